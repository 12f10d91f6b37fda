"""Worlds of mostly corrupted devices, tuning that looks only where it may, and tables of who stands where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_coordinator.reproduce import comt, contestants, data, incomplete, majority, regimes, standings
from covey_coordinator.reproduce.contract import Measured
from covey_coordinator.reproduce.majority import CORRUPTIONS, drawn
from covey_coordinator.teaching.fitting import Data, Floats
from covey_protocol.errors import DataError

FLIPS = standings.place("flips", "breast-cancer", "flips", 0.05, flips=0.8).settings
LINES = ["name,b,c,d,e,f,g,h,target", *(f"{'MFI'[n % 3]},{n},2,3,4,5,{n * n % 7},7,{n % 5}" for n in range(60))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """abalone.csv of 60 made-up lines."""
    path = tmp_path_factory.mktemp("tables")
    (path / "abalone.csv").write_text("\n".join(LINES) + "\n")
    return path


def rows(part: Data) -> set[bytes]:
    return {row.tobytes() for row in part.x}


def test_no_instance_is_in_two_parts_of_a_world_and_the_seed_decides() -> None:
    world, again, other = drawn(FLIPS, 0, None), drawn(FLIPS, 0, None), drawn(FLIPS, 1, None)
    parts = [*world.problem.devices, world.problem.all_trusted, world.validation, world.test]
    assert sum(len(rows(part)) for part in parts) == len(set.union(*(rows(part) for part in parts))) == 569
    assert len(world.problem.all_trusted.y) == 28
    assert set(world.problem.all_trusted.y) == {-1.0, 1.0}
    np.testing.assert_array_equal(world.problem.all_noisy.y, again.problem.all_noisy.y)
    assert not np.array_equal(world.problem.all_noisy.y, other.problem.all_noisy.y)
    assert np.abs(world.test.x).max() <= 1.0
    assert (world.test.x[:, -1] == 1.0).all()


def test_few_trusted_instances_are_of_both_classes() -> None:
    for seed in range(5):
        trusted = drawn({**FLIPS, "trusted": 4}, seed, None).problem.all_trusted
        assert sorted(trusted.y) == [-1.0, -1.0, 1.0, 1.0]


def test_only_the_devices_named_are_corrupted_and_the_bound_has_them_clean() -> None:
    world = drawn({**FLIPS, "corrupted": 0.4}, 0, None)
    changed = [np.mean(a.y != b.y) for a, b in zip(world.problem.devices, world.clean.devices)]
    np.testing.assert_allclose(changed, [0.8, 0.8, 0, 0, 0], atol=0.01)


def instances(n: int = 4000) -> Data:
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, (n, 4))
    return Data(x, np.where(x[:, 0] + 0.1 * random.normal(size=n) > 0, 1.0, -1.0))


def corrupted(name: str, part: Data, **settings: Any) -> Data:
    return CORRUPTIONS[name](part, settings, np.random.default_rng(1))


def test_two_thirds_of_the_flipped_labels_are_positive_while_there_are_so_many() -> None:
    clean = instances()
    flipped = clean.y != corrupted("flips", clean, flips=0.6).y
    assert flipped.mean() == pytest.approx(0.6, abs=1e-3)
    assert np.mean(clean.y[flipped] > 0) == pytest.approx(2 / 3, abs=1e-3)
    rare = Data(clean.x, np.where(np.arange(4000) < 400, 1.0, -1.0))
    flipped = rare.y != corrupted("flips", rare, flips=0.6).y
    assert flipped.mean() == pytest.approx(0.6, abs=1e-3)
    assert flipped[:400].all()


def test_noise_has_the_variance_asked_for_and_one_mean_per_device() -> None:
    clean = instances()
    noise = corrupted("features", clean, variance=1.5).x - clean.x
    np.testing.assert_allclose(noise.var(0), 1.5, rtol=0.1)
    assert np.abs(noise.mean(0)).max() > 1.0
    noise = corrupted("targets", clean, variance=4.5).y - clean.y
    assert noise.var() == pytest.approx(4.5, rel=0.1)
    assert np.abs(noise.mean()) < 2.5


def test_users_hide_high_values_of_what_tells_most() -> None:
    clean = instances()
    hidden = np.isnan(corrupted("hidden", clean, attributes=0.25).x)
    assert hidden[:, 0].mean() == pytest.approx(0.5, abs=0.01)
    assert not hidden[:, 1:].any()
    np.testing.assert_array_equal(hidden[:, 0], clean.x[:, 0] > np.median(clean.x[:, 0]))


@pytest.mark.parametrize("appear", ["zero", "mean", "missing"])
def test_nothing_hidden_stays_a_nan_and_missing_values_are_marked(appear: str) -> None:
    settings = incomplete.hiding("breast-cancer", appear, 0.5).settings
    world = drawn(settings, 0, None)
    assert all(np.isfinite(part.x).all() for part in world.problem.devices)
    width = {"missing": 61}.get(appear, 31)
    assert {part.x.shape[1] for part in [*world.problem.devices, *world.clean.devices, world.test]} == {width}
    if appear == "missing":
        shares = [part.x[:, 30:60].mean() for part in world.problem.devices]
        np.testing.assert_allclose(shares, [0.25] * 5 + [0.0] * 5, atol=0.02)


def test_fourier_features_are_near_a_gaussian_kernel() -> None:
    lift, x = majority.lifted(4000, 3, 0), np.random.default_rng(0).uniform(-1, 1, (6, 3))
    z = lift(x)[:, :-1]
    kernel = np.exp(-((x[:, None] - x[None]) ** 2).sum(-1) / 6.0)
    np.testing.assert_allclose(z @ z.T, kernel, atol=0.06)


def test_digits_it_never_saw_are_told_apart_by_features_learned_on_others() -> None:
    x, y = majority._deep_digits()
    assert x.shape == (357, 32)
    assert sorted(set(y)) == [-1.0, 1.0]
    theta = np.linalg.lstsq(np.c_[x[:200], np.ones(200)], y[:200], rcond=None)[0]
    assert np.mean(np.sign(np.c_[x[200:], np.ones(157)] @ theta) == y[200:]) > 0.9


@pytest.mark.parametrize("name", contestants.METHODS)
def test_candidates_fill_every_range_evenly_and_are_the_same_each_time(name: str) -> None:
    tried = contestants.candidates(name, 12)
    assert tried == contestants.candidates(name, 12)
    for setting, (low, high) in contestants.METHODS[name].ranges.items():
        places = np.sort(np.log([one[setting] / low for one in tried]) / np.log(high / low))
        np.testing.assert_allclose(places, (np.arange(12) + 0.5) / 12, atol=1e-9)


def test_comts_candidates_are_draws_for_the_data_and_the_first_is_the_middle() -> None:
    from covey_coordinator.teaching.tuning import drawn as drawn_settings
    from covey_protocol import teaching

    assert contestants.candidates(contestants.COMT, 3) == [{"draw": 0.0}, {"draw": 1.0}, {"draw": 2.0}]
    problem = drawn(FLIPS, 0, None).problem
    thetas = [contestants.taught(problem, {"draw": float(number)}) for number in (0, 1, 1)]
    np.testing.assert_array_equal(thetas[1], thetas[2])
    assert not np.allclose(thetas[0], thetas[1])
    devices, trusted = ([(part.x, part.y) for part in parts] for parts in (problem.devices, problem.trusted))
    kind, base = teaching.Problem(problem.kind), teaching.Settings(rounds=60, tolerance=1e-3)
    middle = contestants.comt(devices, trusted, kind, drawn_settings(kind, devices, trusted, None, base)).theta
    np.testing.assert_array_equal(thetas[0], middle)


def spoiled(part: Data) -> Data:
    return Data(part.x, -part.y)


def test_tuning_looks_at_the_validation_set_only_where_it_may() -> None:
    world = drawn(FLIPS, 0, None)
    other = world._replace(validation=spoiled(world.validation), test=spoiled(world.test))

    def chosen(of: Any, by: str) -> dict[str, float]:
        return contestants.tuned("trusted + noisy", of, by, 6)[1]

    assert chosen(world, "trusted") == chosen(other, "trusted")
    assert chosen(world, "validation") != chosen(other, "validation")
    assert chosen(world, "nothing") == {"decay": 1e-3}


def test_a_fold_is_predicted_by_a_model_that_did_not_see_it() -> None:
    """A method that only remembers is no better than chance in cross-validation."""
    world = drawn(FLIPS, 0, None)
    seen: list[Floats] = []

    def remembers(problem: Any, settings: Any) -> Floats:
        seen.append(problem.all_trusted.y)
        return np.zeros(31)

    contestants._on_trusted(contestants.Method(remembers, {}), world, {})
    assert [len(y) for y in seen] == [18, 19, 19]  # of 28, without a third each
    assert all(len(set(y)) == 2 for y in seen)


def test_a_method_that_diverges_is_never_chosen() -> None:
    world, method = drawn(FLIPS, 0, None), contestants.Method(lambda problem, settings: np.full(31, np.nan), {})
    assert contestants._on_validation(method, world, {}) == (-np.inf, -np.inf)


def test_comt_is_one_of_them_and_teaches_what_plain_learning_gets_wrong() -> None:
    place = standings.Place("flips", {**FLIPS, "trusted": 0.05}, {})
    scores = {
        method: standings.value(standings.run(standings.case(place, method, 2).settings, 0, None))
        for method in (contestants.COMT, "devices only", standings.CLEAN)
    }
    assert scores["devices only"] < 0.5 < 0.85 < scores[contestants.COMT] <= scores[standings.CLEAN] + 0.02


def measured(**values: tuple[float, ...]) -> Measured:
    return Measured({f"w: {k}": [{"score": v} for v in found] for k, found in values.items()}, standings.value)


def test_pairs_are_compared_seed_by_seed() -> None:
    pair = standings.paired(measured(a=(0.5, 0.7, 0.9), b=(0.4, 0.7, 0.6)), "w: a", "w: b")
    assert (pair.wins, pair.seeds) == (2, 3)
    assert pair.mean == pytest.approx(0.4 / 3)
    assert pair.spread == pytest.approx(np.std([0.1, 0.0, 0.3], ddof=1))


def test_the_tables_say_who_is_best_and_by_how_much() -> None:
    found = Measured(
        {f"w: {name}": [{"score": value}] * 2 for name, value in (("trusted only", 0.5), ("CoMT", 0.6), ("DUTI", 0.7))},
        standings.value,
    )
    assert "| w | +0.100, 0.000 | 2 of 2 | DUTI | +0.100, 0.000 |" in standings.gaps(found)
    assert "| CoMT | 0.600 |" in standings.matrix(found)


@pytest.mark.parametrize("one", [comt.COMT_TABLES, incomplete.INCOMPLETE, regimes.REGIMES], ids=lambda one: one.name)
def test_figures_and_words_are_made_of_any_numbers(one: Any) -> None:
    cases = one.cases(True)
    numbers = Measured({case.label: [{"score": 0.1 * n}] * 2 for n, case in enumerate(cases)}, one.value)
    assert one.figure(cases, numbers).startswith(b"\x89PNG")
    assert "| CoMT |" in one.found(numbers)


def test_a_table_of_numbers_and_sexes_is_read(folder: Path) -> None:
    x, y = data.regression_table(folder, "abalone.csv")
    assert x.shape == (60, 8)
    np.testing.assert_array_equal(x[:3, 0], [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(y[:6], [0, 1, 2, 3, 4, 0])
    world = drawn(standings.place("", "abalone", "targets", 10, variance=1.0).settings, 0, folder)
    assert world.problem.all_trusted.y.mean() == pytest.approx(0.0, abs=1e-9)
    assert world.problem.all_trusted.y.std() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("line", "said"), [("M,1,2,3,4,5,6,7,x", "no number"), ("M,1,2,3,4,5,6,7", "columns|cells")])
def test_a_table_that_is_another_is_refused(tmp_path: Path, line: str, said: str) -> None:
    head = ",".join("abcdefghi"[: line.count(",") + 1])
    (tmp_path / "abalone.csv").write_text(f"{head}\n{line}\n")
    with pytest.raises(DataError, match=said):
        data.regression_table(tmp_path, "abalone.csv")
