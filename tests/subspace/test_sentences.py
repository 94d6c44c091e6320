"""Runs of a model on sentences: trained in a subspace or whole, from a checkpoint or from random weights."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tiny_classifier import lines, make_folder, write_table
from trimtab.cli import run as command
from trimtab.data.label_batch import pad_labelled
from trimtab.errors import UsageError
from trimtab.subspace.reparameterize import Subspace
from trimtab.subspace.runs import Run, untrained
from trimtab.subspace.sentences import SentenceTrainer, Setting, batch_loss, read_splits
from trimtab.subspace.series import checkpoints_of
from trimtab.subspace.subject import of_sentences
from trimtab.train.loss import class_loss

QUICK = ["--grid", "2,2000", "--seeds", "2", "--workers", "1", "--lr", "1e-2", "--lr-scale", "none", "--epochs", "4"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("sentences")
    train = write_table(folder / "train.tsv", lines(120))
    test = write_table(folder / "test.tsv", lines(40))
    model = str(make_folder(folder / "encoder"))
    return Setting(model, "classification", str(train), str(test), epochs=4, batch_size=8, max_length=16)


def test_all_parameters_learn_it_and_one_dimension_does_not(setting: Setting) -> None:
    trainer = SentenceTrainer(setting)
    whole, one = trainer(Run(None, 0, 1e-2)), trainer(Run(1, 0, 1e-2))
    assert whole.test > 0.95
    assert one.test < 0.9
    assert (one.d, whole.d) == (1, of_sentences(setting).D)
    assert whole.steps == one.steps == 4 * -(-102 // 8), "15 % of the training rows are held out"
    assert not whole.diverged


def test_the_start_is_scored_without_training(setting: Setting) -> None:
    trainer = SentenceTrainer(setting)
    start, one = trainer(untrained(0)), trainer(Run(1, 0, 0.0))
    assert (start.d, start.steps, start.final_loss) == (0, 0, start.first_loss)
    assert (start.train, start.validation, start.test) == (one.train, one.validation, one.test)
    assert trainer(untrained(1)).first_loss != start.first_loss, "another head"


def test_a_model_with_a_trained_head_may_forget_it_without_diverging(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss begins at next to nothing, and where nothing is learned it ends at that of guessing."""
    trainer = SentenceTrainer(setting)
    loaded = trainer.load(0)
    trainer._fit(
        loaded.model, list(loaded.model.parameters()), trainer._encoded("train", loaded), 0, Run(None, 0, 1e-2)
    )
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    own = dataclasses.replace(setting, model=str(tmp_path))

    def forget(self: SentenceTrainer, net: nn.Module, *_: object) -> int:
        for parameter in net.classifier.parameters():
            parameter.data.zero_()
        return 1

    monkeypatch.setattr(SentenceTrainer, "_fit", forget)
    forgotten = SentenceTrainer(own)(Run(None, 0, 1e-2))
    assert forgotten.first_loss < 0.1
    assert forgotten.final_loss == pytest.approx(math.log(2))
    assert not forgotten.diverged
    assert of_sentences(own).about["head"] == "the checkpoint's own"
    assert "head" not in of_sentences(setting).about


def test_a_run_depends_on_its_seed_alone(setting: Setting) -> None:
    run = Run(40, 3, 0.1)
    first, again = (dataclasses.replace(SentenceTrainer(setting)(run), seconds=0.0) for _ in range(2))
    assert first == again
    other = dataclasses.replace(SentenceTrainer(setting)(Run(40, 4, 0.1)), seconds=0.0)
    assert other.final_loss != first.final_loss


@pytest.mark.parametrize("subspace", [True, False])
def test_a_batch_in_parts_has_the_gradient_of_the_whole_and_less_padding(setting: Setting, subspace: bool) -> None:
    trainer = SentenceTrainer(setting)
    loaded = trainer.load(0)
    pad, examples = loaded.tokenizer.pad_token_id, trainer._encoded("train", loaded)[:9]
    net = Subspace.of(loaded.model, d=50) if subspace else loaded.model
    trained = net.trained() if isinstance(net, Subspace) else list(net.parameters())
    cells, products = [], []
    loaded.model.register_forward_pre_hook(
        lambda module, args, inputs: cells.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    if isinstance(net, Subspace):
        net.projection.expand = lambda x, made=net.projection.expand: products.append(x) or made(x)  # type: ignore[method-assign]
    whole = class_loss(net, pad_labelled(examples, pad)) / len(examples)
    parts = batch_loss(net, examples, pad)
    assert sum(cells[1:]) < cells[0]
    assert len(products) == 2 * subspace, "P θ_d is made once for all parts"
    torch.testing.assert_close(parts, whole)
    wanted, found = (torch.autograd.grad(loss, trained, materialize_grads=True) for loss in (whole, parts))
    size = max(float(own.abs().max()) for own in wanted)
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5 * size)  # fp32 sums in another order


def test_a_batch_of_one_row_is_a_batch(setting: Setting) -> None:
    trainer = SentenceTrainer(setting)
    loaded = trainer.load(0)
    pad, one = loaded.tokenizer.pad_token_id, trainer._encoded("train", loaded)[:1]
    torch.testing.assert_close(batch_loss(loaded.model, one, pad), class_loss(loaded.model, pad_labelled(one, pad)))


@pytest.mark.parametrize("mode", ["did", "said"])
def test_both_modes_learn_with_enough_dimensions(setting: Setting, mode: str) -> None:
    own = dataclasses.replace(setting, mode=mode)
    assert SentenceTrainer(own)(Run(1000, 0, 3e-2)).train > 0.9


def test_random_weights_are_another_start(setting: Setting) -> None:
    own = dataclasses.replace(setting, pretrained=False)
    names = [name for name, _ in SentenceTrainer(own).load(0).model.named_parameters()]
    same = [SentenceTrainer(s).load(1).model.state_dict()[names[0]] for s in (setting, own)]
    assert not same[0].equal(same[1])
    assert "with random weights" in of_sentences(own).title


def test_a_checkpoint_in_half_precision_is_trained_in_fp32(setting: Setting, tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = make_folder(tmp_path / "half")
    AutoModel.from_pretrained(folder).half().save_pretrained(folder)
    outcome = SentenceTrainer(dataclasses.replace(setting, model=str(folder)))(Run(None, 0, 1e-2))
    assert outcome.test > 0.95, "fp16 diverges at the first step"


def test_what_is_missing_is_said(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs another one to be scored on"):
        SentenceTrainer(dataclasses.replace(setting, test=None))
    alone = write_table(tmp_path / "alone.tsv", [row for row in lines(40) if row[0] == "1"])
    with pytest.raises(UsageError, match=r"has the label .1.: there is nothing to tell apart"):
        SentenceTrainer(dataclasses.replace(setting, test=str(alone)))


def test_every_wrong_number_is_named_at_once(setting: Setting) -> None:
    wrong = {"rows": 0, "test_rows": -5, "epochs": 0, "batch_size": 0, "max_length": 0, "mode": "sade"}
    with pytest.raises(UsageError, match="6 problems") as told:
        dataclasses.replace(setting, **wrong)
    assert all(f"{name} is " in str(told.value) for name in wrong)
    assert "rows is -5, but must be at least 1" in str(told.value)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (("--rows", "0"), "rows is 0, but must be at least 1"),
        (("--test-rows", "-5"), "test_rows is -5"),
        (("--batch-size", "0"), "batch_size is 0"),
        (("--epochs", "0"), "epochs is 0"),
    ],
)
def test_a_wrong_number_is_refused_before_the_model_is_loaded(
    setting: Setting, flag: tuple[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(SentenceTrainer, "load", lambda *args: pytest.fail("the model is loaded"))
    given = ["--model", setting.model, "--task", str(setting.data), "--test-data", str(setting.test), *flag]
    assert command(["measure", "dimension", *given]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("few", "said"),
    [
        ({"rows": 1}, "the train split has no row of class . in its 1 rows"),
        ({"test_rows": 1}, "the validation split has no row of class . in its 1 rows"),
    ],
)
def test_a_class_that_sampling_leaves_out_is_told(setting: Setting, few: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_splits(dataclasses.replace(setting, **few))


def test_a_class_that_one_file_lacks_is_told(setting: Setting, tmp_path: Path) -> None:
    two = lines(40)
    three = write_table(tmp_path / "three.tsv", [("2" if i % 3 == 0 else row[0], row[1]) for i, row in enumerate(two)],
                        labels=("0", "1", "2"))  # fmt: skip
    with pytest.raises(UsageError, match="the test split has no row of class 2 in its 40 rows"):
        read_splits(dataclasses.replace(setting, data=str(three)))
    with pytest.raises(UsageError, match=r"three\.tsv line 2 has the label '2', but the classes are 0, 1"):
        read_splits(dataclasses.replace(setting, test=str(three)))


@pytest.mark.parametrize(
    ("task", "data", "said"),
    [
        ("sst2", (), "nlu/sst2.train.tsv.gz in it: name it with --data-dir or in TRIMTAB_DATA"),
        ("sst2", ("--data-dir", "/nowhere"), "--data-dir names /nowhere, and there is no such file or folder"),
        ("sst2", ("--data-dir", "/"), "--data-dir names /, which has no nlu/sst2.train.tsv.gz"),
        ("sst2", ("--data-dir", __file__), "sst2 is not to be scored on what it learns"),
        ("nowhere.tsv", (), "there is no file nowhere.tsv: with a model --task is sst2, mrpc or a file of sentences"),
        (__file__, (), "needs another one to be scored on: name it with --test-data"),
        ("sst2", ("--test-data", __file__), "sst2 is scored on its own test rows: --test-data is for a file as --task"),
        (__file__, ("--data-dir", "/"), "--data-dir is for a task with files of its own"),
    ],
)
def test_missing_data_is_told_by_the_flag_that_names_it(
    setting: Setting, task: str, data: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)
    assert command(["measure", "dimension", "--model", setting.model, "--task", task, *data]) == 2
    assert said in capsys.readouterr().err


def test_the_command_measures_a_file_of_ones_own(setting: Setting, tmp_path: Path, capsys) -> None:
    flags = ["--model", setting.model, "--task", str(setting.data), "--test-data", str(setting.test)]
    grid = ["--grid", "2,5000", "--seeds", "2", "--workers", "1", "--lr", "1e-2", "--epochs", "4", "--rates", "1"]
    assert command(["measure", "dimension", *flags, *grid, "--json", "--out", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["chance"] == 0.5
    assert 2 < told["crossing"]["d"] < 5000
    assert "Budget for LoRA: rank r trains r · " in " ".join(told["sentences"])
    assert "DID" in told["title"]


def test_a_series_of_checkpoints_is_measured_and_told(setting: Setting, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "series"
    for step in (0, 100):
        make_folder(folder / f"step-{step}")
    flags = ["--checkpoints", str(folder), "--task", str(setting.data), "--test-data", str(setting.test)]
    assert command(["measure", "dimension", *flags, *QUICK, "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    first, last = told["series"]
    assert [one["label"] for one in (first, last)] == ["step-0", "step-100"]
    assert first["scores"] == last["scores"], "both are the same weights"
    assert told == json.loads((tmp_path / "out" / "results.json").read_text()) | {"report": told["report"]}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "do not say that it falls or rises" in page
    assert (tmp_path / "out" / "step-100" / "runs.jsonl").exists()
    each = [str(tmp_path / "out" / f"step-{step}") for step in (0, 100)]
    assert command(["measure", "dimension", "--compare", *each, "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert [one["label"] for one in both["measurements"]] == ["step-0", "step-100"]
    assert [one["n"] for one in both["measurements"]] == [len(read_splits(setting).train)] * 2


def test_a_series_is_in_the_order_of_its_steps_whatever_trainer_wrote_it(setting: Setting, tmp_path: Path) -> None:
    for step in (2000, 500, 1000):
        make_folder(tmp_path / "run" / f"checkpoint-{step}")
    given, steps = checkpoints_of([str(tmp_path / "run")])
    assert list(given) == ["checkpoint-500", "checkpoint-1000", "checkpoint-2000"]
    assert [steps[label] for label in given] == [500, 1000, 2000]
    for name in ("early", "late"):
        make_folder(tmp_path / "named" / name)
    with pytest.raises(UsageError, match=r"tell no order \(early, late \.\.\.\): call them step100"):
        checkpoints_of([str(tmp_path / "named")])
    given, steps = checkpoints_of([str(tmp_path / "named" / name) for name in ("late", "early")])
    assert (list(given), steps) == (["late", "early"], {"late": 0, "early": 1})


def test_a_folder_of_another_search_is_refused_before_any_of_a_series_is_trained(
    setting: Setting, tmp_path: Path, capsys
) -> None:
    for step in (1, 2):
        make_folder(tmp_path / "series" / f"step{step}")
    (tmp_path / "out" / "step2").mkdir(parents=True)
    (tmp_path / "out" / "step2" / "search.json").write_text('{"task": "another"}')
    flags = ["--checkpoints", str(tmp_path / "series"), "--task", str(setting.data), "--test-data", str(setting.test)]
    assert command(["measure", "dimension", *flags, *QUICK, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert re.search(r"step2 holds the runs of another search: task 'another', but now .* and \d+ more", told)
    assert not (tmp_path / "out" / "step1").exists()


def broken(folder: Path) -> Path:
    """The folder of a model whose weights are no numbers, so that its training diverges."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(make_folder(folder))
    model.embeddings.word_embeddings.weight.data.fill_(float("nan"))
    model.save_pretrained(folder)
    return folder


def test_a_checkpoint_without_a_threshold_does_not_end_the_series(setting: Setting, tmp_path: Path, capsys) -> None:
    series = [str(broken(tmp_path / "step-0")), str(make_folder(tmp_path / "step-100"))]
    flags = ["--task", str(setting.data), "--test-data", str(setting.test), *QUICK, "--out", str(tmp_path / "out")]
    assert command(["measure", "dimension", "--checkpoints", *series, *flags, "--json"]) == 0
    printed = capsys.readouterr()
    assert "step-0 is not measured: the loss is no number before any training" in printed.err
    missing, measured = json.loads(printed.out)["series"]
    assert (missing["label"], missing["reason"]) == ("step-0", "no number before training")
    assert (measured["label"], list(measured["scores"])) == ("step-100", ["2", "2000"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "not measured: no number before training" in page
    assert "step-0 is not measured: the loss is no number before any training" in page
    assert not (tmp_path / "out" / "step-0" / "results.json").exists()


def test_a_series_takes_what_there_is_of_an_earlier_one(setting: Setting, tmp_path: Path, capsys) -> None:
    series = [str(make_folder(tmp_path / f"step-{step}")) for step in range(4)]
    flags = ["--task", str(setting.data), "--test-data", str(setting.test), *QUICK]
    assert command(["measure", "dimension", "--checkpoints", *series[:2], *flags, "--out", str(tmp_path / "old")]) == 0
    capsys.readouterr()
    flags += ["--reuse", str(tmp_path / "old"), "--out", str(tmp_path / "new")]
    assert command(["measure", "dimension", "--checkpoints", *series[1:3], *flags]) == 0
    assert "old holds no runs of step-2: all of its own are trained" in capsys.readouterr().err
    kept = [(tmp_path / folder / "step-1" / "runs.jsonl").read_text() for folder in ("old", "new")]
    assert kept[0] == kept[1]
    assert command(["measure", "dimension", "--checkpoints", *series[2:], *flags]) == 2
    assert "old holds the runs of none of these checkpoints: step-2, step-3" in capsys.readouterr().err


def test_a_checkpoint_that_has_no_dimension_any_more_keeps_no_result_of_an_earlier_threshold(
    setting: Setting, tmp_path: Path, capsys
) -> None:
    series = [str(make_folder(tmp_path / name)) for name in ("step-0", "step-100")]
    flags = ["--task", str(setting.data), "--test-data", str(setting.test), *QUICK, "--out", str(tmp_path / "out")]
    assert command(["measure", "dimension", "--checkpoints", *series, *flags]) == 0
    own = tmp_path / "out" / "step-0"
    runs = [json.loads(line) for line in (own / "runs.jsonl").read_text().splitlines()]
    for line in runs:
        line["outcome"]["diverged"] = line["run"]["d"] is None
    (own / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in runs))
    assert command(["measure", "dimension", "--checkpoints", *series, *flags]) == 0
    assert "step-0 is not measured" in capsys.readouterr().err
    assert sorted(path.name for path in own.iterdir()) == ["runs.jsonl", "search.json"]


def test_numbers_as_classes_are_in_the_order_of_numbers(setting: Setting, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("train.tsv", "test.tsv")]
    for file in files:
        rows = [f"{file.stem} text {label} {i}\t{label}" for label in range(12) for i in range(20)]
        file.write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    given = dataclasses.replace(setting, data=str(files[0]), test=str(files[1]), rows=None, test_rows=None)
    assert read_splits(given).classes == tuple(map(str, range(12)))


def test_a_series_of_which_nothing_can_be_measured_is_an_error(setting: Setting, tmp_path: Path, capsys) -> None:
    series = [str(broken(tmp_path / name)) for name in ("step-0", "step-100")]
    flags = ["--task", str(setting.data), "--test-data", str(setting.test), *QUICK]
    assert command(["measure", "dimension", "--checkpoints", *series, *flags]) == 1
    assert "none of the checkpoints can be measured: step-0: the loss is no number" in capsys.readouterr().err


def test_a_series_of_different_shapes_is_refused(setting: Setting, tmp_path: Path, capsys) -> None:
    make_folder(tmp_path / "series" / "step-1")
    make_folder(tmp_path / "series" / "step-2", type_vocab_size=3)
    flags = ["--checkpoints", str(tmp_path / "series"), "--task", str(setting.data), "--test-data", str(setting.test)]
    assert command(["measure", "dimension", *flags]) == 2
    assert "of different shapes" in capsys.readouterr().err
    assert command(["measure", "dimension", "--checkpoints", str(tmp_path), "--task", str(setting.data)]) == 2
    assert "fewer than two checkpoints" in capsys.readouterr().err


def test_folders_given_as_a_dot_are_called_by_their_names(
    setting: Setting, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (0, 100):
        make_folder(tmp_path / f"step-{step}")
    flags = ["--task", str(setting.data), "--test-data", str(setting.test), *QUICK, "--out", str(tmp_path / "out")]
    monkeypatch.chdir(tmp_path / "step-100")
    assert command(["measure", "dimension", "--checkpoints", ".", "../step-0", *flags, "--json"]) == 0
    series = json.loads(capsys.readouterr().out)["series"]
    assert [(one["label"], one["protocol"]["model"]) for one in series] == [("step-0",) * 2, ("step-100",) * 2]
    monkeypatch.chdir(tmp_path / "out" / "step-0")
    assert command(["measure", "dimension", "--compare", ".", "../step-100", "--json"]) == 0
    both = json.loads(capsys.readouterr().out)["measurements"]
    assert [one["label"] for one in both] == ["step-0", "step-100"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where downloads of some/series are kept, with its revisions step1000 and step20; there is no connection."""
    import huggingface_hub.constants

    repository = tmp_path / "hub" / "models--some--series"
    (repository / "refs").mkdir(parents=True)
    for revision, digit in (("step1000", "a"), ("step20", "b")):
        make_folder(repository / "snapshots" / (digit * 40))
        (repository / "refs" / revision).write_text(digit * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository


def test_revisions_of_a_repository_are_a_series_in_the_order_of_their_steps(
    setting: Setting, hub: Path, tmp_path: Path, capsys
) -> None:
    flags = ["--checkpoints", "some/series@step1000", "some/series@step20", "--task", str(setting.data)]
    out = ["--test-data", str(setting.test), "--out", str(tmp_path / "out"), "--json"]
    assert command(["measure", "dimension", *flags, *QUICK, *out]) == 0
    told = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [one["at"] for one in told["series"]] == [20, 1000]
    assert [one["protocol"]["model"] for one in told["series"]] == ["series@step20", "series@step1000"]
    assert (tmp_path / "out" / "step20" / "runs.jsonl").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["nowhere", "some/series@step20"], "there is no folder nowhere; those of a hub's repository are named"),
        (["some/series@step20"], "some/series@step20: fewer than two checkpoints"),
        (["some/series@step20", "an/other@step20"], "two checkpoints are called step20"),
        (["./nowhere@step1", "some/series@step20"], "there is no file or folder ./nowhere@step1"),
        (["some/series@step20", "some/series@step30"], "no model 'some/series@step30'"),
    ],
    ids=str,
)
def test_a_series_that_cannot_be_had_is_refused(
    setting: Setting, hub: Path, given: list[str], said: str, capsys
) -> None:
    flags = ["--checkpoints", *given, "--task", str(setting.data), "--test-data", str(setting.test)]
    assert command(["measure", "dimension", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_file_is_not_scored_on_what_it_teaches(setting: Setting, tmp_path: Path, caplog) -> None:
    with pytest.raises(UsageError, match="is not to be scored on what it teaches"):
        read_splits(dataclasses.replace(setting, test=setting.data))
    rows = lines(120)
    both = write_table(tmp_path / "both.tsv", [*rows[:3], *lines(40, seed=7)])
    of_sentences(dataclasses.replace(setting, data=str(write_table(tmp_path / "own.tsv", rows)), test=str(both)))
    assert "rows that are scored are also learned" in caplog.text


def test_another_tokenizer_or_configuration_is_another_search(setting: Setting, tmp_path: Path) -> None:
    folder, first = Path(setting.model), of_sentences(setting).about

    def differing(file: str, change: Callable[[str], str]) -> set[str]:
        other = shutil.copytree(folder, tmp_path / file)
        (other / file).write_text(change((other / file).read_text()))
        about = of_sentences(dataclasses.replace(setting, model=str(other))).about
        return {key for key in first if first[key] != about[key]} - {"model"}

    def swapped(text: str) -> str:
        vocabulary = json.loads(text)
        words = vocabulary["model"]["vocab"]
        words["good"], words["bad"] = words["bad"], words["good"]
        return json.dumps(vocabulary)

    assert differing("config.json", lambda text: text.replace('"gelu"', '"relu"')) == {"config"}
    assert differing("tokenizer.json", swapped) == {"data_digest"}


def test_a_head_that_the_checkpoint_has_is_said_to_be_kept(setting: Setting, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO", logger="trimtab")
    trainer = SentenceTrainer(setting)
    loaded = trainer.load(0)
    assert "drawn at random" in caplog.text
    loaded.model.save_pretrained(tmp_path / "fine")
    loaded.tokenizer.save_pretrained(tmp_path / "fine")
    caplog.clear()
    SentenceTrainer(dataclasses.replace(setting, model=str(tmp_path / "fine"))).load(0)
    assert "has a head of its own: seeds draw the projection, the order and dropout alone" in caplog.text


def test_other_rows_in_a_file_of_the_same_name_are_another_search(setting: Setting, tmp_path: Path) -> None:
    other = write_table(tmp_path / Path(str(setting.data)).name, lines(120, seed=1))
    first, second = (of_sentences(s).about for s in (setting, dataclasses.replace(setting, data=str(other))))
    assert {key for key in first if first[key] != second[key]} == {"data_digest"}


def test_a_known_task_in_another_folder_is_the_same_search(setting: Setting, tmp_path: Path) -> None:
    for place in ("here", "there"):
        for split, count in (("train", 120), ("dev", 40), ("test", 40)):
            table = write_table(tmp_path / split, lines(count)).read_bytes()
            file = tmp_path / place / "nlu" / f"sst2.{split}.tsv.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(gzip.compress(table))
    known = dataclasses.replace(setting, task="sst2", test=None)
    here, there = (of_sentences(dataclasses.replace(known, data=str(tmp_path / at))).about for at in ("here", "there"))
    assert here == there
    file.write_bytes(gzip.compress(write_table(tmp_path / "other", lines(40, seed=1)).read_bytes()))
    other = of_sentences(dataclasses.replace(known, data=str(tmp_path / "there"))).about
    assert {key for key in here if here[key] != other[key]} == {"data_digest"}
