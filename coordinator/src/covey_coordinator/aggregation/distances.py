"""Squared distances between updates, right however close together or far from zero the updates are.

They come from a Gram matrix of *centred* rows; uncentred float32 ones are 74% wrong when updates differ by a thousandth
of their size, and name the wrong devices. The mean is centre enough for honest rows, but one hostile row can carry it
far away and so blur the distances between the others. Where distances are small against the centred norms, they are
computed again around the row whose (n // 2)-th nearest other is nearest: more than half of the rows lie around it, so
no minority can place it elsewhere.
"""

from __future__ import annotations

from typing import Any

from covey_coordinator.aggregation.kernels import Kernels, Updates
from covey_coordinator.aggregation.kernels.mathematics import column_mean, square_distances

MAX_PASSES = 3  # Gram matrices at most; a second is needed only under attack or at tiny spread
PRECISE_SHARE = 2.0**-7  # a squared distance above this share of the squared norms has 13 good bits or more


def distances_between(k: Kernels, updates: Updates) -> Any:
    """(n, n) float64: squared Euclidean distances between the rows, 0 on the diagonal."""
    return square_distances(k, centred_gram(k, updates)[1])


def centred_gram(k: Kernels, updates: Updates) -> tuple[Any, Any]:
    """A centre (d,) float32 near which most rows lie, and the Gram matrix (n, n) float64 of the rows around it.

    The matrix is that of rows rounded to 2^-21 of their largest number in a block of columns, and of nothing else: it
    is consistent in all digits of float64, so that distances of weighted means from rows can be had from it.
    """

    def around(centre: Any) -> tuple[Any, Any, Any]:
        inner_products = k.gram(updates, centre)
        distances = square_distances(k, inner_products)
        return inner_products, most_central(k, distances), is_precise(k, inner_products, distances)

    def again(passes: Any, pivot: Any, next_pivot: Any, centre: Any, inner_products: Any, precise: Any) -> Any:
        centre = k.row(updates, next_pivot)
        inner_products, pivot_after, precise = around(centre)
        return passes + 1, next_pivot, pivot_after, centre, inner_products, precise

    def goes_on(passes: Any, pivot: Any, next_pivot: Any, centre: Any, inner_products: Any, precise: Any) -> Any:
        return (passes < MAX_PASSES) & not_(k, k.equal(pivot, next_pivot)) & not_(k, precise)

    mean = column_mean(k, updates)
    inner_products, first, precise = around(mean)
    state = (1, k.whole(-1), first, mean, inner_products, precise)
    _, _, _, centre, inner_products, _ = k.while_loop(goes_on, again, state)
    return centre, inner_products


def not_(k: Kernels, condition: Any) -> Any:
    """The opposite of a scalar bool of any kind."""
    return k.where(condition, k.full((), False), k.full((), True))


def most_central(k: Kernels, distances: Any) -> Any:
    """Index of the row whose (n // 2)-th nearest other is nearest."""
    return k.argmin(k.sort(distances)[:, k.length(distances) // 2])


def to_others(k: Kernels, distances: Any) -> Any:
    """The same distances with infinity on the diagonal, so that no row is its own neighbour."""
    return k.with_diagonal(distances, float("inf"))


def nearest_sums(k: Kernels, distances: Any, neighbours: Any) -> Any:
    """(n, n) squared distances to others -> (n,) sums of the smallest `neighbours` in each row."""
    return k.sum_rows(k.transpose(k.sort(distances)[:, :neighbours]))


def is_precise(k: Kernels, inner_products: Any, distances: Any) -> Any:
    """Scalar bool: no squared distance between two rows drowns in the rounding of their squared norms."""
    squares = k.diagonal(inner_products)
    enough = distances >= PRECISE_SHARE * (squares[:, None] + squares[None, :])
    return k.all(k.with_diagonal(enough, True))
