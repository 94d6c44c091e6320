"""The command line: one thin file per command. Imports nothing heavy, so that help and errors come at once."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import trimtab
from trimtab.errors import TrimtabError, UsageError, did_you_mean, ran_out_of_memory

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "the main job on an embedded model, start to finish"),
    "train": ("train", "train an adapter on a data file"),
    "eval": ("eval", "how well a model answers the questions of tasks, beside chance"),
    "generate": ("generate", "answer prompts, each with the adapter you name"),
    "chat": ("chat", "talk to a model, switching adapters as you go"),
    "merge": ("merge", "put an adapter into the weights, and audit it"),
    "export": ("export", "write an adapter in another tool's format"),
    "data inspect": ("data_inspect", "see what is supervised, token by token, before training"),
    "measure dimension": ("measure_dimension", "how many directions a task needs, by training in random subspaces"),
    "measure directions": ("measure_directions", "which directions of the weights change, beside what noise gives"),
    "report": ("report", "one self-contained page about a run"),
    "selftest": ("selftest", "show the equivalences trimtab rests on, on this machine and model"),
    "list": ("list", "the methods, models, tasks and formats there are"),
}
"""Each command, its file here and its line in the help."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 when fine, 1 when it failed, 2 for wrong usage."""
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    """Run one command and return its exit code. Errors are one line, a traceback only with --debug."""
    # A thread that waits spins for a moment and then sleeps: spinning on slows the others down on shared cores, and
    # sleeping at once costs more than the short pauses between operations. Read when torch loads its OpenMP library.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        code = _run(argv)
        sys.stdout.flush()  # so that a closed pipe is met here and not at the very end
        return code
    except KeyboardInterrupt as stop:
        _complain("stopped" + (f": {stop}" if str(stop) else ""))
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        return _failed(error)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        print(f"trimtab {trimtab.__version__}")
        return 0
    try:
        name, rest = _command(argv)
        command = importlib.import_module(f"trimtab.cli.{COMMANDS[name][0]}")
        command.run(name, COMMANDS[name][1], rest)
    except SystemExit as stop:  # after a command's help
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def _failed(error: Exception) -> int:
    """Say what went wrong; the exit code."""
    if isinstance(error, TrimtabError):
        _complain(str(error))
        return error.exit_code
    text = " ".join(str(error).split())
    if ran_out_of_memory(error):
        _complain("out of memory: lower the batch size or the length, or load the model in bfloat16 (--dtype)")
        return 2
    _complain(f"unexpected {type(error).__name__}: {text} (run again with --debug for the traceback)")
    return 1


def _complain(message: str) -> None:
    print(f"trimtab: {message}", file=sys.stderr)


def _command(argv: list[str]) -> tuple[str, list[str]]:
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return name, argv[words:]
    inside = [c for c in COMMANDS if c.startswith(argv[0] + " ")]
    if inside:
        if any(word in ("-h", "--help") for word in argv[1:]):
            print("\n".join(f"trimtab {c}: {COMMANDS[c][1]}" for c in inside))
            raise SystemExit(0)
        raise UsageError(f"'{' '.join(argv[:2])}' is no command; there is: {', '.join('trimtab ' + c for c in inside)}")
    raise UsageError(f"unknown command '{argv[0]}'{did_you_mean(argv[0], COMMANDS)} (see trimtab --help)")


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return (
        "usage: trimtab COMMAND ...\n\nAdapt large pretrained models with few parameters, and trust the result.\n\n"
        + "\n".join(lines)
        + "\n\nEach command has --help, --json for scripts, and --debug for tracebacks."
    )
