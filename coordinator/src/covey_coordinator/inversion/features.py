"""From the gradient of the first dense layer back to the input of the model: a Gaussian inverse problem.

The attacker sees G = [g_W; g_b'], the first dense layer's gradient of one example (see `dense`), and knows
the layers f before it, their parameters, and how large the noise on every number of G is. Without noise G =
[f(x); 1] b' with b the bias gradient. Following Tarantola (Inverse Problem Theory, 2005, sections 3.2 and
3.4) the most probable x and b minimise

    |G - [f(x); 1] b'|^2 / s^2  +  |x - m0|^2 / tau^2        with x in the box of the input range,

where s is the noise's standard deviation and the prior is deliberately plain: the middle m0 of the range and
the spread tau of a uniform variable on it. For a fixed direction v = b/|b| only the projection G v = |b|
[f(x); 1] + noise matters; x and |b| are then found together by damped Gauss-Newton steps (SciPy's trust
region method for bounds, the Jacobian of f from TensorFlow), and v anew from the x found.

The posterior covariance of x, with |b| unknown too, is C~ = (|b|^2 J'(I - h h'/(1+|h|^2))J / s^2 + I / tau^2)^-1 for
h = f(x) and J its Jacobian; R = I - C~ / tau^2 is the resolution, and trace(R) counts how many of the input's
numbers the update determines. The posterior is the linearised one around the point found.

Not used, so that a real attacker may do better under noise: the gradients of the other layers, the dependence
of b on x, and any knowledge of what such inputs look like. Optimisation attacks use all three; they are another
module's work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.priors import Matrix, Prior, Vector
from covey_coordinator.inversion.resolution import inside, resolved_numbers

MAX_JACOBIAN_NUMBERS = 16_000_000  # 128 MB in float64; one factorisation then already takes seconds
MAX_EVALUATIONS = 60
DIRECTION_ROUNDS = 3
DIRECT_ROUNDS = 100
EDGE_SCATTER = 3.0  # pure noise passes for signal in about 1 of 1000 updates (simulated, 31 x 16 to 65 x 10)


@dataclass(frozen=True)
class FeatureMap:
    """f and its Jacobian as functions of a flat input (n,): values (m,) and matrix (m, n), both float64."""

    values: Callable[[Vector], Vector]
    jacobian: Callable[[Vector], Matrix]


@dataclass(frozen=True)
class Recovered:
    """The most probable input, flat (n,).

    resolved: trace(R), from 0 to n. bias_gradient: b (units,), the other half of the solution, for reading
    the label. misfit: the quantity minimised (both terms).
    """

    values: Vector
    bias_gradient: Vector
    resolved: float
    misfit: float


def keras_feature_map(submodel: Any, input_shape: Sequence[int]) -> FeatureMap:
    """The feature map of a Keras model whose output is the first dense layer's input, (batch, m).

    The submodel runs in inference mode: with dropout or batch normalisation before the dense layer it is not
    quite what the device computed. Variables are read at every call, so parameters may be set afterwards.
    float32 inside.
    """
    import tensorflow as tf

    shape = (1, *input_shape)

    def features(picture: Any) -> Any:
        return tf.reshape(submodel(picture, training=False), [-1])

    def slopes(picture: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(picture)
            outputs = features(picture)
        return tape.jacobian(outputs, picture)

    signature = [tf.TensorSpec(shape, tf.float32)]
    compiled_features = tf.function(features, input_signature=signature)
    compiled_slopes = tf.function(slopes, input_signature=signature)

    def on_flat(function: Any) -> Callable[[Vector], npt.NDArray[Any]]:
        return lambda flat: np.asarray(function(flat.reshape(shape).astype(np.float32)), np.float64)

    values, jacobian = on_flat(compiled_features), on_flat(compiled_slopes)
    return FeatureMap(values, lambda flat: jacobian(flat).reshape(-1, flat.size))


def invert_features(
    feature_map: FeatureMap,
    stacked: Matrix,
    directions: Sequence[Vector],
    *,
    noise_std: float,
    num_inputs: int,
    prior: Prior,
    seed: int,
    random_starts: int = 2,
) -> Recovered:
    """The input whose first dense layer has this gradient, through the layers before it.

    stacked: G (m + 1, units); noise_std: s > 0, on G's scale; directions: unit vectors (units,) to start v
    from. From the middle of the box along each direction, and from seeded random points as long as no start
    fits as well as the noise allows (projected misfit at most twice its expectation). Returns the solution of
    least misfit.
    Deviation from Tarantola: the noise covariance is a multiple of the identity (true for covey's noise).
    """
    best: Recovered | None = None
    for direction, start in _starts(directions, num_inputs, prior, seed, random_starts):
        if best is not None and _fits(feature_map, stacked, best, noise_std):
            break
        found = _descend(feature_map, stacked, direction, start, noise_std, prior)
        if best is None or found.misfit < best.misfit:
            best = found
    assert best is not None
    return best


def invert_direct(stacked: Matrix, direction: Vector, *, noise_std: float, prior: Prior) -> Recovered:
    """The same problem where the dense layer sees the input itself (f the identity), by alternating closed forms.

    stacked: G (n + 1, units); direction: unit vector (units,) to start from; noise_std: s > 0.
    """
    along = stacked @ direction
    values = np.clip(along[:-1] / (along[-1] or 1.0), prior.low, prior.high)
    bias_gradient = _bias_given_input(stacked, values)
    for _ in range(DIRECT_ROUNDS):
        trust = (bias_gradient @ bias_gradient) * prior.spread**2 / noise_std**2
        seen = stacked[:-1] @ bias_gradient * prior.spread**2 / noise_std**2
        values = np.clip((seen + prior.middle) / (trust + 1.0), prior.low, prior.high)
        bias_gradient = _bias_given_input(stacked, values)

    def resolution(size: float) -> float:
        strength = (size * prior.spread / noise_std) ** 2
        along_input = strength / (1.0 + values @ values)  # its own length the input shows through g_b only
        return float((values.size - 1) * strength / (1 + strength) + along_input / (1 + along_input))

    resolved = _without_followed_noise(resolution, stacked, values, bias_gradient, noise_std)
    return Recovered(values, bias_gradient, resolved, _misfit(stacked, values, values, noise_std, prior))


def nothing_recovered(num_inputs: int, units: int, prior: Prior) -> Recovered:
    """What an attacker is left with who learns nothing: the prior."""
    return Recovered(np.full(num_inputs, prior.middle), np.zeros(units), 0.0, math.inf)


def _starts(
    directions: Sequence[Vector], num_inputs: int, prior: Prior, seed: int, random_starts: int
) -> Iterator[tuple[Vector, Vector]]:
    rng = np.random.default_rng(seed)
    for direction in directions:
        yield direction, np.full(num_inputs, prior.middle)
    for _ in range(random_starts):
        yield directions[0], prior.low + (prior.high - prior.low) * rng.uniform(0.05, 0.95, num_inputs)


def _fits(feature_map: FeatureMap, stacked: Matrix, found: Recovered, noise_std: float) -> bool:
    size = float(np.linalg.norm(found.bias_gradient))
    if size == 0:
        return False
    seen = stacked @ (found.bias_gradient / size)
    residual = seen - size * np.append(feature_map.values(found.values), 1.0)
    return float(residual @ residual) <= 2 * seen.size * noise_std**2


def _descend(
    feature_map: FeatureMap, stacked: Matrix, direction: Vector, start: Vector, noise_std: float, prior: Prior
) -> Recovered:
    values, bias_gradient = start, direction
    features = feature_map.values(values)
    for _ in range(DIRECTION_ROUNDS):
        values = _gauss_newton(feature_map, stacked @ direction, values, noise_std, prior)
        features = feature_map.values(values)
        bias_gradient = _bias_given_input(stacked, features)
        size = np.linalg.norm(bias_gradient)
        if size == 0:
            break
        turned, direction = direction, bias_gradient / size
        if np.linalg.norm(direction - turned) < 1e-4:
            break
    resolution = _resolution(feature_map, values, noise_std, prior)
    resolved = _without_followed_noise(resolution, stacked, features, bias_gradient, noise_std)
    return Recovered(values, bias_gradient, resolved, _misfit(stacked, features, values, noise_std, prior))


def _gauss_newton(feature_map: FeatureMap, seen: Vector, start: Vector, noise_std: float, prior: Prior) -> Vector:
    """The best x for one direction. seen: G v (m + 1,). The last unknown is |b| in units of its first guess."""
    from scipy.optimize import least_squares

    ones = np.append(feature_map.values(start), 1.0)
    guess = max(float(seen @ ones / (ones @ ones)), noise_std)
    prior_slopes = np.hstack([np.eye(start.size) / prior.spread, np.zeros((start.size, 1))])

    def residuals(unknowns: Vector) -> Vector:
        model = unknowns[-1] * guess * np.append(feature_map.values(unknowns[:-1]), 1.0)
        return np.concatenate([(model - seen) / noise_std, (unknowns[:-1] - prior.middle) / prior.spread])

    def slopes(unknowns: Vector) -> Matrix:
        jacobian = np.vstack([feature_map.jacobian(unknowns[:-1]), np.zeros((1, start.size))])
        by_size = np.append(feature_map.values(unknowns[:-1]), 1.0)[:, None]
        return np.vstack([np.hstack([unknowns[-1] * jacobian, by_size]) * (guess / noise_std), prior_slopes])

    low = np.append(np.full(start.size, prior.low), 0.0)
    high = np.append(np.full(start.size, prior.high), np.inf)
    inset = 1e-3 * (prior.high - prior.low)  # the method starts strictly inside its bounds
    inside = np.append(np.clip(start, prior.low + inset, prior.high - inset), 1.0)
    solution = least_squares(
        residuals, inside, jac=slopes, bounds=(low, high), xtol=1e-7, ftol=1e-6, max_nfev=MAX_EVALUATIONS
    )
    return np.asarray(solution.x[:-1], np.float64)


def _bias_given_input(stacked: Matrix, features: Vector) -> Vector:
    extended = np.append(features, 1.0)
    return np.asarray(stacked.T @ extended / (extended @ extended), np.float64)


def _without_followed_noise(
    resolution: Callable[[float], float], stacked: Matrix, features: Vector, bias_gradient: Vector, noise_std: float
) -> float:
    """trace(R) with |b| corrected for the noise that the fit has followed. resolution: trace(R) as a function of |b|.

    The best rank-one fit of pure noise of p rows and q columns already has a size near s (sqrt p + sqrt q). An
    observed size y s above that edge comes from a true size l s with y^2 = (l^2 + p)(l^2 + q) / l^2, found along a
    direction whose squared cosine with the true one is (l^4 - p q) / (l^2 (l^2 + q)); below it no signal can be told
    from noise. Without this correction an update of noise alone would seem to resolve what the fit invented.
    Source: Benaych-Georges and Nadakuditi 2012 (arXiv:1103.2221), section 3.1, for large matrices; the edge's own
    scatter from Johnstone 2001 (Annals of Statistics 29), Theorem 1.1.
    Deviation: p counts the directions the fit can follow, which are those it resolves and its length.
    """
    size = float(np.linalg.norm(bias_gradient))
    rows, columns = resolution(size) + 1.0, stacked.shape[1]
    observed = size**2 * float(features @ features + 1.0) / noise_std**2
    root = math.sqrt(rows) + math.sqrt(columns)
    scatter = root * (1 / math.sqrt(rows) + 1 / math.sqrt(columns)) ** (1 / 3)
    if observed <= root**2 + EDGE_SCATTER * scatter:
        return 0.0
    above = observed - rows - columns
    true = (above + math.sqrt(above**2 - 4.0 * rows * columns)) / 2
    cosine = (true**2 - rows * columns) / (true * (true + columns))
    return resolution(size * math.sqrt(true / observed * cosine))


def _misfit(stacked: Matrix, features: Vector, values: Vector, noise_std: float, prior: Prior) -> float:
    residual = stacked - np.outer(np.append(features, 1.0), _bias_given_input(stacked, features))
    return float(np.sum(residual**2) / noise_std**2 + np.sum((values - prior.middle) ** 2) / prior.spread**2)


def _resolution(feature_map: FeatureMap, values: Vector, noise_std: float, prior: Prior) -> Callable[[float], float]:
    """trace(R) of this module's docstring at an input (n,), as a function of |b|."""
    point = inside(values, prior)
    features, slopes = feature_map.values(point), feature_map.jacobian(point)
    length = float(np.linalg.norm(features))
    if length > 0:
        along = features / length
        shortened = 1.0 - 1.0 / math.sqrt(1.0 + length**2)
        slopes = slopes - shortened * np.outer(along, along @ slopes)
    stretches = (np.linalg.svd(slopes, compute_uv=False) * prior.spread / noise_std) ** 2
    return lambda size: resolved_numbers(size**2 * stretches)
