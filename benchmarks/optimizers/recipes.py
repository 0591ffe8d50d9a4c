"""The optimizers under comparison, by name."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax
import optax
import optax.contrib

import tekfac_jax
from benchmarks.errors import UsageError
from benchmarks.optimizers.soap import soap
from tekfac_jax._optimizer import refresh

# Settings that may be kept in the optimizer's state if they are numbers: one compiled step then
# serves all their values.
_TRACEABLE = frozenset(
    {"learning_rate", "damping", "trace_floor", "damping_scale", "kl_clip", "momentum"}
)


class Recipe(NamedTuple):
    """How an optimizer is made, and where the search for its learning rate starts."""

    make: Callable[..., optax.GradientTransformation]
    second_order: bool
    start: float  # the middle one of the first three learning rates


def _sgd(learning_rate: Any, momentum: Any = 0.9) -> optax.GradientTransformation:
    return optax.sgd(learning_rate, momentum=momentum)


def _kron(learning_rate: Any, update_probability: float = 0.03) -> optax.GradientTransformation:
    """PSGD Kron; by default it updates its factors at the final rate of its own schedule."""
    kron = importlib.import_module("psgd_jax.kron").kron
    tx = kron(learning_rate, preconditioner_update_probability=update_probability)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(updates, state, params)  # its signature promises more

    return optax.GradientTransformation(tx.init, update)


def tekfac_momentum_first(
    learning_rate: Any, layers: tekfac_jax.Layers, *, momentum: Any = 0.9, **options: Any
) -> optax.GradientTransformation:
    """TEKFAC that preconditions the average of the gradients instead of averaging the steps.

    Gradients that the layers do not cover go to Adam unchanged.
    """
    uncovered = {path for path, _ in layers.uncovered}

    def covered(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/") not in uncovered,
            params,
        )

    return optax.chain(
        optax.masked(optax.trace(momentum), covered),
        tekfac_jax.tekfac(learning_rate, layers, momentum=None, **options),
    )


def tekfac_without_transport(
    learning_rate: Any, layers: tekfac_jax.Layers, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """TEKFAC whose Θ keeps its values when the basis changes, for an ablation only.

    The library always moves Θ into the new basis; here that step is patched out.
    """
    tx = tekfac_jax.tekfac(learning_rate, layers, **options)

    def update(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(refresh, "transport", lambda theta, rest, old, new: (theta, rest)):
            return tx.update(*args, **kwargs)

    return optax.GradientTransformationExtraArgs(tx.init, update)


for _ablated in (tekfac_momentum_first, tekfac_without_transport):
    _ablated.__signature__ = inspect.signature(tekfac_jax.tekfac)  # pyright: ignore


RECIPES = {
    "tekfac": Recipe(tekfac_jax.tekfac, True, 0.01),
    "tkfac": Recipe(tekfac_jax.tkfac, True, 0.01),
    "ekfac": Recipe(tekfac_jax.ekfac, True, 0.01),
    "kfac": Recipe(tekfac_jax.kfac, True, 0.01),
    "sgd": Recipe(_sgd, False, 0.1),
    "adam": Recipe(optax.adam, False, 0.001),
    "adamw": Recipe(optax.adamw, False, 0.001),
    "muon": Recipe(optax.contrib.muon, False, 0.01),
    "soap": Recipe(soap, False, 0.003),
    "tekfac-momentum-first": Recipe(tekfac_momentum_first, True, 0.01),
    "tekfac-without-transport": Recipe(tekfac_without_transport, True, 0.01),
}
if importlib.util.find_spec("psgd_jax") is not None:  # it needs an older optax: `benchmarks.peers`
    RECIPES["kron"] = Recipe(_kron, False, 0.001)
OPTIMIZERS = tuple(RECIPES)


class Curvature(NamedTuple):
    """Settings of the second-order optimizers; the names are those of `tekfac_jax.tekfac`."""

    factor_interval: int
    eigenbasis_interval: int
    rescaling_interval: int
    damping: Any = "auto"
    stagger: bool = False
    basis_rank: Any = None
    statistics_examples: int | None = None
    damping_scale: float | None = None


def library_interval(name: str) -> int:
    """The library's default."""
    return inspect.signature(tekfac_jax.tekfac).parameters[name].default


class Settings(NamedTuple):
    """Settings of an optimizer, divided by whether a change needs another compilation."""

    static: dict[str, Any]  # part of the compiled step
    traced: dict[str, float]  # numbers in the optimizer's state


def divide(settings: Mapping[str, Any]) -> Settings:
    """Numbers that may change without another compilation, and everything else."""
    traced = {
        name: float(value)
        for name, value in settings.items()
        if name in _TRACEABLE and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return Settings({k: v for k, v in settings.items() if k not in traced}, traced)


def make_optimizer(
    name: str,
    layers: tekfac_jax.Layers | None,
    static: Mapping[str, Any],
    traced: Mapping[str, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that keeps its learning rate, and other numbers on request, in its state.

    One compiled step then serves every value: a search recompiles nothing, and all optimizers share
    one schedule of a few lines.

    Args:
        name: one of `OPTIMIZERS`.
        layers: from `tekfac_jax.find_layers`; None for a first-order optimizer.
        static: further arguments of the optimizer.
        traced: arguments kept in the state, each with any valid value; None: the learning rate.

    Returns:
        Transformation to be used with `set_hyperparams`.

    Raises:
        UsageError: a setting that the optimizer does not have.
    """
    recipe = RECIPES[name]
    traced = {"learning_rate": 0.0} if traced is None else dict(traced)
    parameters = set(inspect.signature(recipe.make).parameters)
    unknown = sorted({*static, *traced} - parameters)
    if unknown:
        raise UsageError(
            f"{name} has no setting {unknown[0]!r}: choose from {', '.join(sorted(parameters))}"
        )
    make = optax.inject_hyperparams(recipe.make, static_args=parameters - set(traced))
    arguments = {**traced, **static, **({"layers": layers} if recipe.second_order else {})}
    return make(**arguments)


def set_hyperparams(opt_state: Any, values: Mapping[str, Any]) -> Any:
    """The optimizer state with other values for the settings that it keeps."""
    return opt_state._replace(hyperparams={**opt_state.hyperparams, **values})
