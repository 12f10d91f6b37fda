"""Rules by name. Importing this module imports no TensorFlow, and neither does making a rule.

A new rule is one module, one test and one line in `RULES`. Its dataclass fields are the settings an operator can write.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from covey_coordinator.aggregation.krum import Krum, MultiKrum
from covey_coordinator.aggregation.mean import Mean
from covey_coordinator.aggregation.rules import Rule
from covey_coordinator.aggregation.trimmed_mean import Median, TrimmedMean
from covey_protocol.errors import ConfigError, RuleError

RULES: dict[str, type[Rule]] = {
    "mean": Mean,
    "median": Median,
    "trimmed-mean": TrimmedMean,
    "multi-krum": MultiKrum,
    "krum": Krum,
}
RULE_NAMES = tuple(RULES)


def make_rule(name: str, num_byzantine: int = 0, **settings: Any) -> Rule:
    """The rule of this name. `rule.check(n)` tells whether it can bear num_byzantine hostile devices among n.

    Raises ConfigError for an unknown name or setting and RuleError for a num_byzantine that is not a whole number
    of at least 0.
    """
    if name not in RULES:
        raise ConfigError(f"there is no aggregation rule {name!r}", suggest(name, RULE_NAMES))
    known = settings_of(RULES[name])
    for setting in settings:
        if setting not in known:
            raise ConfigError(f"rule {name!r} has no setting {setting!r}", suggest(setting, known))
    if isinstance(num_byzantine, bool) or not isinstance(num_byzantine, int) or num_byzantine < 0:
        raise RuleError(
            f"{name} with num_byzantine = {num_byzantine!r}", "set num_byzantine to 0 or more, a whole number"
        )
    made: Any = RULES[name]
    rule: Rule = made(num_byzantine=num_byzantine, **settings)
    return rule


def settings_of(kind: type[Any]) -> tuple[str, ...]:
    """What can be set: the fields of the dataclass."""
    return tuple(field.name for field in dataclasses.fields(kind))


def suggest(word: str, known: tuple[str, ...]) -> str:
    """'did you mean X?' where a known word is near, then the whole list."""
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(known)}"
