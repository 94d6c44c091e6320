"""Threads and dtype that suit this machine, measured in a fraction of a second."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.models.dtypes import torch_dtype
from trimtab.ops.products import COMPUTED_ON_CPU, product

CLEARLY = 1.1  # how many times as fast anything but the default must be to be taken
ROUNDS, SECONDS = 5, 0.05  # of a measurement: at most so many, and none begun after so long

KERNELS = 128
"""Of the products of one layer of a packed batch, forward and backward, there are fewer: some 35 of linear maps, and
those of attention (`tree_attention.SHAPES`)."""
KERNEL_CACHES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"
"""oneDNN's own, and that of the layer through which torch calls it."""

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
    thread and all, since threads that wait for each other on shared cores can be slower than one; and in bf16 where the
    CPU has instructions for it, which need not be fast. All cores and fp32 are kept unless the other is faster by a
    tenth. Takes 0.2 s at most.
    Raises UsageError for more threads than there are cores.
    """
    most = cores()
    if threads is not None and not 1 <= threads <= most:
        wanted = "at least 1" if threads < 1 else f"at most {most}, the cores that this process may use"
        raise UsageError(f"threads is {threads}, but must be {wanted}")
    if torch.cuda.is_available():
        if threads is not None:
            torch.set_num_threads(threads)
        quick = torch.cuda.is_bf16_supported(including_emulation=False)
        auto = torch.bfloat16 if quick else torch.float32
        return Choice(
            torch.get_num_threads(), _dtype(dtype, auto), f"this GPU computes bf16 {'' if quick else 'not '}itself"
        )
    counts = [threads] if threads is not None else sorted({1, most})
    speeds = _speeds([(count, torch.float32) for count in counts])
    fp32 = {count: speeds[count, torch.float32] for count in counts}
    best = 1 if 1 in fp32 and fp32[1] > CLEARLY * fp32[counts[-1]] else counts[-1]
    told = ", ".join(f"{count} thread{'s' * (count > 1)} {speed:.0f}" for count, speed in fp32.items())
    reason, fast = f"fp32 GFLOP/s: {told}", torch.float32
    if dtype == "auto" and torch.bfloat16 not in COMPUTED_ON_CPU:
        reason += "; bf16 has no instructions here"
    elif dtype == "auto":
        both = _speeds([(best, torch.float32), (best, torch.bfloat16)])
        bf16 = both[best, torch.bfloat16]
        # Against both measurements of fp32: one of them may have met a busy moment.
        fast = torch.bfloat16 if bf16 > CLEARLY * max(fp32[best], both[best, torch.float32]) else fast
        reason += f"; bf16 {bf16:.0f}"
    torch.set_num_threads(best)
    return Choice(best, _dtype(dtype, fast), reason)


def spare_memory() -> None:
    """What the command line asks of its process before the first product: keep freed memory, and few kernels."""
    keep_freed_memory()
    keep_few_kernels()


def keep_freed_memory() -> None:
    """Ask the C library to keep memory that tensors give back, for the next ones; nothing where it cannot be asked.

    glibc returns blocks above 128 KiB to the system at once and takes them anew at the next allocation, page by page:
    about a tenth of a training step here. Blocks above 32 MiB still go back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def keep_few_kernels() -> None:
    """Ask torch and its oneDNN to keep KERNELS compiled products each, not 1,024; what the environment says stands.

    In bf16, and for convolutions, a kernel is compiled for every shape of a product, and takes some 0.6 MB: batches of
    ever new lengths fill hundreds of megabytes within a hundred steps. A layer's own are few, and come again with the
    next layer. To be called before the first product.
    """
    for cache in KERNEL_CACHES:
        os.environ.setdefault(cache, str(KERNELS))


def cores() -> int:
    """The cores this process may use; not every system tells them apart from those there are."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def _dtype(name: str, auto: torch.dtype) -> torch.dtype:
    return auto if name == "auto" else torch_dtype(name)


def _speeds(candidates: Sequence[tuple[int, torch.dtype]]) -> dict[tuple[int, torch.dtype], float]:
    """GFLOP/s of each (threads, dtype), the best of several rounds that take turns, so that a busy moment hits all."""
    best = dict.fromkeys(candidates, 0.0)
    end = time.perf_counter() + SECONDS
    for _ in range(ROUNDS):
        for threads, dtype in candidates:
            best[threads, dtype] = max(best[threads, dtype], _speed(threads, dtype))
        if time.perf_counter() > end:
            break
    return best


def _speed(threads: int, dtype: torch.dtype) -> float:
    """GFLOP/s of a product [128, 576] x [576, 1536]."""
    torch.set_num_threads(threads)
    x, w = torch.ones(128, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    _timed(x[:8], w)  # wakes the threads
    return 2 * x.shape[0] * w.numel() / _timed(x, w) / 1e9


def _timed(x: Tensor, w: Tensor) -> float:
    start = time.perf_counter()
    product(x, w)
    return time.perf_counter() - start
