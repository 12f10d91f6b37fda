"""What goes wrong with one device's data: wrong labels, bad sensors, lost attributes, or an owner who lies.

Pure NumPy on arrays; randomness arrives as a seeded generator; the inputs are never changed in place. Attacks on
updates rather than on data are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional, Union

import numpy as np

from covey_models.corruption.contract import OURS, Array, Corruption, Examples, Setting
from covey_models.corruption.labels import (
    FlipLabels,
    RandomLabels,
    ShiftLabels,
    TargetedFlip,
    flip_labels,
    random_labels,
    shift_labels,
)
from covey_models.corruption.missing import HiddenAttributes, MissingAttributes
from covey_models.corruption.sensors import (
    DriftingSensor,
    SensorNoise,
    StuckAttributes,
    StuckSensor,
    sensor_noise,
    stuck_sensor,
)
from covey_models.corruption.subsets import Duplicates, SelectedClasses, SelectedRange
from covey_models.corruption.trigger import Trigger, triggered
from covey_models.tables import made, require_share

__all__ = [
    "CORRUPTIONS",
    "OURS",
    "Corruption",
    "Setting",
    "corrupt",
    "flip_labels",
    "make_corruption",
    "random_labels",
    "sensor_noise",
    "shift_labels",
    "stuck_sensor",
    "triggered",
]

CORRUPTIONS: dict[str, type[Corruption]] = {
    "flip-labels": FlipLabels,
    "shift-labels": ShiftLabels,
    "random-labels": RandomLabels,
    "targeted-flip": TargetedFlip,
    "sensor-noise": SensorNoise,
    "stuck-sensor": StuckSensor,
    "stuck-attributes": StuckAttributes,
    "drifting-sensor": DriftingSensor,
    "missing-attributes": MissingAttributes,
    "hidden-attributes": HiddenAttributes,
    "duplicates": Duplicates,
    "selected-classes": SelectedClasses,
    "selected-range": SelectedRange,
    "trigger": Trigger,
}


def make_corruption(table: Union[str, Mapping[str, Any]]) -> Corruption:
    """Of a table {"kind": name, **its settings}, or of a name for the defaults. Raises ConfigError naming the key."""
    return made(CORRUPTIONS, "corruption", table)


def corrupt(
    corruption: Union[str, Corruption],
    x: Array,
    y: Array,
    setting: Setting,
    random: np.random.Generator,
    share: Optional[float] = None,
) -> Examples:
    """One device's (x, y) with this share of its examples corrupted; None is the corruption's own share, mostly all.

    The share is a random part, in the device's order; a smaller share's examples are among a larger one's. Where
    they come out fewer, they are at the end.
    """
    chosen = make_corruption(corruption) if isinstance(corruption, str) else corruption
    share = chosen.default_share if share is None else share
    require_share("share", share)
    count = round(share * len(y))
    if count == len(y):
        return chosen.applied(x, y, setting, random)
    places = np.sort(random.permutation(len(y))[:count])
    if not count:
        return x.copy(), y.copy()
    new_x, new_y = chosen.applied(x[places], y[places], setting, random)
    if len(new_y) != count:
        return np.concatenate([np.delete(x, places, 0), new_x]), np.concatenate([np.delete(y, places), new_y])
    x, y = x.copy(), y.copy()
    x[places], y[places] = new_x, new_y
    return x, y
