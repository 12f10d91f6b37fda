"""What decoding coded redundancy costs the coordinator, beside the geometric median, each under attack by s devices.

    .venv/bin/python benchmarks/draco.py [--quick]

Everything on the same machine in turns, medians, BLAS on one thread. The geometric median and the repetition code (the
rule draco) are the live rounds' kernels on float32 updates; the cyclic code decodes float64 rows, odd n, so real ones.
Liars send -100 times what they should; under the repetition code s in every group, who agree with each other. Devices'
own work, 2s + 1 times as much, is not in it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from covey_coordinator.aggregation.kernels import Updates
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.rules import Batch
from covey_coordinator.coding.cyclic import decode
from covey_protocol.coding import CyclicCode

SHAPES = ((15, 2), (25, 2), (45, 4))  # 2s + 1 divides n
DIMENSIONS = (100_000, 1_000_000)
KERNELS = NumpyKernels()


def repeated(n: int, s: int, d: int, hostile: bool) -> Any:
    """(n, d) float32: the updates of groups of 2s + 1, the first s of each group liars."""
    load = 2 * s + 1
    rows = np.repeat(np.random.default_rng(0).standard_normal((n // load, d), np.float32), load, axis=0)
    if hostile:
        rows[np.arange(n) % load < s] *= -100
    return rows


def coded(code: CyclicCode, d: int, hostile: bool) -> Any:
    """(n, d) float64 rows, s of them lies."""
    shards = np.random.default_rng(0).standard_normal((code.n, d), np.float32)
    rows = np.stack([code.encode(shards[code.shards(device)]) for device in range(code.n)])
    if hostile:
        rows[np.random.default_rng(1).permutation(code.n)[: code.s]] *= -100
    return rows


def contestants(n: int, s: int, d: int) -> dict[str, Callable[[], Any]]:
    code, ones, places = CyclicCode(n, s), np.ones(n, np.float32), np.arange(n)
    draco, median = make_rule("draco", s), make_rule("geometric-median", s)
    attacked = np.random.default_rng(2).standard_normal((n, d), np.float32)
    attacked[:s] *= -100
    rows = {hostile: repeated(n, s, d, hostile) for hostile in (False, True)}
    lied = {hostile: coded(code, d, hostile) for hostile in (False, True)}

    def judged(rule: Any, updates: Any) -> Callable[[], Any]:
        return lambda: rule.step(KERNELS, Batch(Updates(updates), ones, places))

    return {
        "geometric median": judged(median, attacked),
        "repetition": judged(draco, rows[True]),
        "repetition, no liar": judged(draco, rows[False]),
        "cyclic": lambda: decode(code, lied[True], np.random.default_rng(3)),
        "cyclic, no liar": lambda: decode(code, lied[False], np.random.default_rng(3)),
    }


def medians_ms(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """In turns, so that what else the machine does meets all alike; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="d = 100,000 only, 3 repeats")
    quick = parser.parse_args().quick
    names = ("geometric median", "repetition", "repetition, no liar", "cyclic", "cyclic, no liar")
    lines = [f"| n | s | d | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    with threadpool_limits(1):
        for d in DIMENSIONS[: 1 if quick else None]:
            for n, s in SHAPES:
                print(f"n = {n}, d = {d:,}", file=sys.stderr, flush=True)
                found = medians_ms(contestants(n, s, d), 3 if quick else 7)
                lines.append(f"| {n} | {s} | {d:,} | " + " | ".join(f"{found[name]:.3g}" for name in names) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
