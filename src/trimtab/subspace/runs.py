"""The runs of a search: trained side by side, kept as they end, and not trained twice."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.errors import FormatError, TrimtabError, UsageError
from trimtab.files import read_json, storage_error, whole_lines, write_whole
from trimtab.subspace.training import Outcome

MADE_WITH, RUNS = "search.json", "runs.jsonl"
OF_SUBSPACES = ("projection", "diagonal", "options", "mode", "layers")
"""What of a setting a run of all parameters does not depend on."""
SAID = 3
"""So many differences between two searches are named."""


class Run(NamedTuple):
    """One training. d: dimensions of the subspace; None for all parameters directly, 0 for none, so that θ0 is scored.
    lr: the optimizer's."""

    d: int | None
    seed: int
    lr: float


def untrained(seed: int) -> Run:
    """The run that trains nothing."""
    return Run(0, seed, 0.0)


Trainer = Callable[[Run], Outcome]


class Runs:
    """Runs of one problem under one protocol, in a folder or in memory.

    make: gives the trainer; called once in every worker, so it is to be a function that can be sent to another process
    (a partial of one). about: what the runs depend on besides d, seed and lr, as plain values: a folder holds the runs
    of one such setting. workers: processes at once, each with `threads` threads. told(run, outcome) hears of each new
    run.
    """

    def __init__(
        self,
        make: Callable[[], Trainer],
        about: Mapping[str, Any],
        folder: Path | None = None,
        *,
        workers: int = 1,
        threads: int = 1,
        told: Callable[[Run, Outcome], None] | None = None,
    ) -> None:
        if workers < 1:
            raise UsageError(f"workers is {workers}, but must be at least 1")
        self._make, self._folder, self._workers, self._threads, self._told = make, folder, workers, threads, told
        self._trainer: Trainer | None = None
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._begun: dict[concurrent.futures.Future[Outcome], Run] = {}
        self._known: dict[Run, Outcome] = {}
        self._about: dict[str, Any] = json.loads(json.dumps(about))
        if folder is not None:
            self._open(folder)

    def _open(self, folder: Path) -> None:
        refuse_other_search(folder, self._about)
        self._known |= _stored(folder)

    def take(self, folder: Path) -> None:
        """Keep the runs of another search's folder that would be trained alike here: all of them or, where the two
        differ in their subspaces alone, those of all parameters and of none.

        Raises UsageError where they differ in anything else, and for a folder that holds no search.
        """
        differing = refuse_unlike(folder, self._about)
        for run, outcome in _stored(folder, repair=False).items():  # a search may be going on there
            if run not in self._known and (not run.d or not differing):
                self._known[run] = outcome
                self._keep(run, outcome)

    def begin(self, wanted: Iterable[Run]) -> None:
        """Let the workers start on runs that will be asked for, so that none is idle. One alone begins nothing early:
        `wanted` is not looked at then."""
        if self._workers == 1:
            return
        for run in wanted:
            if run not in self._known and run not in self._begun.values():
                self._begun[self._workers_pool().submit(_train, run)] = run

    def outcomes(self, wanted: Iterable[Run]) -> list[Outcome]:
        """Of each run, in the order asked for; those that are not there yet are trained, `workers` at a time."""
        runs = list(wanted)
        missing = [run for run in dict.fromkeys(runs) if run not in self._known]
        for run, outcome in self._trained(missing):
            self._known[run] = outcome
            self._keep(run, outcome)
            if self._told is not None:
                self._told(run, outcome)
        return [self._known[run] for run in runs]

    @property
    def known(self) -> Mapping[Run, Outcome]:
        """Every run there is."""
        return self._known

    def _trained(self, missing: Sequence[Run]) -> Iterator[tuple[Run, Outcome]]:
        """The missing runs as they end, and others that were begun."""
        if self._workers == 1:
            with _threads(self._threads):
                self._trainer = self._trainer or self._make()
                for run in missing:
                    yield run, self._trainer(run)
            return
        self.begin(missing)
        left = set(missing)
        while left:
            ended, _ = concurrent.futures.wait(self._begun, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ended:
                run = self._begun.pop(future)
                left.discard(run)
                yield run, _result(future)

    def _workers_pool(self) -> concurrent.futures.ProcessPoolExecutor:
        if self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(self._make, self._threads),
            )
        return self._pool

    def _keep(self, run: Run, outcome: Outcome) -> None:
        if self._folder is None:
            return
        path, made_with = self._folder / RUNS, self._folder / MADE_WITH
        if not made_with.exists():
            write_whole(made_with, json.dumps(self._about, indent=2) + "\n")
        line = json.dumps({"run": run._asdict(), "outcome": dataclasses.asdict(outcome)})
        try:
            with path.open("ab") as file:
                file.write(f"{line}\n".encode())
        except OSError as error:
            raise storage_error(error, path) from error

    def close(self) -> None:
        """End the workers; what they are at is dropped."""
        if self._pool is not None:
            for process in list(getattr(self._pool, "_processes", {}).values()):
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
            self._begun.clear()


def _result(future: concurrent.futures.Future[Outcome]) -> Outcome:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise TrimtabError(
            "a process that trained runs was ended from outside, as a system does that is out of memory: try fewer "
            "--workers; with --out the runs that came to their end are kept"
        ) from error


def refuse_other_search(folder: Path, about: Mapping[str, Any]) -> None:
    """UsageError where a folder holds the runs of a search that was not of this."""
    if (folder / MADE_WITH).exists():
        _refuse(folder, _differing(folder, about))
    elif (folder / RUNS).exists():
        raise UsageError(f"{folder / RUNS} is there without {MADE_WITH}: choose another folder, or empty this one")


def refuse_unlike(folder: Path, about: Mapping[str, Any]) -> Mapping[str, tuple[Any, Any]]:
    """How the subspaces of another search differ from those of this one: (there, here) by key. UsageError where they
    differ in more than that, so that no run of the one is a run of the other."""
    differing = _differing(folder, about)
    _refuse(folder, {key: pair for key, pair in differing.items() if key not in OF_SUBSPACES})
    return differing


def _differing(folder: Path, about: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What the search in a folder is of and this one is not: (there, here) by key."""
    try:
        there = read_json(folder / MADE_WITH)
    except FormatError as error:
        raise FormatError(f"{error}: choose another folder, or empty this one") from error
    here = json.loads(json.dumps(about))
    return {key: (there.get(key), here.get(key)) for key in {**there, **here} if there.get(key) != here.get(key)}


def _refuse(folder: Path, differing: Mapping[str, tuple[Any, Any]]) -> None:
    if differing:
        told = "; ".join(f"{key} {there!r}, but now {here!r}" for key, (there, here) in list(differing.items())[:SAID])
        more = f"; and {len(differing) - SAID} more" if len(differing) > SAID else ""
        raise UsageError(f"{folder} holds the runs of another search: {told}{more}: choose another folder")


def _stored(folder: Path, *, repair: bool = True) -> dict[Run, Outcome]:
    found = {}
    for number, line in whole_lines(folder / RUNS, repair=repair):
        try:
            run, outcome = Run(**line["run"]), Outcome(**line["outcome"])
            if not all(isinstance(value, int | float) for value in (run.d or 0, *run[1:], *vars(outcome).values())):
                raise TypeError("a value is no number")
            if not all(0 <= score <= 1 for score in (outcome.train, outcome.validation, outcome.test)):
                raise ValueError("a score is not from 0 to 1")
            found[run] = outcome
        except (TypeError, KeyError, ValueError) as error:
            raise FormatError(
                f"{folder / RUNS} line {number} is no run of a search: choose another folder, or empty {folder}"
            ) from error
    return found


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Within the block torch computes with so many threads, as in a worker: results round alike."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_own: Trainer | None = None  # of a worker process


def _start(make: Callable[[], Trainer], threads: int) -> None:
    global _own
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    import torch

    from trimtab.train.machine import spare_memory

    spare_memory()
    torch.set_num_threads(threads)
    _own = make()


def _end_with_parent() -> None:
    """Wait until the process of the search is gone, however it ended, and go too: nobody would keep the runs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _train(run: Run) -> Outcome:
    assert _own is not None
    return _own(run)
