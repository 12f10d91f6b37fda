"""The contract of an aggregation rule. No TensorFlow is imported here.

A rule is a frozen value. Its mathematics is written once, against the operations of `kernels`: TFF runs it in traced
TensorFlow, live rounds in numpy and compiled loops, with the same bits. What a rule may use, and why, is said there.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

from covey_coordinator.aggregation.kernels import Kernels, Updates
from covey_coordinator.records import Array
from covey_protocol.errors import RuleError, UsageError

MAX_DEVICES = 1 << 16  # far above any cohort; bounds the search in `least_devices`
UPDATE, LOSSES = "update", "losses"  # what a rule may need of trusted data
TRUSTED_PLACE = -2  # in TFF, of the row that is the coordinator's own; devices have places of 0 and above


class Batch(NamedTuple):
    """What one round gives to a rule, after screening.

    updates: n rows of d. num_examples: (n,) float32, positive, as the devices claim. places: (n,) int64, a number per
    device that is the same in every round, for rules that remember devices. For rules that need trusted data (see
    Rule.needs_trusted), else None: trusted: (d,) float32, the coordinator's own update, made with the round's plan;
    losses: from (m, d) float32 aggregates to (m, 2) float64, the mean loss and the share of wrong answers on the
    trusted data of the round's model plus each.
    """

    updates: Updates
    num_examples: Any
    places: Any
    trusted: Any = None
    losses: Callable[[Any], Any] | None = None


class Trusted(NamedTuple):
    """What an engine is given of the trusted data in one round; what the rule does not need is None.

    update: (d,) float32. losses: from (m, d) float32 models to (m, 2) float64, see `Batch`; may raise RuleError.
    """

    update: Array | None = None
    losses: Callable[[Array], Any] | None = None


class Judgement(NamedTuple):
    """What a rule says about one round.

    aggregate: (d,) float32. accepted: (n,) bool, False where the device's update did not enter the aggregate (or, for
    rules that weigh or work by coordinate, hardly did). scores: (n,) float32, finite, larger is more suspicious; each
    rule says what. measurements: named float32 scalars to log, the same names every round.
    """

    aggregate: Any
    accepted: Any
    scores: Any
    measurements: dict[str, Any]


class Facts(NamedTuple):
    """What `covey rules` says of a rule.

    summary: one line. needs: the precondition as the paper writes it. breakdown: the largest share of corrupted devices
    it bears. cost: in n, d and f. sums_only: whether weighted sums of updates are all the server must see, so that it
    works under secure aggregation. source: paper, equation.
    """

    summary: str
    needs: str
    breakdown: str
    cost: str
    sums_only: bool
    source: str


class Rule(ABC):
    """One aggregation rule with its settings. Implementations are frozen dataclasses; their fields are the settings.

    A stateless rule gives `name`, `num_byzantine`, `check`, `step` and `explain`. A rule with memory (momentum)
    overrides `initial_state` and `advance` instead of `step` alone; engines and the TFF factory call only those two.
    The state is a nest of arrays whose shapes and dtypes do not change, nor depend on num_byzantine. remembers_devices:
    the rule reads `Batch.places`, so its rows must be single devices. needs_trusted: UPDATE for a rule that reads
    `Batch.trusted`, LOSSES for one that reads `Batch.losses`, "" for one that needs no trusted data. expects_copies:
    bit-equal updates are what honest devices send, so screening does not look for copies.
    """

    facts: ClassVar[Facts]
    remembers_devices: ClassVar[bool] = False
    needs_trusted: ClassVar[str] = ""
    expects_copies: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in the registry."""

    @property
    @abstractmethod
    def num_byzantine(self) -> int:
        """f of the papers: how many devices of a round may send anything they like."""

    def with_num_byzantine(self, num_byzantine: int) -> Rule:
        """The same rule for another f; a state of one fits the other. A rule that wraps another overrides this."""
        changed: Any = self
        rule: Rule = dataclasses.replace(changed, num_byzantine=num_byzantine)
        return rule

    def for_fleet(self, device_ids: Sequence[str]) -> Rule:
        """The rule for these devices, whose places are 0, 1, ... in this order; itself if it knows none by name."""
        del device_ids
        return self

    @abstractmethod
    def check(self, n: int) -> None:
        """Raise RuleError unless the rule's guarantee holds for n updates. Must stay true when n grows."""

    @abstractmethod
    def step(self, k: Kernels, batch: Batch) -> Judgement:
        """One round without memory. No side effects; n has passed `check`."""

    @abstractmethod
    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        """One sentence why a device with this score was not accepted among n devices."""

    def initial_state(self, d: int) -> Any:
        """State before the first round, for updates of d numbers: a nest of numpy arrays. Empty for stateless rules."""
        del d
        return ()

    def advance(self, k: Kernels, state: Any, batch: Batch) -> tuple[Any, Judgement]:
        """One round: the state it leaves and the judgement."""
        return state, self.step(k, batch)


def require_devices(rule: Rule, n: int, least: int, because: str) -> None:
    """Raise RuleError unless 0 <= f and n >= least. because: the inequality, as the paper writes it."""
    f = rule.num_byzantine
    if f < 0:
        raise RuleError(f"{rule.name} with num_byzantine = {f}", "set num_byzantine to 0 or more")
    if n < max(least, 1):
        raise RuleError(
            f"{rule.name} needs {because}: {n} updates do not bear num_byzantine = {f}",
            f"wait for at least {max(least, 1)} usable updates, or lower num_byzantine",
        )


def least_devices(rule: Rule) -> int:
    """The smallest n that passes `rule.check`. Raises the check's own RuleError if no n does."""
    low, high = 0, MAX_DEVICES  # check fails at low (no update at all), holds at high
    rule.check(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _bears(rule, middle) else (middle, high)
    return high


def _bears(rule: Rule, n: int) -> bool:
    try:
        rule.check(n)
    except RuleError:
        return False
    return True


def times_median(score: float, accepted_scores: Array) -> str:
    """'8.2 times the median of the accepted' and its edge cases, for explanations."""
    if len(accepted_scores) == 0:
        raise UsageError("there are no accepted scores to compare with")
    median = sorted(float(value) for value in accepted_scores)[len(accepted_scores) // 2]
    if median <= 0.0:
        return "while the median of the accepted is 0"
    return f"{score / median:.3g} times the median of the accepted"
