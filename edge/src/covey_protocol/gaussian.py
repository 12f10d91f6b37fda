"""What Gaussian noise is worth: epsilon of any number of noised updates, exactly, with the standard library alone.

A device clips its update to norm C and adds noise of standard deviation z C to every number. Two data sets of one
device, whatever they are, give clipped updates at most 2 C apart, so one update is a Gaussian mechanism of sensitivity
2 C: mu = 2 / z in the terms of Dong, Roth and Su 2022 (arXiv:1905.02383, Gaussian differential privacy). This is local
differential privacy of all the device's data, the strongest neighbourhood there is; it holds against the coordinator
itself. (Accounting of a sum against those who see models only, per added device, has sensitivity C and amplification:
covey_coordinator.aggregation.accounting.)

Gaussian mechanisms compose exactly (their Corollary 3.3): many are one with mu^2 = sum of their mu^2, also where each
update depends on those before. And of one mechanism epsilon and delta are known exactly: Balle and Wang 2018
(arXiv:1805.06530), Theorem 8. So nothing is lost to bounds, however many rounds.

Not covered: that floating-point noise is not exactly Gaussian (Mironov 2012).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

SENSITIVITY = 2.0  # in clip norms
_PRECISION = 1e-9  # relative, upwards


def mu_of(releases: Mapping[float, int]) -> float:
    """noise multiplier -> how many updates had it; each above 0. Returns mu of all together, 0 of none."""
    return math.sqrt(sum(count * (SENSITIVITY / multiplier) ** 2 for multiplier, count in releases.items()))


def delta_of(epsilon: float, mu: float) -> float:
    """The smallest delta of a Gaussian mechanism at this epsilon (Balle and Wang 2018, eq. 6)."""
    if mu == 0:
        return 0.0
    first, second = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    return math.exp(_log_below(first)) - math.exp(epsilon + _log_below(second))


def epsilon_of(mu: float, delta: float) -> float:
    """The smallest epsilon, rounded up by at most 1e-9 of it. 0 < delta < 1."""
    if delta_of(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while delta_of(high, mu) > delta:
        low, high = high, 2 * high
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle, mu) > delta else (low, middle)
    return high


def _log_below(value: float) -> float:
    """log of the share of a standard normal below the value; where that would underflow by its asymptotic series."""
    if value > -30.0:
        return math.log(math.erfc(-value / math.sqrt(2.0)) / 2.0)
    inverse = 1.0 / value**2  # three terms: the next is below 1e-10 of the sum
    series = math.log1p(-inverse * (1.0 - 3.0 * inverse * (1.0 - 5.0 * inverse)))
    return -value * value / 2 - math.log(-value * math.sqrt(2 * math.pi)) + series
