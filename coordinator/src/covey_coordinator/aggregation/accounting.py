"""What differential privacy a run has spent. Imports no TensorFlow.

The accountant is dp-accounting's, by Renyi differential privacy (Mironov 2017, arXiv:1702.07476; subsampling: Mironov,
Talwar, Zhang 2019, arXiv:1908.10530). Two data sets are neighbours if one has one more device, with all its data. What
is accounted is a *sum* of vectors clipped to norm C, each device in a round with probability sampling_rate and
independently of all else, plus Gaussian noise of standard deviation noise_multiplier * C. The promise is against those
who see the models, not against the coordinator, which sees updates. A fleet that invites whoever is online has
sampling_rate = 1.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from covey_protocol.errors import ConfigError


def epsilon_spent(noise_multiplier: float, rounds: int, sampling_rate: float, delta: float) -> float:
    """Epsilon of (epsilon, delta)-differential privacy after so many rounds. Infinite without noise.

    An upper bound. Raises ConfigError for arguments out of range.
    """
    if rounds < 0:
        raise ConfigError(f"epsilon of {rounds} rounds", "ask for 0 rounds or more")
    return float(epsilons_by_round(noise_multiplier, rounds, sampling_rate, delta)[rounds])


def epsilons_by_round(
    noise_multiplier: float, rounds: int, sampling_rate: float, delta: float
) -> npt.NDArray[np.float64]:
    """(rounds + 1,) float64: epsilon after 0, 1, ... rounds."""
    check_privacy(noise_multiplier, sampling_rate, delta)
    if noise_multiplier == 0:
        return np.array([0.0] + [math.inf] * rounds)
    from dp_accounting.rdp import compute_epsilon

    orders, divergences = _of_one_round(noise_multiplier, sampling_rate)
    spent = [compute_epsilon(orders, number * divergences, delta)[0] for number in range(1, rounds + 1)]
    return np.array([0.0, *spent])


def check_privacy(noise_multiplier: float, sampling_rate: float, delta: float) -> None:
    """ConfigError for what is no privacy setting."""
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ConfigError(f"noise_multiplier = {noise_multiplier}", "set noise_multiplier to 0 or more")
    if not 0 < sampling_rate <= 1:
        raise ConfigError(f"sampling_rate = {sampling_rate}", "set it to the share of devices in a round, above 0 to 1")
    if not 0 < delta < 1:
        raise ConfigError(f"delta = {delta}", "set delta well below 1 / number of devices, for example 1e-5")


@lru_cache(maxsize=16)
def _of_one_round(noise_multiplier: float, sampling_rate: float) -> tuple[npt.NDArray[np.float64], ...]:
    """(orders, Renyi divergences) of one round; those of several rounds are their multiples."""
    import dp_accounting

    accountant = dp_accounting.rdp.RdpAccountant()
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(sampling_rate, gaussian))
    # the accountant gives out epsilons only; composing every round anew would take a quarter of a second each
    return np.array(accountant._orders), np.array(accountant._rdp)
