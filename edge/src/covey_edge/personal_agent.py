"""The agent's part in keeping models for the owner: when, from which files, in which child, and what is written.

A round's model is looked at after this device is done with the round (its update acknowledged, or the round over). When
data are held out, a child process scores it beside the one in place; then another request makes the personal copy.
The child is not the one that trains for rounds, and is ended when a round's training begins: a round never waits, the
copy does, and is made after a later round. Nothing made here is sent.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import msgspec

from covey_edge.cache import BlobCache
from covey_edge.conditions import TRAINING, Conditions, Sensors
from covey_edge.config import Agent, TaskPersonal
from covey_edge.frames import Frame, Personalise, Personalised, Problem, Tune
from covey_edge.model_choice import Scores, comparable, measure_of, with_federated, with_personal
from covey_edge.model_store import Kept, ModelStore, Scale, Version
from covey_edge.policy import DataPlace, data_for
from covey_edge.reading import Reading
from covey_edge.training_process import TrainingProcess
from covey_edge.watch import Order, Watch
from covey_protocol.errors import StorageError
from covey_protocol.messages import Invitation, TrainingPlan

log = logging.getLogger("covey.agent")

LOOK_AGAIN_S = 60.0  # at conditions that keep a copy from being made; nobody waits for it


class _Job(NamedTuple):
    """What the child is asked. kept: what the store held then. tunes: whether a personal copy is made."""

    invitation: Invitation
    new: Version
    kept: Optional[Kept]
    tunes: bool


class Personal:
    """Called from the agent's loop alone. Does nothing for tasks without `keep`. clock: seconds, never backwards."""

    def __init__(
        self,
        agent: Agent,
        cache: BlobCache,
        on_answer: Callable[[object, Frame], None],
        sensors: Optional[Sensors] = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._agent, self._cache, training = agent, cache, agent.config.training
        self._child = TrainingProcess(on_answer, training.memory_mb, training.nice)
        conditions = Conditions(agent.config.conditions, sensors or Sensors(agent.state_dir))
        self._clock, self._watch = clock, Watch(conditions, clock, training.threads)
        self._waiting: dict[str, Invitation] = {}  # task -> the newest round this device has worked in
        self._job: Optional[_Job] = None
        self._look_again = -math.inf  # when conditions did not hold

    def worked(self, invitation: Optional[Invitation]) -> None:
        """The child has trained or evaluated this round's model, so it loads and passed the screening of its work."""
        if invitation is not None and self._settings(invitation).keep:
            self._waiting[invitation.plan.task] = invitation

    def tick(self, *, idle: bool) -> None:
        """Once a second. idle: the device works for no round, and waits for none."""
        if self._job is not None:
            self._obey(self._watch.order(TRAINING, math.inf, 0.0, busy=self._child.busy))
            return
        if not idle or not self._waiting or not self._may_begin():
            return
        _, invitation = self._waiting.popitem()
        try:
            self._look_at(invitation)
        except StorageError as exc:
            log.error("%s", exc)

    def takes(self, token: object, frame: Frame) -> bool:
        """Whether this is an answer to what was asked here, which is then dealt with."""
        if not isinstance(token, _Job):
            return False
        if token is self._job:
            self._job = None
            try:
                self._take(token, frame)
            except StorageError as exc:
                log.error("%s", exc)
            if self._job is None:
                self.close()
        return True

    def interrupt(self, why: str = "a round begins") -> None:
        """A round's training begins: it has the processor and the memory."""
        if self._job is not None:
            log.info("task %r: %s, the personal model waits", self._task(self._job), why)
            self._waiting.setdefault(self._task(self._job), self._job.invitation)
        self.close()

    def close(self) -> None:
        self._job = None
        self._watch.over()
        self._child.stop()

    def section(self) -> str:
        """For `covey agent status`: which model applications get, and how it came to that, of each task."""
        config = self._agent.config
        names = dict.fromkeys(("", *config.data.tasks, *config.personal.tasks))
        told = [
            f"{name}: {text}" if name else text
            for name in names
            if config.personal.of(name).keep and (text := _told(ModelStore(self._agent.state_dir, name)))
        ]
        return "; ".join(told) or "none are kept"

    # --- conditions: the same as for a round

    def _may_begin(self) -> bool:
        if self._clock() < self._look_again:
            return False
        if self._watch.refusal():
            self._look_again = self._clock() + max(LOOK_AGAIN_S, self._agent.config.conditions.check_every_s)
            return False
        return True

    def _obey(self, order: Order) -> None:
        if order is Order.PAUSE:
            self._child.pause()
        elif order is Order.GO_ON:
            self._child.go_on()
        elif order is Order.GIVE_UP:
            self.interrupt("the conditions do not hold any more")

    # --- steps

    def _look_at(self, invitation: Invitation) -> None:
        store, task = self._store(invitation), invitation.plan.task
        kept, new = store.load(), self._version(invitation)
        if kept is not None and new.parameters in kept.refused:
            return
        place = self._held_out(invitation)
        known = kept is not None and (kept.federated.bundle, kept.federated.parameters) == (new.bundle, new.parameters)
        if known and kept is not None:
            if kept.personal is None or kept.personal.base != new.parameters:
                self._tune(invitation, kept)
            return
        for name, ref in zip(new.files, (invitation.bundle, invitation.parameters)):
            if self._cache.has(ref):
                store.stage(name, self._cache.path(ref.sha256))
            elif not store.path(name).exists():
                raise StorageError(f"task {task!r}: {name} is not in the cache any more", "the next round brings it")
        if place is None:
            self._let_in(_Job(invitation, new, kept, tunes=False), None)
            return
        versions = [new, *(comparable(kept, new.bundle) if kept is not None else ())]
        self._ask(_Job(invitation, new, kept, tunes=False), versions, place, None)

    def _tune(self, invitation: Invitation, kept: Kept) -> None:
        """Ask for a personal copy of the federated model that was let in."""
        settings, data = self._settings(invitation), data_for(self._agent.config.data, _training(invitation))
        if not settings.finetune_epochs or data is None or not data.path:
            return
        plan = TrainingPlan(
            settings.finetune_epochs,
            settings.finetune_learning_rate or invitation.plan.learning_rate,
            shuffle_seed=invitation.number,
            gradient_clip_norm=invitation.plan.gradient_clip_norm,
        )
        path = str(self._agent.folder / data.path)
        reading = data.kept_in(self._agent.state_dir)
        tune = Tune(data.source, path, plan, settings.finetune_layers, self._agent.config.device_id, reading)
        versions = comparable(kept, kept.federated.bundle)
        self._ask(_Job(invitation, kept.federated, kept, tunes=True), versions, self._held_out(invitation), tune)

    def _ask(self, job: _Job, versions: Sequence[Version], place: Optional[DataPlace], tune: Optional[Tune]) -> None:
        store, first = self._store(job.invitation), versions[0]
        bundle, _ = first.files
        request = Personalise(
            str(store.path(bundle)),
            first.bundle,
            first.sealed_by,
            tuple((str(store.path(one.files[1])), one.parameters) for one in versions),
            place.source if place is not None else "",
            str(self._agent.folder / place.path) if place is not None else "",
            tune,
            place.kept_in(self._agent.state_dir) if place is not None else Reading(),
            self._agent.config.training.threads,
        )
        self._job = job
        self._child.request(job, request, self._agent.config.training.timeout_s)
        if self._watch.paused:
            self._child.pause()

    def _take(self, job: _Job, frame: Frame) -> None:
        if isinstance(frame, Problem):
            log.warning("task %r: %s%s", self._task(job), frame.what, f"; {frame.remedy}" if frame.remedy else "")
        elif isinstance(frame, Personalised):
            scores = _scores(job, frame, self._settings(job.invitation))
            if job.tunes:
                self._keep_tuned(job, frame, scores)
            else:
                self._let_in(job, scores)

    def _let_in(self, job: _Job, scores: Optional[Scores]) -> None:
        store, settings = self._store(job.invitation), self._settings(job.invitation)
        with store.changing():
            if store.load() != job.kept:
                return  # its owner has rolled back meanwhile: the next round is looked at anew
            kept, taken = with_federated(job.kept, job.new, scores, settings, _now_ms())
            store.commit(kept, {})
        self._tell(job, kept)
        if taken:
            self._tune(job.invitation, kept)

    def _keep_tuned(self, job: _Job, frame: Personalised, scores: Optional[Scores]) -> None:
        store, settings = self._store(job.invitation), self._settings(job.invitation)
        if len(frame.parameters) != job.invitation.parameters.size or job.kept is None:
            log.error("task %r: the personal model has %d bytes", self._task(job), len(frame.parameters))
            return
        sha256 = hashlib.sha256(frame.parameters).hexdigest()
        tuned = msgspec.structs.replace(
            job.new, kind="personal", parameters=sha256, base=job.new.parameters, made_ms=_now_ms()
        )
        with store.changing():
            if store.load() != job.kept:
                return
            kept, _ = with_personal(job.kept, tuned, scores, settings, _now_ms())
            store.commit(kept, {tuned.files[1]: frame.parameters} if tuned.files[1] in kept.files else {})
        self._tell(job, kept)

    # --- small things

    def _tell(self, job: _Job, kept: Kept) -> None:
        log.info("task %r, model of round %d: %s", self._task(job), job.new.number, kept.history[-1].decision)

    def _version(self, invitation: Invitation) -> Version:
        keys = tuple(key.hex() for key in self._agent.coordinators)
        bundle, parameters = invitation.bundle.sha256.hex(), invitation.parameters.sha256.hex()
        data = data_for(self._agent.config.data, _training(invitation))
        reading = data.reading if data is not None else Reading()
        scale = Scale(reading.normalise, reading.file("normalisation", "json").name) if reading.normalise else None
        return Version(
            "federated", bundle, parameters, keys, invitation.number, invitation.round_id, _now_ms(), scale=scale
        )

    def _held_out(self, invitation: Invitation) -> Optional[DataPlace]:
        evaluation = msgspec.structs.replace(_training(invitation), evaluate=("loss",))
        place = data_for(self._agent.config.data, evaluation)
        return place if place is not None and place.held_out else None

    def _settings(self, invitation: Invitation) -> TaskPersonal:
        return self._agent.config.personal.of(invitation.plan.task)

    def _store(self, invitation: Invitation) -> ModelStore:
        return ModelStore(self._agent.state_dir, invitation.plan.task)

    def _task(self, job: _Job) -> str:
        return job.invitation.plan.task


def _told(store: ModelStore) -> str:
    try:
        kept = store.load()
    except StorageError as exc:
        return str(exc)
    if kept is None:
        return ""
    return f"{kept.used} (newest decision: {kept.history[-1].decision})" if kept.history else str(kept.used)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _training(invitation: Invitation) -> TrainingPlan:
    """A plain round's plan for this task: which data it would train on."""
    return TrainingPlan(1, invitation.plan.learning_rate, task=invitation.plan.task)


def _scores(job: _Job, frame: Personalised, settings: TaskPersonal) -> Optional[Scores]:
    """None without held-out data. In the order in which the versions were asked for."""
    if not frame.counts:
        return None
    left = list(frame.scores)
    measure = measure_of(settings, has_classes=frame.has_classes)
    first = left.pop(0)
    tuned = left.pop() if job.tunes else None
    known = comparable(job.kept, job.new.bundle) if job.kept is not None else ()
    personal = left.pop() if any(one.kind == "personal" for one in known) else None
    current = left.pop() if left else None
    return Scores(frame.counts, measure, first, current, personal, tuned)
