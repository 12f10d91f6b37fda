"""In which batches a device sees its examples in a round, and what it draws in each step: as `covey_edge.trainer` does.

Pure NumPy. The order is computed here and travels to the simulated device, so that it is the real device's own.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

from covey_coordinator.algorithms.settings import FSVRG_NAIVE
from covey_coordinator.simulation.learning import Array
from covey_protocol import scaffold, svrg
from covey_protocol.messages import TrainingPlan
from covey_protocol.works import SCAFFOLD


class Schedule(NamedTuple):
    """rows: (steps, batch) int32, which examples; a partial batch is filled up with its own.

    counts: (steps,) int32, how many of a row's are real. seeds: (steps,) int32, of what the model draws, 0 where it
    draws nothing.
    """

    rows: Array
    counts: Array
    seeds: Array
    steps_per_epoch: int


def in_order(count: int, batch_size: int) -> tuple[Array, Array]:
    """(rows, counts) of one pass over examples 0 to count - 1 in their order."""
    return _cut(np.arange(count), batch_size)


def schedule_of(
    algorithm: str, plan: TrainingPlan, order_name: str, count: int, batch_size: int, draws: bool
) -> Schedule:
    """The batches of the local steps of this algorithm."""
    if algorithm == FSVRG_NAIVE:
        batches = svrg.drawn(count, batch_size, plan.steps, svrg.order_of(plan.shuffle_seed, order_name))
    elif algorithm == SCAFFOLD:
        batches = scaffold.batches(count, batch_size, plan.steps, svrg.order_of(plan.shuffle_seed, order_name))
    else:
        return training_schedule(plan, order_name, count, batch_size, draws)
    chosen = list(batches)
    rows = np.stack([np.resize(one, batch_size) for one in chosen]).astype(np.int32)
    counts = np.array([len(one) for one in chosen], np.int32)
    return Schedule(rows, counts, _seeds(plan, order_name, len(rows), draws), len(rows))


def training_schedule(plan: TrainingPlan, order_name: str, count: int, batch_size: int, draws: bool) -> Schedule:
    """All steps of one round for a device of so many examples (n >= 1, after max_examples)."""
    random = np.random.default_rng([plan.shuffle_seed, zlib.crc32(order_name.encode())])
    epochs = [_cut(random.permutation(count), batch_size) for _ in range(plan.epochs)]
    rows, counts = (np.concatenate(parts) for parts in zip(*epochs))
    return Schedule(rows, counts, _seeds(plan, order_name, len(rows), draws), len(epochs[0][0]))


def _seeds(plan: TrainingPlan, order_name: str, steps: int, draws: bool) -> Array:
    if not draws:
        return np.zeros(steps, np.int32)
    return np.array([svrg.step_seed(plan.shuffle_seed, order_name, step) for step in range(steps)], np.int32)


def _cut(order: Array, batch_size: int) -> tuple[Array, Array]:
    """The batches of one pass. The last is filled up by np.resize, as `covey_edge.runtime.Model` pads it."""
    starts = range(0, len(order), batch_size)
    rows = np.stack([np.resize(order[start : start + batch_size], batch_size) for start in starts])
    counts = np.array([min(batch_size, len(order) - start) for start in starts], np.int32)
    return rows.astype(np.int32), counts
