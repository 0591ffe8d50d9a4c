"""The command line of `benchmarks.train`, checked before anything is computed."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from benchmarks.data.sets import DATASETS
from benchmarks.errors import DataError, UsageError, check_choice
from benchmarks.models.convnets import MODELS, check_model
from benchmarks.optimizers.recipes import OPTIMIZERS, Curvature, library_interval


class Defaults(NamedTuple):
    """Defaults of the options that depend on the data set."""

    model: str
    epochs: int
    batch_size: int
    search_epochs: int
    target: float
    seeds: int
    interval: int | None  # None: the library's
    damping: str


DEFAULTS = {
    "digits": Defaults("cnn", 20, 64, 4, 97.0, 5, 10, "auto"),
    "cifar10": Defaults("resnet20", 20, 128, 2, 90.0, 1, None, "auto"),
    "cifar100": Defaults("resnet20", 20, 128, 2, 60.0, 1, None, "auto"),
    "svhn": Defaults("resnet20", 20, 128, 2, 90.0, 1, None, "auto"),
    "fashion_mnist": Defaults("resnet8", 20, 128, 2, 90.0, 1, None, "auto"),
    # Without convolutions "auto" is a fixed 1e-3: far above the curvature of a loss that is a mean
    # over 64 characters.
    "alice": Defaults("transformer", 10, 32, 2, 50.0, 1, 10, "trace"),
}


def _default(option: str) -> str:
    """The default in words, for the help; by data set if they differ."""
    by_value: dict[Any, list[str]] = {}
    for dataset, defaults in DEFAULTS.items():
        by_value.setdefault(getattr(defaults, option), []).append(dataset)
    if len(by_value) == 1:
        return f"default: {next(iter(by_value))}"
    values = (f"{value:g}" if isinstance(value, float) else str(value) for value in by_value)
    pairs = zip(values, by_value.values(), strict=True)
    return "default: " + ", ".join(f"{value} for {' and '.join(names)}" for value, names in pairs)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Prints one sentence, without the whole usage before it."""
        self.exit(2, f"{self.prog}: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """Every option with its meaning."""
    parser = _Parser(
        prog="python -m benchmarks.train",
        description=(
            "Trains the same network with several optimizers, from the same parameters and with "
            "the same order of the data, each at a learning rate found by a small search. Prints "
            "a table; writes curves.png and results.json. All learning rates fall to zero along "
            "half a cosine. There is no data augmentation and no weight decay."
        ),
    )
    whole = _number(int, 1, math.inf)
    add = parser.add_argument
    add("--dataset", default="digits", help=f"{', '.join(DATASETS)} (default: digits)")
    add("--data", type=Path, metavar="DIR", help="directory with the files of CIFAR, SVHN "
        "or Fashion-MNIST, compressed or not")  # fmt: skip
    add("--subset", type=whole, metavar="N", help="use only N training examples")
    add("--model", help=f"{', '.join(MODELS)} ({_default('model')})")
    add("--width", type=whole, help="channels of the first convolution, or "
        "features per position of a transformer (default: 16; vgg16, vit and "
        "transformer: 64)")  # fmt: skip
    add("--affine", action=argparse.BooleanOptionalAction, default=True,
        help="whether BatchNorm and LayerNorm have a scale and a bias")  # fmt: skip
    add("--optimizers", default="tekfac,sgd,adam", metavar="LIST",
        help=f"comma-separated: {', '.join(OPTIMIZERS)} (default: tekfac,sgd,adam)")  # fmt: skip
    add("--epochs", type=whole, help=f"length of a run ({_default('epochs')})")
    add("--batch-size", type=whole, help=_default("batch_size"))
    add("--seeds", type=whole, metavar="N",
        help=f"runs of each optimizer, seeded 0 to N-1 ({_default('seeds')})")  # fmt: skip
    add("--learning-rates", metavar="RATES",
        help="one number for all, or e.g. tekfac=0.01,sgd=0.1: no search for these")  # fmt: skip
    add("--search-epochs", type=whole,
        help=f"length of a run in the search ({_default('search_epochs')})")  # fmt: skip
    add("--target", type=_number(float, 0, 100), metavar="PERCENT",
        help=f"test accuracy; its first epoch is reported ({_default('target')})")  # fmt: skip
    for name, what in (
        ("factor", "updates of the Kronecker factors"),
        ("eigenbasis", "eigendecompositions"),
        ("rescaling", "updates of the eigenvalues"),
    ):
        add(f"--{name}-interval", type=whole, metavar="STEPS",
            help=f"steps between {what} (default: 10 for digits and alice, whose epochs "
            f"are short; else the library's {library_interval(f'{name}_interval')})")  # fmt: skip
    add("--damping", type=_damping,
        help=f"auto, trace or a number ({_default('damping')})")  # fmt: skip
    add("--damping-scale", type=_positive_number, metavar="FACTOR",
        help="multiplies the damping (default: the library's)")  # fmt: skip
    add("--basis-rank", type=basis_rank, metavar="RANK",
        help="eigenvectors kept on each side: auto, number or share (default: all)")  # fmt: skip
    add("--out", type=Path, default=Path("out"), metavar="DIR",
        help="where curves.png and results.json go (default: out)")  # fmt: skip
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options with every default filled in.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Namespace; `optimizers` is a tuple, `learning_rates` a dict, and the curvature settings
        are together in `curvature`.

    Raises:
        DataError: unknown data set.
        UsageError: an option out of its range.
        SystemExit: with code 2, an option that is unknown or not a number.
    """
    options = build_parser().parse_args(argv)
    if options.dataset not in DATASETS:
        raise DataError(f"unknown dataset {options.dataset!r}: choose from {', '.join(DATASETS)}")
    defaults = DEFAULTS[options.dataset]
    for name in ("model", "epochs", "batch_size", "search_epochs", "target", "seeds", "damping"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(defaults, name))
    check_model(options.model, options.dataset, DATASETS[options.dataset])
    options.optimizers = _optimizers(options.optimizers)
    options.learning_rates = _learning_rates(options.learning_rates, options.optimizers)
    intervals = {}
    for name in ("factor_interval", "eigenbasis_interval", "rescaling_interval"):
        given = vars(options).pop(name)
        intervals[name] = given or defaults.interval or library_interval(name)
    options.curvature = Curvature(
        **intervals,
        damping=vars(options).pop("damping"),
        damping_scale=vars(options).pop("damping_scale"),
        basis_rank=vars(options).pop("basis_rank"),
    )
    return options


def exit_with(error: Exception, command: str) -> NoReturn:
    """Prints the error as one sentence and ends with code 2."""
    print(f"python -m benchmarks.{command}: {error}", file=sys.stderr)
    raise SystemExit(2) from error


def _number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            limits = f"from {low} to {high}" if high < math.inf else f"of {low} or more"
            raise argparse.ArgumentTypeError(f"must be {what} {limits}, got {text!r}")
        return value

    return convert


def _positive(text: str) -> float:
    """A positive number, or NaN."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if 0 < value < math.inf else math.nan


def basis_rank(text: str) -> str | int | float:
    """``auto``, a number, or a share."""
    if text == "auto":
        return text
    try:
        return int(text) if text.isdecimal() and int(text) > 0 else _share(float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be auto, a whole number, 1 or more, or a share between 0 and 1, not {text!r}"
        ) from error


def _share(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError
    return value


def _damping(text: str) -> str | float:
    if text in ("auto", "trace"):
        return text
    value = _positive(text)
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"must be auto, trace or a positive number, got {text!r}")
    return value


def _positive_number(text: str) -> float:
    value = _positive(text)
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def _optimizers(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        check_choice("optimizer", name, OPTIMIZERS)
    if len(set(names)) < len(names):
        raise UsageError(f"--optimizers {text} names one of them twice: name each once")
    return names


def _learning_rates(text: str | None, optimizers: tuple[str, ...]) -> dict[str, float]:
    if text is None:
        return {}
    pairs = [item.rpartition("=") for item in text.split(",")]
    if len(pairs) == 1 and not pairs[0][1]:
        rates = dict.fromkeys(optimizers, _positive(text))
    else:
        rates = {name.strip(): _positive(rate) for name, _, rate in pairs}
    for name in rates:
        check_choice("optimizer in --learning-rates", name, optimizers)
    if len(rates) < len(pairs) or any(map(math.isnan, rates.values())):
        raise UsageError(
            f"--learning-rates must be one positive number, or for example {optimizers[0]}=0.1, "
            f"once for each optimizer, got {text!r}"
        )
    return rates
