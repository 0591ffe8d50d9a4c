"""Learning rates at which each optimizer is tried: as many for each, half a decade apart."""

from typing import NamedTuple


class Rates(NamedTuple):
    """An optimizer's own range, and where it comes from."""

    values: tuple[float, ...]
    reason: str


ADAM = Rates(
    (1e-3, 3e-3, 1e-2),
    "1e-3 is the default (Kingma and Ba 2015); networks as small as these train at higher ones",
)
_OURS = Rates((1e-2, 3e-2, 1e-1), "docs/quickstart.md: start at 0.03 and search in factors of 3")

OWN_RATES = {
    "sgd": Rates((1e-2, 3e-2, 1e-1), "0.1 is usual with BatchNorm (He et al. 2016), less without"),
    "adam": ADAM,
    "adamw": ADAM._replace(reason="as Adam (Loshchilov and Hutter 2019)"),
    "muon": Rates((3e-3, 1e-2, 3e-2), "0.02 is the default of its authors (Jordan et al. 2024)"),
    "soap": Rates((1e-3, 3e-3, 1e-2), "3e-3 is the default of Vyas et al. 2024"),
    "tekfac": _OURS,
    "tkfac": _OURS,
    "ekfac": _OURS,
    "kfac": _OURS,
}
