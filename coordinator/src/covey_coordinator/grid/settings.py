"""What a grid is asked to do, from options or TOML, checked before anything starts. No TensorFlow here."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta, Struct

from covey_coordinator.aggregation.registry import RULE_NAMES, make_rule, suggest
from covey_coordinator.aggregation.rules import Rule, least_devices
from covey_coordinator.attacks.contract import Attack
from covey_coordinator.attacks.registry import GENERAL_NAMES, make_attack
from covey_protocol.errors import ConfigError, RuleError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NO_ATTACK = "none"
MODELS = ("mlp", "softmax")
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+=-]{0,39}")
AtLeastOne = Annotated[int, Meta(ge=1)]
Spec = dict[str, Any]


class GridSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """docs/attacks.md lists every setting.

    rules, attacks: names, or tables with the key `rule` (or `attack`), the settings of that rule, and for rules
    `num_byzantine` (what the rule is told; otherwise the true number) and `before` (pre-steps); `label` names the row
    or column. fractions: of corrupted devices. steps: local SGD steps per round, with batches drawn from the device's
    own data. momentum: of every device, over rounds; 0 sends plain updates. alpha: of the Dirichlet partition.
    trusted: so many examples are the coordinator's, for the rules that need them, and no device's.
    """

    data: str = "digits"
    model: str = "mlp"
    rules: tuple[str | Spec, ...] = ()
    attacks: tuple[str | Spec, ...] = ()
    fractions: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4)
    seeds: AtLeastOne = 3
    devices: Annotated[int, Meta(ge=2, le=1000)] = 20
    rounds: AtLeastOne = 30
    steps: AtLeastOne = 10
    batch: AtLeastOne = 16
    learning_rate: Annotated[float, Meta(gt=0, le=100)] = 0.1
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    alpha: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    trusted: Annotated[int, Meta(ge=0)] = 0


QUICK: dict[str, Any] = {
    "seeds": 1,
    "rounds": 10,
    "fractions": (0.0, 0.2, 0.4),
    "attacks": ("none", "sign-flip", "gaussian", "nan", "label-flip", "scaling-backdoor", "ipm", "alie", "min-max"),
}


@dataclass(frozen=True)
class RuleSpec:
    """One row of the grid. num_byzantine: what the rule is told; None is the true number of corrupted devices."""

    label: str
    name: str
    num_byzantine: int | None
    settings: tuple[tuple[str, Any], ...]

    def made(self, num_hostile: int) -> Rule:
        """The rule for this many corrupted devices.

        A rule that bears none in any cohort, such as the plain mean, is told 0: it is there for comparison.
        """
        told = num_hostile if self.num_byzantine is None else self.num_byzantine
        settings = dict(self.settings)
        rule = make_rule(self.name, told, **settings)
        if self.num_byzantine is None and told and bears_nobody(rule):
            return make_rule(self.name, 0, **settings)
        return rule


def bears_nobody(rule: Rule) -> bool:
    """Whether no number of devices is enough for the rule's num_byzantine."""
    try:
        least_devices(rule)
    except RuleError:
        return True
    return False


@dataclass(frozen=True)
class AttackSpec:
    """One column of the grid."""

    label: str
    attack: Attack


class Cell(NamedTuple):
    """One training run. fraction: as asked for; num_hostile: what it comes to."""

    rule: str
    attack: str
    fraction: float
    num_hostile: int
    seed: int

    @property
    def key(self) -> str:
        """A file name."""
        words = (self.rule, self.attack, f"{self.num_hostile}-corrupted", f"seed-{self.seed}")
        return "--".join(word.replace(" ", "_") for word in words)


@dataclass(frozen=True)
class Plan:
    """The settings with everything resolved. notes: what the operator should know about defaults."""

    settings: GridSettings
    rules: dict[str, RuleSpec]
    attacks: dict[str, AttackSpec]
    notes: tuple[str, ...] = ()

    def cells(self) -> list[Cell]:
        """Every run, seed by seed, so that the first seed's picture is there early. Without corrupted devices there is
        nothing to tell attacks apart, and one column is enough."""
        found = []
        for seed in range(self.settings.seeds):
            for fraction in self.settings.fractions:
                hostile = self.num_hostile(fraction)
                names = tuple(self.attacks) if hostile else (NO_ATTACK,)
                found += [Cell(rule, attack, fraction, hostile, seed) for rule in self.rules for attack in names]
        return found

    def num_hostile(self, fraction: float) -> int:
        return round(fraction * self.settings.devices)


def plan_of(settings: GridSettings) -> Plan:
    """ConfigError for whatever cannot work, named."""
    if settings.model not in MODELS:
        raise ConfigError(f"the grid trains no model {settings.model!r}", suggest(settings.model, MODELS))
    _check_fractions(settings)
    notes: list[str] = []
    rules = [rule_spec(spec) for spec in settings.rules] or _default_rules(settings, notes)
    for spec in rules if not settings.trusted else []:
        if spec.made(0).needs_trusted:
            raise ConfigError(f"the rule {spec.label!r} needs trusted data", "set trusted to a number of examples")
    for spec in rules:
        if spec.made(0).expects_copies:
            raise ConfigError(
                f"the rule {spec.label!r} needs devices that share data, of which a grid has none",
                "try it with covey simulate (docs/coded-redundancy.md)",
            )
    attacks = [attack_spec(spec) for spec in settings.attacks or GENERAL_NAMES]
    for kind, labels in (("rule", [r.label for r in rules]), ("attack", [a.label for a in attacks])):
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ConfigError(f"two {kind}s are called {twice!r}", "give one of them a `label` of its own")
    return Plan(settings, {r.label: r for r in rules}, {a.label: a for a in attacks}, tuple(notes))


def _check_fractions(settings: GridSettings) -> None:
    if not settings.fractions:
        raise ConfigError("there are no fractions of corrupted devices", "give at least one, such as 0.2")
    if list(settings.fractions) != sorted(set(settings.fractions)):
        raise ConfigError(f"the fractions are {settings.fractions}", "give each once, in ascending order")
    numbers = [round(fraction * settings.devices) for fraction in settings.fractions]
    for fraction, number in zip(settings.fractions, numbers):
        if not 0.0 <= fraction < 1.0 or number >= settings.devices:
            raise ConfigError(f"a fraction of {fraction} corrupted devices", "give numbers from 0 to below 1")
    if len(set(numbers)) < len(numbers):
        raise ConfigError(
            f"of {settings.devices} devices the fractions {settings.fractions} are {numbers} devices",
            "leave out fractions that come to the same number, or take more devices",
        )


def _default_rules(settings: GridSettings, notes: list[str]) -> list[RuleSpec]:
    """Every rule of the registry that works without settings, with trusted data only where there are some."""
    found = []
    for name in RULE_NAMES:
        try:
            rule = make_rule(name, 0)
        except ConfigError as error:
            notes.append(f"{name} is left out: {error}")
            continue
        if rule.expects_copies:
            notes.append(f"{name} is left out: no two devices of a grid hold the same data")
        elif rule.needs_trusted and not settings.trusted:
            notes.append(f"{name} is left out: it needs trusted data (trusted = a number of examples)")
        else:
            found.append(RuleSpec(name, name, None, ()))
    return found


def rule_spec(spec: str | Spec) -> RuleSpec:
    """The rule that a name or a table says. ConfigError for whatever is wrong with a name or a setting."""
    table = _table("rule", spec)
    name, label = table.pop("rule"), table.pop("label", None)
    told = table.pop("num_byzantine", None)
    if told is not None and (isinstance(told, bool) or not isinstance(told, int) or told < 0):
        raise ConfigError(f"rule {name!r}: num_byzantine = {told!r}", "give a whole number, or leave it out")
    if not table.get("before", True):
        table.pop("before")
    made = RuleSpec(
        _label(name, label, {**table, **({} if told is None else {"f": told})}),
        name,
        told,
        tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in table.items()),
    )
    make_rule(made.name, told or 0, **dict(made.settings))  # says at once what is wrong with a name or a setting
    return made


def attack_spec(spec: str | Spec) -> AttackSpec:
    """As `rule_spec`."""
    table = _table("attack", spec)
    name, label = table.pop("attack"), table.pop("label", None)
    return AttackSpec(_label(name, label, table), make_attack(name, **table))


def _table(kind: str, spec: str | Spec) -> Spec:
    table = {kind: spec} if isinstance(spec, str) else dict(spec)
    if not isinstance(table.get(kind), str):
        raise ConfigError(f"an entry of {kind}s is {spec!r}", f'give a name, or a table with {kind} = "NAME"')
    return table


def _label(name: str, label: Any, settings: Spec) -> str:
    """The label given, or one made of name and settings: nnm+median, bucketing size=3+krum, ipm epsilon=10."""
    if label is None:
        steps = [_step_label(step) for step in _before(settings)]
        others = [f"{key}={value}" for key, value in settings.items() if key != "before"]
        label = " ".join(["+".join([*steps, name]), *others])
    if not isinstance(label, str) or not LABEL.fullmatch(label):
        raise ConfigError(
            f"{label!r} cannot be a label", "set `label` to at most 40 letters, digits, blanks and . _ + = -"
        )
    return label


def _step_label(step: Any) -> str:
    if not isinstance(step, dict):
        return str(step)
    return " ".join([str(step.get("step", "step")), *(f"{k}={value}" for k, value in step.items() if k != "step")])


def _before(settings: Spec) -> Sequence[Any]:
    before = settings.get("before", ())
    return before if isinstance(before, (list, tuple)) else (before,)


def parse_spec(kind: str, text: str) -> Spec:
    """NAME, NAME:KEY=VALUE,KEY=VALUE, and for rules STEP+NAME:...; values are read as in TOML, other words as text."""
    head, _, tail = text.partition(":")
    *before, name = head.split("+")
    table: Spec = {kind: name}
    if before:
        table["before"] = before
    for pair in filter(None, tail.split(",")):
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ConfigError(f"{text!r}: {pair!r} is no setting", "write NAME:KEY=VALUE,KEY=VALUE")
        table[key.strip()] = toml_value(value.strip())
    return table


def toml_value(text: str) -> Any:
    """A value written as in TOML; other words are text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def written_names(path: Path) -> list[str]:
    """The settings that a TOML file names, which may be the defaults too."""
    return list(tomllib.loads(path.read_text()))


def canonical(plan: Plan) -> dict[str, Any]:
    """What identifies a grid: all settings, with the defaults' names written out. Plain JSON values."""
    settings = msgspec.to_builtins(plan.settings)
    if not plan.settings.trusted:
        del settings["trusted"]  # as before there were any
    settings["rules"] = [
        {"label": rule.label, "rule": rule.name, "num_byzantine": rule.num_byzantine, **dict(rule.settings)}
        for rule in plan.rules.values()
    ]
    settings["attacks"] = [
        {"label": spec.label, "attack": spec.attack.name, **msgspec.to_builtins(spec.attack)}
        for spec in plan.attacks.values()
    ]
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(settings))
    return plain
