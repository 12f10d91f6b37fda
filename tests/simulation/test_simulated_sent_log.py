"""The log of what leaves a device, in the simulated worlds: through crashes and full disks, nothing leaves unwritten.

As tests/simulation/test_privacy_ledger.py, with the production log before everything a device says. Its files are small
here, so that they give way and are summed up.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from covey_edge import sent_log
from covey_edge.config import PrivacySettings
from covey_edge.performer import Performer
from covey_edge.sent_log import EVALUATION, FAILURE, UNSAID, UPDATE, Line, Sent, SentLog
from covey_protocol.errors import StorageError
from covey_protocol.messages import Chunk, Failure, FromDevice, Offer
from simulation.mutations import Patch, wrapped
from simulation.world import SimulatedDevice, SimulatedDisk, World, breaks

SEEDS, MANY = 20, 20_000


class SentWorld(World):
    """What a device says is in its log; what tells of its data so that a power cut cannot take it."""

    def sent_log(self, owner: SimulatedDevice) -> Sent:
        return SentLog(Path(owner.name), PrivacySettings(), owner.disk, now_s=lambda: 1.7e9 + self.now)

    def device_says(self, name: str, message: Any) -> None:
        if name in self.devices:
            disk = self.devices[name].disk
            self.require(_durable(disk, name, message), f"{name} says what is not durable in its log", message)
        super().device_says(name, message)


def _durable(disk: SimulatedDisk, name: str, message: FromDevice) -> bool:
    if isinstance(message, (Offer, Chunk)):
        sha256 = (message.update if isinstance(message, Offer) else message).sha256.hex()
        return any(line.kind in (UPDATE, EVALUATION) for line in _durable_lines(disk, name, sha256))
    if isinstance(message, Failure) and not message.reason.startswith(UNSAID):
        lines = _durable_lines(disk, name, message.round_id)
        return any((line.kind, line.words) == (FAILURE, message.reason) for line in lines)
    return True


def _durable_lines(disk: SimulatedDisk, name: str, about: str) -> list[Line]:
    """Of all files, those with this word."""
    found = []
    for one in b"\n".join(disk.durable_part(path) for path in _files(disk, name)).split(b"\n"):
        if about.encode() in one:
            with contextlib.suppress(msgspec.MsgspecError):  # torn by a power cut
                found.append(msgspec.json.decode(one, type=Line))
    return found


def _files(disk: SimulatedDisk, name: str) -> list[Path]:
    return [Path(name) / one for one in disk.names(Path(name)) if one.startswith("sent") and one.endswith(".jsonl")]


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sent_log, "MAX_FILE_BYTES", 2500)


def run(seed: int) -> World:
    world = SentWorld(seed)
    try:
        return world.run()
    except BaseException as exc:
        raise AssertionError(f"{exc!r}\n{world.story()}\nseed {seed}") from exc


def test_everything_is_in_the_log_before_it_leaves() -> None:
    seen: Counter[str] = Counter()
    gave_way = 0
    for seed in range(SEEDS):
        world = run(seed)
        seen += world.seen
        gave_way += any(len(_files(one.disk, name)) > 1 for name, one in world.devices.items())
    assert seen["device's power cut: appended"] > 0  # between the line and the outbox
    assert gave_way > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_and_in_many_more_worlds() -> None:
    for seed in range(SEEDS, MANY):
        run(seed)


# --- planted bugs


def written_after_it_was_said(patch: Patch) -> None:
    def before(original: Any, self: SentLog, message: FromDevice) -> FromDevice:
        self.later = [*getattr(self, "later", []), message]  # type: ignore[attr-defined]
        for one in self.later[:-1]:  # type: ignore[attr-defined]
            original(self, one)
        return message

    wrapped(patch, SentLog, "before", before)


def updates_without_a_sync(patch: Patch) -> None:
    def write(original: Any, self: SentLog, line: Line, *, durable: bool) -> None:
        original(self, line, durable=False)

    wrapped(patch, SentLog, "_write", write)


def a_full_disk_is_passed_over(patch: Patch) -> None:
    def write(original: Any, self: SentLog, line: Line, *, durable: bool) -> None:
        with contextlib.suppress(StorageError):
            original(self, line, durable=durable)

    wrapped(patch, SentLog, "_write", write)


def only_the_outbox(patch: Patch) -> None:
    patch.setattr(SentLog, "keep", lambda self, effect, invitation: None)


def what_was_said_before_the_restart_is_forgotten(patch: Patch) -> None:
    def start(original: Any, self: Performer) -> None:
        log: Any = self._sent
        log._disk.files.pop(str(log._path), None)
        original(self)

    wrapped(patch, Performer, "start", start)


BUGS: dict[str, Callable[[Patch], None]] = {
    "a message is written down after it was said": written_after_it_was_said,
    "the log is written without a sync": updates_without_a_sync,
    "a log that cannot be written is passed over": a_full_disk_is_passed_over,
    "an update is not written down before it is in the outbox": only_the_outbox,
    "a start begins a new log": what_was_said_before_the_restart_is_forgotten,
}


@pytest.mark.parametrize("what", BUGS)
def test_the_simulation_finds_that(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[what](monkeypatch)
    assert any(breaks(SentWorld, seed) for seed in range(5 * SEEDS))
