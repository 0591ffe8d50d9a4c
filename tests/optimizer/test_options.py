"""A wrong option raises an error that names it, its value and what is permitted."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import tekfac_jax as tekfac
from tests.capturing import simple_case
from tests.oracles import SCALE_BY

# option -> (values out of range, what the error says besides name and value)
_BAD_OPTIONS = {
    "factor_interval": ((0, -1, 2.5, True, "often", None, np.array(0)), "1 or more"),
    "eigenbasis_interval": ((0, -50, jnp.array(-1)), "1 or more"),
    "rescaling_interval": ((0, float("nan"), np.int64(0)), "1 or more"),
    "factor_decay": ((1, 1.0, -0.1, float("nan"), "0.9", np.float32(1)), r"\[0, 1\)"),
    "rescaling_decay": ((1.5, None, jnp.array(-0.5)), r"\[0, 1\)"),
    "damping": ((0, -1.0, float("inf"), "none", None, np.float32(-1)), r"\(0, inf\)|\"trace\""),
    "trace_floor": ((-1e-9, float("nan")), r"\[0, inf\)"),
    "damping_scale": ((0, -1, jnp.zeros(())), r"\(0, inf\)"),
    "fc_damping": (("alpha", None, 1.0), '"beta", "own"'),
    "damping_form": (("pi", None, True), '"exact", "factored"'),
    "factors": (("Exact", None), '"exact", "location"'),
    "rescaling": (("never", 1), '"exact", "running"'),
    "factor_dtype": ((jnp.float16, "bfloat16", jnp.int32), "float32 or float64"),
}
_BAD_READY_OPTIONS = {
    "learning_rate": ((-0.1, float("nan"), "fast"), r"\[0, inf\)"),
    "momentum": ((1.0, -0.1, np.float64(2)), r"\[0, 1\)"),
    "weight_decay": ((-1e-4, None), r"\[0, inf\)"),
    "kl_clip": ((0.0, -1e-3, "off"), r"\(0, inf\)"),
}


def _cases(options):
    return [
        pytest.param(name, value, says, id=f"{name}={value!r}")
        for name, (values, says) in options.items()
        for value in values
    ]


@pytest.mark.parametrize(("option", "value", "says"), _cases(_BAD_OPTIONS))
def test_options_out_of_range(option, value, says):
    layers = simple_case()[-1]
    shown = jnp.dtype(value).name if option == "factor_dtype" else str(value)
    for scale_by in SCALE_BY.values():
        with pytest.raises(ValueError, match=f"{option} must be .*({says})") as error:
            scale_by(layers, **{option: value})
        assert shown in str(error.value)
    for ready in (tekfac.tekfac, tekfac.tkfac, tekfac.ekfac, tekfac.kfac):
        with pytest.raises(ValueError, match=f"{option} must be"):
            ready(0.1, layers, **{option: value})


@pytest.mark.parametrize("member", SCALE_BY)
def test_factored_damping_only_where_there_are_factors(member):
    layers, factored = simple_case()[-1], {"damping_form": "factored"}
    if member in ("tekfac", "ekfac"):
        with pytest.raises(ValueError, match=r'"factored" is for KFAC and TKFAC.*"exact"'):
            SCALE_BY[member](layers, **factored)
        return
    for option in ({"basis_rank": "auto"}, {"max_dim": 4}):
        with pytest.raises(ValueError, match=f"all eigenvectors, and {next(iter(option))}"):
            SCALE_BY[member](layers, **factored, **option)


@pytest.mark.parametrize(("option", "value", "says"), _cases(_BAD_READY_OPTIONS))
def test_options_of_the_ready_optimizers_out_of_range(option, value, says):
    options = {"learning_rate": 0.1, option: value}
    for ready in (tekfac.tekfac, tekfac.tkfac, tekfac.ekfac, tekfac.kfac):
        with pytest.raises(
            ValueError, match=f"{option} must be .*({says}).*{re.escape(str(value))}"
        ):
            ready(options["learning_rate"], simple_case()[-1], **_without_rate(options))


def _without_rate(options):
    return {name: value for name, value in options.items() if name != "learning_rate"}


@pytest.mark.parametrize("option", ["momentun", "layer", "damp"])
def test_unknown_options(option):
    layers = simple_case()[-1]
    for name, scale_by in SCALE_BY.items():
        with pytest.raises(TypeError, match=f"'{option}'"):
            scale_by(layers, **{option: 1})
        with pytest.raises(TypeError, match=f"no argument '{option}'"):
            getattr(tekfac, name)(0.1, layers, **{option: 1})


def test_an_option_that_is_nearly_one():
    with pytest.raises(TypeError, match=r"no argument 'dampign', did you mean 'damping'"):
        tekfac.kfac(0.1, simple_case()[-1], dampign=1)


def test_scalar_arrays_within_range_are_options():
    options = {"factor_interval": np.int64(2), "damping": np.float32(0.1), "factor_decay": 0}
    tekfac.scale_by_tekfac(simple_case()[-1], **options)
    tekfac.tekfac(np.float32(0.1), simple_case()[-1], momentum=jnp.array(0.5), **options)


def test_arguments_of_ready_optimizers():
    *_, layers = simple_case()
    with pytest.raises(ValueError, match="must be a number or a schedule, got Layers: pass it fir"):
        tekfac.tekfac(layers, 0.1)
    with pytest.raises(ValueError, match=r"or an optax schedule; pass η, not −η"):
        tekfac.kfac("0.1", layers)
    with pytest.raises(TypeError, match="no argument 'kl_cilp', did you mean 'kl_clip'"):
        tekfac.tekfac(0.1, layers, kl_cilp=1e-3)
    with pytest.raises(TypeError, match=r"choose from learning_rate, momentum, .*, factor_interv"):
        tekfac.ekfac(0.1, layers, nesterov=True)
