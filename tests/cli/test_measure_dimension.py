"""trimtab measure dimension: what it says, what it leaves, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tiny_classifier import lines, make_folder, write_table
from trimtab.cli import run
from trimtab.subspace.crossing import GRIDS
from trimtab.subspace.plan import SWEEP_SEED

QUICK = ["--workers", "1", "--seeds", "2"]
TOY = ["--task", "toy", "--threshold", "absolute", "--share", "0.99", "--lr-scale", "none", *QUICK]


def test_the_toy_has_dimension_ten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["measure", "dimension", *TOY, "--grid", "8,9,10,11", "--out", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["crossing"]["first"] == 10
    assert (told["crossing"]["d"], told["found"]) == (10, "within")
    assert told == json.loads((tmp_path / "results.json").read_text()) | {"report": told["report"]}
    page = (tmp_path / "report.html").read_text()
    assert "Intrinsic dimension of toy" in page
    assert "exp(-loss)" in page
    assert "chance" in page
    before = (tmp_path / "runs.jsonl").read_bytes()
    assert run(["measure", "dimension", *TOY, "--grid", "8,9,10,11", "--out", str(tmp_path), "--json"]) == 0
    assert (tmp_path / "runs.jsonl").read_bytes() == before, "nothing is trained twice"
    assert (tmp_path / "report.html").read_text() == page


@pytest.mark.parametrize("share", ["1", "0.9"])
def test_the_dimension_of_the_toy_is_ten_exactly(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task", "toy", "--workers", "1", "--share", share, "--json"]
    assert run(["measure", "dimension", *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [told["crossing"][key] for key in ("d", "low", "high")] == [10, 10, 10]
    assert told["gap"] is None, "the training split is what is scored"
    name = {"1": "d100", "0.9": "d90"}[share]
    assert told["sentences"][0].startswith(f"{name} of toy is 10 [10, 10], with D = 1,000 parameters and 3 seeds")


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run(["measure", "dimension", *TOY, "--grid", "8,12", "--out=~/one"]) == 0
    assert run(["measure", "dimension", *TOY, "--grid", "8,12", "--out=~/two", "--reuse=~/one"]) == 0
    assert all((tmp_path / name / "results.json").exists() for name in ("one", "two"))
    assert not (tmp_path / "~").exists()


def test_the_runs_that_were_trained_are_counted_and_nobody_knows_how_many_there_will_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trimtab.cli.plain_lines.FIRST_SECONDS", -1.0)
    monkeypatch.setattr("trimtab.cli.plain_lines.EVERY_SECONDS", 0.0)
    assert run(["measure", "dimension", *TOY, "--grid", "8,12"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training")]
    paced = [re.sub(r"[\d.]+ (runs/s|s/run)$", "PACE", line) for line in told]
    assert paced == [
        "training θ0, untrained: 0 runs",
        "training θ0, untrained: 1 run, PACE",
        "training θ0, untrained: 2 runs, PACE",
        *(f"training all parameters: {n} runs, PACE" for n in (2, 3, 4)),
        *(f"training d = 8: {n} runs, PACE" for n in (4, 5, 6)),
        *(f"training d = 12: {n} runs, PACE" for n in (6, 7, 8)),
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--task", "mnist"], "there is no problem 'mnist'"),
        (["--task", "mnist-fc", "--data-dir", "/nowhere"], "which is no folder"),
        (["--grid", "0,5"], "d is 0, but must be at least 1"),
        (["--grid", "5,1000000"], "d is 1000000, but must be at least 1 and at most D ="),
        (["--grid", "five"], "must be numbers with commas between them, or li2018 or aghajanyan2020"),
        (["--grid", ","], "in which there is no d from 1 to 2,410"),
        (["--rates-at", "first"], "--rates-at is for several --rates"),
        (["--reuse", "/nowhere"], "/nowhere/search.json does not exist"),
        (["--projection", "none"], "unknown projection 'none'"),
        (["--mode", "said"], "--mode is for a task with --model"),
        (["--rows", "5"], "--rows is for a task with --model"),
        (["--grid", "5,9", "--start", "5"], "--start is for a search"),
        (["--grid", "5,9", "--resolution", "2"], "--resolution is for a search"),
        (["--projection", "uni", "--diagonal", "sign"], "--diagonal is for fastfood"),
        (["--model", "minilm", "--task", "sst2", "--width", "5"], "--width is for a task without --model"),
        (["--model", "minilm", "--task", "sst2", "--l2", "0"], "--l2 is for a task without --model"),
        *(
            (["--checkpoints", "a", "b", flag, value], f"{flag} is for a task without --model or --checkpoints")
            for flag, value in (("--shuffle", "pixels"), ("--width", "5"), ("--depth", "2"), ("--l2", "0.1"))
        ),
        (["--share", "1.5"], "must be above 0 and at most 1"),
        (["--workers", "0"], "workers is 0"),
        (["--seeds", "0"], "seeds is 0"),
        (["--lr", "-1"], "lr is -1.0, but must be a number above 0"),
        (["--lr", "inf"], "lr is inf, but must be a number above 0"),
        (["--l2", "inf"], "l2 is inf, but must be a number of at least 0"),
        (["--rates", "1,inf"], "rates are [1.0, inf], but must be numbers above 0"),
        (["--rates", ""], "--rates is empty: give a value, or leave it out"),
        (["--grid", ""], "--grid is empty"),
        (["--grid", "-1,5"], "d is -1, but must be at least 1"),
        (["--model", "minilm"], "digits has a net of its own: with a model --task is sst2, mrpc or a file"),
        (["--model", "minilm", "--task", "nope.tsv"], "there is no file nope.tsv: with a model --task is sst2"),
        (["--task", "sst2"], "sst2 is for a pretrained model to learn: name one with --model"),
        (["--task", "toy", "--width", "5"], "--width is for mnist-fc, not for toy"),
        (["--task", "toy", "--l2", "1"], "--l2 is for digits, mnist-fc and mnist-lenet, not for toy"),
        (["--shuffle", "labels"], "--shuffle is for mnist-fc and mnist-lenet, not for digits"),
        (["--model", "minilm", "--task", "sst2", "--layers", "tensor"], "--layers is for --mode said"),
        (["--data-dir", "/nowhere"], "digits reads no files, so --data-dir /nowhere changes nothing"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_any_training(flags: list[str], said: str, tmp_path: Path, capsys) -> None:
    assert run(["measure", "dimension", *flags, "--out", str(tmp_path / "new")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new" / "runs.jsonl").exists()


def test_what_a_folder_holds_is_not_overwritten_by_something_else(tmp_path: Path, capsys) -> None:
    def refused(*flags: str) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
        assert run(["measure", "dimension", *flags]) == 2
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
        return capsys.readouterr().err

    one, other, both, foreign = (str(tmp_path / name) for name in ("one", "other", "both", "foreign"))
    for out, seeds in ((one, "2"), (other, "3")):
        assert run(["measure", "dimension", *TOY, "--grid", "8,12", "--seeds", seeds, "--out", out]) == 0
    assert run(["measure", "dimension", "--compare", one, other, "--out", both]) == 0
    assert run(["measure", "dimension", "--compare", one, other, "--out", both]) == 0, "a comparison is drawn anew"
    Path(foreign).mkdir()
    (Path(foreign) / "report.html").write_text("of a run")
    capsys.readouterr()
    assert "holds a comparison of measurements" in refused(*TOY, "--out", both)
    assert "holds the results of something else" in refused(*TOY, "--out", foreign)
    third = str(tmp_path / "third")
    assert run(["measure", "dimension", *TOY, "--grid", "8,12", "--out", third]) == 0
    capsys.readouterr()
    assert "holds a single measurement" in refused("--compare", one, other, "--out", third)
    assert "holds a single measurement" in refused("--checkpoints", "a", "b", "--task", "sst2", "--out", third)
    assert "--out is empty" in refused(*TOY, "--out", "")


def test_what_was_trained_before_it_is_stopped_is_kept(tmp_path: Path, monkeypatch, capsys) -> None:
    from trimtab.subspace import trainers

    train, ended = trainers.train, []

    def stopping(*arguments, **options):
        if len(ended) == 3:
            raise KeyboardInterrupt
        ended.append(train(*arguments, **options))
        return ended[-1]

    monkeypatch.setattr(trainers, "train", stopping)
    flags = ["measure", "dimension", *TOY, "--grid", "8,12"]
    assert run([*flags, "--out", str(tmp_path)]) == 130
    assert f"the runs that ended are in {tmp_path}, and the same command goes on from there" in capsys.readouterr().err
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 5, "three, and θ0 with two seeds"
    assert run(flags) == 130
    assert "with --out, they would have been kept" in capsys.readouterr().err
    monkeypatch.setattr(trainers, "train", train)
    assert run([*flags, "--out", str(tmp_path)]) == 0
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 8


def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    flags = ["--task", "mnist-fc", "--data-dir", "/nowhere", "--out", str(tmp_path / "file" / "out")]
    assert run(["measure", "dimension", *flags]) == 2
    assert f"{tmp_path / 'file'} is a file, not a folder" in capsys.readouterr().err


def test_a_file_is_not_taken_for_a_task_that_is_called_like_it(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").write_text("")
    assert run(["measure", "dimension", *TOY, "--grid", "8,12"]) == 0
    assert run(["measure", "dimension", "--task", "./toy"]) == 2
    assert "./toy is for a pretrained model to learn" in capsys.readouterr().err
    assert run(["measure", "dimension", "--task", "x" * 300]) == 2


@pytest.mark.parametrize("name", ["runs.jsonl", "search.json"])
def test_folders_where_files_belong_are_refused(name: str, tmp_path: Path, capsys) -> None:
    assert run(["measure", "dimension", *TOY, "--grid", "8,12", "--out", str(tmp_path / "whole"), "--quiet"]) == 0
    (tmp_path / "whole" / name).unlink()
    (tmp_path / "whole" / name).mkdir()
    assert run(["measure", "dimension", *TOY, "--grid", "8,12", "--out", str(tmp_path / "whole")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_a_key_that_is_no_json_is_told_with_what_to_do(tmp_path: Path, capsys) -> None:
    (tmp_path / "search.json").write_text("{")
    assert run(["measure", "dimension", *TOY, "--grid", "8,12", "--out", str(tmp_path)]) == 2
    assert re.search(r"search\.json is not JSON: .*: choose another folder, or empty this one", capsys.readouterr().err)


def test_a_d_that_a_projection_has_no_room_for_is_refused_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("trimtab.subspace.matrices.MATRIX_BYTES", 4 * 1000 * 9)
    flags = ["measure", "dimension", *TOY, "--projection", "dense", "--out", str(tmp_path / "out")]
    assert run([*flags, "--grid", "8,10"]) == 2
    assert "d is 10, but must be at least 1 and at most 9, beyond which this projection" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run([*flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["found"], told["crossing"]["d"], list(told["scores"])[-1]) == ("above", None, "9")
    assert "is above 9, the largest d tried" in told["sentences"][0]


def test_a_threshold_that_guessing_passes_is_refused(capsys) -> None:
    assert run(["measure", "dimension", *QUICK, "--epochs", "1", "--share", "0.1"]) == 1
    assert "any d would pass" in capsys.readouterr().err


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a task of a file."""
    folder = tmp_path_factory.mktemp("sentences")
    train, test = (write_table(folder / f"{name}.tsv", lines(80)) for name in ("train", "test"))
    return ["--task", str(train), "--test-data", str(test), *QUICK, "--epochs", "1"]


def test_a_d_that_said_has_not_is_refused_before_any_training(sentences: list[str], tmp_path: Path, capsys) -> None:
    flags = ["--model", str(make_folder(tmp_path / "model")), "--mode", "said", "--out", str(tmp_path / "out")]
    assert run(["measure", "dimension", *sentences, *flags, "--grid", "3,2000"]) == 2
    assert "d is 3, but must be at least 6, since SAID spends 5 on the λ of its layers" in capsys.readouterr().err
    assert run(["measure", "dimension", *sentences, *flags, "--layers", "tensor", "--grid", "6"]) == 2
    assert "since SAID spends" in (err := capsys.readouterr().err)
    assert "spends 5" not in err, "a λ for each tensor is more of them"
    assert not (tmp_path / "out").exists(), "nor is anything written"


def test_the_rate_of_a_pretrained_model_is_chosen_where_something_is_learned(
    sentences: list[str], tmp_path: Path
) -> None:
    model = str(make_folder(tmp_path / "model"))
    flags = [*sentences, "--model", model, "--grid", "4,40", "--epochs", "4", "--batch-size", "8", "--lr-scale", "none"]
    assert run(["measure", "dimension", *flags, "--lr", "3e-3", "--out", str(tmp_path / "out")]) == 0
    runs = [json.loads(line)["run"] for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    tried = {d: sorted(r["lr"] for r in runs if r["d"] == d and r["seed"] == SWEEP_SEED) for d in (None, 4, 40)}
    assert tried[None] == pytest.approx([3e-3, 12e-3, 48e-3])
    assert [rate / tried[4][0] for rate in tried[4]] == pytest.approx([1, 4, 16])
    assert [rate / tried[40][0] for rate in tried[40]] == pytest.approx([1, 4, 16]), "nothing is learned at 4"


def test_checkpoints_of_other_shapes_are_told_even_where_they_have_as_many_parameters(
    sentences: list[str], tmp_path: Path, capsys
) -> None:
    made = [make_folder(tmp_path / "step-1", type_vocab_size=2), make_folder(tmp_path / "step-2", type_vocab_size=3)]
    config = json.loads((made[1] / "config.json").read_text())
    (made[1] / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 31}))
    shrink(made[1], "embeddings.position_embeddings.weight")
    flags = ["--checkpoints", *map(str, made)]
    assert run(["measure", "dimension", *sentences, *flags]) == 2
    told = "position_embeddings.weight is [32, 16] in step-1 and [31, 16] in step-2"
    assert told in capsys.readouterr().err


def test_a_series_takes_the_runs_of_each_checkpoint_from_an_earlier_one(sentences: list[str], tmp_path: Path) -> None:
    made = [str(make_folder(tmp_path / f"step-{step}")) for step in (1, 2)]
    flags = [*sentences, "--checkpoints", *made, "--grid", "2,40", "--lr", "1e-2", "--epochs", "4", "--rates", "1"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(["measure", "dimension", *flags, "--out", str(first)]) == 0
    assert run(["measure", "dimension", *flags, "--share", "0.8", "--reuse", str(first), "--out", str(second)]) == 0
    for step in ("step-1", "step-2"):
        assert (second / step / "runs.jsonl").read_bytes() == (first / step / "runs.jsonl").read_bytes()


def shrink(folder: Path, name: str) -> None:
    """Leave the last row of a tensor out of the checkpoint in a folder."""
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: tensors[name][:-1].clone()}, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The folders of two measurements of the toy, which differ in their projection."""
    folder = tmp_path_factory.mktemp("toys")
    for projection in ("uni", "dense"):
        flags = [*TOY, "--grid", "8,12", "--projection", projection, "--out", str(folder / projection), "--quiet"]
        assert run(["measure", "dimension", *flags]) == 0
    return [str(folder / projection) for projection in ("uni", "dense")]


def test_measurements_that_were_kept_are_set_side_by_side(toys: list[str], tmp_path: Path, capsys) -> None:
    assert run(["measure", "dimension", "--compare", *toys, "--out", str(tmp_path / "both"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["label"] for one in told["measurements"]] == ["uni", "dense"]
    assert all(one["n"] == 10 and one["gap"] is None for one in told["measurements"]), "all splits are the same"
    for folder, one in zip(toys, told["measurements"], strict=True):
        assert json.loads((Path(folder) / "results.json").read_text()).items() <= one.items()
    assert told == json.loads((tmp_path / "both" / "results.json").read_text()) | {"report": told["report"]}
    assert "How they differ" in Path(told["report"]).read_text()
    assert run(["measure", "dimension", "--compare", *toys]) == 0
    shown = capsys.readouterr().out
    assert all(
        word in shown for word in ("uni", "dense", "1,000", "√(first d/n)", "The intrinsic dimension is least for")
    )


def test_runs_of_all_parameters_are_taken_from_a_measurement_with_another_projection(
    toys: list[str], tmp_path: Path, capsys
) -> None:
    flags = [*TOY, "--grid", "8,12", "--projection", "sparse", "--out", str(tmp_path / "sparse")]
    assert run(["measure", "dimension", *flags, "--reuse", toys[0]]) == 0
    first, own = ((Path(folder) / "runs.jsonl").read_text().splitlines() for folder in (toys[0], tmp_path / "sparse"))
    assert own[:4] == first[:4], "to the second that they took"
    assert len(own) == len(first)
    assert run(["measure", "dimension", *flags[:-1], str(tmp_path / "other"), "--epochs", "3", "--reuse", toys[0]]) == 2
    assert f"{toys[0]} holds the runs of another search: epochs" in capsys.readouterr().err


def test_the_grid_of_a_paper_is_taken_by_its_name_up_to_all_parameters(capsys) -> None:
    assert run(["measure", "dimension", *TOY, "--seeds", "1", "--grid", "aghajanyan2020", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plan"]["grid"] == [d for d in GRIDS["aghajanyan2020"] if d <= 1000]
    assert told["crossing"]["first"] == 100


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--epochs", "3"], "--epochs changes nothing beside --compare"),
        (["--task", "toy"], "--task changes nothing beside --compare"),
        (["--checkpoints", "a", "b"], "--checkpoints changes nothing beside --compare"),
        (["--out", "{first}"], "is one of the measurements, whose results it would replace"),
        (["--compare", "{first}"], "is given twice"),
        (["--compare", "/nowhere"], "/nowhere holds no results.json"),
    ],
    ids=str,
)
def test_a_comparison_that_cannot_be_is_refused(flags: list[str], said: str, toys: list[str], capsys) -> None:
    before = (Path(toys[0]) / "results.json").read_bytes()
    asked = [flag.format(first=toys[0]) for flag in flags]
    assert run(["measure", "dimension", "--compare", *toys, *asked]) == 2
    assert said in capsys.readouterr().err
    assert (Path(toys[0]) / "results.json").read_bytes() == before
