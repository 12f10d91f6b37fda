"""Federated SVRG, its naive form and gradient descent on sparse data of authors: how far from the optimum they are
after how many rounds. Numpy alone (covey_coordinator.algorithms.reference), all devices in every round.

    .venv/bin/python benchmarks/algorithms.py [--quick]

The data, and what is planted in them: covey_coordinator.algorithms.sparse_logistic. Each algorithm has one rate, the
best on seed 0 of 10, 30, 100 (FSVRG), 3, 10 (without scaling), 0.1, 0.3, 1 (naive), 1, 2, 4 (gradient descent).
Batches of 5. Prints a table of means over the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from covey_coordinator.algorithms import reference
from covey_coordinator.algorithms.sparse_logistic import Authors, error, loss, make_authors, optimum

BATCH, ROUNDS = 5, 30
SHOWN = (1, 3, 10, 30)
Run = Callable[[Authors, float], Iterator[Any]]
ALGORITHMS: dict[str, Run] = {
    "FSVRG": lambda data, decay: reference.fsvrg(data.train, decay, 30.0, batch=BATCH),
    "FSVRG, reshuffled data": lambda data, decay: reference.fsvrg(data.reshuffled(1).train, decay, 30.0, batch=BATCH),
    "FSVRG, S = A = 1": lambda data, decay: reference.fsvrg(data.train, decay, 10.0, batch=BATCH, scaled=False),
    "naive, 20 steps": lambda data, decay: reference.fsvrg_naive(data.train, decay, 0.3, 20, batch=BATCH),
    "gradient descent": lambda data, decay: reference.gradient_descent(data.train, decay, 2.0),
}


def measured(name: str, seed: int, authors: int, features: int) -> list[tuple[float, float]]:
    """(above the least loss, test error minus the optimum's in percent points) after the rounds of SHOWN."""
    data = make_authors(authors, features, seed=seed)
    every, test = data.all_train(), data.all_test()
    decay = 1 / len(every)
    best = optimum(every, decay)
    least, fewest = loss(best, every, decay), error(best, test)
    models = list(itertools.islice(ALGORITHMS[name](data, decay), ROUNDS))
    return [
        (loss(models[number - 1], every, decay) - least, 100 * (error(models[number - 1], test) - fewest))
        for number in SHOWN
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, 30 authors: half a minute")
    quick = parser.parse_args().quick
    seeds, size = (range(1), (30, 300)) if quick else (range(3), (100, 1000))
    heads = " | ".join(f"round {number}" for number in SHOWN)
    lines = [f"| algorithm | {heads} |", "|---" * (1 + len(SHOWN)) + "|"]
    for name in ALGORITHMS:
        found = []
        for seed in seeds:
            print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
            found.append(measured(name, seed, *size))
        cells = [f"{gap:.4f}, {points:+.1f}" for gap, points in np.mean(found, axis=0)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
