"""What an evaluation round says of a model: each metric's mean, median and spread over the devices.

Every number is a rule's, applied to the (n, m) matrix of n devices' m metrics, so that num_byzantine devices that send
anything cannot move one out of the range of what the others sent: median and spread by their definition, the mean
because a value beyond the num_byzantine-th smallest or largest counts as that one. No device is rejected for being
far away: honest data differ, and there is always one that is the worst. Its score says how far it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from covey_coordinator.aggregation.kernels import Updates
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.mean import Mean
from covey_coordinator.aggregation.rules import Batch
from covey_coordinator.aggregation.screening import Screened, number_fault
from covey_coordinator.aggregation.trimmed_mean import Median
from covey_coordinator.records import ACCEPTED, REJECTED, Array, DeviceVerdict, FleetMetric

BOUNDS = {"accuracy": (0.0, 1.0)}  # of the metrics that have any
ROUNDING = 1e-3  # a batch's share of right places is a float32 sum
MOST_SPREADS = 1e6  # a score is a finite number, also where all devices but one say the same


@dataclass(frozen=True)
class Evaluated:
    """parameters: of the model that was evaluated, as they were. verdicts: by device id; score: how many spreads the
    device is from the median, of the metric where it is farthest. metrics: in the order of the plan, held_out not set.
    """

    parameters: Array
    verdicts: list[DeviceVerdict]
    measurements: dict[str, float]
    metrics: tuple[FleetMetric, ...]


def metrics_fault(names: Sequence[str]) -> Callable[[Array, float], str]:
    """What screening asks of an evaluation's numbers. Zeros are good ones, and so are those of another device."""

    def fault(row: Array, norm: float) -> str:
        bad = number_fault(row, norm)
        for name, value in zip(names, row.tolist()):
            low, high = BOUNDS.get(name, (-np.inf, np.inf))
            if not bad and not low - ROUNDING <= value <= high + ROUNDING:
                bad = f"{name} is {value:g}, not from {low:g} to {high:g}"
        return bad

    return fault


def evaluated(names: Sequence[str], parameters: Array, screened: Screened, num_byzantine: int) -> Evaluated:
    """Raises RuleError where so few devices cannot bear num_byzantine, less those that screening refused."""
    kernels, n, values = NumpyKernels(), len(screened.device_ids), screened.updates
    left = number_of_liars(screened, num_byzantine)

    def median(rows: Array) -> Array:
        return np.asarray(Median(left).step(kernels, Batch(Updates(rows), screened.num_examples, None)).aggregate)

    mean, middle = cut_mean(screened, left), median(values)
    distances = np.abs(values - middle)
    spread = median(distances)
    metrics = tuple(
        FleetMetric(name, float(mean[place]), float(middle[place]), float(spread[place]), n)
        for place, name in enumerate(names)
    )
    measurements = {"num_byzantine": float(num_byzantine), "num_byzantine_left": float(left)}
    return Evaluated(parameters, _verdicts(screened, _spreads(distances, spread)), measurements, metrics)


def number_of_liars(screened: Screened, num_byzantine: int) -> int:
    """How many may be among those that screening let pass. RuleError where so few devices cannot bear them."""
    left = max(0, num_byzantine - screened.num_faulty)
    Median(left).check(len(screened.device_ids))
    return left


def cut_mean(screened: Screened, left: int) -> Array:
    """(n, m) -> (m,): the mean, weighted by capped numbers of examples, of the values cut to the range from the
    (left + 1)-th smallest to the (left + 1)-th largest."""
    kernels, n, values = NumpyKernels(), len(screened.device_ids), screened.updates
    low, high = (kernels.ranked_means(Updates(values), rank, rank + 1, cut=0)[0] for rank in (left, n - 1 - left))
    within = Batch(Updates(np.clip(values, low, high)), screened.num_examples, None)
    return np.asarray(Mean().step(kernels, within).aggregate)


def _spreads(distances: Array, spread: Array) -> Array:
    """(n, m), (m,) -> (n,): the largest of each row's distances in spreads; MOST_SPREADS for any where that is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(distances > 0, distances.astype(np.float64) / spread, 0.0)
    return np.asarray(np.minimum(ratios, MOST_SPREADS).max(axis=1))


def _verdicts(screened: Screened, scores: Array) -> list[DeviceVerdict]:
    used = [
        DeviceVerdict(device_id, ACCEPTED, "", float(score), int(count), screened.norms[device_id])
        for device_id, score, count in zip(screened.device_ids, scores, screened.num_examples)
    ]
    refused = [DeviceVerdict(device_id, REJECTED, reason) for device_id, reason in screened.reasons.items()]
    return sorted([*used, *refused], key=lambda verdict: verdict.device_id)
