"""Independent references in plain numpy and float64: geometric median and centred clipping."""

from __future__ import annotations

import numpy as np


def sum_of_distances(point: np.ndarray, updates: np.ndarray, weights: np.ndarray) -> float:
    return float(weights @ np.linalg.norm(updates.astype(np.float64) - point, axis=1))


def geometric_median(updates: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Weiszfeld's iteration on the points themselves, 20,000 times at most, from the coordinate-wise median.

    An update is the answer itself if the unit vectors towards the others do not outweigh it (Kuhn's condition).
    """
    rows = updates.astype(np.float64)
    weights = np.ones(len(rows)) if weights is None else weights.astype(np.float64)
    for row in rows:
        distances = np.linalg.norm(rows - row, axis=1)
        off = distances > 0
        pull = ((rows[off] - row) * (weights[off] / distances[off])[:, None]).sum(axis=0)
        if np.linalg.norm(pull) <= weights[~off].sum():
            return row
    point = np.median(rows, axis=0) + 1e-9
    for _ in range(20_000):
        pulls = weights / np.linalg.norm(rows - point, axis=1)
        following = pulls @ rows / pulls.sum()
        if np.linalg.norm(following - point) < 1e-14 * np.linalg.norm(point):
            return following
        point = following
    return point


def centred_clipping(updates: np.ndarray, start: np.ndarray, radius: float, iterations: int) -> np.ndarray:
    centre = start.astype(np.float64)
    for _ in range(iterations):
        differences = updates.astype(np.float64) - centre
        lengths = np.linalg.norm(differences, axis=1)
        factors = [1.0 if length <= radius else radius / length for length in lengths]
        centre = centre + np.mean([factor * row for factor, row in zip(factors, differences)], axis=0)
    return centre
