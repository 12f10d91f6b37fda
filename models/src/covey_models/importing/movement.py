"""Operators that move, choose, repeat or name numbers. Shapes are those of the file, so most need nothing else."""

from __future__ import annotations

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.importing.registry import Call, Tensor, axes_of, imports, static
from covey_protocol.errors import BundleError

tf = import_tensorflow()


@imports("RESHAPE", "EXPAND_DIMS", "SQUEEZE")
def reshape(call: Call, x: Tensor, *_: Tensor) -> Tensor:
    return tf.reshape(x, call.shape)


@imports("TRANSPOSE")
def transpose(call: Call, x: Tensor, order: Tensor) -> Tensor:
    return tf.transpose(x, axes_of(call, order))


@imports("SLICE")
def cut_out(call: Call, x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    return tf.slice(x, tf.cast(begin, tf.int32), call.shape)


@imports("STRIDED_SLICE")
def strided_slice(call: Call, x: Tensor, begin: Tensor, end: Tensor, strides: Tensor) -> Tensor:
    return tf.strided_slice(
        x,
        begin,
        end,
        strides,
        begin_mask=call.whole("BeginMask"),
        end_mask=call.whole("EndMask"),
        ellipsis_mask=call.whole("EllipsisMask"),
        new_axis_mask=call.whole("NewAxisMask"),
        shrink_axis_mask=call.whole("ShrinkAxisMask"),
    )


@imports("SPLIT")
def split(call: Call, axis: Tensor, x: Tensor) -> list[Tensor]:
    return list(tf.split(x, len(call.shapes), axes_of(call, axis)[0]))


@imports("SPLIT_V")
def split_by_sizes(call: Call, x: Tensor, sizes: Tensor, axis: Tensor) -> list[Tensor]:
    place = axes_of(call, axis)[0]
    return list(tf.split(x, [shape[place] for shape in call.shapes], place))


@imports("PACK")
def pack(call: Call, *inputs: Tensor) -> Tensor:
    return tf.stack(inputs, call.whole("Axis"))


@imports("UNPACK")
def unpack(call: Call, x: Tensor) -> list[Tensor]:
    return list(tf.unstack(x, len(call.shapes), call.whole("Axis")))


@imports("CONCATENATION")
def concatenate(call: Call, *inputs: Tensor) -> Tensor:
    return tf.concat(inputs, call.whole("Axis"))


@imports("PAD", "PADV2")
def pad(call: Call, x: Tensor, paddings: Tensor, value: Tensor = 0) -> Tensor:
    filler = tf.reshape(tf.cast(value, call.type), [])
    return tf.pad(x, static(call, paddings, "the paddings"), constant_values=filler)


@imports("MIRROR_PAD")
def mirror_pad(call: Call, x: Tensor, paddings: Tensor) -> Tensor:
    return tf.pad(x, static(call, paddings, "the paddings"), ("REFLECT", "SYMMETRIC")[call.whole("Mode") != 0])


@imports("TILE")
def tile(call: Call, x: Tensor, multiples: Tensor) -> Tensor:
    return tf.tile(x, [new // old if old else 1 for new, old in zip(call.shape, x.shape)])


@imports("BROADCAST_TO")
def broadcast(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    return tf.broadcast_to(x, call.shape)


@imports("ONE_HOT")
def one_hot(call: Call, indices: Tensor, depth: Tensor, on: Tensor, off: Tensor) -> Tensor:
    axis = call.whole("Axis", -1)
    return tf.one_hot(indices, call.shape[axis], on, off, axis, dtype=call.type)


@imports("GATHER")
def gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    if isinstance(indices, np.ndarray) and indices.size:  # here, not when an attack runs
        low, high, rows = indices.min(), indices.max(), x.shape[call.whole("Axis")]
        if low < 0 or high >= rows:
            raise BundleError(f"a GATHER of the model takes rows {low} to {high} of {rows}", "export it again")
    return tf.gather(x, indices, axis=call.whole("Axis"), batch_dims=call.whole("BatchDims"))


@imports("GATHER_ND")
def gather_places(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    return tf.gather_nd(x, indices)


@imports("SCATTER_ND")
def scatter(call: Call, indices: Tensor, values: Tensor, shape: Tensor) -> Tensor:
    return tf.scatter_nd(indices, values, tf.constant(call.shape, tf.convert_to_tensor(indices).dtype))


@imports("UNSORTED_SEGMENT_SUM", "UNSORTED_SEGMENT_MAX", "UNSORTED_SEGMENT_MIN", "UNSORTED_SEGMENT_PROD")
def segments(call: Call, x: Tensor, ids: Tensor, count: Tensor) -> Tensor:
    return getattr(tf.math, call.name.lower())(x, ids, call.shape[0])


@imports("CUMSUM")
def running_sum(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    exclusive, reverse = bool(call.whole("Exclusive")), bool(call.whole("Reverse"))
    return tf.cumsum(x, axes_of(call, axis)[0], exclusive, reverse)


@imports("ARG_MAX")
def place_of_largest(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    return tf.argmax(x, axes_of(call, axis)[0], call.type)


@imports("ARG_MIN")
def place_of_smallest(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    return tf.argmin(x, axes_of(call, axis)[0], call.type)


@imports("TOPK_V2")
def largest(call: Call, x: Tensor, count: Tensor) -> list[Tensor]:
    return list(tf.math.top_k(x, call.shape[-1]))


@imports("REVERSE_V2")
def reverse(call: Call, x: Tensor, axes: Tensor) -> Tensor:
    return tf.reverse(x, axes_of(call, axes))


@imports("REVERSE_SEQUENCE")
def reverse_sequences(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    return tf.reverse_sequence(x, lengths, call.whole("SeqDim"), call.whole("BatchDim"))


@imports("SPACE_TO_BATCH_ND")
def space_to_batch(call: Call, x: Tensor, block: Tensor, paddings: Tensor) -> Tensor:
    return tf.space_to_batch(x, np.asarray(static(call, block, "the blocks")), paddings)


@imports("BATCH_TO_SPACE_ND")
def batch_to_space(call: Call, x: Tensor, block: Tensor, crops: Tensor) -> Tensor:
    return tf.batch_to_space(x, np.asarray(static(call, block, "the blocks")), crops)


@imports("SPACE_TO_DEPTH")
def space_to_depth(call: Call, x: Tensor) -> Tensor:
    return tf.nn.space_to_depth(x, call.whole("BlockSize", 1))


@imports("DEPTH_TO_SPACE")
def depth_to_space(call: Call, x: Tensor) -> Tensor:
    return tf.nn.depth_to_space(x, call.whole("BlockSize", 1))
