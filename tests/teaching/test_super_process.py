"""The consensus of super teaching in TFF is the one in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.teaching.super_process import TffConsensus
from covey_coordinator.teaching.super_teaching import Part, SuperSettings, agreed, super_teach
from covey_protocol.errors import UsageError
from covey_protocol.teaching import Logistic, Squares


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_what_teachers_agree_on_in_tff_is_what_numpy_says_to_1e_9(kind: str, worker: Worker) -> None:
    """Through the whole of super teaching: matching without and with a price, and two retrainings."""
    random = np.random.default_rng(2)
    star, teachers = random.normal(size=3), []
    for n in (9, 1, 8):
        x = random.normal(size=(n, 3))
        y = x @ star + random.normal(size=n)
        teachers.append((x, y if kind == "ridge" else np.where(y > 0, 1.0, -1.0)))
    settings = SuperSettings(kind=kind, prices=(0.0, 0.1), rounds=6)
    found = super_teach(teachers, star, settings, consensus=TffConsensus(worker))
    right = super_teach(teachers, star, settings)
    np.testing.assert_allclose(found.theta, right.theta, rtol=0, atol=1e-9)
    for one, other in zip(found.weights, right.weights):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-9)
    assert [flags.tolist() for flags in found.selected] == [flags.tolist() for flags in right.selected]
    assert (found.rounds, found.turns, found.vectors) == (right.rounds, right.turns, right.vectors)


def test_it_ends_where_numpy_ends(worker: Worker) -> None:
    random = np.random.default_rng(3)
    parts = [Part(random.normal(size=(5, 2)), Squares(random.normal(size=5), 1.0, np.full(5, 0.1))) for _ in range(3)]
    settings = SuperSettings(tolerance=1e-4)
    found, right = TffConsensus(worker)(parts, 1.0, np.ones(2), settings), agreed(parts, 1.0, np.ones(2), settings)
    assert found.rounds == right.rounds < settings.rounds
    np.testing.assert_allclose(found.p, right.p, rtol=0, atol=1e-10)
    with pytest.raises(UsageError, match="different losses"):
        TffConsensus(worker)([*parts, Part(np.ones((1, 2)), Logistic(1.0))], 1.0, np.ones(2), settings)
