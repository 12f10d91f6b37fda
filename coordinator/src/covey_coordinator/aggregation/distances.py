"""Squared distances between updates, right however close together or far from zero the updates are.

They come from a Gram matrix of *centred* rows; uncentred float32 ones are 74% wrong when updates differ by a thousandth
of their size, and name the wrong devices. The centre is a row: the one among most others in the first columns. Where
that was a bad choice (distances are small against the centred norms), they are computed again around the row whose
(n // 2)-th nearest other is nearest: more than half of the rows lie around it, so no minority can place it elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from covey_coordinator.aggregation.kernels import Kernels, Updates
from covey_coordinator.aggregation.kernels.mathematics import square_distances

SAMPLE = 1024  # columns that choose the first centre
MAX_PASSES = 3  # Gram matrices at most; a second is needed only under attack or at tiny spread
PRECISE_SHARE = 2.0**-7  # a squared distance above this share of the squared norms has 13 good bits or more


def distances_between(k: Kernels, updates: Updates, pivot: Any = None) -> Any:
    """(n, n) float64: squared Euclidean distances between the rows, 0 on the diagonal. pivot: from `first_look`."""
    return square_distances(k, centred_gram(k, updates, pivot)[1])


def centred_gram(k: Kernels, updates: Updates, pivot: Any = None) -> tuple[Any, Any]:
    """A centre (d,) float32 near which most rows lie, and the Gram matrix (n, n) float64 of the rows around it.

    The matrix is that of rows rounded to 2^-23 of their largest number in a block of columns, and of nothing else: it
    is consistent in all digits of float64, so that distances of weighted means from rows can be had from it.
    """

    def around(pivot: Any) -> tuple[Any, Any, Any, Any]:
        centre = k.row(updates, pivot)
        inner_products = k.gram(updates, centre)
        distances = square_distances(k, inner_products)
        return centre, inner_products, most_central(k, distances), is_precise(k, inner_products, distances)

    def again(passes: Any, pivot: Any, next_pivot: Any, centre: Any, inner_products: Any, precise: Any) -> Any:
        centre, inner_products, pivot_after, precise = around(next_pivot)
        return passes + 1, next_pivot, pivot_after, centre, inner_products, precise

    def goes_on(passes: Any, pivot: Any, next_pivot: Any, centre: Any, inner_products: Any, precise: Any) -> Any:
        return (passes < MAX_PASSES) & not_(k, k.equal(pivot, next_pivot)) & not_(k, precise)

    first = first_look(k, updates)[1] if pivot is None else pivot
    centre, inner_products, next_pivot, precise = around(first)
    state = (1, first, next_pivot, centre, inner_products, precise)
    _, _, _, centre, inner_products, _ = k.while_loop(goes_on, again, state)
    return centre, inner_products


def first_look(k: Kernels, updates: Updates) -> tuple[Any, Any]:
    """(n, n) squared distances in the first columns, and the index of the row that is most central there.

    Cheap, and only good to choose a way by: what is then computed around that row shows if it is not central.
    """
    sample = Updates(updates.matrix[:, :SAMPLE], updates.stages)
    distances = square_distances(k, k.gram(sample, k.row(sample, 0)))
    return distances, most_central(k, distances)


def rounded_distances(k: Kernels, updates: Updates, pivot: Any) -> tuple[Any, Any]:
    """Bounds of the squared distances between the rows: (n, n) float64 not above them, and (n, n) not below.

    In half the time of `distances_between`. They are about a thousandth apart; further where a number of a row is far
    larger than most of it, or a row far from the one with index `pivot`.
    """
    inner_products, errors = k.rough_gram(updates, k.row(updates, pivot))
    lengths = k.sqrt(square_distances(k, inner_products))
    error = (errors[:, None] + errors[None, :]) * (1.0 + 2.0**-30) + lengths * 2.0**-20
    least, most = k.maximum(lengths - error, 0.0), lengths + error
    return least * least, most * most


def once(k: Kernels, condition: Any, compute: Callable[..., tuple[Any, ...]], state: tuple[Any, ...]) -> Any:
    """compute(*state) if the condition, a scalar bool, holds, else state; shapes and dtypes alike."""
    return k.while_loop(
        lambda waits, *_: waits, lambda _, *state: (k.full((), False), *compute(*state)), (condition, *state)
    )[1:]


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
