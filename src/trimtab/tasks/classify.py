"""Which class a model gives to each sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from trimtab.adapt.adapter import Adapter
from trimtab.data.label_batch import LabelledExample, encode_labelled, pad_labelled
from trimtab.errors import TrimtabError, UsageError
from trimtab.models.classifier import Classifier
from trimtab.tasks.asking import Asking, Progress
from trimtab.tasks.evaluating import device_of, evaluating
from trimtab.tasks.nlu import Classification, Sentences
from trimtab.tasks.results import Outcome, Results
from trimtab.train.loss import class_logits


def classify(
    loaded: Classifier,
    task: Classification,
    items: Sequence[Sentences],
    *,
    max_length: int = 512,
    batch_size: int = 32,
    results: Results | None = None,
    progress: Progress | None = None,
) -> tuple[Outcome, ...]:
    """The most probable class of each item, in their order; scores are log-probabilities in nats.

    max_length: what is longer in tokens is cut, as in training. results, progress: as for `tasks.evaluate.evaluate`.
    Raises UsageError where there are no items, and TrimtabError for logits that are not finite.
    """
    texts = [f"{item.question}\t{item.second}" if item.second is not None else item.question for item in items]
    asking = Asking(task.name, items, texts, results, progress)
    left = cast("list[list[Sentences]]", asking.left(batch_size))
    examples = (
        {e.row: e for e in encoded([item for batch in left for item in batch], loaded, max_length)} if left else {}
    )
    with evaluating(loaded.model):
        for part in left:
            nats = _nats(loaded, [examples[item.line] for item in part])
            answers = []
            for item, row in zip(part, nats.tolist(), strict=True):
                if not all(map(math.isfinite, row)):
                    raise TrimtabError(
                        f"{task.name} line {item.line} has no finite score: load the model in float32 (--dtype)"
                    )
                best = loaded.classes[row.index(max(row))]
                answers.append({"prediction": best, "scores": dict(zip(loaded.classes, row, strict=True))})
            asking.keep(part, answers)
    return tuple(asking.found[item.index] for item in items)


def _nats(loaded: Classifier, examples: Sequence[LabelledExample]) -> Tensor:
    batch = pad_labelled(examples, loaded.tokenizer.pad_token_id).to(device_of(loaded.model))
    return torch.log_softmax(class_logits(loaded.model, batch), -1)


def encoded(items: Sequence[Sentences], loaded: Classifier, max_length: int) -> list[LabelledExample]:
    """The items as tokens of the model's, of at most max_length, and no more than it reads."""
    room = min(max_length, loaded.max_length)
    return encode_labelled([item.row() for item in items], loaded.tokenizer, loaded.classes, max_length=room)


def refuse_random(loaded: Classifier, adapter: Adapter | None) -> None:
    """UsageError where a part of the model is neither its checkpoint's nor the adapter's, but drawn at random."""
    places = [key.rpartition(".") for key in loaded.fresh]
    copies = adapter.copies if adapter is not None else {}
    random = [
        f"{path}.{name}" for path, _, name in places if path not in copies or name not in copies[path]._parameters
    ]
    if random:
        own = (
            "its adapter does not hold it"
            if adapter is not None
            else "give --adapter, as trimtab train --task makes it"
        )
        raise UsageError(f"{loaded.name} has no trained {random[0]}, so its answers would be random: {own}")
