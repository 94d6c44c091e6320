"""metrics.jsonl, and other loggers by their own libraries."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from trimtab.errors import UsageError
from trimtab.files import storage_error, write_whole

LOGGERS = ("tensorboard", "mlflow", "wandb")


class Logger(Protocol):
    """Somewhere a row of figures goes."""

    def log(self, row: dict[str, Any]) -> None:
        """Take one row; `step` is among its keys."""

    def close(self) -> None:
        """Write out what is pending."""


class MetricsFile:
    """metrics.jsonl: one JSON object a row. Resuming drops the rows after the checkpoint, which will come again."""

    def __init__(self, path: Path, last_step: int) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Whole or not at all: a kill here must not cost the rows that are kept.
            write_whole(path, "".join(line + "\n" for line in _rows_until(path, last_step)))
            self._file: IO[str] = path.open("a", encoding="utf-8")
        except OSError as error:
            raise storage_error(error, path) from error

    def log(self, row: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise storage_error(error, self._path) from error

    def close(self) -> None:
        # What cannot be written any more has been told by `log`.
        with contextlib.suppress(OSError):
            self._file.close()


def _rows_until(path: Path, last_step: int) -> Iterator[str]:
    if not path.exists() or last_step == 0:
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            return  # a line cut short by a kill, and so after the checkpoint
        if row.get("step", 0) > last_step:
            return
        yield line


class TensorBoardLogger:
    """TensorBoard's event files in the run folder."""

    def __init__(self, folder: Path) -> None:
        writer = _library("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"))

    def log(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class MLflowLogger:
    """An MLflow run, where MLflow's own settings say."""

    def __init__(self, folder: Path) -> None:
        self._mlflow = _library("mlflow", "mlflow")
        self._mlflow.start_run(run_name=folder.name)

    def log(self, row: dict[str, Any]) -> None:
        figures = {k: float(v) for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        self._mlflow.log_metrics(figures, step=row["step"])

    def close(self) -> None:
        self._mlflow.end_run()


class WandbLogger:
    """A Weights & Biases run, where its own settings say."""

    def __init__(self, folder: Path) -> None:
        self._run = _library("wandb", "wandb").init(name=folder.name, dir=str(folder))

    def log(self, row: dict[str, Any]) -> None:
        self._run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        self._run.finish()


def make_logger(name: str, folder: Path) -> Logger:
    """A logger by name. UsageError when its library is missing, naming what to install."""
    kinds: dict[str, Any] = {"tensorboard": TensorBoardLogger, "mlflow": MLflowLogger, "wandb": WandbLogger}
    logger: Logger = kinds[name](folder)
    return logger


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"logging to {package} needs its library: pip install {package}") from error
