"""Rounds that end at a goal, and rounds that take updates of earlier ones (docs/protocol.md, section 6.2)."""

from dataclasses import replace
from typing import Any

import pytest
from protocol.test_machines import OFFER, REF, SETTINGS, UPDATE, deliver, invitation, walk

from covey_protocol import device
from covey_protocol import round as rounds
from covey_protocol.blobs import blob_ref, chunk
from covey_protocol.device import DeviceMachine, State
from covey_protocol.errors import RuleError
from covey_protocol.messages import Answer, Chunk, Failure, Invitation, Need, Offer, Receipt, RoundClosed, Verdict
from covey_protocol.round import Earlier, Progress, RoundMachine, RoundSettings

LATE = Offer("run.0", REF, 5)
OTHER = blob_ref(bytes(40), 16)


def late_round(**changes: Any) -> Invitation:
    """Round 1, which takes updates of round 0."""
    return invitation(**{"max_staleness": 2, "earlier": ("run.0",), **changes})


def goal_round(goal: int, **changes: Any) -> RoundMachine:
    machine = RoundMachine(invitation(), ["a", "b", "c"], replace(SETTINGS, goal=goal, **changes))
    machine.handle(rounds.Opened(), 0.0)
    return machine


def buffer(goal: int = 2, taken: tuple[str, ...] = ()) -> RoundMachine:
    """An asynchronous round."""
    settings = replace(SETTINGS, goal=goal, earlier={"run.0": Earlier(1, frozenset(taken))})
    machine = RoundMachine(late_round(), ["a", "b", "c"], settings)
    machine.handle(rounds.Opened(), 0.0)
    return machine


def deliver_late(machine: RoundMachine, name: str, now: float = 1.0) -> list[rounds.Effect]:
    machine.handle(rounds.Offered(name, LATE), now)
    for index in range(REF.num_chunks):
        piece = Chunk("run.0", REF.sha256, index, chunk(UPDATE, REF, index))
        effects = machine.handle(rounds.ChunkArrived(name, piece), now)
    assert effects == [rounds.Store(name, LATE, UPDATE, staleness=1)]
    return machine.handle(rounds.Stored(name), now)


# --- a goal


def test_a_round_is_decided_when_its_goal_is_reached() -> None:
    machine = goal_round(2)
    deliver(machine, "a")
    assert deliver(machine, "c")[-1] == rounds.Aggregate(("a", "c"))
    finished, *_ = machine.handle(rounds.Aggregated({"a": "", "c": ""}), 2.0)
    assert finished == rounds.Finished("published", "", {"b": "2 updates came before its own"}, {})
    assert machine.handle(rounds.Offered("b", OFFER), 3.0) == [rounds.Recall("b", OFFER)]


def test_without_its_goal_a_round_ends_as_it_did_before() -> None:
    machine = goal_round(3)
    deliver(machine, "a")
    deliver(machine, "b")
    assert machine.handle(rounds.Tick(), 59.9) == [] or machine.phase is rounds.Phase.AGGREGATING
    machine.handle(rounds.Tick(), 60.0)
    assert machine.phase is rounds.Phase.AGGREGATING


def test_a_goal_below_the_quorum_is_refused_at_once() -> None:
    with pytest.raises(RuleError, match="goal of 1"):
        goal_round(1)


def test_a_restart_after_the_goal_was_reached_decides_at_once() -> None:
    stored = rounds.DeviceFacts(Progress.STORED, "", OFFER)
    facts = rounds.RoundFacts(
        invitation(),
        replace(SETTINGS, goal=2),
        rounds.Phase.INVITING,
        {"a": stored, "b": stored, "c": rounds.DeviceFacts()},
        5.0,
    )
    assert RoundMachine.restored(facts, 0.0).resume(0.0)[-1] == rounds.Aggregate(("a", "b"))


# --- the coordinator takes late updates


def test_an_update_of_an_earlier_round_is_taken_with_its_staleness() -> None:
    machine = buffer()
    need = machine.handle(rounds.Offered("a", LATE), 1.0)[-1]
    assert need == rounds.SendTo("a", Need("run.0", REF.sha256, (0, 1, 2)))
    assert deliver_late(machine, "a") == [rounds.SendTo("a", Receipt("run.0", REF.sha256, True))]


def test_its_verdict_names_the_round_it_was_trained_for() -> None:
    machine = buffer()
    deliver_late(machine, "a")
    assert deliver(machine, "b")[-1] == rounds.Aggregate(("a", "b"))
    finished, closed, *verdicts = machine.handle(rounds.Aggregated({"a": "", "b": "too far"}), 2.0)
    assert finished == rounds.Finished("published", "", {}, {"b": "too far"})  # c may deliver later: it is not missing
    assert closed == rounds.PublishRound(RoundClosed("run.1", "published"))
    assert verdicts == [
        rounds.SendTo("a", Verdict("run.0", "accepted")),
        rounds.SendTo("b", Verdict("run.1", "rejected", "too far")),
    ]


def test_an_update_that_another_round_took_is_recalled() -> None:
    assert buffer(taken=("a",)).handle(rounds.Offered("a", LATE), 1.0) == [rounds.Recall("a", LATE)]


def test_an_update_of_a_round_that_is_too_old_is_recalled() -> None:
    old = Offer("run.old", REF, 5)
    assert buffer().handle(rounds.Offered("a", old), 1.0) == [rounds.Recall("a", old)]


def test_a_round_takes_one_update_of_each_device_the_next_one_waits() -> None:
    machine = buffer(goal=3)
    deliver_late(machine, "a")
    assert machine.handle(rounds.Offered("a", OFFER), 2.0) == []
    assert machine.handle(rounds.Offered("a", LATE), 2.0) == [rounds.SendTo("a", Receipt("run.0", REF.sha256, True))]
    assert machine.handle(rounds.Tick(), 30.0) == []


def test_the_same_bytes_for_another_round_are_another_update() -> None:
    machine = buffer(goal=3)
    deliver(machine, "a")
    assert machine.handle(rounds.Offered("a", LATE), 2.0) == []


def test_what_a_device_says_of_this_round_does_not_stop_its_late_update() -> None:
    machine = buffer()
    machine.handle(rounds.Offered("a", LATE), 1.0)
    assert machine.handle(rounds.Answered("a", Answer("run.1", False, "on battery")), 1.0) == []
    assert machine.handle(rounds.Failed("a", Failure("run.1", "no data")), 1.0) == []
    assert deliver_late(machine, "a") == [rounds.SendTo("a", Receipt("run.0", REF.sha256, True))]


@pytest.mark.parametrize(
    "said",
    [
        rounds.Answered("a", Answer("run.1", False, "on battery")),
        rounds.Failed("a", Failure("run.1", "no data")),
    ],
)
def test_who_does_not_work_for_this_round_may_still_deliver_for_an_earlier_one(said: rounds.Event) -> None:
    machine = buffer()
    machine.handle(said, 1.0)
    assert deliver_late(machine, "a") == [rounds.SendTo("a", Receipt("run.0", REF.sha256, True))]


def test_a_late_update_that_is_lost_on_the_device_leaves_room_for_another() -> None:
    machine = buffer(goal=3)
    machine.handle(rounds.Offered("a", LATE), 1.0)
    assert machine.handle(rounds.Failed("a", Failure("run.0", "the disk")), 1.0) == []
    assert deliver(machine, "a") == [rounds.SendTo("a", Receipt("run.1", REF.sha256, True))]


def test_a_chunk_for_another_round_than_the_offered_one_breaks_the_protocol() -> None:
    machine = buffer()
    machine.handle(rounds.Offered("a", LATE), 1.0)
    with pytest.raises(rounds.PeerError):
        machine.handle(rounds.ChunkArrived("a", Chunk("run.1", REF.sha256, 0, chunk(UPDATE, REF, 0))), 1.0)


def test_a_chunk_that_an_earlier_round_asked_for_is_ignored() -> None:
    machine = buffer()
    piece = Chunk("run.0", REF.sha256, 0, chunk(UPDATE, REF, 0))
    assert machine.handle(rounds.ChunkArrived("a", piece), 1.0) == []
    machine.handle(rounds.Offered("a", OFFER), 1.0)
    assert machine.handle(rounds.ChunkArrived("a", piece), 1.0) == []


def test_an_asynchronous_round_waits_for_its_goal_though_nobody_is_awaited() -> None:
    machine = buffer()
    deliver(machine, "a")
    for name in "bc":
        machine.handle(rounds.Answered(name, Answer("run.1", False, "no")), 1.0)
    assert machine.handle(rounds.Tick(), 59.0) == []
    (finished, *_) = machine.handle(rounds.Tick(), 60.0)
    assert isinstance(finished, rounds.Finished)
    assert finished.outcome == "abandoned"


def test_after_a_damaged_late_update_only_that_one_is_taken_from_its_device() -> None:
    facts = {"a": rounds.DeviceFacts(Progress.LOST, "", LATE), "b": rounds.DeviceFacts(), "c": rounds.DeviceFacts()}
    settings = replace(SETTINGS, goal=2, earlier={"run.0": Earlier(1)})
    machine = RoundMachine.restored(rounds.RoundFacts(late_round(), settings, rounds.Phase.INVITING, facts, 1.0), 0.0)
    machine.resume(0.0)
    assert machine.handle(rounds.Offered("a", OFFER), 0.0) == []
    assert deliver_late(machine, "a") == [rounds.SendTo("a", Receipt("run.0", REF.sha256, True))]


# --- the device goes on


TO_FETCHING = (device.Invited(late_round(earlier=())), device.ConditionsChecked("run.1", True))
TO_TRAINING = (*TO_FETCHING, device.BlobReady(bytes(32)), device.BlobReady(bytes([1]) * 32))
NEXT = late_round(round_id="run.2", number=2, earlier=("run.1",))


@pytest.mark.parametrize("before", [TO_FETCHING, TO_TRAINING])
def test_a_device_goes_on_when_an_asynchronous_round_is_closed(before: tuple[device.Event, ...]) -> None:
    machine = DeviceMachine("a")
    walk(machine, *before)
    state = machine.state
    assert walk(machine, device.Closed(RoundClosed("run.1", "published")), device.Invited(NEXT)) == []
    assert (machine.state, machine.round_id) == (state, "run.1")


def test_it_takes_up_the_newest_invitation_when_its_update_is_kept() -> None:
    machine = DeviceMachine("a")
    walk(machine, *TO_TRAINING, device.Closed(RoundClosed("run.1", "published")), device.Invited(NEXT))
    keep, offer, discard, check = walk(machine, device.Trained("run.1", UPDATE, 5))
    assert isinstance(keep, device.Keep)
    assert (offer, discard, check) == (device.Send(OFFER), device.Discard("run.1"), device.CheckConditions(NEXT))
    assert machine.owed == ("run.1",)


def test_a_failed_training_also_leads_to_the_newest_invitation() -> None:
    machine = DeviceMachine("a")
    walk(machine, *TO_TRAINING, device.Invited(NEXT))
    failure, discard, _, check = walk(machine, device.TrainingFailed("run.1", "out of memory"))
    assert failure == device.Send(Failure("run.1", "out of memory"))
    assert (discard, check) == (device.Discard("run.1"), device.CheckConditions(NEXT))


def test_an_invitation_that_was_closed_meanwhile_is_not_taken_up() -> None:
    machine = DeviceMachine("a")
    walk(machine, *TO_TRAINING, device.Invited(NEXT), device.Closed(RoundClosed("run.2", "abandoned")))
    walk(machine, device.Trained("run.1", UPDATE, 5), device.Received(Receipt("run.1", REF.sha256, True)))
    assert machine.state is State.IDLE


def test_a_round_that_takes_nothing_of_the_old_one_replaces_it() -> None:
    machine = DeviceMachine("a")
    effects = walk(machine, *TO_TRAINING, device.Invited(late_round(round_id="run.9", earlier=())))
    assert effects[0] == device.Discard("run.1")
    assert machine.round_id == "run.9"


def test_a_synchronous_round_that_is_closed_is_over() -> None:
    machine = DeviceMachine("a")
    walk(machine, device.Invited(invitation()), device.ConditionsChecked("run.1", True))
    assert walk(machine, device.Closed(RoundClosed("run.1", "published")))[0] == device.Discard("run.1")


def test_what_is_owed_is_offered_to_a_round_that_takes_it() -> None:
    machine = DeviceMachine("a")
    machine.restore([OFFER], 0.0)
    offer, check = walk(machine, device.Invited(NEXT), now=1.0)
    assert (offer, check) == (device.Send(OFFER), device.CheckConditions(NEXT))


def test_a_device_that_reports_begins_the_next_round_and_still_owes_the_last() -> None:
    machine = DeviceMachine("a")
    walk(machine, *TO_TRAINING, device.Trained("run.1", UPDATE, 5))
    offer, discard, check = walk(machine, device.Invited(NEXT), now=1.0)
    assert (offer, discard, check) == (device.Send(OFFER), device.Discard("run.1"), device.CheckConditions(NEXT))
    assert machine.owed == ("run.1",)


def test_a_device_that_the_next_round_does_not_name_finishes_this_one() -> None:
    machine = DeviceMachine("a")
    walk(machine, *TO_TRAINING, device.Invited(late_round(round_id="run.2", earlier=("run.1",), devices=("b",))))
    walk(machine, device.Trained("run.1", UPDATE, 5), device.Received(Receipt("run.1", REF.sha256, True)))
    assert machine.state is State.IDLE


def test_settings_of_an_invitation_keep_goal_and_earlier_rounds() -> None:
    settings = RoundSettings.of(late_round(), 2, 10.0, 3.0, 2, {"run.0": Earlier(1)})
    assert (settings.goal, settings.earlier) == (2, {"run.0": Earlier(1)})
