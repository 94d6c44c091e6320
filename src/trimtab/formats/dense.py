"""Any mergeable adapter as dense changes: one ΔW a weight, which loads as an adapter of method full."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter, own_state
from trimtab.adapt.attach import tensor_of
from trimtab.adapt.module import Copies
from trimtab.deltas.delta import wide
from trimtab.deltas.full import Full, FullDelta
from trimtab.errors import UsageError
from trimtab.formats.peft_write import write_adapter

OWN_BIASES = {"none": "adapter-only"}
"""What `Placement.bias` becomes where biases are changed."""


@torch.no_grad()
def export_dense(adapter: Adapter, path: str | Path) -> Path:
    """Write ΔW of every adapted weight, in fp32 (fp64 where the adapter is), and b + Δb where a method changes biases.

    As large as the weights it changes. Raises UsageError for a method that changes no weights, and for an adapter that
    is merged; StorageError as `save_adapter`.
    """
    state, method = own_state(adapter), adapter.method
    if not method.mergeable:
        raise UsageError(f"method '{method.name}' computes what no weights can, so it has no dense change")
    if state.merged is not None:
        raise UsageError(f"adapter '{state.merged.names[0]}' is merged into the weights: unmerge it first")
    placement = dataclasses.replace(adapter.placement, slices={})
    dense = Adapter(
        adapter.model, adapter.name, Full(), placement, {**adapter.provenance, "dense_of": method.options()}
    )
    dense.sites, dense.copies, dense.whole = adapter.sites, dict(adapter.copies), adapter.whole
    for site, delta in adapter.deltas.items():
        module = adapter.sites[site]
        full = FullDelta(Full(), delta.layout)
        full.change.data = delta.weight_change(module.weight).detach()  # type: ignore[arg-type]
        dense.deltas[site] = full
        bias = _bias(module, adapter.copies.get(site))
        change = delta.bias_change(bias)
        if change is not None and bias is not None:
            dense.copies[site] = _with_bias(adapter.copies.get(site), wide(bias) + change)
            dense.placement = dataclasses.replace(placement, bias=OWN_BIASES.get(placement.bias, placement.bias))
    return write_adapter(dense, path)


def _bias(module: nn.Module, copies: Copies | None) -> Tensor | None:
    """The bias that a delta changes: the adapter's own copy where it has one."""
    own = tensor_of(copies, "bias")
    return tensor_of(module, "bias") if own is None else own


def _with_bias(copies: Copies | None, bias: Tensor) -> Copies:
    """Copies with this bias among them."""
    kept = {name: p for name, p in copies._parameters.items() if p is not None} if copies is not None else {}
    buffers = {name: b for name, b in copies._buffers.items() if b is not None} if copies is not None else {}
    return Copies({**kept, "bias": nn.Parameter(bias)}, buffers)
