"""Finding the eigenbasis of a factor: from scratch, or from the basis that was there before."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from tekfac_jax._curvature.eigenbasis import HIGHEST, matrix_trace
from tekfac_jax._layers.spec import zeros_like

# A factor of so few rows is decomposed in closed form.
SMALL = 2

# A basis Q of Φ is good enough where ‖ΦQ − QΛ‖ is at most this share of ‖Φ‖, Λ = diag(QᵀΦQ).
TOLERANCE = 0.01
_SMALL_EIGH = 256  # of so many rows `eigh` takes few milliseconds, and less to compile
_PASSES = 2  # of subspace iteration, before a decomposition from scratch
_PROBES = 4  # random directions in which eigenvectors that are missing are looked for
Method = Literal["eigh", "subspace", "auto"]


def starts_from_old_basis(dim: int, rank: int, method: Method) -> bool:
    """Whether the basis before is of use: where `eigh` of all `dim` is not as cheap."""
    if dim <= SMALL or method == "eigh":
        return False
    return method == "subspace" or (dim > _SMALL_EIGH and 2 * rank <= dim)


def eigenvectors(
    factor: Float[Array, "*lead d d"], mine: Bool[Array, "*lead"] | None = None
) -> Float[Array, "*lead d d"]:
    """Eigenvectors of symmetric factors (Eq. 3.1), not a number where they cannot be found.

    A factor is divided by its trace first: eigenvectors do not care, and float32 neither
    over- nor underflows. `eigh` answers bad input with NaN instead of an error. With `mine` only
    those for which it is true are computed, and zero stands for the others.
    """
    factor = _unit_trace(factor)
    if factor.shape[-1] <= SMALL:
        q = _small_eigh(factor)
        return q if mine is None else jnp.where(mine[..., None, None], q, 0)
    if mine is None and factor.ndim > 2:
        flat = factor.reshape(-1, *factor.shape[-2:])
        # Batched LAPACK calls can deadlock on CPU; on GPU a batched call is what is fast.
        q = lax.platform_dependent(flat, cpu=lambda x: lax.map(_eigh, x), default=jax.vmap(_eigh))
        return q.reshape(factor.shape)
    return _one_by_one(_eigh, mine, factor)


def updated_eigenvectors(
    factor: Float[Array, "*lead d d"],
    old: Float[Array, "*lead d r"],
    valid: Bool[Array, "*lead"],
    mine: Bool[Array, "*lead"] | None = None,
) -> Float[Array, "*lead d r"]:
    """The top eigenvectors, from those of an earlier factor where `valid`.

    An old basis that still diagonalises the factor is kept as it is. Otherwise subspace iteration
    with Rayleigh-Ritz (Saad 2011, ch. 5) improves it, and where a few passes do not reach
    `TOLERANCE`, `eigh` finds the basis from scratch. Of a truncated basis random probes outside of
    it tell whether a larger eigenvalue than the smallest that is kept has grown there: the residual
    does not see that.
    """
    return _one_by_one(_update, mine, _unit_trace(factor), old, valid)


def residual(
    factor: Float[Array, "*lead d d"], q: Float[Array, "*lead d r"]
) -> Float[Array, "*lead"]:
    """‖ΦQ − QΛ‖ / ‖Φ‖, Λ = diag(QᵀΦQ): of a whole basis ‖offdiag(QᵀΦQ)‖ / ‖Φ‖."""
    image = jnp.matmul(factor, q, precision=HIGHEST)
    values = jnp.sum(q * image, axis=-2, keepdims=True)
    norm, off = (jnp.linalg.norm(x, axis=(-2, -1)) for x in (factor, image - q * values))
    return off / jnp.where(norm > 0, norm, 1)


class _Iterate(NamedTuple):
    """A basis on its way; of one factor."""

    q: jax.Array  # (d, r) orthonormal, eigenvalues ascending
    image: jax.Array  # (d, r) ΦQ
    probes: jax.Array  # (d, p) unit vectors outside of Q, after one multiplication with Φ
    error: jax.Array  # () how far Q is from the top eigenvectors, over ‖Φ‖
    passes: jax.Array  # () after the first, which only measures the basis that was there before


def _update(factor: Array, old: Array, valid: Array) -> Array:
    """`updated_eigenvectors` of one factor with trace one."""

    def as_it_is(it: _Iterate) -> tuple[Array, Array]:
        return it.q, jnp.matmul(factor, it.q, precision=HIGHEST)

    def one_more(it: _Iterate) -> _Iterate:
        improved = functools.partial(_improved, factor)
        q, image = lax.cond(it.passes < 0, as_it_is, improved, it)
        return _measured(factor, q, image, it.passes + 1)

    nothing = jax.eval_shape(lambda: _measured(factor, old, factor @ old, jnp.int32(valid)))
    start = jax.tree.map(zeros_like, nothing)._replace(
        q=old, error=lax.full_like(nothing.error, jnp.inf), passes=jnp.where(valid, -1, _PASSES)
    )
    end = lax.while_loop(lambda it: (it.error > TOLERANCE) & (it.passes < _PASSES), one_more, start)
    rank = old.shape[-1]
    return lax.cond(end.error <= TOLERANCE, lambda: end.q, lambda: _eigh(factor)[:, -rank:])


def _improved(factor: Array, it: _Iterate) -> tuple[Array, Array]:
    """Q ← the part of span[ΦQ, probes] in which Φ is largest, and ΦQ."""
    rank = it.q.shape[-1]
    # The largest first: a column takes from those before it.
    block = jnp.concatenate([it.image[:, ::-1], it.probes], axis=-1)
    q = jnp.linalg.qr(block)[0]
    image = jnp.matmul(factor, q, precision=HIGHEST)
    if it.probes.shape[-1]:
        ritz = _eigh(jnp.matmul(q.T, image, precision=HIGHEST))[:, -rank:]
        q, image = (jnp.matmul(x, ritz, precision=HIGHEST) for x in (q, image))
    else:  # Rayleigh-Ritz in all dimensions would be the decomposition from scratch
        q, image = q[:, ::-1], image[:, ::-1]
    return q, image


def _measured(factor: Array, q: Array, image: Array, passes: Array) -> _Iterate:
    def outside(x: Array) -> Array:
        inside = jnp.matmul(q, jnp.matmul(q.T, x, precision=HIGHEST), precision=HIGHEST)
        return x - inside

    norm = jnp.linalg.norm(factor)
    values = jnp.sum(q * image, axis=0)
    error = jnp.linalg.norm(image - q * values)
    dim, rank = q.shape
    probes = jnp.zeros((dim, 0), q.dtype)
    if rank < dim:
        shape = (dim, min(_PROBES, dim - rank))
        directions = jnp.asarray(np.random.default_rng(0).normal(size=shape), q.dtype)
        probes = outside(jnp.matmul(factor, outside(directions), precision=HIGHEST))
        lengths = jnp.linalg.norm(probes, axis=0)
        probes = probes / jnp.where(lengths > 0, lengths, 1)
        # No larger than the largest eigenvalue outside.
        quotients = jnp.sum(probes * jnp.matmul(factor, probes, precision=HIGHEST), axis=0)
        error = jnp.maximum(error, jnp.max(quotients) - jnp.min(values))
    return _Iterate(q, image, probes, error / jnp.where(norm > 0, norm, 1), passes)


def _eigh(factor: Float[Array, "d d"]) -> Float[Array, "d d"]:
    return jnp.linalg.eigh(factor, symmetrize_input=False)[1]


def _unit_trace(factor: Float[Array, "*lead d d"]) -> Float[Array, "*lead d d"]:
    total = matrix_trace(factor)[..., None, None]
    return factor / jnp.where(total > 0, total, 1)


def _one_by_one(function: Any, mine: Array | None, *arguments: Array) -> Array:
    """Maps a function of one factor over `*lead`; zeros for those that are not `mine`."""

    def one(arguments: tuple[Array, ...], mine: Array | None) -> Array:
        if mine is None:
            return function(*arguments)
        like = jax.eval_shape(function, *arguments)
        return lax.cond(mine, lambda: function(*arguments), lambda: zeros_like(like))

    lead = arguments[0].shape[:-2]
    if not lead:
        return one(arguments, mine)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(lead) :]), (arguments, mine))
    q = lax.map(lambda each: one(*each), flat)
    return q.reshape(*lead, *q.shape[1:])


def _small_eigh(factor: Float[Array, "*lead d d"]) -> Float[Array, "*lead d d"]:
    """Of one or two dimensions: a rotation in closed form, for very many factors at once."""
    if factor.shape[-1] == 1:
        return factor * 0 + 1  # not a number where the factor is none
    a, b, c = factor[..., 0, 0], factor[..., 0, 1], factor[..., 1, 1]
    angle = jnp.atan2(2 * b, a - c) / 2  # of the larger eigenvalue's vector
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([-sin, cos], axis=-1), jnp.stack([cos, sin], axis=-1)], axis=-2)
