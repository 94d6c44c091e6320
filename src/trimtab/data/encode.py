"""From rows to tokens: the tokenizer's own chat template, with loss on the assistant's turns alone.

A row is rendered and tokenised once, whole. Where the assistant's turns stand is found in its characters: from
the template's own {% generation %} marks, or by rendering the conversation up to each turn. A template whose
prefixes do not nest is refused rather than guessed at.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.data.layout import Row, Turn
from trimtab.data.read import Source
from trimtab.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
CHUNK = 512  # rows tokenised at a time: enough for the tokenizer's own speed, few enough to keep their offsets small


@dataclass(frozen=True)
class Example:
    """One row as tokens.

    supervised[i] is True where token i is a training target: the loss at position i - 1 predicts it.
    row: its number in the file. truncated: tokens dropped at the end. answer_cut: some of those were supervised.
    """

    input_ids: list[int]
    supervised: list[bool]
    row: int
    truncated: int
    answer_cut: bool


def encode(source: Source | Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> list[Example]:
    """The rows of `source` as tokens, at most `max_length` of each, from the beginning; one example a row, in order.

    Conversations: the chat template of `tokenizer`, supervised on each assistant turn up to and including its
    end-of-turn token, not on headers. Without a template, rows of prompt and completion stand as written,
    supervised on the completion and the end-of-sequence token. Plain text: all tokens but the first, and the
    end-of-sequence token.

    Raises UsageError: no chat template where one is needed, a row the template refuses, a template whose turns
    cannot be told apart, a tokenizer without character offsets.
    """
    rows = source.rows if isinstance(source, Source) else tuple(source)
    where = f"{source.name} row" if isinstance(source, Source) else "row"
    if max_length < 2:
        raise UsageError(f"max_length is {max_length}, but must be at least 2: the first token has nothing before it")
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(f"{type(tokenizer).__name__} has no character offsets; use the model's fast tokenizer")
    templated = [row for row in rows if row.turns and (tokenizer.chat_template or not row.raw)]
    if templated and not tokenizer.chat_template:
        raise UsageError(
            f"the tokenizer has no chat template, but {where} {templated[0].number} is a conversation; use a model with "
            "one, set tokenizer.chat_template, or give rows of prompt and completion, which need none"
        )
    by_template = {id(row) for row in templated}
    examples: list[Example] = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        chats = _encode_chats([row for row in chunk if id(row) in by_template], tokenizer, where)
        plain = _encode_plain([row for row in chunk if id(row) not in by_template], tokenizer)
        for row in chunk:
            ids, supervised = next(chats if id(row) in by_template else plain)
            examples.append(_truncate(ids, supervised, row.number, max_length))
    return examples


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of the tokens that are marks rather than text, end-of-turn marks among them."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _truncate(ids: list[int], supervised: list[bool], row: int, max_length: int) -> Example:
    dropped = max(0, len(ids) - max_length)
    return Example(ids[:max_length], supervised[:max_length], row, dropped, any(supervised[max_length:]))


def _encode_chats(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, where: str
) -> Iterator[tuple[list[int], list[bool]]]:
    if not rows:
        return
    marked = GENERATION.search(tokenizer.get_chat_template())
    rendered = (_render_marked if marked else _render_nested)(rows, tokenizer, where)
    # The template writes its own beginning-of-sequence token; a second one would be a token never seen.
    encoded = tokenizer([text for text, _ in rendered], add_special_tokens=False, return_attention_mask=False)
    special = special_ids(tokenizer)
    for (text, spans), encoding in zip(rendered, encoded.encodings, strict=True):
        ids: list[int] = encoding.ids
        supervised = [False] * len(ids)
        for first, last in _token_spans(spans, encoding.offsets):
            last = _end_of_turn(text, ids, encoding.offsets, first, last, special)
            supervised[first:last] = [True] * (last - first)
        yield ids, supervised


def _token_spans(spans: Sequence[Span], offsets: Sequence[Span]) -> list[Span]:
    # The tokens that share a character with each span. Offsets never fall, so both edges are found by bisection.
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    return [(bisect_right(ends, first), bisect_left(starts, last)) for first, last in spans if first < last]


def _end_of_turn(
    text: str, ids: Sequence[int], offsets: Sequence[Span], first: int, last: int, special: frozenset[int]
) -> int:
    # Some templates write a newline behind the end-of-turn token. A model stops at the token, so nothing is
    # learned from what follows it.
    end = last
    while end > first and ids[end - 1] not in special and not text[slice(*offsets[end - 1])].strip():
        end -= 1
    return end


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _each(
    render: Callable[[list[list[dict[str, str]]]], Any],
    chats: list[list[dict[str, str]]],
    numbers: Sequence[int],
    where: str,
) -> Any:
    # One call for all is fast; only when it fails is the row looked for.
    try:
        return render(chats)
    except Exception:
        for chat, number in zip(chats, numbers, strict=True):
            try:
                render([chat])
            except Exception as error:  # a template may raise anything, jinja's errors and Python's alike
                raise UsageError(f"the chat template refuses {where} {number}: {' '.join(str(error).split())}") from error
        raise


def _render_marked(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, where: str) -> list[tuple[str, list[Span]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(chats: list[list[dict[str, str]]]) -> Any:
        return render_jinja_template(
            chats,
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )

    texts, spans = _each(render, [_messages(row.turns) for row in rows], [row.number for row in rows], where)
    return list(zip(texts, spans, strict=True))


def _render_nested(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, where: str) -> list[tuple[str, list[Span]]]:
    def render(chats: list[list[dict[str, str]]], header: bool) -> Any:
        return tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=header)

    for row in rows:
        if row.turns[0].role == "assistant":
            raise UsageError(f"{where} {row.number} begins with the assistant's turn; put the user's turn before it")
    answers = [(row, k) for row in rows for k, turn in enumerate(row.turns) if turn.role == "assistant"]
    numbers = [row.number for row, _ in answers]
    before = [_messages(row.turns[:k]) for row, k in answers]
    after = [_messages(row.turns[: k + 1]) for row, k in answers]
    # A conversation's last answer ends with the conversation: its rendering is the whole text already.
    texts = _each(lambda c: render(c, False), [_messages(r.turns) for r in rows], [r.number for r in rows], where)
    headed = _each(lambda c: render(c, True), before, numbers, where)
    bare = _each(lambda c: render(c, False), before, numbers, where)
    closed = _each(lambda c: render(c, False), after, numbers, where)
    spans: dict[int, list[Span]] = {id(row): [] for row in rows}
    whole = {id(row): text for row, text in zip(rows, texts, strict=True)}
    for (row, k), start, plain, end in zip(answers, headed, bare, closed, strict=True):
        span = _nested_span(whole[id(row)], start, plain, end, row.turns[k].content)
        if span is None:
            raise UsageError(
                f"the chat template writes turn {k + 1} of {where} {row.number} differently once more turns follow, so "
                "what to learn from cannot be told; mark the assistant's text in the template with "
                "{% generation %} … {% endgeneration %}, or give each row one answer"
            )
        spans[id(row)].append(span)
    return [(whole[id(row)], spans[id(row)]) for row in rows]


def _nested_span(whole: str, headed: str, bare: str, closed: str, content: str) -> Span | None:
    # whole: the conversation. headed, bare: up to before the answer, with and without its header. closed: up to
    # its end. None where the answer cannot be told with certainty.
    if not whole.startswith(headed) or not whole.startswith(closed) or len(closed) < len(headed):
        return None
    start = len(headed)
    if headed == bare:
        # This template writes no header when asked for one: either it has none, or the header is yet to come
        # and everything before the answer's own text belongs to it.
        found = closed.find(content.strip(), start)
        return None if found < 0 else (found, len(closed))
    return start, len(closed)


def _encode_plain(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[bool]]]:
    if not rows:
        return
    if tokenizer.eos_token_id is None:
        raise UsageError(
            "the tokenizer has no end-of-sequence token, so a model could not learn to stop; set tokenizer.eos_token"
        )
    texts = [row.text if row.text is not None else "".join(turn.content for turn in row.turns) for row in rows]
    encoded = tokenizer(texts, return_attention_mask=False)
    for row, encoding in zip(rows, encoded.encodings, strict=True):
        ids, lead = _without_second_bos(encoding.ids, _leading_specials(encoding), tokenizer)
        dropped = len(encoding.ids) - len(ids)
        first = 1
        if row.text is None:
            boundary = len(row.turns[0].content)
            first = _boundary_token(encoding, boundary) - dropped
            crossing = first < len(ids) and encoding.offsets[first + dropped][0] < boundary
            if crossing:
                # A token that joins both texts would not be there when the model is given the prompt alone.
                prompt, answer = (_ids(tokenizer, turn.content) for turn in row.turns)
                ids, first = [*ids[:lead], *prompt, *answer], lead + len(prompt)
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        yield ids, [i >= first for i in range(len(ids))]


def _leading_specials(encoding: Any) -> int:
    marks: list[int] = encoding.special_tokens_mask
    return next((i for i, mark in enumerate(marks) if not mark), len(marks))


def _without_second_bos(ids: list[int], lead: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    # The tokenizer adds its token in front of a text that already begins with it.
    doubled = tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2
    return (ids[1:], max(lead - 1, 0)) if doubled else (ids, lead)


def _boundary_token(encoding: Any, boundary: int) -> int:
    # The first token with a character at or behind the boundary; special tokens that the tokenizer adds have none.
    tokens = zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
    return next((i for i, ((_, end), mark) in enumerate(tokens) if not mark and end > boundary), len(encoding.ids))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
