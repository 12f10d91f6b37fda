"""Elementwise functions that TFLite 2.14 lacks or computes slowly, and gradients of those it has.

In the formulas x is the input, y = f(x) the output, dy the gradient of the loss with respect to y. The errors are the
largest measured in tflite_runtime against float64 (tests/models/test_lowering_precision.py holds them).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.constants import constant
from covey_models.lowering.formulations import absolute, minus, size
from covey_models.lowering.registry import Node, Tensor, lowers
from covey_protocol.errors import BundleError

tf = import_tensorflow()


def polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """c0 + c1 x + c2 x^2 + ..., by Horner's rule."""
    value = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def zero_is_one(x: Tensor) -> Tensor:
    """1.0 where x is 0, else 0.0."""
    return 1.0 - tf.abs(tf.sign(x))


def log_of_one_plus(x: Tensor) -> Tensor:
    """log(1 + x) with a small relative error: log(u) x / (u - 1) with u = fl(1 + x), and x where u is 1.

    Rounding in u cancels, because log(u) / (u - 1) changes slowly. Source: Goldberg 1991, theorem 4.
    """
    u = 1.0 + x
    apart = u - 1.0
    same = zero_is_one(apart)
    return tf.math.log(u) * (x / (apart + same)) + same * x


@lowers("Sub")
def subtract(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """y = a - b, as a + -1 b where a shape is broadcast: TFLite 2.14 computes that 20 times faster."""
    return minus(a, b) if a.dtype.is_floating else a - b


@lowers("Square")
def square(node: Node, x: Tensor) -> Tensor:
    """y = x x."""
    return x * x


@lowers("SquaredDifference")
def squared_difference(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """y = (a - b)^2."""
    difference = subtract(node, a, b)
    return difference * difference


@lowers("Abs")
def absolute_value(node: Node, x: Tensor) -> Tensor:
    """y = relu(x) + relu(-x), 50 times faster than ABS in TFLite 2.14."""
    return absolute(x) if x.dtype.is_floating else tf.abs(x)


@lowers("RealDiv")
def divide(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """y = a / b, as a (1 / b) where b is broadcast: 30 times faster in TFLite 2.14."""
    return a * (1.0 / b) if a.dtype.is_floating and size(b) < size(a) else a / b


@lowers("SqrtGrad")
def sqrt_gradient(node: Node, y: Tensor, dy: Tensor) -> Tensor:
    """dx = dy / (2 y)."""
    return dy * 0.5 / y


@lowers("RsqrtGrad")
def rsqrt_gradient(node: Node, y: Tensor, dy: Tensor) -> Tensor:
    """dx = -dy y^3 / 2."""
    return dy * -0.5 * y * y * y


@lowers("Reciprocal", "Inv")
def reciprocal(node: Node, x: Tensor) -> Tensor:
    """y = 1 / x."""
    return 1.0 / x


@lowers("ReciprocalGrad", "InvGrad")
def reciprocal_gradient(node: Node, y: Tensor, dy: Tensor) -> Tensor:
    """dx = -dy y^2."""
    return -dy * y * y


@lowers("DivNoNan")
def divide_no_nan(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    if b.dtype.is_complex:
        raise BundleError("complex numbers cannot be trained in TFLite", "put the spectrum before what is trained")
    is_zero = zero_is_one(b)
    return a * (1.0 - is_zero) / (b + is_zero)


@lowers("Log1p")
def log1p(node: Node, x: Tensor) -> Tensor:
    """y = log(u) x / (u - 1), u = 1 + x rounded; x where u is 1. Relative error at most 2.4e-7 for -1 < x < 3e38."""
    return log_of_one_plus(x)


@lowers("Expm1")
def expm1(node: Node, x: Tensor) -> Tensor:
    """y = exp(x) - 1 = tanh(x / 2) (exp(x) + 1), which cancels nothing. Relative error at most 6e-7."""
    return tf.tanh(0.5 * x) * (tf.exp(x) + 1.0)


@lowers("Sinh")
def sinh(node: Node, x: Tensor) -> Tensor:
    """y = tanh(x) cosh(x). Relative error at most 6e-7 for |x| < 88, where the exponential overflows."""
    return tf.tanh(x) * _cosh(x)


@lowers("Cosh")
def cosh(node: Node, x: Tensor) -> Tensor:
    """y = (exp(x) + exp(-x)) / 2. Relative error at most 3e-7 for |x| < 88, where the exponential overflows."""
    return _cosh(x)


def _cosh(x: Tensor) -> Tensor:
    return 0.5 * tf.exp(x) + 0.5 * tf.exp(-x)


@lowers("Asinh")
def asinh(node: Node, x: Tensor) -> Tensor:
    """y = sign(x) log1p(|x| + x^2 / (1 + sqrt(1 + x^2))). Relative error at most 5e-7 for |x| < 1e18."""
    size = tf.abs(x)
    square = x * x
    return tf.sign(x) * log_of_one_plus(size + square / (1.0 + tf.sqrt(1.0 + square)))


@lowers("Acosh")
def acosh(node: Node, x: Tensor) -> Tensor:
    """y = log1p(t + sqrt(t (t + 2))), t = x - 1. Relative error at most 5e-7 for 1 < x < 1e18; NaN below 1."""
    t = x - 1.0
    return log_of_one_plus(t + tf.sqrt(t * (t + 2.0)))


@lowers("Atanh")
def atanh(node: Node, x: Tensor) -> Tensor:
    """y = sign(x) log1p(2 |x| / (1 - |x|)) / 2. Relative error at most 5e-7 for |x| < 1."""
    size = tf.abs(x)
    return 0.5 * tf.sign(x) * log_of_one_plus(2.0 * size / (1.0 - size))


@lowers("Atan")
def atan(node: Node, x: Tensor) -> Tensor:
    """y = atan2(x, 1), a builtin. Relative error at most 2e-7."""
    return tf.math.atan2(x, tf.ones(x.shape))


@lowers("Atan2")
def atan2(node: Node, y: Tensor, x: Tensor) -> Tensor:
    """The builtin, on inputs of one shape: it does not broadcast."""
    shape = tf.broadcast_static_shape(y.shape, x.shape)
    return tf.raw_ops.Atan2(y=tf.broadcast_to(y, shape), x=tf.broadcast_to(x, shape))


@lowers("Asin")
def asin(node: Node, x: Tensor) -> Tensor:
    """y = atan2(x, sqrt((1 - x) (1 + x))). Relative error at most 3e-7 for |x| <= 1; NaN outside."""
    return tf.math.atan2(x, tf.sqrt((1.0 - x) * (1.0 + x)))


@lowers("Acos")
def acos(node: Node, x: Tensor) -> Tensor:
    """y = atan2(sqrt((1 - x) (1 + x)), x). Relative error at most 4e-7 for |x| < 1; NaN outside."""
    return tf.math.atan2(tf.sqrt((1.0 - x) * (1.0 + x)), x)


@lowers("Tan")
def tan(node: Node, x: Tensor) -> Tensor:
    """y = sin(x) / cos(x). Relative error at most 3e-7 for |x| < 1.57."""
    return tf.sin(x) / tf.cos(x)


# x p(x^2) / q(x^2) on [-4, 4], a minimax fit in float32; beyond 4 erf is 1 in float32.
ERF_ABOVE = (
    -1.60960333262415e-02, -2.95459980854025e-03, -7.34990630326855e-04, -5.69250639462346e-05,
    -2.10102402082508e-06, 2.77068142495902e-08, -2.72614225801306e-10,
)  # fmt: skip
ERF_BELOW = (
    -1.42647390514189e-02, -7.37332916720468e-03, -1.68282697438203e-03, -2.13374055278905e-04, -1.45660718464996e-05,
)  # fmt: skip


@lowers("Erf")
def erf(node: Node, x: Tensor) -> Tensor:
    """y = x p(x^2) / q(x^2), x clipped to [-4, 4]; p of degree 6, q of degree 4. Relative error at most 4e-7.

    Source of the coefficients: the float32 minimax fit that Eigen and XLA use.
    """
    x = tf.clip_by_value(x, -4.0, 4.0)
    square = x * x
    return x * polynomial(square, ERF_ABOVE) / polynomial(square, ERF_BELOW)


def _fitted_erfc() -> tuple[float, ...]:
    """Coefficients of g(s) = log(erfc(z) exp(z^2) (1 + z / 2)) with s = 2 / (1 + z / 2) - 1, for 0 <= z <= 12."""
    smallest = 2.0 / (1.0 + 12.0 / 2.0) - 1.0
    s = smallest + (1.0 - smallest) * (1.0 - np.cos(np.pi * (np.arange(200) + 0.5) / 200)) / 2.0  # Chebyshev's points
    z = 2.0 * (2.0 / (s + 1.0) - 1.0)
    values = [math.log(math.erfc(each)) + each * each + math.log(1.0 + each / 2.0) for each in z]
    return tuple(float(coefficient) for coefficient in np.polyfit(s, values, 10)[::-1])


ERFC = _fitted_erfc()


@lowers("Erfc")
def erfc(node: Node, x: Tensor) -> Tensor:
    """y = exp(g(s) - z^2) / (1 + z / 2), z = |x|, s = 2 / (1 + z / 2) - 1; 2 - y for x < 0.

    Relative error at most 1e-6 for |x| < 9. g is a polynomial of degree 10, fitted to float64 when this file is loaded.
    exp(-z^2) is taken in two factors, exp(-h^2) exp(-(z - h)(z + h)), h a multiple of 1/16 whose square is exact;
    otherwise the rounding of z^2 alone gives 8e-6.
    """
    size = tf.abs(x)
    t = 1.0 / (1.0 + 0.5 * size)
    coarse = tf.floor(size * 16.0) * 0.0625
    fine = polynomial(2.0 * t - 1.0, ERFC) - (size - coarse) * (size + coarse)
    tail = t * tf.exp(fine) * tf.exp(-coarse * coarse)
    return tf.where(x < tf.zeros(x.shape), 2.0 - tail, tail)


ERFINV_CENTRE = (
    1.50140941, 0.246640727, -0.00417768164, -0.00125372503, 0.00021858087, -4.39150654e-06, -3.5233877e-06,
    3.43273939e-07, 2.81022636e-08,
)  # fmt: skip
ERFINV_TAIL = (
    2.83297682, 1.00167406, 0.00943887047, -0.0076224613, 0.00573950773, -0.00367342844, 0.00134934322,
    0.000100950558, -0.000200214257,
)  # fmt: skip


def _inverse_erf(x: Tensor) -> Tensor:
    w = -tf.math.log((1.0 - x) * (1.0 + x))
    tail = polynomial(tf.sqrt(w) - 3.0, ERFINV_TAIL)
    return x * tf.where(w < 5.0 * tf.ones(x.shape), polynomial(w - 2.5, ERFINV_CENTRE), tail)


@lowers("Erfinv")
def erfinv(node: Node, x: Tensor) -> Tensor:
    """y = x p(w), w = -log(1 - x^2): two polynomials of degree 8, for w below and above 5. Relative error below 1e-6.

    Source: Giles 2010, "Approximating the erfinv function", single precision.
    """
    return _inverse_erf(x)


@lowers("Ndtri")
def normal_quantile(node: Node, x: Tensor) -> Tensor:
    """y = sqrt(2) erfinv(2 x - 1). Absolute error at most 1e-5 for 0.001 < x < 0.999: 2 x - 1 is rounded."""
    return math.sqrt(2.0) * _inverse_erf(2.0 * x - 1.0)


SHIFT = 6  # log gamma and digamma are moved up by this much before their asymptotic series


@lowers("Lgamma")
def log_gamma(node: Node, x: Tensor) -> Tensor:
    """y = S(x + 6) - log(x (x + 1) ... (x + 5)), S(z) = (z - 1/2) log z - z + log(2 pi) / 2 + 1/12z - 1/360z^3.

    For x > 0 only, NaN or wrong below. Error at most 4e-6 times max(1, |y|) for 1e-3 < x < 1e4.
    Source: Stirling's series (DLMF 5.11.1).
    """
    z = x + float(SHIFT)
    product = x
    for step in range(1, SHIFT):
        product = product * (x + float(step))
    inverse = 1.0 / z
    series = inverse * (1.0 / 12.0 - inverse * inverse * (1.0 / 360.0))
    return (z - 0.5) * tf.math.log(z) - z + 0.5 * math.log(2.0 * math.pi) + series - tf.math.log(product)


@lowers("Digamma")
def digamma(node: Node, x: Tensor) -> Tensor:
    """y = log z - 1/2z - 1/12z^2 + 1/120z^4 - 1/252z^6 - (1/x + ... + 1/(x + 5)), z = x + 6.

    For x > 0 only, wrong below. Error at most 1e-6 times max(1, |y|) for 1e-3 < x < 1e4. Source: DLMF 5.11.2.
    """
    z = x + float(SHIFT)
    inverse = 1.0 / z
    square = inverse * inverse
    series = tf.math.log(z) - 0.5 * inverse - square * (1.0 / 12.0 - square * (1.0 / 120.0 - square * (1.0 / 252.0)))
    return series - tf.add_n([1.0 / (x + float(step)) for step in range(SHIFT)])


@lowers("Polygamma")
def trigamma(node: Node, order: Tensor, x: Tensor) -> Tensor:
    """y = 1/z + 1/2z^2 + 1/6z^3 - 1/30z^5 + 1/42z^7 + 1/x^2 + ... + 1/(x + 5)^2, z = x + 6; order 1 only.

    For x > 0 only, wrong below. Relative error at most 1e-6 for 1e-3 < x < 1e4. Source: the derivative of DLMF 5.11.2.
    """
    if (constant(order, "the order of a polygamma function") != 1.0).any():
        raise BundleError("polygamma functions of an order other than 1 have no lowering", "use the first order")
    inverse = 1.0 / (x + float(SHIFT))
    square = inverse * inverse
    odd = 1.0 / 6.0 - square * (1.0 / 30.0 - square * (1.0 / 42.0))
    series = inverse + square * (0.5 + inverse * odd)
    return series + tf.add_n([1.0 / tf.square(x + float(step)) for step in range(SHIFT)])
