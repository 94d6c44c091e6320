"""Shared by every test: this folder is importable, for the tiny models in toys.py."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from trimtab.deltas import core_bases


@pytest.fixture(scope="session", autouse=True)
def own_svd_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Decompositions of the tests' weights go to a folder of their own; models may come from the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_bases, "cache_root", lambda cache=None: cache or folder)
        yield folder


@pytest.fixture(autouse=True)
def log_level_unset() -> None:
    """The command line sets how much is told, fixtures of whole modules too: a test starts as if none had."""
    logging.getLogger("trimtab").setLevel(logging.NOTSET)
