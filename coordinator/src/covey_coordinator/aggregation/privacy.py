"""Differential privacy around a rule, in TFF: its Gaussian query with the rule as the sum, and the epsilon it costs.

TFF's `DifferentiallyPrivateFactory` clips each client's update, hands the records to an aggregator that it takes for a
*sum*, adds noise for a sum, and divides by clients_per_round. A rule gives a mean or something like it, so here it is
multiplied by the number of clients it saw (`UnweightedRuleFactory(rule, as_sum=True)`).

The epsilon of the accountant holds for a sum: one client more or less moves it by the clip norm at most. A mean times n
is one. A median, Krum and every other rule that compares updates are not: one client can move the result from one
update to another, so times n by up to 2 n clip norms, and the noise would cover 1 / (2 n) of that. `private_aggregator`
refuses those. They can still be given noise (TFF's factory around `UnweightedRuleFactory`), without any epsilon.

The noise comes from TensorFlow's generators, which are not cryptographic ones.
"""

from __future__ import annotations

import collections
from typing import Any

import dp_accounting
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
import tensorflow_privacy as tfp

from covey_coordinator.aggregation.accounting import check_privacy, epsilons_by_round
from covey_coordinator.aggregation.clipping import Clipping, Zeroing
from covey_coordinator.aggregation.factory import UnweightedRuleFactory
from covey_coordinator.aggregation.mean import Mean
from covey_coordinator.aggregation.presteps import Before
from covey_coordinator.aggregation.rules import Rule
from covey_protocol.errors import ConfigError

MAX_ROUNDS = 100_000


def private_aggregator(
    rule: Rule,
    *,
    clip_norm: float,
    noise_multiplier: float,
    clients_per_round: float,
    rounds: int,
    sampling_rate: float = 1.0,
    delta: float = 1e-5,
    seed: int | None = None,
) -> tff.aggregators.UnweightedAggregationFactory:
    """An aggregator for unweighted `tff.learning` processes with an epsilon in its measurements.

    Updates are clipped to clip_norm (L2) at the clients; the sum has noise of noise_multiplier * clip_norm per
    coordinate; clients_per_round is the fixed number it is divided by. rounds: how many are planned; the one after
    fails. seed: makes the noise the same in every run, for simulations only: whoever knows it can subtract the noise.
    Measurements: under `privacy` the `epsilon` after the round, `delta` and `noise_multiplier`; under `dp` those
    of TFF and of the rule. Raises ConfigError for a rule whose sensitivity the clip norm does not bound, and for wrong
    settings.
    """
    if not is_a_sum(rule):
        raise ConfigError(
            f"no epsilon can be claimed for {rule.name}: one device can move it by more than clip_norm / n",
            'take "mean", with clipping or zeroing at a fixed threshold before it at most',
        )
    check_privacy(noise_multiplier, sampling_rate, delta)
    _check_sizes(clip_norm, clients_per_round, rounds)
    query = tfp.NormalizedQuery(
        _SeededSum(clip_norm, clip_norm * noise_multiplier, seed)
        if seed is not None
        else tfp.GaussianSumQuery(l2_norm_clip=clip_norm, stddev=clip_norm * noise_multiplier),
        denominator=clients_per_round,
    )
    noised = tff.aggregators.DifferentiallyPrivateFactory(query, UnweightedRuleFactory(rule, as_sum=True))
    epsilons = epsilons_by_round(noise_multiplier, rounds, sampling_rate, delta)
    return _Accounted(noised, epsilons, {"delta": delta, "noise_multiplier": noise_multiplier})


def is_a_sum(rule: Rule) -> bool:
    """Whether the rule, all counts equal, is a mean of rows that each depend on one update alone and are not longer."""
    if isinstance(rule, Before):
        fixed = isinstance(rule.first, Clipping) or (
            isinstance(rule.first, Zeroing) and rule.first.threshold is not None
        )
        return fixed and is_a_sum(rule.inner)
    return isinstance(rule, Mean)


def _check_sizes(clip_norm: float, clients_per_round: float, rounds: int) -> None:
    for name, value in (("clip_norm", clip_norm), ("clients_per_round", clients_per_round)):
        if not (np.isfinite(value) and value > 0):
            raise ConfigError(f"{name} = {value}", f"set {name} to a positive number")
    if not 1 <= rounds <= MAX_ROUNDS:
        raise ConfigError(f"rounds = {rounds}", f"set rounds to 1 to {MAX_ROUNDS}")


class _SeededSum(tfp.GaussianSumQuery):  # type: ignore[misc]  # tensorflow_privacy ships no types
    """The Gaussian sum with noise drawn by (seed, number of the round). Its global state: (the parent's, round)."""

    def __init__(self, l2_norm_clip: float, stddev: float, seed: int) -> None:
        super().__init__(l2_norm_clip, stddev)
        self._seed = seed

    def initial_global_state(self) -> Any:
        return super().initial_global_state(), tf.constant(0, tf.int64)

    def derive_sample_params(self, global_state: Any) -> Any:
        return super().derive_sample_params(global_state[0])

    def get_noised_result(self, sample_state: Any, global_state: Any) -> Any:
        plain, number = global_state
        leaves = tf.nest.flatten(sample_state)
        noised = [
            leaf + plain.stddev * tf.random.stateless_normal(tf.shape(leaf), [self._seed, number * len(leaves) + place])
            for place, leaf in enumerate(leaves)
        ]
        event = dp_accounting.GaussianDpEvent(plain.stddev / plain.l2_norm_clip)
        return tf.nest.pack_sequence_as(sample_state, noised), (plain, number + 1), event


class _Accounted(tff.aggregators.UnweightedAggregationFactory):  # type: ignore[misc]  # TFF ships no types
    """The inner aggregator, and beside its measurements what its rounds have spent. State: (inner state, rounds)."""

    def __init__(self, inner: Any, epsilons: np.ndarray[Any, Any], settings: dict[str, float]) -> None:
        self._inner = inner
        self._epsilons = epsilons
        self._settings = settings

    def create(self, value_type: Any) -> Any:
        inner = self._inner.create(value_type)
        count = tff.tensorflow.computation(self._counted, np.int32)
        tell = tff.tensorflow.computation(self._measured, np.int32)

        def next_round(state: Any, value: Any) -> Any:
            rounds = tff.federated_map(count, state[1])
            output = inner.next(state[0], value)
            spent = tff.federated_map(tell, rounds)
            measurements = collections.OrderedDict(privacy=spent, dp=output.measurements)
            return tff.templates.MeasuredProcessOutput(
                tff.federated_zip((output.state, rounds)), output.result, tff.federated_zip(measurements)
            )

        initialize = tff.federated_computation(
            lambda: tff.federated_zip((inner.initialize(), tff.federated_value(0, tff.SERVER)))
        )
        state_type = initialize.type_signature.result
        clients = tff.FederatedType(value_type, tff.CLIENTS)
        return tff.templates.AggregationProcess(initialize, tff.federated_computation(next_round, state_type, clients))

    def _counted(self, rounds: Any) -> Any:
        planned = len(self._epsilons) - 1
        message = f"the {planned} rounds that the privacy budget was planned for are over"
        with tf.control_dependencies([tf.debugging.assert_less(rounds, planned, message=message)]):
            return rounds + 1

    def _measured(self, rounds: Any) -> Any:
        constants = {name: tf.constant(value, tf.float64) for name, value in self._settings.items()}
        return collections.OrderedDict(epsilon=tf.gather(tf.constant(self._epsilons), rounds), **constants)
