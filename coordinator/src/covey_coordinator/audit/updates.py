"""Updates as devices make them: the agent's own training process, then clipping and noise with a seed.

Clip, noise and compression are the device's own functions (`covey_protocol`); only the noise's seed differs, because a
device takes its from the operating system, and an audit is to be repeatable.
"""

from __future__ import annotations

import hashlib
import io
import queue
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np
import numpy.typing as npt

from covey_coordinator.audit.data import AuditData, Part
from covey_coordinator.inversion.contract import Seen
from covey_coordinator.simulation.settings import PrivacySettings
from covey_edge.files import DISK, write_atomic
from covey_edge.frames import Done, Frame, Open, Problem, Run
from covey_edge.runtime import Model
from covey_edge.trainer import keep_variances
from covey_edge.training_process import TrainingProcess
from covey_protocol import errors
from covey_protocol.bundle import Bundle, write_bundle
from covey_protocol.compression import decode, encode
from covey_protocol.errors import TrainingError
from covey_protocol.forms import NONE, compression_of, update_seed
from covey_protocol.messages import TrainingPlan
from covey_protocol.privacy import add_gaussian_noise, clip
from covey_protocol.seals import SealingKey

Floats = npt.NDArray[np.float32]
TIMEOUT_S = 600.0
NO_PRIVACY = PrivacySettings()


class TrainingChild:
    """The agent's training process, asked one thing at a time. Use as a context: it has a process and a folder."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.initial: Floats = Model(bundle).parameters()
        self._answers: queue.Queue[Frame] = queue.Queue()
        self._process = TrainingProcess(lambda _, frame: self._answers.put(frame))
        self._folder = tempfile.TemporaryDirectory(prefix="covey-audit-")
        key = SealingKey.generate()  # the trainer takes sealed bundles only; this copy is nobody's but ours
        data = write_bundle(bundle.manifest, bundle.model, key)
        self._path, self._sha256, self._key = self._root / "bundle.covey", hashlib.sha256(data).digest(), key
        write_atomic(self._path, data, mode=0o600)

    def __enter__(self) -> TrainingChild:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.stop()
        self._folder.cleanup()

    @property
    def _root(self) -> Path:
        return Path(self._folder.name)

    def update(self, device_id: str, part: Part, parameters: Floats, plan: TrainingPlan) -> Floats:
        """(d,): what training changes, neither clipped nor noised nor compressed; of any model, also a suspicious one.

        Raises what the trainer raises.
        """
        plan = msgspec.structs.replace(plan, compression=NONE, kept_fraction=0.0)
        self._asked(self._open(part))
        received = parameters.astype("<f4").tobytes()
        run = Run("audit", device_id, received, plan, 0.0, 0.0, 1, screen_models="off")
        return np.frombuffer(self._asked(run).update, "<f4").astype(np.float32)

    def _open(self, part: Part) -> Open:
        path = self._root / f"{hashlib.sha256(part.x.tobytes() + part.y.tobytes()).hexdigest()}.npz"
        if not path.exists():
            buffer = io.BytesIO()
            np.savez(buffer, x=part.x, y=part.y)
            DISK.write_scratch(path, buffer.getvalue())
        return Open(str(self._path), self._sha256, self._key.public.hex(), "npz", str(path))

    def _asked(self, frame: Frame) -> Done:
        self._process.request(frame, frame, TIMEOUT_S)
        answer = self._answers.get()
        if isinstance(answer, Problem):
            raise getattr(errors, answer.kind, TrainingError)(answer.what, answer.remedy)
        assert isinstance(answer, Done)
        return answer


@dataclass(frozen=True)
class Protection:
    """What happens to an update between training and the coordinator's eyes."""

    privacy: PrivacySettings = NO_PRIVACY

    @property
    def noise_std(self) -> float:
        """Of what the coordinator sees of one device: noise that it adds itself it can leave out."""
        return self.privacy.noise_multiplier * self.privacy.clip_norm if self.privacy.by == "device" else 0.0

    def sent(
        self, update: Floats, received: Floats, plan: TrainingPlan, bundle: Bundle, seed: tuple[int, ...]
    ) -> Floats:
        """(d,): as the coordinator decodes it. seed: of the noise, and of a compression's rounding."""
        if self.privacy.clip_norm:
            update = clip(update, self.privacy.clip_norm)
        if self.noise_std:
            rng = np.random.default_rng(seed)
            update = add_gaussian_noise(update, self.privacy.clip_norm, self.privacy.noise_multiplier, rng)
            update = keep_variances(update, received, bundle.manifest)
        form = compression_of(plan)
        if form.name == NONE:
            return update
        at = update_seed("audit", "-".join(map(str, seed)))
        return np.asarray(decode(encode(update, form, at), form, at, len(update)), np.float32)


@dataclass(frozen=True)
class Attacked:
    """One update, what the attacker holds of it, and the truth it is graded against."""

    seen: Seen
    truth: Part


def attacked(
    child: TrainingChild,
    device: tuple[int, str],
    part: Part,
    parameters: Floats,
    plan: TrainingPlan,
    protection: Protection,
    seed: int,
    round_number: int = 1,
) -> Attacked:
    """One device's update under this plan and protection. device: its number and id."""
    place, device_id = device
    trained = child.update(device_id, part, parameters, plan)
    sent = protection.sent(trained, parameters, plan, child.bundle, (seed, round_number, place))
    seen = Seen(
        parameters=parameters,
        update=sent,
        plan=plan,
        examples=len(part),
        noise_std=protection.noise_std,
        clip_norm=protection.privacy.clip_norm,
        device_id=device_id,
        round_number=round_number,
    )
    return Attacked(seen, part)


@dataclass(frozen=True)
class Round:
    """parameters: (d,) that all received. seen: one per device, in their order."""

    number: int
    parameters: Floats
    seen: tuple[Seen, ...]


@dataclass(frozen=True)
class Fleet:
    """Devices that train round after round under one plan and protection, aggregated by the mean of what they hold."""

    child: TrainingChild
    data: AuditData
    protection: Protection
    seed: int

    def rounds(self, plan_of: Callable[[int], TrainingPlan], count: int) -> Iterator[Round]:
        """plan_of: round number -> TrainingPlan. Ends with a round `count` + 1 without updates: the finished model."""
        parameters = self.child.initial
        sizes = np.array([len(part) for part in self.data.devices], np.float64)
        for number in range(1, count + 1):
            plan = plan_of(number)
            seen = tuple(
                attacked(self.child, device, part, parameters, plan, self.protection, self.seed, number).seen
                for device, part in zip(enumerate(self.data.device_ids()), self.data.devices)
            )
            yield Round(number, parameters, seen)
            parameters = parameters + self._aggregate(np.stack([one.update for one in seen]), sizes, number)
        yield Round(count + 1, parameters, ())

    def _aggregate(self, updates: Floats, sizes: npt.NDArray[np.float64], number: int) -> Floats:
        """Weighted by examples; the plain mean where the coordinator adds the noise, which is for equal weights."""
        privacy = self.protection.privacy
        central = privacy.by == "coordinator" and privacy.noise_multiplier > 0
        weights = np.full(len(updates), 1.0 / len(updates)) if central else sizes / sizes.sum()
        mean = (weights @ updates.astype(np.float64)).astype(np.float32)
        if not central:
            return mean
        rng = np.random.default_rng([self.seed, number, len(updates)])
        return add_gaussian_noise(mean, privacy.clip_norm / len(updates), privacy.noise_multiplier, rng)
