"""Model inversion: what does a member of a class look like, read off the finished model (Fredrikson et al. 2015).

MI-Face, Algorithm 1 of "Model Inversion Attacks that Exploit Confidence Information and Basic Countermeasures" (CCS
2015): gradient descent on c(x) = 1 - f_label(x) + AuxTerm(x), each step followed by Process. What the attacker can ask
the model is a `Slopes`: `white_box` holds the model, `black_box` asks for probabilities and takes differences.
`rounded` is the paper's countermeasure as a wrapper of what is asked, `labels_only` shows the class alone.

Nothing here attacks updates. TensorFlow is imported by `white_box` and `asked` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.contract import AttackedModel, Progress, Stop
from covey_protocol.errors import UsageError

Array = npt.NDArray[Any]
Ask = Callable[[Array], Array]  # x (n, *input shape) -> probabilities (n, C), as the model answers
Process = Callable[[Array], Array]  # x (n, ...) -> x (n, ...), after every step
Auxiliary = Callable[[Array], tuple[Array, Array]]  # x (n, ...) -> (terms (n,), their slopes (n, ...))

SEES_MODEL = "The finished model with its parameters."
SEES_ANSWERS = "The model's answers to inputs of the attacker's choice."
MOST_NUMBERS = 1 << 24  # of inputs asked at once: 64 MB as float32

CONFIDENT, NO_BETTER, ALL_STEPS, ENDED = "confident", "no better", "all steps", "ended"


class Slope(NamedTuple):
    """Of n inputs: the confidence f_label (n,), its slope in the input (n, ...), and how many answers that took."""

    confidence: Array
    slope: Array
    answers: int = 0


Slopes = Callable[[Array, Array], Slope]  # (x (n, ...), labels (n,)) -> Slope


@dataclass(frozen=True)
class Search:
    """The paper's settings of Algorithm 1: alpha, beta, gamma, lambda.

    iterations: alpha. patience: beta; a class ends when its cost is no lower than the highest of so many before.
    confidence: gamma; a class ends when its cost is at most 1 - confidence. rate: lambda.
    unit: steps of length `rate` whatever the slope's; not in the paper, for slopes known only in direction.

    Deviation: Algorithm 1 as printed ends at a cost of at most gamma, and gamma = 0.99 would end it at its start,
    where 40 people have a cost of 0.975; as a confidence it is what the text describes. The first `patience` costs
    are never "no better".
    """

    iterations: int = 5000
    patience: int = 100
    confidence: float = 0.99
    rate: float = 0.1
    unit: bool = False


@dataclass(frozen=True)
class Inverted:
    """One input per class asked for: that of the lowest cost. ended: why each search ended. answers: asked in all."""

    inputs: Array
    confidences: Array
    iterations: Array
    ended: tuple[str, ...]
    answers: int

    @property
    def empty(self) -> Array:
        """(n,) bool: whether the input is flat, so that nothing was learned from a flat start."""
        flat = self.inputs.reshape(len(self.inputs), -1)
        return np.asarray(np.ptp(flat, axis=1) == 0)


def invert(
    slopes: Slopes,
    labels: Sequence[int] | Array,
    start: Array,
    search: Search | None = None,
    *,
    process: Process | None = None,
    auxiliary: Auxiliary | None = None,
    stop: Stop | None = None,
    progress: Progress | None = None,
) -> Inverted:
    """MI-Face for several classes side by side, each with its own end.

    labels (n,). start (...): one input, for all classes; the paper's is 0. process: None leaves inputs as they are,
    also beyond the declared range, as in the paper; see `within`. What `slopes` draws at random is seeded there.
    """
    told = search or Search()
    labels = np.asarray(labels)
    state = _State(labels, np.repeat(np.asarray(start, np.float64)[None], len(labels), axis=0))
    answers = 0
    for number in range(told.iterations + 1):
        live = state.live
        if not len(live):
            break
        if stop is not None and stop():
            state.end(live, ENDED)
            break
        found = slopes(state.x[live], labels[live])
        answers += found.answers
        terms, bends = auxiliary(state.x[live]) if auxiliary is not None else (0.0, 0.0)
        state.judge(live, 1 - found.confidence + terms, found.confidence, number, told)
        state.step(live, -found.slope + bends, told, process)
        if progress is not None:
            progress(number, told.iterations)
    state.end(state.live, ALL_STEPS)
    return Inverted(state.best, state.confidence, state.iterations, tuple(state.ended), answers)


class _State:
    """Where every class stands. best: the input of its lowest cost so far."""

    def __init__(self, labels: Array, x: Array) -> None:
        self.x, self.best = x, x.copy()
        self.lowest = np.full(len(labels), np.inf)
        self.confidence = np.zeros(len(labels))
        self.iterations = np.zeros(len(labels), np.int64)
        self.ended = [""] * len(labels)
        self._costs: list[Array] = []

    @property
    def live(self) -> Array:
        return np.flatnonzero([not why for why in self.ended])

    def end(self, places: Array, why: str) -> None:
        for place in places:
            self.ended[place] = why

    def judge(self, live: Array, costs: Array, confidences: Array, number: int, told: Search) -> None:
        better = costs < self.lowest[live]
        places = live[better]
        self.lowest[places], self.confidence[places] = costs[better], confidences[better]
        self.best[places] = self.x[places]
        self.iterations[live] = number
        before = np.stack(self._costs)[:, live].max(axis=0) if len(self._costs) >= told.patience else np.inf
        self.end(live[costs >= before], NO_BETTER)
        self.end(live[costs <= 1 - told.confidence], CONFIDENT)
        row = np.full(len(self.lowest), -np.inf)
        row[live] = costs
        self._costs = [*self._costs, row][-told.patience :]

    def step(self, live: Array, slopes: Array, told: Search, process: Process | None) -> None:
        if told.unit:
            lengths = np.sqrt(np.sum(slopes**2, axis=tuple(range(1, slopes.ndim)), keepdims=True))
            slopes = slopes / np.where(lengths > 0, lengths, 1)
        moved = self.x[live] - told.rate * slopes
        self.x[live] = moved if process is None else process(moved)


# --- what the attacker can ask


def white_box(model: AttackedModel, parameters: Any, *, through_loss: bool = False) -> Slopes:
    """Confidence and slope by differentiating the model.

    through_loss: of the cross entropy that the bundle trains on, f = exp(-loss), instead of what `infer` gives: this
    is how a holder of the bundle gets around outputs that are rounded in the file. It sees the model in training mode.
    """
    import tensorflow as tf

    flat = tf.constant(np.asarray(parameters), model.dtype)

    def of_outputs(x: Any, labels: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            chosen = tf.gather(_one_row(model.outputs(flat, x)), labels, batch_dims=1)
            total = tf.reduce_sum(chosen)
        return chosen, tape.gradient(total, x)

    def of_loss(x: Any, labels: Any) -> tuple[Any, Any]:
        weights = tf.ones(tf.shape(x)[0], model.dtype)
        count = tf.reduce_sum(weights)
        with tf.GradientTape() as tape:
            tape.watch((x, weights))
            loss = model.loss(flat, x, labels, weights)
        bend, by_weight = tape.gradient(loss, (x, weights))
        chosen = tf.exp(-(loss + count * by_weight))  # one pass gives every example's loss: see membership._losses
        return chosen, -tf.reshape(chosen, [-1] + [1] * (len(x.shape) - 1)) * count * bend

    traced = tf.function(of_loss if through_loss else of_outputs)

    def slopes(x: Array, labels: Array) -> Slope:
        rows = _filled_up(len(x))
        confidence, slope = traced(tf.constant(x[rows], model.dtype), tf.constant(labels[rows], tf.int32))
        if slope is None:
            raise UsageError(
                "the model's outputs have no slope (they are rounded in the bundle)", "use through_loss=True"
            )
        return Slope(confidence.numpy()[: len(x)], slope.numpy()[: len(x)])

    return slopes


def _filled_up(count: int) -> Array:
    """Places of 0 .. count - 1, the last repeated up to a power of two: a function is traced for few sizes, not all."""
    return np.minimum(np.arange(1 << (count - 1).bit_length()), count - 1)


def asked(model: AttackedModel, parameters: Any) -> Ask:
    """The model as somebody sees it who may only ask: inputs in, probabilities out."""
    import tensorflow as tf

    flat = tf.constant(np.asarray(parameters), model.dtype)
    traced = tf.function(lambda x: _one_row(model.outputs(flat, x)))

    def ask(x: Array) -> Array:
        rows = max(1, MOST_NUMBERS // max(1, int(np.prod(x.shape[1:]))))
        parts = []
        for first in range(0, len(x), rows):
            part = x[first : first + rows]
            parts.append(traced(tf.constant(part[_filled_up(len(part))], model.dtype)).numpy()[: len(part)])
        return np.concatenate(parts)

    return ask


def _one_row(outputs: Any) -> Any:
    if len(outputs.shape) != 2:
        raise UsageError(
            f"the model's outputs have shape {tuple(outputs.shape)}", "invert a model with one class per input"
        )
    return outputs


def rounded(ask: Ask, unit: float) -> Ask:
    """The paper's countermeasure: probabilities to multiples of `unit`. They need not add up to 1 any more."""
    if not 0 < unit <= 1:
        raise UsageError(f"rounding to multiples of {unit}", "give a number above 0 and at most 1")
    return lambda x: np.round(ask(x) / unit) * unit


def labels_only(ask: Ask) -> Ask:
    """The strongest rounding: 1 for the most probable class, 0 for the others."""

    def answer(x: Array) -> Array:
        probabilities = ask(x)
        return np.asarray(np.eye(probabilities.shape[1])[probabilities.argmax(axis=1)])

    return answer


def black_box(ask: Ask, step: float) -> Slopes:
    """Central differences in every number of the input: 2 d answers for one slope.

    step: how far an input number is moved. It decides what is found where answers are rounded: the smallest change of
    a probability that shows is about the rounding unit, so the step must be so large that one number makes it.
    """

    def slopes(x: Array, labels: Array) -> Slope:
        size = int(np.prod(x.shape[1:]))
        found = [_differences(ask, one, label, step) for one, label in zip(x, labels)]
        confidence = np.take_along_axis(ask(x), labels[:, None], axis=1)[:, 0]
        return Slope(confidence, np.stack(found), len(x) * (2 * size + 1))

    return slopes


def _differences(ask: Ask, x: Array, label: int, step: float) -> Array:
    size = x.size
    rows = max(1, MOST_NUMBERS // (2 * size))
    found = np.empty(size)
    for first in range(0, size, rows):
        places = np.arange(first, min(first + rows, size))
        moves = np.zeros((len(places), size))
        moves[np.arange(len(places)), places] = step
        around = np.concatenate([x.reshape(1, -1) + moves, x.reshape(1, -1) - moves]).reshape(-1, *x.shape)
        up, down = np.split(ask(around)[:, label], 2)
        found[places] = (up - down) / (2 * step)
    return found.reshape(x.shape)


Draw = Callable[[np.random.Generator, int], Array]  # (generator, n) -> (n, *input shape), of mean 0


def smoothed(ask: Ask, draw: Draw, spread: float, draws: int, seed: int) -> Slopes:
    """Slopes of the confidence averaged over random moves of the input: the adaptive attack on rounding.

    An average over moves that are large beside what rounding hides is smooth although each answer is rounded, or a mere
    class: the moves act as dither. Antithetic pairs: 2 `draws` answers for one slope (Salimans et al. 2017,
    arXiv:1703.03864; on decisions alone Kahla et al. 2022, arXiv:2203.06580). draw: kinds of moves; for pictures those
    of `blotches`. spread: their size. The confidence is the average's, not that of the input itself.
    """
    random = np.random.default_rng(seed)

    def slopes(x: Array, labels: Array) -> Slope:
        confidences, found = [], []
        for one, label in zip(x, labels):
            moves = draw(random, draws)
            up, down = np.split(ask(np.concatenate([one + spread * moves, one - spread * moves]))[:, label], 2)
            found.append(np.tensordot((up - down) / (2 * spread * draws), moves, axes=1))
            confidences.append((up.mean() + down.mean()) / 2)
        return Slope(np.array(confidences), np.stack(found), 2 * draws * len(x))

    return slopes


def blotches(shape: Sequence[int], coarse: int) -> Draw:
    """Random pictures of coarse x coarse Gaussian numbers, smoothly enlarged to (height, width[, channels])."""
    height, width = shape[:2]
    down, across = _enlarging(height, coarse), _enlarging(width, coarse)

    def draw(random: np.random.Generator, count: int) -> Array:
        large = down @ random.standard_normal((count, coarse, coarse)) @ across.T
        return np.asarray(large.reshape(count, height, width, *([1] * (len(shape) - 2))) * np.ones(shape))

    return draw


def _enlarging(size: int, coarse: int) -> Array:
    """(size, coarse): linear interpolation between the centres of `coarse` equal pieces."""
    centres = (np.arange(coarse) + 0.5) * size / coarse - 0.5
    return np.stack([np.interp(np.arange(size), centres, row) for row in np.eye(coarse)], axis=1)


# --- Process and AuxTerm


def within(low: float, high: float) -> Process:
    """Inputs stay in their range. Not in the paper, whose Process is the identity where it is no autoencoder's."""
    return lambda x: np.clip(x, low, high)


def denoised_and_sharpened(strength: float = 0.5) -> Process:
    """A median of 3x3, then x + strength (x - Gaussian blur of x), within [0, 1]; pictures (n, height, width[, 1]).

    Deviation: the paper's denoiser is non-local means.
    """
    from scipy.ndimage import gaussian_filter, median_filter

    def process(x: Array) -> Array:
        flat = x.reshape(x.shape[:3])
        calm = median_filter(flat, size=(1, 3, 3))
        sharp = calm + strength * (calm - gaussian_filter(calm, sigma=(0, 1, 1)))
        return np.asarray(np.clip(sharp, 0, 1).reshape(x.shape))

    return process


def in_code_space(encode: Callable[[Array], Array], decode: Callable[[Array], Array], process: Process) -> Process:
    """Process-DAE (Algorithm 2): a code is decoded, processed as a picture, and encoded again."""
    return lambda code: encode(process(decode(code)))


def near(center: Array, weight: float) -> Auxiliary:
    """AuxTerm of an attacker who knows about what inputs look like: weight times the mean square distance to it."""

    def term(x: Array) -> tuple[Array, Array]:
        difference = x - center
        axes = tuple(range(1, x.ndim))
        size = int(np.prod(x.shape[1:]))
        return weight * np.mean(difference**2, axis=axes), 2 * weight / size * difference

    return term
