"""The experiments of the paper, and readings for small machines: ``python -m benchmarks.paper``.

``--list`` shows the experiments; each is a module of `benchmarks.experiments`. Every optimizer of
an experiment is tuned with the same number of trials by successive halving, then trained with each
seed, from the same parameters and with the same order of the data. You may kill it at any time: the
same command continues where it stopped. ``python -m benchmarks.report`` draws the results so far.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import experiments
from benchmarks.data.augment import crop_and_flip
from benchmarks.data.sets import load_dataset
from benchmarks.errors import DataError, UsageError, check_choice
from benchmarks.models.convnets import make_model
from benchmarks.optimizers.recipes import divide
from benchmarks.training import kfac_jax_trainer
from benchmarks.training.experiment import SEARCH_SEED, Entry, Experiment, RunSpec, TaskSpec
from benchmarks.training.halving import Candidate, candidates, grid_size, search
from benchmarks.training.loop import COSINE, Task, Trainer, Trains
from benchmarks.training.options import exit_with
from benchmarks.training.runs import OutOfTime, Store, train, write_json


def main(argv: list[str] | None = None) -> None:
    """Runs the experiments; ends with code 2 and one sentence if it cannot."""
    options = _parse(argv)
    console = Console(soft_wrap=True)
    try:
        if options.list or options.experiment is None:
            _show_list(console)
            return
        names = experiments.names() if options.experiment == "all" else [options.experiment]
        loaded = {name: experiments.load(name) for name in names}
        deadline = time.monotonic() + 60 * options.minutes
        for name, (experiment, doc) in loaded.items():
            out = options.out or Path("out") / "paper"
            directory = out / name if options.out is None or len(names) > 1 else out
            console.print(f"{name}: {experiment.title}", highlight=False)
            try:
                Session(
                    name, experiment, doc, Store(directory), console,
                    data=options.data, only=options.only, deadline=deadline,
                ).run()  # fmt: skip
            except DataError as error:
                if len(names) == 1:
                    raise
                console.print(f"  left out: {error}", highlight=False)
            print(f"python -m benchmarks.report {directory} draws it")
    except OutOfTime:
        print(f"the {options.minutes:g} minutes are over; the same command continues")
    except (DataError, UsageError) as error:
        exit_with(error, "paper")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=(__doc__ or "").partition("\n\n")[2]
    )
    add = parser.add_argument
    add("experiment", nargs="?", help="name of an experiment, or all")
    add("--list", action="store_true", help="show the experiments")
    add(
        "--minutes",
        type=float,
        default=math.inf,
        help="stop after this time, at the end of an epoch",
    )
    add("--only", type=lambda text: [label.strip() for label in text.split(",")],
        metavar="LABELS", help="only these entries, separated by commas")  # fmt: skip
    add("--data", type=Path, metavar="DIR", help="directory with the data sets")
    add("--out", type=Path, metavar="DIR", help="default: out/paper/EXPERIMENT")
    options = parser.parse_args(argv)
    if not options.minutes > 0:
        parser.exit(2, f"{parser.prog}: --minutes must be positive, got {options.minutes:g}\n")
    return options


def _show_list(console: Console) -> None:
    for name in experiments.names():
        experiment, doc = experiments.load(name)
        console.print(f"[bold]{name}[/bold]: {experiment.title}", highlight=False)
        console.print(f"  {len(experiment.entries)} entries; {doc.splitlines()[0]}")


class Session:
    """A running experiment: the search of every entry, then all entries, seed by seed."""

    def __init__(
        self, name: str, experiment: Experiment, doc: str, store: Store, console: Console, *,
        data: Path | None = None, only: Sequence[str] | None = None, deadline: float = math.inf,
    ):  # fmt: skip
        self.experiment, self.store, self.console = experiment, store, console
        self.deadline = deadline
        labels = tuple(entry.label for entry in experiment.entries)
        for label in only or ():
            check_choice("label in --only", label, labels)
        self.entries = [e for e in experiment.entries if only is None or e.label in only]
        if only is None and not kfac_jax_trainer.is_installed():
            others = [e for e in self.entries if e.optimizer != kfac_jax_trainer.NAME]
            if len(others) < len(self.entries):
                console.print(f"  left out: {kfac_jax_trainer.NOT_INSTALLED}", highlight=False)
            self.entries = others
        sizes = [grid_size(entry.grid) for entry in experiment.entries]
        self.trials = experiment.trials or min((size for size in sizes if size > 1), default=1)
        self.task = make_task(experiment.task, data)
        self._trainers: dict[str, Trains] = {}
        self._description = {
            "name": name,
            "doc": doc,
            **experiment._asdict(),
            "trials": self.trials,
            "task": experiment.task._asdict(),
            "schedule": experiment.schedule._asdict(),
            "targets": experiment.targets._asdict(),
            "rungs": [rung._asdict() for rung in experiment.rungs],
            "published": experiment.published and experiment.published._asdict(),
            "entries": [
                {**entry._asdict(), "grid_size": grid_size(entry.grid)}
                for entry in experiment.entries
            ],
        }

    def run(self) -> None:
        """Runs everything that is not finished.

        Raises:
            OutOfTime: the time limit passed before the end.
        """
        with self._progress() as (describe, advance):
            winners: dict[str, Candidate] = {}
            self._write(winners)
            for entry in self.entries:
                describe(f"{entry.label}: search")
                winners[entry.label] = self._search(entry, advance)
                self._write(winners)
            for seed in self.experiment.seeds:
                for entry in self.entries:
                    describe(f"{entry.label}: seed {seed}")
                    settings = winners[entry.label]
                    spec = self._spec(entry, settings, self.experiment.epochs, seed, search=False)
                    self._train(spec, advance)

    def _write(self, winners: dict[str, Candidate]) -> None:
        """Writes what the report needs beside the records; winners of other entries stay."""
        path = self.store.directory / "experiment.json"
        write_json(path, {**self._description, "winners": {**self._known_winners(), **winners}})

    def _known_winners(self) -> dict[str, Candidate]:
        path = self.store.directory / "experiment.json"
        return json.loads(path.read_text()).get("winners", {}) if path.exists() else {}

    def _search(self, entry: Entry, advance: Callable[[], None]) -> Candidate:
        found = candidates(entry.grid, self.trials)

        def score(candidate: Candidate, epochs: int) -> float:
            spec = self._spec(entry, candidate, epochs, SEARCH_SEED, search=True)
            loss = self._train(spec, advance)["train_loss"]
            return math.inf if loss is None else loss

        return search(found, self.experiment.rungs, score) | dict(entry.fixed)

    def _spec(
        self, entry: Entry, settings: Candidate, epochs: int, seed: int, *, search: bool
    ) -> RunSpec:
        return RunSpec(
            self.experiment.task, entry.label, entry.optimizer, {**entry.fixed, **settings}, epochs,
            COSINE if search else self.experiment.schedule, seed, search,
        )  # fmt: skip

    def _train(self, spec: RunSpec, advance: Callable[[], None]) -> dict[str, Any]:
        new = self.store.record(spec) is None
        make = functools.partial(self._trainer, spec)
        record = train(spec, self.store, make, deadline=self.deadline, on_epoch=advance)
        if new:
            self.console.print(_line(spec, record), highlight=False)
        return record

    def _trainer(self, spec: RunSpec) -> Trains:
        """Compiled once for all runs that differ only in numbers kept in the state."""
        static, traced = divide(spec.settings)
        key = repr((spec.optimizer, sorted(static.items(), key=str), sorted(traced)))
        if key not in self._trainers and spec.optimizer == kfac_jax_trainer.NAME:
            self._trainers[key] = kfac_jax_trainer.KfacJaxTrainer(self.task, spec.settings)
        elif key not in self._trainers:
            self._trainers[key] = Trainer(self.task, spec.optimizer, spec.settings)
        return self._trainers[key]

    def _epochs(self, entry: Entry) -> int:
        """Epochs of an entry's search and runs together."""
        alive, total = min(grid_size(entry.grid), self.trials), 0
        for rung in self.experiment.rungs:
            if alive > 1:
                total += alive * rung.epochs
                alive = min(alive, rung.keep)
        return total + len(self.experiment.seeds) * self.experiment.epochs

    @contextmanager
    def _progress(self) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("epochs"), TimeRemainingColumn(),
        )  # fmt: skip
        console = self.console
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=sum(map(self._epochs, self.entries)))
            yield (
                lambda what: progress.update(bar, description=what),
                lambda: progress.advance(bar),
            )


def make_task(spec: TaskSpec, data: Path | None) -> Task:
    """Reads the data and makes the network.

    Raises:
        DataError: the data cannot be read.
        UsageError: an unknown model, or one that does not fit.
    """
    dataset = load_dataset(spec.dataset, data, spec.subset)
    options: dict[str, Any] = {} if spec.dtype is None else {"dtype": spec.dtype}
    model = make_model(spec.model, dataset.num_classes, spec.width, affine=spec.affine, **options)
    return Task(dataset, model, spec.batch_size, crop_and_flip if spec.augment else None)


def _line(spec: RunSpec, record: dict[str, Any]) -> str:
    settings = ", ".join(f"{k}={v:g}" for k, v in divide(spec.settings).traced.items())
    what = "search" if spec.search else f"seed {spec.seed}"
    if record["diverged"]:
        result = "diverged"
    else:
        result = f"training loss {record['train_loss']:.3g}"
        if not spec.search:
            result += f", test accuracy {100 * record['curve'][-1]['test_accuracy']:.2f} %"
        result += f", {record['curve'][-1]['seconds']:.1f} s"
    return (
        f"  {spec.label} ({settings}), {what}, {spec.epochs} epochs: {result} "
        f"({record['median_step_ms']:.1f} ms a step)"
    )


if __name__ == "__main__":
    main()
