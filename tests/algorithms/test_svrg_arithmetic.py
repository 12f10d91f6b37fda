"""Federated SVRG and SCAFFOLD in numpy: the published equations, their edge cases, and the convergence they are for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from covey_coordinator.algorithms import reference
from covey_coordinator.algorithms.combining import boosted, boosts, fleet_control, owners
from covey_coordinator.algorithms.sparse_logistic import (
    Authors,
    Posts,
    error,
    gradient,
    joined,
    loss,
    make_authors,
    optimum,
)
from covey_protocol import scaffold, svrg

Array = np.ndarray[Any, Any]


def posts(rows: list[list[int]], labels: list[float], features: int = 4) -> Posts:
    starts = np.cumsum([0, *map(len, rows)])
    columns = np.array([column for row in rows for column in row], np.int64)
    return Posts(columns, starts, np.array(labels, np.float64), features)


FIRST = posts([[0, 1], [0], [0, 2]], [1.0, -1.0, 1.0])
SECOND = posts([[0], [3, 0]], [1.0, 1.0])


def test_a_rare_feature_is_scaled_by_how_much_rarer_it_is_in_the_fleet() -> None:
    """phi^j = n^j / n over phi_k^j = n_k^j / n_k, on five examples that can be counted by hand."""
    fleet = joined([FIRST, SECOND]).shares()
    assert_allclose(fleet, [5 / 5, 1 / 5, 1 / 5, 1 / 5, 1])
    assert_allclose(svrg.scales(fleet, FIRST.shares()), [1, 3 / 5, 3 / 5, 1, 1])  # the fourth is not on this device
    assert_allclose(svrg.scales(fleet, SECOND.shares()), [1, 1, 1, 2 / 5, 1])


def test_what_few_devices_have_moves_as_if_all_had_it() -> None:
    own = np.stack([FIRST.shares(), SECOND.shares()])
    assert_array_equal(owners(own), [2, 1, 1, 1, 2])
    assert_array_equal(boosts(own), np.array([1, 2, 2, 2, 1], np.float32))
    assert_array_equal(boosts(np.zeros((3, 2))), np.ones(2, np.float32))  # nobody has it
    assert_array_equal(boosted(np.ones(2), np.array([1.0, 2.0]), np.array([1.0, 3.0])), [2.0, 7.0])


def test_dense_data_are_not_scaled_at_all() -> None:
    dense = svrg.shares(np.full((7, 2, 3), 0.5))
    assert_array_equal(dense, np.ones(6))
    assert_array_equal(svrg.scales(dense, dense), np.ones(6, np.float32))
    assert_array_equal(boosts(np.stack([dense, dense])), np.ones(6, np.float32))


def test_only_the_kernels_rows_belong_to_features() -> None:
    spread = svrg.per_parameter(np.array([0.25, 0.5]), 3, 8)
    assert_array_equal(spread, np.array([0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 1.0, 1.0], np.float32))


def test_a_pass_goes_equally_far_on_few_and_on_many_examples() -> None:
    """With no curvature every step is `full`: so h_k = h / n_k takes every device to start - h full."""
    full, start = np.array([1.0, -2.0]), np.zeros(2)
    for n in (1, 7, 40):
        batches = svrg.passes(n, 4, 1, svrg.order_of(1, "pi"))
        rate = svrg.local_rate(0.5, n, 4)
        assert_allclose(svrg.local_steps(start, full, lambda w, rows, step: w * 0, batches, rate), -0.5 * full)


def test_a_pass_sees_every_example_once_and_a_draw_any_number_of_times() -> None:
    seen = np.concatenate(list(svrg.passes(10, 4, 2, svrg.order_of(3, "pi"))))
    assert_array_equal(np.bincount(seen), np.full(10, 2))
    assert not np.array_equal(seen[:10], seen[10:])
    drawn = list(svrg.drawn(10, 4, 5, svrg.order_of(3, "pi")))
    assert [len(rows) for rows in drawn] == [4] * 5
    assert len(np.unique(np.concatenate(drawn))) < 10
    counted = [len(rows) for rows in scaffold.batches(10, 4, 5, svrg.order_of(3, "pi"))]
    assert counted == [4, 4, 2, 4, 4]


def test_one_step_is_the_published_equation() -> None:
    rng = np.random.default_rng(0)
    start, full, scale = rng.normal(size=5), rng.normal(size=5), rng.uniform(0.2, 2.0, 5)
    rows = [np.array([0, 2]), np.array([1])]

    def slope(w: Array, batch: Array, step: int) -> Array:
        return gradient(w, FIRST.taken(batch), 0.1)

    expected = start.copy()
    for batch in rows:
        expected = expected - 0.3 * (scale * (slope(expected, batch, 0) - slope(start, batch, 0)) + full)
    assert_allclose(svrg.local_steps(start, full, slope, iter(rows), 0.3, scale), expected, rtol=1e-14)


def test_both_gradients_of_a_step_draw_the_same() -> None:
    told: list[tuple[int, ...]] = []

    def slope(w: Array, rows: Array, step: int) -> Array:
        told.append((step, *rows))
        return np.zeros(2)

    svrg.local_steps(np.zeros(2), np.ones(2), slope, svrg.passes(5, 2, 1, svrg.order_of(0, "pi")), 0.1)
    assert told[::2] == told[1::2]
    assert [first[0] for first in told[::2]] == [0, 1, 2]


def test_at_the_optimum_nothing_moves() -> None:
    every = joined([FIRST, SECOND])
    w = optimum(every, 0.1, tolerance=1e-12)
    moved = next(iter(_from(w, [FIRST, SECOND])))
    assert_allclose(moved, w, atol=1e-6)


def _from(w: Array, devices: list[Posts]) -> Iterator[Array]:
    """One round of FSVRG from w."""
    full = reference.full_gradient(w, devices, 0.1)
    for one in devices:
        batches = svrg.passes(len(one), 1, 1, svrg.order_of(0, "pi"))
        yield svrg.local_steps(w, full, lambda v, rows, step, one=one: gradient(v, one.taken(rows), 0.1), batches, 0.5)


def test_the_gradient_is_that_of_the_loss() -> None:
    w, step = np.random.default_rng(0).normal(size=5), 1e-6
    for place in range(5):
        shift = np.eye(5)[place] * step
        slope = (loss(w + shift, FIRST, 0.3) - loss(w - shift, FIRST, 0.3)) / (2 * step)
        assert gradient(w, FIRST, 0.3)[place] == pytest.approx(slope, abs=1e-8)


# --- SCAFFOLD


def test_the_fleets_control_follows_from_the_aggregate_alone() -> None:
    """With every device in the round c stays the mean of the c_i, as Algorithm 1 makes it from what devices send."""
    rng = np.random.default_rng(0)
    own = rng.normal(size=(4, 3))
    fleet, updates = own.mean(axis=0), rng.normal(size=(4, 3))
    after = np.stack([scaffold.next_control(fleet, one, update, 7, 0.1) for one, update in zip(own, updates)])
    assert_allclose(fleet_control(fleet, updates.mean(axis=0), 7, 0.1, 4, 4), after.mean(axis=0), rtol=1e-12)
    some = own.copy()
    some[:2] = after[:2]  # the others keep what they had
    half = fleet_control(fleet, updates[:2].mean(axis=0), 7, 0.1, 2, 4)
    assert_allclose(half, fleet + 0.5 * (after[:2] - fleet).mean(axis=0) - 0.5 * (own[:2] - fleet).mean(axis=0))


def test_a_control_is_the_mean_gradient_along_the_way() -> None:
    """c_i+ = c_i - c + (x - y_i) / (K eta), where y_i = x - eta sum (g + c - c_i)."""
    gradients, own, fleet = np.array([[1.0, 2.0], [3.0, 6.0]]), np.array([0.5, 0.5]), np.array([0.1, -0.1])
    update = -0.2 * (gradients + scaffold.correction(fleet, own)).sum(axis=0)
    assert_allclose(scaffold.next_control(fleet, own, update, 2, 0.2), gradients.mean(axis=0))


# --- what it is for


@pytest.fixture(scope="module")
def authors() -> Authors:
    return make_authors(authors=20, features=150, most=120, own_words=10, seed=0)


def test_the_data_are_sparse_unbalanced_and_of_authors_with_words_of_their_own(authors: Authors) -> None:
    own = np.stack([one.shares()[:-1] for one in authors.train])
    sizes = np.array([len(one) for one in authors.train])
    assert joined(authors.train).shares()[:-1].mean() < 0.1
    assert sizes.max() > 5 * sizes.min()
    assert np.percentile(owners(own), 10) <= 10 < 18 <= np.percentile(owners(own), 95)  # of 20 authors
    shuffled = authors.reshuffled(1)
    assert [len(one) for one in shuffled.train] == sizes.tolist()
    assert np.std(own[:, 75:], axis=0).mean() > 1.2 * np.std([one.shares()[75:-1] for one in shuffled.train], 0).mean()


def test_fsvrg_comes_closest_to_the_optimum_then_its_naive_form_then_gradient_descent(authors: Authors) -> None:
    """The order of Fig. 2 of Konecny et al. 2016, each at the best of its step sizes, after 10 rounds."""
    every, test = authors.all_train(), authors.all_test()
    decay = 1 / len(every)
    best = optimum(every, decay)
    least = loss(best, every, decay)

    def above(run: Iterator[Array]) -> tuple[float, float]:
        w = next(itertools.islice(run, 9, None))
        return loss(w, every, decay) - least, error(w, test)

    # the best rates of 1, 3, 10, 30 (1, 3, 10 for gradient descent) and 0.1, 0.3, 1 on these data
    fsvrg = above(reference.fsvrg(authors.train, decay, 30.0, batch=5))
    naive = above(reference.fsvrg_naive(authors.train, decay, 0.3, 12, batch=5))
    plain = above(reference.gradient_descent(authors.train, decay, 1.0))
    assert 10 * fsvrg[0] < naive[0] < 0.6 * plain[0], (fsvrg, naive, plain)
    assert fsvrg[1] < naive[1] < plain[1]
