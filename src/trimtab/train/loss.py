"""The training loss: negative log-likelihood summed over the supervised tokens of a batch, in nats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.adapt.module import modes_kept
from trimtab.data.batch import Batch
from trimtab.data.label_batch import LabelledBatch
from trimtab.deltas.layout import original_class
from trimtab.errors import UsageError
from trimtab.models.attention import attends_by_tree, seeing
from trimtab.models.readout import readout_of

Loss = Callable[[nn.Module, Batch], Tensor]


def causal_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Σ weight · -log p(target | the tokens before it) over the batch's terms. A scalar; divide by the tokens' number.

    Logits exist only for positions that predict a target, and only a block of them at a time; where the model does
    something else with its head, which the log says, for all positions. A packed batch that shares prefixes needs a
    model that is within `attending_by_tree`.
    """
    readout = readout_of(model)
    if readout is not None:
        hidden = _at_predictors(readout.hidden, model, batch, positions=batch.read)
        return readout.loss(hidden, batch.targets, batch.weights)
    return (_nats_of_all_logits(model, batch) * batch.weights).sum()


@torch.no_grad()
def term_nats(model: nn.Module, batch: Batch) -> Tensor:
    """[terms] of -log p(target | the tokens before it), in nats, without gradient."""
    readout = readout_of(model)
    if readout is not None:
        return readout.nats(_at_predictors(readout.hidden, model, batch, positions=batch.read), batch.targets)
    return _nats_of_all_logits(model, batch)


def _at_predictors(compute: Callable[..., Tensor], model: nn.Module, batch: Batch, **others: Any) -> Tensor:
    """[terms, width]: what `compute` gives at the positions that predict something."""
    shape = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    inputs = {"input_ids": batch.input_ids, **{k: v for k, v in shape.items() if v is not None}, **others}
    with seeing(batch.tree if attends_by_tree(model) else None):
        return compute(**inputs).flatten(0, 1)[batch.predictors]


def _nats_of_all_logits(model: nn.Module, batch: Batch) -> Tensor:
    logits = _at_predictors(lambda **inputs: model(**inputs, use_cache=False).logits, model, batch)
    return F.cross_entropy(logits.float(), batch.targets, reduction="none")


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch], loss: Loss = causal_loss) -> float:
    """Nats per supervised token over whole batches, in evaluation mode; every module's mode is restored."""
    device = next(model.parameters()).device
    with modes_kept(model):
        model.eval()
        total = sum(loss(model, batch.to(device)).item() for batch in batches)
    return total / sum(batch.supervised_tokens for batch in batches)


def class_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Σ -log p(class | row), in nats, over the rows of a classifier's batch. A scalar; divide by the rows' number."""
    return F.cross_entropy(class_logits(model, batch), batch.targets, reduction="sum")


def class_logits(model: nn.Module, batch: Batch) -> Tensor:
    """[rows, classes], fp32: what a classifier makes of a batch of `data.label_batch`."""
    assert isinstance(batch, LabelledBatch), "a classifier reads batches that pad_labelled made"
    logits: Tensor = model(**batch.inputs).logits
    return logits.float()


def refuse_not_causal(model: nn.Module) -> None:
    """UsageError for a model whose tokens see what follows them, where predicting the next token is no task."""
    generates: Any = getattr(model, "can_generate", None)
    config: Any = getattr(model, "config", None)
    if (generates is not None and not generates()) or getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"{original_class(model).__name__} is no causal language model, so there is no next token to predict: "
            "give fit a loss(model, batch) of its own"
        )
