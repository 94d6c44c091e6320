"""What intrinsic dimension is measured on: a net, its data in splits, and how it is trained. Imports no torch."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from trimtab.errors import UsageError, problems_to_error

if TYPE_CHECKING:
    from torch import Tensor, nn

OPTIMIZERS = ("adam", "sgd", "lbfgs")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Protocol:
    """How a net is trained, directly and in a subspace.

    The defaults are those of Li et al. 2018, "Measuring the Intrinsic Dimension of Objective Landscapes" (arXiv
    1804.08838), as its released code has them for MNIST: constant learning rate, the last batch of an epoch may be
    smaller.

    lr: of direct training. betas: Adam's. momentum: SGD's.
    l2: weight of the sum of squares (without ½) of the full parameters θ, not of θ_d.
    l2_on: kernels are the parameters of two or more dimensions, so neither biases nor norms; or all.
    """

    epochs: int = 100
    batch_size: int = 128
    optimizer: Literal["adam", "sgd", "lbfgs"] = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    momentum: float = 0.9
    l2: float = 1e-4
    l2_on: Literal["kernels", "all"] = "kernels"

    def __post_init__(self) -> None:
        found = [
            f"{name} is {value}, but must be a whole number above 0"
            for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size))
            if not (value > 0 and value == int(value))
        ]
        if not 0 < self.lr < math.inf:
            found.append(f"lr is {self.lr}, but must be a number above 0")
        if self.optimizer not in OPTIMIZERS:
            found.append(f"optimizer is {self.optimizer!r}, but must be one of {', '.join(OPTIMIZERS)}")
        if self.l2_on not in ("kernels", "all"):
            found.append(f"l2_on is {self.l2_on!r}, but must be kernels or all")
        if not 0 <= self.l2 < math.inf:
            found.append(f"l2 is {self.l2}, but must be a number of at least 0")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)):
            found.append(f"betas {self.betas} and momentum {self.momentum} must be at least 0 and below 1")
        problems_to_error(found, "protocol")


@dataclass(frozen=True, eq=False)
class Split:
    """Examples, and what they are called in their source. inputs: [examples, ...]; targets: [examples]."""

    name: str
    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class Problem:
    """A net and its data, as intrinsic dimension is measured on them.

    metric: what `score` gives, higher is better. chances: what guessing scores on each split: for accuracy the share
    of its largest class. scored: the split that the published figure is of. make_model: a net in fp32 whose
    start depends on the seed alone. loss(outputs, targets): a mean over examples. defaults: how it is trained.
    """

    name: str
    metric: str
    chances: Mapping[str, float]
    train: Split
    validation: Split
    test: Split
    scored: Literal["train", "validation", "test"]
    make_model: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    defaults: Protocol

    @property
    def splits(self) -> Mapping[str, Split]:
        """The three splits by what they are for."""
        return {name: getattr(self, name) for name in SPLITS}

    @property
    def chance(self) -> float:
        """What guessing scores on the split that counts."""
        return self.chances[self.scored]

    @cached_property
    def digest(self) -> str:
        """Of the data of all splits: 16 hexadecimal digits of SHA-256."""
        found = hashlib.sha256()
        for split in self.splits.values():
            for tensor in (split.inputs, split.targets):
                found.update(tensor.cpu().contiguous().numpy().data)
        return found.hexdigest()[:16]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each trainable tensor of the net, in the order of its parameters, as a projection takes them.

        UsageError for a net without any.
        """
        found = tuple(p.numel() for p in self.make_model(0).parameters() if p.requires_grad)
        if not sum(found):
            raise UsageError(f"{self.name} has no trainable parameters, so there is no dimension to measure")
        return found

    @property
    def D(self) -> int:
        """How many parameters are trained."""
        return sum(self.sizes)


def seed_for(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose (start, order, ...) of one seed, so that their draws are independent.

    UsageError for a seed below 0.
    """
    if seed < 0:
        raise UsageError(f"seed is {seed}, but must be at least 0")
    return int(np.random.SeedSequence([seed, zlib.crc32(purpose.encode())]).generate_state(1, np.uint64)[0] >> 1)
