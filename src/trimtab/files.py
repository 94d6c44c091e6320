"""Writing files and folders that are whole or absent, whatever happens meanwhile; reading JSON that may be neither."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trimtab.errors import FormatError, TrimtabError, UsageError


class StorageError(TrimtabError, OSError):
    """A disk that is full or a folder that cannot be written. What stood there before is untouched."""

    exit_code = 2


def cache_root(cache: Path | None = None) -> Path:
    """Where what took long to make is kept: `cache`, TRIMTAB_CACHE, or trimtab/ in XDG_CACHE_HOME or ~/.cache."""
    if cache is not None:
        return cache
    if own := os.environ.get("TRIMTAB_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "trimtab"


@contextmanager
def whole_folder(path: str | Path, *, marker: str | None = None) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends well, and vanishes otherwise.

    An existing folder is replaced only when it is empty or holds the file `marker`. Everything is on the disk
    before the name changes. What a killed process left of an earlier try is removed. Raises StorageError when the
    disk is full or the place cannot be written.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or (marker and (path / marker).exists()))):
        raise UsageError(f"{path} exists and is something else: choose another folder")
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(path)
        partial = _folder_beside(path, "partial")
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


def _folder_beside(path: Path, kind: str) -> Path:
    """A new hidden folder beside `path`; its name says which process of which machine it belongs to."""
    folder = path.with_name(f".{path.name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.{kind}")
    folder.mkdir()
    return folder


def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _clear_leftovers(path: Path) -> None:
    """Remove the folders that saves of `path` left beside it when they were killed on this machine."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.{_machine()}-(\d+)-[0-9a-f]{{8}}\.(partial|old)")
    for folder in path.parent.iterdir():
        found = ours.fullmatch(folder.name)
        # While `path` is absent, what was moved out of its place is the last whole one.
        if found and not _alive(int(found[1])) and (found[2] == "partial" or path.exists()):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    """Whether a process may still be there; always so on Windows, where asking would end it."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _open_to_readers(folder: Path) -> None:
    """Give the files within, which some writers make private, the permissions that ordinary files have here."""
    # The system made the folder as the user's umask has it, and reading the umask itself would change it meanwhile.
    mode = folder.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)


def _swap(new: Path, path: Path) -> None:
    """Give `new` the name `path`. Where the system can, they trade names at once, so that one is always there."""
    if not path.exists():
        os.rename(new, path)
        return
    if _exchange(new, path):
        shutil.rmtree(new, ignore_errors=True)
        return
    old = _folder_beside(path, "old")
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


def name_of(path: str | Path) -> str:
    """The last part of a path; of . and .. the folder's own name."""
    return Path(os.path.abspath(Path(path).expanduser())).name  # not resolved: a link is called by its own name


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


def refuse_unwritable(folder: Path) -> None:
    """StorageError for a folder that could not be made, or written into. Nothing is made to find that out."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise StorageError(f"cannot write {folder}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(f"{there} cannot be written: choose another folder")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. UsageError when it cannot be read, FormatError when it is broken, saying where."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise FormatError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, a number of a million digits, a thousand brackets
        raise FormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} must hold keys and values, but holds a {type(content).__name__}")
    return content


def whole_lines(path: Path, *, repair: bool = True) -> Iterator[tuple[int, Any]]:
    """Number and content of each line of a JSON-lines file; of none where there is no file.

    A last line without an end, as a kill leaves it, is none. repair: it is taken off the file; not to be done to a file
    that another process may be writing. FormatError for any other that is not JSON, UsageError for what cannot be read.
    """
    if not path.exists():
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    whole = content.rfind(b"\n") + 1
    if repair and whole < len(content):
        os.truncate(path, whole)
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise FormatError(f"{path} line {number} is not JSON: choose another folder, or empty this one") from error


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
    windows = os.name == "nt"
    if windows and path.is_dir():
        return  # it opens no folders, and syncs only what may be written
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
