"""Bugs to plant: each breaks the promise in one place, by a sentence. The simulation must find every one.

A mutation takes pytest's monkeypatch and changes production code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from covey_coordinator import coordinator, serve
from covey_coordinator.coordinator import Coordinator
from covey_coordinator.store import RunStore
from covey_edge.outbox import Outbox
from covey_edge.performer import Performer
from covey_protocol import device, round
from covey_protocol.blobs import BlobAssembly
from covey_protocol.messages import Receipt

Patch = Any  # pytest.MonkeyPatch
MUTATIONS: dict[str, Callable[[Patch], None]] = {}


def mutation(sentence: str) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def keep(function: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTATIONS[sentence] = function
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
        original(self, state, effect)

    wrapped(patch, Coordinator, "_store", store)


@mutation("a stored update is written without a sync")
def _(patch: Patch) -> None:
    def store(original: Any, self: RunStore, device_id: str, offer: Any, data: bytes) -> None:
        write = self._disk.write
        self._disk.write = lambda path, data, mode=0: self._disk.write_scratch(path, data)  # type: ignore[method-assign]
        try:
            original(self, device_id, offer, data)
        finally:
            self._disk.write = write  # type: ignore[method-assign]

    wrapped(patch, RunStore, "store_update", store)


@mutation("the row of a stored update is forgotten")
def _(patch: Patch) -> None:
    def store(original: Any, self: RunStore, device_id: str, offer: Any, data: bytes) -> None:
        self._disk.write(self._update_path(offer.update.sha256.hex()), data)

    wrapped(patch, RunStore, "store_update", store)


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
        original: Any, self: RunStore, round_id: str, phase: Any, reason: str, verdicts: Any, checkpoint: Any = None
    ) -> None:
        if checkpoint is not None:
            hashes = self._write_checkpoint("run", checkpoint)
            with self._transaction() as database:
                values = ("run", checkpoint.number, round_id, *hashes)
                database.execute("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?)", values)
        original(self, round_id, phase, reason, verdicts)

    wrapped(patch, RunStore, "conclude", conclude)


@mutation("verdicts are sent before they are durable")
def _(patch: Patch) -> None:
    def finish(original: Any, self: Any, *arguments: Any) -> Any:
        finished, *said = original(self, *arguments)
        return [*said, finished]

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
