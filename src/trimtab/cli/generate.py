"""trimtab generate: answers to prompts, with one or several adapters."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from trimtab.cli.common import ModelFlags, Screen, load_model, options
from trimtab.errors import UsageError, did_you_mean, problems_to_error
from trimtab.options import option

BASE = "base"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateFlags(ModelFlags):
    prompt: tuple[str, ...] = option((), "prompts to answer", positional=True)
    adapter: tuple[str, ...] = option((), "adapter folders, each as DIR or NAME=DIR")
    use: tuple[str, ...] = option((), "names of the adapters to answer with; by default each given one (base: none)")
    rows: str | None = option(
        None, 'JSONL file of {"prompt": ..., "adapter": NAME or null}; answered together, each with its own adapter'
    )
    raw: bool = option(False, "give the prompt to the model as it is, without its chat template")
    max_new_tokens: int = option(128, "longest answer in tokens")
    temperature: float = option(0.0, "0 takes the likeliest token; above 0 samples")
    batch_size: int = option(16, "prompts to one batch")
    seed: int = option(0, "of sampling")


def run(name: str, summary: str, argv: list[str]) -> None:
    """Answer every prompt with every adapter asked for, or a file of rows each with its own."""
    flags, output = options(GenerateFlags, name, summary, argv)
    check_sampling(flags.max_new_tokens, flags.temperature, flags.batch_size)
    adapters = named_adapters(flags.adapter)
    requests = _requests(flags, list(adapters))
    screen = Screen(output)
    loaded = load_model(flags, screen)
    if loaded.tokenizer is None:
        raise UsageError(f"{flags.model} has no tokenizer, so it cannot read a prompt")
    if not flags.raw and not loaded.tokenizer.chat_template:
        raise UsageError(f"{flags.model} has no chat template: give --raw to continue the prompts as they are")
    load_adapters(loaded.model, adapters)
    answers = _answer(flags, loaded, requests, screen)
    results = [
        {"prompt": prompt, "adapter": used, "answer": answer}
        for (prompt, used), answer in zip(requests, answers, strict=True)
    ]
    for row in results:
        if len(results) > 1:
            screen.say(f"[{row['adapter'] or BASE}] {row['prompt']}", style="bold")
        if not output.json:
            print(row["answer"])  # as it is: the console would take marks and control characters out
    screen.result({"answers": results})


def check_sampling(max_new_tokens: int, temperature: float, batch_size: int = 1) -> None:
    """UsageError for what no answer can be made with, told before the model is loaded."""
    problems = [
        f"{name} is {value}, but must be at least 1"
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size))
        if value < 1
    ]
    if temperature < 0:
        problems.append(f"temperature is {temperature}, but must be at least 0")
    problems_to_error(problems, "generation")


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
    return found


def load_adapters(model: Any, adapters: dict[str, str]) -> None:
    """Put every adapter on the model; the last one stays enabled."""
    import trimtab

    for name, folder in adapters.items():
        trimtab.load(model, folder, name=name)


def _requests(flags: GenerateFlags, names: list[str]) -> list[tuple[str, str | None]]:
    """(prompt, adapter) of every answer wanted."""
    if bool(flags.prompt) == bool(flags.rows):
        raise UsageError("give either prompts or --rows FILE")
    if flags.rows and flags.use:
        raise UsageError("--rows says which adapter each row uses: leave --use out")
    if flags.rows:
        return [
            _row(line, f"{flags.rows} line {n}", names) for n, line in enumerate(_lines(flags.rows), 1) if line.strip()
        ]
    for used in flags.use:
        _check(used, names, "--use")
    wanted = flags.use or tuple(names) or (BASE,)
    return [(prompt, None if used == BASE else used) for prompt in flags.prompt for used in wanted]


def _lines(file: str) -> list[str]:
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text (byte {error.start})") from error
    if not any(line.strip() for line in lines):
        raise UsageError(f"{file} is empty")
    return lines


def _row(line: str, where: str, names: list[str]) -> tuple[str, str | None]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise UsageError(f'{where} must be an object with a "prompt" and an "adapter" (a name, or null for the base)')
    used = row.get("adapter")
    if used is not None:
        _check(used, names, where)
    return row["prompt"], None if used == BASE else used


def _check(used: Any, names: list[str], where: str) -> None:
    if used not in (*names, BASE):
        known = ", ".join([*names, BASE])
        raise UsageError(f"{where}: no adapter '{used}'{did_you_mean(str(used), names)} (there are: {known})")


def _answer(flags: GenerateFlags, loaded: Any, requests: list[tuple[str, str | None]], screen: Screen) -> list[str]:
    import trimtab
    from trimtab.tasks.generate import generate

    prompts: list[Any] = [p if flags.raw else [{"role": "user", "content": p}] for p, _ in requests]
    used = [name for _, name in requests]

    def around(batch: list[int]) -> Any:
        return trimtab.rows(loaded.model, [used[i] for i in batch])

    with screen.progress("answering", "prompts") as update:
        return generate(
            loaded.model,
            loaded.tokenizer,
            prompts,
            max_new_tokens=flags.max_new_tokens,
            batch_size=flags.batch_size,
            temperature=flags.temperature,
            seed=flags.seed,
            progress=update,
            around=around if trimtab.adapters(loaded.model) else None,
        )
