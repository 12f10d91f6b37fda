"""What the owner of a device lets it work for, and on which data. Decides by agent.toml alone; reads no data."""

from __future__ import annotations

from typing import NamedTuple, Optional

from msgspec import UNSET

from covey_edge.config import AgentConfig, DataSettings, PolicySettings, TaskData
from covey_edge.leak_told import JUDGED
from covey_protocol.bundle import METRICS
from covey_protocol.messages import BlobRef, TrainingPlan
from covey_protocol.works import CORRECT, FEATURES, WORKS


class DataPlace(NamedTuple):
    """path, replica, debug: as in agent.toml. held_out: the owner keeps these data for evaluations. trusted: where the
    instances are whose labels the owner vouches for, "" for none. shards: (name, path) of a code's; it has no path.
    """

    source: str
    path: str
    held_out: bool = False
    trusted: str = ""
    replica: str = ""
    shards: tuple[tuple[str, str], ...] = ()
    debug: str = ""


def data_for(data: DataSettings, plan: TrainingPlan) -> Optional[DataPlace]:
    """Where the data for this plan are; None where the device has none for its task.

    A device that names the data of tasks has others only for a round without a task: data of one task would train
    another one's model to nonsense, where their shapes happen to agree.
    """
    own = data.tasks.get(plan.task) if data.tasks and plan.task else data
    if own is None:
        return None
    if plan.coding is not UNSET:
        return DataPlace(own.source, "", shards=tuple(own.shards.items())) if own.shards else None
    if plan.evaluate and own.evaluation_path:
        return DataPlace(own.source, own.evaluation_path, held_out=True)
    if not own.path:
        return None
    return DataPlace(own.source, own.path, trusted=own.trusted_path, replica=own.replica, debug=own.debug)


def places(data: DataSettings) -> list[DataPlace]:
    """All data of this device, each once."""
    settings: list[DataSettings | TaskData] = [data, *data.tasks.values()]
    paths = [(one.source, path) for one in settings for path in _paths(one)]
    return list(dict.fromkeys(DataPlace(source, path) for source, path in paths if path))


def _paths(own: DataSettings | TaskData) -> tuple[str, ...]:
    return (own.path, own.evaluation_path, own.trusted_path, *own.shards.values())


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
