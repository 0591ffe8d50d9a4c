"""What dominates a step: ``python -m benchmarks.profile --model resnet20``.

Runs each kind of TEKFAC step under `jax.profiler` and sums the time of its operations by the part
of the step that they belong to, according to the names in the compiled program.
"""

import argparse
import collections
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.errors import UsageError, check_choice
from benchmarks.speed import COUNTS, INTERVALS, at_count, make_task
from benchmarks.training.loop import Trainer
from benchmarks.training.options import basis_rank, exit_with
from benchmarks.training.timing import MODELS

_INSTRUCTION = re.compile(r"%?([\w.\-]+) = .* ([\w\-]+)\(.*?op_name=\"([^\"]*)\"")
_AROUND = ("while", "conditional", "call", "tuple")  # their time contains that of others


def main(argv: list[str] | None = None) -> None:
    """Prints a table: milliseconds of each part, for each kind of step."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--model", default="resnet20", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--basis-rank", type=basis_rank, help="auto, a number or a share")
    parser.add_argument("--steps", type=int, default=3, help="of each kind")
    parser.add_argument("--top", type=int, default=10, help="operations that are listed")
    options = parser.parse_args(argv)
    try:
        check_choice("model", options.model, tuple(MODELS))
        if min(options.batch_size, options.steps) < 1:
            raise UsageError("--batch-size and --steps must be 1 or more")
    except UsageError as error:
        exit_with(error, "profile")
    task = make_task(options.model, options.batch_size)
    trainer = Trainer(task, "tekfac", INTERVALS._replace(basis_rank=options.basis_rank))
    parts = parts_of(trainer.compiled.as_text() or "")
    batches = list(task.batches(seed=0, epoch=0))
    state = trainer.initial_state(0)
    found: dict[str, dict[str, float]] = {}
    single: dict[tuple[str, str], float] = collections.defaultdict(float)
    for kind, count in {"": 105, **COUNTS}.items():  # the first one fills the curvature
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for step in range(options.steps):
                    state = state.replace(opt_state=at_count(state.opt_state, count))
                    batch = batches[step % len(batches)]
                    state, _ = trainer.compiled(state, *batch, jnp.float32(1e-4))
                jax.block_until_ready(state)
            found[kind] = collections.defaultdict(float)
            for name, milliseconds in _events(Path(folder)):
                part = parts.get(name)
                if part is not None:
                    found[kind][part] += milliseconds / options.steps
                    if kind == "all three":
                        single[part, name] += milliseconds / options.steps
    _show(found, sorted(single.items(), key=lambda item: -item[1])[: options.top])


def parts_of(program: str) -> dict[str, str]:
    """For each operation of a compiled program the part of a step that it belongs to."""
    parts = {}
    for name, kind, scope in _INSTRUCTION.findall(program):
        if kind not in _AROUND:
            parts[name] = _part(scope)
    return parts


def _part(scope: str) -> str:
    ours = re.findall(r"tekfac (\w+)", scope)
    if ours:
        return ours[-1]
    if "transpose(" in scope:
        return "backward pass"
    return "forward pass" if "jvp(" in scope else "everything else"


def _events(folder: Path) -> Iterator[tuple[str, float]]:
    """(name, milliseconds) of every operation in a trace."""
    for path in folder.rglob("*.xplane.pb"):
        data: Any = jax.profiler.ProfileData.from_file(str(path))
        for plane in data.planes:
            for line in plane.lines:
                for event in line.events:
                    yield event.name, event.duration_ns / 1e6


def _show(found: dict[str, dict[str, float]], top: list[tuple[tuple[str, str], float]]) -> None:
    kinds = list(COUNTS)
    parts = sorted({part for kind in kinds for part in found[kind]},
                   key=lambda part: -found["all three"][part])  # fmt: skip
    table = Table("ms a step", *kinds)
    for part in parts:
        table.add_row(part, *(f"{found[kind][part]:.1f}" for kind in kinds))
    table.add_section()
    table.add_row("sum", *(f"{sum(found[kind].values()):.1f}" for kind in kinds))
    console = Console(width=100)
    console.print(table)
    table = Table("operation of a step with all three", "part", "ms")
    for (part, name), milliseconds in top:
        table.add_row(name, part, f"{milliseconds:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
