"""Data sets from small copies of the official files (`test_cifar` has more), digits and a text."""

import gzip
import io
import os
import struct
import tarfile
import warnings

import numpy as np
import pytest
import scipy.io

from benchmarks.data import text
from benchmarks.data.cifar import VARIANTS
from benchmarks.data.sets import DATASETS, DataError, load_dataset
from benchmarks.data.text import WINDOW, cut_text
from tests.benchmarks.refusals import assert_refused


def make_split(count, size, num_classes):
    """Random images whose channels differ in mean and deviation, and labels of every kind."""
    rng = np.random.default_rng(count)
    shares = np.linspace(0.3, 1, size[2])
    images = (rng.integers(256, size=(count, *size)) * shares).astype(np.uint8)
    labels = rng.integers(num_classes, size=count).astype(np.uint8)
    labels[0], labels[1] = num_classes - 1, 0
    return images, labels


# --- small copies of what is on the web ------------------------------------------------------


def records(name, images, labels):
    """The binary version: for CIFAR-100 the superclass stands before the class."""
    superclasses = [] if name == "cifar10" else [labels // 5]
    rows = [*superclasses, labels, *images.transpose(0, 3, 1, 2).reshape(len(images), -1).T]
    return np.stack(rows, 1).astype(np.uint8).tobytes()


def binary_files(name, train, test):
    number = 5 if name == "cifar10" else 1
    parts = zip(*(np.array_split(column, number) for column in train), strict=True)
    contents = [records(name, *part) for part in parts]
    if name == "cifar10":
        names = [f"data_batch_{i}.bin" for i in range(1, 6)]
        return dict(zip(names, contents, strict=True)) | {"test_batch.bin": records(name, *test)}
    return {"train.bin": contents[0], "test.bin": records(name, *test)}


FOLDERS = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
ARCHIVES = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}


def write_folder(directory, name, files):
    (directory / FOLDERS[name]).mkdir()
    for file, content in files.items():
        (directory / FOLDERS[name] / file).write_bytes(content)


def write_archive(directory, name, files):
    with tarfile.open(directory / ARCHIVES[name], "w:gz") as archive:
        for file, content in files.items():
            member = tarfile.TarInfo(f"{FOLDERS[name]}/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_mat(path, images, labels):
    """As from Matlab: the examples along the last axis, and 10 for the digit 0."""
    classes = np.where(labels == 0, 10, labels).astype(np.uint8)
    content = {"X": images.transpose(1, 2, 3, 0), "y": classes[:, None]}
    scipy.io.savemat(path, content, do_compression=True)


def write_svhn(directory, train, test):
    write_mat(directory / "train_32x32.mat", *train)
    write_mat(directory / "test_32x32.mat", *test)


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(directory, train, test, *, pack=True):
    for prefix, (images, labels) in (("train", train), ("t10k", test)):
        for kind, array in (("images-idx3", images[..., 0]), ("labels-idx1", labels)):
            path = directory / f"{prefix}-{kind}-ubyte"
            if pack:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                path.write_bytes(idx(array))


def write_unpacked_idx(directory, train, test):
    write_idx(directory, train, test, pack=False)


# --- what comes back -------------------------------------------------------------------------


def assert_read(name, directory, train, test, mean, std):
    """Both splits come back shuffled and standardised, and a subset is the first part of it."""
    order = np.random.default_rng(0).permutation(len(train[1]))
    for subset in (None, 7):
        read = load_dataset(name, directory, subset)
        assert read.train_inputs.dtype == read.test_inputs.dtype == np.float32
        assert read.train_labels.dtype == read.test_labels.dtype == np.int32
        kept = order[:subset]
        for inputs, images in (
            (read.train_inputs, train[0][kept]),
            (read.test_inputs, test[0]),
        ):
            np.testing.assert_allclose(inputs, (images / 255 - mean) / std, atol=2e-5)
        np.testing.assert_array_equal(read.train_labels, train[1][kept])
        np.testing.assert_array_equal(read.test_labels, test[1])
        assert read.examples == "images"
    return read


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("write", [write_folder, write_archive])
def test_binary_cifar(tmp_path, name, write):
    variant = VARIANTS[name]
    train, test = (make_split(count, (32, 32, 3), variant.num_classes) for count in (20, 6))
    write(tmp_path, name, binary_files(name, train, test))
    read = assert_read(name, tmp_path, train, test, variant.mean, variant.std)
    assert read.num_classes == variant.num_classes


@pytest.mark.parametrize(
    ("name", "size", "write"),
    [
        ("svhn", (32, 32, 3), write_svhn),
        ("fashion_mnist", (28, 28, 1), write_idx),
        ("fashion_mnist", (28, 28, 1), write_unpacked_idx),
    ],
)
def test_svhn_and_fashion_mnist(tmp_path, name, size, write):
    train, test = (make_split(count, size, 10) for count in (20, 6))
    write(tmp_path, train, test)
    pixels = train[0] / 255
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    read = assert_read(name, tmp_path, train, test, mean, std)
    assert read.num_classes == 10
    whole = load_dataset(name, tmp_path).train_inputs
    np.testing.assert_allclose(whole.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(whole.std((0, 1, 2)), 1, atol=1e-5)


def test_moments_of_more_images_than_are_counted_at_once(tmp_path):
    train, test = (make_split(count, (28, 28, 1), 10) for count in (2100, 2))
    train[0][1500:] //= 4  # so that no piece is like the whole
    write_unpacked_idx(tmp_path, train, test)
    whole = load_dataset("fashion_mnist", tmp_path).train_inputs.astype(np.float64)
    np.testing.assert_allclose([whole.mean(), whole.std()], [0, 1], atol=1e-5)


@pytest.mark.skipif("TEKFAC_DATA" not in os.environ, reason="TEKFAC_DATA names no directory")
@pytest.mark.parametrize("name", FOLDERS)
def test_real_cifar_in_the_binary_layout(tmp_path, name):
    """Real images, written as records, come back as they were."""
    variant = VARIANTS[name]
    real = load_dataset(name, os.environ["TEKFAC_DATA"], subset=300)
    pixels = 255 * (real.train_inputs * np.asarray(variant.std) + np.asarray(variant.mean))
    train = pixels.round().astype(np.uint8), real.train_labels.astype(np.uint8)
    test = train[0][:5], train[1][:5]
    write_folder(tmp_path, name, binary_files(name, train, test))
    assert_read(name, tmp_path, train, test, variant.mean, variant.std)


# --- what is refused -------------------------------------------------------------------------


def splits(size, num_classes=10):
    return make_split(10, size, num_classes), make_split(4, size, num_classes)


def cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])


def break_binary_truncated(directory):
    files = binary_files("cifar10", *splits((32, 32, 3)))
    files["data_batch_2.bin"] = files["data_batch_2.bin"][:-1]
    write_folder(directory, "cifar10", files)


def break_binary_empty(directory):
    files = binary_files("cifar10", *splits((32, 32, 3)))
    write_folder(directory, "cifar10", {**files, "test_batch.bin": b""})


def break_binary_lacking(directory):
    files = binary_files("cifar10", *splits((32, 32, 3)))
    del files["data_batch_4.bin"]
    write_archive(directory, "cifar10", files)


def break_binary_labels(directory):
    write_folder(directory, "cifar10", binary_files("cifar10", *splits((32, 32, 3), 57)))


def break_binary_subset(directory):
    write_folder(directory, "cifar10", binary_files("cifar10", *splits((32, 32, 3))))


def break_svhn_nothing(directory):
    del directory


def break_svhn_lacking(directory):
    write_mat(directory / "train_32x32.mat", *splits((32, 32, 3))[0])


def break_svhn_truncated(directory):
    write_svhn(directory, *splits((32, 32, 3)))
    cut(directory / "train_32x32.mat", 5000)


def break_svhn_html(directory):
    write_svhn(directory, *splits((32, 32, 3)))
    (directory / "test_32x32.mat").write_bytes(b"<html>not found</html>" * 20)


def break_svhn_shape(directory):
    write_svhn(directory, *splits((16, 16, 3)))


def break_svhn_counts(directory):
    train, test = splits((32, 32, 3))
    write_svhn(directory, (train[0], train[1][:-1]), test)


def break_svhn_labels(directory):
    write_svhn(directory, *splits((32, 32, 3), 13))


def break_svhn_zero(directory):
    train, test = splits((32, 32, 3))
    write_svhn(directory, train, test)
    content = {"X": test[0].transpose(1, 2, 3, 0), "y": test[1][:, None]}
    scipy.io.savemat(directory / "test_32x32.mat", content)


def break_svhn_key(directory):
    write_svhn(directory, *splits((32, 32, 3)))
    scipy.io.savemat(directory / "test_32x32.mat", {"X": np.zeros((32, 32, 3, 2), np.uint8)})


def break_svhn_grey(directory):
    train, test = splits((32, 32, 3))
    train[0][..., 1] = 128
    write_svhn(directory, train, test)


def break_svhn_subset(directory):
    write_svhn(directory, *splits((32, 32, 3)))


def break_idx_nothing(directory):
    del directory


def break_idx_no_directory(directory):
    return directory / "nowhere"


def break_idx_lacking(directory):
    write_idx(directory, *splits((28, 28, 1)))
    (directory / "t10k-images-idx3-ubyte.gz").unlink()


def break_idx_truncated_gz(directory):
    write_idx(directory, *splits((28, 28, 1)))
    cut(directory / "train-images-idx3-ubyte.gz", 100)


def break_idx_truncated(directory):
    write_unpacked_idx(directory, *splits((28, 28, 1)))
    cut(directory / "train-images-idx3-ubyte", 1)


def break_idx_short(directory):
    write_unpacked_idx(directory, *splits((28, 28, 1)))
    (directory / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08")


def break_idx_magic(directory):
    write_unpacked_idx(directory, *splits((28, 28, 1)))
    path = directory / "train-labels-idx1-ubyte"
    path.write_bytes(b"\0\0\x0d\1" + path.read_bytes()[4:])


def break_idx_swapped(directory):
    write_unpacked_idx(directory, *splits((28, 28, 1)))
    (directory / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros(30, np.uint8)))


def break_idx_size(directory):
    write_idx(directory, *splits((32, 32, 1)))


def break_idx_counts(directory):
    train, test = splits((28, 28, 1))
    write_idx(directory, (train[0], train[1][:-1]), test)


def break_idx_labels(directory):
    write_idx(directory, *splits((28, 28, 1), 26))


def break_idx_subset(directory):
    write_idx(directory, *splits((28, 28, 1)))


# What is broken -> the sentence; the data set is in the name.
BREAKS = {
    break_binary_truncated: "data_batch_2.bin is damaged .* not a multiple of 3073",
    break_binary_empty: r"test_batch.bin is damaged .*labels of shape \(0,\)",
    break_binary_lacking: "lacks cifar-10-batches-bin/data_batch_4.bin: download",
    break_binary_labels: "labels from 0 to 56 where CIFAR-10 has 10 classes, 0 to 9: put",
    break_binary_subset: "a subset of 11 training .* CIFAR-10 in .* has 10: choose --subset from",
    break_svhn_nothing: "no SVHN in .* must hold train_32x32.mat and test_32x32.mat .*http",
    break_svhn_lacking: "lacks test_32x32.mat: download it from http",
    break_svhn_truncated: "train_32x32.mat is damaged or not a file of SVHN .* fetch it again",
    break_svhn_html: "test_32x32.mat is damaged or not a file of SVHN .* fetch it again",
    break_svhn_shape: r"train_32x32.mat is damaged .*X of shape \(16, 16, 3, 10\)",
    break_svhn_counts: r"train_32x32.mat is damaged .*10 images, y of shape \(9, 1\)",
    break_svhn_labels: "labels from 1 to 12 where SVHN has 10 classes, 1 to 10: put",
    break_svhn_zero: "labels from 0 to 9 where SVHN has 10 classes, 1 to 10: put",
    break_svhn_key: "test_32x32.mat is damaged .*'y'",
    break_svhn_grey: "train_32x32.mat is damaged .*all pixels are the same",
    break_svhn_subset: "a subset of 11 training images .* SVHN in .* has 10: choose --subset",
    break_idx_nothing: "no Fashion-MNIST in .* must hold train-images-idx3-ubyte, .*http",
    break_idx_no_directory: "nowhere is not a directory: pass with --data the one that holds train",
    break_idx_lacking: "lacks t10k-images-idx3-ubyte, compressed or not: get it from http",
    break_idx_truncated_gz: "train-images-idx3-ubyte.gz is damaged or not a file of Fashion-MNIST",
    break_idx_truncated: "train-images-idx3-ubyte is damaged .*7855 bytes, 7856 expected",
    break_idx_short: "t10k-labels-idx1-ubyte is damaged .*3 bytes",
    break_idx_magic: "train-labels-idx1-ubyte is damaged .* begins with 00 00 0d 01",
    break_idx_swapped: "t10k-images-idx3-ubyte is damaged .*begins with 00 00 08 01",
    break_idx_size: "train-images-idx3-ubyte.gz is damaged .*images of 32x32",
    break_idx_counts: "train-labels-idx1-ubyte.gz is damaged .*9 labels for 10 images",
    break_idx_labels: "labels from 0 to 25 where Fashion-MNIST has 10 classes, 0 to 9: put",
    break_idx_subset: "a subset of 11 training images .* Fashion-MNIST in .* has 10: choose",
}
NAMES = {"binary": "cifar10", "svhn": "svhn", "idx": "fashion_mnist"}


@pytest.mark.parametrize("function", BREAKS, ids=lambda f: f.__name__.removeprefix("break_"))
def test_broken_files_are_refused_in_one_sentence(tmp_path, function):
    layout, kind = function.__name__.split("_", 2)[1:]
    directory = function(tmp_path) or tmp_path
    with pytest.raises(DataError, match=BREAKS[function]) as caught:
        load_dataset(NAMES[layout], directory, 11 if kind == "subset" else None)
    assert "\n" not in str(caught.value)


def test_any_damaged_mat_is_refused(tmp_path):
    """Wherever it is cut or overwritten, unless what is left is still a whole data set."""
    write_svhn(tmp_path, *splits((32, 32, 3)))
    path = tmp_path / "train_32x32.mat"
    whole = path.read_bytes()
    rng, refused = np.random.default_rng(0), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, about names and encodings that are noise
        for place in rng.integers(1, len(whole) - 8, size=30):
            for content in (whole[:place], whole[:place] + rng.bytes(8) + whole[place + 8 :]):
                path.write_bytes(content)
                try:
                    load_dataset("svhn", tmp_path)
                except DataError:
                    refused += 1
    assert refused > 50


@pytest.mark.parametrize("name", ["svhn", "fashion_mnist"])
def test_a_directory_is_needed(name):
    assert DATASETS[name] == "images"
    with pytest.raises(DataError, match=f"{name} is read from a directory: pass with --data"):
        load_dataset(name)


# --- digits, and a text ----------------------------------------------------------------------


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
