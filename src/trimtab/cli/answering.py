"""What the commands that answer prompts share: which adapters answer, and what no answer can be made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.cli.common import Screen
from trimtab.errors import UsageError, problems_to_error
from trimtab.tasks.nlu import refuse_classifiers

BASE = "base"
"""The name of the model itself, without an adapter."""


def check_sampling(max_new_tokens: int, temperature: float, batch_size: int | None = None) -> None:
    """UsageError for what no answer can be made with, told before the model is loaded."""
    problems = [
        f"{name} is {value}, but must be at least 1"
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size))
        if value is not None and value < 1
    ]
    if temperature < 0:
        problems.append(f"temperature is {temperature}, but must be at least 0")
    problems_to_error(problems, "generation")


ANY_BASE = "take an adapter though it was trained on other weights than the model's"


def named_adapters(given: tuple[str, ...]) -> dict[str, str]:
    """Folder by name, from DIR (named after the folder) or NAME=DIR. UsageError for a name given twice."""
    found: dict[str, str] = {}
    for item in given:
        name, equals, folder = (item, "", "") if Path(item).is_dir() else item.partition("=")
        if not equals:
            path = Path(item)
            name, folder = path.name if path.name != "adapter" else path.absolute().parent.name, item
        if name in found or name == BASE:
            raise UsageError(
                f"adapter name '{name}' is {'taken: it is the model itself' if name == BASE else 'given twice'}"
            )
        if not Path(folder).is_dir():
            raise UsageError(f"adapter '{name}': there is no folder {folder}")
        found[name] = folder
    refuse_classifiers(found)
    return found


def load_adapters(model: Any, adapters: dict[str, str], screen: Screen, *, any_base: bool = False) -> None:
    """Put every adapter on the model; the last one stays enabled."""
    import trimtab

    with screen.progress("loading adapters", "adapters") as update:
        for number, (name, folder) in enumerate(adapters.items(), 1):
            trimtab.load(model, folder, name=name, any_base=any_base)
            update(number, len(adapters))
