"""The engine of machine teaching (CoMT): sums of the teachers' shares, and of what trusted instances would change.

Shares are judged by the run's rule, every device counting alike, and what the rule makes of them times the number of
teachers stands for the sum over all: with the rule `mean` and every teacher there it is the sum. What is left for the
next exchange is part of the engine's saved state, as in Federated SVRG. The step itself is covey_coordinator.teaching.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from covey_coordinator.aggregation.engines import Engine, StepResult
from covey_coordinator.aggregation.screening import Screened
from covey_coordinator.algorithms.engines import AlgorithmEngine, all_or_nothing, equal, moved_by, require_finite
from covey_coordinator.records import Array
from covey_coordinator.teaching.server import Standing, moved
from covey_edge.teaching import settings_of
from covey_protocol.errors import StorageError
from covey_protocol.messages import TeachingPlan
from covey_protocol.teaching import Teacher
from covey_protocol.works import CORRECT, TEACH


@dataclasses.dataclass(frozen=True)
class Teaching:
    """What a run teaches with. plan: as the devices get it. holders: how many devices hold trusted instances.

    longest_share: norm beyond which a share is refused, for each example that its device has, times lambda_w; 0 for no
    bound. own: a Teacher of the coordinator's own trusted instances alone, None where it has none.
    """

    plan: TeachingPlan
    holders: int = 0
    longest_share: float = 0.0
    own: Teacher | None = None

    @property
    def description(self) -> str:
        return f"comt, {self.plan}, {self.holders}, {self.longest_share!r}, {self.own is not None}"


class TeachingEngine(AlgorithmEngine):
    """Exchanges of `teach` and `teach-correct` in turn; of `teach` alone where only the coordinator holds trusted ones.

    shares, corrections: plain engines with the server optimizer sgd and a learning rate of 1.
    """

    def __init__(
        self, shares: Engine, corrections: Engine, d: int, teaching: Teaching, close: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(teaching.description, [shares, corrections], close)
        self._shares, self._corrections, self._teaching = shares, corrections, teaching
        self._kept = {"u": np.zeros(d, np.float32), "tau": np.zeros(d, np.float32)}

    @property
    def work(self) -> str:
        return CORRECT if "answers" in self._kept else TEACH

    @property
    def vectors(self) -> tuple[Array, ...]:
        return (self._kept["u"], self._kept["tau"]) if self.work == TEACH else ()

    def aggregate(self, parameters: Array, screened: Screened) -> StepResult:
        told, nothing = self._teaching, np.zeros_like(parameters)
        if self.work == CORRECT:
            with all_or_nothing(self._corrections):
                result = self._corrections.aggregate(nothing, equal(screened))
                corrections = np.float32(told.holders) * result.parameters
                return self._step(result, parameters, self._kept["answers"], corrections)
        with all_or_nothing(self._shares):
            bounded = without_long_ones(screened, told.longest_share / told.plan.lambda_w)
            result = self._shares.aggregate(nothing, equal(bounded))
            answers = np.float32(told.plan.teachers) * result.parameters
            require_finite(answers)
            if not told.holders:
                return self._step(result, parameters, answers, nothing)
        self._kept = {**self._kept, "answers": answers}
        return dataclasses.replace(result, parameters=parameters)

    def _step(self, result: StepResult, parameters: Array, answers: Array, corrections: Array) -> StepResult:
        """The server's step on the sums, with the coordinator's own correction. It is refused as a whole."""
        told, before = self._teaching, self._more()
        vectors = (parameters, self._kept["u"], self._kept["tau"], answers, corrections)
        theta, u, tau, answered, sums = (vector.astype(np.float64) for vector in vectors)
        if told.own is not None:
            sums = sums + told.own.correct(theta.reshape(told.own.share.shape)).reshape(-1)
        holders = told.holders + (told.own is not None)
        standing, settings = Standing(theta, tau, u, np.zeros_like(theta)), settings_of(told.plan)
        after, residuals = moved(standing, settings, answered, told.plan.teachers, sums, holders)
        new, dual = after.theta.astype(np.float32), after.u.astype(np.float32)
        try:
            require_finite(new)
            require_finite(dual)
        except BaseException:
            self._load_more(before)
            raise
        self._kept = {"u": dual, "tau": answers}
        stepped = moved_by(result, parameters, new)
        told_of = {"model_from_shares": residuals.primal, "moved": residuals.dual}
        return dataclasses.replace(stepped, measurements={**stepped.measurements, **told_of})

    def _more(self) -> bytes:
        """The state of the coordinator's own teacher."""
        return b"" if self._teaching.own is None else self._teaching.own.saved()

    def _load_more(self, data: bytes) -> bool:
        if self._teaching.own is None:
            return not data
        try:
            self._teaching.own.loaded(data)
        except StorageError:
            return False
        return True


def without_long_ones(screened: Screened, longest: float) -> Screened:
    """Without the shares that are longer than `longest` for each example of their device; the reasons say so.

    How many examples a device has is its claim, which is not taken for more than ten times the median claim.
    """
    if not longest or not screened.device_ids:
        return screened
    counts = np.minimum(screened.num_examples, 10.0 * np.median(screened.num_examples))
    lengths = np.linalg.norm(screened.updates, axis=1)
    fits = lengths <= longest * counts
    reasons = {
        one: f"share has norm {length:.3g}, beyond {longest * count:.3g} for {count:.0f} examples"
        for one, length, count, fit in zip(screened.device_ids, lengths, counts, fits)
        if not fit
    }
    return dataclasses.replace(
        screened,
        updates=np.ascontiguousarray(screened.updates[fits]),
        num_examples=screened.num_examples[fits],
        device_ids=tuple(one for one in screened.device_ids if one not in reasons),
        reasons={**screened.reasons, **reasons},
    )
