"""Consensus super teaching: its consensus against plain optimisation, its choices against all subsets."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from covey_coordinator.reproduce import super_teaching as problems
from covey_coordinator.teaching.super_baselines import exhaustive, greedy, learned
from covey_coordinator.teaching.super_teaching import (
    Matching,
    Part,
    SuperSettings,
    agreed,
    in_turns,
    learners,
    pulls,
    super_teach,
)
from covey_protocol.errors import ConfigError, DataError

KINDS = ["ridge", "logistic"]


def teachers(kind: str, seed: int = 0, sizes: tuple[int, ...] = (9, 7, 8), d: int = 3) -> Any:
    random = np.random.default_rng(seed)
    star, found = random.normal(size=d), []
    for n in sizes:
        x = random.normal(size=(n, d))
        y = x @ star + random.normal(size=n)
        found.append((x, y if kind == "ridge" else np.where(y > 0, 1.0, -1.0)))
    return found, star


def joined(found: Any) -> Any:
    return np.concatenate([x for x, _ in found]), np.concatenate([y for _, y in found])


@pytest.mark.parametrize("kind", KINDS)
def test_the_consensus_of_all_teachers_is_the_learner_of_all_their_instances(kind: str) -> None:
    found, _ = teachers(kind)
    settings = SuperSettings(kind=kind, decay=0.7, tolerance=1e-10)
    done = agreed(learners(found, settings), 0.7, np.zeros(3), settings)
    assert np.abs(done.p - learned(*joined(found), settings)).max() < 1e-8
    assert 1 < done.rounds < settings.rounds


@pytest.mark.parametrize("kind", KINDS)
def test_the_dual_relaxation_is_the_least_of_its_own_equation(kind: str) -> None:
    """Against a bounded quasi-Newton search over all a_i of the equation at the module's head, at price 0.3."""
    found, star = teachers(kind, sizes=(4, 3, 4))
    settings = SuperSettings(
        kind=kind, relaxation="dual", lambda_t=2.0, gamma=0.0, prices=(0.3,), turns=False, tolerance=1e-11, rounds=3000
    )
    a = np.concatenate(super_teach(found, star, settings).weights)
    x, y = joined(found)
    rows = x if kind == "ridge" else y[:, None] * x

    def value(split: Any) -> float:
        up, down = np.split(split, 2)
        own = up - down
        w = rows.T @ own / settings.decay
        conjugate = own @ own / 2 - own @ y if kind == "ridge" else up @ np.log(up) + (1 - up) @ np.log(1 - up)
        risk = settings.lambda_t * np.sum((w - star) ** 2)
        return float(conjugate + settings.decay / 2 * (w @ w) + risk + 0.3 * np.sum(up + down))

    high, tiny = (None, 0.0) if kind == "ridge" else (1 - 1e-12, 1e-12)
    bounds = [(tiny, high)] * len(y) + [(0.0, high if kind == "ridge" else 0.0)] * len(y)
    best = minimize(value, np.full(2 * len(y), 0.1) * [[1.0]], bounds=bounds, options={"maxfun": 10**6, "ftol": 1e-15})
    assert value(np.concatenate([np.maximum(a, tiny), np.maximum(-a, 0.0)])) <= best.fun + 1e-7
    assert np.abs(a - np.subtract(*np.split(best.x, 2))).max() < 2e-3


def test_matching_is_the_least_of_its_own_equation() -> None:
    found, star = teachers("ridge", sizes=(4, 5, 3))
    settings = SuperSettings(tolerance=1e-11, rounds=5000)
    g = np.concatenate(pulls(found, star, settings))
    price, smooth = np.linspace(0.0, 0.5, len(g)), 0.2
    parts = [Part(one, Matching(cost, smooth)) for one, cost in zip(np.split(g, [4, 9]), np.split(price, [4, 9]))]
    p = agreed(parts, 1.0, star, settings).p
    b = np.concatenate([part.loss.pull(part.z @ p) for part in parts])

    def value(b: Any) -> float:
        return float(np.sum((b @ g - star) ** 2) / 2 + price @ b + smooth / 2 * b @ b)

    best = minimize(value, np.full(len(g), 0.5), bounds=[(0, 1)] * len(g), options={"ftol": 1e-15, "gtol": 1e-12})
    assert np.abs(b - best.x).max() < 1e-5
    assert 0 < np.sum(b == 0.0) < len(b)


@pytest.mark.parametrize("kind", KINDS)
def test_the_remainder_bounds_the_risk(kind: str) -> None:
    """|theta(S) - theta*| <= |sum of S's pulls - decay theta*| / decay, for any S."""
    found, star = teachers(kind, seed=3)
    settings = SuperSettings(kind=kind, decay=0.5)
    x, y = joined(found)
    g = np.concatenate(pulls(found, star, settings))
    for number in range(20):
        chosen = np.random.default_rng(number).random(len(y)) < 0.4
        risk = np.linalg.norm(learned(x[chosen], y[chosen], settings) - star)
        assert risk <= np.linalg.norm(chosen @ g - 0.5 * star) / 0.5 + 1e-9


def test_turns_only_ever_come_nearer_and_end_where_no_single_change_helps() -> None:
    found, star = teachers("ridge", seed=4, sizes=(20, 0, 30))
    g = pulls(found, star, SuperSettings())
    start = [np.zeros(len(one), bool) for one in g]
    chosen, turns = in_turns(g, start, star)
    flat, rows = np.concatenate(chosen).astype(float), np.concatenate(g)

    def apart(flags: Any) -> float:
        return float(np.linalg.norm(flags @ rows - star))

    assert turns >= 2
    assert not any(one.any() for one in start)
    assert apart(flat) < 0.2 * np.linalg.norm(star)
    for number in range(len(flat)):
        other = flat.copy()
        other[number] = 1 - other[number]
        assert apart(other) >= apart(flat) * (1 - 1e-9)


def test_teachers_with_split_attributes_teach_together_what_none_can_alone() -> None:
    task = problems.linear("ridge", 0, d=10, split=True)
    together = task.risk(task.taught().theta)
    settings = SuperSettings(relaxation="none")
    alone = [task.risk(super_teach([one], task.star, settings).theta) for one in task.teachers]
    assert together < 1e-3 < 0.3 < min(alone)


def test_adaptive_weights_leave_out_what_equal_weights_use_a_little() -> None:
    assert problems.shares(problems.ADAPTIVE, 0) <= 0.05
    assert problems.shares(problems.UNWEIGHTED, 0) > 0.2


def test_no_choice_is_better_than_the_best_of_all_subsets() -> None:
    found, star = teachers("ridge", seed=5, sizes=(4, 4))
    x, y = joined(found)
    settings = SuperSettings()
    best, least = exhaustive(x, y, star, settings)
    for other in (greedy(x, y, star, settings)[1], super_teach(found, star, settings).risk):
        assert least * (1 - 1e-9) <= other < 0.5 * np.sum(star**2)
    assert least == pytest.approx(np.sum((learned(x[best], y[best], settings) - star) ** 2))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_takes_the_instance_that_leaves_the_least_risk(kind: str) -> None:
    found, star = teachers(kind, seed=6, sizes=(6,))
    (x, y), settings = found[0], SuperSettings(kind=kind)
    chosen, risk = greedy(x, y, star, settings, most=1)
    alone = [np.sum((learned(x[[number]], y[[number]], settings) - star) ** 2) for number in range(6)]
    assert np.flatnonzero(chosen).tolist() == [int(np.argmin(alone))]
    assert risk == pytest.approx(min(alone))


def test_what_was_sent_is_counted_and_the_same_data_give_the_same_bits() -> None:
    found, star = teachers("logistic")
    settings = SuperSettings(kind="logistic", prices=(0.0,))
    one, two = super_teach(found, star, settings), super_teach(found, star, settings)
    assert one.theta.tobytes() == two.theta.tobytes()
    assert one.vectors == 3 * (one.rounds + 1) + one.turns


def test_what_does_not_fit_is_refused() -> None:
    found, star = teachers("ridge")
    with pytest.raises(DataError, match="do not fit"):
        super_teach(found, star[:2])
    with pytest.raises(DataError, match="-1 and 1"):
        super_teach(found, star, SuperSettings(kind="logistic"))
    with pytest.raises(DataError, match="not finite"):
        super_teach(found, star * np.nan)
    with pytest.raises(ConfigError, match="super teaching of a 'ridge' learner by 'magic'"):
        SuperSettings(relaxation="magic")
    with pytest.raises(ConfigError, match="prices"):
        dataclasses.replace(SuperSettings(), prices=(-1.0,))
    with pytest.raises(ConfigError, match="all subsets of 17"):
        exhaustive(np.zeros((17, 3)), np.zeros(17), star, SuperSettings())
