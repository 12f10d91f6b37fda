"""A fleet on a virtual clock: the production machines, performers and stores, with everything around them made up.

Real: RoundMachine, DeviceMachine, `serve.run_tasks`, Coordinator, RunStore with its SQL (on SQLite in memory), the
device's Performer and Outbox, and in every third world the encryption of updates. Made up, and driven by one seed:
time, the broker, the disks, training, the engine, and when whom the power leaves. A crash can come before and after
every effect; what a disk has then is what was synced.

Every honest update has one number of the model for itself: an update is a 1 there and 0 elsewhere, and the engine adds.
So the model is a ledger: it says of every update ever trained how often it was counted.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from msgspec.structs import replace
from scripted import manifest_of

from covey_coordinator import records
from covey_coordinator.aggregation.staleness import staleness_weight
from covey_coordinator.coordinator import NO_TRAINING, Clock, Common, Coordinator, OwnTraining
from covey_coordinator.fleet import FromFleet
from covey_coordinator.orders import Orders
from covey_coordinator.serve import CoordinatorConfig, RoundSettings, Task, WireSettings, Work, run_tasks
from covey_coordinator.store import KEEP_ROUNDS, SCHEMA, RunStore
from covey_edge.config import BrokerSettings
from covey_edge.files import Disk
from covey_edge.ledger import UNCOUNTED, Counts
from covey_edge.outbox import Outbox
from covey_edge.performer import Performer
from covey_edge.sent_log import UNLOGGED, Sent
from covey_protocol import device
from covey_protocol.blobs import blob_ref, chunks
from covey_protocol.bundle import write_bundle
from covey_protocol.encryption import ENCRYPTION_BYTES, KeyPair, encrypted
from covey_protocol.errors import CoveyError, RuleError, StorageError
from covey_protocol.messages import (
    Answer,
    BlobRef,
    Chunk,
    Failure,
    Invitation,
    Need,
    Offer,
    Presence,
    Receipt,
    RoundClosed,
    Seen,
    Verdict,
    run_of,
)
from covey_protocol.parameters import ParameterSpec
from covey_protocol.seals import SealingKey

HONEST = ("a", "b", "c")
HOSTILE = "m"
SLOTS = 60  # updates one device can train in a run
D = SLOTS * len(HONEST)
CHUNK_BYTES = 320  # an update has 3 chunks
ROUNDS = 2
DURATION_S, ANSWER_S, GRACE_S = 20.0, 4.0, 2.0
TROUBLE_S = 60.0  # then everything works, and all must come to a good end
PATIENCE_S = 400.0
CONFIG = CoordinatorConfig(
    fleet="sim",
    run="run",
    bundle="",
    key_file="",
    rounds=ROUNDS,
    broker=BrokerSettings(url="mqtt://nowhere"),
    devices={},
    round=RoundSettings(
        devices=2, quorum=2, duration_s=DURATION_S, answer_s=ANSWER_S, grace_s=GRACE_S, wait_s=30.0, pause_s=0.5
    ),
)
NUM_EXAMPLES = 5
KINDS: dict[str, dict[str, int]] = {  # of rounds
    "for everyone": {},
    "until the goal": {"goal": 2},
    "asynchronous": {"goal": 2, "max_staleness": 2},
}
MOST_STALENESS = max(kind.get("max_staleness", 0) for kind in KINDS.values())
ENCRYPTED = WireSettings(encryption=True)
MANIFEST = manifest_of(ParameterSpec("ledger", (D,)))
BUNDLE = write_bundle(MANIFEST, b"model", SealingKey.from_seed(bytes(32)))
STORED = "SELECT id, coalesce(origin, round), sha256, staleness FROM devices WHERE sha256 IS NOT NULL"
TO_DEVICE = {
    Invitation: device.Invited,
    RoundClosed: device.Closed,
    Need: device.Needed,
    Receipt: device.Received,
    Verdict: device.Judged,
}


class Crash(BaseException):
    """The power is gone: no code of the program runs any more."""


class Broken(AssertionError):
    """An invariant does not hold."""


@dataclass
class Trouble:
    """How bad this world is. Probabilities; crash: per step of a program."""

    crash: float
    device_crash: float
    drop: float
    repeat: float
    delay_s: float
    full: float
    clock: float
    broker: float
    busy: float

    @classmethod
    def drawn(cls, rng: random.Random) -> Trouble:
        return cls(
            crash=rng.choice([0.0, 0.002, 0.01, 0.05]),
            device_crash=rng.choice([0.0, 0.0, 0.005, 0.03]),
            drop=rng.choice([0.0, 0.05, 0.3]),
            repeat=rng.choice([0.0, 0.1]),
            delay_s=rng.choice([0.05, 0.3, 2.0]),
            full=rng.choice([0.0, 0.0, 0.01]),
            clock=rng.choice([0.0, 0.5]),
            broker=rng.choice([0.0, 0.0, 0.02]),
            busy=rng.choice([0.0, 0.1, 0.5]),
        )


class SimulatedDisk(Disk):
    """What was written is there; what was not synced may be old, new, torn or gone after a crash."""

    def __init__(self, world: World, step: Callable[[str], None]) -> None:
        self._world, self._step = world, step
        self.files: dict[str, bytes] = {}
        self.scratch: set[str] = set()
        self.removed: dict[str, bytes] = {}  # the removal is not durable
        self.unsynced: dict[str, int] = {}  # how long the file was when all of it was durable
        self.full = False

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        name = str(path)
        self._step(f"write {name}")
        self._require_space(name)
        old = self.files.get(name)
        self.files[name] = data
        try:
            self._step(f"wrote {name}")
        except Crash:
            if self._world.rng.random() < 0.5:  # the folder was not synced yet
                self._put(name, old)
            raise
        folder = f"{path.parent}/"
        self.removed = {other: kept for other, kept in self.removed.items() if not other.startswith(folder)}

    def write_all(self, files: Mapping[Path, bytes], mode: int = 0o644) -> None:
        """Nothing is durable before the end: of what was written until a crash, any may be lost."""
        before = {path: self.read(path) for path in files}
        try:
            for path, data in files.items():
                self.write(path, data, mode)
        except Crash:
            for path, old in before.items():
                if self._world.rng.random() < 0.5:
                    self._put(str(path), old)
            raise

    def write_scratch(self, path: Path, data: bytes) -> None:
        self._require_space(str(path))
        self.files[str(path)] = data
        self.scratch.add(str(path))

    def append(self, path: Path, data: bytes, *, durable: bool) -> int:
        name = str(path)
        self._step(f"append {name}")
        self._require_space(name)
        old = self.files.get(name, b"")
        self.files[name] = old + data
        self.unsynced.setdefault(name, len(old))
        if durable:
            self._step(f"appended {name}")
            del self.unsynced[name]
        return len(self.files[name])

    def durable_part(self, path: Path) -> bytes:
        """What a power cut now would leave of a file that grows."""
        data = self.files.get(str(path), b"")
        return data[: self.unsynced.get(str(path), len(data))]

    def read(self, path: Path) -> bytes | None:
        return self.files.get(str(path))

    def names(self, folder: Path) -> list[str]:
        start = f"{folder}/"
        return sorted({name[len(start) :].split("/")[0] for name in self.files if name.startswith(start)})

    def remove(self, path: Path) -> None:
        self._step(f"remove {path}")
        if str(path) in self.files:
            self.removed[str(path)] = self.files.pop(str(path))

    def sweep(self, folder: Path) -> None:
        pass  # temporary files are below this model; tests/edge/test_outbox.py has them

    def remove_tree(self, folder: Path) -> None:
        for name in [name for name in self.files if name.startswith(f"{folder}/")]:
            del self.files[name]
            self.scratch.discard(name)

    def rename(self, path: Path, new: Path) -> None:
        data = self.read(path)
        self.remove(path)
        self._put(str(new), data)
        if str(path) in self.unsynced:
            self.unsynced[str(new)] = self.unsynced.pop(str(path))

    def crash(self) -> None:
        rng = self._world.rng
        for name, length in self.unsynced.items():
            if name in self.files:
                self.files[name] = self.files[name][: rng.randint(length, len(self.files[name]))]
        for name in sorted(self.scratch):
            self._put(name, rng.choice([None, self.files[name], self.files[name][:-1]]))
        for name, data in self.removed.items():
            if name not in self.files and rng.random() < 0.5:
                self.files[name] = data
        self.scratch, self.removed, self.unsynced = set(), {}, {}

    def _put(self, name: str, data: bytes | None) -> None:
        if data is None:
            self.files.pop(name, None)
        else:
            self.files[name] = data

    def _require_space(self, name: str) -> None:
        if self.full:
            raise StorageError(f"cannot write {name} (No space left on device)")


class SimulatedDatabase:
    """SQLite in memory: what was committed survives a crash, an open transaction does not."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._new_model = self._new_end = False
        self.real = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)

    def execute(self, statement: str, values: Any = ()) -> Any:
        if statement == "COMMIT":
            self._world.step("before commit")
            if self._world.disk.full:
                raise sqlite3.OperationalError("database or disk is full")
            result = self.real.execute(statement)
            if self._new_model:
                self._new_model = False
                self._world.check_ledger()
            if self._new_end:
                self._new_end = False
                self._world.check_evaluations()
            self._world.step("after commit")
            return result
        if statement.startswith("INSERT OR REPLACE INTO checkpoints"):
            self._new_model = True
        if statement.startswith("UPDATE rounds SET phase = ?, reason"):
            self._new_end = True
        return self.real.execute(statement, values)

    def executemany(self, statement: str, rows: Any) -> Any:
        return self.real.executemany(statement, rows)

    @property
    def in_transaction(self) -> bool:
        return self.real.in_transaction

    @property
    def total_changes(self) -> int:
        return self.real.total_changes

    def crash(self) -> None:
        if self.real.in_transaction:
            self.real.execute("ROLLBACK")

    def close(self) -> None:
        pass


class SimulatedClock(Clock):
    def __init__(self, world: World) -> None:
        self._world = world

    def monotonic_s(self) -> float:
        return self._world.now

    def unix_ms(self) -> int:
        return int((1_000_000 + self._world.now + self._world.clock_offset_s) * 1000)


@dataclass(frozen=True)
class Outcome:
    parameters: Any
    verdicts: list[records.DeviceVerdict]
    measurements: dict[str, float] = field(default_factory=dict)


class LedgerEngine:
    """Adds the honest updates up. Its state counts the rounds: it must be as old as the model."""

    num_byzantine = 1
    expects_copies = False

    def __init__(self, world: World, run: str) -> None:
        self._world, self._run, self.count = world, run, 0

    def aggregate(self, parameters: Any, screened: Any) -> Outcome:
        verdicts = []
        result = parameters.copy()
        for row, device_id in enumerate(screened.device_ids):
            if device_id == HOSTILE:
                verdicts.append(records.DeviceVerdict(device_id, records.REJECTED, "hostile"))
                continue
            result += screened.updates[row]
            verdicts.append(records.DeviceVerdict(device_id, records.ACCEPTED))
        for device_id, reason in screened.reasons.items():
            verdicts.append(records.DeviceVerdict(device_id, records.REJECTED, reason))
        if sum(verdict.status == records.ACCEPTED for verdict in verdicts) < 1:
            raise RuleError("no honest update")
        self._world.about_to_aggregate(screened, self._run, self.count)
        self.count += 1
        return Outcome(result, verdicts)

    def saved_state(self) -> bytes:
        return b"%d" % self.count

    def load_state(self, data: bytes) -> bool:
        self.count = int(data)
        return True


class SimulatedFleet:
    """The coordinator's side of the broker; as `fleet.Fleet`, without seals."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._presence: dict[str, bool] = {}
        self.blobs: dict[bytes, bytes] = {}
        self.round: Invitation | RoundClosed | None = None
        self.inbox: list[FromFleet] = [FromFleet(name, Presence(up, 1)) for name, up in world.retained_presence.items()]

    def known(self) -> list[str]:
        return sorted((*HONEST, HOSTILE))

    def online(self) -> list[str]:
        return sorted(name for name, up in self._presence.items() if up)

    def capabilities(self, device_id: str) -> tuple[str, ...]:
        return device.CAPABILITIES

    def send(self, device_id: str, message: Any) -> None:
        self._world.step("send")
        self._world.coordinator_says(device_id, message)

    def publish_round(self, message: Invitation | RoundClosed, in_use: Any = ()) -> None:
        self._world.step("publish round")
        self.round = message
        self._world.coordinator_publishes(message)

    def publish_blob(self, data: bytes) -> BlobRef:
        self._world.step("publish blob")
        ref = blob_ref(data, CHUNK_BYTES)
        self.blobs[ref.sha256] = data
        self._world.retained_blobs.add(ref.sha256)
        return ref

    def clear_blob(self, sha256: bytes) -> None:
        self._world.step("clear blob")
        del self.blobs[sha256]
        self._world.retained_blobs.discard(sha256)

    def next(self, timeout_s: float) -> FromFleet | None:
        """Time passes here: everything else in the world happens meanwhile. It may sleep longer than asked."""
        self._world.step("wait")
        if timeout_s == 0.0:
            return self._taken() if self.inbox else None
        self._world.check_time()
        if self._world.troubled and self._world.rng.random() < self._world.trouble.busy:
            self._world.sleep(self._world.rng.uniform(0.0, 2.0))  # the coordinator was: several messages wait for it
        end = self._world.now + timeout_s
        while not self.inbox:
            if self._world.next_event_at() > end:
                self._world.now = min(self._world.next_event_at(), end + 0.5)
                return None
            self._world.run_next_event()
        return self._taken()

    def _taken(self) -> FromFleet:
        received = self.inbox.pop(0)
        if isinstance(received.message, Presence):
            self._presence[received.device_id] = received.message.online
        return received

    def restore(self) -> None:
        """The broker came back without a memory: as Fleet does, publish everything again."""
        self._world.retained_blobs.update(self.blobs)
        if self.round is not None:
            self._world.coordinator_publishes(self.round)


class SimulatedDevice:
    """A device with a disk. It is what the performer finds around it."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.disk = SimulatedDisk(world, self.step)
        self.on = self.connected = False
        self.starts = self.work = 0
        self.trained = 0
        self.released: set[str] = set()  # rounds whose update it may forget
        self.heard: dict[str, str] = {}
        self.performer: Performer

    # --- life

    def start(self) -> None:
        self.starts += 1
        self.on = True
        machine = device.DeviceMachine(self.name)
        ledger = self.world.privacy_ledger(self)
        sent = self.world.sent_log(self)
        self.performer = Performer(machine, CheckedOutbox(self), self, lambda: self.world.now, ledger, sent)
        self.run(self.performer.start)
        self.later(0.1, self.connect)
        self.later(1.0, self.tick)

    def connect(self) -> None:
        if self.world.broker_up and not self.connected:
            self.connected = True
            self.world.presence(self.name, True)
            self.run(lambda: self.performer.handle(device.Connected()))
            if self.world.retained_round is not None and self.on:
                self.world.deliver(self.name, self.world.retained_round)
        elif not self.connected:
            self.later(1.0, self.connect)

    def disconnect(self) -> None:
        if self.connected:
            self.connected = False
            self.world.presence(self.name, False)
            if self.on:
                self.later(self.world.rng.uniform(0.5, 5.0), self.connect)

    def tick(self) -> None:
        self.run(lambda: self.performer.handle(device.Tick()))
        if self.on:
            self.later(1.0, self.tick)

    def receive(self, message: Any) -> None:
        if self.on and self.connected:
            self.world.log(self.name, "hears", message)
            if isinstance(message, Verdict) or (isinstance(message, Receipt) and not message.kept):
                self.released.add(message.round_id)
                self.world.seen[f"hears: {type(message).__name__} {message.reason[:23]}"] += 1
            self.run(lambda: self.performer.handle(TO_DEVICE[type(message)](message)))

    def run(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Crash:
            self.world.log(self.name, "crashes")
            self.disk.crash()
            self.on = False
            self.disconnect()
            self.world.at(self.world.rng.uniform(0.2, 8.0), self.start)
        except StorageError:
            self.world.log(self.name, "ends with a storage error")
            self.world.seen["device's disk full"] += 1
            self.on = False
            self.disconnect()
            self.world.at(2.0, self.start)

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Unless it is off or started again by then."""
        starts = self.starts
        self.world.at(delay_s, lambda: action() if self.on and self.starts == starts else None)

    def step(self, what: str) -> None:
        self.disk.full = self.world.troubled and self.world.rng.random() < self.world.trouble.full
        if self.world.troubled and self.world.rng.random() < self.world.trouble.device_crash:
            self.world.log(self.name, "power cut at", what)
            self.world.seen[f"device's power cut: {what.split(' ' + self.name)[0]}"] += 1
            raise Crash

    # --- what the performer uses

    def say(self, message: Any) -> None:
        self.step(f"say {type(message).__name__}")
        if isinstance(message, Offer):
            kept = Outbox(Path(self.name), self.disk).update(message)
            self.world.require(kept is not None, f"{self.name} offers what is not in its outbox", message)
        if self.connected:
            self.world.device_says(self.name, message)

    def conditions(self, invitation: Invitation) -> device.ConditionsChecked:
        willing = self.world.rng.random() > 0.03
        return device.ConditionsChecked(invitation.round_id, willing, "" if willing else "on battery")

    def fetch(self, blobs: tuple[BlobRef, ...]) -> None:
        work = self.work

        def look() -> None:
            if work != self.work:
                return
            if self.connected and all(ref.sha256 in self.world.retained_blobs for ref in blobs):
                for ref in blobs:
                    self.run(lambda ref=ref: self.performer.handle(device.BlobReady(ref.sha256)))  # type: ignore[misc]
            else:
                self.later(1.0, look)

        self.later(self.world.rng.uniform(0.1, 1.0), look)

    def train(self, invitation: Invitation) -> None:
        work = self.work

        def done() -> None:
            if work != self.work:
                return
            if invitation.plan.evaluate:
                event: device.Event = self.trained_on(invitation, self.world.new_metrics(self.name, invitation))
            elif self.trained >= SLOTS:
                event = device.TrainingFailed(invitation.round_id, "no slot is left")
            else:
                update = self.world.new_update(self.name, self.trained, invitation)
                self.trained += 1
                event = self.trained_on(invitation, update)
            self.run(lambda: self.performer.handle(event))

        self.later(self.world.rng.uniform(0.3, 3.0), done)

    def trained_on(self, invitation: Invitation, update: bytes) -> device.Trained:
        return device.Trained(invitation.round_id, update, 1 if invitation.encryption_key else NUM_EXAMPLES)

    def stop_working(self) -> None:
        self.work += 1


class CheckedOutbox(Outbox):
    """The production outbox, watched: nothing leaves it without a verdict, a refusal, or a loss that was reported."""

    def __init__(self, owner: SimulatedDevice) -> None:
        super().__init__(Path(owner.name), owner.disk)
        self._owner = owner

    def forget(self, round_id: str) -> None:
        owed = self._owner.performer.machine.owed
        allowed = (
            round_id in self._owner.released
            or len(owed) >= device.MAX_OWED - 1
            or f"{self._owner.name}/outbox/{round_id}.msgpack" not in self._owner.disk.files
        )
        self._owner.world.require(allowed, f"{self._owner.name} forgets {round_id} without a verdict")
        super().forget(round_id)


@dataclass
class World:
    """One seed's world. `run` raises Broken, with the trace, where an invariant does not hold."""

    seed: int
    now: float = 0.0
    clock_offset_s: float = 0.0
    broker_up: bool = True
    troubled: bool = True
    trace: list[tuple[Any, ...]] = field(default_factory=list)
    retained_blobs: set[bytes] = field(default_factory=set)
    retained_round: Invitation | RoundClosed | None = None
    retained_presence: dict[str, bool] = field(default_factory=dict)
    slots: dict[int, tuple[str, str, str]] = field(default_factory=dict)  # slot -> device, round, sha256
    acknowledged: set[tuple[str, str, str]] = field(default_factory=set)  # device, round, sha256
    told: dict[tuple[str, str], Verdict] = field(default_factory=dict)
    decided: dict[str, frozenset[str]] = field(default_factory=dict)
    excused: dict[str, tuple[str, int]] = field(
        default_factory=dict
    )  # device -> round, and which start of it excused itself
    uptime: dict[str, float] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)
    crashes: int = 0
    seen: Counter[str] = field(default_factory=Counter)  # what happened how often, so that a test can ask for it

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.trouble = Trouble.drawn(self.rng)
        self.kind = self.rng.choice(list(KINDS))
        self.encrypted = self.seed % 3 == 0
        self.configs = {run: self._varied(config) for run, config in self.planned.items()}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._counter = 0
        self._last_check = 0.0
        self.databases = {run: SimulatedDatabase(self) for run in self.configs}
        self.disk = SimulatedDisk(self, self.step)
        self.fleet: SimulatedFleet | None = None
        self.devices = {name: SimulatedDevice(self, name) for name in HONEST}
        self.orders = Orders(Path("no folder"))  # of the first run
        self.entropy = random.Random(f"keys {self.seed}").randbytes
        self.openable: set[str] = set()  # what the hostile device has encrypted rightly
        self.rounds = next(iter(self.configs.values())).rounds  # of each run, that are published at the end

    def _varied(self, config: CoordinatorConfig) -> CoordinatorConfig:
        settings = KINDS[self.kind]
        rounds = config.rounds * (2 if "max_staleness" in settings else 1)
        wire = ENCRYPTED if self.encrypted else config.wire
        return replace(config, rounds=rounds, round=replace(config.round, **settings), wire=wire)

    # --- the whole run

    def revoked(self) -> Mapping[str, str]:
        return {}

    planned: ClassVar[Mapping[str, CoordinatorConfig]] = {"run": CONFIG}  # by run; each has its own store

    def orders_of(self, run: str) -> Orders:
        return self.orders if run == next(iter(self.configs)) else Orders(Path("no folder"))

    def privacy_ledger(self, owner: SimulatedDevice) -> Counts:
        """What counts the updates of this device, new for every start of it."""
        return UNCOUNTED

    def sent_log(self, owner: SimulatedDevice) -> Sent:
        """What writes down what leaves this device, new for every start of it."""
        return UNLOGGED

    def own_training(self) -> OwnTraining:
        """What makes the coordinator's own updates, new for every start of it."""
        return NO_TRAINING

    def task(self, coordinator: Coordinator, config: CoordinatorConfig) -> Task:
        work = Work(config, BUNDLE, np.zeros(D, np.float32))
        engine = LedgerEngine(self, config.run)
        return Task(coordinator, engine, work, lambda line: None, self.orders_of(config.run))

    def rounds_of(self, run: str) -> int:
        return self.rounds

    def is_over(self) -> bool:
        """Whether the run has ended without all its rounds, as it should."""
        return False

    def run(self) -> World:
        logger = logging.getLogger("covey")
        before = logger.level
        logger.setLevel(logging.CRITICAL)  # what happens is in the trace
        try:
            return self._run()
        finally:
            logger.setLevel(before)

    def _run(self) -> World:
        for one in self.devices.values():
            one.start()
        self.at(1.0, self.hostile)
        self.at(1.0, self.mischief)
        finished = False
        while not finished:
            finished = (
                self.coordinate(
                    lambda coordinators: run_tasks(
                        [self.task(one, config) for one, config in zip(coordinators, self.configs.values())]
                    )
                )
                or self.is_over()
            )
        self.calm()
        # who was away asks what became of its update
        self.coordinate(
            lambda coordinators: coordinators[0].attend(70.0, lambda: not any(map(_owes, self.devices.values())))
        )
        self.check_end()
        for database in self.databases.values():
            database.real.close()
        return self

    def coordinate(self, program: Callable[[list[Coordinator]], Any]) -> bool:
        """One start of the coordinator; False where it ended badly. Then some time passes without one."""
        if self.now > TROUBLE_S:
            self.calm()
        self.require(self.now < PATIENCE_S, "starts again and again")
        self.log("coordinator", "starts")
        self.fleet = SimulatedFleet(self)
        good = False
        try:
            stores = {
                run: RunStore(Path(run), disk=self.disk, database=database) for run, database in self.databases.items()
            }
            clock, common = SimulatedClock(self), Common(stores)
            coordinators = [
                Coordinator(
                    self.fleet,
                    store,
                    leave_open=True,
                    clock=clock,
                    aborted=self.orders_of(run).abort_reason,
                    revoked=self.revoked,
                    entropy=self.entropy,
                    common=common,
                    own=self.own_training(),
                )
                for run, store in stores.items()
            ]
            program(coordinators)
            good = True
        except Crash:
            self.crashes += 1
            self.log("coordinator", "crashes")
            self.disk.crash()
            for database in self.databases.values():
                database.crash()
        except CoveyError as exc:
            self.log("coordinator", "ends", exc)
            self.seen[f"ends: {type(exc).__name__}"] += 1
        self.check_store()
        self.fleet = None
        if self.troubled and self.rng.random() < self.trouble.clock:
            self.clock_offset_s = self.rng.uniform(-3000.0, 3000.0)
            self.log("coordinator", "clock is off by", self.clock_offset_s)
        for round_id in self.restarts:
            self.restarts[round_id] += 1
        if not good:
            self.sleep(self.rng.choice([0.1, 1.0, 5.0, 15.0]))
        return good

    def sleep(self, seconds: float) -> None:
        end = self.now + seconds
        while self.next_event_at() <= end:
            self.run_next_event()
        self.now = end

    def calm(self) -> None:
        if self.troubled:
            self.log("world", "is calm from here on")
        self.troubled = False
        self.disk.full = False

    # --- time

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        self._counter += 1
        heapq.heappush(self._events, (self.now + delay_s, self._counter, action))

    def next_event_at(self) -> float:
        return self._events[0][0] if self._events else float("inf")

    def run_next_event(self) -> None:
        when, _, action = heapq.heappop(self._events)
        self.now = max(self.now, when)
        action()

    def check_time(self) -> None:
        """Rounds end, and so does the run."""
        if self.troubled and self.now > TROUBLE_S:
            self.calm()
        self.require(self.now < PATIENCE_S, f"{self.rounds} rounds are not published after {PATIENCE_S} s")
        passed, self._last_check = self.now - self._last_check, self.now
        current = self.fleet.round if self.fleet is not None else None
        if isinstance(current, Invitation) and passed < 5.0:
            round_id = current.round_id
            self.restarts.setdefault(round_id, 0)
            self.uptime[round_id] = self.uptime.get(round_id, 0.0) + passed
            bound = DURATION_S + 3.0 + 5.5 * self.restarts[round_id]
            # what a restart may cost: the time since it was last kept, where the clock jumped back
            limit = min(bound, DURATION_S + 30.0)
            self.require(self.uptime[round_id] < limit, f"round {round_id} does not end")

    # --- trouble

    def step(self, what: str) -> None:
        """Before every effect of the coordinator."""
        if not self.troubled:
            return
        if self.rng.random() < (0.05 if self.disk.full else self.trouble.full):
            self.disk.full = not self.disk.full
        # most steps only wait: crash more often between effects, where it matters
        if self.rng.random() < self.trouble.crash * (0.3 if what == "wait" else 3.0):
            self.log("coordinator", "power cut at", what)
            self.seen[f"power cut: {what.split(' run/')[0].split(' of ')[0]}"] += 1
            raise Crash

    def mischief(self) -> None:
        """Connections break; the broker restarts and forgets; whole parts of the fleet are cut off."""
        if not self.troubled:
            return
        if self.rng.random() < 0.1:
            for one in self.rng.sample(list(self.devices.values()), self.rng.choice([1, 1, 2, 3])):
                self.log(one.name, "loses its connection")
                one.disconnect()
        if self.rng.random() < self.trouble.broker:
            self.broker_restarts()
        self.at(1.0, self.mischief)

    def broker_restarts(self) -> None:
        self.log("broker", "restarts and forgets")
        self.broker_up = False
        self.retained_blobs.clear()
        self.retained_round = None
        for one in self.devices.values():
            one.disconnect()

        def back() -> None:
            self.broker_up = True
            if self.fleet is not None:
                self.fleet.restore()

        self.at(self.rng.uniform(0.5, 3.0), back)

    def hostile(self) -> None:
        """A device of the roster that says anything."""
        if self.retained_presence.get(HOSTILE) is None or self.rng.random() < 0.05:
            self.presence(HOSTILE, self.rng.random() < 0.8)
        if isinstance(self.retained_round, Invitation):
            for message in self._nonsense(self.retained_round):
                self.device_says(HOSTILE, message)
        self.at(self.rng.uniform(0.2, 2.0), self.hostile)

    def _nonsense(self, invitation: Invitation) -> list[Any]:
        rng = self.rng
        round_id = rng.choice([invitation.round_id, invitation.round_id, "run.0.0", "another"])
        size = 4 * D + (ENCRYPTION_BYTES if self.encrypted else 0)
        data = bytes([rng.randrange(1, 4)]) * rng.choice([size, size, 8])
        if self.encrypted and rng.random() < 0.3:  # it can encrypt, too
            data = encrypted(invitation, HOSTILE, data[: 4 * D].ljust(4 * D, b"x"), 2**53, {}, self.entropy)
            self.openable.add(hashlib.sha256(data).hexdigest())
        ref = blob_ref(data, CHUNK_BYTES)
        sha256 = rng.choice(
            [ref.sha256, bytes(32), *(bytes.fromhex(sha) for _, _, sha in list(self.slots.values())[-2:])]
        )
        index = rng.randrange(ref.num_chunks)
        honest = data[index * CHUNK_BYTES :][: ref.chunk_size(index)]
        if rng.random() < 0.2:  # a whole upload, true to its hash or not
            wrong = rng.random() < 0.5
            pieces = [bytes(ref.chunk_size(one)) if wrong else piece for one, piece in chunks(data, ref)]
            sent = [Chunk(round_id, ref.sha256, one, piece) for one, piece in enumerate(pieces)]
            return [Offer(round_id, ref, 3), *sent]
        return [
            rng.choice(
                [
                    Answer(round_id, rng.random() < 0.7),
                    Offer(round_id, BlobRef(sha256, len(data), CHUNK_BYTES), rng.choice([1, 2**53])),
                    Offer(round_id, ref, 3),
                    Chunk(round_id, rng.choice([ref.sha256, sha256]), index, honest),
                    Chunk(
                        round_id, rng.choice([ref.sha256, sha256]), index, bytes(rng.choice([ref.chunk_size(index), 5]))
                    ),
                    Chunk(round_id, ref.sha256, index, honest),
                    Failure(round_id, "nonsense") if rng.random() < 0.1 else Seen(round_id),
                    Seen(round_id),
                ]
            )
        ]

    # --- the broker

    def _fly(self, action: Callable[[], None]) -> None:
        copies = 1
        if self.troubled:
            copies = 0 if self.rng.random() < self.trouble.drop else 2 if self.rng.random() < self.trouble.repeat else 1
        for _ in range(copies):
            self.at(self.rng.expovariate(1 / self.trouble.delay_s) if self.troubled else 0.05, action)

    def deliver(self, name: str, message: Any) -> None:
        if name in self.devices and self.broker_up:
            self._fly(lambda: self.devices[name].receive(message))

    def device_says(self, name: str, message: Any) -> None:
        self.log(name, "says", message)
        if self.encrypted and name in HONEST and isinstance(message, Offer):
            self.require(message.num_examples == 1 and not message.metrics, "an offer says what is to be hidden")
        declines = isinstance(message, Answer) and not message.accept
        if name in self.devices and (declines or isinstance(message, Failure)):
            self.excused[name] = (message.round_id, self.devices[name].starts)
        elif isinstance(message, Answer):
            self.excused.pop(name, None)  # it joins, perhaps later than it declined
        if self.broker_up:
            self._fly(lambda: self._to_coordinator(name, message))

    def _to_coordinator(self, name: str, message: Any) -> None:
        if self.fleet is not None:
            self.fleet.inbox.append(FromFleet(name, message))

    def presence(self, name: str, online: bool) -> None:
        self.retained_presence[name] = online
        self._to_coordinator(name, Presence(online, 1))

    def coordinator_publishes(self, message: Invitation | RoundClosed) -> None:
        self.log("coordinator", "publishes", message)
        if isinstance(message, Invitation):
            phase = self._one("SELECT phase FROM rounds WHERE id = ?", message.round_id)
            self.require(phase is not None and phase[0] in ("inviting", "aggregating"), "invites to a closed round")
            if message.encryption_key:
                self.require(self._has_key(message), "invites with a key that is not durable", message)
        if self.broker_up:
            self.retained_round = message
            for name in self.devices:
                self.deliver(name, message)
                self._expect_excuse(name, message)

    def _expect_excuse(self, name: str, message: Invitation | RoundClosed) -> None:
        """A coordinator that starts again hears again who takes no part, and does not wait for it."""
        one, fleet = self.devices[name], self.fleet
        starts = one.starts
        if self.troubled or not one.connected or self.excused.get(name) != (message.round_id, starts):
            return

        def look() -> None:
            still = self.excused.get(name) == (message.round_id, starts)
            if still and one.on and one.starts == starts and self.fleet is fleet:
                self.seen["excuses itself again"] += 1
                query = "SELECT d.progress, r.phase FROM devices d JOIN rounds r ON r.id = d.round"
                progress, phase = self._one(f"{query} WHERE d.round = ? AND d.id = ?", message.round_id, name)
                known = progress not in ("invited", "accepted", "uploading") or phase in ("published", "abandoned")
                self.require(known, f"{name} excused itself from {message.round_id}, which is not heard")

        self.at(1.0, look)

    def coordinator_says(self, name: str, message: Any) -> None:
        """Here the coordinator's words are held against what is durable."""
        self.log("coordinator", f"tells {name}", message)
        if isinstance(message, Receipt):
            word = (name, message.round_id, message.sha256.hex())
            if message.kept:
                self.require(self._is_durable(*word), "acknowledges what is not durable", word)
                nonsense = self.encrypted and name == HOSTILE and message.sha256.hex() not in self.openable
                self.require(not nonsense, "acknowledges what does not decrypt", word)
                self.acknowledged.add(word)
            else:
                self.require(word not in self.acknowledged, "refuses what it acknowledged", word)
                self.require(bool(message.reason), "refuses without a reason", word)
        elif isinstance(message, Verdict):
            self.require(
                self._verdict(message.round_id, name) == message.status, "a verdict that is not durable", message
            )
            before = self.told.setdefault((name, message.round_id), message)
            self.require(before == message, "two verdicts on one update", before, message)
        self.deliver(name, message)

    # --- training

    def new_update(self, name: str, number: int, invitation: Invitation) -> bytes:
        slot = HONEST.index(name) * SLOTS + number
        update = np.zeros(D, "<f4")
        update[slot] = 1.0
        data = update.tobytes()
        if invitation.encryption_key:
            data = encrypted(invitation, name, data, NUM_EXAMPLES, {"loss": 0.5}, self.entropy)
        self.slots[slot] = (name, invitation.round_id, hashlib.sha256(data).hexdigest())
        return data

    def new_metrics(self, name: str, invitation: Invitation) -> bytes:
        data = np.array([self.rng.uniform(0.0, 3.0), self.rng.uniform(0.0, 1.0)], "<f4").tobytes()
        if invitation.encryption_key:
            return encrypted(invitation, name, data, NUM_EXAMPLES, {}, self.entropy)
        return data

    # --- invariants

    def require(self, holds: bool, what: str, *more: Any) -> None:
        if not holds:
            raise Broken(what, *more)

    def about_to_aggregate(self, screened: Any, run: str, count: int) -> None:
        round_id = self._one("SELECT id FROM rounds WHERE phase = 'aggregating'")
        self.require(round_id is not None, "aggregates before the decision is durable")
        self.require(run_of(round_id[0]) == run, "the engine of another task")
        names = frozenset(screened.device_ids) | frozenset(screened.reasons)
        self.seen["aggregated again after a crash"] += round_id[0] in self.decided
        goal = self.configs[run].round.goal
        self.require(goal == 0 or len(names) <= goal, "more updates than the goal", names)
        before = self.decided.setdefault(round_id[0], names)
        self.require(before == names, "another set of updates for a round that was decided", before, names)
        said = dict(zip(screened.device_ids, screened.num_examples))
        wrong = [name for name, count in said.items() if name in HONEST and count != NUM_EXAMPLES]
        self.require(not wrong, "the rule hears another number of examples than the device said", wrong)
        newest = self._all("SELECT max(number) FROM checkpoints", run=run)[0][0] or 0
        self.require(count == newest, f"an engine that has seen {count} rounds with the model of round {newest}")

    def check_ledger(self) -> None:
        """The newest model of each run counts each of its accepted updates once, and no other."""
        for run in self.configs:
            for row in self._all("SELECT number, parameters FROM checkpoints ORDER BY number DESC LIMIT 1", run=run):
                self._check_model(run, *row)

    def _check_model(self, run: str, number: int, sha256: str) -> None:
        data = self.disk.files.get(f"{run}/checkpoints/{run}/round-{number:05d}.f32")
        self.require(data is not None and hashlib.sha256(data).hexdigest() == sha256, "a checkpoint without its file")
        ledger = self.ledger_of(run, number, np.frombuffer(data or b"", "<f4"))
        accepted = {tuple(word): stale for *word, stale in self._all(f"{STORED} AND status = 'accepted'", run=run)}
        trained = self._all("SELECT kind FROM checkpoints JOIN rounds ON rounds.id = round", run=run)
        self.require(set(trained) == {("training",)}, "a checkpoint of an evaluation", trained)
        for slot, word in self.slots.items():
            weight = np.float32(staleness_weight(accepted[word])) if word in accepted else 0.0
            self.require(ledger[slot] == weight, "model and verdict disagree", word, ledger[slot], weight)

    def ledger_of(self, run: str, number: int, model: Any) -> Any:
        """What the model of this checkpoint counts, and what waits beside it."""
        return model

    def check_evaluations(self) -> None:
        """A published evaluation has its numbers, from the devices whose metrics were accepted; no other has any."""
        ended = "SELECT id, number, phase, run FROM rounds WHERE kind = 'evaluation'"
        numbers = Counter()
        for round_id, number, phase, run in self._all(ended):
            numbers[run, number] += 1
            rows = self._all("SELECT metric, median, devices FROM evaluations WHERE round = ?", round_id)
            self.require(len(rows) == (2 if phase == "published" else 0), "metrics without their round's end", round_id)
            used = self._all("SELECT sha256 FROM devices WHERE round = ? AND status = 'accepted'", round_id)
            files = [self.disk.files.get(f"{run}/updates/{sha256}.f32") for (sha256,) in used]
            if phase == "published" and None not in files and not self.encrypted:
                medians = np.median([np.frombuffer(data or b"", "<f4") for data in files], axis=0)
                told = {metric: median for metric, median, _ in rows}
                right = np.allclose([told["loss"], told["accuracy"]], medians)
                self.require(right and rows[0][2] == len(used), "other metrics than the devices sent", told, medians)
        self.require(max(numbers.values(), default=1) == 1, "a model was evaluated twice", numbers)

    def check_store(self) -> None:
        """What was acknowledged is on its way, or has a verdict; and nothing grows without end."""
        if min(self._all("PRAGMA user_version"))[0] < len(SCHEMA):
            return
        self.check_evaluations()
        for word in self.acknowledged:
            self.require(self._is_durable(*word), "an acknowledged update is gone", word)
        judged = (
            "SELECT d.id, coalesce(d.origin, d.round), d.sha256, d.status, d.why"
            " FROM devices d JOIN rounds r ON r.id = d.round"
        )
        for *word, status, why in self._all(f"{judged} WHERE r.phase IN ('published', 'abandoned')"):
            if tuple(word) in self.acknowledged:
                good = status == "accepted" or (status == "rejected" and bool(why))
                self.require(good, "no verdict, or none with a reason", word, status, why)
        words = [tuple(word[:2]) for word in self._all(STORED)]
        self.require(len(words) == len(set(words)), "an update was taken by two rounds", words)
        stale = self._all(
            "SELECT d.staleness, taker.number - trained.number FROM devices d JOIN rounds taker ON taker.id = d.round"
            " JOIN rounds trained ON trained.id = d.origin"
        )
        right = all(said == is_so <= MOST_STALENESS for said, is_so in stale)
        self.require(right, "the staleness of an update is wrong", stale)
        partial = [name for name in self.disk.files if "/partial/" in name]
        everyone = len(HONEST) + 1
        for run, config in self.configs.items():
            updates = [name for name in self.disk.files if name.startswith(f"{run}/updates/")]
            kinds = 2 if config.evaluation.every else 1
            self.require(len(updates) <= (KEEP_ROUNDS + 2) * everyone * kinds, "updates pile up", len(updates))
        rounds = self._all("SELECT id FROM rounds WHERE phase NOT IN ('published', 'abandoned')")
        self.require(len(rounds) <= 1, "more than one round is open", rounds)
        self.require(len(partial) <= 4 * everyone, "chunks pile up", len(partial))
        keys = [name for name in self.disk.files if name.startswith("run/keys/")]
        self.require(len(keys) <= KEEP_ROUNDS + 2, "keys pile up", len(keys))
        self.require(bool(keys) <= self.encrypted, "a key that nobody asked for", keys)
        for one in self.devices.values():
            self.require(len(one.disk.files) <= device.MAX_OWED + 2, f"{one.name}'s outbox grows")

    def check_end(self) -> None:
        self.check_store()
        self.check_ledger()
        for run in self.configs:
            published = self._all("SELECT count(*) FROM checkpoints", run=run)[0][0]
            self.require(published >= self.rounds_of(run), "not every round is published", run)
        for (stale,) in self._all("SELECT staleness FROM devices WHERE origin IS NOT NULL AND status = 'accepted'"):
            self.seen[f"accepted late, staleness {stale}"] += 1
        for word in self.acknowledged:
            self.require(self._verdict(word[1], word[0]) in ("accepted", "rejected"), "never judged", word)
        for one in self.devices.values():
            left = [name for name in one.disk.files if "/outbox/" in name]
            self.require(one.performer.machine.owed == () and not left, f"{one.name} never hears", left)

    def _is_durable(self, name: str, round_id: str, sha256: str) -> bool:
        row = self._one(
            "SELECT offer FROM devices WHERE coalesce(origin, round) = ? AND id = ? AND sha256 = ?",
            round_id,
            name,
            sha256,
        )
        path = f"{run_of(round_id)}/updates/{sha256}.f32"
        over = self._verdict(round_id, name) is not None  # then the file may have gone after KEEP_ROUNDS
        data = self.disk.files.get(path)
        whole = data is not None and path not in self.disk.scratch and hashlib.sha256(data).hexdigest() == sha256
        busy = any(database.in_transaction for database in self.databases.values())
        return row is not None and not busy and (whole or over)

    def _has_key(self, invitation: Invitation) -> bool:
        path = f"{run_of(invitation.round_id)}/keys/{invitation.round_id}.x25519"
        data = self.disk.files.get(path)
        right = data is not None and KeyPair.of(data).public == invitation.encryption_key
        return right and path not in self.disk.scratch

    def _verdict(self, round_id: str, name: str) -> str | None:
        row = self._one(
            "SELECT status FROM devices WHERE coalesce(origin, round) = ? AND id = ? AND sha256 IS NOT NULL",
            round_id,
            name,
        )
        return row[0] if row is not None else None

    def _one(self, query: str, *values: Any) -> Any:
        return next(iter(self._all(query, *values)), None)

    def _all(self, query: str, *values: Any, run: str | None = None) -> list[Any]:
        """Of this run's database, or of all."""
        chosen = self.databases.values() if run is None else [self.databases[run]]
        return [row for database in chosen for row in database.real.execute(query, values)]

    # --- telling

    def log(self, who: str, what: str, *more: Any) -> None:
        self.trace.append((self.now, who, what, more))

    def story(self, last: int = 60) -> str:
        """The end of the trace, in words."""
        lines = [
            f"{now:8.2f}  {who:12}{what} {' '.join(_short(one) for one in more)}" for now, who, what, more in self.trace
        ]
        return "\n".join([f"seed {self.seed}, {self.trouble}", *lines[-last:]])


def _owes(one: SimulatedDevice) -> bool:
    return not one.on or bool(one.performer.machine.owed)


def _short(value: Any) -> str:
    if isinstance(value, (Invitation, RoundClosed)):
        return f"{type(value).__name__} {value.round_id}"
    if isinstance(value, Offer):
        return f"Offer {value.round_id} {value.update.sha256.hex()[:8]}"
    if isinstance(value, Chunk):
        return f"Chunk {value.round_id} {value.sha256.hex()[:8]} {value.index}"
    return str(value)[:200]


def breaks(kind: type[World], seed: int) -> bool:
    """Whether this world breaks an invariant: with a bug planted, one that does has found it."""
    try:
        kind(seed).run()
    except Broken:
        return True
    return False
