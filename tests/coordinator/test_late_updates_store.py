"""What the store keeps of updates that a later round took."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from coordinator.test_store import SETTINGS, D, invitation, offer, update
from msgspec.structs import replace

from covey_coordinator.records import ACCEPTED, DeviceVerdict
from covey_coordinator.store import RunStore
from covey_coordinator.watching.history import opened
from covey_protocol.messages import Verdict
from covey_protocol.round import Earlier, Phase, Progress, RoundSettings

HALF = np.float32(2.0**-0.5)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """Round 1 is published without an update of a; round 2 is open and takes updates of round 1."""
    store = RunStore(tmp_path / "run")
    first = replace(invitation(1), max_staleness=2)
    store.open_round("run", first, SETTINGS, first.issued_at_ms)
    store.store_update("b", offer(1, update(2.0)), update(2.0))
    store.conclude(first.round_id, Phase.PUBLISHED, "", [DeviceVerdict("b", ACCEPTED)])
    second = replace(invitation(2), max_staleness=2)
    second = replace(second, earlier=store.window(second, "run", 2))
    settings = RoundSettings.of(second, 1, 20.0, 3.0, 3, store.earlier(second))
    store.open_round("run", second, settings, second.issued_at_ms)
    return store


def take(store: RunStore) -> None:
    store.save_chunk("a", offer(1, update(1.0)), 0, update(1.0)[:8], taken_by="run.2.abc")
    store.store_update("a", offer(1, update(1.0)), update(1.0), taken_by="run.2.abc", staleness=1)


def test_a_round_names_the_earlier_ones_that_are_not_too_old_and_of_the_same_form(store: RunStore) -> None:
    third = replace(invitation(3), max_staleness=2)
    store.conclude("run.2.abc", Phase.ABANDONED, "too few", [])
    assert store.window(third, "run", 2) == ("run.2.abc", "run.1.abc")
    assert store.window(third, "run", 1) == ("run.2.abc",)
    assert store.window(replace(third, plan=replace(third.plan, compression="rotated-8bit")), "run", 2) == ()
    assert store.window(third, "another", 2) == ()
    assert store.next_window("run") == ("run.2.abc", "run.1.abc")  # a round that was abandoned is repeated


def test_a_stale_update_enters_the_rule_with_less_weight(store: RunStore) -> None:
    take(store)
    np.testing.assert_array_equal(store.read_update("run.2.abc", "a"), np.full(D, HALF))
    (kept,) = store.kept_updates("run.2.abc").values()
    np.testing.assert_array_equal(kept[1], np.full(D, HALF))


def test_a_restart_finds_the_round_with_its_goal_its_earlier_rounds_and_whose_update_is_whose(store: RunStore) -> None:
    take(store)
    facts = store.unfinished("run")
    assert facts is not None
    assert facts.settings.goal == 3
    assert facts.settings.earlier == {"run.1.abc": Earlier(1, frozenset({"b"}))}
    assert facts.devices["a"].progress is Progress.STORED
    assert facts.devices["a"].offer == offer(1, update(1.0))
    assert store.taken("run.1.abc") == {"a", "b"}


def test_who_may_still_deliver_to_a_later_round_is_not_said_to_have_failed(store: RunStore) -> None:
    take(store)
    store.conclude("run.2.abc", Phase.PUBLISHED, "", [DeviceVerdict("a", ACCEPTED)])
    with opened(store.folder) as history:
        (_, ended) = history.status()["last_rounds"]
    assert (ended["invited"], ended["accepted"], ended["not_used"]) == (1, 1, [])


def test_chunks_of_a_late_update_are_kept_with_the_round_that_takes_it(store: RunStore) -> None:
    store.save_chunk("a", offer(1, update(1.0)), 0, update(1.0)[:8], taken_by="run.2.abc")
    facts = store.unfinished("run")
    assert facts is not None
    assert facts.devices["a"].chunks == {offer(1, update(1.0)).update.sha256: {0: update(1.0)[:8]}}


def test_the_verdict_is_found_by_the_round_it_was_trained_for(store: RunStore) -> None:
    take(store)
    store.conclude("run.2.abc", Phase.PUBLISHED, "", [DeviceVerdict("a", ACCEPTED)])
    sha256 = offer(1, update(1.0)).update.sha256
    assert store.verdict("run.1.abc", "a", sha256) == Verdict("run.1.abc", "accepted")
    assert store.verdict("run.2.abc", "a", sha256) is None
    assert store.untold("run.2.abc") == [("a", Verdict("run.1.abc", "accepted"))]
    store.seen("run.2.abc", "a")
    assert store.untold_devices("run") == {"a", "b"}
    store.seen("run.1.abc", "a")
    assert store.untold_devices("run") == {"b"}
