"""[teaching] of an experiment, and what live rounds share with it. No TensorFlow. docs/teaching-mathematics.md."""

from __future__ import annotations

import math
from typing import Annotated

from msgspec import Meta, Struct

from covey_edge.config import NotNegative, Positive
from covey_protocol.teaching import Settings


class Penalties(Struct, frozen=True, forbid_unknown_fields=True):
    """What [teaching] has in experiments and in live rounds: as in covey_protocol.teaching.Settings."""

    lambda_w: Positive = 1.0
    lambda_t: NotNegative = 1.0
    lambda_a: NotNegative = 0.0
    lambda_z: Positive = math.inf
    lambda_y: Annotated[float, Meta(gt=0.5)] = math.inf


class SimulatedTeaching(Penalties, frozen=True, forbid_unknown_fields=True):
    """rho, curvature: as in covey_protocol.teaching.Settings, 0 for the data's own.

    fourier_features: so many, of what the model's last layer sees; 0 for that itself. width: of their kernel, 0 for the
    median distance of trusted instances. representation_steps: steps of Adam that the model is trained on the trusted
    instances before it represents; 0 leaves it at its first weights.
    """

    rho: NotNegative = 0.0
    curvature: NotNegative = 0.0
    fourier_features: Annotated[int, Meta(ge=0, le=100_000)] = 0
    width: NotNegative = 0.0
    representation_steps: Annotated[int, Meta(ge=0, le=100_000)] = 0

    def settings(self, rounds: int) -> Settings:
        """With penalties of 1 where the data shall say them: see `tuning.balanced`."""
        return Settings(
            self.lambda_w,
            self.lambda_t,
            self.lambda_a,
            self.lambda_z,
            self.lambda_y,
            self.rho or 1.0,
            self.curvature or 1.0,
            rounds,
        )
