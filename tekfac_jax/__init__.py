"""TEKFAC and its siblings KFAC, EKFAC and TKFAC: natural-gradient optimizers for Flax and optax."""

from tekfac_jax._capture.check_capture import check_capture
from tekfac_jax._capture.find_layers import find_layers
from tekfac_jax._capture.fisher_stats import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    fisher_stats,
)
from tekfac_jax._capture.tap import make_slots, tap
from tekfac_jax._capture.value_grad_and_stats import value_grad_and_stats
from tekfac_jax._devices.mesh import opt_state_sharding
from tekfac_jax._devices.plan import Assignment, DevicePlan, device_plan
from tekfac_jax._layers.spec import Layers, LayerSpec
from tekfac_jax._layers.statistics import Capture, Reduced, ReducedStatistics, Statistics
from tekfac_jax._optimizer.clip_by_kl import clip_by_kl
from tekfac_jax._optimizer.ready import ekfac, kfac, tekfac, tkfac
from tekfac_jax._optimizer.transforms import (
    scale_by_ekfac,
    scale_by_kfac,
    scale_by_tekfac,
    scale_by_tkfac,
)
from tekfac_jax._state.check_state import check_state
from tekfac_jax._state.diagnostics import diagnostics, step_diagnostics
from tekfac_jax._state.layout import ClipByKlState, LayerState, ScaleByTekfacState, StateKind
from tekfac_jax._state.read import Curvature, curvature, memory_usage, stats_due
from tekfac_jax._state.restore import restore_state, without_factors
from tekfac_jax.train_state import TrainState

__version__ = "0.1.0"

__all__ = [
    "Assignment",
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
    "Reduced",
    "ReducedStatistics",
    "ScaleByTekfacState",
    "StateKind",
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
