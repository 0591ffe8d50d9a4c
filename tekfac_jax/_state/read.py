"""Reads the curvature inside any optax state, however deep."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tekfac_jax._curvature.eigenbasis import outside
from tekfac_jax._layers.types import OptState, Shaped
from tekfac_jax._state.layout import LayerState, ScaleByTekfacState, debiased, unit_trace
from tekfac_jax._state.recognise import find_states, layer_states, whole_layers


class Curvature(NamedTuple):
    """Curvature of one layer: F ≈ (Q_Φ⊗Q_Ψ) diag(Θ) (Q_Φ⊗Q_Ψ)ᵀ, or δ Φ⊗Ψ. All debiased.

    `lead` are the axes of stacked layers and of groups; () for other layers.

    Attributes:
        delta: δ, the trace of the Fisher block. Shape (*lead).
        phi: Φ, trace 1, (*lead, in[+1], in[+1]).
        psi: Ψ, trace 1, (*lead, out, out).
        q_phi: eigenvectors of Φ in columns, (*lead, in[+1], in[+1]). For an embedding None, which
            stands for the identity; `phi` is then the diagonal of Φ, (*lead, in).
        q_psi: eigenvectors of Ψ in columns, (*lead, out, out).
        theta: Θ, (*lead, in[+1], out).
        theta_rest: θ⊥, which stands for Θ outside of the kept columns; zero if all are kept. With
            `basis_rank`, `q_phi` and `q_psi` have fewer columns, and `theta` fewer entries. Shape
            (*lead).
    """

    delta: jax.Array
    phi: jax.Array
    psi: jax.Array
    q_phi: jax.Array | None
    q_psi: jax.Array
    theta: jax.Array
    theta_rest: jax.Array


def curvature(opt_state: OptState) -> dict[str, Curvature]:
    """The curvature held in an optax state, however deep.

    Args:
        opt_state: state of any optax transformation that contains one of ours, or a train state.

    Returns:
        For each layer path its `Curvature`, debiased, Φ and Ψ with trace 1 (I/dim before the
        first statistics). In KFAC and EKFAC δ = tr A · tr U, Φ = A / tr A, Ψ = U / tr U. In KFAC
        and TKFAC Θ = δ · max(λ_Φ, 0) ⊗ max(λ_Ψ, 0), as of the last refresh.

    Raises:
        ValueError: there is no such state inside.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)
        >>> layers = tekfac.find_layers(lambda p, x: model.apply(p, x).sum(), params, x)
        >>> opt_state = tekfac.tekfac(0.1, layers).init(params)
        >>> tekfac.curvature(opt_state)["params"].theta.shape
        (6, 3)
    """

    def read(layer: LayerState) -> Curvature:
        theta, rest = (debiased(x, layer.theta_weight) for x in (layer.theta, layer.rest))
        return Curvature(
            delta=layer.delta,
            phi=unit_trace(layer.phi, layer.q_phi),
            psi=unit_trace(layer.psi, layer.q_psi),
            q_phi=layer.q_phi,
            q_psi=layer.q_psi,
            theta=theta,
            theta_rest=outside(theta, rest, (layer.q_phi, layer.q_psi)),
        )

    return {path: read(layer) for path, layer in whole_layers(opt_state).items()}


def stats_due(opt_state: OptState) -> jax.Array:
    """Whether the next step would use statistics: a factor, basis or Θ refresh is due.

    For training loops that compile a second step without statistics. If statistics are due but not
    passed, the curvature is held until the next interval.

    Args:
        opt_state: state of any optax transformation that contains one of ours.

    Returns:
        Boolean array of shape ().

    Raises:
        ValueError: there is no such state inside.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)
        >>> layers = tekfac.find_layers(lambda p, x: model.apply(p, x).sum(), params, x)
        >>> opt_state = tekfac.tekfac(0.1, layers).init(params)
        >>> bool(tekfac.stats_due(opt_state))  # nothing is known yet
        True
    """
    return jnp.any(jnp.stack([state.due for state in find_states(opt_state, ScaleByTekfacState)]))


def memory_usage(opt_state: OptState) -> dict[str, dict[str, int]]:
    """Bytes of curvature state for each layer: ``factors``, ``eigenbasis``, ``rescaling``.

    Args:
        opt_state: state of any optax transformation that contains one of ours; shapes are enough.

    Returns:
        Layer path -> kind -> bytes.

    Raises:
        ValueError: there is no such state inside.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)
        >>> layers = tekfac.find_layers(lambda p, x: model.apply(p, x).sum(), params, x)
        >>> opt_state = tekfac.tekfac(0.1, layers).init(params)
        >>> tekfac.memory_usage(opt_state)
        {'params': {'factors': 180, 'eigenbasis': 180, 'rescaling': 72}}
    """

    def size(*arrays: Shaped | None) -> int:
        return sum(
            math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays if x is not None
        )

    return {
        path: {
            "factors": size(layer.phi, layer.psi),
            "eigenbasis": size(layer.q_phi, layer.q_psi),
            "rescaling": size(layer.theta),
        }
        for path, layer in layer_states(opt_state).items()
    }
