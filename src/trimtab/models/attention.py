"""Prefix trees through transformers' attention interface, so that any model that uses it takes packed rows.

Two functions are registered under one name: a mask function that hands the tree of the row to every layer in the mask's
place, and an attention function that attends by it. Without a tree they do what the model did before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimtab.adapt.module import modes_kept
from trimtab.deltas.layout import original_class
from trimtab.errors import TRIAL_FAILURES, UsageError, ran_out_of_memory
from trimtab.ops.tree import Tree
from trimtab.ops.tree_attention import tree_attention

NAME = "trimtab_tree"
UNSERVED = ("s_aux", "position_bias", "sinks")
"""Arguments that some models give their attention and that change what it computes."""
PAIRS = 5
"""Of short sequences, on which a model of few bits is tried; three where rounding is small."""
FP32_EPS = torch.finfo(torch.float32).eps

_tree: ContextVar[Tree | None] = ContextVar("tree", default=None)
_usual: ContextVar[str] = ContextVar("usual", default="sdpa")
_attended: ContextVar[list[nn.Module] | None] = ContextVar("attended", default=None)


@contextmanager
def attending_by_tree(model: Any) -> Iterator[None]:
    """Within the block the model's attention takes trees; backward passes belong into it too."""
    if attends_by_tree(model):
        yield
        return
    _register()
    parts = {"": model.config, **{key: getattr(model.config, key, None) for key in model.config.sub_configs}}
    before = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    token = _usual.set(_text_config(model)._attn_implementation)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _usual.reset(token)


def attends_by_tree(model: Any) -> bool:
    """Whether the model is within `attending_by_tree`."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME


@contextmanager
def seeing(tree: Tree | None) -> Iterator[None]:
    """Within the block, rows given to a model that attends by tree have this shape."""
    token = _tree.set(tree)
    try:
        yield
    finally:
        _tree.reset(token)


def why_no_tree(model: nn.Module, longest: int) -> str | None:
    """Why prefix trees of examples of at most `longest` tokens would not be exact on this model; None if they are.

    What its configuration does not tell is tried out on a few tokens.
    """
    name, config = original_class(model).__name__, _text_config(model)
    if config is None or not getattr(type(model), "_can_set_attn_implementation", bool)():
        return f"{name} does not use transformers' attention interface"
    attention = cast("Any", model.config)._attn_implementation
    if attention not in ("sdpa", "eager", NAME):
        return f"{name} was loaded with another attention: {attention}"
    windows = {"sliding_attention", "chunked_attention"}
    kinds = {*(getattr(config, "layer_types", None) or ["full_attention"])} - {"full_attention"}
    reach = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    windowed = kinds & windows or (not getattr(config, "layer_types", None) and reach)
    if kinds - windows:
        return f"{name} has layers of {', '.join(sorted(kinds - windows))}"
    if windowed and "chunked_attention" not in kinds and reach and longest <= reach:
        windowed = False  # nothing is further away than the window reaches
    if windowed:
        return f"{name} attends within a window of {reach} tokens, and the longest example has {longest}"
    return _tried(model, name)


def rotates_alike_to(model: nn.Module) -> int | None:
    """How many tokens a row may have before the angles of all depend on its length; None where they never do."""
    config = _text_config(model)
    given = getattr(config, "rope_parameters", None) or {}
    limits = []
    for kind in (given, *(own for own in given.values() if isinstance(own, dict))):  # of all layers, or by their type
        if kind.get("rope_type") == "longrope":
            limits.append(kind["original_max_position_embeddings"])
        elif "dynamic" in str(kind.get("rope_type")):
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)


@torch.no_grad()
def _tried(model: nn.Module, name: str) -> str | None:
    # Pairs of sequences that begin alike: each by itself, each as a tree of its own, and each pair as one tree.
    device, embeddings = next(model.parameters()).device, cast("Any", model).get_input_embeddings()
    narrow = torch.finfo(embeddings.weight.dtype).eps > FP32_EPS
    shape, drawn = (PAIRS if narrow else 3, 7), torch.Generator().manual_seed(0)
    draw = torch.randint(len(embeddings.weight), shape, generator=drawn).to(device)
    first, second = draw[:, :4], draw[:, [0, 1, 4, 5, 6]]
    with modes_kept(model):
        model.eval()
        alone = [model(ids, use_cache=False).logits.float() for ids in (first, second)]
        try:
            with _attending() as attended:
                shared = _packed(model, draw, [7, 7, 4, 4, 7, 7, 7], [0, 1, 2, 3, 2, 3, 4])
            both = torch.cat([first, second], 1)
            apart = _packed(model, both, [4] * 4 + [9] * 5, [*range(4), *range(5)]) if narrow else None
        except TRIAL_FAILURES as error:
            if ran_out_of_memory(error):
                raise
            return f"{name} does not take a tree for its attention ({type(error).__name__}: {error})"
    layers = getattr(_text_config(model), "num_hidden_layers", 1)
    if len(attended) < layers:  # others mix tokens in another way, or were not asked
        return f"{name} attends in {len(attended)} of {layers} layers"
    difference = _difference(shared, torch.cat([alone[0], alone[1][:, 2:]], 1))
    # A token that sees another branch, or stands at a wrong position, leaves a tenth and more; rounding far less, but
    # in few bits how much less depends on the model: it shows where nothing is shared.
    allowed = 1e-3 if apart is None else min(max(3e-2, 2 * _difference(apart, torch.cat(alone, 1))), 0.1)
    return None if difference <= allowed else f"{name} gives other logits for a tree ({difference:.1%} apart)"


@contextmanager
def _attending() -> Iterator[list[nn.Module]]:
    """Within the block modules that attend by a tree are noted, once for each time."""
    noted: list[nn.Module] = []
    token = _attended.set(noted)
    try:
        yield noted
    finally:
        _attended.reset(token)


def _packed(model: Any, ids: Tensor, end: list[int], depth: list[int]) -> Tensor:
    """Logits [pairs, tokens, vocabulary] of rows of one shape, `end` and `depth`, put together into one row."""
    pairs, tokens = ids.shape
    tree = Tree.of([at * tokens + stop for at in range(pairs) for stop in end]).to(ids.device)
    positions = torch.tensor([depth * pairs], device=ids.device)
    with attending_by_tree(model), seeing(tree):
        logits: Tensor = model(ids.reshape(1, -1), position_ids=positions, use_cache=False).logits
    return logits.view(pairs, tokens, -1).float()


def _difference(ours: Tensor, wanted: Tensor) -> float:
    """Relative, of the middle pair: some tokens make a model far more sensitive to rounding than most."""
    apart = (ours - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    return float(apart.median())


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(*args: Any, **kwargs: Any) -> Any:
    """The mask of a forward pass: the tree of its row, or the usual one."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    tree = _tree.get()
    return ALL_MASK_ATTENTION_FUNCTIONS[_usual.get()](*args, **kwargs) if tree is None else tree


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' contract: query [1, heads, N, width] and so on to [1, N, heads, width]."""
    if not isinstance(attention_mask, Tree):
        extra = {} if softcap is None else {"softcap": softcap}
        options = {"dropout": dropout, "scaling": scaling, **extra, **others}
        usual: tuple[Tensor, None] = _usual_of(module)(module, query, key, value, attention_mask, **options)
        return usual
    unserved = [key for key in UNSERVED if others.get(key) is not None]
    if unserved:
        raise UsageError(f"its attention takes {', '.join(unserved)}, which prefix trees do not serve")
    if query.shape[0] != 1 or query.shape[2] != len(attention_mask.end):
        raise UsageError(
            f"a tree of {len(attention_mask.end)} tokens met queries {list(query.shape)}: it holds for one packed row"
        )
    if (noted := _attended.get()) is not None:
        noted.append(module)
    out = tree_attention(query[0], key[0], value[0], attention_mask, scale=scaling, dropout=dropout, soft_cap=softcap)
    return out.transpose(0, 1).unsqueeze(0), None


def _usual_of(module: nn.Module) -> Any:
    """The attention function that the module took before; eager attention stands in the file of its model."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[original_class(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(_usual.get(), eager)
