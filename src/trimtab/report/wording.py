"""Figures as a reader sees them: a unit beside every number, an interval beside every estimate."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.errors import FormatError
from trimtab.report.run_folder import is_number

MISSING = "not recorded"
# The space must not break, or the sign may stand alone on the next line.
PERCENT = "\N{NO-BREAK SPACE}%"
LABELS = {
    "subtoken_f1": "Subtoken F1",
    "exact_match": "Exact match",
    "knowledge": "General knowledge",
    "f1": "F1",
    "matthews": "Matthews correlation",
}
# Shares of a whole, shown in percent; F1 is a mean of two shares and is customarily left as a number.
PERCENT_MEASURES = frozenset(("exact_match", "knowledge", "accuracy"))
MEASURE_KEYS = frozenset(
    (
        *("before", "after", "interval_before", "interval_after", "interval_of_change"),
        *("chance", "null", "resampled", "resampled_number"),
    )
)


def number(value: float, digits: int = 3) -> str:
    """`value` to `digits` significant digits, thousands separated: 0.0213, 12,340, 3.1e-07."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e15:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", "−")


def count(value: float) -> str:
    """A large count, shortened: 4.88 million."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if abs(value) >= size:
            return f"{number(value / size)} {word}"
    return f"{value:,.0f}".replace("-", "−")


def counted(number: float, noun: str) -> str:
    """A number with its noun: 1 row, 2,251 rows."""
    return f"{plain(number)} {noun}{'' if number == 1 else 's'}"


def percent(share: float, digits: int = 1) -> str:
    """A share of 1 in percent, with fixed decimals: 9.2 %."""
    return f"{100 * share:.{digits}f}{PERCENT}".replace("-", "−") if math.isfinite(share) else number(share)


def ratio_percent(ratio: float) -> str:
    """A ratio in percent to three significant digits: 0.482 %."""
    return f"{number(100 * ratio)}{PERCENT}"


def duration(seconds: float) -> str:
    """6 min 12 s; 41.3 s; 2 h 05 min."""
    if not math.isfinite(seconds) or seconds < 60:
        return f"{number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def mebibytes(size: float) -> str:
    """A size in bytes as MiB or GiB."""
    return f"{number(size / 2**30)} GiB" if size >= 2**30 else f"{number(size / 2**20)} MiB"


def visible(text: str) -> str:
    """`text` with the control characters a browser would drop made visible, as their Unicode pictures."""

    def shown(char: str) -> str:
        if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs"):
            return char
        if ord(char) < 0x20:
            return chr(0x2400 + ord(char))
        return f"\\u{ord(char):04x}"

    return "".join(map(shown, text))


@dataclass(frozen=True)
class Measure:
    """One figure before and after training, with 95 % bootstrap intervals where they were recorded.

    interval_of_change: of after minus before, from the same examples. Where it is recorded the change is judged by it:
    two intervals that overlap say nothing, for what is easy before is easy after.
    chance: what guessing gives, on the same scale; None when the run recorded none.
    resampled, resampled_number: what the intervals drew anew, such as modules, and how many of them there are.
    further: whatever else the run recorded with it, such as the number of questions.
    """

    key: str
    before: float
    after: float
    interval_before: tuple[float, float] | None
    interval_after: tuple[float, float] | None
    chance: float | None
    further: Mapping[str, Any]
    resampled: str | None = None
    resampled_number: int | None = None
    interval_of_change: tuple[float, float] | None = None

    @property
    def label(self) -> str:
        return LABELS.get(self.key, self.key.replace("_", " ").capitalize())

    def show(self, value: float) -> str:
        if self.key in PERCENT_MEASURES:
            return percent(value)
        # Fixed decimals line up, but only a figure between 0 and 1 is known to need no more.
        return f"{value:.3f}".replace("-", "−") if abs(value) <= 1 else number(value)

    def show_interval(self, interval: tuple[float, float] | None) -> str:
        if interval is None:
            return "no interval recorded"
        low = self.show(interval[0])
        # The unit stands once, after the upper end.
        return f"{low.removesuffix(PERCENT)} to {self.show(interval[1])}"

    def show_difference(self) -> str:
        """After minus before, as both are shown, so that a reader's sum comes out."""
        if self.key in PERCENT_MEASURES:
            return f"{round(100 * self.after, 1) - round(100 * self.before, 1):+.1f} points".replace("-", "−")
        small = abs(self.after) <= 1 and abs(self.before) <= 1
        difference = round(self.after, 3) - round(self.before, 3) if small else self.after - self.before
        return f"{'+' if difference > 0 else ''}{self.show(difference)}"

    def show_change_interval(self) -> str:
        """The interval of the change with its unit; '' when none was recorded."""
        if self.interval_of_change is None:
            return ""
        if self.key not in PERCENT_MEASURES:
            return self.show_interval(self.interval_of_change)
        low, high = (f"{100 * end:+.1f}".replace("-", "−") for end in self.interval_of_change)
        return f"{low} to {high} points"

    def verdict(self) -> str:
        """What the intervals say about the difference, in words."""
        if self.interval_of_change is None:
            return self._overlap()
        low, high = self.interval_of_change
        known = "which holds 0, so it may be chance" if low <= 0 <= high else "which excludes 0"
        return f"a change of {self.show_difference()}, 95{PERCENT} interval {self.show_change_interval()}, {known}"

    def _overlap(self) -> str:
        if self.interval_before is None or self.interval_after is None:
            return "no intervals to judge the difference by"
        (low, high), (other_low, other_high) = self.interval_before, self.interval_after
        return "the intervals overlap" if low <= other_high and other_low <= high else "the intervals do not overlap"

    @property
    def has_flat_interval(self) -> bool:
        return any(interval and interval[0] == interval[1] for interval in (self.interval_before, self.interval_after))

    def sentence(self) -> str:
        """From what to what, with intervals and the chance level."""
        verb = "rose" if self.after > self.before else "fell" if self.after < self.before else "stayed"
        bracket_before = f" [{self.show_interval(self.interval_before)}]" if self.interval_before else ""
        bracket_after = f" [{self.show_interval(self.interval_after)}]" if self.interval_after else ""
        chance = f"; chance gives {self.show(self.chance)}" if self.chance is not None else ""
        return (
            f"{self.label} {verb} from {self.show(self.before)}{bracket_before} to {self.show(self.after)}"
            f"{bracket_after}: {self.verdict()}{chance}."
        )


def resampling(measures: Sequence[Measure]) -> str:
    """What the intervals drew anew, measure by measure, as one sentence; '' when no measure has an interval.

    It decides how wide they are: examples of one group are alike, so drawing them one by one would promise too much.
    """
    labels: dict[str, list[str]] = {}
    for row in measures:
        if row.interval_before or row.interval_after:
            number = "" if row.resampled_number is None else f"{row.resampled_number:,} "
            labels.setdefault(f"{number}{row.resampled or 'units that were not recorded'}", []).append(row.label)
    parts = [f"{unit} for {', '.join(names)}" for unit, names in labels.items()]
    return f"Drawn anew each time: {'; '.join(parts)}." if parts else ""


def read_measures(result: Mapping[str, Any], where: str) -> list[Measure]:
    """Every before/after figure of result.json, in its order. FormatError for one that is not made of numbers."""
    return [
        _read_measure(key, value, where)
        for key, value in result.items()
        if isinstance(value, Mapping) and "before" in value and "after" in value
    ]


def _read_measure(key: str, value: Mapping[str, Any], where: str) -> Measure:
    for name in ("before", "after"):
        if not is_number(value[name]):
            raise FormatError(f"{where}: {key}.{name} must be a number")
    chance = value.get("chance", value.get("null"))
    if chance is not None and not is_number(chance):
        raise FormatError(f"{where}: the chance level of {key} must be a number")
    resampled, number = value.get("resampled"), value.get("resampled_number")
    if resampled is not None and not isinstance(resampled, str):
        raise FormatError(f"{where}: {key}.resampled must be text, such as modules")
    if number is not None and not is_number(number):
        raise FormatError(f"{where}: {key}.resampled_number must be a number")
    return Measure(
        key=key,
        before=float(value["before"]),
        after=float(value["after"]),
        interval_before=_read_interval(value.get("interval_before"), f"{where}: {key}.interval_before"),
        interval_after=_read_interval(value.get("interval_after"), f"{where}: {key}.interval_after"),
        chance=None if chance is None else float(chance),
        further={name: content for name, content in value.items() if name not in MEASURE_KEYS},
        interval_of_change=_read_interval(value.get("interval_of_change"), f"{where}: {key}.interval_of_change"),
        resampled=resampled,
        resampled_number=number,
    )


def _read_interval(value: Any, where: str) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2 or not all(map(is_number, value)):
        raise FormatError(f"{where} must be two numbers, the ends of the 95 % interval")
    low, high = float(value[0]), float(value[1])
    if low > high:
        raise FormatError(f"{where} must start at its lower end, but is [{low}, {high}]")
    return low, high


def plain(value: Any) -> str:
    """Any JSON value on one line, for a table of what has no better form."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}".replace("-", "−")
    return f"{value:,}" if isinstance(value, int) else str(value)
