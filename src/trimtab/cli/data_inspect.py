"""trimtab data inspect: what training would see in a file, token by token."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli.common import Screen, find_model, load_libraries, options
from trimtab.cli.data import LAYOUTS, encode_rows, inspect_rows, read_rows
from trimtab.errors import UsageError
from trimtab.options import option
from trimtab.report.wording import counted

if TYPE_CHECKING:
    from trimtab.data.inspect import Inspection


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectFlags:
    file: str = option(help="data file or hub data set", positional=True)
    model: str = option(help="the model whose tokenizer and chat template will be used")
    against: str | None = option(None, "evaluation file to look for among the rows")
    layout: str = option("auto", LAYOUTS)
    split: str = option("train", "split of FILE, where that is a hub data set")
    against_split: str = option("train", "split of the evaluation data, where that is a hub data set")
    max_length: int = option(512, "the limit on an example's tokens that training will have")
    limit: int | None = option(None, "look at the first so many rows")
    show: int = option(2, "examples to show token by token")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")


def run(name: str, summary: str, argv: list[str]) -> None:
    """Read, encode, report; exit code 2 when training would refuse the file."""
    flags, output = options(InspectFlags, name, summary, argv)
    screen = Screen(output)
    common: dict[str, Any] = {"layout": flags.layout, "keep_incomplete": True}
    source = read_rows(flags.file, screen, split=flags.split, limit=flags.limit, **common)
    screen.say(source.describe(), style="bold")
    against = read_rows(flags.against, screen, split=flags.against_split, **common) if flags.against else None
    tokenizer = _tokenizer(flags, screen)
    examples = encode_rows(source, tokenizer, flags.max_length, screen)
    found = inspect_rows(source, examples, tokenizer, flags.max_length, against, screen)
    for example in examples[: flags.show]:
        _show(example, tokenizer, screen)
    _figures(found, screen)
    screen.result(found.to_dict())
    if found.errors:
        raise UsageError(f"{Path(flags.file).name} cannot be trained on: {'; '.join(found.errors)}")


def _tokenizer(flags: InspectFlags, screen: Screen) -> Any:
    load_libraries(screen)
    from trimtab.models.embedded import EMBEDDED
    from trimtab.models.load import load_tokenizer

    kind = EMBEDDED[flags.model].kind if flags.model in EMBEDDED else "causal-lm"
    path = find_model(flags.model, screen, trust_remote_code=flags.trust_remote_code, kind=kind)
    with screen.progress(f"loading the tokenizer of {flags.model}"):
        tokenizer = load_tokenizer(path, trust_remote_code=flags.trust_remote_code)
    if tokenizer is None:
        raise UsageError(f"{flags.model} has no tokenizer")
    return tokenizer


def _show(example: Any, tokenizer: Any, screen: Screen) -> None:
    from rich.text import Text

    from trimtab.data.inspect import token_view

    if screen.output.quiet or screen.output.json:
        return
    text = Text()
    colour = screen.console.color_system is not None
    for supervised, run in itertools.groupby(token_view(example, tokenizer), key=lambda token: token[1]):
        tokens = [token for token, _ in run]
        if colour:
            # Two shades in turn, so that the borders between tokens show.
            for index, token in enumerate(tokens):
                shade = "black on green" if index % 2 else "black on bright_green"
                text.append(token, style=shade if supervised else "dim")
        else:
            text.append(f"⟦{'|'.join(tokens)}⟧" if supervised else "".join(tokens))
    legend = "green is supervised" if colour else "⟦…⟧ is supervised"
    screen.console.print(f"\nrow {example.row}: {len(example.input_ids)} tokens ({legend})", style="bold")
    screen.console.print(text)


def _figures(found: Inspection, screen: Screen) -> None:
    screen.outcome(
        f"\n{counted(found.rows, 'row')}, {counted(found.tokens, 'token')}, {found.supervised_tokens:,} of them "
        f"supervised ({found.supervised_share:.1%})\n"
        f"length in tokens: median {found.length_p50}, 95% at most {found.length_p95}, longest {found.length_max}; "
        f"limit {found.max_length}\n"
        f"cut off: {counted(found.truncated, 'row')}, {found.answers_cut} of them in the answer; nothing supervised: "
        f"{found.unsupervised}; no end of turn supervised: {found.open_ended}\n"
        f"duplicates: {found.duplicates}; prompts with several answers: {found.conflicts}"
    )
    if found.overlap is not None:
        overlap = found.overlap
        screen.outcome(
            f"of the {counted(overlap.rows, 'row')} of {overlap.against}, {overlap.same_text:,} stand here "
            f"word for word, {overlap.same_words:,} apart from case and punctuation ({overlap.share:.1%})"
        )
    for warning in found.warnings:
        screen.warn(warning)
