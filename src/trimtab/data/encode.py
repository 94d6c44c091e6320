"""From rows to tokens: the tokenizer's own chat template, with loss on the assistant's turns alone.

A row is rendered and tokenised once, whole. Where the assistant's turns stand is found in its characters: from
the template's own {% generation %} marks, or by rendering the conversation up to each turn. A template whose
prefixes do not nest is refused rather than guessed at.
"""

from __future__ import annotations

import re
from array import array
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

    @property
    def targets(self) -> int:
        """How many terms of a loss it has: a first token is none, as nothing stands before it."""
        return sum(self.supervised[1:])

    def content(self) -> bytes:
        """What tells it from another example."""
        ids = array("q", [self.row, len(self.input_ids), *self.input_ids])
        return ids.tobytes() + bytes(self.supervised)


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
    needs = next((row for row in rows if row.turns and not row.raw), None)
    if needs and not tokenizer.chat_template:
        raise UsageError(
            f"the tokenizer has no chat template, but {where} {needs.number} is a conversation; use a model with one, "
            "set tokenizer.chat_template, or give rows of prompt and completion, which need none"
        )
    examples: list[Example] = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        by_template = [bool(row.turns and (tokenizer.chat_template or not row.raw)) for row in chunk]
        chats = _encode_chats([row for row, t in zip(chunk, by_template, strict=True) if t], tokenizer, where)
        plain = _encode_plain([row for row, t in zip(chunk, by_template, strict=True) if not t], tokenizer)
        for row, t in zip(chunk, by_template, strict=True):
            ids, supervised = next(chats if t else plain)
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
                raise UsageError(
                    f"the chat template refuses {where} {number}: {' '.join(str(error).split())}"
                ) from error
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
    def render(chats: Sequence[Sequence[Turn]], numbers: Sequence[int], header: bool = False) -> list[str]:
        def run(batch: list[list[dict[str, str]]]) -> Any:
            return tokenizer.apply_chat_template(batch, tokenize=False, add_generation_prompt=header)

        return list(_each(run, [_messages(turns) for turns in chats], numbers, where)) if chats else []

    texts = render([row.turns for row in rows], [row.number for row in rows])
    answers = [(i, k) for i, row in enumerate(rows) for k, turn in enumerate(row.turns) if turn.role == "assistant"]
    first = next((rows[i] for i, k in answers if k == 0), None)
    if first is not None:
        raise UsageError(f"{where} {first.number} begins with the assistant's turn; put the user's turn before it")
    prompts = [rows[i].turns[:k] for i, k in answers]
    headed = render(prompts, [rows[i].number for i, _ in answers], header=True)
    unasked = _unasked_header(prompts[0], render) if answers else ""
    # An answer at the end of its conversation ends with it: only the earlier ones are rendered once more.
    inner = [(i, k) for i, k in answers if k + 1 < len(rows[i].turns)]
    closed = dict(
        zip(inner, render([rows[i].turns[: k + 1] for i, k in inner], [rows[i].number for i, _ in inner]), strict=True)
    )
    spans: list[list[Span]] = [[] for _ in rows]
    for (i, k), start in zip(answers, headed, strict=True):
        span = _nested_span(texts[i], start + unasked, closed.get((i, k), texts[i]), rows[i].turns[k].content)
        if span is None:
            raise UsageError(
                f"the chat template writes turn {k + 1} of {where} {rows[i].number} differently when asked for an "
                "answer or when more turns follow, so what to learn from cannot be told; mark the assistant's text in "
                "the template with {% generation %} and {% endgeneration %}, or give each row one answer"
            )
        spans[i].append(span)
    return list(zip(texts, spans, strict=True))


def _unasked_header(prompt: Sequence[Turn], render: Callable[..., list[str]]) -> str:
    # A template may ignore the wish for the answer's header. What it then writes between the prompt and the answer is
    # the header all the same; an answer that stands nowhere else shows it.
    (bare,), (headed,) = render([prompt], [0]), render([prompt], [0], header=True)
    if bare != headed:
        return ""
    marker = "answer\u2042here"
    (closed,) = render([[*prompt, Turn("assistant", marker)]], [0])
    if not closed.startswith(bare) or marker not in closed:
        raise UsageError("the chat template does not write an answer behind its question, so it cannot be learned from")
    return closed[len(bare) : closed.index(marker)]


def _nested_span(whole: str, headed: str, closed: str, content: str) -> Span | None:
    # whole: the conversation. headed: up to the answer's header. closed: up to the answer's end. None where the
    # answer's place in the whole is not certain.
    start = len(headed)
    if not whole.startswith(headed) or not closed.startswith(headed):
        return None
    if whole.startswith(closed):
        return start, len(closed)
    # Templates of thinking models write an earlier answer without the thinking they put before a last one. The
    # answer is still certain if its text and its ending follow the header.
    for place in {closed.find(content, start), closed.rfind(content, start)} - {-1}:
        if whole.startswith(closed[place:], start):
            return start, start + len(closed) - place
    return None


def _encode_plain(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], list[bool]]]:
    if not rows:
        return
    if tokenizer.eos_token_id is None:
        raise UsageError(
            "the tokenizer has no end-of-sequence token, so a model could not learn to stop; set tokenizer.eos_token"
        )
    texts = [row.text if row.text is not None else "".join(turn.content for turn in row.turns) for row in rows]
    prompts = [row.turns[0].content if row.turns else "" for row in rows]
    encoded = tokenizer(texts, return_attention_mask=False)
    alone = tokenizer(prompts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    for row, encoding, prompt in zip(rows, encoded.encodings, alone, strict=True):
        ids, lead = _without_second_bos(encoding.ids, _leading_specials(encoding), tokenizer)
        first = 1
        if row.turns:
            first = lead + len(prompt)
            if ids[lead:first] != prompt:
                # The model is given the prompt alone later, without a token that joins it to the answer.
                ids = [*ids[:lead], *prompt, *_ids(tokenizer, row.turns[1].content)]
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


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
