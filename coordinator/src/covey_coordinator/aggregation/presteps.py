"""What can stand before a rule: pre-steps, joined with it by wrapping.

`Before(first, inner)` is a rule again, so steps compose in the order in which they are wrapped, and nothing that takes
a rule needs to know of them. A pre-step gives the inner rule other rows: each is a weighted sum of the devices' rows,
said as a `Stage`, so nothing is copied. The verdicts of the inner rule are handed back to the devices behind its rows.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from covey_coordinator.aggregation.distances import distances_between
from covey_coordinator.aggregation.kernels import FLOAT32_MAX, Kernels
from covey_coordinator.aggregation.kernels.mathematics import permutation
from covey_coordinator.aggregation.rules import Batch, Facts, Judgement, Rule
from covey_coordinator.records import Array
from covey_protocol.errors import ConfigError, RuleError

MAX_SEED = 1 << 62  # an int64 with room for the round's number


class Prepared(NamedTuple):
    """What a pre-step hands to the inner rule, and how to read the answer.

    batch: m rows. row_of: (n,) int64, the row in which each device's update went. kept: (n,) bool, False for a device
    whose update the step itself took out. measurements: as in `Judgement`, named after the step.
    """

    batch: Batch
    row_of: Any
    kept: Any
    measurements: dict[str, Any]


class PreStep(ABC):
    """One pre-step with its settings: a frozen dataclass whose fields are the settings, like a rule.

    state: as in `Rule`, shapes and dtypes never change. mixes_devices: a row does not belong to one device any more,
    so rules that remember devices cannot follow. keeps_copies: updates that are equal come out equal.
    """

    facts: ClassVar[Facts]
    mixes_devices: ClassVar[bool] = False
    keeps_copies: ClassVar[bool] = True

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in the registry."""

    @abstractmethod
    def prepare(self, k: Kernels, state: Any, batch: Batch, num_byzantine: int) -> tuple[Any, Prepared]:
        """One round: the state it leaves, and what the inner rule sees. No side effects."""

    def check(self, n: int, num_byzantine: int) -> None:
        """Raise RuleError unless the step makes sense for n updates. Must stay true when n grows."""
        del n, num_byzantine

    def rows(self, n: int) -> int:
        """How many rows the inner rule sees of n updates. Does not fall when n grows."""
        return n

    def initial_state(self, d: int) -> Any:
        """State before the first round, a nest of numpy arrays."""
        del d
        return ()

    def explain(self, inner: Rule, score: float, accepted_scores: Array, n: int) -> str:
        """One sentence why a device with this score was not accepted among n devices."""
        return f"after {self.name}: {inner.explain(score, accepted_scores, n)}"


@dataclass(frozen=True)
class Before(Rule):
    """The rule `inner` on what the pre-step `first` makes of the updates.

    A device is accepted if the step kept it and the inner rule accepted its row; its score is the row's, and the
    largest float32 if the step took it out. num_byzantine is the inner rule's: no step turns one hostile device into
    more than one hostile row, but rows may be fewer, and the inner rule is checked on their number.
    """

    first: PreStep
    inner: Rule

    def __post_init__(self) -> None:
        if self.first.mixes_devices and self.inner.remembers_devices:
            raise ConfigError(
                f"{self.inner.name} remembers devices, and {self.first.name} mixes them into new rows every round",
                f"take {self.first.name} out, or choose another rule",
            )
        if self.inner.expects_copies and not self.first.keeps_copies:
            raise ConfigError(
                f"{self.inner.name} counts on equal updates, and {self.first.name} mixes them with others",
                f"take {self.first.name} out, or choose another rule",
            )

    @property
    def name(self) -> str:
        return f"{self.first.name} + {self.inner.name}"

    @property
    def num_byzantine(self) -> int:
        return self.inner.num_byzantine

    def with_num_byzantine(self, num_byzantine: int) -> Rule:
        return dataclasses.replace(self, inner=self.inner.with_num_byzantine(num_byzantine))

    @property
    def remembers_devices(self) -> bool:  # type: ignore[override]  # a constant of other rules' classes
        return self.inner.remembers_devices

    @property
    def needs_trusted(self) -> str:  # type: ignore[override]  # the same
        return self.inner.needs_trusted

    @property
    def expects_copies(self) -> bool:  # type: ignore[override]  # as above
        return self.inner.expects_copies

    def for_fleet(self, device_ids: Sequence[str]) -> Rule:
        return dataclasses.replace(self, inner=self.inner.for_fleet(device_ids))

    def check(self, n: int) -> None:
        self.first.check(n, self.num_byzantine)
        rows = self.first.rows(n)
        try:
            self.inner.check(rows)
        except RuleError as error:
            if rows == n:
                raise
            what = f"{error.what} ({self.first.name} makes {rows} rows of {n} updates)"
            raise RuleError(what, f"counted in rows after {self.first.name}: {error.remedy}") from error

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        """One round from the initial state."""
        state = self.initial_state(1)
        return self.advance(k, state, batch)[1]

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        if len(accepted_scores) == 0:
            return f"{self.name} accepted no device in this round"
        return self.first.explain(self.inner, score, accepted_scores, n)

    def initial_state(self, d: int) -> Any:
        return self.first.initial_state(d), self.inner.initial_state(d)

    def advance(self, k: Kernels, state: Any, batch: Batch) -> tuple[Any, Judgement]:
        first_state, prepared = self.first.prepare(k, state[0], batch, self.num_byzantine)
        inner_state, judged = self.inner.advance(k, state[1], prepared.batch)
        scores = k.where(prepared.kept, k.take(judged.scores, prepared.row_of), FLOAT32_MAX)
        accepted = k.take(judged.accepted, prepared.row_of) & prepared.kept
        measurements = {**judged.measurements, **prepared.measurements}
        return (first_state, inner_state), Judgement(judged.aggregate, accepted, scores, measurements)


def weighed_rows(k: Kernels, batch: Batch, weights: Any) -> Batch:
    """The batch with row i multiplied by weights[i], (n,) float64."""
    stage = k.arange(k.count(batch.updates))[:, None], weights[:, None]
    return batch._replace(updates=batch.updates.through(*stage))


def one_to_one(k: Kernels, batch: Batch, **measurements: Any) -> Prepared:
    """Row i is device i's, and all are kept."""
    n = k.count(batch.updates)
    return Prepared(batch, k.arange(n), k.full((n,), True), measurements)


def require_honest_majority(step: PreStep, n: int, num_byzantine: int) -> None:
    """Raise RuleError unless n > 2f."""
    if n <= 2 * num_byzantine:
        raise RuleError(
            f"{step.name} needs n > 2f: {n} updates do not bear num_byzantine = {num_byzantine}",
            f"wait for at least {2 * num_byzantine + 1} usable updates, or lower num_byzantine",
        )


@dataclass(frozen=True)
class NearestNeighbourMixing(PreStep):
    """Each row becomes the mean of the n - f rows nearest to it, itself included; ties go to the smaller index.

    num_examples of a mixed row: the plain mean of the mixed ones'. Brings the rows together, so that what honest
    devices differ in does not hide a hostile one; makes the robustness of the rule behind it optimal in order.
    Source: Allouah et al. 2023 (arXiv:2302.01772). Beside the distances, every later reading of a row costs n - f rows.
    """

    name = "nnm"
    keeps_copies = False
    facts = Facts(
        summary="nearest-neighbour mixing: each row becomes the mean of its n - f nearest",
        needs="n > 2f",
        breakdown="that of the rule; less error where honest data differ",
        cost="n^2 d",
        sums_only=False,
        source="Allouah et al. 2023 (arXiv:2302.01772)",
    )

    def check(self, n: int, num_byzantine: int) -> None:
        require_honest_majority(self, n, num_byzantine)

    def prepare(self, k: Kernels, state: Any, batch: Batch, num_byzantine: int) -> tuple[Any, Prepared]:
        n = k.count(batch.updates)
        kept = n - num_byzantine
        distances = k.with_diagonal(distances_between(k, batch.updates), -1.0)  # itself first, also among equals
        nearest = k.argsort(distances)
        members = k.argsort(nearest) < k.whole(kept)  # the place of each row among the nearest
        share = k.divide(1.0, k.real(kept))
        examples = k.sum_rows(k.transpose(k.take(k.real(batch.num_examples), nearest[:, :kept]))) * share
        mixed = batch.updates.mixed(members, share)
        return state, one_to_one(k, batch._replace(updates=mixed, num_examples=k.single(examples)))


@dataclass(frozen=True)
class Bucketing(PreStep):
    """Random groups of `size` devices, each one row: their plain mean. The last group has what is left.

    The order is drawn anew each round from `seed` and the round's number. Whoever knows the seed knows the groups.
    num_examples of a row: the sum of its devices', so that a weighted mean keeps weighing what groups hold. places of
    rows: their positions. The verdict on a row is the verdict on all its devices. f hostile devices spoil at most f
    rows, so the rule must bear f among ceil(n / size). Groups can be summed under secure aggregation.
    Source: Karimireddy et al. 2022 (arXiv:2006.09365), which takes plain means.
    """

    size: int = 2
    seed: int = 0
    name = "bucketing"
    mixes_devices = True
    keeps_copies = False
    facts = Facts(
        summary="random groups of `size` devices are averaged into one row each",
        needs="the rule's, on ceil(n / size) rows",
        breakdown="that of the rule, divided by size",
        cost="n d",
        sums_only=False,
        source="Karimireddy et al. 2022 (arXiv:2006.09365)",
    )

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"bucketing: size = {self.size}", "set size to 1 or more")
        if not 0 <= self.seed < MAX_SEED:
            raise ConfigError(f"bucketing: seed = {self.seed}", "set seed to 0 or more, below 2^62")

    def rows(self, n: int) -> int:
        return -(-n // self.size)

    def initial_state(self, d: int) -> Any:
        return np.int64(0)

    def prepare(self, k: Kernels, state: Any, batch: Batch, num_byzantine: int) -> tuple[Any, Prepared]:
        n = k.count(batch.updates)
        rows = (n + self.size - 1) // self.size
        order = permutation(k, k.random_bits(self.seed, 1)[0] + state, n)
        slots = k.reshape(k.arange(rows * self.size), (rows, self.size))
        devices = k.take(order, k.minimum(slots, k.whole(n) - 1))
        used = k.where(slots < k.whole(n), k.full((), 1.0), k.full((), 0.0))
        sizes = k.sum_rows(k.transpose(used))
        examples = k.sum_rows(k.transpose(used * k.take(k.real(batch.num_examples), devices)))
        mixed = batch.updates.through(devices, used * k.divide(k.full((), 1.0), sizes)[:, None])
        groups = batch._replace(updates=mixed, num_examples=k.single(examples), places=k.arange(rows))
        row_of = k.argsort(order) // self.size
        return state + 1, Prepared(groups, row_of, k.full((n,), True), {})

    def explain(self, inner: Rule, score: float, accepted_scores: Array, n: int) -> str:
        one_per_row = sorted(accepted_scores)[:: self.size]  # a row's devices have one score; a short row counts once
        reason = inner.explain(score, one_per_row, self.rows(n))  # type: ignore[arg-type]  # only read as numbers
        return f"its group of up to {self.size} devices, after bucketing: {reason}"
