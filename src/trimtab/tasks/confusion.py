"""F1 and Matthews' correlation of a table of right classes against predicted ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from trimtab.tasks.statistics import Interval

Table = NDArray[np.float64]


def confusion(answers: Sequence[str], predictions: Sequence[str], classes: Sequence[str]) -> Table:
    """[classes, classes]: how many rows of each class (down) were taken for each (across)."""
    number = {label: i for i, label in enumerate(classes)}
    table = np.zeros((len(classes), len(classes)))
    np.add.at(table, ([number[a] for a in answers], [number[p] for p in predictions]), 1)
    return table


def f1(tables: Table) -> Table:
    """The harmonic mean of precision and recall: of two classes that of the second, of more the mean over classes.

    tables: [..., classes, classes]. A class that is neither there nor predicted counts as 0.
    """
    right = np.diagonal(tables, axis1=-2, axis2=-1)
    either = tables.sum(-1) + tables.sum(-2)
    by_class = 2 * right / np.maximum(either, 1)
    found: Table = by_class[..., 1] if tables.shape[-1] == 2 else by_class.mean(-1)
    return found


def matthews(tables: Table) -> Table:
    """The correlation of answers and predictions (Matthews 1975; of more than two classes, Gorodkin 2004).

    tables: [..., classes, classes]. 0 where all rows are of one class, or are taken for one.
    """
    answers, predictions, total = tables.sum(-1), tables.sum(-2), tables.sum((-2, -1))
    right = np.trace(tables, axis1=-2, axis2=-1)
    spread = (total**2 - (answers**2).sum(-1)) * (total**2 - (predictions**2).sum(-1))
    found: Table = (right * total - (answers * predictions).sum(-1)) / np.sqrt(np.where(spread > 0, spread, 1))
    return np.where(spread > 0, found, 0.0)


def interval_of(
    statistic: Callable[[Table], Table], table: Table, *, seed: int = 0, draws: int = 2000, level: float = 0.95
) -> Interval:
    """The percentile bootstrap interval over rows of a statistic of their table (Efron and Tibshirani 1993).

    Rows of one cell are alike, so a resample of the rows is a multinomial draw of the cells.
    """
    cells = table.ravel()
    drawn = np.random.default_rng(seed).multinomial(int(cells.sum()), cells / cells.sum(), draws)
    low, high = np.quantile(
        statistic(drawn.reshape(draws, *table.shape).astype(float)), [(1 - level) / 2, (1 + level) / 2]
    )
    return Interval(float(low), float(high))
