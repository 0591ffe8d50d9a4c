"""Sixteen small problems for all optimizers: ``python -m benchmarks.workloads --data DIR``.

The problems share nothing but the library: convolutions with and without BatchNorm, a vision
transformer, a mixer, pre-norm and post-norm language models, an LSTM, word vectors, an autoencoder,
a U-Net, a diffusion model, sets, tables, and learning without labels. The data are real: CIFAR from
``--data`` (without it, the workloads on CIFAR are skipped), scikit-learn's sets, and Alice. A run
has 200 to 400 steps; on two CPU cores a step of SGD takes 2 to 40 ms.

Every optimizer starts from the same parameters, sees the same batches, and is tried at three
learning rates of its own (``benchmarks/optimizers/rates.py``); TEKFAC also at Adam's. All rates
fall to zero along half a cosine. There is no dropout.

A record is written when a run ends. You may kill the command at any time: the same command does
what is missing, and one with more workloads, optimizers, rates or seeds adds to it. Records are
kept when the code changes. To measure another state of the library or of a workload, use another
``--out``, and copy the records that still hold into its ``runs``. Command and report warn where
states of the library are mixed.
"""

import argparse
import ast
import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.errors import DataError, UsageError, check_choice
from benchmarks.optimizers.rates import ADAM, OWN_RATES
from benchmarks.problems.plan import Plan, entries
from benchmarks.problems.records import Record, Records, describe, fingerprint
from benchmarks.problems.table import PROBLEMS, make_workload, scaled_steps
from benchmarks.problems.training import Stepper
from benchmarks.problems.workload import Workload
from benchmarks.reporting.standings import Standings
from benchmarks.reporting.summary import as_plain_json
from benchmarks.reporting.workload_figures import save_curves, save_profile
from benchmarks.reporting.workloads import as_json, report, summary
from benchmarks.training.options import exit_with
from benchmarks.training.runs import write_json


class Command(NamedTuple):
    """The checked command line."""

    plan: Plan
    data: Path | None
    out: Path
    report_only: bool


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing and reports; ends with code 2 and one sentence if it cannot."""
    try:
        command = _parse(argv)
        records, console = Records(command.out), Console(soft_wrap=True)
        if not command.report_only:
            _warn_of_other_states(records, console)
            _run(command, records, console)
        _report(command, records)
    except (DataError, UsageError) as error:
        exit_with(error, "workloads")


# --- the command line ------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.workloads",
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workloads", metavar="LIST", default=",".join(PROBLEMS),
        help=f"comma-separated (default: all of {', '.join(PROBLEMS)})")  # fmt: skip
    add("--optimizers", metavar="LIST", default=",".join(OWN_RATES),
        help=f"comma-separated (default: all of {', '.join(OWN_RATES)})")  # fmt: skip
    add("--rates", metavar="RATES", help="adam (Adam's for all), own, or a list of numbers "
        "(default: own, and Adam's for tekfac too)")  # fmt: skip
    add("--seeds", type=int, default=1, metavar="N", help="runs of each rate (default: 1)")
    add("--options", metavar="KEY=VALUE,...", default="", help="arguments of tekfac")
    add("--steps-scale", type=float, default=1.0, metavar="FACTOR",
        help="multiplies the length of the runs, e.g. 0.1 for a trial")  # fmt: skip
    add("--data", type=Path, metavar="DIR", help="directory with CIFAR-10 and CIFAR-100")
    add("--out", type=Path, default=Path("out/workloads"), metavar="DIR",
        help="where records and report go (default: out/workloads)")  # fmt: skip
    add("--report", action="store_true", help="run nothing, report what is there")
    return parser


def _parse(argv: list[str] | None) -> Command:
    options = _parser().parse_args(argv)
    if options.seeds < 1:
        raise UsageError(f"--seeds must be 1 or more, got {options.seeds}")
    if not 0 < options.steps_scale < math.inf:
        raise UsageError(f"--steps-scale must be positive, got {options.steps_scale:g}")
    plan = Plan(
        _names("workload", options.workloads, tuple(PROBLEMS)),
        _names("optimizer", options.optimizers, tuple(OWN_RATES)),
        _rates(options.rates), options.seeds, _options(options.options), options.steps_scale,
    )  # fmt: skip
    return Command(plan, options.data, options.out, options.report)


def _names(what: str, text: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        check_choice(what, name, choices)
    return names


def _rates(text: str | None) -> tuple[float, ...] | str | None:
    if text in (None, "own"):
        return text
    if text == "adam":
        return ADAM.values
    try:
        rates = tuple(float(rate) for rate in text.split(","))
    except ValueError:
        rates = (math.nan,)
    if not all(0 < rate < math.inf for rate in rates):
        raise UsageError(f"--rates must be adam, own, or positive numbers, got {text!r}")
    return rates


def _options(text: str) -> dict[str, Any]:
    """Values are Python literals, and words without quotes."""
    pairs = [item.partition("=") for item in text.split(",") if item]
    if not all(name and sign for name, sign, _ in pairs):
        raise UsageError(f"--options must be like damping=trace,momentum=0.95, got {text!r}")
    return {name.strip(): _value(value.strip()) for name, _, value in pairs}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# --- the runs --------------------------------------------------------------------------------


def _run(command: Command, records: Records, console: Console) -> None:
    """Everything that is asked for and not finished, workload by workload."""
    plan = command.plan
    missing = {
        (workload, optimizer): keys
        for workload in _available(command, console)
        for optimizer in plan.optimizers
        if (keys := [key for key in plan.keys(workload, optimizer) if not records.has(key)])
    }
    made: dict[str, Workload] = {}  # one at a time: it holds its data
    with _progress(console, sum(map(len, missing.values()))) as (say, advance):
        for (name, optimizer), keys in missing.items():
            say(f"{name}, {optimizer}: compiling")
            if name not in made:
                made = {name: make_workload(name, command.data, plan.steps_scale)}
            stepper = _stepper(made[name], optimizer, plan.options_of(optimizer))
            for key in keys:
                say(f"{name}, {optimizer}: learning rate {key.rate:g}, seed {key.seed}")
                record = describe(key, stepper, stepper.train(key.rate, key.seed))
                records.write(key, record)
                console.print(_line(record), highlight=False)
                advance()


def _available(command: Command, console: Console) -> list[str]:
    """Workloads whose data is there."""
    names = list(command.plan.workloads)
    if command.data is not None:
        return names
    skipped = [name for name in names if PROBLEMS[name].needs]
    if skipped:
        console.print(f"skipped for want of CIFAR (pass --data DIR): {', '.join(skipped)}")
    return [name for name in names if name not in skipped]


def _stepper(workload: Workload, optimizer: str, options: Any) -> Stepper:
    try:
        return Stepper(workload, optimizer, options)
    except (TypeError, ValueError) as error:
        if not options or isinstance(error, UsageError):
            raise
        raise UsageError(f"--options do not suit {optimizer}: {error}") from error


def _line(record: Record) -> str:
    result = "lost" if record.lost else f"loss {record.start:.3g} to {record.final:.3g}"
    metric = "" if record.validation is None else f", {record.metric} {record.validation:.3g}"
    return (
        f"{record.workload}, {record.optimizer} ({record.rate:g}), seed {record.seed}: {result}"
        f"{metric}; {record.median_step_ms:.1f} ms a step, mean {record.mean_step_ms:.1f}, "
        f"compiled in {record.compile_seconds:.1f} s"
    )


def _warn_of_other_states(records: Records, console: Console) -> None:
    """Records are kept whatever the library was when they were made."""
    ours = [r for r in records.read() if r.optimizer.endswith("fac")]
    others = sum(record.library != fingerprint() for record in ours)
    if others:
        console.print(
            f"notice: {others} of {len(ours)} records of the library's optimizers in {records.runs}"
            " were made by another state of the library and are kept: use another --out for this "
            "one"
        )


@contextlib.contextmanager
def _progress(
    console: Console, runs: int
) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A progress bar, if there is a terminal: functions that describe and advance it."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("runs"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=runs)
        yield (
            lambda what: progress.update(bar, description=what),
            lambda: progress.advance(bar),
        )


# --- the report ------------------------------------------------------------------------------


def _report(command: Command, records: Records) -> None:
    """Writes report.md, report.json and two figures, of all records of this length of runs."""
    standings = Standings(entries(_counting(command.plan, records.read())))
    if not standings.cells:
        raise DataError(
            f"no optimizer has finished a workload in {records.runs}: run the command without "
            "--report, or with the same --steps-scale as before"
        )
    out, images = command.out, ("profile.png", "curves.png")
    save_profile(out / images[0], standings)
    save_curves(out / images[1], standings)
    (out / "report.md").write_text(report(standings, images))
    write_json(out / "report.json", as_plain_json(as_json(standings)))
    print(summary(standings))
    print(f"\nwritten: {', '.join(str(out / n) for n in ('report.md', 'report.json', *images))}")


def _counting(plan: Plan, records: list[Record]) -> list[Record]:
    """Records of the workloads and the length of runs that are asked for, in their order."""
    order = {name: i for i, name in enumerate(PROBLEMS)}
    counting = [
        record
        for record in records
        if record.workload in plan.workloads
        and record.steps == scaled_steps(record.workload, plan.steps_scale)
    ]
    return sorted(counting, key=lambda record: order[record.workload])


if __name__ == "__main__":
    main()
