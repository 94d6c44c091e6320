"""The core bases of a weight: its singular value decomposition W = Σ σᵢ uᵢ vᵢᵀ, computed once and kept on disk.

A file is found by the content of the weight, so that every run on the same base shares it, whatever its name.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.deltas.method import OnProgress
from trimtab.errors import UsageError
from trimtab.files import StorageError, cache_root, write_whole

log = logging.getLogger("trimtab")


class CoreBases(NamedTuple):
    """U [out, n], sigma [n] in descending order, V [in, n], n = min(out, in), in fp32 on the CPU."""

    U: Tensor
    sigma: Tensor
    V: Tensor


def core_bases(matrix: Tensor, cache: Path | None = None) -> CoreBases:
    """The core bases of a weight [out, in], from disk where they are, else computed and written there.

    Raises UsageError for a weight with entries that are not finite.
    """
    file = _file(matrix, cache)
    return _read(file, matrix) or _computed(matrix, file)


def prepare(matrices: Sequence[Tensor], progress: OnProgress | None = None, cache: Path | None = None) -> None:
    """Compute what is not on disk yet, several weights at a time, and say beforehand how long that takes."""
    files = {_file(matrix, cache): matrix for matrix in matrices}
    missing = {file: matrix for file, matrix in files.items() if not file.exists()}
    if not missing:
        return
    workers = torch.get_num_threads()
    largest_last = sorted(missing.items(), key=lambda item: _work(item[1]))
    seconds = _seconds(missing.values(), workers)  # type: ignore[arg-type]
    log.info(
        "decomposing %d weights, about %.0f s; kept in %s, so only once",
        len(missing), seconds, next(iter(missing)).parent,
    )  # fmt: skip
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            running = [pool.submit(_computed, matrix, file) for file, matrix in reversed(largest_last)]
            for done, future in enumerate(as_completed(running), start=1):
                future.result()
                if progress is not None:
                    progress(done, len(running), "")
    finally:
        torch.set_num_threads(workers)


def change_rates(bases: CoreBases, B: Tensor, A: Tensor) -> Tensor:
    """δᵢ = |uᵢᵀ ΔW vᵢ| / (σᵢ + ε) for ΔW = B A, [n]; ε = 1e-6 σ₁ (Si et al. 2024, arXiv 2409.01035).

    For a weight of zeros ε is 1, so that δᵢ is what its direction changes by. B: [out, r], A: [r, in]. Costs
    r n (out + in): no dense ΔW is formed.
    """
    along = ((bases.U.T @ B.float().cpu()) * (A.float().cpu() @ bases.V).T).sum(1)
    epsilon = 1e-6 * float(bases.sigma[0])
    # Below what fp32 has in full precision, a weight is as good as zero.
    return along.abs() / (bases.sigma + (epsilon if epsilon > torch.finfo(torch.float32).tiny else 1.0))


def _file(matrix: Tensor, cache: Path | None) -> Path:
    own = matrix.detach().float().cpu().contiguous()
    digest = hashlib.sha256(repr(tuple(own.shape)).encode())
    digest.update(own.numpy().data)
    return cache_root(cache) / "svd" / f"{digest.hexdigest()[:32]}.safetensors"


def _computed(matrix: Tensor, file: Path) -> CoreBases:
    from safetensors.torch import save

    own = matrix.detach().float().cpu()
    if not bool(own.isfinite().all()):
        raise UsageError(f"a weight {list(own.shape)} has entries that are not finite, so it has no core bases")
    U, sigma, Vh = torch.linalg.svd(own, full_matrices=False)
    bases = CoreBases(U.contiguous(), sigma, Vh.T.contiguous())
    try:
        write_whole(file, save(bases._asdict()))
    except StorageError as error:
        log.warning("the core bases of a weight %s are not kept: %s", list(own.shape), error)
    return bases


def _read(file: Path, matrix: Tensor) -> CoreBases | None:
    """What a file holds; None where it is absent, damaged or of other shapes: then it is computed again."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        bases = CoreBases(**load_file(file))
    except (SafetensorError, OSError, ValueError, TypeError):
        return None
    (out, inner), n = matrix.shape, min(matrix.shape)
    wanted = ([out, n], [n], [inner, n])
    return bases if tuple(list(t.shape) for t in bases) == wanted else None


def _work(matrix: Tensor) -> float:
    """Products of numbers in a decomposition, up to a factor."""
    return float(max(matrix.shape)) * min(matrix.shape) ** 2


def _seconds(matrices: Sequence[Tensor], workers: int) -> float:
    """How long decomposing them takes about: from the median of a few small ones, after a first that is always slow."""
    small = torch.randn(192, 192, generator=torch.Generator().manual_seed(0))
    taken = []
    for _ in range(6):
        start = time.perf_counter()
        torch.linalg.svd(small, full_matrices=False)
        taken.append(time.perf_counter() - start)
    return sum(map(_work, matrices)) / _work(small) * median(taken[1:]) / workers
