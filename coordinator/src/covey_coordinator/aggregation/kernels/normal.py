"""Normal numbers with the same bits in every implementation: uniform bits through the inverse of the normal CDF.

Cosines, which other methods need, have no bits that libraries agree on; rational functions and one logarithm have.
"""

from __future__ import annotations

from typing import Any

from covey_coordinator.aggregation.kernels import Kernels
from covey_coordinator.aggregation.kernels.mathematics import log, uniforms

CENTRAL = 0.425  # |p - 1/2| up to here is the middle
NEAR_TAIL = 5.0  # sqrt(-log p) up to here
# Numerators and denominators, highest power first.
MIDDLE = (
    (
        2509.0809287301226727,
        33430.575583588128105,
        67265.770927008700853,
        45921.953931549871457,
        13731.693765509461125,
        1971.5909503065514427,
        133.14166789178437745,
        3.387132872796366608,
    ),
    (
        5226.495278852854561,
        28729.085735721942674,
        39307.89580009271061,
        21213.794301586595867,
        5394.1960214247511077,
        687.1870074920579083,
        42.313330701600911252,
        1.0,
    ),
)
NEAR = (
    (
        7.7454501427834140764e-4,
        0.0227238449892691845833,
        0.24178072517745061177,
        1.27045825245236838258,
        3.64784832476320460504,
        5.7694972214606914055,
        4.6303378461565452959,
        1.42343711074968357734,
    ),
    (
        1.05075007164441684324e-9,
        5.475938084995344946e-4,
        0.0151986665636164571966,
        0.14810397642748007459,
        0.68976733498510000455,
        1.6763848301838038494,
        2.05319162663775882187,
        1.0,
    ),
)
FAR = (
    (
        2.01033439929228813265e-7,
        2.71155556874348757815e-5,
        0.0012426609473880784386,
        0.026532189526576123093,
        0.29656057182850489123,
        1.7848265399172913358,
        5.4637849111641143699,
        6.6579046435011037772,
    ),
    (
        2.04426310338993978564e-15,
        1.4215117583164458887e-7,
        1.8463183175100546818e-5,
        7.868691311456132591e-4,
        0.0148753612908506148525,
        0.13692988092273580531,
        0.59983220655588793769,
        1.0,
    ),
)


def normal_quantile(k: Kernels, p: Any) -> Any:
    """The number that a standard normal one stays below with probability p, float64 in (0, 1).

    Within 1e-15 relative. Source: Wichura 1988, algorithm AS 241, PPND16.
    """
    q = p - 0.5
    middle = q * _ratio(k, MIDDLE, 0.180625 - q * q)
    r = k.sqrt(-log(k, k.minimum(p, 1.0 - p)))
    tail = k.where(r <= NEAR_TAIL, _ratio(k, NEAR, r - 1.6), _ratio(k, FAR, r - NEAR_TAIL))
    return k.where(k.maximum(q, -q) <= CENTRAL, middle, k.where(q < 0.0, -tail, tail))


def _ratio(k: Kernels, polynomials: tuple[tuple[float, ...], tuple[float, ...]], x: Any) -> Any:
    values = []
    for first, *rest in polynomials:
        value = x * 0.0 + first
        for coefficient in rest:
            value = value * x + coefficient
        values.append(value)
    return k.divide(values[0], values[1])


def normals(k: Kernels, seed: Any, n: Any) -> Any:
    """(n,) float64 standard normal numbers, drawn by the seed; none beyond 8.3 (p is at least 2^-53)."""
    return normal_quantile(k, uniforms(k, seed, n))
