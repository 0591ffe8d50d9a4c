"""A text cut into windows of characters, or into passages of words with their chapters.

The text is *Alice's Adventures in Wonderland* by Lewis Carroll, first published in London in 1865.
Its author died in 1898, so it is in the public domain. `alice.txt` holds the twelve chapters and
nothing else, in ASCII: 144,206 characters, 66 of them distinct.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.errors import DataError, check_subset

WINDOW = 64
ALICE = Path(__file__).with_name("alice.txt")


class Windows(NamedTuple):
    """Characters as numbers, and for each the next character; both (N, WINDOW), int32."""

    inputs: NDArray[np.int32]
    labels: NDArray[np.int32]


class RawText(NamedTuple):
    """Training and test set of a text, and its number of distinct characters."""

    train: Windows
    test: Windows
    num_characters: int


class Passages(NamedTuple):
    """Words as numbers (N, length), and the chapter that each passage is from (N,); int32."""

    inputs: NDArray[np.int32]
    labels: NDArray[np.int32]


class Chapters(NamedTuple):
    """Training and test passages of a book, its number of distinct words and of chapters."""

    train: Passages
    test: Passages
    num_words: int
    num_chapters: int


def read_alice(subset: int | None) -> RawText:
    """The whole book; errors as in `load_dataset`."""
    return cut_text(_alice(), subset, "alice")


def read_chapters(length: int = 24, stride: int = 1) -> Chapters:
    """Passages of the book, labelled with their chapters; the headings are left out.

    The last sixth of each chapter is for the test: no word of it is in a training passage.

    Args:
        length: words of a passage.
        stride: words from the start of a passage to the start of the next one.
    """
    _, *texts = re.split(r"^CHAPTER .*$", _alice(), flags=re.MULTILINE)
    chapters = [re.findall(r"[a-z]+", text.lower()) for text in texts]
    number = {word: i for i, word in enumerate(sorted(set().union(*chapters)))}
    coded = [np.array([number[word] for word in words], np.int32) for words in chapters]
    ends = [len(words) * 5 // 6 for words in coded]
    train = [words[:end] for words, end in zip(coded, ends, strict=True)]
    test = [words[end:] for words, end in zip(coded, ends, strict=True)]
    return Chapters(
        _passages(train, length, stride), _passages(test, length, stride), len(number), len(coded)
    )


def _passages(chapters: list[NDArray[np.int32]], length: int, stride: int) -> Passages:
    cut = [np.lib.stride_tricks.sliding_window_view(c, length)[::stride] for c in chapters]
    labels = np.repeat(np.arange(len(cut), dtype=np.int32), [len(passages) for passages in cut])
    return Passages(np.concatenate(cut), labels)


def _alice() -> str:
    try:
        return ALICE.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {ALICE} ({error}): restore it, it is part of the benchmarks"
        ) from error


def cut_text(text: str, subset: int | None, name: str) -> RawText:
    """Cuts a text into windows that do not overlap; its last tenth is the test set.

    Args:
        text: long enough for a window in its last tenth.
        subset: keep only that many training windows, in a fixed random order.
        name: of the text, for errors.

    Returns:
        `RawText`; a character's number is its place in the sorted alphabet of the whole text.

    Raises:
        DataError: a text too short, or `subset` larger than the training set.
    """
    alphabet, numbers = np.unique(list(text), return_inverse=True)
    end = len(numbers) * 9 // 10
    if len(numbers) - end <= WINDOW:
        raise DataError(
            f"{name} has {len(numbers)} characters: its last tenth must hold more than {WINDOW}, "
            "choose a longer text"
        )
    train, test = _windows(numbers[:end]), _windows(numbers[end:])
    check_subset(subset, len(train.inputs), name, "windows")
    order = np.random.default_rng(0).permutation(len(train.inputs))[:subset]
    return RawText(Windows(train.inputs[order], train.labels[order]), test, len(alphabet))


def _windows(numbers: NDArray[np.intp]) -> Windows:
    """The labels of a window are its inputs shifted by one character."""
    count = (len(numbers) - 1) // WINDOW
    used = numbers[: count * WINDOW + 1].astype(np.int32)
    return Windows(used[:-1].reshape(count, WINDOW), used[1:].reshape(count, WINDOW))
