"""How much damping λ each layer gets, and what is added where the factors are damped instead."""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `lax.cond`, `jax.eval_shape` and others untyped.

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from tekfac_jax._layers.spec import Layers, LayerSpec
from tekfac_jax._optimizer.options import Damping, Options
from tekfac_jax._optimizer.spectrum import Spectrum

FIXED_DAMPING = 1e-3  # of the paper's rule for networks without convolution


def trace_damping(spec: LayerSpec, trace: jax.Array, trace_floor: jax.Array | float) -> jax.Array:
    """λ = max(tr Θ, ϑ) / dim Θ (Eq. 3.5): the mean eigenvalue, (*lead) or what broadcasts to it.

    The features of a normalisation are one layer together.
    """
    number = spec.in_dim * spec.out_dim
    if spec.kind == "norm" and spec.groups > 1:
        trace, number = jnp.sum(trace, axis=-1, keepdims=True), number * spec.groups
    return jnp.maximum(trace, trace_floor) / number


def layer_dampings(
    layers: Layers, spectra: Mapping[str, Spectrum], options: Options
) -> dict[str, jax.Array]:
    """λ of every layer, (*lead), by the options `damping`, `damping_scale` and `fc_damping`.

    With ``damping="trace"`` it is `trace_damping` (Eq. 3.5), with a number that number (Eq. 3.4);
    ``"auto"`` is trace damping in a network with conv layers and `FIXED_DAMPING` in another. With
    ``fc_damping="beta"`` a Dense layer with one position in a network with conv layers takes the
    largest λ of these, so that it keeps pace with them.
    """
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
    if options.fc_damping == "beta" and convs and by_trace:
        known = [jnp.max(jnp.where(spectra[path].valid, dampings[path], 0)) for path in convs]
        beta = jnp.max(jnp.stack(known))
        for path, spec in layers.items():
            if _is_fully_connected(spec):
                own_dtype = dampings[path].dtype
                dampings[path] = jnp.where(beta > 0, beta.astype(own_dtype), dampings[path])
    return dampings


def by_factors(theta: jax.Array, damping: jax.Array, *, plain: bool) -> jax.Array:
    """Θ of a Kronecker product whose factors are damped each by itself, less λ.

    TKFAC (arXiv:2011.10741) damps √δΦ + √λI and √δΨ + √λI; KFAC (Martens and Grosse 2015, section
    6.3) A + π√λI and U + √λ/πI, with π² = (tr A / dim A) / (tr U / dim U). In the eigenbasis either
    product is Θ + λ + √(λ/δ) (c r ⊕ s/c), r and s the sums of Θ's rows and columns, c = 1 or
    √(dim A / dim U).

    Args:
        theta: Θ = δ λ_Φ⊗λ_Ψ, debiased, of all columns, (*lead, in[+1], out).
        damping: λ, (*lead).
        plain: whether the factors are A and U.
    """
    rows, columns = (jnp.sum(theta, axis=axis, keepdims=True) for axis in (-1, -2))
    delta = jnp.sum(rows, axis=-2, keepdims=True)
    ratio = jnp.sqrt(damping[..., None, None] / jnp.where(delta > 0, delta, 1))
    c = math.sqrt(theta.shape[-2] / theta.shape[-1]) if plain else 1.0
    return theta + ratio * (c * rows + columns / c)


def follows_trace(layers: Layers, damping: Damping) -> bool:
    """Whether λ is by Eq. 3.5: where it is asked for, and with ``"auto"`` beside convolutions."""
    if not isinstance(damping, str):
        return False
    return damping == "trace" or bool(_convolutions(layers))


def _convolutions(layers: Layers) -> list[str]:
    return [path for path, spec in layers.items() if spec.kind == "conv"]


def _is_fully_connected(spec: LayerSpec) -> bool:
    return spec.kind == "dense" and spec.positions == 1
