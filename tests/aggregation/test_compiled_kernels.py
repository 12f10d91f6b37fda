"""The compiled kernels give the bits of TensorFlow's, whatever the numbers, the stages and the threads."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
import tensorflow as tf

from covey_coordinator.aggregation import compiled, crew
from covey_coordinator.aggregation.distances import rounded_distances
from covey_coordinator.aggregation.kernels import Mixture, Updates
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.kernels.reference import TensorFlowKernels
from covey_protocol.errors import UsageError

REFERENCE = TensorFlowKernels()
SHAPES = [
    *[(1, 1), (2, 31), (3, 257), (4, 64), (5, 1001), (7, 9001), (8, 32), (10, 5003), (16, 512), (17, 4097)],
    *[(33, 1023), (50, 4100), (64, 100), (65, 1), (100, 1003), (129, 129), (257, 400)],
]


# ---- references in TensorFlow


def mixed(matrix: np.ndarray, stages: Any) -> Any:
    rows = tf.constant(matrix)
    for stage in stages:
        if isinstance(stage, Mixture):
            rows = means_of_members(rows, *stage)
            continue
        indices, weights = stage
        chosen = tf.cast(tf.gather(rows, indices), tf.float64) * tf.constant(weights)[:, :, None]
        flat = tf.reshape(tf.transpose(chosen, [1, 0, 2]), [indices.shape[1], -1])
        rows = tf.cast(tf.reshape(REFERENCE.sum_rows(flat), [len(indices), -1]), tf.float32)
    return rows


def means_of_members(rows: Any, members: np.ndarray, share: float) -> Any:
    means = []
    for row in members:
        there = tf.where(row[:, None], tf.cast(rows, tf.float64) * share, tf.constant(0.0, tf.float64))
        nothing = tf.zeros_like(there[0])
        fours = [[there[j] if j < len(row) else nothing for j in range(i, i + 4)] for i in range(0, len(row), 4)]
        means.append(REFERENCE.sum_rows(tf.stack([(a + b) + (c + d) for a, b, c, d in fours])))
    return tf.cast(tf.stack(means), tf.float32)


def mean_of(rows: Any) -> Any:
    mean = tf.cast(REFERENCE.sum_rows(tf.cast(rows, tf.float64)) * (1.0 / rows.shape[0]), tf.float32)
    return tf.where(mean == 0.0, 0.0, mean)


def ranked(rows: Any, low: int, high: int, cut: int) -> tuple[Any, Any]:
    ordered = tf.sort(rows, axis=0)
    outside = (rows < ordered[cut]) | (rows > ordered[rows.shape[0] - 1 - cut])
    aggregate = mean_of(ordered[low:high])
    return aggregate, tf.math.count_nonzero(outside, axis=1)


def nearest(rows: Any, keep: int) -> tuple[Any, Any]:
    ordered, n = tf.sort(rows, axis=0), rows.shape[0]
    wide = tf.cast(ordered, tf.float64)
    median = (wide[(n - 1) // 2] + wide[n // 2]) * 0.5
    reach = tf.maximum(median - wide[: n - keep + 1], wide[keep - 1 :] - median)
    starts = tf.argmin(reach, axis=0)[:, None] + tf.range(keep, dtype=tf.int64)
    window = tf.transpose(tf.gather(tf.transpose(ordered), starts, batch_dims=1))
    outside = (rows < window[0]) | (rows > window[-1])
    return mean_of(window), tf.math.count_nonzero(outside, axis=1)


def combined(rows: Any, weights: np.ndarray, centre: np.ndarray | None, scale: float = 1.0) -> Any:
    wide, shares = tf.cast(rows, tf.float64), tf.constant(weights)[:, None]
    if centre is None:
        return tf.cast(REFERENCE.sum_rows(shares * wide) * scale, tf.float32)
    middle = tf.cast(tf.constant(centre), tf.float64)
    return tf.cast(middle + REFERENCE.sum_rows(shares * (wide - middle)) * scale, tf.float32)


# ---- numbers


def ordinary(n: int, d: int) -> np.ndarray:
    return np.random.default_rng([n, d]).standard_normal((n, d), dtype=np.float32)


def ties(n: int, d: int) -> np.ndarray:
    """Few different values, zeros of both signs among them, and some equal rows."""
    found = np.random.default_rng([n, d, 1]).integers(-2, 3, (n, d)).astype(np.float32) * np.float32(0.5)
    found[1::3] *= -1.0
    found[2::4] = found[0]
    return found


def hostile(n: int, d: int) -> np.ndarray:
    """Rows from 1e-30 to 1e30, one of the least normal numbers and one of numbers below the normal range."""
    random = np.random.default_rng([n, d, 2])
    found = (random.standard_normal((n, d)) * 10.0 ** random.integers(-30, 31, (n, 1))).astype(np.float32)
    found[n // 2] = np.where(random.random(d) < 0.5, 1.1754944e-38, -2e-38)
    found[n // 3] = random.standard_normal(d) * 1e-40
    found[0, :: max(d // 5, 1)] = -0.0
    return found


def stages_for(n: int) -> dict[str, Any]:
    random = np.random.default_rng(n)
    clipping = (np.arange(n, dtype=np.int32)[:, None], random.random((n, 1)))
    half, k = (n + 1) // 2, max(n - n // 4, 1)
    buckets = (
        np.stack([np.arange(half) * 2 % n, (np.arange(half) * 2 + 1) % n], 1).astype(np.int32),
        np.full((half, 2), 0.5),
    )
    neighbours = (random.integers(0, n, (n, k)).astype(np.int32), np.full((n, k), 1.0 / k))
    uneven = (random.integers(0, n, (n + 2, k)).astype(np.int32), random.standard_normal((n + 2, k)))
    mixture = Mixture(random.random((n + 1, n)) < 0.8, np.float64(1.0 / k))
    return {
        "no stages": (),
        "clipping": (clipping,),
        "clipping, then neighbours": (clipping, neighbours),
        "uneven weights, then buckets": (uneven, buckets),
        "neighbours": (neighbours,),
        "a mixture": (mixture,),
        "a mixture, then buckets": (mixture, buckets),
    }


def same(found: np.ndarray, expected: Any) -> None:
    wanted = expected.numpy()
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes(), f"{np.count_nonzero(found != wanted)} of {found.size} differ"


def compare_all(matrix: np.ndarray, stages: Any) -> None:
    updates, rows = Updates(matrix, stages), mixed(matrix, stages)
    n = rows.shape[0]
    for low, high, cut in [((n - 1) // 2, n // 2 + 1, n // 4), (n // 5, n - n // 5, n // 5), (0, n, 0)]:
        for found, expected in zip(compiled.ranked_means(updates, low, high, cut), ranked(rows, low, high, cut)):
            same(found, expected)
    for keep in {1, n - n // 3, n}:
        for found, expected in zip(compiled.nearest_means(updates, keep), nearest(rows, keep)):
            same(found, expected)
    weights, centre = np.random.default_rng(n).standard_normal(n), np.ascontiguousarray(matrix[0])
    same(compiled.combination(updates, weights), combined(rows, weights, None))
    same(compiled.combination(updates, weights, centre, scale=0.3), combined(rows, weights, centre, 0.3))
    for middle in (centre, np.zeros_like(centre)):
        same(compiled.gram(updates, middle), REFERENCE.gram(Updates(rows), tf.constant(middle)))
        same(compiled.square_norms(updates, middle), REFERENCE.square_norms(Updates(rows), tf.constant(middle)))
        for found, expected in zip(
            compiled.rough_gram(updates, middle), REFERENCE.rough_gram(Updates(rows), tf.constant(middle))
        ):
            same(found, expected)
    same(compiled.gram(updates), REFERENCE.gram(Updates(rows)))


@pytest.mark.parametrize("numbers", [ordinary, ties, hostile])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_kernels_give_the_bits_of_tensorflow(n: int, d: int, numbers: Callable[[int, int], np.ndarray]) -> None:
    compare_all(numbers(n, d), ())


@pytest.mark.parametrize("numbers", [ordinary, ties, hostile])
@pytest.mark.parametrize("stages", list(stages_for(1))[1:])
@pytest.mark.parametrize(("n", "d"), [(1, 3), (5, 4200), (17, 1000), (50, 333)])
def test_kernels_after_stages_give_the_bits_of_tensorflow(n: int, d: int, stages: str, numbers: Any) -> None:
    compare_all(numbers(n, d), stages_for(n)[stages])


def test_a_mixture_is_applied_to_every_row_in_both_kernels() -> None:
    for n in (1, 3, 4, 10, 21):
        updates = Updates(ties(n, 300), stages_for(n)["a mixture"])
        staged = updates._replace(matrix=tf.constant(updates.matrix))
        weights, places = np.linspace(-1.0, 1.0, n + 1), np.arange(300)
        same(NumpyKernels().combination(updates, weights), REFERENCE.combination(staged, tf.constant(weights)))
        same(NumpyKernels().columns(updates, places), REFERENCE.columns(staged, tf.constant(places)))
        assert NumpyKernels().count(updates) == n + 1


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sums_of_the_largest_whole_numbers_do_not_overflow(sign: float) -> None:
    """All numbers just below the next power of two: upper parts of 2^12 everywhere."""
    rows = np.full((6, 3000), np.nextafter(np.float32(2.0), np.float32(0.0)))
    rows[3:] *= sign
    exact = rows.astype(np.float64) @ rows.astype(np.float64).T
    np.testing.assert_allclose(compiled.gram(Updates(rows)), exact, rtol=2.0**-22)
    np.testing.assert_allclose(compiled.square_norms(Updates(rows)), np.diag(exact), rtol=2.0**-22)
    far = np.array([3.4e38, -3.4e38, 1.0, 0.0], np.float32)[:, None] * np.ones((1, 1500), np.float32)
    around = compiled.gram(Updates(far), far[0].copy())  # differences that are infinite in float32
    assert np.isfinite(around).all()
    assert around[1, 1] > 1500 * (3.4e38) ** 2


@pytest.mark.parametrize("numbers", [ordinary, ties, hostile])
def test_rounded_distances_lie_between_their_bounds(numbers: Callable[[int, int], np.ndarray]) -> None:
    for n, d in ((7, 300), (20, 3001), (50, 10_000)):
        rows = numbers(n, d)
        k, updates = NumpyKernels(), Updates(rows)
        least, most = rounded_distances(k, updates, n // 2)
        centred = rows.astype(np.float64) - rows[n // 2]
        exact = np.stack([((centred - row) ** 2).sum(axis=1) for row in centred])
        assert (least <= exact * (1 + 1e-12)).all()
        assert (exact <= most * (1 + 1e-12)).all()
        if numbers is ordinary:
            apart = ~np.eye(n, dtype=bool)
            assert (most[apart] / least[apart]).max() < 1.01


def test_combination_of_chosen_rows_is_the_mean_of_these_rows() -> None:
    matrix = ordinary(20, 5000)
    rows = np.array([3, 4, 7, 11, 12, 19])
    found = compiled.combination(Updates(matrix), np.ones(6), rows=rows, scale=1.0 / 6)
    same(found, mean_of(tf.constant(matrix[rows])))


def test_sum_rows_adds_in_the_order_of_tensorflows() -> None:
    for n in (1, 2, 3, 7, 50, 101):
        rows = hostile(n, 37).astype(np.float64)
        same(NumpyKernels().sum_rows(rows), REFERENCE.sum_rows(tf.constant(rows)))


def test_an_update_matrix_that_cannot_be_written_or_lies_oddly_in_memory_is_read_too() -> None:
    matrix = ordinary(6, 100)
    locked, turned = matrix.copy(), np.asfortranarray(matrix)
    locked.flags.writeable = False
    expected = compiled.ranked_means(Updates(matrix), 2, 4, 1)[0]
    for other in (locked, turned):
        np.testing.assert_array_equal(compiled.ranked_means(Updates(other), 2, 4, 1)[0], expected)


# ---- threads


@pytest.fixture
def crew_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    def set_size(size: int) -> None:
        monkeypatch.setattr(crew, "SIZE", size)
        crew.pool.cache_clear()

    yield set_size
    monkeypatch.undo()
    crew.pool.cache_clear()


def everything(updates: Updates) -> bytes:
    n, centre = compiled.Plan(updates).m, np.ascontiguousarray(updates.matrix[1])
    results = [
        *compiled.ranked_means(updates, n // 5, n - n // 5, n // 5),
        *compiled.nearest_means(updates, n - n // 5),
        compiled.combination(updates, np.linspace(-1.0, 1.0, n), centre),
        compiled.gram(updates, centre),
        *compiled.rough_gram(updates, centre),
        compiled.square_norms(updates, centre),
    ]
    return b"".join(result.tobytes() for result in results)


MIXED = Updates(ordinary(20, 30_011), stages_for(20)["a mixture"])


def test_results_do_not_depend_on_the_number_of_threads(crew_of: Callable[[int], None]) -> None:
    for updates in (Updates(hostile(50, 30_011)), Updates(ordinary(20, 30_011), stages_for(20)["neighbours"]), MIXED):
        found = set()
        for size in (1, 2, 3, 5):
            crew_of(size)
            found |= {everything(updates) for _ in range(3)}
        assert len(found) == 1


def test_callers_at_the_same_time_get_what_they_get_alone(crew_of: Callable[[int], None]) -> None:
    crew_of(3)
    cases = [Updates(hostile(n, 20_000 + n)) for n in (11, 24, 50, 77)]
    alone = [everything(case) for case in cases]
    with ThreadPoolExecutor(4) as callers:
        for _ in range(3):
            assert list(callers.map(everything, cases)) == alone


def test_an_error_in_a_part_reaches_the_caller_whoever_ran_it(crew_of: Callable[[int], None]) -> None:
    crew_of(2)
    done = []

    def work(part: int) -> None:
        if part == 5:
            raise ValueError("part five")
        done.append(part)

    with pytest.raises(ValueError, match="part five"):
        crew.spread(8, work)
    assert 5 not in done
    crew.spread(8, done.append)
    assert sorted(done[-8:]) == list(range(8))


# ---- memory


def memory(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


@pytest.mark.parametrize("stages", ["no stages", "neighbours", "a mixture"])
def test_memory_beyond_the_updates_is_less_than_three_tenths_of_them(stages: str) -> None:
    everything(Updates(ordinary(4, 100), stages_for(4)[stages]))  # compile, load libraries
    updates = Updates(ordinary(60, 300_000), stages_for(60)[stages])
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    everything(updates)
    assert memory("VmHWM") - before < 0.3 * updates.matrix.nbytes


# ---- what is refused


@pytest.mark.parametrize(
    "call",
    {
        "no columns": lambda: compiled.ranked_means(Updates(np.zeros((3, 0), np.float32)), 0, 1, 0),
        "a vector": lambda: compiled.ranked_means(Updates(np.zeros(3, np.float32)), 0, 1, 0),
        "no ranks": lambda: compiled.ranked_means(Updates(ordinary(3, 4)), 2, 2, 0),
        "a rank too high": lambda: compiled.ranked_means(Updates(ordinary(3, 4)), 2, 4, 0),
        "a cut too high": lambda: compiled.ranked_means(Updates(ordinary(3, 4)), 1, 2, 3),
        "more kept than there are": lambda: compiled.nearest_means(Updates(ordinary(3, 4)), 4),
        "a weight too few": lambda: compiled.combination(Updates(ordinary(3, 4)), np.ones(2)),
        "a row that does not exist": lambda: compiled.combination(Updates(ordinary(3, 4)), np.ones(1), rows=[3]),
        "a short centre": lambda: compiled.gram(Updates(ordinary(3, 4)), np.zeros(3, np.float32)),
        "members of other rows": lambda: compiled.gram(Updates(ordinary(3, 4), (Mixture(np.ones((2, 4), bool), 0.5),))),
        "a stage of other rows": lambda: compiled.gram(Updates(ordinary(3, 4), [(np.array([[3]]), np.array([[1.0]]))])),
    }.values(),
)
def test_what_would_read_outside_the_updates_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        call()
