"""Threads and dtype that suit this machine, measured in a fraction of a second."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import statistics
import sys
import time

import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.models.dtypes import torch_dtype

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@dataclasses.dataclass(frozen=True)
class Choice:
    """Threads and dtype to compute with, and why in one line."""

    threads: int
    dtype: torch.dtype
    reason: str


def choose(threads: int | None = None, dtype: str = "auto") -> Choice:
    """Set torch's threads and say which dtype to load a model in.

    A given value is taken as it is. Otherwise a matrix product the size of a small model's layer is timed: with one
    thread and all, since threads that wait for each other on shared cores can be slower than one; and in bf16, which
    is taken only where it beats fp32, for many CPUs compute it slowly. Takes at most about 0.2 s.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}, but must be at least 1")
    if torch.cuda.is_available():
        if threads is not None:
            torch.set_num_threads(threads)
        quick = torch.cuda.is_bf16_supported(including_emulation=False)
        auto = torch.bfloat16 if quick else torch.float32
        return Choice(
            torch.get_num_threads(), _dtype(dtype, auto), f"this GPU computes bf16 {'' if quick else 'not '}itself"
        )
    tried = {threads} if threads is not None else {1, _cores()}
    speeds = {count: _speed(count, torch.float32) for count in sorted(tried)}
    best = max(speeds, key=lambda count: speeds[count])
    bf16 = _speed(best, torch.bfloat16) if dtype == "auto" else 0.0
    torch.set_num_threads(best)
    fast = torch.bfloat16 if bf16 > 1.1 * speeds[best] else torch.float32
    told = ", ".join(f"{count} thread{'s' * (count > 1)} {speed:.0f}" for count, speed in speeds.items())
    reason = f"fp32 GFLOP/s: {told}" + (f"; bf16 {bf16:.0f}" if dtype == "auto" else "")
    return Choice(best, _dtype(dtype, fast), reason)


def keep_freed_memory() -> None:
    """Ask the C library to keep memory that tensors give back, for the next ones; nothing where it cannot be asked.

    glibc returns blocks above 128 KiB to the system at once and takes them anew at the next allocation, page by page:
    about a tenth of a training step here. Blocks above 32 MiB still go back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _cores() -> int:
    """The cores this process may use; not every system tells them apart from those there are."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def _dtype(name: str, auto: torch.dtype) -> torch.dtype:
    return auto if name == "auto" else torch_dtype(name)


def _speed(threads: int, dtype: torch.dtype) -> float:
    """GFLOP/s of a product [128, 576] x [576, 1536], median of a few."""
    torch.set_num_threads(threads)
    x, w = torch.ones(128, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    times = [_timed(x, w) for _ in range(4)][1:]
    return 2 * x.shape[0] * w.numel() / statistics.median(times) / 1e9


def _timed(x: Tensor, w: Tensor) -> float:
    start = time.perf_counter()
    torch.nn.functional.linear(x, w)
    return time.perf_counter() - start
