"""Files and folders that are whole or absent."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from trimtab import files
from trimtab.errors import FormatError, UsageError
from trimtab.files import StorageError, read_json, storage_error, whole_folder, write_whole


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


def test_permissions_are_those_of_ordinary_files_and_the_umask_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    mask = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("another thread would make a file meanwhile"))
            with whole_folder(tmp_path / "run") as partial:
                (partial / "in").mkdir(mode=0o700)
                (partial / "in" / "private").touch(mode=0o600)
    finally:
        os.umask(mask)
    places = [tmp_path / "run", tmp_path / "run" / "in", tmp_path / "run" / "in" / "private"]
    assert [oct(place.stat().st_mode & 0o777) for place in places] == ["0o750", "0o750", "0o640"]


def killed_save(path: Path, *, within_swap: bool = False) -> None:
    """A process that saves to `path` and is killed: while it writes, or with the old folder moved out of the way."""
    child = os.fork()
    if child == 0:
        files._exchange = lambda first, second: False
        if within_swap:
            rename, calls = os.rename, []
            os.rename = lambda a, b: (calls.append(a), rename(a, b), os.kill(os.getpid(), signal.SIGKILL))
        with whole_folder(path, marker="mark") as partial:
            (partial / "mark").write_text("half")
            if not within_swap:
                os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_what_a_killed_save_left_is_cleared_by_the_next_to_the_same_place(tmp_path: Path) -> None:
    killed_save(tmp_path / "run")
    killed_save(tmp_path / "run.v2")
    assert len(list(tmp_path.iterdir())) == 2
    with whole_folder(tmp_path / "run") as partial:
        (partial / "mark").write_text("whole")
        with whole_folder(tmp_path / "run") as beside:  # a save that is under way is none that was killed
            (beside / "mark").write_text("other")
        assert partial.exists()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names[1:] == ["run"]
    assert names[0].startswith(".run.v2.")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_the_last_whole_folder_is_kept_until_another_stands_in_its_place(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "run") as partial:
        (partial / "mark").write_text("first")
    killed_save(tmp_path / "run", within_swap=True)
    assert not (tmp_path / "run").exists()
    (old,) = tmp_path.glob(".run.*.old/run")

    def fail() -> None:
        with whole_folder(tmp_path / "run"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (old / "mark").read_text() == "first"
    for _ in range(2):
        with whole_folder(tmp_path / "run", marker="mark") as partial:
            (partial / "mark").write_text("second")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


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


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, UsageError, "a.json does not exist"),
        (b'{"a": 1,}', FormatError, "a.json is not JSON: .* at line 1, column"),
        ('{"a": "ü"}'.encode("latin-1"), FormatError, "a.json is not JSON: .*can't decode"),
        (b"[" * 100_000, FormatError, "a.json is not JSON"),
        (b"[1]", FormatError, "a.json must hold keys and values, but holds a list"),
    ],
    ids=["absent", "comma", "latin-1", "deep", "list"],
)
def test_a_broken_json_file_is_named(content: bytes | None, error: type, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(error, match=message):
        read_json(tmp_path / "a.json")
    with pytest.raises(UsageError, match=r"cannot read .*: Is a directory"):
        read_json(tmp_path)
