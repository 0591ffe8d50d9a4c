"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from disk, as uint8.

Three layouts are read: the official archives in the python or the binary version, unpacked or not,
and a pair of `.npz` packs, each with half of the images as lossless WebP.
"""

import functools
import io
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.data.readers import (
    DAMAGE,
    Moments,
    RawImages,
    Source,
    Split,
    check_directory,
    checked_labels,
    damaged,
    joined,
    shuffled,
)
from benchmarks.data.safe_pickle import safe_loads
from benchmarks.errors import DataError, check_subset

_SIZE = 32
_DOWNLOAD = "https://www.cs.toronto.edu/~kriz/cifar.html"


class Binary(NamedTuple):
    """Files of the binary version: bytes of labels and of pixels, image after image."""

    folder: str
    archive: str
    train_files: tuple[str, ...]
    test_file: str
    label_bytes: int  # before each image; the last one is the class


class Variant(NamedTuple):
    """What tells the two data sets apart."""

    title: str
    num_classes: int
    folder: str  # of the official python archive
    archive: str
    train_files: tuple[str, ...]
    test_file: str
    labels_key: str
    binary: Binary
    packs: tuple[str, str]
    # Per channel over the whole training set, pixels in 0..1; one pack alone holds half of it.
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def files(self) -> str:
        """What the directory may hold, in words."""
        return (
            f"{self.folder}, {self.archive}, {self.binary.folder}, {self.binary.archive}, or "
            f"{' and '.join(self.packs)} ({_DOWNLOAD})"
        )


VARIANTS = {
    "cifar10": Variant(
        "CIFAR-10", 10, "cifar-10-batches-py", "cifar-10-python.tar.gz",
        tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "labels",
        Binary("cifar-10-batches-bin", "cifar-10-binary.tar.gz",
               tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", 1),
        ("cifar10_a.npz", "cifar10_b.npz"),
        (0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159),
    ),
    "cifar100": Variant(
        "CIFAR-100", 100, "cifar-100-python", "cifar-100-python.tar.gz",
        ("train",), "test", "fine_labels",
        Binary("cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin",), "test.bin", 2),
        ("cifar100_a.npz", "cifar100_b.npz"),
        (0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615),
    ),
}  # fmt: skip


def read_cifar(variant: Variant, directory: Path, subset: int | None) -> RawImages:
    """Reads whichever layout `directory` holds; errors as in `load_dataset`.

    The python and the binary version have the same images in the same order.
    """
    check_directory(directory, variant.files)
    for layout, parse in ((variant, _parse_batch), (variant.binary, _parse_records)):
        contents = _read_files(layout, directory)
        if contents is not None:
            *train, test = [parse(variant, *item) for item in contents.items()]
            kept = shuffled(joined(train), subset, f"{variant.title} in {directory}")
            return RawImages(kept, test, Moments(variant.mean, variant.std))
    packs = [directory / name for name in variant.packs if (directory / name).is_file()]
    if not packs:
        raise DataError(f"no {variant.title} in {directory}: it must hold {variant.files}")
    return _from_packs(variant, packs, directory, subset)


SOURCES = {
    name: Source(
        variant.title, variant.num_classes, variant.files, functools.partial(read_cifar, variant)
    )
    for name, variant in VARIANTS.items()
}


# --- the official archives -------------------------------------------------------------------


def _read_files(layout: Variant | Binary, directory: Path) -> dict[str, bytes] | None:
    """File contents by path, the test set last; None if neither folder nor archive is there."""
    names = (*layout.train_files, layout.test_file)
    if (directory / layout.folder).is_dir():
        return _read_folder(directory / layout.folder, names)
    if (directory / layout.archive).is_file():
        return _read_archive(directory / layout.archive, layout.folder, names)
    return None


def _read_folder(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    try:
        return {str(folder / name): (folder / name).read_bytes() for name in names}
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename} ({error.strerror}): unpack the archive again"
        ) from error


def _read_archive(path: Path, folder: str, names: tuple[str, ...]) -> dict[str, bytes]:
    wanted = {f"{folder}/{name}" for name in names}
    contents = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            # One pass in file order: seeking back would decompress it from the start.
            for member in archive:
                file = archive.extractfile(member) if member.name in wanted else None
                if file is not None:
                    contents[member.name] = file.read()
    except DAMAGE as error:
        raise _damaged(path, error) from error
    if missing := sorted(wanted - set(contents)):
        raise DataError(f"{path} lacks {missing[0]}: download it again from {_DOWNLOAD}")
    return {f"{path}/{folder}/{name}": contents[f"{folder}/{name}"] for name in names}


def _parse_batch(variant: Variant, where: str, content: bytes) -> Split:
    try:
        batch = safe_loads(content)
        batch = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        images = batch["data"].reshape(-1, 3, _SIZE, _SIZE).transpose(0, 2, 3, 1)
        labels = np.asarray(batch[variant.labels_key], np.int64)
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{len(images)} images, labels of shape {labels.shape}")
    # To the unpickler a damaged pickle is a random program: it can raise nearly anything.
    except Exception as error:
        raise _damaged(where, error) from error
    return Split(images, checked_labels(labels, variant.num_classes, variant.title, where))


def _parse_records(variant: Variant, where: str, content: bytes) -> Split:
    label_bytes = variant.binary.label_bytes
    size = label_bytes + 3 * _SIZE**2
    if len(content) % size:
        raise _damaged(where, f"{len(content)} bytes are not a multiple of {size}")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    images = records[:, label_bytes:].reshape(-1, 3, _SIZE, _SIZE).transpose(0, 2, 3, 1)
    labels = records[:, label_bytes - 1]
    return Split(images, checked_labels(labels, variant.num_classes, variant.title, where))


# --- the packed pair ---------------------------------------------------------------------------


def _from_packs(
    variant: Variant, paths: list[Path], directory: Path, subset: int | None
) -> RawImages:
    if len(paths) < len(variant.packs):
        print(
            f"notice: of {' and '.join(variant.packs)} only {paths[0].name} is in {directory}: "
            f"continuing with this half of {variant.title}",
            file=sys.stderr,
        )
    packs = [_read_pack(variant, path) for path in paths]
    available = sum(len(pack["train_labels"]) for pack in packs)
    check_subset(subset, available, f"{variant.title} in {directory}")
    left = available if subset is None else subset
    train, test = [], []
    for path, pack in zip(paths, packs, strict=True):
        train.append(_decode(path, pack, "train", left))
        left -= len(train[-1].labels)
        test.append(_decode(path, pack, "test", len(pack["test_labels"])))
    return RawImages(joined(train), joined(test), Moments(variant.mean, variant.std))


def _read_pack(variant: Variant, path: Path) -> dict[str, NDArray]:
    try:
        # Opened here because numpy does not close a damaged file.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            pack = {key: file[key] for key in file.files}
        num_classes = len(pack["class_names"])
        for split in ("train", "test"):
            offsets, labels = pack[f"{split}_offsets"], pack[f"{split}_labels"]
            if offsets.shape != (len(labels) + 1,) or offsets.dtype != np.int64:
                raise ValueError(f"{split}_offsets do not match {len(labels)} {split}_labels")
            if np.any(np.diff(offsets) < 0) or offsets[0] < 0:
                raise ValueError(f"{split}_offsets do not ascend")
            if pack[f"{split}_bytes"].dtype != np.uint8:
                raise ValueError(f"{split}_bytes are not bytes")
            if offsets[-1] > len(pack[f"{split}_bytes"]):
                raise ValueError(f"{split}_bytes end before the last image")
    except (*DAMAGE, AttributeError, TypeError, IndexError) as error:
        raise _damaged(path, error) from error
    if num_classes != variant.num_classes:
        raise DataError(
            f"{path} has {num_classes} classes where {variant.title} has {variant.num_classes}: "
            "put the right file there"
        )
    for key in ("train_labels", "test_labels"):
        pack[key] = checked_labels(pack[key], variant.num_classes, variant.title, path)
    return pack


def _decode(path: Path, pack: dict[str, NDArray], split: str, count: int) -> Split:
    labels = pack[f"{split}_labels"][:count]
    content, offsets = pack[f"{split}_bytes"], pack[f"{split}_offsets"]
    images = np.empty((len(labels), _SIZE, _SIZE, 3), np.uint8)
    for i in range(len(labels)):
        encoded = content[offsets[i] : offsets[i + 1]].tobytes()
        try:
            with Image.open(io.BytesIO(encoded), formats=["WEBP"]) as image:
                if image.size != (_SIZE, _SIZE) or image.mode != "RGB":
                    raise ValueError(f"{split} image {i} is {image.size}, {image.mode}")
                images[i] = np.asarray(image)
        except DAMAGE as error:
            raise _damaged(path, error) from error
    return Split(images, labels)


def _damaged(where: Path | str, why: object) -> DataError:
    return damaged(where, "CIFAR", why)
