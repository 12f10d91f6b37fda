"""What `covey serve` reads of the cyclic code: [coding], and what it asks of the rest. docs/coded-redundancy.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from msgspec import Meta, Struct

from covey_coordinator.algorithms.coded import Coded
from covey_coordinator.coding.cyclic import TOLERANCE
from covey_edge.config import NotNegative
from covey_protocol.errors import ConfigError
from covey_protocol.forms import NONE
from covey_protocol.messages import MAX_CODED, CodingPlan
from covey_protocol.topics import check_name

Count = Annotated[int, Meta(ge=0, le=MAX_CODED)]


class CodingSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """shards: their names, as many as devices, in the order of the code. liars, absent: how many devices may lie, and
    how many more may be missing, in one round. tolerance: of honest rows, 0 for the decoder's own.
    """

    shards: tuple[str, ...]
    liars: Count = 1
    absent: Count = 0
    tolerance: NotNegative = 0.0

    @property
    def s(self) -> int:
        """Of the code: two missing rows cost as much as one that lies."""
        return self.liars + (self.absent + 1) // 2


class Rounds(Protocol):
    """Of serve.RoundSettings, what is read here."""

    @property
    def quorum(self) -> int: ...
    @property
    def sample(self) -> int: ...
    @property
    def goal(self) -> int: ...


def coding_plan(settings: CodingSettings, devices: Sequence[str]) -> CodingPlan:
    """devices: those that may take part, in the order of the file: device j holds the shards j to j + 2s."""
    for name in settings.shards:
        check_name(name, "shard")
    if len(settings.shards) != len(devices):
        raise ConfigError(
            f"[coding] names {len(settings.shards)} shards for {len(devices)} devices",
            "the cyclic code has as many of both: cut the data into more shards or fewer, or use round.only",
        )
    try:
        return CodingPlan(tuple(devices), tuple(settings.shards), settings.s)
    except ValueError as exc:
        raise ConfigError(
            f"[coding]: {exc}", f"name each once, and have at least {2 * settings.s + 1} devices"
        ) from exc


def coded_of(settings: CodingSettings, plan: CodingPlan | None) -> Coded:
    """What the engine needs."""
    assert plan is not None  # Algorithm
    return Coded(plan, settings.liars, settings.absent, settings.tolerance or TOLERANCE)


def check_coded(
    path: Path, settings: CodingSettings, aggregation: Mapping[str, Any], rounds: Rounds, compression: str
) -> None:
    """ConfigError for what does not go with a code: every device has its own place, and rows are exact."""
    least = len(settings.shards) - settings.absent
    if rounds.quorum < least:
        raise ConfigError(
            f"{path}: round.quorum = {rounds.quorum} with a code of {len(settings.shards)} devices of which "
            f"{settings.absent} may be absent",
            f"set it to {least} or more, or coding.absent higher",
        )
    beside = {
        f"round.sample = {rounds.sample}": rounds.sample,
        f"round.goal = {rounds.goal}": rounds.goal,
        f"wire.compression = {compression!r}": compression != NONE,
        f"aggregation = {dict(aggregation)}": dict(aggregation) != {"rule": "mean"},
    }
    for name, stands in beside.items():
        if stands:
            raise ConfigError(
                f"{path}: algorithm 'cyclic-code' with {name}",
                'its decoder is the rule: write rule = "mean" alone in [aggregation]'
                if name.startswith("aggregation")
                else "leave it out: every device has its place, and rows are exact",
            )
