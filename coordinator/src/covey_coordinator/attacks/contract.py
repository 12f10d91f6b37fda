"""The contract of an attack: what it is given, and what it gives back. No TensorFlow is imported here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from covey_coordinator.aggregation.kernels import Kernels, Updates
from covey_coordinator.aggregation.rules import Batch, Rule
from covey_protocol.errors import UsageError

Floats = np.ndarray[Any, Any]


class AttackFacts(NamedTuple):
    """What the documentation says of an attack.

    summary: one line. knows: what the attacker must know. source: paper, section or equation.
    """

    summary: str
    knows: str
    source: str


@dataclass(frozen=True)
class Knowledge:
    """What an attacker may know besides the honest updates. Each attack says what it uses.

    own: (m, d) float32, what the corrupted devices' own training gave (on poisoned data, for a data attack).
    num_byzantine: the f the rule is told, a Python int. seed: a whole number. round_number: int or int64 scalar.
    rule, rule_state: the rule in use and its state before this round. batch_with: the corrupted rows (m, d) -> the
    batch the rule would see with them. parameters: (d,) float32, the global model the round started from.
    """

    own: Any
    num_byzantine: int
    seed: int = 0
    round_number: Any = 0
    rule: Rule | None = None
    rule_state: Any = ()
    batch_with: Callable[[Any], Batch] | None = None
    parameters: Any = None


class DataSetting(NamedTuple):
    """What a data attack may know of the data. input_range: inclusive bounds of all numbers of an example."""

    num_classes: int
    input_range: tuple[float, float]


class Attack(ABC):
    """One attack with its settings. Implementations are frozen dataclasses; their fields are the settings.

    sends_finite: False where updates are not finite on purpose, so that only screening can deal with them.
    poisons_data: the attack changes the corrupted devices' training data (`poison`).
    """

    facts: ClassVar[AttackFacts]
    sends_finite: ClassVar[bool] = True
    poisons_data: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in the registry."""

    @abstractmethod
    def craft(self, k: Kernels, honest: Updates, num_hostile: Any, knowledge: Knowledge) -> Any:
        """(m, d) float32: what the m = num_hostile corrupted devices send. No side effects.

        honest: the h >= 1 honest updates of this round, without stages. num_hostile: a Python int or a scalar tensor,
        so it may not stand in an `if`.
        """

    def poison(self, x: Floats, y: Floats, setting: DataSetting, random: np.random.Generator) -> tuple[Floats, Floats]:
        """One corrupted device's training data after the attack; the arguments are never changed in place."""
        del setting, random
        return x, y


def rows_of(honest: Updates) -> Any:
    """(h, d): the honest matrix. Attackers see what was sent, before any pre-step."""
    if honest.stages:
        raise UsageError("an attack is given updates that went through a pre-step")
    return honest.matrix
