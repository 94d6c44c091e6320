"""What every command shares: flags to objects, the console, progress bars, results."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from trimtab.cli.flags import parse
from trimtab.cli.plain_lines import PlainLines
from trimtab.errors import UsageError
from trimtab.models.dtypes import FULL
from trimtab.options import from_mapping, option

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


class Update(Protocol):
    """How far long work is: `done` of `total`, None where nobody knows, and a note to stand behind its name."""

    def __call__(self, done: float, total: int | None, note: str = "") -> None: ...


@dataclasses.dataclass(frozen=True)
class Output:
    """Flags every command has."""

    json: bool = option(False, "print the result as one JSON object on standard output, and nothing else there")
    quiet: bool = option(False, "no progress bars and no notes: warnings, and what came of it")
    debug: bool = option(False, "show the traceback of an error")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelName:
    """Which model, loaded in the dtype of its checkpoint."""

    model: str = option(help="short name (trimtab list models), folder, GGUF file or hub id, also as REPO@REVISION")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags(ModelName):
    """Which model, and how to compute with it."""

    dtype: Literal["auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"] = option(
        "auto", "dtype to load the model in; auto takes bfloat16 only where this machine is quick at it"
    )
    threads: int | None = option(None, "CPU threads; by default measured")

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", FULL.get(self.dtype, self.dtype))  # a recipe has one name for each


def options(cls: type[T], name: str, summary: str, argv: Sequence[str], notes: str = "") -> tuple[T, Output]:
    """A command's options from its arguments, and the flags every command has."""
    given = parse(name, summary, [("options", cls), ("output", Output)], argv, notes)
    return from_mapping(cls, own(cls, given), name), from_mapping(Output, own(Output, given), "output")


def own(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the given values that are fields of `cls`."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {key: value for key, value in given.items() if key in names}


class Screen:
    """Where a command speaks: text on standard output, or on standard error when that is for --json."""

    def __init__(self, output: Output) -> None:
        from rich.console import Console

        self.output = output
        self.console: Console = Console(stderr=output.json, highlight=False, soft_wrap=True, emoji=False)
        if not self.console.is_terminal:
            self.console.width = 1000  # tables wrap to fit a terminal, and nothing else
        self._bars: Console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        self._drawing = False
        self.warnings: list[str] = []
        log = logging.getLogger("trimtab")
        log.handlers = [_Notes(self)]
        log.setLevel(logging.WARNING if output.quiet else logging.INFO)
        log.propagate = False

    def say(self, text: str = "", style: str | None = None) -> None:
        """One line for a person, about what is going on."""
        if not self.output.quiet:
            self._print(text, style)

    def outcome(self, text: str, style: str | None = None) -> None:
        """One line of what the command came to, told with --quiet too; --json has it in its object."""
        if not (self.output.quiet and self.output.json):
            self._print(text, style)

    def _print(self, text: str, style: str | None) -> None:
        # A line on the terminal that a bar is drawn on goes through that bar, which moves down beneath it.
        console = self._bars if self._drawing and self.console.file.isatty() else self.console
        console.print(text, style=style, markup=False)

    def warn(self, text: str) -> None:
        """One line that must not be missed, on standard error; kept in `warnings` for the run's record."""
        self.warnings.append(text)
        self._bars.print(f"warning: {text}", style="bold yellow", markup=False)

    def note(self, text: str) -> None:
        """One line about what is going on, on standard error."""
        if not self.output.quiet:
            self._bars.print(text, markup=False)

    def result(self, values: Mapping[str, Any]) -> None:
        """The result, for --json."""
        if self.output.json:
            print(json.dumps(values, indent=2, default=str, ensure_ascii=False))

    @contextmanager
    def progress(self, what: str, unit: str = "items") -> Iterator[Update]:
        """Long work drawn on a terminal; elsewhere a plain line now and then, on standard error.

        On a terminal: a bar with rate and time left once `update` has told a total; until then, or for good where
        there is none, what is done and the seconds so far. Not to be nested.
        """
        if self.output.quiet:
            yield lambda done, total, note="": None
            return
        if not self._bars.is_terminal:
            yield PlainLines(what, unit, self.note)
            return
        from trimtab.cli.bars import drawn

        with drawn(self._bars, what, unit) as (bar, task):

            def update(done: float, total: int | None, note: str = "") -> None:
                bar.update(task, completed=done, total=total, description=f"{what}{note}")

            self._drawing = True
            try:
                yield update
            finally:
                self._drawing = False


class _Notes(logging.Handler):
    """The library's log on the screen: warnings as warnings, the rest as notes."""

    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self.screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self.screen.warn(text) if record.levelno >= logging.WARNING else self.screen.note(text)


def load_libraries(screen: Screen) -> None:
    """Import torch and transformers, which takes seconds, so that nothing later is held up by it unexplained."""
    with screen.progress("loading torch and transformers"):
        import torch  # noqa: F401
        import transformers  # noqa: F401


def load_model(
    flags: ModelName, screen: Screen, kind: str = "causal-lm", *, classes: Sequence[str] = (), seed: int = 0
) -> Any:
    """The model that the flags name. With ModelFlags, threads and dtype are chosen and told.

    classes: those a classifier tells apart, whose head is drawn from the seed where the checkpoint has none.
    """
    load_libraries(screen)
    import torch

    from trimtab.models.classifier import load_classifier
    from trimtab.models.load import load
    from trimtab.train.machine import choose, spare_memory

    spare_memory()
    machine = choose(flags.threads, flags.dtype) if isinstance(flags, ModelFlags) else None
    find_model(flags.model, screen, trust_remote_code=flags.trust_remote_code, kind="classifier" if classes else kind)
    how: dict[str, Any] = {
        "dtype": machine.dtype if machine else None,
        "device": "cuda" if torch.cuda.is_available() else None,
        "trust_remote_code": flags.trust_remote_code,
    }
    with screen.progress(f"loading {flags.model}"):
        if classes:
            loaded: Any = load_classifier(flags.model, classes, seed, **how)
        else:
            loaded = load(flags.model, kind=kind, **how)  # type: ignore[arg-type]
    size = f"{loaded.model.num_parameters():,} parameters in {str(loaded.model.dtype).removeprefix('torch.')}"
    threads = "" if machine is None else f", {machine.threads} thread{'s' * (machine.threads > 1)} ({machine.reason})"
    screen.note(f"{flags.model}: {size}{threads}")
    return loaded


def need_tokenizer(loaded: Any) -> None:
    """UsageError for a model that cannot read text."""
    if loaded.tokenizer is None:
        raise UsageError(f"{loaded.name} has no tokenizer, so it cannot read text")


def find_model(name: str, screen: Screen, *, trust_remote_code: bool, kind: str = "causal-lm") -> Path:
    """The folder of the model called `name`; GGUF is converted and a hub id fetched if need be."""
    from trimtab.models.embedded import EMBEDDED
    from trimtab.models.load import find

    options: dict[str, Any] = {"kind": kind, "trust_remote_code": trust_remote_code, "progress": screen.note}
    if name not in EMBEDDED and not Path(name).expanduser().exists():
        return find(name, **options)  # with the hub's own bars, which one of ours around them would garble
    with screen.progress(f"looking up {name}"):
        return find(name, **options)


def program() -> str:
    """How the user can call trimtab again from here, for a shell."""
    started = Path(sys.argv[0])
    if started.stem != "trimtab":
        return "python -m trimtab"
    on_path = shutil.which("trimtab")
    return "trimtab" if on_path and Path(on_path).resolve() == started.resolve() else shlex.quote(str(started))


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
    refuse_unwritable(path)
    return path


def refuse_unwritable(path: Path) -> None:
    """UsageError when a folder could not be made or written, told before the work and not after it."""
    parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise UsageError(f"{path} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path} cannot be written ({parent} is read-only for you): choose another folder")


def refuse_taken(out: str) -> None:
    """UsageError when a new folder cannot take the name `out`, told before the work and not after it."""
    path = Path(out)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{path} exists and is not empty: choose another folder")
    refuse_unwritable(path)
