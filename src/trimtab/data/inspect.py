"""What training would see: how much is supervised, cut off, doubled, or known from the test set."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.data.encode import Example, special_ids
from trimtab.data.layout import Row
from trimtab.data.read import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Sentence punctuation only: + - * / = and their like tell one sum from another.
PUNCTUATION = re.compile(r"[.,;:!?\"'`()\[\]{}“”‘’«»…，。！？；：、（）【】《》\s]+")
MOST_TRUNCATED = 0.05
MOST_DUPLICATES = 0.01


@dataclass(frozen=True)
class Overlap:
    """Rows of a test set whose prompt also stands in the training rows.

    same_text: rows equal up to white space. same_words: up to letter case and punctuation too (those of same_text
    included). share: same_words over the test set's rows. training_rows: how many training rows they stand in.
    examples: up to five pairs of (training row, test row) numbers.
    """

    against: str
    rows: int
    same_text: int
    same_words: int
    share: float
    training_rows: int
    examples: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Inspection:
    """Figures on the examples of one source. Lengths are in tokens, before truncation.

    tokens: kept after truncation. supervised_tokens: of those, the training targets. truncated: examples cut at
    max_length. answers_cut: of those, the ones that lost supervised tokens. unsupervised: examples with no target.
    open_ended: examples whose last target is not an end-of-turn token, though nothing of the answer was cut.
    duplicates: rows equal to an earlier one. conflicts: prompts that have more than one answer.
    errors: what stops training. warnings: what makes its result doubtful.
    """

    source: str
    rows: int
    tokens: int
    supervised_tokens: int
    supervised_share: float
    length_p50: int
    length_p95: int
    length_max: int
    max_length: int
    truncated: int
    answers_cut: int
    unsupervised: int
    open_ended: int
    incomplete: tuple[int, ...]
    duplicates: int
    conflicts: int
    overlap: Overlap | None
    errors: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return dataclasses.asdict(self)


def inspect(
    source: Source,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    against: Source | None = None,
) -> Inspection:
    """Figures on `source` and its encoded `examples`, with what is wrong with them.

    max_length: the limit the examples were encoded with, in tokens. against: rows that must not be trained on.
    """
    lengths = sorted(len(e.input_ids) + e.truncated for e in examples) or [0]
    targets = [sum(e.supervised[1:]) for e in examples]
    tokens = sum(len(e.input_ids) for e in examples)
    special = special_ids(tokenizer)
    ends = [_ends_with_mark(e, special) for e in examples]
    conversations = any(row.turns for row in source.rows)
    found = Inspection(
        source=source.describe(),
        rows=len(source.rows),
        tokens=tokens,
        supervised_tokens=sum(targets),
        supervised_share=sum(targets) / tokens if tokens else 0.0,
        length_p50=_percentile(lengths, 50),
        length_p95=_percentile(lengths, 95),
        length_max=lengths[-1],
        max_length=max_length,
        truncated=sum(e.truncated > 0 for e in examples),
        answers_cut=sum(e.answer_cut for e in examples),
        unsupervised=sum(count == 0 for count in targets),
        open_ended=sum(
            count > 0 and not end and not e.answer_cut for e, count, end in zip(examples, targets, ends, strict=True)
        ),
        incomplete=source.incomplete,
        duplicates=len(source.rows) - len({(row.turns, row.text) for row in source.rows}),
        conflicts=_conflicts(source.rows),
        overlap=None if against is None else overlap(source, against),
        errors=(),
        warnings=(),
    )
    return dataclasses.replace(
        found, errors=tuple(_errors(found, any(ends) or not conversations)), warnings=tuple(_warnings(found))
    )


def overlap(source: Source, against: Source) -> Overlap:
    """Which rows of `against` have a prompt that also stands in `source`."""
    texts, words = _by_prompt(source.rows, _same_text), _by_prompt(source.rows, _same_words)
    same_text = [row for row in against.rows if _same_text(prompt(row)) in texts]
    same_words = [row for row in against.rows if _same_words(prompt(row)) in words]
    training = {number for row in same_words for number in words[_same_words(prompt(row))]}
    return Overlap(
        against=against.name,
        rows=len(against.rows),
        same_text=len(same_text),
        same_words=len(same_words),
        share=len(same_words) / len(against.rows) if against.rows else 0.0,
        training_rows=len(training),
        examples=tuple((words[_same_words(prompt(row))][0], row.number) for row in same_words[:5]),
    )


def prompt(row: Row) -> str:
    """What a row asks: its user's turns, a line each, or its plain text. System turns are the same for all rows."""
    return row.text if row.text is not None else "\n".join(t.content for t in row.turns if t.role == "user")


def token_view(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Each token of `example` as (its text, whether it is supervised). The texts joined are the text.

    A character that several tokens share stands with the first of them; the others have ''.
    """
    texts: list[str] = []
    ids = example.input_ids
    while len(texts) < len(ids):
        start = len(texts)
        # No character of UTF-8 has more than four bytes, so no more than four tokens share one.
        pieces = (tokenizer.decode(ids[start : start + n], clean_up_tokenization_spaces=False) for n in range(1, 5))
        whole = next(((n, piece) for n, piece in enumerate(pieces, start=1) if "\ufffd" not in piece), None)
        count, text = whole or (1, tokenizer.decode(ids[start : start + 1]))
        count = min(count, len(ids) - start)
        if str(tokenizer.convert_ids_to_tokens(ids[start])).startswith("▁") and not text.startswith(" "):
            text = " " + text  # decoding a token by itself takes off the space that its piece begins with
        texts += [text] + [""] * (count - 1)
    return list(zip(texts, example.supervised, strict=True))


def _ends_with_mark(example: Example, special: frozenset[int]) -> bool:
    pairs = zip(reversed(example.input_ids), reversed(example.supervised), strict=True)
    return not example.answer_cut and next((token in special for token, target in pairs if target), False)


def _percentile(ordered: Sequence[int], percent: int) -> int:
    # Nearest rank: the smallest length that at least so many percent of the examples do not exceed.
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _same_text(text: str) -> str:
    return " ".join(text.split())


def _same_words(text: str) -> str:
    # Text of punctuation alone stays as it is: without it, all such texts would be equal.
    return PUNCTUATION.sub(" ", text.casefold()).strip() or _same_text(text)


def _by_prompt(rows: Iterable[Row], normalise: Callable[[str], str]) -> dict[str, list[int]]:
    numbers: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        if key := normalise(prompt(row)):
            numbers[key].append(row.number)
    return dict(numbers)


def _conflicts(rows: Iterable[Row]) -> int:
    conversations = {row.turns for row in rows if row.turns}
    answers = Counter(turns[:-1] for turns in conversations)
    return sum(count > 1 for count in answers.values())


def _errors(found: Inspection, any_end: bool) -> Iterable[str]:
    if found.supervised_tokens == 0:
        yield (
            "no token is supervised, so there is nothing to learn: check the layout, the chat template, and that "
            f"max_length ({found.max_length}) reaches the answers"
        )
    elif not any_end:
        yield (
            "no end-of-turn token is supervised, so the model would not learn to stop: raise max_length "
            f"({found.max_length}) if answers are cut, or have the chat template end the assistant's turn with one, "
            "inside {% generation %} where it uses that"
        )
    if found.incomplete:
        shown = ", ".join(map(str, found.incomplete[:5])) + (", …" if len(found.incomplete) > 5 else "")
        yield f"{_count(len(found.incomplete), 'row')} without an answer ({shown}): training refuses them; remove them"


def _warnings(found: Inspection) -> Iterable[str]:
    known = found.overlap
    if known is not None and known.same_words:
        yield (
            f"contamination: {known.same_words:,} of the {known.rows:,} rows of {known.against} ({known.share:.0%}) "
            "stand in the training data; a score on them is void until they are removed"
        )
    if found.answers_cut:
        yield (
            f"{_count(found.answers_cut, 'answer')} cut at max_length ({found.max_length}); the longest example has "
            f"{found.length_max:,} tokens"
        )
    elif found.truncated > MOST_TRUNCATED * found.rows:
        yield f"{_count(found.truncated, 'example')} of {found.rows:,} truncated at max_length ({found.max_length})"
    if found.unsupervised and found.supervised_tokens:
        yield f"{_count(found.unsupervised, 'example')} with nothing supervised: these teach nothing"
    if found.open_ended:
        yield f"{_count(found.open_ended, 'example')} whose answer does not end with an end-of-turn token"
    if found.duplicates > MOST_DUPLICATES * found.rows:
        yield f"{_count(found.duplicates, 'row')} of {found.rows:,} repeat an earlier row"
    if found.conflicts > MOST_DUPLICATES * found.rows:
        yield f"{_count(found.conflicts, 'prompt')} with more than one answer"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
