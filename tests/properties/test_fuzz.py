"""Fuzzing the public interface: random networks and options, and random mistakes."""

import functools
import re

import jax
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import tekfac_jax as tekfac
from tekfac_jax._optimizer.options import Options
from tests.capturing import simple_case, x64_standard
from tests.properties import fuzzing, fuzzing_nnx, misuses

# The same examples each time, so that a failure is due to the change at hand. Each example is a
# program to compile, so there are few, and failing ones are not shrunk.
FEW = settings(
    max_examples=3, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck), phases=[Phase.generate],
)  # fmt: skip
MANY = settings(FEW, max_examples=36)


def check_network(network, setting):
    problem, refusal = None, ""
    try:
        problem = fuzzing.make_problem(network)
    except ValueError as error:
        refusal = str(error)
    if problem is None:
        assert re.match("no layer can be captured|argument 0 holds no arrays", refusal)
        return
    fuzzing.assert_covered_or_listed(problem)
    fuzzing.assert_captured_exactly(network, problem)
    steps = fuzzing.run_steps(problem, setting)
    fuzzing.assert_dense_solves(problem, setting, steps)
    fuzzing.assert_split_is_whole(network, problem, setting, steps[0])


@x64_standard
@FEW
@given(network=fuzzing.networks(), setting=fuzzing.settings_of())
def test_any_network_any_options(network, setting):
    check_network(network, setting)


@pytest.mark.slow
@x64_standard
@MANY
@given(network=fuzzing.networks(), setting=fuzzing.settings_of())
def test_many_networks_many_options(network, setting):
    check_network(network, setting)


def check_nnx(network):
    network = fuzzing_nnx.bare(network)
    try:
        problem = fuzzing.make_problem(network)
    except ValueError:
        return  # its message is tested above
    fuzzing_nnx.assert_layers_of_linen(network, problem)
    network = fuzzing_nnx.precise(network)
    fuzzing_nnx.assert_numbers_of_linen(network, fuzzing.make_problem(network))


# Flax keeps the averages of a BatchNorm in float32.
of_float32_averages = pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")


@of_float32_averages
@x64_standard
@settings(FEW, max_examples=2)
@given(network=fuzzing.networks())
def test_any_nnx_module_is_its_linen_module(network):
    check_nnx(network)


@pytest.mark.slow
@of_float32_averages
@x64_standard
@MANY
@given(network=fuzzing.networks())
def test_many_nnx_modules_are_their_linen_modules(network):
    check_nnx(network)


# --- mistakes --------------------------------------------------------------------------------


def _is_number(value):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < 1e38 and not (isinstance(value, int) and value >= 2**31)


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_positive(value):
    return _is_number(value) and value > 1e-37


def _is_flag(value):
    return isinstance(value, bool)


# What the documentation permits besides words of a list.
ALLOWED = {
    **dict.fromkeys(("factor_interval", "eigenbasis_interval", "rescaling_interval"), _is_count),
    **dict.fromkeys(
        ("factor_decay", "rescaling_decay", "momentum"), lambda v: _is_number(v) and v < 1
    ),
    **dict.fromkeys(("damping", "damping_scale", "kl_clip"), _is_positive),
    **dict.fromkeys(("trace_floor", "weight_decay"), _is_number),
    **dict.fromkeys(("max_failures", "max_dim", "statistics_examples"), _is_count),
    **dict.fromkeys(("stagger", "early_refreshes", "shard_state"), _is_flag),
    "learning_rate": lambda v: _is_number(v) or callable(v),
    "basis_rank": lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0,
}
MAY_BE_NONE = {
    "statistics_examples", "basis_rank", "max_dim", "max_failures", "axis_name", "mesh",
    "mesh_axis", "factor_dtype", "momentum", "kl_clip", "fallback",
}  # fmt: skip
OF_READY = ("learning_rate", "momentum", "weight_decay", "kl_clip", "fallback")


@pytest.mark.parametrize("option", [*Options._fields, *OF_READY])
def test_any_value_of_an_option(option):
    """Each value is refused by an error that names the option, or is permitted and works."""
    loss, params, x, layers = simple_case()

    def step(value):
        if option in OF_READY:
            tx = tekfac.tekfac(**{"learning_rate": 0.1, "layers": layers, option: value})
        else:
            tx = tekfac.scale_by_tekfac(layers, **{option: value})

        def run(params, x):
            _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
            return tx.update(grads, tx.init(params), params, stats=stats)

        if option != "learning_rate" or not callable(value):  # a schedule may raise its own errors
            jax.eval_shape(run, params, x)

    allowed = ALLOWED.get(option, lambda value: False)
    for value in misuses.JUNK:
        works = misuses.assert_ours(functools.partial(step, value), option)
        fits = allowed(value) or (value is None and option in MAY_BE_NONE)
        if option == "shard_state":
            fits = value is False or (isinstance(value, bool) and not value)
        assert works == bool(fits), (option, value)


@pytest.mark.parametrize(
    "intervals", [(1000, 999, 997), (2**31 - 1, 1, 1)], ids=["no common divisor", "huge"]
)
def test_staggering_that_cannot_be_laid_out(intervals):
    names = ("factor_interval", "eigenbasis_interval", "rescaling_interval")
    with pytest.raises(ValueError, match=r"stagger=True would try .*shorter\s+intervals"):
        tekfac.scale_by_tekfac(
            simple_case()[-1], stagger=True, **dict(zip(names, intervals, strict=True))
        )


@pytest.mark.parametrize("given", [{}, {"batch_size": 3}])
def test_axis_that_is_not_there(given):
    _, params, _, layers = simple_case()
    tx = tekfac.scale_by_tekfac(layers, axis_name="data")
    with pytest.raises(ValueError, match=r"does not run under .*axis_name='data': .*pmap"):
        tx.update(params, tx.init(params), **given)


NAMES = st.deferred(lambda: st.sampled_from(sorted(misuses.mistakes())))
RANDOM = st.randoms(use_true_random=False)
MISTAKES = settings(FEW, max_examples=120)


@MISTAKES
@given(name=NAMES, rng=RANDOM)
def test_any_mistake(name, rng):
    misuses.assert_ours(lambda: misuses.mistakes()[name](rng))


@pytest.mark.slow
@settings(FEW, max_examples=1500)
@given(name=NAMES, rng=RANDOM)
def test_many_mistakes(name, rng):
    misuses.assert_ours(lambda: misuses.mistakes()[name](rng))


def test_errors_of_the_users_own_code_pass_through():
    _, params, x, layers = simple_case()

    class Mine(Exception):
        pass

    def loss(params, x):
        raise Mine("of the model")

    for call in (
        lambda: tekfac.find_layers(loss, params, x),
        lambda: tekfac.value_grad_and_stats(loss, layers)(params, x),
        lambda: tekfac.fisher_stats(loss, layers, likelihood=tekfac.Gaussian())(
            params, x, key=jax.random.key(0)
        ),
    ):
        with pytest.raises(Mine, match="of the model"):
            call()
