"""Attacks that need no cleverness: what broken or careless devices send. Also `none`, for comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from covey_coordinator.aggregation.kernels import FLOAT32_MAX, Kernels, Updates
from covey_coordinator.aggregation.kernels.mathematics import column_mean
from covey_coordinator.attacks.contract import Attack, AttackFacts, Knowledge
from covey_coordinator.attacks.mathematics import normals, repeated, seed_of
from covey_protocol.errors import ConfigError


def require_finite(name: str, setting: str, value: float, least: float = -FLOAT32_MAX) -> None:
    """ConfigError unless least <= value <= the largest float32."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and least <= value <= FLOAT32_MAX):
        bound = f" of at least {least:g}" if least > -FLOAT32_MAX else ""
        raise ConfigError(f"{name}: {setting} = {value!r}", f"set {setting} to a finite number{bound}")


@dataclass(frozen=True)
class NoAttack(Attack):
    """The corrupted devices are honest after all: what a rule costs when f is overestimated."""

    name = "none"
    facts = AttackFacts("the f devices behave honestly", "nothing", "for comparison")

    def craft(self, k: Kernels, honest: Updates, num_hostile: Any, knowledge: Knowledge) -> Any:
        return knowledge.own


@dataclass(frozen=True)
class SignFlip(Attack):
    """-scale * mu, mu the mean of the honest updates; or, with of = "own", -scale times each device's own update.

    Source: gradient ascent instead of descent, e.g. Li et al. 2019 (RSA, arXiv:1811.03761); with of = "own"
    the attacker needs to know nothing. Blanchard et al. 2017 call the first kind, largely scaled, omniscient.
    """

    scale: float = 1.0
    of: str = "mean"
    name = "sign-flip"
    facts = AttackFacts(
        "the update backwards",
        'all honest updates (of = "mean") or nothing (of = "own")',
        "Li et al. 2019 (RSA, arXiv:1811.03761)",
    )

    def __post_init__(self) -> None:
        require_finite(self.name, "scale", self.scale)
        if self.of not in ("mean", "own"):
            raise ConfigError(f"{self.name}: of = {self.of!r}", 'set it to "mean" or "own"')

    def craft(self, k: Kernels, honest: Updates, num_hostile: Any, knowledge: Knowledge) -> Any:
        if self.of == "own":
            return k.single(-self.scale * k.real(knowledge.own))
        return repeated(k, k.single(-self.scale * k.real(column_mean(k, honest))), num_hostile)


@dataclass(frozen=True)
class Gaussian(Attack):
    """Independent N(0, sigma^2) numbers, other ones for every device and round.

    Source: Blanchard et al. 2017 (arXiv:1703.02757), section 6, with sigma = 200.
    """

    sigma: float = 200.0
    name = "gaussian"
    facts = AttackFacts("noise", "nothing", "Blanchard et al. 2017 (arXiv:1703.02757), section 6")

    def __post_init__(self) -> None:
        require_finite(self.name, "sigma", self.sigma, least=0.0)

    def craft(self, k: Kernels, honest: Updates, num_hostile: Any, knowledge: Knowledge) -> Any:
        seed = seed_of(k, knowledge.seed, knowledge.round_number)
        return k.single(self.sigma * normals(k, seed, num_hostile, k.dimension(honest)))


@dataclass(frozen=True)
class Constant(Attack):
    """The same number everywhere. Source: Chen et al. 2018 (DRACO, arXiv:1803.09877), with -100."""

    value: float = -100.0
    name = "constant"
    facts = AttackFacts("one number everywhere", "nothing", "Chen et al. 2018 (arXiv:1803.09877)")

    def __post_init__(self) -> None:
        require_finite(self.name, "value", self.value)

    def craft(self, k: Kernels, honest: Updates, num_hostile: Any, knowledge: Knowledge) -> Any:
        return k.single(k.full((num_hostile, k.dimension(honest)), self.value))


@dataclass(frozen=True)
class Zero(Attack):
    """Zeros: the device pretends to have trained. Screening takes these out before any rule."""

    name = "zero"
    facts = AttackFacts("zeros", "nothing", "a lazy device; no paper needed")

    def craft(self, k: Kernels, honest: Updates, num_hostile: Any, knowledge: Knowledge) -> Any:
        return k.single(k.full((num_hostile, k.dimension(honest)), 0.0))


@dataclass(frozen=True)
class NotANumber(Attack):
    """NaN everywhere. A mean of it is NaN; screening must take these out before any rule."""

    name = "nan"
    sends_finite = False
    facts = AttackFacts("NaN everywhere", "nothing", "a broken device; no paper needed")

    def craft(self, k: Kernels, honest: Updates, num_hostile: Any, knowledge: Knowledge) -> Any:
        return k.single(k.full((num_hostile, k.dimension(honest)), math.nan))
