"""Sliding windows as index tables: one rule for every kernel size, stride, dilation, padding and number of axes.

A convolution or pooling becomes a GATHER of rows by a constant table; its gradient a GATHER by the inverse table and a
SUM. Pure numpy. An image of `height x width` has `height * width` rows (pixels); index `height * width` means the
padding row that the caller appends. A volume has three axes and `depth * height * width` rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Table = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Window:
    """A sliding window over any number of axes; all fields hold one entry per axis.

    padding: "SAME", "VALID" or "EXPLICIT"; explicit: ((before, after), ...) per axis, used with "EXPLICIT" only.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...] = (1, 1)
    padding: str = "VALID"
    explicit: tuple[tuple[int, int], ...] = ((0, 0), (0, 0))

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    def output_size(self, *size: int) -> tuple[int, ...]:
        return tuple(self._axis(axis, length)[0] for axis, length in enumerate(size))

    def is_every_pixel_once(self, *size: int) -> bool:
        """Whether the patches are the image itself (1x1, stride 1)."""
        return self.taps == 1 and self.output_size(*size) == size

    def tiles(self, *size: int) -> bool:
        """Whether the windows cover the image without overlap, gap or padding."""
        covered = tuple(outputs * kernel for outputs, kernel in zip(self.output_size(*size), self.kernel))
        return self.kernel == self.strides and set(self.dilations) == {1} and covered == size

    def inputs_of_outputs(self, *size: int) -> Table:
        """(outputs, taps): which input pixel each tap of each output pixel reads."""
        inside: Any = True
        pixel: Any = 0
        for axis, length in enumerate(size):
            outputs, before = self._axis(axis, length)
            read = _positions(outputs, self.strides[axis], before, self.kernel[axis], self.dilations[axis])
            broadcast = [1] * (2 * len(size))  # the axes of the outputs, then those of the taps
            broadcast[axis], broadcast[len(size) + axis] = read.shape
            read = read.reshape(broadcast)
            inside = inside & (read >= 0) & (read < length)
            pixel = pixel * length + read
        table: Table = np.where(inside, pixel, math.prod(size)).reshape(-1, self.taps).astype(np.int32)
        return table

    def outputs_of_inputs(self, *size: int) -> Table:
        """(inputs, touches): the inverse table, as entries `output * taps + tap`, filled up with `outputs * taps`."""
        return inverse_table(self.inputs_of_outputs(*size).reshape(-1), math.prod(size))

    def offsets(self) -> list[tuple[int, int]]:
        """How far down and right of its window's first pixel every tap of a flat image's window lies, row by row."""
        rows, columns = (range(0, size * step, step) for size, step in zip(self.kernel, self.dilations))
        return [(y, x) for y in rows for x in columns]

    def reach(self, axis: int, size: int) -> tuple[int, int]:
        """Along one axis: the padding before the first pixel, and how many pixels, padding included, windows read."""
        outputs, before = self._axis(axis, size)
        return before, (outputs - 1) * self.strides[axis] + (self.kernel[axis] - 1) * self.dilations[axis] + 1

    def _axis(self, axis: int, size: int) -> tuple[int, int]:
        """How many outputs along one axis and how much padding before the first pixel."""
        stride = self.strides[axis]
        reach = (self.kernel[axis] - 1) * self.dilations[axis] + 1
        if self.padding == "SAME":
            outputs = -(-size // stride)
            return outputs, max((outputs - 1) * stride + reach - size, 0) // 2
        before, after = self.explicit[axis] if self.padding == "EXPLICIT" else (0, 0)
        return (size + before + after - reach) // stride + 1, before


def inverse_table(reads: Table, rows: int) -> Table:
    """(rows, touches): where in the flat table `reads` each of `rows` rows is read, filled up with `len(reads)`.

    Entries of `reads` that are `rows` or more are of the padding row and appear nowhere.
    """
    entries = np.argsort(reads, kind="stable")
    pixels = reads[entries]
    counts = np.bincount(pixels, minlength=rows + 1)
    rank = np.arange(len(reads)) - (np.cumsum(counts) - counts)[pixels]
    table = np.full((rows, max(1, int(counts[:rows].max(initial=0)))), len(reads), np.int32)
    real = pixels < rows
    table[pixels[real], rank[real]] = entries[real]
    return table


def _positions(outputs: int, stride: int, before: int, kernel: int, dilation: int) -> Table:
    return np.arange(outputs)[:, None] * stride - before + np.arange(kernel)[None, :] * dilation
