"""What `trimtab measure dimension` can be asked, and which flags do not go together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from trimtab.errors import UsageError
from trimtab.options import option
from trimtab.tasks.nlu import KNOWN
from trimtab.tasks.problems import PROBLEMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class DimensionFlags:
    """What to measure, how sure to be, and how each run is trained."""

    task: str = option("digits", "see below; with --model: sst2, mrpc, or a training file of sentences with labels")
    data_dir: str | None = option(
        None, "folder with the task's files (MNIST's four IDX files, nlu/); for MNIST also a hub's dataset, OWNER/NAME"
    )
    test_data: str | None = option(None, "with a file as --task: the file that is scored")
    model: str | None = option(None, "a pretrained encoder or causal model, under a head that is trained")
    compare: tuple[str, ...] = option(
        (), "in the place of a task: the --out folders of earlier measurements, which are set side by side"
    )
    checkpoints: tuple[str, ...] = option(
        (),
        "in the place of --model: a folder of checkpoints, or several in the order of their pretraining; of a hub's "
        "repository as REPO@REVISION",
    )
    mode: Literal["did", "said"] = option("did", "with --model: one θ_d, or a λ for every layer out of the budget too")
    layers: Literal["block", "tensor"] = option("block", "what has a λ of its own with --mode said")
    random_weights: bool = option(False, "with --model: the same architecture, not pretrained, as a control")
    rows: int | None = option(None, "with --model: at most so many rows to train on, drawn once")
    test_rows: int | None = option(
        None, "with --model: at most so many rows to score on, of the test and of the validation split, drawn once"
    )
    width: int | None = option(None, "of mnist-fc's hidden layers")
    depth: int | None = option(None, "how many hidden layers mnist-fc has")
    shuffle: Literal["none", "pixels", "labels"] = option("none", "of MNIST: a control")
    projection: str | None = option(
        None,
        "how θ_d becomes θ: dense, sparse, sparse-global, fastfood, fastfood-blocks (default) or uni (with --model)",
    )
    diagonal: Literal["gaussian", "sign"] = option("gaussian", "G of the Fastfood projections")
    threshold: Literal["local", "global", "absolute"] = option(
        "local", "share of what training all parameters reaches, share of 1, or an accuracy"
    )
    share: float = option(0.9, "the share, or the accuracy of an absolute threshold")
    seeds: int = option(3, "runs at every d: start (of a pretrained model, its head), projection and order differ")
    grid: str | None = option(
        None,
        "try exactly these d, as 100,200,500, instead of searching; li2018 or aghajanyan2020: a paper's",
    )
    start: int | None = option(None, "the first d of the search; by default √D")
    resolution: float = option(1.2, "how far apart, as a ratio, the d may be between which the dimension is found")
    lr: float | None = option(None, "of training all parameters; by default the task's")
    lr_scale: Literal["sqrt", "none"] = option("sqrt", "in a subspace: times √(D/d), or as it is, as the papers do")
    rates: str | None = option(
        None,
        "multiples of the learning rate to choose from, as 0.5,1,2; by default the rate itself, and of a pretrained "
        "model 1,4,16, chosen at the first d where something is learned",
    )
    rates_at: Literal["each", "first"] | None = option(
        None, "choose at each d (usual with --rates), or for all of them at the first d where something is learned"
    )
    epochs: int | None = option(None, "passes over the data; by default the task's")
    batch_size: int | None = option(None, "examples a step; by default the task's")
    l2: float | None = option(None, "weight of the squares of the weights, biases left out; by default the task's")
    workers: int | None = option(None, "runs at once, one thread each; by default as many as there are cores")
    reuse: str | None = option(
        None,
        "an earlier --out whose runs are taken: all where they are trained alike, those of all parameters where only "
        "--projection, --diagonal, --mode or --layers differs",
    )
    out: str | None = option(None, "folder that keeps every run, results.json and report.html; a search there goes on")


SENTENCES_ONLY = ("test_data", "random_weights", "rows", "test_rows", "mode", "layers")
PROBLEMS_ONLY = ("width", "depth", "l2", "shuffle")
OF_SOME = {
    "width": ("mnist-fc",),
    "depth": ("mnist-fc",),
    "shuffle": ("mnist-fc", "mnist-lenet"),
    "l2": ("digits", "mnist-fc", "mnist-lenet"),
}
"""Flags that are of some problems alone."""


def refuse_idle(flags: DimensionFlags) -> None:
    """UsageError for flags that would change nothing, or are empty."""
    empty = [name for name in _changed(flags) if getattr(flags, name) == ""]
    if empty:
        raise UsageError(f"--{empty[0].replace('_', '-')} is empty: give a value, or leave it out")
    if flags.compare:
        _refuse_beside_compare(flags)
        return
    if flags.checkpoints and (flags.model is not None or flags.random_weights):
        raise UsageError("--checkpoints stands in the place of --model, and of pretrained weights")
    with_model = is_of_model(flags)
    idle = [name for name in _changed(flags) if name in (PROBLEMS_ONLY if with_model else SENTENCES_ONLY)]
    if idle:
        kind = "without" if with_model else "with"
        raise UsageError(f"--{idle[0].replace('_', '-')} is for a task {kind} --model or --checkpoints")
    _refuse_task(flags)
    if flags.layers != "block" and flags.mode != "said":
        raise UsageError("--layers is for --mode said, where each layer has a λ of its own")
    searching = [name for name in _changed(flags) if name in ("start", "resolution")]
    if flags.grid is not None and searching:
        raise UsageError(f"--{searching[0]} is for a search, but --grid names the d to try: leave one of them out")
    if flags.rates_at is not None and "," not in rates_of(flags)[0]:
        raise UsageError("--rates-at is for several --rates to choose from: name them, or leave it out")
    if "diagonal" in _changed(flags) and not projection_of(flags).startswith("fastfood"):
        raise UsageError(
            f"--diagonal is for fastfood and fastfood-blocks, and the projection is {projection_of(flags)}"
        )


def _refuse_task(flags: DimensionFlags) -> None:
    """UsageError for a task that is not there, before a model is fetched or read, and for flags it does not have."""
    task, changed = flags.task, _changed(flags)
    own = is_file(task)
    if is_of_model(flags) and not own and task not in KNOWN:
        why = f"{task} has a net of its own" if task in PROBLEMS else f"there is no file {task}"
        raise UsageError(f"{why}: with a model --task is {', '.join(KNOWN)} or a file of sentences with their labels")
    if not is_of_model(flags) and (own or task in KNOWN):
        raise UsageError(f"{task} is for a pretrained model to learn: name one with --model")
    foreign = [name for name in changed if name in OF_SOME and task not in OF_SOME[name] and task in PROBLEMS]
    if foreign:
        *most, last = OF_SOME[foreign[0]]
        known = f"{', '.join(most)} and {last}" if most else last
        raise UsageError(f"--{foreign[0]} is for {known}, not for {task}")


def is_file(task: str) -> bool:
    """Whether --task names a file. A known task goes before a file that is called like it, which is then ./name."""
    try:
        return task not in (*KNOWN, *PROBLEMS) and Path(task).expanduser().is_file()
    except OSError:  # a name that is longer than any file's
        return False


def is_of_model(flags: DimensionFlags) -> bool:
    """Whether a pretrained model is measured, or a series of them."""
    return flags.model is not None or bool(flags.checkpoints)


def rates_of(flags: DimensionFlags) -> tuple[str, str]:
    """Multiples of the learning rate, and where to choose one, as asked for or as usual.

    Of a pretrained model at its own rate, in a subspace, little is learned in the few steps of fine-tuning: a random
    direction holds √(d/D) of the gradient.
    """
    if flags.rates is None and is_of_model(flags):
        return "1,4,16", flags.rates_at or "first"
    return flags.rates or "1", flags.rates_at or "each"


def projection_of(flags: DimensionFlags) -> str:
    """The projection that was asked for, or the usual one."""
    return flags.projection or ("uni" if is_of_model(flags) else "fastfood-blocks")


def _changed(flags: DimensionFlags) -> list[str]:
    """The flags that are not at their defaults."""
    return [field.name for field in dataclasses.fields(flags) if getattr(flags, field.name) != field.default]


def _refuse_beside_compare(flags: DimensionFlags) -> None:
    idle = [name for name in _changed(flags) if name not in ("compare", "out")]
    if idle:
        flag = f"--{idle[0].replace('_', '-')}"
        raise UsageError(f"{flag} changes nothing beside --compare, which trains nothing: leave it out")
    out = None if flags.out is None else Path(flags.out).expanduser().resolve()
    if out in [Path(folder).expanduser().resolve() for folder in flags.compare]:
        raise UsageError(
            f"--out {flags.out} is one of the measurements, whose results it would replace: choose another"
        )
