"""The commands besides train, each as a user meets it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from tiny_command_line import environment, rows, write_rows

SHORT = ("--max-new-tokens", 6, "--threads", 1, "--dtype", "float32")


def answers(done):
    assert done.code == 0, done.err
    return [row["answer"] for row in done.json["answers"]]


# --- data inspect ---


def test_inspecting_shows_tokens_and_figures(trimtab, model, data):
    done = trimtab("data", "inspect", data / "train.jsonl", "--model", model, "--show", 1)
    assert done.code == 0
    assert "train.jsonl: 16 rows, prompt-completion layout" in done.out
    assert "⟦I|t| |i|s| |0|.|<|end|>⟧" in done.out
    assert "row 2:" not in done.out
    assert re.search(r"16 rows, \d+ tokens, \d+ of them supervised \(\d+\.\d%\)", done.out)


def test_inspecting_finds_contamination(trimtab, model, data, tmp_path):
    known = write_rows(tmp_path / "test.jsonl", [*rows(0, 2), {"prompt": "what is 3 plus 3", "completion": "6"}])
    done = trimtab("data", "inspect", data / "train.jsonl", "--model", model, "--against", known)
    assert "of the 3 rows of test.jsonl, 2 stand here word for word, 3 apart from case and punctuation" in done.out
    assert "warning: contamination: 3 of the 3 rows" in done.err


def test_inspecting_as_json_is_one_object(trimtab, model, data):
    done = trimtab(
        "data", "inspect", data / "train.jsonl", "--model", model, "--json", "--against", data / "eval.jsonl"
    )
    found = done.json
    assert found["rows"] == 16
    assert found["overlap"]["same_words"] == 0
    assert found["errors"] == []


def test_inspecting_what_training_refuses_exits_2_and_still_shows_it(trimtab, model, tmp_path):
    broken = write_rows(tmp_path / "rows.jsonl", [*rows(0, 2), {"prompt": "unanswered", "completion": ""}])
    done = trimtab("data", "inspect", broken, "--model", model, "--json")
    assert done.code == 2
    assert done.json["incomplete"] == [3]
    assert "cannot be trained on: 1 row without an answer (3)" in done.err


def test_a_split_of_a_hub_data_set_can_be_named(trimtab, model, monkeypatch):
    asked = []

    class Fake:
        @staticmethod
        def load_dataset(name, split):
            asked.append((name, split))
            return rows(0, 4)

    monkeypatch.setitem(sys.modules, "datasets", Fake())
    flags = ["--split", "validation", "--against", "some/tests", "--against-split", "test"]
    done = trimtab("data", "inspect", "some/rows", "--model", model, *flags)
    assert asked == [("some/rows", "validation"), ("some/tests", "test")]
    assert "hub data set, split validation" in done.out


# --- generate ---


def test_each_adapter_gives_its_own_answer(trimtab, model, adapters):
    named = ["--adapter", f"sql={adapters / 'sql'}", "--adapter", f"poet={adapters / 'poet'}"]
    both = trimtab("generate", "--model", model, *named, *SHORT, "--json", "hello")
    assert [row["adapter"] for row in both.json["answers"]] == ["sql", "poet"]
    one = trimtab("generate", "--model", model, *named, *SHORT, "--json", "hello", "--use", "poet", "--use", "base")
    assert answers(one)[0] == answers(both)[1]
    base = trimtab("generate", "--model", model, *SHORT, "--json", "hello")
    assert answers(one)[1] == answers(base)[0]
    assert len({*answers(both), *answers(base)}) == 3


def test_rows_of_one_batch_equal_each_alone(trimtab, model, adapters, tmp_path):
    named = ["--adapter", f"sql={adapters / 'sql'}", "--adapter", f"poet={adapters / 'poet'}"]
    wanted = [("hello", "sql"), ("a longer prompt than that", None), ("hello", "poet"), ("hello\u2028you", "sql")]
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": p, "adapter": a}, ensure_ascii=False) for p, a in wanted]
    file.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    together = trimtab("generate", "--model", model, *named, *SHORT, "--rows", file, "--json")
    assert [(row["prompt"], row["adapter"]) for row in together.json["answers"]] == wanted
    alone = [
        answers(trimtab("generate", "--model", model, *named, *SHORT, "--json", prompt, "--use", name or "base"))[0]
        for prompt, name in wanted
    ]
    assert answers(together) == alone


@pytest.mark.parametrize(("flags", "sizes"), [((), [20]), (("--batch-size", 8), [8, 8, 4])], ids=["default", "split"])
def test_a_file_of_rows_is_one_batch_unless_memory_is_short(
    trimtab, model, adapters, tmp_path, monkeypatch, flags, sizes
):
    from trimtab.tasks import generate

    batch, seen = generate._batch, []

    def counted(model, rows, *rest):
        seen.append(len(rows))
        return batch(model, rows, *rest)

    monkeypatch.setattr(generate, "_batch", counted)
    lines = [{"prompt": f"prompt {i}", "adapter": (None, "sql", "poet")[i % 3]} for i in range(20)]
    named = ["--adapter", adapters / "sql", "--adapter", adapters / "poet"]
    file = write_rows(tmp_path / "rows.jsonl", lines)
    done = trimtab("generate", "--model", model, *named, *SHORT, "--rows", file, "--json", *flags)
    assert [row["prompt"] for row in done.json["answers"]] == [line["prompt"] for line in lines]
    assert seen == sizes


def test_one_answer_alone_stands_on_standard_output(trimtab, model):
    done = trimtab("generate", "--model", model, *SHORT, "hello")
    told = trimtab("generate", "--model", model, *SHORT, "hello", "--json").json["answers"][0]["answer"]
    assert done.out == told + "\n"
    assert "parameters in float32" in done.err


def test_sampling_is_settled_by_its_seed(trimtab, model):
    flags = ["generate", "--model", model, *SHORT, "--temperature", 1, "--json", "hello"]
    first, second, other = (answers(trimtab(*flags, "--seed", seed)) for seed in (1, 1, 2))
    assert first == second != other


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "give either prompts or --rows FILE"),
        (["hello", "--use", "poem"], "--use: no adapter 'poem'"),
        (["hello", "--adapter", "poet=nowhere"], "adapter 'poet': there is no folder nowhere"),
        (["hello", "--adapter", "base=."], "adapter name 'base' is taken"),
        (["hello", "--adapter", "a=.", "--adapter", "a=."], "adapter name 'a' is given twice"),
        (["hello", "--max-new-tokens", "0"], "max_new_tokens is 0, but must be at least 1"),
        (["hello", "--batch-size", "0"], "batch_size is 0, but must be at least 1"),
        (["hello", "--temperature", "-1"], "temperature is -1.0, but must be at least 0"),
        (["--rows", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["--rows", "nowhere.jsonl", "--use", "base"], "leave --use out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_request_is_told_before_the_model_is_loaded(trimtab, flags, told):
    done = trimtab("generate", "--model", "no-such-model", *flags)
    assert done.code == 2
    assert told in done.err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 1 is not JSON"),
        ('{"text": "x"}', 'must be an object with a "prompt"'),
        ('{"prompt": "x", "adapter": "sqk"}', "no adapter 'sqk'; did you mean sql"),
        ("", "is empty"),
    ],
)
def test_a_wrong_row_is_told(trimtab, adapters, tmp_path, line, told):
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    done = trimtab(
        "generate", "--model", "m", "--adapter", f"sql={adapters / 'sql'}", "--rows", tmp_path / "rows.jsonl"
    )
    assert done.code == 2
    assert told in done.err


def test_an_adapter_of_another_model_is_told_with_the_first_misfit(trimtab, model, adapters, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    foreign = tmp_path / "foreign"
    shutil.copytree(adapters / "sql", foreign)
    tensors = load_file(foreign / "adapter_model.safetensors")
    wider = {k: torch.cat([t, t], dim=1) if ".lora_A." in k else t for k, t in tensors.items()}
    save_file(wider, foreign / "adapter_model.safetensors")
    done = trimtab("generate", "--model", model, "--adapter", foreign, *SHORT, "hello")
    assert done.code == 2
    assert re.search(r"layers\.0\.\S*_proj", done.err)
    assert "64" in done.err


# --- chat ---


def test_a_conversation_is_driven_by_lines(trimtab, model, adapters, monkeypatch):
    lines = "hello\n/use poet\nhello\n/use pot\n/nope\n/reset\n/use base\n\nhello\n/help\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    done = trimtab(
        "chat", "--model", model, "--adapter", f"sql={adapters / 'sql'}", "--adapter", f"poet={adapters / 'poet'}",
        *SHORT,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "adapters: sql, poet, base; answering with sql" in done.err
    assert "no adapter 'pot'; did you mean poet? (there are: sql, poet, base)" in done.out
    assert "unknown command /nope" in done.out
    assert "/reset      forget the conversation" in done.out
    named = ["--adapter", f"sql={adapters / 'sql'}"]
    first = answers(trimtab("generate", "--model", model, *named, *SHORT, "--json", "hello"))[0]
    fresh = answers(trimtab("generate", "--model", model, *SHORT, "--json", "hello"))[0]
    assert done.out.startswith(first)
    assert fresh in done.out  # after /reset and /use base: the same question without a past


def test_the_past_of_a_conversation_counts_until_it_is_reset(trimtab, model, monkeypatch):
    def said(lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return trimtab("chat", "--model", model, *SHORT).out

    once, twice, anew = said("hello\n"), said("hello\nhello\n"), said("hello\n/reset\nhello\n")
    assert anew == once * 2
    assert twice != anew


def test_chat_ends_at_quit_and_has_no_json(trimtab, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\nhello\n"))
    assert trimtab("chat", "--model", model, *SHORT).out == ""
    done = trimtab("chat", "--model", model, "--json")
    assert done.code == 2
    assert "use trimtab generate in scripts" in done.err


# --- merge and export ---


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_merged_folder_is_a_plain_model(trimtab, model, adapters, tmp_path, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import trimtab as package

    done = trimtab(
        "merge", "--model", model, "--adapter", adapters / "sql", "--out", tmp_path / "merged", "--dtype", dtype,
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    audit = json.loads((tmp_path / "merged" / "audit.json").read_text())
    assert done.json == {"merged": str(tmp_path / "merged"), "audit": audit}
    assert len(audit["layers"]) == 14
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    assert not [name for name in merged.state_dict() if "deltas" in name]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    base = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        plain = base(ids).logits
        package.load(base, adapters / "sql")
        wanted = base(ids).logits
        difference = (merged(ids).logits.float() - wanted).abs().max()
    # fp32 rounding of sums in another order; bf16 keeps 8 bits of every weight and activation.
    assert difference < (1e-4 if dtype == "auto" else 0.1) * wanted.abs().max()
    assert difference < 0.2 * (wanted - plain).abs().max()


def test_merging_keeps_the_dtype_of_the_checkpoint(trimtab, model, adapters, tmp_path):
    import shutil

    from transformers import AutoModelForCausalLM

    half = tmp_path / "half"
    shutil.copytree(model, half)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(half)
    trimtab("merge", "--model", half, "--adapter", adapters / "sql", "--out", tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_a_merge_does_not_replace_what_is_there(trimtab, model, adapters):
    done = trimtab("merge", "--model", "no-such-model", "--adapter", adapters / "sql", "--out", model)
    assert done.code == 2
    assert f"{model} exists and is not empty" in done.err


def test_an_export_does_not_replace_what_is_there(trimtab, adapters):
    before = (adapters / "sql" / "adapter_model.safetensors").read_bytes()
    done = trimtab("export", "--model", "no-such-model", "--adapter", adapters / "sql", "--out", adapters / "sql")
    assert done.code == 2
    assert f"{adapters / 'sql'} exists and is not empty" in done.err
    assert (adapters / "sql" / "adapter_model.safetensors").read_bytes() == before


def test_quiet_keeps_where_the_result_went(trimtab, model, adapters, tmp_path):
    fixed = ["--model", model, "--adapter", adapters / "sql", "--quiet"]
    assert trimtab("merge", *fixed, "--out", tmp_path / "merged").out.endswith(
        f"merged model: {tmp_path / 'merged'} (audit in {tmp_path / 'merged' / 'audit.json'})\n"
    )
    assert trimtab("export", *fixed, "--out", tmp_path / "out").out == f"peft adapter: {tmp_path / 'out'}\n"


def test_an_untrained_adapter_is_not_worth_a_merge(trimtab, model, tmp_path):
    import trimtab as package
    from trimtab.models.load import load

    package.attach(load(str(model)).model, package.LoRA(rank=2)).save(tmp_path / "fresh")
    done = trimtab("merge", "--model", model, "--adapter", tmp_path / "fresh", "--out", tmp_path / "merged")
    assert done.code == 1
    assert "the adapter's change is zero" in done.err
    assert not (tmp_path / "merged").exists()


def test_an_exported_adapter_loads_in_peft_with_the_same_outputs(trimtab, model, adapters, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    import trimtab as package

    done = trimtab(
        "export", "--format", "peft", "--model", model, "--adapter", adapters / "sql", "--out", tmp_path / "out",
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json == {"adapter": str(tmp_path / "out"), "format": "peft"}
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "out")(ids)
        ours = AutoModelForCausalLM.from_pretrained(model)
        package.load(ours, adapters / "sql")
        assert (theirs.logits - ours(ids).logits).abs().max() < 1e-5


def test_a_full_change_is_not_exported_as_low_rank(trimtab, model, data, tmp_path):
    trimtab(
        "train", "--model", model, "--data", data / "train.jsonl", "--out", tmp_path / "run", "--method", "full",
        "--max-steps", 1, "--threads", 1,
    )  # fmt: skip
    done = trimtab("export", "--model", model, "--adapter", tmp_path / "run" / "adapter", "--out", tmp_path / "out")
    assert done.code == 2
    assert "merge it instead" in done.err


# --- report, selftest, list ---


def test_a_report_is_written_beside_the_run(train, trimtab, tmp_path):
    pytest.importorskip("matplotlib")
    train(tmp_path / "run")
    done = trimtab("report", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert done.json == {"report": [str(tmp_path / "run" / "report.html")]}
    assert "<html" in page
    assert trimtab("report", tmp_path).code == 2
    (tmp_path / "notes.html").write_text("<html>mine</html>")
    taken = trimtab("report", tmp_path / "run", "--out", tmp_path / "notes.html")
    assert taken.code == 2
    assert "exists and is no report of trimtab's" in taken.err
    assert (tmp_path / "notes.html").read_text() == "<html>mine</html>"
    for _ in range(2):  # a page of its own is replaced
        assert trimtab("report", tmp_path / "run", "--out", tmp_path / "page.html").code == 0
    assert "leave it out" in trimtab("report", tmp_path / "run", tmp_path / "run", "--out", "x.html").err


def test_the_selftest_passes_and_tells_every_difference(trimtab):
    from trimtab.selftest import CHECKS

    done = trimtab("selftest")
    assert done.code == 0, done.out
    assert done.out.count("\nok  ") + done.out.startswith("ok  ") == len(CHECKS)
    assert f"all {len(CHECKS)} equivalences hold" in done.out


def test_the_selftest_runs_on_the_users_model(trimtab, model):
    done = trimtab("selftest", "--model", model, "--dtype", "float32", "--json")
    assert done.code == 0, done.err
    assert done.json["passed"] is True
    assert {check["allowed"] for check in done.json["checks"]} == {0.0, 1e-4}


def test_in_a_narrow_dtype_twice_its_own_rounding_is_allowed(monkeypatch):
    import torch

    from trimtab import selftest as module
    from trimtab.deltas import make_method

    model = module.tiny_model().to(torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rounding = module.rounding(model, make_method("lora"), module._examples(model))
    assert 1e-3 < rounding < 0.1
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    monkeypatch.setitem(module.ALLOWED, torch.bfloat16, 0.0)
    monkeypatch.setattr(module, "CHECKS", (module.shared, module.unmerged))
    shared, unmerged = module.selftest(model, make_method("lora"))
    assert shared.allowed == 2 * rounding
    assert shared.passed
    assert unmerged.allowed == 0


@pytest.mark.parametrize(
    ("off", "allowed"), [(0.01, 0.05), (0.1, 0.2), (5.0, 0.3), (float("inf"), 0.05), (float("nan"), 0.05)]
)
def test_no_rounding_allows_more_than_a_leak_would_differ(monkeypatch, off, allowed):
    import torch

    from trimtab import selftest as module
    from trimtab.deltas import make_method

    monkeypatch.setattr(module, "rounding", lambda *args: off)
    monkeypatch.setattr(module, "CHECKS", (module.accumulated, module.merged))
    gradients, logits = module.selftest(module.tiny_model().to(torch.bfloat16), make_method("lora"))
    assert (gradients.allowed, logits.allowed) == (allowed, 0.05)


def test_the_selftest_fails_when_an_equivalence_is_broken(trimtab, monkeypatch):
    from trimtab.data import batch, pack
    from trimtab.ops.tree import Tree
    from trimtab.train import packing

    def leaky(examples, pad_id):  # each example sees those before it
        whole = pack.pack(examples, pad_id)
        tokens = whole.input_ids.numel()
        return batch.dataclasses.replace(whole, tree=Tree.of([tokens] * tokens))

    monkeypatch.setattr(packing, "pack", leaky)
    done = trimtab("selftest", "--json")
    assert done.code == 1
    assert done.json["passed"] is False
    assert "1 of 13 checks failed: Packed equals unpacked" in done.err


@pytest.mark.parametrize("wrong", ["_RMSNorm", "_Rotate", "_Gated"])
def test_the_selftest_fails_when_a_leaner_layer_has_a_wrong_gradient(trimtab, monkeypatch, wrong):
    from trimtab.ops import gated, rms_norm, rotary

    function = next(getattr(m, wrong) for m in (rms_norm, rotary, gated) if hasattr(m, wrong))
    own = function.backward
    doubled = staticmethod(lambda ctx, *grads: tuple(g if g is None else 2 * g for g in own(ctx, *grads)))
    monkeypatch.setattr(function, "backward", doubled)
    done = trimtab("selftest", "--json")
    assert done.code == 1
    assert "1 of 13 checks failed: Leaner layers equal the model's own" in done.err


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("methods", ["lora", "(α/r) B A", "full", "arXiv 2106.09685"]),
        ("models", ["smollm2-135m", "minilm", "134.5 M"]),
        ("tasks", ["naming", "knowledge"]),
        ("formats", ["peft"]),
    ],
)
def test_what_there_is_is_listed(trimtab, what, words):
    shown = trimtab("list", what).out
    assert all(word in shown for word in words)
    found = trimtab("list", what, "--json").json[what]
    # One line each, however long, where no terminal sets the width.
    assert len(shown.splitlines()) == len(found) + 1


def test_methods_are_listed_with_what_they_train_on_a_model(trimtab, model):
    import trimtab as package
    from trimtab.models.load import load

    found = {row["method"]: row for row in trimtab("list", "methods", "--model", model, "--json").json["methods"]}
    adapter = package.attach(load(str(model)).model, package.LoRA())
    assert found["lora"]["parameters"] == sum(p.numel() for p in adapter.parameters())
    assert found["lora"]["modules"] == len(adapter.deltas)
    assert found["bitfit"]["parameters"] is None
    assert "no linear layer of this model has a bias" in found["bitfit"]["why not"]
    assert (found["lora"]["merges"], found["houlsby"]["merges"]) == ("yes", "no")
    assert f"{found['lora']['parameters']:,}" in trimtab("list", "methods", "--model", model).out
    assert "--model is for trimtab list methods" in trimtab("list", "tasks", "--model", model).err


# --- the terminal ---


def test_inspecting_on_a_terminal_counts_rows(terminal, model, data):
    drawn = terminal("data", "inspect", data / "train.jsonl", "--model", model)
    assert re.search(r"encoding train\.jsonl .* 16/16", drawn)
    for work in ("reading train.jsonl", "loading torch and transformers", "loading the tokenizer", "checking train."):
        assert re.search(rf"{work}[^\n]* \d+ s", drawn), work


def test_answering_on_a_terminal_counts_what_is_answered_so_far(terminal, model, adapters):
    drawn = terminal("generate", "--model", model, "--adapter", adapters / "sql", *SHORT, "one", "two")
    assert re.search(rf"loading {model}[^\n]* \d+ s", drawn)
    assert re.search(r"loading adapters .* 1/1", drawn)
    assert re.search(r"answering .* 2/2 +[\d.]+ (prompts/s|s/prompt)", drawn)


def test_merging_on_a_terminal_shows_that_it_goes_on(terminal, model, adapters, tmp_path):
    drawn = terminal("merge", "--model", model, "--adapter", adapters / "sql", "--out", tmp_path / "merged")
    for work in ("loading the adapter", "merging and auditing", "writing the merged model"):
        assert re.search(rf"{work}[^\n]* \d+ s", drawn), work


def test_the_selftest_on_a_terminal_counts_its_checks(terminal):
    drawn = terminal("selftest")
    assert re.search(r"checking .* 13/13 +[\d.]+ (checks/s|s/check)", drawn)
    # The lines of the checks stand above the bar, whole.
    assert len(re.findall(r"\rok   \w[^\r\n]*\)\s*\n", drawn)) == 13


def test_the_hubs_own_bars_stand_alone(trimtab, model, data, monkeypatch):
    class Fake:
        @staticmethod
        def load_dataset(name, split):
            return rows(0, 4)

    monkeypatch.setitem(sys.modules, "datasets", Fake())
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    done = trimtab("data", "inspect", "some/rows", "--model", "nobody/nothing")
    assert "no model 'nobody/nothing'" in done.err
    assert "loading torch" in done.err
    assert "reading" not in done.err
    assert "looking up" not in done.err


def test_nothing_is_drawn_where_it_is_not_wanted(terminal, model, data):
    assert terminal("data", "inspect", data / "train.jsonl", "--model", model, "--quiet") == ""


# --- the process ---


def test_a_closed_pipe_is_quiet():
    done = subprocess.run(
        f"{sys.executable} -m trimtab list methods --json | head -1", shell=True, env=environment(),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "{\n"
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["list methods --json", "list methods", "--version", "train --help", "data --help"])
def test_a_reader_that_is_gone_already_is_quiet(process, command):
    read, write = os.pipe()
    os.close(read)
    child = process(*command.split(), stdout=write)
    os.close(write)
    _, err = child.communicate(timeout=60)
    assert err == ""
    assert child.returncode in (0, 1)  # argparse overlooks what it cannot print


def test_a_traceback_comes_with_debug_alone(trimtab):
    plain, debug = (trimtab("report", "nowhere", *flags) for flags in ([], ["--debug"]))
    assert plain.code == debug.code == 2
    assert "Traceback" not in plain.err
    assert "Traceback" in debug.err
    assert debug.err.splitlines()[-1] == plain.err.splitlines()[-1]


def test_an_unexpected_error_is_one_line_and_exit_code_1(trimtab, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("some\nbug")

    monkeypatch.setattr("trimtab.cli.list.run", broken)
    done = trimtab("list", "methods")
    assert done.code == 1
    assert done.err == "trimtab: unexpected ValueError: some bug (run again with --debug for the traceback)\n"


def test_memory_that_runs_out_anywhere_is_told(trimtab, monkeypatch):
    def hungry(*args, **kwargs):
        torch.empty(2**60)

    monkeypatch.setattr("trimtab.cli.list.run", hungry)
    done = trimtab("list", "methods")
    assert done.code == 2
    assert "out of memory: lower" in done.err


def test_a_real_process_keeps_its_streams_apart(process, model):
    child = process("generate", "--model", model, "--json", "hello", "--max-new-tokens", 3)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert list(json.loads(out)) == ["answers"]
    assert "parameters in" in err
    assert "\x1b[" not in out + err


def test_ctrl_c_at_a_prompt_is_one_line(process, model):
    import signal

    child = process("chat", "--model", model, stdin=subprocess.PIPE)
    for line in child.stderr:
        if "answering with" in line:
            break
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err == "trimtab: stopped\n"
