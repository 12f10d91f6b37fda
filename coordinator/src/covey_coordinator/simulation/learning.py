"""What is learned in a simulation, how, by whom and against whom. Making these values needs no TFF."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from covey_coordinator.aggregation.registry import suggest
from covey_coordinator.aggregation.rules import Rule
from covey_coordinator.attacks.contract import Attack
from covey_models.population import Device
from covey_protocol.errors import ConfigError
from covey_protocol.messages import TrainingPlan

Array = np.ndarray[Any, Any]
DeviceData = Device  # one simulated device
ALGORITHMS = {
    "fedavg": "every device trains plan.epochs epochs (McMahan et al. 2017, arXiv:1602.05629); with a proximal_weight "
    "above 0 this is FedProx (Li et al. 2020, arXiv:1812.06127)",
    "fedsgd": "every device sends one gradient step over all its examples (McMahan et al. 2017); no epochs, no "
    "clipping of gradients, no optimizer on the device",
    "fsvrg": "Federated SVRG (Konecny et al. 2016, arXiv:1610.02527, Algorithm 4): a round is two exchanges, of "
    "gradients and of passes over the local data; with feature_scaling S_k and A for sparse data",
    "fsvrg-naive": "its naive form (Algorithm 3): plan.steps steps on every device, a plain average",
    "comt": "machine teaching with trusted data (Han, Zhang 2020), in `covey_coordinator.teaching.simulation`, which "
    "takes no Learning",
    "scaffold": "plan.steps steps on every device, corrected by controls (Karimireddy et al. 2020, arXiv:1910.06378)",
}


@dataclass(frozen=True)
class Privacy:
    """Clipping and Gaussian noise by every device on its own update, as an agent's owner sets them.

    Noise has a standard deviation of noise_multiplier * clip_norm on every number; 0 clips only.
    What hostile devices send is not touched.
    """

    clip_norm: float
    noise_multiplier: float = 0.0

    def __post_init__(self) -> None:
        check_noise(self.clip_norm, self.noise_multiplier)


@dataclass(frozen=True)
class CentralPrivacy:
    """Differential privacy by the coordinator: updates clipped, noise on their sum, an epsilon after every round.

    devices_per_round: the fixed number the sum is divided by. sampling_rate: the share of all devices in a round.
    See `aggregation.privacy.private_aggregator`, which refuses every rule but a mean.
    """

    clip_norm: float
    noise_multiplier: float
    devices_per_round: int
    rounds: int
    sampling_rate: float = 1.0
    delta: float = 1e-5

    def __post_init__(self) -> None:
        check_noise(self.clip_norm, self.noise_multiplier)


def check_noise(clip_norm: float, noise_multiplier: float) -> None:
    """ConfigError for what is no clip norm or no noise."""
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ConfigError(f"clip_norm = {clip_norm}", "set it to a positive number")
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ConfigError(f"noise_multiplier = {noise_multiplier}", "set it to 0 or more")


@dataclass(frozen=True)
class Learning:
    """model: a built tf.keras.Model, whose weights are the first global model; it is not changed.

    loss, optimizer, moving_statistics: as for `covey_models.export`. plan: what every device does in a round, as in a
    live invitation. algorithm: see `ALGORITHMS`. attack: what the devices with the numbers
    `hostile` send instead. feature_scaling: of fsvrg, for models whose first tensor is a kernel on the inputs.
    trusted: the coordinator's own data, for rules that need them, under the name `RESERVED_ID`.
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
    privacy: Privacy | CentralPrivacy | None = None
    seed: int = 0
    feature_scaling: bool = True
    trusted: DeviceData | None = None

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            known = tuple(ALGORITHMS)
            raise ConfigError(f"there is no algorithm {self.algorithm!r}", suggest(self.algorithm, known))
        if self.rule.needs_trusted and self.trusted is None:
            raise ConfigError(f"the rule {self.rule.name!r} needs trusted data", "give some")
