"""Rows read, encoded and checked with signs of life: what train, demo and data inspect share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli.common import Screen
from trimtab.data.layout import KNOWN
from trimtab.errors import UsageError

if TYPE_CHECKING:
    from trimtab.data.encode import Example
    from trimtab.data.inspect import Inspection
    from trimtab.data.read import Source

LAYOUTS = f"layout of the rows: auto, {', '.join(KNOWN)}"
"""The help of every --layout."""


def read_rows(name: str, screen: Screen, **options: Any) -> Source:
    """`trimtab.data.read` of a file with the seconds told, or of a hub data set with the hub's own bars."""
    from trimtab.data.read import read

    if not Path(name).expanduser().exists():
        return read(name, **options)
    with screen.progress(f"reading {Path(name).name}"):
        return read(name, **options)


def encode_rows(source: Source, tokenizer: Any, max_length: int, screen: Screen) -> list[Example]:
    """`trimtab.data.encode` of all rows, in parts, so that a bar can count them."""
    from trimtab.data.encode import CHUNK, encode

    examples: list[Example] = []
    with screen.progress(f"encoding {source.name}", "rows") as update:
        for start in range(0, len(source.rows), CHUNK):
            part = dataclasses.replace(source, rows=source.rows[start : start + CHUNK])
            examples += encode(part, tokenizer, max_length=max_length)
            update(len(examples), len(source.rows))
    return examples


def inspect_rows(
    source: Source, examples: list[Example], tokenizer: Any, max_length: int, against: Source | None, screen: Screen
) -> Inspection:
    """`trimtab.data.inspect` with the seconds told."""
    from trimtab.data.inspect import inspect

    with screen.progress(f"checking {source.name}"):
        return inspect(source, examples, tokenizer, max_length=max_length, against=against)


def encode_for_training(
    source: Source, tokenizer: Any, max_length: int, against: Source | None, screen: Screen
) -> list[Example]:
    """The examples to train on, checked: what is wrong with them stops, what is doubtful is told loudly.

    against: rows that must not be among them. UsageError when nothing could be learned from them.
    """
    examples = encode_rows(source, tokenizer, max_length, screen)
    found = inspect_rows(source, examples, tokenizer, max_length, against, screen)
    for warning in found.warnings:
        screen.warn(warning)
    if found.errors:
        raise UsageError(f"{source.name}: {'; '.join(found.errors)}")
    screen.say(f"{found.tokens:,} tokens, {found.supervised_tokens:,} of them supervised")
    return examples
