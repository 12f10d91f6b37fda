"""Rounds of the cyclic code in the worlds of `world`: rows of float64, as durable as updates, decoded through crashes.

The code has four devices: the three honest ones, and the hostile one, whose rows are lies wherever it sends any. Each
shard's update in a round follows from the round's id, so at every checkpoint the model is known to the last number.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest

from covey_coordinator import coordinator
from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.mean import Mean
from covey_coordinator.algorithms import coded
from covey_coordinator.algorithms.coded import LOCATED, Coded, CodedEngine
from covey_coordinator.algorithms.coded_settings import CodingSettings
from covey_coordinator.coordinator import Coordinator
from covey_coordinator.serve import Task, TrainingSettings, Work
from covey_coordinator.store import RunStore
from covey_protocol import forms
from covey_protocol.blobs import blob_ref, chunks
from covey_protocol.coding import CyclicCode, as_numbers, weighed
from covey_protocol.compression import encode
from covey_protocol.encryption import encrypted
from covey_protocol.forms import compression_of
from covey_protocol.messages import Answer, Chunk, CodingPlan, Invitation, Offer
from simulation.mutations import Patch, wrapped
from simulation.world import (
    BUNDLE,
    CHUNK_BYTES,
    CONFIG,
    HONEST,
    HOSTILE,
    MANIFEST,
    NUM_EXAMPLES,
    SLOTS,
    D,
    LedgerEngine,
    Outcome,
    World,
    breaks,
)

SEEDS, MANY = 6, 2_000
SHARDS = ("north", "east", "south", "west")
PLAN = CodingPlan(("c", "a", HOSTILE, "b"), SHARDS, 1)  # not in the order of their names
CODE = CyclicCode(4, 1)
replace = msgspec.structs.replace


def shard_update(round_id: str, shard: str) -> Any:
    seed = hashlib.sha256(f"{round_id} {shard}".encode()).digest()[:8]
    return np.random.default_rng(int.from_bytes(seed, "big")).standard_normal(D).astype(np.float32)


def row_of(name: str, round_id: str) -> Any:
    """What an honest device sends, of shards of 5, 6, 7 and 8 examples."""
    parts = (weighed(shard_update(round_id, one), 5 + SHARDS.index(one)) for one in PLAN.held_by(name))
    return as_numbers(CODE.encode(parts))


def mean_of(round_id: str) -> Any:
    return sum((5 + place) * shard_update(round_id, one).astype(float) for place, one in enumerate(SHARDS)) / 26


@functools.cache
def engine_of() -> CodedEngine:
    """One for all worlds: it remembers nothing, and TensorFlow traces for a second."""
    return CodedEngine(make_engine("direct", Mean(), MANIFEST.parameters), Coded(PLAN, 1, 1))


@pytest.fixture(scope="module", autouse=True)
def _engines_end_before_the_interpreter() -> Iterator[None]:
    yield
    engine_of.cache_clear()


class DecodingEngine(LedgerEngine):
    work, vectors = "cyclic-code", ()

    def aggregate(self, parameters: Any, screened: Any) -> Outcome:
        result = engine_of().aggregate(parameters, screened)
        self._world.about_to_aggregate(screened, self._run, self.count)
        self.count += 1
        said = {verdict.device_id: verdict for verdict in result.verdicts}
        wrong = [name for name in HONEST if name in said and said[name].status != "accepted"]
        self._world.require(not wrong, "an honest device is named", wrong)
        located = HOSTILE in said and said[HOSTILE].reason == LOCATED
        self._world.seen["located"] += located
        self._world.seen["a device is missing"] += len(screened.device_ids) < CODE.n
        return Outcome(result.parameters, result.verdicts)


class CodedWorld(World):
    planned: ClassVar = {
        "run": replace(
            CONFIG,
            devices=dict.fromkeys(PLAN.devices, "00" * 32),
            round=replace(CONFIG.round, devices=3, quorum=3),
            training=TrainingSettings(algorithm="cyclic-code"),
            coding=CodingSettings(SHARDS),
        )
    }

    def _varied(self, config: Any) -> Any:
        self.kind = "for everyone"  # covey serve refuses the others
        return super()._varied(config)

    def task(self, coordinator: Coordinator, config: Any) -> Task:
        work = Work(config, BUNDLE, np.zeros(D, np.float32))
        return Task(coordinator, DecodingEngine(self, config.run), work, lambda line: None, self.orders_of(config.run))

    def new_update(self, name: str, number: int, invitation: Invitation) -> bytes:
        data = self._sent(name, invitation, row_of(name, invitation.round_id))
        slot = HONEST.index(name) * SLOTS + number
        self.slots[slot] = (name, invitation.round_id, hashlib.sha256(data).hexdigest())
        return data

    def _sent(self, name: str, invitation: Invitation, row: Any) -> bytes:
        data = encode(row, compression_of(invitation.plan), b"")
        if invitation.encryption_key:
            data = encrypted(invitation, name, data, NUM_EXAMPLES, {"loss": 0.5}, self.entropy)
        return data

    def _nonsense(self, invitation: Invitation) -> list[Any]:
        """Mostly a whole row that is a lie, small or large."""
        if self.rng.random() < 0.5:
            return super()._nonsense(invitation)
        row = row_of(HOSTILE, invitation.round_id)
        row[self.rng.randrange(D)] += self.rng.choice([1e-9, 1.0, 1e12])
        data = self._sent(HOSTILE, invitation, row)
        if invitation.encryption_key:
            self.openable.add(hashlib.sha256(data).hexdigest())
        ref, round_id = blob_ref(data, CHUNK_BYTES), invitation.round_id
        sent = [Chunk(round_id, ref.sha256, index, piece) for index, piece in chunks(data, ref)]
        return [Answer(round_id, True), Offer(round_id, ref, 3), *sent]

    def _check_model(self, run: str, number: int, sha256: str) -> None:
        data = self.disk.files.get(f"{run}/checkpoints/{run}/round-{number:05d}.f32")
        self.require(data is not None and hashlib.sha256(data).hexdigest() == sha256, "a checkpoint without its file")
        rounds = self._all("SELECT round FROM checkpoints ORDER BY number", run=run)
        true = sum(mean_of(round_id) for (round_id,) in rounds)
        off = float(np.abs(np.frombuffer(data or b"", "<f4") - true).max())
        self.require(off < 1e-6, "the model is not that of the shards", number, off)
        for name, round_id, status, why in self._all("SELECT id, round, status, why FROM devices", run=run):
            named = status == "rejected" and name in HONEST and why == LOCATED
            self.require(not named, "an honest device is told that it lied", name, round_id)
            self.require((name, status) != (HOSTILE, "accepted"), "a lie is accepted", round_id)


def run(seed: int) -> World:
    world = CodedWorld(seed)
    try:
        return world.run()
    except BaseException as exc:
        raise AssertionError(f"{exc!r}\n{world.story()}\nseed {seed} of CodedWorld") from exc


def test_the_promise_holds_for_rows_and_no_lie_enters_a_model() -> None:
    seen = sum((run(seed).seen for seed in range(1, SEEDS)), run(0).seen)
    assert min(seen["located"], seen["a device is missing"]) >= SEEDS / 2
    assert min(seen[f"power cut: {place} commit"] for place in ("before", "after"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_and_in_many_more_worlds() -> None:
    for seed in range(SEEDS, MANY):
        run(seed)


# --- planted bugs


def rows_are_kept_in_float32(patch: Patch) -> None:
    def opened(original: Any, self: RunStore, *rest: Any) -> Any:
        offer, row = original(self, *rest)
        return offer, row.astype(np.float32).astype(row.dtype)

    wrapped(patch, RunStore, "opened", opened)


def who_lied_hears_that_its_row_was_used(patch: Patch) -> None:
    original = coded._verdicts
    patch.setattr(coded, "_verdicts", lambda screened, liars: original(screened, set()))


def whoever_lies_is_not_located(patch: Patch) -> None:
    original = coded.decode
    patch.setattr(coded, "decode", lambda *args, tolerance, **named: original(*args, tolerance=1.0, **named))


def places_go_by_the_order_of_names(patch: Patch) -> None:
    def made(original: Any, self: CodedEngine, plain: Any, told: Coded) -> None:
        original(self, plain, dataclasses.replace(told, plan=replace(told.plan, devices=tuple(sorted(PLAN.devices)))))

    wrapped(patch, CodedEngine, "__init__", made)
    engine_of.cache_clear()  # and after the test, so that no other gets this one


def an_offer_of_float32_fits(patch: Patch) -> None:
    """Sizes as of plain updates: honest rows are refused, and no round ends well."""
    original = forms.compression_of
    patch.setattr(forms, "compression_of", lambda plan: original(replace(plan, coding=msgspec.UNSET)))


def rows_are_gathered_as_plain_updates(patch: Patch) -> None:
    original = coordinator.arrivals_of

    def arrivals_of(device_ids: Any, plan: Any, d: int) -> Any:
        return original(device_ids, replace(plan, coding=msgspec.UNSET), d)

    patch.setattr(coordinator, "arrivals_of", arrivals_of)


BUGS = {
    "rows are kept in float32": rows_are_kept_in_float32,
    "who lied hears that its row was used": who_lied_hears_that_its_row_was_used,
    "who lies is not located": whoever_lies_is_not_located,
    "places go by the order of names": places_go_by_the_order_of_names,
    "an offer has the size of a plain update": an_offer_of_float32_fits,
    "rows are gathered as plain updates": rows_are_gathered_as_plain_updates,
}


@pytest.mark.parametrize("what", BUGS)
def test_the_simulation_finds_that(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[what](monkeypatch)
    assert any(breaks(CodedWorld, seed) for seed in range(SEEDS))
    engine_of.cache_clear()
