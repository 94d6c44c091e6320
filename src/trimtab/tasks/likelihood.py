"""Multiple choice by likelihood: which answer does the model find most probable?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from trimtab.errors import UsageError
from trimtab.tasks.evaluating import device_of, evaluating
from trimtab.tasks.knowledge import Question
from trimtab.tasks.statistics import Interval, bootstrap, mean


@dataclass(frozen=True)
class ChoiceResult:
    """How a model answered, question by question.

    correct, picks: whether the best-scored choice was right, and its index. scores: per choice, in nats per byte.
    accuracy: the share of right picks, with its bootstrap interval. chance: what picking at random would give.
    """

    correct: tuple[bool, ...]
    picks: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]
    accuracy: float
    interval: Interval
    chance: float


@dataclass(frozen=True)
class _Tokens:
    """A question as token ids: what all choices begin with, then what each adds to it."""

    index: int
    shared: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]


def prompt_of(question: Question) -> str:
    """The text that a choice is the continuation of."""
    return f"Question: {question.question}\nAnswer:"


def choice_scores(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> ChoiceResult:
    """Score each choice as the text after "Question: …\\nAnswer:", and pick the best.

    A choice's score is its log-likelihood divided by its length in UTF-8 bytes. Bytes, because tokens would favour
    whichever answer the tokenizer happens to split finely, and would make models with different tokenizers
    incomparable; undivided, the shortest answer would win too often.

    Questions whose prompts have equally many tokens run together, up to batch_size; a prompt is computed once for all
    its choices. No padding stands before a scored token, so the batch size changes nothing but rounding.
    progress(done, total) counts questions. Training modes are restored. Raises UsageError for no questions.
    """
    if not questions:
        raise UsageError("there are no questions to score")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, but must be at least 1")
    items = [_tokens(tokenizer, question, index) for index, question in enumerate(questions)]
    scores: dict[int, tuple[float, ...]] = {}
    with evaluating(model):
        for batch in _batches(items, batch_size):
            for item, sums in zip(batch, _score(model, batch), strict=True):
                scores[item.index] = tuple(s / n for s, n in zip(sums, item.sizes, strict=True))
            if progress is not None:
                progress(len(scores), len(questions))
    ordered = tuple(scores[index] for index in range(len(questions)))
    picks = tuple(max(range(len(row)), key=row.__getitem__) for row in ordered)
    correct = tuple(pick == question.answer for pick, question in zip(picks, questions, strict=True))
    chance = mean([1 / len(question.choices) for question in questions])
    return ChoiceResult(correct, picks, ordered, mean(correct), bootstrap(correct), chance)


def _tokens(tokenizer: Any, question: Question, index: int) -> _Tokens:
    """Tokenise prompt and choice as one text: at the seam, a tokenizer may join what stands on both sides."""
    prompt = prompt_of(question)
    texts = [prompt, *(f"{prompt} {choice}" for choice in question.choices)]
    ids = [_without_end(tokenizer, list(tokenizer(text)["input_ids"])) for text in texts]
    # At most all but one token of each choice is shared, so that each has something to score.
    limit = min(len(ids[0]), *(len(row) - 1 for row in ids[1:]))
    shared = next((i for i in range(limit) if len({row[i] for row in ids}) > 1), limit)
    if shared < 1:
        raise UsageError(f"the tokenizer leaves nothing of the question '{question.question}' before its choices")
    return _Tokens(
        index=index,
        shared=tuple(ids[0][:shared]),
        endings=tuple(tuple(row[shared:]) for row in ids[1:]),
        sizes=tuple(len(f" {choice}".encode()) for choice in question.choices),
    )


def _without_end(tokenizer: Any, ids: list[int]) -> list[int]:
    # Some tokenizers close every text with the end token, which is no part of a choice.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _batches(items: Sequence[_Tokens], batch_size: int) -> Iterator[list[_Tokens]]:
    def shape(item: _Tokens) -> tuple[int, int]:
        return len(item.shared), len(item.endings)

    for _, group in groupby(sorted(items, key=shape), key=shape):
        same = list(group)
        yield from (same[i : i + batch_size] for i in range(0, len(same), batch_size))


def _score(model: Any, batch: Sequence[_Tokens]) -> list[list[float]]:
    """The log-likelihood of each ending of each question, in nats."""
    device = device_of(model)
    shared = torch.tensor([item.shared for item in batch], device=device)  # [questions, shared]
    choices = len(batch[0].endings)
    flat = [ending for item in batch for ending in item.endings]
    longest = max(len(ending) for ending in flat)
    # Pads stand behind every scored token, where a causal model cannot see them: any id will do.
    endings = torch.tensor([[*ending, *[0] * (longest - len(ending))] for ending in flat], device=device)
    lengths = torch.tensor([len(ending) for ending in flat], device=device)
    first = model(input_ids=shared, use_cache=True)
    cache: Any = getattr(first, "past_key_values", None)
    if hasattr(cache, "batch_repeat_interleave"):
        logits = first.logits[:, -1:].repeat_interleave(choices, dim=0)
        if longest > 1:
            cache.batch_repeat_interleave(choices)
            later = model(input_ids=endings[:, :-1], past_key_values=cache, use_cache=True)
            logits = torch.cat([logits, later.logits], dim=1)  # [questions × choices, longest, vocabulary]
    else:
        whole = torch.cat([shared.repeat_interleave(choices, dim=0), endings[:, :-1]], dim=1)
        logits = model(input_ids=whole, use_cache=False).logits[:, shared.shape[1] - 1 :]
    picked = logits.float().log_softmax(dim=-1).gather(2, endings.unsqueeze(2)).squeeze(2)
    scored = torch.arange(longest, device=device) < lengths.unsqueeze(1)
    sums = picked.masked_fill(~scored, 0.0).sum(dim=1)
    rows: list[list[float]] = sums.view(len(batch), choices).tolist()
    return rows
