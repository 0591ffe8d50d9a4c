"""Finding the eigenbasis of a factor, from scratch or from the previous basis."""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `lax.cond`, `jax.eval_shape` and others untyped.

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from tekfac_jax._curvature.eigenbasis import HIGHEST, matrix_trace
from tekfac_jax._layers.spec import zeros_like

# Factors with at most so many rows are decomposed in closed form.
SMALL = 2

# A basis Q of Φ is accepted if ‖ΦQ − QΛ‖ ≤ TOLERANCE · ‖Φ‖, where Λ = diag(QᵀΦQ).
TOLERANCE = 0.01
_SMALL_EIGH = 256  # up to so many rows `eigh` takes a few milliseconds, and compiles sooner
_PASSES = 2  # of subspace iteration before a decomposition from scratch
_PROBES = 4  # random directions that search for missing eigenvectors
Method = Literal["eigh", "subspace", "auto"]


def starts_from_old_basis(dim: int, rank: int, method: Method) -> bool:
    """Whether to start from the previous basis: if `eigh` of all `dim` rows would cost more."""
    if dim <= SMALL or method == "eigh":
        return False
    return method == "subspace" or (dim > _SMALL_EIGH and 2 * rank <= dim)


def eigenvectors(
    factor: Float[Array, "*lead d d"], wanted: Bool[Array, "*lead"] | None = None
) -> Float[Array, "*lead d d"]:
    """Eigenvectors of symmetric factors (Eq. 3.1); NaN where they cannot be found.

    Each factor is first divided by its trace: this leaves the eigenvectors unchanged, and float32
    neither over- nor underflows. `eigh` answers bad input with NaN instead of an error. Where
    `wanted` is False, nothing is computed and the result is zero.
    """
    factor = _unit_trace(factor)
    if factor.shape[-1] <= SMALL:
        q = _small_eigh(factor)
        return q if wanted is None else jnp.where(wanted[..., None, None], q, 0)
    if wanted is None and factor.ndim > 2:
        # Batched LAPACK calls can deadlock on CPU; on GPU only a batched call is fast.
        flat = factor.reshape(-1, *factor.shape[-2:])

        def one_by_one(flat: Array) -> Array:
            return cast(Array, lax.map(_eigh, flat))

        q = cast(Array, lax.platform_dependent(flat, cpu=one_by_one, default=jax.vmap(_eigh)))
        return q.reshape(factor.shape)
    return _one_by_one(_eigh, wanted, factor)


def updated_eigenvectors(
    factor: Float[Array, "*lead d d"],
    old: Float[Array, "*lead d r"],
    valid: Bool[Array, "*lead"],
    wanted: Bool[Array, "*lead"] | None = None,
) -> Float[Array, "*lead d r"]:
    """The top eigenvectors, starting from those of an earlier factor where `valid`.

    An old basis that still diagonalises the factor is kept. Otherwise subspace iteration with
    Rayleigh-Ritz (Saad 2011, ch. 5) improves it. If a few passes do not reach `TOLERANCE`, `eigh`
    finds the basis from scratch. For a truncated basis, random probes outside of it detect
    eigenvalues that have grown beyond the smallest kept one: the residual does not show these.
    """
    return _one_by_one(_update, wanted, _unit_trace(factor), old, valid)


def residual(
    factor: Float[Array, "*lead d d"], q: Float[Array, "*lead d r"]
) -> Float[Array, "*lead"]:
    """‖ΦQ − QΛ‖ / ‖Φ‖ with Λ = diag(QᵀΦQ); for a whole basis ‖offdiag(QᵀΦQ)‖ / ‖Φ‖."""
    image = jnp.matmul(factor, q, precision=HIGHEST)
    values = jnp.sum(q * image, axis=-2, keepdims=True)
    norm, off = (_norm(x, axis=(-2, -1)) for x in (factor, image - q * values))
    return off / jnp.where(norm > 0, norm, 1)


class _Iterate(NamedTuple):
    """One factor's basis during subspace iteration."""

    q: jax.Array  # (d, r) orthonormal, eigenvalues ascending
    image: jax.Array  # (d, r) ΦQ
    probes: jax.Array  # (d, p) unit vectors outside of Q, after one multiplication by Φ
    error: jax.Array  # () how far Q is from the top eigenvectors, relative to ‖Φ‖
    passes: jax.Array  # () so far, without the first, which only measures the old basis


def _update(factor: Array, old: Array, valid: Array) -> Array:
    """`updated_eigenvectors` of one factor with trace one."""

    def unchanged(it: _Iterate) -> tuple[Array, Array]:
        return it.q, jnp.matmul(factor, it.q, precision=HIGHEST)

    def next_pass(it: _Iterate) -> _Iterate:
        improved = functools.partial(_improved, factor)
        q, image = cast(tuple[Array, Array], lax.cond(it.passes < 0, unchanged, improved, it))
        return _measured(factor, q, image, it.passes + 1)

    def goes_on(it: _Iterate) -> Array:
        return (it.error > TOLERANCE) & (it.passes < _PASSES)

    # The first pass measures the old basis; without a valid one there is none.
    like: _Iterate = jax.eval_shape(lambda: _measured(factor, old, factor @ old, jnp.int32(valid)))
    start: _Iterate = jax.tree.map(zeros_like, like)._replace(
        q=old, error=lax.full_like(like.error, jnp.inf), passes=jnp.where(valid, -1, _PASSES)
    )
    end = lax.while_loop(goes_on, next_pass, start)

    # What did not converge is decomposed from scratch.
    rank = old.shape[-1]
    is_found = end.error <= TOLERANCE
    return cast(Array, lax.cond(is_found, lambda: end.q, lambda: _eigh(factor)[:, -rank:]))


def _improved(factor: Array, it: _Iterate) -> tuple[Array, Array]:
    """The orthonormal Q in span[ΦQ_old, probes] for which Φ is largest, and ΦQ."""
    rank = it.q.shape[-1]
    # Largest eigenvalues first: QR orthogonalises each column against those before it.
    block = jnp.concatenate([it.image[:, ::-1], it.probes], axis=-1)
    q = jnp.linalg.qr(block)[0]
    image = jnp.matmul(factor, q, precision=HIGHEST)
    if it.probes.shape[-1]:
        ritz = _eigh(jnp.matmul(q.T, image, precision=HIGHEST))[:, -rank:]
        q, image = (jnp.matmul(x, ritz, precision=HIGHEST) for x in (q, image))
    else:  # Rayleigh-Ritz in all dimensions would be a decomposition from scratch
        q, image = q[:, ::-1], image[:, ::-1]
    return q, image


def _measured(factor: Array, q: Array, image: Array, passes: Array) -> _Iterate:
    """How far a basis is from the top eigenvectors, with the probes that tell."""
    norm = _norm(factor)
    values = jnp.sum(q * image, axis=0)
    error = _norm(image - q * values)
    probes = _probes(factor, q)
    if probes.shape[-1]:
        # Rayleigh quotients bound the largest eigenvalue outside of Q from below.
        quotients = jnp.sum(probes * jnp.matmul(factor, probes, precision=HIGHEST), axis=0)
        error = jnp.maximum(error, jnp.max(quotients) - jnp.min(values))
    return _Iterate(q, image, probes, error / jnp.where(norm > 0, norm, 1), passes)


def _probes(factor: Array, q: Array) -> Array:
    """A few unit vectors orthogonal to Q, turned towards the large eigenvalues there."""

    def without_q(x: Array) -> Array:
        inside = jnp.matmul(q, jnp.matmul(q.T, x, precision=HIGHEST), precision=HIGHEST)
        return x - inside

    dim, rank = q.shape
    if rank == dim:
        return jnp.zeros((dim, 0), q.dtype)
    shape = (dim, min(_PROBES, dim - rank))
    directions = jnp.asarray(np.random.default_rng(0).normal(size=shape), q.dtype)
    probes = without_q(jnp.matmul(factor, without_q(directions), precision=HIGHEST))
    lengths = _norm(probes, axis=0)
    return probes / jnp.where(lengths > 0, lengths, 1)


def _norm(x: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """`jnp.linalg.norm`, which JAX leaves untyped."""
    return cast(Array, jnp.linalg.norm(x, axis=axis))


def _eigh(factor: Float[Array, "d d"]) -> Float[Array, "d d"]:
    return cast(Array, jnp.linalg.eigh(factor, symmetrize_input=False)[1])


def _unit_trace(factor: Float[Array, "*lead d d"]) -> Float[Array, "*lead d d"]:
    total = matrix_trace(factor)[..., None, None]
    return factor / jnp.where(total > 0, total, 1)


def _one_by_one(function: Callable[..., Array], wanted: Array | None, *arguments: Array) -> Array:
    """Maps a function of one factor over `*lead`; zeros for those that are not `wanted`."""

    def one(each: tuple[tuple[Array, ...], Array | None]) -> Array:
        arguments, wanted = each
        if wanted is None:
            return function(*arguments)
        like = jax.eval_shape(function, *arguments)
        return cast(Array, lax.cond(wanted, lambda: function(*arguments), lambda: zeros_like(like)))

    lead = arguments[0].shape[:-2]
    if not lead:
        return one((arguments, wanted))

    def flat(x: Array) -> Array:
        return x.reshape(-1, *x.shape[len(lead) :])

    q = cast(Array, lax.map(one, jax.tree.map(flat, (arguments, wanted))))
    return q.reshape(*lead, *q.shape[1:])


def _small_eigh(factor: Float[Array, "*lead d d"]) -> Float[Array, "*lead d d"]:
    """In one or two dimensions: a rotation in closed form, for very many factors at once."""
    if factor.shape[-1] == 1:
        return factor * 0 + 1  # NaN where the factor is NaN
    a, b, c = factor[..., 0, 0], factor[..., 0, 1], factor[..., 1, 1]
    angle = jnp.atan2(2 * b, a - c) / 2  # of the eigenvector with the larger eigenvalue
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([-sin, cos], axis=-1), jnp.stack([cos, sin], axis=-1)], axis=-2)
