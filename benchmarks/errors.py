"""Errors that can occur before a run starts; the command line prints each as one sentence."""


class UsageError(ValueError):
    """A setting that cannot be used: its value, what is permitted, and the remedy."""


class DataError(ValueError):
    """A data set that cannot be read: where it was looked for, and the remedy."""


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises a `UsageError` unless `value` is one of `choices`."""
    if value not in choices:
        raise UsageError(f"unknown {what} {value!r}: choose from {', '.join(choices)}")


def check_subset(subset: int | None, available: int, where: str, examples: str = "images") -> None:
    """Raises a `DataError` unless `available` training examples are enough."""
    if subset is not None and not 1 <= subset <= available:
        raise DataError(
            f"a subset of {subset} training {examples} was asked for, {where} has {available}: "
            f"choose --subset from 1 to {available}"
        )
