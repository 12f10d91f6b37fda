"""The consensus of super teaching as a TFF computation: teachers are clients, the server sees sums of d-vectors.

Stands where `super_teaching.agreed` does: super_teach(..., consensus=TffConsensus(worker)). The loop, its end and its
penalty stay in this process; a round is one call, in which the new consensus goes back to the teachers. What teachers
remember (own vector and dual) travels with them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.teaching import tensors
from covey_coordinator.teaching.super_teaching import (
    Agreed,
    Matching,
    Part,
    Round,
    SuperSettings,
    centre,
    first_penalty,
    until_agreed,
)
from covey_protocol.errors import UsageError
from covey_protocol.teaching import Array, Logistic, Squares

Tensor = Any


class MatchingTensors(NamedTuple):
    """As super_teaching.Matching."""

    price: Tensor
    smooth: Tensor

    def value(self, m: Tensor) -> Tensor:
        b = self.pull(m)
        return tf.reduce_sum(-(m + self.price) * b - self.smooth / 2 * b * b)

    def pull(self, m: Tensor) -> Tensor:
        return tf.clip_by_value(-(m + self.price) / self.smooth, tf.constant(0.0, tf.float64), 1.0)

    def bend(self, m: Tensor) -> Tensor:
        b = -(m + self.price) / self.smooth
        return tf.cast((b > 0) & (b < 1), tf.float64) / self.smooth


LOSSES: dict[type, Any] = {  # of two numbers for each instance
    Squares: lambda first, second: tensors.Squares(first, 1.0, second),
    Logistic: lambda first, second: tensors.Logistic(1.0, second),
    Matching: MatchingTensors,
}


class TffConsensus:
    """`agreed` on this worker. Computations are made once for each loss and dimension."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._made: dict[tuple[type, int], Any] = {}

    def __call__(self, parts: Sequence[Part], curvature: float, linear: Array, settings: SuperSettings) -> Agreed:
        d, count, kind = len(linear), len(parts), type(parts[0].loss)
        if any(type(part.loss) is not kind for part in parts) or kind not in LOSSES:
            raise UsageError("a consensus of parts with different losses")
        computation = self._computation(kind, d)
        sets = [
            OrderedDict(z=part.z, first=first, second=second) for part in parts for first, second in [_numbers(part)]
        ]

        def next_round(z: Array, penalty: float, own: Array, duals: Array) -> Round:
            server = OrderedDict(z=z, linear=linear, curvature=curvature, penalty=penalty)
            clients = [OrderedDict(**one, own=p, dual=u) for one, p, u in zip(sets, own, duals)]
            new, square, kept = self._worker.call(computation, server, clients)
            own, duals = (np.stack([np.asarray(one[name]) for one in kept]) for name in ("own", "dual"))
            return Round(np.asarray(new), math.sqrt(float(square)), own, duals)

        return until_agreed(next_round, count, d, first_penalty(parts, curvature, d), settings)

    def _computation(self, kind: type, d: int) -> Any:
        if (kind, d) not in self._made:
            self._made[kind, d] = self._worker.call(_round_of, kind, d)
        return self._made[kind, d]


def _numbers(part: Part) -> tuple[Array, Array]:
    loss, n = part.loss, len(part.z)
    if isinstance(loss, Matching):
        return loss.price, np.full(n, loss.smooth)
    first = loss.target if isinstance(loss, Squares) else np.zeros(n)
    return first, np.broadcast_to(np.asarray(getattr(loss, "margin", 0.0), np.float64), (n,))


def _round_of(kind: type, d: int) -> Any:
    """(server, clients) -> (the new consensus, sum of |own - it|^2, what each teacher keeps)."""
    vector, number, column = (tff.TensorType(np.float64, shape) for shape in ([d], [], [None]))
    server_type = tff.to_type(OrderedDict(z=vector, linear=vector, curvature=number, penalty=number))
    client_type = tff.to_type(
        OrderedDict(z=tff.TensorType(np.float64, [None, d]), first=column, second=column, own=vector, dual=vector)
    )

    def near(server: Any, client: Any) -> Any:
        def run(server: Any, client: Any) -> Any:
            loss = LOSSES[kind](client["first"], client["second"])
            pull = -server["penalty"] * (server["z"] - client["dual"])
            return tensors.minimised(client["z"], loss, pull, server["penalty"], client["own"])

        return tf.function(run, autograph=False)(server, client)

    def said(own: Any, client: Any) -> Any:
        return OrderedDict(total=own + client["dual"], count=tf.constant(1.0, tf.float64))

    def centred(server: Any, sums: Any) -> Any:
        return centre(sums["total"], sums["count"], server["penalty"], server["curvature"], server["linear"])

    def settled(z: Any, own: Any, client: Any) -> Any:
        return OrderedDict(own=own, dual=client["dual"] + own - z)

    make = tff.tensorflow.computation
    find, say = make(near, server_type, client_type), make(said, vector, client_type)
    move = make(centred, server_type, say.type_signature.result)
    settle = make(settled, vector, vector, client_type)
    square = make(lambda z, own: tf.reduce_sum((own - z) ** 2), vector, vector)

    def next_round(server: Any, clients: Any) -> Any:
        own = tff.federated_map(find, (tff.federated_broadcast(server), clients))
        sums = tff.federated_sum(tff.federated_map(say, (own, clients)))
        new = tff.federated_map(move, (server, sums))
        told = tff.federated_broadcast(new)
        apart = tff.federated_sum(tff.federated_map(square, (told, own)))
        return new, apart, tff.federated_map(settle, (told, own, clients))

    placed = tff.FederatedType(server_type, tff.SERVER), tff.FederatedType(client_type, tff.CLIENTS)
    return tff.federated_computation(next_round, *placed)
