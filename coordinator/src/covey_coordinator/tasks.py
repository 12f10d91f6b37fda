"""Several tasks in one fleet: what a file says of each, and whose turn it is. Decides nothing about rounds.

A task is a run of its own, RUN-TASK, in a folder of its own beside the others, so that everything that is known of runs
holds for it. What a task does not say of itself the file says for all, table by table.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, Union

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from covey_edge.config import toml_content
from covey_edge.strict import as_struct
from covey_protocol.errors import ConfigError
from covey_protocol.topics import check_name

Table = Union[dict[str, Any], UnsetType]
Config = TypeVar("Config", bound=Struct)
Key = TypeVar("Key", bound=Hashable)


class TaskTable(Struct, frozen=True, forbid_unknown_fields=True):
    """One of [[tasks]]. Tables are looked at by whoever reads the whole configuration."""

    name: str
    weight: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    bundle: Union[str, UnsetType] = UNSET
    rounds: Union[int, UnsetType] = UNSET
    round: Table = UNSET
    aggregation: Table = UNSET
    server: Table = UNSET
    training: Table = UNSET
    wire: Table = UNSET
    evaluation: Table = UNSET
    teaching: Table = UNSET
    coding: Table = UNSET
    trusted: Table = UNSET
    privacy: Table = UNSET
    rollout: Table = UNSET


class NamedTask(Struct):
    """As much of a task as says where its run is."""

    name: str


def run_name(run: str, task: str) -> str:
    return check_name(f"{run}-{task}", "run and task")


def runs_in(run: str, tasks: Iterable[NamedTask]) -> dict[str, str]:
    """Task -> its run; the one run under "" where there are no tasks."""
    return {task.name: run_name(run, task.name) for task in tasks} or {"": run}


def read_tasks(path: Path, kind: type[Config]) -> list[tuple[Config, float]]:
    """What a coordinator.toml says of each task, as if it were alone in the file, and its weight.

    One without a name where the file has no [[tasks]]. Raises ConfigError.
    """
    content = toml_content(path)
    if "tasks" not in content:
        return [(as_struct(content, kind, str(path)), 1.0)]
    tables = content.pop("tasks")
    if not isinstance(tables, list) or not tables:
        raise ConfigError(f"{path}: tasks is not a list of tables", "write [[tasks]] before each task")
    found = []
    for place, table in enumerate(tables, 1):
        task = as_struct(table, TaskTable, f"{path}: [[tasks]] {place}")
        where = f"{path}: task {check_name(task.name, 'task')}"
        own = {name: value for name, value in msgspec.to_builtins(task).items() if name not in ("name", "weight")}
        run = run_name(str(content.get("run", "")), task.name)
        config = as_struct({**content, **own, "run": run, "task": task.name}, kind, where)
        found.append((config, task.weight))
    names = [table["name"] for table in tables]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: two tasks have the same name", "give each its own")
    return found


class Turns(Generic[Key]):
    """Round robin by weight: of the tasks that can have a round now, one with twice the weight gets twice as many.

    weights: in the order of the file. last_round: when each last had one, so that those who have waited longest go
    first after a start; a restart after every single round still serves all. A task that could not have a round for a
    while does not catch up. Source: stride scheduling, Waldspurger and Weihl 1995.
    """

    def __init__(self, weights: dict[Key, float], last_round: dict[Key, int]) -> None:
        self._weights = weights
        order = sorted(weights, key=lambda key: last_round.get(key, 0))
        self._place = {key: place for place, key in enumerate(order)}
        self._passed = dict.fromkeys(weights, 0.0)
        self._now = 0.0

    def choose(self, ready: Iterable[Key]) -> Key:
        """One of these; that is its turn."""
        chosen = min(ready, key=lambda key: (self._passed[key], self._place[key]))
        self._now = max(self._now, self._passed[chosen])
        self._passed[chosen] = self._now + 1.0 / self._weights[chosen]
        return chosen
