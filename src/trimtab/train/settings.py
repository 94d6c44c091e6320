"""What a user can set about training. One source for YAML keys, flags and the saved configuration; no torch here."""

from __future__ import annotations

import dataclasses
from typing import Literal

from trimtab.deltas.method import positive
from trimtab.errors import problems_to_error
from trimtab.options import LARGEST, option


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long, how fast and in what order to train.

    Sources of the defaults. LWR is Schulman et al. 2025, "LoRA Without Regret"; LLFL is Biderman et al. 2024,
    "LoRA Learns Less and Forgets Less", arXiv 2405.09673.
    - lr 2e-4, a tenth of it for full fine-tuning: within LLFL's 5e-5 to 5e-4 for instruction tuning; LWR fits a
      ratio of about 10 between LoRA's and full fine-tuning's best rates.
    - schedule constant, no warm-up: LWR. LLFL uses cosine with 10 % warm-up, which `schedule` and `warm_up` give.
    - batch_size 8: LWR finds LoRA's gap to full fine-tuning growing with the batch, small at 32 and below.
    - weight_decay 0 and betas 0.9, 0.999: AdamW as in both. clip 1.0: the norm both cut at.
    """

    epochs: float = option(1.0, "passes over the training data; fractions are fine")
    max_steps: int | None = option(None, "stop after this many optimizer steps")
    batch_size: int = option(8, "examples to one optimizer step")
    micro_batch: int | None = option(None, "examples to one forward pass; less memory, the same result")
    packing: Literal["auto", "tree", "pack", "pad"] = option(
        "auto",
        "tree: what examples of a batch begin alike with is computed once; pack: one row; auto: the best exact one",
    )
    shuffle: bool = option(True, "take the examples in a new order in each epoch, or in the order they are in")
    lr: float | None = option(None, "learning rate; by default the method's own, 2e-4 for LoRA")
    schedule: Literal["constant", "linear", "cosine"] = option("constant", "how the learning rate falls after warm-up")
    warm_up: float = option(0.0, "share of the steps in which the learning rate rises from 0")
    weight_decay: float = option(0.0, "AdamW's decay of the adapter's parameters")
    clip: float = option(1.0, "largest norm of a step's gradient; 0 leaves it alone")
    gradient_checkpointing: bool = option(False, "compute activations again in backward: less memory, more time")
    eval_every: int | None = option(None, "evaluate every so many steps, besides at the end")
    save_every: int | None = option(
        None, "write a checkpoint to resume from every so many steps; by default every five minutes"
    )
    keep_best: bool = option(False, "finish with the weights of the lowest evaluation loss, not the last ones")
    seed: int = option(0, "of the adapter's start, the order of the data and dropout")

    def __post_init__(self) -> None:
        problems_to_error(self.problems(), "training settings")

    def problems(self) -> list[str]:
        """What is wrong with the values, one sentence each."""
        found = positive("epochs", self.epochs) + positive("batch_size", self.batch_size)
        for name in ("max_steps", "micro_batch", "lr", "eval_every", "save_every"):
            value = getattr(self, name)
            found += [] if value is None else positive(name, value)
        for name in ("weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                found.append(f"{name} is {getattr(self, name)}, but must be at least 0")
        for name, known in (
            ("packing", ("auto", "tree", "pack", "pad")),
            ("schedule", ("constant", "linear", "cosine")),
        ):
            if getattr(self, name) not in known:
                found.append(f"{name} is '{getattr(self, name)}', but must be one of {', '.join(known)}")
        if not 0 <= self.warm_up < 1:
            found.append(f"warm_up is {self.warm_up}, but must be a share of the steps from 0 to below 1")
        if not 0 <= self.seed < LARGEST:
            found.append(f"seed is {self.seed}, but must be at least 0 and below 2^63")
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            found.append(f"micro_batch {self.micro_batch} is above batch_size {self.batch_size}")
        return found
