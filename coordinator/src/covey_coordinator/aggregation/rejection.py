"""Rules that try what each update does to the model on trusted data, and leave out what does harm.

Fang et al. propose them against their own attacks. Each update is judged by the mean with and without it: many hostile
updates mask each other, since the mean without any one of them is as bad. docs/trusted-data.md shows by how much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from covey_coordinator.aggregation.kernels import FLOAT32_MAX, Kernels
from covey_coordinator.aggregation.kernels.mathematics import as_scores
from covey_coordinator.aggregation.mean import capped_shares
from covey_coordinator.aggregation.rules import LOSSES, Batch, Facts, Judgement, Rule, require_devices
from covey_coordinator.records import Array

CAP_RATIO = 10.0  # of num_examples, as the mean's
SOURCE = "Fang et al. 2020 (arXiv:1911.11815), section 6"


@dataclass(frozen=True)
class LossRejection(Rule):
    """Mean without the num_byzantine updates that raise the loss on the trusted data most.

    What an update does is the loss of the model plus the mean of all updates, minus that without this one; means are
    weighted by capped num_examples. A model whose loss is no number counts as the worst; of equal ones the later
    devices go. The server optimizer does not take part in these trials.
    score: by how much the update raises the loss. Not accepted: left out.
    Source: Fang et al. 2020 (arXiv:1911.11815), section 6, with the mean as its rule.
    """

    num_byzantine: int = 0
    name = "lfr"
    needs_trusted = LOSSES
    facts = Facts(
        summary="mean without the f updates that raise the loss on trusted data most",
        needs="trusted data; n > f",
        breakdown="none is proven: hostile updates mask each other",
        cost="n^2 d, and n + 1 evaluations on the trusted data",
        sums_only=False,
        source=SOURCE,
    )

    def check(self, n: int) -> None:
        require_devices(self, n, least=self.num_byzantine + 1, because="n > f")

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        shares = capped_shares(k, batch.num_examples, CAP_RATIO)
        found = effects(k, batch, shares)
        kept = self.kept(k, found)
        left = k.where(kept, shares, 0.0 * shares)
        aggregate = k.combination(batch.updates, k.divide(left, k.sum_rows(left)))
        return Judgement(aggregate, kept, as_scores(k, self.scores(k, found)), {"left_out": k.single(count(k, kept))})

    def kept(self, k: Kernels, found: Any) -> Any:
        """(n,) bool. found: of `effects`."""
        return mildest(k, found[:, 0], self.num_byzantine)

    def scores(self, k: Kernels, found: Any) -> Any:
        """(n,) float64."""
        return found[:, 0]

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        return f"raises the loss on the trusted data by {score:.3g}, more than those that were kept"


@dataclass(frozen=True)
class ErrorRejection(LossRejection):
    """Mean without the num_byzantine updates that raise the share of wrong answers on the trusted data most.

    As lfr, with wrong answers for the loss. The share has as many steps as there are trusted examples, so with few of
    them many updates are equal, and of equal ones the later devices go.
    Source: Fang et al. 2020 (arXiv:1911.11815), section 6, with the mean as its rule.
    """

    name = "err"
    facts = LossRejection.facts._replace(summary="mean without the f updates that raise the error on trusted data most")

    def kept(self, k: Kernels, found: Any) -> Any:
        return mildest(k, found[:, 1], self.num_byzantine)

    def scores(self, k: Kernels, found: Any) -> Any:
        return found[:, 1]

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        return f"raises the share of wrong answers on the trusted data by {score:.3g}, more than those that were kept"


@dataclass(frozen=True)
class UnionRejection(LossRejection):
    """Mean without the updates that lfr or err leaves out, up to 2 num_byzantine of them.

    score: how much the update raises the loss or the error, each as a share of the largest such effect; the larger one.
    Source: Fang et al. 2020 (arXiv:1911.11815), section 6, "Union", with the mean as its rule.
    """

    name = "lfr-err"
    facts = LossRejection.facts._replace(
        summary="mean without what lfr or err leaves out", needs="trusted data; n > 2f"
    )

    def check(self, n: int) -> None:
        require_devices(self, n, least=2 * self.num_byzantine + 1, because="n > 2f")

    def kept(self, k: Kernels, found: Any) -> Any:
        return mildest(k, found[:, 0], self.num_byzantine) & mildest(k, found[:, 1], self.num_byzantine)

    def scores(self, k: Kernels, found: Any) -> Any:
        largest = k.largest(k.transpose(k.maximum(found, -1.0 * found)))
        relative = k.divide(found, largest[None, :])
        return k.largest(relative)

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        return f"raises loss or error on the trusted data by {score:.0%} of the largest effect"


def count(k: Kernels, kept: Any) -> Any:
    """How many are not kept, float64."""
    return k.real(k.whole(k.length(kept)) - k.number_true(kept))


def mildest(k: Kernels, effects_of: Any, num_byzantine: int) -> Any:
    """(n,) bool: all but the num_byzantine largest; of equal ones the smaller index is kept."""
    rank = k.argsort(k.argsort(effects_of))
    return rank < k.whole(k.length(effects_of)) - num_byzantine


def effects(k: Kernels, batch: Batch, shares: Any) -> Any:
    """(n, 2) float64: what each update adds to loss and error of the mean that includes it. Finite.

    Candidates are made one after the other, so beside the updates there is one more (d,).
    """
    n, losses_of = k.count(batch.updates), _finite(k, batch.losses)
    numbers, first = k.arange(n), k.whole(0)
    everyone = losses_of(k.combination(batch.updates, shares)[None])

    def goes_on(number: Any, found: Any) -> Any:
        return number < k.whole(n)

    def without_one(number: Any, found: Any) -> Any:
        others = k.where(k.equal(numbers, number), 0.0 * shares, shares)
        candidate = k.combination(batch.updates, k.divide(others, k.sum_rows(others)))
        effect = everyone - losses_of(candidate[None])
        # also: the next trial begins when this one is done, since in TensorFlow all are made on the same variables
        following = k.required(number + 1, k.all(effect < 4.0 * FLOAT32_MAX), "a trial gave no number", "report this")
        return following, k.replaced(found, k.reshape(number, (1,)), effect)

    _, found = k.while_loop(goes_on, without_one, (first, k.full((n, 2), 0.0)))
    return found


def _finite(k: Kernels, losses: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    """The same with the largest float32 for what is no number or larger; no loss is below its negative."""
    assert losses is not None  # an engine gives them to a rule that needs them

    def bounded(models: Any) -> Any:
        found = losses(models)
        known = (found < FLOAT32_MAX) & (found > -FLOAT32_MAX)
        return k.where(known, found, FLOAT32_MAX)

    return bounded
