"""From a causal model's hidden states to its loss, where the model's head is known exactly.

A model's logits are z = cap(scale · head(h)), with h the last hidden state of its backbone. Where that holds, the loss
is computed from h, and logits exist for a few rows at a time only. Whether it holds is tried out on the model.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.adapt.frozen_head import is_plain
from trimtab.adapt.module import Adapted, modes_kept
from trimtab.adapt.prompts import Prompted
from trimtab.adapt.select import output_head
from trimtab.deltas.layout import original_class
from trimtab.errors import TRIAL_FAILURES, ran_out_of_memory
from trimtab.models.last_layer import FEW, at_positions, last_feed_forward, recomputes
from trimtab.ops.cross_entropy import head_cross_entropy, linear_cross_entropy, nats, token_nats
from trimtab.ops.precision import autocasts

log = logging.getLogger("trimtab")

FACTORS = ("logit_scale",)
DIVISORS = ("logits_scaling",)
"""Where configurations keep the number their logits are multiplied or divided by."""
LARGE = 100.0  # a logit on which any soft cap in use shows


@dataclass(frozen=True)
class Readout:
    """A model's backbone and head, and what it does to its logits.

    last: the feed-forward of its last layer, where that works on each position by itself.
    """

    backbone: nn.Module
    head: nn.Module
    scale: float
    soft_cap: float | None
    last: nn.Module | None

    def hidden(self, positions: Tensor | None = None, **inputs: Any) -> Tensor:
        """The last hidden state, [rows, length, d].

        positions: [n] of the flattened tokens, no two equal, where it is read; elsewhere it may be anything.
        """
        tokens, length = inputs["input_ids"].numel(), inputs["input_ids"].shape[-1]
        if positions is not None and isinstance(self.backbone, Prompted):
            positions = self.backbone.places(positions, length)
        few = positions is not None and len(positions) <= FEW * tokens and not recomputes(self.backbone)
        with at_positions(self.last, positions) if self.last is not None and few else nullcontext():  # type: ignore[arg-type]
            states: Tensor = self.backbone(**inputs, use_cache=False).last_hidden_state
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] to the model's logits [..., vocabulary]."""
        z: Tensor = self.head(hidden)
        z = z * self.scale if self.scale != 1.0 else z
        return z if self.soft_cap is None else self.soft_cap * torch.tanh(z / self.soft_cap)

    def loss(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Σ weights · nats of the targets. hidden: [terms, d]."""
        weight: Tensor = self.head.weight  # type: ignore[assignment]
        bias: Tensor | None = getattr(self.head, "bias", None)
        trained = [p for p in _taking_part(self.head) if p.requires_grad]
        adapted = isinstance(self.head, Adapted) and self.head._active
        if adapted and _shares(self.head):
            return (nats(self.logits(hidden), targets) * weights).sum()
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        if adapted or trains or not is_plain(self.head):
            return head_cross_entropy(hidden, targets, weights, self.logits, weight.shape[0], trained)
        return linear_cross_entropy(hidden, targets, weights, weight, bias, scale=self.scale, soft_cap=self.soft_cap)

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """[terms] of −log p(target), without gradient. hidden: [terms, d]."""
        vocabulary = cast("Tensor", self.head.weight).shape[0]
        return token_nats(hidden, targets, self.logits, vocabulary)


def _taking_part(head: nn.Module) -> list[nn.Parameter]:
    """The head's parameters but for those of adapters that are not active."""
    if not isinstance(head, Adapted):
        return list(head.parameters())
    parts = [*head.deltas.items(), *(head.copies.items() if head.copies is not None else ())]
    idle = {id(p) for name, own in parts if name not in head._active for p in own.parameters()}
    return [p for p in head.parameters() if id(p) not in idle]


def _shares(head: nn.Module) -> bool:
    """Whether what changes a head is trained elsewhere too, so that its gradient cannot be taken block by block."""
    deltas = cast("Any", head).deltas
    return any(deltas[name].method.shared for name in cast("Any", head)._active if name in deltas)


_KNOWN: WeakKeyDictionary[nn.Module, Readout | None] = WeakKeyDictionary()


def readout_of(model: nn.Module) -> Readout | None:
    """The model's readout; None, said once in the log, where its logits are something else than described above."""
    known = _KNOWN.get(model)
    replaced = known is not None and known.head is not output_head(model)
    if model not in _KNOWN or replaced:
        found = _candidate(model)
        why = "its head was not found" if found is None else _difference(model, found)
        if found is not None and why is None and not _last_by_position(model, found):
            found = dataclasses.replace(found, last=None)
        if why is not None:
            log.warning("%s: %s, so the loss is computed from all logits", original_class(model).__name__, why)
        _KNOWN[model] = found if why is None else None
    return _KNOWN[model]


@contextmanager
def all_logits(model: nn.Module) -> Iterator[None]:
    """Within the block the model's loss is computed from all its logits."""
    known = _KNOWN.pop(model, None)
    _KNOWN[model] = None
    try:
        yield
    finally:
        del _KNOWN[model]
        if known is not None:
            _KNOWN[model] = known


def _candidate(model: Any) -> Readout | None:
    backbone, head = getattr(model, "base_model", None), output_head(model)
    if backbone is model:  # its class names its backbone by another attribute than it has it in
        backbone = getattr(model, "get_decoder", lambda: None)()
    if backbone is None or backbone is model or not isinstance(head, nn.Linear):
        return None
    if original_class(head).forward is not nn.Linear.forward:
        return None
    config = model.config.get_text_config()
    scale = 1.0
    for name in FACTORS:
        scale *= getattr(config, name, None) or 1.0
    for name in DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    return Readout(backbone, head, scale, cap, last_feed_forward(backbone))


@torch.no_grad()
def _difference(model: nn.Module, readout: Readout) -> str | None:
    """What is wrong with a readout: the model's own logits of a few tokens are something else.

    Tried with the head's input as it is, and so large that a cap shows.
    """
    ids = torch.tensor([[1, 2, 3]], device=next(model.parameters()).device)
    with modes_kept(model):
        model.eval()
        try:
            size = float(readout.head(readout.hidden(input_ids=ids)).abs().max())
            for factor in (1.0, LARGE / max(size, 1e-6)):
                with _input_times(readout.head, factor):
                    own = model(input_ids=ids, use_cache=False).logits.float()
                    ours = readout.logits(readout.hidden(input_ids=ids)).float()
                if own.shape != ours.shape or not _same(own, ours, model):
                    return "its logits are not its head's"
        except TRIAL_FAILURES as error:
            if ran_out_of_memory(error):
                raise
            return f"its backbone cannot be asked alone ({error})"
    return None


@contextmanager
def _input_times(module: nn.Module, factor: float) -> Iterator[None]:
    """Within the block the module is given `factor` times its input."""
    hook = module.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * factor, *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _last_by_position(model: nn.Module, readout: Readout) -> bool:
    """Whether the last feed-forward, asked for one position alone, leaves what is read there as it was."""
    device = next(model.parameters()).device
    ids, position = torch.tensor([[1, 2, 3]], device=device), torch.tensor([1], device=device)
    with modes_kept(model):
        model.eval()
        try:
            whole, alone = (readout.hidden(p, input_ids=ids)[0, 1].float() for p in (None, position))
        except TRIAL_FAILURES as error:
            if ran_out_of_memory(error):
                raise
            return False
    return _same(whole, alone, model)


def _same(own: Tensor, ours: Tensor, model: nn.Module) -> bool:
    """Whether two results of the model differ by its rounding at most, each number of them."""
    if autocasts(own.device):
        allowed = 1e-2
    else:
        allowed = min(1e-2, 1e2 * max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()))
    finite = bool(own.isfinite().all())  # of infinite ones nothing would differ
    return finite and bool((own - ours).abs().max() <= allowed * own.abs().max())
