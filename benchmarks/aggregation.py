"""What a round of aggregation costs: the engines beside the bare kernel and beside numpy.

    python benchmarks/aggregation.py [--quick]

All variants of one row run in one process, taking turns, so that a busy machine slows them alike; the table gives
medians, and ratios to the bare kernel, which is the rule in the fast kernels on a matrix already in place. `live` is
the end of a live round, whose updates were screened as they arrived: the rule, the sgd server step and verdicts.
`direct` and `tff` also screen and sort updates that come all at once; `tff` crosses gRPC to a worker and back. Compare
within a row, not between runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from covey_coordinator.libraries import prepare

prepare()

import numpy as np
from threadpoolctl import threadpool_limits

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.kernels import Updates
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.registry import RULES, make_rule
from covey_coordinator.aggregation.rules import LOSSES, Batch, Trusted
from covey_coordinator.aggregation.screening import screen_updates
from covey_coordinator.aggregation.worker import Worker
from covey_protocol.parameters import ParameterSpec

SHAPES = ((10, 20_000), (50, 100_000))
VARIANTS = ("kernel", "live", "direct", "tff", "numpy")


def numpy_rule(name: str, f: int, updates: np.ndarray, num_examples: np.ndarray) -> np.ndarray:
    """The rule as one would write it in numpy without further thought, float32, for comparison of cost."""
    if name == "mean":
        return np.average(updates, axis=0, weights=num_examples)
    if name == "median":
        return np.median(updates, axis=0)
    if name == "trimmed-mean":
        return np.sort(updates, axis=0)[f : len(updates) - f].mean(axis=0)
    return updates[numpy_krum(updates, f, 1 if name == "krum" else len(updates) - f)].mean(axis=0)


def numpy_krum(updates: np.ndarray, f: int, m: int) -> np.ndarray:
    """Rows kept, from a centred Gram matrix, as in `kernels.gram` but in float32."""
    centred = updates - updates.mean(axis=0)
    products = centred @ centred.T
    squares = np.diag(products)
    distances = np.sort(squares[:, None] + squares - 2 * products, axis=1)
    return np.argsort(distances[:, 1 : len(updates) - f - 1].sum(axis=1), kind="stable")[:m]


def variants_of(name: str, n: int, d: int, worker: Worker) -> dict[str, Callable[[], object]]:
    """One callable per variant, all on the same updates."""
    f = 0 if name == "mean" else n // 5
    rule, specs = make_rule(name, f), [ParameterSpec("model", (d,))]
    generator = np.random.default_rng(0)
    updates = generator.standard_normal((n, d)).astype(np.float32)
    num_examples = generator.integers(10, 100, n).astype(np.float32)
    parameters, ids = np.zeros(d, np.float32), [f"device-{i:03}" for i in range(n)]
    own = generator.standard_normal(d).astype(np.float32)
    kernels, batch = NumpyKernels(), Batch(Updates(updates), num_examples, np.arange(n), own)
    direct = make_engine("direct", rule, specs)
    screened = replace(screen_updates(updates, num_examples, ids, d), trusted=Trusted(own))
    by_tff = make_engine("tff", rule, specs, worker=worker)
    return {
        "kernel": lambda: rule.advance(kernels, rule.initial_state(d), batch),
        "live": lambda: direct.aggregate(parameters, screened),
        "direct": lambda: direct.step(parameters, updates, num_examples, ids, Trusted(own)),
        "tff": lambda: by_tff.step(parameters, updates, num_examples, ids, Trusted(own)),
        "numpy": lambda: numpy_rule(name, f, updates, num_examples),
    }


def medians_ms(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median time of each variant; they take turns. The first turn warms up and is not counted."""
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(repeats + 1):
        for variant, run in variants.items():
            start = time.perf_counter()
            run()
            times[variant].append(1e3 * (time.perf_counter() - start))
    return {variant: statistics.median(values[1:]) for variant, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    repeats = 3 if parser.parse_args().quick else 15
    print(f"medians of {repeats}, ms; in brackets the ratio to the bare kernel; numpy with one BLAS thread")
    print(f"{'rule':<14}{'n':>4}{'d':>9}" + "".join(f"{variant:>20}" for variant in VARIANTS))
    # rules on copies: see draco.py; those that need losses take what evaluating a model takes, n + 1 times
    names = [name for name, kind in RULES.items() if not (kind.expects_copies or kind.needs_trusted == LOSSES)]
    with Worker() as worker, threadpool_limits(1):
        for n, d in SHAPES:
            for name in names:
                row = medians_ms(variants_of(name, n, d, worker), repeats)
                cells = "".join(f"{row[v]:>12.2f} ({row[v] / row['kernel']:4.1f})" for v in VARIANTS)
                print(f"{name:<14}{n:>4}{d:>9}{cells}", flush=True)


if __name__ == "__main__":
    main()
