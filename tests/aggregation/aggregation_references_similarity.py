"""Independent references of FoolsGold and FLAME: plain numpy in float64 and scikit-learn's HDBSCAN. Only for tests."""

from __future__ import annotations

import numpy as np
from sklearn.cluster import HDBSCAN


def cosines(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    return (rows @ rows.T) / np.outer(norms, norms)


def foolsgold_weights(history: np.ndarray, kappa: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(weights, likeness), with the loops of the paper's Algorithm 1."""
    n = len(history)
    cs = cosines(history)
    v = np.array([max(0.0, max(cs[i, j] for j in range(n) if j != i)) for i in range(n)])
    likeness = np.zeros(n)
    for i in range(n):
        for j in range(n):
            if i != j:
                pardoned = cs[i, j] * v[i] / v[j] if v[j] > v[i] else cs[i, j]
                likeness[i] = max(likeness[i], pardoned)
    weights = np.clip(1 - likeness, 0, 1)
    weights = np.minimum(weights / weights.max(), 0.99)
    with np.errstate(divide="ignore"):
        logits = kappa * (np.log(weights / (1 - weights)) + 0.5)
    return np.clip(logits, 0, 1), likeness


def cosine_distances(updates: np.ndarray) -> np.ndarray:
    distances = np.maximum(1 - cosines(updates), 0)
    np.fill_diagonal(distances, 0)
    return distances


def hdbscan_majority(distances: np.ndarray) -> np.ndarray:
    """(n,) bool: scikit-learn's only cluster of more than half the points."""
    n = len(distances)
    found = HDBSCAN(min_cluster_size=n // 2 + 1, min_samples=1, metric="precomputed", allow_single_cluster=True)
    return found.fit(distances.copy()).labels_ == 0


def flame(updates: np.ndarray) -> np.ndarray:
    """Without noise."""
    rows = updates.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    shortened = rows * np.minimum(1, np.median(norms) / norms)[:, None]
    return shortened[hdbscan_majority(cosine_distances(updates))].mean(axis=0)
