"""What a run folder holds, read and checked. Any file but config.yaml may be absent; none may be broken."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import FormatError, UsageError
from trimtab.options import read_yaml

Row = Mapping[str, Any]

RESULT_NUMBERS = (
    *("seconds", "real_tokens", "supervised_tokens", "tokens_per_second", "train_loss", "eval_loss"),
    "eval_loss_before",
    *("peak_rss_bytes", "trainable_parameters", "base_parameters"),
)
AUDIT_SHARES = ("unchanged_share", "realised_share", "error_share")


@dataclass(frozen=True)
class RunFolder:
    """One run as read from disk. None (or no rows) stands for a file that is absent."""

    path: Path
    config: Row
    config_text: str
    metrics: Sequence[Row]
    result: Row | None
    samples: Sequence[Row]
    audit: Row | None
    layers: Sequence[Row]

    @property
    def classifies(self) -> bool:
        """Whether a classifier was trained: each of its rows is one term of the loss, and no token is."""
        return self.config.get("task") is not None

    @property
    def loss_unit(self) -> str:
        """The unit of the run's losses."""
        return f"nats per {'row' if self.classifies else 'supervised token'}"

    def series(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """The rows of metrics.jsonl that hold both keys, as two lists, in file order."""
        rows = [row for row in self.metrics if row.get(x) is not None and row.get(y) is not None]
        return [float(row[x]) for row in rows], [float(row[y]) for row in rows]

    def last(self, key: str) -> Any:
        """The last value of `key` in metrics.jsonl, or None."""
        return next((row[key] for row in reversed(self.metrics) if row.get(key) is not None), None)

    def relative_changes(self) -> dict[str, float]:
        """‖ΔW‖/‖W‖ (Frobenius, a ratio) for each adapted module: from the audit, else from layers.json."""
        rows = self.audit["layers"] if self.audit is not None else self.layers
        return {row["name"]: float(row["relative_change"]) for row in rows}


def read_run(path: Path) -> RunFolder:
    """Read a run folder. UsageError when it is none; FormatError names the broken file and its line."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UsageError(f"{path} {what}, but must be a run folder (what `trimtab train --out` writes)")
    config = path / "config.yaml"
    if not any((path / name).is_file() for name in ("config.yaml", "metrics.jsonl", "result.json")):
        own = "; a measurement has a page of its own, written with it" if (path / "results.json").exists() else ""
        raise UsageError(f"{path} has no config.yaml and no metrics.jsonl, so it is not a run folder{own}")
    values: dict[str, Any] = {}
    config_text = _read_text(config) or ""
    if config.is_file():
        try:
            values = read_yaml(str(config))
        except UsageError as error:
            raise FormatError(str(error)) from error
    result = _read_json(path / "result.json")
    if result is not None:
        _check_object(result, str(path / "result.json"))
        for key in RESULT_NUMBERS:
            if result.get(key) is not None:
                _check_number(result[key], key, str(path / "result.json"))
    return RunFolder(
        path=path,
        config=values,
        config_text=config_text,
        metrics=_checked_metrics(path / "metrics.jsonl"),
        result=result,
        samples=_checked_samples(path / "samples.jsonl"),
        audit=_checked_audit(path / "audit.json"),
        layers=_checked_layers(_read_json(path / "layers.json"), path / "layers.json", ()),
    )


def _read_text(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise FormatError(f"{path} line {line} is not UTF-8; restore the file or write it again as UTF-8") from error


def _read_json(path: Path) -> Any:
    text = _read_text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{path} line {error.lineno} is not JSON ({error.msg}); restore or delete the file"
        ) from error
    except RecursionError as error:
        raise FormatError(f"{path} is nested too deeply to be a file of a run; restore or delete the file") from error
    if value is None:
        raise FormatError(f"{path} line 1 holds null; restore or delete the file")
    return value


def _read_json_lines(path: Path) -> list[tuple[int, Row]]:
    """(line number, row) for each line that is not blank."""
    rows = []
    # str.splitlines would also cut at U+2028, which is legal inside a JSON string.
    for number, line in enumerate((_read_text(path) or "").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            what = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise FormatError(f"{path} line {number} is not JSON ({what}); repair or remove the line") from error
        _check_object(row, f"{path} line {number}")
        rows.append((number, row))
    return rows


def _check_object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise FormatError(f"{where} must hold a JSON object, but holds {_kind(value)}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number: true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_number(value: Any, key: str, where: str) -> None:
    if not is_number(value):
        raise FormatError(f"{where}: {key} must be a number, but is {_kind(value)}")


METRIC_KEYS = frozenset(
    ("step", "epoch", "loss", "lr", "grad_norm", "real_tokens", "supervised_tokens", "seconds", "eval_loss")
)


def _checked_metrics(path: Path) -> list[Row]:
    rows = []
    for number, row in _read_json_lines(path):
        where = f"{path} line {number}"
        _check_number(row.get("step"), "step", where)
        for key in METRIC_KEYS:
            if row.get(key) is not None:
                _check_number(row[key], key, where)
        rows.append(row)
    return rows


def _checked_samples(path: Path) -> list[Row]:
    rows = []
    for number, row in _read_json_lines(path):
        for key in ("prompt", "expected", "after", "before"):
            if not isinstance(row.get(key), str) and not (key == "before" and row.get(key) is None):
                raise FormatError(f"{path} line {number}: {key} must be text, but is {_kind(row.get(key))}")
        rows.append(row)
    return rows


def _checked_audit(path: Path) -> Row | None:
    audit = _read_json(path)
    if audit is None:
        return None
    _check_object(audit, str(path))
    if "layers" not in audit:
        raise FormatError(f"{path} has no list of layers, so it is not a merge audit; merge again or delete the file")
    _checked_layers(audit["layers"], path, AUDIT_SHARES)
    for key in ("max_logit_difference", "greedy_agreement", "probe_positions"):
        if audit.get(key) is not None:
            _check_number(audit[key], key, str(path))
    return dict(audit)


def _checked_layers(layers: Any, path: Path, optional: Sequence[str]) -> list[Row]:
    if layers is None:
        return []
    if not isinstance(layers, list):
        raise FormatError(f"{path}: the layers must be a list, but are {_kind(layers)}")
    seen = set()
    for index, row in enumerate(layers):
        where = f"{path}: layer {index}"
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise FormatError(f"{where} must be an object with the name of a module, but is {_kind(row)}")
        if row["name"] in seen:
            raise FormatError(f"{where} names {row['name']} a second time; each module must be there once")
        seen.add(row["name"])
        _check_number(row.get("relative_change"), "relative_change", where)
        for key in optional:
            if row.get(key) is not None:
                _check_number(row[key], key, where)
    return layers
