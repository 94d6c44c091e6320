"""What each step of a run takes: its examples, its learning rate, and whether it evaluates or saves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from trimtab.data.batch import Batch, batches
from trimtab.data.encode import Example
from trimtab.data.pack import pack_shared
from trimtab.errors import UsageError
from trimtab.train.packing import Build, Packing
from trimtab.train.settings import Settings


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which examples each step takes and at what rate; from the settings alone, so a resumed run has the same.

    useful: the examples with something supervised; the others are in no step. lengths: theirs, in tokens.
    """

    useful: tuple[int, ...]
    lengths: tuple[int, ...]
    settings: Settings
    base_lr: float
    by_length: bool
    steps_per_epoch: int
    steps: int
    _order: dict[int, list[list[int]]] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(examples: Sequence[Example], settings: Settings, default_lr: float, *, by_length: bool = True) -> Plan:
        """by_length: batches of similar length, for padding. UsageError when there is nothing to learn from."""
        useful = tuple(i for i, example in enumerate(examples) if example.targets)
        if not useful:
            raise UsageError(
                f"none of the {len(examples)} examples has a supervised token: there is nothing to train on"
            )
        per_epoch = math.ceil(len(useful) / settings.batch_size)
        steps = max(1, math.ceil(settings.epochs * per_epoch - 1e-9))
        steps = min(steps, settings.max_steps or steps)
        lengths = tuple(len(examples[i].input_ids) for i in useful)
        return Plan(useful, lengths, settings, settings.lr or default_lr, by_length, per_epoch, steps)

    def batch(self, step: int) -> list[int]:
        """The examples of optimizer step `step`, counted from 1."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        return [self.useful[i] for i in self._epoch(epoch)[place]]

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._order:  # one epoch is kept: shuffling anew at each step would take longer than the step
            self._order.clear()
            options = {"by_length": self.by_length, "shuffle": self.settings.shuffle}
            size, seed = self.settings.batch_size, self.settings.seed
            self._order[epoch] = batches(self.lengths, size, seed=seed, epoch=epoch, **options)
        return self._order[epoch]

    def evaluates(self, step: int) -> bool:
        """Whether the evaluation data is looked at after this step."""
        return step == self.steps or bool(self.settings.eval_every and step % self.settings.eval_every == 0)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after this step."""
        return bool(self.settings.save_every and step % self.settings.save_every == 0)

    def lr(self, step: int) -> float:
        """The learning rate of step `step`: rising linearly in warm-up, then constant, or falling to 0."""
        warm = round(self.settings.warm_up * self.steps)
        if step <= warm:
            return self.base_lr * step / warm
        done = (step - 1 - warm) / max(1, self.steps - warm)
        if self.settings.schedule == "linear":
            return self.base_lr * (1 - done)
        if self.settings.schedule == "cosine":
            return self.base_lr * (1 + math.cos(math.pi * done)) / 2
        return self.base_lr


def micro_batches(
    examples: Sequence[Example], chosen: Sequence[int], settings: Settings, packing: Packing, pad_id: int = 0
) -> list[Batch]:
    """The examples of one step, as batches of at most `micro_batch`."""
    own = [examples[i] for i in chosen]
    return _cut(own, settings.micro_batch or settings.batch_size, packing.build, pad_id)


def eval_batches(examples: Sequence[Example], settings: Settings, packing: Packing, pad_id: int = 0) -> list[Batch]:
    """The evaluation data in batches of similar length. UsageError when nothing in it is supervised."""
    useful = [example for example in examples if example.targets]
    if examples and not useful:
        raise UsageError(f"none of the {len(examples)} evaluation examples has a supervised token")
    useful.sort(key=lambda example: len(example.input_ids))
    return _cut(useful, settings.micro_batch or settings.batch_size, packing.build_eval, pad_id)


def _cut(examples: list[Example], size: int, build: Build, pad_id: int) -> list[Batch]:
    if build is pack_shared and len(examples) > size:
        examples = sorted(examples, key=lambda example: example.input_ids)  # what begins alike, into the same batch
    return [build(examples[i : i + size], pad_id) for i in range(0, len(examples), size)]
