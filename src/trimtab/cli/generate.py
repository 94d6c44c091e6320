"""trimtab generate: answers to prompts, with one or several adapters."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from trimtab.cli.answering import ANY_BASE, BASE, check_sampling, load_adapters, named_adapters
from trimtab.cli.common import ModelFlags, Screen, load_model, need_tokenizer, options
from trimtab.errors import UsageError, did_you_mean
from trimtab.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateFlags(ModelFlags):
    prompt: tuple[str, ...] = option((), "prompts to answer", positional=True)
    adapter: tuple[str, ...] = option((), "adapter folders, each as DIR or NAME=DIR")
    any_base: bool = option(False, ANY_BASE)
    use: tuple[str, ...] = option((), "names of the adapters to answer with; by default each given one (base: none)")
    rows: str | None = option(
        None,
        'JSONL file of {"prompt": ..., "adapter": NAME or null}; all answered in one batch, each with its own adapter',
    )
    raw: bool = option(False, "give the prompt to the model as it is, without its chat template")
    max_new_tokens: int = option(128, "longest answer in tokens")
    temperature: float = option(0.0, "0 takes the likeliest token; above 0 samples")
    batch_size: int | None = option(None, "prompts to one batch, for where memory is short; by default all at once")
    seed: int = option(0, "of sampling", least=0)


def run(name: str, summary: str, argv: list[str]) -> None:
    """Answer every prompt with every adapter asked for, or a file of rows each with its own."""
    flags, output = options(GenerateFlags, name, summary, argv)
    check_sampling(flags.max_new_tokens, flags.temperature, flags.batch_size)
    adapters = named_adapters(flags.adapter)
    requests = _requests(flags, list(adapters))
    screen = Screen(output)
    loaded = load_model(flags, screen)
    need_tokenizer(loaded)
    if not flags.raw and not loaded.tokenizer.chat_template:
        raise UsageError(f"{flags.model} has no chat template: give --raw to continue the prompts as they are")
    load_adapters(loaded.model, adapters, screen, any_base=flags.any_base)
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
            batch_size=flags.batch_size or len(prompts),
            temperature=flags.temperature,
            seed=flags.seed,
            progress=update,
            around=around if trimtab.adapters(loaded.model) else None,
        )
