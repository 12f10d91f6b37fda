"""Bugs to plant in the agent, each by a sentence: tests/life must find every one. See tests/simulation/mutations.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from covey_edge import agent, boot, files, launcher, mqtt, updates, wheels
from covey_edge.cache import BlobCache
from covey_edge.fetching import Fetching
from covey_edge.ledger import Ledger
from covey_edge.outbox import Entry, NumberFile, Outbox
from covey_edge.performer import Performer
from covey_edge.retired import RetiredKeys
from covey_protocol import device
from covey_protocol.keys import KeyRing
from covey_protocol.messages import Failure, Offer, Receipt
from covey_protocol.releases import described_unverified

Patch = Any  # pytest.MonkeyPatch
BUGS: dict[str, Callable[[Patch], None]] = {}


def bug(sentence: str) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def keep(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
        BUGS[sentence] = plant
        return plant

    return keep


def wrapped(patch: Patch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace owner.name by change(original, self, *arguments)."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *arguments, **named: change(original, *arguments, **named))


# --- files


@bug("the content of a file is not synced")
def _(patch: Patch) -> None:
    def write(path: Path, data: bytes, mode: int = 0o644) -> None:
        files.make_folder(path.parent)
        with files._written(path.with_suffix(".tmp"), data, mode):
            pass
        files.os.replace(path.with_suffix(".tmp"), path)
        files.sync_folder(path.parent)

    patch.setattr(files, "write_atomic", write)


@bug("a folder is not synced after a rename")
def _(patch: Patch) -> None:
    patch.setattr(files, "sync_folder", lambda folder: None)


def in_place(path: Path, data: bytes, mode: int = 0o644) -> None:
    files.make_folder(path.parent)
    with files._written(path, data, mode) as descriptor:
        files.os.fsync(descriptor)
    files.sync_folder(path.parent)


@bug("a file is written in place")
def _(patch: Patch) -> None:
    patch.setattr(files, "write_atomic", in_place)


@bug("a file is written around the layer that is watched")
def _(patch: Patch) -> None:
    def write(path: Path, data: bytes, mode: int = 0o644) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    patch.setattr(files, "write_atomic", write)


@bug("what a crash left of unfinished writes stays")
def _(patch: Patch) -> None:
    patch.setattr(files.Disk, "sweep", lambda self, folder: None)


@bug("what a crash left of unfinished writes outside the outbox stays")
def _(patch: Patch) -> None:
    patch.setattr(agent, "sweep", lambda state_dir: None)


# --- what is said, and what it stands on


@bug("an update is offered before it is in the outbox")
def _(patch: Patch) -> None:
    def perform(original: Any, self: Performer, effects: list[device.Effect]) -> None:
        original(self, sorted(effects, key=lambda effect: isinstance(effect, device.Keep)))

    wrapped(patch, Performer, "_perform", perform)


@bug("an update is offered before it is counted")
def _(patch: Patch) -> None:
    patch.setattr(Ledger, "count", lambda self, sha256, *, evaluates: None)


@bug("message numbers are not reserved")
def _(patch: Patch) -> None:
    patch.setattr(NumberFile, "store", lambda self, number: None)


@bug("message numbers begin with the clock alone")
def _(patch: Patch) -> None:
    patch.setattr(NumberFile, "load", lambda self: 0)


@bug("an update is forgotten when it is delivered")
def _(patch: Patch) -> None:
    def received(original: Any, self: Performer, event: device.Event) -> None:
        original(self, event)
        if isinstance(event, device.Received) and isinstance(event.receipt, Receipt) and event.receipt.kept:
            self._outbox.forget(event.receipt.round_id)
            self.machine._owed.pop(event.receipt.round_id, None)
            self.machine.state = device.State.IDLE

    wrapped(patch, Performer, "handle", received)


@bug("the outbox is emptied at the start")
def _(patch: Patch) -> None:
    def offers(original: Any, self: Outbox) -> list[Offer]:
        for offer in original(self):
            self.forget(offer.round_id)
        return []

    wrapped(patch, Outbox, "offers", offers)


@bug("an update is trained again after a restart although one was offered")
def _(patch: Patch) -> None:
    patch.setattr(Outbox, "offers", lambda self: [])


@bug("a damaged update is offered")
def _(patch: Patch) -> None:
    def update(self: Outbox, offer: Offer) -> bytes:
        data = self._disk.read(self._path(offer.round_id))
        return msgspec.msgpack.decode(data, type=Entry).update[::-1] if data is not None else b""

    patch.setattr(Outbox, "update", update)


# --- growth


@bug("the outbox forgets nothing")
def _(patch: Patch) -> None:
    patch.setattr(Outbox, "forget", lambda self, round_id: None)


@bug("old models stay on the disk")
def _(patch: Patch) -> None:
    patch.setattr(BlobCache, "prune", lambda self, keep: None)


@bug("topics of blobs that have come stay subscribed")
def _(patch: Patch) -> None:
    patch.setattr(Fetching, "_leave", lambda self, assembly: None)
    wrapped(patch, Fetching, "take", _unforgetting)


def _unforgetting(original: Any, self: Fetching, *chunk: Any) -> bool:
    self._transport.forget = lambda topics: None  # type: ignore[method-assign]
    return bool(original(self, *chunk))


@bug("every message number heard is remembered for ever")
def _(patch: Patch) -> None:
    def is_new(original: Any, self: KeyRing[Any], taken: Any) -> bool:
        self.__dict__.setdefault("_all", []).append(taken.sequence)
        return bool(original(self, taken))

    wrapped(patch, KeyRing, "is_new", is_new)


# --- leaks


@bug("a failure tells what is in the data")
def _(patch: Patch) -> None:
    def say(original: Any, self: agent.AgentProgram, message: Any) -> None:
        if isinstance(message, Failure):
            data = Path(self._agent.folder / "data.npz").read_bytes()[:100].decode()
            message = msgspec.structs.replace(message, reason=data)
        original(self, message)

    wrapped(patch, agent.AgentProgram, "say", say)


@bug("the key is in a topic for debugging")
def _(patch: Patch) -> None:
    def start(original: Any, self: agent.AgentProgram) -> None:
        original(self)
        self._transport.publish("covey/1/home/debug", self._agent.key.pem())

    wrapped(patch, agent.AgentProgram, "start", start)


@bug("an update leaves as it was before the child protected it")
def _(patch: Patch) -> None:
    def take(original: Any, self: agent.AgentProgram, round_id: str, frame: Any) -> None:
        original(self, round_id, msgspec.structs.replace(frame, update=frame.update[::-1]))

    wrapped(patch, agent.AgentProgram, "_take_update", take)


# --- keys


@bug("which keys are retired is not kept")
def _(patch: Patch) -> None:
    patch.setattr(RetiredKeys, "retire", lambda self, name: lambda keys: None)


@bug("a retired key is taken")
def _(patch: Patch) -> None:
    patch.setattr(KeyRing, "_heard", lambda self, key: None)


# --- releases


@bug("a release is marked healthy as soon as it is ready")
def _(patch: Patch) -> None:
    patch.setattr(launcher, "HEALTHY_S", 0.0)


@bug("the attempts of a release are not counted")
def _(patch: Patch) -> None:
    patch.setattr(launcher, "attempted", lambda known, here, base: known)


@bug("an attempt is counted after it was made")
def _(patch: Patch) -> None:
    def next_(original: Any, self: launcher.Launcher) -> boot.Boot:
        save = self._folder.save
        self._folder.save = lambda known: None  # type: ignore[method-assign]
        try:
            return original(self)  # type: ignore[no-any-return]
        finally:
            self._folder.save = save  # type: ignore[method-assign]

    wrapped(patch, launcher.Launcher, "_next", next_)


@bug("a release that failed is forgotten")
def _(patch: Patch) -> None:
    def failed(known: boot.Boot, why: str) -> boot.Boot:
        return dataclasses.replace(known, trial="", attempts=0, failed=why)

    patch.setattr(launcher, "failed", failed)
    patch.setattr(boot, "failed", failed)


@bug("what the launcher knows is written in place")
def _(patch: Patch) -> None:
    patch.setattr(boot, "write_atomic", in_place)


@bug("the release before is removed as soon as another is to be tried")
def _(patch: Patch) -> None:
    def stage(original: Any, self: boot.Folder, staged: boot.Staged) -> None:
        original(self, staged)
        self.remove_others([staged.version])

    wrapped(patch, boot.Folder, "stage", stage)


@bug("old releases stay on the disk")
def _(patch: Patch) -> None:
    patch.setattr(boot.Folder, "remove_others", lambda self, keep: None)


@bug("a release is named before it is durable")
def _(patch: Patch) -> None:
    patch.setattr(wheels, "_write", lambda path, content: files.Disk().write_scratch(path, content))


@bug("the seal of a release is not looked at")
def _(patch: Patch) -> None:
    patch.setattr(updates, "open_release", lambda data, key: described_unverified(data))


@bug("older news of releases are followed")
def _(patch: Patch) -> None:
    wrapped(patch, updates.Updates, "_is_for_us", _unremembering)


def _unremembering(original: Any, self: updates.Updates, release: Any) -> bool:
    self._heard = 0
    return bool(original(self, release))


# --- certificates


@bug("certificate files are read only once")
def _(patch: Patch) -> None:
    patch.setattr(mqtt, "tls_context", functools.lru_cache(None)(mqtt.tls_context))


@bug("nobody is warned of a certificate's end")
def _(patch: Patch) -> None:
    patch.setattr(agent.AgentProgram, "_warn_of_certificate", lambda self: None)


@bug("the key of a certificate is in the log")
def _(patch: Patch) -> None:
    def warn(original: Any, self: agent.AgentProgram) -> None:
        original(self)
        path = self._agent.broker.key_file
        if path is not None:
            agent.log.warning("connected with %s", path.read_text())

    wrapped(patch, agent.AgentProgram, "_warn_of_certificate", warn)
