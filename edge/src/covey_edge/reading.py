"""How a place of data is read: the part of [data] in agent.toml that the training child needs. Reads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

What = Literal["training", "evaluation", "trusted", "shard"]
ALL, TRAINING, HELD_OUT = "all", "training", "held-out"  # of the examples of one place


class Reading(Struct, frozen=True, forbid_unknown_fields=True):
    """options: of the source. bad_rows, normalise, holdout: as in agent.toml.

    part: which examples are asked for. what: what the data are for; only those of "training" make the statistics that
    all data of a task are normalised with. state_dir: where the device's key of the split, the statistics and the
    report lie; "" for a reading without any of them. task: whose data they are, "" for those of no task.
    keeps: whether these files may be written; else they are only read, for a look beside an agent.
    """

    options: dict[str, Any] = {}
    bad_rows: Literal["refuse", "drop"] = "refuse"
    normalise: Literal["", "standard", "range"] = ""
    holdout: float = 0.0
    part: Literal["all", "training", "held-out"] = "all"
    what: What = "training"
    state_dir: str = ""
    task: str = ""
    keeps: bool = True

    def beside(self, what: What) -> Reading:
        """How data are read that lie beside those to train on: whole, with the statistics of those."""
        return msgspec.structs.replace(self, what=what, part="all", holdout=0.0)

    def file(self, name: str, ending: str) -> Path:
        """A file in the state folder, one for each task."""
        return Path(self.state_dir) / (f"{name}-{self.task}.{ending}" if self.task else f"{name}.{ending}")
