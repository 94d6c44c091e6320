"""What every command shares: flags to objects, the console, progress bars, results."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from trimtab.cli.flags import parse
from trimtab.errors import UsageError
from trimtab.options import from_mapping, option

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Output:
    """Flags every command has."""

    json: bool = option(False, "print the result as one JSON object on standard output, and nothing else there")
    quiet: bool = option(False, "no progress bars and no notes")
    debug: bool = option(False, "show the traceback of an error")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which model, and how to load it."""

    model: str = option(help="short name (trimtab list models), folder, GGUF file or hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "dtype to load the model in; auto takes bfloat16 only where this machine is quick at it"
    )
    threads: int | None = option(None, "CPU threads; by default measured")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")


def options(cls: type[T], name: str, summary: str, argv: Sequence[str], notes: str = "") -> tuple[T, Output]:
    """A command's options from its arguments, and the flags every command has."""
    given = parse(name, summary, [("options", cls), ("output", Output)], argv, notes)
    return from_mapping(cls, own(cls, given), f"trimtab {name}"), from_mapping(Output, own(Output, given), "output")


def own(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the given values that are fields of `cls`."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {key: value for key, value in given.items() if key in names}


class Screen:
    """Where a command speaks: text on standard output, or on standard error when that is for --json."""

    def __init__(self, output: Output) -> None:
        from rich.console import Console
        from rich.logging import RichHandler

        self.output = output
        self.console: Console = Console(stderr=output.json, highlight=False, soft_wrap=True)
        self._bars: Console = Console(stderr=True)
        handler = RichHandler(console=self._bars, show_time=False, show_path=False, show_level=False, markup=False)
        log = logging.getLogger("trimtab")
        log.handlers = [handler]
        log.setLevel(logging.WARNING if output.quiet else logging.INFO)
        log.propagate = False

    def say(self, text: str = "", style: str | None = None) -> None:
        """One line for a person."""
        if not self.output.quiet:
            self.console.print(text, style=style, markup=False)

    def warn(self, text: str) -> None:
        """One line that must not be missed, on standard error."""
        self._bars.print(f"warning: {text}", style="bold yellow", markup=False)

    def result(self, values: Mapping[str, Any]) -> None:
        """The result, for --json."""
        if self.output.json:
            print(json.dumps(values, indent=2, default=str))

    @contextmanager
    def progress(self, what: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
        """A bar with rate and time left, for long work; the block calls update(done, total). Quiet off a terminal."""
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn

        class Rate(ProgressColumn):
            def render(self, task: Task) -> Any:
                speed = task.finished_speed or task.speed
                return f"{speed:.1f} {unit}/s" if speed else ""

        shown = self._bars.is_terminal and not self.output.quiet
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), Rate())
        with Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=self._bars, disable=not shown) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def load_model(flags: Any, screen: Screen, kind: str = "causal-lm") -> Any:
    """The model that ModelFlags name, with threads and dtype chosen and told."""
    import torch

    from trimtab.models.load import load
    from trimtab.train.machine import choose

    machine = choose(flags.threads, flags.dtype)
    device = "cuda" if torch.cuda.is_available() else None
    loaded: Any = load(
        flags.model,
        dtype=machine.dtype,
        device=device,
        trust_remote_code=flags.trust_remote_code,
        kind=kind,  # type: ignore[arg-type]
        progress=screen.say,
    )
    size = f"{loaded.model.num_parameters():,} parameters in {str(machine.dtype).removeprefix('torch.')}"
    screen.say(f"{flags.model}: {size}, {machine.threads} threads ({machine.reason})")
    return loaded


def new_run(out: str | None, kind: str, resume: bool = False) -> Path:
    """The run's folder: `out`, or runs/KIND-N with the next free N. UsageError when it holds another run."""
    if out is None:
        if resume:
            raise UsageError("--resume needs the run's folder: give --out")
        numbers = (path.name.rpartition("-")[2] for path in Path("runs").glob(f"{kind}-*"))
        taken = [int(number) for number in numbers if number.isdigit()]
        return Path("runs") / f"{kind}-{max(taken, default=0) + 1}"
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, but the run needs a folder")
    if path.is_dir() and any(path.iterdir()) and not resume:
        raise UsageError(f"{path} is not empty: choose another folder, or go on with --resume")
    return path
