"""What a simulated device does in a round, as TensorFlow for a TFF worker. No state is kept from round to round.

It runs the model's own entry points, as a device runs their TFLite form, in the device's order. Against an agent with
`moving_statistics = "local"` this differs: the agent's statistics live on, here they start from the model's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from covey_coordinator.aggregation.kernels.normal import normals
from covey_coordinator.aggregation.kernels.reference import TensorFlowKernels
from covey_coordinator.aggregation.rules import LOSSES, TRUSTED_PLACE
from covey_coordinator.simulation.entry_points import EntryPoints, captured_values
from covey_coordinator.simulation.learning import Array, DeviceData, Privacy
from covey_coordinator.simulation.schedule import Schedule, in_order
from covey_coordinator.simulation.shards import Shards
from covey_edge.runtime import NO_CLIPPING
from covey_models.steps import Steps
from covey_protocol.messages import TrainingPlan
from covey_protocol.parameters import MAX_UPDATE_NORM, total_size
from covey_protocol.privacy import BELOW_ROUNDING

Tensor = Any


@dataclass(frozen=True)
class DeviceWork:
    """The graphs of one model under one plan.

    privacy: what a device does to its own update, if anything. one_gradient_step: a device sends -learning_rate times
    the gradient over all its examples, at the parameters it received, instead of training. needs_trusted, trusted: of
    the rule, and the data. The task with TRUSTED_PLACE is the coordinator's: its update is not protected, or is the
    received parameters for a rule that needs losses.
    """

    steps: Steps
    plan: TrainingPlan
    shards: Shards
    privacy: Privacy | None = None
    one_gradient_step: bool = False
    needs_trusted: str = ""
    trusted: DeviceData | None = None
    values: Mapping[int, Array] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", captured_values(self.steps))

    @property
    def dimension(self) -> int:
        return total_size(self.steps.specs)

    @property
    def task_type(self) -> Any:
        """The TFF type of what one device is given in a round: see `task`."""
        batch = self.steps.batch_size
        return tff.types.to_type(
            OrderedDict(
                shard=self.shards.value_type,
                place=np.int64,
                rows=tff.TensorType(np.int32, [None, batch]),
                counts=tff.TensorType(np.int32, [None]),
                seeds=tff.TensorType(np.int32, [None]),
                steps_per_epoch=np.int32,
                noise_seed=np.int64,
            )
        )

    def task(self, shard: int, place: int, schedule: Schedule, noise_seed: int) -> OrderedDict[str, Any]:
        """shard, place: numbers of the device's examples and of the device itself."""
        return OrderedDict(
            shard=self.shards.value(shard),
            place=np.int64(place),
            rows=schedule.rows,
            counts=schedule.counts,
            seeds=schedule.seeds,
            steps_per_epoch=np.int32(schedule.steps_per_epoch),
            noise_seed=np.int64(noise_seed),
        )

    def training(self) -> Any:
        """A TFF computation: (parameters (d,), task) -> update, num_examples, place, loss.

        num_examples is 0 where a real device would report a failure: an update that is not finite, too long, or zero.
        loss: of the last epoch, or at the received parameters for a gradient step.
        """
        return tff.tensorflow.computation(self._training, tff.TensorType(np.float32, [self.dimension]), self.task_type)

    def _training(self, parameters: Tensor, task: Any) -> Any:
        entry = EntryPoints(self.steps, self.values, ("train", "gradient", "set_parameters", "get_parameters"))

        def run(parameters: Tensor, task: Any) -> Any:
            x, y = self.shards.read(task["shard"])
            with tf.control_dependencies([entry("set_parameters", parameters=parameters)["dimension"]]):
                if self.one_gradient_step:
                    loss, gradient = self.full_gradient(entry, x, y, task)
                    update = -self.plan.learning_rate * gradient
                else:
                    loss = self.epochs(entry, x, y, task, self.constants(parameters))
                    with tf.control_dependencies([loss]):
                        update = entry("get_parameters")["parameters"] - parameters
            count = tf.reduce_sum(task["counts"][: task["steps_per_epoch"]])
            return OrderedDict(
                update=self.sent(update, parameters, task),
                num_examples=tf.where(self.is_usable(update), tf.cast(count, tf.float32), 0.0),
                place=task["place"],
                loss=loss,
            )

        return tf.function(run, autograph=False)(parameters, task)

    def sent(self, update: Tensor, parameters: Tensor, task: Any) -> Tensor:
        """What a device sends of its update; the coordinator's is as the rule needs it."""
        protected = self.protect(update, task["noise_seed"])
        if not self.needs_trusted:
            return protected
        own = parameters if self.needs_trusted == LOSSES else update
        return tf.where(tf.equal(task["place"], TRUSTED_PLACE), own, protected)

    def constants(self, parameters: Tensor) -> dict[str, Tensor]:
        """What all steps of a round share, of those inputs that the model's `train` has."""
        inputs = {
            "clip_norm": {"clip_norm": tf.constant(self.plan.gradient_clip_norm or NO_CLIPPING, tf.float32)},
            "proximal": {
                "proximal_weight": tf.constant(self.plan.proximal_weight, tf.float32),
                "proximal_center": parameters,
            },
            "correction": {"correction": tf.zeros([self.dimension])},
        }
        shared = {"learning_rate": tf.constant(self.plan.learning_rate, tf.float32)}
        for name in self.steps.train_inputs:
            shared.update(inputs.get(name, {}))
        return shared

    def epochs(self, entry: EntryPoints, x: Tensor, y: Tensor, task: Any, shared: dict[str, Tensor]) -> Tensor:
        """All steps; the mean loss of the last epoch's examples."""
        steps = tf.shape(task["counts"])[0]
        first_of_last = steps - task["steps_per_epoch"]

        def step(number: Tensor, loss_sum: Tensor) -> tuple[Tensor, Tensor]:
            count = task["counts"][number]
            seed = {"seed": task["seeds"][number]} if "seed" in self.steps.train_inputs else {}
            loss = entry("train", **batch(x, y, task["rows"][number], count), **shared, **seed)["loss"]
            weight = tf.cast(count, tf.float32) * tf.cast(number >= first_of_last, tf.float32)
            with tf.control_dependencies([loss]):
                return number + 1, loss_sum + tf.math.multiply_no_nan(tf.reshape(loss, []), weight)

        _, total = tf.while_loop(
            lambda number, _: number < steps, step, (tf.constant(0), tf.constant(0.0)), parallel_iterations=1
        )
        return total / tf.cast(tf.reduce_sum(task["counts"][first_of_last:]), tf.float32)

    def full_gradient(self, entry: EntryPoints, x: Tensor, y: Tensor, task: Any) -> tuple[Tensor, Tensor]:
        """Mean loss and its gradient (d,) over the first epoch's examples, as `covey_edge.runtime.Model.gradient`."""

        def step(number: Tensor, loss_sum: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            count = task["counts"][number]
            seed = {"seed": task["seeds"][number]} if "seed" in self.steps.train_inputs else {}
            found = entry("gradient", **batch(x, y, task["rows"][number], count), **seed)
            weight = tf.cast(count, tf.float64)
            one = tf.cast(found["gradient"], tf.float64) * weight
            return number + 1, loss_sum + tf.cast(tf.reshape(found["loss"], []), tf.float64) * weight, total + one

        start = (tf.constant(0), tf.constant(0.0, tf.float64), tf.zeros([self.dimension], tf.float64))
        _, loss_sum, total = tf.while_loop(
            lambda number, *_: number < task["steps_per_epoch"], step, start, parallel_iterations=1
        )
        count = tf.cast(tf.reduce_sum(task["counts"][: task["steps_per_epoch"]]), tf.float64)
        return tf.cast(loss_sum / count, tf.float32), tf.cast(total / count, tf.float32)

    def is_usable(self, update: Tensor) -> Tensor:
        """Whether a device would send it; else it reports a failure."""
        norm = tf.norm(update)  # infinite or NaN where it is not finite
        return tf.logical_and(norm > 0.0, norm <= MAX_UPDATE_NORM)

    def protect(self, update: Tensor, noise_seed: Tensor) -> Tensor:
        if self.privacy is None:
            return update
        return protected(update, self.privacy, noise_seed)

    def evaluation(self) -> Any:
        """A TFF computation: (parameters (d,), task) -> loss_sum, correct, count over the shard in the task's order."""
        return tff.tensorflow.computation(
            self._evaluation, tff.TensorType(np.float32, [self.dimension]), self.task_type
        )

    def _evaluation(self, parameters: Tensor, task: Any) -> Any:
        entry = EntryPoints(self.steps, self.values, ("evaluate", "set_parameters"))

        def run(parameters: Tensor, task: Any) -> Any:
            x, y = self.shards.read(task["shard"])
            return evaluated(entry, parameters, x, y, task["rows"], task["counts"])

        return tf.function(run, autograph=False)(parameters, task)

    def losses(self) -> Callable[[Tensor], Tensor]:
        """As `aggregation.factory.LossesMaker`: of models on the trusted data."""
        assert self.trusted is not None
        entry = EntryPoints(self.steps, self.values, ("evaluate", "set_parameters"))
        rows, counts = (tf.constant(part) for part in in_order(len(self.trusted.y), self.steps.batch_size))
        x, y = (tf.constant(part) for part in self.trusted[1:3])

        def of_one(parameters: Tensor) -> Tensor:
            loss_sum, correct, count = tf.unstack(evaluated(entry, parameters, x, y, rows, counts))
            return tf.stack([loss_sum / count, 1.0 - correct / count])

        return lambda models: tf.map_fn(
            of_one, models, fn_output_signature=tf.TensorSpec([2], tf.float64), parallel_iterations=1
        )


def evaluated(entry: EntryPoints, parameters: Tensor, x: Tensor, y: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """(3,) float64: loss_sum, correct, count of the model over these batches."""

    def step(number: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
        found = entry("evaluate", **batch(x, y, rows[number], counts[number]))
        one = tf.stack([tf.reshape(found[name], []) for name in ("loss_sum", "correct", "count")])
        return number + 1, totals + tf.cast(one, tf.float64)

    with tf.control_dependencies([entry("set_parameters", parameters=parameters)["dimension"]]):
        _, totals = tf.while_loop(
            lambda number, _: number < tf.shape(counts)[0],
            step,
            (tf.constant(0), tf.zeros([3], tf.float64)),
            parallel_iterations=1,
        )
    return totals


def batch(x: Tensor, y: Tensor, rows: Tensor, count: Tensor) -> dict[str, Tensor]:
    """The inputs of a step: the examples at `rows`, of which the first `count` have weight 1, the others 0."""
    weight = tf.cast(tf.range(tf.shape(rows)[0]) < count, tf.float32)
    size = rows.shape[0]
    return {
        "x": tf.ensure_shape(tf.gather(x, rows), [size, *x.shape[1:]]),
        "y": tf.ensure_shape(tf.gather(y, rows), [size, *y.shape[1:]]),
        "example_weight": tf.ensure_shape(weight, [size]),
    }


def protected(update: Tensor, privacy: Privacy, noise_seed: Tensor) -> Tensor:
    """The update (d,) clipped, then noised, as `covey_protocol.privacy` does on a device; that draws from secrets.

    The same clip to a rounding (in float64), noise of the same distribution, drawn by a seed.
    """
    wide = tf.cast(update, tf.float64)
    norm = tf.norm(wide)
    clip_norm = tf.constant(privacy.clip_norm, tf.float64)
    wide = tf.where(norm > clip_norm, wide * (clip_norm / norm * BELOW_ROUNDING), wide)
    if privacy.noise_multiplier:
        noise = normals(TensorFlowKernels(), noise_seed, tf.size(update))
        wide += noise * (privacy.noise_multiplier * clip_norm)
    return tf.ensure_shape(tf.cast(wide, tf.float32), update.shape)
