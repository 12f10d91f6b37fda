"""The cyclic code in TFF: every client trains its 2s + 1 shards and sends their combination, the server decodes.

A vector of a shard is its update times its number of examples, with that number behind it: the sum over the shards then
holds both parts of the weighted mean, and nobody can lie about the number alone. A row travels as two vectors of
float64, its real and its imaginary part. TFF computes the rows and gathers them; decoding searches, so it is NumPy's,
on the gathered rows. The step of the server is plain sgd. The rule of the learning is not used, nor its attack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import msgspec
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.coding.cyclic import decode
from covey_coordinator.records import Array
from covey_coordinator.simulation.composition import Wire, gathering
from covey_coordinator.simulation.device_work import DeviceWork
from covey_coordinator.simulation.learning import DeviceData, Learning
from covey_coordinator.simulation.process import traced_shards
from covey_coordinator.simulation.schedule import training_schedule
from covey_protocol.coding import CyclicCode
from covey_protocol.errors import ConfigError

Lie = Callable[[Array, int], Array]  # (rows (n, d + 1), number of the round) -> what is received


class CodedOutcome(NamedTuple):
    """mean: (d,) float64, of the shards' updates by their examples. liars: numbers of devices. misfit: see Decoded."""

    mean: Array
    liars: tuple[int, ...]
    misfit: float


class CodedSimulation:
    """Federated averaging in which device j of n holds the shards j to j + 2s. Use it in a with block.

    shards: n of them, one after another; their ids name the orders of their examples. s: how many devices may lie.
    lie: what becomes of the rows on the way; None leaves them. worker: to share, left running.
    Raises ConfigError for a learning whose updates would not be equal, or whose step of the server is not sgd.
    """

    def __init__(
        self, learning: Learning, shards: Sequence[DeviceData], s: int, *, worker: Worker, lie: Lie | None = None
    ) -> None:
        _check(learning)
        self.code = CyclicCode(len(shards), s)
        self._learning, self._held, self._worker = learning, list(shards), worker
        self._lie = lie if lie is not None else lambda rows, number: rows
        self._steps, self._shards, self._numbers = traced_shards(learning, self._held, worker)
        self._work = DeviceWork(self._steps, learning.plan, self._shards)
        self._random = np.random.default_rng([learning.seed, len(shards), s])
        try:
            self._rows = worker.call(self._computation)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CodedSimulation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Delete the shards' files."""
        self._shards.close()

    def initial_parameters(self) -> Array:
        """(d,) float32: the model before the first round."""
        return np.concatenate([np.ravel(variable.numpy()) for variable in self._steps.parameters])

    def next(self, parameters: Array, number: int, shuffle_seed: int) -> tuple[Array, CodedOutcome]:
        """Round `number`: the new parameters. Raises RuleError where more than s devices lied."""
        d = len(parameters)
        tasks = [[self._task(shard, shuffle_seed) for shard in places] for places in self._places()]
        sent = np.asarray(self._worker.call(self._rows, parameters, tuple(tasks))).reshape(self.code.n, 2, d + 1)
        rows = sent[:, 0] if self.code.n % 2 else sent[:, 0] + 1j * sent[:, 1]
        found = decode(self.code, self._lie(rows, number), self._random)
        mean = found.total[:-1] / found.total[-1]
        moved = parameters + np.float32(self._learning.server_learning_rate) * mean.astype(np.float32)
        return moved, CodedOutcome(mean, found.liars, found.misfit)

    def _places(self) -> list[list[int]]:
        """For each place in a device's hand the shards of all devices."""
        hands = [self.code.shards(device) for device in range(self.code.n)]
        return [list(place) for place in zip(*hands)]

    def _task(self, shard: int, shuffle_seed: int) -> Any:
        plan = msgspec.structs.replace(self._learning.plan, shuffle_seed=shuffle_seed)
        held, draws = self._held[shard], "seed" in self._steps.train_inputs
        schedule = training_schedule(plan, held.order_name, len(held.y), self._steps.batch_size, draws)
        return self._work.task(self._numbers[shard], shard, schedule, 0)

    def _computation(self) -> Any:
        """A TFF computation: (parameters, tasks of all devices for each place) -> (n, 2 (d + 1)) float64."""
        wire, train = Wire(self._steps.specs), self._work.training()
        weights = np.stack([self.code.coefficients.real, np.imag(self.code.coefficients)])
        result_type = train.type_signature.result

        def combined(results: Any) -> Any:
            parts = []
            for result in results:
                count = tf.cast(result["num_examples"], tf.float64)
                parts.append(tf.concat([tf.cast(result["update"], tf.float64) * count, count[None]], 0))
            held = tf.stack(parts)
            return tf.reshape(tf.reduce_sum(tf.constant(weights)[:, :, None] * held[None], axis=1), [-1])

        combine = tff.tensorflow.computation(combined, tff.types.to_type((result_type,) * self.code.load))
        gather = gathering(2 * (wire.d + 1), np.float64)
        tasks_type = tff.FederatedType(self._work.task_type, tff.CLIENTS)

        def rows(parameters: Any, tasks: Any) -> Any:
            received = tff.federated_broadcast(parameters)
            results = [tff.federated_map(train, (received, tasks[place])) for place in range(self.code.load)]
            return gather(tff.federated_map(combine, tuple(results)))

        parameters_type = tff.FederatedType(wire.vector_type, tff.SERVER)
        return tff.federated_computation(rows, parameters_type, tff.types.to_type((tasks_type,) * self.code.load))


def _check(learning: Learning) -> None:
    unequal = {
        f"the algorithm {learning.algorithm!r}": learning.algorithm != "fedavg",
        "privacy": learning.privacy is not None,
        f"the server optimizer {learning.server_optimizer!r}": learning.server_optimizer != "sgd",
        "max_examples": learning.plan.max_examples,
    }
    for name, is_set in unequal.items():
        if is_set:
            raise ConfigError(f"the cyclic code with {name}", "leave it out: rows are sums of plain updates of fedavg")
