"""Federated SVRG and SCAFFOLD in a simulation: TFF computations of a round, which on devices is one or two exchanges.

What devices do is covey_protocol.svrg and covey_protocol.scaffold, written in TensorFlow; tests hold both against the
numpy they repeat. The rule, with the attack, judges gradients and updates alike, as in live rounds. Features are
counted once, over all devices, before the first round. Of SCAFFOLD the devices' controls stay in this process, as
part of the state, and travel with the tasks of a cohort.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from covey_coordinator.aggregation.engines import build_server_optimizer
from covey_coordinator.aggregation.evaluating import cut_mean, number_of_liars
from covey_coordinator.aggregation.screening import Screened
from covey_coordinator.algorithms.combining import boosts
from covey_coordinator.algorithms.making import check_algorithm
from covey_coordinator.algorithms.settings import FSVRG_NAIVE, Algorithm
from covey_coordinator.simulation.composition import Wire, aggregation_of, gathering
from covey_coordinator.simulation.device_work import DeviceWork, batch
from covey_coordinator.simulation.entry_points import EntryPoints
from covey_coordinator.simulation.learning import Array, CentralPrivacy, DeviceData, Learning
from covey_coordinator.simulation.schedule import in_order
from covey_models.steps import Steps
from covey_protocol import svrg
from covey_protocol.errors import ConfigError, TrainingError
from covey_protocol.messages import TrainingPlan
from covey_protocol.parameters import total_size
from covey_protocol.works import SCAFFOLD, BundleFacts, check_work, feature_units

Tensor = Any
NOISE_OF_GRADIENTS = 1 << 40  # keeps a device's noise on its gradient apart from that on its update


def algorithm_of(learning: Learning) -> Algorithm | None:
    """None for what `composition.learning_process` does."""
    if learning.algorithm in ("fedavg", "fedsgd"):
        return None
    return Algorithm(learning.algorithm, learning.plan.steps, learning.feature_scaling)


def facts_of(steps: Steps, optimizer: Any, x: Array) -> BundleFacts:
    names = tuple(steps.functions)
    told = optimizer if isinstance(optimizer, str) else type(optimizer).__name__
    return BundleFacts("of the simulation", steps.specs, names, steps.train_inputs, told, int(np.prod(x.shape[1:])))


def checked(learning: Learning, algorithm: Algorithm, facts: BundleFacts) -> None:
    """ConfigError where algorithm, plan and model do not go together."""
    check_algorithm(algorithm, learning.server_optimizer)
    if isinstance(learning.privacy, CentralPrivacy):
        raise ConfigError(f"{algorithm.name} under central differential privacy", "let devices clip and noise")
    try:
        for work in algorithm.works:
            check_work(facts, algorithm.plan(learning.plan, work))
    except TrainingError as exc:
        raise ConfigError(exc.what, exc.remedy) from exc


def process_for(learning: Learning, algorithm: Algorithm, work: DeviceWork, devices: Sequence[DeviceData]) -> Any:
    """What `Simulation` uses in place of a learning process, made in the worker's context.

    Raises ConfigError where the algorithm does not go with the rest, RuleError where the rule cannot bear the devices.
    """
    facts = facts_of(work.steps, learning.optimizer, devices[0].x)
    checked(learning, algorithm, facts)
    if algorithm.name == SCAFFOLD:
        return ScaffoldProcess(learning, algorithm, work, len(devices))
    counted = _counted(learning, facts, devices) if algorithm.scaled else None
    return SvrgProcess(learning, algorithm, work, counted)


def _counted(learning: Learning, facts: BundleFacts, devices: Sequence[DeviceData]) -> tuple[Array, Array]:
    """(devices, d) the diagonals of S_k, and (d,) that of A, as a fleet's exchange of features gives them."""
    units, d = feature_units(facts), total_size(facts.parameters)
    most = learning.plan.max_examples or None
    own = np.stack([svrg.per_parameter(svrg.shares(one.x[:most]), units or 1, d) for one in devices])
    counts = np.array([len(one.x[:most]) for one in devices], np.float32)
    screened = Screened(own, counts, tuple(one.device_id for one in devices))
    fleet = cut_mean(screened, number_of_liars(screened, learning.rule.num_byzantine))
    return np.stack([svrg.scales(fleet, one) for one in own]), boosts(own)


class _Exchanges:
    """What the two processes share: types, the rule, the step of the server. next: (state, tasks) -> output."""

    def __init__(self, learning: Learning, algorithm: Algorithm, work: DeviceWork, more: dict[str, Any]) -> None:
        self.learning, self.algorithm, self.work = learning, algorithm, work
        self.wire = Wire(work.steps.specs)
        self.task_type = tff.types.to_type(OrderedDict([*tff.structure.to_elements(work.task_type), *more.items()]))
        self.flat = tff.tensorflow.computation(self.wire.flat, self.wire.weights_type)
        self.finalizer = tff.learning.templates.build_apply_optimizer_finalizer(
            build_server_optimizer("sgd", learning.server_learning_rate), self.wire.weights_type
        )
        start = np.concatenate([np.ravel(variable.numpy()) for variable in work.steps.parameters])
        self.first = tff.tensorflow.computation(lambda: self.wire.weights(tf.constant(start)))
        equal = algorithm.name in (FSVRG_NAIVE, SCAFFOLD)
        self.weight = tff.tensorflow.computation(
            lambda told: (tf.minimum(told[0], 1.0) if equal else told[0], told[1]),
            tff.types.to_type((np.float32, np.int64)),
        )
        self.told = tff.tensorflow.computation(lambda loss, count: tf.stack([loss, count]), np.float32, np.float32)

    def aggregated(self, aggregation: Any, state: Any, result: Any, vector: str, equal: bool = True) -> Any:
        """In a federated computation: the rule on one vector of the devices' results."""
        pair = tff.federated_zip((result["num_examples"], result["place"]))
        return aggregation.next(state, result[vector], tff.federated_map(self.weight, pair) if equal else pair)

    def moved(self, state: Any, weights: Any, change: Any) -> Any:
        """The server's step along `change`."""
        gradient = tff.tensorflow.computation(
            lambda vector: self.wire.weights(-vector).trainable, self.wire.vector_type
        )
        return self.finalizer.next(state, weights, tff.federated_map(gradient, change))

    def computation(self, run: Callable[..., Any], vectors: int) -> Any:
        """A TFF computation of a device: (parameters, so many vectors more, task)."""
        return tff.tensorflow.computation(run, *[self.wire.vector_type] * (1 + vectors), self.task_type)

    def result(self, vector: Tensor, task: Any, loss: Tensor, noise_seed: Tensor) -> OrderedDict[str, Tensor]:
        """As DeviceWork's: what the device sends, protected; 0 examples where it would report a failure.

        SCAFFOLD's count is of examples used in steps; there every device weighs the same.
        """
        count = tf.reduce_sum(task["all_counts" if "all_counts" in task else "counts"])
        return OrderedDict(
            update=self.work.protect(vector, noise_seed),
            num_examples=tf.where(self.work.is_usable(vector), tf.cast(count, tf.float32), 0.0),
            place=task["place"],
            loss=loss,
        )


class SvrgProcess(_Exchanges):
    """State: TFF's, where `distributor` holds what the rule remembers of gradients.

    counted: the diagonals of S_k and A; None for the identity.
    """

    def __init__(
        self, learning: Learning, algorithm: Algorithm, work: DeviceWork, counted: tuple[Array, Array] | None
    ) -> None:
        rows, row = tff.TensorType(np.int32, [None, work.steps.batch_size]), tff.TensorType(np.int32, [None])
        more: dict[str, Any] = {"all_rows": rows, "all_counts": row, "all_seeds": row}
        if counted is not None:
            more["scale"] = tff.TensorType(np.float32, [work.dimension])
        super().__init__(learning, algorithm, work, more)
        self._scales = counted[0] if counted is not None else None
        self._boost = counted[1] if counted is not None else np.ones(work.dimension, np.float32)
        self.initialize, self.next = self._computations()

    def task(self, base: OrderedDict[str, Any], number: int, device: DeviceData, count: int, plan: TrainingPlan) -> Any:
        rows, counts = in_order(count, self.work.steps.batch_size)
        seeds = np.zeros(len(rows), np.int32)
        if "seed" in self.work.steps.train_inputs:
            first = svrg.step_seed(plan.shuffle_seed, device.order_name, 0)
            seeds = ((first + np.arange(len(rows))) % 2**31).astype(np.int32)
        base.update(all_rows=rows, all_counts=counts, all_seeds=seeds)
        if self._scales is not None:
            base["scale"] = self._scales[number]
        return base

    def _computations(self) -> tuple[Any, Any]:
        wire, finalizer = self.wire, self.finalizer
        slopes, updates = (aggregation_of(self.learning, wire.vector_type) for _ in range(2))
        slope, local = self.computation(self._slope, 0), self.computation(self._local, 1)
        nothing = tff.tensorflow.computation(lambda: ())
        boosted = tff.tensorflow.computation(lambda vector: tf.constant(self._boost) * vector, wire.vector_type)
        gather = gathering(2, np.float32)

        def first_state() -> Any:
            return tff.federated_zip(
                tff.learning.templates.LearningAlgorithmState(
                    tff.federated_eval(self.first, tff.SERVER),
                    slopes.initialize(),
                    tff.federated_eval(nothing, tff.SERVER),
                    updates.initialize(),
                    finalizer.initialize(),
                )
            )

        initialize = tff.federated_computation(first_state)

        def next_round(state: Any, tasks: Any) -> Any:
            received = tff.federated_broadcast(tff.federated_map(self.flat, state.global_model_weights))
            gradients = tff.federated_map(slope, (received, tasks))
            full = self.aggregated(slopes, state.distributor, gradients, "update", equal=False)
            result = tff.federated_map(local, (received, tff.federated_broadcast(full.result), tasks))
            combined = self.aggregated(updates, state.aggregator, result, "update")
            change = tff.federated_map(boosted, combined.result)
            finalized = self.moved(state.finalizer, state.global_model_weights, change)
            new_state = tff.federated_zip(
                tff.learning.templates.LearningAlgorithmState(
                    finalized.result, full.state, state.client_work, combined.state, finalized.state
                )
            )
            told = tff.federated_map(self.told, (gradients["loss"], result["num_examples"]))
            metrics = OrderedDict(
                client_work=gather(told), aggregator=combined.measurements, gradients=full.measurements
            )
            return new_state, tff.federated_zip(metrics)

        tasks_type = tff.FederatedType(self.task_type, tff.CLIENTS)
        return initialize, tff.federated_computation(next_round, initialize.type_signature.result, tasks_type)

    def after(self, state: Any, tasks: Sequence[Any], output: Any) -> tuple[Any, Any]:
        """(state, metrics). A device is accepted where its gradient and its update were."""
        new_state, metrics = output
        told, gradients = metrics["aggregator"], metrics["gradients"]
        told["accepted"] = np.logical_and(told["accepted"], gradients["accepted"])
        told["gradients_accepted"] = np.float32(np.count_nonzero(gradients["accepted"]))
        return new_state, metrics

    def before(self, state: Any, tasks: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        return state, tasks

    def _slope(self, parameters: Tensor, task: Any) -> Any:
        entry = EntryPoints(self.work.steps, self.work.values, ("gradient", "set_parameters"))

        def run(parameters: Tensor, task: Any) -> Any:
            x, y = self.work.shards.read(task["shard"])
            every = {name: task[f"all_{name}"] for name in ("rows", "counts", "seeds")}
            every["steps_per_epoch"] = tf.shape(every["counts"])[0]
            with tf.control_dependencies([entry("set_parameters", parameters=parameters)["dimension"]]):
                loss, gradient = self.work.full_gradient(entry, x, y, every)
            return self.result(gradient, task, loss, task["noise_seed"] ^ NOISE_OF_GRADIENTS)

        return tf.function(run, autograph=False)(parameters, task)

    def _local(self, parameters: Tensor, full: Tensor, task: Any) -> Any:
        """As svrg.local_steps; the model stands twice, so that nothing is copied back and forth in a step."""
        moving, fixed = (
            EntryPoints(self.work.steps, self.work.values, ("gradient", "set_parameters")) for _ in range(2)
        )
        plan = self.work.plan

        def run(parameters: Tensor, full: Tensor, task: Any) -> Any:
            x, y = self.work.shards.read(task["shard"])
            rate = tf.constant(plan.learning_rate, tf.float64)
            if not plan.steps:
                rate /= tf.cast(task["steps_per_epoch"], tf.float64)

            def step(number: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
                inputs = batch(x, y, task["rows"][number], task["counts"][number])
                if "seed" in self.work.steps.train_inputs:
                    inputs["seed"] = task["seeds"][number]
                with tf.control_dependencies([moving("set_parameters", parameters=w)["dimension"]]):
                    now = moving("gradient", **inputs)["gradient"]
                change = now - fixed("gradient", **inputs)["gradient"]
                scaled = change if self._scales is None else task["scale"] * change
                return number + 1, w - tf.cast(rate, tf.float32) * (scaled + full)

            with tf.control_dependencies([fixed("set_parameters", parameters=parameters)["dimension"]]):
                _, end = tf.while_loop(
                    lambda number, _: number < tf.shape(task["counts"])[0],
                    step,
                    (tf.constant(0), tf.identity(parameters)),
                    parallel_iterations=1,
                )
            return self.result(end - parameters, task, tf.constant(0.0), task["noise_seed"])

        return tf.function(run, autograph=False)(parameters, full, task)


class ScaffoldProcess(_Exchanges):
    """State: TFF's, where `client_work` holds c and, in this process alone, `distributor` the (devices, d) controls."""

    def __init__(self, learning: Learning, algorithm: Algorithm, work: DeviceWork, devices: int) -> None:
        own = tff.TensorType(np.float32, [work.dimension])
        super().__init__(learning, algorithm, work, {"own": own})
        self._devices = devices
        self._initialize, self._next = self._computations()

    def task(self, base: OrderedDict[str, Any], number: int, device: DeviceData, count: int, plan: TrainingPlan) -> Any:
        return base

    def initialize(self) -> Any:
        return self._initialize()._replace(distributor=np.zeros((self._devices, self.wire.d), np.float32))

    def next(self, state: Any, tasks: Sequence[Any]) -> Any:
        return self._next(state, tasks)

    def before(self, state: Any, tasks: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        own = state.distributor
        return state._replace(distributor=()), [
            OrderedDict([*one.items(), ("own", own[one["place"]])]) for one in tasks
        ]

    def after(self, state: Any, tasks: Sequence[Any], output: Any) -> tuple[Any, Any]:
        new_state, metrics = output
        own = np.array(state.distributor)
        for task, control, (_, count) in zip(tasks, metrics["controls"], np.reshape(metrics["client_work"], (-1, 2))):
            if count > 0:  # else the device has reported a failure
                own[task["place"]] = control
        return new_state._replace(distributor=own), metrics

    def _computations(self) -> tuple[Any, Any]:
        wire, finalizer = self.wire, self.finalizer
        updates, local = aggregation_of(self.learning, wire.vector_type), self.computation(self._local, 1)
        nothing = tff.tensorflow.computation(lambda: ())
        zeros = tff.tensorflow.computation(lambda: tf.zeros([wire.d]))
        gather, gather_controls = gathering(2, np.float32), gathering(wire.d, np.float32)
        scale, devices = float(self.algorithm.steps * self.work.plan.learning_rate), float(self._devices)
        accepted_type = updates.next.type_signature.result.measurements.member["accepted"]

        def moved(control: Tensor, aggregate: Tensor, accepted: Tensor) -> Tensor:
            used = tf.reduce_sum(tf.cast(accepted, tf.float32))
            return control + tf.minimum(1.0, used / devices) * (-control - aggregate / scale)

        move = tff.tensorflow.computation(moved, wire.vector_type, wire.vector_type, accepted_type)
        accepted = tff.tensorflow.computation(
            lambda told: told["accepted"], updates.next.type_signature.result.measurements.member
        )

        def first_state() -> Any:
            return tff.federated_zip(
                tff.learning.templates.LearningAlgorithmState(
                    tff.federated_eval(self.first, tff.SERVER),
                    tff.federated_eval(nothing, tff.SERVER),
                    tff.federated_eval(zeros, tff.SERVER),
                    updates.initialize(),
                    finalizer.initialize(),
                )
            )

        initialize = tff.federated_computation(first_state)

        def next_round(state: Any, tasks: Any) -> Any:
            received = tff.federated_broadcast(tff.federated_map(self.flat, state.global_model_weights))
            result = tff.federated_map(local, (received, tff.federated_broadcast(state.client_work), tasks))
            combined = self.aggregated(updates, state.aggregator, result, "update")
            finalized = self.moved(state.finalizer, state.global_model_weights, combined.result)
            kept = tff.federated_map(accepted, combined.measurements)
            control = tff.federated_map(move, (state.client_work, combined.result, kept))
            new_state = tff.federated_zip(
                tff.learning.templates.LearningAlgorithmState(
                    finalized.result, state.distributor, control, combined.state, finalized.state
                )
            )
            told = tff.federated_map(self.told, (result["loss"], result["num_examples"]))
            metrics = OrderedDict(
                client_work=gather(told), aggregator=combined.measurements, controls=gather_controls(result["control"])
            )
            return new_state, tff.federated_zip(metrics)

        tasks_type = tff.FederatedType(self.task_type, tff.CLIENTS)
        return initialize, tff.federated_computation(next_round, initialize.type_signature.result, tasks_type)

    def _local(self, parameters: Tensor, fleet: Tensor, task: Any) -> Any:
        entry = EntryPoints(self.work.steps, self.work.values, ("train", "set_parameters", "get_parameters"))
        plan = self.work.plan

        def run(parameters: Tensor, fleet: Tensor, task: Any) -> Any:
            x, y = self.work.shards.read(task["shard"])
            shared = {**self.work.constants(parameters), "correction": fleet - task["own"]}
            with tf.control_dependencies([entry("set_parameters", parameters=parameters)["dimension"]]):
                loss = self.work.epochs(entry, x, y, task, shared)
            with tf.control_dependencies([loss]):
                update = entry("get_parameters")["parameters"] - parameters
            control = task["own"] - fleet - update / float(plan.steps * plan.learning_rate)
            sent = self.result(update, task, loss, task["noise_seed"])
            return OrderedDict([*sent.items(), ("control", control)])

        return tf.function(run, autograph=False)(parameters, fleet, task)
