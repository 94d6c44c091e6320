"""The items of a task and the answers so far: in batches, kept as they come, gone on with after an interruption."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from trimtab.data.batch import batches
from trimtab.errors import UsageError
from trimtab.tasks.digests import text_digest
from trimtab.tasks.results import Outcome, Results
from trimtab.tasks.task import Item

Progress = Callable[[float, int], None]
log = logging.getLogger(__name__)


class Asking:
    """The items of a task, `found` the outcomes so far by index."""

    def __init__(
        self, name: str, items: Sequence[Item], texts: Sequence[str], results: Results | None, progress: Progress | None
    ) -> None:
        """texts: what the model is given for each item. UsageError where there are none."""
        if not items:
            raise UsageError(f"there are no questions of {name} to ask")
        self.name, self.items = name, items
        self._results, self._progress = results, progress
        self._digests = {item.index: text_digest(text) for item, text in zip(items, texts, strict=True)}
        self.found: dict[int, Outcome] = {} if results is None else results.done(name, self._digests)

    def left(self, batch_size: int) -> list[list[Item]]:
        """The batches of what is not answered yet, which is told; questions of a batch are alike in length."""
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}, but must be at least 1 question")
        plan = batches([len(item.question) for item in self.items], batch_size, seed=0, epoch=0)
        left = [[self.items[i] for i in batch if self.items[i].index not in self.found] for batch in plan]
        if self.found:
            log.info("%s: %d of %d questions are answered already", self.name, len(self.found), len(self.items))
        self.tell()
        return [batch for batch in left if batch]

    def keep(self, batch: Sequence[Item], answers: Sequence[dict[str, Any]]) -> None:
        """Take the answers to a batch: `prediction`, and `scores` or `text`."""
        new = [
            Outcome(
                index=item.index,
                prompt=self._digests[item.index],
                answer=item.answer,
                correct=answer["prediction"] == item.answer,
                **answer,
            )
            for item, answer in zip(batch, answers, strict=True)
        ]
        if self._results is not None:
            self._results.add(self.name, new)
        self.found |= {outcome.index: outcome for outcome in new}
        self.tell()

    def tell(self, more: float = 0.0) -> None:
        """Say how far it is; `more` of the questions are under way."""
        if self._progress is not None:
            self._progress(len(self.found) + more, len(self.items))
