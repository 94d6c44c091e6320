"""trimtab chat: a conversation in the terminal, answers streamed, adapters switched by name."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from trimtab.cli.answering import ANY_BASE, BASE, check_sampling, load_adapters, named_adapters
from trimtab.cli.common import ModelFlags, Screen, load_model, options
from trimtab.errors import TrimtabError, UsageError, did_you_mean
from trimtab.options import option

COMMANDS = """/use NAME   answer with another adapter (/use base: none)
/reset      forget the conversation
/help       this
/quit       leave (or Ctrl-D); Ctrl-C stops an answer"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFlags(ModelFlags):
    adapter: tuple[str, ...] = option((), "adapter folders, each as DIR or NAME=DIR; the first one answers")
    any_base: bool = option(False, ANY_BASE)
    system: str | None = option(None, "the system message")
    max_new_tokens: int = option(512, "longest answer in tokens")
    temperature: float = option(0.0, "0 takes the likeliest token; above 0 samples")


def run(name: str, summary: str, argv: list[str]) -> None:
    """Read a line, answer it, until the end of the input."""
    flags, output = options(ChatFlags, name, summary, argv, notes=COMMANDS)
    if output.json:
        raise UsageError("chat has no --json: use trimtab generate in scripts")
    check_sampling(flags.max_new_tokens, flags.temperature)
    adapters = named_adapters(flags.adapter)
    screen = Screen(output)
    loaded = load_model(flags, screen)
    if loaded.tokenizer is None or not loaded.tokenizer.chat_template:
        raise UsageError(f"{flags.model} has no chat template: use trimtab generate --raw")
    load_adapters(loaded.model, adapters, screen, any_base=flags.any_base)
    names = [*adapters, BASE]
    start = [{"role": "system", "content": flags.system}] if flags.system else []
    turns, used = list(start), names[0]
    _use(loaded.model, used)
    screen.note(f"adapters: {', '.join(names)}; answering with {used}. /help for commands.")
    while (line := _read(f"{used}> ")) is not None:
        word, _, rest = line.strip().partition(" ")
        if not word:
            continue
        if word == "/quit":
            break
        if word == "/use" and rest in names:
            used = rest
            _use(loaded.model, used)
        elif word == "/use":
            screen.say(f"no adapter '{rest}'{did_you_mean(rest, names)} (there are: {', '.join(names)})")
        elif word == "/reset":
            turns = list(start)
        elif word == "/help":
            screen.say(COMMANDS)
        elif word.startswith("/"):
            known = [line.split()[0] for line in COMMANDS.splitlines()]
            screen.say(f"unknown command {word}{did_you_mean(word, known)} (/help lists them)")
        else:
            turns = _turn(loaded, [*turns, {"role": "user", "content": line}], flags, screen)


def _read(prompt: str) -> str | None:
    try:
        return input(prompt if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _use(model: Any, name: str) -> None:
    import trimtab

    if trimtab.adapters(model):
        trimtab.switch(model, None if name == BASE else name)


def _turn(loaded: Any, turns: list[dict[str, str]], flags: ChatFlags, screen: Screen) -> list[dict[str, str]]:
    """Stream the answer to the last turn. The conversation with it, or without that turn when it was stopped."""
    from trimtab.tasks.generate import stream

    parts: list[str] = []
    try:
        for text in stream(
            loaded.model, loaded.tokenizer, turns, max_new_tokens=flags.max_new_tokens, temperature=flags.temperature
        ):
            parts.append(text)
            print(text, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
        return turns[:-1]
    except TrimtabError as error:
        screen.warn(str(error))
        return turns[:-1]
    return [*turns, {"role": "assistant", "content": "".join(parts)}]
