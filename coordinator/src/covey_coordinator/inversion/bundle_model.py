"""The model of a bundle as the attacker differentiates it: read back from the bundle's own TFLite file, no Keras.

`loss` and `gradient` are those of a device's training step, before clipping, FedProx and corrections: the weighted mean
loss plus the model's own regularisation, in training mode. So BatchNorm normalises with the statistics of the batch it
is given, and Dropout draws from `seed` (a coordinator knows the seeds of a plan: `covey_protocol.svrg.step_seed`).
`outputs` is `infer`: inference mode. `update` runs `train` itself, with the bundle's optimizer.

A bundle's graphs are written for exactly B examples. For another number they are resized where every example goes
through alone (`covey_models.importing.batching`). Where not (in `loss` and `gradient` with BatchNorm, or with Dropout
for more than B) the examples are cut into batches of B, of which the last is filled up with its own examples at weight
0, as `covey_edge.runtime.Model` does; a BatchNorm's statistics see the filling, here as there.

Soft labels, (n, classes), take the place of the graph's one-hot labels where it makes them of classes; else every
example counts once per class, which costs as much.

Not done: quantised models, loops that depend on data. Moving statistics that stay on a device (exported "local") are
taken as the file has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from covey_coordinator.inversion.contract import OfBundle
from covey_edge.runtime import NO_CLIPPING
from covey_protocol.bundle import RESET_OPTIMIZER, Bundle, Manifest, TensorSpec, check_plan
from covey_protocol.errors import UsageError
from covey_protocol.messages import TRAIN, TrainingPlan
from covey_protocol.svrg import step_seed

Tensor = Any
Batch = tuple[Any, Any, Any]  # x, y, weights
Output = tuple[str, str]  # entry point and name

LOSS, OUTPUTS = ("train", "loss"), ("infer", "output")
BATCHED = ("x", "y", "example_weight")
MOST_AT_ONCE = 256  # examples in one graph: beyond, larger tensors only cost memory
AGREEMENT = 1e-4  # of a resized graph, relative; rounding gives 1e-6
CROSS_ENTROPY = "sparse_categorical_crossentropy"
TINY = 1e-12  # as in covey_models.steps


class BundleModel(OfBundle):
    """Implements `contract.AttackedModel`. dtype: tf.float32 (the default) or tf.float64.

    seed: of what the model draws in `loss` and `gradient`; a further batch of B draws from the next number.
    """

    def __init__(self, bundle: Bundle, dtype: Any = None, *, seed: int = 0) -> None:
        import tensorflow as tf

        from covey_models.importing import ReadBack

        self._tf = tf
        super().__init__(bundle.manifest, tf.as_dtype(dtype or tf.float32))
        if self._dtype not in (tf.float32, tf.float64):
            raise UsageError(f"a bundle cannot be computed in {self._dtype.name}", "choose tf.float32 or tf.float64")
        self._read = ReadBack(bundle.model, double=self._dtype == tf.float64)
        self._seed = seed
        self._losses = tf.function(self._loss_of_batch, autograph=False)
        self._sizes: dict[tuple[Output, int], Any] = {}
        self._takes_soft = bundle.manifest.loss == CROSS_ENTROPY and self._read.makes_one_hot("train", "y", ["loss"])
        self._own_gradients = tf.function(self._own_gradient_of_batch, autograph=False)
        self._gradients = tf.function(self._gradient_of_batch, autograph=False)
        self._infer = tf.function(self._outputs_of_batch, autograph=False)
        self._step = tf.function(self._trained, autograph=False)

    def loss(self, parameters: Tensor, x: Tensor, y: Tensor, weights: Tensor = None) -> Tensor:
        """(): of a training step, with the model's regularisation. Weights must not all be 0."""
        return self._mean(self._losses, LOSS, parameters, x, y, weights)

    def gradient(self, parameters: Tensor, x: Tensor, y: Tensor, weights: Tensor = None) -> Tensor:
        """(d,): of `loss`, by automatic differentiation, which is faster to differentiate again than `own_gradient`.

        At a point where the derivative jumps it may be another one-sided derivative than the device's: for instance
        where a LeakyReLU's input is exactly 0.
        """
        return self._mean(self._gradients, LOSS, parameters, x, y, weights)

    def own_gradient(self, parameters: Tensor, x: Tensor, y: Tensor, weights: Tensor = None) -> Tensor:
        """(d,): of the bundle's entry point `gradient`, in batches of B: what a device computes, also at kinks."""
        return self._mean(self._own_gradients, None, parameters, x, y, weights)

    def outputs(self, parameters: Tensor, x: Tensor) -> Tensor:
        """(n, ...): probabilities for the cross entropies."""
        return self._rows(self._infer, self._real(parameters), self._tf.convert_to_tensor(x))

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

    def _loss_of_batch(self, parameters: Tensor, x: Tensor, y: Tensor, weights: Tensor, seed: Tensor) -> Tensor:
        inputs = {**self._batch(x, y, weights), **self._shared(None, parameters), **self._drawing(seed)}
        return self._run(LOSS, x.shape[0], inputs, parameters)

    def _gradient_of_batch(self, parameters: Tensor, x: Tensor, y: Tensor, weights: Tensor, seed: Tensor) -> Tensor:
        with self._tf.GradientTape() as tape:
            tape.watch(parameters)
            loss = self._loss_of_batch(parameters, x, y, weights, seed)
        return tape.gradient(loss, parameters, unconnected_gradients=self._tf.UnconnectedGradients.ZERO)

    def _own_gradient_of_batch(self, parameters: Tensor, x: Tensor, y: Tensor, weights: Tensor, seed: Tensor) -> Tensor:
        inputs = {**self._batch(x, y, weights), **self._drawing(seed)}
        return self._run(("gradient", "gradient"), self._manifest.batch_size, inputs, parameters)

    def _outputs_of_batch(self, parameters: Tensor, x: Tensor) -> Tensor:
        return self._run(OUTPUTS, x.shape[0], {"x": x}, parameters)

    def _run(self, output: Output, count: int, inputs: dict[str, Tensor], parameters: Tensor) -> Tensor:
        """One output of one entry point, for so many examples."""
        name, key = output
        sized = self._resized(output, count)
        return self._read.run(name, inputs, self._state(parameters), [key], sized)[0][key]

    def _resized(self, output: Output, count: int) -> Any:
        """The graph for another number of examples than B; None for B itself and where there is none."""
        size = self._manifest.batch_size
        if count != size and (output, count) not in self._sizes:
            batched = [key for key in BATCHED if key in self._read.entry_point(output[0]).inputs]
            sized = self._read.for_count(output[0], [output[1]], batched, size, count)
            self._sizes[output, count] = sized if sized and self._agrees(output, count, sized) else None
        return self._sizes.get((output, count))

    def _agrees(self, output: Output, count: int, sized: Any) -> bool:
        """Whether a resized graph gives the numbers of batches of B on random examples."""
        tf, manifest = self._tf, self._manifest
        with tf.init_scope():
            random = np.random.default_rng(count)
            x, y = (tf.constant(_within(spec, count, random)) for spec in (manifest.input, manifest.label))
            parameters = self._read.run("get_parameters", {}, self._read.initial)[0]["parameters"]
            self._sizes[output, count] = None  # so that it is cut
            padded = self._plain(output, parameters, x, y)
            self._sizes[output, count] = sized
            resized = self._plain(output, parameters, x, y)
            scale = float(tf.reduce_max(tf.abs(padded)))
            return bool(tf.reduce_max(tf.abs(resized - padded)) <= AGREEMENT * scale)

    def _plain(self, output: Output, parameters: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if output == LOSS:
            return self._mean(self._loss_of_batch, LOSS, parameters, x, y, None)
        return self._rows(self._outputs_of_batch, parameters, x)

    def _rows(self, function: Any, parameters: Tensor, x: Tensor) -> Tensor:
        """What a function of batches gives for each example."""
        rows = [function(parameters, part)[:kept] for part, kept in self._cut(x, OUTPUTS)]
        return rows[0] if len(rows) == 1 else self._tf.concat(rows, 0)

    def _trained(
        self, state: dict[str, Tensor], x: Tensor, y: Tensor, weights: Tensor, shared: dict[str, Tensor], seed: Tensor
    ) -> dict[str, Tensor]:
        inputs = {**self._batch(x, y, weights), **shared, **self._drawing(seed)}
        return self._read.run("train", inputs, state)[1]

    def _mean(
        self, function: Any, output: Output | None, parameters: Tensor, x: Tensor, y: Tensor, weights: Tensor
    ) -> Tensor:
        """The mean of a function of batches over all examples, each batch counted by its weights."""
        tf, parameters = self._tf, self._real(parameters)
        x, y = tf.convert_to_tensor(x), tf.convert_to_tensor(y)
        weights = tf.ones([x.shape[0]], self._dtype) if weights is None else self._real(weights)
        x, y, weights = self._hard(x, y, weights, output)
        parts = list(zip(self._cut(x, output), self._cut(y, output), self._cut(weights, output)))
        seeds = [tf.constant((self._seed + number) % 2**31, tf.int32) for number in range(len(parts))]
        if len(parts) == 1 and parts[0][0][1] == parts[0][0][0].shape[0]:
            return function(parameters, x, y, weights, seeds[0])
        total = 0.0
        for ((bx, kept), (by, _), (bw, _)), seed in zip(parts, seeds):
            present = bw * self._real(np.arange(bx.shape[0]) < kept)
            total += tf.reduce_sum(present) * function(parameters, bx, by, present, seed)
        return total / tf.maximum(tf.reduce_sum(weights), TINY)

    def _hard(self, x: Tensor, y: Tensor, weights: Tensor, output: Output | None) -> Batch:
        """Soft labels as one example per class, weighted, where the graph cannot take them as they are."""
        tf, classes = self._tf, self._manifest.num_classes
        if not self._are_soft(x, y) or (output == LOSS and self._takes_soft):
            return x, y, weights
        every = tf.tile(tf.range(classes), [x.shape[0]])
        return tf.repeat(x, classes, 0), every, tf.reshape(weights[:, None] * self._real(y), [-1])

    def _are_soft(self, x: Tensor, y: Tensor) -> bool:
        manifest = self._manifest
        return manifest.label.shape == () and tuple(y.shape) == (x.shape[0], manifest.num_classes)

    def _batch(self, x: Tensor, y: Tensor, weights: Tensor) -> dict[str, Any]:
        from covey_models.importing import Soft

        return {"x": x, "y": Soft(y) if self._are_soft(x, y) else y, "example_weight": weights}

    def _cut(self, rows: Tensor, output: Output | None) -> Iterator[tuple[Tensor, int]]:
        """(rows, how many of them are examples): at once where the graph can be resized, else batches of B.

        The last batch is filled up with its own examples.
        """
        count, size = rows.shape[0], self._manifest.batch_size
        together = min(count, MOST_AT_ONCE)
        if output is not None and self._resized(output, together) is not None:
            size = together
        for start in range(0, count, size):
            part = rows[start : start + size]
            kept = part.shape[0]
            yield (part if kept == size else self._tf.gather(part, np.resize(np.arange(kept), size))), kept


def _within(spec: TensorSpec, count: int, random: np.random.Generator) -> Any:
    """Random examples that a spec allows."""
    low = 0.0 if spec.minimum is None else spec.minimum
    high = low + 1.0 if spec.maximum is None else spec.maximum
    shape = (count, *spec.shape)
    if spec.dtype == "float32":
        return random.uniform(low, high, shape).astype(np.float32)
    return random.integers(int(low), int(high) + 1, shape).astype(spec.dtype)


def batches_of(x: Any, y: Any, plan: TrainingPlan, device_id: str, manifest: Manifest) -> list[Batch]:
    """The (x, y, weights) of every local step, as a device with these data draws them for this plan.

    x, y: all its examples, (n, ...). device_id: or the replica that its owner names. A partial batch is filled up with
    its own examples at weight 0.
    """
    from covey_coordinator.simulation.schedule import training_schedule

    count = min(plan.max_examples or len(x), len(x))
    schedule = training_schedule(plan, device_id, count, manifest.batch_size, draws=False)
    present = np.arange(manifest.batch_size)
    return [
        (x[rows], y[rows], (present < real).astype(np.float32)) for rows, real in zip(schedule.rows, schedule.counts)
    ]
