"""Algorithms of two exchanges in the worlds of `world`: what the first leaves for the second is as durable as a model.

The engine is a ledger of two pages: a gradient exchange enters its updates on the second, which travels to the devices
as a vector, and the local exchange enters its own and moves the second page to the first. So at every checkpoint both
pages together count each accepted update once.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest

from covey_coordinator import serve
from covey_coordinator.coordinator import Coordinator
from covey_coordinator.serve import Task, TrainingSettings, Work
from covey_coordinator.store import Checkpoint, RunStore
from covey_protocol import device
from covey_protocol.bundle import write_bundle
from covey_protocol.device import DeviceMachine
from covey_protocol.messages import BlobRef, Invitation
from covey_protocol.seals import SealingKey
from covey_protocol.works import GRADIENT, SVRG
from simulation.mutations import Patch, wrapped
from simulation.world import CONFIG, MANIFEST, D, LedgerEngine, Outcome, SimulatedDevice, World, breaks

SEEDS, MANY = 50, 20_000
BUNDLE = write_bundle(
    msgspec.structs.replace(MANIFEST, signatures=(*MANIFEST.signatures, "gradient")),
    b"model",
    SealingKey.from_seed(bytes(32)),
)
replace = msgspec.structs.replace


class TwoPageEngine(LedgerEngine):
    """State: the count and the second page, which is there between the two exchanges."""

    page: Any = None

    @property
    def work(self) -> str:
        return GRADIENT if self.page is None else SVRG

    @property
    def vectors(self) -> tuple[Any, ...]:
        return () if self.page is None else (self.page,)

    def aggregate(self, parameters: Any, screened: Any) -> Outcome:
        outcome = super().aggregate(parameters, screened)
        if self.page is None:
            self.page = outcome.parameters - parameters
            return dataclasses.replace(outcome, parameters=parameters)
        page, self.page = self.page, None
        return dataclasses.replace(outcome, parameters=outcome.parameters + page)

    def saved_state(self) -> bytes:
        return b"%d %s" % (self.count, b"" if self.page is None else self.page.astype("<f4").tobytes())

    def load_state(self, data: bytes) -> bool:
        self.page = page_of(data)
        return super().load_state(data.split(b" ")[0])


def page_of(state: bytes) -> Any:
    data = state.split(b" ", 1)[1]
    return np.frombuffer(data, "<f4").copy() if data else None


class FetchingDevice(SimulatedDevice):
    fetched: frozenset[bytes] = frozenset()

    def fetch(self, blobs: tuple[BlobRef, ...]) -> None:
        self.fetched = frozenset(ref.sha256 for ref in blobs)
        super().fetch(blobs)


class ExchangesWorld(World):
    training: ClassVar = TrainingSettings(algorithm="fsvrg-naive", local_steps=1)
    planned: ClassVar = {"run": replace(CONFIG, rounds=4, training=training)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.devices = {name: FetchingDevice(self, name) for name in self.devices}

    def _varied(self, config: Any) -> Any:
        if self.kind == "asynchronous":  # covey serve refuses it
            self.kind = "for everyone"
        return super()._varied(config)

    def task(self, coordinator: Coordinator, config: Any) -> Task:
        work = Work(config, BUNDLE, np.zeros(D, np.float32))
        engine = TwoPageEngine(self, config.run)
        return Task(coordinator, engine, work, lambda line: None, self.orders_of(config.run))

    def ledger_of(self, run: str, number: int, model: Any) -> Any:
        page = self.page_after(run, number)
        return model if page is None else model + page

    def page_after(self, run: str, number: int) -> Any:
        state = self.disk.files.get(f"{run}/checkpoints/{run}/round-{number:05d}.state")
        self.require(state is not None, "a checkpoint without its state", number)
        return page_of(state or b" ")

    def new_update(self, name: str, number: int, invitation: Invitation) -> bytes:
        """The vectors are those of the exchange before, and the device has fetched them."""
        asked = {GRADIENT: 0, SVRG: 1}[invitation.plan.work]
        self.require(len(invitation.vectors) == asked, "another number of vectors", invitation)
        for ref in invitation.vectors:
            page = self.page_after("run", invitation.number - 1)
            right = page is not None and hashlib.sha256(page.astype("<f4").tobytes()).digest() == ref.sha256
            self.require(right, "a vector that the exchange before has not left", invitation)
            one = self.devices[name]
            assert isinstance(one, FetchingDevice)
            self.require(ref.sha256 in one.fetched, "trains without a vector", name)
        self.seen[f"work: {invitation.plan.work}"] += 1
        return super().new_update(name, number, invitation)


def run(seed: int) -> World:
    world = ExchangesWorld(seed)
    try:
        return world.run()
    except BaseException as exc:
        raise AssertionError(f"{exc!r}\n{world.story()}\nseed {seed} of ExchangesWorld") from exc


def test_the_promise_holds_over_two_exchanges() -> None:
    seen = sum((run(seed).seen for seed in range(1, SEEDS)), run(0).seen)
    assert min(seen[f"work: {work}"] for work in (GRADIENT, SVRG)) > SEEDS
    assert [
        place for place in ("before commit", "after commit", "publish blob") if not seen[f"power cut: {place}"]
    ] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_and_in_many_more_worlds() -> None:
    for seed in range(SEEDS, MANY):
        run(seed)


# --- planted bugs


def page_is_not_saved(patch: Patch) -> None:
    patch.setattr(TwoPageEngine, "saved_state", lambda self: b"%d " % self.count)


def gradients_make_no_checkpoint(patch: Patch) -> None:
    def conclude(original: Any, self: RunStore, round_id: str, *rest: Any) -> None:
        phase, reason, verdicts, checkpoint, *more = rest
        if checkpoint is not None and self.invitation(round_id).plan.work == GRADIENT:
            checkpoint = None
        original(self, round_id, phase, reason, verdicts, checkpoint, *more)

    wrapped(patch, RunStore, "conclude", conclude)


def state_goes_before_the_end_of_its_round(patch: Patch) -> None:
    """The page is written beside the checkpoint that is there, which a crash then leaves with another state."""

    def conclude(original: Any, self: RunStore, round_id: str, *rest: Any) -> None:
        checkpoint = rest[3]
        if checkpoint is not None and checkpoint.number > 1:
            before = Checkpoint(checkpoint.number - 1, checkpoint.parameters, checkpoint.state)
            self.mend_checkpoint("run", before)
        original(self, round_id, *rest)

    wrapped(patch, RunStore, "conclude", conclude)


def vectors_of_another_exchange(patch: Patch) -> None:
    def asked(original: Any, engine: Any) -> Any:
        work, vectors = original(engine)
        return work, tuple(vector * 0 for vector in vectors)

    wrapped(patch, serve, "asked_by", asked)


def vectors_are_not_fetched(patch: Patch) -> None:
    row = (device.State.INVITED, device.ConditionsChecked)
    original = device.TABLE[row]

    def checked(machine: DeviceMachine, event: Any, now: float) -> list[Any]:
        effects = original(machine, event, now)
        if machine.invitation is not None:
            machine._awaited = {ref.sha256 for ref in machine.invitation.blobs[:2]}
        return [device.Fetch(one.blobs[:2]) if isinstance(one, device.Fetch) else one for one in effects]

    patch.setitem(device.TABLE, row, checked)


BUGS = {
    "what a gradient exchange leaves is not part of the saved state": page_is_not_saved,
    "a gradient exchange makes no checkpoint": gradients_make_no_checkpoint,
    "the state is written over the one before": state_goes_before_the_end_of_its_round,
    "the vectors are not those of the exchange before": vectors_of_another_exchange,
    "a device does not fetch the vectors": vectors_are_not_fetched,
}


@pytest.mark.parametrize("what", BUGS)
def test_the_simulation_finds_that(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[what](monkeypatch)
    assert any(breaks(ExchangesWorld, seed) for seed in range(SEEDS))
