"""trimtab train --task, and trimtab eval of what it trained."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_command_line import files, stopped_after_two_batches, weights

from tiny_classifier import lines, make_folder, write_table
from trimtab import load
from trimtab.models.classifier import load_classifier


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A folder of data with SST-2's and MRPC's files, made up, and own.tsv with words for labels."""
    folder = tmp_path_factory.mktemp("data")
    for number, split in enumerate(("train", "dev", "test")):
        write_table(folder / "nlu" / f"sst2.{split}.tsv.gz", lines(40 - 5 * number, seed=number), header=False)
    write_table(folder / "own.tsv", lines(32, seed=3, pairs=True), labels=("no", "yes"))
    write_table(folder / "own.test.tsv", lines(20, seed=4, pairs=True), labels=("no", "yes"))
    return folder


@pytest.fixture
def trained(trimtab, encoder, tables):
    """trained(out, *flags): train a classifier of SST-2's sentences."""

    def call(out, *flags, task="sst2", data=None, epochs=10, base=encoder):
        fixed = ["train", "--model", base, "--task", task, "--data", data or tables / "nlu" / "sst2.train.tsv.gz"]
        how = ["--threads", 1, "--dtype", "float32", "--epochs", epochs, "--lr", 1e-2]
        return trimtab(*fixed, *how, "--out", out, *flags)

    return call


@pytest.fixture
def evaluated(trimtab, encoder, tables):
    def call(*flags, task="sst2", data=tables):
        fixed = ["eval", "--model", encoder, "--tasks", task, "--data", data, "--threads", 1, "--dtype", "float32"]
        return trimtab(*fixed, *flags)

    return call


def test_a_run_has_its_folder_its_figures_and_the_head_in_its_adapter(trained, trimtab, encoder, tables, tmp_path):
    out = tmp_path / "run"
    done = trained(out, "--eval-data", tables / "nlu" / "sst2.dev.tsv.gz", "--rank", 4, "--json")
    assert done.code == 0, done.err
    assert {"config.yaml", "metrics.jsonl", "result.json", "layers.json", "samples.jsonl"} <= set(files(out))
    found = json.loads((out / "result.json").read_text())
    assert found == done.json
    assert (found["task"], found["classes"], found["truncated_rows"]) == ("sst2", ["0", "1"], 0)
    assert found["supervised_tokens"] == 400  # rows
    assert found["accuracy"]["after"] >= 0.8  # by chance 0.0003
    assert found["accuracy"]["chance"] == pytest.approx(18 / 35)
    assert found["matthews"]["chance"] == found["f1"]["chance"] == 0  # always class 0, of 18 rows
    assert found["eval_loss"] < found["eval_loss_before"]
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]
    assert config["task_type"] == "SEQ_CLS"
    sample = json.loads((out / "samples.jsonl").read_text().splitlines()[0])
    assert sample["expected"] == "0"
    assert {sample["before"], sample["after"]} <= {"0", "1"}
    assert trimtab("report", out).code == 0
    page = (out / "report.html").read_text()
    assert "nats per row" in page
    assert "supervised token" not in page


def test_an_adapter_is_evaluated_with_its_head_and_each_result_is_kept(trained, evaluated, tmp_path, monkeypatch):
    assert trained(tmp_path / "run").code == 0
    adapter = ("--adapter", tmp_path / "run" / "adapter", "--batch-size", 7)
    done = evaluated(*adapter, "--out", tmp_path / "whole", "--json")
    assert done.code == 0, done.err
    (row,) = done.json["tasks"]
    assert row["items"] == 30
    assert row["accuracy"] >= 0.8
    assert row["chance"] == row["majority"] == 0.5
    assert row["f1_interval"][0] <= row["f1"] <= row["f1_interval"][1]
    kept = [json.loads(line) for line in (tmp_path / "whole" / "examples.jsonl").open()]
    assert sum(line["correct"] for line in kept) / 30 == row["accuracy"]
    table = evaluated(*adapter).out.splitlines()[-2:]
    header = "task items accuracy 95% interval chance majority F1 95% interval Matthews 95% interval"
    assert table[0].split() == header.split()

    stopped_after_two_batches(monkeypatch)
    assert evaluated(*adapter, "--out", tmp_path / "cut").code == 130
    again = evaluated(*adapter, "--out", tmp_path / "cut", "--json")
    assert "sst2: 14 of 30 questions are answered already" in again.err
    assert again.json["tasks"] == done.json["tasks"]


@pytest.mark.parametrize("method", ["bitfit", "full", "dash --warm-up-steps 2"])
def test_every_kind_of_method_trains_below_a_head(trained, evaluated, tmp_path, method):
    done = trained(tmp_path / "run", "--method", *method.split(), "--hold-out", 0.25, epochs=1)
    assert done.code == 0, done.err
    assert "30 rows to train on (15 of class 0, 15 of class 1)" in done.out
    assert "10 rows to evaluate on" in done.out
    assert evaluated("--adapter", tmp_path / "run" / "adapter").code == 0


def test_pairs_of_ones_own_with_words_for_labels(trained, evaluated, tables, tmp_path):
    done = trained(tmp_path / "run", task="classification", data=tables / "own.tsv", epochs=1)
    assert done.code == 0, done.err
    assert "16 of class no, 16 of class yes" in done.out
    adapter = ("--adapter", tmp_path / "run" / "adapter")
    (row,) = evaluated(*adapter, "--json", task="classification", data=tables / "own.test.tsv").json["tasks"]
    assert row["items"] == 20
    other = evaluated(*adapter)
    assert other.code == 2
    assert "the classes of sst2 are 0, 1, and not no, yes" in other.err
    wrong = evaluated(*adapter, task="classification", data=tables / "nlu" / "sst2.test.tsv.gz")
    assert "sst2.test.tsv.gz line 1 has the label '0', but the classes are no, yes" in wrong.err


@pytest.fixture(scope="module")
def bases(encoder, tmp_path_factory):
    """Folders of models by kind; an adapter on a poolerless one brings a pooler with its head."""
    folder = tmp_path_factory.mktemp("bases")
    bare = make_folder(folder / "poolerless") / "model.safetensors"
    save_file({k: v for k, v in load_file(bare).items() if "pooler" not in k}, bare, metadata={"format": "pt"})
    return {"encoder": encoder, "poolerless": bare.parent, "causal": make_folder(folder / "causal", "causal")}


@pytest.fixture
def answers(tables):
    """answers(model, tokenizer): a model's logits on eight pairs, padded."""

    def call(model, tokenizer):
        pairs = [line.split("\t")[1:] for line in (tables / "own.test.tsv").read_text().splitlines()[1:9]]
        with torch.no_grad():
            return model(**tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")).logits

    return call


LORA, DASH = "lora --rank 4", "dash --rank 4 --warm-up-steps 2"
LOW_RANK = [("encoder", LORA), ("poolerless", LORA), ("causal", LORA), ("encoder", DASH), ("causal", DASH)]
ALIKE = {"rtol": 0, "atol": 1e-5}  # logits of about 1, in fp32, computed in another order


@pytest.fixture
def delivered(trained, trimtab, bases, tables, answers, tmp_path):
    """delivered(command, kind, method): a trained adapter merged or exported to a folder, the classifier's tokenizer,
    and what it answers with the adapter on it, under a head drawn from another seed."""

    def call(command, kind, method=LORA, *flags):
        how = {"task": "classification", "data": tables / "own.tsv", "epochs": 1, "base": bases[kind]}
        assert trained(tmp_path / "run", "--method", *method.split(), **how).code == 0
        adapter, out = tmp_path / "run" / "adapter", tmp_path / "out"
        done = trimtab(command, "--model", bases[kind], "--adapter", adapter, "--out", out, *flags)
        assert done.code == 0, done.err
        loaded = load_classifier(str(bases[kind]), ("no", "yes"), seed=7)
        load(loaded.model, adapter)
        return out, loaded.tokenizer, answers(loaded.model, loaded.tokenizer)

    return call


@pytest.mark.parametrize(("kind", "method"), [*LOW_RANK, ("encoder", "bitfit")])
def test_a_merged_classifier_is_a_plain_one_with_the_same_logits(delivered, answers, kind, method):
    out, _, wanted = delivered("merge", kind, method)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    torch.testing.assert_close(answers(plain, transformers.AutoTokenizer.from_pretrained(out)), wanted, **ALIKE)
    assert plain.config.id2label == {0: "no", 1: "yes"}
    audit = json.loads((out / "audit.json").read_text())
    assert 0 <= audit["max_logit_difference"] < 1e-5
    assert all(layer["relative_change"] > 0 for layer in audit["layers"])


def test_a_merged_classifier_is_evaluated_as_its_adapter_is(delivered, evaluated, trimtab, tables, tmp_path):
    out, *_ = delivered("merge", "encoder")
    asked = ["eval", "--tasks", "classification", "--data", tables / "own.test.tsv", "--threads", 1, "--json"]
    merged = trimtab(*asked, "--dtype", "float32", "--model", out, "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err
    flags = ("--adapter", tmp_path / "run" / "adapter", "--out", tmp_path / "adapted", "--json")
    adapted = evaluated(*flags, task="classification", data=tables / "own.test.tsv")
    assert merged.json["tasks"] == adapted.json["tasks"]
    one, other = (
        {line["index"]: line for line in map(json.loads, (tmp_path / name / "examples.jsonl").open())}
        for name in ("merged", "adapted")
    )
    assert len(one) == 20
    assert {line["prediction"] for line in one.values()} == {"no", "yes"}, "else any head would do"
    for index, line in one.items():
        assert line["prediction"] == other[index]["prediction"]
        assert line["scores"] == pytest.approx(other[index]["scores"], abs=1e-5)  # as ALIKE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "method"), LOW_RANK)
def test_peft_loads_an_exported_classifier_with_its_head(delivered, bases, answers, kind, method):
    import peft

    out, tokenizer, wanted = delivered("export", kind, method)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        bases[kind], num_labels=2, pad_token_id=tokenizer.pad_token_id
    )
    loaded = peft.PeftModel.from_pretrained(base, out)
    torch.testing.assert_close(answers(loaded, tokenizer), wanted, **ALIKE)


@pytest.mark.parametrize("kind", ["encoder", "poolerless", "causal"])
def test_a_dense_change_of_a_classifier_keeps_its_head(delivered, bases, answers, kind):
    out, tokenizer, wanted = delivered("export", kind, LORA, "--format", "dense")
    loaded = load_classifier(str(bases[kind]), ("no", "yes"), seed=8)
    load(loaded.model, out)
    torch.testing.assert_close(answers(loaded.model, tokenizer), wanted, **ALIKE)


def test_a_stopped_run_is_resumed_to_the_same_weights(trained, tmp_path, monkeypatch):
    from trimtab.train import loop

    flags = ("--save-every", 1, "--rank", 2, "--hold-out", 0.2)
    assert trained(tmp_path / "whole", *flags, epochs=1).code == 0
    save, saved = loop.save_checkpoint, []

    def stopping(*arguments, **options):
        saved.append(save(*arguments, **options))
        if len(saved) == 2:
            raise KeyboardInterrupt
        return saved[-1]

    monkeypatch.setattr(loop, "save_checkpoint", stopping)
    assert trained(tmp_path / "cut", *flags, epochs=1).code == 130
    again = trained(tmp_path / "cut", *flags, "--resume", epochs=1)
    assert again.code == 0, again.err
    assert "going on from step 2 of 4" in again.err
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    finished = trained(tmp_path / "cut", *flags, "--resume", epochs=1)
    assert "already finished" in finished.err
    assert "accuracy" in finished.out


def test_a_classifier_writes_no_text(trained, trimtab, model, tmp_path):
    trained(tmp_path / "run", epochs=1)
    adapter = tmp_path / "run" / "adapter"
    done = trimtab("generate", "--model", model, "--adapter", adapter, "Hello")
    assert done.code == 2
    assert "adapter 'run' tells classes apart (0, 1) and writes no text: use trimtab eval --adapter" in done.err
    done = trimtab("eval", "--model", model, "--adapter", adapter, "--tasks", "arc_easy", "--data", tmp_path)
    assert "tells classes apart (0, 1) and writes no text" in done.err


def test_a_model_without_a_trained_head_is_not_asked(evaluated, adapters, tmp_path):
    done = evaluated()
    assert done.code == 2
    assert "has no trained classifier.bias, so its answers would be random: give --adapter" in done.err


def test_overlap_of_training_and_evaluation_is_told(trained, tables, tmp_path):
    same = tables / "nlu" / "sst2.train.tsv.gz"
    done = trained(tmp_path / "run", "--eval-data", same, "--limit", 10, epochs=1)
    assert "10 of the 40 rows to evaluate on are among those to train on" in done.err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--task", "sst"], "task is 'sst', but trimtab train has sst2, mrpc, classification; did you mean sst2?"),
        (["--task", "sst2", "--hold-out", 1], "hold_out is 1.0, but must be a share between 0 and 1"),
        (["--hold-out", 0.1], "hold_out is for a classifier: give task (--task)"),
        (["--task", "sst2", "--hold-out", 0.1, "--eval-data", "x"], "give either eval_data or hold_out, not both"),
        (["--task", "sst2", "--layout", "alpaca"], "layout is not for a task"),
        (["--task", "sst2", "--method", "prompt-tuning"], "has no place for the head of a classifier"),
        (["--task", "mrpc"], "other rows than mrpc, which is of pairs of sentences"),
        (["--task", "sst2", "--limit", 1], "sst2.train.tsv.gz has no row of class 1 in its 1 rows"),
        (["--task", "sst2", "--eval-data", "nowhere.tsv"], "no such file: nowhere.tsv"),
        (["--task", "sst2", "--data", "nowhere.tsv"], "--data names nowhere.tsv, and there is no such file or folder"),
    ],
    ids=str,
)
def test_wrong_usage_is_told_before_a_model_is_loaded(trimtab, tables, tmp_path, flags, told):
    data = tables / "nlu" / "sst2.train.tsv.gz"
    done = trimtab("train", "--model", "no-such-model", "--data", data, "--out", tmp_path / "run", *flags)
    assert done.code == 2
    assert told in done.err
    assert not (tmp_path / "run").exists()


def test_tasks_of_words_and_of_a_head_are_not_mixed(evaluated):
    assert "sst2 asks a trained head and arc_easy asks for text" in evaluated(task="sst2,arc_easy").err
    assert "--scoring is for tasks that are answered in words" in evaluated("--scoring", "generation").err
