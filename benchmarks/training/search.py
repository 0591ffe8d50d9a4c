"""A small search for the learning rate, of the same size for every optimizer."""

import math
from collections.abc import Callable
from typing import NamedTuple

TRIALS = 5
_FACTOR = 10.0


class Search(NamedTuple):
    """What was tried, and what was chosen."""

    losses: dict[float, float]  # training loss at the end of each trial, inf where it diverged
    best: float

    @property
    def at_edge(self) -> bool:
        """Whether a rate beyond the tried ones might have been better."""
        return self.best in (min(self.losses), max(self.losses))


def search_learning_rate(trial: Callable[[float], float], start: float) -> Search:
    """Tries `TRIALS` learning rates: three, a factor of 10 apart, then wherever it looks best.

    If the best rate is the lowest or highest so far, the next one lies beyond it. Otherwise it lies
    halfway, on a logarithmic scale, between the best and the better of its neighbours.

    Args:
        trial: training loss at the end of a short run with this learning rate.
        start: the middle one of the first three.

    Returns:
        `Search`; of rates with equal losses the lower one is chosen.
    """
    losses: dict[float, float] = {}
    rates = [_round(start / _FACTOR), _round(start), _round(start * _FACTOR)]
    while len(losses) < TRIALS:
        rate = rates.pop(0) if rates else _next_rate(losses)
        loss = trial(rate)
        losses[rate] = loss if math.isfinite(loss) else math.inf
    ordered = dict(sorted(losses.items()))
    return Search(ordered, min(ordered, key=ordered.__getitem__))


def _next_rate(losses: dict[float, float]) -> float:
    rates = sorted(losses)
    best = rates.index(min(rates, key=losses.__getitem__))
    if best == 0:
        return _round(rates[0] / _FACTOR)
    if best == len(rates) - 1:
        return _round(rates[-1] * _FACTOR)
    neighbour = min(rates[best - 1], rates[best + 1], key=losses.__getitem__)
    return _round(math.sqrt(rates[best] * neighbour))


def _round(rate: float) -> float:
    """To two digits: 0.032 reads better than 0.0316227766."""
    return float(f"{rate:.1e}")
