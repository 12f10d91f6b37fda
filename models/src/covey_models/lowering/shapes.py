"""Gradients of slicing and resizing, and ops that only pass tensors through.

Shape arithmetic has no lowering: shapes are static, so the rewriter computes it while it traces.
"""

from __future__ import annotations

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.formulations import static
from covey_models.lowering.registry import Node, Tensor, lowers
from covey_protocol.errors import BundleError

tf = import_tensorflow()


@lowers("StridedSliceGrad")
def strided_slice_gradient(
    node: Node, shape: Tensor, begin: Tensor, end: Tensor, strides: Tensor, dy: Tensor
) -> Tensor:
    """The gradient of x[a:b, ..., c], padded with zeros to the shape of x."""
    if any(stride != 1 for stride in static(strides)):
        raise BundleError("the gradient of a slice with a step other than 1 cannot be lowered", "gather instead")
    full = static(shape)
    ranges = _sliced_ranges(node, full, static(begin), static(end))
    kept = tf.reshape(dy, [stop - start for start, stop in ranges])
    return tf.pad(kept, [[start, size - stop] for (start, stop), size in zip(ranges, full)])


def _sliced_ranges(
    node: Node, full: tuple[int, ...], begin: tuple[int, ...], end: tuple[int, ...]
) -> list[tuple[int, int]]:
    """(start, stop) per axis, after TensorFlow's five bit masks."""
    masks = {name: node.attribute(f"{name}_mask") for name in ("begin", "end", "shrink_axis", "new_axis", "ellipsis")}

    def marked(name: str, position: int) -> bool:
        return bool(masks[name] >> position & 1)

    consuming = sum(not marked("new_axis", i) and not marked("ellipsis", i) for i in range(len(begin)))
    ranges: list[tuple[int, int]] = []
    for i in range(len(begin)):
        if marked("ellipsis", i):
            ranges += [(0, size) for size in full[len(ranges) : len(ranges) + len(full) - consuming]]
        elif not marked("new_axis", i):
            size = full[len(ranges)]
            start = 0 if marked("begin", i) else _from_start(begin[i], size)
            stop = size if marked("end", i) else _from_start(end[i], size)
            ranges.append((start, start + 1 if marked("shrink_axis", i) else stop))
    return ranges + [(0, size) for size in full[len(ranges) :]]


def _from_start(index: int, size: int) -> int:
    return min(max(index + size if index < 0 else index, 0), size)


@lowers("ResizeNearestNeighborGrad")
def nearest_neighbour_gradient(node: Node, dy: Tensor, size: Tensor) -> Tensor:
    batch, height, width, channels = dy.shape
    rows, columns = static(size)
    if height % rows or width % columns:
        raise BundleError(
            "nearest-neighbour resizing by a factor that is not whole cannot be lowered", "use a whole factor"
        )
    bands = tf.reduce_sum(tf.reshape(dy, [batch * rows, height // rows, width * channels]), 1)
    cells = tf.reduce_sum(tf.reshape(bands, [batch * rows * columns, width // columns, channels]), 1)
    return tf.reshape(cells, [batch, rows, columns, channels])
