"""CIFAR's python version and the packs: what comes back, what is refused, and pickles."""

import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from benchmarks.data.cifar import VARIANTS
from benchmarks.data.safe_pickle import safe_loads
from benchmarks.data.sets import DataError, load_dataset
from tests.benchmarks.refusals import assert_refused

CIFAR = tuple(VARIANTS)
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
        (break_no_directory, "nowhere is not a directory: pass with --data"),
        (break_lacking_batch, "cannot read .*data_batch_3 .*unpack"),
        (break_archive_lacking_batch, "lacks cifar-10-batches-py/data_batch_3: download"),
        (break_truncated_batch, "test_batch is damaged .* fetch it again"),
        (break_truncated_archive, "cifar-10-python.tar.gz is damaged .* fetch it again"),
        (break_no_archive, "cifar-10-python.tar.gz is damaged .* fetch it again"),
        (break_labels_of_another_set, "labels from .* to 99 where CIFAR-10 has 10 classes"),
        (break_missing_labels, "test_batch is damaged or not a file of CIFAR"),
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


# --- pickles ---------------------------------------------------------------------------------


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
