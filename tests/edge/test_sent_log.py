"""The log of what left this device: its words, a torn end, a full disk, files that give way, years of summaries."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import get_args

import pytest

from covey_edge import sent_log
from covey_edge.config import PrivacySettings
from covey_edge.files import Disk, append_to
from covey_edge.sent_log import UNSAID, Line, SentLog, Summary, contents, entries, made, read_lines, read_summary
from covey_protocol import device
from covey_protocol.blobs import blob_ref
from covey_protocol.errors import StorageError
from covey_protocol.messages import (
    Answer,
    BlobRef,
    Chunk,
    Failure,
    FromDevice,
    Invitation,
    Offer,
    Presence,
    Receipt,
    Seen,
    TrainingPlan,
    Verdict,
)

DAY_S = 86_400.0
PRIVATE = PrivacySettings(clip_norm=0.5, noise_multiplier=0.1)


def invitation(number: int = 1, plan: TrainingPlan | None = None, key: bytes | None = None) -> Invitation:
    more = {"encryption_key": key} if key else {}
    ref = BlobRef(bytes(32), 4096 * 4)
    return Invitation(f"r.{number}", number, 0, 1000, BlobRef(bytes(32), 9), ref, plan or TrainingPlan(1, 0.1), **more)


def kept(number: int = 1, size: int = 100) -> device.Keep:
    update = bytes([number % 256]) * size
    offer = Offer(f"r.{number}", blob_ref(update, 64), 120, {"loss": 0.25})
    return device.Keep(offer.round_id, offer, update)


class Years:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0  # 2023-11-14

    def __call__(self) -> float:
        return self.now_s


def lines(folder: Path) -> list[Line]:
    return [entry for entry in entries(folder) if isinstance(entry, Line)]


def test_words_say_what_an_update_is_and_what_was_done_to_it() -> None:
    assert made(invitation(), PRIVATE) == (
        "update of 4,096 numbers, clipped to 0.5, noise 0.1 times that, not encrypted"
    )
    bare = made(invitation(plan=TrainingPlan(1, 0.1, compression="rotated-8bit"), key=bytes(32)), PrivacySettings())
    assert bare == "update of 4,096 numbers, not clipped, no noise, rotated-8bit, encrypted to the coordinator"
    evaluation = made(invitation(plan=TrainingPlan(1, 0.1, evaluate=("loss", "accuracy"))), PRIVATE)
    assert evaluation == "evaluation: loss, accuracy of the model, exact, not encrypted"
    assert contents(120, {"b": 0.5, "a": 1.0}) == "120 examples; a 1, b 0.5"
    assert contents(1, {}) == "1 example"


def test_trouble_with_the_agents_own_software_is_in_the_log(tmp_path: Path) -> None:
    said = Presence(True, 1, "0.3.1", "tflite 2.14", (), "release 0.3.0 failed", on_trial=True, bad=("0.2.9", "0.3.0"))
    SentLog(tmp_path, PRIVATE).before(said)
    assert lines(tmp_path)[0].words == (
        "online, covey 0.3.1, tflite 2.14; release 0.3.0 failed; this release is on trial; does not take 0.2.9, 0.3.0"
    )


def test_every_message_of_a_device_has_a_line() -> None:
    log, keep = SentLog(Path(), PRIVATE), kept()
    said: list[FromDevice] = [
        Presence(True, 1),
        Answer("r.1", True),
        keep.offer,
        Chunk("r.1", bytes(32), 0, b"x"),
        Failure("r.1", "no"),
        Seen("r.1"),
    ]
    assert {type(message) for message in said} == set(get_args(FromDevice))
    assert len({log._line_of(message).kind for message in said}) == len(said)


def test_a_round_is_five_lines_in_the_order_of_what_happened(tmp_path: Path) -> None:
    log, keep = SentLog(tmp_path, PRIVATE, now_s=lambda: 1_700_000_000.0), kept()
    log.before(Presence(True, 1, "0.1.0", "tflite 2.14"))
    log.before(Answer("r.1", True))
    log.keep(keep, invitation())
    log.before(keep.offer)
    log.heard(device.Judged(Verdict("r.1", "rejected", "too far")), ("r.1",))
    told = lines(tmp_path)
    assert [line.kind for line in told] == ["presence", "answer", "update", "offer", "verdict"]
    assert told[2] == Line(
        "2023-11-14T22:13:20Z",
        "update",
        "update of 4,096 numbers, clipped to 0.5, noise 0.1 times that, not encrypted; 120 examples; loss 0.25",
        "r.1",
        "",
        100,
        keep.offer.update.sha256.hex(),
    )
    assert told[4].words == "rejected: too far"
    assert (tmp_path / "sent.jsonl").stat().st_mode & 0o777 == 0o600
    for line in (tmp_path / "sent.jsonl").read_text().splitlines():
        assert json.loads(line)["at"] == "2023-11-14T22:13:20Z"


def test_an_encrypted_update_is_described_by_what_is_inside(tmp_path: Path) -> None:
    log, keep = SentLog(tmp_path, PRIVATE), kept()
    log.describe(keep.offer.update.sha256, contents(77, {"loss": 2.0}))
    log.keep(keep, invitation(key=bytes(32)))
    assert lines(tmp_path)[0].words.endswith("encrypted to the coordinator; 77 examples; loss 2")


def test_what_is_said_again_is_one_line_and_other_peoples_verdicts_are_none(tmp_path: Path) -> None:
    log = SentLog(tmp_path, PRIVATE)
    for _ in range(5):
        log.before(Answer("r.1", False, "on battery"))
        log.before(kept().offer)
        log.heard(device.Judged(Verdict("r.9", "accepted")), ("r.1",))
        log.heard(device.Received(Receipt("r.1", bytes(32), True)), ("r.1",))
    assert [line.kind for line in lines(tmp_path)] == ["answer", "offer"]


class Syncs(Disk):
    def __init__(self) -> None:
        self.durable: list[bool] = []

    def append(self, path: Path, data: bytes, *, durable: bool) -> int:
        self.durable.append(durable)
        return super().append(path, data, durable=durable)


def test_only_what_tells_of_the_data_costs_a_sync(tmp_path: Path) -> None:
    disk = Syncs()
    log, keep = SentLog(tmp_path, PRIVATE, disk), kept()
    for message in (Answer("r.1", True), keep.offer):
        log.before(message)
    assert disk.durable == [False, False]
    log.keep(keep, invitation())
    log.before(Failure("r.2", "3 examples are fewer than 5"))
    assert disk.durable[2:] == [True, True]


class Full(Disk):
    full = True

    def append(self, path: Path, data: bytes, *, durable: bool) -> int:
        if self.full:
            full = OSError(28, "No space left on device")
            raise StorageError(f"cannot write {path} (No space left on device)", "free some space") from full
        return super().append(path, data, durable=durable)


def test_on_a_full_disk_no_update_leaves_and_a_failure_says_nothing_of_the_data(tmp_path: Path) -> None:
    disk = Full()
    log = SentLog(tmp_path, PRIVATE, disk)
    with pytest.raises(StorageError):
        log.keep(kept(), invitation())
    said = log.before(Failure("r.1", "labels above 9 in row 17"))
    assert isinstance(said, Failure)
    assert said.reason.startswith(UNSAID)
    assert "row 17" not in said.reason
    assert str(tmp_path) not in said.reason
    assert "No space left on device" in said.reason
    for number in range(200):
        log.before(Answer(f"r.{number}", True))
    disk.full = False
    log.before(Answer("r.201", True))
    told = lines(tmp_path)
    assert told[0].words.startswith(UNSAID)  # what had to wait, in its order
    assert [line.round for line in told[1:64]] == [f"r.{number}" for number in range(63)]
    assert told[64].words == "137 lines: the disk was full"
    assert (len(told), told[65].round) == (66, "r.201")


def test_a_write_that_fails_half_way_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    append_to(path, b"whole\n", durable=True)
    write = os.write

    def half(descriptor: int, data: memoryview) -> int:
        write(descriptor, data[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(StorageError, match="No space left on device"):
        append_to(path, b"another\n", durable=True)
    monkeypatch.undo()
    assert path.read_bytes() == b"whole\n"
    assert append_to(path, b"more\n", durable=False) == 11


def test_a_line_that_a_power_cut_has_torn_is_counted_and_harms_no_other(tmp_path: Path) -> None:
    SentLog(tmp_path, PRIVATE).before(Answer("r.1", True))
    with (tmp_path / "sent.jsonl").open("ab") as file:
        file.write(b'{"at":"2023-11-14T2')
    SentLog(tmp_path, PRIVATE).before(Answer("r.2", True))
    assert [entry if isinstance(entry, int) else entry.round for entry in entries(tmp_path)] == ["r.1", "r.2", 1]


def test_files_give_way_and_years_of_summaries_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sent_log, "MAX_FILE_BYTES", 1500)
    monkeypatch.setattr(sent_log, "KEPT_FILES", 3)
    clock = Years()
    log = SentLog(tmp_path, PRIVATE, now_s=clock)
    rounds = 160
    for number in range(rounds):
        keep = kept(number)
        log.keep(keep, invitation(number))
        log.before(keep.offer)
        clock.now_s += 5 * DAY_S
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len([name for name in files if name.startswith("sent-0")]) == 3
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 5 * 1900 + 8000
    summary = read_summary(Disk(), tmp_path)
    summed = sum(kinds["update"].lines for kinds in summary.months.values())
    detailed = [line for line in lines(tmp_path) if line.kind == "update"]
    assert summed + len(detailed) == rounds  # nothing is lost, nothing counted twice
    assert sum(kinds["update"].bytes for kinds in summary.months.values()) == 100 * summed
    assert min(summary.months) == "2023-11"
    assert summary.months["2023-11"]["update"].first == "2023-11-14T22:13:20Z"
    assert len(summary.months) >= 24


def test_a_crash_between_summing_up_and_deleting_counts_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sent_log, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(sent_log, "KEPT_FILES", 1)

    class NeverRemoves(Disk):
        def remove(self, path: Path) -> None:
            pass

    for number in range(30):  # each start finds what the one before could not remove
        log = SentLog(tmp_path, PRIVATE, NeverRemoves() if number < 20 else Disk())
        log.before(Answer(f"r.{number}", True))
        log.keep(kept(number), invitation(number))
    summary = read_summary(Disk(), tmp_path)
    summed = sum(kinds["update"].lines for kinds in summary.months.values())
    left = [line for name in sorted(tmp_path.glob("sent*.jsonl")) for line in read_lines(Disk(), name)[0]]
    assert summed + sum(line.kind == "update" for line in left) == 30


def test_a_summary_that_cannot_be_read_is_not_written_over(tmp_path: Path) -> None:
    assert read_summary(Disk(), tmp_path) == Summary()
    (tmp_path / "sent-summary.json").write_text("{torn")
    with pytest.raises(StorageError, match=r"sent-summary\.json cannot be read"):
        read_summary(Disk(), tmp_path)
