"""What a search is of: a self-contained problem, or a pretrained model on sentences, seen alike."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from trimtab.adapt.select import adaptable, base_modules
from trimtab.subspace.draws import GENERATOR
from trimtab.subspace.judged import Judged
from trimtab.subspace.layers import layer_groups
from trimtab.subspace.offsets import groups_of
from trimtab.subspace.projection import make_projection, most_dimensions
from trimtab.subspace.runs import Trainer
from trimtab.subspace.sentences import SentenceTrainer, Setting
from trimtab.subspace.trainers import about_problem, problem_trainer
from trimtab.tasks.digests import config_digest, model_digest
from trimtab.tasks.problem import Problem, Protocol

log = logging.getLogger("trimtab")

FINE_TUNING_LR = 5e-5
"""Of all parameters of a pretrained encoder: the largest of those that Devlin et al. 2019 (arXiv 1810.04805, appendix
A.3) found to work across tasks."""


class Subject(NamedTuple):
    """title, metric, split: for people. shapes: of the parameters that are trained, by name. scored, chosen: the split
    that counts, and the one by which learning rates are chosen. n: training examples. least, most: the smallest d there
    is and the largest. lr: by default, of all parameters. make: gives the trainer; can be sent to another process.
    about: what the runs depend on. features: Σ (in + out) of the weights a LoRA would be put on, and how many; or None.
    """

    title: str
    metric: str
    split: str
    shapes: Mapping[str, tuple[int, ...]]
    scored: Judged
    chosen: Judged
    n: int
    least: int
    most: int
    lr: float
    make: Callable[[], Trainer]
    about: Mapping[str, Any]
    features: tuple[int, int] | None

    @property
    def D(self) -> int:
        """How many parameters are trained."""
        return sum(map(math.prod, self.shapes.values()))


def of_problem(
    make: Callable[[], Problem], change: Callable[[Protocol], Protocol], projection: str, options: Mapping[str, Any]
) -> Subject:
    """A self-contained problem, trained as `change` leaves its protocol."""
    problem = make()
    protocol = change(problem.defaults)
    make_projection(projection, problem.sizes, 1, 0, **options)  # refuses what cannot be before anything is trained
    judged = {name: Judged(name, problem.chances[name], len(split)) for name, split in problem.splits.items()}
    return Subject(
        problem.name,
        problem.metric,
        problem.splits[problem.scored].name,
        _shapes(problem.make_model(0)),
        judged[problem.scored],
        judged["train" if problem.scored == "train" else "validation"],
        len(problem.train),
        1,
        most_dimensions(projection, problem.sizes),
        protocol.lr,
        functools.partial(problem_trainer, make, protocol, projection, dict(options)),
        about_problem(problem, protocol, projection, options),
        None,
    )


def of_sentences(setting: Setting) -> Subject:
    """A model on a task of sentences. The model is loaded once, to be looked at."""
    trainer = SentenceTrainer(setting)
    if trainer.splits.in_common:
        log.warning(
            "%d of %d rows that are scored are also learned: the scores say less of other rows",
            trainer.splits.in_common,
            len(trainer.splits.test),
        )
    loaded = trainer.load(0)
    shapes = _shapes(loaded.model)
    D = sum(map(math.prod, shapes.values()))
    make_projection(setting.projection, [D], 1, 0, **setting.options)
    groups = groups_of(setting.mode, setting.layers, layer_groups(list(shapes)))
    start = "" if setting.pretrained else " with random weights"
    return Subject(
        f"{setting.task} for {loaded.name}{start}, {setting.mode.upper()}",
        "accuracy",
        f"{len(trainer.splits.test):,} test rows",
        shapes,
        trainer.splits.judged("test"),
        trainer.splits.judged("validation"),
        len(trainer.splits.train),
        1 if groups is None else len(set(groups)) + 1,
        most_dimensions(setting.projection, [math.prod(shape) for shape in shapes.values()]),
        FINE_TUNING_LR,
        functools.partial(SentenceTrainer, setting),
        {
            **setting.about(),
            "parameters": D,
            "weights": model_digest(loaded.model),
            "config": config_digest(loaded.model.config),
            "data_digest": trainer.digest(loaded),
            "generator": GENERATOR,
            **({} if loaded.fresh else {"head": "the checkpoint's own"}),
        },
        _features(loaded.model, loaded.head),
    )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad and p.numel()}


def _features(model: nn.Module, head: tuple[str, ...]) -> tuple[int, int] | None:
    sites, _ = adaptable(base_modules(model))
    own = [
        site.layout
        for path, site in sites.items()
        if site.layout.linear and not any(path == h or path.startswith(f"{h}.") for h in head)
    ]
    return (sum(layout.in_features + layout.out_features for layout in own), len(own)) if own else None
