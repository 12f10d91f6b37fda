"""A device looks for wrong labels in its own data with the instances that its owner vouches for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from algorithms import teachers

from covey_edge import debugging
from covey_edge.frames import Done, Open, Problem, Run
from covey_edge.runtime import Model
from covey_edge.trainer import Trainer, train
from covey_protocol.bundle import read_bundle
from covey_protocol.duti import class_chances
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey

PLAN = TrainingPlan(1, 0.1, shuffle_seed=3)
N, TRUSTED, WRONG = 200, 50, 60
Array = np.ndarray[Any, Any]


def digits() -> tuple[Array, Array, Array]:
    """x, labels of which the first WRONG are wrong, and the true ones; after N more to be trusted."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[: N + TRUSTED]
    x, y = (x[order] / 16).astype(np.float32).reshape(-1, 8, 8, 1), y[order].astype(np.int32)
    given = y.copy()
    given[:WRONG] = (y[:WRONG] + np.random.default_rng(1).integers(1, 10, WRONG)) % 10
    return x, given, y


class Device:
    """A training child with data of its own."""

    def __init__(self, folder: Path, bundle: bytes, key: SealingKey, data: Any, trusted: Any) -> None:
        self.folder, self.bundle, self.key = folder, bundle, key
        (folder / "bundle").write_bytes(bundle)
        np.savez(folder / "data.npz", x=data[0], y=data[1])
        np.savez(folder / "trusted.npz", x=trusted[0], y=trusted[1])
        self.trainer = Trainer()
        self.start = Model(read_bundle(bundle)).parameters()

    def ask(self, debug: str, plan: TrainingPlan = PLAN) -> Any:
        opened = self.trainer.answer(
            Open(
                str(self.folder / "bundle"),
                hashlib.sha256(self.bundle).digest(),
                self.key.public.hex(),
                "npz",
                str(self.folder / "data.npz"),
            )
        )
        assert isinstance(opened, Done), opened
        trusted = str(self.folder / "trusted.npz")
        return self.trainer.answer(
            Run("r.1.a", "pi", self.start.tobytes(), plan, 0.0, 0.0, 1, trusted_path=trusted, debug=debug)
        )

    def update_of(self, x: Array, y: Array) -> Array:
        model = Model(read_bundle(self.bundle))
        train(model, (x, y), PLAN, "pi")
        return model.parameters() - self.start


@pytest.fixture
def device(tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey) -> Device:
    x, given, true = digits()
    return Device(tmp_path, digits_bundle, coordinator_key, (x[:N], given[:N]), (x[N:], true[N:]))


@pytest.fixture(scope="module")
def first_look(
    tmp_path_factory: pytest.TempPathFactory, digits_bundle: bytes, coordinator_key: SealingKey
) -> tuple[Device, Any]:
    """A device that has looked, and what it answered."""
    (x, given, true), folder = digits(), tmp_path_factory.mktemp("device")
    made = Device(folder, digits_bundle, coordinator_key, (x[:N], given[:N]), (x[N:], true[N:]))
    return made, made.ask("report")


def told(done: Any) -> list[dict[str, Any]]:
    assert isinstance(done, Done), done
    assert set(done.found) == {"labels.json", "labels.html"}
    instances: list[dict[str, Any]] = json.loads(done.found["labels.json"])["instances"]
    return instances


def test_wrong_labels_are_doubted_and_mostly_the_right_ones_are_suggested(first_look: tuple[Device, Any]) -> None:
    _, _, true = digits()
    instances = told(first_look[1])
    doubted = [one for one in instances if one["why"]]
    assert [one["row"] for one in instances[: len(doubted)]] == [one["row"] for one in doubted]  # they come first
    found = [one for one in doubted if one["row"] < WRONG]
    assert len(found) / len(doubted) >= 0.85
    assert len(found) / WRONG >= 0.5
    assert np.mean([int(one["expected"]) == true[one["row"]] for one in found]) >= 0.75
    assert {one["why"] for one in doubted} == {"the instances you vouch for speak for another label"}


def test_the_owner_says_what_becomes_of_doubted_labels(first_look: tuple[Device, Any]) -> None:
    """A report changes nothing; without the doubted, or with what is suggested, the update is that of such data."""
    x, given, _ = digits()
    x, given = x[:N], given[:N]
    device, done = first_look
    doubted = {one["row"]: int(one["expected"]) for one in told(done) if one["why"]}
    left = np.array([row not in doubted for row in range(N)])
    mended = np.array([doubted.get(row, label) for row, label in enumerate(given)], np.int32)
    for debug, data in (
        ("report", (x, given)),
        ("", (x, given)),
        ("drop", (x[left], given[left])),
        ("mend", (x, mended)),
    ):
        done = device.ask(debug)
        assert done.num_examples == len(data[1])
        np.testing.assert_array_equal(np.frombuffer(done.update, "<f4"), device.update_of(*data))
        assert done.found == {}  # once for each state of the data is enough


def test_data_that_change_are_looked_through_again_and_evaluations_are_of_all(device: Device) -> None:
    before = len(told(device.ask("drop")))
    x, given, _ = digits()
    np.savez(device.folder / "data.npz", x=x[:150], y=given[:150])
    assert (before, len(told(device.ask("drop")))) == (N, 150)
    evaluated = device.ask("drop", TrainingPlan(1, 0.1, evaluate=("loss",)))
    assert evaluated.num_examples == 150


def test_the_page_has_pictures_and_no_way_out(first_look: tuple[Device, Any]) -> None:
    page = first_look[1].found["labels.html"].decode()
    assert page.count("<img ") == page.count("<tr>") - 1 > 20
    assert "What a look for wrong labels found in this device" in page
    assert "<th>suggested label</th>" in page
    assert "<script" not in page
    assert "http" not in page


def test_numbers_that_are_far_off_are_mended(tmp_path: Path, coordinator_key: SealingKey) -> None:
    data, trusted = teachers.numbers(1, 60), teachers.numbers(2, 20)
    wrong = data.y.copy()
    wrong[:8] += 4.0
    bundle = teachers.linear(coordinator_key, "mean_squared_error")
    device = Device(tmp_path, bundle, coordinator_key, (data.x, wrong), trusted)
    instances = told(device.ask("mend"))
    rows = [one["row"] for one in instances if one["why"]]
    assert set(range(8)) <= set(rows[:10])
    mended = np.array([float(one["expected"]) for one in sorted(instances, key=lambda one: one["row"])])
    assert np.abs(mended - data.y)[:8].max() < 1.5
    assert [one["label"] == one["expected"] for one in instances] == [not one["why"] for one in instances]


REFUSED = {
    "a file that is not there": (lambda device: (device.folder / "trusted.npz").unlink(), "trusted.npz does not exist"),
    "too many numbers": (lambda device: None, "200 examples of 64 features are too many to be debugged; turn data"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_round_fails_by_name_with(what: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    change, words = REFUSED[what]
    change(device)
    if "many" in what:
        monkeypatch.setattr(debugging, "MOST_NUMBERS", 12_799)
    answer = device.ask("report")
    assert isinstance(answer, Problem)
    assert words in f"{answer.what}; {answer.remedy}"


def test_a_class_of_which_there_is_no_instance_is_never_suggested() -> None:
    x = np.random.default_rng(0).normal(size=(30, 4))
    y = (x[:, 0] > 0).astype(np.int64)
    found = class_chances(x, y, 3, (x[:10], y[:10]), 0.01, 0.5, 10.0)
    np.testing.assert_array_equal(found[:, 2], 0.0)
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    np.testing.assert_array_equal(found.argmax(axis=1), y)
