"""The engine of machine teaching (CoMT): the teachers' shares become tau, and corrections by trusted instances move theta.

What a device sends is judged by the run's rule, every device counting alike, and what the rule makes of it times the
number of teachers stands for the sum over all: with the rule `mean` and every teacher there it is the sum. u and tau
are part of the engine's saved state, as g is in Federated SVRG. docs/machine-teaching.md, docs/adr/0026.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.aggregation.engines import Engine, StepResult
from covey_coordinator.aggregation.screening import Screened
from covey_coordinator.algorithms.engines import AlgorithmEngine, all_or_nothing, equal, moved_by, require_finite
from covey_coordinator.records import Array
from covey_protocol.works import CORRECT, TEACH

Numbers = npt.NDArray[np.float64]
# theta, u, tau (d,) -> what the coordinator's own trusted instances add to theta
Correction = Callable[[Array, Array, Array], Numbers]


class TeachingEngine(AlgorithmEngine):
    """Exchanges of `teach` and `teach-correct` in turn; of `teach` alone where the coordinator holds what is trusted.

    shares, corrections: plain engines with the server optimizer sgd and a learning rate of 1. teachers: how many teach,
    whether they take part or not. longest_share: norm beyond which a share is refused, for each example that its device
    has, times lambda_w; 0 for no bound. own: the coordinator's correction, None where devices hold what is trusted.
    """

    def __init__(
        self,
        shares: Engine,
        corrections: Engine,
        d: int,
        description: str,
        *,
        teachers: int,
        lambda_w: float,
        longest_share: float = 0.0,
        own: Correction | None = None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(f"comt, {description}", [shares, corrections], close)
        self._shares, self._corrections, self._teachers, self._own = shares, corrections, teachers, own
        self._longest = longest_share / lambda_w
        self._kept = {"u": np.zeros(d, np.float32), "tau": np.zeros(d, np.float32)}

    @property
    def work(self) -> str:
        return CORRECT if "answered" in self._kept else TEACH

    @property
    def vectors(self) -> tuple[Array, ...]:
        return self._kept["u"], self._kept.get("answered", self._kept["tau"])

    def aggregate(self, parameters: Array, screened: Screened) -> StepResult:
        if self.work == CORRECT:
            return self._corrected(parameters, screened)
        with all_or_nothing(self._shares):
            bounded = without_long_ones(screened, self._longest)
            result = self._shares.aggregate(np.zeros_like(parameters), equal(bounded))
            tau = np.float32(self._teachers) * result.parameters
            require_finite(tau)
            if self._own is not None:
                return self._moved(result, parameters, tau, self._own(parameters, self._kept["u"], tau))
        self._kept = {**self._kept, "answered": tau}
        return dataclasses.replace(result, parameters=parameters)

    def _corrected(self, parameters: Array, screened: Screened) -> StepResult:
        with all_or_nothing(self._corrections):
            result = self._corrections.aggregate(np.zeros_like(parameters), equal(screened))
            return self._moved(result, parameters, self._kept["answered"], result.parameters)

    def _moved(self, result: StepResult, parameters: Array, tau: Array, correction: Any) -> StepResult:
        """theta + the mean correction, and u + theta - tau: docs/machine-teaching.md, equation (10)."""
        theta = (parameters + correction).astype(np.float32)
        u = self._kept["u"] + theta - tau
        for vector in (theta, u):
            require_finite(vector)
        self._kept = {"u": u, "tau": tau}
        moved = moved_by(result, parameters, theta)
        primal = float(np.linalg.norm(theta - tau))
        return dataclasses.replace(moved, measurements={**moved.measurements, "theta_from_tau": primal})


def without_long_ones(screened: Screened, longest: float) -> Screened:
    """Without the shares that are longer than `longest` for each example of their device; the reasons say so.

    The device says how many examples it has: a claim, which is not taken for more than ten times the median claim.
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
