"""From examples to batches: padded tensors, what their loss sums over, and the order of examples in an epoch."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.data.encode import Example
from trimtab.errors import UsageError
from trimtab.ops.tree import Tree

IGNORED = -100  # the label that torch's and transformers' cross-entropy leave out
POOL = 16  # batches whose examples are sorted by length together


@dataclass(frozen=True)
class Batch:
    """Examples as tensors, for one forward pass.

    input_ids: [rows, length] int64. attention_mask: [rows, length] int64, 1 on real tokens, of a padded batch, whose
    tokens the model counts by itself. position_ids: [1, length] int64, of a packed row. tree: its shape, which says
    what each token attends to.
    predictors, targets: [terms] int64, and weights: [terms] fp32: the terms of the loss. Position `predictors[t]` of
    the flattened tokens predicts `targets[t]`; a position of a tree may predict several. read: [n] int64, the
    positions that predict something, each once.
    examples: the row numbers of the examples in their files. real_tokens: the examples' tokens, without padding and
    each counted though a tree may compute it once. supervised_tokens: the sum of the weights, which is what a mean
    loss divides by. places: for each example, where its tokens stand among the flattened ones; those behind its last
    predictor may be left out.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    tree: Tree | None
    predictors: Tensor
    targets: Tensor
    weights: Tensor
    read: Tensor
    examples: tuple[int, ...]
    real_tokens: int
    supervised_tokens: int
    places: tuple[Sequence[int], ...]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor | Tree)
        }
        return dataclasses.replace(self, **moved)

    @property
    def labels(self) -> Tensor:
        """[rows, length] int64 as transformers' losses take them, unshifted, IGNORED where unsupervised.

        For a padded batch alone: in a tree a position may predict several tokens.
        """
        assert self.tree is None, "a packed batch has terms, not labels"
        labels = torch.full_like(self.input_ids, IGNORED)
        labels.view(-1)[self.predictors + 1] = self.targets
        return labels


def pad(examples: Sequence[Example], pad_id: int) -> Batch:
    """`examples` as rows of one batch, padded on the right: no token of a causal model sees what follows it.

    Tensors are [len(examples), longest]. Raises UsageError without examples.
    """
    need_some(examples)
    length = max(len(example.input_ids) for example in examples)
    ids, mask = [], []
    terms: dict[Term, int] = {}
    places = []
    for row, example in enumerate(examples):
        real = len(example.input_ids)
        rest = length - real
        ids.append(example.input_ids + [pad_id] * rest)
        mask.append([1] * real + [0] * rest)
        places.append(range(row * length, row * length + real))
        add_terms(terms, example, places[-1])
    return Batch(
        torch.tensor(ids),
        None,
        torch.tensor(mask),
        None,
        *term_tensors(terms),
        *counts(examples),
        tuple(places),
    )


Term = tuple[int, int]
"""(position that predicts, token it predicts)."""


def add_terms(terms: dict[Term, int], example: Example, places: Sequence[int]) -> None:
    """Count an example's targets. places: where its tokens stand among the batch's, flattened; all that predict.

    Nothing predicts an example's first token: what stands before it is padding or another example.
    """
    for i in range(1, len(example.input_ids)):
        if example.supervised[i]:
            term = places[i - 1], example.input_ids[i]
            terms[term] = terms.get(term, 0) + 1


def term_tensors(terms: dict[Term, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(predictors, targets, weights, read) of a batch."""
    found = torch.tensor([*terms], dtype=torch.int64).view(-1, 2)
    predictors, weights = found[:, 0].contiguous(), torch.tensor([*terms.values()], dtype=torch.float32)
    return predictors, found[:, 1].contiguous(), weights, torch.unique(predictors)


def need_some(examples: Sequence[Example]) -> None:
    """UsageError when there are none."""
    if not examples:
        raise UsageError("a batch needs at least one example")


def counts(examples: Sequence[Example]) -> tuple[tuple[int, ...], int, int]:
    """(rows in the file, real tokens, supervised tokens) of a batch."""
    # Counted here, where they are Python numbers: asking the tensors would wait for their device.
    tokens, supervised = sum(len(e.input_ids) for e in examples), sum(e.targets for e in examples)
    return tuple(example.row for example in examples), tokens, supervised


def batches(
    lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int, by_length: bool = True, shuffle: bool = True
) -> list[list[int]]:
    """The examples of one epoch, as indices into `lengths`, in batches.

    shuffle: in a random order, and with by_length in batches of similar length; else in the order they are in. Every
    example stands in exactly one batch; all batches but one have batch_size examples. The order depends on the
    arguments alone. Raises UsageError for a batch size below 1.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, but must be at least 1 example")
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    if shuffle:
        rng.shuffle(order)
    if not (shuffle and by_length):
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    pool = batch_size * POOL
    # Sorting within pools only: sorting all would put the same examples together in every epoch.
    pools = [sorted(order[start : start + pool], key=lengths.__getitem__) for start in range(0, len(order), pool)]
    ordered = [index for members in pools for index in members]
    cut = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    rng.shuffle(cut)
    return cut
