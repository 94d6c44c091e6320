"""Asking a model the questions of a task, by likelihood or by generation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from trimtab.data.encode import Example, encode, special_ids
from trimtab.errors import TrimtabError, UsageError
from trimtab.tasks.asking import Asking, Progress
from trimtab.tasks.figures import figures as figures
from trimtab.tasks.generate import Prompt, generate
from trimtab.tasks.likelihood import log_likelihoods
from trimtab.tasks.results import Outcome, Results
from trimtab.tasks.task import Item, WordedTask

Scoring = Literal["likelihood", "generation"]


def evaluate(
    model: Any,
    tokenizer: Any,
    task: WordedTask,
    items: Sequence[Item],
    *,
    scoring: Scoring = "likelihood",
    batch_size: int = 8,
    max_new_tokens: int = 32,
    results: Results | None = None,
    progress: Progress | None = None,
) -> tuple[Outcome, ...]:
    """What the model answers to each question, in their order.

    likelihood: the choice whose response ("the correct answer is answer2") has the highest log-probability behind the
    question: the sum over its tokens, without the mark that ends a turn. Not divided by length, as the responses of a
    question differ in one word. A batch of questions is one forward pass, where the model allows it a prefix tree.
    generation: the answer that `Task.extract` reads from the text of the likeliest token each time, of at most
    max_new_tokens.

    The question stands in the tokenizer's chat template, or as `Task.plain_prompt` where it has none.
    results: keeps each batch when it is done, and questions it has are not asked again. Batches are the same however
    often the work was stopped between them. progress(done, total) counts questions.
    Raises UsageError for a question that is longer than the model allows, and where there are none.
    """
    asking = _Questions(tokenizer, task, items, results, progress)
    left = asking.left(batch_size)
    if left and scoring == "likelihood":
        _by_likelihood(model, asking, left)
    elif left:
        _by_generation(model, asking, left, max_new_tokens)
    return tuple(asking.found[item.index] for item in items)


class _Questions(Asking):
    """The questions of a task with the answers so far, and how a model is given them."""

    def __init__(
        self,
        tokenizer: Any,
        task: WordedTask,
        items: Sequence[Item],
        results: Results | None,
        progress: Progress | None,
    ) -> None:
        self.tokenizer, self.task = tokenizer, task
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        super().__init__(task.name, items, [self._text(item) for item in items], results, progress)

    def prompt(self, item: Item) -> Prompt:
        """What the model is given to answer."""
        return [{"role": "user", "content": item.question}] if self.chat else self.task.plain_prompt(item.question)

    def _text(self, item: Item) -> str:
        prompt = self.prompt(item)
        if isinstance(prompt, str):
            return prompt
        return str(self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))


def _by_likelihood(model: Any, asking: _Questions, left: Sequence[Sequence[Item]]) -> None:
    def pick(number: int, sums: list[list[float]]) -> None:
        answers = []
        for item, nats in zip(left[number], sums, strict=True):
            if not all(map(math.isfinite, nats)):
                raise TrimtabError(
                    f"{asking.task.name} question {item.index} has no finite score: load the model in float32 (--dtype)"
                )
            best = item.choices[nats.index(max(nats))]
            answers.append({"prediction": best, "scores": dict(zip(item.choices, nats, strict=True))})
        asking.keep(left[number], answers)

    examples = iter(_examples(model, asking, [item for batch in left for item in batch]))
    log_likelihoods(model, [[[next(examples) for _ in item.choices] for item in batch] for batch in left], pick)


def _examples(model: Any, asking: _Questions, items: Sequence[Item]) -> list[Example]:
    """Each question with each of its choices, in tokens as training has them; the words of the response are scored."""
    rows = [asking.task.row(item, choice, chat=asking.chat) for item in items for choice in item.choices]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    examples = encode(rows, asking.tokenizer, max_length=limit)
    for example in examples:
        if example.truncated:
            raise UsageError(
                f"{asking.task.name} question {example.row - 1} has {limit + example.truncated} tokens with an answer, "
                f"more than the model's {limit}: take a model with more"
            )
    marks = special_ids(asking.tokenizer)
    return [_without_end(example, marks) for example in examples]


def _without_end(example: Example, marks: frozenset[int]) -> Example:
    ids, scored = example.input_ids, example.supervised
    last = max(i for i in range(len(ids)) if scored[i] and ids[i] not in marks)
    return Example(ids[: last + 1], scored[: last + 1], example.row, 0, False)


def _by_generation(model: Any, asking: _Questions, left: Sequence[Sequence[Item]], max_new_tokens: int) -> None:
    for batch in left:
        texts = generate(
            model,
            asking.tokenizer,
            [asking.prompt(item) for item in batch],
            max_new_tokens=max_new_tokens,
            batch_size=len(batch),
            progress=lambda done, _: asking.tell(done),
        )
        asking.keep(batch, [{"prediction": asking.task.extract(text), "text": text} for text in texts])
