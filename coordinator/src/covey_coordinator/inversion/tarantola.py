"""The most probable batch behind an update: Tarantola's non-linear least squares, as an attack.

What is minimised over the batch m, within the range that the bundle declares (Tarantola 2005, section 3.4):

    2 S(m) = |g(m) - d|^2 / C_D + |m - m0|^2 / C_M

by Gauss-Newton steps with Levenberg's damping: (G'C_D^-1 G + C_M^-1 + damping) step = -gradient of S. Small batches
solve it densely, larger ones by conjugate gradients with nothing but products (`forward`). Numbers that lie on the
range's end and would leave it are held. The search begins with noise as large as the update, at which g is nearly
linear in what can be seen of it, and lets it shrink step by step to the true one.

Unlike attacks that descend on a gradient's direction it uses the size of the update, the known noise and every number
of a local training of several steps. It needs the labels. Where g jumps (the kinks of a ReLU) it stops before an exact
copy; with noise that covers the jumps it does not matter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.contract import AttackedModel, Finding, Progress, Seen, Stop
from covey_coordinator.inversion.labels import labels_for
from covey_coordinator.inversion.priors import Matrix, Prior, Vector, flat_examples, plain_prior
from covey_coordinator.inversion.resolution import Problem, data_weights, squared

DENSE_UP_TO = 400  # unknown numbers; a dense step needs a product for each of them
STEPS_PER_STAGE = 12
CONJUGATE_STEPS = 60
CONJUGATE_ENOUGH = 1e-2  # of the residual: an inexact Newton step
DAMPINGS = 8  # tries of one step, each with ten times the damping
STANDS_STILL = 1e-5  # relative change of the misfit
FITS = 2.0  # misfit per number of data at which another start is not worth its time
SHRINKS = 10.0


@dataclass(frozen=True)
class Estimate:
    """inputs: (N,). misfit: 2 S of the last stage. data_misfit: its first term per number of data, about 1 where the
    estimate explains the update. iterations: steps taken, in all stages."""

    inputs: Vector
    misfit: float
    data_misfit: float
    iterations: int


def most_probable(
    forward: Any,
    prior: Prior,
    data: Vector,
    weights: Vector,
    start: Vector,
    *,
    iterations: int = 150,
    stop: Optional[Stop] = None,
) -> Estimate:
    """The MAP estimate from one start.

    forward: `forward.Forward`. data: (d,), what was sent. weights: (d,) as of `resolution.data_weights`. start: (N,).
    iterations: the most Gauss-Newton steps. A local minimum of 2 S; which one depends on the start.
    """
    search = _Search(forward, prior, data, weights, start)
    for noise in _stages(data, weights):
        search.with_noise(noise)
        for _ in range(STEPS_PER_STAGE):
            if search.taken >= iterations or (stop is not None and stop()) or not search.step():
                break
    counted = max(int(np.count_nonzero(weights)), 1)
    residual = (forward.values(search.inputs) - data) * weights
    data_misfit = float(residual @ residual)
    return Estimate(search.inputs, data_misfit + search.prior_misfit(), data_misfit / counted, search.taken)


def _stages(data: Vector, weights: Vector) -> Iterator[float]:
    """Standard deviations that are added to each number's own: from the data's size down, 0 at last."""
    seen = weights > 0
    if not seen.any():
        return
    size, own = float(np.sqrt(np.mean(data[seen] ** 2))), float(1.0 / np.max(weights))
    noise = size / SHRINKS
    while noise > own:
        yield noise
        noise /= SHRINKS
    yield 0.0


class _Search:
    """Where the search stands. inputs: (N,)."""

    def __init__(self, forward: Any, prior: Prior, data: Vector, weights: Vector, start: Vector) -> None:
        self._forward, self._prior, self._data, self._true_weights = forward, prior, data, weights
        self.inputs = np.clip(start, prior.low, prior.high)
        self.taken = 0
        self.with_noise(0.0)

    def with_noise(self, noise: float) -> None:
        self._weights = self._true_weights / np.sqrt(1.0 + (noise * self._true_weights) ** 2)
        self._damping = 1.0
        self._residual = self._residual_at(self.inputs)
        self._misfit = float(self._residual @ self._residual) + self._prior_misfit_at(self.inputs)

    def prior_misfit(self) -> float:
        return self._prior_misfit_at(self.inputs)

    def step(self) -> bool:
        """One Gauss-Newton step. False where none makes the misfit smaller by more than STANDS_STILL."""
        self.taken += 1
        problem = Problem(self._forward, self._prior, self._weights, self.inputs)
        downhill = -problem.pull(self._residual[None])[0] - self._whitened(self.inputs)
        free = self._free(downhill)
        square = squared(problem) if problem.inputs <= DENSE_UP_TO else None
        before = self._misfit
        for _ in range(DAMPINGS):
            move = _solved(problem, square, downhill, free, 1.0 + self._damping)
            tried = np.clip(self.inputs + problem.scaled(move[None])[0], self._prior.low, self._prior.high)
            residual = self._residual_at(tried)
            misfit = float(residual @ residual) + self._prior_misfit_at(tried)
            if misfit < before:
                self.inputs, self._residual, self._misfit = tried, residual, misfit
                self._damping = self._damping / SHRINKS if self._damping > 1e-12 else 0.0
                return before - misfit > STANDS_STILL * before
            self._damping = max(self._damping, 1e-6) * SHRINKS
        return False

    def _free(self, downhill: Vector) -> npt.NDArray[np.bool_]:
        """(N,): which numbers are not held at an end of the range. With a correlated prior none is: its directions
        are no pixels, and the range only cuts off what leaves it."""
        if self._prior.root is not None:
            return np.ones(len(self.inputs), bool)
        leaves_low = (self.inputs <= self._prior.low) & (downhill < 0)
        return ~(leaves_low | ((self.inputs >= self._prior.high) & (downhill > 0)))

    def _residual_at(self, inputs: Vector) -> Vector:
        return np.asarray((self._forward.values(inputs) - self._data) * self._weights, np.float64)

    def _prior_misfit_at(self, inputs: Vector) -> float:
        whitened = self._whitened(inputs)
        return float(whitened @ whitened)

    def _whitened(self, inputs: Vector) -> Vector:
        """C_M^(-1/2) (m - m0)"""
        examples = flat_examples(inputs, self._forward.shape[1:])
        return np.asarray(self._prior.unscaled(examples - self._prior.center(examples)).ravel(), np.float64)


def _solved(
    problem: Problem, square: Optional[Matrix], downhill: Vector, free: npt.NDArray[np.bool_], ridge: float
) -> Vector:
    """(B + ridge I) step = downhill among the free numbers, 0 elsewhere."""
    move = np.zeros(len(downhill))
    if square is not None:
        matrix = square[np.ix_(free, free)] + ridge * np.eye(int(free.sum()))
        move[free] = np.linalg.solve(matrix, downhill[free])
        return move
    right = np.where(free, downhill, 0.0)
    rest, direction = right.copy(), right.copy()
    size = enough = float(rest @ rest)
    for _ in range(CONJUGATE_STEPS):
        if size <= CONJUGATE_ENOUGH**2 * enough or size == 0.0:
            break
        image = np.where(free, problem.square(direction), 0.0) + ridge * direction
        length = size / float(direction @ image)
        move, rest = move + length * direction, rest - length * image
        size, smaller = float(rest @ rest), size
        direction = rest + size / smaller * direction
    return move


SEES = (
    "The bundle, the parameters it sent, the plan, the update of one device (or several of the same batch), the "
    "settings of clipping and noise, and the labels or what the update says about them."
)


@dataclass(frozen=True)
class Tarantola:
    """The attack. labels: of the examples, in their order, where the attacker knows them; None reads them off the
    update (`labels`); over several steps their order then is a guess. prior: the plain one where None. starts: the
    prior's middle, then random ones, until one fits. ignored: (d,), numbers of the update to leave out."""

    labels: Any = None
    prior: Optional[Prior] = None
    starts: int = 3
    iterations: int = 150
    ignored: Optional[npt.NDArray[np.bool_]] = None
    name: str = "tarantola"
    sees: str = SEES

    def run(
        self,
        model: AttackedModel,
        seen: Union[Seen, Sequence[Seen]],
        *,
        seed: int,
        stop: Optional[Stop] = None,
        progress: Optional[Progress] = None,
    ) -> Finding:
        """Also takes several updates of one batch, which it fits together. Finding.score is 2 S."""
        from covey_coordinator.inversion.forward import Forward

        started = time.monotonic()
        several = [seen] if isinstance(seen, Seen) else list(seen)
        labels = labels_for(model, several[0], self.labels, seed)
        forward, prior = Forward(model, several, labels), self.prior or plain_prior(model.input)
        data = np.concatenate([np.asarray(one.update, np.float64) for one in several])
        weights = np.concatenate([data_weights(one, self.ignored) for one in several])
        found: list[Estimate] = []
        for order, start in enumerate(_starts(prior, forward.shape, self.starts, seed)):
            if found and ((stop is not None and stop()) or found[-1].data_misfit <= FITS):
                break
            found.append(most_probable(forward, prior, data, weights, start, iterations=self.iterations, stop=stop))
            if progress is not None:
                progress(order + 1, self.starts)
        best = min(found, key=lambda one: one.misfit)
        return Finding(
            attack=self.name,
            sees=self.sees,
            inputs=best.inputs.reshape(forward.shape).astype(np.float32),
            labels=labels,
            score=best.misfit,
            seconds=time.monotonic() - started,
            iterations=sum(one.iterations for one in found),
            notes=(
                f"misfit per number of the update {best.data_misfit:.3g} after {len(found)} starts; 1 is a perfect fit",
            ),
        )


def _starts(prior: Prior, shape: tuple[int, ...], count: int, seed: int) -> Iterator[Vector]:
    rng = np.random.default_rng(seed)
    blank = np.zeros((shape[0], math.prod(shape[1:])))
    # examples that start alike with labels alike have equal derivatives, and would stay alike for ever
    yield (prior.center(blank) + 0.01 * prior.spread * rng.standard_normal(blank.shape)).ravel()
    for _ in range(count - 1):
        yield (prior.center(blank) + prior.scaled(rng.standard_normal(blank.shape))).ravel()
