"""Attacks on training data: the corrupted devices train as told, on poisoned examples of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from covey_coordinator.aggregation.kernels import Kernels, Updates
from covey_coordinator.attacks.contract import Attack, AttackFacts, DataSetting, Floats, Knowledge
from covey_coordinator.attacks.plain import require_finite
from covey_models.corruption import Setting, corrupt, flip_labels, triggered
from covey_models.corruption.trigger import Trigger
from covey_protocol.errors import ConfigError


@dataclass(frozen=True)
class LabelFlip(Attack):
    """Labels l -> C - 1 - l on the corrupted devices, which are honest otherwise; updates are sent as trained.

    Source: Yin et al. 2018 (arXiv:1803.01498), section 7; Fang et al. 2020 (arXiv:1911.11815).
    """

    name = "label-flip"
    poisons_data = True
    facts = AttackFacts("labels reversed", "own data only", "Yin et al. 2018 (arXiv:1803.01498), section 7")

    def craft(self, k: Kernels, honest: Updates, num_hostile: Any, knowledge: Knowledge) -> Any:
        return knowledge.own

    def poison(self, x: Floats, y: Floats, setting: DataSetting, random: np.random.Generator) -> tuple[Floats, Floats]:
        return x, flip_labels(y, setting.num_classes)


@dataclass(frozen=True)
class ScalingBackdoor(Attack):
    """Trains a trigger in, then sends scale * own update, so that an average becomes the backdoored model.

    scale: None is n / m for n devices of which m are corrupted: together they replace the model of a plain mean (with
    one attacker the paper's n / eta for eta = 1). poisoned_share: of a device's examples get the trigger and the label
    `target`. patch: the trigger, a square of so many pixels in the lower right corner at the largest value (images), or
    the last so many features (tables). Deviation: the paper's local training has a loss term that keeps the update
    inconspicuous; here it is plain training.
    Source: Bagdasaryan et al. 2020 (arXiv:1807.00459), model replacement; pixel trigger of Gu et al. 2017
    (arXiv:1708.06733).
    """

    scale: float | None = None
    target: int = 0
    poisoned_share: float = 0.5
    patch: int = 2
    name = "scaling-backdoor"
    poisons_data = True
    facts = AttackFacts(
        "a trigger trained in, then scaled up",
        "own data and n",
        "Bagdasaryan et al. 2020 (arXiv:1807.00459), model replacement",
    )

    def __post_init__(self) -> None:
        if self.scale is not None:
            require_finite(self.name, "scale", self.scale)
        require_finite(self.name, "poisoned_share", self.poisoned_share, least=0.0)
        if self.poisoned_share > 1.0:
            raise ConfigError(f"{self.name}: poisoned_share = {self.poisoned_share}", "set it to 1 or less")
        for setting, value, least in (("target", self.target, 0), ("patch", self.patch, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"{self.name}: {setting} = {value!r}", f"set it to a whole number of at least {least}"
                )

    def craft(self, k: Kernels, honest: Updates, num_hostile: Any, knowledge: Knowledge) -> Any:
        n = k.real(k.count(honest) + num_hostile)
        scale = k.divide(n, k.real(num_hostile)) if self.scale is None else self.scale
        return k.single(scale * k.real(knowledge.own))

    def poison(self, x: Floats, y: Floats, setting: DataSetting, random: np.random.Generator) -> tuple[Floats, Floats]:
        if self.target >= setting.num_classes:
            raise ConfigError(
                f"{self.name}: target = {self.target}, with {setting.num_classes} classes", "name a class there is"
            )
        trigger = Trigger(self.target, self.patch)
        return corrupt(trigger, x, y, Setting(*setting), random, self.poisoned_share)

    def triggered(self, x: Floats, setting: DataSetting) -> Floats:
        """The examples with the trigger: see `covey_models.corruption.trigger`."""
        return triggered(x, self.patch, setting.input_range)
