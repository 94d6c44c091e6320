"""Multiple choice by likelihood: which answer does the model find most probable?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.data.batch import Batch
from trimtab.data.encode import Example
from trimtab.errors import UsageError
from trimtab.tasks.evaluating import device_of, evaluating
from trimtab.tasks.knowledge import Question
from trimtab.tasks.statistics import Interval, bootstrap, mean
from trimtab.train.loss import term_nats
from trimtab.train.packing import packing_of
from trimtab.train.trial import means_for


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

    batch_size questions run together, where the model allows it as one prefix tree: what questions and choices begin
    with is computed once. Batch size and packing change nothing but rounding.
    progress(done, total) counts questions. Training modes are restored. Raises UsageError for no questions.
    """
    if not questions:
        raise UsageError("there are no questions to score")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, but must be at least 1")
    items = [_tokens(tokenizer, question, index) for index, question in enumerate(questions)]
    scores: list[tuple[float, ...]] = []

    def keep(batch: int, sums: list[list[float]]) -> None:
        for item, found in zip(items[len(scores) :], sums, strict=False):
            scores.append(tuple(nats / size for nats, size in zip(found, item.sizes, strict=True)))
        if progress is not None:
            progress(len(scores), len(questions))

    choices = [_choices(item) for item in items]
    log_likelihoods(model, [choices[i : i + batch_size] for i in range(0, len(choices), batch_size)], keep)
    picks = tuple(max(range(len(row)), key=row.__getitem__) for row in scores)
    correct = tuple(pick == question.answer for pick, question in zip(picks, questions, strict=True))
    chance = mean([1 / len(question.choices) for question in questions])
    return ChoiceResult(correct, picks, tuple(scores), mean(correct), bootstrap(correct), chance)


def log_likelihoods(
    model: Any,
    batches: Sequence[Sequence[Sequence[Example]]],
    tell: Callable[[int, list[list[float]]], None],
) -> None:
    """The log-likelihood of each example's supervised tokens, in nats, given what stands before them.

    batches: of questions, each with its choices as examples. A batch is one forward pass, in which what examples begin
    with is computed once where the model allows it. tell(number of the batch, its sums by question and choice) hears
    of every batch when it is done, in their order.
    """
    examples = [example for batch in batches for question in batch for example in question]
    with evaluating(model):
        means = means_for(model, (), "auto", examples, packing_of(model, "auto", examples))
    with evaluating(model), means.on(model):
        for number, batch in enumerate(batches):
            together = [example for question in batch for example in question]
            sums = iter(_sums(model, means.packing.build_eval(together, 0), together))
            tell(number, [[next(sums) for _ in question] for question in batch])


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


def _choices(item: _Tokens) -> list[Example]:
    """A question with each of its choices, of which only the ending is scored."""
    return [
        Example([*item.shared, *ending], [False] * len(item.shared) + [True] * len(ending), item.index, 0, False)
        for ending in item.endings
    ]


def _sums(model: Any, batch: Batch, examples: Sequence[Example]) -> list[float]:
    """The log-likelihood of each example's scored tokens, in nats."""
    terms = {term: i for i, term in enumerate(zip(batch.predictors.tolist(), batch.targets.tolist(), strict=True))}
    nats = term_nats(model, batch.to(device_of(model))).tolist()
    return [
        -sum(
            nats[terms[places[i - 1], token]]
            for i, (token, scored) in enumerate(zip(example.input_ids, example.supervised, strict=True))
            if scored and i
        )
        for example, places in zip(examples, batch.places, strict=True)
    ]
