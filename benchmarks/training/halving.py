"""Successive halving: many short runs, then longer ones of those that did best."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Candidate = dict[str, Any]  # setting -> value


class Rung(NamedTuple):
    """A round of the search."""

    epochs: int
    keep: int  # how many candidates go on; 1 in the last round


def grid_size(grid: Mapping[str, Sequence[Any]]) -> int:
    """How many candidates a grid has."""
    return math.prod(len(values) for values in grid.values())


def candidates(grid: Mapping[str, Sequence[Any]], trials: int) -> list[Candidate]:
    """The grid, or a sample of it.

    In a sample every value of a setting occurs equally often, to within one, in an order of its own
    (a Latin hypercube), so that no learning rate is left out. The sample is always the same.

    Args:
        grid: values by setting.
        trials: how many candidates there may be.

    Returns:
        Distinct candidates: `trials` of them, or the whole grid if it is smaller.
    """
    if grid_size(grid) <= trials:
        return [
            dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
        ]
    rng = np.random.default_rng(0)
    for _ in range(1000):  # until all are distinct
        columns = []
        for values in grid.values():
            rounds = math.ceil(trials / len(values))
            order = np.concatenate([rng.permutation(len(values)) for _ in range(rounds)])[:trials]
            columns.append([values[i] for i in rng.permutation(order)])
        found = [dict(zip(grid, values, strict=True)) for values in zip(*columns, strict=True)]
        if all(a != b for a, b in itertools.combinations(found, 2)):
            return found
    every = list(itertools.product(*grid.values()))  # the sample is nearly the whole grid
    chosen = sorted(rng.choice(len(every), trials, replace=False))
    return [dict(zip(grid, every[i], strict=True)) for i in chosen]


def search(
    found: Sequence[Candidate],
    rungs: Sequence[Rung],
    score: Callable[[Candidate, int], float],
) -> Candidate:
    """The best candidate.

    Args:
        found: the candidates to try.
        rungs: the rounds; each trains from scratch, with a schedule of its own length.
        score: (candidate, epochs) -> training loss at the end of such a run; infinite if it
            diverged.

    Returns:
        The candidate with the lowest score in the last round; the first one among equals.
    """
    alive = list(found)
    for rung in rungs:
        if len(alive) == 1:
            break
        scores = [score(candidate, rung.epochs) for candidate in alive]
        order = np.argsort(scores, kind="stable")[: rung.keep]
        alive = [alive[i] for i in order]
    return alive[0]
