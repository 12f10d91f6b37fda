"""What is learned in a simulation, how, by whom and against whom. Making these values needs no TFF."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from covey_coordinator.aggregation.rules import Rule
from covey_coordinator.attacks.contract import Attack
from covey_coordinator.records import Array
from covey_protocol.messages import TrainingPlan


class DeviceData(NamedTuple):
    """One simulated device. x: (n, *shape) as the model takes it; y: (n,) labels; n >= 1.

    faults: names of what was done to its data, empty for a healthy device.
    """

    device_id: str
    x: Array
    y: Array
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Privacy:
    """Central differential privacy: every update clipped to clip_norm, Gaussian noise on the sum (TFF's own factory).

    noise_multiplier: standard deviation of the noise on the sum over clip_norm; 0 clips only.
    """

    clip_norm: float
    noise_multiplier: float = 0.0


@dataclass(frozen=True)
class Learning:
    """model: a built tf.keras.Model, whose weights are the first global model; it is not changed.

    loss, optimizer, moving_statistics: as for `covey_models.export`. plan: what every device does in a round, as in a
    live invitation. algorithm: "fedavg", or another of the process. attack: what the devices with the numbers
    `hostile` send instead.
    """

    model: Any
    plan: TrainingPlan
    rule: Rule
    batch_size: int = 16
    loss: Any = "sparse_categorical_crossentropy"
    optimizer: Any = "sgd"
    moving_statistics: str = "average"
    algorithm: str = "fedavg"
    attack: Attack | None = None
    hostile: tuple[int, ...] = ()
    server_optimizer: str = "sgd"
    server_learning_rate: float = 1.0
    privacy: Privacy | None = None
    seed: int = 0
