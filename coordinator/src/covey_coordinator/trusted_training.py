"""The coordinator's own update in a live round, made by a training child as a device's is (`covey_edge.trainer`).

The child is new in every round and is given nothing but the bundle, the trusted data, the round's model and its plan:
a coordinator that is started again in the middle of a round makes the same bits, so nothing here is durable. It works
while the devices do. Its update never travels, so it is not compressed, and no device's owner clips or noises it.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from covey_coordinator.aggregation.rules import LOSSES, UPDATE, Rule, Trusted
from covey_coordinator.algorithms.settings import FEDAVG
from covey_edge.config import Positive
from covey_edge.frames import Done, Frame, Open, Problem, Run
from covey_edge.training_process import TrainingProcess
from covey_protocol import errors
from covey_protocol.bundle import METRICS
from covey_protocol.errors import ConfigError, CoveyError, RuleError, StorageError, UsageError
from covey_protocol.forms import NONE
from covey_protocol.messages import TrainingPlan
from covey_protocol.topics import RESERVED_ID

Floats = npt.NDArray[np.float32]
EVALUATION = METRICS[:2]  # loss and accuracy


class TrustedSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """[trusted] of coordinator.toml: path and source of the data, as [data] of agent.toml. memory_mb: 0 for no limit.

    timeout_s: for an answer of the child.
    """

    path: str
    source: str = "npz"
    timeout_s: Positive = 600.0
    memory_mb: Annotated[int, Meta(ge=0)] = 0


def check_needs(path: Path, rule: Rule, settings: TrustedSettings | None, algorithm: str, max_staleness: int) -> None:
    """ConfigError where the rule needs trusted data and there are none, or the rounds are not of plain updates."""
    if not rule.needs_trusted:
        return
    other = "or choose another rule"
    if settings is None:
        raise ConfigError(f"{path}: the rule {rule.name!r} needs trusted data", f"write [trusted] with a path, {other}")
    if algorithm != FEDAVG:
        raise ConfigError(
            f"{path}: the rule {rule.name!r} with the algorithm {algorithm!r}, of whose exchanges the coordinator makes"
            " none of its own",
            f"leave the algorithm out, {other}",
        )
    if max_staleness:
        raise ConfigError(
            f"{path}: the rule {rule.name!r} with round.max_staleness: late updates belong to other models than the"
            " coordinator's own",
            f"leave max_staleness out, {other}",
        )


class TrustedTraining:
    """Makes what the rule needs of one round after another. needs: UPDATE or LOSSES. sealed_by: a public key, hex.

    path: of the data. To be used by one thread; the child answers in others. Raises nothing of the child's before
    `given` or `check`.
    """

    def __init__(self, needs: str, settings: TrustedSettings, path: Path, bundle: bytes, sealed_by: str) -> None:
        if needs not in (UPDATE, LOSSES):
            raise UsageError(f"a rule that needs {needs!r} of trusted data")
        self._needs, self._settings = needs, settings
        self._folder = tempfile.TemporaryDirectory(prefix="covey-trusted-")
        model = Path(self._folder.name) / "model.covey"
        try:
            model.write_bytes(bundle)
        except OSError as exc:
            self._folder.cleanup()
            raise StorageError(
                f"the bundle cannot be written to {model} ({exc.strerror})", "free space there, or set TMPDIR"
            ) from exc
        self._open = Open(str(model), hashlib.sha256(bundle).digest(), sealed_by, settings.source, str(path))
        self._answered = threading.Condition()
        self._answer: Frame | None = None
        self._after_open: Run | None = None
        self._child: TrainingProcess | None = None
        self._round: tuple[str, TrainingPlan] | None = None

    def close(self) -> None:
        self.stop()
        self._folder.cleanup()

    def stop(self) -> None:
        """End the child, whatever it is doing."""
        with self._answered:
            child, self._child = self._child, None
            self._answer = self._round = None
        if child is not None:
            child.stop()

    def check(self) -> None:
        """That a child can load the model and the data; raises what a device would report, with [trusted] named."""
        self._start(None)
        answer = self._waited()
        self.stop()
        if isinstance(answer, Problem):
            kind: type[CoveyError] = getattr(errors, answer.kind, ConfigError)
            raise kind(*_named(answer))

    # --- a round

    def begin(self, round_id: str, parameters: Floats, plan: TrainingPlan) -> None:
        """Start to work for this round, and give up what was under way."""
        self._round = round_id, plan
        self._start(self._run(parameters, plan) if self._needs == UPDATE else None)

    def is_ready(self) -> bool:
        """Whether `given` can answer without waiting, well or not; also where no round was begun."""
        with self._answered:
            return self._round is None or self._answer is not None

    def given(self) -> Trusted:
        """What the rule needs, waiting for it where it is not there. Raises RuleError where the child failed."""
        answer = self._checked(self._waited())
        if self._needs == LOSSES:
            return Trusted(losses=self._losses)
        return Trusted(np.frombuffer(answer.update, "<f4").astype(np.float32))

    def _losses(self, models: Floats) -> npt.NDArray[np.float64]:
        """(m, d) models -> (m, 2): loss and share of wrong answers. Waits for the child."""
        assert self._round is not None
        assert self._child is not None
        _, plan = self._round
        asked = msgspec.structs.replace(plan, evaluate=EVALUATION)
        found = []
        for model in models:
            self._ask(self._run(model, asked))
            answer = self._waited()
            if isinstance(answer, Problem) and self._child.pid is not None:  # it lives: the model gives no numbers
                found.append((np.inf, 1.0))
                continue
            loss, accuracy = np.frombuffer(self._checked(answer).update, "<f4").astype(np.float64)
            found.append((loss, 1.0 - accuracy))
        return np.array(found, np.float64).reshape(-1, 2)

    # --- the child

    def _run(self, parameters: Floats, plan: TrainingPlan) -> Run:
        assert self._round is not None
        plain = msgspec.structs.replace(plan, compression=NONE, kept_fraction=0.0)
        return Run(self._round[0], RESERVED_ID, parameters.astype("<f4").tobytes(), plain, 0.0, 0.0, 1)

    def _start(self, after_open: Run | None) -> None:
        if self._child is not None:
            self._child.stop()
        with self._answered:
            self._child = TrainingProcess(self._take, self._settings.memory_mb)
            self._after_open = after_open
        self._ask(self._open)

    def _ask(self, request: Frame) -> None:
        child = self._child
        assert child is not None
        with self._answered:
            self._answer = None
        child.request(child, request, self._settings.timeout_s)

    def _take(self, child: Any, frame: Frame) -> None:
        """In a thread of the child's: the next request, or the answer for whoever waits."""
        with self._answered:
            current = self._child
            if current is None or child is not current:
                return  # of a round that was given up
            following, self._after_open = self._after_open, None
            if not isinstance(frame, Done) or following is None:
                self._answer = frame
                self._answered.notify_all()
                return
        current.request(current, following, self._settings.timeout_s)

    def _waited(self) -> Frame:
        with self._answered:
            self._answered.wait_for(lambda: self._answer is not None)  # the child answers within timeout_s
            assert self._answer is not None
            return self._answer

    def _checked(self, answer: Frame) -> Done:
        if isinstance(answer, Problem):
            raise RuleError(*_named(answer))
        assert isinstance(answer, Done)
        return answer


def _named(problem: Problem) -> tuple[str, str]:
    """What and remedy, of a device's settings as they are called here."""
    remedy = problem.remedy.replace("data.path in agent.toml", "its path").replace("training.memory_mb", "memory_mb")
    return f"[trusted]: {problem.what}", remedy or "look at the log and the settings of [trusted]"
