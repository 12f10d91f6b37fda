"""Cosines between updates: of their directions, whatever their sizes. FoolsGold and FLAME judge by them, and the rules
with trusted data by cosines with one vector.
"""

from __future__ import annotations

from typing import Any

from covey_coordinator.aggregation.distances import distances_between
from covey_coordinator.aggregation.kernels import Kernels, Updates


def cosines_between(k: Kernels, updates: Updates) -> tuple[Any, Any]:
    """(n, n) float64 cosines and (n,) Euclidean norms. A row of zeros has cosine 0 with every other.

    Inner products are exact on values rounded to 2^-23 of the row's largest (`Kernels.gram`), so a cosine is right to
    about 1e-6: rows closer in direction than a thousandth cannot be told apart by it.
    """
    inner_products = k.gram(updates)
    norms = k.sqrt(k.diagonal(inner_products))
    return k.divide(inner_products, norms[:, None] * norms[None, :]), norms


def cosine_distances(k: Kernels, updates: Updates) -> tuple[Any, Any]:
    """(n, n) float64 distances 1 - cosine, 0 on the diagonal, and (n,) Euclidean norms.

    Half the squared distances between the rows scaled to length 1. Right to 1e-4 of themselves at directions that are a
    ten-thousandth apart, where cosines are all but 1. A row of zeros has distance 1 from every other.
    """
    norms = k.sqrt(k.square_norms(updates))
    directions = updates.through(k.arange(k.count(updates))[:, None], k.divide(1.0, norms)[:, None])
    distances = distances_between(k, directions) * 0.5
    is_zero = norms <= 0.0
    distances = k.where(is_zero[:, None] | is_zero[None, :], k.full((), 1.0), distances)
    return k.with_diagonal(distances, 0.0), norms


def cosines_with(k: Kernels, updates: Updates, vector: Any) -> tuple[Any, Any, Any]:
    """(n,) float64 cosines with the vector (d,) float32, (n,) Euclidean norms, and the vector's norm.

    From the distances between the rows and the vector, all scaled to length 1 and rounded to float32: right to about
    1e-6. A row of zeros has cosine 0.
    """
    norms, one = k.sqrt(k.square_norms(updates)), Updates(vector[None])
    length = k.sqrt(k.square_norms(one))
    direction = k.row(one.through(k.arange(1)[:, None], k.divide(1.0, length)[:, None]), 0)
    directions = updates.through(k.arange(k.count(updates))[:, None], k.divide(1.0, norms)[:, None])
    cosines = 1.0 - k.square_norms(directions, direction) * 0.5
    return k.where(norms > 0.0, k.maximum(cosines, -1.0), 0.0 * norms), norms, length[0]
