"""trimtab measure directions, as a user meets it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import trimtab as package
from trimtab.models.load import load

SMALL = ("--directions", 4, "--draws", 100)


@pytest.fixture(scope="session")
def references(model, tmp_path_factory):
    """The tiny model fine-tuned: as a full adapter in q_proj and up_proj, and as a model of its own."""
    folder = tmp_path_factory.mktemp("references")
    loaded = load(str(model))
    adapter = package.attach(loaded.model, package.Full(), targets=("q_proj", "up_proj"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    adapter.save(folder / "full")
    package.merge(adapter)
    package.save_merged(loaded.model, folder / "model", tokenizer=loaded.tokenizer)
    return folder


def measured(trimtab, *arguments):
    done = trimtab("measure", "directions", *arguments, *SMALL, "--json")
    assert done.code == 0, done.err
    return done.json


def test_an_adapter_is_measured_against_a_full_one(trimtab, model, adapters, references, tmp_path):
    out = tmp_path / "out"
    given = ["--model", model, "--adapter", adapters / "sql", "--reference", references / "full"]
    done = trimtab("measure", "directions", *given, *SMALL, "--out", out)
    assert done.code == 0, done.err
    assert "two random" in done.out
    assert "smallest σ" in done.out
    assert "32×32 (2 weights): no verdict, for 2 layers are too few" in done.out
    assert "64×32 (2 weights): no verdict" in done.out
    assert (
        "warning: the reference does not change 10 of 14 weights, such as model.layers.0.self_attn.k_proj" in done.err
    )
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    told = json.loads((out / "results.json").read_text())
    (adapter,) = told["adapters"]
    assert adapter["weights"] == 14
    assert [shape["label"] for shape in adapter["overlap"]["shapes"]] == ["64×32", "32×32"]
    assert told["reference"]["weights"] == 4
    weights = adapter["picked"]["weights"]
    assert {weight["rank"] for weight in weights} == {4}
    assert all(len(weight["picked"]) == 4 for weight in weights)
    every = load_file(out / "projections.safetensors")
    assert len(every) == 14 + 14 + 4
    for weight in weights:
        along = every[f"sql/{weight['path']}.along"]
        np.testing.assert_allclose(along[weight["picked"]], weight["projections"], rtol=1e-6)
        assert every[f"{weight['path']}.sigma"].shape == along.shape == (min(weight["shape"]),)


def test_a_fine_tuned_model_and_its_change_as_an_adapter_are_the_same_reference(trimtab, model, adapters, references):
    both = [
        measured(trimtab, "--model", model, "--adapter", adapters / "sql", "--reference", references / name)
        for name in ("full", "model")
    ]
    common = [
        {w["path"]: w["actual"] for w in told["adapters"][0]["overlap"]["weights"] if "q_proj" in w["path"]}
        for told in both
    ]
    assert common[0] == common[1] != {}


def test_several_adapters_are_compared_pairwise(trimtab, model, adapters):
    told = measured(trimtab, "--model", model, "--adapter", adapters / "sql", "--adapter", f"b={adapters / 'poet'}")
    assert [one["name"] for one in told["adapters"]] == ["sql", "b"]
    (pair,) = told["sharing"]
    assert (pair["first"], pair["second"]) == ("sql", "b")
    assert {len(shape["cells"]) for shape in pair["shapes"]} == {4}
    assert len(pair["weights"]) == 14
    assert told["reference"] is None


def test_checkpoints_of_a_run_are_put_in_the_order_of_their_steps(train, trimtab, model, references, tmp_path):
    assert train(tmp_path / "run", "--save-every", 1).code == 0
    steps = tmp_path / "run" / "checkpoints"
    given = ["--adapter", steps / "step-000002", "--adapter", f"1={steps / 'step-000001'}"]
    told = measured(trimtab, "--model", model, *given, "--reference", references / "model")
    assert [(one["name"], one["step"], one["kind"]) for one in told["adapters"]] == [
        ("1", 1, "checkpoint"),
        ("step-000002", 2, "checkpoint"),
    ]
    assert told["sharing"] == []
    alone = measured(trimtab, "--model", model, "--adapter", tmp_path / "run")
    assert alone["adapters"][0]["picked"]["weights"] == told["adapters"][1]["picked"]["weights"]


def test_the_same_seed_gives_the_same_and_another_one_other_nulls(trimtab, model, adapters):
    given = ["--model", model, "--adapter", adapters / "sql"]
    told = [measured(trimtab, *given, "--seed", seed) for seed in (0, 0, 1)]
    assert told[0] == told[1]
    picked = [[w["picked"] for w in one["adapters"][0]["picked"]["weights"]] for one in told]
    assert picked[0] == picked[2]
    assert told[0]["adapters"] != told[2]["adapters"]


def test_what_cannot_be_measured_is_one_line(trimtab, model, adapters, references, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    base = ["--model", model, "--adapter", adapters / "sql"]
    for arguments, told in (
        (["--adapter", adapters / "sql"], "measure directions: 'model' is missing"),
        (["--model", model], "measure directions: 'adapter' is missing"),
        (["--model", model, "--adapter", tmp_path / "empty"], "holds no adapter"),
        (["--model", model, "--adapter", "nowhere"], "there is no folder nowhere"),
        ([*base, "--reference", tmp_path / "nowhere"], "reference: there is no folder"),
        ([*base, "--directions", 17], "17 directions are above the 16 core directions of model.layers.0.self_attn.k"),
        ([*base, "--reference", references / "full", "--directions", 9], "twice the 9 directions"),
        ([*base, "--draws", 5], "draws is 5, but must be at least 100"),
        ([*base, "--out", tmp_path], "is not empty"),
        ([*base, "--reference", references / "model" / "..", "--quiet"], "holds no adapter"),
    ):
        done = trimtab("measure", "directions", *arguments)
        assert done.code == 2, arguments
        assert told in done.err
        assert done.err.splitlines()[-1].startswith("trimtab: ")


def test_models_that_do_not_fit_are_refused(trimtab, model, adapters, tmp_path):
    from transformers import LlamaForCausalLM

    loaded = load(str(model))
    config = loaded.model.config
    config.hidden_size, config.head_dim = 16, 4
    other = LlamaForCausalLM(config)
    other.save_pretrained(tmp_path / "other")
    given = ["measure", "directions", *SMALL]
    done = trimtab(*given, "--model", tmp_path / "other", "--adapter", adapters / "sql")
    assert done.code == 2
    assert "does not fit this model" in done.err
    done = trimtab(*given, "--model", model, "--adapter", adapters / "sql", "--reference", tmp_path / "other")
    assert done.code == 2
    assert "is [16, 16] in the fine-tuned model, but [32, 32] in the base" in done.err


def test_a_reference_of_other_modules_is_refused(trimtab, model, references, tmp_path):
    loaded = load(str(model))
    adapter = package.attach(loaded.model, package.LoRA(rank=2), targets="down_proj")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(0.1)
    adapter.save(tmp_path / "down")
    given = ["--model", model, "--adapter", tmp_path / "down", "--reference", references / "full"]
    done = trimtab("measure", "directions", *given, *SMALL)
    assert done.code == 2
    assert "the reference changes none of the 2 weights, such as model.layers.0.mlp.down_proj; it changes" in done.err
