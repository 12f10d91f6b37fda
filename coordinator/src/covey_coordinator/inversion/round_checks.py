"""The cheap checks of every round: how much can be read off each update, off the aggregate, and who can be told again.

They know no truth, so they say how much is readable and not whether it is right, and never what: no reading is kept.
Nothing here refuses an update. It has arrived, so whoever holds the coordinator has read it; leaving it out would undo
nothing and let anybody whose data look odd be shut out (docs/adr/0031). Pure NumPy, some milliseconds a device.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.plan_gate import PrivacyPolicy
from covey_protocol.bundle import Manifest
from covey_protocol.leakage import dense_layers, label_place, label_shares, readability
from covey_protocol.messages import TRAIN, TrainingPlan
from covey_protocol.works import GRADIENT, SCAFFOLD, SVRG

Numbers = npt.NDArray[Any]
# what is looked at in a round, a second or two: numbers of first dense layers, and devices; of more always the same
MOST_NUMBERS, MOST_DEVICES = 30_000_000, 200
MOST_TOLD = 10  # sentences about devices
SKETCH = 256  # numbers that stand for an update when updates are compared: cosines err by 1 / sqrt(256)
ROUNDS = 20  # whose comparisons are pooled
QUIET = 0.09  # of the length that noise has; the smallest weight of a late update is 0.1
READABLE = 0.99  # rank_one from which an update counts as one example's
# of the whole round, with no device
RANK_ONE, SEPARABLE, LABEL_SHARE, NORM = "rank_one", "separable", "label_share", "norm"
AGGREGATE = "aggregate_"
LINKABILITY, IDENTIFIED, COMPARED, CHECKED = "linkability_auc", "identified", "compared", "checked"


@dataclass(frozen=True)
class RoundLeakage:
    """devices: device -> measure -> value. fleet: measure -> value. told: sentences for the operator."""

    devices: Mapping[str, Mapping[str, float]]
    fleet: Mapping[str, float]
    told: Sequence[str] = ()

    def rows(self) -> list[tuple[str, str, float]]:
        """(device, measure, value); "" is the whole round."""
        own = [(device, name, value) for device, found in self.devices.items() for name, value in found.items()]
        return own + [("", name, value) for name, value in self.fleet.items()]


class _Compared(NamedTuple):
    same: Numbers
    others: Numbers
    identified: int


@dataclass
class RoundChecks:
    """Of one run. After a restart the first round has nobody to compare with."""

    manifest: Manifest
    policy: PrivacyPolicy = field(default_factory=PrivacyPolicy)
    seed: int = 0

    def __post_init__(self) -> None:
        layers = dense_layers(self.manifest.parameters)
        self._layer = layers[0] if layers else None
        self._label = label_place(self.manifest.parameters, self.manifest.loss, self.manifest.num_classes)
        self._before: dict[str, Numbers] = {}
        self._pool: deque[_Compared] = deque(maxlen=ROUNDS)

    def measure(
        self, updates: Numbers, device_ids: Sequence[str], examples: Sequence[int], plan: TrainingPlan
    ) -> RoundLeakage | None:
        """updates: (n, d), as they enter the rule. examples: as devices say. None for works that send no gradients."""
        if plan.work not in (TRAIN, GRADIENT, SVRG, SCAFFOLD) or not len(device_ids):
            return None
        size = self._layer.kernel.size if self._layer is not None else 1
        most = min(MOST_DEVICES, max(1, MOST_NUMBERS // size))
        by_name = sorted(range(len(device_ids)), key=lambda row: (zlib.crc32(device_ids[row].encode()), row))
        rows = sorted(by_name[:most])
        names = [device_ids[row] for row in rows]
        devices = {device_ids[row]: self._read(updates[row], plan, int(examples[row])) for row in rows}
        fleet = {CHECKED: float(len(devices)), **self._link(updates[rows], names)}
        told = self._told_of_devices(devices, dict(zip(device_ids, examples)), updates.shape[1])
        return RoundLeakage(devices, fleet, told)

    def with_aggregate(self, leakage: RoundLeakage, change: Numbers) -> RoundLeakage:
        """change: (d,), the new model minus the old one. With what is to be told of the round as a whole."""
        fleet = dict(leakage.fleet)
        if self._layer is not None:
            read = readability(self._layer, change)
            fleet |= {AGGREGATE + RANK_ONE: read.rank_one, AGGREGATE + SEPARABLE: float(read.separable)}
        told = list(leakage.told)
        limit, found = self.policy.max_linkability_auc, fleet.get(LINKABILITY)
        if limit is not None and found is not None and found > limit:
            told.append(f"devices can be told again by their updates: AUC {found:.2f}, above {limit:g}")
        if self.policy.max_psnr_db is not None and fleet.get(AGGREGATE + SEPARABLE):
            told.append(f"the new model states {fleet[AGGREGATE + SEPARABLE]:.0f} inputs of single examples")
        return RoundLeakage(leakage.devices, fleet, told)

    def _read(self, update: Numbers, plan: TrainingPlan, examples: int) -> dict[str, float]:
        found = {NORM: float(np.linalg.norm(update.astype(np.float64)))}
        if self._layer is not None:
            read = readability(self._layer, update)
            found |= {RANK_ONE: read.rank_one, SEPARABLE: float(read.separable)}
        if self._label is not None:
            steps = plan.steps or plan.epochs * max(1, -(-examples // self.manifest.batch_size))
            rate, told = (
                (1.0, -update[self._label]) if plan.work == GRADIENT else (plan.learning_rate, update[self._label])
            )
            found[LABEL_SHARE] = float(label_shares(told, rate, 1 if plan.work == GRADIENT else steps).max())
        return found

    def _told_of_devices(
        self, devices: Mapping[str, Mapping[str, float]], examples: Mapping[str, int], d: int
    ) -> list[str]:
        policy, told = self.policy, []
        for name, found in devices.items():
            if policy.max_psnr_db is not None and found.get(RANK_ONE, 0.0) >= READABLE:
                told.append(f"the update of {name} has rank one: it may state an example, or its features")
            if policy.max_psnr_db is not None and found.get(SEPARABLE):
                told.append(f"the update of {name} states {found[SEPARABLE]:.0f} inputs of single examples")
            if examples[name] < policy.min_examples:
                told.append(f"{name} trained on {examples[name]} examples, fewer than min_examples")
            if policy.clip_norm and not policy.noise_multiplier and found[NORM] > 1.05 * policy.clip_norm:
                told.append(
                    f"the update of {name} has norm {found[NORM]:.3g}: it does not clip to {policy.clip_norm:g}"
                )
            noise = policy.clip_norm * policy.noise_multiplier * d**0.5
            if noise and found[NORM] < QUIET * noise:
                told.append(
                    f"the update of {name} has norm {found[NORM]:.3g}: with its noise it would have {noise:.3g}"
                )
        more = len(told) - MOST_TOLD
        return [*told[:MOST_TOLD], f"and {more} more"] if more > 0 else told

    def _link(self, updates: Numbers, device_ids: Sequence[str]) -> dict[str, float]:
        """Who resembles whom of the round before: cosines of sketches, without what all have in common."""
        rng = np.random.default_rng(self.seed)
        d = updates.shape[1]
        bucket, sign = rng.integers(0, SKETCH, d), rng.choice(np.array([-1.0, 1.0]), d)
        now = np.stack([np.bincount(bucket, weights=sign * update, minlength=SKETCH) for update in updates])
        before, self._before = self._before, dict(zip(device_ids, now))
        both = [name for name in device_ids if name in before]
        if len(both) >= 2:
            cosines = _cosines(now, np.stack(list(before.values())))
            column = {name: place for place, name in enumerate(before)}
            row = {name: place for place, name in enumerate(device_ids)}
            is_same = np.zeros(cosines.shape, bool)
            for name in both:
                is_same[row[name], column[name]] = True
            identified = sum(int(cosines[row[name]].argmax()) == column[name] for name in both)
            self._pool.append(_Compared(cosines[is_same], cosines[~is_same], identified))
        if not self._pool:
            return {}
        same = np.concatenate([one.same for one in self._pool])
        return {
            LINKABILITY: auc(same, np.concatenate([one.others for one in self._pool])),
            IDENTIFIED: sum(one.identified for one in self._pool) / len(same),
            COMPARED: float(len(same)),
        }


def auc(same: Numbers, others: Numbers) -> float:
    """The chance that a pair of the same device is more alike than one of two devices; ties count half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, same, side="left") + np.searchsorted(ordered, same, side="right")
    return float(below.mean() / 2 / len(others))


def _cosines(now: Numbers, before: Numbers) -> Numbers:
    """(n, m): each round's mean is what everybody learned, and says nothing of who it was."""
    unit = []
    for rows in (now, before):
        centred = rows - rows.mean(axis=0)
        unit.append(centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-300))
    product: Numbers = unit[0] @ unit[1].T
    return product
