"""How the examples of a batch are put together: as a prefix tree, in one row, or padded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.module import modes_kept
from trimtab.adapt.prompts import has_prompt
from trimtab.data.batch import Batch, pad
from trimtab.data.encode import Example
from trimtab.data.pack import pack, pack_shared
from trimtab.deltas.layout import original_class
from trimtab.errors import UsageError, ran_out_of_memory
from trimtab.models.attention import attending_by_tree, rotates_alike_to, why_no_tree
from trimtab.models.readout import readout_of
from trimtab.ops.products import NARROW
from trimtab.train.loss import Loss, causal_loss

log = logging.getLogger("trimtab")

Build = Callable[[Sequence[Any], int], Batch]
"""Makes a batch of examples, with the id of the padding token."""
LEAK = 1e-4  # of the outputs' size: a true mask leaves no trace at all, a missing one some hundredths


@dataclasses.dataclass(frozen=True)
class Packing:
    """How batches are built, and why so.

    name: tree, pack or pad, as `Settings.packing`. build: makes a training batch; build_eval: one of evaluation, where
    nothing is dropped. by_tree: whether the model is to attend by tree. reason: one clause, for people.
    """

    name: str
    build: Build
    build_eval: Build
    by_tree: bool
    reason: str

    @property
    def shares(self) -> bool:
        """Whether a training batch computes shared prefixes once."""
        return self.build is pack_shared

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model takes these batches."""
        if not self.by_tree:
            yield
            return
        with attending_by_tree(model):
            yield


PAD = Packing("pad", pad, pad, False, "as asked")


def packing_for(
    adapter: Adapter, wanted: str, examples: Sequence[Example], loss: Loss = causal_loss, build: Build = pad
) -> Packing:
    """The packing of training an adapter; see `packing_of`. build: makes the batches that a loss of one's own reads."""
    packing = packing_of(adapter.model, wanted, examples, dropout=dropout_of(adapter), loss=loss)
    return packing if build is pad else dataclasses.replace(packing, build=build, build_eval=build)


def packing_of(
    model: nn.Module, wanted: str, examples: Sequence[Example], *, dropout: float = 0.0, loss: Loss = causal_loss
) -> Packing:
    """The packing that `wanted` (auto, tree, pack or pad) comes to on a model that drops out with this probability.

    auto takes the first that is exact: a tree; without sharing where dropout is on, as sharing a prefix would share
    its dropout; padding. UsageError when what was asked for by name would not be exact. With dropout, tree by name is
    allowed: examples that share a prefix then share what was dropped from it.
    """
    if loss is not causal_loss:
        if wanted not in ("auto", "pad"):
            raise UsageError(f"packing '{wanted}' is for the loss of causal models: another loss takes 'pad'")
        return PAD if wanted == "pad" else dataclasses.replace(PAD, reason="this loss is of padded batches")
    longest = max((len(example.input_ids) for example in examples), default=0)
    packing = PAD if wanted == "pad" else _exact(model, wanted, longest, dropout)
    if packing.name == "pad":
        warn_of_padding(model, examples)
    return packing


def warn_of_padding(model: nn.Module, examples: Sequence[Example]) -> None:
    """Tell of a model that computes an example beside a longer one otherwise than alone."""
    lengths = [len(example.input_ids) for example in examples]
    if lengths and not pads_exactly(model, min(lengths), max(lengths)):
        log.warning(
            "%s does not compute an example in a padded batch as it does the example alone: with micro_batch 1 no "
            "example is padded",
            original_class(model).__name__,
        )


def _exact(model: nn.Module, wanted: str, longest: int, dropout: float) -> Packing:
    if has_prompt(model):
        if wanted != "auto":
            raise UsageError(f"packing '{wanted}' has no place for a soft prompt before each example: take 'pad'")
        return dataclasses.replace(PAD, reason="a soft prompt stands before each row")
    limit = rotates_alike_to(model)
    if limit is not None and longest > limit:
        reason = f"{original_class(model).__name__} rotates by other angles in rows of more than {limit} tokens"
        if wanted != "auto":
            raise UsageError(f"packing '{wanted}' would not be exact: {reason}, and the longest example has {longest}")
        return dataclasses.replace(PAD, reason=reason)
    why = why_no_tree(model, longest)
    if why is None:
        return _by_tree(wanted, dropout)
    if wanted == "tree":
        raise UsageError(f"packing 'tree' would not be exact: {why}; packing 'auto' takes what is")
    leak = leaks(model, longest)
    if leak and wanted == "pack":
        raise UsageError(
            f"{original_class(model).__name__} cannot tell packed examples apart, so that each would see the one "
            "before it: use packing 'pad'"
        )
    if leak:
        return dataclasses.replace(PAD, reason=f"{why}, and it cannot tell packed examples apart")
    return Packing("pack", pack, pack, False, f"without sharing: {why}")


def _by_tree(wanted: str, dropout: float) -> Packing:
    if wanted == "pack":
        return Packing("pack", pack, pack, True, "as asked")
    if wanted == "auto" and dropout:
        reason = f"without sharing, since with dropout {dropout:g} a shared prefix would share what was dropped from it"
        return Packing("pack", pack, pack_shared, True, f"{reason} (packing 'tree' does so)")
    shared = ", and what was dropped from it" if dropout else ""
    return Packing("tree", pack_shared, pack_shared, True, f"examples that begin alike share that{shared}")


def dropout_of(adapter: Adapter) -> float:
    """The largest probability of dropout, or size of noise, in training, of adapter or model; 0 where there is none."""
    model: Any = adapter.model
    config = model.config.get_text_config() if hasattr(model, "config") else None
    own = [getattr(delta.method, "dropout", 0.0) for delta in adapter.deltas.values()]
    layers = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    # What a module's forward hands to functional dropout, leaves whole layers out by, or makes noise with.
    held = ((key, value) for module in model.modules() for key, value in vars(module).items())
    named = [float(value) for key, value in held if isinstance(value, float) and ("drop" in key or "jitter" in key)]
    return max([0.0, *own, *layers, *named, float(getattr(config, "attention_dropout", None) or 0.0)])


@torch.no_grad()
def leaks(model: nn.Module, longest: int = 4) -> bool:
    """Whether an example in a packed row sees the one before it, or less of itself than alone: not every model can tell
    them apart.

    longest: tokens of the longest example. Some models can up to so many tokens, and not beyond.
    """
    device, length, drawn = next(model.parameters()).device, max(longest, 4), torch.Generator().manual_seed(0)
    *before, last = torch.randint(1, 7, (3, length), generator=drawn).tolist()  # tokens that every model has
    compute, outputs = _outputs_of(model), []
    with modes_kept(model):
        model.eval()
        alone = compute(input_ids=torch.tensor([last], device=device))[:, :-1].float()
        for first in before:
            examples = [Example(ids, [True] * length, 1, 0, False) for ids in (first, last)]
            batch = pack(examples).to(device)
            try:
                packed = compute(input_ids=batch.input_ids, position_ids=batch.position_ids)
            except (IndexError, RuntimeError) as error:
                if ran_out_of_memory(error):
                    raise
                return True  # it counts positions of its own, and has none left for the second example
            outputs.append(packed[:, length - 1 :].float())  # a last token is not read
    seen = (outputs[0] - outputs[1]).abs().max() > LEAK * alone.abs().max()
    return bool(seen) or not _alike(model, outputs[0], alone)


@torch.no_grad()
def pads_exactly(model: nn.Module, shortest: int, longest: int) -> bool:
    """Whether examples of `shortest` and more tokens are computed beside one of `longest` as they are alone."""
    if shortest == longest:
        return True
    lengths = longest, (shortest + longest) // 2, shortest
    device, drawn = next(model.parameters()).device, torch.Generator().manual_seed(0)
    rows = torch.randint(1, 7, (len(lengths), longest), generator=drawn).tolist()
    examples = [Example(ids[:length], [True] * length, 1, 0, False) for ids, length in zip(rows, lengths, strict=True)]
    batch, compute = pad(examples, 0).to(device), _outputs_of(model)
    with modes_kept(model):
        model.eval()
        beside = compute(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        for row, length in enumerate(lengths):
            alone = compute(input_ids=batch.input_ids[row : row + 1, :length])
            if not _alike(model, beside[row : row + 1, :length].float(), alone.float()):
                return False
    return True


def _outputs_of(model: nn.Module) -> Callable[..., Tensor]:
    """What a trial compares: hidden states, which are far smaller than logits, where they are known to make those."""
    readout = readout_of(model)
    return readout.hidden if readout is not None else lambda **inputs: model(**inputs, use_cache=False).logits


def _alike(model: nn.Module, ours: Tensor, alone: Tensor) -> bool:
    """Whether two results of rows of different lengths differ by rounding alone; what is missing or added is more."""
    rounding = 0.1 if next(model.parameters()).dtype in NARROW else 1e-3
    return bool((ours - alone).norm() <= rounding * alone.norm())
