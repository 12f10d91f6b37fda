"""Which updates never reach a rule, and the reason each device is given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from covey_coordinator.aggregation.screening import MAX_NUM_EXAMPLES, Arrivals, require_memory, screen_updates
from covey_protocol.errors import RuleError, UsageError

GOOD = np.array([1.0, 2.0, 3.0], np.float32)
OTHER = np.array([1.0, 2.0, 4.0], np.float32)


def reason_for(update: Any, num_examples: Any = 10) -> str:
    """The reason a device with this update gets beside a blameless one; empty if it passes."""
    screened = screen_updates([OTHER, update], [10, num_examples], ["good", "tested"], d=3)
    assert "good" in screened.device_ids
    return screened.reasons.get("tested", "")


UPDATES = {
    "NaN is named": (np.array([1, np.nan, 3], np.float32), "1 values that are not finite"),
    "infinity is named": (np.array([np.inf, -np.inf, 3], np.float32), "2 values that are not finite"),
    "a short vector": (np.zeros(2, np.float32), "shape (2,) instead of (3,)"),
    "a matrix": (np.ones((1, 3), np.float32), "shape (1, 3) instead of (3,)"),
    "double precision": (np.ones(3), "dtype float64 instead of float32"),
    "objects": (np.array([1, "a", None], object), "dtype object instead of float32"),
    "a list": ([1.0, 2.0, 3.0], "not an array but list"),
    "nothing": (None, "not an array but NoneType"),
    "all zeros": (np.zeros(3, np.float32), "all zeros: the device did not train"),
    "negative zeros": (-np.zeros(3, np.float32), "all zeros: the device did not train"),
    "a copy": (OTHER.copy(), "bit-equal to that of good"),
}


@pytest.mark.parametrize(("update", "reason"), UPDATES.values(), ids=UPDATES.keys())
def test_a_bad_update_is_refused_with_its_reason(update: Any, reason: str) -> None:
    assert reason in reason_for(update)


COUNTS = {
    "none": 0,
    "fewer than none": -5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a word": "many",
    "nothing": None,
    "more digits than a float holds": 10**400,
}


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS.keys())
def test_a_bad_number_of_examples_is_refused(count: Any) -> None:
    assert "num_examples is" in reason_for(GOOD, count)


def test_good_updates_pass_sorted_by_device_id() -> None:
    screened = screen_updates([GOOD, OTHER], [7, 1e12], ["b", "a"], d=3)
    assert screened.device_ids == ("a", "b")
    np.testing.assert_array_equal(screened.updates, [OTHER, GOOD])
    np.testing.assert_array_equal(screened.num_examples, np.array([MAX_NUM_EXAMPLES, 7], np.float32))
    assert screened.norms["b"] == pytest.approx(14**0.5)
    assert not screened.reasons


def test_only_updates_that_float32_cannot_square_are_too_large() -> None:
    assert reason_for(np.full(3, 1e17, np.float32)) == ""
    assert reason_for(np.full(3, 3e38, np.float32)) == "update has norm 5.2e+38, beyond what float32 can square"


def test_an_update_too_small_to_square_in_float32_is_not_all_zeros() -> None:
    assert reason_for(np.full(3, 1e-40, np.float32)) == ""


def test_every_copy_after_the_first_is_refused_whatever_the_order() -> None:
    rows = [GOOD, OTHER, GOOD, GOOD]
    screened = screen_updates(rows, [1] * 4, ["d", "c", "b", "a"], d=3)
    assert screened.device_ids == ("a", "c")
    assert screened.reasons == {
        "b": "update is bit-equal to that of a",
        "d": "update is bit-equal to that of a",
    }
    kept = screen_updates(rows, [1] * 4, ["d", "c", "b", "a"], d=3, refuse_copies=False)
    assert kept.device_ids == ("a", "b", "c", "d")


def test_updates_that_differ_in_one_unsampled_number_are_not_copies() -> None:
    one = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    other = one.copy()
    other[501] = np.nextafter(other[501], np.float32(9))
    screened = screen_updates([one, other, one.copy()], [1, 1, 1], ["a", "b", "c"], d=1000)
    assert screened.device_ids == ("a", "b")


def test_a_matrix_in_order_is_not_copied() -> None:
    matrix = np.array([GOOD, OTHER])
    assert screen_updates(matrix, [1, 1], ["a", "b"], d=3).updates is matrix


def test_nothing_left_is_an_empty_matrix() -> None:
    screened = screen_updates([None], [1], ["a"], d=3)
    assert screened.updates.shape == (0, 3)
    assert screened.num_examples.shape == (0,)


def test_a_round_that_contradicts_itself_is_our_bug() -> None:
    with pytest.raises(UsageError, match="2 updates, 1 num_examples"):
        screen_updates([GOOD, OTHER], [1], ["a", "b"], d=3)
    with pytest.raises(UsageError, match="twice"):
        screen_updates([GOOD, OTHER], [1, 1], ["a", "a"], d=3)


# ---- one by one


def arrivals_of(sent: dict[str, tuple[Any, Any]], invited: str = "abcdef", d: int = 3) -> Arrivals:
    arrivals = Arrivals(invited, d)
    for device_id, (update, num_examples) in sent.items():
        arrivals.add(device_id, update, num_examples)
    return arrivals


def test_updates_that_arrive_in_any_order_are_screened_as_all_together() -> None:
    sent = {
        "e": (GOOD, 3),
        "b": (np.array([1, np.nan, 3], np.float32), 5),
        "a": (OTHER, 1e12),
        "f": (OTHER.copy(), 2),
        "c": (np.ones(2, np.float32), 1),
        "d": (GOOD * 2, float("nan")),
    }
    one_by_one = arrivals_of(sent).screened(sent)
    updates, counts = zip(*sent.values())
    together = screen_updates(updates, counts, list(sent), d=3)
    np.testing.assert_array_equal(one_by_one.updates, together.updates)
    np.testing.assert_array_equal(one_by_one.num_examples, together.num_examples)
    assert one_by_one.device_ids == together.device_ids == ("a", "e")
    assert one_by_one.reasons == together.reasons
    np.testing.assert_equal(one_by_one.norms, together.norms)


def test_a_device_that_was_not_asked_about_leaves_no_trace() -> None:
    screened = arrivals_of({"a": (GOOD, 1), "c": (OTHER, 1), "b": (None, 1)}).screened(["c"])
    assert (screened.device_ids, screened.reasons, list(screened.norms)) == (("c",), {}, ["c"])
    np.testing.assert_array_equal(screened.updates, [OTHER])


def test_a_later_update_replaces_an_earlier_one() -> None:
    arrivals = arrivals_of({"a": (None, 1), "b": (GOOD, 1)})
    arrivals.add("a", OTHER, 4)
    arrivals.add("b", None, 1)
    screened = arrivals.screened("ab")
    assert screened.device_ids == ("a",)
    assert "b" in screened.reasons


def test_the_matrix_is_not_copied_when_all_arrive() -> None:
    arrivals = arrivals_of({"b": (GOOD, 1), "a": (OTHER, 1)}, invited="ab")
    assert arrivals.screened("ab").updates.base is arrivals.screened("ab").updates.base is not None


def test_more_than_the_rules_or_the_machine_bear_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuleError, match=r"2000 updates of 10000000 numbers are 74.5 GiB.*fewer devices"):
        Arrivals([str(number) for number in range(2000)], 10_000_000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1 << 30})())
    with pytest.raises(RuleError, match=r"need 1.4 GiB, but 1.0 GiB are free.*more memory"):
        require_memory(1000, 260_000)
    require_memory(10, 1_000_000)
