"""TensorFlow's fused optimizer ops as arithmetic between READ_VARIABLE and ASSIGN_VARIABLE.

The Keras optimizers of 2.14 are written in plain assignments and need none of these; tf.keras.optimizers.legacy and
tf.compat.v1.train do. In the formulas w is the variable, g its gradient, r the learning rate; every other name is a
slot or an input of the op. All slots are updated before w, as in TensorFlow.
"""

from __future__ import annotations

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.registry import Node, Tensor, lowers
from covey_models.lowering.variables import assign, read

tf = import_tensorflow()


@lowers("ResourceApplyGradientDescent")
def gradient_descent(node: Node, w: Tensor, r: Tensor, g: Tensor) -> list[Tensor]:
    """w -= r g."""
    return assign(w, read(w, g) - r * g)


@lowers("ResourceApplyMomentum")
def momentum(node: Node, w: Tensor, accumulator: Tensor, r: Tensor, g: Tensor, momentum: Tensor) -> list[Tensor]:
    """a = momentum a + g; w -= r a, with Nesterov w -= r (g + momentum a)."""
    a = read(accumulator, g) * momentum + g
    assign(accumulator, a)
    step = g + momentum * a if node.attribute("use_nesterov") else a
    return assign(w, read(w, g) - r * step)


@lowers("ResourceApplyKerasMomentum")
def keras_momentum(node: Node, w: Tensor, accumulator: Tensor, r: Tensor, g: Tensor, momentum: Tensor) -> list[Tensor]:
    """a = momentum a - r g; w += a, with Nesterov w += momentum a - r g."""
    a = read(accumulator, g) * momentum - r * g
    assign(accumulator, a)
    step = a * momentum - r * g if node.attribute("use_nesterov") else a
    return assign(w, read(w, g) + step)


def _towards(slot: Tensor, target: Tensor, decay: Tensor) -> Tensor:
    """The slot's moving average: slot += (1 - decay) (target - slot)."""
    old = read(slot, target)
    new = old + (target - old) * (1.0 - decay)
    assign(slot, new)
    return new


@lowers("ResourceApplyAdam")
def adam(
    node: Node, w: Tensor, first: Tensor, second: Tensor, power1: Tensor, power2: Tensor, r: Tensor, beta1: Tensor,
    beta2: Tensor, epsilon: Tensor, g: Tensor,
) -> list[Tensor]:  # fmt: skip
    """m += (1 - b1)(g - m); v += (1 - b2)(g^2 - v); w -= r sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + epsilon).

    With Nesterov b1 m + (1 - b1) g stands for m in the last one.
    """
    rate = r * tf.sqrt(1.0 - power2) / (1.0 - power1)
    m, v = _towards(first, g, beta1), _towards(second, g * g, beta2)
    if node.attribute("use_nesterov"):
        m = beta1 * m + (1.0 - beta1) * g
    return assign(w, read(w, g) - rate * m / (tf.sqrt(v) + epsilon))


@lowers("ResourceApplyAdamWithAmsgrad")
def adam_with_amsgrad(
    node: Node, w: Tensor, first: Tensor, second: Tensor, largest: Tensor, power1: Tensor, power2: Tensor, r: Tensor,
    beta1: Tensor, beta2: Tensor, epsilon: Tensor, g: Tensor,
) -> list[Tensor]:  # fmt: skip
    """As Adam with u = max(u, v) for v in the last formula."""
    rate = r * tf.sqrt(1.0 - power2) / (1.0 - power1)
    m, v = _towards(first, g, beta1), _towards(second, g * g, beta2)
    u = tf.maximum(read(largest, g), v)
    assign(largest, u)
    return assign(w, read(w, g) - rate * m / (tf.sqrt(u) + epsilon))


@lowers("ResourceApplyAdaMax")
def adamax(
    node: Node, w: Tensor, first: Tensor, largest: Tensor, power1: Tensor, r: Tensor, beta1: Tensor, beta2: Tensor,
    epsilon: Tensor, g: Tensor,
) -> list[Tensor]:  # fmt: skip
    """m += (1 - b1)(g - m); u = max(b2 u, |g|); w -= r / (1 - b1^t) m / (u + epsilon)."""
    m = _towards(first, g, beta1)
    u = tf.maximum(beta2 * read(largest, g), tf.abs(g))
    assign(largest, u)
    return assign(w, read(w, g) - r / (1.0 - power1) * m / (u + epsilon))


@lowers("ResourceApplyRMSProp")
def rmsprop(
    node: Node, w: Tensor, square: Tensor, accumulator: Tensor, r: Tensor, rho: Tensor, momentum: Tensor,
    epsilon: Tensor, g: Tensor,
) -> list[Tensor]:  # fmt: skip
    """s += (1 - rho)(g^2 - s); a = momentum a + r g / sqrt(s + epsilon); w -= a."""
    s = _towards(square, g * g, rho)
    a = momentum * read(accumulator, g) + r * g * tf.math.rsqrt(s + epsilon)
    assign(accumulator, a)
    return assign(w, read(w, g) - a)


@lowers("ResourceApplyCenteredRMSProp")
def centred_rmsprop(
    node: Node, w: Tensor, mean: Tensor, square: Tensor, accumulator: Tensor, r: Tensor, rho: Tensor,
    momentum: Tensor, epsilon: Tensor, g: Tensor,
) -> list[Tensor]:  # fmt: skip
    """As RMSProp with the variance s - m^2 for s, where m += (1 - rho)(g - m)."""
    s, m = _towards(square, g * g, rho), _towards(mean, g, rho)
    a = momentum * read(accumulator, g) + r * g * tf.math.rsqrt(s - m * m + epsilon)
    assign(accumulator, a)
    return assign(w, read(w, g) - a)


@lowers("ResourceApplyAdagrad", "ResourceApplyAdagradV2")
def adagrad(node: Node, w: Tensor, accumulator: Tensor, r: Tensor, *rest: Tensor) -> list[Tensor]:
    """a += g^2; w -= r g / (sqrt(a) + epsilon); the first version has no epsilon."""
    *epsilons, g = rest
    a = read(accumulator, g)
    if node.attribute("update_slots"):
        a = a + g * g
        assign(accumulator, a)
    below = tf.sqrt(a)
    for epsilon in epsilons:
        below = below + epsilon
    return assign(w, read(w, g) - r * g / below)


@lowers("ResourceApplyAdadelta")
def adadelta(
    node: Node, w: Tensor, square: Tensor, updates: Tensor, r: Tensor, rho: Tensor, epsilon: Tensor, g: Tensor
) -> list[Tensor]:
    """s += (1 - rho)(g^2 - s); d = sqrt(u + epsilon) / sqrt(s + epsilon) g; u += (1 - rho)(d^2 - u); w -= r d."""
    s = _towards(square, g * g, rho)
    step = tf.sqrt(read(updates, g) + epsilon) * tf.math.rsqrt(s + epsilon) * g
    _towards(updates, step * step, rho)
    return assign(w, read(w, g) - r * step)


@lowers("ResourceApplyFtrl", "ResourceApplyFtrlV2")
def follow_the_regularised_leader(
    node: Node, w: Tensor, accumulator: Tensor, linear: Tensor, g: Tensor, r: Tensor, l1: Tensor, l2: Tensor,
    *rest: Tensor,
) -> list[Tensor]:  # fmt: skip
    """b = a + g^2; z += g' - (b^-p - a^-p) w / r; w = (l1 sign(z) - z) / (b^-p / r + 2 l2) if |z| > l1 else 0; a = b.

    p is the learning rate's power (negative); g' = g + 2 l2_shrinkage w in the second version. With
    multiply_linear_by_lr z, l1 and l2 carry a factor r.
    """
    *shrinkages, power = rest
    scaled = node.has("multiply_linear_by_lr") and node.attribute("multiply_linear_by_lr")
    old, before = read(w, g), read(accumulator, g)
    after = before + g * g
    slope = g
    for shrinkage in shrinkages:
        slope = slope + 2.0 * shrinkage * old
    factor, divisor = (r, 1.0) if scaled else (1.0, r)
    before_power, after_power = tf.pow(before, -power), tf.pow(after, -power)
    z = read(linear, g) + factor * slope - (after_power - before_power) / divisor * old
    assign(linear, z)
    assign(accumulator, after)
    excess = tf.nn.relu(tf.abs(z) - factor * l1)
    return assign(w, -tf.sign(z) * excess / (after_power / divisor + 2.0 * factor * l2))


@lowers("ResourceApplyAddSign")
def add_sign(
    node: Node, w: Tensor, first: Tensor, r: Tensor, alpha: Tensor, decay: Tensor, beta: Tensor, g: Tensor
) -> list[Tensor]:
    """m = b m + (1 - b) g; w -= r (alpha + decay sign(g) sign(m)) g."""
    m = _towards(first, g, beta)
    return assign(w, read(w, g) - r * (alpha + decay * tf.sign(g) * tf.sign(m)) * g)


@lowers("ResourceApplyPowerSign")
def power_sign(
    node: Node, w: Tensor, first: Tensor, r: Tensor, base: Tensor, decay: Tensor, beta: Tensor, g: Tensor
) -> list[Tensor]:
    """m = b m + (1 - b) g; w -= r exp(base decay sign(g) sign(m)) g; `base` is the logarithm of the base."""
    m = _towards(first, g, beta)
    return assign(w, read(w, g) - r * tf.exp(base * decay * tf.sign(g) * tf.sign(m)) * g)


def _proximal(point: Tensor, rate: Tensor, l1: Tensor, l2: Tensor) -> Tensor:
    """sign(p) max(|p| - rate l1, 0) / (1 + rate l2)."""
    return tf.sign(point) * tf.nn.relu(tf.abs(point) - rate * l1) / (1.0 + rate * l2)


@lowers("ResourceApplyProximalGradientDescent")
def proximal_gradient_descent(node: Node, w: Tensor, r: Tensor, l1: Tensor, l2: Tensor, g: Tensor) -> list[Tensor]:
    """p = w - r g; w = sign(p) max(|p| - r l1, 0) / (1 + r l2)."""
    return assign(w, _proximal(read(w, g) - r * g, r, l1, l2))


@lowers("ResourceApplyProximalAdagrad")
def proximal_adagrad(
    node: Node, w: Tensor, accumulator: Tensor, r: Tensor, l1: Tensor, l2: Tensor, g: Tensor
) -> list[Tensor]:
    """a += g^2; q = r / sqrt(a); p = w - q g; w = sign(p) max(|p| - q l1, 0) / (1 + q l2)."""
    a = read(accumulator, g) + g * g
    assign(accumulator, a)
    rate = r * tf.math.rsqrt(a)
    return assign(w, _proximal(read(w, g) - rate * g, rate, l1, l2))
