"""Federated learning on this machine: rounds of simulated devices in a TFF learning process, on a worker of TFF.

`composition` has the process. What it learns with is what live rounds use: the model's entry points, the rules, the
attacks, TFF's server optimizers. What live rounds do and this does not: look for copies among updates, lower
num_byzantine by devices that were refused before the rule.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import msgspec
import numpy as np
import tensorflow as tf

from covey_coordinator.aggregation.kernels import FLOAT32_MAX
from covey_coordinator.aggregation.rules import LOSSES, TRUSTED_PLACE
from covey_coordinator.aggregation.states import pack_state, unpack_state
from covey_coordinator.aggregation.worker import Worker, refusal_of
from covey_coordinator.simulation.composition import evaluator, learning_process
from covey_coordinator.simulation.device_work import DeviceWork
from covey_coordinator.simulation.exchanges import algorithm_of, process_for
from covey_coordinator.simulation.learning import Array, CentralPrivacy, DeviceData, Learning
from covey_coordinator.simulation.remote import RemoteWorkers
from covey_coordinator.simulation.results import Judged
from covey_coordinator.simulation.schedule import Schedule, in_order, schedule_of
from covey_coordinator.simulation.shards import FileShards, Pair, SentShards, Shards
from covey_models.losses import loss_for
from covey_models.steps import Recipe, Steps, training_steps
from covey_protocol.errors import ConfigError, DataError, RuleError, StorageError, UsageError
from covey_protocol.parameters import ParameterSpec
from covey_protocol.works import SCAFFOLD

EVALUATED_TOGETHER = 2000  # examples of central test data per piece, so that a worker's cores share them
NOISE = 4  # stream of random numbers of a seed


class RoundOutcome(NamedTuple):
    """What one round gave. loss: mean training loss over the cohort's examples; losses: by device. verdicts: what the
    rule said; a device whose update was not usable is not accepted. measurements: of the rule, and in differential
    privacy of the accountant. notes: what became of remote workers meanwhile, a sentence each.
    """

    loss: float
    losses: dict[str, float]
    verdicts: dict[str, Judged]
    measurements: dict[str, float]
    notes: tuple[str, ...] = ()


class Simulation:
    """One learning on some devices. Use it in a with block: it holds a worker process and files.

    worker: a worker, or several on other machines, to share, left running; without one an own one is started when it
    is needed. send_data: send the devices' examples with every round also to workers that see this machine's disk.
    Raises ConfigError and DataError for devices or settings that do not fit the model.
    """

    def __init__(
        self,
        learning: Learning,
        devices: Sequence[DeviceData],
        *,
        worker: Worker | RemoteWorkers | None = None,
        send_data: bool = False,
    ) -> None:
        self._learning, self._devices = learning, list(devices)
        self._steps = _traced(learning)
        self._owns_worker, self._worker = worker is None, Worker() if worker is None else worker
        self._shards = _shards(self._steps, send_data or not self._worker.read_our_files)
        try:
            self._numbers = [self._shards.add(_checked(one, self._steps)) for one in self._devices]
            needed = learning.rule.needs_trusted
            self._trusted = learning.trusted if needed else None
            if self._trusted is not None:
                self._trusted_shard = self._shards.add(_checked(self._trusted, self._steps))
            self._work = DeviceWork(
                self._steps,
                learning.plan,
                self._shards,
                _of_devices(learning),
                learning.algorithm == "fedsgd",
                needed,
                self._trusted,
            )
            self._exchanges: Any = None
            algorithm = algorithm_of(learning)
            if algorithm is not None:
                if needed:
                    raise ConfigError(f"{learning.rule.name} with {learning.algorithm}", "take fedavg or fedsgd")
                self._exchanges = self._worker.call(process_for, learning, algorithm, self._work, self._devices)
            self._process = self._exchanges or self._worker.call(learning_process, learning, self._work)
            self._evaluator = self._worker.call(evaluator, self._work)
        except BaseException:
            self.close()
            raise
        self._tests: list[tuple[Array, Array, list[int]]] = []

    def __enter__(self) -> Simulation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the worker, if it is our own, and delete the devices' files."""
        if self._owns_worker:
            self._worker.stop()
        self._shards.close()

    @property
    def parameter_specs(self) -> tuple[ParameterSpec, ...]:
        return self._steps.specs

    @property
    def process(self) -> Any:
        """The `tff.learning.templates.LearningProcess`."""
        return self._process

    def initial_state(self) -> Any:
        """TFF's state before the first round."""
        return self._worker.call(self._process.initialize)

    def next(self, state: Any, cohort: Sequence[int], shuffle_seed: int | None = None) -> tuple[Any, RoundOutcome]:
        """One round of the devices with these numbers, in their order.

        shuffle_seed: of the round's batches, in place of the plan's. Raises RuleError where the rule cannot bear the
        cohort or the model would not be finite; `state` is then still good.
        """
        self._check_cohort(cohort)
        plan = self._learning.plan
        if shuffle_seed is not None:
            plan = msgspec.structs.replace(plan, shuffle_seed=shuffle_seed)
        devices = [self._devices[number] for number in cohort]
        tasks = [self._task(number, plan) for number in cohort]
        if self._trusted is not None:
            tasks.append(self._trusted_task(self._trusted, plan))
        try:
            new_state, metrics = self._next(state, tasks)
        except Exception as error:
            refusal = refusal_of(error)
            if refusal is None:
                raise
            raise refusal from error
        if not all(np.isfinite(part).all() for part in _parts(new_state.global_model_weights)):
            raise RuleError(
                f"the round of {self._learning.rule.name} would make parameters that are not finite",
                "lower the learning rate, or choose a rule that bears corrupted devices",
            )
        return new_state, _outcome(devices, metrics)._replace(notes=self._worker.take_notes())

    def _next(self, state: Any, tasks: list[Any]) -> tuple[Any, Any]:
        if self._exchanges is None:
            output = self._worker.call(self._process.next, state, tasks)
            return output.state, output.metrics
        given = self._exchanges.before(state, tasks)
        return self._exchanges.after(state, tasks, self._worker.call(self._exchanges.next, *given))  # type: ignore[no-any-return]

    def parameters(self, state: Any) -> Array:
        """The global model, (d,) float32, in the order of a bundle's parameters."""
        weights = state.global_model_weights
        parts = {True: iter(weights.trainable), False: iter(weights.non_trainable)}
        return np.concatenate([np.ravel(next(parts[spec.trainable])) for spec in self._steps.specs])

    def evaluate(self, state: Any, x: Array, y: Array) -> dict[str, float]:
        """ "loss" and "accuracy" of the global model on central data."""
        totals = np.sum(self._evaluated(state, self._pieces(x, y)), axis=0)
        return _means(totals)

    def evaluate_devices(self, state: Any, numbers: Sequence[int]) -> dict[str, dict[str, float]]:
        """The same on each of these devices' own training data, with "num_examples"."""
        sizes = [(self._numbers[number], len(self._devices[number].y)) for number in numbers]
        found = self._evaluated(state, sizes)
        return {
            self._devices[number].device_id: {**_means(totals), "num_examples": float(totals[2])}
            for number, totals in zip(numbers, found)
        }

    def saved(self, state: Any) -> bytes:
        """All that the next round depends on."""
        return pack_state(self._description, [], state)

    def loaded(self, data: bytes) -> Any:
        """The state that `saved` gave. Raises StorageError for one of other settings."""
        unpacked = unpack_state(data, self._description, self.initial_state())
        if unpacked is None:
            raise StorageError("a saved state belongs to other settings", "start the run anew")
        return unpacked[1]

    @property
    def _description(self) -> str:
        told = self._learning
        layout = [(spec.shape, spec.trainable) for spec in self._steps.specs]
        server = f"{told.server_optimizer}, {told.server_learning_rate!r}"
        return f"{told.rule!r}, {told.attack!r}, {server}, {layout}, {told.algorithm}"

    def _task(self, number: int, plan: Any) -> OrderedDict[str, Any]:
        device = self._devices[number]
        count = min(len(device.y), plan.max_examples or len(device.y))
        draws = "seed" in self._steps.train_inputs
        schedule = schedule_of(self._learning.algorithm, plan, device.order_name, count, self._steps.batch_size, draws)
        random = np.random.SeedSequence([self._learning.seed, NOISE, plan.shuffle_seed, number])
        noise_seed = int(random.generate_state(1, np.uint64)[0] >> np.uint64(1))
        task = self._work.task(self._numbers[number], number, schedule, noise_seed)
        return task if self._exchanges is None else self._exchanges.task(task, number, device, count, plan)

    def _trusted_task(self, trusted: DeviceData, plan: Any) -> OrderedDict[str, Any]:
        """The coordinator's own; it trains nothing for a rule that needs losses."""
        draws, size = "seed" in self._steps.train_inputs, self._steps.batch_size
        count = min(len(trusted.y), plan.max_examples or len(trusted.y))
        schedule = schedule_of(self._learning.algorithm, plan, trusted.device_id, count, size, draws)
        if self._work.needs_trusted == LOSSES:
            schedule = Schedule(schedule.rows[:0], schedule.counts[:0], schedule.seeds[:0], 0)
        return self._work.task(self._trusted_shard, TRUSTED_PLACE, schedule, 0)

    def _check_cohort(self, cohort: Sequence[int]) -> None:
        if len(set(cohort)) < len(cohort) or not all(0 <= number < len(self._devices) for number in cohort):
            raise UsageError(f"a cohort of {list(cohort)} among {len(self._devices)} devices", "name each once")
        self._learning.rule.check(len(cohort))
        if self._learning.attack is not None and set(cohort) <= set(self._learning.hostile):
            raise RuleError("all devices of a round are corrupted", "leave the attack an honest device to look at")

    def _evaluated(self, state: Any, sets: Sequence[tuple[int, int]]) -> Array:
        """(number of sets, 3) float64: loss sum, correct and count of each (shard, size)."""
        tasks = []
        for place, (shard, size) in enumerate(sets):
            rows, counts = in_order(size, self._steps.batch_size)
            tasks.append(self._work.task(shard, place, Schedule(rows, counts, np.zeros_like(counts), len(counts)), 0))
        found = self._worker.call(self._evaluator, state.global_model_weights, tasks)
        return np.asarray(found).reshape(-1, 3)

    def _pieces(self, x: Array, y: Array) -> list[tuple[int, int]]:
        """(shard, size) of the pieces of central data; kept, so that every round's evaluation finds them there."""
        shards = next((kept for known_x, known_y, kept in self._tests if known_x is x and known_y is y), None)
        if shards is None:
            starts = range(0, len(y), EVALUATED_TOGETHER)
            pairs = [(x[start : start + EVALUATED_TOGETHER], y[start : start + EVALUATED_TOGETHER]) for start in starts]
            shards = [self._shards.add(_checked(DeviceData("test data", *pair), self._steps)) for pair in pairs]
            self._tests.append((x, y, shards))
        return [
            (shard, min(EVALUATED_TOGETHER, len(y) - place * EVALUATED_TOGETHER)) for place, shard in enumerate(shards)
        ]


def traced_shards(learning: Learning, devices: Sequence[DeviceData], worker: Worker) -> tuple[Steps, Shards, list[int]]:
    """The model's steps, and the devices' examples where the worker finds them, with their numbers there."""
    steps = _traced(learning)
    shards = _shards(steps, not worker.read_our_files)
    return steps, shards, [shards.add(_checked(one, steps)) for one in devices]


def _traced(learning: Learning) -> Steps:
    loss = loss_for(learning.loss, tuple(learning.model.output_shape[1:]))
    recipe = Recipe(
        loss,
        learning.batch_size,
        learning.optimizer,
        clip=learning.plan.gradient_clip_norm > 0,
        proximal=learning.plan.proximal_weight > 0,
        correction=learning.algorithm == SCAFFOLD,
        moving_statistics=learning.moving_statistics,
    )
    return training_steps(learning.model, recipe)


def _of_devices(learning: Learning) -> Any:
    return None if isinstance(learning.privacy, CentralPrivacy) else learning.privacy


def _shards(steps: Steps, send_data: bool) -> Shards:
    x, y = (tf.TensorSpec([None, *spec.shape[1:]], spec.dtype) for spec in _examples(steps))
    return SentShards(x, y) if send_data else FileShards(x, y)


def _examples(steps: Steps) -> tuple[Any, Any]:
    """TensorFlow's specs of a batch of examples and of its labels."""
    arguments = {tensor.op.name: tensor for tensor in steps.functions["evaluate"].graph.inputs}
    return arguments["x"], arguments["y"]


def _checked(device: DeviceData, steps: Steps) -> Pair:
    """The device's examples, if the model can take them."""
    labels = steps.recipe.loss.labels
    for what, array, spec in zip(("examples", "labels"), (device.x, device.y), _examples(steps)):
        if len(array) == 0 or array.shape[1:] != tuple(spec.shape[1:]):
            raise DataError(
                f"{device.device_id} has {what} of shape {array.shape}, the model takes {tuple(spec.shape[1:])} each",
                "give every device at least one example, in the model's shape",
            )
    if len(device.x) != len(device.y):
        raise DataError(f"{device.device_id} has {len(device.x)} examples and {len(device.y)} labels", "give one each")
    low, high = labels.minimum, labels.maximum
    if (low is not None and device.y.min() < low) or (high is not None and device.y.max() > high):
        raise DataError(
            f"{device.device_id} has labels from {device.y.min()} to {device.y.max()}, the model tells {low} to {high}",
            "take a model with as many classes as the data have",
        )
    return device.x, device.y


def _parts(weights: Any) -> list[Array]:
    return [*weights.trainable, *weights.non_trainable]


def _means(totals: Array) -> dict[str, float]:
    loss_sum, correct, count = totals.tolist()
    return {"loss": loss_sum / count, "accuracy": correct / count}


def _outcome(devices: Sequence[DeviceData], metrics: Any) -> RoundOutcome:
    losses, counts = np.asarray(metrics["client_work"]).reshape(-1, 2)[: len(devices)].T  # a last one is trusted
    told = dict(_flat_measurements(metrics["aggregator"]))
    ids = [device.device_id for device in devices]
    accepted = told.pop("accepted", counts > 0)
    scores = told.pop("scores", np.where(counts > 0, 0.0, FLOAT32_MAX))
    seen = counts > 0
    loss = float(np.average(losses[seen], weights=counts[seen])) if seen.any() else float("nan")
    return RoundOutcome(
        loss=loss,
        losses={one: float(value) for one, value in zip(ids, losses)},
        verdicts={one: Judged(bool(yes), float(score)) for one, yes, score in zip(ids, accepted, scores)},
        measurements={name: float(value) for name, value in told.items() if np.size(value) == 1},
    )


def _flat_measurements(measurements: Any) -> Any:
    """(name, value) of all leaves of nested dictionaries, by their last names."""
    for name, value in measurements.items():
        if isinstance(value, dict):
            yield from _flat_measurements(value)
        else:
            yield name, value
