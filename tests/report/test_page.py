from __future__ import annotations

import html
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trimtab.errors import UsageError
from trimtab.files import StorageError
from trimtab.report.page import _share, render, write_report
from trimtab.report.run_folder import read_run
from trimtab.report.wording import visible


class Page(HTMLParser):
    """Tags with their attributes, the text of the page, and whether every tag was closed in order."""

    VOID = frozenset(("meta", "br", "img", "link", "input"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.pieces))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, folders: ModuleType) -> Page:
    """The page of the finished run, for tests that only look."""
    return page_of(folders.write_run(tmp_path_factory.mktemp("whole") / "demo"))


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_the_report_is_written_into_the_run_by_default(run: Path) -> None:
    assert write_report(run) == run / "report.html"
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_page_fetches_nothing_and_runs_nothing(whole: Page) -> None:
    for tag, attributes in whole.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "base")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "src", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in whole.source
    assert set(re.findall(r"url\((.)", whole.source)) == {"#"}
    assert "default-src 'none'" in whole.source


def test_every_tag_is_closed_and_no_id_is_used_twice(whole: Page) -> None:
    assert whole.open == []
    ids = Counter(attributes["id"] for _, attributes in whole.tags if "id" in attributes)
    assert [name for name, uses in ids.items() if uses > 1] == []
    for _, attributes in whole.tags:
        target = attributes.get("xlink:href") or attributes.get("href")
        assert target is None or target.removeprefix("#") in ids


def test_every_figure_is_well_formed_and_says_what_it_shows(whole: Page) -> None:
    figures = re.findall(r"<svg.*?</svg>", whole.source, flags=re.DOTALL)
    assert len(figures) == 3
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.get("role") == "img"
        assert len(root.get("aria-label") or "") > 20


def test_no_figure_has_a_colour_that_ignores_dark_mode(whole: Page) -> None:
    styles = re.findall(r'style="([^"]*)"', whole.source)
    assert len(styles) > 200
    assert [style for style in styles if re.search(r"(fill|stroke): #", style)] == []


def test_gain_and_forgetting_stand_with_interval_and_chance(whole: Page) -> None:
    text = whole.text
    gained = "Subtoken F1 rose from 0.021 [0.012 to 0.032] to 0.243 [0.206 to 0.281]: the intervals do not overlap."
    forgot = "General knowledge fell from 52.5 % [41.2 to 63.7 %] to 51.2 % [40.0 to 62.5 %]: the intervals overlap"
    assert gained in text
    assert forgot + "; chance gives 25.0 %." in text
    assert "No chance level was recorded for Subtoken F1, Exact match." in text
    assert "95 % bootstrap intervals" in text


def test_a_change_is_judged_by_its_own_interval_where_there_is_one(run: Path) -> None:
    measure = {"before": 0.825, "after": 0.9125, "interval_before": [0.7375, 0.9], "interval_after": [0.85, 0.9625]}
    edit(run / "result.json", knowledge=measure | {"interval_of_change": [0.025, 0.1625]})
    page = page_of(run)
    # 91.2 is 82.5 and 8.7: the difference is that of the figures as they are shown.
    assert "a change of +8.7 points, 95 % interval +2.5 to +16.2 points, which excludes 0" in page.text
    assert "+8.7 points [+2.5 to +16.2 points] from 82.5 %" in page.text
    assert "General knowledge: interval of change" not in page.text
    edit(run / "result.json", knowledge=measure | {"interval_of_change": [-0.025, 0.1625]})
    assert "−2.5 to +16.2 points, which holds 0, so it may be chance" in page_of(run).text
    f1 = {"before": 0.0214, "after": 0.2436, "interval_of_change": [0.1, 0.3]}
    edit(run / "result.json", subtoken_f1=f1)
    assert "a change of +0.223, 95 % interval 0.100 to 0.300, which excludes 0" in page_of(run).text


def test_warnings_of_training_stand_at_the_top(run: Path) -> None:
    edit(run / "result.json", warnings=["contamination: 3 of the 4 rows <b>stand</b> there"])
    page = page_of(run)
    header = page.source[: page.source.index("</header>")]
    assert '<p class="warning">Warning: contamination: 3 of the 4 rows &lt;b&gt;stand&lt;/b&gt; there</p>' in header
    assert page.text.count("contamination") == 1


def test_a_learning_rate_that_was_left_to_the_method_is_told(whole: Page, run: Path) -> None:
    assert "own learning rate" not in whole.text
    (run / "config.yaml").write_text("method: lora\nlr: null\n", encoding="utf-8")
    assert "lr is null: the method's own learning rate, 0.000200, was used." in page_of(run).text


def test_one_of_a_kind_is_told_in_the_singular(run: Path, folders: ModuleType) -> None:
    folders.write_lines(run / "metrics.jsonl", folders.metrics(1)[1:])
    edit(run / "audit.json", layers=folders.layers(1)[:1])
    text = page_of(run).text
    for words in ("for 1 optimizer step on", "1 row of metrics.jsonl", "moved the one weight matrix", "The module"):
        assert words in text


def test_one_step_has_no_ticks_between_steps(run: Path, folders: ModuleType) -> None:
    folders.write_lines(run / "metrics.jsonl", folders.metrics(1)[1:])
    curves = re.findall(r"<svg.*?</svg>", page_of(run).source, flags=re.DOTALL)[1]
    ticks = re.findall(r'id="curves-xtick_\d+">.*?<text[^>]*>([^<]*)</text>', curves, flags=re.DOTALL)
    assert ticks
    assert set(ticks) == {"1"}


def test_the_intervals_say_what_was_drawn_anew(whole: Page, run: Path) -> None:
    told = "Drawn anew each time: 37 whole modules for Subtoken F1, Exact match; 80 questions for General knowledge."
    assert told in whole.text
    edit(run / "result.json", exact_match={"before": 0.1, "after": 0.2, "interval_after": [0.1, 0.3]}, knowledge=None)
    silent = "37 whole modules for Subtoken F1; units that were not recorded for Exact match."
    assert silent in page_of(run).text


def test_the_audit_says_what_outputs_were_compared_on(whole: Page, run: Path) -> None:
    assert "Greedy tokens that agree100 % of 87 positions" in whole.text.replace("agree ", "agree")
    assert "Probes8 prompts" in whole.text.replace("Probes ", "Probes")
    assert "robe kind" not in whole.text
    nothing = {"probe_kind": "no probes", "probe_positions": 0, "greedy_agreement": None}
    edit(run / "audit.json", **nothing)
    text = page_of(run).text
    assert "no probes" in text
    assert "positions" not in text


def test_a_run_with_nothing_but_its_metrics_has_a_page(run: Path) -> None:
    for name in ("config.yaml", "samples.jsonl", "result.json", "audit.json"):
        (run / name).unlink()
    text = page_of(run).text
    for words in ("The run has no config.yaml", "result.json is missing", "121 rows of metrics.jsonl"):
        assert words in text


def test_the_headline_says_what_was_trained_and_what_it_cost(whole: Page) -> None:
    text = whole.text
    assert "LoRA, rank 16, on smollm2-135m-instruct" in text
    assert "Trained 4.88 million parameters (3.63 % of the 135 million frozen ones) for 120 optimizer steps" in text
    assert "on 385,320 tokens, of which 14,160 were supervised, in 5 min 48 s." in text


def test_markup_in_samples_and_names_stays_text(run: Path, folders: ModuleType) -> None:
    attack = "</pre></svg><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}"
    sample = {"prompt": attack, "expected": attack, "before": attack, "after": attack, attack: attack}
    folders.write_lines(run / "samples.jsonl", [sample])
    folders.write_lines(run / "metrics.jsonl", [{"step": 1, "loss": 1.0, attack: 1}])
    bars = [{"name": attack, "relative_change": 0.1}]
    grid = [{"name": f"{attack}.{layer}.{attack}", "relative_change": 0.1} for layer in range(4)]
    edit(run / "audit.json", layers=bars + grid, dtype=attack, **{attack: attack})
    measure = {"before": 0.1, "after": 0.2, attack: attack}
    edit(run / "result.json", model=attack, versions={attack: attack}, **{attack: attack, attack + "2": measure})
    (run / "config.yaml").write_text(f"note: {json.dumps(attack)}\n", encoding="utf-8")
    page = page_of(run)
    assert page.open == []
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "".join(page.pieces).count(attack) >= 12


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60))
def test_any_answer_of_a_model_is_shown_whole(run: Path, folders: ModuleType, answer: str) -> None:
    folders.write_lines(run / "samples.jsonl", [{"prompt": "p", "expected": answer, "after": "x"}])
    for name in ("metrics.jsonl", "audit.json", "result.json"):
        (run / name).unlink(missing_ok=True)
    text = write_report(run).read_bytes().decode("utf-8")
    # A browser drops the line break right after <pre>, so the page must write one of its own.
    shown = html.unescape(re.findall(r'<pre dir="auto">\n(.*?)</pre>', text, flags=re.DOTALL)[0])
    assert shown == visible(answer)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", shown)


def test_the_configuration_is_shown_verbatim(whole: Page, folders: ModuleType) -> None:
    shown = re.findall(r'<pre tabindex="0">\n(.*?)</pre>', whole.source, flags=re.DOTALL)
    assert [html.unescape(text) for text in shown] == [folders.CONFIG]


def test_no_key_of_the_result_is_dropped(run: Path) -> None:
    edit(run / "result.json", odd_key={"deep": [1.5, None, True]}, perplexity=4.25)
    text = page_of(run).text
    assert "Odd keydeep 1.5, none, yes" in text.replace("Odd key ", "Odd key")
    for figure in ("4.25", "2.06 GiB", "runs/demo/adapter", "2.13.0", "4,884,480 parameters", "80"):
        assert figure in text


def test_every_module_of_the_audit_is_in_its_table(whole: Page, folders: ModuleType) -> None:
    names = [row["name"] for row in folders.layers()]
    assert len(names) == 210
    assert all(whole.text.count(name) >= 2 for name in names)  # in the table, and on hovering over its cell


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (1, "100 %"),
        (0.99999, "99.999 %"),
        (1.000004, "100.0004 %"),
        (0.3964, "39.64 %"),
        (2e-6, "0.000200 %"),
        (0, "0 %"),
    ],
)
def test_no_share_rounds_to_all_or_to_none(share: float, shown: str) -> None:
    assert _share(share).replace("\N{NO-BREAK SPACE}", " ") == shown


def test_a_run_with_nothing_but_its_configuration_says_what_is_missing(run: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl", "result.json", "audit.json"):
        (run / name).unlink()
    text = page_of(run).text
    for words in (
        "result.json is missing",
        "metrics.jsonl is missing",
        "samples.jsonl is missing",
        "audit.json is missing: this run was not merged",
        "No change per layer was recorded",
        "No measurement before and after training",
    ):
        assert words in text


def test_a_run_that_was_not_merged_takes_its_layers_from_layers_json(run: Path) -> None:
    (run / "audit.json").unlink()
    rows = [{"name": "encoder", "relative_change": 0.0125}, {"name": "head", "relative_change": 0.5}]
    (run / "layers.json").write_text(json.dumps(rows), encoding="utf-8")
    text = page_of(run).text
    assert "1.25 %" in text
    assert "All 2 modules as a table" in text
    assert "this run was not merged" in text


def test_values_that_are_not_finite_are_counted_not_hidden(run: Path, folders: ModuleType) -> None:
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": float("inf")}]
    folders.write_lines(run / "metrics.jsonl", rows)
    layers = [{"name": "a", "relative_change": 0.1}, {"name": "b", "relative_change": float("nan")}]
    edit(run / "audit.json", layers=layers)
    text = page_of(run).text
    assert "leave a gap in the curves: 2." in text
    assert "so is not drawn: 1." in text


def test_one_run_gives_one_page_byte_for_byte(run: Path) -> None:
    assert render(read_run(run)) == render(read_run(run))


def test_an_earlier_report_stays_whole_when_the_run_is_broken(run: Path) -> None:
    before = write_report(run).read_bytes()
    (run / "audit.json").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match=r"audit\.json"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


def test_a_place_that_cannot_be_written_is_refused_and_nothing_is_left_behind(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(StorageError, match=r"cannot write .*report\.html"):
        write_report(run, out=tmp_path / "file" / "report.html")
    with pytest.raises(UsageError, match="it is a folder"):
        write_report(run, out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {run.name, "file"}


def test_writing_leaves_one_file_that_others_may_read(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_report(run, out=out / "page.html")
    assert [path.name for path in out.iterdir()] == ["page.html"]
    probe = tmp_path / "probe"
    probe.touch()
    assert (out / "page.html").stat().st_mode == probe.stat().st_mode


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(run: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=re.escape('pip install "trimtab[plots]"')):
        write_report(run)
    assert not (run / "report.html").exists()
