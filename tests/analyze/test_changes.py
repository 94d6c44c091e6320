"""Where changes come from: adapters, checkpoints, fine-tuned models; what does not fit is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab
from tiny_training import make_examples, make_llama
from toys import built, numbers, stir
from trimtab.analyze.changes import (
    Changed,
    StoredTensors,
    aligned,
    kind_of,
    of_adapter,
    of_model,
    of_states,
    read_changes,
)
from trimtab.deltas import make_method
from trimtab.errors import FormatError, UsageError
from trimtab.train.settings import Settings

ROOT = Path(__file__).parents[2]


@torch.no_grad()
def fine_tuned(name: str, size: float = 0.01) -> Any:
    """A tiny model whose every weight moved a little."""
    model = built(name)
    for number, parameter in enumerate(model.parameters()):
        parameter.add_(size * numbers(*parameter.shape, seed=number))
    return model


def dense(changed: Changed) -> Tensor:
    made = changed.change()
    return made if isinstance(made, Tensor) else made[0] @ made[1]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_fine_tuned_model_and_a_full_adapter_are_the_same_change(name: str) -> None:
    base, tuned = built(name), fine_tuned(name)
    from_states = {c.path: c for c in of_states(base.state_dict(), tuned.state_dict())}
    changes = of_model(base, tuned.state_dict())
    adapter = trimtab.attach(base, trimtab.Full())
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            difference = tuned.get_submodule(path).weight - adapter.sites[path].weight
            delta.change.copy_(delta.layout.matrix(difference))
    own = of_adapter(adapter)
    assert [c.path for c in changes] == [c.path for c in own]
    for ours, theirs in zip(own, changes, strict=True):
        torch.testing.assert_close(dense(ours), dense(theirs))
        assert torch.equal(ours.weight, theirs.weight)
        plain = dense(from_states[ours.path])
        torch.testing.assert_close(
            plain if plain.shape == dense(ours).shape and name == "llama" else plain.T, dense(ours)
        )


def test_a_folder_is_read_as_its_state_dict(tmp_path: Path) -> None:
    base, tuned = built("llama"), fine_tuned("llama")
    tuned.save_pretrained(tmp_path / "whole")
    tuned.save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    wanted = of_model(base, tuned.state_dict())
    for folder in ("whole", "parts"):
        stored = StoredTensors(tmp_path / folder)
        assert len(stored) == len(list(stored))
        with read_changes(tmp_path / folder, base) as changes:
            assert [c.path for c in changes] == [c.path for c in wanted]
            assert all(torch.equal(dense(a), dense(b)) for a, b in zip(changes, wanted, strict=True))


def test_the_weights_asked_for_are_looked_at() -> None:
    base, tuned = built("llama"), fine_tuned("llama")
    path = "model.layers.1.mlp.up_proj"
    assert [c.path for c in of_model(base, tuned.state_dict(), [path])] == [path]


def test_another_model_is_no_fine_tuned_one() -> None:
    base, other = built("llama"), built("llama")
    with torch.no_grad():
        for number, parameter in enumerate(other.parameters()):
            parameter.copy_(0.1 * numbers(*parameter.shape, seed=number))
    with pytest.raises(FormatError, match=r"differs from the base by more than its own size"):
        of_model(base, other.state_dict())
    with pytest.raises(FormatError, match=r"has no 'model\.layers\.0\.self_attn\.q_proj\.weight'"):
        of_model(base, built("gpt2").state_dict())
    state = {k: t[:3] for k, t in base.state_dict().items()}
    with pytest.raises(FormatError, match=r"is \[3, 16\] in the fine-tuned model, but \[16, 16\] in the base"):
        of_model(base, state)


def test_a_whole_projection_gives_the_rows_that_slices_are_of() -> None:
    model = built("gpt2")
    flags = {"c_attn": (True, False, True)}
    sliced = of_adapter(stir(trimtab.attach(model, trimtab.LoRA(rank=2), targets="c_attn", slices=flags)))
    for method, made in ((trimtab.Full(), "dense"), (trimtab.LoRA(rank=2), "factors")):
        whole = of_adapter(stir(trimtab.attach(model, method, targets="c_attn", name=made)))
        found = aligned(whole, [c.path for c in sliced])
        assert [c.path for c in found] == [c.path for c in sliced]
        for wanted, own in zip(sliced, found, strict=True):
            assert torch.equal(wanted.weight, own.weight)
        torch.testing.assert_close(dense(found[1]), dense(whole[0])[32:48])
    assert aligned(sliced, ["h.0.attn.c_attn", "nowhere"]) == []


def test_merged_weights_and_branches_have_no_directions() -> None:
    model = built("llama")
    adapter = stir(trimtab.attach(model, trimtab.LoRA(rank=2)))
    trimtab.merge(adapter)
    with pytest.raises(UsageError, match="merged weights: unmerge them first"):
        of_adapter(adapter)
    trimtab.unmerge(adapter)
    assert of_adapter(adapter)
    branch = trimtab.attach(model, make_method("parallel", width=2), name="branch")
    with pytest.raises(UsageError, match="adds what no weight can compute"):
        of_adapter(branch)


def trained(out: Path, method: Any, **options: Any) -> Any:
    model = make_llama()
    adapter = trimtab.attach(model, method, seed=5, **options)
    settings = Settings(batch_size=3, epochs=1, lr=1e-2, seed=5, save_every=2)
    trimtab.fit(adapter, make_examples(), settings, out=out)
    return adapter


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (trimtab.LoRA(rank=2, rank_pattern={"q_proj": 3}), {"bias": "none"}),
        (trimtab.Dash(rank=2, directions=3, warm_up_steps=1), {}),
        (trimtab.Full(), {"extra_modules": ["lm_head"]}),
    ],
    ids=["lora", "dash", "full"],
)
def test_a_checkpoint_is_the_adapter_at_its_step(tmp_path: Path, method: Any, options: Any) -> None:
    adapter = trained(tmp_path, method, **options)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    assert kind_of(newest) == "checkpoint"
    assert kind_of(tmp_path) == "adapter"
    base = make_llama()
    wanted = {c.path: dense(c) for c in of_adapter(adapter)}
    for folder in (newest, tmp_path):
        with read_changes(folder, base) as changes:
            assert [c.path for c in changes] == list(wanted)
            if newest.name == "step-000004":  # the last step, so both are the same
                assert all(torch.equal(dense(c), wanted[c.path]) for c in changes)
    assert newest.name == "step-000004"
    assert trimtab.adapters(base) == {}


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    trained(tmp_path / "a", trimtab.LoRA(rank=2))
    step = tmp_path / "a" / "checkpoints" / "step-000004"
    for model, why in (
        (make_llama(hidden_size=32), r"does not fit this model: '.*' is \[.*\] in"),
        (built("gpt2"), "which the model has not"),
    ):
        with pytest.raises(FormatError, match=why), read_changes(step, model):
            pass
        assert trimtab.adapters(model) == {}
    trained(tmp_path / "b", trimtab.LoRA(rank=2), targets="q_proj", slices={"q_proj": (True, False)})
    sliced = tmp_path / "b" / "checkpoints" / "step-000004"
    with pytest.raises(UsageError, match="give the adapter folder of its run"), read_changes(sliced, make_llama()):
        pass
    (step / "state.json").write_text("{}")
    with pytest.raises(FormatError, match="is not a checkpoint of this version"), read_changes(step, make_llama()):
        pass


@pytest.mark.parametrize("method", [trimtab.LoRA(rank=2), trimtab.Full()], ids=["lora", "full"])
def test_a_checkpoint_of_another_base_is_refused_unless_any_may_be(tmp_path: Path, method: Any) -> None:
    trained(tmp_path, method)
    step, other = tmp_path / "checkpoints" / "step-000004", make_llama(1)
    told = r"made on another base: there, the weight of model\.layers\.\S+ was not what it is here.*--any-base"
    with pytest.raises(FormatError, match=told), read_changes(step, other):
        pass
    assert trimtab.adapters(other) == {}
    with read_changes(step, make_llama().bfloat16()) as own, read_changes(step, other, any_base=True) as foreign:
        assert len(own) == len(foreign) > 0


def test_the_example_of_the_documents_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_llama(hidden_size=32)
    for name, method in (("sql", trimtab.LoRA(rank=2)), ("full", trimtab.Full())):
        adapter = stir(trimtab.attach(model, method, targets=["up_proj", "q_proj"]), size=0.02)
        adapter.save(Path("runs") / name / "adapter")
        adapter.remove()
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "directions.md").read_text(), re.DOTALL)
    exec(compile(code, "directions.md", "exec"), {"model": model})
    assert "32×32 (4 weights): no verdict" in capsys.readouterr().out


def test_a_folder_of_something_else_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no adapter"):
        kind_of(tmp_path)
