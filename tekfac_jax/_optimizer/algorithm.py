"""Algorithm 1 of the paper (Gao et al., arXiv:2011.13609), in the paper's order.

The Fisher block of a layer is approximated by F ≈ (Q_Φ⊗Q_Ψ) (Θ + λI) (Q_Φ⊗Q_Ψ)ᵀ (Eq. 3.4). Two
switches make the family of four of it:

|                                | plain factors A, U | trace-restricted factors Φ, Ψ |
|--------------------------------|--------------------|-------------------------------|
| eigenvalues of the factors     | KFAC               | TKFAC                         |
| Θ measured in their eigenbasis | EKFAC              | TEKFAC                        |

`_optimizer.update` runs these two functions: the first for each group of layers that has something
due, the second once on every step.
"""

from collections.abc import Mapping

import jax

from tekfac_jax._layers.spec import Layers
from tekfac_jax._optimizer.damping import layer_dampings
from tekfac_jax._optimizer.family import ThetaFrom
from tekfac_jax._optimizer.options import Options
from tekfac_jax._optimizer.precondition import has_fallen_back, precondition
from tekfac_jax._optimizer.refresh import (
    Group,
    Held,
    form_gradients_once,
    update_eigenbases,
    update_factors,
    update_rescaling,
)
from tekfac_jax._optimizer.spectrum import spectrum_of
from tekfac_jax._optimizer.sums import Source
from tekfac_jax._state.family import Member
from tekfac_jax._state.layout import LayerState


def refresh_curvature(
    group: Group, held: Held, *, sources: Mapping[str, Source], theta: ThetaFrom
) -> Held:
    """The curvature of layers that are refreshed together; each line does what is due."""
    sources = form_gradients_once(group, held, sources)

    # Reduced statistics hold Θ in the basis from before this step.
    if theta == "old basis":
        held = update_rescaling(group, held, sources)

    # Every T_FIM steps: δ, Φ and Ψ.                                            Eq. 2.10, 3.7, 3.8
    held = update_factors(group, held, sources)

    # Every T_EIG steps: Q_Φ and Q_Ψ; Θ is transported into the new basis.                Eq. 3.1
    held = update_eigenbases(group, held)

    # Every T_RE steps: Θ.                                                           Eq. 3.2, 3.6
    if theta == "new basis":
        held = update_rescaling(group, held, sources)
    return held


def take_step(
    layers: Layers,
    gradients: Mapping[str, jax.Array],
    held: Held,
    member: Member,
    options: Options,
) -> tuple[dict[str, jax.Array], dict[str, LayerState]]:
    """The preconditioned gradients, and the curvature with a note of the λ that was used."""
    spectra = {path: spectrum_of(layer) for path, layer in held.items()}

    # On every step: λ.                                                              Eq. 3.4, 3.5
    damping = layer_dampings(layers, spectra, options)
    noted = {
        path: layer._replace(damping=damping[path], fallen_back=has_fallen_back(layer, options))
        for path, layer in held.items()
    }

    # Q_Φ [(Q_Φᵀ G Q_Ψ) / (Θ + λ)] Q_Ψᵀ.                                        Eq. 3.9, less −η
    return precondition(gradients, noted, spectra, member, options), noted
