"""An engine that is stopped and started again from its saved state gives the bits of one that never stopped."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from covey_coordinator.aggregation.engines import Engine, make_engine
from covey_coordinator.aggregation.registry import rule_from_table
from covey_protocol.errors import StorageError
from covey_protocol.parameters import ParameterSpec

SPECS = (ParameterSpec("dense", (3, 4)), ParameterSpec("mean", (2,), trainable=False))
D, N = 14, 6
TABLES: dict[str, dict[str, Any]] = {
    "a rule without memory": {"rule": "mean"},
    "a rule that remembers devices": {"rule": "foolsgold"},
    "a pre-step with a running norm": {"rule": "median", "before": ["clipping"]},
}


def engine(table: dict[str, Any], optimizer: str = "adam", name: str = "direct", rate: float = 0.1) -> Engine:
    return make_engine(name, rule_from_table(table), SPECS, optimizer, rate)


def rounds(made: Engine, parameters: np.ndarray, numbers: range) -> np.ndarray:
    for number in numbers:
        rng = np.random.default_rng(number)
        ids = [f"d{place}" for place in rng.permutation(N)]
        updates = rng.normal(size=(N, D)).astype(np.float32)
        parameters = made.step(parameters, updates, [1.0] * N, ids).parameters
    return parameters


@pytest.mark.parametrize("optimizer", ["sgd", "sgdm", "adagrad", "adam", "yogi"])
@pytest.mark.parametrize("what", TABLES)
def test_a_restart_changes_no_bit(what: str, optimizer: str) -> None:
    start = np.zeros(D, np.float32)
    through = rounds(engine(TABLES[what], optimizer), start, range(5))
    first = engine(TABLES[what], optimizer)
    half = rounds(first, start, range(3))
    second = engine(TABLES[what], optimizer)
    assert second.load_state(first.saved_state())
    assert rounds(second, half, range(3, 5)).tobytes() == through.tobytes()
    if optimizer != "sgd":  # the test tells a kept memory from a fresh one
        assert rounds(engine(TABLES[what], optimizer), half, range(3, 5)).tobytes() != through.tobytes()


def test_a_state_saved_by_one_door_is_loaded_by_the_other() -> None:
    table, start = {"rule": "mean"}, np.zeros(D, np.float32)
    made = [engine(table, name=name) for name in ("direct", "tff")]
    try:
        halves = [rounds(one, start, range(2)) for one in made]
        saved = [one.saved_state() for one in made]
        assert made[0].load_state(saved[1])
        assert made[1].load_state(saved[0])
        ends = [rounds(one, half, range(2, 4)) for one, half in zip(made, halves)]
        assert ends[0].tobytes() == ends[1].tobytes()
    finally:
        for one in made:
            one.close()


OTHERS = {
    "another rule": ({"rule": "median"}, "adam", 0.1),
    "another setting of the rule": ({"rule": "trimmed-mean", "num_byzantine": 1}, "adam", 0.1),
    "another optimizer of the same shapes": ({"rule": "mean"}, "yogi", 0.1),
    "another server learning rate": ({"rule": "mean"}, "adam", 0.2),
}
OTHER_SPECS = (ParameterSpec("dense", (4, 3)), *SPECS[1:])


@pytest.mark.parametrize("what", OTHERS)
def test_a_state_is_not_loaded_by(what: str) -> None:
    saved = engine({"rule": "mean"}).saved_state()
    table, optimizer, rate = OTHERS[what]
    other = engine(table, optimizer, rate=rate)
    before = other.saved_state()
    assert not other.load_state(saved)
    assert other.saved_state() == before


def test_a_state_is_not_loaded_by_an_engine_of_another_model() -> None:
    other = make_engine("direct", rule_from_table({"rule": "mean"}), OTHER_SPECS, "adam", 0.1)
    assert not other.load_state(engine({"rule": "mean"}).saved_state())


def test_what_is_no_saved_state_is_an_error() -> None:
    made = engine({"rule": "mean"})
    with pytest.raises(StorageError, match="cannot be read"):
        made.load_state(b"nonsense")
    content = msgspec.msgpack.decode(made.saved_state())
    content["arrays"][0][2] = b""
    with pytest.raises(StorageError, match="a saved state holds"):
        made.load_state(msgspec.msgpack.encode(content))
