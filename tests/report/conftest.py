"""A finished run, written once for each test that may change it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load_run_folders() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_run_folders", Path(__file__).with_name("run_folders.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def folders() -> ModuleType:
    """The maker of run folders, loaded by path so that it needs no package of tests."""
    return _load_run_folders()


@pytest.fixture
def run(tmp_path: Path, folders: ModuleType) -> Path:
    path = tmp_path / "demo"
    folders.write_run(path)
    return path
