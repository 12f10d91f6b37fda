"""The TFF computations behind a simulation: a learning process of TFF, and an evaluation of its model on devices.

Its state is TFF's `LearningAlgorithmState`, the process a `tff.learning.templates.LearningProcess`: a broadcast, the
devices' work (`device_work`), the rule as TFF's aggregator (`aggregation.factory`), TFF's optimizer finalizer. It is
not made by `compose_learning_process`, which takes only sequences for clients' data: going through tf.data costs
several times the training itself (docs/adr/0022-simulation.md).
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from covey_coordinator.aggregation.engines import build_server_optimizer
from covey_coordinator.aggregation.factory import RuleFactory
from covey_coordinator.aggregation.privacy import private_aggregator
from covey_coordinator.aggregation.rules import Rule
from covey_coordinator.attacks.attacked import Attacked
from covey_coordinator.simulation.device_work import DeviceWork
from covey_coordinator.simulation.learning import CentralPrivacy, Learning
from covey_protocol.errors import ConfigError
from covey_protocol.parameters import ParameterSpec, offsets, total_size


class Wire:
    """Between TFF's ModelWeights and one flat vector of all parameters. Plain TensorFlow."""

    def __init__(self, specs: Sequence[ParameterSpec]) -> None:
        self.specs, self.d = specs, total_size(specs)
        parts = {one: [spec for spec in specs if spec.trainable is one] for one in (True, False)}
        types = {
            one: tff.types.StructWithPythonType([(None, tff.TensorType(np.float32, s.shape)) for s in found], list)
            for one, found in parts.items()
        }
        self.weights_type = tff.types.StructWithPythonType(
            [("trainable", types[True]), ("non_trainable", types[False])], tff.learning.models.ModelWeights
        )
        self.vector_type = tff.TensorType(np.float32, [self.d])

    def flat(self, weights: Any) -> Any:
        parts = {True: iter(weights.trainable), False: iter(weights.non_trainable)}
        return tf.concat([tf.reshape(next(parts[spec.trainable]), [-1]) for spec in self.specs], 0)

    def weights(self, vector: Any) -> Any:
        places = offsets(self.specs)
        parts = {
            one: [tf.reshape(vector[places[s.name]], s.shape) for s in self.specs if s.trainable is one]
            for one in (True, False)
        }
        return tff.learning.models.ModelWeights(parts[True], parts[False])


def learning_process(learning: Learning, work: DeviceWork) -> Any:
    """The learning process, made in the worker's context."""
    wire = Wire(work.steps.specs)
    start = np.concatenate([np.ravel(variable.numpy()) for variable in work.steps.parameters])
    first = tff.tensorflow.computation(lambda: wire.weights(tf.constant(start)))
    flat = tff.tensorflow.computation(wire.flat, wire.weights_type)
    train = work.training()
    aggregation = aggregation_of(learning, wire.vector_type, work.losses if work.trusted is not None else None)
    finalizer = tff.learning.templates.build_apply_optimizer_finalizer(
        build_server_optimizer(learning.server_optimizer, learning.server_learning_rate), wire.weights_type
    )
    gradient = tff.tensorflow.computation(lambda update: wire.weights(-update).trainable, wire.vector_type)
    moved = tff.tensorflow.computation(
        lambda weights, update: tff.learning.models.ModelWeights(
            weights.trainable,
            [old + change for old, change in zip(weights.non_trainable, wire.weights(update).non_trainable)],
        ),
        wire.weights_type,
        wire.vector_type,
    )
    gather = gathering(2, np.float32)
    told = tff.tensorflow.computation(
        lambda result: tf.stack([result["loss"], result["num_examples"]]), train.type_signature.result
    )
    nothing = tff.tensorflow.computation(lambda: ())

    def first_state() -> Any:
        return tff.federated_zip(
            tff.learning.templates.LearningAlgorithmState(
                tff.federated_eval(first, tff.SERVER),
                tff.federated_eval(nothing, tff.SERVER),
                tff.federated_eval(nothing, tff.SERVER),
                aggregation.initialize(),
                finalizer.initialize(),
            )
        )

    initialize = tff.federated_computation(first_state)
    state_type = initialize.type_signature.result
    tasks_type = tff.FederatedType(work.task_type, tff.CLIENTS)

    def next_round(state: Any, tasks: Any) -> Any:
        received = tff.federated_broadcast(tff.federated_map(flat, state.global_model_weights))
        result = tff.federated_map(train, (received, tasks))
        weight = (tff.federated_zip((result["num_examples"], result["place"])),) if aggregation.is_weighted else ()
        aggregated = aggregation.next(state.aggregator, result["update"], *weight)
        weights = tff.federated_map(moved, (state.global_model_weights, aggregated.result))
        finalized = finalizer.next(state.finalizer, weights, tff.federated_map(gradient, aggregated.result))
        new_state = tff.federated_zip(
            tff.learning.templates.LearningAlgorithmState(
                finalized.result, state.distributor, state.client_work, aggregated.state, finalized.state
            )
        )
        metrics = tff.federated_zip(
            OrderedDict(
                client_work=gather(tff.federated_map(told, result)),
                aggregator=aggregated.measurements,
                finalizer=finalized.measurements,
            )
        )
        return tff.learning.templates.LearningProcessOutput(new_state, metrics)

    get_weights = tff.tensorflow.computation(lambda state: state.global_model_weights, state_type.member)
    set_weights = tff.tensorflow.computation(
        lambda state, weights: tff.learning.templates.LearningAlgorithmState(
            weights, state.distributor, state.client_work, state.aggregator, state.finalizer
        ),
        state_type.member,
        wire.weights_type,
    )
    return tff.learning.templates.LearningProcess(
        initialize, tff.federated_computation(next_round, state_type, tasks_type), get_weights, set_weights
    )


def aggregation_of(learning: Learning, vector_type: Any, losses: Any = None) -> Any:
    """losses: as of RuleFactory."""
    rule: Rule = learning.rule
    if learning.attack is not None and learning.hostile:
        rule = Attacked(learning.attack, tuple(learning.hostile), rule, learning.seed, sampled=True)
    if isinstance(learning.privacy, CentralPrivacy):
        if rule is not learning.rule:
            raise ConfigError("an attack on updates under central differential privacy", "attack the data instead")
        told = {field.name: getattr(learning.privacy, field.name) for field in dataclasses.fields(learning.privacy)}
        devices = told.pop("devices_per_round")
        return private_aggregator(rule, clients_per_round=devices, seed=learning.seed, **told).create(vector_type)
    return RuleFactory(rule, losses=losses).create(vector_type, tff.types.to_type((np.float32, np.int64)))


def gathering(columns: int, dtype: Any) -> Any:
    """In a federated computation: vectors of so many numbers at clients -> one matrix at the server, in their order."""
    rows_type, row_type = tff.TensorType(dtype, [None, columns]), tff.TensorType(dtype, [columns])
    empty = tff.tensorflow.computation(
        lambda: tf.compat.v1.placeholder_with_default(tf.zeros([0, columns], dtype), [None, columns])
    )
    append = tff.tensorflow.computation(lambda rows, row: tf.concat([rows, row[None]], 0), rows_type, row_type)
    join = tff.tensorflow.computation(lambda upper, lower: tf.concat([upper, lower], 0), rows_type, rows_type)
    whole = tff.tensorflow.computation(lambda rows: rows, rows_type)
    return lambda value: tff.federated_aggregate(value, empty(), append, join, whole)


def evaluator(work: DeviceWork) -> Any:
    """A TFF computation: (ModelWeights, tasks of devices) -> (devices, 3) float64."""
    wire, evaluation = Wire(work.steps.specs), work.evaluation()
    flat, gather = tff.tensorflow.computation(wire.flat, wire.weights_type), gathering(3, np.float64)

    def evaluated(weights: Any, tasks: Any) -> Any:
        received = tff.federated_broadcast(tff.federated_value(flat(weights), tff.SERVER))
        return gather(tff.federated_map(evaluation, (received, tasks)))

    return tff.federated_computation(evaluated, wire.weights_type, tff.FederatedType(work.task_type, tff.CLIENTS))
