"""Rules and pre-steps by name, and the one way to write a rule in TOML. Imports no TensorFlow, nor does making a rule.

A new rule is one module, one test and one line in `RULES`; a pre-step the same in `PRE_STEPS`. Their dataclass fields
are the settings an operator can write.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from covey_coordinator.aggregation.bulyan import Bulyan, MeanAroundMedian
from covey_coordinator.aggregation.centred_clipping import CentredClipping
from covey_coordinator.aggregation.clipping import AdaptiveRobustClipping, Clipping, NormClipping, Zeroing
from covey_coordinator.aggregation.draco import Draco
from covey_coordinator.aggregation.flame import Flame
from covey_coordinator.aggregation.foolsgold import FoolsGold
from covey_coordinator.aggregation.geometric_median import GeometricMedian
from covey_coordinator.aggregation.krum import Krum, MultiKrum
from covey_coordinator.aggregation.mda import MinimumDiameter
from covey_coordinator.aggregation.mean import Mean
from covey_coordinator.aggregation.presteps import Before, Bucketing, NearestNeighbourMixing, PreStep
from covey_coordinator.aggregation.rejection import ErrorRejection, LossRejection, UnionRejection
from covey_coordinator.aggregation.rules import Rule
from covey_coordinator.aggregation.spectral import CovarianceFilter, DivideAndConquer
from covey_coordinator.aggregation.trimmed_mean import Median, TrimmedMean
from covey_coordinator.aggregation.trusted import FLTrust, TrustedAlignment, TrustedOnly
from covey_protocol.errors import ConfigError, RuleError

RULES: dict[str, type[Rule]] = {
    "mean": Mean,
    "median": Median,
    "trimmed-mean": TrimmedMean,
    "geometric-median": GeometricMedian,
    "centred-clipping": CentredClipping,
    "multi-krum": MultiKrum,
    "krum": Krum,
    "meamed": MeanAroundMedian,
    "bulyan": Bulyan,
    "mda": MinimumDiameter,
    "dnc": DivideAndConquer,
    "caf": CovarianceFilter,
    "foolsgold": FoolsGold,
    "flame": Flame,
    "fltrust": FLTrust,
    "trusted-alignment": TrustedAlignment,
    "trusted-only": TrustedOnly,
    "lfr": LossRejection,
    "err": ErrorRejection,
    "lfr-err": UnionRejection,
    "draco": Draco,
}
RULE_NAMES = tuple(RULES)
PRE_STEPS: dict[str, type[PreStep]] = {
    "clipping": Clipping,
    "norm-clipping": NormClipping,
    "zeroing": Zeroing,
    "arc": AdaptiveRobustClipping,
    "bucketing": Bucketing,
    "nnm": NearestNeighbourMixing,
}


def make_rule(
    name: str, num_byzantine: int = 0, before: Iterable[str | Mapping[str, Any]] = (), **settings: Any
) -> Rule:
    """The rule of this name. `rule.check(n)` tells whether it can bear num_byzantine hostile devices among n.

    before: pre-steps in the order in which they run, each a name or a table {"step": name, **its settings}.
    Raises ConfigError for an unknown name or setting or a value of the wrong type, and RuleError for a num_byzantine
    that is not a whole number of at least 0.
    """
    if name not in RULES:
        raise ConfigError(f"there is no aggregation rule {name!r}", suggest(name, RULE_NAMES))
    if isinstance(num_byzantine, bool) or not isinstance(num_byzantine, int) or num_byzantine < 0:
        raise RuleError(
            f"{name} with num_byzantine = {num_byzantine!r}", "set num_byzantine to 0 or more, a whole number"
        )
    made: Any = RULES[name]
    rule: Rule = made(num_byzantine=num_byzantine, **checked_settings(made, f"rule {name!r}", settings))
    for step in reversed([make_pre_step(entry) for entry in before]):
        rule = Before(step, rule)
    return rule


def make_pre_step(entry: str | Mapping[str, Any]) -> PreStep:
    """The pre-step of this name, or of the table {"step": name, **settings}. Raises ConfigError as `make_rule` does."""
    settings = {"step": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
    name = settings.pop("step", None)
    if not isinstance(name, str):
        raise ConfigError(
            f"before holds {entry!r}", 'write a name, or a table such as { step = "bucketing", size = 2 }'
        )
    if name not in PRE_STEPS:
        raise ConfigError(f"there is no pre-step {name!r}", suggest(name, tuple(PRE_STEPS)))
    made: Any = PRE_STEPS[name]
    step: PreStep = made(**checked_settings(made, f"pre-step {name!r}", settings))
    return step


def rule_from_table(table: Mapping[str, Any]) -> Rule:
    """The rule that a TOML table says: `rule`, `num_byzantine`, `before`, and the rule's own settings beside them.

    Raises ConfigError naming the key for whatever is unknown, missing or of the wrong type.
    """
    settings = dict(table)
    name = settings.pop("rule", None)
    if not isinstance(name, str):
        told = "has no key 'rule'" if name is None else f"says rule = {name!r}"
        raise ConfigError(f"the table of the aggregation rule {told}", f"name one of {', '.join(RULE_NAMES)}")
    num_byzantine = settings.pop("num_byzantine", 0)
    if isinstance(num_byzantine, bool) or not isinstance(num_byzantine, int) or num_byzantine < 0:
        raise ConfigError(f"num_byzantine = {num_byzantine!r}", "set it to a whole number of at least 0")
    before = settings.pop("before", [])
    if not isinstance(before, (list, tuple)):
        raise ConfigError(f"before = {before!r}", 'write a list of pre-steps, such as ["nnm"]')
    return make_rule(name, num_byzantine, before, **settings)


def settings_of(kind: type[Any]) -> tuple[str, ...]:
    """What can be set: the fields of the dataclass."""
    return tuple(field.name for field in dataclasses.fields(kind))


def checked_settings(kind: type[Any], what: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as the dataclass's fields have them. what: whose they are. Raises ConfigError naming the setting.

    A whole number is taken for a real one; a bool or a string for no number.
    """
    known = settings_of(kind)
    keys = (*known, "before") if issubclass(kind, Rule) else known
    types = typing.get_type_hints(kind)
    checked = {}
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(f"{what} has no setting {name!r}", suggest(name, keys))
        try:
            checked[name] = msgspec.convert(value, types[name])
        except msgspec.ValidationError as error:
            told = str(error)[:1].lower() + str(error)[1:]
            raise ConfigError(f"{what}: {name} = {value!r}, {told}", f"correct {name}") from error
    return checked


def suggest(word: str, known: tuple[str, ...]) -> str:
    """'did you mean X?' where a known word is near, then the whole list."""
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(known)}"
