"""Independent references of the attacks: plain numpy in float64, after the papers' own algorithms. Only for tests."""

from __future__ import annotations

import functools
from statistics import NormalDist
from typing import Any

import numpy as np
import tensorflow as tf

from covey_coordinator.aggregation.kernels import Updates
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.kernels.reference import TensorFlowKernels
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.rules import Batch
from covey_coordinator.attacks.contract import Attack, Knowledge

RULE_IN_USE = ("trimmed-mean", 2)


def honest_rows(seed: int, n: int, d: int, spread: float = 1.0) -> np.ndarray:
    """Updates around a common vector, with columns of different spread."""
    generator = np.random.default_rng(seed)
    spreads = spread * np.exp(generator.uniform(-1, 1, d))
    return (generator.standard_normal(d) + spreads * generator.standard_normal((n, d))).astype(np.float32)


def knowledge_of(honest: Any, own: Any, rule: Any = RULE_IN_USE, round_number: Any = 3) -> Knowledge:
    """Everything there is to know; the corrupted devices come last."""
    n = honest.shape[0] + own.shape[0]
    ones, places = np.ones(n, np.float32), np.arange(n)
    return Knowledge(
        own=own,
        num_byzantine=own.shape[0],
        seed=7,
        round_number=round_number,
        rule=make_rule(*rule),
        rule_state=(),
        batch_with=lambda rows: Batch(Updates(np.concatenate([honest, rows])), ones, places),
    )


def craft(attack: Attack, honest: np.ndarray, m: int, own: Any = None, **known: Any) -> np.ndarray:
    """The attack in the fast kernels."""
    own = honest[:m] if own is None else own
    with np.errstate(all="ignore"):
        return attack.craft(NumpyKernels(), Updates(honest), m, knowledge_of(honest, own, **known))


def craft_in_tensorflow(attack: Attack, honest: np.ndarray, m: int) -> np.ndarray:
    """The attack in the reference kernels, traced once per attack with every size unknown."""
    return _traced(attack)(honest, honest[:m]).numpy()


@functools.cache
def _traced(attack: Attack) -> Any:
    def crafted(rows: Any, own: Any) -> Any:
        def batch_with(hostile: Any) -> Batch:
            n = tf.shape(rows)[0] + tf.shape(hostile)[0]
            return Batch(Updates(tf.concat([rows, hostile], 0)), tf.ones([n]), tf.range(tf.cast(n, tf.int64)))

        known = Knowledge(
            own=own, num_byzantine=2, seed=7, round_number=3, rule=make_rule(*RULE_IN_USE), batch_with=batch_with
        )
        return attack.craft(TensorFlowKernels(), Updates(rows), tf.shape(own)[0], known)

    spec = tf.TensorSpec([None, None], tf.float32)
    return tf.function(crafted, input_signature=(spec, spec), autograph=False)


def alie_z(n: int, m: int) -> float:
    s = max(n // 2 + 1 - m, 1)
    return NormalDist().inv_cdf(max((n - m - s) / (n - m), 0.5))


def push(honest: np.ndarray, direction: str) -> np.ndarray:
    rows = honest.astype(np.float64)
    mu = rows.mean(0)
    return {"mean": -mu, "unit": -mu / np.linalg.norm(mu), "std": -rows.std(0), "sign": -np.sign(mu)}[direction]


def largest_gamma(inside: Any, start: float = 64.0, tau: float = 1e-9) -> float:
    """The halving search of Shejwalkar and Houmansadr 2021, algorithm 1."""
    gamma, step, best = start, start / 2, 0.0
    while step > tau:
        if inside(gamma):
            best, gamma = gamma, gamma + step
        else:
            gamma -= step
        step /= 2
    return best


def min_max_gamma(honest: np.ndarray, direction: str) -> float:
    rows, p = honest.astype(np.float64), push(honest, direction)
    widest = max(np.linalg.norm(a - b) for a in rows for b in rows)
    return largest_gamma(lambda g: max(np.linalg.norm(rows.mean(0) + g * p - row) for row in rows) <= widest)


def min_sum_gamma(honest: np.ndarray, direction: str) -> float:
    rows, p = honest.astype(np.float64), push(honest, direction)
    widest = max(sum(np.sum((a - b) ** 2) for b in rows) for a in rows)
    return largest_gamma(lambda g: sum(np.sum((rows.mean(0) + g * p - row) ** 2) for row in rows) <= widest)


def fang_krum_lambda(honest: np.ndarray, m: int, threshold: float = 1e-5) -> float:
    """Theorem 1's bound, halved until Krum on all n rows picks an attacker."""
    rows, h, d = honest.astype(np.float64), *honest.shape
    n, s = h + m, np.where(honest.astype(np.float64).mean(0) > 0, 1.0, -1.0)
    between = ((rows[:, None] - rows[None]) ** 2).sum(2)
    nearest = [np.sort(np.delete(between[i], i))[: n - m - 2].sum() for i in range(h)]
    bound = np.sqrt(min(nearest) / (max(n - 2 * m - 1, 1) * d)) + max(np.linalg.norm(rows, axis=1)) / np.sqrt(d)
    lam = bound
    while lam >= threshold:
        everyone = np.concatenate([rows, np.tile(-lam * s, (m, 1))])
        square = ((everyone[:, None] - everyone[None]) ** 2).sum(2)
        scores = [np.sort(np.delete(square[i], i))[: n - m - 2].sum() for i in range(n)]
        if min(scores[h:]) < min(scores[:h]):
            return lam
        lam /= 2
    return lam


def most_unusual(honest: np.ndarray) -> int:
    rows = honest.astype(np.float64)
    centred = rows - rows.mean(0)
    direction = np.linalg.svd(centred, full_matrices=False)[2][0]
    return int(np.argmax(np.abs(centred @ direction)))
