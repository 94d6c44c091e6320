from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from trimtab.errors import FormatError, UsageError
from trimtab.report.page import write_report
from trimtab.report.run_folder import read_run


def test_a_folder_without_a_configuration_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.yaml"):
        read_run(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        read_run(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("metrics.jsonl", '{"step": 3, "los', "line 3 is not JSON"),
        ("metrics.jsonl", "[1, 2]", "line 3 must hold a JSON object, but holds a list"),
        ("metrics.jsonl", '{"loss": 1.0}', "line 3: step must be a number, but is null"),
        ("metrics.jsonl", '{"step": 3, "loss": "low"}', "line 3: loss must be a number, but is text"),
        ("metrics.jsonl", '{"step": 3, "lr": true}', "line 3: lr must be a number, but is true or false"),
        ("samples.jsonl", '{"prompt": "p", "after": "a"}', "line 3: expected must be text, but is null"),
        ("samples.jsonl", '{"prompt": "p", "expected": 3, "after": "a"}', "line 3: expected must be text"),
        ("samples.jsonl", "null", "line 3 must hold a JSON object, but holds null"),
    ],
)
def test_a_broken_line_is_named_with_its_file(run: Path, folders: ModuleType, name: str, line: str, words: str) -> None:
    good = {"step": 1, "loss": 2.0} if name == "metrics.jsonl" else folders.SAMPLES[0]
    (run / name).write_text(json.dumps(good) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(FormatError, match=f"{name} {words}"):
        read_run(run)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("audit.json", '{\n"dtype": ', "line 2 is not JSON"),
        ("audit.json", "[]", "must hold a JSON object, but holds a list"),
        ("audit.json", "{}", "has no list of layers"),
        ("audit.json", '{"layers": {}}', "the layers must be a list, but are an object"),
        ("audit.json", '{"layers": [{"name": "a"}]}', "layer 0: relative_change must be a number, but is null"),
        ("audit.json", '{"layers": [], "greedy_agreement": "all"}', "greedy_agreement must be a number, but is text"),
        ("audit.json", '{"layers": [], "probe_positions": "all"}', "probe_positions must be a number, but is text"),
        ("audit.json", '{"layers": [{"name": "a", "relative_change": 1, "error_share": []}]}', "layer 0: error_share"),
        ("layers.json", '[{"relative_change": 0.1}]', "layer 0 must be an object with the name"),
        ("layers.json", '[{"name": "a", "relative_change": 1}, {"name": "a", "relative_change": 2}]', "a second time"),
        ("result.json", '{"seconds": "long"}', "seconds must be a number, but is text"),
        ("result.json", "null", "line 1 holds null"),
        ("result.json", "[" * 100_000, "is nested too deeply|is not JSON"),
        ("config.yaml", "a: [1\n", "is not YAML.*line"),
        ("config.yaml", "only text", "must hold keys and values"),
        ("config.yaml", "", "must hold keys and values"),
    ],
)
def test_a_broken_file_is_named(run: Path, name: str, content: str, words: str) -> None:
    (run / name).write_text(content, encoding="utf-8")
    with pytest.raises(FormatError, match=f"(?s){name}.*({words})"):
        read_run(run)


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        ({"before": "low", "after": 1}, "exact_match.before must be a number"),
        ({"before": 0, "after": 1, "chance": "half"}, "chance level of exact_match must be a number"),
        ({"before": 0, "after": 1, "interval_after": [0.1]}, "exact_match.interval_after must be two numbers"),
        ({"before": 0, "after": 1, "resampled": 3}, "exact_match.resampled must be text"),
        ({"before": 0, "after": 1, "resampled_number": "3"}, "exact_match.resampled_number must be a number"),
        ({"before": 0, "after": 1, "interval_after": [0.4, 0.1]}, "must start at its lower end"),
    ],
)
def test_a_broken_measure_is_named(run: Path, measure: dict[str, object], words: str) -> None:
    (run / "result.json").write_text(json.dumps({"exact_match": measure}), encoding="utf-8")
    with pytest.raises(FormatError, match=words):
        write_report(run)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "result.json", "samples.jsonl"])
def test_text_that_is_not_utf8_is_named_with_its_line(run: Path, name: str) -> None:
    (run / name).write_bytes(b"\n\xff\xfe\n")
    with pytest.raises(FormatError, match=f"{name} line 2 is not UTF-8"):
        read_run(run)


def test_a_line_separator_inside_an_answer_does_not_end_the_line(run: Path) -> None:
    sample = {"prompt": "a\u2028b", "expected": "c\x85d", "after": "e"}
    (run / "samples.jsonl").write_text(json.dumps(sample, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_run(run).samples == [sample]


def test_a_row_may_hold_training_and_evaluation(run: Path, folders: ModuleType) -> None:
    folder = read_run(run)
    assert folder.series("step", "eval_loss")[0] == [0, 30, 60, 90, 120]
    assert len(folder.series("step", "loss")[0]) == 120
    assert folder.last("real_tokens") == 3211 * 120


def test_the_audit_comes_before_layers_json(run: Path) -> None:
    (run / "layers.json").write_text('[{"name": "other", "relative_change": 9}]', encoding="utf-8")
    assert "other" not in read_run(run).relative_changes()
    (run / "audit.json").unlink()
    assert read_run(run).relative_changes() == {"other": 9.0}


def test_a_run_of_the_library_has_no_config_and_a_page_all_the_same(run: Path) -> None:
    (run / "config.yaml").unlink()
    assert "The run has no config.yaml" in write_report(run).read_text(encoding="utf-8")


def test_a_folder_with_nothing_of_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a run folder$"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UsageError, match="is not a run folder; a measurement has a page of its own"):
        write_report(tmp_path)
