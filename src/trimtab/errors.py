"""What trimtab raises. Every message names the input, what was expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class TrimtabError(Exception):
    """Anything trimtab refuses. The command line prints its message on one line and exits with `exit_code`."""

    exit_code = 1


class UsageError(TrimtabError, ValueError):
    """A wrong input: a flag, a key, a name, a file. Exit code 2."""

    exit_code = 2


class FormatError(UsageError):
    """A file that is not what it should be: truncated, foreign, or for another model."""


class OutOfMemory(TrimtabError):
    """Memory ran out; the message says what to lower. Exit code 2: smaller settings would have done."""

    exit_code = 2


class TrainingError(TrimtabError, RuntimeError):
    """Training stopped: a loss that is not finite, no memory, a full disk. What was saved before stays whole."""


TRIAL_FAILURES = (TypeError, ValueError, AttributeError, IndexError, RuntimeError)
"""What a part of a model raises that is tried with inputs it does not take; see `ran_out_of_memory`."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: Python's, the processor's or the accelerator's."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def problems_to_error(problems: Sequence[str], what: str) -> None:
    """Raise one UsageError that lists every problem at once; return when there is none."""
    if len(problems) == 1:
        raise UsageError(f"{what}: {problems[0]}")
    if problems:
        raise UsageError(f"{what}: {len(problems)} problems\n" + "\n".join(f"  - {p}" for p in problems))


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the nearest of `known`, or '' when nothing is near."""
    near = [name for name in difflib.get_close_matches(wrong, list(known), n=3, cutoff=0.5) if _alike(wrong, name)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _alike(wrong: str, name: str) -> bool:
    """Whether two names are near in more than the ending of a file name, which all files of a kind share."""
    (stem, _, ending), (other, _, other_ending) = wrong.rpartition("."), name.rpartition(".")
    if not stem or ending != other_ending:
        return True
    return difflib.SequenceMatcher(None, stem, other).ratio() >= 0.6
