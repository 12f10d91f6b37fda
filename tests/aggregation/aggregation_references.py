"""Independent references of the rules: plain numpy in float64, one obvious loop each. Only for tests."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
import tensorflow as tf

from covey_coordinator.aggregation.factory import traced
from covey_coordinator.aggregation.kernels import Kernels, Updates
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.rules import LOSSES, UPDATE, Batch, Judgement, Rule

# Rules as the tables of the tests run them: name -> f such that n = 7 bears it.
ALL_RULES = {
    "mean": 0,
    "median": 2,
    "trimmed-mean": 2,
    "multi-krum": 2,
    "krum": 2,
    "dnc": 2,
    "caf": 2,
    "geometric-median": 2,
    "centred-clipping": 2,
    "meamed": 2,
    "bulyan": 1,
    "mda": 2,
}


def rules() -> dict[str, Rule]:
    return {name: make_rule(name, f) for name, f in ALL_RULES.items()}


def batch_of(updates: Any, num_examples: Any = None) -> Batch:
    updates = np.ascontiguousarray(updates, np.float32)
    counts = np.ones(len(updates), np.float32) if num_examples is None else np.asarray(num_examples, np.float32)
    return Batch(Updates(updates), counts, np.arange(len(updates)))


def trusted_of(updates: np.ndarray) -> np.ndarray:
    """A good trusted update for rules that need one: the median, among the honest rows where these are the most."""
    return np.median(updates, axis=0).astype(np.float32)


def losses_around(k: Kernels, best: Any) -> Any:
    """For rules that need losses: the squared distance from the best aggregate, and its share of itself plus one."""

    def losses(aggregates: Any) -> Any:
        square = k.square_norms(Updates(aggregates), best)
        return k.transpose(k.reshape(k.concat([square, k.divide(square, square + 1.0)]), (2, k.length(square))))

    return losses


def judge(rule: Rule, updates: Any, num_examples: Any = None, trusted: Any = None) -> Judgement:
    """The rule in the fast kernels, as live rounds run it, from its initial state."""
    batch = batch_of(updates, num_examples)
    trusted = trusted_of(batch.updates.matrix) if trusted is None else trusted
    if rule.needs_trusted == UPDATE:
        batch = batch._replace(trusted=trusted)
    elif rule.needs_trusted == LOSSES:
        batch = batch._replace(losses=losses_around(NumpyKernels(), trusted))
    with np.errstate(all="ignore"):
        return rule.advance(NumpyKernels(), rule.initial_state(batch.updates.matrix.shape[1]), batch)[1]


def judge_in_tensorflow(rule: Rule, updates: Any, num_examples: Any = None) -> Judgement:
    """The rule in the reference kernels in this process, numpy in and out."""
    batch = batch_of(updates, num_examples)
    state = tf.nest.map_structure(tf.constant, rule.initial_state(batch.updates.matrix.shape[1]))
    rows = (tf.constant(part) for part in (batch.updates.matrix, batch.num_examples, batch.places))
    return tf.nest.map_structure(lambda tensor: tensor.numpy(), traced_once(rule)(state, *rows)[1])


@functools.cache
def traced_once(rule: Rule) -> Any:
    """`traced` for updates of any n and d: a trace takes 0.5 to 2 s, so all tests of a rule share one."""
    unknown = tf.nest.map_structure(
        lambda part: tf.TensorSpec([None] * np.ndim(part), tf.constant(part).dtype), rule.initial_state(1)
    )
    rows = (tf.TensorSpec([None, None]), tf.TensorSpec([None]), tf.TensorSpec([None], tf.int64))
    return tf.function(traced(rule), input_signature=(unknown, *rows), autograph=False)


def mean(updates: np.ndarray, num_examples: np.ndarray, cap_ratio: float = 10.0) -> np.ndarray:
    weights = np.minimum(num_examples.astype(np.float64), cap_ratio * np.median(num_examples))
    return np.average(updates.astype(np.float64), axis=0, weights=weights)


def median(updates: np.ndarray) -> np.ndarray:
    return np.median(updates.astype(np.float64), axis=0)


def trimmed_mean(updates: np.ndarray, f: int) -> np.ndarray:
    ordered = np.sort(updates.astype(np.float64), axis=0)
    return ordered[f : len(ordered) - f].mean(axis=0)


def trimmed_shares(updates: np.ndarray, cut: int) -> np.ndarray:
    ordered = np.sort(updates, axis=0)
    outside = (updates < ordered[cut]) | (updates > ordered[len(updates) - 1 - cut])
    return outside.mean(axis=1)


def krum_scores(updates: np.ndarray, f: int) -> np.ndarray:
    rows = updates.astype(np.float64)
    scores = []
    for i, row in enumerate(rows):
        distances = sorted(float(np.sum((row - other) ** 2)) for j, other in enumerate(rows) if j != i)
        scores.append(sum(distances[: len(rows) - f - 2]))
    return np.array(scores)


def krum_selection(updates: np.ndarray, f: int, m: int) -> list[int]:
    """The m smallest scores; ties to the smaller index."""
    scores = krum_scores(updates, f)
    return sorted(sorted(range(len(scores)), key=lambda row: (scores[row], row))[:m])


def bits(values: Any) -> bytes:
    return np.ascontiguousarray(values).tobytes()


def noisy(seed: int, n: int, d: int, spread: float = 1.0, hostile: int = 0, size: float = 100.0) -> np.ndarray:
    """n updates around a common vector of size 1; the first `hostile` ones far away on one side."""
    generator = np.random.default_rng(seed)
    updates = generator.standard_normal(d) + spread * generator.standard_normal((n, d))
    updates[:hostile] += size
    return updates.astype(np.float32)


def hostile_inputs(seed: int, n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Updates at some relative spread, one of them of quite another size, and example counts of all sizes."""
    generator = np.random.default_rng(seed)
    updates = noisy(seed, n, d, spread=10.0 ** -generator.uniform(0, 5))
    updates[generator.integers(n)] *= np.float32(10.0 ** generator.uniform(-20, 20))
    return updates, np.exp(generator.uniform(0, 15, n)).astype(np.float32)


def digest_of_rules(names: list[str]) -> str:
    """One digest over these rules' answers on some inputs."""
    digest = hashlib.sha256()
    for rule in (rules()[name] for name in names):
        for seed, (n, d) in enumerate([(7, 20000), (31, 9001)]):
            for part in judge_in_tensorflow(rule, *hostile_inputs(seed, n, d))[:3]:
                digest.update(bits(part))
    return digest.hexdigest()
