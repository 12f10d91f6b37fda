"""ByzFL's heat maps: the worst of the attacks counts; ByzFL itself, where a Python that has it is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.reproduce import heatmaps
from covey_coordinator.reproduce.contract import Measured
from covey_protocol.errors import MachineError

needs_byzfl = pytest.mark.skipif(
    heatmaps.VARIABLE not in os.environ, reason=f"{heatmaps.VARIABLE} names no Python with byzfl"
)


def settings(peer: bool) -> dict[str, Any]:
    case = next(case for case in heatmaps.cases(quick=True) if case.label == heatmaps.label_of("trimmed-mean", 1.0, 1))
    shape = {**case.settings["descent"], "rounds": 30, "hidden": [12], "measured": 10}
    return {**case.settings, "descent": shape, "attacks": list(heatmaps.ATTACKS[:2]), "peer": peer}


def test_the_worst_attack_counts(data_folder: Path) -> None:
    outcome = heatmaps.run(settings(peer=False), 0, data_folder)
    assert outcome["byzfl"] is None
    assert outcome["accuracy"] == min(accuracy for _, accuracy in outcome["by_attack"])
    assert len(outcome["by_attack"]) == 2
    told = heatmaps.agreement(Measured({"a": [outcome]}, heatmaps.BYZFL.value))
    assert "ByzFL itself did not run" in told


def test_a_python_without_byzfl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(heatmaps.VARIABLE, "/usr/bin/false")
    with heatmaps.peer_of("trimmed-mean", 1) as peer, pytest.raises(MachineError, match="ran no ByzFL"):
        peer.aggregate(np.zeros((5, 3), np.float32))


@needs_byzfl
@pytest.mark.parametrize("rule", ["trimmed-mean", "geometric-median"])
def test_byzfls_aggregates_of_shared_updates_are_ours(rule: str) -> None:
    """The geometric median only nearly: ByzFL's takes three steps from zero, smoothed by 0.1."""
    random = np.random.default_rng(0)
    updates = random.normal(0, 0.05, (12, 300)).astype(np.float32)
    updates[:2] += 5.0
    with heatmaps.peer_of(rule, 2) as peer:
        watched = heatmaps.Watched(peer, make_rule(rule, 2, heatmaps.BEFORE))
        watched(0, updates)
    assert watched.apart < {"trimmed-mean": 1e-6, "geometric-median": 0.2}[rule]


@needs_byzfl
def test_runs_with_byzfls_rule_come_to_ours(data_folder: Path) -> None:
    outcome = heatmaps.run(settings(peer=True), 0, data_folder)
    assert outcome["apart"] < 1e-5
    assert outcome["byzfl"] == pytest.approx(outcome["accuracy"], abs=0.05)
