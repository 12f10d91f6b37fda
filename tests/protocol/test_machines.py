"""The two state tables: complete, and each rule of docs/protocol.md sections 5 and 6 as a sentence."""

from typing import Any, get_args

import msgspec
import pytest

from covey_protocol import device
from covey_protocol import round as rounds
from covey_protocol.blobs import blob_ref, chunk
from covey_protocol.bundle import REQUIRED_SIGNATURES, Manifest, TensorSpec
from covey_protocol.device import DeviceMachine, State, needed_capabilities
from covey_protocol.errors import PeerError, RuleError, UsageError
from covey_protocol.messages import (
    Answer,
    BlobRef,
    Chunk,
    Failure,
    Invitation,
    Need,
    Offer,
    Receipt,
    RoundClosed,
    Seen,
    TrainingPlan,
    Verdict,
)
from covey_protocol.parameters import ParameterSpec
from covey_protocol.round import Phase, Progress, RoundMachine, RoundSettings

UPDATE = bytes(range(40))
REF = blob_ref(UPDATE, 16)
OFFER = Offer("run.1", REF, 5)


def invitation(round_id: str = "run.1", **changes: Any) -> Invitation:
    values: dict[str, Any] = {
        "round_id": round_id,
        "number": 1,
        "issued_at_ms": 0,
        "duration_ms": 60_000,
        "bundle": BlobRef(bytes(32), 10, 16),
        "parameters": BlobRef(bytes([1]) * 32, 40, 16),
        "plan": TrainingPlan(1, 0.1),
        "devices": ("a", "b", "c"),
        "requires": ("train",),
    }
    return Invitation(**{**values, **changes})


@pytest.mark.parametrize(("states", "events", "module"), [(State, device.Event, device), (Phase, rounds.Event, rounds)])
def test_every_pair_of_state_and_event_is_decided(states: Any, events: Any, module: Any) -> None:
    for state in states:
        for kind in get_args(events):
            decided, ignored = (state, kind) in module.TABLE, (state, kind) in module.IGNORED
            assert decided != ignored, (state, kind)


# --- the device


def walk(machine: DeviceMachine, *events: device.Event, now: float = 0.0) -> list[device.Effect]:
    """The effects of the last event."""
    effects: list[device.Effect] = []
    for event in events:
        effects = machine.handle(event, now)
    return effects


TO_FETCHING = (device.Invited(invitation()), device.ConditionsChecked("run.1", True))
TO_TRAINING = (*TO_FETCHING, device.BlobReady(bytes(32)), device.BlobReady(bytes([1]) * 32))
TO_REPORTING = (*TO_TRAINING, device.Trained("run.1", UPDATE, 5))


def test_a_device_goes_through_a_whole_round() -> None:
    machine = DeviceMachine("a")
    assert walk(machine, device.Invited(invitation())) == [device.CheckConditions(invitation())]
    answer, fetch = walk(machine, device.ConditionsChecked("run.1", True))
    assert answer == device.Send(Answer("run.1", True))
    assert isinstance(fetch, device.Fetch)
    assert walk(machine, device.BlobReady(bytes(32))) == []
    assert walk(machine, device.BlobReady(bytes([1]) * 32)) == [device.Train(invitation())]
    keep, send = walk(machine, device.Trained("run.1", UPDATE, 5))
    assert isinstance(keep, device.Keep)
    assert send == device.Send(OFFER)
    assert walk(machine, device.Needed(Need("run.1", REF.sha256, (0, 2)))) == [device.SendChunks(OFFER, (0, 2))]
    assert device.Discard("run.1") in walk(machine, device.Received(Receipt("run.1", REF.sha256, True)))
    assert machine.state is State.IDLE
    assert machine.owed == ("run.1",)
    note, forget, seen = walk(machine, device.Judged(Verdict("run.1", "rejected", "too far")))
    assert forget == device.Forget("run.1")
    assert note == device.Note("round run.1: update rejected: too far")
    assert seen == device.Send(Seen("run.1"))
    assert machine.owed == ()


def test_the_update_is_kept_before_anything_is_said_about_it() -> None:
    effects = walk(DeviceMachine("a"), *TO_REPORTING)
    assert [type(effect) for effect in effects] == [device.Keep, device.Send]


def test_a_device_that_was_not_invited_stays_idle() -> None:
    machine = DeviceMachine("z")
    assert walk(machine, device.Invited(invitation())) == []
    assert machine.state is State.IDLE


def test_an_invitation_that_names_nobody_is_for_everyone() -> None:
    assert walk(DeviceMachine("z"), device.Invited(invitation(devices=())))


def test_a_capability_the_device_lacks_is_declined_by_name() -> None:
    (answer, _) = walk(DeviceMachine("a"), device.Invited(invitation(requires=("train", "mask"))))
    assert isinstance(answer, device.Send)
    assert isinstance(answer.message, Answer)
    assert not answer.message.accept
    assert "mask" in answer.message.reason


def test_an_invitation_requires_what_an_old_device_would_pass_over_in_silence() -> None:
    first = Manifest(
        format=1,
        name="m",
        model_sha256="",
        model_bytes=0,
        batch_size=4,
        input=TensorSpec((3,), "float32"),
        label=TensorSpec((), "int32"),
        parameters=(ParameterSpec("dense/kernel", (3, 2)),),
        signatures=REQUIRED_SIGNATURES,
        loss="sparse_categorical_crossentropy",
        optimizer="sgd",
    )
    plain = TrainingPlan(1, 0.1)
    assert needed_capabilities(first, plain) == ("train", "float32")
    asks = msgspec.structs.replace(plain, gradient_clip_norm=1.0, proximal_weight=0.1)
    assert needed_capabilities(first, asks) == ("train", "float32", "clip_norm", "proximal")
    for work, capability in (
        ("gradient", "svrg"),
        ("svrg", "svrg"),
        ("scaffold", "scaffold"),
        ("dream", "dream"),
        ("teach", "teach"),
        ("teach-correct", "teach"),
        ("cyclic-code", "cyclic-code"),
    ):
        other = msgspec.structs.replace(plain, work=work)
        named = needed_capabilities(first, other)
        assert set(named) == {"train", "float32", capability} & set(device.CAPABILITIES)
    adam = msgspec.structs.replace(first, signatures=(*first.signatures, "reset_optimizer"), train_inputs=("seed",))
    assert needed_capabilities(adam, plain) == ("train", "float32", "seed", "reset_optimizer")
    (effect,) = walk(DeviceMachine("a"), device.Invited(invitation(requires=needed_capabilities(adam, asks))))
    assert isinstance(effect, device.CheckConditions)
    old = DeviceMachine("a", capabilities=("train", "float32"))
    (answer, _) = walk(old, device.Invited(invitation(requires=needed_capabilities(adam, asks))))
    assert isinstance(answer, device.Send)
    assert isinstance(answer.message, Answer)
    assert answer.message.reason.startswith("this device cannot seed, clip_norm, proximal, reset_optimizer")


FOR_NOW = device.ConditionsChecked("run.1", False, "not charging", for_now=True)
NOT_NOW = Answer("run.1", False, "not charging", True)
YES = device.ConditionsChecked("run.1", True)


def test_a_device_that_declined_for_now_joins_the_same_round_when_it_can() -> None:
    machine = DeviceMachine("a")
    walk(machine, device.Invited(invitation()), FOR_NOW)
    assert machine.postponed == invitation()
    assert walk(machine, device.Connected())[0] == device.Send(NOT_NOW)
    assert walk(machine, device.Reconsidered(), now=59.0) == [device.CheckConditions(invitation())]
    effects = walk(machine, YES, now=59.0)
    assert effects == [device.Send(Answer("run.1", True)), device.Fetch(invitation().blobs)]
    assert (machine.postponed, machine.state) == (None, State.FETCHING)
    late = walk(machine, device.Tick(), now=60.0)  # the deadline is the invitation's, not a new one
    assert isinstance(late[0], device.Send)
    assert isinstance(late[0].message, Failure)


def test_it_may_decline_again_and_again() -> None:
    machine = DeviceMachine("a")
    walk(machine, device.Invited(invitation()), FOR_NOW)
    for _ in range(3):
        effects = walk(machine, device.Reconsidered(), FOR_NOW)
        assert effects[0] == device.Send(NOT_NOW)
        assert machine.postponed == invitation()


NOT_POSTPONED: dict[str, tuple[device.Event, ...]] = {
    "it declined for good": (device.ConditionsChecked("run.1", False, "no data"),),
    "the round is closed": (FOR_NOW, device.Closed(RoundClosed("run.1", "published"))),
    "another round begins": (FOR_NOW, device.Invited(invitation("run.2")), device.TrainingFailed("run.2", "")),
    "another round begins without it": (FOR_NOW, device.Invited(invitation("run.2", devices=("b",)))),
}


@pytest.mark.parametrize("why", NOT_POSTPONED)
def test_nothing_is_joined_where(why: str) -> None:
    machine = DeviceMachine("a")
    walk(machine, device.Invited(invitation()), *NOT_POSTPONED[why])
    state = machine.state
    assert machine.postponed is None
    assert walk(machine, device.Reconsidered()) == []
    assert machine.state is state


def test_nothing_is_joined_after_the_rounds_time() -> None:
    machine = DeviceMachine("a")
    walk(machine, device.Invited(invitation()), FOR_NOW)
    walk(machine, device.Tick(), now=60.0)
    assert walk(machine, device.Reconsidered(), now=60.0) == []


def test_the_invitation_of_a_postponed_round_that_comes_again_is_answered_with_no() -> None:
    machine = DeviceMachine("a")
    walk(machine, device.Invited(invitation()), FOR_NOW)
    assert walk(machine, device.Invited(invitation())) == [device.Send(NOT_NOW)]
    assert machine.postponed == invitation()


def test_a_condition_that_fails_is_declined_with_its_reason() -> None:
    machine = DeviceMachine("a")
    effects = walk(machine, device.Invited(invitation()), device.ConditionsChecked("run.1", False, "on battery"))
    assert effects[0] == device.Send(Answer("run.1", False, "on battery"))
    assert machine.state is State.IDLE


def test_the_same_invitation_again_is_only_answered_again() -> None:
    """A coordinator that started again says it again; it may have missed the answer."""
    for walked, said in (
        (TO_FETCHING[:1], []),
        (TO_FETCHING, [device.Send(Answer("run.1", True))]),
        (TO_TRAINING, [device.Send(Answer("run.1", True))]),
        (TO_REPORTING, []),  # the Offer is repeated as time passes
    ):
        machine = DeviceMachine("a")
        walk(machine, *walked)
        state = machine.state
        assert walk(machine, device.Invited(invitation())) == said
        assert machine.state is state


EXCUSES = {
    "a condition": (
        (TO_FETCHING[0], device.ConditionsChecked("run.1", False, "on battery")),
        Answer("run.1", False, "on battery"),
    ),
    "a capability": (
        (device.Invited(invitation(requires=("fly",))),),
        Answer("run.1", False, "this device cannot fly; update its agent"),
    ),
    "a training": ((*TO_TRAINING, device.TrainingFailed("run.1", "SIGSEGV")), Failure("run.1", "SIGSEGV")),
    "an outbox": ((*TO_REPORTING, device.Lost("run.1", "a full disk")), Failure("run.1", "a full disk")),
}


@pytest.mark.parametrize("what", EXCUSES)
def test_an_excuse_is_said_again_until_its_round_is_over(what: str) -> None:
    """Or the coordinator, had it missed it, would wait for this device."""
    events, excuse = EXCUSES[what]
    machine = DeviceMachine("a")
    assert device.Send(excuse) in walk(machine, *events)
    for again in (device.Connected(), device.Invited(invitation()), device.Connected()):
        assert walk(machine, again) == [device.Send(excuse)]
    assert walk(machine, device.Closed(RoundClosed("run.0", "published")), device.Connected()) == [device.Send(excuse)]
    assert walk(machine, device.Closed(RoundClosed("run.1", "published"))) == []
    assert walk(machine, device.Connected()) == []
    assert walk(machine, device.Invited(invitation())) == []


def test_an_excuse_is_not_said_any_more_in_the_next_round() -> None:
    machine = DeviceMachine("a")
    walk(machine, *TO_TRAINING, device.TrainingFailed("run.1", "SIGSEGV"), device.Invited(invitation("run.2")))
    assert walk(machine, device.Connected()) == []


def test_a_finished_round_is_not_begun_again_when_its_retained_invitation_comes_back() -> None:
    machine = DeviceMachine("a")
    walk(machine, *TO_REPORTING, device.Received(Receipt("run.1", REF.sha256, True)))
    assert walk(machine, device.Invited(invitation())) == []
    assert machine.state is State.IDLE


def test_a_new_round_replaces_the_one_in_progress() -> None:
    machine = DeviceMachine("a")
    effects = walk(machine, *TO_TRAINING, device.Invited(invitation("run.2")))
    assert effects[0] == device.Discard("run.1")
    assert machine.round_id == "run.2"
    assert walk(machine, device.Trained("run.1", UPDATE, 5)) == []


def test_a_failed_training_is_reported_and_the_device_is_free_again() -> None:
    machine = DeviceMachine("a")
    effects = walk(machine, *TO_TRAINING, device.TrainingFailed("run.1", "SIGSEGV"))
    assert effects[0] == device.Send(Failure("run.1", "SIGSEGV"))
    assert machine.state is State.IDLE


def test_an_unanswered_offer_is_sent_again_also_after_the_deadline() -> None:
    machine = DeviceMachine("a")
    walk(machine, *TO_REPORTING)
    assert machine.handle(device.Tick(), device.RESEND_S - 1) == []
    assert machine.handle(device.Tick(), device.RESEND_S) == [device.Send(OFFER)]
    assert device.Discard("run.1") in machine.handle(device.Tick(), 60.0)
    assert machine.state is State.IDLE
    assert machine.handle(device.Tick(), device.RESEND_S + device.ASK_S - 0.5) == []
    assert machine.handle(device.Tick(), 60.0 + device.ASK_S) == [device.Send(OFFER)]


def test_an_offer_that_nothing_answers_is_repeated_less_and_less_often_until_something_is_heard() -> None:
    machine = DeviceMachine("a")
    walk(machine, *TO_REPORTING)

    def repeats(start: int, end: int) -> list[int]:
        return [now for now in range(start, end) if device.Send(OFFER) in machine.handle(device.Tick(), float(now))]

    assert repeats(1, 50) == [5, 15, 35]
    machine.handle(device.Needed(Need("run.1", OFFER.update.sha256, (0,))), 50.0)
    assert repeats(51, 60) == [55]


def test_a_device_that_is_not_done_at_the_deadline_says_so() -> None:
    machine = DeviceMachine("a")
    walk(machine, *TO_TRAINING)
    effects = machine.handle(device.Tick(), 60.0)
    assert isinstance(effects[0], device.Send)
    assert isinstance(effects[0].message, Failure)
    assert machine.state is State.IDLE


ENDS = {
    "its receipt": device.Received(Receipt("run.1", REF.sha256, True)),
    "the round's end": device.Closed(RoundClosed("run.1", "published")),
    "another round": device.Invited(invitation("run.2")),
    "a restart": None,
}


@pytest.mark.parametrize("what", ENDS)
def test_an_update_is_owed_after(what: str) -> None:
    machine = DeviceMachine("a")
    walk(machine, *TO_REPORTING)
    event = ENDS[what]
    if event is None:
        machine = DeviceMachine("a")
        machine.restore([OFFER], now=0.0)
    else:
        assert not any(isinstance(effect, device.Forget) for effect in machine.handle(event, 0.0))
    assert machine.owed == ("run.1",)
    assert device.Send(OFFER) in walk(machine, device.Connected())
    assert walk(machine, device.Needed(Need("run.1", REF.sha256, (1,)))) == [device.SendChunks(OFFER, (1,))]
    assert walk(machine, device.Invited(invitation())) == []
    assert device.Forget("run.1") in walk(machine, device.Judged(Verdict("run.1", "accepted")))
    assert device.Send(OFFER) not in walk(machine, device.Connected())


def test_a_refusal_ends_what_is_owed_with_its_reason() -> None:
    machine = DeviceMachine("a")
    effects = walk(machine, *TO_REPORTING, device.Received(Receipt("run.1", REF.sha256, False, "that round is over")))
    assert effects[-2:] == [device.Note("round run.1: update refused: that round is over"), device.Forget("run.1")]


def test_a_verdict_that_comes_again_is_only_answered() -> None:
    assert walk(DeviceMachine("a"), device.Judged(Verdict("run.1", "accepted"))) == [device.Send(Seen("run.1"))]


def test_an_update_that_the_outbox_has_lost_is_reported_and_not_offered_again() -> None:
    machine = DeviceMachine("a")
    effects = walk(machine, *TO_REPORTING, device.Lost("run.1", "unreadable"))
    assert effects[0] == device.Send(Failure("run.1", "unreadable"))
    assert effects[-1] == device.Forget("run.1")
    assert machine.state is State.IDLE
    assert OFFER not in [effect.message for effect in walk(machine, device.Connected())]  # type: ignore[union-attr]


def test_the_outbox_is_bounded_and_the_oldest_gives_way() -> None:
    machine = DeviceMachine("a")
    offers = [Offer(f"old.{number}", REF, 5) for number in range(device.MAX_OWED)]
    machine.restore(offers, now=0.0)
    note, forget, *_ = walk(machine, *TO_REPORTING)
    assert note == device.Note(f"round old.0: no verdict came over {device.MAX_OWED} later updates")
    assert forget == device.Forget("old.0")
    assert len(machine.owed) == device.MAX_OWED


def test_after_a_reconnection_the_last_word_is_said_again() -> None:
    machine = DeviceMachine("a")
    assert walk(machine, *TO_TRAINING, device.Connected()) == [device.Send(Answer("run.1", True))]
    assert walk(machine, device.Trained("run.1", UPDATE, 5), device.Connected()) == [device.Send(OFFER)]


def test_an_update_from_before_a_restart_is_offered_again() -> None:
    machine = DeviceMachine("a")
    machine.restore([OFFER], now=0.0)
    assert walk(machine, device.Connected()) == [device.Send(OFFER)]
    assert walk(machine, device.Needed(Need("run.1", REF.sha256, (1,)))) == [device.SendChunks(OFFER, (1,))]


def test_chunks_that_do_not_exist_are_not_sent() -> None:
    machine = DeviceMachine("a")
    walk(machine, *TO_REPORTING)
    assert walk(machine, device.Needed(Need("run.1", REF.sha256, (7, 16_000)))) == []


# --- the round


SETTINGS = RoundSettings(quorum=2, answer_s=10.0, grace_s=3.0, update_bytes=len(UPDATE))


def opened(**changes: Any) -> RoundMachine:
    machine = RoundMachine(invitation(), ["c", "a", "b"], SETTINGS)
    machine.handle(rounds.Opened(), 0.0)
    return machine


def accept(machine: RoundMachine, *names: str) -> None:
    for name in names:
        machine.handle(rounds.Answered(name, Answer("run.1", True)), 0.0)


def deliver(machine: RoundMachine, name: str, now: float = 1.0) -> list[rounds.Effect]:
    """Offer, chunks, stored; the effects of the last step."""
    machine.handle(rounds.Offered(name, OFFER), now)
    for index in range(REF.num_chunks):
        effects = machine.handle(
            rounds.ChunkArrived(name, Chunk("run.1", REF.sha256, index, chunk(UPDATE, REF, index))), now
        )
    assert effects == [rounds.Store(name, OFFER, UPDATE)]
    return machine.handle(rounds.Stored(name), now)


def test_a_round_ends_when_every_device_delivered() -> None:
    machine = opened()
    accept(machine, "a", "b", "c")
    assert deliver(machine, "b") == [rounds.SendTo("b", Receipt("run.1", REF.sha256, True))]
    deliver(machine, "c")
    assert deliver(machine, "a")[-1] == rounds.Aggregate(("a", "b", "c"))
    finished, closed, *verdicts = machine.handle(rounds.Aggregated({"a": "", "b": "too far", "c": ""}), 2.0)
    assert finished == rounds.Finished("published", "", {}, {"b": "too far"})
    assert closed == rounds.PublishRound(RoundClosed("run.1", "published"))
    assert verdicts == [
        rounds.SendTo("a", Verdict("run.1", "accepted")),
        rounds.SendTo("b", Verdict("run.1", "rejected", "too far")),
        rounds.SendTo("c", Verdict("run.1", "accepted")),
    ]


def test_no_receipt_before_the_update_is_durable() -> None:
    machine = opened()
    machine.handle(rounds.Offered("a", OFFER), 1.0)
    said: list[rounds.Effect] = []
    for index in range(REF.num_chunks):
        said += machine.handle(
            rounds.ChunkArrived("a", Chunk("run.1", REF.sha256, index, chunk(UPDATE, REF, index))), 1.0
        )
    assert not any(isinstance(effect, rounds.SendTo) for effect in said)
    assert machine.handle(rounds.Stored("a"), 1.0)[0] == rounds.SendTo("a", Receipt("run.1", REF.sha256, True))


def test_a_lost_device_is_waited_for_a_little_then_the_round_goes_on() -> None:
    machine = opened()
    accept(machine, "a", "b", "c")
    deliver(machine, "a")
    deliver(machine, "b")
    assert machine.handle(rounds.PresenceChanged("c", False), 2.0) == []
    assert machine.handle(rounds.Tick(), 2.0 + SETTINGS.grace_s - 0.1) == []
    assert machine.handle(rounds.Tick(), 2.0 + SETTINGS.grace_s) == [rounds.Aggregate(("a", "b"))]
    finished = machine.handle(rounds.Aggregated({"a": "", "b": ""}), 6.0)[0]
    assert isinstance(finished, rounds.Finished)
    assert finished.missing == {"c": "connection lost"}


def test_a_device_that_comes_back_in_time_still_counts() -> None:
    machine = opened()
    accept(machine, "a", "b", "c")
    deliver(machine, "a")
    deliver(machine, "b")
    machine.handle(rounds.PresenceChanged("c", False), 2.0)
    machine.handle(rounds.PresenceChanged("c", True), 3.0)
    assert machine.handle(rounds.Tick(), 30.0) == []
    assert deliver(machine, "c", 31.0)[-1] == rounds.Aggregate(("a", "b", "c"))


def test_who_declines_or_fails_is_not_waited_for() -> None:
    machine = opened()
    accept(machine, "a", "b")
    machine.handle(rounds.Answered("c", Answer("run.1", False, "on battery")), 0.0)
    deliver(machine, "a")
    assert deliver(machine, "b")[-1] == rounds.Aggregate(("a", "b"))


def test_silent_devices_are_waited_for_until_the_answer_time() -> None:
    machine = opened()
    deliver(machine, "a")
    deliver(machine, "b")
    assert machine.handle(rounds.Tick(), SETTINGS.answer_s - 1) == []
    assert machine.handle(rounds.Tick(), SETTINGS.answer_s) == [rounds.Aggregate(("a", "b"))]


def test_a_deadline_before_the_answer_time_still_ends_the_round() -> None:
    machine = RoundMachine(invitation(duration_ms=5_000), ["a", "b", "c"], SETTINGS)
    machine.handle(rounds.Opened(), 0.0)
    deliver(machine, "a")
    deliver(machine, "b")
    assert machine.handle(rounds.Tick(), 5.0) == [rounds.Aggregate(("a", "b"))]


def test_without_a_quorum_at_the_deadline_the_round_is_abandoned_with_a_reason() -> None:
    machine = opened()
    accept(machine, "a", "b", "c")
    deliver(machine, "a")
    finished, closed, verdict = machine.handle(rounds.Tick(), 60.0)
    why = "the round was abandoned: 1 updates came, the quorum is 2"
    assert verdict == rounds.SendTo("a", Verdict("run.1", "rejected", why))
    assert closed == rounds.PublishRound(RoundClosed("run.1", "abandoned", "1 updates came, the quorum is 2"))
    assert isinstance(finished, rounds.Finished)
    assert set(finished.missing) == {"b", "c"}


def test_a_refusing_rule_abandons_the_round() -> None:
    machine = opened()
    for name in "abc":
        deliver(machine, name)
    finished, _, *verdicts = machine.handle(rounds.AggregationRefused("krum needs more devices"), 2.0)
    why = "the round was abandoned: krum needs more devices"
    assert finished == rounds.Finished("abandoned", "krum needs more devices", {}, dict.fromkeys("abc", why))
    assert verdicts == [rounds.SendTo(name, Verdict("run.1", "rejected", why)) for name in "abc"]


def test_an_update_of_the_wrong_size_is_refused_before_a_byte_of_it_is_taken() -> None:
    machine = opened()
    record, refusal = machine.handle(rounds.Offered("a", Offer("run.1", blob_ref(b"tiny"), 5)), 1.0)
    assert record == rounds.Record("a", Progress.REFUSED, "refused: the update has 4 bytes, the model needs 40")
    assert isinstance(refusal, rounds.SendTo)
    assert isinstance(refusal.message, Receipt)
    assert not refusal.message.kept
    assert "needs 40" in refusal.message.reason


def test_an_update_that_breaks_its_hash_is_refused() -> None:
    machine = opened()
    machine.handle(rounds.Offered("a", OFFER), 1.0)
    for index in range(REF.num_chunks):
        data = bytes(REF.chunk_size(index))
        effects = machine.handle(rounds.ChunkArrived("a", Chunk("run.1", REF.sha256, index, data)), 1.0)
    assert isinstance(effects[0], rounds.Record)
    assert isinstance(effects[1], rounds.SendTo)
    assert isinstance(effects[1].message, Receipt)
    assert not effects[1].message.kept
    assert machine.progress()["a"] is Progress.REFUSED


def test_an_update_offered_again_after_it_was_stored_gets_its_receipt_again() -> None:
    machine = opened()
    accept(machine, "a", "b", "c")
    deliver(machine, "a")
    assert machine.handle(rounds.Offered("a", OFFER), 2.0) == [rounds.SendTo("a", Receipt("run.1", REF.sha256, True))]


def test_a_second_different_update_of_one_device_is_refused() -> None:
    machine = opened()
    accept(machine, "a", "b", "c")
    deliver(machine, "a")
    other = Offer("run.1", blob_ref(bytes(40), 16), 5)
    (effect,) = machine.handle(rounds.Offered("a", other), 2.0)
    assert isinstance(effect, rounds.SendTo)
    assert effect.message == Receipt(
        "run.1", other.update.sha256, False, "an update of this device is already stored for this round"
    )


def test_what_came_of_an_update_can_be_shown() -> None:
    machine = opened()
    accept(machine, "a", "b", "c")
    deliver(machine, "a")
    machine.handle(rounds.Offered("b", OFFER), 1.0)
    machine.handle(rounds.ChunkArrived("b", Chunk("run.1", REF.sha256, 0, chunk(UPDATE, REF, 0))), 1.0)
    assert machine.received() == {"a": (40, 40), "b": (16, 40)}


def test_only_missing_chunks_are_asked_for_again() -> None:
    machine = opened()
    machine.handle(rounds.Offered("a", OFFER), 1.0)
    machine.handle(rounds.ChunkArrived("a", Chunk("run.1", REF.sha256, 1, chunk(UPDATE, REF, 1))), 1.0)
    assert machine.handle(rounds.Offered("a", OFFER), 2.0) == [rounds.SendTo("a", Need("run.1", REF.sha256, (0, 2)))]


def test_an_offer_for_a_round_that_is_over_is_answered_from_the_store() -> None:
    late = Offer("run.0", REF, 5)
    assert opened().handle(rounds.Offered("a", late), 1.0) == [rounds.Recall("a", late)]
    machine = opened()
    for name in "abc":
        deliver(machine, name)
    assert machine.handle(rounds.Offered("a", OFFER), 2.0) == [rounds.SendTo("a", Receipt("run.1", REF.sha256, True))]
    machine.handle(rounds.AggregationRefused("no"), 2.0)
    assert machine.handle(rounds.Offered("a", OFFER), 3.0) == [rounds.Recall("a", OFFER)]


def test_a_device_that_declined_may_join_later_by_a_yes_or_by_its_update() -> None:
    for later in (rounds.Answered("a", Answer("run.1", True)), rounds.Offered("a", OFFER)):
        machine = opened()
        machine.handle(rounds.Answered("a", Answer("run.1", False, "not charging")), 0.0)
        effects = machine.handle(later, 5.0)
        assert effects[0] == rounds.Record("a", Progress.ACCEPTED)
        deliver(machine, "a")
        assert machine.progress()["a"] is Progress.STORED


def test_a_late_no_does_not_keep_out_an_update_that_comes_all_the_same() -> None:
    """Messages may overtake each other where a connection breaks."""
    machine = opened()
    machine.handle(rounds.Answered("a", Answer("run.1", True)), 0.0)
    machine.handle(rounds.Answered("a", Answer("run.1", False, "not charging")), 1.0)
    deliver(machine, "a")
    assert machine.progress()["a"] is Progress.STORED


def test_nobody_waits_for_who_declined_and_everybody_for_who_joined() -> None:
    machine = opened()
    for name in ("b", "c"):
        deliver(machine, name)
    assert machine.phase is Phase.INVITING
    machine.handle(rounds.Answered("a", Answer("run.1", False, "not charging")), 1.0)
    assert machine.phase is Phase.AGGREGATING
    other = opened()
    other.handle(rounds.Answered("a", Answer("run.1", False, "not charging")), 1.0)
    other.handle(rounds.Answered("a", Answer("run.1", True)), 2.0)
    for name in ("b", "c"):
        deliver(other, name)
    assert other.phase is Phase.COLLECTING


def test_a_round_waits_for_who_declined_for_now_where_too_few_others_deliver() -> None:
    machine = opened()
    assert machine.handle(rounds.Answered("a", NOT_NOW), 1.0) == [
        rounds.Record("a", Progress.POSTPONED, "declined: not charging")
    ]
    machine.handle(rounds.Answered("b", Answer("run.1", False, "no data")), 1.0)
    deliver(machine, "c")
    assert machine.handle(rounds.Tick(), 59.0) == []
    assert machine.phase is Phase.COLLECTING
    deliver(machine, "a", 59.0)
    assert machine.phase is Phase.AGGREGATING


def test_it_does_not_where_enough_deliver_or_time_is_over_or_they_went_or_changed_their_mind() -> None:
    enough = opened()
    enough.handle(rounds.Answered("a", NOT_NOW), 1.0)
    deliver(enough, "b")
    deliver(enough, "c")
    assert enough.phase is Phase.AGGREGATING
    ends: dict[str, Any] = {
        "time": (rounds.Tick(), 60.0),
        "went": (rounds.PresenceChanged("a", False), 1.0),
        "for good": (rounds.Answered("a", Answer("run.1", False, "no data")), 2.0),
    }
    for event, now in ends.values():
        machine = opened()
        for name in "ab":
            machine.handle(rounds.Answered(name, NOT_NOW), 1.0)
        machine.handle(rounds.Failed("c", Failure("run.1", "no data")), 1.0)
        assert machine.phase is Phase.COLLECTING
        machine.handle(event, now)
        machine.handle(rounds.Tick(), now + SETTINGS.grace_s)
        assert machine.phase is Phase.ABANDONED


def test_a_restart_knows_who_declined_for_now() -> None:
    postponed = rounds.DeviceFacts(Progress.POSTPONED, "declined: not charging")
    machine = restored(100.0, Phase.COLLECTING, a=postponed, b=postponed, c=rounds.DeviceFacts(Progress.DECLINED, "no"))
    machine.handle(rounds.Tick(), 101.0)
    assert machine.phase is Phase.COLLECTING
    machine.handle(rounds.Tick(), 160.0)
    assert machine.phase is Phase.ABANDONED


def test_what_a_device_said_is_recorded_before_anything_follows_from_it() -> None:
    machine = opened()
    assert machine.handle(rounds.Answered("a", Answer("run.1", True)), 0.0) == [rounds.Record("a", Progress.ACCEPTED)]
    no = machine.handle(rounds.Answered("b", Answer("run.1", False, "on battery")), 0.0)
    assert no == [rounds.Record("b", Progress.DECLINED, "declined: on battery")]
    failed = machine.handle(rounds.Failed("c", Failure("run.1", "no data")), 0.0)
    assert failed[0] == rounds.Record("c", Progress.FAILED, "failed: no data")
    unasked = opened().handle(rounds.Offered("a", OFFER), 0.0)
    assert unasked[0] == rounds.Record("a", Progress.ACCEPTED)


def test_an_engine_that_forgets_an_update_is_a_bug_not_a_verdict() -> None:
    machine = opened()
    for name in "abc":
        deliver(machine, name)
    with pytest.raises(UsageError):
        machine.handle(rounds.Aggregated({"a": ""}), 2.0)


# --- a round that goes on after a restart


def restored(now: float, phase: Phase = Phase.INVITING, elapsed_s: float = 5.0, **devices: Any) -> RoundMachine:
    known = {name: devices.get(name, rounds.DeviceFacts()) for name in "abc"}
    return RoundMachine.restored(rounds.RoundFacts(invitation(), SETTINGS, phase, known, elapsed_s), now)


STORED = rounds.DeviceFacts(Progress.STORED, "", OFFER)
LOST = rounds.DeviceFacts(Progress.LOST, "", OFFER)
ACCEPTED = rounds.DeviceFacts(Progress.ACCEPTED)


def test_a_restored_round_keeps_its_id_and_deadline_and_does_not_ask_again_for_what_it_has() -> None:
    machine = restored(1000.0, elapsed_s=59.0, a=STORED, b=STORED, c=ACCEPTED)
    assert machine.resume(1000.0) == [rounds.PublishRound(invitation())]
    assert machine.handle(rounds.Offered("a", OFFER), 1000.1) == [
        rounds.SendTo("a", Receipt("run.1", REF.sha256, True))
    ]
    assert machine.handle(rounds.Tick(), 1000.9) == []
    assert machine.handle(rounds.Tick(), 1001.0) == [rounds.Aggregate(("a", "b"))]


def test_a_round_whose_deadline_passed_while_nobody_ran_is_decided_at_once() -> None:
    machine = restored(0.0, elapsed_s=100.0, a=STORED, b=STORED)
    assert machine.resume(0.0)[-1] == rounds.Aggregate(("a", "b"))


def test_a_decided_round_aggregates_the_same_updates_again() -> None:
    machine = restored(0.0, Phase.AGGREGATING, a=STORED, c=STORED)
    assert machine.resume(0.0) == [rounds.Aggregate(("a", "c"))]


def test_an_upload_goes_on_with_the_chunks_that_are_missing() -> None:
    chunks = {REF.sha256: {0: chunk(UPDATE, REF, 0), 1: b"torn"}}
    machine = restored(0.0, a=rounds.DeviceFacts(Progress.ACCEPTED, "", None, chunks))
    machine.resume(0.0)
    assert machine.handle(rounds.Offered("a", OFFER), 0.0) == [rounds.SendTo("a", Need("run.1", REF.sha256, (1, 2)))]


def test_a_damaged_stored_update_is_asked_for_again_also_where_the_round_was_decided() -> None:
    machine = restored(0.0, Phase.AGGREGATING, a=LOST, b=STORED, c=STORED)
    assert machine.resume(0.0) == [rounds.PublishRound(invitation())]
    assert deliver(machine, "a") == [
        rounds.SendTo("a", Receipt("run.1", REF.sha256, True)),
        rounds.Aggregate(("a", "b", "c")),
    ]


def test_a_damaged_stored_update_that_does_not_come_again_is_rejected_with_the_reason() -> None:
    machine = restored(0.0, a=LOST, b=STORED, c=STORED)
    machine.resume(0.0)
    assert machine.handle(rounds.Tick(), 55.0) == [rounds.Aggregate(("b", "c"))]
    finished, _, verdict, *_ = machine.handle(rounds.Aggregated({"b": "", "c": ""}), 55.0)
    why = "the stored update was damaged and did not come again"
    assert verdict == rounds.SendTo("a", Verdict("run.1", "rejected", why))
    assert isinstance(finished, rounds.Finished)
    assert finished.rejected == {"a": why}


def test_strangers_and_chunks_out_of_the_blue_are_protocol_errors_that_change_nothing() -> None:
    machine = opened()
    before = machine.progress()
    with pytest.raises(PeerError):
        machine.handle(rounds.Offered("mallory", OFFER), 1.0)
    with pytest.raises(PeerError):
        machine.handle(rounds.ChunkArrived("a", Chunk("run.1", REF.sha256, 0, UPDATE[:16])), 1.0)
    assert machine.progress() == before


@pytest.mark.parametrize("quorum", [0, 4])
def test_a_quorum_that_cannot_be_met_is_refused_at_once(quorum: int) -> None:
    with pytest.raises(RuleError):
        RoundMachine(invitation(), ["a", "b", "c"], RoundSettings(quorum, 1, 1, 40))


# --- compression


SPARSE = TrainingPlan(epochs=1, learning_rate=0.1, compression="top-k", kept_fraction=0.5)


def test_a_device_that_does_not_know_the_compression_declines_by_its_name() -> None:
    requires = ("train", "float32", "top-k")
    invited = device.Invited(invitation(requires=requires))
    (answer, _) = walk(DeviceMachine("a", ("train", "float32")), invited)
    assert answer == device.Send(Answer("run.1", False, "this device cannot top-k; update its agent"))
    assert walk(DeviceMachine("a"), invited) == [device.CheckConditions(invited.invitation)]


def test_sizes_between_the_bounds_of_the_form_are_taken_and_others_refused() -> None:
    invited = invitation(plan=SPARSE, parameters=BlobRef(bytes(32), 800))  # 100 of 200 numbers, a bitmap of 25 bytes
    sizes = RoundSettings.of(invited, 1, 10.0, 3.0).sizes
    assert (sizes[0], sizes[-1]) == (426, 426)
    fewer = msgspec.structs.replace(invited, plan=msgspec.structs.replace(SPARSE, kept_fraction=0.05))
    settings = RoundSettings.of(fewer, 1, 10.0, 3.0)  # 10 of 200: gaps of 1 byte each, or the bitmap
    for size, taken in ((50, False), (51, True), (66, True), (67, False)):
        machine = RoundMachine(fewer, ["a"], settings)
        machine.handle(rounds.Opened(), 0.0)
        effects = machine.handle(rounds.Offered("a", Offer("run.1", blob_ref(bytes(size)), 5)), 1.0)
        asked = [e for e in effects if isinstance(e, rounds.SendTo) and isinstance(e.message, Need)]
        assert bool(asked) is taken


def test_an_update_that_does_not_decode_is_refused_and_the_round_goes_on() -> None:
    machine = opened()
    deliver(machine, "b")
    deliver(machine, "c")
    machine.handle(rounds.Offered("a", OFFER), 1.0)
    for index in range(REF.num_chunks):
        machine.handle(rounds.ChunkArrived("a", Chunk("run.1", REF.sha256, index, chunk(UPDATE, REF, index))), 1.0)
    effects = machine.handle(rounds.Malformed("a", "a scale is wrong"), 2.0)
    assert effects == [
        rounds.Record("a", Progress.REFUSED, "refused: a scale is wrong"),
        rounds.SendTo("a", Receipt("run.1", REF.sha256, False, "a scale is wrong")),
        rounds.Aggregate(("b", "c")),
    ]
    assert machine.handle(rounds.Malformed("a", "again"), 3.0) == []


# --- devices that are revoked

WHY = "revoked: stolen"
GONE_FOR_GOOD = rounds.DeviceFacts(Progress.REVOKED, WHY, OFFER)


def revoke(machine: RoundMachine, name: str, now: float = 2.0) -> list[rounds.Effect]:
    return machine.handle(rounds.Revoked(name, WHY), now)


def test_what_a_revoked_device_delivered_is_rejected_with_the_reason() -> None:
    machine = opened()
    for name in "ab":
        deliver(machine, name)
    assert revoke(machine, "a") == [rounds.Record("a", Progress.REVOKED, WHY)]
    assert deliver(machine, "c")[-1] == rounds.Aggregate(("b", "c"))
    finished, _, *verdicts = machine.handle(rounds.Aggregated({"b": "", "c": ""}), 3.0)
    assert isinstance(finished, rounds.Finished)
    assert finished.rejected == {"a": WHY}
    assert verdicts[0] == rounds.SendTo("a", Verdict("run.1", "rejected", WHY))


def test_a_revoked_device_that_has_not_delivered_is_not_waited_for_and_is_missing() -> None:
    machine = opened()
    accept(machine, "a")
    deliver(machine, "b")
    deliver(machine, "c")
    record, aggregate = revoke(machine, "a")
    assert (record, aggregate) == (rounds.Record("a", Progress.REVOKED, WHY), rounds.Aggregate(("b", "c")))
    finished, _, *verdicts = machine.handle(rounds.Aggregated({"b": "", "c": ""}), 3.0)
    assert isinstance(finished, rounds.Finished)
    assert (finished.rejected, finished.missing) == ({}, {"a": WHY})
    assert [one.device_id for one in verdicts if isinstance(one, rounds.SendTo)] == ["b", "c"]


def test_a_revocation_can_cost_the_round_its_quorum() -> None:
    machine = opened()
    deliver(machine, "a")
    deliver(machine, "b")
    revoke(machine, "a")
    finished, *_ = machine.handle(rounds.Tick(), 60.0)
    assert isinstance(finished, rounds.Finished)
    assert (finished.outcome, finished.reason) == ("abandoned", "1 updates came, the quorum is 2")


def test_an_update_that_is_being_made_durable_when_its_device_is_revoked_is_not_acknowledged() -> None:
    machine = opened()
    machine.handle(rounds.Offered("a", OFFER), 1.0)
    for index in range(REF.num_chunks):
        machine.handle(rounds.ChunkArrived("a", Chunk("run.1", REF.sha256, index, chunk(UPDATE, REF, index))), 1.0)
    record = rounds.Record("a", Progress.REVOKED, WHY)
    assert revoke(machine, "a") == [record]
    assert machine.handle(rounds.Stored("a"), 2.0) == [record]  # over the row that says stored


def test_who_was_refused_stays_so() -> None:
    """What was refused on arrival counts against f; a revocation later takes nothing back."""
    machine = opened()
    machine.handle(rounds.Offered("b", Offer("run.1", blob_ref(b"short"), 5)), 1.0)
    assert (revoke(machine, "b"), revoke(machine, "stranger")) == ([], [])
    assert machine.progress()["b"] is Progress.REFUSED


def test_who_had_declined_cannot_join_any_more_once_it_is_revoked() -> None:
    machine = opened()
    machine.handle(rounds.Answered("a", Answer("run.1", False, "busy")), 1.0)
    assert revoke(machine, "a") == [rounds.Record("a", Progress.REVOKED, WHY)]
    assert machine.handle(rounds.Answered("a", Answer("run.1", True)), 2.0) == []
    assert machine.progress()["a"] is Progress.REVOKED


def test_a_readmitted_device_delivers_again_only_in_the_next_round() -> None:
    machine = opened()
    deliver(machine, "a")
    revoke(machine, "a")
    revoke(machine, "b")
    assert machine.handle(rounds.Answered("b", Answer("run.1", True)), 3.0) == []
    assert machine.handle(rounds.Offered("b", OFFER), 3.0) == [
        rounds.SendTo("b", Receipt("run.1", REF.sha256, False, WHY))
    ]
    assert machine.handle(rounds.Offered("a", OFFER), 3.0) == []  # was acknowledged: its verdict comes


def test_a_round_that_was_decided_is_decided_again_without_who_was_revoked_before_the_rule_ran() -> None:
    machine = restored(0.0, Phase.AGGREGATING, a=GONE_FOR_GOOD, b=STORED, c=STORED)
    assert machine.resume(0.0) == [rounds.Aggregate(("b", "c"))]
    _, _, *verdicts = machine.handle(rounds.Aggregated({"b": "", "c": ""}), 1.0)
    assert rounds.SendTo("a", Verdict("run.1", "rejected", WHY)) in verdicts
    alone = restored(0.0, Phase.AGGREGATING, a=GONE_FOR_GOOD, b=STORED)
    finished, *_ = alone.resume(0.0)
    assert isinstance(finished, rounds.Finished)
    assert finished.outcome == "abandoned"


# --- encrypted rounds


def test_an_encrypted_round_is_declined_by_name_by_a_device_that_cannot() -> None:
    invited = device.Invited(invitation(requires=("train", "encryption"), encryption_key=bytes([9]) * 32))
    (answer, _) = walk(DeviceMachine("a", ("train", "float32")), invited)
    assert answer == device.Send(Answer("run.1", False, "this device cannot encryption; update its agent"))
    assert walk(DeviceMachine("a"), invited) == [device.CheckConditions(invited.invitation)]


def test_an_encrypted_update_has_one_size_and_a_plain_one_is_refused() -> None:
    invited = invitation(encryption_key=bytes([9]) * 32)
    settings = RoundSettings.of(invited, 1, 10.0, 3.0)
    assert settings.sizes == range(40 + 560, 40 + 561)
    machine = RoundMachine(invited, ["a"], settings)
    machine.handle(rounds.Opened(), 0.0)
    _, refused, *_ = machine.handle(rounds.Offered("a", OFFER), 1.0)
    assert isinstance(refused, rounds.SendTo)
    assert refused.message == Receipt("run.1", REF.sha256, False, "the update has 40 bytes, the model needs 600")
