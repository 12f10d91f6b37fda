"""The server's step of CoMT, on sums alone: docs/teaching-mathematics.md. Numpy; no teacher, no transport."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from covey_protocol.teaching import Settings

Array = npt.NDArray[np.float64]


class Residuals(NamedTuple):
    """What is left to settle, each a norm: |theta - tau|, what theta and tau moved, what the holders moved together."""

    primal: float
    dual: float
    trusted: float
    size: float

    def settled(self, tolerance: float) -> bool:
        return max(self.primal, self.dual, self.trusted) <= tolerance * self.size


class Standing(NamedTuple):
    """What the server knows between rounds, (F,) or (F, C) each.

    theta: the model. tau: the sum of the teachers' parts. u: the dual of theta = tau. q: the holders' mean of their own
    theta and dual.
    """

    theta: Array
    tau: Array
    u: Array
    q: Array


def begun(shape: tuple[int, ...]) -> Standing:
    return Standing(*(np.zeros(shape) for _ in range(4)))


def moved(
    state: Standing, settings: Settings, answers: Array, teachers: int, corrections: Array, holders: int
) -> tuple[Standing, Residuals]:
    """answers: the sum over all `teachers`; corrections: over all `holders`. Sums are all that the server needs."""
    after = stepped(state, settings, answers, teachers, corrections, holders)
    theta, q = after.theta, after.q
    residuals = Residuals(
        float(np.linalg.norm(theta - answers)),
        float(np.hypot(np.linalg.norm(theta - state.theta), np.linalg.norm(answers - state.tau))),
        float(np.linalg.norm(q - state.q)) if holders else 0.0,
        float(np.linalg.norm(theta)),
    )
    return after, residuals


def stepped(
    state: Standing, settings: Settings, answers: Any, teachers: int, corrections: Any, holders: int
) -> Standing:
    """(10), on arrays of numpy or tensors alike."""
    kappa = settings.lambda_w**2 / settings.curvature
    q = state.theta + corrections / max(holders, 1)
    drawn = kappa * (answers / teachers - state.u) + holders * settings.rho * q
    theta = drawn / (settings.lambda_w + kappa / teachers + holders * settings.rho)
    return Standing(theta, answers, state.u + (theta - answers) / teachers, q)
