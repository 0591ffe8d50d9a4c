"""The data that capture hands to the optimizer."""

import dataclasses
from typing import Literal, NamedTuple, TypeAlias

import jax


class Capture(NamedTuple):
    """What is captured of one call of a layer.

    Attributes:
        a: the layer's input, as the layer received it (batch axis first); for a normalisation,
            what it multiplies by its scale.
        u: gradient of the loss with respect to the layer's output, in the output's shape.
    """

    a: jax.Array
    u: jax.Array


class Statistics(NamedTuple):
    """Curvature statistics of one batch, as captured.

    Attributes:
        layers: for each layer path one `Capture` per call of the layer.
        scale: what `u` is multiplied by to become the gradient of the summed loss. Shape ().
        examples: number of examples that sums are divided by, shape (); None: the number
            captured.
        parts: how many statistics were added up, shape (); None: 1. Captures cannot be added up,
            and this shows that they were.
    """

    layers: dict[str, tuple[Capture, ...]]
    scale: jax.Array
    examples: jax.Array | None = None
    parts: jax.Array | None = None


FactorKind = Literal["exact", "location", "plain"]


class Reduced(NamedTuple):
    """Sums over examples, for one layer."""

    phi: jax.Array  # (*lead, i, i); for an embedding (*lead, i)
    psi: jax.Array  # (*lead, o, o)
    theta: jax.Array | None  # (*lead, i, o) in the given basis's columns; None without a basis
    rest: jax.Array | None = None  # (*lead) the trace outside of these columns


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReducedStatistics:
    """Curvature statistics of a batch, contracted: those of micro-batches add up.

    ``jax.tree.map(jnp.add, one, other)`` gives the statistics of both.

    Attributes:
        layers: for each layer path its sums over examples.
        examples: how many examples were summed, shape (); 0 where `when` was False.
        factors: which factors they are: ``"exact"``, ``"location"`` or ``"plain"``.
    """

    layers: dict[str, Reduced]
    examples: jax.Array
    factors: FactorKind = dataclasses.field(metadata={"static": True})


StatisticsOfBatch: TypeAlias = Statistics | ReducedStatistics
