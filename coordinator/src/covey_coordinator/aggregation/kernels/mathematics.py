"""Small functions made of kernels, and so with the same bits in every implementation."""

from __future__ import annotations

import math
from typing import Any

from covey_coordinator.aggregation.kernels import FLOAT32_MAX, Kernels, Updates

LOG_TERMS = 14  # of the series of atanh: the next term is below 1e-17 for |s| <= 0.1716
LN2 = 0.6931471805599453
SQRT2 = 1.4142135623730951
LN2_HIGH = 0.6931471803691238  # 33 bits: times an exponent it is exact
LN2_LOW = 1.9082149292705877e-10
EXP_TERMS = 14  # of the series at |r| <= ln 2 / 2: the next term is below 3e-19
EXPONENT_PLACES = 10  # binary digits of the exponents of float64
UNIFORM_BITS = 52  # one less than float64 holds, so that half a step can be added


def median_of(k: Kernels, values: Any) -> Any:
    """(n,) float64 -> scalar: the median; the mean of the two middle values for even n."""
    ordered = k.sort(values)
    n = k.length(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) * 0.5


def column_mean(k: Kernels, updates: Updates) -> Any:
    """(d,) float32: the plain mean of the rows. Equal rows give exactly that row."""
    n = k.count(updates)
    return k.combination(updates, k.full((n,), 1.0) * k.divide(1.0, k.real(n)))


def mean_of_members(k: Kernels, updates: Updates, members: Any) -> Any:
    """(d,) float32: the plain mean of the rows where members, (n,) bool, holds; at least one."""
    share = k.divide(1.0, k.real(k.number_true(members)))
    return k.combination(updates, k.where(members, share, 0.0 * share))


def square_distances(k: Kernels, inner_products: Any) -> Any:
    """(n, n) Gram matrix -> (n, n) squared distances between the rows, not negative."""
    squares = k.diagonal(inner_products)
    return k.maximum((squares[:, None] + squares[None, :]) - 2.0 * inner_products, 0.0)


def as_scores(k: Kernels, values: Any) -> Any:
    """(n,) float64 -> (n,) float32, cut at the largest finite float32."""
    return k.single(k.minimum(values, FLOAT32_MAX))


def log(k: Kernels, values: Any) -> Any:
    """Natural logarithm of positive normal float64 numbers, within 2 units in the last place."""
    mantissa, exponent = k.exponent_parts(values)
    upper = mantissa > SQRT2
    mantissa = k.where(upper, mantissa * 0.5, mantissa)
    exponent = k.real(exponent) + k.real(upper)
    s = k.divide(mantissa - 1.0, mantissa + 1.0)
    square = s * s
    series = square * 0.0 + 1.0 / (2 * LOG_TERMS + 1)
    for term in range(LOG_TERMS - 1, -1, -1):
        series = series * square + 1.0 / (2 * term + 1)
    return exponent * LN2 + 2.0 * s * series


def exp(k: Kernels, values: Any) -> Any:
    """e to the power of float64 numbers within +-700, within 2 units in the last place."""
    exponent = k.floor(values * (1.0 / LN2) + 0.5)
    rest = (values - exponent * LN2_HIGH) - exponent * LN2_LOW
    series = rest * 0.0 + 1.0 / math.factorial(EXP_TERMS)
    for term in range(EXP_TERMS - 1, -1, -1):
        series = series * rest + 1.0 / math.factorial(term)
    return series * power_of_two(k, k.whole(exponent))


def power_of_two(k: Kernels, exponent: Any) -> Any:
    """2 to the power of int64 numbers within +-1022, exactly."""
    negative = exponent < 0
    digits = k.where(negative, -exponent, exponent)
    power = k.real(exponent) * 0.0 + 1.0
    for place in range(EXPONENT_PLACES):
        size = 2.0 ** (1 << place)
        factor = k.where(negative, k.full((), 1.0 / size), k.full((), size))
        power = power * k.where((digits // (1 << place)) % 2 > 0, factor, k.full((), 1.0))
    return power


def uniforms(k: Kernels, seed: Any, n: Any) -> Any:
    """(n,) float64 in (0, 1): odd multiples of 2^-53, drawn by the seed."""
    bits = k.random_bits(seed, n)
    return (k.real((bits // (1 << (64 - UNIFORM_BITS))) % (1 << UNIFORM_BITS)) + 0.5) * 2.0**-UNIFORM_BITS


def permutation(k: Kernels, seed: Any, n: Any) -> Any:
    """(n,) int64: the numbers 0 to n - 1 in an order drawn by the seed."""
    return k.argsort(k.random_bits(seed, n))
