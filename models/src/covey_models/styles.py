"""Handwriting styles, for data whose writers are not told: simple features, and regions of equal size in them. Ours.

Four features per image: slant, stroke thickness, width over height, and ink. A region is a box in these features, as
in a k-d tree: cut again and again across the feature that spreads most. What is compared is the rank among examples
of the same class, at every cut anew, so that a region tells how something is written and not what: all have nearly
the same classes in the same numbers.

What this is not: real writers. A region is more uniform than a person's hand, writers also differ in how much and in
what they write, and nothing was compared with EMNIST.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from covey_protocol.errors import DataError

Array = np.ndarray[Any, Any]

BLOCK = 4096  # images looked at at once: float64 copies of 60,000 would take 380 MB


def style_regions(x: Array, y: Array, num_regions: int) -> Array:
    """(n,) region numbers of the images x (n, height, width[, 1]), any range; sizes differ by at most one."""
    labels = np.asarray(y)
    features = np.stack([relative_to_class(column, labels) for column in style_features(x).T], 1)
    regions = np.empty(len(labels), np.int64)
    _cut(features, labels, np.arange(len(labels)), 0, num_regions, regions)
    return regions


def style_features(x: Array) -> Array:
    """(n, 4) float64: slant, thickness, width over height, ink. An image without ink has zeros."""
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] != 1):
        raise DataError(
            f"handwriting styles need grey images, these examples are {x.shape[1:]}",
            "choose another partition than writer-like",
        )
    images = x.reshape(x.shape[:3])
    blocks = [_features(images[start : start + BLOCK]) for start in range(0, len(images), BLOCK)]
    return np.concatenate(blocks) if blocks else np.zeros((0, 4))


def _features(images: Array) -> Array:
    """Moments of ink; the slant is the shear that would take it away, the thickness is ink over half the outline."""
    ink = images.astype(np.float64)
    ink -= ink.min((1, 2), keepdims=True)
    rows, columns = (np.arange(size, dtype=np.float64) for size in ink.shape[1:])
    mass = ink.sum((1, 2))
    safe = np.where(mass > 0, mass, 1.0)
    over_rows, over_columns = ink.sum(2), ink.sum(1)
    row, column = over_rows @ rows / safe, over_columns @ columns / safe
    tall = over_rows @ rows**2 / safe - row**2
    wide = over_columns @ columns**2 / safe - column**2
    leaning = np.einsum("nhw,h,w->n", ink, rows, columns) / safe - row * column
    outline = np.abs(np.diff(ink, axis=1)).sum((1, 2)) + np.abs(np.diff(ink, axis=2)).sum((1, 2))
    features = np.stack([
        _ratio(-leaning, tall),
        _ratio(2 * mass, outline),
        np.sqrt(_ratio(np.maximum(wide, 0), tall)),
        mass / ink[0].size if len(ink) else mass,
    ], 1)  # fmt: skip
    return np.asarray(features * (mass > 0)[:, None])


def _ratio(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 1e-9)


def relative_to_class(values: Array, y: Array) -> Array:
    """(n,) the ranks of values (n,) among the examples of the same class, evenly spread over 0 to 1.

    Equal values share the mean of their ranks, so that what is constant in a class is 0.5 there.
    """
    order = np.lexsort((values, y))
    labels, ordered = y[order], values[order]
    starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]])
    ties = np.flatnonzero(np.r_[True, (labels[1:] != labels[:-1]) | (ordered[1:] != ordered[:-1])])
    own, tied = (np.diff(np.r_[begin, len(y)]) for begin in (starts, ties))
    ranks: Array = np.repeat(ties + tied / 2, tied) - np.repeat(starts, own)
    relative = np.empty(len(y))
    relative[order] = ranks / np.repeat(own, own)
    return relative


def _cut(features: Array, y: Array, places: Array, first: int, count: int, regions: Array) -> None:
    """Give these places the regions first .. first + count - 1."""
    if count == 1:
        regions[places] = first
        return
    half = count // 2
    across = int(np.argmax(features[places].std(0)))
    order = places[np.argsort(relative_to_class(features[places, across], y[places]), kind="stable")]
    end = round(half * len(places) / count)
    _cut(features, y, order[:end], first, half, regions)
    _cut(features, y, order[end:], first + half, count - half, regions)
