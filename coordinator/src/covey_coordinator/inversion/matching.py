"""What the optimisation attacks share: a simulated gradient is made to match the seen one by moving dummy inputs.

A `Problem` says what to match; `descend` minimises by (signed) Adam, many starts side by side, in one TensorFlow loop;
`bend` minimises by L-BFGS. Both keep the best point they measured, ask `stop` between pieces of work and are seeded by
whoever draws their starts. TensorFlow and SciPy are imported when they run.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.contract import AttackedModel, Progress, Seen, Stop
from covey_protocol.errors import UsageError
from covey_protocol.parameters import offsets
from covey_protocol.svrg import order_of, passes

Numbers = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

# what the attacks on one batch need
SEES = "The update, the parameters sent out, the model, the plan and how many examples the device has."
# parameters sent out (d,), dummy inputs (m, *input shape) and labels (integers, or (m, classes) soft) -> (d,), on the
# scale of what was seen. Two that are equal compute alike: graphs are kept by it
Simulate = Callable[[Any, Any, Any], Any]

CHUNK_S = 0.5  # how long the attack computes between two questions whether to stop
UNBOUNDED = (-3.0, 3.0)  # where an input has no declared range: three deviations of standardised features
KEPT = 8  # traced graphs, with the models they hold
LIKELY, CERTAIN = 4.0, 30.0  # logits of a label: 0.86 of ten classes and movable; one without a slope
LAST_SMOOTHING = 1e-3  # of total variation's weight: where `Descent` has faded it to in the end
NEIGHBOURS = 1.0  # scale of neighbouring numbers' differences, of the range; of four tried the best on small digits
DECAYS = (3 / 8, 5 / 8, 7 / 8)  # of all iterations: where steps are divided by ten (Geiping et al.'s code)
TINY = 1e-30  # keeps a norm's derivative finite at 0
BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's own defaults (Kingma and Ba 2015), which Geiping et al. use


@dataclass(frozen=True)
class Distance:
    """How far a simulated gradient is from the seen one, a weighted sum of three distances, each free of units.

    cosine: 1 - <g, s> / (|g| |s|), in [0, 2], blind to the length. euclidean: |g - s|^2 / |s|^2. l1: |g - s|_1 / |s|_1.
    total_variation: of the dummy inputs' rows and columns, mean |difference| over the range; added to the distance.
    Source: Geiping et al. 2020 (arXiv:2003.14053), eq. 4; Zhu et al. 2019 (arXiv:1906.08935), eq. 1, there not divided.
    """

    cosine: float = 0.0
    euclidean: float = 0.0
    l1: float = 0.0
    total_variation: float = 0.0

    def __post_init__(self) -> None:
        if not (self.cosine or self.euclidean or self.l1):
            raise UsageError("a distance of nothing", "give cosine, euclidean or l1 a weight")


EVERY_NUMBER = Distance(euclidean=1.0)  # of DLG
DIRECTION = Distance(cosine=1.0, total_variation=0.01)  # of inverting gradients


@dataclass(frozen=True)
class Shape:
    """What the graph of an objective depends on; all else goes in as numbers, so that updates share one graph.

    simulate: what a device with these inputs would have sent. inputs: (m, *input shape) of the dummy inputs. bounds:
    lowest and highest value of an input. boxed: whether the inputs are known to lie there. length_known: False for a
    clipped update; then the simulated gradient is stretched to fit best before it is compared.
    """

    simulate: Simulate
    inputs: tuple[int, ...]
    bounds: tuple[float, float]
    boxed: bool
    distance: Distance
    dtype: Any
    length_known: bool = True

    @property
    def span(self) -> float:
        return self.bounds[1] - self.bounds[0]

    def objective(self, known: Any, x: Any, y: Any, smoothing: Any = 1.0) -> Any:
        """(). known: as `Problem.known`. smoothing: multiplies the total variation's weight."""
        import tensorflow as tf

        seen, parameters, mask = known
        simulated = mask * self.simulate(parameters, x, y)
        if not self.length_known:
            along = tf.nn.relu(tf.reduce_sum(simulated * seen))
            simulated *= along / (tf.reduce_sum(simulated**2) + TINY)
        value = _distance(simulated, seen, self.distance)
        if self.distance.total_variation and len(self.inputs) == 4:
            value += smoothing * self.distance.total_variation * _total_variation(x) / self.span
        return value


@dataclass(frozen=True)
class Problem:
    """seen: (d,), on the scale of what is simulated; 0 where not trained. parameters: (d,) that were sent out. mask:
    (d,), 1 where a parameter is trained.
    """

    graph: Shape
    seen: Floats
    parameters: Numbers
    mask: Floats

    @property
    def shape(self) -> tuple[int, ...]:
        return self.graph.inputs

    @property
    def bounds(self) -> tuple[float, float]:
        return self.graph.bounds

    @property
    def boxed(self) -> bool:
        return self.graph.boxed

    @property
    def dtype(self) -> Any:
        return self.graph.dtype

    @property
    def span(self) -> float:
        return self.graph.span

    @property
    def known(self) -> tuple[Any, ...]:
        """As tensors: seen, parameters and mask."""
        import tensorflow as tf

        return tuple(tf.constant(one, self.dtype) for one in (self.seen, self.parameters, self.mask))

    def starts(self, rng: np.random.Generator, count: int) -> Floats:
        """(count, *shape): normal around the middle of the range, a quarter of it wide, within the box."""
        middle = sum(self.bounds) / 2
        drawn = middle + self.span / 4 * rng.standard_normal((count, *self.shape))
        return np.clip(drawn, *self.bounds) if self.boxed else drawn


@dataclass
class Best:
    """The best point so far. labels: soft ones, where they were sought too."""

    inputs: Floats
    score: float = math.inf
    labels: Floats | None = None
    evaluations: int = 0


@dataclass
class Work:
    """How much of an attack is done: one unit is one evaluation of the objective and its derivative."""

    total: int
    stop: Stop | None = None
    progress: Progress | None = None
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> int:
        return max(self.total - self.done, 0)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def add(self, count: int) -> bool:
        """Whether to go on."""
        self.done += count
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)
        return not self.over

    @property
    def over(self) -> bool:
        return self.done >= self.total or (self.stop is not None and self.stop())


def problem_of(model: AttackedModel, seen: Seen, count: int, simulate: Simulate, distance: Distance) -> Problem:
    """The problem of `count` dummy inputs whose simulated mean gradient is to match that of the update."""
    low, high = model.input.minimum, model.input.maximum
    boxed = low is not None and high is not None and low < high
    bounds = (float(low), float(high)) if low is not None and high is not None and boxed else UNBOUNDED
    gradient = mean_gradient(model, seen)
    if not np.any(gradient):
        raise UsageError("the update changes nothing that is trained", "there is nothing to match")
    shape, length_known = (count, *model.input.shape), not was_clipped(seen)
    graph = Shape(simulate, shape, bounds, boxed, distance, model.dtype, length_known)
    return Problem(graph, gradient, seen.parameters, trained_mask(model))


def mean_gradient(model: AttackedModel, seen: Seen) -> Floats:
    """(d,): the update divided by minus its rate and its number of steps; 0 in moving statistics.

    With one step the gradient itself; with several the mean of the gradients along the way. Raises UsageError for an
    update that does not belong to the model or is not finite.
    """
    size = sum(spec.size for spec in model.specs)
    if seen.update.shape != (size,) or seen.parameters.shape != (size,):
        raise UsageError(f"an update of shape {seen.update.shape} for a model of {size} numbers", "use both of one run")
    if not (np.isfinite(seen.update).all() and np.isfinite(seen.parameters).all()):
        raise UsageError("the update or the parameters hold NaN or infinity", "only finite updates can be attacked")
    steps = len(rows_of_steps(seen, model.manifest.batch_size))
    return -np.asarray(seen.update, np.float64) / (seen.plan.learning_rate * steps) * trained_mask(model)


def in_the_bundles_form(model: AttackedModel, labels: Numbers) -> Numbers:
    """Labels (n,) as the model's loss takes them: (n,) of the bundle's type, or (n, classes)."""
    told = model.manifest.label
    if told.shape:
        return np.asarray(np.eye(told.shape[0])[labels], told.dtype)
    return np.asarray(labels, told.dtype)


def trained_mask(model: AttackedModel) -> Floats:
    """(d,): 1 where a parameter is trained, 0 where it is a moving statistic."""
    places, mask = offsets(model.specs), np.zeros(sum(spec.size for spec in model.specs))
    for spec in model.specs:
        mask[places[spec.name]] = float(spec.trainable)
    return mask


def was_clipped(seen: Seen) -> bool:
    """Whether the update has the length it would have been shortened to."""
    length = float(np.linalg.norm(np.asarray(seen.update, np.float64)))
    return seen.clip_norm > 0 and length >= seen.clip_norm * (1 - 1e-4)


def rows_of_steps(seen: Seen, batch_size: int) -> list[Rows]:
    """Which of the device's examples are in the batch of each step: known to whoever wrote the plan's shuffle seed.

    An example's number is its place in the device's own data, which says nothing about what it is.
    """
    order = order_of(seen.plan.shuffle_seed, seen.device_id)
    return list(passes(seen.examples, batch_size, seen.plan.epochs, order))


def _distance(simulated: Any, seen: Any, weights: Distance) -> Any:
    import tensorflow as tf

    value = tf.zeros((), simulated.dtype)
    if weights.cosine:
        lengths = tf.sqrt(tf.reduce_sum(simulated**2) + TINY) * tf.sqrt(tf.reduce_sum(seen**2))
        value += weights.cosine * (1.0 - tf.reduce_sum(simulated * seen) / lengths)
    if weights.euclidean:
        value += weights.euclidean * tf.reduce_sum((simulated - seen) ** 2) / tf.reduce_sum(seen**2)
    if weights.l1:
        value += weights.l1 * tf.reduce_sum(tf.abs(simulated - seen)) / tf.reduce_sum(tf.abs(seen))
    return value


def _total_variation(x: Any) -> Any:
    import tensorflow as tf

    return tf.reduce_mean(tf.abs(x[:, 1:] - x[:, :-1])) + tf.reduce_mean(tf.abs(x[:, :, 1:] - x[:, :, :-1]))


# --- Adam


@dataclass(frozen=True)
class Descent:
    """step: of Adam, as a share of the inputs' range. signed: it sees only the signs of the derivative.

    decay: the step is divided by ten at 3/8, 5/8 and 7/8 of all iterations, as in Geiping et al.'s code. fade: what the
    weight of total variation is multiplied by in the end, in the same three steps; 1 keeps it. Smoothness leads to the
    right place, and then keeps from being exact. Ours. smoothing: multiplies that weight from the beginning.
    """

    step: float = 0.1
    signed: bool = True
    decay: bool = True
    fade: float = LAST_SMOOTHING
    smoothing: float = 1.0


def faded(settings: Descent, problem: Problem, seen: Seen) -> Descent:
    """The settings for this update: total variation keeps the weight that the noise known to be in it gives it.

    With noise of variance s^2 on each number and neighbours that differ by a Laplace distribution, the most probable
    inputs minimise |g|^2 / s^2 times the cosine distance plus the sum of differences over their scale, NEIGHBOURS.
    """
    weight = problem.graph.distance.total_variation
    if not (weight and seen.noise_std):
        return settings
    loudness = seen.noise_std**2 / np.sum((seen.update * problem.mask) ** 2)
    probable = float(loudness) * math.prod(problem.shape) / NEIGHBOURS / weight
    last = max(settings.fade, probable)
    return dataclasses.replace(settings, smoothing=settings.smoothing * max(last, 1.0), fade=min(last, 1.0))


def descend(
    problem: Problem, labels: Numbers, starts: Floats, settings: Descent, work: Work, share: float = 1.0
) -> list[Best]:
    """The best point of every start; all start together and take this share of the iterations that the work allows.

    labels: (t, m), given. starts: (t, *shape). One iteration of t starts counts t evaluations.
    """
    import tensorflow as tf

    trials, given = len(starts), tf.constant(labels)
    iterations = math.ceil(share * (work.left // trials))
    run = _descent(problem.graph, settings.signed, len(problem.seen), tuple(given.shape), given.dtype)
    rates = (settings.step, settings.decay, settings.smoothing, -math.log10(settings.fade))
    fixed = (*problem.known, given, tf.constant(iterations, problem.dtype), tf.constant(rates, problem.dtype))
    x = tf.constant(starts, problem.dtype)
    zeros, nothing = tf.zeros_like(x), tf.fill([trials], tf.constant(math.inf, problem.dtype))
    state: tuple[Any, ...] = (tf.constant(0), x, zeros, zeros, x, nothing)
    done, piece = 0, 1
    while done < iterations and not work.over:
        began = time.monotonic()
        until = min(done + piece, iterations)
        state = run(*fixed, tf.constant(until), *state)
        work.add((until - done) * trials)
        took = time.monotonic() - began
        if done:  # the first piece warms up
            piece = max(1, min(4 * piece, int(piece * CHUNK_S / max(took, 1e-6))))
        done = until
    state = run(*fixed, state[0] + 1, *state)  # where the last iteration led to is looked at, too
    return [Best(np.asarray(point, np.float64), float(score), None, done) for point, score in zip(state[4], state[5])]


@lru_cache(maxsize=KEPT)
def _descent(graph: Shape, signed: bool, d: int, labels: tuple[int, ...], label: Any) -> Any:
    """Steps of Adam as a traced graph, for labels (t, m, ...) of the type `label`.

    Its first arguments: what is known, the labels, how many iterations there are in all, and the rates (step, whether
    it decays, smoothing, by how many powers of ten that does).
    """
    import tensorflow as tf

    floats = [tf.TensorSpec(shape, graph.dtype) for shape in ([d], [], [4], [labels[0]], [labels[0], *graph.inputs])]
    number, scores, points = tf.TensorSpec([], tf.int32), floats[3], floats[4]
    fixed = [floats[0]] * 3 + [tf.TensorSpec(labels, label), floats[1], floats[2]]

    def decayed(number: Any, iterations: Any, decades: Any) -> Any:
        at = tf.cast(number, graph.dtype)
        passed = tf.add_n([tf.cast(at >= tf.math.ceil(share * iterations), graph.dtype) for share in DECAYS])
        return tf.pow(tf.constant(0.1, graph.dtype), decades * passed)

    def step(fixed: Any, number: Any, x: Any, first: Any, second: Any, best: Any, best_score: Any) -> tuple[Any, ...]:
        *known, y, iterations, rates = fixed
        length, decays, smoothing, decades = tf.unstack(rates)
        smoothing *= decayed(number, iterations, decades / len(DECAYS))
        scores, slopes = _scores_and_slopes(graph, known, x, y, smoothing)
        better = scores < best_score
        best = tf.where(tf.reshape(better, [-1] + [1] * len(graph.inputs)), x, best)
        best_score = tf.where(better, scores, best_score)
        slopes = tf.where(tf.math.is_finite(slopes), slopes, tf.zeros_like(slopes))
        slopes = tf.sign(slopes) if signed else slopes
        first = BETAS[0] * first + (1 - BETAS[0]) * slopes
        second = BETAS[1] * second + (1 - BETAS[1]) * slopes**2
        count = tf.cast(number + 1, graph.dtype)
        corrected = tf.sqrt(second / (1 - tf.pow(tf.constant(BETAS[1], graph.dtype), count)))
        mean = first / (1 - tf.pow(tf.constant(BETAS[0], graph.dtype), count))
        length *= graph.span * decayed(number, iterations, decays)
        x -= length * mean / (corrected + EPSILON)
        x = tf.clip_by_value(x, *graph.bounds) if graph.boxed else x
        return number + 1, x, first, second, best, best_score

    def run(*arguments: Any) -> Any:
        told, (until, *state) = arguments[: len(fixed)], arguments[len(fixed) :]
        return tf.while_loop(lambda current, *_: current < until, lambda *now: step(told, *now), state)

    return _traced(run, [*fixed, number, number, points, points, points, points, scores])


def _traced(function: Any, signature: Sequence[Any]) -> Any:
    """Not for TensorFlow to trace when it is called: it would warn that many functions of one name are traced."""
    import tensorflow as tf

    return tf.function(function, input_signature=signature, autograph=False).get_concrete_function()


def _scores_and_slopes(graph: Shape, known: Any, x: Any, y: Any, smoothing: Any) -> tuple[Any, Any]:
    """(t,) and (t, *shape). The trials stand side by side in one graph, so that TensorFlow can run them in parallel."""
    import tensorflow as tf

    pairs = []
    for trial in range(x.shape[0]):
        with tf.GradientTape() as tape:
            one = x[trial]
            tape.watch(one)
            score = graph.objective(known, one, y[trial], smoothing)
        pairs.append((score, tape.gradient(score, one, unconnected_gradients="zero")))
    return tf.stack([score for score, _ in pairs]), tf.stack([slope for _, slope in pairs])


# --- L-BFGS


@dataclass(frozen=True)
class Bend:
    """memory: pairs that L-BFGS keeps. good_enough: a score at which no other start is tried. patience: evaluations
    without a gain of a hundredth after which a start is given up for a new one.
    """

    memory: int = 50
    good_enough: float = 1e-12
    patience: int = 60


class _Enough(Exception):
    """Ends a run of SciPy's."""


def bend(
    problem: Problem, labels: Any | None, classes: int, rng: np.random.Generator, settings: Bend, work: Work
) -> Best:
    """L-BFGS from one random start after another, until one is good enough or the work is done.

    labels: (m,) given, or None: then soft labels are sought with the inputs. Inputs are bounded where the problem is.
    """
    import tensorflow as tf

    m, fixed = problem.shape[0], (*problem.known, tf.constant(1.0, problem.dtype))
    if labels is not None:
        fixed = (*fixed, tf.constant(labels))
    given = tuple((tuple(one.shape), one.dtype) for one in fixed)
    traced = _joint(problem.graph, classes, given)

    def compiled(flat: Floats) -> Any:
        return traced(*fixed, tf.constant(flat, problem.dtype))

    best = Best(problem.starts(rng, 1)[0])
    while not work.over and not best.score <= settings.good_enough:
        start = _as_unknowns(problem, problem.starts(rng, 1)[0])
        if labels is None:
            start = np.concatenate([start, rng.standard_normal(m * classes)])
        _one_start(problem, compiled, start, labels is None, best, settings, work)
    return best


def refine(
    problem: Problem,
    labels: Numbers,
    begun: Best,
    settings: Bend,
    work: Work,
    *,
    smoothing: float = 1.0,
    logits: float = 0.0,
    keep: int = 0,
) -> Best:
    """The better of `begun` and what L-BFGS makes of it.

    labels: as the model's loss takes them, given. smoothing: multiplies total variation's weight. logits: not 0 to
    have soft labels among the unknowns, beginning with this number where `labels` (m, classes) are 1: at CERTAIN they
    stay. keep: evaluations of the work for later.
    """
    import tensorflow as tf

    start, fixed = _as_unknowns(problem, begun.inputs), (*problem.known, tf.constant(smoothing, problem.dtype))
    if logits:
        start = np.concatenate([start, logits * labels.ravel()])
    else:
        fixed = (*fixed, tf.constant(labels))
    classes = labels.shape[-1] if logits else 0
    traced = _joint(problem.graph, classes, tuple((tuple(one.shape), one.dtype) for one in fixed))
    best = Best(begun.inputs, evaluations=begun.evaluations)

    def compiled(flat: Floats) -> Any:
        return traced(*fixed, tf.constant(flat, problem.dtype))

    if work.left > keep and not work.over:
        _one_start(problem, compiled, start, logits > 0, best, settings, work, keep)
    return best if best.score < begun.score else dataclasses.replace(begun, evaluations=best.evaluations)


def _as_unknowns(problem: Problem, inputs: Floats) -> Floats:
    """Inputs as L-BFGS sees them: flat, from 0 to 1 over their range."""
    return np.asarray((inputs - problem.bounds[0]).ravel() / problem.span)


@lru_cache(maxsize=KEPT)
def _joint(graph: Shape, classes: int, given: tuple[tuple[tuple[int, ...], Any], ...]) -> Any:
    """The objective and its slope in the unknowns of L-BFGS: inputs from 0 to 1 over their range, then label logits
    where no labels are given. A traced graph of what is known, the smoothing (and labels), then the unknowns.

    given: shape and type of each of its arguments but the last.
    """
    import tensorflow as tf

    m, size, sought = graph.inputs[0], math.prod(graph.inputs), len(given) == 4

    def joint(*arguments: Any) -> tuple[Any, Any]:
        known, (smoothing, *labels, flat) = arguments[:3], arguments[3:]
        with tf.GradientTape() as tape:
            tape.watch(flat)
            x = graph.bounds[0] + graph.span * tf.reshape(flat[:size], graph.inputs)
            y = tf.nn.softmax(tf.reshape(flat[size:], [m, classes])) if sought else labels[0]
            score = graph.objective(known, x, y, smoothing)
        return score, tape.gradient(score, flat)

    unknowns = tf.TensorSpec([size + (m * classes if sought else 0)], graph.dtype)
    return _traced(joint, [*(tf.TensorSpec(*one) for one in given), unknowns])


for kept in (_descent, _joint):  # TensorFlow's graphs complain where they outlive its modules
    atexit.register(kept.cache_clear)


def _one_start(
    problem: Problem, compiled: Any, start: Floats, joint: bool, best: Best, settings: Bend, work: Work, keep: int = 0
) -> None:
    from scipy.optimize import minimize

    size = math.prod(problem.shape)
    lowest, since = math.inf, 0

    def evaluate(flat: Floats) -> tuple[float, Floats]:
        nonlocal lowest, since
        score, slope = (np.asarray(part, np.float64) for part in compiled(flat))
        going = work.add(1) and work.left > keep
        best.evaluations += 1
        if score < best.score:
            best.score = float(score)
            best.inputs = problem.bounds[0] + problem.span * flat[:size].reshape(problem.shape)
            best.labels = _softmax(flat[size:].reshape(problem.shape[0], -1)) if joint else None
        if score < 0.99 * lowest:
            lowest, since = float(score), 0
        since += 1
        if not going or since > settings.patience or score <= settings.good_enough or not np.isfinite(score):
            raise _Enough
        return float(score), slope

    sides = [(0.0, 1.0) if problem.boxed else (None, None)] * size + [(None, None)] * (start.size - size)
    options = {"maxcor": settings.memory, "maxiter": work.left, "maxfun": work.left, "ftol": 0.0, "gtol": 0.0}
    with contextlib.suppress(_Enough):
        minimize(evaluate, start, jac=True, method="L-BFGS-B", bounds=sides, options=options)


def _softmax(logits: Floats) -> Floats:
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(shares / shares.sum(-1, keepdims=True))


def best_of(found: Sequence[Best]) -> Best:
    return min(found, key=lambda one: one.score)
