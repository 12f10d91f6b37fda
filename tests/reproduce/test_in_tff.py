"""The reproductions that run as TFF processes, small: their own program from data to outcome."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from covey_coordinator.reproduce import fedavg, image_classification


def test_fedavg_counts_its_rounds_and_stops_at_the_target(data_folder: Path) -> None:
    case = next(case for case in fedavg.cases(quick=False) if case.label == fedavg.label_of("iid", 10))
    settings = {**case.settings, "clients": 10, "cohort": 5, "hidden": [12, 12], "target": 0.6, "rounds": 15}
    outcome = fedavg.run(settings, 0, data_folder)
    assert outcome["curve"][-1][1] >= 0.6
    assert len(outcome["curve"]) == outcome["curve"][-1][0] < 15
    assert outcome["curve"][-1][0] - 1 < outcome["reached"] <= outcome["curve"][-1][0]


def test_devices_of_two_shards_have_few_classes_and_cohorts_are_drawn_anew() -> None:
    y = np.random.default_rng(0).integers(0, 10, 2000)
    devices = fedavg.divided(np.zeros((2000, 3), np.float32), y, "shards", 20, 0)
    assert all(len(np.unique(device.y)) <= 4 for device in devices)  # a shard may hold the end of one and another
    drawn = list(fedavg.cohorts(20, 5, 3, 0))
    assert all(cohort == sorted(set(cohort)) and len(cohort) == 5 for cohort in drawn)
    assert drawn[0] != drawn[1]
    assert drawn == list(fedavg.cohorts(20, 5, 3, 0))


def test_the_tutorial_runs_on_writer_like_shards_where_emnist_is_not(data_folder: Path) -> None:
    settings = {**image_classification.cases(quick=True)[0].settings, "download": False, "rounds": 3, "devices": 4}
    outcome = image_classification.run(settings, 0, data_folder)
    assert outcome["data"] == "mnist"
    assert [number for number, _ in outcome["curve"]] == [1, 2, 3]
    assert outcome["curve"][2][1] < outcome["curve"][0][1]
