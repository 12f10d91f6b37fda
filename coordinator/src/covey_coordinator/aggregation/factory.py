"""The door to a rule from TFF: an aggregator for `tff.learning` processes and for real updates on a TFF worker.

It composes with TFF's own aggregators as the innermost part: clipping, zeroing, rotations, differential privacy
(`privacy`). TFF's `EncodedSumFactory` has no inner part and its other compressions hand on whole numbers to be summed,
so compression is a setting here (`encoder_fn`), with the same encoders. Gathering costs O(n^2)
bytes of copies in the worker and the transport several times the rule itself; live rounds of a bare rule use the
direct engine. What this does not do: look for copies among the updates (screening does, before any door).
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from covey_coordinator.aggregation.kernels import FLOAT32_MAX, Updates
from covey_coordinator.aggregation.kernels.reference import TensorFlowKernels
from covey_coordinator.aggregation.rules import (
    LOSSES,
    TRUSTED_PLACE,
    Batch,
    Judgement,
    Rule,
    Trusted,
    least_devices,
)
from covey_protocol.errors import UsageError

EncoderMaker = Callable[[tf.TensorSpec], Any]  # to a SimpleEncoder of the tensor_encoding that TFF uses
LossesOf = Callable[[Any], Any]  # in a graph: (m, d) models -> (m, 2) float64, as in `rules.Trusted`
LossesMaker = Callable[[], LossesOf]  # called while a computation is traced, outside its functions: it makes variables
POSITION = -1  # the place of a client whose weight does not name one
BLOCK = 8  # rows


class RuleFactory(tff.aggregators.WeightedAggregationFactory):  # type: ignore[misc]  # TFF ships no types
    """Aggregates clients' updates with a rule; the clients' weights are the rule's num_examples.

    A weight may also be a pair (num_examples float32, place int64); the place is the client's lasting number for rules
    that remember devices. Without it, that is the client's position.

    Values: any structure of float32 tensors of static shape, flattened in the order of `tf.nest`. Clients are rows in
    the order in which TFF got them. Clients with a value that is not finite or without examples are left out before
    the rule; num_byzantine stays, where an engine lowers it. With fewer clients left than the rule can bear, the
    computation fails and names the rule.
    Measurements: `accepted` (n,) bool and `scores` (n,) float32 in client order; a client left out has accepted False
    and the largest float32 as its score. The rule's own measurements stand beside them.
    encoder_fn: how each tensor travels from the clients (`quantize_above_threshold`); None sends it as it is.

    For a rule that needs trusted data one client stands for the coordinator: its place is TRUSTED_PLACE, its value the
    trusted update, or for losses the model of the round, and its count says nothing. It is in no measurement.
    losses: for rules that need them.
    """

    def __init__(self, rule: Rule, encoder_fn: EncoderMaker | None = None, losses: LossesMaker | None = None) -> None:
        self.rule = rule
        self.encoder_fn = encoder_fn
        self.losses = losses

    def create(self, value_type: Any, weight_type: Any) -> Any:
        """The aggregation process for this type of value. Raises RuleError if the rule bears no number of clients."""
        losses = self.losses if self.rule.needs_trusted == LOSSES else None
        if self.rule.needs_trusted == LOSSES and losses is None:
            raise UsageError(f"{self.rule.name} without losses")
        parts = _Parts(self.rule, value_type, weight_type, self.encoder_fn, losses=losses)
        next_round = tff.federated_computation(
            parts.next_round,
            tff.FederatedType(parts.state_type, tff.SERVER),
            tff.FederatedType(value_type, tff.CLIENTS),
            tff.FederatedType(weight_type, tff.CLIENTS),
        )
        return tff.templates.AggregationProcess(parts.initialize, next_round)


class UnweightedRuleFactory(tff.aggregators.UnweightedAggregationFactory):  # type: ignore[misc]
    """The same without weights: every client counts with one example, its place is its position.

    as_sum: give the aggregate times the number of clients the rule saw, for TFF's aggregators that want a sum and
    divide it themselves (`tff.aggregators.DifferentiallyPrivateFactory`, `UnweightedMeanFactory`).
    """

    def __init__(self, rule: Rule, *, as_sum: bool = False, encoder_fn: EncoderMaker | None = None) -> None:
        self.rule = rule
        self.as_sum = as_sum
        self.encoder_fn = encoder_fn

    def create(self, value_type: Any) -> Any:
        """As `RuleFactory.create`."""
        parts = _Parts(self.rule, value_type, tff.TensorType(np.float32), self.encoder_fn, self.as_sum)

        def next_round(state: Any, value: Any) -> Any:
            return parts.next_round(state, value, tff.federated_value(np.float32(1.0), tff.CLIENTS))

        return tff.templates.AggregationProcess(
            parts.initialize,
            tff.federated_computation(
                next_round, tff.FederatedType(parts.state_type, tff.SERVER), tff.FederatedType(value_type, tff.CLIENTS)
            ),
        )


def quantize_above_threshold(bits: int = 8, threshold: int = 20000) -> EncoderMaker:
    """For `encoder_fn`: tensors of more than threshold numbers travel as `bits` bits per number, others as they are.

    TFF's own encoder of `EncodedSumFactory.quantize_above_threshold`, rounding to the nearest of 2^bits values between
    the tensor's least and largest.
    """
    from tensorflow_model_optimization.python.core.internal import tensor_encoding as te

    def encoder_of(spec: tf.TensorSpec) -> Any:
        large = spec.shape.num_elements() > threshold
        encoder = te.encoders.uniform_quantization(bits, stochastic=False) if large else te.encoders.identity()
        return te.encoders.as_simple_encoder(encoder, spec)

    return encoder_of


class _Parts:
    """The computations of one aggregation process."""

    def __init__(
        self,
        rule: Rule,
        value_type: Any,
        weight_type: Any,
        encoder_fn: EncoderMaker | None,
        as_sum: bool = False,
        losses: LossesMaker | None = None,
    ) -> None:
        if rule.needs_trusted and not isinstance(weight_type, tff.StructType):
            raise UsageError(f"{rule.name} needs a client with the place {TRUSTED_PLACE}, and weights name no places")
        least = least_devices(rule)
        layout = _Layout(value_type)
        initial_state = tff.tensorflow.computation(
            lambda: tf.nest.map_structure(tf.constant, rule.initial_state(layout.d))
        )
        self.initialize = tff.federated_computation(lambda: tff.federated_eval(initial_state, tff.SERVER))
        self.state_type = initial_state.type_signature.result
        self._judge = tff.tensorflow.computation(
            lambda state, rows: _judge(rule, least, layout, as_sum, losses and losses(), state, *rows),
            self.state_type,
            layout.rows_type,
        )
        self._code = _Code(layout, value_type, encoder_fn)
        self._gather = _gathering(layout, self._code, weight_type)

    def next_round(self, state: Any, value: Any, weight: Any) -> Any:
        rows = self._gather(tff.federated_map(self._code.encode, value), weight)
        return tff.templates.MeasuredProcessOutput(*tff.federated_map(self._judge, (state, rows)))


class _Code:
    """How a value travels: `encode` is a computation for clients, `decode` plain TensorFlow for the server."""

    def __init__(self, layout: _Layout, value_type: Any, encoder_fn: EncoderMaker | None) -> None:
        self._layout = layout
        specs = [tf.TensorSpec(shape, tf.float32) for shape in layout.shapes]
        self._encoders = [encoder_fn(spec) for spec in specs] if encoder_fn else None
        self.encode = tff.tensorflow.computation(self._encoded, value_type)

    def _encoded(self, value: Any) -> Any:
        if self._encoders is None:
            return value
        return tuple(encoder.encode(leaf)[0] for encoder, leaf in zip(self._encoders, tf.nest.flatten(value)))

    def flat(self, encoded: Any) -> Any:
        """One vector (d,) of what arrived."""
        if self._encoders is not None:
            encoded = [encoder.decode(part) for encoder, part in zip(self._encoders, encoded)]
        return self._layout.flat(encoded)


def _gathering(layout: _Layout, code: _Code, weight_type: Any) -> Any:
    """(encoded values, weights) at clients -> (matrix (n, d), counts, places) at the server, in client order.

    Rows wait in a block of up to BLOCK before they join the matrix: n^2 / 16 + 4 n copies of a row instead of n^2 / 2.
    """
    rows_type = layout.rows_type
    kept_type = tff.types.to_type((rows_type, rows_type))
    pair_type = tff.types.to_type((code.encode.type_signature.result, weight_type))
    has_places = isinstance(weight_type, tff.StructType)

    def empty() -> Any:
        return tuple(_any_rows(tf.zeros(shape, dtype)) for shape, dtype in layout.empty_rows)

    def joined(*parts: Any) -> Any:
        return tuple(tf.concat(columns, axis=0) for columns in zip(*parts))

    def appended(kept: Any, pair: Any) -> Any:
        count, place = pair[1] if has_places else (pair[1], tf.constant(POSITION, tf.int64))
        block = joined(kept[1], (code.flat(pair[0])[None], tf.cast(count, tf.float32)[None], place[None]))
        return tf.cond(
            tf.shape(block[0])[0] < BLOCK,
            lambda: (tuple(map(tf.identity, kept[0])), block),
            lambda: (joined(kept[0], block), tuple(part[:0] for part in block)),
        )

    def both(upper: Any, lower: Any) -> Any:
        return joined(*upper, lower[0]), tuple(map(tf.identity, lower[1]))

    nothing = tff.tensorflow.computation(lambda: (empty(), empty()))
    append = tff.tensorflow.computation(appended, kept_type, pair_type)
    join = tff.tensorflow.computation(both, kept_type, kept_type)
    all_rows = tff.tensorflow.computation(lambda kept: joined(*kept), kept_type)

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


def _judge(
    rule: Rule,
    least: int,
    layout: _Layout,
    as_sum: bool,
    losses: LossesOf | None,
    state: Any,
    updates: Any,
    num_examples: Any,
    places: Any,
) -> Any:
    """One round on the gathered rows: new state, structured aggregate (times usable rows for as_sum), measurements."""
    trusted = Trusted()
    if rule.needs_trusted:
        trusted, (updates, num_examples, places) = _set_apart(rule, losses, updates, num_examples, places)
    # tf.equal: in TFF's graphs `==` compares the tensor objects and is False
    places = tf.where(tf.equal(places, POSITION), tf.range(tf.size(places, tf.int64)), places)
    usable, new_state, judgement = _advance_usable(rule, least, state, updates, num_examples, places, trusted)
    state = tf.nest.map_structure(lambda new, old: tf.ensure_shape(new, old.shape), new_state, state)  # loops forget it
    aggregate = judgement.aggregate * tf.cast(usable, tf.float32) if as_sum else judgement.aggregate
    own = {name: tf.cast(value, tf.float32) for name, value in sorted(judgement.measurements.items())}
    measurements = collections.OrderedDict(accepted=judgement.accepted, scores=judgement.scores, **own)
    return state, layout.unflat(aggregate), measurements


def _set_apart(
    rule: Rule, losses: LossesOf | None, updates: Any, num_examples: Any, places: Any
) -> tuple[Trusted, tuple[Any, Any, Any]]:
    """What the row of the coordinator's own says, and the rows of the clients."""
    is_own = tf.equal(places, TRUSTED_PLACE)
    row = tf.boolean_mask(updates, is_own)
    message = f"the row of trusted data for {rule.name} is missing, not finite or all zeros"
    asked = tf.logical_and(tf.equal(tf.shape(row)[0], 1), tf.reduce_all(tf.math.is_finite(row)))
    if rule.needs_trusted != LOSSES:
        asked = tf.logical_and(asked, tf.reduce_any(row > 0) | tf.reduce_any(row < 0))
    with tf.control_dependencies([tf.debugging.Assert(asked, [message])]):
        own = tf.ensure_shape(row[0], [updates.shape[1]])
    others = tuple(tf.boolean_mask(part, tf.logical_not(is_own)) for part in (updates, num_examples, places))
    if losses is None:
        return Trusted(own), others
    return Trusted(losses=lambda aggregates: losses(own + aggregates)), others


def _advance_usable(
    rule: Rule, least: int, state: Any, updates: Any, num_examples: Any, places: Any, trusted: Trusted
) -> tuple[Any, Any, Judgement]:
    """rule.advance on the rows that are finite and have examples; the judgement speaks of all rows.

    Returns how many rows there were, the new state and the judgement.
    """
    finite = tf.reduce_all(tf.math.is_finite(updates), axis=1)
    usable = tf.logical_and(finite, tf.logical_and(tf.math.is_finite(num_examples), num_examples > 0))
    chosen = tf.where(usable)
    n = tf.shape(chosen)[0]
    message = f"{rule.name} with num_byzantine = {rule.num_byzantine} needs at least {least} usable updates"
    with tf.control_dependencies([tf.debugging.assert_greater_equal(n, least, message=message)]):
        rows, counts, numbers = (tf.gather(whole, chosen[:, 0]) for whole in (updates, num_examples, places))
    state, judgement = traced(rule, trusted.losses)(state, rows, counts, numbers, trusted.update)
    accepted = tf.scatter_nd(chosen, tf.cast(judgement.accepted, tf.int32), [tf.shape(updates)[0]]) > 0
    left_out = tf.fill(tf.shape(num_examples), tf.constant(FLOAT32_MAX))
    scores = tf.tensor_scatter_nd_update(left_out, chosen, judgement.scores)
    return n, state, judgement._replace(accepted=accepted, scores=scores)


def traced(rule: Rule, losses: LossesOf | None = None) -> Any:
    """The rule in the reference kernels: a tf.function (state, (n, d), (n,), (n,)) -> (state, judgement).

    A last argument, (d,), is the trusted update for rules that need it. losses: of aggregates, as in `Batch`.
    """

    def advance(state: Any, updates: Any, num_examples: Any, places: Any, trusted: Any = None) -> tuple[Any, Judgement]:
        batch = Batch(Updates(updates), num_examples, places, trusted, losses)
        return rule.advance(TensorFlowKernels(), state, batch)

    return tf.function(advance, autograph=False)
