"""The model of a bundle as the attacker differentiates it: read back from the bundle's own TFLite file, no Keras.

`loss` and `gradient` are those of a device's training step, before clipping, FedProx and corrections: the weighted mean
loss plus the model's own regularisation, in training mode. So BatchNorm normalises with the statistics of the batch it
is given, and Dropout draws from `seed` (a coordinator knows the seeds of a plan: `covey_protocol.svrg.step_seed`).
`outputs` is `infer`: inference mode. `update` runs `train` itself, with the bundle's optimizer.

A bundle's graphs are written for exactly B examples. Other numbers are cut into batches of B, of which the last is
filled up with its own examples at weight 0, as `covey_edge.runtime.Model` does; a BatchNorm's statistics see the
filling, here as there.

Not done: quantised models, loops that depend on data. Moving statistics that stay on a device (exported "local") are
taken as the file has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from covey_protocol.bundle import RESET_OPTIMIZER, Bundle, Manifest, TensorSpec, check_plan
from covey_protocol.errors import UsageError
from covey_protocol.messages import TRAIN, TrainingPlan
from covey_protocol.parameters import ParameterSpec
from covey_protocol.svrg import step_seed

Tensor = Any
Batch = tuple[Any, Any, Any]  # x, y, weights

NO_CLIPPING = 3e38  # as in covey_edge.runtime
TINY = 1e-12  # as in covey_models.steps


class BundleModel:
    """Implements `contract.AttackedModel`. dtype: tf.float32 (the default) or tf.float64.

    seed: of what the model draws in `loss` and `gradient`.
    """

    def __init__(self, bundle: Bundle, dtype: Any = None, *, seed: int = 0) -> None:
        import tensorflow as tf

        from covey_models.importing import ReadBack

        self._tf = tf
        self._manifest = bundle.manifest
        self._dtype = tf.as_dtype(dtype or tf.float32)
        if self._dtype not in (tf.float32, tf.float64):
            raise UsageError(f"a bundle cannot be computed in {self._dtype.name}", "choose tf.float32 or tf.float64")
        self._read = ReadBack(bundle.model, double=self._dtype == tf.float64)
        self._seed = seed
        self._losses = tf.function(self._loss_of_batch, autograph=False)
        self._gradients = tf.function(self._gradient_of_batch, autograph=False)
        self._infer = tf.function(self._outputs_of_batch, autograph=False)
        self._step = tf.function(self._trained, autograph=False)

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def dtype(self) -> Any:
        return self._dtype

    @property
    def specs(self) -> Sequence[ParameterSpec]:
        return self._manifest.parameters

    @property
    def input(self) -> TensorSpec:
        return self._manifest.input

    def loss(self, parameters: Tensor, x: Tensor, y: Tensor, weights: Tensor = None) -> Tensor:
        """(): of a training step, with the model's regularisation. Weights must not all be 0."""
        return self._mean(self._losses, parameters, x, y, weights)

    def gradient(self, parameters: Tensor, x: Tensor, y: Tensor, weights: Tensor = None) -> Tensor:
        """(d,): the bundle's own entry point `gradient`, so that kinks and ties are treated as on a device."""
        return self._mean(self._gradients, parameters, x, y, weights)

    def outputs(self, parameters: Tensor, x: Tensor) -> Tensor:
        """(n, ...): probabilities for the cross entropies."""
        parameters, x = self._real(parameters), self._tf.convert_to_tensor(x)
        rows = [self._infer(parameters, bx)[: bx.shape[0] if full else kept] for bx, kept, full in self._cut(x)]
        return rows[0] if len(rows) == 1 else self._tf.concat(rows, 0)

    def update(
        self, parameters: Tensor, batches: Sequence[Batch], plan: TrainingPlan, *, device_id: str = ""
    ) -> Tensor:
        """(d,): what training on the batches changes, before clipping and noise of the device's owner.

        Starts with a fresh optimizer, as a round does. device_id: whose draws (Dropout) are to be played.
        Raises TrainingError where the plan asks for what the bundle cannot do, UsageError for other works.
        """
        check_plan(self._manifest, plan)
        if plan.work != TRAIN or plan.evaluate:
            raise UsageError(f"the work {plan.work!r} is not local training", "replay a round that trains")
        received = self._real(parameters)
        state = self._state(received)
        if RESET_OPTIMIZER in self._manifest.signatures:
            _, state = self._read.run(RESET_OPTIMIZER, {}, state)
        for number, (x, y, weights) in enumerate(batches):
            seed = step_seed(plan.shuffle_seed, device_id, number) if self._draws else 0
            shared = self._shared(plan, received)
            state = self._step(state, x, y, self._real(weights), shared, self._tf.constant(seed, self._tf.int32))
        trained, _ = self._read.run("get_parameters", {}, state)
        return trained["parameters"] - received

    @property
    def _draws(self) -> bool:
        return "seed" in self._manifest.train_inputs

    def _real(self, values: Any) -> Tensor:
        return self._tf.cast(values, self._dtype)

    def _state(self, parameters: Tensor) -> dict[str, Tensor]:
        """All variables, with these parameters in place of the file's."""
        _, state = self._read.run("set_parameters", {"parameters": parameters}, self._read.initial)
        return state

    def _shared(self, plan: TrainingPlan | None, received: Tensor) -> dict[str, Tensor]:
        """What `train` takes beside batch and seed; neutral without a plan."""
        clip_norm = plan.gradient_clip_norm if plan and plan.gradient_clip_norm else NO_CLIPPING
        inputs = {
            "clip_norm": {"clip_norm": np.float32(clip_norm)},
            "proximal": {
                "proximal_weight": np.float32(plan.proximal_weight if plan else 0.0),
                "proximal_center": received,
            },
            "correction": {"correction": self._tf.zeros_like(received)},
            "seed": {},
        }
        taken = {name: value for key in self._manifest.train_inputs for name, value in inputs[key].items()}
        taken["learning_rate"] = np.float32(plan.learning_rate if plan else 0.0)
        return {name: self._real(value) for name, value in taken.items()}

    def _drawing(self, seed: Any) -> dict[str, Any]:
        return {"seed": seed} if self._draws else {}

    def _batch(self, x: Tensor, y: Tensor, weights: Tensor) -> dict[str, Tensor]:
        return {"x": x, "y": y, "example_weight": weights}

    def _loss_of_batch(self, parameters: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        inputs = {**self._batch(x, y, weights), **self._shared(None, parameters), **self._drawing(self._seed)}
        return self._read.run("train", inputs, self._state(parameters), ["loss"])[0]["loss"]

    def _gradient_of_batch(self, parameters: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        inputs = {**self._batch(x, y, weights), **self._drawing(self._seed)}
        return self._read.run("gradient", inputs, self._state(parameters), ["gradient"])[0]["gradient"]

    def _outputs_of_batch(self, parameters: Tensor, x: Tensor) -> Tensor:
        return self._read.run("infer", {"x": x}, self._state(parameters), ["output"])[0]["output"]

    def _trained(
        self, state: dict[str, Tensor], x: Tensor, y: Tensor, weights: Tensor, shared: dict[str, Tensor], seed: Tensor
    ) -> dict[str, Tensor]:
        inputs = {**self._batch(x, y, weights), **shared, **self._drawing(seed)}
        return self._read.run("train", inputs, state)[1]

    def _mean(self, function: Any, parameters: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """The mean of a function of batches over all examples, each batch counted by its weights."""
        tf, parameters = self._tf, self._real(parameters)
        x, y = tf.convert_to_tensor(x), tf.convert_to_tensor(y)
        weights = tf.ones([x.shape[0]], self._dtype) if weights is None else self._real(weights)
        x, y, weights = self._hard(x, y, weights)
        total = 0.0
        for (bx, kept, _), (by, _, _), (bw, _, _) in zip(self._cut(x), self._cut(y), self._cut(weights)):
            bw *= np.arange(bx.shape[0]) < kept
            total += tf.reduce_sum(bw) * function(parameters, bx, by, bw)
        return total / tf.maximum(tf.reduce_sum(weights), TINY)

    def _hard(self, x: Tensor, y: Tensor, weights: Tensor) -> Batch:
        """Soft labels as one example per class, weighted: exact for every loss."""
        tf, classes = self._tf, self._manifest.num_classes
        soft = (x.shape[0], classes) if classes else None
        label = self._manifest.label
        if tuple(y.shape) != soft or label.shape == (classes,):
            return x, y, weights
        every = tf.tile(tf.range(classes), [x.shape[0]])
        return tf.repeat(x, classes, 0), every, tf.reshape(weights[:, None] * self._real(y), [-1])

    def _cut(self, rows: Tensor) -> Iterator[tuple[Tensor, int, bool]]:
        """(B rows, how many of them are real, whether all are); the last batch repeats its own."""
        size = self._manifest.batch_size
        for start in range(0, rows.shape[0], size):
            part = rows[start : start + size]
            kept = part.shape[0]
            yield (
                (part if kept == size else self._tf.gather(part, np.resize(np.arange(kept), size))),
                kept,
                kept == size,
            )


def batches_of(x: Any, y: Any, plan: TrainingPlan, device_id: str, manifest: Manifest) -> list[Batch]:
    """The (x, y, weights) of every local step, as a device with these data draws them for this plan.

    x, y: all its examples, (n, ...). A partial batch is filled up with its own examples at weight 0.
    """
    from covey_coordinator.simulation.schedule import training_schedule

    count = min(plan.max_examples or len(x), len(x))
    schedule = training_schedule(plan, device_id, count, manifest.batch_size, draws=False)
    present = np.arange(manifest.batch_size)
    return [
        (x[rows], y[rows], (present < real).astype(np.float32)) for rows, real in zip(schedule.rows, schedule.counts)
    ]
