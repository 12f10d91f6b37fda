"""How many numbers of a batch an update resolves, before anybody attacks it: Tarantola's view as a number.

The data d are what the device sends, the model m the n x S numbers of its batch, g the training between them
(`forward`), G its Jacobian at a point, C_D the covariance of noise and rounding, N(m0, C_M) what the attacker believes
before (`priors`). Tarantola 2005 (Inverse Problem Theory, sections 3.2 and 3.3), for g linear around the point:

    C~ = (G' C_D^-1 G + C_M^-1)^-1        R = I - C~ C_M^-1        trace R: the number of resolved parameters

With A = C_D^(-1/2) G C_M^(1/2) and B = A'A everything is a function of B: C~ = C_M^(1/2) (I + B)^-1 C_M^(1/2), trace R
is the sum of s / (1 + s) over B's eigenvalues s, and the update says half the sum of log2 (1 + s) bits about the batch.
The diagonal of C~ is the variance that is left per pixel, its mean the error of the best linear attacker.

Small batches are computed exactly: min(d, N) products with G or its transpose and a singular value decomposition.
Larger ones never form a matrix: Lanczos' method from random vectors, with an error bar for the drawing and bounds for
the steps.

What the number is not: a bound. A prior that knows more resolves more; far from the point g bends, and an attacker who
does not know where to begin may find less, or another batch that gives the same update. Labels are taken as known.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.contract import AttackedModel, Progress, Seen, Stop
from covey_coordinator.inversion.forward import AT_ONCE
from covey_coordinator.inversion.lanczos import Krylov, lanczos
from covey_coordinator.inversion.metrics import psnr
from covey_coordinator.inversion.priors import Prior, flat_examples, plain_prior
from covey_protocol.compression import decode, encode
from covey_protocol.errors import UsageError
from covey_protocol.forms import NONE, compression_of, update_seed

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]

EXACT_UP_TO = 1024  # products with the Jacobian; a batch of 16 digits of 64 pixels, a second on one core
MAX_MATRIX = 16_000_000  # numbers of A held at once, 128 MB; beyond, its square is built
PROBES = 8
STEPS = 48  # of Lanczos' method, from each random vector
INWARD = 1e-3  # how far inside the box, as a share of the range, derivatives are taken (see `inside`)
HALF_UNIT = 2.0**-24  # of float32's relative rounding
QUANTISATION_DRAWS = 4


@dataclass(frozen=True)
class Leakage:
    """What one batch's update, or several of it, tells.

    numbers: N. resolved: trace R, 0 to N. resolved_error: one standard error of the drawing, plus half of what
    quadrature leaves open; 0 where exact. bits: of information. per_example: (n,), of `resolved`. resolved_map: (n,
    *input shape), the share of each pixel's variance that the update takes away, 0 to 1 (for a plain prior the
    diagonal of R). posterior_std: the same shape, of what is left. expected_mse: of the best linear attacker, mean
    over the prior; psnr_db: the same in dB. here_psnr_db: at these very inputs, whose distance from the prior's middle
    is known in an audit; what a measured attack is to be compared with. method: "exact" or "lanczos".
    """

    numbers: int
    resolved: float
    resolved_error: float
    bits: float
    per_example: Vector
    resolved_map: Matrix
    posterior_std: Matrix
    expected_mse: float
    psnr_db: float
    here_psnr_db: float
    method: str
    seconds: float

    @property
    def share(self) -> float:
        """Of the batch's numbers that are resolved, 0 to 1."""
        return self.resolved / self.numbers


class OutOfTime(UsageError):
    """`stop` asked for the end before anything could be said."""


def resolved_numbers(stretches: npt.NDArray[Any]) -> float:
    """trace R of the eigenvalues s of B: the squared ratios of signal to noise along B's directions."""
    return float(np.sum(stretches / (1.0 + stretches)))


@dataclass(frozen=True)
class Problem:
    """g linear around one point: B's products. weights: (d,), 1 over the standard deviation of each number of the data,
    0 for numbers that the attacker leaves out. point: (N,), where the derivatives are taken. stop: asked before every
    AT_ONCE products, which then raise OutOfTime."""

    forward: Any
    prior: Prior
    weights: Vector
    point: Vector
    products: list[int] = field(default_factory=lambda: [0])
    stop: Optional[Stop] = None

    @property
    def inputs(self) -> int:
        return int(self.forward.inputs)

    def push(self, tangents: Matrix) -> Matrix:
        """A w of each row: (k, N) -> (k, d)."""
        return self._in_blocks(
            lambda block: np.asarray(self.forward.pushed(self.point, self.scaled(block)) * self.weights, np.float64),
            tangents,
        )

    def pull(self, cotangents: Matrix) -> Matrix:
        """A' v of each row: (k, d) -> (k, N)."""
        return self._in_blocks(
            lambda block: self.scaled(self.forward.pulled(self.point, block * self.weights)), cotangents
        )

    def _in_blocks(self, function: Callable[[Matrix], Matrix], rows: Matrix) -> Matrix:
        parts = []
        for first in range(0, len(rows), AT_ONCE):
            if self.stop is not None and self.stop():
                raise OutOfTime("the time was up before the resolution was known", "give more time")
            parts.append(function(rows[first : first + AT_ONCE]))
        self.products[0] += len(rows)
        return np.concatenate(parts)

    def square(self, tangent: Vector) -> Vector:
        """B w, (N,)."""
        return np.asarray(self.pull(self.push(tangent[None]))[0], np.float64)

    def scaled(self, rows: Matrix) -> Matrix:
        """C_M^(1/2) w of each row."""
        return self._by_example(self.prior.scaled, rows)

    def unscaled(self, rows: Matrix) -> Matrix:
        return self._by_example(self.prior.unscaled, rows)

    def _by_example(self, function: Callable[[Matrix], Matrix], rows: Matrix) -> Matrix:
        return function(flat_examples(rows, self.forward.shape[1:])).reshape(rows.shape)


def leakage_number(
    model: AttackedModel,
    seen: Union[Seen, Sequence[Seen]],
    x: npt.NDArray[Any],
    y: npt.NDArray[Any],
    *,
    prior: Optional[Prior] = None,
    seed: int = 0,
    exact: Optional[bool] = None,
    probes: int = PROBES,
    steps: int = STEPS,
    ignored: Optional[npt.NDArray[np.bool_]] = None,
    batch_size: Optional[int] = None,
    stop: Optional[Stop] = None,
    progress: Optional[Progress] = None,
) -> Leakage:
    """The resolution of what was seen of one batch, at the batch itself (x: (n, *input shape), y: its labels).

    model: in float64, because the eigenvalues span more than float32 tells apart. seen: one update, or several of the
    same batch (rounds in which a device trains on it again).
    Of their `update` only the size counts, for rounding and quantisation; a plan whose training nobody did yet can be
    judged with `planned`. prior: the plain one where None. exact: None chooses by size. ignored: (d,) of each update,
    numbers that the attacker leaves out, for example what a defence spoils. batch_size: of the local steps, see
    `forward.Forward`. stop: between products. Vectors drawn until then count where there are two; else OutOfTime.
    """
    from covey_coordinator.inversion.forward import Forward

    started = time.monotonic()
    if model.dtype.name != "float64":
        raise UsageError(f"the resolution in {model.dtype.name}", "build the attacked model with dtype=tf.float64")
    several = [seen] if isinstance(seen, Seen) else list(seen)
    prior = prior or plain_prior(model.input)
    truth = flat_examples(x, model.input.shape)
    if len(truth) != len(y):
        raise UsageError(f"{len(truth)} examples and {len(y)} labels", "give one label for each example")
    forward = Forward(model, several, np.asarray(y), batch_size)
    weights = np.concatenate([data_weights(one, ignored) for one in several])
    problem = Problem(forward, prior, weights, inside(truth, prior).ravel(), stop=stop)
    distance = problem.unscaled((truth - prior.center(truth)).reshape(1, -1))[0]
    if exact is None:
        exact = min(forward.inputs, forward.outputs) <= EXACT_UP_TO
    if exact:
        found = _exact(problem, distance)
    else:
        found = _drawn(problem, distance, probes, steps, np.random.default_rng(seed), progress)
    return _leakage(problem, found, truth, time.monotonic() - started, "exact" if exact else "lanczos")


def planned(
    model: AttackedModel, seen: Seen, x: npt.NDArray[Any], y: npt.NDArray[Any], batch_size: Optional[int] = None
) -> Seen:
    """The same with the update that this batch gives by the model's own arithmetic, without noise, in float32."""
    from covey_coordinator.inversion.forward import Forward

    update = Forward(model, [seen], np.asarray(y), batch_size).values(np.asarray(x, np.float64).ravel())
    return replace(seen, update=update.astype(np.float32), examples=len(x))


def data_weights(seen: Seen, ignored: Optional[npt.NDArray[np.bool_]] = None) -> Vector:
    """(d,): 1 over the standard deviation of every number of the update, 0 for one that says nothing.

    Adds up, as variances: the known noise; float32's rounding of parameter and update (a unit in the last place over
    the root of 12) and of the device's sums (half a unit of the update's size); the quantisation of the form in which
    it travelled, measured by encoding the update. Numbers that top-k did not send say nothing here (an attacker could
    still use that they are small).
    """
    update = np.asarray(seen.update, np.float32)
    trained = np.abs(np.asarray(seen.parameters, np.float32) + update)
    size = float(np.sqrt(np.mean(update.astype(np.float64) ** 2)))
    rounding = np.hypot(np.spacing(trained) / math.sqrt(12), HALF_UNIT * size)
    variance = seen.noise_std**2 + rounding.astype(np.float64) ** 2
    silent = np.zeros(len(update), bool) if ignored is None else ignored.copy()
    if seen.plan.compression != NONE:
        errors, sent = _quantisation(seen)
        variance, silent = variance + errors**2, silent | ~sent
    return np.where(silent, 0.0, 1.0 / np.sqrt(np.maximum(variance, 1e-60)))


def inside(examples: Matrix, prior: Prior) -> Matrix:
    """These examples (n, S), at least INWARD of the range away from its ends.

    A pixel of exactly 0 often sits on the kink of a ReLU, where the derivative that TensorFlow states is 0 although the
    update answers to every possible change.
    """
    step = INWARD * (prior.high - prior.low)
    return np.clip(examples, prior.low + step, prior.high - step)


def _quantisation(seen: Seen) -> tuple[Vector, npt.NDArray[np.bool_]]:
    """(d,) standard deviation of the form's rounding, the same for all numbers; (d,) which numbers are sent."""
    update = np.asarray(seen.update, np.float32)
    form = compression_of(seen.plan)
    seeds = [update_seed(f"draw-{draw}", seen.device_id or "device") for draw in range(QUANTISATION_DRAWS)]
    decoded = [decode(encode(update, form, one), form, one, len(update)) for one in seeds]
    sent = decoded[0] != 0 if form.kept_fraction else np.ones(len(update), bool)
    errors = np.concatenate([(one.astype(np.float64) - update)[sent] for one in decoded])
    return np.full(len(update), math.sqrt(np.mean(errors**2))), sent


@dataclass(frozen=True)
class _Found:
    """Functions of B. left: (N,) the diagonal of (I + B)^-1. variance: (N,) that of C~. here: (N,) expected squared
    error at the truth, in the inputs' unit."""

    resolved: float
    resolved_error: float
    bits: float
    left: Vector
    variance: Vector
    here: Vector


def _exact(problem: Problem, distance: Vector) -> _Found:
    stretches, directions = spectrum(problem)
    shares = stretches / (1.0 + stretches)
    left = 1.0 - shares @ directions**2
    pixels = problem.scaled(directions)  # C_M^(1/2) times each direction
    prior_variance = np.tile(problem.prior.variances(int(np.prod(problem.forward.shape[1:]))), problem.forward.shape[0])
    variance = prior_variance - shares @ pixels**2
    missing = distance - (shares * (directions @ distance)) @ directions
    bias = problem.scaled(missing[None])[0]
    noise = (stretches / (1.0 + stretches) ** 2) @ pixels**2
    bits = 0.5 * float(np.sum(np.log2(1.0 + stretches)))
    return _Found(resolved_numbers(stretches), 0.0, bits, left, variance, bias**2 + noise)


def spectrum(problem: Problem) -> tuple[Vector, Matrix]:
    """B's eigenvalues that are not 0 for want of data, (k,), k <= min(d, N), and their directions (k, N)."""
    inputs, outputs = problem.inputs, len(problem.weights)
    if outputs < inputs:
        matrix = problem.pull(np.eye(outputs))
    elif inputs * outputs <= MAX_MATRIX:
        matrix = np.asarray(np.linalg.qr(problem.push(np.eye(inputs)).T, mode="r"), np.float64)
    else:
        values, vectors = np.linalg.eigh(squared(problem))
        return np.maximum(values, 0.0), np.ascontiguousarray(vectors.T)
    _, stretches, directions = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(stretches, np.float64) ** 2, np.asarray(directions, np.float64)


def squared(problem: Problem) -> Matrix:
    """B, (N, N), in blocks of rows. Small eigenvalues are exact to 1e-16 of the largest only."""
    block = max(1, min(problem.inputs, MAX_MATRIX // len(problem.weights)))
    rows = np.eye(problem.inputs)
    parts = [problem.pull(problem.push(rows[first : first + block])) for first in range(0, problem.inputs, block)]
    square = np.concatenate(parts)
    return np.asarray((square + square.T) / 2, np.float64)


def _drawn(
    problem: Problem,
    distance: Vector,
    probes: int,
    steps: int,
    rng: np.random.Generator,
    progress: Optional[Progress],
) -> _Found:
    """Hutchinson's estimate with Lanczos' quadrature. Each random vector z also gives a draw C_M^(1/2) (I + B)^(-1/2) z
    of what is left, whose squares average to the diagonal of C~."""
    if probes < 2 or steps < 1:
        raise UsageError(f"{probes} random vectors of {steps} steps", "give at least two vectors and one step")
    missing = lanczos(problem.square, distance, steps).times(_left)
    drawn: list[_Drawn] = []
    for probe in range(probes):
        try:
            krylov = lanczos(problem.square, rng.choice([-1.0, 1.0], problem.inputs), steps)
        except OutOfTime:
            if len(drawn) < 2:
                raise
            break
        drawn.append(_functions(problem, krylov))
        if progress is not None:
            progress(probe + 1, probes)
    remains = np.array([(one.least + one.most) / 2 for one in drawn])
    open_still = float(np.mean([abs(one.most - one.least) / 2 for one in drawn]))
    bias = problem.scaled(missing[None])[0]
    return _Found(
        resolved=problem.inputs - float(np.mean(remains)),
        resolved_error=float(np.std(remains, ddof=1)) / math.sqrt(len(drawn)) + open_still,
        bits=float(np.mean([one.bits for one in drawn])),
        left=np.mean([one.left for one in drawn], axis=0),
        variance=np.mean([one.variance for one in drawn], axis=0),
        here=bias**2 + np.mean([one.noise for one in drawn], axis=0),
    )


class _Drawn(NamedTuple):
    """Of one random vector. least, most: bounds of trace (I + B)^-1. left, variance, noise: (N,), as in _Found."""

    least: float
    most: float
    bits: float
    left: Vector
    variance: Vector
    noise: Vector


def _functions(problem: Problem, krylov: Krylov) -> _Drawn:
    draw = krylov.times(lambda s: 1.0 / np.sqrt(1.0 + s))
    followed = krylov.times(lambda s: np.sqrt(s) / (1.0 + s))
    pixels = problem.scaled(np.array([draw, followed])) ** 2
    bits = 0.5 * krylov.gauss(lambda s: np.asarray(np.log2(1.0 + s), np.float64))
    return _Drawn(krylov.gauss(_left), krylov.radau(_left), bits, draw**2, pixels[0], pixels[1])


def _left(stretches: Vector) -> Vector:
    return 1.0 / (1.0 + stretches)


def _leakage(problem: Problem, found: _Found, truth: Matrix, seconds: float, method: str) -> Leakage:
    shape = problem.forward.shape
    variances = np.broadcast_to(problem.prior.variances(truth.shape[1]), truth.shape)
    per_example = truth.shape[1] - found.left.reshape(truth.shape).sum(axis=1)
    expected = float(np.mean(np.maximum(found.variance, 0.0)))
    remaining = np.maximum(found.variance, 0.0).reshape(truth.shape)
    return Leakage(
        numbers=problem.inputs,
        resolved=found.resolved,
        resolved_error=found.resolved_error,
        bits=found.bits,
        per_example=per_example,
        resolved_map=np.clip(1.0 - remaining / variances, 0.0, 1.0).reshape(shape),
        posterior_std=np.sqrt(remaining).reshape(shape),
        expected_mse=expected,
        psnr_db=psnr(expected, problem.prior.range),
        here_psnr_db=psnr(float(np.mean(found.here)), problem.prior.range),
        method=method,
        seconds=seconds,
    )
