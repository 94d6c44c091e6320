"""Runs of a pretrained model on sentences or pairs of them, in subspaces and with all parameters.

After Aghajanyan et al. 2020 (arXiv 2012.13255): all parameters are in D, the head's included, which is drawn from the
seed; the model starts from its checkpoint, or from weights drawn at random as the control.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapt.module import modes_kept
from trimtab.data.label_batch import LabelledBatch, LabelledExample, pad_labelled
from trimtab.data.labelled import LabelledRow, check_classes, class_names, hold_out
from trimtab.errors import UsageError, problems_to_error
from trimtab.files import name_of
from trimtab.models.classifier import Classifier, load_classifier
from trimtab.models.fused import fused
from trimtab.subspace.judged import Judged
from trimtab.subspace.offsets import groups_of
from trimtab.subspace.reparameterize import Subspace
from trimtab.subspace.runs import Run
from trimtab.subspace.training import Outcome, has_diverged
from trimtab.tasks.classify import encoded
from trimtab.tasks.digests import examples_digest
from trimtab.tasks.evaluating import device_of, evaluating
from trimtab.tasks.nlu import KNOWN, Classification
from trimtab.tasks.problem import SPLITS, seed_for
from trimtab.train.loss import class_logits, class_loss, mean_loss

log = logging.getLogger("trimtab")

SCORED_ROWS = 64
"""So many rows are scored at once: with their activations they stay within some hundred megabytes."""
HELD_OUT = 0.15
"""Share of the training rows that learning rates are chosen by, where a task has no split for that: of MRPC's 4,076
some 600, on which an accuracy is known to ± 0.02."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the runs are of, and how they are trained: Adam at a constant rate, as the problems of Li et al. are.

    model, pretrained: see `load_classifier`. task: sst2, mrpc, or classification with files of one's own: data is then
    the training file and test the other one; else data is the folder with the task's files. mode, layers, projection,
    options: see `Subspace`. rows, test_rows: at most so many, drawn once, the same for every run. max_length: tokens of
    a row. epochs, batch_size: by default those that Devlin et al. 2019 (arXiv 1810.04805, appendix A.3) fine-tune with.
    """

    model: str
    task: str
    data: str | None = None
    test: str | None = None
    pretrained: bool = True
    mode: str = "did"
    layers: str | None = None
    projection: str = "uni"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rows: int | None = None
    test_rows: int | None = None
    epochs: int = 3
    batch_size: int = 32
    max_length: int = 128

    def __post_init__(self) -> None:
        counts = {key: getattr(self, key) for key in ("rows", "test_rows", "epochs", "batch_size", "max_length")}
        problems = [f"{key} is {n}, but must be at least 1" for key, n in counts.items() if n is not None and n < 1]
        try:
            groups_of(self.mode, self.layers, ())
        except UsageError as error:
            problems.append(str(error))
        problems_to_error(problems, "training on sentences")

    def about(self) -> dict[str, Any]:
        """What runs depend on besides d, seed and learning rate, as plain values; files by their names. The folder of
        a known task is left out: what its files hold counts, not where they are."""
        plain = dataclasses.asdict(self)
        if self.task in KNOWN:
            del plain["data"]
        return {**plain, **{key: name_of(plain[key]) for key in ("model", "data", "test") if plain.get(key)}}


@dataclasses.dataclass(frozen=True)
class Splits:
    """The rows of each split, and the classes there are."""

    classes: tuple[str, ...]
    train: tuple[LabelledRow, ...]
    validation: tuple[LabelledRow, ...]
    test: tuple[LabelledRow, ...]

    @property
    def in_common(self) -> int:
        """How many test rows are among those that are learned."""
        learned = {(row.first, row.second) for row in self.train}
        return sum((row.first, row.second) in learned for row in self.test)

    def judged(self, name: str) -> Judged:
        """One of the splits as runs are judged by it: guessing scores the share of its largest class."""
        rows = getattr(self, name)
        return Judged(name, max(Counter(row.label for row in rows).values()) / len(rows), len(rows))


def read_splits(setting: Setting) -> Splits:
    """The rows that a setting names.

    UsageError for files that are not there, and for a class without a row among those of a split that are taken.
    """
    task = Classification(setting.task)
    known = KNOWN.get(setting.task)
    if known is None and setting.task != "classification":
        tasks = ", ".join(KNOWN)
        raise UsageError(f"a model learns {tasks} or a file of sentences with labels, and '{setting.task}' is neither")
    if known and setting.test is not None:
        raise UsageError(f"{setting.task} is scored on its own test rows: --test-data is for a file as --task")
    if known is None and (setting.data is None or setting.test is None):
        raise UsageError("a file of your own needs another one to be scored on: name it with --test-data")
    files = functools.partial(task.path, data=setting.data, flag="--data-dir")
    if known and files("train") == files("test"):
        raise UsageError(f"{setting.task} is not to be scored on what it learns: give the folder with its files")
    rows = task.rows(files("train"))
    scored = files("test") if known else Path(str(setting.test)).expanduser()
    if scored.exists() and scored.samefile(files("train")):
        raise UsageError(f"{scored} is not to be scored on what it teaches: name another file with --test-data")
    test = task.rows(scored)
    classes = task.classes or class_names(rows, files("train").name)
    check_classes(test, classes, scored.name, each=False)
    if known and "dev" in known.splits:
        validation = task.rows(files("dev"))
    else:
        rows, validation = hold_out(rows, HELD_OUT, 0)
    few = setting.test_rows
    splits = Splits(classes, _some(rows, setting.rows), _some(validation, few), _some(test, few))
    for name in SPLITS:
        check_classes(getattr(splits, name), classes, f"the {name} split")
    return splits


def _some(rows: Sequence[LabelledRow], count: int | None) -> tuple[LabelledRow, ...]:
    if count is None or count >= len(rows):
        return tuple(rows)
    kept = set(random.Random(0).sample(range(len(rows)), count))
    return tuple(row for i, row in enumerate(rows) if i in kept)


class SentenceTrainer:
    """Trains one run after another; the data is read once, and the model is loaded anew for each."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.splits, self._told = setting, read_splits(setting), False
        self._tokens: dict[str, list[LabelledExample]] = {}

    def load(self, seed: int) -> Classifier:
        """The model of a run: its head, or all of it, is drawn from the seed. What is drawn is logged once."""
        before = log.level
        log.setLevel(max(before, logging.WARNING) if self._told else before)
        self._told = True
        try:
            return self._loaded(seed)
        finally:
            log.setLevel(before)

    def _loaded(self, seed: int) -> Classifier:
        # Whatever the checkpoint stores: in fp16 the first step of Adam is no number, as its epsilon is zero there.
        loaded = load_classifier(
            self.setting.model, self.splits.classes, seed, pretrained=self.setting.pretrained, dtype="float32"
        )
        if not loaded.fresh:
            log.info("the checkpoint has a head of its own: seeds draw the projection, the order and dropout alone")
        return loaded

    def digest(self, loaded: Classifier) -> str:
        """Of every row of every split, as the tokenizer has it."""
        return examples_digest(example for name in SPLITS for example in self._encoded(name, loaded))

    def __call__(self, run: Run) -> Outcome:
        loaded = self.load(run.seed)
        pad = loaded.tokenizer.pad_token_id
        train = self._encoded("train", loaded)
        few = _batches(train[: 4 * SCORED_ROWS], pad)  # what tells a run that diverged needs no more
        net, trained = self._net(loaded.model, run)
        with fused(net):
            first = mean_loss(net, few, class_loss)
            begun = time.perf_counter()
            steps = self._fit(net, trained, train, pad, run) if trained else 0
            seconds = time.perf_counter() - begun
            with evaluating(net), _weights_kept(net):
                final = mean_loss(net, few, class_loss)
                scores = {name: _accuracy(net, _batches(self._encoded(name, loaded), pad)) for name in SPLITS}
        size = sum(p.numel() for p in loaded.model.parameters())
        return Outcome(
            seed=run.seed,
            d=size if run.d is None else run.d,
            lr=run.lr,
            **scores,
            first_loss=first,
            final_loss=final,
            seconds=seconds,
            steps=steps,
            diverged=has_diverged(first, final, math.log(len(self.splits.classes))),
        )

    def _encoded(self, split: str, loaded: Classifier) -> list[LabelledExample]:
        """A split as tokens: the tokenizer is the same for every run."""
        if split not in self._tokens:
            task, rows = Classification(self.setting.task), getattr(self.splits, split)
            self._tokens[split] = encoded(task.items_of(rows, self.splits.classes), loaded, self.setting.max_length)
        return self._tokens[split]

    def _net(self, model: nn.Module, run: Run) -> tuple[nn.Module, list[nn.Parameter]]:
        if run.d is None:
            return model, [p for p in model.parameters() if p.requires_grad]
        if run.d == 0:
            return model, []
        s = self.setting
        made = Subspace.of(
            model, d=run.d, mode=s.mode, projection=s.projection, seed=run.seed, layers=s.layers, **s.options
        )
        return made, list(made.trained())

    def _fit(
        self, net: nn.Module, trained: list[nn.Parameter], examples: list[LabelledExample], pad: int, run: Run
    ) -> int:
        order, steps = torch.Generator().manual_seed(seed_for(run.seed, "order")), 0
        optimizer = torch.optim.Adam(trained, lr=run.lr)
        with torch.random.fork_rng(), modes_kept(net):
            torch.manual_seed(seed_for(run.seed, "dropout"))
            net.train()
            for _ in range(self.setting.epochs):
                for rows in torch.split(torch.randperm(len(examples), generator=order), self.setting.batch_size):
                    loss = batch_loss(net, [examples[i] for i in rows.tolist()], pad)
                    if not math.isfinite(loss.item()):
                        return steps
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    optimizer.zero_grad()
                    steps += 1
        return steps


def batch_loss(net: nn.Module, examples: Sequence[LabelledExample], pad: int) -> Tensor:
    """The mean loss of a batch, computed in two parts, the shorter rows and the longer ones: less of it is padding."""
    ordered, half, device = sorted(examples, key=_length), len(examples) // 2, device_of(net)
    parts = [pad_labelled(part, pad).to(device) for part in (ordered[:half], ordered[half:]) if part]
    with _weights_kept(net):
        return torch.stack([class_loss(net, part) for part in parts]).sum() / len(examples)


def _batches(examples: Sequence[LabelledExample], pad: int) -> list[LabelledBatch]:
    """Of rows that are alike in length, so that little is padded."""
    ordered = sorted(examples, key=_length)
    return [pad_labelled(ordered[i : i + SCORED_ROWS], pad) for i in range(0, len(ordered), SCORED_ROWS)]


def _length(example: LabelledExample) -> int:
    return len(example.input_ids)


def _accuracy(net: nn.Module, batches: Sequence[LabelledBatch]) -> float:
    device = device_of(net)
    right = sum(int((class_logits(net, b.to(device)).argmax(1) == b.targets.to(device)).sum()) for b in batches)
    return right / sum(len(batch.targets) for batch in batches)


def _weights_kept(net: nn.Module) -> AbstractContextManager[None]:
    return net.weights_kept() if isinstance(net, Subspace) else nullcontext()
