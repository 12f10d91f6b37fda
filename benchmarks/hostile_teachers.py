"""What one hostile device does to machine teaching, and what bounds it: the table of docs/machine-teaching.md.

    python benchmarks/hostile_teachers.py [--seeds 5] [--trust 0.3]

Breast cancer, 10 devices, 80 % of the labels flipped on 7 of them, 20 trusted instances with the coordinator, 60 steps.
Numpy alone: the teachers and the server's step are those that devices and coordinator run; so is the bound on shares.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from covey_coordinator.aggregation.screening import Screened
from covey_coordinator.algorithms.comt import without_long_ones
from covey_coordinator.teach.data import Examples
from covey_coordinator.teaching.server import begun, moved
from covey_models.datasets import breast_cancer
from covey_protocol.teaching import LOGISTIC, Logistic, Problem, Settings, Teacher, minimised

Array = np.ndarray[Any, Any]
DEVICES, CORRUPTED, FLIPPED, TRUSTED, TESTED, STEPS, MAX_SHARE = 10, 7, 0.8, 20, 150, 60, 2.0
LIES: dict[str, Callable[[Array, Array], Array] | None] = {  # (honest shares, model) -> what the first device sends
    "its share": None,
    "-10 times the others' sum": lambda shares, theta: -10 * shares[1:].sum(axis=0),
    "1000 in each number": lambda shares, theta: np.full_like(theta, 1e3),
    "1 in each number": lambda shares, theta: np.ones_like(theta),
    "-5 times the model": lambda shares, theta: -5 * theta,
}
RULES = ("sum", "bounded sum", "median")


def fleet(seed: int) -> tuple[list[Examples], Examples, Examples]:
    """(devices, trusted, test); labels -1 and 1."""
    rng, data = np.random.default_rng(seed), breast_cancer()
    x = np.hstack([data.x.astype(float), np.ones((len(data), 1))])
    every = Examples(data.x, x, np.where(data.y == 1, 1.0, -1.0))
    order = rng.permutation(len(data))
    parts = [every.take(rows) for rows in np.array_split(order[TRUSTED + TESTED :], DEVICES)]
    for part in parts[:CORRUPTED]:
        part.y[rng.permutation(len(part))[: int(FLIPPED * len(part))]] *= -1
    return parts, every.take(order[:TRUSTED]), every.take(order[TRUSTED : TRUSTED + TESTED])


def taught(seed: int, trust: float, lie: Callable[[Array, Array], Array] | None, rule: str) -> tuple[float, float]:
    """(accuracy, the longest honest share for each instance, times lambda_w)."""
    parts, trusted, test = fleet(seed)
    weight = trust * sum(len(part) for part in parts) / len(trusted)
    bend = np.mean([np.sum(part.features**2) for part in parts]) / trusted.features.shape[1]
    settings = Settings(1.0, weight, rho=2 * weight * len(trusted), curvature=float(bend))
    problem = Problem(LOGISTIC)
    teachers = [Teacher(problem, settings, part.features, part.y[:, None], None, DEVICES) for part in parts]
    held = trusted.features, trusted.y[:, None]
    own = Teacher(problem, settings, held[0][:0], held[1][:0], held, DEVICES)
    state, longest = begun((held[0].shape[1], 1)), 0.0
    for _ in range(STEPS):
        shares = np.stack([one.answer(state.theta, state.u, state.tau - one.share) for one in teachers])
        lengths = np.linalg.norm(shares.reshape(DEVICES, -1), axis=1)
        longest = max(longest, float(max(lengths / [len(part) for part in parts])) * settings.lambda_w)
        if lie is not None:
            shares[0] = lie(shares, state.theta)
        total = combined(shares, [len(part) for part in parts], rule, settings)
        state, _ = moved(state, settings, total, DEVICES, own.correct(state.theta), 1)
    return accuracy(test, state.theta[:, 0]), longest


def combined(shares: Array, sizes: list[int], rule: str, settings: Settings) -> Array:
    if rule == "median":
        return np.asarray(np.median(shares, axis=0) * DEVICES)
    if rule == "bounded sum":
        rows = shares.reshape(DEVICES, -1).astype(np.float32)
        screened = Screened(rows, np.array(sizes, np.float32), tuple(f"{place:02d}" for place in range(DEVICES)))
        kept = without_long_ones(screened, MAX_SHARE / settings.lambda_w)
        shares = kept.updates.reshape(-1, *shares.shape[1:])
    return np.asarray(shares.mean(axis=0) * DEVICES, np.float64)


def accuracy(test: Examples, theta: Array) -> float:
    return float(np.mean(np.sign(test.features @ theta) == test.y))


def trusted_alone(seed: int) -> float:
    _, trusted, test = fleet(seed)
    margins, start = trusted.y[:, None] * trusted.features, np.zeros(trusted.features.shape[1])
    return accuracy(test, minimised(margins, Logistic(1.0), start, 1.0, start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trust", type=float, default=0.3, help="weight of all trusted instances, of all others")
    asked = parser.parse_args()
    seeds = range(asked.seeds)
    print(f"trusted instances alone: {np.mean([trusted_alone(seed) for seed in seeds]):.3f}")
    print(f"| one of the ten sends | {' | '.join(RULES)} |", flush=True)
    longest = 0.0
    for name, lie in LIES.items():
        means = []
        for rule in RULES:
            found = [taught(seed, asked.trust, lie, rule) for seed in seeds]
            means.append(np.mean([one[0] for one in found]))
            longest = max(longest, *(one[1] for one in found)) if name == "its share" and rule == "sum" else longest
        print(f"| {name} | {' | '.join(f'{mean:.3f}' for mean in means)} |", flush=True)
    print(f"longest honest share without a lie, of each instance, times lambda_w: {longest:.2f}")


if __name__ == "__main__":
    main()
