"""How much an update counts that was trained on an older model. Pure numpy; one definition for every round."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def staleness_weight(staleness: int) -> float:
    """s = 1 / sqrt(1 + staleness), of an update that is behind by so many published models.

    Nguyen et al. 2022 (FedBuff, arXiv:2106.06639), section 5; from Xie et al. 2019 (arXiv:1903.03934), a = 1/2.
    """
    return float((1.0 + staleness) ** -0.5)


def weighted(update: Floats, staleness: int) -> Floats:
    """The (d,) update times its weight, in float32; the update itself where it is not stale."""
    return update if staleness == 0 else update * np.float32(staleness_weight(staleness))
