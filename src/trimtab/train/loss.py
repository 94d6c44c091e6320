"""The training loss: negative log-likelihood summed over the supervised tokens of a batch, in nats."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.adapt.module import modes_kept
from trimtab.data.batch import Batch, pack
from trimtab.data.encode import Example
from trimtab.deltas.layout import original_class
from trimtab.errors import UsageError

Loss = Callable[[nn.Module, Batch], Tensor]
LEAK = 1e-4  # of the logits' size: a true mask leaves no trace at all, a missing one some hundredths


def causal_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Sum of -log p(token | tokens before it) over the supervised tokens. A scalar in fp32; divide by their number.

    batch.labels: [rows, length], -100 where a token is no target; position i is predicted at i - 1. Only the columns
    that predict something go through the output head, where the model allows it.
    """
    targets = batch.labels[:, 1:]
    supervised = targets != -100
    columns = supervised.any(0).nonzero().squeeze(1)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask
    if "logits_to_keep" in inspect.signature(original_class(model).forward).parameters:
        logits = model(**inputs, logits_to_keep=columns).logits
    else:
        logits = model(**inputs).logits[:, columns]
    chosen = supervised[:, columns]
    return F.cross_entropy(logits[chosen].float(), targets[:, columns][chosen], reduction="sum")


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch], loss: Loss = causal_loss) -> float:
    """Nats per supervised token over whole batches, in evaluation mode; every module's mode is restored."""
    device = next(model.parameters()).device
    with modes_kept(model):
        model.eval()
        total = sum(loss(model, batch.to(device)).item() for batch in batches)
    return total / sum(batch.supervised_tokens for batch in batches)


def refuse_not_causal(model: nn.Module) -> None:
    """UsageError for a model whose tokens see what follows them, where predicting the next token is no task."""
    generates: Any = getattr(model, "can_generate", None)
    config: Any = getattr(model, "config", None)
    if (generates is not None and not generates()) or getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"{original_class(model).__name__} is no causal language model, so there is no next token to predict: "
            "give fit a loss(model, batch) of its own"
        )


@torch.no_grad()
def refuse_leaky_packing(model: nn.Module) -> None:
    """UsageError when an example in a packed row sees the one before it: not every model can tell them apart."""
    device = next(model.parameters()).device
    outputs = []
    with modes_kept(model):
        model.eval()
        for first in ([1, 4, 1, 5], [2, 6, 5, 3]):
            examples = [Example(ids, [True] * 4, 1, 0, False) for ids in (first, [5, 3, 6, 2])]
            batch = pack(examples, 0).to(device)
            logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
            outputs.append(logits[:, len(first) :].float())
    if (outputs[0] - outputs[1]).abs().max() > LEAK * outputs[0].abs().max():
        raise UsageError(
            f"{original_class(model).__name__} cannot tell packed examples apart, so that each would see the one "
            "before it: use packing 'pad'"
        )
