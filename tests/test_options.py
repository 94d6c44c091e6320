"""Dataclasses as the one source of what a user can set."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Literal, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.deltas import METHODS, make_method, method_class, method_spec
from trimtab.errors import UsageError, did_you_mean
from trimtab.options import convert, did_you_mean_option, from_mapping, helps, option, read_yaml, to_mapping, type_name


@dataclasses.dataclass(frozen=True)
class Sample:
    name: str = option(help="must be given")
    count: int = option(3, "how many")
    seed: int = option(0, "of the draw", least=0)
    rate: float = option(0.5, "how fast")
    loud: bool = option(False, "or not")
    mode: Literal["a", "b"] = option("a", "which")
    limit: int | None = option(None, "at most")
    words: tuple[str, ...] = option(factory=tuple, help="some")
    scales: Mapping[str, float] = option(factory=dict, help="by name")
    parts: Mapping[str, tuple[bool, ...]] = option(factory=dict, help="flags")


samples = st.builds(
    Sample,
    name=st.text(max_size=8),
    count=st.integers(1 - 2**63, 2**63 - 1),
    seed=st.integers(0, 2**63 - 1),
    rate=st.floats(allow_nan=False),
    loud=st.booleans(),
    mode=st.sampled_from(["a", "b"]),
    limit=st.none() | st.integers(1 - 2**63, 2**63 - 1),
    words=st.lists(st.text(max_size=5), max_size=3).map(tuple),
    scales=st.dictionaries(st.text(max_size=4), st.floats(allow_nan=False), max_size=3),
    parts=st.dictionaries(st.text(max_size=4), st.lists(st.booleans(), max_size=3).map(tuple), max_size=3),
)


@given(samples)
def test_options_survive_a_mapping_and_json(sample: Sample) -> None:
    assert from_mapping(Sample, to_mapping(sample), "x") == sample
    assert from_mapping(Sample, json.loads(json.dumps(to_mapping(sample))), "x") == sample


@settings(max_examples=40, deadline=None)
@given(samples)
def test_options_survive_yaml(sample: Sample) -> None:
    plain = to_mapping(sample)
    assert from_mapping(Sample, yaml.safe_load(yaml.safe_dump(plain)), "x") == sample


@given(st.integers(1 - 2**63, 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_as_text_are_numbers_where_the_field_is_one(count: int, rate: float) -> None:
    made = from_mapping(Sample, {"name": "n", "count": str(count), "rate": repr(rate)}, "x")
    assert (made.count, made.rate) == (count, rate)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("x", int), (1.5, int), (True, int), (float("inf"), int), (None, int), ([1], int), ("", int),
        ("x", float), (True, float), (float("nan"), float), ("nan", float), (None, float),
        (1, bool), ("yes", bool), (0, bool), (None, bool),
        (1, str), (True, str), (None, str),
        ("c", Literal["a", "b"]), (True, Literal[1, 2]),
        (3, tuple[str, ...]), ([1], tuple[str, ...]), ({"a": 1}, tuple[str, ...]),
        ([1], Mapping[str, int]), ({"a": "x"}, Mapping[str, int]),
        ("x", int | None),
    ],
)  # fmt: skip
def test_nothing_is_coerced(value: Any, kind: Any) -> None:
    with pytest.raises((ValueError, OverflowError)):
        convert(value, kind)


@pytest.mark.parametrize(
    ("value", "kind", "wanted"),
    [
        ("2e-4", float, 2e-4), (3, float, 3.0), (3.0, int, 3), ("7", int, 7), ("True", bool, True),
        ("q_proj", tuple[str, ...], ("q_proj",)), (["a", "b"], tuple[str, ...], ("a", "b")),
        (None, int | None, None), ("7", int | None, 7), ({1: "2"}, Mapping[str, int], {"1": 2}),
    ],
)  # fmt: skip
def test_what_means_the_same_is_taken(value: Any, kind: Any, wanted: Any) -> None:
    found = convert(value, kind)
    assert found == wanted
    assert type(found) is type(wanted)


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(UsageError) as error:
        from_mapping(Sample, {"cuont": 1, "rate": "fast", "mode": "c"}, "recipe.yaml")
    text = str(error.value)
    assert text.startswith("recipe.yaml: 4 problems")
    assert "unknown key 'cuont'; did you mean count?" in text
    assert "rate is 'fast', but must be a number" in text
    assert "mode is 'c', but must be one of a, b" in text
    assert "'name' is missing (text)" in text
    assert error.value.exit_code == 2


def test_a_dash_is_an_underscore_in_keys() -> None:
    @dataclasses.dataclass(frozen=True)
    class Dashed:
        max_length: int = option(help="tokens")

    assert from_mapping(Dashed, {"max-length": 3}, "x") == Dashed(3)


def test_types_are_written_for_users() -> None:
    hints = {
        "count": "a whole number",
        "limit": "a whole number",
        "words": "a list of text",
        "scales": "a mapping of text to a number",
    }
    kinds = get_type_hints(Sample)
    assert {name: type_name(kinds[name]) for name in hints} == hints
    assert type_name(kinds["mode"]) == "one of a, b"


def test_yaml_that_is_none_is_refused(tmp_path) -> None:
    for content, message in (
        (b"- a\n- b\n", "but holds a list"),
        (b"# nothing\n", "is empty"),
        (b"a: [", "is not YAML"),
        (b"\xff\xfe\xfa", "is not YAML"),
    ):
        (tmp_path / "r.yaml").write_bytes(content)
        with pytest.raises(UsageError, match=message):
            read_yaml(str(tmp_path / "r.yaml"))
    with pytest.raises(UsageError, match=r"cannot read .*No such file"):
        read_yaml(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_made_from_its_own_options(name: str) -> None:
    method = method_class(name)()
    options = method.options()
    assert make_method(options.pop("name"), **options) == method
    with pytest.raises(UsageError, match="unknown key 'ranc'"):
        make_method(name, ranc=3)


@pytest.mark.parametrize("name", METHODS)
def test_the_light_specification_of_a_method_is_the_real_one(name: str) -> None:
    light, real = method_spec(name), method_class(name)
    assert [(f.name, f.default, f.metadata) for f in dataclasses.fields(light)] == [
        (f.name, f.default, f.metadata) for f in dataclasses.fields(real)
    ]
    assert (light.__doc__, light.formula, light.paper) == (real.__doc__, real.formula, real.paper)


def test_the_light_specification_imports_no_torch() -> None:
    code = "import sys; from trimtab.deltas import METHODS, method_spec; [method_spec(n)() for n in METHODS]; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown method 'lorra'; did you mean lora .*\? \(known: lora, "):
        make_method("lorra")


def test_an_option_is_found_by_what_its_help_says() -> None:
    known = {
        "lr": "learning rate; by default its own",
        "schedule": "how the learning rate falls",
        "clip": "largest norm",
    }
    for wrong in ("learning_rate", "--learning-rate"):
        assert did_you_mean_option(wrong, known) == "; did you mean lr?"
    assert did_you_mean_option("clp", known) == "; did you mean clip?"
    assert did_you_mean_option("--", known) == ""
    assert helps(Sample)["rate"] == "how fast"


def test_files_that_share_their_ending_alone_are_not_alike() -> None:
    files = ["report.jsonl", "metrics.jsonl"]
    assert did_you_mean("nothing.jsonl", files) == ""
    assert did_you_mean("metric.jsonl", files) == "; did you mean metrics.jsonl?"
    assert "layers.0.q_proj" in did_you_mean("layers.0.q_prj", ["layers.0.q_proj"])


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("seed", -1, "seed is -1, but must be at least 0"),
        ("seed", "-1", "seed is -1, but must be at least 0"),
        ("seed", str(2**63), "must be below 2^63"),
        ("count", 1e30, "must be below 2^63"),
        ("limit", -(2**63), "must be below 2^63"),
    ],
)
def test_a_number_out_of_range_is_named(key: str, value: Any, why: str) -> None:
    with pytest.raises(UsageError, match=re.escape(why)):
        from_mapping(Sample, {"name": "x", key: value}, "sample")
