"""What the server does in Federated SVRG and SCAFFOLD with what its rule made of the devices' vectors. Numpy alone.

Sources: Konecny et al. 2016 (arXiv:1610.02527), Algorithm 4; Karimireddy et al. 2020 (arXiv:1910.06378), Algorithm 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[Any]


def owners(shares: Numbers) -> npt.NDArray[np.int64]:
    """omega: (n, d) shares phi_k of n devices -> (d,), how many of them have the feature at all.

    f hostile devices move a count by f at most. By claiming a feature they make it move slower, towards the plain
    average; by hiding one they hide only themselves.
    """
    return np.asarray(np.count_nonzero(shares > 0, axis=0))


def boosts(shares: Numbers) -> npt.NDArray[np.float32]:
    """The diagonal of A: a^j = K / omega^j; 1 for a feature that no device has. (n, d) -> (d,)."""
    omega = owners(shares)
    return np.divide(len(shares), omega, out=np.ones(shares.shape[1], np.float32), where=omega > 0, casting="unsafe")


def boosted(parameters: Numbers, change: Numbers, boost: Numbers) -> Numbers:
    """w + A change: the change is what the rule made of the devices' w_k - w. (d,) each."""
    return np.asarray(parameters + boost * change)


def fleet_control(control: Numbers, aggregate: Numbers, steps: int, rate: float, used: int, devices: int) -> Numbers:
    """c + |S| / N mean(c_i+ - c_i), the mean being -c - aggregate / (K eta) (scaffold.next_control, averaged).

    aggregate: (d,), what the rule made of the updates of `used` of `devices` devices.
    """
    change = -control - aggregate / control.dtype.type(steps * rate)
    return np.asarray(control + control.dtype.type(min(1.0, used / devices)) * change)
