"""Compares optimizers on one network: ``python -m benchmarks.train --help``."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.data.sets import load_dataset
from benchmarks.errors import DataError, UsageError
from benchmarks.models.convnets import make_model
from benchmarks.optimizers.recipes import RECIPES
from benchmarks.reporting.summary import Result, save_curves, save_json, show_table
from benchmarks.training.loop import Task, Trainer
from benchmarks.training.options import exit_with, parse
from benchmarks.training.search import TRIALS, Search, search_learning_rate

# The search uses other parameters and another order of the data than the final runs.
_SEARCH_SEED = 1_000_000


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark; ends with code 2 and one sentence if it cannot."""
    try:
        _run(parse(argv))
    except (DataError, UsageError) as error:
        exit_with(error, "train")


def _run(options: Any) -> None:
    console = Console()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write to {options.out} ({error.strerror}): choose another --out"
        ) from error
    dataset = load_dataset(options.dataset, options.data, options.subset)
    model = make_model(options.model, dataset.num_classes, options.width, affine=options.affine)
    task = Task(dataset, model, options.batch_size)
    title = (
        f"{options.model} ({task.num_parameters:,} parameters) on {options.dataset}: "
        f"{len(dataset.train_labels)} training {dataset.examples}, "
        f"batch {options.batch_size}, {_count(options.epochs, 'epoch')} of "
        f"{_count(task.steps_per_epoch, 'step')}, {_count(options.seeds, 'seed')}"
    )
    print(title, flush=True)
    results = [_compare(console, task, name, options) for name in options.optimizers]
    print()
    show_table(console, results, options.target)
    save_curves(options.out / "curves.png", results, title)
    settings = {
        **vars(options),
        "curvature": options.curvature._asdict(),
        "train_examples": len(dataset.train_labels),
        "test_examples": len(dataset.test_labels),
        "parameters": task.num_parameters,
    }
    save_json(options.out / "results.json", results, settings)
    print(f"\nwritten: {options.out / 'curves.png'}, {options.out / 'results.json'}")


def _compare(console: Console, task: Task, name: str, options: Any) -> Result:
    """Compiles, searches and trains one optimizer."""
    rate = options.learning_rates.get(name)
    epochs = options.seeds * options.epochs
    if rate is None:
        epochs += TRIALS * options.search_epochs
    with _progress(console, name, epochs) as (describe, advance):
        describe("compiling")
        trainer = Trainer(task, name, options.curvature)

        def trial(rate: float) -> float:
            describe(f"trying learning rate {rate:g}")
            run = trainer.train(
                rate, epochs=options.search_epochs, seed=_SEARCH_SEED, test=False, on_epoch=advance
            )
            return run.train_loss

        search = None
        if rate is None:
            search = search_learning_rate(trial, RECIPES[name].start)
            rate = search.best
            print(_describe_search(name, search), flush=True)
        runs = []
        for seed in range(options.seeds):
            describe(f"learning rate {rate:g}, seed {seed}")
            runs.append(trainer.train(rate, epochs=options.epochs, seed=seed, on_epoch=advance))
    return Result(name, rate, search, trainer.compile_seconds, runs)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _describe_search(name: str, search: Search) -> str:
    tried = ", ".join(f"{rate:g}: {loss:.2g}" for rate, loss in search.losses.items())
    edge = " (at the edge of what was tried)" if search.at_edge else ""
    return f"{name}: training loss by learning rate {tried}; chosen {search.best:g}{edge}"


@contextlib.contextmanager
def _progress(
    console: Console, name: str, epochs: int
) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A progress bar, if there is a terminal: functions that describe and advance it."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("epochs"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(name, total=epochs)
        yield (
            lambda what: progress.update(bar, description=f"{name}: {what}"),
            lambda: progress.advance(bar),
        )


if __name__ == "__main__":
    main()
