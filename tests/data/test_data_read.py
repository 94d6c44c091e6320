from __future__ import annotations

import gzip
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.data.layout import Turn
from trimtab.data.read import read
from trimtab.errors import FormatError, UsageError

ALPACA = [
    {"instruction": "Add.", "input": "1 and 2", "output": " 3 "},
    {"instruction": "Name a colour.", "input": "", "output": "red"},
]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_alpaca_joins_instruction_and_input_and_strips(tmp_path: Path) -> None:
    source = read(write(tmp_path / "a.json", json.dumps(ALPACA)))
    assert source.rows[0].turns == (Turn("user", "Add.\n1 and 2"), Turn("assistant", "3"))
    assert source.rows[1].turns == (Turn("user", "Name a colour."), Turn("assistant", "red"))
    assert source.describe() == "a.json: 2 rows, alpaca layout (instruction, input, output), JSON array"


def test_every_container_gives_the_same_rows(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    csv = 'instruction,input,output\nAdd.,1 and 2, 3 \nName a colour.,,"red"\n'
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ALPACA), tmp_path / "a.parquet")
    files = [
        write(tmp_path / "a.json", json.dumps(ALPACA, indent=2)),
        write(tmp_path / "lines.json", lines(ALPACA)),
        write(tmp_path / "array.jsonl", json.dumps(ALPACA)),
        write(tmp_path / "a.jsonl", lines(ALPACA)),
        write(tmp_path / "a.csv", csv),
        write(tmp_path / "semicolons.csv", csv.replace(",", ";")),
        write(tmp_path / "a.tsv", csv.replace(",", "\t")),
        tmp_path / "a.parquet",
    ]
    zipped = [write(file.with_name(file.name + ".gz"), gzip.compress(file.read_bytes())) for file in files]
    expected = [row.turns for row in read(files[0]).rows]
    assert {file.name: [row.turns for row in read(file).rows] for file in files + zipped} == {
        file.name: expected for file in files + zipped
    }
    assert read(zipped[-1]).container == "Parquet gzipped"
    assert read(zipped[1]).container == "JSON Lines gzipped"


@pytest.mark.parametrize(
    ("record", "layout"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "messages"),
        ({"conversation": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        ({"prompt": "q", "completion": "a"}, "prompt-completion"),
        ({"prompt": "q", "response": "a"}, "prompt-completion"),
        ({"question": "q", "answer": "a", "source": 7}, "prompt-completion"),
        ({"instruction": "q", "output": "a", "text": "### q ### a"}, "alpaca"),
    ],
)
def test_layouts_are_told_by_their_keys(tmp_path: Path, record: dict[str, Any], layout: str) -> None:
    source = read(write(tmp_path / "a.jsonl", lines([record])))
    assert source.layout == layout
    assert source.rows[0].turns == (Turn("user", "q"), Turn("assistant", "a"))


def test_plain_text_comes_from_a_text_key_or_a_txt_file(tmp_path: Path) -> None:
    from_key = read(write(tmp_path / "a.jsonl", lines([{"text": " one "}])))
    from_file = read(write(tmp_path / "a.txt", "[one]\r\n\ntwo\n"))
    assert [(r.text, r.turns) for r in from_key.rows] == [(" one ", ())]
    assert [(r.text, r.number) for r in from_file.rows] == [("[one]", 1), ("two", 3)]


def test_a_layout_can_be_chosen_where_two_fit(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", lines([{"prompt": "p", "completion": "c", "question": "q", "output": "o"}]))
    assert read(file).rows[0].turns[0].content == "p"
    both = write(tmp_path / "b.jsonl", lines([{"prompt": "p", "completion": "c", "instruction": "i", "output": "o"}]))
    with pytest.raises(UsageError, match=r"fit alpaca .* and prompt-completion"):
        read(both)
    assert read(both, layout="alpaca").rows[0].turns[0].content == "i"


def test_unknown_keys_are_refused_with_the_keys_and_the_known_layouts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"its keys \(sentence, label\).*alpaca.*sharegpt"):
        read(write(tmp_path / "a.csv", "sentence,label\ngood,1\n"))


def test_an_unknown_layout_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean alpaca"):
        read(write(tmp_path / "a.json", json.dumps(ALPACA)), layout="alpacca")


@pytest.mark.parametrize("output", ["", "  \n", None])
def test_a_row_without_an_answer_is_refused(tmp_path: Path, output: str | None) -> None:
    rows = [*ALPACA, {"instruction": "Say.", "output": output}]
    with pytest.raises(UsageError, match=r"a\.jsonl: row 3 has no answer: 'output'"):
        read(write(tmp_path / "a.jsonl", lines(rows)))


def test_a_row_that_lacks_the_answer_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="row 1 has no answer: 'output' is missing"):
        read(write(tmp_path / "a.jsonl", lines([{"instruction": "Say."}, *ALPACA])))


def test_rows_without_an_answer_can_be_kept_to_look_at(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", lines([{"instruction": "Say.", "output": ""}, *ALPACA]))
    source = read(file, keep_incomplete=True)
    assert (len(source.rows), source.incomplete) == (3, (1,))


def test_all_wrong_rows_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)row 1 .*row 2 .*row 5 .*and 3 more rows"):
        read(write(tmp_path / "a.jsonl", lines([{"instruction": "Say.", "output": ""}] * 8)))


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ([("user", "q")], "its last turn is the user's"),
        ([("user", "q"), ("assistant", " ")], "turn 2, the assistant's, is blank"),
        ([("user", "q"), ("tool", "a")], "unknown role 'tool' in turn 2; known: system, user, assistant"),
        ([("user", "q"), ("assistant", [{"type": "text"}])], "a list as 'content'"),
        ([("user", "q"), ("assistant", None)], "no 'content' in turn 2"),
        ([], "'messages' is empty"),
    ],
)
def test_a_wrong_conversation_is_refused(tmp_path: Path, turns: list[Any], problem: str) -> None:
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    with pytest.raises(UsageError, match=f"row 1 has .*{problem}"):
        read(write(tmp_path / "a.jsonl", lines([row])))


def test_numbers_are_not_taken_for_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="row 1 has a int as 'answer', but must have text"):
        read(write(tmp_path / "a.jsonl", lines([{"question": "1+1", "answer": 2}])))


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="row 1 has half a surrogate pair in 'answer'"):
        read(write(tmp_path / "a.jsonl", '{"question": "q", "answer": "\\ud83d"}'))


@pytest.mark.parametrize(
    "content", [b"", b"  \n\n", b"[]", gzip.compress(b"")], ids=["nothing", "blank", "no-rows", "gzipped-nothing"]
)
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UsageError, match=r"a\.json is empty"):
        read(write(tmp_path / "a.json", content))


def test_invalid_utf8_is_refused_with_its_place(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"question": "a", "answer": "b"}\n{"question": "caf\xe9", "answer": "b"}\n'
    with pytest.raises(FormatError, match=rf"byte 0xe9 at offset {content.index(0xE9)} \(line 2\)"):
        read(write(tmp_path / "a.jsonl", content))


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.csv", b"\xef\xbb\xbfquestion,answer\nq,a\n")).layout == "prompt-completion"


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.json", '[{"question": "q", "answer": "a"},\n {"question": }]', "line 2 column 15"),
        ("a.json", '[{"question": "q", "answer": "a"},\n', "line 2 column 1"),
        ("a.jsonl", '{"question": "q", "answer": "a"}\n{"question": "q" "a"}\n', "line 2 column 18"),
        ("a.jsonl", '{"question": "q\n', "line 1 column 14"),
    ],
)
def test_broken_json_is_refused_with_its_place(tmp_path: Path, name: str, content: str, place: str) -> None:
    with pytest.raises(FormatError, match=f"broken JSON at {place}"):
        read(write(tmp_path / name, content))


def test_one_object_over_many_lines_is_not_taken_for_rows(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"one JSON object over several lines \(keys: data\)"):
        read(write(tmp_path / "a.json", json.dumps({"data": ALPACA}, indent=1)))


def test_rows_that_are_not_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="row 2 is a str"):
        read(write(tmp_path / "a.json", '[{"text": "a"}, "b"]'))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0", "a PNG image"),
        (struct.pack("<Q", 24) + b'{"w":{"dtype":"F32"}}   ' + bytes(64), "a safetensors file"),
        (b"GGUF\x03\0\0\0", "a GGUF model"),
        (b"PK\x03\x04rest", "a zip archive"),
        (b"\x80\x04\x95rest", "a Python pickle"),
        ("[]".encode("utf-16"), "text in UTF-16"),
        (b"\0\0\x08\x01" + bytes(20), "a binary file"),
        (b"once upon a time", "not JSON"),
    ],
)
def test_a_file_of_another_format_is_refused_by_name(tmp_path: Path, content: bytes, kind: str) -> None:
    with pytest.raises(FormatError, match=kind):
        read(write(tmp_path / "a.json", content))


def test_a_file_that_is_not_what_its_ending_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"a\.jsonl\.gz is no gzip file"):
        read(write(tmp_path / "a.jsonl.gz", lines(ALPACA).encode()))


def test_a_truncated_gzip_file_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(lines(ALPACA).encode())
    with pytest.raises(FormatError, match="broken or truncated gzip"):
        read(write(tmp_path / "a.jsonl.gz", whole[:-9]))


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(FormatError, match="broken or truncated Parquet"):
        read(write(tmp_path / "a.parquet", b"PAR1" + bytes(50)))


def test_a_csv_row_of_another_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="row 2 has 3 fields, but its header has 2"):
        read(write(tmp_path / "a.csv", "question,answer\nq,a\nq,a,b\n"))


def test_a_csv_quote_left_open_is_refused_and_does_not_swallow_rows(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="broken CSV"):
        read(write(tmp_path / "a.csv", 'question,answer\nq,"a\nq,a\n'))


def test_a_long_csv_field_is_read_whole(tmp_path: Path) -> None:
    source = read(write(tmp_path / "a.csv", f"question,answer\nq,{'a' * 200_000}\n"))
    assert len(source.rows[0].turns[1].content) == 200_000


def test_limit_reads_the_first_rows_and_checks_no_others(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", lines([*ALPACA, {"instruction": "Say.", "output": ""}]))
    assert [row.number for row in read(file, limit=2).rows] == [1, 2]
    with pytest.raises(UsageError, match="limit is 0"):
        read(file, limit=0)


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", lines(ALPACA))
    with pytest.raises(UsageError, match=r"no such file.*did you mean train\.jsonl"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(UsageError, match="is a folder"):
        read(tmp_path)


def test_a_hub_name_without_the_hub_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'trimtab\[hub\]'"):
        read("someone/some-data")


def test_a_hub_data_set_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        @staticmethod
        def load_dataset(name: str, split: str) -> list[dict[str, str]]:
            if name != "someone/some-data":
                raise ConnectionError("no network")
            return [{"question": split, "answer": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", Fake())  # type: ignore[arg-type]
    assert read("someone/some-data", split="test", limit=3).rows[0].turns[0].content == "test[:3]"
    with pytest.raises(UsageError, match=r"split 'train' of a hub data set.*no network"):
        read("someone/other")


def test_a_split_is_not_ignored_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="split 'test' is for hub data sets"):
        read(write(tmp_path / "a.jsonl", lines(ALPACA)), split="test")


def test_reading_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, trimtab.data.read; sys.exit(bool({'torch', 'transformers', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=5))
def test_any_text_survives_json_and_json_lines(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    pairs = [(f"q{question}", f"a{answer}") for question, answer in pairs]
    records = [{"prompt": question, "completion": answer} for question, answer in pairs]
    folder = tmp_path_factory.mktemp("text")
    for name, content in (
        ("a.json", json.dumps(records, ensure_ascii=False)),
        ("a.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)),
    ):
        source = read(write(folder / name, content))
        assert [tuple(turn.content for turn in row.turns) for row in source.rows] == pairs
