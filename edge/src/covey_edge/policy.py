"""What the owner of a device lets it work for, and on which data. Decides by agent.toml alone; reads no data."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional

import msgspec
from msgspec import UNSET

from covey_edge.config import AgentConfig, DataSettings, PolicySettings, TaskData
from covey_edge.leak_told import JUDGED
from covey_edge.reading import HELD_OUT, TRAINING, Reading, What
from covey_protocol.bundle import METRICS
from covey_protocol.messages import BlobRef, TrainingPlan
from covey_protocol.works import CORRECT, FEATURES, WORKS


class DataPlace(NamedTuple):
    """path, replica, debug: as in agent.toml. held_out: the owner keeps these data for evaluations. trusted: where the
    instances are whose labels the owner vouches for, "" for none. shards: (name, path) of a code's; it has no path.
    reading: how the source reads them.
    """

    source: str
    path: str
    held_out: bool = False
    trusted: str = ""
    replica: str = ""
    shards: tuple[tuple[str, str], ...] = ()
    debug: str = ""
    reading: Reading = Reading()

    def kept_in(self, state_dir: Path) -> Reading:
        """With the folder where the split, the statistics and the report lie."""
        return msgspec.structs.replace(self.reading, state_dir=str(state_dir))

    def looked_at(self, state_dir: Path) -> Reading:
        """The same, without a change of anything there."""
        return msgspec.structs.replace(self.kept_in(state_dir), keeps=False)


def data_for(data: DataSettings, plan: TrainingPlan) -> Optional[DataPlace]:
    """Where the data for this plan are; None where the device has none for its task.

    A device that names the data of tasks has others only for a round without a task: data of one task would train
    another one's model to nonsense, where their shapes happen to agree.
    """
    task = plan.task if data.tasks else ""
    own = data.tasks.get(task) if task else data
    if own is None:
        return None
    reading = _reading(own, task)
    if plan.coding is not UNSET:
        return DataPlace(own.source, "", shards=tuple(own.shards.items()), reading=reading) if own.shards else None
    if plan.evaluate and own.evaluation_path:
        return DataPlace(own.source, own.evaluation_path, True, reading=reading.beside("evaluation"))
    if not own.path:
        return None
    if plan.evaluate and own.holdout:
        return DataPlace(own.source, own.path, True, reading=msgspec.structs.replace(reading, part=HELD_OUT))
    return DataPlace(
        own.source, own.path, trusted=own.trusted_path, replica=own.replica, debug=own.debug, reading=reading
    )


def places(data: DataSettings) -> list[DataPlace]:
    """All data of this device, each once for each way in which it is read; those to train on come first."""
    settings: list[tuple[str, DataSettings | TaskData]] = [("", data), *data.tasks.items()]
    found = [place for task, own in settings for place in _places(own, _reading(own, task)) if place.path]
    return [place for number, place in enumerate(found) if place not in found[:number]]


def _places(own: DataSettings | TaskData, reading: Reading) -> list[DataPlace]:
    beside: list[tuple[What, str]] = [("evaluation", own.evaluation_path), ("trusted", own.trusted_path)]
    beside += [("shard", path) for path in own.shards.values()]
    others = [DataPlace(own.source, path, reading=reading.beside(what)) for what, path in beside]
    return [DataPlace(own.source, own.path, reading=reading), *others]


def _reading(own: DataSettings | TaskData, task: str) -> Reading:
    reading = Reading(own.options, own.bad_rows, own.normalise, own.holdout, task=task)
    return msgspec.structs.replace(reading, part=TRAINING) if own.holdout else reading


def unwilling(config: AgentConfig, plan: TrainingPlan) -> str:
    """Why this device takes no part in a round of this task, or in this evaluation; "" where it does."""
    policy, name = config.policy, f"task {plan.task!r}" if plan.task else "a round without a task"
    if plan.task in policy.refuse_tasks or (policy.tasks is not None and plan.task not in policy.tasks):
        return f"this device does not work for {name} ([policy] in its agent.toml)"
    data = data_for(config.data, plan)
    if data is None:
        return f"this device has no data for {name} ([data] in its agent.toml)"
    unknown = [metric for metric in plan.evaluate if metric not in METRICS]
    if unknown:
        return f"this device cannot measure {', '.join(unknown)}; update its agent"
    if plan.evaluate and config.privacy.noise_multiplier and not config.privacy.exact_evaluation:
        return "this device adds noise, and metrics have none (privacy.exact_evaluation in its agent.toml)"
    limited = config.privacy.max_psnr_db or config.privacy.max_label_recovery
    if limited and not plan.evaluate and plan.work in WORKS and plan.work not in JUDGED:
        return f"this device limits what its updates tell, and cannot judge {plan.work!r} ([privacy] in its agent.toml)"
    if plan.work not in WORKS:
        return f"this device cannot do {plan.work!r}; update its agent"
    if plan.coding is not UNSET:
        held = plan.coding.held_by(config.device_id)
        missing = [one for one in held if one not in dict(data.shards)]
        if missing or not held:
            return f"this device holds no shard {missing[0]!r}" if held else "this device has no place in the code"
    if plan.work == CORRECT and not data.trusted:
        return f"this device has no trusted instances for {name} ([data] in its agent.toml)"
    if plan.work == FEATURES and config.privacy.noise_multiplier:
        return "this device adds noise, and shares of its examples have none"
    return ""


def unpinned(policy: PolicySettings, bundle: BlobRef) -> str:
    """Why this device does not load this bundle; "" where it does."""
    if policy.bundles is None or bundle.sha256.hex() in policy.bundles:
        return ""
    return f"this device does not load bundle {bundle.sha256.hex()[:12]}... ([policy] bundles in its agent.toml)"
