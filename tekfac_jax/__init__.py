"""TEKFAC and its siblings KFAC, EKFAC and TKFAC: natural-gradient optimizers for Flax and optax."""

from tekfac_jax._capture import find_layers, make_slots, tap, value_grad_and_stats
from tekfac_jax._check import check_capture
from tekfac_jax._devices import DevicePlan, Assignment, device_plan
from tekfac_jax._fisher import Bernoulli, Categorical, Gaussian, Likelihood, fisher_stats
from tekfac_jax._layers import Capture, Layers, LayerSpec, Statistics
from tekfac_jax._optimizers import clip_by_kl, ekfac, kfac, tekfac, tkfac
from tekfac_jax._readers import (
    Curvature,
    check_state,
    curvature,
    diagnostics,
    memory_usage,
    stats_due,
)
from tekfac_jax._reduced import Reduced, ReducedStatistics
from tekfac_jax._restore import restore_state, without_factors
from tekfac_jax._sharding import opt_state_sharding
from tekfac_jax._state import ClipByKlState, LayerState, StateKind, ScaleByTekfacState
from tekfac_jax._steps import step_diagnostics
from tekfac_jax._transform import (
    scale_by_ekfac,
    scale_by_kfac,
    scale_by_tekfac,
    scale_by_tkfac,
)
from tekfac_jax.train_state import TrainState

__version__ = "0.1.0"

__all__ = [
    "Bernoulli",
    "Capture",
    "Categorical",
    "ClipByKlState",
    "Curvature",
    "DevicePlan",
    "Gaussian",
    "LayerSpec",
    "LayerState",
    "Layers",
    "Likelihood",
    "StateKind",
    "Reduced",
    "ReducedStatistics",
    "ScaleByTekfacState",
    "Assignment",
    "Statistics",
    "TrainState",
    "check_capture",
    "check_state",
    "clip_by_kl",
    "curvature",
    "device_plan",
    "diagnostics",
    "ekfac",
    "find_layers",
    "fisher_stats",
    "kfac",
    "make_slots",
    "memory_usage",
    "opt_state_sharding",
    "restore_state",
    "scale_by_ekfac",
    "scale_by_kfac",
    "scale_by_tekfac",
    "scale_by_tkfac",
    "stats_due",
    "step_diagnostics",
    "tap",
    "tekfac",
    "tkfac",
    "value_grad_and_stats",
    "without_factors",
]
