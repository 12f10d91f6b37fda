"""A new model goes to a few devices first: whom a run's rounds mean, and what its evaluations must say before more.

Pure: it is told how many rounds are published and what evaluations gave. What it needs to know again after a restart is
in the run's store already.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from covey_coordinator.aggregation.evaluating import BOUNDS
from covey_protocol.errors import ConfigError, RunError

NotNegative = Annotated[float, Meta(ge=0)]


class RolloutSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """rings: device ids; each ring holds those before it, and after the last come all that [round] means. rounds:
    published in each ring. max_worse: by so much the median of metric, as the ring's devices evaluate it, may be worse
    than baseline (the old model's, where it is known) and than at the end of the ring before. accept: rounds at whose
    end the next ring opens whatever was said."""

    rings: Annotated[tuple[Annotated[tuple[str, ...], Meta(min_length=1)], ...], Meta(min_length=1, max_length=32)]
    rounds: Annotated[int, Meta(ge=1)]
    metric: Literal["loss", "accuracy"] = "loss"
    max_worse: NotNegative = 0.0
    baseline: float | None = None
    accept: tuple[int, ...] = ()

    def ring(self, number: int) -> int | None:
        """From 0: the one to which round `number` belongs; None after the last."""
        place = (number - 1) // self.rounds
        return place if place < len(self.rings) else None

    def only(self, number: int, meant: tuple[str, ...]) -> tuple[str, ...]:
        """Whom round `number` means, as [round] only would say it. meant: that itself."""
        ring = self.ring(number)
        if ring is None:
            return meant
        return tuple(dict.fromkeys(name for one in self.rings[: ring + 1] for name in one))

    def is_gate(self, done: int) -> bool:
        """Whether with round `done` a ring ends."""
        return done > 0 and done % self.rounds == 0 and self.ring(done) is not None


def check_gate(settings: RolloutSettings, done: int, median: Callable[[int], float | None]) -> str:
    """What the evaluation at the end of a ring says, in words. median: of a round's model, None where there is none.

    RunError where the model is not to go further.
    """
    ring = done // settings.rounds
    value = median(done)
    if done in settings.accept:
        return f"rollout: ring {ring} of {len(settings.rings)} ends, accepted by the operator"
    remedy = f"see `covey devices`; to go on all the same, add {done} to rollout.accept"
    if value is None:
        raise RunError(
            f"rollout: nobody knows the {settings.metric} of round {done}, with which ring {ring} ends", remedy
        )
    before = median(done - settings.rounds) if ring > 1 else None
    for what, reference in (("the baseline", settings.baseline), (f"the end of ring {ring - 1}", before)):
        if reference is not None and _loss(settings, value - reference) > settings.max_worse:
            raise RunError(
                f"rollout: {settings.metric} {value:.4g} at the end of ring {ring} is worse than {reference:.4g} of "
                f"{what} by more than {settings.max_worse:g}",
                remedy,
            )
    return f"rollout: ring {ring} of {len(settings.rings)} ends with {settings.metric} {value:.4g}; the next opens"


def _loss(settings: RolloutSettings, more: float) -> float:
    return -more if settings.metric in BOUNDS else more  # of what has bounds, more is better


def check_rollout(
    path: Path,
    settings: RolloutSettings | None,
    *,
    meant: Collection[str],
    devices: int,
    rounds: int,
    evaluates: tuple[int, Collection[str]],
    simple: bool,
) -> None:
    """meant: whom [round] means. devices: a round's, or an evaluation's where that asks for more. evaluates: every how
    many rounds, and what. simple: a round is one exchange with the devices. Raises ConfigError."""
    if settings is None:
        return
    every, metrics = evaluates
    named = [name for ring in settings.rings for name in ring]
    for name in named:
        if name not in meant or named.count(name) > 1:
            why = "twice" if name in meant else "which [round] does not mean or [devices] does not hold"
            raise ConfigError(f"{path}: [rollout] names {name}, {why}", "correct its rings")
    if len(settings.rings[0]) < devices:
        raise ConfigError(
            f"{path}: the first ring of [rollout] has {len(settings.rings[0])} devices, a round needs {devices}",
            "name more, or lower round.devices and evaluation.devices",
        )
    if not every or settings.rounds % every or settings.metric not in metrics:
        raise ConfigError(
            f"{path}: a ring of [rollout] ends after {settings.rounds} rounds with no evaluation of {settings.metric}",
            "set evaluation.every to a divisor of rollout.rounds, and name the metric in evaluation.metrics",
        )
    if rounds <= len(settings.rings) * settings.rounds:
        raise ConfigError(
            f"{path}: {rounds} rounds end before [rollout] comes to all devices",
            "raise rounds, or lower rollout.rounds",
        )
    if not simple:
        raise ConfigError(f"{path}: [rollout] with an algorithm whose rounds are several exchanges", "use fedavg")
