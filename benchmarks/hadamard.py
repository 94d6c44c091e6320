"""Milliseconds of the Walsh-Hadamard transform beside a memory copy, and of every projection's two products.

usage: python benchmarks/hadamard.py [--threads 1 2] [--rounds 15] [--out benchmarks/results/hadamard.jsonl]
       [--sides transform projections] [--D 199210 20000000] [--d 750] [--limit-seconds 60] [--names uni ...]
       [--cpu-time]

Transform: L = 2^10 .. 2^24 in fp32, 2^18 / L rows of the short ones, in turn with a copy of the same bytes; `of_copies`
is its time over that of a copy times log₂ L, the number of butterfly passes. Projections: expand and adjoint in turn,
in a fresh process each; `draw_s` is the first product, in which P is drawn; `kept_mib` is the resident memory that P
takes, and `_transient_mib` the peak over that during a product, the result included. Appends one JSON line each. A line
says why where a projection refuses a size. --cpu-time counts the processor's time in place of the wall clock's: for one
thread, on a machine that others use as well.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import UsageError
from trimtab.ops.hadamard import hadamard, hadamard_
from trimtab.subspace.projection import PROJECTIONS, make_projection
from trimtab.train.machine import spare_memory

MNIST_FC = [784 * 200, 200, 200 * 200, 200, 200 * 10, 10]
SIDES = [*((name, {}) for name in PROJECTIONS), ("fastfood-blocks", {"diagonal": "gaussian"})]


def in_turn(sides: dict[str, Callable[[], Any]], flags: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of each side, a call of each in every round; the first is not counted."""
    clock = time.process_time if flags.cpu_time else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in sides}
    begin = time.perf_counter()
    for round_ in range(flags.rounds + 1):
        for name, side in sides.items():
            start = clock()
            side()
            if round_:
                found[name].append(1e3 * (clock() - start))
        if round_ > 1 and time.perf_counter() - begin > flags.limit_seconds:
            break
    return found


def spread(times: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(times, method="inclusive")
    return {"median_ms": round(median, 4), "quartiles_ms": [round(low, 4), round(high, 4)]}


def transform_line(bits: int, flags: argparse.Namespace) -> dict[str, Any]:
    x = torch.randn(max(1, 2**18 >> bits), 2**bits)
    copy, scratch = torch.empty_like(x), torch.zeros_like(x)  # zeros, since in place it would grow by √L each time
    sides = {"copy": lambda: copy.copy_(x), "hadamard": lambda: hadamard(x), "in_place": lambda: hadamard_(scratch)}
    times = in_turn(sides, flags)
    line: dict[str, Any] = {"side": "transform", "L": 2**bits, "rows": len(x)}
    line.update({name: spread(taken) for name, taken in times.items()})
    passes = bits * line["copy"]["median_ms"]
    line["of_copies"] = round(line["hadamard"]["median_ms"] / passes, 3)
    line["in_place_of_copies"] = round(line["in_place"]["median_ms"] / passes, 3)
    return line


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Peak:
    """The highest resident memory within a `with`, looked at every half millisecond."""

    def __enter__(self) -> Peak:
        self.bytes, self._over = resident(), threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(5e-4):
            self.bytes = max(self.bytes, resident())

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._watch.join()


def projection_line(name: str, options: dict[str, Any], sizes: list[int], threads: int, flags: Any) -> dict[str, Any]:
    torch.set_num_threads(threads)
    line = {"side": "projection", "name": name, **options, "D": sum(sizes), "d": flags.d}
    try:
        projection = make_projection(name, sizes, flags.d, 0, **options)
    except UsageError as error:
        return {**line, "refused": str(error)}
    theta_d, g = torch.randn(flags.d), torch.randn(projection.D)
    clock = time.process_time if flags.cpu_time else time.perf_counter
    before, start = resident(), clock()
    projection.expand(theta_d)
    line["draw_s"], kept = round(clock() - start, 3), resident()
    with Peak() as expanding:
        result = projection.expand(theta_d)
    del result
    with Peak() as going_back:
        projection.adjoint(g)
    line["kept_mib"] = round((kept - before) / 2**20, 1)
    line["expand_transient_mib"] = round((expanding.bytes - kept) / 2**20, 1)
    line["adjoint_transient_mib"] = round((going_back.bytes - kept) / 2**20, 1)
    spare_memory()  # as the command line does
    sides = {"expand": lambda: projection.expand(theta_d), "adjoint": lambda: projection.adjoint(g)}
    times = in_turn(sides, flags)
    line.update({side: spread(taken) for side, taken in times.items()})
    line["step"] = spread([sum(pair) for pair in zip(*times.values(), strict=True)])
    return line


def serve(wire: Any, *arguments: Any) -> None:
    wire.send(projection_line(*arguments))


def projections(flags: argparse.Namespace, threads: int) -> Iterator[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    for D in flags.D:
        sizes = MNIST_FC if sum(MNIST_FC) == D else [D]
        for name, options in [side for side in SIDES if side[0] in flags.names]:
            wire, theirs = context.Pipe()
            worker = context.Process(target=serve, args=(theirs, name, options, sizes, threads, flags))
            worker.start()
            theirs.close()
            yield wire.recv()
            worker.join()


def lines_of(flags: argparse.Namespace, threads: int) -> Iterator[dict[str, Any]]:
    if "transform" in flags.sides:
        yield from (transform_line(bits, flags) for bits in range(10, 25, 2))
    if "projections" in flags.sides:
        yield from projections(flags, threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit-seconds", type=float, default=60.0)
    parser.add_argument(
        "--sides", nargs="+", choices=["transform", "projections"], default=["transform", "projections"]
    )
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--D", type=int, nargs="+", default=[sum(MNIST_FC), 20_000_000])
    parser.add_argument("--d", type=int, default=750)
    parser.add_argument("--names", nargs="+", choices=list(PROJECTIONS), default=list(PROJECTIONS))
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "hadamard.jsonl"))
    flags = parser.parse_args()
    if flags.cpu_time and flags.threads != [1]:
        parser.error("--cpu-time is for --threads 1: the time of several threads would be added up")
    clock = "cpu" if flags.cpu_time else "wall"
    spare_memory()
    for threads in flags.threads:
        torch.set_num_threads(threads)
        for line in lines_of(flags, threads):
            text = json.dumps({**line, "threads": threads, "rounds": flags.rounds, "clock": clock})
            print(text, flush=True)
            with Path(flags.out).open("a", encoding="utf-8") as file:
                file.write(text + "\n")


if __name__ == "__main__":
    main()
