"""Local training of all devices at once in numpy: softmax regression and nets of dense layers.

All devices take the same number of SGD steps on batches drawn with replacement from their own examples, so one matrix
product per layer trains the whole fleet. Weights start as those of `covey_models.zoo` (same names, same layout), and
everything is float32. This stands in for real devices in simulations; it is not what an agent runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from covey_protocol.parameters import ParameterSpec, offsets

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[Any]


class Network:
    """Dense layers with ReLU between them, ending in logits."""

    def __init__(self, specs: list[ParameterSpec]) -> None:
        """specs: kernel (in, out) and bias (out,) of each layer in turn."""
        self._places = [(place, spec.shape) for spec, place in zip(specs, offsets(specs).values())]

    def tensors(self, flat: Floats) -> list[Floats]:
        """(..., d) -> the layers' tensors (..., *shape), views."""
        return [flat[..., place].reshape(*flat.shape[:-1], *shape) for place, shape in self._places]

    def trained(self, flat: Floats, x: Floats, y: Integers, batches: Integers, learning_rate: float) -> Floats:
        """Every device's parameters (n, d) after SGD from flat (d,).

        x: (count, features), y: (count,), of all devices. batches: (steps, n, batch) rows of x.
        """
        devices = np.repeat(flat[None], batches.shape[1], axis=0)
        tensors = self.tensors(devices)
        rate = np.float32(learning_rate)
        for rows in batches:
            for tensor, gradient in zip(tensors, _gradients(tensors, x[rows], y[rows])):
                tensor -= rate * gradient
        return devices

    def gradients(self, flat: Floats, x: Floats, y: Integers) -> Floats:
        """(n, d): each device's gradient of its mean loss at the same parameters flat (d,).

        x: (n, batch, features), y: (n, batch).
        """
        found = np.empty((len(x), len(flat)), np.float32)
        tensors = [tensor[None] for tensor in self.tensors(flat)]
        for (place, _), gradient in zip(self._places, _gradients(tensors, x, y)):
            found[:, place] = gradient.reshape(len(x), -1)
        return found

    def predicted(self, flat: Floats, x: Floats) -> Integers:
        """(count,): the class of each example."""
        layers = _forward([tensor[None] for tensor in self.tensors(flat)], x[None])
        classes: Integers = layers[-1][0].argmax(axis=1)
        return classes

    def losses(self, models: Floats, x: Floats, y: Integers) -> npt.NDArray[np.float64]:
        """(m, 2): mean cross-entropy and share of wrong answers of each model (m, d) on these examples."""
        logits = np.stack([_forward([tensor[None] for tensor in self.tensors(one)], x[None])[-1][0] for one in models])
        wide = logits.astype(np.float64)
        wide -= wide.max(axis=2, keepdims=True)
        of_class = np.take_along_axis(wide, y[None, :, None].astype(np.int64), axis=2)[:, :, 0]
        loss = (np.log(np.exp(wide).sum(axis=2)) - of_class).mean(axis=1)
        return np.stack([loss, (wide.argmax(axis=2) != y).mean(axis=1)], axis=1)


def _forward(tensors: list[Floats], x: Floats) -> list[Floats]:
    """The input of each layer (n, batch, width), then the logits."""
    values = [x]
    for layer in range(0, len(tensors), 2):
        product = values[-1] @ tensors[layer] + tensors[layer + 1][:, None, :]
        values.append(np.maximum(product, 0) if layer + 2 < len(tensors) else product)
    return values


def _gradients(tensors: list[Floats], x: Floats, y: Integers) -> list[Floats]:
    """Of the mean cross-entropy over each device's batch, in the order of tensors."""
    values = _forward(tensors, x)
    logits = values[-1] - values[-1].max(axis=2, keepdims=True)
    exponentials = np.exp(logits)
    slope = exponentials / exponentials.sum(axis=2, keepdims=True)
    np.put_along_axis(slope, y[..., None], np.take_along_axis(slope, y[..., None], 2) - 1, 2)
    slope /= np.float32(x.shape[1])
    found: list[Floats] = []
    for layer in range(len(tensors) - 2, -1, -2):
        inputs = values[layer // 2]
        found = [inputs.swapaxes(1, 2) @ slope, slope.sum(axis=1), *found]
        if layer:
            slope = (slope @ tensors[layer].swapaxes(1, 2)) * (inputs > 0)
    return found
