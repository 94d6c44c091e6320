"""trimtab demo: the main job on an embedded model, start to finish."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli.common import ModelFlags, Screen, load_model, need_tokenizer, new_run, options, program
from trimtab.cli.data import encode_for_training, encode_rows, read_rows
from trimtab.cli.recipe import Recipe, build_recipe, resolved, write_config
from trimtab.cli.training import attach_recipe, fit_run
from trimtab.files import write_whole
from trimtab.options import option
from trimtab.report.wording import counted

if TYPE_CHECKING:
    from trimtab.adapt.adapter import Adapter
    from trimtab.adapt.merge import MergeAudit
    from trimtab.data.encode import Example
    from trimtab.tasks.likelihood import ChoiceResult
    from trimtab.tasks.naming import NamingScore, NamingTask

MAX_LENGTH = 512
SIDES = ("train", "test", "evaluation")
BATCH = 8  # functions to a step
LONGEST = 250  # characters of a function to train on: the longer ones teach no more in the same time
EVALUATED = 32  # of the test functions, for the loss while training: enough to see it fall
ANSWER_TOKENS = 16  # names of the standard library take 4 tokens in the median, 12 at most nearly always


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoFlags(ModelFlags):
    model: str = option("smollm2-135m", "short name (trimtab list models), folder, GGUF file or hub id")
    code: str | None = option(None, "folder of Python files to learn from; by default the standard library")
    functions: int = option(480, "functions to train on")
    test_functions: int = option(100, "functions of other modules to test on")
    rank: int = option(16, "rank of the LoRA")
    lr: float = option(3e-3, "learning rate, falling linearly to 0")
    seed: int = option(0, "of the split, the adapter's start and the order of the data", least=0)
    out: str | None = option(None, "the run's folder; by default runs/demo-N")


@dataclasses.dataclass(frozen=True)
class Skill:
    """What a model can do at one moment: the task, and general knowledge."""

    answers: list[str]
    naming: NamingScore
    knowledge: ChoiceResult


def run(name: str, summary: str, argv: list[str]) -> None:
    """Test, train, test again, merge, audit, report."""
    flags, output = options(DemoFlags, name, summary, argv)
    screen = Screen(output)
    started = time.perf_counter()
    task = _build(flags, screen)
    folder = new_run(flags.out, "demo")
    screen.say(
        "Teach a small language model to name Python functions, and see what it gains and forgets.", style="bold"
    )
    screen.say(
        f"data: {counted(len(task.train), 'function')} to learn from, {len(task.test)} of other modules to test on "
        f"({len(task.modules_train)} and {counted(len(task.modules_test), 'module')})"
    )
    loaded = load_model(flags, screen)
    need_tokenizer(loaded)
    from trimtab.train.loop import peak_rss_bytes

    system = takes_system(loaded.tokenizer)
    recipe = resolved(_recipe(flags, task, folder, system), loaded)
    write_config(recipe, folder)
    examples, evaluation = _encode(recipe, loaded.tokenizer, folder, screen)
    before = measure(loaded, task, system, screen, "before")
    adapter, result = _train(recipe, loaded, examples, evaluation, folder, screen)
    after = measure(loaded, task, system, screen, "after")
    audit, merged = _deliver(adapter, loaded, folder, screen)
    result |= gains(task, before, after)
    result |= {"merged": str(merged), "audit": str(folder / "audit.json"), "training_seconds": result["seconds"]}
    result |= {"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_rss_bytes()}
    result |= {"run": str(folder), "report": str(folder / "report.html")}
    _write(folder, task, before, after, audit, result, screen)
    _tell(task, before, after, result, flags, screen)
    screen.result(result)


def _build(flags: DemoFlags, screen: Screen) -> NamingTask:
    from trimtab.tasks import naming

    code = Path(flags.code) if flags.code else None
    with screen.progress("reading code", "files") as update:
        return naming.build(
            code,
            train=flags.functions,
            test=flags.test_functions,
            seed=flags.seed,
            longest=LONGEST,
            progress=update,
        )


def takes_system(tokenizer: Any) -> bool:
    """Whether a chat template has a system turn; some refuse one."""
    try:
        tokenizer.apply_chat_template([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
    except Exception:  # a template raises what it likes
        return False
    return True


def _recipe(flags: DemoFlags, task: NamingTask, folder: Path, system: bool) -> Recipe:
    """The run as a recipe that `trimtab train --config` takes, with its data beside it."""
    from trimtab.tasks import naming

    for side, functions in zip(SIDES, (task.train, task.test, task.test[:EVALUATED]), strict=True):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in naming.rows(functions, system))
        write_whole(folder / "data" / f"{side}.jsonl", lines)
    flat = {
        "model": flags.model,
        "dtype": flags.dtype,
        "threads": flags.threads,
        "trust_remote_code": flags.trust_remote_code,
        "data": str(folder / "data" / "train.jsonl"),
        "eval_data": str(folder / "data" / "evaluation.jsonl"),
        "eval_every": max(1, math.ceil(flags.functions / BATCH) // 2),
        "max_length": MAX_LENGTH,
        "method": "lora",
        "rank": flags.rank,
        "alpha": 2.0 * flags.rank,
        "lr": flags.lr,
        "schedule": "linear",
        "batch_size": min(BATCH, flags.functions),
        "seed": flags.seed,
        "out": str(folder),
    }
    return build_recipe(flat, "demo")


def measure(loaded: Any, task: NamingTask, system: bool, screen: Screen, when: str) -> Skill:
    """Name the test functions and answer the knowledge questions."""
    from trimtab.tasks import naming
    from trimtab.tasks.generate import generate
    from trimtab.tasks.knowledge import questions
    from trimtab.tasks.likelihood import choice_scores

    prompts = [function.turns(system) for function in task.test]
    with screen.progress(f"naming functions {when}", "functions") as update:
        answers = generate(
            loaded.model, loaded.tokenizer, prompts, max_new_tokens=ANSWER_TOKENS, batch_size=20, progress=update
        )
    with screen.progress(f"answering questions {when}", "questions") as update:
        knowledge = choice_scores(loaded.model, loaded.tokenizer, questions(), progress=update)
    score = naming.score(answers, task.test)
    screen.say(
        f"{when} training: subtoken F1 {score.subtoken_f1:.3f}, exact match {score.exact_match:.1%}, "
        f"knowledge {knowledge.accuracy:.1%} of {len(knowledge.correct)} questions"
    )
    return Skill(answers, score, knowledge)


def _encode(recipe: Recipe, tokenizer: Any, folder: Path, screen: Screen) -> tuple[list[Example], list[Example]]:
    """The examples for training, checked as `trimtab train` checks its data, and those for evaluation."""
    train, test, evaluation = (read_rows(str(folder / "data" / f"{side}.jsonl"), screen) for side in SIDES)
    limit = recipe.data.max_length
    # Against all the test functions: the evaluation while training has only some of them.
    examples = encode_for_training(train, tokenizer, limit, test, screen)
    return examples, encode_rows(evaluation, tokenizer, limit, screen)


def _train(
    recipe: Recipe, loaded: Any, examples: list[Example], evaluation: list[Example], folder: Path, screen: Screen
) -> tuple[Adapter, dict[str, Any]]:
    adapter = attach_recipe(recipe, loaded.model, screen)
    try:
        result = fit_run(recipe, adapter, loaded.tokenizer, examples, evaluation, folder, screen, [])
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"{stop}: it trains to the end, but measures nothing before and after") from stop
    screen.say(f"trained {result['trainable_parameters']:,} parameters in {result['seconds']:.0f} s")
    return adapter, result


def _deliver(adapter: Adapter, loaded: Any, folder: Path, screen: Screen) -> tuple[MergeAudit, Path]:
    import trimtab

    with screen.progress("merging and auditing"):
        audit = trimtab.merge(adapter, tokenizer=loaded.tokenizer)
    screen.say(audit.summary())
    with screen.progress("writing the merged model"):
        return audit, trimtab.save_merged(loaded.model, folder / "merged", tokenizer=loaded.tokenizer)


def gains(task: NamingTask, before: Skill, after: Skill) -> dict[str, Any]:
    """Before, after, 95 % bootstrap intervals, and what chance would give.

    Functions of one module are alike, so their intervals resample modules.
    """
    from trimtab.tasks.knowledge import questions
    from trimtab.tasks.statistics import bootstrap, paired_bootstrap

    chance, modules = task.chance(), [function.module for function in task.test]
    found: dict[str, Any] = {}
    asked = [question.question for question in questions()]
    rows: Sequence[tuple[str, Any, Any, float, str, list[str]]] = (
        ("subtoken_f1", before.naming.f1, after.naming.f1, chance.subtoken_f1, "whole modules", modules),
        ("exact_match", before.naming.exact, after.naming.exact, chance.exact_match, "whole modules", modules),
        ("knowledge", before.knowledge.correct, after.knowledge.correct, before.knowledge.chance, "questions", asked),
    )
    for name, old, new, null, unit, groups in rows:
        ends = {key: bootstrap(values, groups=groups) for key, values in (("before", old), ("after", new))}
        change = paired_bootstrap(old, new, groups=groups)
        found[name] = {
            "before": sum(old) / len(old),
            "after": sum(new) / len(new),
            "interval": [ends["after"].low, ends["after"].high],
            "interval_before": [ends["before"].low, ends["before"].high],
            "interval_after": [ends["after"].low, ends["after"].high],
            "interval_of_change": [change.low, change.high],
            "resampled": unit,
            "resampled_number": len(set(groups)),
            "chance": null,
            "items": len(new),
        }
    return found


def _write(
    folder: Path,
    task: NamingTask,
    before: Skill,
    after: Skill,
    audit: MergeAudit,
    result: dict[str, Any],
    screen: Screen,
) -> None:
    from trimtab.report.page import write_report
    from trimtab.report.record import write_audit, write_result, write_samples

    samples = [
        {"prompt": f.code, "expected": f.name, "before": old, "after": new}
        for f, old, new in zip(task.test, before.answers, after.answers, strict=True)
    ]
    write_samples(folder, samples)
    write_audit(folder, audit)
    write_result(folder, result)
    with screen.progress("drawing the report"):
        write_report(folder)


def _tell(
    task: NamingTask, before: Skill, after: Skill, result: dict[str, Any], flags: DemoFlags, screen: Screen
) -> None:
    """The figures, a handful of predictions, and what to do next."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", title=None)
    for column in ("held-out measure", "before", "after", "95% interval of after", "chance"):
        table.add_column(column, justify="left" if column.startswith("held") else "right")
    for name in ("subtoken_f1", "exact_match", "knowledge"):
        row = result[name]
        low, high = row["interval_after"]
        table.add_row(
            f"{name.replace('_', ' ')} ({row['items']})", f"{row['before']:.3f}", f"{row['after']:.3f}",
            f"{low:.3f} to {high:.3f}", f"{row['chance']:.3f}",
        )  # fmt: skip
    if not (screen.output.quiet and screen.output.json):
        screen.console.print(table)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column, width in (("its author's name", 22), ("after", 22), ("before", 30)):
        shown.add_column(column, overflow="ellipsis", no_wrap=True, width=width)
    for function, old, new in list(zip(task.test, before.answers, after.answers, strict=True))[:6]:
        shown.add_row(function.name, new.replace("\n", " "), old.replace("\n", " "))
    if not screen.output.quiet:
        screen.say()
        screen.console.print(shown)
    adapter, model, call = shlex.quote(result["adapter"]), shlex.quote(flags.model), program()
    screen.outcome(
        f"\nreport:       {result['report']} (open it in a browser)\n"
        f"adapter:      {result['adapter']}\nmerged model: {result['merged']}\n"
        f"{result['seconds']:.0f} s in all, peak memory {result['peak_rss_bytes'] / 2**30:.2f} GiB"
    )
    screen.say(
        "\nnext:\n"
        f"  {call} chat --model {model} --adapter naming={adapter}\n"
        f"  {call} data inspect YOUR_FILE.jsonl --model {model}\n"
        f"  {call} train --model {model} --data YOUR_FILE.jsonl"
    )
