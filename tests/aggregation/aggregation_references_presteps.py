"""Independent references of the pre-steps: plain numpy in float64, one obvious loop each. Only for tests."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf
from aggregation_references import batch_of, traced_once

from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.rules import Judgement, Rule


def clipped(updates: np.ndarray, clip_norm: float) -> np.ndarray:
    rows = updates.astype(np.float64)
    return np.array([row * min(1.0, clip_norm / max(np.linalg.norm(row), 1e-300)) for row in rows])


def arc(updates: np.ndarray, f: int) -> np.ndarray:
    n = len(updates)
    longest = math.floor(2 * (f / n) * (n - f))
    norms = sorted((float(np.linalg.norm(row)) for row in updates.astype(np.float64)), reverse=True)
    return clipped(updates, norms[longest])


def nnm(updates: np.ndarray, f: int) -> np.ndarray:
    rows = updates.astype(np.float64)
    mixed = []
    for row in rows:
        nearest = sorted(range(len(rows)), key=lambda j: float(np.sum((rows[j] - row) ** 2)))[: len(rows) - f]
        mixed.append(rows[nearest].mean(axis=0))
    return np.array(mixed)


def quantile_estimates(norms: list[np.ndarray], initial: float, target: float, rate: float) -> list[float]:
    """The estimate used in each round, for the norms of the rounds."""
    used, estimate = [], initial
    for round_norms in norms:
        used.append(estimate)
        estimate *= math.exp(-rate * (float(np.mean(round_norms <= estimate)) - target))
    return used


def rounds_in(door: str, rule: Rule, rounds: list[np.ndarray], counts: Any = None) -> list[tuple[Any, Judgement]]:
    """(state, judgement) after each round from the initial state: "numpy" or "tensorflow", numpy out."""
    state = rule.initial_state(rounds[0].shape[1])
    if door == "tensorflow":
        state = tf.nest.map_structure(tf.constant, state)
    found = []
    for updates in rounds:
        batch = batch_of(updates, counts)
        if door == "tensorflow":
            rows = (tf.constant(part) for part in (batch.updates.matrix, batch.num_examples, batch.places))
            state, judged = traced_once(rule)(state, *rows)
            found.append(tf.nest.map_structure(lambda tensor: tensor.numpy(), (state, judged)))
        else:
            with np.errstate(all="ignore"):
                state, judged = rule.advance(NumpyKernels(), state, batch)
            found.append((state, judged))
    return found
