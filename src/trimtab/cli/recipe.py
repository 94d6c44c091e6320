"""A training recipe: what to train on what, how. Flags, YAML keys and the saved config.yaml are this."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimtab.cli.common import ModelFlags, Output, own
from trimtab.cli.data import LAYOUTS
from trimtab.cli.flags import parse
from trimtab.deltas import DEFAULT, METHODS, method_class, method_spec
from trimtab.deltas.soft_prompt import SoftPrompt
from trimtab.errors import UsageError, did_you_mean, problems_to_error
from trimtab.models.embedded import EMBEDDED
from trimtab.options import did_you_mean_option, helps, option, read_mapping, read_yaml, to_mapping
from trimtab.tasks import CLASSES, TASKS
from trimtab.train.settings import Settings

if TYPE_CHECKING:
    from trimtab.deltas.method import Method


@dataclasses.dataclass(frozen=True)
class DataFlags:
    """What to train on."""

    data: str = option(help="training file (JSON, JSONL, CSV, Parquet, text; gzipped too) or hub data set")
    eval_data: str | None = option(
        None, "evaluation file: its loss is measured, and its overlap with the training data told"
    )
    task: str | None = option(
        None,
        "train a classifier: sst2, mrpc or classification, with --data a tab-separated file of sentences and labels",
    )
    hold_out: float | None = option(
        None, "share of a task's training data to evaluate on instead, drawn with --seed, where there is no eval_data"
    )
    layout: str = option("auto", LAYOUTS)
    split: str = option("train", "split of the training data, where that is a hub data set")
    eval_split: str = option("train", "split of the evaluation data, where that is a hub data set")
    limit: int | None = option(None, "use the first so many rows of the training data")
    max_length: int = option(512, "longest example in tokens; the rest is cut off, and said")


@dataclasses.dataclass(frozen=True)
class PlaceFlags:
    """Where the method goes."""

    targets: tuple[str, ...] = option(
        (), "modules: all-linear, names, globs, or re: and an expression; by default the method's own, often all-linear"
    )
    exclude: tuple[str, ...] = option((), "modules to leave out of the targets")
    bias: Literal["none", "all", "adapter-only"] = option("none", "biases to train besides")
    extra_modules: tuple[str, ...] = option((), "modules to train whole besides, saved with the adapter")
    slices: Mapping[str, str] = option(factory=dict, help="parts of a fused projection, e.g. c_attn=1,0,1 for q and v")
    adapter_dtype: Literal["float32", "bfloat16"] = option("float32", "dtype of the adapter's parameters")

    def parts(self) -> dict[str, tuple[bool, ...]]:
        """`slices` as flags, one for each equal part. UsageError when they are not 0 and 1."""
        found = {}
        for pattern, flags in self.slices.items():
            digits = flags.replace(" ", "").split(",")
            if not set(digits) <= {"0", "1"}:
                raise UsageError(f"slices {pattern}={flags}: write 1 or 0 for each equal part, such as 1,0,1")
            found[pattern] = tuple(digit == "1" for digit in digits)
        return found


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """Where the run goes."""

    out: str | None = option(None, "the run's folder; by default runs/train-N")
    resume: bool = option(False, "go on with the run in --out, as its config.yaml says, from its newest checkpoint")


@dataclasses.dataclass(frozen=True)
class RecordFlags:
    """What the run records besides its figures."""

    log_to: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = option(
        (), "also log to these, through their own libraries"
    )
    samples: int = option(3, "rows of the evaluation (else training) data to answer for the report, before and after")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything a training run is made from."""

    model: ModelFlags
    data: DataFlags
    method: Method
    place: PlaceFlags
    training: Settings
    record: RecordFlags
    run: RunFlags

    def to_dict(self) -> dict[str, Any]:
        """Flat keys and values, as in a YAML recipe; what says where the run goes is left out."""
        method = self.method.options()
        flat = {**to_mapping(self.model), **to_mapping(self.data), "method": method.pop("name"), **method}
        return {**flat, **to_mapping(self.place), **to_mapping(self.training), **to_mapping(self.record)}


GROUPS = {
    "model": ModelFlags,
    "data": DataFlags,
    "place": PlaceFlags,
    "training": Settings,
    "record": RecordFlags,
    "run": RunFlags,
}
TITLES = {**{key: key for key in GROUPS}, "place": "where the method goes"}
FREE = ("threads", "data", "eval_data", *(field.name for field in dataclasses.fields(RecordFlags)))
"""What may differ when a run is resumed: it comes to the same adapter. Data may have moved; a checkpoint knows it."""


@dataclasses.dataclass(frozen=True)
class _Choice:
    config: str | None = option(None, "a YAML recipe; flags given beside it win")
    method: str = option(DEFAULT, f"one of {', '.join(METHODS)}")


def read_recipe(name: str, summary: str, argv: list[str]) -> tuple[Recipe, Output]:
    """The recipe from --config and flags. Every wrong key and value is named at once."""
    file = _config_file(argv)
    config = read_yaml(file) if file else {}
    method = _method_name(argv, config)
    groups: list[tuple[str, type]] = [("recipe", _Choice), (f"method {method}", method_spec(method))]
    groups += [(TITLES[key], cls) for key, cls in GROUPS.items()]
    foreign = {"--" + key.replace("_", "-"): why for key, why in _foreign(method).items()}
    given = parse(name, summary, [*groups, ("output", Output)], argv, refused=foreign)
    output = Output(**own(Output, given))
    given = {key: value for key, value in given.items() if key != "config" and key not in own(Output, given)}
    if given.get("resume") and not file and not {"model", "data"} <= given.keys():
        if "out" not in given:
            raise UsageError("--resume needs the run's folder: give --out")
        raise UsageError(f"there is no run to resume in {given['out']}: it has no config.yaml")
    flat = {key.replace("-", "_"): value for key, value in {**config, **given, "method": method}.items()}
    return build_recipe(flat, file or name), output


def _flag_values(argv: list[str]) -> dict[str, str]:
    words = [w for a in argv for w in (a.split("=", 1) if a.startswith("--") else [a])]
    return dict(itertools.pairwise([*words, ""]))


def _config_file(argv: list[str]) -> str | None:
    """The recipe file: the one given, or that of the run to resume."""
    after = _flag_values(argv)
    if after.get("--config"):
        return after["--config"]
    saved = Path(after.get("--out", "")) / "config.yaml"
    return str(saved) if "--resume" in after and "--out" in after and saved.exists() else None


def _method_name(argv: list[str], config: Mapping[str, Any]) -> str:
    """The method, known before the flags are: they depend on it."""
    name = str(_flag_values(argv).get("--method") or config.get("method", DEFAULT))
    method_spec(name)
    return name


def build_recipe(flat: Mapping[str, Any], what: str) -> Recipe:
    """A recipe from flat keys and values. UsageError lists every problem, before anything heavy is loaded."""
    method = str(flat["method"])
    parts = {**GROUPS, "method": method_spec(method)}
    problems = _unknown(
        flat, method, {"method": "", **{k: v for part in parts.values() for k, v in helps(part).items()}}
    )
    values: dict[str, dict[str, Any]] = {}
    for key, part in parts.items():
        values[key], wrong = read_mapping(part, own(part, flat))
        problems += wrong
    problems += _task_problems(values["data"], method)
    if not values["data"].get("eval_data") and not values["data"].get("hold_out"):
        asked = [name for name in ("eval_every", "keep_best") if values["training"].get(name)]
        problems += [f"{name} needs evaluation data: give eval_data (--eval-data)" for name in asked]
    least = (("max_length", "data", 2), ("limit", "data", 1), ("samples", "record", 0))
    for key, group, low in least:
        if (number := values[group].get(key)) is not None and number < low:
            problems.append(f"{key} is {number}, but must be at least {low}")
    problems_to_error(problems, what)
    for key in ("data", "eval_data"):
        values["data"][key] = _whole_path(values["data"].get(key))
    values["model"]["model"] = _whole_path(values["model"]["model"])
    made = {key: part(**values[key]) for key, part in parts.items()}
    made["method"] = method_class(method)(**values["method"])
    made["place"].parts()
    return Recipe(**made)


def _task_problems(data: Mapping[str, Any], method: str) -> list[str]:
    """What does not go with --task, or not without it."""
    if not data.get("task"):
        return ["hold_out is for a classifier: give task (--task)"] if data.get("hold_out") else []
    problems = [
        f"{key} is not for a task: its files are read as tables of sentences"
        for key, default in (("layout", "auto"), ("split", "train"), ("eval_split", "train"))
        if data.get(key, default) != default
    ]
    if data["task"] not in (known := [name for name, listed in TASKS.items() if listed.place == CLASSES]):
        near = did_you_mean(data["task"], known)
        problems.append(f"task is '{data['task']}', but trimtab train has {', '.join(known)}{near}")
    if data.get("hold_out") is not None and not 0 < data["hold_out"] < 1:
        problems.append(f"hold_out is {data['hold_out']}, but must be a share between 0 and 1")
    if data.get("hold_out") and data.get("eval_data"):
        problems.append("give either eval_data or hold_out, not both")
    if issubclass(method_spec(method), SoftPrompt):
        problems.append(f"method '{method}' has no place for the head of a classifier: choose another")
    return problems


def _whole_path(name: str | None) -> str | None:
    """The absolute path of a file or folder that is there, so that a run goes on from any directory; else `name`."""
    path = Path(name or "").expanduser()
    return str(path.absolute()) if name and name not in EMBEDDED and path.exists() else name


def _unknown(flat: Mapping[str, Any], method: str, known: Mapping[str, str]) -> list[str]:
    """What is wrong with each key that is not known, and once which keys there are."""
    foreign = _foreign(method)
    wrong = [key for key in flat if key not in known]
    found = [f"'{key}' {foreign[key]}" for key in wrong if key in foreign]
    unknown = [f"unknown key '{key}'{did_you_mean_option(key, known)}" for key in wrong if key not in foreign]
    if unknown:
        unknown[-1] += f" (known: {', '.join(known)})"
    return found + unknown


def _foreign(method: str) -> dict[str, str]:
    """Why the options that other methods alone have are refused."""
    own = helps(method_spec(method))
    having: dict[str, list[str]] = {}
    for other in METHODS:
        for key in helps(method_spec(other)):
            if key not in own:
                having.setdefault(key, []).append(other)
    return {key: f"is for method {' or '.join(others)}, but the method is {method}" for key, others in having.items()}


def resolved(recipe: Recipe, loaded: Any) -> Recipe:
    """The recipe with the dtype and the threads that were chosen, so that it says the same on every machine."""
    import torch

    dtype = str(loaded.model.dtype).removeprefix("torch.")
    model = dataclasses.replace(recipe.model, dtype=dtype, threads=torch.get_num_threads())  # type: ignore[arg-type]
    return dataclasses.replace(recipe, model=model)


def write_config(recipe: Recipe, folder: Path) -> None:
    """config.yaml of a run: the resolved recipe, which `--config` takes again."""
    import yaml

    from trimtab.files import write_whole

    write_whole(folder / "config.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True))


def same_run(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe to resume a run with: its own dtype and threads, unless others are asked for.

    UsageError names every key that differs: it would not be the run that was interrupted.
    """
    file = str(folder / "config.yaml")
    # Built anew, so that a key that was not known yet when the run began has its default.
    before = build_recipe({"method": DEFAULT, **read_yaml(file)}, file).to_dict()
    model = recipe.model
    if model.dtype == "auto":
        model = dataclasses.replace(model, dtype=before["dtype"])
    if model.threads is None:
        model = dataclasses.replace(model, threads=before["threads"])
    recipe = dataclasses.replace(recipe, model=model)
    now = recipe.to_dict()
    keys = [key for key in {**before, **now} if key not in FREE and before.get(key) != now.get(key)]
    changed = [f"{key} was {before.get(key)!r}, and is {now.get(key)!r} now" for key in keys]
    problems_to_error(changed, f"{folder} was started with another recipe")
    for key in ("data", "eval_data"):
        name = now[key]
        if name and Path(name).is_absolute() and not Path(name).exists():
            flag = "--" + key.replace("_", "-")
            raise UsageError(f"{file} names {name}, which is not there: give {flag} with where it is now")
    if not Path(recipe.model.model).exists() and Path(recipe.model.model).is_absolute():
        raise UsageError(f"{file} names the model {recipe.model.model}, which is not there: put it back")
    return recipe
