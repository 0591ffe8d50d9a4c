"""The optimizers under comparison, by name."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import optax
import optax.contrib

import tekfac_jax
from benchmarks.soap import soap


class Recipe(NamedTuple):
    """How an optimizer is made, and where the search for its learning rate starts."""

    make: Callable[..., optax.GradientTransformation]
    second_order: bool
    start: float  # the middle one of the first three learning rates


RECIPES = {
    "tekfac": Recipe(tekfac_jax.tekfac, True, 0.01),
    "tkfac": Recipe(tekfac_jax.tkfac, True, 0.01),
    "ekfac": Recipe(tekfac_jax.ekfac, True, 0.01),
    "kfac": Recipe(tekfac_jax.kfac, True, 0.01),
    "sgd": Recipe(lambda learning_rate: optax.sgd(learning_rate, momentum=0.9), False, 0.1),
    "adam": Recipe(optax.adam, False, 0.001),
    "muon": Recipe(optax.contrib.muon, False, 0.01),
    "soap": Recipe(soap, False, 0.003),
}
OPTIMIZERS = tuple(RECIPES)


class Curvature(NamedTuple):
    """Settings of the second-order optimizers; the names are those of `tekfac_jax.tekfac`."""

    factor_interval: int
    eigenbasis_interval: int
    rescaling_interval: int
    damping: Any = "auto"
    stagger: bool = False
    basis_rank: Any = None
    rescaling_examples: int | None = None


def library_interval(name: str) -> int:
    """What the library takes where nothing is said."""
    return inspect.signature(tekfac_jax.tekfac).parameters[name].default


def make_optimizer(
    name: str, layers: tekfac_jax.Layers | None, curvature: Curvature
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose learning rate stands in its state.

    So the compiled step serves every learning rate: the search compiles nothing again, and the
    schedule is the same few lines for everybody.

    Args:
        name: one of `OPTIMIZERS`.
        layers: from `tekfac_jax.find_layers`; None for a first-order optimizer.
        curvature: settings of the second-order optimizers, of no effect on the others.

    Returns:
        Transformation to be used with `set_learning_rate`.
    """
    recipe = RECIPES[name]

    def make(learning_rate: Any) -> optax.GradientTransformation:
        if recipe.second_order:
            return recipe.make(learning_rate, layers, **curvature._asdict())
        return recipe.make(learning_rate)

    return optax.inject_hyperparams(make)(learning_rate=0.0)


def set_learning_rate(opt_state: Any, learning_rate: Any) -> Any:
    """The optimizer state with another learning rate."""
    return opt_state._replace(hyperparams={"learning_rate": learning_rate})
