"""The steps of training that names of checkpoints tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

COUNTED = re.compile(r"(?<![a-z])(global_?step|step|checkpoint|ckpt|epoch|iteration|iter|update)[-_]?(\d+)(?!\d)", re.I)
"""As trainers call their checkpoints: step-000200, step1000-tokens4B, checkpoint-500, global_step1000, epoch_3."""


def steps_of(names: Sequence[str]) -> Mapping[str, int]:
    """The step of training that each name tells: the number after the last word of COUNTED in it, the same word in all
    of them, or a number alone, which is one of steps; empty unless all do."""
    found = {name: COUNTED.findall(f"step{name}" if name.isdecimal() else name) for name in names}
    if not all(found.values()) or len({told[-1][0].lower() for told in found.values()}) > 1:
        return {}
    return {name: int(told[-1][1]) for name, told in found.items()}
