"""Which runs are asked for, and the finished ones grouped into what is compared."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.optimizers.rates import ADAM, OWN_RATES
from benchmarks.problems.records import Record, RunKey
from benchmarks.problems.table import scaled_steps

TEKFAC = "tekfac"


class Plan(NamedTuple):
    """What to run."""

    workloads: tuple[str, ...]
    optimizers: tuple[str, ...]
    rates: tuple[float, ...] | str | None  # the same for all; "own"; None: own, TEKFAC also Adam's
    seeds: int
    options: Mapping[str, Any]  # of TEKFAC
    steps_scale: float

    def rates_of(self, optimizer: str) -> tuple[float, ...]:
        """Learning rates of an optimizer, ascending."""
        if isinstance(self.rates, tuple):
            return tuple(sorted(set(self.rates)))
        own = OWN_RATES[optimizer].values
        also = ADAM.values if self.rates is None and optimizer == TEKFAC else ()
        return tuple(sorted({*own, *also}))

    def options_of(self, optimizer: str) -> Mapping[str, Any]:
        """Options of an optimizer: only TEKFAC has some."""
        return self.options if optimizer == TEKFAC else {}

    def keys(self, workload: str, optimizer: str) -> list[RunKey]:
        """The runs of an optimizer on a workload, which share one compiled step."""
        steps, options = scaled_steps(workload, self.steps_scale), self.options_of(optimizer)
        return [
            RunKey(workload, optimizer, rate, seed, steps, options)
            for seed in range(self.seeds)
            for rate in self.rates_of(optimizer)
        ]


class Entry(NamedTuple):
    """An optimizer with the learning rates among which its best one is chosen."""

    label: str
    optimizer: str
    rates: tuple[float, ...]
    records: tuple[Record, ...]


def entries(records: Sequence[Record]) -> list[Entry]:
    """What is compared, in the order of the table of rates.

    All of an optimizer's own rates make one entry, all of Adam's make another, so that every entry
    has as many; whatever other rates there are make a third one.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        options = json.dumps(record.options, sort_keys=True)
        groups.setdefault((record.optimizer, options), []).append(record)
    order = list(OWN_RATES)
    return [
        entry
        for optimizer, options in sorted(groups, key=lambda pair: (order.index(pair[0]), pair[1]))
        for entry in _of_group(optimizer, groups[optimizer, options])
    ]


def _of_group(optimizer: str, records: list[Record]) -> list[Entry]:
    options = ",".join(f"{name}={value}" for name, value in records[0].options.items())
    title = f"{optimizer} {options}".strip()
    own, rest = OWN_RATES[optimizer].values, {record.rate for record in records}
    sets = {title: own} if rest.issuperset(own) else {}
    if own != ADAM.values and rest.issuperset(ADAM.values):
        sets[f"{title} at Adam's rates"] = ADAM.values
    others = tuple(sorted(rest.difference(*sets.values())))
    if others:
        sets[f"{title} at {', '.join(f'{rate:g}' for rate in others)}"] = others
    return [
        Entry(label, optimizer, rates, tuple(r for r in records if r.rate in rates))
        for label, rates in sets.items()
    ]
