"""The training loss: negative log-likelihood summed over the supervised tokens of a batch, in nats."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.data.batch import Batch
from trimtab.deltas.layout import original_class


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
def mean_loss(model: nn.Module, batches: list[Batch]) -> float:
    """Nats per supervised token over whole batches, in evaluation mode; the mode is restored."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        total = sum(causal_loss(model, batch.to(device)).double().item() for batch in batches)
    finally:
        model.train(training)
    return total / sum(batch.supervised_tokens for batch in batches)
