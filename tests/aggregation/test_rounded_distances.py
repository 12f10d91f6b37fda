"""Krum by rounded distances: whoever it keeps, full distances would keep. Bounds are in test_compiled_kernels.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_coordinator.aggregation.distances import SAMPLE
from covey_coordinator.aggregation.kernels import Updates
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.rules import Batch, Judgement

F = 3


def judged(updates: np.ndarray, name: str = "multi-krum", f: int = F) -> Judgement:
    rule, n = make_rule(name, f), len(updates)
    batch = Batch(Updates(updates), np.ones(n, np.float32), np.arange(n))
    return rule.advance(NumpyKernels(), rule.initial_state(updates.shape[1]), batch)[1]


def kept_by_float64(updates: np.ndarray, selected: int, f: int = F) -> np.ndarray:
    rows = updates.astype(np.float64)
    squares = np.stack([((rows - row) ** 2).sum(axis=1) for row in rows])
    scores = np.sort(squares, axis=1)[:, 1 : len(rows) - f - 1].sum(axis=1)
    return np.isin(np.arange(len(rows)), np.argsort(scores, kind="stable")[:selected])


def rows(seed: int, n: int = 12, d: int = 3000) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d), dtype=np.float32)


def shifted(seed: int) -> np.ndarray:
    """Three rows stand apart everywhere."""
    found = rows(seed)
    found[:F] += 2.0
    return found


def misleading(seed: int) -> np.ndarray:
    """Three rows stand apart in the first columns, and three others, by a hair, in all."""
    found = rows(seed)
    found[:F, :SAMPLE] += 0.5
    found[F : 2 * F, SAMPLE:] *= np.float32(1.063)
    return found


def spiked(seed: int) -> np.ndarray:
    """One number in a thousand is a thousand times the others: rounding takes what the others hold."""
    found = rows(seed)
    found[:, ::1000] *= 1000.0
    return found


def far_first(seed: int) -> np.ndarray:
    """The row that the first look is taken around lies a million away."""
    found = shifted(seed)
    found[0] += 1e6
    return found


CASES: dict[str, tuple[Callable[[int], np.ndarray], set[float]]] = {  # and what rounded_distances takes on, at least
    "apart: rounded distances do": (shifted, {1.0}),
    "alike: the first look finds no gap": (rows, {0.0}),
    "the first columns mislead, and rounded distances leave it open": (misleading, {0.0}),
    "few numbers hold most of the length": (spiked, set()),
    "a row far away comes first": (far_first, set()),
}


@pytest.mark.parametrize("case", CASES)
def test_krum_keeps_whom_float64_keeps(case: str) -> None:
    make, rounded = CASES[case]
    seen = set()
    for seed in range(20):
        updates = make(seed)
        many, one = judged(updates), judged(updates, "krum")
        np.testing.assert_array_equal(many.accepted, kept_by_float64(updates, len(updates) - F))
        np.testing.assert_array_equal(one.accepted, kept_by_float64(updates, 1))
        seen.add(float(many.measurements["rounded_distances"]))
    assert rounded <= seen


def test_scores_by_rounded_distances_are_right_to_a_thousandth() -> None:
    updates = shifted(0)
    found = judged(updates)
    exact = np.sort([((updates.astype(np.float64) - row) ** 2).sum(axis=1) for row in updates], axis=1)
    assert found.measurements["rounded_distances"] == 1.0
    np.testing.assert_allclose(found.scores, exact[:, 1 : len(updates) - F - 1].sum(axis=1), rtol=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.0, 3.0), st.integers(-20, 20), st.integers(1, 4000))
def test_krum_keeps_whom_float64_keeps_at_any_gap_scale_and_size(seed: int, gap: float, scale: int, d: int) -> None:
    updates = rows(seed, 11, d)
    updates[:F] += np.float32(gap)
    updates *= np.float32(2.0) ** scale
    found = judged(updates)
    wanted = kept_by_float64(updates, len(updates) - F)
    assert np.array_equal(found.accepted, wanted) or tied(updates)


def tied(updates: np.ndarray) -> Any:
    """Whether the last kept and the first not kept have scores that no 24 bits tell apart."""
    wide = updates.astype(np.float64)
    squares = np.stack([((wide - row) ** 2).sum(axis=1) for row in wide])
    scores = np.sort(np.sort(squares, axis=1)[:, 1 : len(wide) - F - 1].sum(axis=1))
    return scores[len(wide) - F] <= scores[len(wide) - F - 1] * (1 + 1e-6)
