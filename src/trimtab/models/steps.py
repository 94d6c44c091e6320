"""The steps of training that names of checkpoints tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

COUNTED = re.compile(r"(?<![a-z])(global_?step|step|checkpoint|ckpt|epoch|iteration|iter|update)[-_]?(\d+)(?!\d)", re.I)
"""As trainers call their checkpoints: step-000200, step1000-tokens4B, checkpoint-500, global_step1000, epoch_3."""


def steps_of(names: Sequence[str]) -> Mapping[str, int]:
    """The step of training that each name tells: a number alone, or one after the same word of COUNTED in all of them,
    the last in a name counting; empty unless all do."""
    if all(re.fullmatch(r"\d+", name) for name in names):
        return {name: int(name) for name in names}
    found = {name: COUNTED.findall(name) for name in names}
    if not all(found.values()) or len({told[-1][0].lower() for told in found.values()}) > 1:
        return {}
    return {name: int(told[-1][1]) for name, told in found.items()}
