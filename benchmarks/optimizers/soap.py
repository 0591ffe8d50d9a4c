"""SOAP (Vyas et al. 2024, arXiv:2409.11321) as an optax transformation, as a peer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax


class _Leaf(NamedTuple):
    mean: jax.Array  # of the gradient, in the standard basis
    square: jax.Array  # of the rotated gradient
    factors: tuple[jax.Array, ...]  # L = E[G Gᵀ] and R = E[Gᵀ G]; none for a vector
    bases: tuple[jax.Array, ...]


class SoapState(NamedTuple):
    """Steps taken, and for each parameter Adam's averages and the two bases they are kept in."""

    steps: jax.Array
    leaves: Any


def soap(
    learning_rate: Any,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    interval: int = 10,
    max_dim: int = 10_000,
) -> optax.GradientTransformation:
    """Adam in the eigenbasis of Shampoo's factors (Algorithm 3 of the paper).

    Kernels are reshaped to (all inputs, outputs). Vectors, and sides longer than `max_dim`, are not
    rotated. The first step only sets up factors and bases: if its gradient entered the mean but not
    the squares, unbounded steps would follow. Every `interval` steps one orthogonal iteration
    updates each basis (Algorithm 4, without its reordering of the averages).

    Args:
        learning_rate: number or schedule.
        b1: decay of the mean.
        b2: decay of squares and factors.
        eps: added to the root of the squares.
        interval: steps between updates of the bases.
        max_dim: longer sides keep the standard basis.

    Returns:
        `optax.GradientTransformation`.
    """

    def init(params: Any) -> SoapState:
        def leaf(p: jax.Array) -> _Leaf:
            m = jnp.zeros_like(_matrix(p))
            dims = [d for d in m.shape if d <= max_dim] if p.ndim > 1 else []
            eyes = tuple(jnp.eye(d, dtype=p.dtype) for d in dims)
            # Separate buffers, since a step donates them.
            return _Leaf(m, jnp.zeros_like(m), tuple(jnp.zeros_like(e) for e in eyes), eyes)

        return SoapState(jnp.zeros((), jnp.int32), jax.tree.map(leaf, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, SoapState]:
        del params
        flat, tree = jax.tree.flatten(updates)
        pairs = [
            _step(_matrix(g), leaf, state.steps, b1, b2, eps, interval, max_dim)
            for g, leaf in zip(flat, tree.flatten_up_to(state.leaves), strict=True)
        ]
        moved = [u.reshape(g.shape) for (u, _), g in zip(pairs, flat, strict=True)]
        new = SoapState(state.steps + 1, tree.unflatten([leaf for _, leaf in pairs]))
        return tree.unflatten(moved), new

    return optax.chain(
        optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate)
    )


def _matrix(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(1, -1)


def _step(
    g: jax.Array, leaf: _Leaf, count: jax.Array, b1: float, b2: float, eps: float,
    interval: int, max_dim: int,
) -> tuple[jax.Array, _Leaf]:  # fmt: skip
    is_rotated = [bool(leaf.bases) and d <= max_dim for d in g.shape]

    def rotate(x: jax.Array, bases: tuple[jax.Array, ...], back: bool) -> jax.Array:
        own = list(bases)
        if is_rotated[0]:
            q = own.pop(0)
            x = (q if back else q.T) @ x
        return x @ (own[0].T if back else own[0]) if is_rotated[1] else x

    products = [g @ g.T] * is_rotated[0] + [g.T @ g] * is_rotated[1]
    factors = tuple(
        b2 * old + (1 - b2) * new for old, new in zip(leaf.factors, products, strict=True)
    )
    rotated = rotate(g, leaf.bases, back=False)
    mean = jnp.where(count > 0, b1 * leaf.mean + (1 - b1) * g, leaf.mean)
    square = jnp.where(count > 0, b2 * leaf.square + (1 - b2) * rotated**2, leaf.square)
    t = jnp.maximum(count, 1).astype(g.dtype)
    direction = rotate(mean, leaf.bases, back=False) / (1 - b1**t)
    direction = direction / (jnp.sqrt(square / (1 - b2**t)) + eps)
    update = jnp.where(count > 0, rotate(direction, leaf.bases, back=True), 0)

    def new_bases() -> tuple[jax.Array, ...]:
        def first() -> tuple[jax.Array, ...]:
            return tuple(jnp.linalg.eigh(f)[1][:, ::-1] for f in factors)

        def iterate() -> tuple[jax.Array, ...]:
            return tuple(jnp.linalg.qr(f @ q)[0] for f, q in zip(factors, leaf.bases, strict=True))

        return lax.cond(count == 0, first, iterate)

    bases = lax.cond(count % interval == 0, new_bases, lambda: leaf.bases)
    return update, _Leaf(mean, square, factors, bases)
