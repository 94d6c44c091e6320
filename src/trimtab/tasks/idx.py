"""The IDX files of MNIST, plain or gzipped (yann.lecun.com/exdb/mnist: header big-endian, then the values)."""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trimtab.errors import FormatError, UsageError
from trimtab.models.load import hub_revision
from trimtab.tasks.task import VARIABLE

UNSIGNED_BYTE = 0x08
GZIP = b"\x1f\x8b"

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
"""Images and labels of each half, as they are published."""
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(@.+)?")
"""OWNER/NAME of a hub's repository, or OWNER/NAME@REVISION."""


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes. FormatError, naming the file, where it is none or not whole."""
    content = _content(path)
    expected = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if content[:4] != expected:
        raise FormatError(
            f"{path} begins with {content[:4].hex() or 'nothing'}, but an IDX file of unsigned bytes in {dimensions} "
            f"dimensions begins with {expected.hex()}: is it another file under this name?"
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise FormatError(f"{path} is truncated: it ends within its header of {start} bytes; download it again")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    if len(content) != start + math.prod(shape):
        raise FormatError(
            f"{path} holds {len(content) - start} values, but its header says {' × '.join(map(str, shape))} = "
            f"{math.prod(shape)}: it is truncated or damaged; download it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_pair(folder: Path, half: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Images [n, rows, columns] and labels [n] of a half, train or test. FormatError where they do not fit."""
    images_file, labels_file = (_found(folder, name) for name in FILES[half])
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(images) != len(labels):
        raise FormatError(
            f"{images_file} has {len(images)} images, but {labels_file} {len(labels)} labels: take both of one data set"
        )
    return images, labels


def mnist_folder(data_dir: Path | None) -> Path:
    """The folder with the four files: `data_dir` or what TRIMTAB_DATA names, or mnist/ in it. UsageError if none.

    data_dir may also name a dataset repository of the Hugging Face hub that holds them, OWNER/NAME or
    OWNER/NAME@REVISION; they are fetched then.
    """
    names = ", ".join(name for pair in FILES.values() for name in pair)
    wanted = f"the four files {names} (each plain or .gz)"
    named = data_dir or os.environ.get(VARIABLE)
    if not named:
        raise UsageError(
            f"MNIST is not part of trimtab: name the folder with --data-dir or in {VARIABLE}; it holds {wanted}"
        )
    by, folder = "--data-dir" if data_dir else VARIABLE, Path(named).expanduser()
    if data_dir and not folder.is_dir() and REPOSITORY.fullmatch(str(data_dir)):
        folder = _fetched(str(data_dir), wanted)
    if not folder.is_dir():
        raise UsageError(f"{by} names {folder}, which is no folder; MNIST needs {wanted}")
    for candidate in (folder, folder / "mnist"):
        if not _missing(candidate):
            return candidate
    raise UsageError(f"{by} names {named}, which lacks {', '.join(_missing(folder))}; MNIST needs {wanted}")


def _fetched(name: str, wanted: str) -> Path:
    """The folder with those of the files that a dataset repository of the hub has."""
    from huggingface_hub import snapshot_download

    repository, revision = hub_revision(name)
    files = [f"{folder}{own}*" for pair in FILES.values() for own in pair for folder in ("", "mnist/")]
    try:
        return Path(snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=files))
    except Exception as error:  # the hub's library and those of the connection raise their own
        raise UsageError(
            f"--data-dir names {name}, which is no folder here, and as a dataset repository of the hub it cannot be "
            f"had ({' '.join(str(error).split())[:200]}); MNIST needs {wanted}"
        ) from error


def _missing(folder: Path) -> list[str]:
    return [name for pair in FILES.values() for name in pair if not _found(folder, name).is_file()]


def _found(folder: Path, name: str) -> Path:
    plain = folder / name
    return plain if plain.is_file() else folder / f"{name}.gz"


def _content(path: Path) -> bytes:
    """What a file holds, unpacked where it is gzipped: told by its first bytes, whatever it is called."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == GZIP else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FormatError(f"{path} is truncated or damaged ({error}); download it again") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
