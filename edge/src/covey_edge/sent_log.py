"""A log of everything that left this device, for its owner: one JSON object a line, in `state_dir/sent.jsonl`.

What tells of the data (an update, an evaluation, the reason of a failure) is durable here before it can leave; the rest
(answers, offers, presences) is written before it leaves and synced with the next durable line. So a line may be there
of what a crash has kept from leaving, and never the other way round. What is said again, after a reconnection or
because it was asked for, is one line.

A full file becomes `sent-N.jsonl`; the newest KEPT_FILES are kept, and of older ones the number and bytes of every kind
in every month, in `sent-summary.json`, for ever. The device's clock dates the lines; their order is the file's.
"""

from __future__ import annotations

import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Optional, Protocol, Union

import msgspec
from msgspec import Struct

from covey_edge.config import PrivacySettings
from covey_edge.files import DISK, Disk, told_of
from covey_protocol import device
from covey_protocol.errors import StorageError
from covey_protocol.messages import (
    Answer,
    Chunk,
    Failure,
    FromDevice,
    Invitation,
    Offer,
    Presence,
    Seen,
    TrainingPlan,
    reason_text,
)

log = logging.getLogger("covey.agent")

NAME, SUMMARY = "sent.jsonl", "sent-summary.json"  # in state_dir
_OLDER = re.compile(r"\Asent-(\d{6})\.jsonl\Z")
MAX_FILE_BYTES = 2**20  # some 1,100 rounds; read whole when it is summed up, which must not show in the agent's memory
KEPT_FILES = 16  # older ones, beside the current
REMEMBERED = 256  # messages that are not written again when they are said again
WAITING = 64  # lines that a full disk has kept out, until there is space again
UPDATE, EVALUATION, FAILURE, VERDICT = "update", "evaluation", "failure", "verdict"
UNSAID = "this device cannot write down what leaves it, so it does not say the reason"


class Line(Struct, frozen=True, omit_defaults=True):
    """at: UTC. kind: UPDATE and EVALUATION may leave from then on, "offer" and "chunks" do; VERDICT is what became of
    one. bytes: of an update's wire form; 0 where a message holds nothing but its words."""

    at: str
    kind: str
    words: str
    round: str = ""
    task: str = ""
    bytes: int = 0
    sha256: str = ""


class Tally(Struct, frozen=True):
    """Lines of one kind in one month. first, last: as Line.at."""

    lines: int
    bytes: int
    first: str
    last: str


class Summary(Struct, frozen=True):
    """through: number of the newest file that is in it. months: "2026-11" -> kind -> Tally; verdicts by what they are,
    as "verdict: accepted". unreadable: lines."""

    through: int = 0
    months: dict[str, dict[str, Tally]] = {}
    unreadable: int = 0


class Sent(Protocol):
    """What the performer tells before anything leaves."""

    def keep(self, effect: device.Keep, invitation: Optional[Invitation]) -> None:
        """An update is about to be put into the outbox. Raises StorageError: then it must not be."""

    def before(self, message: FromDevice) -> FromDevice:
        """The message that may be said: this one, or where it cannot be written down one that tells nothing."""

    def heard(self, event: device.Event, owed: tuple[str, ...]) -> None:
        """What became of an update. owed: the rounds whose updates are in the outbox."""


class Unlogged:
    """Of a device without a log (in tests)."""

    def keep(self, effect: device.Keep, invitation: Optional[Invitation]) -> None:
        pass

    def before(self, message: FromDevice) -> FromDevice:
        return message

    def heard(self, event: device.Event, owed: tuple[str, ...]) -> None:
        pass


UNLOGGED = Unlogged()


class SentLog:
    """now_s: Unix time. One program at a time may write (the agent holds its state_dir's lock)."""

    def __init__(
        self, folder: Path, privacy: PrivacySettings, disk: Disk = DISK, now_s: Callable[[], float] = time.time
    ) -> None:
        self._folder, self._path, self._privacy, self._disk, self._now_s = folder, folder / NAME, privacy, disk, now_s
        self._said: OrderedDict[tuple[str, ...], None] = OrderedDict()
        self._contents: dict[str, str] = {}
        self._waiting: list[Line] = []
        self._lost = 0  # lines that no longer fitted into _waiting
        self._checked = False

    # --- what the agent says

    def describe(self, update_sha256: bytes, words: str) -> None:
        """What the update that is kept next holds, where the offer does not tell because it is encrypted."""
        self._contents = {update_sha256.hex(): words}

    def keep(self, effect: device.Keep, invitation: Optional[Invitation]) -> None:
        offer, sha256 = effect.offer, effect.offer.update.sha256.hex()
        plan = invitation.plan if invitation is not None else None
        words = self._contents.pop(sha256, "") or contents(offer.num_examples, offer.metrics)
        line = self._line(
            EVALUATION if effect.evaluates else UPDATE,
            "; ".join(filter(None, (made(invitation, self._privacy), words))),
            offer.round_id,
            plan.task if plan is not None else "",
            offer.update.size,
            sha256,
        )
        self._write(line, durable=True)

    def before(self, message: FromDevice) -> FromDevice:
        line = self._line_of(message)
        mark = (line.kind, line.round, line.sha256, line.words)
        if mark in self._said:
            return message
        self._said[mark] = None
        if len(self._said) > REMEMBERED:
            self._said.popitem(last=False)
        if not isinstance(message, Failure):
            self._write_or_put_off(line)
            return message
        try:
            self._write(line, durable=True)
        except StorageError as exc:
            log.error("%s", exc)
            message = Failure(message.round_id, reason_text(f"{UNSAID} ({told_of(exc)})"))
            self._put_off(self._line_of(message))
        return message

    def heard(self, event: device.Event, owed: tuple[str, ...]) -> None:
        if isinstance(event, device.Judged):
            round_id, verdict, reason = event.verdict.round_id, event.verdict.status, event.verdict.reason
        elif isinstance(event, device.Received) and not event.receipt.kept:
            round_id, verdict, reason = event.receipt.round_id, "refused", event.receipt.reason
        else:
            return
        if round_id in owed:
            self._write_or_put_off(self._line(VERDICT, f"{verdict}: {reason}" if reason else verdict, round_id))

    # --- lines

    def _line(self, kind: str, words: str, round_id: str = "", task: str = "", size: int = 0, sha256: str = "") -> Line:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._now_s()))
        return Line(at, kind, words, round_id, task, size, sha256)

    def _line_of(self, message: FromDevice) -> Line:
        if isinstance(message, Offer):
            sha256, size = message.update.sha256.hex(), message.update.size
            told = contents(message.num_examples, message.metrics)
            return self._line("offer", f"said that its update is ready; {told}", message.round_id, "", size, sha256)
        if isinstance(message, Chunk):
            words, sha256 = "the update itself, in chunks", message.sha256.hex()
            return self._line("chunks", words, message.round_id, "", 0, sha256)
        if isinstance(message, Failure):
            return self._line(FAILURE, message.reason, message.round_id)
        if isinstance(message, Answer):
            said = "takes part" if message.accept else f"declines: {message.reason}"
            return self._line("answer", said, message.round_id)
        if isinstance(message, Seen):
            return self._line("seen", "has read the verdict", message.round_id)
        assert isinstance(message, Presence)
        said = f"online, covey {message.agent_version}, {message.runtime}" if message.online else "offline"
        trial = "this release is on trial" if message.on_trial else ""
        bad = f"does not take {', '.join(message.bad)}" if message.bad else ""
        return self._line("presence", "; ".join(filter(None, (said, message.trouble or "", trial, bad))))

    def _put_off(self, line: Line) -> None:
        if len(self._waiting) < WAITING:
            self._waiting.append(line)
        else:
            self._lost += 1

    # --- files

    def _write_or_put_off(self, line: Line) -> None:
        try:
            self._write(line, durable=False)
        except StorageError as exc:
            log.error("%s", exc)
            self._put_off(line)

    def _write(self, line: Line, *, durable: bool) -> None:
        """With what had to wait before it. Raises StorageError; then nothing of it is in the file."""
        lines = [*self._waiting, line]
        if self._lost:
            lines.insert(-1, self._line("lost", f"{self._lost} lines: the disk was full"))
        data = b"".join(msgspec.json.encode(one) + b"\n" for one in lines)
        if not self._checked:
            old = self._disk.read(self._path)
            data = b"\n" + data if old and not old.endswith(b"\n") else data  # a power cut has torn the last line
        size = self._disk.append(self._path, data, durable=durable)
        self._checked, self._waiting, self._lost = True, [], 0
        if size >= MAX_FILE_BYTES:
            self._begin_a_file()

    def _begin_a_file(self) -> None:
        """A file that is full gives way; what cannot be done now is done after the next line."""
        try:
            older = numbers(self._disk, self._folder)
            summary = read_summary(self._disk, self._folder)
            self._disk.rename(self._path, _older(self._folder, max([summary.through, *older]) + 1))
            for number in older[: max(0, len(older) + 1 - KEPT_FILES)]:
                if number > summary.through:
                    summary = _summed(summary, number, *read_lines(self._disk, _older(self._folder, number)))
                    self._disk.write(self._folder / SUMMARY, msgspec.json.encode(summary) + b"\n", mode=0o600)
                self._disk.remove(_older(self._folder, number))
        except StorageError as exc:
            log.error("%s", exc)


# --- words


def made(invitation: Optional[Invitation], privacy: PrivacySettings) -> str:
    """What the update of this round is, and what was done to it before it was kept."""
    if invitation is None:
        return ""
    plan = invitation.plan
    if plan.evaluate:
        parts = [f"evaluation: {', '.join(plan.evaluate)} of the model, exact"]
    else:
        parts = [f"{_named(plan)} of {invitation.update_dimension:,} numbers"]
        parts.append(f"clipped to {privacy.clip_norm:g}" if privacy.clip_norm else "not clipped")
        noise = f"noise {privacy.noise_multiplier:g} times that" if privacy.noise_multiplier else "no noise"
        parts.append(noise)
        parts += [plan.compression] if plan.compression != "none" else []
    parts.append("encrypted to the coordinator" if invitation.encryption_key else "not encrypted")
    return ", ".join(parts)


def _named(plan: TrainingPlan) -> str:
    return "update" if plan.work == "train" else f"update ({plan.work})"


def contents(num_examples: int, metrics: dict[str, float]) -> str:
    """The numbers that go with an update."""
    numbers = ", ".join(f"{name} {value:.6g}" for name, value in sorted(metrics.items()))
    return f"{num_examples:,} example{'' if num_examples == 1 else 's'}{'; ' if numbers else ''}{numbers}"


# --- reading


def entries(folder: Path, disk: Disk = DISK) -> Iterator[Union[Line, int]]:
    """All lines that are kept, the oldest first; for each file that holds some, the number of unreadable ones."""
    for path in [*(_older(folder, number) for number in numbers(disk, folder)), folder / NAME]:
        lines, unreadable = read_lines(disk, path)
        yield from lines
        if unreadable:
            yield unreadable


def read_lines(disk: Disk, path: Path) -> tuple[list[Line], int]:
    """Those that can be read, and how many cannot: a power cut tears the last one."""
    lines, unreadable = [], 0
    for data in (disk.read(path) or b"").split(b"\n"):
        try:
            lines += [msgspec.json.decode(data, type=Line)] if data else []
        except msgspec.MsgspecError:
            unreadable += 1
    return lines, unreadable


def read_summary(disk: Disk, folder: Path) -> Summary:
    """Raises StorageError where there is one that cannot be read: years must not be written over."""
    data = disk.read(folder / SUMMARY)
    if data is None and SUMMARY not in disk.names(folder):
        return Summary()
    try:
        return msgspec.json.decode(data or b"", type=Summary)
    except msgspec.MsgspecError as exc:
        raise StorageError(f"{folder / SUMMARY} cannot be read ({exc})", "move it away to begin another one") from exc


def numbers(disk: Disk, folder: Path) -> list[int]:
    """Of the files beside the current one, the oldest first."""
    return sorted(int(found[1]) for name in disk.names(folder) if (found := _OLDER.match(name)))


def _older(folder: Path, number: int) -> Path:
    return folder / f"sent-{number:06d}.jsonl"


def _summed(summary: Summary, number: int, lines: list[Line], unreadable: int) -> Summary:
    months = {month: dict(kinds) for month, kinds in summary.months.items()}
    for line in lines:
        kinds = months.setdefault(line.at[:7], {})
        kind = f"{VERDICT}: {line.words.partition(':')[0]}" if line.kind == VERDICT else line.kind
        old = kinds.get(kind, Tally(0, 0, line.at, line.at))
        kinds[kind] = Tally(old.lines + 1, old.bytes + line.bytes, min(old.first, line.at), max(old.last, line.at))
    return Summary(number, months, summary.unreadable + unreadable)
