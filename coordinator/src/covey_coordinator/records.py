"""What happened, as plain values: rounds, verdicts and inversion checks, ready for tables, reports and JSON.

No TensorFlow, no plotting, no I/O here; the programs fill these in and `report` draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

ACCEPTED = "accepted"
REJECTED = "rejected"  # arrived, was judged, and does not enter the aggregate
MISSING = "missing"  # invited, but no usable update arrived (lost, late, failed or refused)


@dataclass(frozen=True)
class DeviceVerdict:
    """What became of one device in one round. reason: one readable sentence, empty when accepted."""

    device_id: str
    status: str  # ACCEPTED, REJECTED or MISSING
    reason: str = ""
    score: float | None = None  # the rule's own measure (Krum score, distance); larger is more suspicious
    num_examples: int = 0
    update_norm: float | None = None


@dataclass(frozen=True)
class FleetMetric:
    """One metric of one model over the devices of an evaluation round. How each is made: aggregation.evaluating.

    spread: half of the devices lie within median - spread and median + spread. held_out: how many of the devices say
    that the data they evaluated on are kept for that.
    """

    name: str
    mean: float
    median: float
    spread: float
    devices: int
    held_out: int = 0


@dataclass(frozen=True)
class RoundRecord:
    """One finished round. accuracy and loss: of the new global model on the held-out test set (0..1, nats)."""

    number: int
    accuracy: float
    loss: float
    verdicts: Sequence[DeviceVerdict]
    seconds: float
    outcome: str = "published"  # or "abandoned"
    note: str = ""


@dataclass(frozen=True)
class RunRecord:
    """One training run: which rule on which fleet, and its rounds in order."""

    title: str  # as in the table, for example "multi-krum, 3 corrupted"
    rule: str
    engine: str
    corrupted: Sequence[str]  # ids of the devices that really are corrupted in this run (empty for the clean reference)
    rounds: Sequence[RoundRecord]

    @property
    def final_accuracy(self) -> float:
        return self.rounds[-1].accuracy if self.rounds else float("nan")


@dataclass(frozen=True)
class Reconstruction:
    """One attempt to rebuild an input from an update.

    image: the recovered input in the model's input shape. mse is per element on the inputs' own scale;
    psnr_db is 10 log10(range^2 / mse) with the declared input range. resolved: Tarantola's resolution number, how many
    of the input's elements the update determines (computable without the truth); None where it was not computed.
    """

    title: str  # for example "as sent", "clipped to 0.5", "clipped to 0.5, noise multiplier 0.1"
    image: Array
    mse: float
    psnr_db: float
    label: int | None = None  # the label the attacker reads off the update
    clip_norm: float | None = None
    noise_multiplier: float | None = None
    resolved: float | None = None


@dataclass(frozen=True)
class InversionRecord:
    """The first inversion check: a true input and what an attacker who sees the update makes of it.

    attacker_sees: one sentence. shape: of the input (H, W, C) for pictures, (features,) for tables.
    """

    device_id: str
    attacker_sees: str
    method: str
    truth: Array
    true_label: int
    input_range: tuple[float, float]
    reconstructions: Sequence[Reconstruction]
    feature_names: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class DemoRecord:
    """All that the report of one `covey demo` shows."""

    name: str
    dataset: str
    class_names: Sequence[str]
    seed: int
    num_devices: int
    settings: dict[str, str]
    runs: Sequence[RunRecord]
    inversion: InversionRecord | None = None
    shard_counts: dict[str, Sequence[int]] = field(default_factory=dict)  # device -> examples per class, as stored
    seconds: float = 0.0
