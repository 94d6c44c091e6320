"""Soft prompts: trained virtual tokens before a causal model's text, made by peft's encoders.

The model's backbone, which turns tokens into hidden states, gets a class of ours, as an adapted module does. It puts
the virtual tokens before what it reads, makes room for them in mask and positions, and gives the hidden states of the
text alone: all that is above it, the head, the loss and generation, sees inputs and outputs of the usual shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimtab.adapt.adapter import STATE, Adapter, ModelState
from trimtab.adapt.module import Adapted, refuse_clash
from trimtab.adapt.select import ALL_LINEAR, base_modules, choose
from trimtab.deltas.layout import original_class
from trimtab.deltas.method import OnProgress
from trimtab.deltas.soft_prompt import SoftPrompt
from trimtab.errors import UsageError
from trimtab.models.last_layer import recomputes


class Prompt(nn.Module):
    """The virtual tokens of one adapter. encoder, config: peft's own; in inference_mode the encoder holds the virtual
    tokens themselves, as PEFT's files do, and no network that makes them.
    """

    def __init__(self, method: SoftPrompt, config: Any, encoder: nn.Module) -> None:
        super().__init__()
        self.method, self.config, self.encoder = method, config, encoder

    @property
    def length(self) -> int:
        """How many virtual tokens."""
        return self.method.virtual_tokens

    def tokens(self) -> Tensor:
        """[virtual tokens, numbers], as PEFT's file has them: inputs, or keys and values of layer after layer."""
        weight = cast("Tensor", cast("Any", self.encoder).embedding.weight)
        if self.config.inference_mode:
            return weight
        made: Tensor = self.encoder(torch.arange(self.length, device=weight.device)[None])[0]
        return made

    def keys_and_values(self, rows: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """By layer, (keys, values), each [rows, heads, virtual tokens, width of a head]."""
        layers, heads = self.config.num_layers, self.config.num_attention_heads
        flat = self.tokens().to(dtype).view(self.length, 2 * layers, heads, -1).permute(1, 2, 0, 3)
        parts = flat[:, None].expand(-1, rows, -1, -1, -1)
        return list(zip(parts[0::2], parts[1::2], strict=True))


class Prompted(Adapted):
    """Mixed in before the class of a backbone; its `deltas` are prompts."""

    def _routed(self, args: Any, kwargs: Any) -> Any:
        # A prompt is a part of the batch's shape, so rows cannot differ in it; modules within route by rows.
        names = [name for name, _ in cast("Any", self._routes).groups]
        if len(names) > 1 and any(name in self.deltas for name in names):
            raise UsageError(
                f"rows() was given {', '.join(str(name) for name in names)}, but a soft prompt stands before every row "
                "of a batch: answer each adapter's prompts in a batch of their own (--batch-size 1)"
            )
        return self._as([name for name in names if name is not None], args, kwargs)

    def _changed(self, names: Sequence[str], args: Any, kwargs: Any) -> Any:
        prompt = self._prompt(names)
        if prompt is None:
            return super()._changed((), args, kwargs)
        taken = inspect.signature(cast("Any", type(self)).original_class.forward).parameters
        inputs = {**dict(zip(list(taken)[1:], args, strict=False)), **kwargs}
        inputs.pop("cache_position", None)  # where a model asks for it, it counts what is in the cache by itself
        text = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        cache = inputs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        _refuse_too_long(self, past + (0 if past else prompt.length) + text.shape[1], prompt)
        before = 0 if past or prompt.method.in_every_layer else prompt.length
        _make_room(inputs, prompt.length, before, text, "position_ids" in taken)
        if not past and prompt.method.in_every_layer:
            self._fill_cache(inputs, prompt, text.shape[0])
        elif not past:
            self._put_before(inputs, prompt)
        return _of_text(super()._changed((), (), inputs), before)

    def _prompt(self, names: Sequence[str]) -> Prompt | None:
        prompts = cast("list[Prompt]", [self.deltas[name] for name in names if name in self.deltas])
        if len(prompts) > 1:
            raise UsageError(f"{len(prompts)} soft prompts are enabled at once: switch to one of them")
        return prompts[0] if prompts else None

    def _fill_cache(self, inputs: dict[str, Any], prompt: Prompt, rows: int) -> None:
        from transformers import DynamicCache

        own = cast("Any", self)
        refuse_recomputing(own)
        if inputs.get("past_key_values") is None:
            inputs["past_key_values"] = DynamicCache(config=own.config)
        for layer, (keys, values) in enumerate(prompt.keys_and_values(rows, own.dtype)):
            inputs["past_key_values"].update(keys, values, layer)

    def _put_before(self, inputs: dict[str, Any], prompt: Prompt) -> None:
        words = inputs.get("inputs_embeds")
        if words is None:
            words = cast("Any", self).get_input_embeddings()(inputs.pop("input_ids"))
        virtual = prompt.tokens().to(words).expand(words.shape[0], -1, -1)
        inputs["inputs_embeds"] = torch.cat([virtual, words], 1)

    def places(self, positions: Tensor, length: int) -> Tensor:
        """Where positions of the flattened text, of rows of `length` tokens, are in the layers of the backbone."""
        prompt = self._prompt(self._active)
        if prompt is None or prompt.method.in_every_layer:
            return positions
        return positions + prompt.length * (positions // length + 1)


def _make_room(inputs: dict[str, Any], length: int, before: int, text: Tensor, takes_positions: bool) -> None:
    """Let mask and positions count `length` virtual tokens, of which `before` are among the inputs."""
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None:
        if mask.dim() != 2:
            raise UsageError(f"a soft prompt needs an attention mask [rows, tokens], but this one is {[*mask.shape]}")
        if positions is None and takes_positions:  # so that padding before a row moves it no further from the prompt
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -text.shape[1] :]
        inputs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], length), mask], 1)
    if positions is not None:
        virtual = torch.arange(before, device=positions.device).expand(*positions.shape[:-1], before)
        inputs["position_ids"] = torch.cat([virtual.to(positions), positions + length], -1)


def _of_text(output: Any, before: int) -> Any:
    """A backbone's output without the virtual tokens that were among its inputs."""
    if not before:
        return output
    if isinstance(output, tuple):
        return output[0][:, before:], *output[1:]
    output["last_hidden_state"] = output["last_hidden_state"][:, before:]
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(states[:, before:] for states in output["hidden_states"])
    return output


def _refuse_too_long(backbone: Any, length: int, prompt: Prompt) -> None:
    limit = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UsageError(
            f"{length} tokens, {prompt.length} of them virtual, go beyond the model's {limit}: shorten the text "
            "(--max-length) or take fewer virtual tokens"
        )


def refuse_recomputing(backbone: nn.Module) -> None:
    """UsageError where layers run again in backward: transformers lets them see no cache then, and so no prefix."""
    if recomputes(backbone):
        raise UsageError("prefix tuning does not work with gradient checkpointing: turn that off")


class PromptAdapter(Adapter):
    """An adapter without deltas: its prompt stands on the backbone, the one module among its sites."""

    method: SoftPrompt
    prompt: Prompt

    def _parts(self) -> Iterator[tuple[str, nn.Module]]:
        if self.sites:
            yield "prompt", self.prompt

    def base_sites(self) -> dict[str, nn.Module]:
        # A prompt was trained for every weight of its base; a head may be made afresh at each load.
        found = choose(self.model, base_modules(self.model), (ALL_LINEAR,))
        return {site.path: site.module for site in found}

    def prepare(self, steps: int, progress: OnProgress | None = None) -> None:
        if self.prompt.config.inference_mode and self.method.through_network:
            raise UsageError(
                f"an adapter file of method '{self.method.name}' holds its virtual tokens alone, and not the network "
                "that makes them, which is what is trained: attach a new adapter, or resume its run"
            )
        for backbone in self.sites.values() if self.method.in_every_layer else ():
            refuse_recomputing(backbone)

    def save(self, path: str | Path) -> Path:
        from trimtab.formats.peft_prompt import save_prompt

        return save_prompt(self, path)


def has_prompt(model: nn.Module) -> bool:
    """Whether a soft prompt is enabled on a model."""
    state: ModelState | None = getattr(model, STATE, None)
    return state is not None and any(isinstance(state.adapters[name], PromptAdapter) for name in state.active)


def backbone_of(model: Any, method: SoftPrompt) -> tuple[str, nn.Module]:
    """(path, module) of a causal model's backbone. UsageError for any other model."""
    generates = getattr(model, "can_generate", None)
    causal = generates is not None and generates() and not model.config.is_encoder_decoder
    backbone = model.get_decoder() if causal else None
    if backbone is None or backbone is model:
        raise UsageError(
            f"method '{method.name}' is for causal language models of transformers, and a "
            f"{original_class(model).__name__} is none"
        )
    path = next(path for path, module in base_modules(model).items() if module is backbone)
    refuse_clash(path, backbone)
    return path, backbone


def make_prompt(method: SoftPrompt, sizes: dict[str, int], words: nn.Module, *, trained: bool, seed: int = 0) -> Prompt:
    """A prompt in fp32. sizes: what PEFT's configuration says of the model (`prompt_trial.sizes_of`).

    trained: it holds what training needs; otherwise the virtual tokens alone, for those of a file.
    """
    config = _peft(method).get_peft_config(
        {
            "peft_type": method.peft_type,
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": method.virtual_tokens,
            "num_transformer_submodules": 1,
            "inference_mode": not trained,
            **sizes,
            **method.encoder_config(sizes["token_dim"]),
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = method.encoder(config, words)
    return Prompt(method, config, encoder.float())


def _peft(method: SoftPrompt) -> Any:
    try:
        import peft
    except ImportError as error:
        raise UsageError(f"method '{method.name}' needs peft: pip install \"trimtab[baselines]\"") from error
    return peft
