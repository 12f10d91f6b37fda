"""Attacks by name. Importing this module imports no TensorFlow, and neither does making an attack."""

from __future__ import annotations

from typing import Any

from covey_coordinator.aggregation.registry import settings_of, suggest
from covey_coordinator.attacks.adaptive import Adaptive
from covey_coordinator.attacks.contract import Attack
from covey_coordinator.attacks.data import LabelFlip, ScalingBackdoor
from covey_coordinator.attacks.envelope import MinMax, MinSum
from covey_coordinator.attacks.fang import FangKrum, FangTrim
from covey_coordinator.attacks.fltrust_adaptive import FLTrustAdaptive
from covey_coordinator.attacks.plain import Constant, Gaussian, NoAttack, NotANumber, SignFlip, Zero
from covey_coordinator.attacks.statistics import ALittleIsEnough, InnerProductManipulation, Mimic
from covey_protocol.errors import ConfigError

ATTACKS: dict[str, type[Attack]] = {
    "none": NoAttack,
    "sign-flip": SignFlip,
    "gaussian": Gaussian,
    "constant": Constant,
    "zero": Zero,
    "nan": NotANumber,
    "label-flip": LabelFlip,
    "scaling-backdoor": ScalingBackdoor,
    "ipm": InnerProductManipulation,
    "alie": ALittleIsEnough,
    "mimic": Mimic,
    "fang-krum": FangKrum,
    "fang-trim": FangTrim,
    "min-max": MinMax,
    "min-sum": MinSum,
    "adaptive": Adaptive,
    "fltrust-adaptive": FLTrustAdaptive,
}
ATTACK_NAMES = tuple(ATTACKS)
GENERAL_NAMES = tuple(
    name for name in ATTACKS if name != FLTrustAdaptive.name
)  # built against no rule with trusted data


def make_attack(name: str, **settings: Any) -> Attack:
    """The attack of this name. Raises ConfigError for an unknown name, an unknown setting or a value that is wrong."""
    if name not in ATTACKS:
        raise ConfigError(f"there is no attack {name!r}", suggest(name, ATTACK_NAMES))
    known = settings_of(ATTACKS[name])
    for setting in settings:
        if setting not in known:
            remedy = suggest(setting, known) if known else "it has no settings; leave it out"
            raise ConfigError(f"attack {name!r} has no setting {setting!r}", remedy)
    made: Any = ATTACKS[name]
    attack: Attack = made(**settings)
    return attack
