"""CoMT in TFF: the reference's numbers, from a computation in which the server sees sums alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from instances import fleet
from numpy.testing import assert_allclose

from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.teaching.process import TeachingProcess
from covey_coordinator.teaching.reference import comt
from covey_protocol.teaching import Problem, Settings


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as running:
        yield running


def columns(sets: Any) -> Any:
    """Two columns of each y: as it is, and something else."""
    return [(x, np.column_stack([y, y * np.where(x[:, 0] > 0, 1.0, -1.0)])) for x, y in sets]


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_a_round_in_tff_is_the_references_to_1e_9(kind: str, worker: Worker) -> None:
    """Three teachers, of whom one holds trusted instances, and a holder without others; with crafting and selection."""
    teachers, trusted = (columns(part) for part in fleet(kind, seed=30, trusted=(3, 0, 0, 4)))
    crafting = {"lambda_y": 3.0} if kind == "ridge" else {}
    told = Settings(
        lambda_w=2.0, lambda_t=3.0, lambda_a=0.2, lambda_z=5.0, rho=4.0, curvature=6.0, rounds=4, **crafting
    )
    expected = comt(teachers, trusted, Problem(kind), told)
    with TeachingProcess(teachers, trusted, Problem(kind), told, worker) as process:
        state = process.initial_state()
        for residuals in expected.history:
            state, found = process.next(state)
            assert_allclose(found, residuals, rtol=1e-9)
    assert_allclose(state.standing.theta, expected.theta, rtol=1e-9)
    for kept, alpha in zip(state.kept, expected.alphas):
        assert_allclose(kept.alpha, alpha, rtol=1e-9, atol=1e-12)
