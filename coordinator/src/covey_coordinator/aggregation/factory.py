"""The door to a rule from TFF: an aggregator for `tff.learning` processes and for real updates on a TFF worker.

It composes with TFF's own aggregators (clipping, zeroing, compression) as the innermost part. Gathering costs O(n^2)
bytes of copies in the worker and the transport several times the rule itself; live rounds of a bare rule use the
direct engine. What this does not do: look for copies among the updates (screening does, before any door).
"""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from covey_coordinator.aggregation.kernels import FLOAT32_MAX, Updates
from covey_coordinator.aggregation.kernels.reference import TensorFlowKernels
from covey_coordinator.aggregation.rules import Batch, Judgement, Rule, least_devices
from covey_protocol.errors import UsageError

POSITION = -1  # the place of a client whose weight does not name one


class RuleFactory(tff.aggregators.WeightedAggregationFactory):  # type: ignore[misc]  # TFF ships no types
    """Aggregates clients' updates with a rule; the clients' weights are the rule's num_examples.

    A weight may also be a pair (num_examples float32, place int64); the place is the client's lasting number for rules
    that remember devices. Without it, that is the client's position.

    Values: any structure of float32 tensors of static shape, flattened in the order of `tf.nest`. Clients are rows in
    the order in which TFF got them. Clients with a value that is not finite or without examples are left out before
    the rule. With fewer clients left than the rule can bear, the computation fails and names the rule.
    Measurements: `accepted` (n,) bool and `scores` (n,) float32 in client order; a client left out has accepted False
    and the largest float32 as its score. The rule's own measurements stand beside them.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def create(self, value_type: Any, weight_type: Any) -> Any:
        """The aggregation process for this type of value. Raises RuleError if the rule bears no number of clients."""
        least = least_devices(self.rule)
        layout = _Layout(value_type)
        initial_state = tff.tensorflow.computation(
            lambda: tf.nest.map_structure(tf.constant, self.rule.initial_state(layout.d))
        )
        state_type = initial_state.type_signature.result
        judge = tff.tensorflow.computation(
            lambda state, rows: _judge(self.rule, least, layout, state, *rows), state_type, layout.rows_type
        )
        gather = _gathering(layout, value_type, weight_type)

        def next_round(state: Any, value: Any, weight: Any) -> Any:
            return tff.templates.MeasuredProcessOutput(*tff.federated_map(judge, (state, gather(value, weight))))

        return tff.templates.AggregationProcess(
            tff.federated_computation(lambda: tff.federated_eval(initial_state, tff.SERVER)),
            tff.federated_computation(
                next_round,
                tff.FederatedType(state_type, tff.SERVER),
                tff.FederatedType(value_type, tff.CLIENTS),
                tff.FederatedType(weight_type, tff.CLIENTS),
            ),
        )


def _gathering(layout: _Layout, value_type: Any, weight_type: Any) -> Any:
    """(values at clients, weights at clients) -> (matrix (n, d), weights (n,)) at the server, in client order."""
    rows_type = layout.rows_type
    pair_type = tff.types.to_type((value_type, weight_type))
    has_places = isinstance(weight_type, tff.StructType)

    def joined(upper: Any, lower: Any) -> Any:
        return tuple(tf.concat(parts, axis=0) for parts in zip(upper, lower))

    def appended(rows: Any, pair: Any) -> Any:
        count, place = pair[1] if has_places else (pair[1], tf.constant(POSITION, tf.int64))
        return joined(rows, (layout.flat(pair[0])[None], tf.cast(count, tf.float32)[None], place[None]))

    def empty() -> Any:
        return tuple(_any_rows(tf.zeros(shape, dtype)) for shape, dtype in layout.empty_rows)

    nothing = tff.tensorflow.computation(empty)
    append = tff.tensorflow.computation(appended, rows_type, pair_type)
    join = tff.tensorflow.computation(joined, rows_type, rows_type)
    all_rows = tff.tensorflow.computation(lambda rows: rows, rows_type)

    def gather(value: Any, weight: Any) -> Any:
        return tff.federated_aggregate(tff.federated_zip((value, weight)), nothing(), append, join, all_rows)

    return gather


class _Layout:
    """How a structured value lies in one flat vector: the leaves in the order of `tf.nest`."""

    def __init__(self, value_type: Any) -> None:
        self.template = tff.types.structure_from_tensor_type_tree(lambda leaf: leaf, value_type)
        leaves = tf.nest.flatten(self.template)
        for leaf in leaves:
            if leaf.dtype != np.float32 or not tff.types.is_shape_fully_defined(leaf.shape):
                raise UsageError(f"rules aggregate float32 tensors of static shape, not {leaf}")
        self.shapes = [list(leaf.shape) for leaf in leaves]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.d = sum(self.sizes)
        self.empty_rows = (([0, self.d], np.float32), ([0], np.float32), ([0], np.int64))
        self.rows_type = tff.types.to_type(
            tuple(tff.TensorType(dtype, [None, *shape[1:]]) for shape, dtype in self.empty_rows)
        )

    def flat(self, value: Any) -> Any:
        return tf.concat([tf.reshape(leaf, [-1]) for leaf in tf.nest.flatten(value)], axis=0)

    def unflat(self, vector: Any) -> Any:
        parts = tf.split(vector, self.sizes)
        leaves = [tf.reshape(part, shape) for part, shape in zip(parts, self.shapes)]
        return tf.nest.pack_sequence_as(self.template, leaves)


def _any_rows(empty: Any) -> Any:
    """An empty tensor whose first dimension TFF types as unknown, as the growing rows need."""
    return tf.compat.v1.placeholder_with_default(empty, [None, *empty.shape[1:]])


def _judge(rule: Rule, least: int, layout: _Layout, state: Any, updates: Any, num_examples: Any, places: Any) -> Any:
    """One round on the gathered rows: new state, structured aggregate, measurements."""
    places = tf.where(places == POSITION, tf.range(tf.size(places, tf.int64)), places)
    state, judgement = _advance_usable(rule, least, state, updates, num_examples, places)
    own = {name: tf.cast(value, tf.float32) for name, value in sorted(judgement.measurements.items())}
    measurements = collections.OrderedDict(accepted=judgement.accepted, scores=judgement.scores, **own)
    return state, layout.unflat(judgement.aggregate), measurements


def _advance_usable(
    rule: Rule, least: int, state: Any, updates: Any, num_examples: Any, places: Any
) -> tuple[Any, Judgement]:
    """rule.advance on the rows that are finite and have examples; the judgement speaks of all rows."""
    finite = tf.reduce_all(tf.math.is_finite(updates), axis=1)
    usable = tf.logical_and(finite, tf.logical_and(tf.math.is_finite(num_examples), num_examples > 0))
    chosen = tf.where(usable)
    n = tf.shape(chosen)[0]
    message = f"{rule.name} with num_byzantine = {rule.num_byzantine} needs at least {least} usable updates"
    with tf.control_dependencies([tf.debugging.assert_greater_equal(n, least, message=message)]):
        rows, counts, numbers = (tf.gather(whole, chosen[:, 0]) for whole in (updates, num_examples, places))
    state, judgement = traced(rule)(state, rows, counts, numbers)
    accepted = tf.scatter_nd(chosen, tf.cast(judgement.accepted, tf.int32), [tf.shape(updates)[0]]) > 0
    left_out = tf.fill(tf.shape(num_examples), tf.constant(FLOAT32_MAX))
    scores = tf.tensor_scatter_nd_update(left_out, chosen, judgement.scores)
    return state, judgement._replace(accepted=accepted, scores=scores)


def traced(rule: Rule) -> Any:
    """The rule in the reference kernels: a tf.function (state, (n, d), (n,), (n,)) -> (state, judgement)."""

    def advance(state: Any, updates: Any, num_examples: Any, places: Any) -> tuple[Any, Judgement]:
        return rule.advance(TensorFlowKernels(), state, Batch(Updates(updates), num_examples, places))

    return tf.function(advance, autograph=False)
