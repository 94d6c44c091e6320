"""How a user names modules."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import UsageError
from trimtab.patterns import first_match, matches

part = st.from_regex(r"[a-z0-9_]{1,6}", fullmatch=True)
path = st.lists(part, min_size=1, max_size=5).map(".".join)


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "q_proj", True),
        ("q_proj", "model.layers.0.xq_proj", False),
        ("q_proj", "q_proj.inner", False),
        ("0.q_proj", "layers.10.q_proj", False),
        ("*.layers.[0-3].*", "model.layers.2.q_proj", True),
        ("*.layers.[0-3].*", "model.layers.12.q_proj", False),
        ("[qv]_proj", "a.v_proj", True),
        ("?_proj", "a.k_proj", True),
        (r"re:.*\.[qv]_proj", "a.v_proj", True),
        (r"re:[qv]_proj", "a.v_proj", False),
        ("re:", "", True),
        ("a.b", "axb", False),
        ("a+", "aa", False),
    ],
)
def test_a_pattern_is_the_end_of_a_path_a_glob_or_an_expression(pattern: str, name: str, found: bool) -> None:
    assert matches(pattern, name) is found


@given(path)
def test_a_path_names_itself_and_so_does_each_of_its_ends(name: str) -> None:
    ends = [name.split(".", i)[-1] for i in range(name.count(".") + 1)]
    assert all(matches(end, name) for end in ends)
    assert matches(f"re:{re.escape(name)}", name)


@given(path, path)
def test_a_plain_name_matches_exactly_what_ends_in_it_from_a_dot_on(pattern: str, name: str) -> None:
    assert matches(pattern, name) == (f".{name}".endswith(f".{pattern}"))


@given(st.dictionaries(part, st.integers(), max_size=4), path)
def test_the_first_pattern_that_matches_counts(patterns: dict[str, int], name: str) -> None:
    wanted = next((value for key, value in patterns.items() if name.split(".")[-1] == key), None)
    assert first_match(patterns, name, None) == wanted


def test_a_broken_expression_is_refused_with_its_reason() -> None:
    with pytest.raises(UsageError, match=r"'re:\(' is not a regular expression: missing \)"):
        matches("re:(", "x")
