"""Bugs to plant: each breaks the promise in one place, by a sentence. The simulation must find every one.

A mutation takes pytest's monkeypatch and changes production code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec.structs import replace

from covey_coordinator import coordinator, serve
from covey_coordinator.coordinator import Coordinator
from covey_coordinator.store import RunStore
from covey_edge.outbox import Outbox
from covey_edge.performer import Performer
from covey_protocol import device, round
from covey_protocol.blobs import BlobAssembly
from covey_protocol.errors import PeerError
from covey_protocol.messages import Receipt

Patch = Any  # pytest.MonkeyPatch
MUTATIONS: dict[str, Callable[[Patch], None]] = {}
REVOKED_MUTATIONS: dict[str, Callable[[Patch], None]] = {}  # for worlds in which a device is revoked


def mutation(
    sentence: str, table: dict[str, Callable[[Patch], None]] = MUTATIONS
) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def keep(function: Callable[[Patch], None]) -> Callable[[Patch], None]:
        table[sentence] = function
        return function

    return keep


def wrapped(patch: Patch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace owner.name by change(original, self, *arguments)."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *arguments, **named: change(original, *arguments, **named))


def row(patch: Patch, table: dict[Any, Any], name: str, change: Callable[..., Any]) -> None:
    """The same for all rows of a state table whose transition has this name."""
    for pair, action in list(table.items()):
        if action.__name__ == name:
            patch.setitem(table, pair, lambda *arguments, action=action: change(action, *arguments))


# --- the coordinator


@mutation("the coordinator acknowledges before it stores")
def _(patch: Patch) -> None:
    def store(original: Any, self: Coordinator, state: Any, effect: Any) -> None:
        self._handle(state, round.Stored(effect.device_id))
        self._commit()
        original(self, state, effect)

    wrapped(patch, Coordinator, "_store", store)


@mutation("a stored update is written without a sync")
def _(patch: Patch) -> None:
    def store(original: Any, self: RunStore, device_id: str, offer: Any, data: bytes, **more: Any) -> None:
        self._disk.write_scratch(self._update_path(offer.update.sha256.hex()), data)
        original(self, device_id, offer, data, **more)
        self._updates.clear()

    wrapped(patch, RunStore, "store_update", store)


@mutation("the row of a stored update is forgotten")
def _(patch: Patch) -> None:
    def store(original: Any, self: RunStore, device_id: str, offer: Any, data: bytes, **more: Any) -> None:
        self._disk.write(self._update_path(offer.update.sha256.hex()), data)

    wrapped(patch, RunStore, "store_update", store)


@mutation("what a batch of messages led to is said before it is durable")
def _(patch: Patch) -> None:
    def commit(original: Any, self: Coordinator) -> None:
        unsaid, self._unsaid = self._unsaid, []
        for device_id, message in unsaid:
            self.fleet.send(device_id, message)
        original(self)

    wrapped(patch, Coordinator, "_commit", commit)


@mutation("the rule runs in the batch of messages that decided the round")
def _(patch: Patch) -> None:
    def decided(original: Any, self: RunStore, round_id: str) -> None:
        original(self, round_id)
        commit = self.commit
        self.commit = lambda: self.__dict__.__setitem__("commit", commit)  # type: ignore[method-assign]

    wrapped(patch, RunStore, "decided", decided)


@mutation("a restart loses who had delivered")
def _(patch: Patch) -> None:
    original = round.RoundMachine.restored.__func__  # type: ignore[attr-defined]

    def restored(cls: Any, facts: Any, now: float) -> Any:
        nothing = {name: round.DeviceFacts() for name in facts.devices}
        return original(cls, dataclasses.replace(facts, devices=nothing), now)

    patch.setattr(round.RoundMachine, "restored", classmethod(restored))


@mutation("a restart loses the round")
def _(patch: Patch) -> None:
    patch.setattr(RunStore, "unfinished", lambda self, run_id: None)


@mutation("a restart loses that the round was decided")
def _(patch: Patch) -> None:
    patch.setattr(RunStore, "decided", lambda self, round_id: None)


@mutation("a restart gives the round its whole time again")
def _(patch: Patch) -> None:
    patch.setattr(Coordinator, "_elapsed_s", lambda self, facts: 0.0)


@mutation("a restart loses the server optimizer's state")
def _(patch: Patch) -> None:
    wrapped(patch, serve, "_resume", lambda original, store, engine, *rest: original(store, Forgetful(), *rest))


class Forgetful:
    def load_state(self, data: bytes) -> bool:
        return True


@mutation("model and verdicts are made durable one after the other")
def _(patch: Patch) -> None:
    def conclude(
        original: Any,
        self: RunStore,
        round_id: str,
        phase: Any,
        reason: str,
        verdicts: Any,
        checkpoint: Any,
        *more: Any,
    ) -> None:
        if checkpoint is not None:
            hashes = self._write_checkpoint("run", checkpoint)
            with self._transaction() as database:
                values = ("run", checkpoint.number, round_id, *hashes)
                database.execute("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?)", values)
            self.commit()
        original(self, round_id, phase, reason, verdicts, None, *more)

    wrapped(patch, RunStore, "conclude", conclude)


@mutation("verdicts are sent before they are durable")
def _(patch: Patch) -> None:
    def finish(original: Any, self: Any, *arguments: Any) -> Any:
        finished, closed, *verdicts = original(self, *arguments)
        return [*verdicts, closed, finished]

    wrapped(patch, round.RoundMachine, "_finish", finish)


@mutation("an abandoned round gives no verdicts")
def _(patch: Patch) -> None:
    def abandon(original: Any, self: Any, reason: str) -> Any:
        finished, closed, *_ = original(self, reason)
        return [dataclasses.replace(finished, rejected={}), closed]

    wrapped(patch, round.RoundMachine, "_abandon", abandon)


@mutation("an offer of an older round is always refused")
def _(patch: Patch) -> None:
    def recall(original: Any, self: Coordinator, device_id: str, offer: Any) -> None:
        self.fleet.send(device_id, Receipt(offer.round_id, offer.update.sha256, False, "that round is over"))

    wrapped(patch, Coordinator, "_recall", recall)


@mutation("a repeated offer is counted again")
def _(patch: Patch) -> None:
    def aggregate(original: Any, self: Coordinator, state: Any, device_ids: Any) -> Any:
        event = original(self, state, device_ids)
        if state.engine is not None and state.repeats:
            state.result = state.result + state.arrivals._matrix[0]
        return event

    def take(original: Any, self: Coordinator, state: Any, received: Any) -> None:
        if state is not None and received is not None and isinstance(received.message, coordinator.Offer):
            state.repeats = getattr(state, "repeats", 0) + (received.device_id in state.offers)
        original(self, state, received)

    patch.setattr(coordinator._Round, "repeats", 0, raising=False)
    wrapped(patch, Coordinator, "_aggregate", aggregate)
    wrapped(patch, Coordinator, "_take", take)


@mutation("a second update of a device replaces the one that was acknowledged")
def _(patch: Patch) -> None:
    def offered(action: Any, self: Any, event: Any, now: float) -> Any:
        peer = self._devices.get(event.device_id)
        if peer is not None and peer.progress is round.Progress.STORED and peer.offer.update != event.offer.update:
            peer.progress = round.Progress.ACCEPTED
        return action(self, event, now)

    row(patch, round.TABLE, "_offered", offered)


@mutation("the hash of an update is not checked")
def _(patch: Patch) -> None:
    def add(original: Any, self: BlobAssembly, index: int, data: bytes) -> Any:
        self._chunks[index] = data
        return None if self.missing() else b"".join(self._chunks[i] for i in range(self.ref.num_chunks))

    wrapped(patch, BlobAssembly, "add", add)


@mutation("the round does not end while a device that was invited is away")
def _(patch: Patch) -> None:
    patch.setattr(round.RoundMachine, "_still_waited_for", lambda self, peer, now: peer.progress not in round.FINAL)
    wrapped(
        patch,
        round.RoundMachine,
        "_advance",
        lambda original, self, now: original(self, min(now, self._opened_at + self.invitation.duration_ms / 1000 - 1)),
    )


# --- rounds with a goal, asynchronous rounds


@mutation("a round with a goal goes on after it is reached")
def _(patch: Patch) -> None:
    original = round.RoundMachine.__init__

    def init(self: Any, invitation: Any, device_ids: Any, settings: Any) -> None:
        original(self, invitation, device_ids, dataclasses.replace(settings, goal=0))

    patch.setattr(round.RoundMachine, "__init__", init)


@mutation("a later round takes an update that an earlier one has taken")
def _(patch: Patch) -> None:
    patch.setattr(RunStore, "taken", lambda self, round_id, but_by="": frozenset())


@mutation("a restart forgets for which round a stored update was trained")
def _(patch: Patch) -> None:
    def store(original: Any, self: RunStore, device_id: str, offer: Any, data: bytes, **more: Any) -> None:
        original(self, device_id, offer, data, **more)
        with self._transaction() as database:
            database.execute("UPDATE devices SET origin = NULL, staleness = 0 WHERE id = ?", (device_id,))

    wrapped(patch, RunStore, "store_update", store)


@mutation("the verdict on a late update names the round that took it")
def _(patch: Patch) -> None:
    def finish(original: Any, self: Any, *arguments: Any) -> Any:
        effects = original(self, *arguments)
        round_id = self.invitation.round_id
        return [
            round.SendTo(one.device_id, replace(one.message, round_id=round_id)) if type(one) is round.SendTo else one
            for one in effects
        ]

    wrapped(patch, round.RoundMachine, "_finish", finish)


@mutation("a late update counts in full")
def _(patch: Patch) -> None:
    patch.setattr(coordinator, "weighted", lambda update, staleness: update)


@mutation("another update of a device takes the name of the one that was stored")
def _(patch: Patch) -> None:
    def taker(original: Any, self: Any, device_id: str, round_id: str) -> Any:
        peer = original(self, device_id, round_id)
        if peer is not None and peer.progress is round.Progress.STORED and peer.offer.round_id != round_id:
            peer.offer = replace(peer.offer, round_id=round_id)
            peer.acknowledged = round_id
        return peer

    wrapped(patch, round.RoundMachine, "_taker", taker)


# --- encrypted rounds


@mutation("a round's key is written without a sync")
def _(patch: Patch) -> None:
    def opened(original: Any, self: RunStore, *arguments: Any) -> None:
        write = self._disk.write
        self._disk.write = lambda path, data, mode=0: self._disk.write_scratch(path, data)  # type: ignore[method-assign]
        try:
            original(self, *arguments)
        finally:
            self._disk.write = write  # type: ignore[method-assign]

    wrapped(patch, RunStore, "open_round", opened)


@mutation("a round's key is not kept at all")
def _(patch: Patch) -> None:
    wrapped(patch, RunStore, "open_round", lambda original, self, *arguments: original(self, *arguments[:4]))


@mutation("a restart takes the number of examples from the offer that is not encrypted")
def _(patch: Patch) -> None:
    def store(original: Any, self: RunStore, device_id: str, offer: Any, data: bytes, **more: Any) -> None:
        original(self, device_id, replace(offer, num_examples=1), data, **more)

    wrapped(patch, RunStore, "store_update", store)


@mutation("what does not decrypt is stored all the same")
def _(patch: Patch) -> None:
    def opened(original: Any, self: RunStore, invitation: Any, device_id: str, offer: Any, data: bytes) -> Any:
        try:
            return original(self, invitation, device_id, offer, data)
        except PeerError:
            return offer, np.ones(invitation.dimension, np.float32)

    wrapped(patch, RunStore, "opened", opened)


# --- the device


@mutation("the device offers before it keeps")
def _(patch: Patch) -> None:
    def trained(action: Any, self: Any, event: Any, now: float) -> Any:
        effects = action(self, event, now)
        return [*effects[:-2], *reversed(effects[-2:])]

    row(patch, device.TABLE, "_trained", trained)


@mutation("the device does not keep its update at all")
def _(patch: Patch) -> None:
    patch.setattr(Outbox, "keep", lambda self, entry: None)


@mutation("the device forgets its update when it hears that it was kept")
def _(patch: Patch) -> None:
    def received(action: Any, self: Any, event: Any, now: float) -> Any:
        effects = action(self, event, now)
        if event.receipt.kept and self._owed.pop(event.receipt.round_id, None):
            return [device.Forget(event.receipt.round_id), *effects]
        return effects

    row(patch, device.TABLE, "_received", received)


@mutation("the device forgets its update when the next round begins")
def _(patch: Patch) -> None:
    def invited(action: Any, self: Any, event: Any, now: float) -> Any:
        effects = action(self, event, now)
        if event.invitation.round_id == self.round_id:
            forgotten = [device.Forget(round_id) for round_id in self._owed]
            self._owed.clear()
            return [*forgotten, *effects]
        return effects

    row(patch, device.TABLE, "_invited", invited)


@mutation("the device loses what it owes when it restarts")
def _(patch: Patch) -> None:
    patch.setattr(Performer, "start", lambda self: None)


@mutation("the device asks for a verdict only once")
def _(patch: Patch) -> None:
    patch.setattr(device.DeviceMachine, "_offer_again", lambda self, now, owed: [])


@mutation("the device takes a receipt of another update for its own")
def _(patch: Patch) -> None:
    def received(action: Any, self: Any, event: Any, now: float) -> Any:
        receipt = event.receipt
        owed = next(iter(self._owed.values()), None)
        if owed is not None:
            receipt = Receipt(owed.offer.round_id, owed.offer.update.sha256, receipt.kept, receipt.reason)
        return action(self, device.Received(receipt), now)

    row(patch, device.TABLE, "_received", received)


# --- revoked devices


@mutation("what a revoked device has delivered enters the model", REVOKED_MUTATIONS)
def _(patch: Patch) -> None:
    def revoked(action: Any, self: Any, event: Any, now: float) -> Any:
        peer = self._devices.get(event.device_id)
        stored = peer is not None and peer.progress is round.Progress.STORED
        return [] if stored else action(self, event, now)

    row(patch, round.TABLE, "_revoked", revoked)


@mutation("a restart does not ask who was revoked meanwhile", REVOKED_MUTATIONS)
def _(patch: Patch) -> None:
    patch.setattr(Coordinator, "_unfinished", lambda self, run_id: self.store.unfinished(run_id))


@mutation("a revocation is not durable", REVOKED_MUTATIONS)
def _(patch: Patch) -> None:
    def record(original: Any, self: RunStore, round_id: str, device_id: str, progress: Any, reason: str) -> None:
        if progress is not round.Progress.REVOKED:
            original(self, round_id, device_id, progress, reason)

    wrapped(patch, RunStore, "record", record)


@mutation("a revoked device is still heard", REVOKED_MUTATIONS)
def _(patch: Patch) -> None:
    def take(original: Any, self: Coordinator, state: Any, received: Any) -> None:
        look, self._look = self._look, dict  # type: ignore[method-assign,assignment]
        try:
            original(self, state, received)
        finally:
            self._look = look  # type: ignore[method-assign]

    wrapped(patch, Coordinator, "_take", take)


@mutation("a revoked device is invited", REVOKED_MUTATIONS)
def _(patch: Patch) -> None:
    patch.setattr(Coordinator, "online", lambda self: self.fleet.online())


@mutation("a revoked device hears no verdict on what it delivered", REVOKED_MUTATIONS)
def _(patch: Patch) -> None:
    def revoked(action: Any, self: Any, event: Any, now: float) -> Any:
        effects = action(self, event, now)
        if event.device_id in self._devices:
            self._devices[event.device_id].acknowledged = None
        return effects

    row(patch, round.TABLE, "_revoked", revoked)


@mutation("a readmitted device is told that what it delivered was refused", REVOKED_MUTATIONS)
def _(patch: Patch) -> None:
    def offered(action: Any, self: Any, event: Any, now: float) -> Any:
        peer = self._devices.get(event.device_id)
        if peer is None or peer.progress is not round.Progress.REVOKED:
            return action(self, event, now)
        acknowledged, peer.acknowledged = peer.acknowledged, None
        try:
            return action(self, event, now)
        finally:
            peer.acknowledged = acknowledged

    row(patch, round.TABLE, "_offered", offered)
