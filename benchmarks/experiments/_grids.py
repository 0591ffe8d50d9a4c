"""Grids and settings that several experiments share."""

from typing import Any

from benchmarks.training.experiment import Entry

# Section 4.1 of the paper.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
DAMPINGS = (1e-8, 1e-6, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
FLOORS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
# T_FIM = T_EIG = 50. The paper's third interval, T_INV = 200, is taken as that of Θ.
PAPER: dict[str, Any] = {
    "factor_interval": 50,
    "eigenbasis_interval": 50,
    "rescaling_interval": 200,
    "factor_decay": 0.95,
    "rescaling_decay": 0.95,
    "momentum": 0.9,
    "damping_scale": 1.0,  # Eq. 3.5 itself, not the library's default
}


_PERIODS = ("curvature_update_period", "inverse_update_period")  # of kfac-jax


def half_decades(low: float, number: int) -> tuple[float, ...]:
    """1, 3, 10, ... times `low`."""
    return tuple(float(f"{low * 10 ** (i / 2):.0e}") for i in range(number))


def paper_entries() -> tuple[Entry, ...]:
    """The paper's five optimizers with its grids, then their other peers.

    The paper damps EKFAC with a fixed λ, TKFAC and TEKFAC with the trace rule and ϑ.
    """
    rate = {"learning_rate": RATES}
    by_floor = {**rate, "trace_floor": FLOORS}, {**PAPER, "damping": "trace"}
    by_damping = {**rate, "damping": DAMPINGS}, PAPER
    return (
        Entry("TEKFAC", "tekfac", *by_floor),
        Entry("SGDM", "sgd", rate),
        Entry("Adam", "adam", rate),
        Entry("TKFAC", "tkfac", *by_floor),
        Entry("EKFAC", "ekfac", *by_damping),
        Entry("KFAC", "kfac", *by_damping),
        Entry("AdamW", "adamw", rate, {"weight_decay": 0.01}),
        Entry("Muon", "muon", rate),
        Entry("SOAP", "soap", rate),
        Entry("kfac-jax", "kfac-jax", by_damping[0], dict.fromkeys(_PERIODS, 50)),
    )


def tuned_entries(number: int) -> tuple[Entry, ...]:
    """All optimizers with their own defaults; the learning rate from a grid of `number` values.

    The family of four enters twice: with its defaults, and with the paper's own rule for λ.
    kfac-jax, whose damping has no default, uses 1e-3 and refreshes as often as TEKFAC.
    """
    family = {"learning_rate": half_decades(1e-3, number)}
    adaptive = {"learning_rate": half_decades(1e-4, number)}
    by_the_paper = {"damping_scale": 1.0}
    return (
        Entry("TEKFAC", "tekfac", family),
        Entry("SGDM", "sgd", {"learning_rate": half_decades(3e-3, number)}),
        Entry("Adam", "adam", adaptive),
        Entry("TEKFAC, scale 1", "tekfac", family, by_the_paper),
        Entry("TKFAC, scale 1", "tkfac", family, by_the_paper),
        Entry("EKFAC, scale 1", "ekfac", family, by_the_paper),
        Entry("KFAC, scale 1", "kfac", family, by_the_paper),
        Entry("AdamW", "adamw", adaptive, {"weight_decay": 0.01}),
        Entry("Muon", "muon", family),
        Entry("SOAP", "soap", adaptive),
        Entry("TKFAC", "tkfac", family),
        Entry("EKFAC", "ekfac", family),
        Entry("KFAC", "kfac", family),
        Entry("kfac-jax", "kfac-jax", family, dict.fromkeys(_PERIODS, 50)),
    )


def intervals(interval: int) -> dict[str, Any]:
    """All three refreshes at the same interval."""
    names = ("factor_interval", "eigenbasis_interval", "rescaling_interval")
    return dict.fromkeys(names, interval)


def early_entries(rates: tuple[float, ...]) -> tuple[Entry, ...]:
    """TEKFAC with two dampings, refreshed every 50 steps, every 50 and early, or every 10."""

    def entry(scale: float, label: str, **changed: Any) -> Entry:
        fixed = {"damping_scale": scale, **changed}
        return Entry(f"scale {scale:g}, {label}", "tekfac", {"learning_rate": rates}, fixed)

    return tuple(
        entry(scale, label, **changed)
        for scale in (0.3, 1.0)
        for label, changed in (
            ("T = 50", intervals(50)),
            ("T = 50 and early", {**intervals(50), "early_refreshes": True}),
            ("T = 10", intervals(10)),
        )
    )


def default_entries(rates: tuple[float, ...]) -> tuple[Entry, ...]:
    """TEKFAC with the paper's λ, with parts of it, with shorter intervals, and with both."""

    def entry(label: str, scale: float, interval: int) -> Entry:
        fixed = {"damping_scale": scale, **intervals(interval)}
        return Entry(label, "tekfac", {"learning_rate": rates}, fixed)

    return (
        entry("scale 1, T = 50", 1.0, 50),
        entry("scale 0.3, T = 50", 0.3, 50),
        entry("scale 0.1, T = 50", 0.1, 50),
        entry("scale 0.03, T = 50", 0.03, 50),
        entry("scale 1, T = 10", 1.0, 10),
        entry("scale 0.1, T = 10", 0.1, 10),
    )
