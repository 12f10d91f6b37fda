"""The agent: joins one device machine, one MQTT connection, one training child and the disk.

One loop in one thread takes everything from one inbox: what the broker brings, what the child answers, and time. All
decisions are the machine's (covey_protocol.device), and `performer` performs its effects with what this file gives it.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import logging
import os
import platform
import queue
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Optional, Union

from covey_edge import __version__
from covey_edge.cache import BlobCache
from covey_edge.conditions import FETCHING, TRAINING, Conditions, Sensors
from covey_edge.config import Agent
from covey_edge.data_report import DataReport
from covey_edge.fetching import Fetching
from covey_edge.files import DISK, told_of
from covey_edge.forgetting import sweep
from covey_edge.frames import SUSPECTED, SUSPECTED_TOLD, Done, Frame, Open, Probe, Problem, Run
from covey_edge.inbox import Inbox
from covey_edge.leak_told import STOPPED, TOLD
from covey_edge.ledger import Ledger
from covey_edge.local_socket import LocalSocket, Question, Request, StateLock
from covey_edge.mqtt import ConnectionDown, ConnectionUp, Incoming, MqttTransport, Refused
from covey_edge.mqtt_reasons import certificate_end
from covey_edge.opting_out import LEFT, OptOut
from covey_edge.outbox import NumberFile, Outbox
from covey_edge.performer import Performer
from covey_edge.personal_agent import Personal
from covey_edge.policy import data_for, places, unpinned, unwilling
from covey_edge.reading import Reading
from covey_edge.records_kept import RecordFolder
from covey_edge.retired import RetiredKeys
from covey_edge.sent_log import SentLog, contents
from covey_edge.service import Notifier
from covey_edge.status import Privacy, Status, doing, last_lines, resident_mb
from covey_edge.training_process import TrainingProcess
from covey_edge.watch import Order, Watch
from covey_edge.withheld import NO_WITHHELD_NOISE, WithheldFile, withholds
from covey_protocol import codec, device, errors
from covey_protocol.captures import with_consent
from covey_protocol.codec import CHUNK_ROOM_BYTES, COORDINATOR, Sequence
from covey_protocol.encryption import encrypted, refusal
from covey_protocol.forms import NONE, WITHHOLDING
from covey_protocol.keys import KeyRing
from covey_protocol.messages import (
    BlobRef,
    FromDevice,
    Invitation,
    Need,
    Offer,
    Presence,
    Receipt,
    RoundClosed,
    TrainingPlan,
    Verdict,
)
from covey_protocol.topics import Topics

if TYPE_CHECKING:
    from covey_edge.updates import Updates

log = logging.getLogger("covey.agent")

TICK_S = 1.0
PROBE_TIMEOUT_S = 120.0
FETCH_RETRY_S, FETCH_RETRY_MOST_S = 10.0, 160.0  # doubled each time: a broker that is behind must not send twice
STEPS = {device.State.FETCHING: FETCHING, device.State.TRAINING: TRAINING}  # at which conditions are watched
UNTOLD = "this device cannot use its data as its settings say; its log says why"
OFFER_EXPIRY_S = 30.0  # the machine repeats an offer: while the broker is away only the newest few are kept for it


class AgentProgram:
    """Runs until `stop` is called. `start` connects; `run` loops.

    sections: what other parts add to `report`, by name: values that JSON can hold. answers: what the local socket can
    be asked, beside the status; each takes what was given with the question. Both are called in the loop's thread.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._config = agent.config
        self._inbox = Inbox()
        self._topics = Topics(agent.config.fleet)
        self._machine = device.DeviceMachine(agent.config.device_id)
        self._numbers = NumberFile(agent.state_dir / "sequence")
        self._sequence = Sequence(time.time_ns(), self._numbers.load(), self._numbers.store)
        self._session = self._sequence.next()
        retired = RetiredKeys(agent.state_dir / "retired.json")
        self._keys = KeyRing(agent.coordinators, retired.of(COORDINATOR), retired.retire(COORDINATOR))
        # a bundle and a model for every task, and those before (or the vectors of an algorithm)
        self._cache = BlobCache(agent.state_dir / "blobs", 2 * max(2, len(agent.config.data.tasks)))
        self._ledger = Ledger(agent.state_dir, agent.config.privacy)
        self._sent = SentLog(agent.state_dir, agent.config.privacy)
        self._opt_out = OptOut(agent.state_dir)
        self._performer = Performer(
            self._machine, Outbox(agent.state_dir), self, time.monotonic, self._ledger, self._sent
        )
        self._child = TrainingProcess(
            lambda token, frame: self._inbox.put((token, frame)),
            agent.config.training.memory_mb,
            agent.config.training.nice,
        )
        conditions = Conditions(agent.config.conditions, Sensors(agent.state_dir))
        self._watch = Watch(conditions, time.monotonic, agent.config.training.threads)
        self._waits_for_network = ""  # the round whose update does
        # what was found about the labels lives in the child; finding it again costs more than the child's memory
        data = agent.config.data
        self._debugs = bool(data.debug) or any(task.debug for task in data.tasks.values())
        self._personal = Personal(agent, self._cache, lambda token, frame: self._inbox.put((token, frame)))
        self._runtime, self._problem = "", ""
        self._transport = MqttTransport(
            agent.broker, f"covey-{agent.config.fleet}-{agent.config.device_id}", self._inbox
        )
        self._fetching = Fetching(
            self._cache,
            self._topics,
            self._transport,
            FETCH_RETRY_S,
            FETCH_RETRY_MOST_S,
            time.monotonic,
            paused=lambda: self._watch.paused,
        )
        self._connected = False
        self._stopped = False
        self.service = Notifier()
        self._updates = _updates_for(agent, self._transport)
        self._software = self._about_software()
        self.starts_anew = False  # whether `run` returned for a new release
        self._began = self._working_since = time.monotonic()
        self._connection = "not connected yet"
        self._lock: Optional[StateLock] = None
        self._socket = LocalSocket(agent.state_dir, self._inbox.put)
        self.sections: dict[str, Callable[[], object]] = {"models": self._personal.section}
        self.answers: dict[str, Callable[[dict[str, Any]], object]] = {
            "status": lambda given: self.report(),
            "stop": lambda given: self.stop(),
            "leave": lambda given: self.leave(),
            "join": lambda given: self.join(),
        }
        if self._updates is not None:
            self.sections["update"] = self._updates.facts
        if conditions.asked():
            self.sections["conditions"] = self._watch.report
        own = agent.broker.cert_file
        if own is not None:
            self.sections["certificate"] = lambda: certificate_end(own)[0]

    # --- life

    def start(self) -> None:
        """Check the data, take up what the outbox holds, connect. Raises DataError, TransportError, StorageError, and
        ConfigError where another agent works in this state_dir."""
        self._lock = StateLock(self._agent.state_dir)
        sweep(self._agent.state_dir)
        self._check_data()
        self._performer.start()
        if self._opt_out.since_ms() is not None:
            self._withdraw()
        self._set_will()
        device_id = self._config.device_id
        listens = self._updates.listens if self._updates is not None else []
        self._transport.subscribe([self._topics.round, self._topics.down(device_id), *listens])
        self._transport.connect()
        self._connected = True
        self.service.ready()
        self._socket.open()
        log.info("%s connected to %s as %s", device_id, self._agent.broker, self._config.fleet)

    def run(self) -> None:
        """Loop until `stop`."""
        next_tick = time.monotonic() + TICK_S
        while not self._stopped:
            if self._transport.alive:
                self.service.pet()
            try:
                item = self._inbox.get(timeout=max(0.0, next_tick - time.monotonic()))
            except queue.Empty:
                item = None
            if item is not None:
                self._take(item)
            if time.monotonic() >= next_tick:  # also while messages come without a pause
                next_tick = time.monotonic() + TICK_S
                self._tick()

    def _tick(self) -> None:
        self._handle(device.Tick())
        self._watch_conditions()
        self._fetching.tick()
        self._look_after_ourselves()
        if not self._debugs:
            self._child.rest()
        self._personal.tick(idle=self._machine.state is device.State.IDLE and self._machine.postponed is None)

    def stop(self) -> None:
        """Ask `run` to return (safe from a signal handler)."""
        self._stopped = True
        self._inbox.put(None)

    def close(self) -> None:
        """Say goodbye to the broker and end the child."""
        if not self.starts_anew:
            self.service.stopping()
        self._socket.close()  # nobody answers any more
        if self._connected:
            with contextlib.suppress(errors.TransportError):  # then the last will says it for us
                self._transport.flush([self._publish_presence(online=False)], timeout_s=2.0)
            self._transport.close()
        self._child.stop()
        self._personal.close()
        if self._lock is not None:
            self._lock.close()

    def leave(self) -> None:
        """Opt out, durably: the round under way is given up, what is in the outbox is not delivered."""
        self._opt_out.leave()
        log.info("the owner has opted out: every round is declined")
        self._withdraw()

    def join(self) -> None:
        """Take that back, durably."""
        self._opt_out.join()
        log.info("the owner has opted in: this device takes part from the next round on")

    def _withdraw(self) -> None:
        if self._machine.state in (device.State.FETCHING, device.State.TRAINING):
            self._handle(device.TrainingFailed(self._machine.round_id, LEFT))
        for round_id in self._machine.owed:
            self._handle(device.Lost(round_id, LEFT))

    def report(self) -> Status:
        """What this agent is doing, for its owner."""
        machine, invitation, now = self._machine, self._machine.invitation, time.monotonic()
        return Status(
            device_id=self._config.device_id,
            fleet=self._config.fleet,
            version=__version__,
            state=machine.state.value,
            doing=doing(machine.state, self._opt_out.since_ms(), self._transport.connected),
            outbox=machine.owed,
            broker=str(self._agent.broker),
            left_ms=self._opt_out.since_ms(),
            privacy=Privacy.of(self._ledger, self._config.privacy),
            rounds=last_lines(self._agent.state_dir),
            pid=os.getpid(),
            uptime_s=round(now - self._began, 1),
            connected=self._transport.connected,
            connection=self._connection,
            mqtt=self._transport.protocol,
            runtime=self._runtime,
            round_id=machine.round_id,
            task=invitation.plan.task if invitation is not None else "",
            ends_in_s=round(machine.deadline - now, 1) if invitation is not None else None,
            working_s=round(now - self._working_since, 1) if self._child.busy else None,
            memory_mb=resident_mb(os.getpid()),
            child_memory_mb=resident_mb(self._child.pid),
            sections={name: section() for name, section in self.sections.items()},
            problem=self._problem,
        )

    def _answer(self, request: Request) -> object:
        answer = self.answers.get(request.ask)
        if answer is None:
            close = difflib.get_close_matches(request.ask, self.answers, n=1, cutoff=0.0)
            raise errors.ConfigError(f"the agent cannot be asked {request.ask!r}", f"did you mean {close[0]!r}?")
        return answer(request.given)

    def _look_after_ourselves(self) -> None:
        state = self._machine.state
        if self.service.heard:  # else the opt-out is not looked up
            what = doing(state, self._opt_out.since_ms(), self._transport.connected)
            self.service.status(f"{what} {self._machine.round_id}; {self._connection}")
        if self._updates is None:
            return
        if self._updates.tick(idle=state is device.State.IDLE):
            log.info("starting anew for another release")
            self.starts_anew = True
            self.stop()
        if self._about_software() != self._software:
            self._software = self._about_software()
            self._publish_presence(online=True)

    # --- what comes in

    def _take(
        self, item: Union[Incoming, ConnectionUp, ConnectionDown, Refused, Question, tuple[object, Frame]]
    ) -> None:
        if isinstance(item, Incoming):
            self._take_message(item)
        elif isinstance(item, Question):
            item.reply(self._answer)
        elif isinstance(item, ConnectionUp):
            self._connection = f"connected since {time.strftime('%Y-%m-%d %H:%M:%S')}"
            self._publish_presence(online=True)
            self._handle(device.Connected())
            self._warn_of_certificate()
        elif isinstance(item, ConnectionDown):
            self._connection = f"lost ({item.reason})"
            log.warning("connection to %s lost (%s), trying again", self._agent.broker, item.reason)
        elif isinstance(item, Refused):
            log.error("%s", item.error)
        else:
            self._take_answer(*item)

    def _warn_of_certificate(self) -> None:
        path = self._agent.broker.cert_file
        said, soon = certificate_end(path) if path is not None else ("", False)
        if soon:
            log.warning("%s: %s", path, said)

    def _take_message(self, item: Incoming) -> None:
        blob = self._topics.parse_blob(item.topic)
        try:
            if blob is not None:
                self._take_chunk(blob.sha256, blob.chunk, item.payload)
                if self._updates is not None:
                    self._updates.take_chunk(blob.sha256, blob.chunk, item.payload)
            elif self._updates is not None and item.topic == self._topics.release:
                self._updates.take_description(item.payload)
            elif item.payload:
                taken = self._keys.take(
                    lambda key: codec.decode_from_coordinator(item.payload, topic=item.topic, key=key)
                )
                if self._keys.is_new(taken) and not self._held_back(taken.message):
                    self._handle(_event(taken.message))
        except (errors.PeerError, errors.ReleaseError) as exc:
            log.warning("ignored a message: %s", exc)
        except errors.StorageError as exc:  # a key that cannot be retired for good must not be followed by a newer one
            log.error("ignored a message: %s", exc)

    def _take_chunk(self, sha256: bytes, index: int, payload: bytes) -> None:
        try:
            whole = self._fetching.take(sha256, index, payload)
        except errors.StorageError as exc:
            log.error("%s", exc)
            self._handle(device.TrainingFailed(self._machine.round_id, told_of(exc)))
            return
        if whole:
            self._handle(device.BlobReady(sha256))

    def _take_answer(self, token: object, frame: Frame) -> None:
        if self._personal.takes(token, frame):
            return
        round_id = str(token)
        if round_id != self._machine.round_id:
            return
        if isinstance(frame, Problem):
            problem = f"{frame.what}; {frame.remedy}" if frame.remedy else frame.what
            log.error("round %s: %s", round_id, problem)
            self._problem = f"round {round_id}: {problem}"
            self._keep_found(frame.found, "stopped")
            self._handle(device.TrainingFailed(round_id, self._told(problem, frame)))
        elif isinstance(frame, Done) and not frame.update:
            _tell(frame.report)
            if frame.runtime != self._runtime:
                self._runtime = frame.runtime
                self._publish_presence(online=True)
            self._run_training()
        elif isinstance(frame, Done):
            for warning in frame.warnings:
                log.warning("round %s: %s", round_id, warning)
            done = "evaluated" if self._evaluates() else "trained"
            log.info("round %s: %s on %d examples with %s", round_id, done, frame.num_examples, frame.runtime)
            self._problem = ""
            self._keep_found(frame.found, "teaching")
            self._keep_record(frame.record)
            self._personal.worked(self._machine.invitation)
            self._take_update(round_id, frame)

    def _told(self, problem: str, frame: Problem) -> str:
        """What a Failure says of it. In an encrypted round not how many examples are too few, or how many rows are
        wrong; of a stopped update never what it would have told; of data and settings nothing that names them."""
        kind = frame.kind
        if kind == STOPPED:
            return TOLD
        if kind == SUSPECTED:
            return SUSPECTED_TOLD
        if kind == errors.StorageError.__name__:
            return told_of(errors.StorageError(problem))
        invitation = self._machine.invitation
        hidden = invitation is not None and invitation.encryption_key
        if hidden:
            return f"{kind}; in an encrypted round the reason is in the device's log alone"
        if kind in (errors.DataError.__name__, errors.ConfigError.__name__):
            return frame.told or UNTOLD
        return problem

    def _evaluates(self) -> bool:
        return self._machine.invitation is not None and bool(self._machine.invitation.plan.evaluate)

    def _keep_found(self, found: dict[str, bytes], where: str) -> None:
        """For the owner: what teaching found in the data, or what a stopped update would have told. Nothing waits for
        it, and nothing of it is sent."""
        invitation = self._machine.invitation
        folder = self._agent.state_dir / where / (invitation.plan.task if invitation is not None else "")
        try:
            DISK.write_all({folder / name: data for name, data in found.items()}, mode=0o600)
        except errors.StorageError as exc:
            log.error("%s", exc)

    def _keep_record(self, work: bytes) -> None:
        """What this device did in the round, for the owner. Nothing waits for it, and nothing of it is sent."""
        invitation = self._machine.invitation
        if not work or invitation is None:
            return
        try:
            RecordFolder(self._agent.state_dir / "records").keep(self._agent, invitation, work)
        except errors.StorageError as exc:
            log.error("%s", exc)

    def _take_update(self, round_id: str, frame: Done) -> None:
        """What the update leaves out is durable before the update can be sent, so that nothing is sent twice."""
        invitation = self._machine.invitation
        try:
            if frame.withheld and invitation is not None:
                WithheldFile.of(self._agent.state_dir, invitation).store(invitation, frame.withheld)
            trained = self._trained(round_id, frame, invitation)
        except (errors.StorageError, errors.ConfigError, errors.PeerError) as exc:
            log.error("%s", exc)
            told = told_of(exc) if isinstance(exc, errors.StorageError) else str(exc)
            self._handle(device.TrainingFailed(round_id, told))
            return
        self._handle(trained)

    def _trained(self, round_id: str, frame: Done, invitation: Optional[Invitation]) -> device.Trained:
        metrics = with_consent(frame.metrics, self._config.capture.allow)
        if self._config.capture.allow:
            log.info("round %s: its update may be captured ([capture] allow in agent.toml)", round_id)
        if invitation is None or not invitation.encryption_key:
            return device.Trained(round_id, frame.update, frame.num_examples, metrics)
        data = encrypted(invitation, self._config.device_id, frame.update, frame.num_examples, metrics)
        self._sent.describe(hashlib.sha256(data).digest(), contents(frame.num_examples, metrics))
        return device.Trained(round_id, data, 1)

    # --- what the performer uses

    def say(self, message: FromDevice) -> None:
        if isinstance(message, Offer) and not self._transport.connected:
            return  # the reconnection offers it again; in a long outage the queue would grow
        topic = self._topics.up(self._config.device_id)
        expiry_s = OFFER_EXPIRY_S if isinstance(message, Offer) else None
        try:
            self._transport.publish(topic, self._sealed(message, topic), expiry_s=expiry_s)
        except errors.TransportError as exc:  # larger than the broker takes: the round will fail, the agent lives on
            log.error("%s", exc)

    def conditions(self, invitation: Invitation) -> device.ConditionsChecked:
        """The owner's policy against the coordinator's wishes."""
        plan, training = invitation.plan, self._config.training
        limit, chunk_bytes = self._transport.max_message_bytes, invitation.parameters.chunk_size(0)
        reason = LEFT if self._opt_out.since_ms() is not None else ""
        reason = reason or unwilling(self._config, plan) or unpinned(self._config.policy, invitation.bundle)
        if not reason and self._updates is not None and self._updates.waits:
            reason = "this device is about to start a new release of its agent"
        if reason:
            return device.ConditionsChecked(invitation.round_id, False, reason)
        if plan.epochs > training.max_epochs:
            reason = f"{plan.epochs} epochs are more than this device allows ({training.max_epochs})"
        elif plan.compression not in (NONE, *self._config.wire.compression):
            reason = f"this device does not send updates as {plan.compression} (wire.compression in its agent.toml)"
        elif plan.compression in WITHHOLDING and self._config.privacy.noise_multiplier:
            reason = "; ".join(NO_WITHHELD_NOISE)
        elif limit is not None and chunk_bytes + CHUNK_ROOM_BYTES > limit:
            reason = f"chunks of {chunk_bytes} bytes do not fit this device's broker (messages up to {limit} bytes)"
            reason += "; set a smaller chunk_bytes"
        else:
            reason = refusal(invitation, self._config.privacy.require_encryption) or self._budget(plan)
        if reason:
            return device.ConditionsChecked(invitation.round_id, False, reason)
        reason = self._watch.refusal(self._need_mb(invitation))
        return device.ConditionsChecked(invitation.round_id, not reason, reason, for_now=bool(reason))

    def _need_mb(self, invitation: Invitation) -> float:
        """What of the round is still to be put on the disk."""
        return sum(ref.size for ref in invitation.blobs if not self._cache.has(ref)) / 2**20

    def _budget(self, plan: TrainingPlan) -> str:
        """Why the privacy ledger forbids this round; "" where it does not."""
        try:
            return self._ledger.refusal(evaluates=bool(plan.evaluate))
        except errors.StorageError as exc:
            log.error("%s", exc)
            return "this device's privacy ledger cannot be read"

    def fetch(self, blobs: tuple[BlobRef, ...]) -> None:
        for ref in self._fetching.fetch(blobs):
            self._handle(device.BlobReady(ref.sha256))

    def train(self, invitation: Invitation) -> None:
        data = data_for(self._config.data, invitation.plan)
        assert data is not None  # else the round was declined
        self._personal.interrupt()
        request = Open(
            str(self._cache.path(invitation.bundle.sha256)),
            invitation.bundle.sha256,
            self._agent.coordinators[-1].hex(),
            data.source,
            str(self._agent.folder / data.path) if data.path else "",
            # also a retired key: the invitation, under a key that is not, names the bundle's hash
            tuple(key.hex() for key in self._agent.coordinators[:-1]),
            data.kept_in(self._agent.state_dir),
            self._config.training.threads,
        )
        self._working_since = time.monotonic()
        work = "evaluation" if invitation.plan.evaluate else "training"
        log.info("round %s: all is fetched, %s begins", invitation.round_id, work)
        self._ask_child(invitation.round_id, request)

    def _ask_child(self, round_id: str, request: Frame) -> None:
        self._child.request(round_id, request, self._config.training.timeout_s)
        if self._watch.paused:
            self._child.pause()

    def stop_working(self) -> None:
        self._fetching.stop()
        if self._child.busy:
            self._child.stop()  # it works for a round that is over
        self._watch.over()
        invitation = self._machine.invitation
        self._cache.prune({ref.sha256 for ref in invitation.blobs} if invitation else set())

    # --- conditions

    def _watch_conditions(self) -> None:
        """Pause, go on or give up what is under way, and join a round that was declined for now."""
        machine, now = self._machine, time.monotonic()
        postponed = machine.postponed
        if postponed is not None:
            if self._watch.may_join(lambda: self._need_mb(postponed)):
                self._handle(device.Reconsidered())
        elif machine.invitation is not None and machine.state in STEPS:
            left_s, duration_s = machine.deadline - now, machine.invitation.duration_ms / 1000
            self._obey(self._watch.order(STEPS[machine.state], left_s, duration_s, busy=self._child.busy))
        elif self._watch.paused:  # what was to be paused had just been done
            self._watch.over()
            self._child.go_on()

    def _obey(self, order: Order) -> None:
        round_id = self._machine.round_id
        if order is Order.PAUSE:
            log.info("round %s: paused", round_id)
            self._child.pause()
            self._fetching.pause()
        elif order is Order.GO_ON:
            log.info("round %s: goes on", round_id)
            self._watch.over()
            self._child.go_on()
            self._fetching.go_on()
        elif order is Order.GIVE_UP:
            self._handle(device.TrainingFailed(round_id, self._watch.reason))

    def _held_back(self, message: object) -> bool:
        """Whether the coordinator asks for an update over a network that its owner does not want used. The update stays
        in the outbox and is offered again."""
        if not isinstance(message, Need) or not self._watch.holds_back():
            return False
        if self._waits_for_network != message.round_id:  # it is asked for again and again
            self._waits_for_network = message.round_id
            log.info("round %s: its update waits for a network that is not metered", message.round_id)
        return True

    # --- training

    def _handle(self, event: device.Event) -> None:
        self._performer.handle(event)

    def _run_training(self) -> None:
        invitation = self._machine.invitation
        assert invitation is not None
        privacy, data = self._config.privacy, data_for(self._config.data, invitation.plan)
        withheld = WithheldFile.of(self._agent.state_dir, invitation)
        request = Run(
            invitation.round_id,
            self._config.device_id,
            self._cache.path(invitation.parameters.sha256).read_bytes(),
            invitation.plan,
            privacy.clip_norm,
            privacy.noise_multiplier,
            privacy.min_examples,
            privacy.noise_moving_statistics,
            withheld.load(invitation) if withholds(invitation.plan) else b"",
            data is not None and data.held_out,
            tuple(self._cache.path(ref.sha256).read_bytes() for ref in invitation.vectors),
            self._config.training.max_epochs,
            data.source if data is not None else "npz",
            str(self._agent.folder / data.trusted) if data is not None and data.trusted else "",
            data.replica if data is not None else "",
            self._config.capture.keep_records > 0,
            {name: str(self._agent.folder / path) for name, path in data.shards} if data is not None else {},
            privacy.max_psnr_db,
            privacy.max_label_recovery,
            privacy.screen_models,
            data.debug if data is not None else "",
            data.kept_in(self._agent.state_dir) if data is not None else Reading(),
        )
        self._ask_child(invitation.round_id, request)

    # --- sending

    def _sealed(self, message: FromDevice, topic: str) -> bytes:
        return codec.encode(
            message, topic=topic, sender=self._config.device_id, sequence=self._sequence.next(), key=self._agent.key
        )

    def _set_will(self) -> None:
        """The goodbye the broker says for us if the connection breaks."""
        topic = self._topics.presence(self._config.device_id)
        self._transport.set_will(topic, self._sealed(Presence(False, self._session), topic))

    def _publish_presence(self, *, online: bool) -> Any:
        topic = self._topics.presence(self._config.device_id)
        presence = Presence(
            online, self._session, __version__, self._runtime, self._machine.capabilities, **self._software
        )
        self._sent.before(presence)
        return self._transport.publish(topic, self._sealed(presence, topic), retain=True)

    def _about_software(self) -> dict[str, Any]:
        """What a presence says of this agent's releases, where there is something to say."""
        if self._updates is None:
            return {}
        said = {"trouble": self._updates.told, "on_trial": self._updates.unproven, "bad": self._updates.bad}
        return {name: value for name, value in said.items() if value}

    def _check_data(self) -> None:
        """Look once at the data before connecting, so that a wrong path is known at once and not in some round."""
        for old in self._agent.state_dir.glob("data-report*.txt"):
            DISK.remove(old)
        for place in places(self._config.data):
            path = self._agent.folder / place.path
            probe = Probe(place.source, str(path), place.kept_in(self._agent.state_dir))
            self._child.request("probe", probe, max(PROBE_TIMEOUT_S, self._config.training.timeout_s))
            item = self._inbox.get()
            if item is None:
                return  # stopped
            _, frame = item
            if isinstance(frame, Problem):
                kind = getattr(errors, frame.kind, errors.TrainingError)
                raise kind(frame.what, frame.remedy)
            self._runtime = frame.runtime
            _tell(frame.report)
        log.info("covey %s trains with %s on Python %s", __version__, self._runtime, platform.python_version())


def _tell(report: Optional[DataReport]) -> None:
    """What was read, for the owner's log; the whole of it lies in the state folder, too."""
    if report is not None:
        log.info("%s holds %s", report.place, report.summary)
        log.debug("%s", report.text().rstrip())


def _updates_for(agent: Agent, transport: MqttTransport) -> Optional[Updates]:
    """None where the owner wants none; what does it is loaded for the others alone."""
    if not agent.config.update.release_key:
        return None
    from covey_edge.updates import updates_for

    return updates_for(agent, transport)


def _event(message: object) -> device.Event:
    event: Optional[device.Event] = None
    if isinstance(message, Invitation):
        event = device.Invited(message)
    elif isinstance(message, RoundClosed):
        event = device.Closed(message)
    elif isinstance(message, Need):
        event = device.Needed(message)
    elif isinstance(message, Receipt):
        event = device.Received(message)
    elif isinstance(message, Verdict):
        event = device.Judged(message)
    if event is None:
        raise errors.PeerError(f"an unexpected message of kind {type(message).__name__}")
    return event
