"""CoMT as a TFF computation over teachers: broadcast, a map, sums, and the server's step on what was summed.

What teachers keep from round to round stays in this process and travels with them, as the controls of SCAFFOLD do in
`simulation.exchanges`; the server's part of the computation never sees it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.simulation.remote import RemoteWorkers
from covey_coordinator.simulation.shards import FileShards, SentShards, Shards
from covey_coordinator.teaching.reference import Array, Data, assembled
from covey_coordinator.teaching.server import Residuals, Standing, begun, stepped
from covey_coordinator.teaching.tensors import Kept, answered, corrected
from covey_protocol.teaching import Problem, Settings

Tensor = Any
TOLD = ("theta", "u", "tau")  # of the server's state, what teachers are told


class State(NamedTuple):
    """standing: the server's. kept: of each teacher, in their order."""

    standing: Standing
    kept: tuple[Kept, ...]


class TeachingProcess:
    """Use it in a with block: it holds files. Every teacher is in every round.

    teachers, trusted: as of `reference.comt`; y of (n, C). Raises DataError for what does not fit together.
    """

    def __init__(
        self,
        teachers: Sequence[Data],
        trusted: Sequence[Data],
        problem: Problem,
        settings: Settings,
        worker: Worker | RemoteWorkers,
    ) -> None:
        self._teachers = assembled(teachers, trusted, problem, settings)
        self._problem, self._settings, self._worker = problem, settings, worker
        self._features, self._columns = self._teachers[0].share.shape
        self._count = sum(one.teaches for one in self._teachers)
        self._holders = sum(one.trusts for one in self._teachers)
        self._shards = self._made_shards()
        nothing = (teachers[0][0][:0], teachers[0][1][:0])
        try:
            self._places = [
                (self._shards.add(_at(teachers, k, nothing)), self._shards.add(_at(trusted, k, nothing)))
                for k in range(len(self._teachers))
            ]
            self._next = worker.call(self._computation)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TeachingProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._shards.close()

    def initial_state(self) -> State:
        shape = (self._features, self._columns)

        def first(count: int) -> Kept:
            parts = dict.fromkeys(Kept._fields, np.zeros(shape))
            return Kept(**{**parts, "alpha": np.zeros((count, self._columns)), "corrected": np.float64(0.0)})

        return State(begun(shape), tuple(first(len(one.alpha)) for one in self._teachers))

    def next(self, state: State) -> tuple[State, Residuals]:
        """One round of all teachers."""
        clients = [
            OrderedDict(
                plain=self._shards.value(plain),
                trusted=self._shards.value(trusted),
                kept=OrderedDict(kept._asdict()),
            )
            for (plain, trusted), kept in zip(self._places, state.kept)
        ]
        standing, residuals, kept = self._worker.call(self._next, OrderedDict(state.standing._asdict()), clients)
        moved = Standing(**{name: np.asarray(standing[name]) for name in Standing._fields})
        told = Residuals(**{name: float(residuals[name]) for name in Residuals._fields})
        return State(
            moved, tuple(Kept(**{name: np.asarray(value) for name, value in one.items()}) for one in kept)
        ), told

    @property
    def computation(self) -> Any:
        """The tff.Computation of a round."""
        return self._next

    def _made_shards(self) -> Shards:
        kinds = (tf.TensorSpec([None, count], tf.float64) for count in (self._features, self._columns))
        return (FileShards if self._worker.read_our_files else SentShards)(*kinds)

    def _computation(self) -> Any:
        matrix, scalar = tff.TensorType(np.float64, (self._features, self._columns)), tff.TensorType(np.float64)
        kept_type = OrderedDict.fromkeys(Kept._fields, matrix)
        kept_type.update(alpha=tff.TensorType(np.float64, [None, self._columns]), corrected=scalar)
        shard = self._shards.value_type
        client_type = tff.to_type(OrderedDict(plain=shard, trusted=shard, kept=kept_type))
        standing_type = tff.to_type(OrderedDict.fromkeys(Standing._fields, matrix))
        told_type = tff.to_type(OrderedDict.fromkeys(TOLD, matrix))
        told = tff.tensorflow.computation(
            lambda standing: OrderedDict((name, standing[name]) for name in TOLD), standing_type
        )
        teach = tff.tensorflow.computation(self._teach, told_type, client_type)
        result_type = teach.type_signature.result
        sent = tff.tensorflow.computation(lambda result: result["sent"], result_type)
        keep = tff.tensorflow.computation(lambda result: result["kept"], result_type)
        move = tff.tensorflow.computation(self._move, standing_type, sent.type_signature.result)

        def next_round(standing: Any, clients: Any) -> Any:
            model = tff.federated_broadcast(tff.federated_map(told, standing))
            result = tff.federated_map(teach, (model, clients))
            sums = tff.federated_sum(tff.federated_map(sent, result))
            moved = tff.federated_map(move, (standing, sums))
            return moved["standing"], moved["residuals"], tff.federated_map(keep, result)

        placed = tff.FederatedType(standing_type, tff.SERVER), tff.FederatedType(client_type, tff.CLIENTS)
        return tff.federated_computation(next_round, *placed)

    def _teach(self, model: Any, client: Any) -> Any:
        """sent: all that leaves the teacher. kept: what it remembers."""

        def run(model: Any, client: Any) -> Any:
            x, y = self._shards.read(client["plain"])
            held_x, held_y = self._shards.read(client["trusted"])
            kept = answered(self._problem, self._settings, self._count, x, y, Kept(**client["kept"]), model)
            kept, change = corrected(self._problem, self._settings, held_x, held_y, kept, model["theta"])
            sent = OrderedDict(answers=kept.share, corrections=change)
            return OrderedDict(sent=sent, kept=OrderedDict(kept._asdict()))

        return tf.function(run, autograph=False)(model, client)

    def _move(self, standing: Any, sums: Any) -> Any:
        """As server.moved."""
        before, answers = Standing(**standing), sums["answers"]
        after = stepped(before, self._settings, answers, self._count, sums["corrections"], self._holders)
        residuals = OrderedDict(
            primal=tf.norm(after.theta - answers),
            dual=tf.norm(tf.stack([after.theta - before.theta, answers - before.tau])),
            trusted=tf.norm(after.q - before.q) if self._holders else tf.constant(0.0, tf.float64),
            size=tf.norm(after.theta),
        )
        return OrderedDict(standing=OrderedDict(after._asdict()), residuals=residuals)


def _at(sets: Sequence[Data], place: int, nothing: Data) -> tuple[Array, Array]:
    return sets[place] if place < len(sets) else nothing
