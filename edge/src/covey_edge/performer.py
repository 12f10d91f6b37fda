"""Does what the device machine wants, in order, and reports what came of it. Everything it uses is passed in.

The agent gives it MQTT, a training child and the disk; the simulation in tests/simulation gives it others. Nothing is
said about an update that is not in the outbox, and nothing is in the outbox that is not in the privacy ledger and in
the log of what leaves this device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from covey_edge.files import told_of
from covey_edge.ledger import UNCOUNTED, Counts, Overspent
from covey_edge.outbox import Entry, Outbox
from covey_edge.sent_log import UNLOGGED, Sent
from covey_protocol import device
from covey_protocol.blobs import chunk
from covey_protocol.errors import StorageError
from covey_protocol.messages import BlobRef, Chunk, FromDevice, Invitation, Offer

log = logging.getLogger("covey.agent")


class Surroundings(Protocol):
    """What a device needs beside its outbox. What comes of `fetch` and `train` is reported with `Performer.handle`."""

    def say(self, message: FromDevice) -> None: ...

    def conditions(self, invitation: Invitation) -> device.ConditionsChecked: ...

    def fetch(self, blobs: tuple[BlobRef, ...]) -> None: ...

    def train(self, invitation: Invitation) -> None: ...

    def stop_working(self) -> None:
        """For the round that was: fetching, training."""


class Performer:
    """One device's machine and outbox. clock: seconds, never backwards while the program runs."""

    def __init__(
        self,
        machine: device.DeviceMachine,
        outbox: Outbox,
        surroundings: Surroundings,
        clock: Callable[[], float],
        ledger: Counts = UNCOUNTED,
        sent: Sent = UNLOGGED,
    ) -> None:
        self.machine = machine
        self._ledger = ledger
        self._sent = sent
        self._outbox = outbox
        self._surroundings = surroundings
        self._clock = clock

    def start(self) -> None:
        """Take up what the outbox holds from before. Raises StorageError."""
        self._perform(self.machine.restore(self._outbox.offers(), self._clock()))

    def handle(self, event: device.Event) -> None:
        self._sent.heard(event, self.machine.owed)
        self._perform(self.machine.handle(event, self._clock()))

    def _perform(self, effects: list[device.Effect]) -> None:
        lost = ""  # the round whose update could not be kept
        for effect in effects:
            if isinstance(effect, device.Send):
                if not (isinstance(effect.message, Offer) and effect.message.round_id == lost):
                    self._surroundings.say(self._sent.before(effect.message))
            elif isinstance(effect, device.CheckConditions):
                self.handle(self._surroundings.conditions(effect.invitation))
            elif isinstance(effect, device.Fetch):
                self._surroundings.fetch(effect.blobs)
            elif isinstance(effect, device.Train):
                self._surroundings.train(effect.invitation)
            elif isinstance(effect, device.Keep):
                lost = lost if self._keep(effect) else effect.round_id
            elif isinstance(effect, device.SendChunks):
                self._send_chunks(effect)
            elif isinstance(effect, device.Forget):
                self._forget(effect)
            elif isinstance(effect, device.Discard):
                self._surroundings.stop_working()
            elif isinstance(effect, device.Note):
                log.info("%s", effect.text)

    def _keep(self, effect: device.Keep) -> bool:
        try:
            self._ledger.count(effect.offer.update.sha256, evaluates=effect.evaluates)
            self._sent.keep(effect, self.machine.invitation)
            self._outbox.keep(Entry(effect.offer, effect.update))
        except (StorageError, Overspent) as exc:
            log.error("%s", exc)
            told = str(exc) if isinstance(exc, Overspent) else told_of(exc)
            self.handle(device.Lost(effect.round_id, told))
            return False
        return True

    def _send_chunks(self, effect: device.SendChunks) -> None:
        offer = effect.offer
        update = self._outbox.update(offer)
        if update is None:
            self.handle(device.Lost(offer.round_id, "the update in the outbox cannot be read any more"))
            return
        for index in effect.indices:
            data = chunk(update, offer.update, index)
            self._surroundings.say(self._sent.before(Chunk(offer.round_id, offer.update.sha256, index, data)))

    def _forget(self, effect: device.Forget) -> None:
        try:
            self._outbox.forget(effect.round_id)
        except StorageError as exc:
            log.error("%s", exc)  # it will be offered, and judged, once more after the next start
