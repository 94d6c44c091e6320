"""From examples to batches: padded or packed tensors, and the order of examples in an epoch."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.data.encode import Example
from trimtab.errors import UsageError

IGNORED = -100  # the label that torch's and transformers' cross-entropy leave out
POOL = 16  # batches whose examples are sorted by length together


@dataclass(frozen=True)
class Batch:
    """Examples as tensors, for one forward pass.

    input_ids, position_ids, labels: [rows, length] int64. labels are not shifted; IGNORED where unsupervised.
    attention_mask: [rows, length] int64, 1 on real tokens; None for a packed batch, whose position_ids restart
    at 0 with each example.
    examples: the row numbers of the examples in their files. real_tokens: tokens without padding.
    supervised_tokens: labels with a token before them in their example, which is what a mean loss divides by.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    labels: Tensor
    examples: tuple[int, ...]
    real_tokens: int
    supervised_tokens: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=None if self.attention_mask is None else self.attention_mask.to(device),
            position_ids=self.position_ids.to(device),
            labels=self.labels.to(device),
        )


def pad(examples: Sequence[Example], pad_id: int) -> Batch:
    """`examples` as rows of one batch, padded on the left, so that the answers line up at the right end.

    Tensors are [len(examples), longest]. Raises UsageError without examples.
    """
    _need_some(examples)
    length = max(len(example.input_ids) for example in examples)
    ids, mask, positions, labels = [], [], [], []
    for example in examples:
        real = len(example.input_ids)
        left = length - real
        ids.append([pad_id] * left + example.input_ids)
        mask.append([0] * left + [1] * real)
        positions.append([0] * left + list(range(real)))
        labels.append([IGNORED] * left + _labels(example))
    return Batch(
        torch.tensor(ids),
        torch.tensor(mask),
        torch.tensor(positions),
        torch.tensor(labels),
        tuple(example.row for example in examples),
        *_counts(examples),
    )


def pack(examples: Sequence[Example], pad_id: int) -> Batch:
    """`examples` one after the other in a single row, without padding.

    Tensors are [1, sum of lengths]. No example sees another, as transformers tells them apart by position_ids that
    restart at 0; it does so only without an attention mask and with use_cache=False. pad_id is not used; it is there so
    that `pad` and `pack` are called alike. Raises UsageError without examples.
    """
    _need_some(examples)
    return Batch(
        torch.tensor([[token for example in examples for token in example.input_ids]]),
        None,
        torch.tensor([[position for example in examples for position in range(len(example.input_ids))]]),
        torch.tensor([[label for example in examples for label in _labels(example)]]),
        tuple(example.row for example in examples),
        *_counts(examples),
    )


def batches(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """The examples of one epoch, as indices into `lengths`, in batches of similar length.

    Every example stands in exactly one batch; all batches but one have batch_size examples. The order depends on
    (lengths, batch_size, seed, epoch) alone. Raises UsageError for a batch size below 1.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, but must be at least 1 example")
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    pool = batch_size * POOL
    # Sorting within pools only: sorting all would put the same examples together in every epoch.
    pools = [sorted(order[start : start + pool], key=lengths.__getitem__) for start in range(0, len(order), pool)]
    by_length = [index for members in pools for index in members]
    cut = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    rng.shuffle(cut)
    return cut


def _need_some(examples: Sequence[Example]) -> None:
    if not examples:
        raise UsageError("a batch needs at least one example")


def _labels(example: Example) -> list[int]:
    # Nothing predicts an example's first token: what stands before it is padding or another example.
    rest = zip(example.input_ids[1:], example.supervised[1:], strict=True)
    return [IGNORED] * bool(example.input_ids) + [token if target else IGNORED for token, target in rest]


def _counts(examples: Sequence[Example]) -> tuple[int, int]:
    # Counted here, where they are Python numbers: asking the tensors would wait for their device.
    return sum(len(e.input_ids) for e in examples), sum(sum(e.supervised[1:]) for e in examples)
