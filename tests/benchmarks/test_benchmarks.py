"""The benchmarks: what is read from disk, what is refused, and one short comparison."""

import functools
import io
import json
import os
import pickle
import re
import struct
import tarfile
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import tekfac_jax as tekfac
from benchmarks import memory, peers, profile, speed
from benchmarks.data import text
from benchmarks.data.cifar import VARIANTS
from benchmarks.data.safe_pickle import safe_loads
from benchmarks.data.sets import DATASETS, DataError, load_dataset
from benchmarks.data.text import WINDOW, cut_text
from benchmarks.errors import UsageError
from benchmarks.models.convnets import MODELS, make_model
from benchmarks.models.transformers import Transformer, ViT
from benchmarks.optimizers.recipes import OPTIMIZERS, RECIPES, Curvature
from benchmarks.optimizers.soap import soap
from benchmarks.train import main
from benchmarks.training import timing
from benchmarks.training.loop import Task, Trainer, cosine
from benchmarks.training.options import parse
from benchmarks.training.search import TRIALS, search_learning_rate
from benchmarks.training.timing import random_images

CIFAR = tuple(VARIANTS)
FREQUENT = Curvature(5, 5, 5)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Users' setting: optax.adam and flax's pooling rely on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


every_cifar = pytest.mark.parametrize("name", CIFAR)


# --- small copies of what is on the web ------------------------------------------------------


def make_split(name, count, seed):
    """Random images and labels; the first label is the highest there is."""
    rng = np.random.default_rng(seed)
    num_classes = VARIANTS[name].num_classes
    labels = rng.integers(num_classes, size=count)
    labels[0] = num_classes - 1
    return rng.integers(256, size=(count, 32, 32, 3), dtype=np.uint8), labels


def batch_pickle(name, images, labels, **more):
    batch = {
        "batch_label": b"some",
        VARIANTS[name].labels_key: labels.tolist(),
        "data": images.transpose(0, 3, 1, 2).reshape(len(images), -1),
        **more,
    }
    return pickle.dumps(batch, protocol=2)


def official_files(name, train, test):
    """Contents of the official archive by file name, the training set cut into its batches."""
    variant = VARIANTS[name]
    parts = [np.array_split(column, len(variant.train_files)) for column in train]
    files = {
        file: batch_pickle(name, images, labels)
        for file, images, labels in zip(variant.train_files, *parts, strict=True)
    }
    return {**files, variant.test_file: batch_pickle(name, *test)}


def write_folder(directory, name, files):
    folder = directory / VARIANTS[name].folder
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_bytes(content)


def write_archive(directory, name, files):
    variant = VARIANTS[name]
    with tarfile.open(directory / variant.archive, "w:gz") as archive:
        for file, content in {"readme.html": b"hello", **files}.items():
            member = tarfile.TarInfo(f"{variant.folder}/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def webp(image, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", lossless=True, **options)
    return buffer.getvalue()


def pack(name, train, test, **replaced):
    arrays = {"class_names": np.array([f"c{i}" for i in range(VARIANTS[name].num_classes)])}
    for split, (images, labels) in (("train", train), ("test", test)):
        encoded = [webp(image) for image in images]
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        arrays[f"{split}_labels"] = labels.astype(np.uint8)
    return {**arrays, **replaced}


def write_packs(directory, name, train, test, halves="ab", **replaced):
    for i, half in enumerate("ab"):
        if half in halves:
            parts = [[np.array_split(x, 2)[i] for x in split] for split in (train, test)]
            np.savez(directory / f"{name}_{half}.npz", **pack(name, *parts, **replaced))


def pixels(name, images):
    variant = VARIANTS[name]
    restored = 255 * (images * np.asarray(variant.std) + np.asarray(variant.mean))
    assert abs(restored - restored.round()).max() < 1e-2
    return restored.round().astype(np.uint8)


def assert_same(name, images, labels, expected):
    assert images.dtype == np.float32
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(pixels(name, images), expected[0])
    np.testing.assert_array_equal(labels, expected[1])


# --- what comes back -------------------------------------------------------------------------


@every_cifar
@pytest.mark.parametrize("write", [write_folder, write_archive])
def test_official_archives_come_back_in_a_shuffled_order(tmp_path, name, write):
    train, test = make_split(name, 20, 1), make_split(name, 6, 2)
    write(tmp_path, name, official_files(name, train, test))
    order = np.random.default_rng(0).permutation(20)
    for subset in (None, 7):
        read = load_dataset(name, tmp_path, subset)
        expected = train[0][order[:subset]], train[1][order[:subset]]
        assert_same(name, read.train_inputs, read.train_labels, expected)
        assert_same(name, read.test_inputs, read.test_labels, test)
        assert read.num_classes == VARIANTS[name].num_classes


@every_cifar
@pytest.mark.parametrize("subset", [None, 2, 5])
def test_packs_come_back(tmp_path, name, subset, capsys):
    train, test = make_split(name, 8, 1), make_split(name, 4, 2)
    write_packs(tmp_path, name, train, test)
    read = load_dataset(name, tmp_path, subset)
    expected = train[0][:subset], train[1][:subset]
    assert_same(name, read.train_inputs, read.train_labels, expected)
    assert_same(name, read.test_inputs, read.test_labels, test)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("half", "kept"), [("a", slice(4)), ("b", slice(4, 8))])
def test_half_of_the_packs_is_used_with_a_notice(tmp_path, half, kept, capsys):
    train, test = make_split("cifar10", 8, 1), make_split("cifar10", 4, 2)
    write_packs(tmp_path, "cifar10", train, test, halves=half)
    read = load_dataset("cifar10", tmp_path)
    assert_same("cifar10", read.train_inputs, read.train_labels, (train[0][kept], train[1][kept]))
    notice = capsys.readouterr().err
    assert f"only cifar10_{half}.npz" in notice
    assert notice.count("\n") == 1


def test_pickle_as_python_2_wrote_it():
    content = bytes(range(256)) * 24
    pickled = (
        b"\x80\x02}(U\x06labels](K\x03K\x07eU\x04data"
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01(K\x02M\x00\x0ct"
        b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<i", len(content)) + content + b"tbu."
    )
    batch = safe_loads(pickled)
    assert batch[b"labels"] == [3, 7]
    np.testing.assert_array_equal(batch[b"data"], np.frombuffer(content, np.uint8).reshape(2, 3072))


def test_digits_are_split_evenly_and_standardised():
    digits = load_dataset("digits")
    assert digits.train_inputs.shape == (1437, 8, 8, 1)
    assert digits.test_inputs.shape == (360, 8, 8, 1)
    assert digits.train_inputs.mean() == pytest.approx(0, abs=1e-5)
    assert digits.train_inputs.std() == pytest.approx(1, abs=1e-5)
    # Stratified: a fifth of every class, of 174 to 183 images, to within one.
    counts = np.bincount(digits.test_labels)
    assert counts.min() >= 34
    assert counts.max() <= 38
    smaller = load_dataset("digits", subset=100)
    np.testing.assert_array_equal(smaller.train_inputs, digits.train_inputs[:100])


def test_windows_come_back_as_the_text():
    raw = "".join(chr(ord("a") + i * i % 26) for i in range(1500))
    read = cut_text(raw, None, "squares")
    assert read.num_characters == len(set(raw))
    order = np.random.default_rng(0).permutation(21)
    # 1350 characters to train with: 21 windows of 64, and the character after the last.
    for windows, rows, start, count in (
        (read.train, np.argsort(order), 0, 21),
        (read.test, slice(None), 1350, 2),
    ):
        alphabet = np.array(sorted(set(raw)))
        for array, shift in ((windows.inputs, 0), (windows.labels, 1)):
            assert array.shape == (count, WINDOW)
            assert array.dtype == np.int32
            restored = "".join(alphabet[array[rows]].ravel())
            assert restored == raw[start + shift :][: count * WINDOW]
    smaller = cut_text(raw, 5, "squares")
    np.testing.assert_array_equal(smaller.train.labels, read.train.labels[:5])
    np.testing.assert_array_equal(smaller.test.inputs, read.test.inputs)


def test_alice_is_the_book_and_nothing_else():
    alice = load_dataset("alice")
    assert alice.train_inputs.shape == alice.train_labels.shape == (2027, WINDOW)
    assert alice.test_inputs.shape == alice.test_labels.shape == (225, WINDOW)
    assert alice.num_classes == 66
    assert alice.examples == "windows"
    content = text.ALICE.read_text("ascii")
    assert content.startswith("CHAPTER I. Down the Rabbit-Hole\n\nAlice was beginning")
    assert content.endswith("her own child-life, and the happy summer days.\n")
    assert "Gutenberg" not in content


@pytest.mark.skipif("TEKFAC_DATA" not in os.environ, reason="TEKFAC_DATA names no directory")
@every_cifar
def test_real_cifar(name):
    read = load_dataset(name, os.environ["TEKFAC_DATA"], subset=2000)
    assert read.train_inputs.shape == (2000, 32, 32, 3)
    assert len(read.test_inputs) in (5000, 10000)
    assert abs(read.train_inputs.mean(axis=(0, 1, 2))).max() < 0.05
    assert abs(read.train_inputs.std(axis=(0, 1, 2)) - 1).max() < 0.05
    assert set(read.test_labels) == set(range(read.num_classes))


# --- what is refused -------------------------------------------------------------------------


def break_nothing_there(directory):
    return directory


def break_no_directory(directory):
    return directory / "nowhere"


def break_lacking_batch(directory):
    files = official_files("cifar10", make_split("cifar10", 10, 1), make_split("cifar10", 2, 2))
    del files["data_batch_3"]
    write_folder(directory, "cifar10", files)


def break_archive_lacking_batch(directory):
    files = official_files("cifar10", make_split("cifar10", 10, 1), make_split("cifar10", 2, 2))
    del files["data_batch_3"]
    write_archive(directory, "cifar10", files)


def break_truncated_batch(directory):
    files = official_files("cifar10", make_split("cifar10", 10, 1), make_split("cifar10", 2, 2))
    files["test_batch"] = files["test_batch"][:-200]
    write_folder(directory, "cifar10", files)


def break_truncated_archive(directory):
    files = official_files("cifar10", make_split("cifar10", 10, 1), make_split("cifar10", 2, 2))
    write_archive(directory, "cifar10", files)
    path = directory / VARIANTS["cifar10"].archive
    path.write_bytes(path.read_bytes()[:-3000])


def break_no_archive(directory):
    (directory / VARIANTS["cifar10"].archive).write_bytes(b"<html>not found</html>")


def break_labels_of_another_set(directory):
    train, test = make_split("cifar100", 10, 1), make_split("cifar100", 2, 2)
    write_folder(directory, "cifar10", official_files("cifar10", train, test))


def break_missing_labels(directory):
    train, test = make_split("cifar10", 10, 1), make_split("cifar10", 2, 2)
    content = pickle.dumps({"fine_labels": test[1].tolist(), "data": b""}, protocol=2)
    files = {**official_files("cifar10", train, test), "test_batch": content}
    write_folder(directory, "cifar10", files)


def break_packs(directory, **replaced):
    train, test = make_split("cifar10", 4, 1), make_split("cifar10", 4, 2)
    write_packs(directory, "cifar10", train, test, **replaced)


def break_pack_of_another_set(directory):
    train, test = make_split("cifar100", 4, 1), make_split("cifar100", 4, 2)
    write_packs(directory, "cifar100", train, test)
    (directory / "cifar100_a.npz").rename(directory / "cifar10_a.npz")


def break_pack_labels(directory):
    break_packs(directory, train_labels=np.array([3, 57], np.uint8))


def break_pack_offsets(directory):
    break_packs(directory, test_offsets=np.array([0, 10, 5], np.int64))


def break_pack_of_other_images(directory):
    image = webp(np.zeros((16, 16, 3), np.uint8))
    break_packs(
        directory,
        test_bytes=np.frombuffer(2 * image, np.uint8),
        test_offsets=np.array([0, 1, 2], np.int64) * len(image),
    )


def break_pack_of_noise(directory):
    break_packs(directory, train_bytes=np.zeros(100_000, np.uint8))


def break_pack_of_objects(directory):
    break_packs(directory, train_labels=np.array([{}, {}], object))


def break_pack_lacking_key(directory):
    np.savez(directory / "cifar10_a.npz", train_labels=np.zeros(3, np.uint8))


def break_truncated_pack(directory):
    break_packs(directory)
    path = directory / "cifar10_b.npz"
    path.write_bytes(path.read_bytes()[:-1000])


def break_single_array(directory):
    with (directory / "cifar10_a.npz").open("wb") as file:
        np.save(file, np.zeros(3))


def break_subset(directory):
    break_packs(directory)


BREAKS = {
    function.__name__.removeprefix("break_"): (function, message)
    for function, message in (
        (break_nothing_there, "no CIFAR-10 in .* it must hold"),
        (break_no_directory, "nowhere is no directory: pass with --data"),
        (break_lacking_batch, "cannot read .*data_batch_3 .*unpack"),
        (break_archive_lacking_batch, "lacks cifar-10-batches-py/data_batch_3: download"),
        (break_truncated_batch, "test_batch is damaged .* fetch it again"),
        (break_truncated_archive, "cifar-10-python.tar.gz is damaged .* fetch it again"),
        (break_no_archive, "cifar-10-python.tar.gz is damaged .* fetch it again"),
        (break_labels_of_another_set, "labels from .* to 99 where CIFAR-10 has 10 classes"),
        (break_missing_labels, "test_batch is damaged or no CIFAR file"),
        (break_pack_of_another_set, "100 classes where CIFAR-10 has 10"),
        (break_pack_labels, "labels from 3 to 57 where CIFAR-10 has 10 classes"),
        (break_pack_offsets, "test_offsets do not ascend"),
        (break_pack_of_other_images, r"test image 0 is \(16, 16\)"),
        (break_pack_of_noise, "cifar10_a.npz is damaged"),
        (break_pack_of_objects, "cifar10_a.npz is damaged"),
        (break_pack_lacking_key, "cifar10_a.npz is damaged .*class_names"),
        (break_truncated_pack, "cifar10_b.npz is damaged"),
        (break_single_array, "cifar10_a.npz is damaged"),
        (break_subset, "a subset of 5 training images .* has 4: choose --subset from 1 to 4"),
    )
}


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_data_is_refused_in_one_sentence(tmp_path, kind, capsys):
    function, message = BREAKS[kind]
    directory = function(tmp_path) or tmp_path
    subset = 5 if kind == "subset" else None
    with pytest.raises(DataError, match=message):
        load_dataset("cifar10", directory, subset)
    capsys.readouterr()
    arguments = ["--dataset", "cifar10", "--data", str(directory), "--out", str(tmp_path / "out")]
    assert_refused([*arguments, *(["--subset", "5"] if subset else [])], message, capsys)


def test_text_too_short_is_refused():
    with pytest.raises(DataError, match="squares has 640 characters: its last tenth must hold"):
        cut_text("a" * 640, None, "squares")


def test_lost_text_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text, "ALICE", tmp_path / "alice.txt")
    message = "cannot read .*alice.txt .*: restore it"
    arguments = ["--dataset", "alice", "--out", str(tmp_path)]
    assert_refused(arguments, message, capsys)
    (tmp_path / "alice.txt").write_bytes(b"\xff" * 2000)
    assert_refused(arguments, message, capsys)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickle_that_calls_something_is_refused(tmp_path):
    train, test = make_split("cifar10", 10, 1), make_split("cifar10", 2, 2)
    files = official_files("cifar10", train, test)
    evil = tmp_path / "evil"
    files["test_batch"] = batch_pickle("cifar10", *test, more=Malicious(evil))
    write_folder(tmp_path, "cifar10", files)
    with pytest.raises(DataError, match=r"test_batch is damaged .*mkdir, refused"):
        load_dataset("cifar10", tmp_path)
    assert not evil.exists()
    pickle.loads(files["test_batch"])
    assert evil.exists()  # so the pickle would have done it


@pytest.mark.parametrize(
    "asked",
    [b"cbuiltins\neval\n.", b"cnumpy\nload\n.", b"cnumpy.core.multiarray\nfromfile\n.", b"]."],
)
def test_unpickler_knows_nothing_else(asked):
    with pytest.raises(pickle.UnpicklingError):
        safe_loads(b"\x80\x02" + asked)


def assert_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    *notices, sentence = capsys.readouterr().err.splitlines()
    assert sentence.startswith("python -m benchmarks.train: ")
    assert re.search(message, sentence), sentence
    assert all(line.startswith("notice: ") for line in notices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--dataset mnist",
            "unknown dataset 'mnist': choose from digits, cifar10, cifar100, alice",
        ),
        ("--dataset cifar100", "cifar100 is read from a directory: pass with --data"),
        ("--model alexnet", "unknown model 'alexnet': choose from cnn, resnet20, vgg16, vit"),
        ("--model transformer", "transformer reads windows, digits has images: choose .* cnn or"),
        ("--dataset alice --model vit", "vit reads images, alice has windows: .* transformer, or"),
        ("--dataset alice --width 30", "a width of 30 cannot be shared out among 4 heads"),
        ("--dataset alice --subset 9000", "a subset of 9000 training windows .* alice has 2027"),
        ("--dataset alice --subset 20", "a batch of 32 is more than the 20 training windows"),
        ("--model vgg16", "vgg16 is made for 32x32 images, these are 8x8"),
        ("--optimizers tekfac,lion", "unknown optimizer 'lion'"),
        ("--optimizers sgd,sgd", "twice"),
        ("--subset 2000", "a subset of 2000 training images .* digits has 1437"),
        ("--subset 50", "a batch of 64 is more than the 50 training images"),
        ("--epochs 0", "--epochs: must be a whole number of 1 or more, got '0'"),
        ("--batch-size 2.5", "--batch-size: must be a whole number"),
        ("--factor-interval never", "--factor-interval: must be a whole number"),
        ("--target 101", "--target: must be a number from 0 to 100"),
        ("--damping much", "--damping: must be auto, trace or a positive number, got 'much'"),
        ("--damping -1", "--damping"),
        ("--basis-rank all", "--basis-rank: must be auto, a whole number, 1 or more, or a share"),
        ("--basis-rank 1.5", "--basis-rank: must be auto"),
        ("--basis-rank 0", "--basis-rank: must be auto"),
        ("--learning-rates 0", "--learning-rates must be one positive number"),
        ("--learning-rates sgd=nan", "--learning-rates must be one positive number"),
        ("--learning-rates sgd=1,sgd=2", "once for each optimizer"),
        ("--learning-rates kfac=0.1", "unknown optimizer in --learning-rates 'kfac'"),
        ("--colour red", "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(tmp_path, arguments, message, capsys):
    assert_refused([*arguments.split(), "--out", str(tmp_path)], message, capsys)


def test_out_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert_refused(["--out", str(tmp_path / "file")], "choose another --out", capsys)


# --- models ----------------------------------------------------------------------------------


def abstract_inputs(size):
    """Images (height, width, channels), or characters (length,)."""
    return jax.ShapeDtypeStruct((2, *size), np.int32 if len(size) == 1 else np.float32)


def abstract_parameters(model, size):
    x = abstract_inputs(size)
    return jax.eval_shape(model.init, jax.random.key(0), x)["params"]


@pytest.mark.parametrize(
    ("name", "size", "num_classes", "width", "count"),
    [
        ("cnn", (8, 8, 1), 10, None, 21_546),
        ("resnet20", (32, 32, 3), 10, None, 269_722),
        ("vgg16", (32, 32, 3), 10, 64, 14_724_042),
        ("vit", (32, 32, 3), 10, None, 207_946),
        ("transformer", (64,), 66, None, 212_674),
    ],
)
def test_number_of_parameters(name, size, num_classes, width, count):
    params = abstract_parameters(make_model(name, num_classes, width), size)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("resnet20", (32, 32, 3), 20),
        ("vgg16", (32, 32, 3), 14),
        ("vit", (32, 32, 3), 2 + 4 * 6 + 1),
        ("transformer", (64,), 2 + 4 * 6 + 1),
    ],
)
def test_without_affine_every_parameter_is_covered(name, size, count):
    model = make_model(name, 10, 4, affine=False)
    x = abstract_inputs(size)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def mean_logit(params, batch_stats, x):
        logits: Any = model.apply({"params": params, "batch_stats": batch_stats}, x)
        return logits.mean()

    batch_stats = variables.get("batch_stats", {})
    layers = tekfac.find_layers(mean_logit, variables["params"], batch_stats, x)
    assert len(layers) == count
    assert not layers.uncovered


def test_images_that_patches_do_not_divide_are_refused():
    with pytest.raises(UsageError, match="patches of 4x4, these are 32x30: choose"):
        abstract_parameters(ViT(), (32, 30, 3))


def test_transformer_sees_no_later_character():
    model = Transformer(num_classes=5, width=8, depth=2)
    rng = np.random.default_rng(0)
    x = rng.integers(5, size=(2, 12)).astype(np.int32)
    variables = model.init(jax.random.key(0), x)
    changed = np.where(np.arange(12) < 7, x, (x + 1) % 5)
    logits, other = (np.asarray(model.apply(variables, ids)) for ids in (x, changed))
    assert logits.shape == (2, 12, 5)
    np.testing.assert_allclose(logits[:, :7], other[:, :7], atol=1e-6)
    assert (abs(logits[:, 7:] - other[:, 7:]).max(axis=(0, 2)) > 1e-3).all()


# --- training --------------------------------------------------------------------------------


class WithNorm(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(4, (3, 3), strides=2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def task():
    return Task(load_dataset("digits", subset=640), WithNorm(), batch_size=64)


@pytest.mark.sampled
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_and_repeats_itself(task, name):
    trainer = Trainer(task, name, FREQUENT)
    run, again = (trainer.train(0.03, epochs=6, seed=7) for _ in range(2))
    assert len(run.epochs) == 6
    assert len(run.step_seconds) == 60
    assert run.train_loss < 0.5 * run.epochs[0].train_loss
    assert run.epochs_to(0.5) is not None
    # The evaluation uses the running averages of BatchNorm: they must have been carried along.
    assert run.train_loss < 2 * run.epochs[-1].train_loss
    losses = [r.epochs[0].train_loss for r in (run, again, trainer.train(0.03, epochs=6, seed=8))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "data", "rate", "accuracy"),
    [
        (ViT(10, width=16, depth=1, patch=2), "digits", 0.03, 0.5),
        (Transformer(66, width=16, depth=1), "alice", 3e-4, 0.25),
    ],
    ids=["vit", "transformer"],
)
def test_transformers_learn(model, data, rate, accuracy):
    task = Task(load_dataset(data, subset=512), model, batch_size=32)
    trainer = Trainer(task, "tekfac", Curvature(5, 5, 5, "trace"))
    assert len(trainer.layers) == 9
    run = trainer.train(rate, epochs=4, seed=0)
    assert run.train_loss < 0.9 * run.epochs[0].train_loss
    assert run.epochs_to(accuracy) is not None


@pytest.mark.slow
def test_evaluation_is_a_mean_over_characters():
    alice = load_dataset("alice", subset=40)
    task = Task(alice, Transformer(alice.num_classes, width=8, depth=1), batch_size=40)
    state = Trainer(task, "sgd", FREQUENT).initial_state(0)
    loss, accuracy = task.evaluate(state, "test")
    logits = task.model.apply({"params": state.params}, alice.test_inputs)
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    chosen = np.take_along_axis(log_probabilities, alice.test_labels[..., None], axis=-1)
    assert loss == pytest.approx(-chosen.mean(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(axis=-1) == alice.test_labels).mean())


def test_divergence_ends_a_run(task):
    run = Trainer(task, "sgd", FREQUENT).train(1e30, epochs=3, seed=0)
    assert run.diverged
    assert run.train_loss == np.inf
    assert len(run.epochs) < 3
    assert run.epochs_to(0.1) is None


def test_batches_are_a_permutation(task):
    seen = np.concatenate([labels for _, labels in task.batches(seed=1, epoch=1)])
    np.testing.assert_array_equal(np.sort(seen), np.sort(task.dataset.train_labels))
    other = np.concatenate([labels for _, labels in task.batches(seed=1, epoch=2)])
    assert (seen != other).any()


def test_batch_larger_than_the_data_is_refused(task):
    with pytest.raises(UsageError, match="641 is more than the 640 training images"):
        Task(task.dataset, task.model, batch_size=641)


def test_cosine():
    assert cosine(0.3, 0.0) == pytest.approx(0.3)
    assert cosine(0.3, 0.5) == pytest.approx(0.15)
    assert cosine(0.3, 1.0) == pytest.approx(0.0)


@pytest.mark.parametrize("best", [1e-4, 1e-3, 4e-3, 0.01, 0.02, 0.3, 10.0])
def test_search_finds_the_best_rate(best):
    search = search_learning_rate(lambda rate: abs(np.log10(rate / best)), start=0.01)
    assert len(search.losses) == TRIALS
    assert abs(np.log10(search.best / best)) < 0.4
    assert search.at_edge == (best in (1e-4, 10.0) and search.best in (1e-5, 10.0))


def test_search_survives_divergence():
    search = search_learning_rate(lambda rate: np.nan if rate > 1e-3 else rate, start=1.0)
    assert search.best in search.losses
    assert search.losses[1.0] == np.inf
    assert search.losses[search.best] <= 1e-3


# --- the whole -------------------------------------------------------------------------------


@pytest.mark.slow
def test_whole_comparison(tmp_path, capsys):
    main(
        [
            *"--epochs 4 --seeds 2 --search-epochs 1 --target 60".split(),
            *("--learning-rates", "tekfac=0.03,sgd=0.1", "--out", str(tmp_path / "new" / "out")),
        ]
    )
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "adam: training loss by learning rate" in printed.out
    assert "sgd: training loss by learning rate" not in printed.out
    assert "epochs to 60 %" in printed.out

    with Image.open(tmp_path / "new" / "out" / "curves.png") as image:
        assert image.format == "PNG"
    written = json.loads((tmp_path / "new" / "out" / "results.json").read_text())
    assert written["settings"]["curvature"]["factor_interval"] == 10
    assert written["settings"]["parameters"] == 21_546
    assert written["versions"]["jax"] == jax.__version__
    assert written["hardware"]["cpu_count"] == os.cpu_count()
    results = {result["optimizer"]: result for result in written["results"]}
    assert list(results) == ["tekfac", "sgd", "adam"]
    assert results["sgd"]["search"] is None
    assert len(results["adam"]["search"]["trials"]) == TRIALS
    for name, result in results.items():
        assert result["compile_seconds"] > 0
        assert [run["seed"] for run in result["runs"]] == [0, 1]
        for run in result["runs"]:
            assert [epoch["epoch"] for epoch in run["epochs"]] == [1, 2, 3, 4]
            assert run["train_loss"] < 1.0, name
            assert run["epochs"][-1]["test_accuracy"] > 0.8, name
            assert run["median_step_ms"] > 0


@pytest.mark.slow
def test_memory_benchmark(tmp_path, capsys):
    sizes = "--depth 4 --width 8 --positions 3 --batch-size 5".split()
    memory.main([*sizes, "--out", str(tmp_path)])
    written = json.loads((tmp_path / "memory.json").read_text())
    assert set(written["results"]) == {"scan", "scan and remat"}
    for result in written["results"].values():
        assert result["plain gradient"] < result["with raw statistics"]
        assert all(value > 0 for value in result.values())
    for name, state in written["states"].items():
        assert state["Adam"] == 2 * state["SGD with momentum"], name
        assert state["SGD with momentum"] < state['TEKFAC, basis_rank="auto"'] < state["TEKFAC"]
        # Two factors, two bases, and three times the parameters: Θ and momentum here, and there
        # two averages.
        assert state["TEKFAC"] == pytest.approx(state["SOAP"], rel=1e-3)
    assert "with reduced statistics" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        memory.main(["--depth", "0"])
    assert end.value.code == 2


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set_has_defaults(dataset):
    parsed = parse(["--dataset", dataset])
    assert parsed.model in MODELS
    assert parsed.curvature.factor_interval >= 1


@pytest.mark.slow
def test_speed_and_spikes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "measure_spikes", functools.partial(
        speed.measure_spikes, interval=3, rounds=1
    ))  # fmt: skip
    speed.main(["--models", "cnn", "--batch-size", "8", "--rounds", "2", "--spikes", "1",
                "--peak-tflops", "0.05", "--out", str(tmp_path)])  # fmt: skip
    found = json.loads((tmp_path / "speed.json").read_text())["results"]["cnn"]
    assert set(found["peers"]) == {"sgd", "adam", "muon", "soap"}
    assert set(found["tekfac"]) == {"all", "auto"}
    for program in found["tekfac"].values():
        kinds = program["kinds"]
        assert set(kinds) == {"off", "factors", "eigenbasis", "rescaling", "all three",
                              "50/50/200", "10/10/10"}  # fmt: skip
        assert min(kind["ratio"] for kind in kinds.values()) > 0
        assert set(program["spikes"]) == {"together", "staggered"}
        assert min(program["spikes"].values()) >= 1
    assert (tmp_path / "speed.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "worst step over median, staggered" in printed
    sgd = found["peers"]["sgd"]
    share = sgd["gflop"] / found["sgd_ms"] / 0.05
    assert f"{found['sgd_ms']:.2f}, {share:.1%}" in printed
    assert found["tekfac"]["all"]["gflop"] > sgd["gflop"] > 1e-3
    for wrong in (["--rounds", "0"], ["--basis-ranks", "all,most"], ["--models", "no"],
                  ["--peak-tflops", "0"]):  # fmt: skip
        with pytest.raises(SystemExit):
            speed.main(wrong)
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    for wrong, says in (
        (["--peers", str(damaged)], "--peers must be files that benchmarks.peers wrote"),
        (["--spikes", "-1"], "--spikes must be 0 or more"),
        (["--rescaling-examples", "0"], "1 or more"),
        (["--out", str(damaged)], "exists"),
    ):
        with pytest.raises(SystemExit):  # before anything is timed
            speed.main(wrong)
        assert says in capsys.readouterr().err


def test_peaks_by_the_name_of_a_gpu():
    assert timing.peak_teraflops("NVIDIA H100 80GB HBM3") == 494.7
    assert timing.peak_teraflops("cpu") is None


def test_what_falls_together_costs_once():
    kinds = {"off": 1.0, "factors": 2.0, "eigenbasis": 3.0, "rescaling": 4.0, "all three": 5.0}
    kinds = {kind: {"ratio": ratio} for kind, ratio in kinds.items()}
    assert speed._amortised(kinds, (10, 10, 10)) == pytest.approx(1 + 4 / 10)
    # Of 200 steps one with all three, and three with factors and eigenbasis.
    expected = 1 + (4 + 3 * (1 + 2)) / 200
    assert speed._amortised(kinds, (50, 50, 200)) == pytest.approx(expected)


@pytest.mark.slow
def test_profile(capsys):
    profile.main(["--model", "cnn", "--batch-size", "8", "--steps", "1"])
    out = capsys.readouterr().out
    for part in ("forward pass", "backward pass", "factors", "eigenbasis", "precondition"):
        assert part in out
    with pytest.raises(SystemExit):
        profile.main(["--steps", "0"])


def test_peers_that_are_not_installed(tmp_path, monkeypatch, capsys):
    """SGD in their place: periods, ratios and JSON; and a sentence where there is none."""
    arguments = ["--models", "cnn", "--rounds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(peers, "is_installed", lambda: False)
    with pytest.raises(SystemExit):
        peers.main(arguments)
    assert "neither kfac-jax nor psgd-jax is installed" in capsys.readouterr().err

    asked = []

    def stand_in(task, settings):
        asked.append(settings)
        return Trainer(task, "sgd", {"learning_rate": 0.0})

    monkeypatch.setattr(peers, "is_installed", lambda: True)
    for wrong, says in ((["--models", "nosuch"], "nosuch"), (["--rounds", "0"], "1 or more")):
        with pytest.raises(SystemExit):
            peers.main([*arguments, *wrong])
        assert says in capsys.readouterr().err
    monkeypatch.setattr(peers, "KfacJaxTrainer", stand_in)
    monkeypatch.setitem(peers.RECIPES, "kron", RECIPES["sgd"])
    peers.main(arguments)
    assert asked == [{"curvature_update_period": 10, "inverse_update_period": 10}]
    found = json.loads((tmp_path / "peers.json").read_text())["results"]["cnn"]
    assert set(found) == {"kfac-jax, 10/10", "PSGD Kron, 0.03"}
    assert all(peer["ratio"] > 0 for peer in found.values())


def test_images_have_a_natural_spectrum():
    images, labels = random_images((16, 12, 2), 40)
    assert images.shape == (40, 16, 12, 2)
    assert images.dtype == np.float32
    assert set(labels) <= set(range(10))
    power = (np.abs(np.fft.fft2(images, axes=(1, 2))) ** 2).mean(axis=(0, 3))
    assert power[0, 1] > 3 * power[0, 3] > 9 * power[0, 6]


def test_soap_is_adam_in_the_eigenbasis():
    """Against the same steps written out with numpy, and Adam where nothing is rotated."""
    rng = np.random.default_rng(0)
    grads = [{"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)} for _ in range(4)]
    tx = soap(0.1, interval=100)
    state = tx.init(grads[0])
    update, state = tx.update(grads[0], state)
    np.testing.assert_array_equal(update["w"], 0)
    left, right = (np.linalg.eigh(f)[1][:, ::-1] for f in
                   (grads[0]["w"] @ grads[0]["w"].T, grads[0]["w"].T @ grads[0]["w"]))  # fmt: skip
    mean, square = 0.0, 0.0
    for k, g in enumerate(grads[1:], start=1):
        update, state = tx.update(g, state)
        g = np.asarray(g["w"])
        mean = 0.95 * mean + 0.05 * g
        square = 0.95 * square + 0.05 * (left.T @ g @ right) ** 2
        direction = left.T @ mean @ right / (1 - 0.95**k)
        direction = direction / (np.sqrt(square / (1 - 0.95**k)) + 1e-8)
        np.testing.assert_allclose(update["w"], -0.1 * left @ direction @ right.T, rtol=2e-3)
        if k == 1:  # as Adam's first: a sign in each direction
            np.testing.assert_allclose(np.abs(direction), 1, rtol=1e-3)
