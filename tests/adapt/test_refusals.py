"""What would do nothing, or the wrong thing, without a word is an error that says so."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import trimtab
from toys import built
from trimtab.errors import FormatError, UsageError
from trimtab.files import StorageError


def test_a_module_whose_forward_a_hook_has_replaced_is_refused_by_name():
    model = built("llama")
    target = model.model.layers[0].mlp.up_proj
    target.forward = lambda x: nn.Linear.forward(target, x)
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.up_proj, which has a forward of its own"):
        trimtab.attach(model, trimtab.LoRA(rank=2), targets=["model.layers.0.mlp.up_proj"])


class Transposed(nn.Linear):
    """A linear layer written in other words, as Falcon's is."""

    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Doubled(nn.Linear):
    """Another map."""

    def forward(self, x):
        return 2 * super().forward(x)


class Stateful(Transposed):
    """What keeps something beside its weight may compute otherwise later."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.state = None


@pytest.mark.parametrize(("kind", "taken"), [(Transposed, True), (Doubled, False), (Stateful, False)])
def test_a_linear_layer_in_other_words_is_taken_for_what_it_computes(kind, taken):
    model = nn.Sequential(kind(6, 4))
    if not taken:
        with pytest.raises(UsageError, match="computes otherwise than a linear layer"):
            trimtab.attach(model, trimtab.LoRA(rank=2), targets=["0"])
        return
    adapter, x = trimtab.attach(model, trimtab.LoRA(rank=2), targets=["0"]), torch.randn(3, 6)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    (change,) = adapter.deltas.values()
    wanted = nn.functional.linear(x, model[0].weight + change.weight_change(model[0].weight), model[0].bias)
    torch.testing.assert_close(model(x), wanted)
    adapter.remove()
    assert type(model[0]) is Transposed


def test_an_adapter_of_a_smaller_model_is_refused_and_names_the_first_module_missing(tmp_path):
    small, model = built("llama"), built("llama")
    small.model.layers = small.model.layers[:1]
    trimtab.attach(small, trimtab.LoRA(rank=2)).save(tmp_path / "small")
    with pytest.raises(FormatError, match=r"nothing for 'model\.layers\.1\.self_attn\.q_proj'"):
        trimtab.load(model, tmp_path / "small")
    assert not trimtab.adapters(model)


def test_an_adapter_with_a_module_taken_out_of_its_file_is_refused(tmp_path):
    folder = trimtab.attach(built("llama"), trimtab.LoRA(rank=2)).save(tmp_path / "whole")
    file = folder / "adapter_model.safetensors"
    tensors = {key: t for key, t in load_file(file).items() if "layers.1.mlp.down_proj" not in key}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"nothing for 'model\.layers\.1\.mlp\.down_proj'"):
        trimtab.load(built("llama"), folder)


def test_an_adapter_of_some_layers_loads_when_its_configuration_says_so(tmp_path):
    folder = trimtab.attach(built("llama"), trimtab.LoRA(rank=2), targets=["model.layers.0.mlp.up_proj"]).save(
        tmp_path / "a"
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.mlp.up_proj"]
    assert list(trimtab.load(built("llama"), folder).deltas) == ["model.layers.0.mlp.up_proj"]


def test_a_compiled_model_is_refused_with_what_to_do():
    compiled = torch.compile(built("llama"), backend="eager")
    with pytest.raises(UsageError, match=r"adapt model\._orig_mod, then wrap it"):
        trimtab.attach(compiled, trimtab.LoRA(rank=2))


def test_a_full_disk_while_saving_a_merged_model_is_told_as_one(tmp_path, monkeypatch):
    model = built("llama")
    adapter = trimtab.attach(model, trimtab.LoRA(rank=2))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    trimtab.merge(adapter)

    def full(*args, **kwargs):
        raise SafetensorError(f"Error while serializing: I/O error: No space left on device (os error {errno.ENOSPC})")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(StorageError, match="no space left"):
        trimtab.save_merged(model, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_sliced_adapter_whose_file_changes_other_rows_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(6, 9))
    adapter = trimtab.attach(model, trimtab.LoRA(rank=2), targets=["0"], slices={"0": (True, False, True)})
    folder = adapter.save(tmp_path / "sliced")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.0.lora_B.weight"][4] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match="outside the slices"):
        trimtab.load(nn.Sequential(nn.Linear(6, 9)), folder)
