"""DRACO's repetition code: devices that hold the same shard vote on its update, and liars are outvoted exactly.

The rule for fleets that replicate data on purpose: 2s + 1 devices of a group train the same examples in the same order
from the same model, so their updates are equal, bit for bit, and s + 1 equal ones prove what an honest device sends.
The aggregate is that of a fleet without liars, in every bit and whatever the liars send. What this does not do: make
devices' updates equal. docs/coded-redundancy.md says what it takes, and what makes it impossible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from covey_coordinator.aggregation.kernels import FLOAT32_MAX, Kernels, Updates
from covey_coordinator.aggregation.rules import Batch, Facts, Judgement, Rule
from covey_coordinator.records import Array
from covey_protocol.errors import ConfigError, RuleError, UsageError

SAMPLED = 16  # numbers of every update by which the vote guesses where to begin
NOBODY = -1  # a group that has no winner yet; the group of a device that is in none
REMEDY = "see that the devices of a group hold the same examples in the same order and have one data.replica"


@dataclass(frozen=True)
class Draco(Rule):
    """Majority vote on equal updates within groups of devices that share a shard, then the mean of the groups.

    num_byzantine: s, how many devices *of each group* may send anything; a group has at least 2 s + 1. groups: the
    device ids of each. group_size: in place of groups, so many devices each, in the order of the fleet; 0 for 2 s + 1.
    tolerance: 0 compares bits; above it, two numbers are the same if they differ by at most so much (in the units of
    the updates), and what is aggregated is the update of one device that s others confirm, not the exact one.
    A device agrees with another if all numbers and num_examples are the same. A group's update is that of a device with
    which s others agree; it counts with its num_examples, which have been voted on, too.
    score: share of the device's numbers that its group's majority did not send. Not accepted: outvoted.
    A group without s + 1 that agree fails the round, as leaving its shard out would not be the exact sum.
    Source: Chen et al. 2018 (arXiv:1803.09877), section 4.1. Deviations: s is per group, which allows more liars than
    the paper's s in all; s + 1 votes are asked for, where the paper takes whatever has most; groups are weighted by
    their examples, as devices of federated averaging are.
    """

    num_byzantine: int = 0
    groups: tuple[tuple[str, ...], ...] = ()
    group_size: int = 0
    tolerance: float = 0.0
    name = "draco"
    remembers_devices = True
    expects_copies = True
    facts = Facts(
        summary="majority vote of devices that share a shard, then the mean: exact whatever the liars send",
        needs="groups of 2f + 1 devices with the same data, f liars in each; equal updates of honest devices",
        breakdown="just under 1/2 of every group",
        cost="n d, at most (f + 1) n d under attack; every shard is trained 2f + 1 times",
        sums_only=False,
        source="Chen et al. 2018 (arXiv:1803.09877), section 4.1 (repetition code)",
    )

    def __post_init__(self) -> None:
        if self.group_size < 0 or (self.groups and self.group_size):
            raise ConfigError(
                f"draco with {len(self.groups)} groups and group_size = {self.group_size}",
                "name the groups, or say with group_size how many neighbours in the order of the fleet share a shard",
            )
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise ConfigError(f"draco: tolerance = {self.tolerance}", "set it to 0 (equal bits) or a positive number")
        named = [device_id for group in self.groups for device_id in group]
        twice = next((device_id for device_id in named if named.count(device_id) > 1), None)
        if twice is not None:
            raise ConfigError(f"draco: {twice!r} is in its groups twice", "name each device once")

    def with_num_byzantine(self, num_byzantine: int) -> Rule:
        """The same: a device that was refused in one group makes nobody in another more honest."""
        del num_byzantine
        return self

    def for_fleet(self, device_ids: Sequence[str]) -> Rule:
        """Raises ConfigError unless every device is in one group and every group is of these devices."""
        groups = self.groups or _neighbours(tuple(device_ids), self.smallest)
        strangers = [one for group in groups for one in group if one not in set(device_ids)]
        if strangers:
            raise ConfigError(f"draco: groups name {strangers[0]!r}, which is not in the fleet", "correct the name")
        alone = set(device_ids).difference(*groups)
        if alone:
            raise ConfigError(f"draco: {min(alone)!r} is in no group", "add it to one, or leave it out of the fleet")
        return PlacedDraco(self.num_byzantine, groups, 0, self.tolerance, tuple(device_ids))

    @property
    def needed(self) -> int:
        """Votes: so many equal updates hold an honest one."""
        return self.num_byzantine + 1

    @property
    def smallest(self) -> int:
        """Devices in the smallest group."""
        return min((len(group) for group in self.groups), default=self.group_size or 2 * self.num_byzantine + 1)

    def check(self, n: int) -> None:
        if self.smallest < 2 * self.num_byzantine + 1:
            raise RuleError(
                f"draco needs 2f + 1 devices in a group: {self.smallest} do not bear num_byzantine = "
                f"{self.num_byzantine}",
                f"replicate each shard on {2 * self.num_byzantine + 1} devices, or lower num_byzantine",
            )
        least = self.needed * max(len(self.groups), 1)
        if n < least:
            raise RuleError(
                f"draco needs f + 1 updates of each group: {n} are too few for num_byzantine = {self.num_byzantine}",
                f"wait for at least {least} usable updates",
            )

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        seats = self.seats(k, batch.places)
        winner, different = _vote(k, batch, seats, self.needed, self.tolerance)
        winner = self.require_winners(k, seats, winner)
        rows = _in_order(k, k.equal(winner, k.arange(k.count(batch.updates))), seats.position)
        examples = k.take(k.real(batch.num_examples), rows)
        # one row per group, so that which of the equal ones it is changes no bit of the sum
        voted = batch.updates.through(rows[:, None], k.divide(examples, examples)[:, None])
        aggregate = k.combination(voted, k.divide(examples, k.sum_rows(examples)))
        at = k.maximum(winner, 0)
        accepted = (
            (winner > NOBODY) & k.equal(different, 0) & k.equal(batch.num_examples, k.take(batch.num_examples, at))
        )
        share = k.divide(k.real(different), k.real(k.dimension(batch.updates)))
        scores = k.single(k.where(winner > NOBODY, share, FLOAT32_MAX))
        outvoted = k.number_true(~accepted)
        return Judgement(aggregate, accepted, scores, {"num_outvoted": k.single(outvoted)})

    def seats(self, k: Kernels, places: Any) -> Seats:
        if self.groups:
            raise UsageError("draco with named groups, and nobody said which places they have", "call for_fleet")
        return _seats(k, k.whole(k.floor(k.divide(k.real(places), float(self.smallest)))), places)

    def require_winners(self, k: Kernels, seats: Seats, winner: Any) -> Any:
        """(n,) winners, if every group has one; else the round fails."""
        what = f"draco: every group of {self.smallest} needs at least {self.needed} equal updates"
        return k.required(winner, k.all(winner > NOBODY), what, REMEDY)

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        if score > 1.0:
            return "belongs to no group that shares a shard"
        if score == 0.0:
            return "sent its group's update with another number of examples than the majority of the group"
        return f"{score:.2g} of its numbers are not those that the majority of its group sent"


@dataclass(frozen=True)
class PlacedDraco(Draco):
    """Draco for a fleet whose devices have the places 0, 1, ... in the order of `fleet`."""

    fleet: tuple[str, ...] = ()

    def seats(self, k: Kernels, places: Any) -> Seats:
        number = {one: index for index, group in enumerate(self.groups) for one in group}
        rank = {one: index for index, one in enumerate(one for group in self.groups for one in group)}
        strangers = len(self.fleet)
        at = k.minimum(places, strangers)
        groups = k.whole(np.array([*(number[one] for one in self.fleet), NOBODY]))
        ranks = k.whole(np.array([*(rank[one] for one in self.fleet), strangers]))
        return _seats(k, k.take(groups, at), k.take(ranks, at))

    def require_winners(self, k: Kernels, seats: Seats, winner: Any) -> Any:
        for index, group in enumerate(self.groups):
            voted = k.any(k.equal(seats.group, index) & (winner > NOBODY))
            what = f"draco: the group {', '.join(group)} needs at least {self.needed} equal updates"
            winner = k.required(winner, voted, what, REMEDY)
        return winner


@dataclass(frozen=True)
class Seats:
    """Who votes with whom. group: (n,) int64, NOBODY for none. position: (n,) int64, of a row among all, by group and
    then by the order within it. order: (n,) int64, the rows by position. together: (n, n) bool, same group.
    """

    group: Any
    position: Any
    order: Any
    together: Any


def _seats(k: Kernels, group: Any, rank: Any) -> Seats:
    order = k.argsort(rank)
    together = k.equal(group[:, None], group[None, :]) & (group > NOBODY)[:, None]
    return Seats(group, k.argsort(order), order, together)


def _vote(k: Kernels, batch: Batch, seats: Seats, needed: int, tolerance: float) -> tuple[Any, Any]:
    """(n,) int64: the row that won in the row's group, NOBODY for none; (n,) int64: numbers that differ from it.

    In every group the rows are compared with one of them, then with another, until one has the votes. The first is one
    that most agree with in a few numbers: only a lie that is right in these can cost one more pass over the updates.
    """
    n = k.count(batch.updates)
    last = k.whole(k.length(batch.places)) - 1
    order = _by_agreement(k, batch.updates, seats, tolerance)
    rank = k.argsort(order)

    def candidates(tried: Any) -> Any:
        """(n,) the rank of the first row of each row's group that was not tried; beyond the last where all were."""
        free = seats.together & ~tried[None, :]
        return k.smallest(k.where(free, rank[None, :], k.whole(n)))

    def goes_on(winner: Any, different: Any, tried: Any) -> Any:
        return k.any((winner < 0) & (candidates(tried) <= last))

    def body(winner: Any, different: Any, tried: Any) -> tuple[Any, Any, Any]:
        found = candidates(tried)
        candidate = k.take(order, k.minimum(found, last))
        is_open = (winner < 0) & (found <= last)
        differences = _differences(k, batch.updates, candidate, tolerance)
        agrees = k.equal(differences, 0) & k.equal(batch.num_examples, k.take(batch.num_examples, candidate))
        votes = k.number_true(seats.together & agrees[None, :])
        wins = is_open & (votes >= needed)
        is_tried = is_open & k.equal(candidate, k.arange(n))
        return k.where(wins, candidate, winner), k.where(wins, differences, different), tried | is_tried

    nothing = k.whole(k.full((n,), 0.0))
    start = (nothing + NOBODY, nothing, k.full((n,), False))
    winner, different, _ = k.while_loop(goes_on, body, start)
    return winner, different


def _by_agreement(k: Kernels, updates: Updates, seats: Seats, tolerance: float) -> Any:
    """(n,) int64: the rows, those that agree with most of their group in SAMPLED numbers first, then by position."""
    d = k.dimension(updates)
    columns = k.whole(k.floor(k.divide(k.real(k.arange(SAMPLED)) * k.real(d), float(SAMPLED))))
    values = k.columns(updates, columns)
    alike = k.equal(k.number_true(_same(k, values[:, None, :], values[None, :, :], tolerance)), SAMPLED)
    agreeing = k.number_true(seats.together & alike)
    return k.take(seats.order, k.argsort(-k.take(agreeing, seats.order)))


def _same(k: Kernels, a: Any, b: Any, tolerance: float) -> Any:
    """Element-wise whether two numbers are the same to the vote."""
    if tolerance == 0.0:
        return k.equal_bits(a, b)
    return k.maximum(k.real(a) - k.real(b), k.real(b) - k.real(a)) <= tolerance


def _differences(k: Kernels, updates: Updates, candidate: Any, tolerance: float) -> Any:
    """(n,) int64: in how many numbers each row is not the same as the row `candidate` (n,) of its group."""

    def per_block(block: Any, carry: Any) -> tuple[Any, Any]:
        return block[0], carry + k.number_true(~_same(k, block, k.take(block, candidate), tolerance))

    return k.over_columns(updates, per_block, k.whole(k.full((k.count(updates),), 0.0)))[1]


def _in_order(k: Kernels, chosen: Any, position: Any) -> Any:
    """(n,) bool, (n,) positions -> the chosen rows, by position."""
    rows = k.argsort(k.where(chosen, position, position + k.whole(k.length(position))))
    return k.take(rows, k.arange(k.number_true(chosen)))


def _neighbours(device_ids: tuple[str, ...], size: int) -> tuple[tuple[str, ...], ...]:
    if len(device_ids) % size:
        raise ConfigError(
            f"draco: {len(device_ids)} devices are not groups of group_size = {size}",
            "choose a size that divides the number of devices, or name the groups",
        )
    return tuple(device_ids[start : start + size] for start in range(0, len(device_ids), size))
