"""From an experiment's table to its cells: every point of the sweep with every seed. No TensorFlow here."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from covey_coordinator.simulation.settings import ExperimentSettings, Table, check_settings, with_absolute_paths
from covey_edge.strict import as_struct
from covey_protocol.errors import ConfigError, RuleError

TOGETHER = "together"  # in [sweep]: a list of tables whose lists go in step
FIXED = ("name", "seeds", "workers", "sweep", "save_every")  # one for all cells
MAX_CELLS = 100_000
LONGEST_KEY = 80

Axis = list[dict[str, Any]]  # the settings that take turns: sweep key -> value, each


@dataclass(frozen=True)
class Cell:
    """One run: a point of the sweep with one seed.

    key: a folder's name; those of a seed sort as they come. varied: sweep key -> value. settings: of this point, with
    an empty sweep, this seed alone and absolute paths. data_dir: where downloaded data sets lie.
    """

    key: str
    seed: int
    varied: dict[str, Any]
    settings: ExperimentSettings
    data_dir: str | None = None

    @property
    def said(self) -> str:
        """For people: aggregation.rule=median, seed 3."""
        return ", ".join([*(f"{key}={label_of(value)}" for key, value in self.varied.items()), f"seed {self.seed}"])


def cells_of(
    table: Table, where: str = "the experiment", beside: Path = Path(), data_dir: str | None = None
) -> list[Cell]:
    """Every cell, seed by seed, so that each point has a first result early.

    where: for errors, the file's name. beside: the folder that relative paths start from. Raises ConfigError naming
    the key, and the point of the sweep where it is wrong only there.
    """
    points = [_point(table, varied, where) for varied in _points(table.get("sweep", {}))]
    seeds = points[0][1].seed_list
    if len(points) * len(seeds) > MAX_CELLS:
        raise ConfigError(f"{where} is {len(points) * len(seeds)} cells", f"sweep less: at most {MAX_CELLS}")
    width = len(str(len(points) - 1))
    found = []
    for seed in seeds:
        for number, (varied, settings) in enumerate(points):
            own = msgspec.structs.replace(with_absolute_paths(settings, beside), seeds=(seed,))
            found.append(Cell(_key(number, width, varied, seed), seed, varied, own, data_dir))
    return found


def _point(table: Table, varied: dict[str, Any], where: str) -> tuple[dict[str, Any], ExperimentSettings]:
    told = ", ".join(f"{key}={label_of(value)}" for key, value in varied.items())
    changed = copy.deepcopy({key: value for key, value in table.items() if key != "sweep"})
    try:
        for key, value in varied.items():
            set_key(changed, key, value)
        settings = as_struct(changed, ExperimentSettings, where)
        check_settings(settings)
    except (ConfigError, RuleError) as exc:
        what = exc.what.removeprefix(f"{where}: ")
        raise ConfigError(f"{where}{f' with {told}' if told else ''}: {what}", exc.remedy) from exc
    return varied, settings


# ---- [sweep]


def _points(sweep: Any) -> Iterator[dict[str, Any]]:
    """The cross product of the axes, the last one fastest; one empty point where there are none."""
    if not isinstance(sweep, Mapping):
        raise ConfigError(f"sweep = {sweep!r}", "write a table [sweep] of keys and lists of their values")
    axes = [axis for key, value in sweep.items() for axis in _axes(key, value)]
    names = [key for axis in axes for key in axis[0]]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"[sweep] has {twice!r} twice", "let each key take its turns in one place")
    for chosen in itertools.product(*axes):
        yield {key: value for part in chosen for key, value in part.items()}


def _axes(key: str, value: Any) -> list[Axis]:
    """A key with its list, a table of such keys (TOML reads dots so), or the tables of `together`."""
    if key == TOGETHER:
        tables = value if isinstance(value, (list, tuple)) else [value]
        return [_in_step(table) for table in tables]
    if isinstance(value, Mapping):
        return [axis for inner, values in value.items() for axis in _axes(f"{key}.{inner}", values)]
    return [[{key: one} for one in _values(key, value)]]


def _in_step(table: Any) -> Axis:
    if not isinstance(table, Mapping) or not table:
        raise ConfigError(f"[[sweep.{TOGETHER}]] is {table!r}", "write a table of keys and lists of the same length")
    columns = [(axis[0].keys(), axis) for key, value in table.items() for axis in _axes(key, value)]
    lengths = {len(axis) for _, axis in columns}
    if len(lengths) > 1:
        raise ConfigError(
            f"the lists of [[sweep.{TOGETHER}]] have {' and '.join(map(str, sorted(lengths)))} values",
            "give as many of each: they take turns together",
        )
    return [
        {key: value for _, axis in columns for key, value in axis[number].items()} for number in range(lengths.pop())
    ]


def _values(key: str, values: Any) -> list[Any]:
    if key.split(".")[0] in FIXED:
        raise ConfigError(f"[sweep] has {key!r}", f"these are the same for all cells: {', '.join(FIXED)}")
    if not isinstance(values, (list, tuple)) or not values:
        raise ConfigError(f"[sweep]: {key} = {values!r}", "give a list of values")
    if any(values[:place].count(value) for place, value in enumerate(values)):
        raise ConfigError(f"[sweep]: {key} has a value twice", "give each once")
    return list(values)


def set_key(table: Any, key: str, value: Any) -> None:
    """Set a dotted key in a table of tables and lists, which are made where they lack; a number counts in a list."""
    *path, last = key.split(".")
    for part in path:
        table = _inner(table, part, key)
    if isinstance(table, list):
        table[_place(table, last, key)] = value
    else:
        table[last] = value


def _inner(table: Any, part: str, key: str) -> Any:
    found = table[_place(table, part, key)] if isinstance(table, list) else table.setdefault(part, {})
    if not isinstance(found, (dict, list)):
        raise ConfigError(f"{key!r}: {part} is {found!r}, not a table", "correct that key")
    return found


def _place(table: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(table):
        raise ConfigError(
            f"{key!r}: there is no {part!r} in a list of {len(table)}", "count from 0, and write the tables first"
        )
    return int(part)


# ---- names


def label_of(value: Any) -> str:
    """A swept value in few words: alie fraction=0.2 for a table, its `label` where it has one."""
    if isinstance(value, Mapping):
        if isinstance(value.get("label"), str):
            return str(value["label"])
        named = [name for name in ("rule", "attack", "kind", "step") if isinstance(value.get(name), str)][:1]
        others = [f"{key}={label_of(inner)}" for key, inner in value.items() if key not in named]
        return " ".join([*(str(value[name]) for name in named), *others])
    if isinstance(value, (list, tuple)):
        return "+".join(map(label_of, value)) or "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _key(number: int, width: int, varied: dict[str, Any], seed: int) -> str:
    words = [f"{number:0{width}d}", *(re.sub(r"[^A-Za-z0-9.+=-]+", "_", label_of(value)) for value in varied.values())]
    return f"{'--'.join(words)[:LONGEST_KEY]}--seed-{seed}"
