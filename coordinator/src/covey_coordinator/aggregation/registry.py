"""Rules by name. Importing this module imports no TensorFlow; making a rule does.

A new rule is one module, one test and one line in `SETTINGS` with its arm in `make_rule`.
"""

from __future__ import annotations

import difflib
from typing import Any

from covey_coordinator.aggregation.rules import Rule
from covey_protocol.errors import ConfigError, RuleError

# What each rule can be told beside num_byzantine; anything else is refused.
SETTINGS: dict[str, tuple[str, ...]] = {
    "mean": ("cap_ratio",),
    "median": (),
    "trimmed-mean": (),
    "multi-krum": ("num_selected", "neighbours"),
    "krum": ("neighbours",),
}
RULE_NAMES = tuple(SETTINGS)


def make_rule(name: str, num_byzantine: int = 0, **settings: Any) -> Rule:
    """The rule of this name. `rule.check(n)` tells whether it can bear num_byzantine hostile devices among n.

    Raises ConfigError for an unknown name or setting and RuleError for a num_byzantine that is not a whole number
    of at least 0.
    """
    if name not in SETTINGS:
        raise ConfigError(f"there is no aggregation rule {name!r}", suggest(name, RULE_NAMES))
    for setting in settings:
        if setting not in SETTINGS[name]:
            raise ConfigError(f"rule {name!r} has no setting {setting!r}", suggest(setting, _known_settings(name)))
    if isinstance(num_byzantine, bool) or not isinstance(num_byzantine, int) or num_byzantine < 0:
        raise RuleError(
            f"{name} with num_byzantine = {num_byzantine!r}", "set num_byzantine to 0 or more, a whole number"
        )
    return _build(name, num_byzantine, settings)


def _build(name: str, num_byzantine: int, settings: dict[str, Any]) -> Rule:
    from covey_coordinator.aggregation.krum import Krum, MultiKrum
    from covey_coordinator.aggregation.mean import Mean
    from covey_coordinator.aggregation.trimmed_mean import Median, TrimmedMean

    builders: dict[str, Any] = {
        "mean": Mean,
        "median": Median,
        "trimmed-mean": TrimmedMean,
        "multi-krum": MultiKrum,
        "krum": Krum,
    }
    rule: Rule = builders[name](num_byzantine=num_byzantine, **settings)
    return rule


def _known_settings(name: str) -> tuple[str, ...]:
    return ("num_byzantine", *SETTINGS[name])


def suggest(word: str, known: tuple[str, ...]) -> str:
    """'did you mean X?' where a known word is near, then the whole list."""
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(known)}"
