"""Writing files and folders that are whole or absent, whatever happens meanwhile."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trimtab.errors import TrimtabError, UsageError


class StorageError(TrimtabError, OSError):
    """A disk that is full or a folder that cannot be written. What stood there before is untouched."""

    exit_code = 2


@contextmanager
def whole_folder(path: str | Path, *, marker: str | None = None) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends well, and vanishes otherwise.

    An existing folder is replaced only when it is empty or holds the file `marker`. Everything is on the disk
    before the name changes. Raises StorageError when the disk is full or the place cannot be written.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or (marker and (path / marker).exists()))):
        raise UsageError(f"{path} exists and is something else: choose another folder")
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        yield partial
        _open_to_readers(partial)
        for file in partial.rglob("*"):
            _sync(file)
        _sync(partial)
        _swap(partial, path)
        _sync(path.parent)
    except OSError as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise storage_error(error, path) from error
    except BaseException:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _open_to_readers(folder: Path) -> None:
    """Give what temporary-file functions made private the permissions that ordinary files would have here."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _swap(new: Path, path: Path) -> None:
    """Give `new` the name `path`. Where the system can, they trade names at once, so that one is always there."""
    if not path.exists():
        os.rename(new, path)
        return
    if _exchange(new, path):
        shutil.rmtree(new, ignore_errors=True)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    os.rename(path, old / path.name)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old / path.name, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux's renameat2); False where the system or its file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Write one file, whole or not at all. Text is UTF-8. Raises StorageError."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        _sync(partial)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):  # the reason to tell is the first one
            partial.unlink(missing_ok=True)
        raise storage_error(error, path) from error
    return path


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise what safetensors says of a full disk and the like as the OSError it is."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error), str(path)) from error


def storage_error(error: OSError, path: Path) -> TrimtabError:
    """What to tell a user of an OSError met while writing `path`."""
    if isinstance(error, TrimtabError):
        return error
    if error.errno == errno.ENOSPC:
        return StorageError(f"no space left on the disk of {path}: free some or choose another folder")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"{path} cannot be written ({error.strerror}): choose another folder")
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return StorageError(f"cannot write {path}: a part of that path is a file, not a folder")
    return StorageError(f"cannot write {path}: {error.strerror or error}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
