"""Which model an owner gets, decided from scores on the held-out data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey_edge.config import TaskPersonal
from covey_edge.model_choice import Scores, with_federated, with_personal
from covey_edge.model_rules import Gain, Score, gain, is_preferred, is_worse
from covey_edge.model_store import HISTORY, Kept, ModelStore, Version
from covey_protocol.errors import StorageError

COUNTS = (10, 10, 10, 10)
BETTER = TaskPersonal(keep=True, finetune_epochs=1)


def losses(*of_groups: float) -> Score:
    return Score(of_groups, tuple(0.0 for _ in of_groups))


def version(number: int, kind: Any = "federated", bundle: str = "b") -> Version:
    digit = f"{number:064x}"
    return Version(kind, bundle * 64, digit if kind == "federated" else digit[::-1], ("0" * 64,), number, "r", 0)


def scores(**of: Score) -> Scores:
    return Scores(COUNTS, "loss", **of)


GOOD, MIDDLE, BAD = losses(4, 5, 4, 5), losses(5, 6, 5, 6), losses(6, 7, 6, 7)


def test_the_standard_error_is_that_of_paired_differences_and_not_of_the_scores() -> None:
    """Scores that vary from group to group by 100 and differ by 1 in each: the difference is certain."""
    old, new = losses(1, 101, 1, 101), losses(0, 100, 0, 100)
    assert gain(new, old, COUNTS, "loss") == Gain(0.1, 0.0)
    noisy = gain(losses(0, 0, 0, 0), losses(8, 0, 0, 0), COUNTS, "loss")
    assert noisy.value == pytest.approx(0.2)
    assert noisy.error == pytest.approx(0.2)  # (6, -2, -2, -2) / 40: sqrt(48 * 4 / 3) / 40


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=8), st.lists(st.floats(-50, 50), min_size=2, max_size=8))
def test_what_is_won_one_way_is_lost_the_other_way(a: list[float], b: list[float]) -> None:
    groups = min(len(a), len(b))
    counts, one, other = (3,) * groups, losses(*a[:groups]), losses(*b[:groups])
    there, back = gain(one, other, counts, "loss"), gain(other, one, counts, "loss")
    assert there.value == pytest.approx(-back.value)
    assert there.error == pytest.approx(back.error)
    assert not (is_worse(there, 0.0) and is_worse(back, 0.0))


def test_a_loss_that_is_not_finite_loses_and_two_of_them_tie() -> None:
    diverged = losses(1, math.nan, 1, 1)
    assert is_worse(gain(diverged, GOOD, COUNTS, "loss"), 100.0)
    assert not is_worse(gain(GOOD, diverged, COUNTS, "loss"), 0.0)
    assert gain(diverged, diverged, COUNTS, "loss") == Gain(0.0, 0.0)


def test_a_model_that_has_diverged_is_kept_out_and_what_is_written_of_it_can_be_read(tmp_path: Path) -> None:
    kept, _ = with_federated(None, version(1), None, BETTER, 0)
    kept, let_in = with_federated(
        kept, version(2), scores(federated=losses(1, math.nan, 1, 1), current=GOOD), BETTER, 0
    )
    assert not let_in
    store = ModelStore(tmp_path)
    for name in kept.files:
        store.folder.mkdir(exist_ok=True)
        store.path(name).touch()
    with store.changing():
        store.commit(kept, {})
    assert store.load() == kept
    assert kept.history[-1].scores["federated"][0] is None


def test_one_group_says_nothing_so_nothing_is_kept_out_and_nothing_preferred() -> None:
    only = gain(losses(100), losses(1), (10,), "loss")
    assert not is_worse(only, 0.0)
    assert not is_preferred(gain(losses(1), losses(100), (10,), "loss"), 0.0, in_use=False)


@pytest.mark.parametrize(
    ("value", "in_use", "preferred"),
    [(0.0, False, False), (0.0, True, False), (0.05, False, False), (0.05, True, True), (0.11, False, True)],
)
def test_a_tie_is_the_federated_ones_and_what_is_in_use_stays_while_it_is_better(
    value: float, in_use: bool, preferred: bool
) -> None:
    assert is_preferred(Gain(value, 0.1), 0.0, in_use=in_use) is preferred


def test_the_first_model_is_used_and_a_newer_one_follows_it() -> None:
    kept, let_in = with_federated(None, version(1), None, BETTER, 7)
    assert let_in
    assert kept.used == kept.federated == version(1)
    kept, let_in = with_federated(kept, version(2), scores(federated=MIDDLE, current=MIDDLE), BETTER, 8)
    assert let_in
    assert (kept.used.number, kept.previous) == (2, version(1))
    assert [one.at_ms for one in kept.history] == [7, 8]


def test_a_federated_model_that_is_worse_is_kept_out_and_the_history_says_so() -> None:
    kept, _ = with_federated(None, version(1), None, BETTER, 0)
    after, let_in = with_federated(kept, version(2), scores(federated=BAD, current=GOOD), BETTER, 0)
    assert not let_in
    assert msgspec.structs.replace(after, history=()) == msgspec.structs.replace(kept, history=())
    assert "kept out, worse by loss" in after.history[-1].decision
    generous = msgspec.structs.replace(BETTER, min_gain=0.3)
    assert with_federated(kept, version(2), scores(federated=BAD, current=GOOD), generous, 0)[1]


def test_a_personal_model_is_used_where_it_is_better_and_left_where_a_new_federated_one_is() -> None:
    kept, _ = with_federated(None, version(1), None, BETTER, 0)
    kept, _ = with_personal(kept, version(1, "personal"), scores(federated=MIDDLE, tuned=GOOD), BETTER, 0)
    assert (kept.used.kind, kept.previous) == ("personal", version(1))
    better = scores(federated=GOOD, current=MIDDLE, personal=BAD)
    kept, _ = with_federated(kept, version(2), better, BETTER, 0)
    assert kept.used == version(2)
    assert kept.personal is not None  # it is scored again beside the next copy


def test_a_personal_model_that_is_no_better_is_kept_but_not_used() -> None:
    kept, _ = with_federated(None, version(1), None, BETTER, 0)
    kept, taken = with_personal(kept, version(1, "personal"), scores(federated=GOOD, tuned=GOOD), BETTER, 0)
    assert taken
    assert kept.used.kind == "federated"


def test_a_new_copy_that_is_worse_than_the_old_one_is_dropped_and_the_old_one_judged() -> None:
    kept, _ = with_federated(None, version(1), None, BETTER, 0)
    kept, _ = with_personal(kept, version(1, "personal"), scores(federated=MIDDLE, tuned=GOOD), BETTER, 0)
    three = scores(federated=MIDDLE, personal=GOOD, tuned=BAD)
    kept, taken = with_personal(kept, version(2, "personal"), three, BETTER, 0)
    assert not taken
    assert kept.used == kept.personal == version(1, "personal")


@pytest.mark.parametrize(
    ("use", "kind"), [("federated", "federated"), ("personal", "personal"), ("better", "federated")]
)
def test_without_held_out_data_only_the_owners_word_puts_the_personal_model_in_use(use: Any, kind: str) -> None:
    settings = msgspec.structs.replace(BETTER, use=use)
    kept, _ = with_federated(None, version(1), None, settings, 0)
    assert with_personal(kept, version(1, "personal"), None, settings, 0)[0].used.kind == kind


def test_a_model_of_another_bundle_is_let_in_and_the_copy_of_the_old_one_goes() -> None:
    kept, _ = with_federated(None, version(1), None, BETTER, 0)
    kept, _ = with_personal(kept, version(1, "personal"), scores(federated=BAD, tuned=GOOD), BETTER, 0)
    kept, let_in = with_federated(kept, version(2, bundle="c"), scores(federated=BAD), BETTER, 0)
    assert let_in
    assert (kept.used.bundle, kept.personal) == ("c" * 64, None)
    assert kept.previous == version(1, "personal")  # the way back is open


def test_what_the_owner_has_rolled_back_from_does_not_come_back_until_the_rollback_is_undone() -> None:
    kept, _ = with_federated(None, version(1), None, BETTER, 0)
    kept, _ = with_federated(kept, version(2), None, BETTER, 0)
    back = kept.rolled_back()
    assert back.used == back.federated == version(1)
    assert with_federated(back, version(2), scores(federated=GOOD, current=BAD), BETTER, 0) == (back, False)
    assert with_federated(back, version(3), None, BETTER, 0)[0].used == version(3)
    undone = back.rolled_back()
    assert (undone.used, undone.refused) == (version(2), ())


def test_a_personal_model_that_was_rolled_back_from_is_not_chosen_again() -> None:
    kept, _ = with_federated(None, version(1), None, BETTER, 0)
    kept, _ = with_personal(kept, version(1, "personal"), scores(federated=BAD, tuned=GOOD), BETTER, 0)
    back = kept.rolled_back()
    assert back.used == version(1)
    after, _ = with_federated(back, version(2), scores(federated=BAD, current=BAD, personal=GOOD), BETTER, 0)
    assert after.used == version(2)


def test_there_is_nothing_to_go_back_to_at_first() -> None:
    with pytest.raises(StorageError, match="no model from before"):
        Kept(version(1), version(1)).rolled_back()


def test_the_history_is_bounded() -> None:
    kept, _ = with_federated(None, version(1), None, BETTER, 0)
    for number in range(HISTORY + 20):
        kept, _ = with_federated(kept, version(number), None, BETTER, number)
    assert len(kept.history) == HISTORY
    assert kept.history[-1].number == HISTORY + 19
