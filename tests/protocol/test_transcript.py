"""A recorded conversation is judged by the specification: the golden ones, and single lines changed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_edge.config import read_roster
from covey_protocol import codec
from covey_protocol.errors import PeerError
from covey_protocol.messages import (
    Answer,
    BlobRef,
    Chunk,
    Envelope,
    Failure,
    Invitation,
    Need,
    Offer,
    Presence,
    Receipt,
    RoundClosed,
    Seen,
    Verdict,
)
from covey_protocol.seals import PublicKey, SealingKey
from covey_protocol.transcript import Judge, Record, Violation, fleet_of, violations, write_record

FOLDER = Path(__file__).parent.parent / "golden" / "transcripts"
ROSTER = FOLDER / "roster.toml"


def _recording() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_transcripts", FOLDER / "record.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MADE = _recording()
GOOD: list[Record] = MADE.read(FOLDER / "good.jsonl")
RELEASES = Path(__file__).parent.parent / "golden" / "releases-v1.json"
KEY = PublicKey.from_hex(MADE.COORDINATOR.public.hex())


def judged(lines: list[bytes]) -> list[Violation]:
    return list(violations(Judge("golden", KEY, read_roster(ROSTER)), lines))


def judge(records: list[Record]) -> list[Violation]:
    return judged([write_record(record) for record in records])


def test_a_real_round_breaks_nothing() -> None:
    assert judge(GOOD) == []
    kinds = {type(MADE.message_of(record)) for record in GOOD}
    said = {Presence, Invitation, Answer, Offer, Need, Chunk, Receipt, RoundClosed, Verdict}
    assert said <= kinds, "the golden round says everything but a failure"


def test_a_real_encrypted_round_breaks_nothing() -> None:
    records = MADE.read(FOLDER / "encrypted.jsonl")
    assert judge(records) == []
    assert MADE.message_of(records[MADE.first(records, Invitation)]).encryption_key
    assert MADE.message_of(records[MADE.first(records, Offer)]).update.size == 36 + 560


def test_a_release_beside_the_rounds_breaks_nothing_unless_it_is_none() -> None:
    sealed = bytes.fromhex(json.loads(RELEASES.read_text())["vectors"]["one wheel for everybody"]["sealed"])
    topic = "covey/1/golden/fleet/release"

    def with_release(payload: bytes) -> list[Violation]:
        record = msgspec.structs.replace(GOOD[-1], topic=topic, payload=payload, retained=True)
        return judge([*GOOD, record])

    assert with_release(sealed) == with_release(b"") == []
    assert [violation.section for violation in with_release(sealed[:-1])] == [12]


def test_a_device_may_say_that_it_has_seen_its_verdict() -> None:
    offer = GOOD[at(Offer)]
    seen = MADE.resealed(offer, Seen(ROUND.round_id), extra=500)
    assert judge([*GOOD, msgspec.structs.replace(seen, time_s=GOOD[-1].time_s)]) == []


FIRST = {
    "a-forged-message": (11, 3, "not sealed by the key known for attic-pi"),
    "a-future-version": (13, 9, "speaks protocol 2"),
    "a-replay": (30, 3, "was said before"),
    "a-second-verdict": (21, 6, "gets another verdict than before"),
    "an-offer-without-an-answer": (10, 5, "offers an update without having accepted"),
    "an-update-kept-too-early": (15, 6, "kept before it is whole"),
    "an-update-of-another-size": (11, 4, "offers 40 bytes, not 36 to 36 as this round asks"),
}


@pytest.mark.parametrize("name", sorted(FIRST))
def test_what_is_wrong_is_named_with_its_line_and_section(name: str) -> None:
    line, section, words = FIRST[name]
    found = judged((FOLDER / f"{name}.jsonl").read_bytes().splitlines())
    assert (found[0].line, found[0].section) == (line, section)
    assert words in str(found[0])


@pytest.mark.parametrize("name", sorted(MADE.BAD))
def test_the_bad_ones_are_the_good_one_with_one_change(name: str) -> None:
    assert name in FIRST
    made = b"".join(write_record(record) for record in MADE.BAD[name](GOOD))
    assert made == (FOLDER / f"{name}.jsonl").read_bytes()


# --- single changes


def at(kind: type) -> int:
    return MADE.first(GOOD, kind)


def said(kind: type, **changes: Any) -> list[Record]:
    """The good ones with other fields in the first message of a kind."""
    index = at(kind)
    message = msgspec.structs.replace(MADE.message_of(GOOD[index]), **changes)
    return MADE.with_line(GOOD, index, MADE.resealed(GOOD[index], message))


def without(keep: Callable[[Record], bool]) -> list[Record]:
    return [record for record in GOOD if keep(record)]


def added(after: type, message: Any) -> list[Record]:
    """Another message of the same sender on the same topic, behind the first of a kind."""
    index = at(after)
    return [*GOOD[: index + 1], MADE.resealed(GOOD[index], message, extra=500), *GOOD[index + 1 :]]


def moved(kind: type, before: type) -> list[Record]:
    old, new = at(kind), at(before)
    record = msgspec.structs.replace(GOOD[old], time_s=GOOD[new].time_s)
    rest = [*GOOD[:old], *GOOD[old + 1 :]]
    return [*rest[:new], record, *rest[new:]]


def changed(index: int, **fields: Any) -> list[Record]:
    return MADE.with_line(GOOD, index, msgspec.structs.replace(GOOD[index], **fields))


ROUND = MADE.message_of(GOOD[at(Invitation)])

CLEARED = next(i for i, r in enumerate(GOOD) if ROUND.parameters.sha256.hex() in r.topic and not r.payload)
CHANGES: dict[str, tuple[list[Record], int, str]] = {
    "a verdict seen that nobody gave": (added(Offer, Seen(ROUND.round_id)), 5, "nobody gave"),
    "time that runs backwards": (changed(5, time_s=0.0), 11, "backwards"),
    "a topic of nobody": (changed(at(Answer), topic="covey/1/golden/device/a b/up"), 2, "no topic"),
    "a topic of another fleet": (changed(at(Answer), topic="covey/1/other/device/a/up"), 2, "no topic"),
    "a presence on up": (changed(at(Presence), topic="covey/1/golden/device/attic-pi/up"), 3, "attic-pi"),
    "a message moved to another device": (
        changed(at(Answer), topic="covey/1/golden/device/attic-pi/presence"),
        3,
        "seal",
    ),
    "a retained answer": (changed(at(Answer), retained=True), 2, "retained"),
    "an empty answer": (changed(at(Answer), payload=b""), 3, "not a covey message"),
    "a device out of the roster": (
        changed(at(Answer), topic="covey/1/golden/device/cellar-pi/up"),
        9,
        "not in the roster",
    ),
    "an invitation before its chunks": (
        without(lambda r: not (ROUND.parameters.sha256.hex() in r.topic and r.payload)),
        6,
        "before its chunks",
    ),
    "a chunk of other bytes": (
        [
            msgspec.structs.replace(r, payload=bytes(reversed(r.payload))) if "/blob/" in r.topic and r.payload else r
            for r in GOOD
        ],
        8,
        "do not make it",
    ),
    "parameters cleared during the round": (
        [
            *GOOD[: at(Answer)],
            msgspec.structs.replace(GOOD[CLEARED], time_s=GOOD[at(Answer)].time_s),
            *GOOD[at(Answer) :],
        ],
        8,
        "cleared while their round",
    ),
    "another invitation to the same round": (
        added(Invitation, msgspec.structs.replace(ROUND, duration_ms=1)),
        6,
        "in another form",
    ),
    "a device that was not invited": (said(Invitation, devices=("attic-pi",)), 5, "kitchen-pi was not invited"),
    "an offer after a decline": (said(Answer, accept=False), 5, "declined or gave up"),
    "a chunk after a failure": (added(Offer, Failure(ROUND.round_id, "no")), 5, "Chunk for a round that it"),
    "an unasked chunk": (said(Need, indices=(0, 1)), 6, "does not have"),
    "a chunk nobody asked for": (without(lambda r: not isinstance(MADE.message_of(r), Need)), 5, "not asked for"),
    "a chunk of the wrong size": (said(Chunk, data=b"x"), 8, "with 1 bytes"),
    "a chunk of wrong bytes": (said(Chunk, data=bytes(36)), 8, "do not make the update"),
    "a chunk of another update": (said(Chunk, sha256=bytes(32)), 6, "has not offered"),
    "two fates of one update": (
        added(Receipt, Receipt(ROUND.round_id, MADE.message_of(GOOD[at(Receipt)]).sha256, False, "no")),
        6,
        "another fate",
    ),
    "a verdict before the end": (moved(Verdict, RoundClosed), 6, "before the round is closed"),
    "an update accepted in an abandoned round": (said(RoundClosed, outcome="abandoned"), 6, "was not published"),
    "two ends of a round": (
        added(RoundClosed, RoundClosed(ROUND.round_id, "abandoned", "no")),
        6,
        "after it ended otherwise",
    ),
    "an outcome of another kind": (said(RoundClosed, outcome="fine"), 4, "cannot end as"),
    "a verdict of another kind": (said(Verdict, status="fine"), 4, "a verdict cannot be"),
    "the end of a round of nobody": (said(RoundClosed, round_id="other"), 6, "nobody was invited"),
    "a round that lets another go on which cannot": (
        added(RoundClosed, msgspec.structs.replace(ROUND, round_id="run.2.x", earlier=(ROUND.round_id,))),
        6,
        "which is not asynchronous",
    ),
    "an older start": (added(Presence, Presence(True, 1)), 4, "session older"),
    "a number used twice": (
        [*GOOD[: at(Offer)], MADE.resealed(GOOD[at(Answer)], Answer(ROUND.round_id, True, "x")), *GOOD[at(Offer) :]],
        3,
        "used twice",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_one_change_is_found(what: str) -> None:
    records, section, words = CHANGES[what]
    found = judge(records)
    assert found, "nothing was found"
    assert any(violation.section == section and words in violation.what for violation in found), found


# --- encrypted updates


def encrypted(**offer: Any) -> list[Record]:
    """The good ones as if their round was encrypted; `offer` changes the first Offer."""
    records = said(Invitation, encryption_key=bytes([9]) * 32)
    return [
        MADE.resealed(record, msgspec.structs.replace(message, **offer)) if isinstance(message, Offer) else record
        for record, message in ((record, MADE.message_of(record)) for record in records)
    ]


def encrypted_ref(more: int) -> BlobRef:
    return BlobRef(bytes(32), MADE.message_of(GOOD[at(Offer)]).update.size + more)


def test_a_plain_update_in_an_encrypted_round_is_found_by_its_size() -> None:
    first, *_ = judge(encrypted())
    assert (first.section, "offers 36 bytes, not 596 to 596" in first.what) == (4, True)


def test_an_encrypted_update_beside_which_something_is_said_is_found() -> None:
    loud = [one for one in judge(encrypted(update=encrypted_ref(560))) if "is to be hidden" in one.what]
    assert {one.section for one in loud} == {4}
    metrics_only = judge(encrypted(update=encrypted_ref(560), num_examples=1))
    assert any("is to be hidden" in one.what for one in metrics_only)
    silent = judge(encrypted(update=encrypted_ref(560), num_examples=1, metrics={}))
    assert not any(isinstance(one, Violation) and one.section == 4 for one in silent)


# --- keys that change

NEXT = SealingKey.from_seed(bytes([77]) * 32)


def moved_keys(sender: str, start: int, stop: int | None = None) -> list[Record]:
    """From line `start` to `stop` this sender seals with its next key."""
    records = list(GOOD)
    for index in range(start, len(GOOD) if stop is None else stop):
        record, message = GOOD[index], MADE.message_of(GOOD[index])
        if message is None:
            continue
        envelope = msgspec.msgpack.decode(record.payload, type=Envelope)
        if envelope.sender == sender:
            payload = codec.encode(message, topic=record.topic, sender=sender, sequence=envelope.sequence, key=NEXT)
            records[index] = msgspec.structs.replace(record, payload=payload)
    return records


def judge_two(records: list[Record], sender: str) -> list[Violation]:
    roster: dict[str, Any] = dict(read_roster(ROSTER))
    coordinator: Any = KEY
    if sender == codec.COORDINATOR:
        coordinator = (KEY, NEXT.public)
    else:
        roster[sender] = (*roster[sender], NEXT.public)
    return list(violations(Judge("golden", coordinator, roster), map(write_record, records)))


@pytest.mark.parametrize("sender", ["attic-pi", codec.COORDINATOR])
def test_a_sender_may_move_to_its_next_key_once(sender: str) -> None:
    middle = len(GOOD) // 2
    assert judge_two(moved_keys(sender, middle), sender) == []
    assert judge_two(GOOD, sender) == []
    assert judge(moved_keys(sender, middle)) != []  # for who does not know the next key
    one = next(i for i in range(middle, len(GOOD)) if moved_keys(sender, i, i + 1) != GOOD)
    back = judge_two(moved_keys(sender, one, one + 1), sender)
    assert back
    assert {one.section for one in back} >= {3}
    assert f"not sealed by the key known for {sender}" in back[0].what


# --- what is no violation


def test_retained_messages_that_come_again_are_copies() -> None:
    """A recorder that reconnects gets them again."""
    index = at(Invitation)
    again = msgspec.structs.replace(GOOD[index], retained=True)
    assert (
        judge([*GOOD[: index + 3], msgspec.structs.replace(again, time_s=GOOD[index + 2].time_s), *GOOD[index + 3 :]])
        == []
    )


def test_a_recording_that_begins_in_the_middle_is_not_blamed_for_it() -> None:
    late = GOOD[at(Offer) :]
    assert judge(late) == []
    early = [msgspec.structs.replace(record, retained=True) for record in GOOD[: at(Answer)]]
    assert judge(early + late) == []


def test_a_verdict_that_is_said_again_is_none() -> None:
    assert judge(added(Verdict, MADE.message_of(GOOD[at(Verdict)]))) == []


@pytest.mark.parametrize("excuse", [Answer(ROUND.round_id, False, "no"), Failure(ROUND.round_id, "no")])
def test_an_excuse_may_be_said_again(excuse: Any) -> None:
    index = at(Answer)
    first, again = (MADE.resealed(GOOD[index], excuse, extra=extra) for extra in (0, 500))
    assert judge([*GOOD[:index], first, again]) == []
    assert [one.section for one in judge([*GOOD[:index], first, again, *GOOD[index + 1 : at(Offer) + 1]])] == [5]


def test_a_device_whose_owner_withdraws_a_stored_update_still_answers_the_verdict() -> None:
    index = at(Verdict)
    offer = msgspec.structs.replace(GOOD[at(Offer)], time_s=GOOD[index].time_s)
    withdrawn = MADE.resealed(offer, Failure(ROUND.round_id, "the owner has opted out"), extra=300)
    seen = MADE.resealed(offer, Seen(ROUND.round_id), extra=500)
    assert judge([*GOOD[:index], withdrawn, GOOD[index], seen]) == []
    assert [one.section for one in judge([*GOOD[:index], withdrawn, seen])] == [5]  # no verdict yet


def test_a_device_that_declined_may_join_the_round_later() -> None:
    index = at(Answer)
    no = MADE.resealed(GOOD[index], Answer(ROUND.round_id, False, "not charging"), extra=-1)
    assert judge([*GOOD[:index], no, *GOOD[index:]]) == []


def test_an_agent_that_starts_again_after_its_answer_may_offer_at_once() -> None:
    """From its outbox. One that had given up may take part again."""
    index, online = at(Offer), at(Presence)
    device = GOOD[index].topic.rsplit("/", 1)[0]
    record = next(r for r in GOOD[online:] if r.topic == f"{device}/presence")
    presence = MADE.message_of(record)
    again = MADE.resealed(record, msgspec.structs.replace(presence, session=presence.session + 10), extra=10)
    again = msgspec.structs.replace(again, time_s=GOOD[index].time_s)
    assert judge([*GOOD[:index], again, *GOOD[index:-2]]) == []


def test_without_keys_everything_but_the_seals_is_judged_and_what_was_not_is_counted() -> None:
    judge_without = Judge("golden")
    lines = (FOLDER / "a-forged-message.jsonl").read_bytes().splitlines()
    assert list(violations(judge_without, lines)) == []
    assert judge_without.unchecked["attic-pi"] > 0
    second = (FOLDER / "a-second-verdict.jsonl").read_bytes().splitlines()
    assert len(list(violations(Judge("golden"), second))) == 1


@given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from(GOOD).map(write_record)), max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_lines_in_any_order_end_in_violations_and_nothing_else(lines: list[bytes]) -> None:
    for violation in judged(lines):
        assert 1 <= violation.line <= len(lines)
        assert 2 <= violation.section <= 11


# --- the command


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "covey_edge", "protocol", "check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_prints_each_violation_and_ends_with_1_or_0() -> None:
    keys = ("--coordinator-key", KEY.hex(), "--roster", ROSTER)
    good = check(FOLDER / "good.jsonl", *keys)
    assert (good.returncode, good.stdout, good.stderr) == (0, "29 messages, 0 violations\n", "")
    bad = check(FOLDER / "a-replay.jsonl", *keys)
    assert bad.returncode == 1
    first, last = bad.stdout.splitlines()
    assert first.startswith("line 30: number ")
    assert first.endswith("receivers drop this (docs/protocol.md, section 3)")
    assert last == "30 messages, 1 violation"
    unkeyed = check(FOLDER / "good.jsonl")
    assert unkeyed.returncode == 0
    assert "not checked: the seals of" in unkeyed.stdout


UNREADABLE = {
    "a file that is not there": (None, "cannot be read"),
    "an empty file": (b"", "is empty"),
    "a file of something else": (b"hello\n", "line 1: not a record of a transcript"),
    "a record of another protocol": (
        json.dumps({"time_s": 0, "topic": "home/lamp", "payload": ""}).encode() + b"\n",
        "not a topic of covey",
    ),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_file_that_is_no_transcript_is_an_error_of_the_caller(what: str, tmp_path: Path) -> None:
    content, words = UNREADABLE[what]
    if content is not None:
        (tmp_path / "t.jsonl").write_bytes(content)
    ended = check(tmp_path / "t.jsonl")
    assert ended.returncode == 2
    assert words in ended.stderr


def test_the_fleet_is_that_of_the_first_line() -> None:
    assert fleet_of(write_record(GOOD[0])) == "golden"
    with pytest.raises(PeerError):
        fleet_of(b"{}")
