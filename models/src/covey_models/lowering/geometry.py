"""Sliding windows as index tables: one rule for every kernel size, stride, dilation and padding.

A convolution or pooling becomes a GATHER of rows by a constant table; its gradient a GATHER by the inverse table and a
SUM. Pure numpy. An image of `height x width` has `height * width` rows (pixels); index `height * width` means the
padding row that the caller appends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Table = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Window:
    """A sliding window.

    padding: "SAME", "VALID" or "EXPLICIT"; explicit: ((top, bottom), (left, right)), used with "EXPLICIT" only.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int] = (1, 1)
    padding: str = "VALID"
    explicit: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return self._axis(0, height)[0], self._axis(1, width)[0]

    def is_every_pixel_once(self, height: int, width: int) -> bool:
        """Whether the patches are the image itself (1x1, stride 1)."""
        return self.taps == 1 and self.output_size(height, width) == (height, width)

    def tiles(self, height: int, width: int) -> bool:
        """Whether the windows cover the image without overlap, gap or padding."""
        rows, columns = self.output_size(height, width)
        covered = (rows * self.kernel[0], columns * self.kernel[1]) == (height, width)
        return self.kernel == self.strides and self.dilations == (1, 1) and covered

    def inputs_of_outputs(self, height: int, width: int) -> Table:
        """(outputs, taps): which input pixel each tap of each output pixel reads."""
        rows, top = self._axis(0, height)
        columns, left = self._axis(1, width)
        y = _positions(rows, self.strides[0], top, self.kernel[0], self.dilations[0])[:, None, :, None]
        x = _positions(columns, self.strides[1], left, self.kernel[1], self.dilations[1])[None, :, None, :]
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        table = np.where(inside, y * width + x, height * width)
        return table.reshape(rows * columns, self.taps).astype(np.int32)

    def outputs_of_inputs(self, height: int, width: int) -> Table:
        """(inputs, touches): the inverse table, as entries `output * taps + tap`, filled up with `outputs * taps`."""
        reads = self.inputs_of_outputs(height, width).reshape(-1)
        entries = np.argsort(reads, kind="stable")
        pixels = reads[entries]
        counts = np.bincount(pixels, minlength=height * width + 1)
        rank = np.arange(len(reads)) - (np.cumsum(counts) - counts)[pixels]
        table = np.full((height * width, max(1, int(counts[:-1].max()))), len(reads), np.int32)
        real = pixels < height * width
        table[pixels[real], rank[real]] = entries[real]
        return table

    def offsets(self) -> list[tuple[int, int]]:
        """How far down and right of its window's first pixel every tap lies, row by row."""
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


def _positions(outputs: int, stride: int, before: int, kernel: int, dilation: int) -> Table:
    return np.arange(outputs)[:, None] * stride - before + np.arange(kernel)[None, :] * dilation
