"""How many parameters a method would train, told from the shapes of a model alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from trimtab.adapt.attach import fitting_delta, parts_of
from trimtab.adapt.module import device_of
from trimtab.adapt.prompt_trial import FIRST, as_prompt
from trimtab.adapt.prompts import backbone_of, make_prompt
from trimtab.adapt.select import Placement, base_modules, choose, present
from trimtab.deltas.method import Method
from trimtab.deltas.soft_prompt import SoftPrompt


class Size(NamedTuple):
    """parameters: how many numbers are trained. modules: in how many modules."""

    parameters: int
    modules: int


def size(model: nn.Module, method: Method) -> Size:
    """What `attach(model, method)` would train; the model may be on the meta device, without values.

    The deltas are made as attaching makes them, on the meta device, so nothing is allocated and nothing is decomposed.
    Raises UsageError where attaching would.
    """
    if isinstance(method, SoftPrompt):
        return _of_prompt(model, method)
    modules, generator = base_modules(model), torch.Generator()
    targets = present(method.default_targets, modules, method.name)
    sites = choose(model, modules, targets)
    with torch.device("meta"):
        deltas = {s.path: (s.module, fitting_delta(method, Placement(targets), s, generator)) for s in sites}
        method.bind(parts_of(deltas))
    return Size(sum(p.numel() for _, delta in deltas.values() for p in delta.parameters()), len(sites))


def _of_prompt(model: Any, method: SoftPrompt) -> Size:
    _, backbone = backbone_of(model, method)
    sizes, _ = as_prompt(model, backbone, method, torch.tensor([FIRST], device=device_of(backbone)))
    with torch.device("meta"):
        words = nn.Embedding(*model.get_input_embeddings().weight.shape)
        prompt = make_prompt(method, sizes, words, trained=True)
    return Size(sum(p.numel() for p in prompt.parameters()), 1)
