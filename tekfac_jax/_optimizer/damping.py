"""The damping λ of each layer, and the Θ of factors that are damped themselves."""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `lax.cond`, `jax.eval_shape` and others untyped.

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from tekfac_jax._layers.spec import Layers, LayerSpec
from tekfac_jax._optimizer.options import Damping, Options
from tekfac_jax._optimizer.spectrum import Spectrum

FIXED_DAMPING = 1e-3  # λ of Eq. 3.4, for networks without conv layers


def trace_damping(spec: LayerSpec, trace: jax.Array, trace_floor: jax.Array | float) -> jax.Array:
    """λ = max(tr Θ, ϑ) / dim Θ (Eq. 3.5): the mean eigenvalue; broadcasts to (*lead).

    The features of a normalisation layer share one λ.
    """
    number = spec.in_dim * spec.out_dim
    if spec.kind == "norm" and spec.groups > 1:
        trace, number = jnp.sum(trace, axis=-1, keepdims=True), number * spec.groups
    return jnp.maximum(trace, trace_floor) / number


def layer_dampings(
    layers: Layers, spectra: Mapping[str, Spectrum], options: Options
) -> dict[str, jax.Array]:
    """λ of every layer, (*lead), from the options `damping`, `damping_scale` and `fc_damping`.

    ``damping="trace"`` means `trace_damping` (Eq. 3.5), a number means that number (Eq. 3.4), and
    ``"auto"`` means trace damping in a network with conv layers and `FIXED_DAMPING` in any other.
    With ``fc_damping="beta"`` and trace damping, a Dense layer with one position takes the largest
    λ of the conv layers, so that it keeps pace with them.
    """
    # Each layer's own λ.
    convs = _convolutions(layers)
    by_trace = follows_trace(layers, options.damping)
    fixed = FIXED_DAMPING if isinstance(options.damping, str) else options.damping

    def own(path: str) -> jax.Array:
        dtype = spectra[path].trace.dtype
        if by_trace:
            rule = trace_damping(layers[path], spectra[path].trace, options.trace_floor)
        else:
            rule = jnp.asarray(fixed, dtype)
        return jnp.broadcast_to(rule * options.damping_scale, layers[path].lead).astype(dtype)

    dampings = {path: own(path) for path in layers}

    # β replaces it in Dense layers. β is 0 until a conv layer has valid curvature.
    if options.fc_damping == "beta" and convs and by_trace:
        known = [jnp.max(jnp.where(spectra[path].valid, dampings[path], 0)) for path in convs]
        beta = jnp.max(jnp.stack(known))
        for path, spec in layers.items():
            if _is_fully_connected(spec):
                own_dtype = dampings[path].dtype
                dampings[path] = jnp.where(beta > 0, beta.astype(own_dtype), dampings[path])
    return dampings


def by_factors(theta: jax.Array, damping: jax.Array, *, plain: bool) -> jax.Array:
    """The damped Θ of two factors that are each damped by itself, less the λ added later.

    TKFAC (arXiv:2011.10741) damps √δΦ + √λI and √δΨ + √λI. KFAC (Martens and Grosse 2015, section
    6.3) damps A + π√λI and U + √λ/πI, with π² = (tr A / dim A) / (tr U / dim U). In the eigenbasis
    both products are Θ + λ + √(λ/δ) (c r ⊕ s/c). Here r and s are the row and column sums of Θ, and
    c is 1 for TKFAC and √(dim A / dim U) for KFAC. `precondition` adds the λ.

    Args:
        theta: Θ = δ λ_Φ⊗λ_Ψ, debiased, with all columns kept, (*lead, in[+1], out).
        damping: λ, (*lead).
        plain: whether the factors are A and U.
    """
    rows, columns = (jnp.sum(theta, axis=axis, keepdims=True) for axis in (-1, -2))
    delta = jnp.sum(rows, axis=-2, keepdims=True)
    ratio = jnp.sqrt(damping[..., None, None] / jnp.where(delta > 0, delta, 1))
    c = math.sqrt(theta.shape[-2] / theta.shape[-1]) if plain else 1.0
    return theta + ratio * (c * rows + columns / c)


def follows_trace(layers: Layers, damping: Damping) -> bool:
    """Whether λ follows Eq. 3.5: with ``"trace"``, or ``"auto"`` in a network with conv layers."""
    if not isinstance(damping, str):
        return False
    return damping == "trace" or bool(_convolutions(layers))


def _convolutions(layers: Layers) -> list[str]:
    return [path for path, spec in layers.items() if spec.kind == "conv"]


def _is_fully_connected(spec: LayerSpec) -> bool:
    return spec.kind == "dense" and spec.positions == 1
