"""Several updates of one device as one: the attacker who keeps what came in every round.

A device trains on the same data in all of them, and its noise is new each time. The mean of k updates has noise of
1/sqrt(k) of the size; what training changes in it stays, as far as the model did not move in between. That is the
simplest way to join them, and any attack on one update can be made on it. The exact way, each update at the parameters
it was trained from, is `tarantola`, which takes several updates as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from covey_coordinator.inversion.contract import Attack, AttackedModel, Finding, Progress, Seen, Stop
from covey_coordinator.inversion.matching import was_clipped
from covey_protocol.errors import UsageError


def mean_of(seen: Sequence[Seen]) -> Seen:
    """What the attacker holds of the mean of these updates, at the mean of the parameters they were trained from.

    UsageError where they are not of one device, or of different amounts of training. Where one of them was clipped,
    the mean's length is unknown, and it is said to be clipped to the length that it has.
    """
    first = seen[0]
    same = {(one.device_id, one.examples, one.plan.epochs, one.plan.learning_rate, one.noise_std) for one in seen}
    if len(same) > 1:
        raise UsageError("these updates are not of one device under one plan", "join those of one device")
    update = np.mean([np.asarray(one.update, np.float64) for one in seen], axis=0)
    clipped = any(was_clipped(one) for one in seen)
    return replace(
        first,
        parameters=np.mean([np.asarray(one.parameters, np.float64) for one in seen], axis=0).astype(np.float32),
        update=update.astype(np.float32),
        noise_std=first.noise_std / len(seen) ** 0.5,
        clip_norm=float(np.linalg.norm(update)) if clipped else first.clip_norm,
    )


@dataclass(frozen=True)
class OnTheMean:
    """Any attack on one update, made on the mean of several of one device."""

    inner: Attack

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def sees(self) -> str:
        return f"Updates of one device in several rounds, of which it takes the mean. {self.inner.sees}"

    def run(
        self,
        model: AttackedModel,
        seen: Seen | Sequence[Seen],
        *,
        seed: int,
        stop: Stop | None = None,
        progress: Progress | None = None,
    ) -> Finding:
        joined = seen if isinstance(seen, Seen) else mean_of(seen)
        return replace(self.inner.run(model, joined, seed=seed, stop=stop, progress=progress), sees=self.sees)
