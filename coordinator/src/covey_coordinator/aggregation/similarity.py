"""Cosines between updates: of their directions, whatever their sizes. FoolsGold and FLAME judge by them."""

from __future__ import annotations

from typing import Any

from covey_coordinator.aggregation.kernels import Kernels, Updates


def cosines_between(k: Kernels, updates: Updates) -> tuple[Any, Any]:
    """(n, n) float64 cosines and (n,) Euclidean norms. A row of zeros has cosine 0 with every other.

    Inner products are exact on values rounded to 2^-23 of the row's largest (`Kernels.gram`), so a cosine is right to
    about 1e-6: rows closer in direction than a thousandth cannot be told apart by it.
    """
    inner_products = k.gram(updates)
    norms = k.sqrt(k.diagonal(inner_products))
    return k.divide(inner_products, norms[:, None] * norms[None, :]), norms
