"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trimtab.deltas.delta import Delta, fill
from trimtab.deltas.layout import ConvLayout, EmbeddingLayout, Layout
from trimtab.deltas.low_rank import LowRankDelta, fresh_pair
from trimtab.deltas.method import one_of, positive, whole
from trimtab.deltas.ranked import Ranked
from trimtab.errors import FormatError, UsageError
from trimtab.options import from_mapping, option
from trimtab.patterns import first_match


@dataclasses.dataclass(frozen=True)
class LoRA(Ranked):
    """h = W x + (α/r) B A x, with A random, B zero and W frozen (section 4.1, equation 3).

    The defaults rank 16 and alpha 32 satisfy both recipe studies that disagree on alpha: fixed alpha 32 with
    1/r scaling (Schulman et al. 2025, "LoRA Without Regret") and alpha = 2 rank (arXiv 2405.09673).
    """

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    formula: ClassVar[str] = "h = W x + (α/r) B A x"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"
    peft_type: ClassVar[str | None] = "LORA"
    stored_names: ClassVar[str] = r"lora_(?:embedding_)?[AB](?:\.[\w-]+)?"

    init: Literal["kaiming", "gaussian"] = option(
        "kaiming", "how A starts: uniform within 1/sqrt(in), or Gaussian with standard deviation 1/r"
    )
    rslora: bool = option(False, "scale by alpha/sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732)")
    rank_pattern: Mapping[str, int] = option(factory=dict, help="rank of the modules a pattern matches, e.g. v_proj=32")
    alpha_pattern: Mapping[str, float] = option(factory=dict, help="alpha of the modules a pattern matches")
    branch: Literal["base", "float32"] = option(
        "base", "compute B A x in the base's dtype, or in float32 as PEFT does: exact, slower, more memory"
    )

    def problems(self) -> list[str]:
        found = super().problems()
        for key, rank in self.rank_pattern.items():
            found += whole(f"rank_pattern[{key}]", rank)
        for key, alpha in self.alpha_pattern.items():
            found += positive(f"alpha_pattern[{key}]", alpha)
        found += one_of("init", self.init, ("kaiming", "gaussian"))
        return found + one_of("branch", self.branch, ("base", "float32"))

    @property
    def scale(self) -> float:
        """α/r, or α/√r with rslora."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def at(self, path: str) -> LoRA:
        if not self.patterns():
            return self
        rank = first_match(self.rank_pattern, path, self.rank)
        alpha = first_match(self.alpha_pattern, path, self.alpha)
        return dataclasses.replace(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def patterns(self) -> tuple[str, ...]:
        return (*self.rank_pattern, *self.alpha_pattern)

    def peft_config(self) -> dict[str, Any]:
        return {
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "init_lora_weights": "gaussian" if self.init == "gaussian" else True,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> LoRA:
        refuse_features(config, PEFT_NEUTRAL, PEFT_MAPLESS)
        values = {own: config[key] for own, key in PEFT_NAMES.items() if config.get(key) is not None}
        for key in ("rank_pattern", "alpha_pattern"):
            if isinstance(values.get(key), Mapping):
                values[key] = {_peft_pattern(p): v for p, v in values[key].items()}
        init = "gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming"
        return from_mapping(cls, {"rank": 8, "alpha": 8, "init": init, **values}, "the adapter's configuration")

    def start(self, layout: Layout, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A and B before the first step: one random, the other zero."""
        A, B = fresh_pair(self.rank, layout, generator)
        if self.init == "gaussian" and not layout.lookup:
            A.normal_(0.0, 1.0 / self.rank, generator=generator)
        return A, B

    def delta(self, layout: Layout, weight: Tensor, generator: torch.Generator) -> Delta:
        return LoRADelta(self, layout, *self.start(layout, generator))


class LoRADelta(LowRankDelta):
    """(α/r) B A for one weight. A: [rank, in], B: [out, rank]."""

    method: LoRA
    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, method: LoRA, layout: Layout, A: Tensor, B: Tensor) -> None:
        super().__init__(method, layout, A=A, B=B)
        # Past nn.Module.__setattr__, which is slow.
        vars(self).update(scale=method.scale, exact=method.branch == "float32")

    def pair(self) -> tuple[Tensor, Tensor]:
        own: Any = self._parameters  # past nn.Module's lookup, which is slow: this is asked for every token
        return own["A"], own["B"]

    def stored(self) -> dict[str, Tensor]:
        return stored_pair(self.layout, self.A, self.B)

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        A, B = restored_pair(self.layout, stored)
        fill({"A": self.A, "B": self.B}, {"A": A, "B": B})

    def other_in_peft(self) -> str | None:
        return other_in_peft(self.layout)

    def rank_and_alpha(self) -> tuple[int, float]:
        return self.method.rank, self.method.alpha


PEFT_NAMES = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rslora": "use_rslora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}
"""Fields of LoRA and their keys in adapter_config.json, with the same meaning."""

PEFT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ write to the base, so their A and B belong to another one.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "use_bdlora": (None, False),
    "megatron_config": (None,),
}
"""Features of a PEFT LoRA that change its map and that trimtab does not have, with the values that leave it alone."""

PEFT_MAPLESS = frozenset(
    {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
    }
)
"""Keys that either are read, or say how training started or where the tensors went, which the file itself shows."""


def refuse_features(config: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], mapless: frozenset[str]) -> None:
    """UsageError naming every feature of a PEFT configuration that is on and not known to leave the map alone.

    A key that nobody knows is let pass only while it is off: null, false or empty.
    """
    wrong = []
    for key, value in config.items():
        off = neutral.get(key, (None, False, [], {}, ""))
        if key not in mapless and not any(value == o and type(value) is type(o) for o in off):
            wrong.append(f"{key}={value!r}")
    if wrong:
        hint = (
            ""
            if "init_lora_weights" not in str(wrong)
            else (
                " (its A and B belong to a base that was changed: save it again with PEFT's "
                "path_initial_model_for_weight_conversion)"
            )
        )
        raise UsageError(f"the adapter uses what trimtab does not have: {', '.join(wrong)}{hint}")


def _peft_pattern(pattern: str) -> str:
    """PEFT's pattern keys are regular expressions for the end of a path, from a dot on."""
    return f"re:(?:.*\\.)?(?:{pattern})"


def other_in_peft(layout: Layout) -> str | None:
    """What makes a convolution one whose LoRA PEFT computes otherwise: its A knows stride and padding only."""
    if isinstance(layout, ConvLayout):
        if layout.groups > 1:
            return f"a convolution with {layout.groups} groups"
        if set(layout.dilation) != {1}:
            return f"a convolution with dilation {layout.dilation}"
        if layout.padding_mode != "zeros":
            return f"a convolution with {layout.padding_mode} padding"
    return None


def stored_pair(layout: Layout, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """A [r, in] and B [out, r] under PEFT's names and in PEFT's shapes for this kind of module."""
    if isinstance(layout, EmbeddingLayout):
        return {"lora_embedding_A": A, "lora_embedding_B": B}
    if isinstance(layout, ConvLayout):
        ones = [1] * layout.dimensions
        A, B = A.reshape(A.shape[0], -1, *layout.kernel), B.reshape(*B.shape, *ones)
    return {"lora_A.weight": A, "lora_B.weight": B}


def restored_pair(layout: Layout, stored: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(A [r, in], B [out, r]) from PEFT's names; an adapter's name within them is tolerated, such files exist."""
    embedding = isinstance(layout, EmbeddingLayout)
    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        head, _, tail = name.partition(".")
        if head in (("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")) and tail != "bias":
            found[head[-1]] = tensor
    if sorted(found) != ["A", "B"] or len(stored) != 2:
        raise FormatError(f"the file has {sorted(stored)} here, but a {layout.kind} needs one A and one B")
    return found["A"].flatten(1), found["B"].flatten(1)
