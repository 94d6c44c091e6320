from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.data.encode import Example, encode
from trimtab.data.inspect import Inspection, inspect, overlap, token_view
from trimtab.data.layout import Row, Turn
from trimtab.data.read import Source, read

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def source(*pairs: tuple[str, str], name: str = "train.jsonl") -> Source:
    rows = tuple(Row((Turn("user", q), Turn("assistant", a)), None, i) for i, (q, a) in enumerate(pairs, start=1))
    return Source(name, "JSON Lines", "prompt-completion", rows, ("prompt", "completion"))


def look(rows: Source, tokenizer: Any, max_length: int = 512, against: Source | None = None) -> Inspection:
    return inspect(
        rows, encode(rows, tokenizer, max_length=max_length), tokenizer, max_length=max_length, against=against
    )


def test_clean_data_has_figures_and_no_complaints(bytes_tokenizer: Any) -> None:
    found = look(source(("Hi.", "Hello."), ("Bye.", "So long!")), bytes_tokenizer(CHATML))
    # One token a byte and one a mark: 4 marks, "user\n", "assistant\n" and two newlines around the texts.
    assert (found.rows, found.tokens) == (2, 2 * (4 + 5 + 10 + 2) + 3 + 6 + 4 + 8)
    assert found.supervised_tokens == len("Hello.") + len("So long!") + 2
    assert found.supervised_share == found.supervised_tokens / found.tokens
    assert (found.length_p50, found.length_p95, found.length_max) == (30, 33, 33)
    assert (found.errors, found.warnings) == ((), ())
    assert json.loads(json.dumps(found.to_dict()))["supervised_tokens"] == found.supervised_tokens


def test_nothing_supervised_is_an_error(bytes_tokenizer: Any) -> None:
    found = look(source(("A long question", "yes")), bytes_tokenizer(CHATML), max_length=8)
    assert (found.unsupervised, found.answers_cut) == (1, 1)
    assert "no token is supervised" in found.errors[0]


def test_no_end_of_turn_supervised_is_an_error(bytes_tokenizer: Any) -> None:
    found = look(source(("a", "b"), ("c", "d")), bytes_tokenizer(ENDLESS))
    assert found.open_ended == 2
    assert "no end-of-turn token is supervised" in found.errors[0]


def test_answers_that_are_all_cut_leave_no_end_of_turn_and_are_an_error(bytes_tokenizer: Any) -> None:
    found = look(source(("a", "b" * 50)), bytes_tokenizer(CHATML), max_length=40)
    assert (found.truncated, found.answers_cut, found.open_ended) == (1, 1, 0)
    assert "no end-of-turn token is supervised" in found.errors[0]


def test_a_cut_answer_is_a_warning(bytes_tokenizer: Any) -> None:
    found = look(source(("a", "b"), ("a", "b" * 50)), bytes_tokenizer(CHATML), max_length=40)
    assert found.errors == ()
    assert found.warnings[0].startswith("1 answer cut at max_length (40); the longest example has 72 tokens")


def test_long_plain_text_may_be_cut_without_an_error(bytes_tokenizer: Any) -> None:
    rows = Source("a.txt", "plain text", "text", (Row((), "word " * 20, 1),), ("text",))
    found = look(rows, bytes_tokenizer(None), max_length=40)
    assert (found.errors, found.truncated) == ((), 1)


def test_duplicates_and_conflicting_answers_are_counted_and_told(bytes_tokenizer: Any) -> None:
    found = look(source(("a", "b"), ("a", "b"), ("a", "b"), ("c", "d"), ("c", "e")), bytes_tokenizer(CHATML))
    assert (found.duplicates, found.conflicts) == (2, 1)
    assert found.warnings == ("2 rows of 5 repeat an earlier row", "1 prompt with more than one answer")


def test_rows_kept_without_an_answer_are_an_error(bytes_tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"question": "q", "answer": "a"}\n{"question": "q2", "answer": ""}\n')
    found = look(read(file, keep_incomplete=True), bytes_tokenizer(CHATML))
    assert found.incomplete == (2,)
    assert found.errors == ("1 row without an answer (2): training refuses them; remove them",)


def test_contamination_is_found_across_spacing_case_and_punctuation(bytes_tokenizer: Any) -> None:
    train = source(("What is  2 + 3 ?", "5"), ("What is 2 - 3?", "-1"), ("Name a colour", "red"), ("x", "y"))
    test = source(("What is 2 + 3 ?", "x"), ("name a colour!", "x"), ("What is 2 * 3?", "x"), name="test.jsonl")
    found = look(train, bytes_tokenizer(CHATML), against=test)
    assert found.overlap is not None
    assert (found.overlap.same_text, found.overlap.same_words, found.overlap.training_rows) == (1, 2, 2)
    assert found.overlap.examples == ((1, 1), (3, 2))
    assert "contamination: 2 of the 3 rows of test.jsonl (67%)" in found.warnings[0]


def test_disjoint_data_is_not_called_contaminated(bytes_tokenizer: Any) -> None:
    found = look(source(("a", "b")), bytes_tokenizer(CHATML), against=source(("c", "b"), name="test.jsonl"))
    assert found.overlap is not None
    assert (found.overlap.same_words, found.warnings) == (0, ())


@pytest.mark.parametrize(
    ("test", "rows", "same_text", "same_words"),
    [
        ("gsm8k", 1319, 1055, 1055),
        ("multiarith", 600, 491, 491),
        ("addsub", 395, 316, 330),
        ("singleeq", 508, 406, 425),
    ],
)
def test_a_published_contamination_is_found(
    shared_data: Path, test: str, rows: int, same_text: int, same_words: int
) -> None:
    train = read(shared_data / "math" / "word_problems.train.json.gz", keep_incomplete=True)
    found = overlap(train, read(shared_data / "math" / f"{test}.test.json.gz", keep_incomplete=True))
    assert (found.rows, found.same_text, found.same_words) == (rows, same_text, same_words)


def test_token_view_joins_to_the_text_even_where_characters_span_tokens(bytes_tokenizer: Any) -> None:
    tokenizer = bytes_tokenizer(None)
    text = "aÄ 你好 🙂\n"
    view = token_view(encode([Row((), text, 1)], tokenizer, max_length=99)[0], tokenizer)
    assert "".join(piece for piece, _ in view) == text + "</s>"
    assert ("🙂", True) in view
    assert [target for _, target in view] == [False] + [True] * (len(view) - 1)


def test_token_view_of_half_a_character_has_a_place_for_every_token(bytes_tokenizer: Any) -> None:
    tokenizer = bytes_tokenizer(None)
    ids = tokenizer("a🙂", add_special_tokens=False)["input_ids"][:3]
    assert len(token_view(Example(ids, [True] * 3, 1, 2, True), tokenizer)) == 3
