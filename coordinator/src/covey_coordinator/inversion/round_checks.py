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
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.linkability import linkability, sketch
from covey_coordinator.inversion.plan_gate import PrivacyPolicy
from covey_protocol.bundle import Manifest
from covey_protocol.leakage import dense_layers, label_place, label_shares, readability
from covey_protocol.messages import TRAIN, TrainingPlan
from covey_protocol.works import GRADIENT, SCAFFOLD, SVRG

Numbers = npt.NDArray[Any]
# what is looked at in a round, a second or two: numbers of first dense layers, and devices; of more always the same
MOST_NUMBERS, MOST_DEVICES = 30_000_000, 200
MOST_TOLD = 10  # sentences about devices
MOST_LINKED, LINKED_ROUNDS = 50, 5  # devices that are compared, over so many rounds
QUIET = 0.09  # of the length that noise has; the smallest weight of a late update is 0.1
READABLE = 0.99  # rank_one from which an update counts as one example's
# of the whole round, with no device
RANK_ONE, SEPARABLE, LABEL_SHARE, NORM = "rank_one", "separable", "label_share", "norm"
AGGREGATE = "aggregate_"
LINKABILITY, IDENTIFIED, CHANCE, CHECKED = "linkability_auc", "identified", "chance", "checked"


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
        self._seen: deque[list[tuple[str, Numbers]]] = deque(maxlen=LINKED_ROUNDS)

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
        fleet = {
            CHECKED: float(len(devices)),
            **self._link(-updates[rows] if plan.work == GRADIENT else updates[rows], names),
        }
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
        """Who resembles whom of the rounds before."""
        now = [(name, sketch(update, self.seed)) for name, update in zip(device_ids, updates)]
        self._seen.append(now[:MOST_LINKED])
        names = [name for one in self._seen for name, _ in one]
        numbers = [place for place, one in enumerate(self._seen) for _ in one]
        found = linkability(np.stack([row for one in self._seen for _, row in one]), names, numbers)
        measures = {LINKABILITY: found.auc, IDENTIFIED: found.identified, CHANCE: found.chance}
        return {name: float(value) for name, value in measures.items() if value is not None}
