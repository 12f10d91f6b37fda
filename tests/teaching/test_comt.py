"""CoMT in numpy: where it ends is what its equations say, found in other ways."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from instances import fleet, objective
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import minimize

from covey_coordinator.teaching.reference import comt
from covey_coordinator.teaching.server import begun, moved
from covey_protocol.errors import ConfigError, DataError, StorageError, UsageError
from covey_protocol.teaching import Logistic, Problem, Settings, Squares, Teacher, minimised

EXACT: dict[str, Any] = {"rounds": 3000, "tolerance": 1e-11, "rho": 4.0}
CURVATURE = {"ridge": 10.0, "logistic": 2.0}


def settings(kind: str, **changes: Any) -> Settings:
    return Settings(**{"curvature": CURVATURE[kind], **EXACT, **changes})


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_without_crafting_it_ends_where_a_convex_solver_does(kind: str) -> None:
    teachers, trusted = fleet(kind, seed=1, sizes=(6, 4, 5))
    told = settings(kind, lambda_w=2.0, lambda_t=3.0, lambda_a=0.2)
    taught = comt(teachers, trusted, Problem(kind), told)
    sizes = [len(x) for x, _ in teachers]
    total = sum(sizes)

    def cost(point: Any) -> float:  # ridge: a as a difference of two parts of one sign, so that |a| is smooth
        a = point[:total] - point[total:] if kind == "ridge" else point
        parts = np.split(a, np.cumsum(sizes)[:-1])
        value = objective(kind, told, teachers, trusted, parts, [0 * x for x, _ in teachers], [0.0] * 3)
        return value + (told.lambda_a * (np.sum(point) - np.abs(a).sum()) if kind == "ridge" else 0.0)

    bounds = [(0, None)] * (2 * total) if kind == "ridge" else [(1e-9, 1 - 1e-9)] * total
    start = np.full(len(bounds), 0.5)
    best = minimize(
        cost, start, bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9, "maxfun": 10**6}
    )
    ours = objective(kind, told, teachers, trusted, taught.alphas[:3], [0 * x for x, _ in teachers], [0.0] * 3)
    assert taught.settled
    assert ours <= best.fun + 1e-9 * abs(best.fun)
    found = best.x[:total] - best.x[total:] if kind == "ridge" else best.x
    assert np.allclose(np.concatenate(taught.alphas), found, atol=2e-4)


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_every_instance_is_where_its_optimality_condition_holds(kind: str, weight: float) -> None:
    teachers, trusted = fleet(kind, seed=2)
    told = settings(kind, lambda_w=1.5, lambda_t=weight, lambda_a=0.1, rho=max(1.0, 4 * weight))
    taught = comt(teachers, trusted, Problem(kind), told)
    w, slope = taught.theta, np.zeros(4)
    for x, y in trusted:
        miss = 2 * (x @ w - y) if kind == "ridge" else -y / (1 + np.exp(y * (x @ w)))
        slope = slope + weight * x.T @ miss
    seen = w + slope / told.lambda_w  # the model that the instances answer to: (5)
    for (x, y), alpha in zip(teachers, taught.alphas):
        if kind == "ridge":
            miss = y - x @ seen
            expected = np.sign(miss) * np.maximum(np.abs(miss) - 0.1, 0)
        else:
            expected = 1 / (1 + np.exp(y * (x @ seen) + 0.1))
        assert np.allclose(alpha, expected, atol=1e-7)
    shares = [(x if kind == "ridge" else y[:, None] * x).T @ a for (x, y), a in zip(teachers, taught.alphas)]
    assert np.allclose(sum(shares) / told.lambda_w, w, atol=1e-9)


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_with_crafting_it_ends_where_no_small_change_helps(kind: str) -> None:
    teachers, trusted = fleet(kind, seed=3)
    prices = {"lambda_z": 6.0, "lambda_y": 4.0} if kind == "ridge" else {"lambda_z": 6.0}
    told = settings(kind, lambda_w=2.0, lambda_t=2.0, **prices)
    taught = comt(teachers, trusted, Problem(kind), told)
    alphas, features = taught.alphas, [one.features for one in taught.crafted]
    targets = [one.targets for one in taught.crafted]
    assert taught.settled
    assert max(np.abs(one).max() for one in features) > 0.01
    assert all(np.all(one[:, -1] == 0) for one in features)

    rng = np.random.default_rng(0)
    inside = [1.0 if kind == "ridge" else one * (1 - one) for one in alphas]  # moves that keep 0 < a < 1
    for _ in range(20):
        moves = [
            ([by * rng.normal(size=one.shape) for one, by in zip(alphas, inside)], features, targets),
            (alphas, [rng.normal(size=one.shape) * [1, 1, 1, 0] for one in features], targets),
            (alphas, features, [rng.normal(size=one.shape) for one in targets]),
        ]
        for part, points in enumerate(moves[: 3 if kind == "ridge" else 2]):
            base = (alphas, features, targets)[part]
            values = []
            for step in (1e-5, -1e-5):
                moved_part = [one + step * by for one, by in zip(base, points[part])]
                point = [*points[:part], moved_part, *points[part + 1 :]]
                values.append(objective(kind, told, teachers, trusted, *point))
            assert abs(values[0] - values[1]) / 2e-5 < 1e-5


def test_crafting_moves_instances_against_the_model_they_answer_to() -> None:
    """(14): b_i = -a_i (w + T'(w) / lambda_w) / (2 lambda_z), so a crafted instance fits less than its own."""
    teachers, trusted = fleet("ridge", seed=12)
    told = settings("ridge", lambda_w=2.0, lambda_t=2.0, lambda_z=6.0)
    taught = comt(teachers, trusted, Problem(), told)
    slope = sum((4.0 * x.T @ (x @ taught.theta - y) for x, y in trusted), np.zeros(4))
    seen = (taught.theta + slope / 2.0) * [1, 1, 1, 0]
    for alpha, one in zip(taught.alphas[:3], taught.crafted):
        assert np.allclose(one.features, -np.outer(alpha, seen) / 12.0, atol=1e-7)


def test_the_best_crafting_of_given_weights_is_rank_one_and_closed() -> None:
    """(8) against a search over all n F numbers of B."""
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=5)
    told = Settings(lambda_w=1.3, lambda_z=0.8, curvature=2.0)
    teacher = Teacher(Problem(fixed=1), told, x, y)
    theta, u = rng.normal(size=3), rng.normal(size=3)
    teacher.answer(theta, u, np.zeros(3))
    a, kappa = teacher.alpha, 1.3**2 / 2.0

    def cost(flat: Any) -> float:
        b = np.column_stack([flat.reshape(5, 2), np.zeros(5)])
        gap = (x + b).T @ a / 1.3 - (theta + u)
        return float(0.8 * (b**2).sum() + kappa / 2 * gap @ gap)

    best = minimize(cost, np.zeros(10), method="BFGS", options={"gtol": 1e-10})
    b = np.outer(a, teacher.direction)
    assert np.allclose(b[:, :2].ravel(), best.x, atol=1e-6)
    assert np.allclose(teacher.share, (x + b).T @ a / 1.3, atol=1e-12)


@pytest.mark.parametrize("loss", [Squares(np.arange(6.0), 1.7, 0.4), Logistic(2.0, 0.3)], ids=["squares", "logistic"])
def test_newton_finds_the_least_value_and_slopes_are_slopes(loss: Any) -> None:
    rng = np.random.default_rng(5)
    z, linear = rng.normal(size=(6, 3)), rng.normal(size=3)
    w = minimised(z, loss, linear, 0.3, np.full(3, 30.0))
    assert np.allclose(linear + 0.3 * w - z.T @ loss.pull(z @ w), 0, atol=1e-10)
    m, step = rng.normal(size=6), 1e-6
    for i, one in enumerate(np.eye(6)):
        assert (loss.value(m + step * one) - loss.value(m - step * one)) / (2 * step) == pytest.approx(
            -loss.pull(m)[i], abs=1e-7
        )
        assert (loss.pull(m - step * one) - loss.pull(m + step * one))[i] / (2 * step) == pytest.approx(
            loss.bend(m)[i], abs=1e-7
        )


def test_the_servers_theta_is_the_least_of_its_three_terms() -> None:
    """(10) against a search: lambda_w/2 |w|^2, kappa/2 |parts - their share of w|^2, rho/2 |holders - w|^2."""
    rng = np.random.default_rng(6)
    state = begun((3,))._replace(theta=rng.normal(size=3), u=rng.normal(size=3))
    parts, wanted = rng.normal(size=(4, 3)), rng.normal(size=(2, 3))
    told = Settings(lambda_w=1.7, rho=0.6, curvature=1.1)
    after, _ = moved(state, told, parts.sum(axis=0), 4, (wanted - state.theta).sum(axis=0), 2)
    kappa = 1.7**2 / 1.1

    def cost(w: Any) -> float:
        gap = (w - parts.sum(axis=0)) / 4 + state.u
        return float(1.7 / 2 * w @ w + kappa / 2 * 4 * gap @ gap + 0.3 * ((w - wanted) ** 2).sum())

    assert np.allclose(after.theta, minimize(cost, np.zeros(3), options={"gtol": 1e-10}).x, atol=1e-6)
    assert np.allclose(after.u, state.u + (after.theta - parts.sum(axis=0)) / 4)


def test_without_trusted_instances_and_crafting_it_is_plain_ridge() -> None:
    teachers, _ = fleet("ridge", seed=7)
    taught = comt(teachers, [], Problem(), settings("ridge", lambda_w=3.0))
    x, y = np.concatenate([x for x, _ in teachers]), np.concatenate([y for _, y in teachers])
    assert np.allclose(taught.theta, np.linalg.solve(x.T @ x + 3 * np.eye(4), x.T @ y), atol=1e-9)
    assert all(np.all(one.features == 0) and np.all(one.targets == 0) for one in taught.crafted)


def test_a_holder_without_other_instances_is_as_good_as_a_teacher_who_holds_them() -> None:
    teachers, trusted = fleet("ridge", seed=8, trusted=(3, 0, 0))
    told = settings("ridge", lambda_t=2.0)
    nobody = (trusted[0][0][:0], trusted[0][1][:0])
    apart = comt(teachers, [nobody, nobody, nobody, trusted[0]], Problem(), told)
    assert np.allclose(comt(teachers, trusted, Problem(), told).theta, apart.theta, atol=1e-12)


def test_trusted_instances_in_one_place_or_in_three_teach_the_same() -> None:
    teachers, trusted = fleet("ridge", seed=9, trusted=(3, 4, 2))
    told = settings("ridge", lambda_t=2.0)
    together = [(np.concatenate([x for x, _ in trusted]), np.concatenate([y for _, y in trusted]))]
    assert np.allclose(
        comt(teachers, trusted, Problem(), told).theta, comt(teachers, together, Problem(), told).theta, atol=1e-8
    )


def test_columns_are_taught_as_if_each_were_alone() -> None:
    teachers, trusted = fleet("logistic", seed=10)
    both = [(x, np.column_stack([y, -y * np.sign(x[:, 0])])) for x, y in teachers]
    held = [(x, np.column_stack([y, -y * np.sign(x[:, 0])])) for x, y in trusted]
    told = settings("logistic", lambda_z=5.0, rounds=30)
    taught = comt(both, held, Problem("logistic"), told)
    for column in range(2):
        alone = comt(
            [(x, y[:, column]) for x, y in both], [(x, y[:, column]) for x, y in held], Problem("logistic"), told
        )
        assert np.allclose(taught.theta[:, column], alone.theta, atol=1e-12)
        assert np.allclose(taught.alphas[0][:, column], alone.alphas[0], atol=1e-12)
        assert np.allclose(taught.crafted[0].features[column], alone.crafted[0].features, atol=1e-12)


def test_a_saved_teacher_goes_on_as_if_nothing_had_happened() -> None:
    teachers, trusted = fleet("ridge", seed=11)
    told = settings("ridge", lambda_z=5.0)

    def anew() -> Teacher:
        return Teacher(Problem(), told, *teachers[0], trusted[0], teachers=3)

    rng, one = np.random.default_rng(0), anew()
    theta, u, others, after = rng.normal(size=(4, 4))
    one.answer(theta, u, others), one.correct(theta)
    other = anew().loaded(one.saved())
    assert np.array_equal(one.answer(after, u, others), other.answer(after, u, others))
    assert np.array_equal(one.correct(after), other.correct(after))
    assert np.array_equal(one.judged().residual, other.judged().residual)
    with pytest.raises(StorageError, match="cannot be read"):
        anew().loaded(one.saved()[:-40])
    with pytest.raises(StorageError, match="other data"):
        Teacher(Problem(), told, *teachers[1]).loaded(one.saved())


def test_an_owner_is_told_which_instances_were_used_how_much_and_how_far_off_they_are() -> None:
    rng = np.random.default_rng(13)
    x = np.column_stack([rng.normal(size=(12, 2)), np.ones(12)])
    y = np.where(x[:, 0] > 0, 1.0, -1.0)
    y[3] = -y[3]
    told = settings("logistic", lambda_t=20.0, lambda_z=8.0, rounds=60)
    trusted = (10 * np.eye(3)[:1], np.ones(1))
    teacher, state = Teacher(Problem("logistic"), told, x, y, trusted), begun((3,))
    for _ in range(60):
        answer, correction = teacher.answer(state.theta, state.u, np.zeros(3)), teacher.correct(state.theta)
        state, _ = moved(state, told, answer, 1, correction, 1)
    teacher.told(state.theta)
    judged = teacher.judged()
    assert judged.weight.argmax() == 3
    assert_allclose(judged.residual, y * (x @ state.theta))
    assert (judged.residual < 0).tolist() == [row == 3 for row in range(12)]
    assert_allclose(judged.feature_change, np.linalg.norm(np.outer(teacher.alpha, teacher.direction), axis=1))
    assert not judged.target_change.any()
    ridge = Teacher(Problem(), settings("ridge", lambda_a=1.0, lambda_y=2.0), x, y * np.linspace(0, 3, 12))
    ridge.answer(np.array([2.0, 0.0, 0.0]), np.zeros(3), np.zeros(3))
    found = ridge.judged()
    assert_array_equal(found.selected, ridge.alpha != 0)
    assert 0 < found.selected.sum() < 12
    assert_allclose(found.target_change, ridge.alpha / 4)


def test_what_cannot_be_taught_is_refused() -> None:
    x, y = np.ones((2, 2)), np.ones(2)
    for wrong in ({"lambda_w": 0.0}, {"lambda_y": 0.5}, {"lambda_t": math.inf}, {"rounds": 0}, {"rho": math.nan}):
        with pytest.raises(ConfigError):
            Settings(**wrong)
    with pytest.raises(ConfigError, match="'lasso'"):
        Problem("lasso")
    with pytest.raises(DataError, match="other than -1 and 1"):
        Teacher(Problem("logistic"), Settings(), x, np.zeros(2))
    with pytest.raises(DataError, match="not finite"):
        Teacher(Problem(), Settings(), x * math.nan, y)
    with pytest.raises(DataError, match="another shape"):
        Teacher(Problem(), Settings(), x, y, (np.ones((1, 3)), np.ones(1)))
    with pytest.raises(DataError, match="without an instance"):
        comt([], [(x, y)], Problem(), Settings())
    with pytest.raises(UsageError, match="ask holders only"):
        Teacher(Problem(), Settings(), x, y).correct(np.zeros(2))
    with pytest.raises(UsageError, match=r"\(3,\)"):
        Teacher(Problem(), Settings(), x, y).answer(np.zeros(3), np.zeros(2), np.zeros(2))
