"""DRACO's reproduction on a small scale: coded runs end under attack where they end without, the mean does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from covey_coordinator.reproduce.contract import Measured
from covey_coordinator.reproduce.draco import ATTACKS, CODES, DRACO, Descent, found, run


def outcome(folder: Path, by: str, attack: str, **changes: Any) -> dict[str, Any]:
    settings = {
        "by": by,
        "attack": attack,
        "devices": 9,
        "s": 1,
        "rounds": 30,
        "hidden": (12,),
        "measured": 30,
        **changes,
    }
    assert Descent(**settings)
    return run(settings, 0, folder)


def test_codes_end_where_they_end_without_attack_and_the_mean_does_not(data_folder: Path) -> None:
    outcomes = {f"{by}, {attack}": [outcome(data_folder, by, attack)] for by in ("mean", *CODES) for attack in ATTACKS}
    last = {label: one[0]["last"] for label, one in outcomes.items()}
    assert last["mean, no attack"] > 0.5
    for code in CODES:
        assert last[f"{code}, no attack"] == pytest.approx(last["mean, no attack"], abs=0.02)
        for attack in ATTACKS[1:]:
            assert last[f"mean, {attack}"] < 0.4
            assert last[f"{code}, {attack}"] == pytest.approx(last[f"{code}, no attack"], abs=0.01)
    assert len({outcomes[f"repetition, {attack}"][0]["bits"] for attack in ATTACKS}) == 1
    assert not any(one[0]["rounds_refused"] for one in outcomes.values())
    outcomes["geometric-median, reversed"] = outcomes["mean, reversed"]
    assert "repetition, reversed: 1 of 1 last models have the bits" in found(Measured(outcomes, DRACO.value))
