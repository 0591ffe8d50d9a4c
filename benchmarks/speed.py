"""What a step of TEKFAC costs, as a ratio to one of SGD: ``python -m benchmarks.speed``.

All steps are timed in one process, in turn, on random images: SGD, its peers, each kind of TEKFAC
step, then SGD again, and so on. The figures are medians of the ratios to the SGD step of the same
round. One compiled TEKFAC step serves all kinds: its three intervals are primes, and the step count
in the state is set so that one refresh, all or none of them are due. kfac-jax needs another version
of jax: `benchmarks.peers` times it, and ``--peers`` adds its figures here.
"""

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import tekfac_jax
from benchmarks.data.sets import Dataset
from benchmarks.errors import UsageError, check_choice
from benchmarks.optimizers.recipes import Curvature
from benchmarks.training.loop import Task, Trainer
from benchmarks.training.options import basis_rank, exit_with
from benchmarks.training.timing import (
    BATCHES,
    MODELS,
    draw,
    in_turn,
    peak_teraflops,
    random_images,
    ratios,
    settings,
)

# T_FIM, T_EIG, T_RE of the timed step, and step counts at which none, one or all are due.
INTERVALS = Curvature(factor_interval=3, eigenbasis_interval=5, rescaling_interval=7)
COUNTS = {"off": 1, "factors": 3, "eigenbasis": 5, "rescaling": 7, "all three": 105}
_AMORTISED = {"50/50/200": (50, 50, 200), "10/10/10": (10, 10, 10)}
_PEERS = ("sgd", "adam", "muon", "soap")


def main(argv: list[str] | None = None) -> None:
    """Times the given models, prints a table, writes JSON and a bar chart."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--models", default="cnn,resnet20", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15, help="how often every step is timed")
    parser.add_argument(
        "--basis-ranks", default="all,auto",
        help="which bases are timed: all, auto, a number, a share (default: all,auto)",
    )  # fmt: skip
    parser.add_argument(
        "--statistics-examples", type=int, help="take the curvature from this many examples"
    )
    parser.add_argument(
        "--spikes", type=int, default=0, metavar="ROUNDS",
        help="times that every step of an interval is timed, staggered and not (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--peers",
        type=Path,
        nargs="+",
        default=(),
        metavar="JSON",
        help="files that benchmarks.peers wrote, for the chart",
    )
    parser.add_argument(
        "--peak-tflops", type=float, metavar="TFLOPS",
        help="arithmetic peak of the device, to print times and the share of it that is reached "
        "(default: by the name of the GPU, if it is known)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args(argv)
    try:
        names = options.models.split(",")
        for name in names:
            check_choice("model", name, tuple(MODELS))
        examples = 1 if options.statistics_examples is None else options.statistics_examples
        if min(options.batch_size, options.rounds, examples) < 1:
            raise UsageError("--batch-size, --rounds and --statistics-examples must be 1 or more")
        if options.spikes < 0:
            raise UsageError(f"--spikes must be 0 or more, got {options.spikes}")
        if options.peak_tflops is not None and not options.peak_tflops > 0:
            raise UsageError(f"--peak-tflops must be positive, got {options.peak_tflops}")
        ranks = {text: None if text == "all" else basis_rank(text)
                 for text in options.basis_ranks.split(",")}  # fmt: skip
        others = _read_peers(options.peers)
        options.out.mkdir(parents=True, exist_ok=True)
    except (UsageError, argparse.ArgumentTypeError, OSError) as error:
        exit_with(UsageError(str(error)), "speed")
    curvatures = {
        text: INTERVALS._replace(basis_rank=rank, statistics_examples=options.statistics_examples)
        for text, rank in ranks.items()
    }
    results = {
        name: measure(name, options.batch_size, options.rounds, curvatures) for name in names
    }
    for name in names:
        for text, rank in ranks.items() if options.spikes else ():
            found = measure_spikes(name, options.batch_size, rank, rounds=options.spikes)
            results[name]["tekfac"][text]["spikes"] = found
    peak = options.peak_tflops or peak_teraflops(jax.devices()[0].device_kind)
    _show(results)
    if peak is not None:
        _show_shares(results, peak)
    record = {
        "settings": {
            "batch_size": options.batch_size,
            "rounds": options.rounds,
            "statistics_examples": options.statistics_examples,
            "peak_tflops": peak,
            "tekfac_jax": tekfac_jax.__version__,
            **settings(),
        },
        "results": results,
    }
    path = options.out / "speed.json"
    path.write_text(json.dumps(record, indent=2))
    draw({name: _bars(found, others.get(name, {})) for name, found in results.items()},
         options.out / "speed.png")  # fmt: skip
    print(f"\nwritten: {path}, {options.out / 'speed.png'}")


def _read_peers(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """What `benchmarks.peers` found, by model; read before hours of timing begin."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            for model, peers in json.loads(path.read_text())["results"].items():
                found.setdefault(model, {}).update(peers)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"--peers must be files that benchmarks.peers wrote, got {path}: {error}"
            ) from error
    return found


def measure(
    name: str, batch_size: int, rounds: int, curvatures: dict[str, Curvature]
) -> dict[str, Any]:
    """All figures of one model.

    Returns:
        For each of ``peers``, and under ``tekfac`` for each curvature and kind of step: the median
        ``ratio`` to SGD and its ``quartiles``; with the compile ``seconds`` and temporary ``mib``
        of each program, its ``gflop`` by XLA's count, and ``sgd_ms``. XLA counts the largest branch
        of a conditional: of TEKFAC that is a step with all three refreshes.
    """
    task = make_task(name, batch_size)
    trainers = {o: Trainer(task, o, INTERVALS) for o in _PEERS}
    for text, curvature in curvatures.items():
        trainers[text] = Trainer(task, "tekfac", curvature)
    batches = list(task.batches(seed=0, epoch=0))
    states = {key: trainer.initial_state(0) for key, trainer in trainers.items()}
    taken = dict.fromkeys(trainers, 0)

    def step(key: str, count: int | None = None) -> float:
        state, batch = states[key], batches[taken[key] % len(batches)]
        taken[key] += 1
        if count is not None:
            state = state.replace(opt_state=at_count(state.opt_state, count))
        jax.block_until_ready(state)
        started = time.perf_counter()
        states[key], loss = trainers[key].compiled(state, *batch, jnp.float32(1e-4))
        jax.block_until_ready((states[key], loss))
        return time.perf_counter() - started

    for _ in range(3):  # the first steps touch new memory, and fill the curvature
        for key in trainers:
            step(key, COUNTS["all three"] if key in curvatures else None)
    steps: dict[Any, Callable[[], float]] = {o: lambda o=o: step(o) for o in _PEERS}
    for text in curvatures:
        for kind, count in COUNTS.items():
            steps[text, kind] = lambda text=text, count=count: step(text, count)
    times: dict[Any, list[float]] = in_turn(steps, rounds)
    found: dict[Any, Any] = ratios(times, "sgd")

    def program(key: str) -> dict[str, float]:
        compiled = trainers[key].compiled
        memory: Any = compiled.memory_analysis()
        return {
            "compile_seconds": trainers[key].compile_seconds,
            "temporary_mib": memory.temp_size_in_bytes / 2**20,
            "gflop": trainers[key].gflop,
        }

    tekfac = {}
    for text in curvatures:
        kinds: dict[str, Any] = {kind: found[text, kind] for kind in COUNTS}
        for amortised, intervals in _AMORTISED.items():
            kinds[amortised] = {"ratio": _amortised(kinds, intervals)}
        tekfac[text] = {"kinds": kinds, **program(text)}
    return {
        "peers": {o: found[o] | program(o) for o in _PEERS},
        "tekfac": tekfac,
        "sgd_ms": 1e3 * statistics.median(times["sgd"]),
    }


def measure_spikes(
    name: str, batch_size: int, rank: Any, *, interval: int = 50, rounds: int = 3
) -> dict[str, float]:
    """The worst step of an interval over the median one, with and without `stagger`.

    All three refreshes have the same interval. Each of its steps is timed `rounds` times, in turn
    with the other kind, and its median counts. The first interval, in which everything is new, is
    left out.
    """
    task = make_task(name, batch_size)
    batches = list(task.batches(seed=0, epoch=0))
    every = Curvature(interval, interval, interval, basis_rank=rank)
    kinds = {"together": False, "staggered": True}
    trainers = {
        kind: Trainer(
            task,
            "tekfac",
            every._replace(stagger=stagger),
        )
        for kind, stagger in kinds.items()
    }
    states = {kind: trainer.initial_state(0) for kind, trainer in trainers.items()}
    times: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    for _ in range(1 + rounds):
        for kind in kinds:
            times[kind].append([])
        for step in range(interval):
            batch = batches[step % len(batches)]
            for kind, trainer in trainers.items():
                started = time.perf_counter()
                states[kind], loss = trainer.compiled(states[kind], *batch, jnp.float32(1e-4))
                jax.block_until_ready((states[kind], loss))
                times[kind][-1].append(time.perf_counter() - started)
    spikes = {}
    for kind, by_round in times.items():
        steps = np.median(by_round[1:], axis=0)
        spikes[kind] = float(steps.max() / np.median(steps))
    return spikes


def _amortised(kinds: dict[str, Any], intervals: tuple[int, int, int]) -> float:
    """Mean cost of a step: the off-step, and each refresh's surplus over its interval.

    A step on which all three fall costs what such a step costs, which is less than their sum.
    """
    off = kinds["off"]["ratio"]
    together = math.lcm(*intervals)
    total = (kinds["all three"]["ratio"] - off) / together
    for kind, interval in zip(("factors", "eigenbasis", "rescaling"), intervals, strict=True):
        total += (kinds[kind]["ratio"] - off) * (1 / interval - 1 / together)
    return off + total


def at_count(opt_state: Any, count: int) -> Any:
    """The optimizer state with another step count in the curvature's part."""

    def is_ours(node: Any) -> bool:
        return isinstance(node, tekfac_jax.ScaleByTekfacState)

    def change(node: Any) -> Any:
        return node._replace(count=jnp.int32(count)) if is_ours(node) else node

    return jax.tree.map(change, opt_state, is_leaf=is_ours)


def make_task(name: str, batch_size: int) -> Task:
    """A model on a few batches of random images."""
    model, shape = MODELS[name]
    images, labels = random_images(shape, BATCHES * batch_size)
    data = Dataset("random", images, labels, images[:1], labels[:1], 10)
    return Task(data, model, batch_size)


def _bars(found: dict[str, Any], others: dict[str, Any]) -> dict[str, float]:
    """What is drawn of one model: a step's cost by optimizer, with refreshes spread over steps."""
    bars = {o: f["ratio"] for o, f in found["peers"].items() if o != "sgd"}
    bars |= {name: value["ratio"] for name, value in others.items()}
    for text, program in found["tekfac"].items():
        for kind in ("off", *_AMORTISED, "all three"):
            label = "1/1/1" if kind == "all three" else kind
            bars[f"tekfac, {text}, {label}"] = program["kinds"][kind]["ratio"]
    return bars


def _show(results: dict[str, dict[str, Any]]) -> None:
    """Prints a column for each model."""
    table = Table("ratio to a step of SGD with momentum (quartiles)", *results)
    first = next(iter(results.values()))

    def row(label: str, cell: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(label, *(cell(found) for found in results.values()))

    for peer in _PEERS[1:]:
        row(peer, lambda found, peer=peer: _with_quartiles(found["peers"][peer]))
    row("SGD, ms a step", lambda found: f"{found['sgd_ms']:.1f}")
    for text, program in first["tekfac"].items():
        table.add_section()

        def own(found: dict[str, Any], text: str = text) -> dict[str, Any]:
            return found["tekfac"][text]

        for kind in program["kinds"]:
            ratio = functools.partial(_ratio, own, kind)
            row(f"tekfac, {text}: {kind}", ratio)
        for what in ("compile_seconds", "temporary_mib"):
            against = functools.partial(_against_sgd, own, what)
            row(f"tekfac, {text}: {what.split('_')[0]}", against)
        for kind in program.get("spikes", ()):
            spike = functools.partial(_spike, own, kind)
            row(f"tekfac, {text}: worst step over median, {kind}", spike)
    Console(width=60 + 22 * len(results)).print(table)


def _show_shares(results: dict[str, dict[str, Any]], peak: float) -> None:
    """Prints milliseconds and the share of the peak (Tflop/s) for steps whose flop are known."""
    table = Table(f"ms a step, and share of {peak:g} Tflop/s", *results)

    def cell(found: dict[str, Any], ratio: float, gflop: float) -> str:
        milliseconds = found["sgd_ms"] * ratio
        return f"{milliseconds:.2f}, {gflop / milliseconds / peak:.1%}"  # Gflop/ms = Tflop/s

    for peer in _PEERS:
        programs = {name: found["peers"][peer] for name, found in results.items()}
        table.add_row(
            peer, *(cell(results[n], p["ratio"], p["gflop"]) for n, p in programs.items())
        )
    for text in next(iter(results.values()))["tekfac"]:
        programs = {name: found["tekfac"][text] for name, found in results.items()}
        cells = (
            cell(results[n], p["kinds"]["all three"]["ratio"], p["gflop"])
            for n, p in programs.items()
        )
        table.add_row(f"tekfac, {text}: all three", *cells)
    Console(width=100).print(table)


def _ratio(own: Callable[..., dict[str, Any]], kind: str, found: dict[str, Any]) -> str:
    return _with_quartiles(own(found)["kinds"][kind])


def _with_quartiles(found: dict[str, Any]) -> str:
    """The median, and the quartiles if it was timed, not computed from others."""
    spread = found.get("quartiles", ())
    return f"{found['ratio']:.2f}" + (" ({:.2f}-{:.2f})".format(*spread) if spread else "")


def _against_sgd(own: Callable[..., dict[str, Any]], what: str, found: dict[str, Any]) -> str:
    """A program's seconds or MiB, and how many times SGD's they are."""
    value = own(found)[what]
    return f"{value:.1f} ({value / found['peers']['sgd'][what]:.1f} x)"


def _spike(own: Callable[..., dict[str, Any]], kind: str, found: dict[str, Any]) -> str:
    return f"{own(found)['spikes'][kind]:.2f}"


if __name__ == "__main__":
    main()
