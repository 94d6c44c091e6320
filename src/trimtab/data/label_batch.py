"""From labelled sentences to batches of a classifier: one term of the loss for each row."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.data.batch import Batch, counts, need_some
from trimtab.data.encode import Example
from trimtab.data.labelled import LabelledRow
from trimtab.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("trimtab")


@dataclass(frozen=True)
class LabelledExample(Example):
    """A row as tokens. label: the number of its class. segments: which sentence each token is of, where a model asks.

    No token is a target: the class is the one thing to be learned. row: its line in the file.
    """

    label: int = 0
    segments: list[int] | None = field(default=None)

    @property
    def targets(self) -> int:
        """One: its class."""
        return 1

    def content(self) -> bytes:
        """What tells it from another example."""
        return super().content() + array("q", [self.label, *(self.segments or ())]).tobytes()


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """Rows padded on the right, for a classifier.

    There is one term for each row: its first token stands among `predictors`, its class among `targets`.
    segments: [rows, length] int64, which sentence each token is of; None for models that do not ask.
    """

    segments: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a classifier of transformers' is called with."""
        assert self.attention_mask is not None
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return inputs if self.segments is None else {**inputs, "token_type_ids": self.segments}


def encode_labelled(
    rows: Sequence[LabelledRow], tokenizer: PreTrainedTokenizerBase, classes: Sequence[str], *, max_length: int
) -> list[LabelledExample]:
    """The rows as the tokenizer has sentences and pairs, in order. What is longer than max_length tokens is cut at the
    end, of a pair at the end of the longer sentence; the log says how much. Raises UsageError for a label that is not
    among `classes`, and where no token of a row is left.
    """
    numbers = {label: number for number, label in enumerate(classes)}
    least = tokenizer.num_special_tokens_to_add(pair=rows[0].second is not None) + 1
    if max_length < least:
        raise UsageError(f"max_length is {max_length}, but must be at least {least} for a token of each sentence")
    found = []
    for row, (ids, segments, cut) in zip(rows, _tokenised(rows, tokenizer, max_length), strict=True):
        if row.label not in numbers:
            raise UsageError(f"line {row.line} has the label '{row.label}', but the classes are {', '.join(classes)}")
        if not ids:
            raise UsageError(f"the tokenizer leaves nothing of the sentence in line {row.line}")
        found.append(LabelledExample(ids, [False] * len(ids), row.line, cut, False, numbers[row.label], segments))
    cut_rows = sum(example.truncated > 0 for example in found)
    if cut_rows:
        cut_tokens = sum(example.truncated for example in found)
        log.warning(
            "%d of %d rows are longer than %d tokens: %d tokens are cut off",
            cut_rows,
            len(found),
            max_length,
            cut_tokens,
        )
    return found


def _tokenised(
    rows: Sequence[LabelledRow], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[list[int], list[int] | None, int]]:
    """(tokens, segments, tokens cut off) of each row."""
    texts = [row.first for row in rows]
    pairs = [row.second for row in rows] if rows[0].second is not None else None
    whole = tokenizer(texts, pairs, verbose=False)
    kept = tokenizer(texts, pairs, truncation="longest_first", max_length=max_length)
    segments = kept.get("token_type_ids") or [None] * len(rows)
    cut = [len(before) - len(after) for before, after in zip(whole["input_ids"], kept["input_ids"], strict=True)]
    return list(zip(kept["input_ids"], segments, cut, strict=True))


def pad_labelled(examples: Sequence[LabelledExample], pad_id: int) -> LabelledBatch:
    """`examples` as rows of one batch, padded on the right. Raises UsageError without examples."""
    need_some(examples)
    length = max(len(example.input_ids) for example in examples)
    starts = torch.arange(len(examples)) * length

    def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])

    segments = [example.segments for example in examples if example.segments is not None]
    return LabelledBatch(
        padded([example.input_ids for example in examples], pad_id),
        torch.arange(length).expand(len(examples), -1),
        padded([[1] * len(example.input_ids) for example in examples], 0),
        None,
        starts,
        torch.tensor([example.label for example in examples]),
        torch.ones(len(examples)),
        starts,
        *counts(examples),
        tuple(range(row * length, row * length + len(e.input_ids)) for row, e in enumerate(examples)),
        padded(segments, 0) if segments else None,
    )
