"""`write_report`: a run folder as one self-contained page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.deltas import METHODS, method_spec
from trimtab.errors import UsageError
from trimtab.files import write_whole
from trimtab.report import plots, wording
from trimtab.report.run_folder import METRIC_KEYS, RunFolder, read_run
from trimtab.report.template import check_plots, filled
from trimtab.report.wording import (
    PERCENT,
    Measure,
    count,
    counted,
    duration,
    mebibytes,
    number,
    percent,
    plain,
    ratio_percent,
)

SAMPLES_OPEN = 8
# Stands in the head of every page, so that a page is known from a file of the user's.
MARKER = b'<meta name="generator" content="trimtab">'

# How each known key of result.json is named and shown; all other keys are listed as they are.
FIGURES = {
    "seconds": ("Time", duration),
    "real_tokens": ("Tokens seen, padding excluded", lambda value: f"{count(value)} tokens"),
    "supervised_tokens": ("Tokens supervised", lambda value: f"{count(value)} tokens"),
    "tokens_per_second": ("Speed", lambda value: f"{number(value)} tokens per second"),
    "peak_rss_bytes": ("Peak memory (resident set)", mebibytes),
    "trainable_parameters": ("Trainable parameters", lambda value: f"{value:,} parameters"),
    "base_parameters": ("Frozen parameters", lambda value: f"{value:,} parameters"),
}
LOSSES = {
    "train_loss": "Training loss",
    "eval_loss": "Evaluation loss",
    "eval_loss_before": "Evaluation loss before training",
}
ENVIRONMENT = ("dtype", "threads", "versions")


def write_report(run: Path, *, out: Path | None = None) -> Path:
    """Write the report of a run folder as one HTML file and return its path.

    run: the folder that training wrote; it must hold config.yaml, and a section says so when its file is absent.
    out: where to write, by default report.html in the run folder. The file replaces an earlier report in one step.

    Errors: FormatError for a broken file of the run (named, with its line); UsageError for a folder that is no run,
    a place that cannot be written or holds a file that is no report, or when the extra "plots" is not installed.
    """
    target = Path(run) / "report.html" if out is None else Path(out)
    page = render(read_run(Path(run)))
    if target.is_dir():
        raise UsageError(f"cannot write the report to {target}: it is a folder; name a file, such as report.html")
    if out is not None and target.exists() and not _is_report(target):
        raise UsageError(f"{target} exists and is no report of trimtab's: choose another file")
    write_whole(target, page)
    return target


def _is_report(file: Path) -> bool:
    with file.open("rb") as opened:
        return MARKER in opened.read(1000)


def render(run: RunFolder) -> str:
    """The page as text. The same run gives the same page, byte for byte."""
    check_plots()
    return filled(
        "page.html",
        context(run),
        visible=wording.visible,
        number=number,
        percent=percent,
        ratio_percent=ratio_percent,
        counted=counted,
    )


def context(run: RunFolder) -> dict[str, Any]:
    """What the template shows, section by section."""
    result = run.result or {}
    measures = wording.read_measures(result, str(run.path / "result.json"))
    warnings = result.get("warnings")
    return {
        "title": _title(run),
        "run_name": run.path.resolve().name,
        "summary": _summary(run),
        "tiles": _tiles(run, measures),
        "warnings": list(map(plain, warnings)) if isinstance(warnings, list) else [],
        "measures": measures,
        "resampling": wording.resampling(measures),
        "measures_svg": plots.measures(measures) if measures else None,
        **_curves(run),
        **_layers(run),
        "samples": run.samples,
        "samples_open": SAMPLES_OPEN,
        "audit": _audit(run),
        "config": run.config_text,
        "method_lr": _method_lr(run),
        "has_result": run.result is not None,
        "figures": _figures(run, measures),
        "environment": _environment(result),
    }


def _method(run: RunFolder) -> tuple[str, Any]:
    """The method's name as the run recorded it, and its rank where it has one."""
    method = (run.result or {}).get("method", run.config.get("method"))
    if isinstance(method, Mapping):
        return str(method.get("name", "adapter")), method.get("rank")
    return str(method or "adapter"), run.config.get("rank")


def _method_lr(run: RunFolder) -> float | None:
    """The learning rate that a configuration without one came to: the method's own."""
    name, _ = _method(run)
    missing = run.config.get("lr", 0) is None
    return method_spec(name).default_lr if missing and name in METHODS else None


def _title(run: RunFolder) -> str:
    name, rank = _method(run)
    shown = method_spec(name).title if name in METHODS else name
    model = str((run.result or {}).get("model", run.config.get("model", "an unnamed model")))
    # The last part of a path or hub id is the name people know; the rest is in the configuration.
    model = model.rstrip("/").rsplit("/", 1)[-1]
    return f"{shown}, rank {rank}, on {model}" if rank is not None else f"{shown} on {model}"


def _summary(run: RunFolder) -> str:
    """What was trained and what it cost, in one sentence."""
    result = run.result or {}
    # The last row of training counts training alone; result.json may count what came after it too.
    known = {key: result.get(key) for key in ("real_tokens", "supervised_tokens", "seconds")}
    known |= {key: run.last(key) for key in known if run.last(key) is not None}
    parts = ""
    trainable, base = result.get("trainable_parameters"), result.get("base_parameters")
    if trainable is not None:
        share = f" ({ratio_percent(trainable / base)} of the {count(base)} frozen ones)" if base else ""
        parts += f" {count(trainable)} parameters{share}"
    if run.last("step") is not None:
        parts += f" for {counted(run.last('step'), 'optimizer step')}"
    if known["real_tokens"] is not None:
        supervised = known["supervised_tokens"]
        learned = "in {} rows" if run.classifies else "of which {} were supervised"
        note = f", {learned.format(count(supervised))}," if supervised is not None else ""
        parts += f" on {count(known['real_tokens'])} tokens{note}"
    if known["seconds"] is not None:
        parts += f" in {duration(known['seconds'])}"
    return f"Trained{parts.rstrip(',')}." if parts else "Nothing about the training was recorded."


def _tiles(run: RunFolder, measures: Sequence[Measure]) -> list[dict[str, str]]:
    """The headline figures: what was gained, what was forgotten, and whether the merge is faithful."""
    tiles = []
    for row in measures:
        bracket = f" [{row.show_change_interval()}]" if row.interval_of_change else ""
        tiles.append(
            {
                "label": row.label,
                "value": row.show(row.after),
                "change": f"{row.show_difference()}{bracket} from {row.show(row.before)}",
                "note": f"95{PERCENT} interval {row.show_interval(row.interval_after)}"
                if row.interval_after
                else "no interval recorded",
                "chance": f"chance {row.show(row.chance)}" if row.chance is not None else "",
            }
        )
    for key, label in (("eval_loss", "Evaluation loss"), ("loss", "Training loss")):
        steps, losses = run.series("step", key)
        if losses:
            start = f"from {number(losses[0])} at step {steps[0]:g}" if len(losses) > 1 else f"at step {steps[0]:g}"
            note = run.loss_unit
            tiles.append({"label": label, "value": number(losses[-1]), "change": start, "note": note, "chance": ""})
            break
    return tiles


def _curves(run: RunFolder) -> dict[str, Any]:
    """The curves, and in words what they leave out."""
    drawn = [key for key in ("loss", "eval_loss", "lr", "grad_norm") if run.series("step", key)[0]]
    not_finite = sum(not math.isfinite(value) for key in drawn for value in run.series("step", key)[1])
    further = sorted({key for row in run.metrics for key in row} - METRIC_KEYS)
    return {
        "curves_svg": plots.curves(run) if drawn else None,
        "metric_rows": len(run.metrics),
        "eval_points": len(run.series("step", "eval_loss")[0]),
        "not_finite": not_finite,
        "further_metrics": further,
    }


def _layers(run: RunFolder) -> dict[str, Any]:
    """The heat maps of ‖ΔW‖/‖W‖ on one common scale, and bars for modules outside any stack of layers."""
    changes = run.relative_changes()
    finite = {name: value for name, value in changes.items() if math.isfinite(value)}
    if not finite:
        return {"layers": None, "layer_rows": list(changes.items())}
    grids, rest = plots.layer_grids(finite)
    top = max(finite.values())
    extremes = {"smallest": min(finite, key=finite.__getitem__), "largest": max(finite, key=finite.__getitem__)}
    layers = {
        "grids": [(grid.prefix, plots.heat_map(grid, top, f"heat{index}")) for index, grid in enumerate(grids)],
        "bars": plots.change_bars(rest) if rest else None,
        "bars_shown": min(len(rest), plots.BARS_SHOWN),
        "bars_total": len(rest),
        "not_finite": len(changes) - len(finite),
        "count": len(changes),
        "top": top,
        "median": statistics.median(finite.values()),
        "extremes": [(word, name, finite[name]) for word, name in extremes.items()],
    }
    return {"layers": layers, "layer_rows": list(changes.items()) if run.audit is None else []}


def _audit(run: RunFolder) -> dict[str, Any] | None:
    if run.audit is None:
        return None
    rows = run.audit["layers"]
    known = {"dtype", "layers", "max_logit_difference", "greedy_agreement", "probe_kind", "probe_positions"}
    positions = run.audit.get("probe_positions")
    facts = [("Written as", str(run.audit.get("dtype", wording.MISSING))), ("Modules merged", f"{len(rows):,}")]
    if run.audit.get("max_logit_difference") is not None:
        facts.append(("Largest logit difference", number(run.audit["max_logit_difference"])))
    if run.audit.get("greedy_agreement") is not None:
        of = f" of {positions:,} positions" if positions else ""
        facts.append(("Greedy tokens that agree", _share(run.audit["greedy_agreement"]) + of))
    if run.audit.get("probe_kind") is not None:
        facts.append(("Probes", plain(run.audit["probe_kind"])))
    for key, label, worst in (
        ("unchanged_share", "Weights unchanged, at most", max),
        ("realised_share", "Change realised, at least", min),
        ("error_share", "Error of the change, at most", max),
    ):
        values = [row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])]
        if values:
            facts.append((label, _share(worst(values))))
    return {
        "facts": facts,
        "rows": [_audit_row(row) for row in rows],
        "further": [(key, plain(value)) for key, value in run.audit.items() if key not in known],
    }


def _share(value: float) -> str:
    """A share that is often almost nothing or almost all: neither rounds to none or to all."""
    if not math.isfinite(value) or abs(value) < 0.01:
        return ratio_percent(value)
    decimals = 2
    while value != 1 and float(f"{100 * value:.{decimals}f}") == 100 and decimals < 14:
        decimals += 1
    return "100" + PERCENT if value == 1 else percent(value, decimals)


def _audit_row(row: Mapping[str, Any]) -> dict[str, str]:
    shown = {"name": row["name"], "relative_change": ratio_percent(row["relative_change"])}
    for key in ("unchanged_share", "realised_share", "error_share"):
        shown[key] = wording.MISSING if row.get(key) is None else _share(row[key])
    return shown


def _figures(run: RunFolder, measures: Sequence[Measure]) -> list[tuple[str, str]]:
    """Every key of result.json that has no place elsewhere: known ones with their unit, others as they are."""
    result = run.result or {}
    elsewhere = {row.key for row in measures} | set(ENVIRONMENT)
    elsewhere |= {"warnings"} if isinstance(result.get("warnings"), list) else set()
    rows = []
    for key, value in result.items():
        if key in elsewhere:
            continue
        if key in LOSSES and value is not None:
            rows.append((LOSSES[key], f"{number(value, 4)} {run.loss_unit}"))
        elif key == "supervised_tokens" and value is not None and run.classifies:
            rows.append(("Rows learned from", f"{count(value)} rows"))
        elif key in FIGURES and value is not None:
            label, show = FIGURES[key]
            rows.append((label, show(value)))
        else:
            rows.append((key.replace("_", " ").capitalize(), plain(value)))
    further = [(row.label, key.replace("_", " "), value) for row in measures for key, value in row.further.items()]
    return rows + [(f"{label}: {key}", plain(value)) for label, key, value in further]


def _environment(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = result.get("versions")
    rows = [(key, plain(result[key])) for key in ("dtype", "threads") if key in result]
    if isinstance(versions, Mapping):
        return rows + [(str(name), plain(version)) for name, version in versions.items()]
    return rows + ([("versions", plain(versions))] if versions is not None else [])
