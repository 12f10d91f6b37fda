"""What an evaluation says of a model cannot be moved by a few devices, and accuses nobody whose data are unusual."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_coordinator.aggregation.evaluating import Evaluated, evaluated, metrics_fault
from covey_coordinator.aggregation.screening import Arrivals, Screened
from covey_coordinator.records import ACCEPTED, REJECTED
from covey_protocol.errors import RuleError

NAMES = ("loss", "accuracy")
MODEL = np.zeros(3, np.float32)
HONEST = {"a": (0.5, 0.9), "b": (0.7, 0.8), "c": (0.6, 0.85), "d": (0.9, 0.7), "e": (0.4, 0.95)}


def screened(rows: dict[str, Sequence[float]], examples: dict[str, int] | None = None) -> Screened:
    arrivals = Arrivals(rows, len(NAMES), metrics_fault(NAMES))
    for device_id, row in rows.items():
        arrivals.add(device_id, np.array(row, np.float32), (examples or {}).get(device_id, 10))
    return arrivals.screened(rows, refuse_copies=False)


def outcome(
    rows: dict[str, Sequence[float]], num_byzantine: int = 0, examples: dict[str, int] | None = None
) -> Evaluated:
    return evaluated(NAMES, MODEL, screened(rows, examples), num_byzantine)


def test_mean_median_and_spread_are_three_numbers() -> None:
    examples = {"a": 10, "b": 20, "c": 10, "d": 40, "e": 20}
    loss, accuracy = outcome(HONEST, examples=examples).metrics
    weights = [10, 20, 10, 40, 20]
    assert loss.mean == pytest.approx(np.average([0.5, 0.7, 0.6, 0.9, 0.4], weights=weights), abs=1e-6)
    assert loss.median == pytest.approx(0.6)
    assert loss.spread == pytest.approx(0.1, abs=1e-6)  # of 0.1, 0.1, 0, 0.3, 0.2
    assert accuracy.mean == pytest.approx(np.average([0.9, 0.8, 0.85, 0.7, 0.95], weights=weights), abs=1e-6)
    assert (accuracy.median, accuracy.devices, loss.name) == (pytest.approx(0.85), 5, "loss")


def test_a_claim_of_many_examples_is_capped() -> None:
    honest = outcome(HONEST).metrics[0].mean
    greedy = outcome(HONEST, examples={"d": 2**53}).metrics[0].mean
    at_most = (honest * 5 + 9 * 0.9) / 14  # ten medians of examples
    assert greedy == pytest.approx(at_most, abs=1e-6)


LIES = {
    "a NaN": ((float("nan"), 0.9), "not finite"),
    "an infinity": ((float("inf"), 0.9), "not finite"),
    "a number that no float32 squares": ((1e30, 0.9), "beyond what float32 can square"),
    "an accuracy above one": ((0.5, 5.0), "accuracy is 5, not from 0 to 1"),
    "a negative accuracy": ((0.5, -0.1), "accuracy is -0.1, not from 0 to 1"),
}


@pytest.mark.parametrize("what", LIES)
def test_is_refused_and_its_device_named(what: str) -> None:
    row, words = LIES[what]
    found = outcome({**HONEST, "liar": row}, num_byzantine=1)
    verdicts = {verdict.device_id: verdict for verdict in found.verdicts}
    assert verdicts["liar"].status == REJECTED
    assert words in verdicts["liar"].reason
    assert found.metrics == outcome(HONEST).metrics
    assert found.measurements == {"num_byzantine": 1.0, "num_byzantine_left": 0.0}


def test_a_plausible_lie_moves_no_number_out_of_the_honest_range_and_stands_out_by_its_score() -> None:
    found = outcome({**HONEST, "liar": (1e15, 0.0)}, num_byzantine=1, examples={"liar": 2**53})
    for metric, low, high in zip(found.metrics, (0.4, 0.7), (0.9, 0.95)):
        for value in (metric.mean, metric.median):
            assert low <= value <= high + 1e-6
        assert metric.spread <= high - low
    assert outcome({**HONEST, "liar": (1e15, 0.0)}).metrics[0].mean > 1e14  # without num_byzantine it would
    scores = {verdict.device_id: verdict.score for verdict in found.verdicts}
    assert scores["liar"] == max(scores.values()) == 1e6
    assert {verdict.status for verdict in found.verdicts} == {ACCEPTED}


def test_zeros_and_equal_numbers_are_good_ones() -> None:
    found = outcome({"a": (0.0, 0.0), "b": (0.0, 0.0), "c": (0.0, 0.0)}, num_byzantine=1)
    assert [(verdict.status, verdict.score) for verdict in found.verdicts] == [(ACCEPTED, 0.0)] * 3
    assert (found.metrics[1].mean, found.metrics[1].spread) == (0.0, 0.0)


def test_too_few_devices_for_num_byzantine_are_refused() -> None:
    two = {name: HONEST[name] for name in "ab"}
    with pytest.raises(RuleError, match="n > 2f"):
        outcome(two, num_byzantine=1)
    outcome({**two, "c": (float("nan"), 0.0)}, num_byzantine=1)  # the one it was told of is known


rows = st.tuples(st.floats(-100, 100, width=32), st.floats(0, 1, width=32))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_f_devices_move_nothing_out_of_the_range_of_the_others(data: st.DataObject) -> None:
    f = data.draw(st.integers(1, 3))
    honest = {f"h{n}": row for n, row in enumerate(data.draw(st.lists(rows, min_size=f + 1, max_size=8)))}
    anything = st.tuples(st.floats(allow_nan=True, width=32), st.floats(allow_nan=True, width=32))
    hostile = {f"m{n}": row for n, row in enumerate(data.draw(st.lists(anything, min_size=f, max_size=f)))}
    examples = {name: data.draw(st.integers(1, 2**53)) for name in hostile}
    everyone = list({**honest, **hostile}.items())
    found = outcome(dict(everyone), f, examples)
    for place, metric in enumerate(found.metrics):
        values = [row[place] for row in honest.values()]
        slack = 1e-5 * max(1.0, *map(abs, values))
        assert min(values) - slack <= metric.median <= max(values) + slack
        assert min(values) - slack <= metric.mean <= max(values) + slack
        assert 0 <= metric.spread <= max(values) - min(values) + slack
    turned = outcome(dict(reversed(everyone)), f, examples)
    assert turned.metrics == found.metrics
