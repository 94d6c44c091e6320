"""Files and folders that are whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from trimtab.errors import UsageError
from trimtab.files import StorageError, storage_error, whole_folder, write_whole


def test_a_folder_appears_only_when_its_block_ends(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "deep" / "run") as partial:
        (partial / "a").write_text("1")
        (partial / "in").mkdir()
        (partial / "in" / "b").write_text("2")
        assert not (tmp_path / "deep" / "run").exists()
    assert (tmp_path / "deep" / "run" / "in" / "b").read_text() == "2"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["run"]
    assert (tmp_path / "deep" / "run").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("exchange", [True, False])
def test_a_marked_folder_is_replaced_as_a_whole(exchange: bool, tmp_path: Path, monkeypatch) -> None:
    if not exchange:  # as on a system that cannot swap two names
        monkeypatch.setattr("trimtab.files._exchange", lambda first, second: False)
    for content in ("old", "new"):
        with whole_folder(tmp_path / "run", marker="mark") as partial:
            (partial / "mark").write_text(content)
            (partial / content).write_text("")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["mark", "new"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_name_is_never_without_a_folder_while_it_is_replaced(tmp_path: Path, monkeypatch) -> None:
    """Where names can be swapped, no rename takes the old folder away first."""
    renames = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (renames.append((a, b)), rename(a, b)))
    for _ in range(2):
        with whole_folder(tmp_path / "run", marker="mark") as partial:
            (partial / "mark").write_text("")
    if len(renames) > 1:
        pytest.skip("this file system cannot swap two names")
    assert renames[0][1] == tmp_path / "run"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with whole_folder(tmp_path / "run") as partial:
        (partial / "a").write_text("1")
    assert (tmp_path / "run" / "a").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_something_else_is_never_replaced(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "thesis"
    if kind == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "chapter").write_text("mine")
    with pytest.raises(UsageError, match="exists and is something else"), whole_folder(place, marker="mark"):
        pytest.fail("the block must not run")
    assert (place if kind == "file" else place / "chapter").read_text() == "mine"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def write(partial: Path) -> None:
        (partial / "a").write_text("1")
        raise error

    with pytest.raises(error), whole_folder(tmp_path / "run") as partial:
        write(partial)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left on the disk of place: free some"),
        (errno.EACCES, "place cannot be written"),
        (errno.EROFS, "place cannot be written"),
        (errno.EIO, "cannot write place: Input/output error"),
    ],
)
def test_a_storage_error_says_what_to_do(number: int, message: str) -> None:
    told = storage_error(OSError(number, os.strerror(number)), Path("place"))
    assert message in str(told)
    assert told.exit_code == 2
    assert storage_error(told, Path("other")) is told  # type: ignore[arg-type]


def test_an_operating_system_error_in_the_block_is_told_with_the_place(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no space left on the disk of .*run"), whole_folder(tmp_path / "run"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    path = write_whole(tmp_path / "in" / "a.txt", "Grüße\n")
    assert path.read_bytes() == "Grüße\n".encode()
    write_whole(path, b"\xff")
    assert path.read_bytes() == b"\xff"

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space left"):
        write_whole(path, "lost")
    assert path.read_bytes() == b"\xff"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]
