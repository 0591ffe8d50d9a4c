"""Text: three language models on characters, and a classifier of passages by their chapter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from benchmarks.data.sets import load_dataset
from benchmarks.data.text import read_chapters
from benchmarks.models.pooled import BagOfWords
from benchmarks.models.recurrent import LSTM
from benchmarks.models.transformers import MaskedTransformer, Transformer
from benchmarks.problems.workload import (
    Batch,
    ModelState,
    Params,
    Workload,
    classification,
    cross_entropies,
    epochs,
    initialiser,
    mean_over,
    outputs,
)

_BATCH = 24  # windows of 64 characters
# Windows are shorter for masks: with 64 positions Adam (1e-3, 3e-3) learns the frequencies of the
# characters, a loss of 3.15, and nothing else in 400 steps.
_SHORT = 16
_MASKED = 3  # of `_SHORT`, not far from BERT's 15 %


def language_model(name: str, steps: int, data: Path | None) -> Workload:
    """A pre-norm transformer predicts the next character of Alice."""
    del data
    return _next_character(name, steps, Transformer, width=64, depth=2)


def lstm(name: str, steps: int, data: Path | None) -> Workload:
    """A layer of LSTM cells predicts the next character of Alice."""
    del data
    return _next_character(name, steps, LSTM, width=96)


def _next_character(name: str, steps: int, network: Any, **options: int) -> Workload:
    text = load_dataset("alice")
    model = network(text.num_classes, **options)
    train, test = (text.train_inputs, text.train_labels), (text.test_inputs, text.test_labels)
    return classification(name, steps, model, train, test, batch_size=_BATCH, by_loss=True)


def masked_language_model(name: str, steps: int, data: Path | None) -> Workload:
    """A post-norm transformer, as BERT, restores masked characters of Alice."""
    del data
    text = load_dataset("alice")
    mask = text.num_classes
    model = MaskedTransformer(text.num_classes, text.num_classes + 1)
    train, test_windows = (x.reshape(-1, _SHORT) for x in (text.train_inputs, text.test_inputs))
    of_epochs = epochs(train, batch_size=4 * _BATCH)

    def batches(seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng([seed, 1])
        for (windows,) in of_epochs(seed):
            yield masked(windows, mask, rng)

    def losses(params: Params, model_state: ModelState, *batch: Any) -> jax.Array:
        inputs, places, labels = batch
        logits = outputs(model, params, model_state, inputs)
        return cross_entropies(jnp.take_along_axis(logits, places[..., None], 1), labels)

    def loss_fn(params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> Any:
        del key  # the masks are part of the batch
        return losses(params, model_state, *batch).mean(), model_state

    test = masked(test_windows, mask, np.random.default_rng(0))
    return Workload(
        name, steps, initialiser(model, train[:1]), loss_fn, batches,
        mean_over(losses, *test), metric="validation loss", higher_is_better=False,
    )  # fmt: skip


def masked(windows: NDArray, mask: int, rng: np.random.Generator) -> tuple[NDArray, ...]:
    """Windows (N, T) with `_MASKED` characters masked, the places of these, and what was there.

    Every window has as many: then the mean over the masked characters is one over the windows.
    """
    order = rng.permuted(np.broadcast_to(np.arange(windows.shape[1]), windows.shape), axis=1)
    places = np.sort(order[:, :_MASKED], axis=1)
    inputs = windows.copy()
    np.put_along_axis(inputs, places, mask, axis=1)
    labels = np.take_along_axis(windows, places, axis=1)
    return inputs, places.astype(np.int32), labels


def chapters(name: str, steps: int, data: Path | None) -> Workload:
    """Word vectors and their mean tell which chapter of Alice a passage is from."""
    del data
    book = read_chapters()
    # Wider vectors learn all passages by heart within the run.
    model = BagOfWords(book.num_chapters, book.num_words, width=16)
    return classification(name, steps, model, book.train, book.test, batch_size=128, small=True)
