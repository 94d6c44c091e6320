"""What random projections are made of, drawn from seeds: the same numbers on every machine and for every device.

All is drawn on the CPU by torch's generator, a seed for each piece. Normal numbers are drawn in fp64, to be rounded to
fp32: torch computes fp32 ones by other formulas on other processors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

GENERATOR = 1
"""Version of everything here and of the order in which projections draw; saved with them."""

SORTED_BELOW = 128
"""Permutations shorter than this are drawn many at a time, by sorting: a call for each takes longer."""

Drawn = tuple[Tensor, ...]


def stream(seed: int, use: str, number: int = 0) -> torch.Generator:
    """The generator of one piece: piece `number` of those drawn for `use`."""
    words = f"trimtab projection {GENERATOR} {seed} {use}".encode()
    start = int.from_bytes(hashlib.sha256(words).digest()[:4], "big")
    # torch's generator takes 32 bits of a seed.
    return torch.Generator().manual_seed((start + number) % 2**32)


def signs(count: int, generator: torch.Generator) -> Tensor:
    """±1 with equal probability: [count], int8."""
    words = torch.empty(count // 8 + 1, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return words.view(torch.int8)[:count].bitwise_and_(1).mul_(2).sub_(1)


def normals(count: int, generator: torch.Generator) -> Tensor:
    """Standard normal numbers: [count], fp64."""
    return torch.randn(count, generator=generator, dtype=torch.float64)


def permutations(count: int, length: int, generator: torch.Generator) -> Tensor:
    """Independent uniform permutations, one a row: [count, length], int64."""
    if length < SORTED_BELOW:
        keys = torch.empty(count, length, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        return keys.argsort(dim=1, stable=True)
    found = torch.empty(count, length, dtype=torch.int64)
    for row in found:
        torch.randperm(length, generator=generator, out=row)
    return found


def chosen(count: int, density: float, generator: torch.Generator) -> Tensor:
    """Which of `count` entries are chosen, each with probability `density` by itself: ascending positions, int64.

    The gaps between them are geometric, so that time and memory are those of the chosen ones alone.
    """
    if density >= 1.0:
        return torch.arange(count)
    pieces, reached = [], -1
    while reached < count:
        expected = (count - reached) * density
        u = torch.rand(int(expected + 4 * math.sqrt(expected)) + 16, generator=generator, dtype=torch.float64)
        gaps = (torch.log1p(-u) / math.log1p(-density)).floor_().add_(1.0).clamp_(max=float(count + 1)).long()
        pieces.append(gaps.cumsum(0).add_(reached))
        reached = int(pieces[-1][-1])
    found = torch.cat(pieces)
    return found[: int(torch.searchsorted(found, count))]


class Kept:
    """What was drawn, kept on the devices it was used on. keep: False draws anew each time."""

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self._found: dict[Hashable, Drawn] = {}

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: Hashable, device: torch.device, draw: Callable[[], Drawn]) -> Drawn:
        """The tensors that `draw` makes for `key`, on `device`. Not to be written."""
        found = self._found.get((key, device))
        if found is None:
            found = tuple(tensor.to(device) for tensor in draw())
            if self.keep:
                self._found[key, device] = found
        return found
