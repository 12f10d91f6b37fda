"""What was sent as a function of the inputs it was computed from, and its derivatives: Tarantola's g(m) and G.

m are all numbers of the batch's inputs, flat, (N,) = n examples of S; labels are known. g(m) are the d numbers that
left the device, before noise: a whole local training with the plan's steps and the clipping. Several updates of one
batch (rounds, devices that share it) are one longer g. The derivatives come from TensorFlow as products with vectors,
never as a matrix: J w by differentiating the product v'J, which is linear in v, once more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any, Optional

import msgspec
import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.contract import AttackedModel, Seen
from covey_protocol.errors import UsageError
from covey_protocol.forms import NONE
from covey_protocol.messages import TrainingPlan
from covey_protocol.parameters import total_size
from covey_protocol.svrg import order_of, passes

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]
AT_ONCE = 32  # tangents pushed in one call: as many copies of the model's activations


class Forward:
    """g of these updates, for a batch of examples with these labels.

    labels: (n, *label shape). seen: what came of one and the same batch, one or several; their `update` is not used,
    noise is not in g. batch_size: of the local steps, the bundle's where None; another one needs a bundle that steps
    with plain SGD.
    """

    def __init__(
        self,
        model: AttackedModel,
        seen: Sequence[Seen],
        labels: npt.NDArray[Any],
        batch_size: Optional[int] = None,
    ) -> None:
        if not seen or not len(labels):
            raise UsageError(f"{len(seen)} updates of {len(labels)} examples", "give at least one of each")
        self.shape = (len(labels), *model.input.shape)
        self.inputs = math.prod(self.shape)
        self.outputs = len(seen) * len(seen[0].parameters)
        self._trainings = [
            local_training(model, one.plan, labels, device_id=one.device_id, batch_size=batch_size) for one in seen
        ]
        self._fixed = [(one.parameters, labels, one.clip_norm) for one in seen]

    def values(self, inputs: Vector) -> Vector:
        """g(m): (N,) -> (d,) of each update, one after the other."""
        return np.concatenate([one.values(inputs, *fixed) for one, fixed in self._each()])

    def pushed(self, inputs: Vector, tangents: Matrix) -> Matrix:
        """J w at these inputs (N,) for each row w of tangents (k, N) -> (k, d)."""
        parts = [
            np.concatenate([one.push(block, inputs, *fixed) for block in _blocks(tangents)])
            for one, fixed in self._each()
        ]
        return np.concatenate(parts, axis=1)

    def pulled(self, inputs: Vector, cotangents: Matrix) -> Matrix:
        """v' J at these inputs (N,) for each row v of cotangents (k, d) -> (k, N)."""
        total = np.zeros((len(cotangents), self.inputs))
        parts = np.split(cotangents, len(self._trainings), axis=1)
        for (one, fixed), part in zip(self._each(), parts):
            total += np.concatenate([one.pull(block, inputs, *fixed) for block in _blocks(part)])
        return total

    def _each(self) -> Iterator[tuple[LocalTraining, tuple[Any, Any, float]]]:
        yield from zip(self._trainings, self._fixed)


class LocalTraining:
    """A device's training on so many examples by one plan, and its derivatives, as graphs of TensorFlow.

    All methods end with inputs (N,), start (d,), labels (n, *label shape) and clip_norm, 0 for off. Each is traced when
    it is used first, in a second or more; curves over noise, clip norms and data share it.
    """

    def __init__(self, model: Any, plan: TrainingPlan, batches: Sequence[Any], size: int, labels_like: Any) -> None:
        import tensorflow as tf

        self._model, self._plan, self._batches, self._size = model, plan, batches, size
        self._d, examples = total_size(model.specs), labels_like[1][0]
        self._shape = (examples, *model.input.shape)
        self._inputs = math.prod(self._shape)
        floats = [tf.TensorSpec(size, model.dtype) for size in ([self._inputs], [self._d], [])]
        self._arguments = [*floats[:2], tf.TensorSpec(labels_like[1], labels_like[0]), floats[2]]

    def values(self, *arguments: Any) -> Vector:
        """(d,): trained minus received, clipped."""
        return np.asarray(self._values(*self._tensors(arguments)), np.float64)

    def push(self, tangents: Matrix, *arguments: Any) -> Matrix:
        """(k, N) -> (k, d)"""
        return np.asarray(self._push(*self._tensors((tangents, *arguments))), np.float64)

    def pull(self, cotangents: Matrix, *arguments: Any) -> Matrix:
        """(k, d) -> (k, N)"""
        return np.asarray(self._pull(*self._tensors((cotangents, *arguments))), np.float64)

    @cached_property
    def _values(self) -> Any:
        return self._graph(self._sent)

    @cached_property
    def _push(self) -> Any:
        return self._each(self._pushed, self._inputs)

    @cached_property
    def _pull(self) -> Any:
        return self._each(self._pulled, self._d)

    def _sent(self, flat: Any, start: Any, labels: Any, clip_norm: Any) -> Any:
        import tensorflow as tf

        x = tf.reshape(flat, self._shape)
        return _clipped(_update(self._model, self._plan, self._batches, self._size, start, x, labels), clip_norm)

    def _pulled(self, cotangent: Any, flat: Any, *fixed: Any) -> Any:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(flat)
            sent = self._sent(flat, *fixed)
        return tape.gradient(sent, flat, cotangent, unconnected_gradients="zero")

    def _pushed(self, tangent: Any, flat: Any, *fixed: Any) -> Any:
        import tensorflow as tf

        anything = tf.zeros([self._d], self._model.dtype)
        with tf.GradientTape() as tape:
            tape.watch(anything)
            pulled = self._pulled(anything, flat, *fixed)
        return tape.gradient(pulled, anything, tangent, unconnected_gradients="zero")

    def _each(self, function: Any, width: int) -> Any:
        import tensorflow as tf

        def rows(vectors: Any, *rest: Any) -> Any:
            return tf.map_fn(lambda one: function(one, *rest), vectors)

        return self._graph(rows, tf.TensorSpec([None, width], self._model.dtype))

    def _graph(self, function: Any, *first: Any) -> Any:
        import tensorflow as tf

        signature = [*first, *self._arguments]
        return tf.function(function, input_signature=signature, autograph=False).get_concrete_function()

    def _tensors(self, arguments: Sequence[Any]) -> list[Any]:
        import tensorflow as tf

        *floats, start, labels, clip_norm = arguments
        return [
            *(tf.constant(one, self._model.dtype) for one in (*floats, start)),
            tf.constant(labels),
            tf.constant(clip_norm, self._model.dtype),
        ]


def local_training(
    model: AttackedModel,
    plan: TrainingPlan,
    labels: npt.NDArray[Any],
    *,
    device_id: str = "",
    batch_size: Optional[int] = None,
) -> LocalTraining:
    """The training on as many examples as there are labels, in the order of this device (docs/protocol.md)."""
    import tensorflow as tf

    like = tf.convert_to_tensor(labels)
    key: Any = model
    size = batch_size or model.manifest.batch_size
    batches = tuple(_rows(len(labels), size, plan, device_id))
    plan = msgspec.structs.replace(plan, compression=NONE, kept_fraction=0.0)  # comes after training
    if "seed" not in model.manifest.train_inputs:
        plan = msgspec.structs.replace(plan, shuffle_seed=0)  # is in the batches: rounds share a graph where these do
    return _kept(key, plan, batches, size, like.dtype, tuple(like.shape))


def _rows(count: int, size: int, plan: TrainingPlan, device_id: str) -> Iterator[tuple[int, ...]]:
    """Of each step; in their own order where a step takes all of them, which is the same mean."""
    for rows in passes(count, size, plan.epochs, order_of(plan.shuffle_seed, device_id)):
        yield tuple(range(count)) if len(rows) == count else tuple(int(row) for row in rows)


@lru_cache(maxsize=8)  # of traced graphs, with the models they hold
def _kept(
    model: Any, plan: TrainingPlan, batches: tuple[tuple[int, ...], ...], size: int, dtype: Any, shape: tuple[int, ...]
) -> LocalTraining:
    return LocalTraining(model, plan, [np.array(rows, np.int64) for rows in batches], size, (dtype, shape))


def _update(model: Any, plan: TrainingPlan, batches: Sequence[Any], size: int, start: Any, x: Any, y: Any) -> Any:
    import tensorflow as tf

    plain = model.manifest.optimizer == "sgd" and not plan.gradient_clip_norm and not plan.proximal_weight
    if plain and len(batches) == 1:
        return -plan.learning_rate * model.gradient(start, x, y)
    if size == model.manifest.batch_size:
        return model.update(start, [_batch(x, y, rows, size) for rows in batches], plan)
    if not plain:
        raise UsageError(
            f"batches of {size} with a bundle of {model.manifest.batch_size}",
            "other batch sizes are for plain SGD without clipped gradients and FedProx",
        )
    current = start
    for rows in batches:
        current = current - plan.learning_rate * model.gradient(current, tf.gather(x, rows), tf.gather(y, rows))
    return current - start


def _clipped(update: Any, clip_norm: Any) -> Any:
    """Shortened to clip_norm where it is longer; 0 is off."""
    import tensorflow as tf

    length = tf.sqrt(tf.maximum(tf.reduce_sum(update**2), 1e-37))
    return tf.where((clip_norm > 0.0) & (length > clip_norm), clip_norm / length, 1.0) * update


def _batch(x: Any, y: Any, rows: npt.NDArray[np.int64], size: int) -> tuple[Any, Any, Any]:
    """These rows, filled up to the batch's size with themselves at weight 0, as a device fills it."""
    import tensorflow as tf

    filled = np.resize(rows, size)
    weights = tf.cast(np.arange(size) < len(rows), x.dtype)
    return tf.gather(x, filled), tf.gather(y, filled), weights


def _blocks(vectors: Matrix) -> list[Matrix]:
    return [vectors[first : first + AT_ONCE] for first in range(0, len(vectors), AT_ONCE)]
