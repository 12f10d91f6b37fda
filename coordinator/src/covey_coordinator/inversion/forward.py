"""What was sent as a function of the inputs it was computed from, and its derivatives: Tarantola's g(m) and G.

m are all numbers of the batch's inputs, flat, (N,) = n examples of S; labels are known. g(m) are the d numbers that
left the device, before noise: a whole local training with the plan's steps and the clipping. Several updates of one
batch (rounds, devices that share it) are one longer g. The derivatives come from TensorFlow as products with vectors,
never as a matrix: J w by differentiating the product v'J, which is linear in v, once more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.contract import AttackedModel, Seen
from covey_protocol.errors import UsageError
from covey_protocol.messages import TrainingPlan
from covey_protocol.parameters import total_size
from covey_protocol.svrg import order_of, passes

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]
AT_ONCE = 32  # tangents pushed in one call: as many copies of the model's activations


class Forward:
    """g of these updates, for a batch of examples with these labels.

    model: in float64: the eigenvalues that are looked for span more than float32 can tell apart. labels: (n, *label
    shape). seen: what came of one and the same batch, one or several; their `update` is not used. noise is not in g.
    """

    def __init__(self, model: AttackedModel, seen: Sequence[Seen], labels: npt.NDArray[Any]) -> None:
        import tensorflow as tf

        if model.dtype != tf.float64:
            raise UsageError(f"resolution in {model.dtype}", "build the attacked model with dtype=tf.float64")
        if not seen or not len(labels):
            raise UsageError(f"{len(seen)} updates of {len(labels)} examples", "give at least one of each")
        self.shape = (len(labels), *model.input.shape)
        self.inputs = math.prod(self.shape)
        self.outputs = len(seen) * len(seen[0].parameters)
        self._starts = [tf.constant(one.parameters, tf.float64) for one in seen]
        self._labels = tf.constant(labels)
        self._clips = [tf.constant(one.clip_norm, tf.float64) for one in seen]
        kind = (self._labels.dtype, tuple(self._labels.shape))
        key: Any = model
        self._compiled = [_compiled(key, one.plan, one.device_id, self.shape, kind) for one in seen]

    def values(self, inputs: Vector) -> Vector:
        """g(m): (N,) -> (d,) of each update, one after the other."""
        return np.concatenate([np.asarray(one.values(inputs, *fixed)) for one, fixed in self._each()])

    def pushed(self, inputs: Vector, tangents: Matrix) -> Matrix:
        """J w at these inputs (N,) for each row w of tangents (k, N) -> (k, d)."""
        parts = [
            np.concatenate([np.asarray(one.push(block, inputs, *fixed)) for block in _blocks(tangents)])
            for one, fixed in self._each()
        ]
        return np.concatenate(parts, axis=1)

    def pulled(self, inputs: Vector, cotangents: Matrix) -> Matrix:
        """v' J at these inputs (N,) for each row v of cotangents (k, d) -> (k, N)."""
        total = np.zeros((len(cotangents), self.inputs))
        parts = np.split(cotangents, len(self._starts), axis=1)
        for (one, fixed), part in zip(self._each(), parts):
            total += np.concatenate([np.asarray(one.pull(block, inputs, *fixed)) for block in _blocks(part)])
        return total

    def _each(self) -> Iterator[tuple[_Graphs, tuple[Any, Any, Any]]]:
        for one, start, clip in zip(self._compiled, self._starts, self._clips):
            yield one, (start, self._labels, clip)


class _Graphs(NamedTuple):
    """g of one update and its derivatives as graphs of TensorFlow. All end with the arguments (inputs (N,), start (d,),
    labels, clip_norm ()); push and pull take rows of vectors first."""

    values: Any
    push: Any
    pull: Any


@lru_cache(maxsize=4)  # tracing takes a second or more, and a curve over clip norms or noise needs one graph
def _compiled(model: Any, plan: TrainingPlan, device_id: str, shape: tuple[int, ...], kind: Any) -> _Graphs:
    import tensorflow as tf

    d, inputs = total_size(model.specs), math.prod(shape)
    batches = batches_of(model.manifest.batch_size, plan, device_id, shape[0])

    def values(flat: Any, start: Any, labels: Any, clip_norm: Any) -> Any:
        update = _update(model, plan, batches, start, tf.reshape(flat, shape), labels)
        return _clipped(update, clip_norm)

    def pull(cotangent: Any, flat: Any, *fixed: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(flat)
            sent = values(flat, *fixed)
        return tape.gradient(sent, flat, cotangent, unconnected_gradients="zero")

    def push(tangent: Any, flat: Any, *fixed: Any) -> Any:
        anything = tf.zeros([d], tf.float64)
        with tf.GradientTape() as tape:
            tape.watch(anything)
            pulled = pull(anything, flat, *fixed)
        return tape.gradient(pulled, anything, tangent, unconnected_gradients="zero")

    def each(function: Any) -> Any:
        return lambda vectors, *rest: tf.map_fn(lambda one: function(one, *rest), vectors)

    arguments = [tf.TensorSpec(size, tf.float64) for size in ([inputs], [d])]
    arguments += [tf.TensorSpec(kind[1], kind[0]), tf.TensorSpec([], tf.float64)]

    def graph(function: Any, *first: Any) -> Any:
        return tf.function(function, input_signature=[*first, *arguments]).get_concrete_function()

    return _Graphs(
        graph(values),
        graph(each(push), tf.TensorSpec([None, inputs], tf.float64)),
        graph(each(pull), tf.TensorSpec([None, d], tf.float64)),
    )


def batches_of(batch_size: int, plan: TrainingPlan, device_id: str, examples: int) -> list[npt.NDArray[np.int64]]:
    """The rows of every batch of a device's local training on so many examples, in its order (docs/protocol.md).

    examples: those it trains on; the plan's max_examples was applied before.
    """
    return list(passes(examples, batch_size, plan.epochs, order_of(plan.shuffle_seed, device_id)))


def _update(model: AttackedModel, plan: TrainingPlan, batches: Sequence[Any], start: Any, x: Any, y: Any) -> Any:
    if len(batches) == 1 and model.manifest.optimizer == "sgd" and not plan.gradient_clip_norm:
        return -plan.learning_rate * model.gradient(start, x, y)  # FedProx' term is 0 in the first step
    return model.update(start, [_batch(x, y, rows, model.manifest.batch_size) for rows in batches], plan)


def _clipped(update: Any, clip_norm: Any) -> Any:
    """Shortened to clip_norm where it is longer; 0 is off."""
    import tensorflow as tf

    length = tf.sqrt(tf.maximum(tf.reduce_sum(update**2), 1e-300))
    return tf.where((clip_norm > 0.0) & (length > clip_norm), clip_norm / length, 1.0) * update


def _batch(x: Any, y: Any, rows: npt.NDArray[np.int64], size: int) -> tuple[Any, Any, Any]:
    """These rows, filled up to the batch's size with the first of them at weight 0."""
    import tensorflow as tf

    filled = np.concatenate([rows, np.full(size - len(rows), rows[0])])
    weights = tf.constant(np.arange(size) < len(rows), tf.float64)
    return tf.gather(x, filled), tf.gather(y, filled), weights


def _blocks(vectors: Matrix) -> list[Matrix]:
    return [vectors[first : first + AT_ONCE] for first in range(0, len(vectors), AT_ONCE)]
