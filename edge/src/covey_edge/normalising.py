"""Inputs scaled by this device's own statistics: `[data] normalise` in agent.toml. Statistics never leave the device.

They are made from the examples that are trained on, kept in the state folder, and applied to all data of the task. Kept
ones stay, so that a model that has learned finds its inputs where they were; while they come from fewer than YOUNG
examples they are made anew each time the examples have doubled. What has drifted away from them is told.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Optional

import msgspec
import numpy as np
import numpy.typing as npt

from covey_edge.files import DISK
from covey_protocol.bundle import TensorSpec
from covey_protocol.errors import DataError

YOUNG = 1000  # examples; the mean of so many lies within 0.1 deviations with near certainty
DRIFT_FROM = 30  # examples, before which a drift is chance
BLOCK_BYTES = 2**22
MOST_TOLD = 5


class Statistics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of each feature: of an example with one axis each number, else each index of the last axis (channels of images,
    sensors of a series). source, shape, columns: what they belong to."""

    source: str
    shape: tuple[int, ...]
    columns: tuple[str, ...]
    count: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]


def measured(x: npt.NDArray[Any], source: str = "", columns: tuple[str, ...] = ()) -> Statistics:
    """x: (n, ...), at least one example, finite. In float64, by blocks."""
    flat = x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1)
    mean = np.mean(flat, axis=0, dtype=np.float64)
    squares = np.zeros(len(mean))
    for block in _blocks(flat):
        squares += np.square(block - mean).sum(axis=0)
    numbers = (mean, np.sqrt(squares / len(flat)), flat.min(axis=0), flat.max(axis=0))
    return Statistics(source, x.shape[1:], columns, len(x), *(tuple(map(float, one)) for one in numbers))


def _blocks(flat: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    size = max(1, BLOCK_BYTES // (8 * flat.shape[1]))
    return [flat[start : start + size] for start in range(0, len(flat), size)]


def kept(path: Path) -> Optional[Statistics]:
    """None where there are none yet. DataError where they cannot be read."""
    data = DISK.read(path)
    if data is None:
        return None
    try:
        return msgspec.json.decode(data, type=Statistics)
    except msgspec.MsgspecError as exc:
        told = "this device's statistics to normalise by are damaged"
        raise DataError(f"{path} is damaged ({exc})", "delete it: statistics are then made anew", told=told) from exc


def keep(path: Path, statistics: Statistics) -> None:
    """Durable when this returns; mode 600."""
    DISK.write(path, msgspec.json.format(msgspec.json.encode(statistics), indent=1), mode=0o600)


def to_use(old: Optional[Statistics], new: Statistics) -> Statistics:
    """The kept ones, or the new ones where those belong to other columns or come from too few examples."""
    if old is None or (old.source, old.shape, old.columns) != (new.source, new.shape, new.columns):
        return new
    return new if old.count < YOUNG and new.count >= 2 * old.count else old


def scaled(
    x: npt.NDArray[Any], statistics: Statistics, how: str, spec: TensorSpec, out: Optional[npt.NDArray[Any]] = None
) -> npt.NDArray[np.float32]:
    """x as float32, each feature by itself: for `standard` its distance from the mean in deviations; for `range` from
    the least to the largest value that the statistics know onto the model's range (0 to 1 where it has none), with what
    lies outside set to the ends. A feature that was constant becomes 0, or the middle of the range.

    out: where to, may be x. DataError for a model of whole numbers, and for statistics of other features.
    """
    if spec.dtype != "float32":
        what = f"the model takes {spec.dtype}, which cannot be normalised"
        raise DataError(what, 'set normalise = "" in [data]', told=what)
    if statistics.shape != x.shape[1:]:
        what = f"the statistics are of examples of shape {statistics.shape}, these have {x.shape[1:]}"
        raise DataError(what, "give all data of a task the same columns", told=what)
    low, high = _ends(spec)
    least, most = np.array(statistics.minimum), np.array(statistics.maximum)
    changing = most > least
    if how == "standard":
        middle, width, offset, factor = np.array(statistics.mean), np.array(statistics.deviation), 0.0, 1.0
    else:
        middle, width, offset, factor = least, most - least, low, high - low
    target = np.empty(x.shape, np.float32) if out is None else out
    flat, flat_target = x.reshape(-1, len(least)), target.reshape(-1, len(least))
    divisor = np.where(changing & (width > 0), width, 1.0)
    for block, place in zip(_blocks(flat), _blocks(flat_target)):
        values = (block - middle) / divisor * factor + offset
        values = np.where(changing, values, 0.0 if how == "standard" else (low + high) / 2)
        place[...] = np.clip(values, low, high) if how == "range" else values
    return target


def _ends(spec: TensorSpec) -> tuple[float, float]:
    if spec.minimum is None or spec.maximum is None:
        return 0.0, 1.0
    return spec.minimum, spec.maximum


def drift(used: Statistics, now: Statistics) -> list[str]:
    """Sentences on the features that are not any more what the statistics in use say of them."""
    if now.count < DRIFT_FROM or used == now:
        return []
    told = [text for place in range(len(used.mean)) if (text := _drifted(used, now, place))]
    more = [f"and {len(told) - MOST_TOLD} more"] if len(told) > MOST_TOLD else []
    return told[:MOST_TOLD] + more


def _drifted(used: Statistics, now: Statistics, place: int) -> str:
    name = used.columns[place] if len(used.columns) == len(used.mean) else f"feature {place}"
    spread, spread_now = used.deviation[place], now.deviation[place]
    if used.minimum[place] == used.maximum[place]:
        changed = now.minimum[place] < now.maximum[place]
        return f"{name} was constant, is not any more, and is left out" if changed else ""
    shift = (now.mean[place] - used.mean[place]) / spread
    if abs(shift) > 1.0:
        return f"the mean of {name} has moved by {shift:+.1f} deviations"
    ratio = spread_now / spread
    if not 0.5 <= ratio <= 2.0:
        return f"{name} now spreads {ratio:.2g} times as wide" if math.isfinite(ratio) else ""
    return ""
