"""Which algorithm a run learns with, what it asks of the devices in which exchange, and how many exchanges it takes.

An exchange is one round of the protocol. Federated SVRG needs two for one step of the model, and one more at the
beginning where features are scaled; machine teaching two, or one where only the coordinator holds what is trusted.
Numbers count exchanges; all of this follows from a number alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from covey_coordinator.aggregation.registry import suggest
from covey_protocol.errors import ConfigError
from covey_protocol.messages import TRAIN, CodingPlan, TeachingPlan, TrainingPlan
from covey_protocol.works import CORRECT, CYCLIC, FEATURES, GRADIENT, SCAFFOLD, SVRG, TEACH

FEDAVG, FSVRG, FSVRG_NAIVE, COMT = "fedavg", "fsvrg", "fsvrg-naive", "comt"
ALGORITHMS = (FEDAVG, FSVRG, FSVRG_NAIVE, SCAFFOLD, COMT, CYCLIC)
STEPPED = (FSVRG_NAIVE, SCAFFOLD)  # every device takes the same number of steps


@dataclass(frozen=True)
class Algorithm:
    """name: one of ALGORITHMS; FedProx is fedavg with a proximal_weight. steps: local steps of those in STEPPED.
    feature_scaling: of fsvrg: S_k and A; without it both are the identity. teaching: of comt, which needs it.
    holders: of comt: devices hold trusted instances and are asked for corrections, not the coordinator alone.
    coding: of cyclic-code, which needs it.
    """

    name: str = FEDAVG
    steps: int = 0
    feature_scaling: bool = True
    teaching: TeachingPlan | None = None
    holders: bool = False
    coding: CodingPlan | None = None

    def __post_init__(self) -> None:
        if self.name not in ALGORITHMS:
            raise ConfigError(f"there is no algorithm {self.name!r}", suggest(self.name, ALGORITHMS))
        if (self.name in STEPPED) != (self.steps > 0):
            raise ConfigError(
                f"algorithm {self.name!r} with local_steps = {self.steps}",
                f"give {' and '.join(STEPPED)} a number above 0, and others none (they count epochs)",
            )

        if (self.name == COMT) != (self.teaching is not None):
            raise ConfigError(
                f"algorithm {self.name!r} {'without' if self.teaching is None else 'with'} [teaching]",
                f"give {COMT!r} the table [teaching], and others none",
            )
        if (self.name == CYCLIC) != (self.coding is not None):
            raise ConfigError(
                f"algorithm {self.name!r} {'without' if self.coding is None else 'with'} [coding]",
                f"give {CYCLIC!r} the table [coding], and others none",
            )

    @property
    def svrg(self) -> bool:
        return self.name in (FSVRG, FSVRG_NAIVE)

    @property
    def scaled(self) -> bool:
        return self.name == FSVRG and self.feature_scaling

    @property
    def works(self) -> tuple[str, ...]:
        """All that it asks of the devices, in the order of the exchanges."""
        if self.svrg:
            return (FEATURES, GRADIENT, SVRG) if self.scaled else (GRADIENT, SVRG)
        if self.name == COMT:
            return (TEACH, CORRECT) if self.holders else (TEACH,)
        return (self.name,) if self.name in (SCAFFOLD, CYCLIC) else (TRAIN,)

    def exchanges(self, rounds: int) -> int:
        """How many exchanges so many steps of the model take."""
        return self._for_one * rounds + self.scaled

    def rounds(self, exchanges: int) -> int:
        """How many steps the model has made after so many exchanges."""
        return max(0, exchanges - self.scaled) // self._for_one

    @property
    def _for_one(self) -> int:
        """Exchanges for one step of the model."""
        return len(self.works) - self.scaled

    def moves(self, number: int) -> bool:
        """Whether this exchange ends with another model than the one before."""
        return self.rounds(number) > self.rounds(number - 1)

    def plan(self, plan: TrainingPlan, work: str) -> TrainingPlan:
        """What the devices are asked, from the plan of a fedavg round."""
        if work == TRAIN:
            return plan
        if work in (TEACH, CORRECT):
            assert self.teaching is not None
            return msgspec.structs.replace(plan, work=work, teaching=self.teaching)
        if work == CYCLIC:
            assert self.coding is not None
            return msgspec.structs.replace(plan, work=work, coding=self.coding)
        own = self.steps if work in (SVRG, SCAFFOLD) else 0
        plain = {"compression": "none", "kept_fraction": 0.0} if work == FEATURES else {}
        return msgspec.structs.replace(plan, work=work, steps=own, **plain)
