from __future__ import annotations

import random
from typing import Any

import pytest

from trimtab.data.encode import Example, encode
from trimtab.data.inspect import token_view
from trimtab.data.layout import Role, Row, Turn
from trimtab.data.read import Source
from trimtab.errors import UsageError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Its header is written with the answer only, whatever add_generation_prompt says.
CHATML_DEAF = CHATML.partition("{% if")[0]
INST = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}{{ raise_exception('no system turn') }}{% endif %}{% endfor %}"
)
# As thinking models do: an empty thought before the last answer, none before earlier ones.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(*contents: str, number: int = 1) -> Row:
    roles: tuple[Role, Role] = ("user", "assistant")
    return Row(tuple(Turn(roles[i % 2], content) for i, content in enumerate(contents)), None, number)


def supervised(example: Example, tokenizer: Any) -> list[str]:
    """The supervised runs of an example, as text."""
    runs, inside = [], False
    for text, target in token_view(example, tokenizer):
        if target:
            runs[-1:] = [runs[-1] + text] if inside else [*runs[-1:], text]
        inside = target
    return runs


def one(row: Row, tokenizer: Any, max_length: int = 4096) -> Example:
    (example,) = encode([row], tokenizer, max_length=max_length)
    return example


@pytest.mark.parametrize("template", [CHATML, CHATML_DEAF, MARKED], ids=["chatml", "deaf", "marked"])
def test_only_the_answers_and_their_end_of_turn_are_supervised(bytes_tokenizer: Any, template: str) -> None:
    tokenizer = bytes_tokenizer(template)
    example = one(chat("Hi.", "Hello.", "assistant\n?", "assistant\nÄ 你好"), tokenizer)
    assert supervised(example, tokenizer) == ["Hello.<|im_end|>", "assistant\nÄ 你好<|im_end|>"]
    assert tokenizer.decode(example.input_ids) == (
        "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nassistant\n?<|im_end|>\n<|im_start|>assistant\nassistant\nÄ 你好<|im_end|>\n"
    )


def test_a_template_without_headers_is_supervised_on_its_answers(bytes_tokenizer: Any) -> None:
    tokenizer = bytes_tokenizer(INST, bos=True)
    example = one(chat("Hi.", "Hello.", "And?", "INST"), tokenizer)
    assert supervised(example, tokenizer) == ["Hello.</s>", "INST</s>"]


def test_a_template_that_writes_its_own_first_token_gets_no_second(bytes_tokenizer: Any) -> None:
    tokenizer = bytes_tokenizer(INST, bos=True)
    assert one(chat("Hi.", "Hello."), tokenizer).input_ids.count(tokenizer.bos_token_id) == 1


def test_an_earlier_answer_is_found_where_a_template_drops_its_empty_thought(bytes_tokenizer: Any) -> None:
    tokenizer = bytes_tokenizer(THINKING)
    example = one(chat("Hi.", "e", "And?", "Bye."), tokenizer)
    assert supervised(example, tokenizer) == ["e<|im_end|>", "<think>\n\n</think>\n\nBye.<|im_end|>"]


def test_a_template_that_rewrites_an_earlier_answer_is_refused(bytes_tokenizer: Any) -> None:
    tokenizer = bytes_tokenizer(THINKING)
    source = Source(
        "chats.jsonl", "JSON Lines", "messages", (chat("Hi.", "<think>x</think>Yes", "So?", "No", number=7),)
    )
    with pytest.raises(UsageError, match=r"turn 2 of chats\.jsonl row 7 differently"):
        encode(source, tokenizer, max_length=100)


def test_a_row_that_the_template_refuses_is_named(bytes_tokenizer: Any) -> None:
    rows = [chat("a", "b"), Row((Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a")), None, 2)]
    with pytest.raises(UsageError, match="the chat template refuses row 2: no system turn"):
        encode(rows, bytes_tokenizer(INST), max_length=100)


def test_a_conversation_that_begins_with_an_answer_is_refused(bytes_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="row 1 begins with the assistant's turn"):
        one(Row((Turn("assistant", "a"),), None, 1), bytes_tokenizer(CHATML))


def test_random_conversations_are_supervised_on_exactly_their_answers(bytes_tokenizer: Any) -> None:
    random_ = random.Random(0)
    tokenizer = bytes_tokenizer(CHATML, merges=(("Ċ", "Ċ"), ("Ġ", "a"), ("a", "b")))
    alphabet = "ab \nÄ你<|>"
    # Longer than a chunk, so that rows keep their order across chunks.
    rows = [
        chat(
            *("x" + "".join(random_.choices(alphabet, k=random_.randint(0, 9))) for _ in range(random_.choice([2, 4])))
        )
        for _ in range(600)
    ]
    for row, example in zip(rows, encode(rows, tokenizer, max_length=4096), strict=True):
        assert supervised(example, tokenizer) == [t.content + "<|im_end|>" for t in row.turns if t.role == "assistant"]


def test_without_a_template_a_conversation_is_refused(bytes_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"no chat template, but row 1 is a conversation; use a model with one"):
        one(chat("a", "b"), bytes_tokenizer(None))


def test_without_a_template_prompt_and_completion_stand_as_written(bytes_tokenizer: Any) -> None:
    tokenizer = bytes_tokenizer(None, bos=True)
    example = one(Row((Turn("user", "Q: 1+1"), Turn("assistant", " 2")), None, 1, raw=True), tokenizer)
    assert tokenizer.decode(example.input_ids) == "<s>Q: 1+1 2</s>"
    assert supervised(example, tokenizer) == [" 2</s>"]


def test_no_token_joins_a_prompt_to_its_completion(bytes_tokenizer: Any) -> None:
    tokenizer = bytes_tokenizer(None, merges=(("a", "b"),), bos=True)
    example = one(Row((Turn("user", "a"), Turn("assistant", "b")), None, 1, raw=True), tokenizer)
    prompt = tokenizer("a")["input_ids"]
    assert example.input_ids[: len(prompt)] == prompt
    assert supervised(example, tokenizer) == ["b</s>"]


def test_a_prompt_that_begins_with_the_first_token_gets_no_second(bytes_tokenizer: Any) -> None:
    tokenizer = bytes_tokenizer(None, bos=True)
    raw = one(Row((Turn("user", "<s>a"), Turn("assistant", "b")), None, 1, raw=True), tokenizer)
    text = one(Row((), "<s>ab</s>", 1), tokenizer)
    assert tokenizer.decode(raw.input_ids) == tokenizer.decode(text.input_ids) == "<s>ab</s>"
    assert supervised(raw, tokenizer) == ["b</s>"]
    assert supervised(text, tokenizer) == ["ab</s>"]


def test_plain_text_is_supervised_whole_with_its_end(bytes_tokenizer: Any) -> None:
    tokenizer = bytes_tokenizer(CHATML)
    example = one(Row((), "abc", 1), tokenizer)
    assert (tokenizer.decode(example.input_ids), supervised(example, tokenizer)) == ("abc</s>", ["bc</s>"])


def test_plain_text_needs_an_end_of_sequence_token(bytes_tokenizer: Any) -> None:
    tokenizer = bytes_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no end-of-sequence token"):
        one(Row((), "abc", 1), tokenizer)


def test_truncation_keeps_the_beginning_and_says_whether_the_answer_was_cut(bytes_tokenizer: Any) -> None:
    tokenizer = bytes_tokenizer(CHATML)
    whole = one(chat("Hi.", "Hello."), tokenizer)
    newline_cut = one(chat("Hi.", "Hello."), tokenizer, len(whole.input_ids) - 1)
    end_cut = one(chat("Hi.", "Hello."), tokenizer, len(whole.input_ids) - 2)
    assert (whole.truncated, whole.answer_cut) == (0, False)
    assert (newline_cut.truncated, newline_cut.answer_cut) == (1, False)
    assert (end_cut.truncated, end_cut.answer_cut) == (2, True)
    assert end_cut.input_ids == whole.input_ids[:-2]
    assert end_cut.supervised == whole.supervised[:-2]
    with pytest.raises(UsageError, match="max_length is 1"):
        one(chat("Hi.", "Hello."), tokenizer, 1)


def test_the_embedded_models_template_gives_the_reference_masks(smollm2: Any) -> None:
    random_ = random.Random(1)
    words = ["sum", " of", " 12", "\n\n", " é", " def f(x):\n    return", " 你好", "!", " user", "<", "|"]
    rows = [chat(*("x" + "".join(random_.choices(words, k=8)) + "." for _ in range(2))) for _ in range(40)]
    for row, example in zip(rows, encode(rows, smollm2, max_length=512), strict=True):
        question = [{"role": "user", "content": row.turns[0].content}]
        before = smollm2.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        prompt = smollm2(before, add_special_tokens=False)["input_ids"]
        answer = smollm2(row.turns[1].content + "<|im_end|>", add_special_tokens=False)["input_ids"]
        newline = smollm2("\n", add_special_tokens=False)["input_ids"]
        assert example.input_ids == prompt + answer + newline
        assert example.supervised == [False] * len(prompt) + [True] * len(answer) + [False]
