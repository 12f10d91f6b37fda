"""Each attack against an independent reference and its defining property; the same bits in both kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import attack_references as reference
import numpy as np
import pytest
import tensorflow_federated as tff
from aggregation_references import bits, judge, judge_in_tensorflow
from attack_references import craft, honest_rows, push
from scipy.optimize import minimize

from covey_coordinator.aggregation.factory import RuleFactory
from covey_coordinator.aggregation.kernels import Updates
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.kernels.reference import TensorFlowKernels
from covey_coordinator.aggregation.registry import make_rule, settings_of
from covey_coordinator.aggregation.screening import screen_updates
from covey_coordinator.attacks.attacked import Attacked
from covey_coordinator.attacks.contract import DataSetting
from covey_coordinator.attacks.mathematics import disguised, seed_of
from covey_coordinator.attacks.registry import ATTACKS, make_attack
from covey_protocol.errors import ConfigError, RuleError

SETTING = DataSetting(num_classes=10, input_range=(0.0, 1.0))
K = NumpyKernels()
SHORT: dict[str, dict[str, Any]] = {"fltrust-adaptive": {"rounds": 2, "steps": 2, "start": "plane"}}


@pytest.mark.parametrize("shape", [pytest.param((5, 1), marks=pytest.mark.slow), (30, 4097)])
@pytest.mark.parametrize("name", ATTACKS)
def test_both_kernels_give_the_same_bits(name: str, shape: tuple[int, int]) -> None:
    honest, attack = honest_rows(1, *shape), make_attack(name, **SHORT.get(name, {}))
    found = craft(attack, honest, 2)
    assert found.dtype == np.float32
    assert found.shape == (2, shape[1])
    assert bits(found) == bits(reference.craft_in_tensorflow(attack, honest, 2))


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_never_writes_into_the_honest_updates(name: str) -> None:
    honest = honest_rows(2, 8, 50)
    before = honest.copy()
    craft(make_attack(name), honest, 2)
    assert bits(honest) == bits(before)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_says_what_it_is_and_whence(name: str) -> None:
    attack = make_attack(name)
    assert attack.name == name
    assert all(attack.facts)
    assert dataclasses.is_dataclass(attack)


def test_unknown_attacks_and_settings_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'min-max'"):
        make_attack("minmax")
    with pytest.raises(ConfigError, match="did you mean 'epsilon'"):
        make_attack("ipm", epsilom=1.0)
    with pytest.raises(ConfigError, match="it has no settings"):
        make_attack("mimic", epsilon=1.0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sign-flip", {"scale": float("nan")}),
        ("sign-flip", {"of": "theirs"}),
        ("gaussian", {"sigma": -1.0}),
        ("constant", {"value": float("inf")}),
        ("ipm", {"epsilon": "much"}),
        ("min-max", {"direction": "north"}),
        ("adaptive", {"doublings": 0}),
        ("fltrust-adaptive", {"rounds": 0}),
        ("fltrust-adaptive", {"smoothing": 0.0}),
        ("scaling-backdoor", {"poisoned_share": 1.5}),
        ("scaling-backdoor", {"patch": 0}),
        ("fang-trim", {"b": 0.5}),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        make_attack(name, **settings)


def test_gaussian_noise_has_its_standard_deviation_and_differs_by_device_and_round() -> None:
    honest = honest_rows(0, 5, 50_000)
    rows = craft(make_attack("gaussian"), honest, 2)
    assert rows.mean() == pytest.approx(0.0, abs=200 * 4 / np.sqrt(rows.size))
    assert rows.std() == pytest.approx(200.0, rel=0.01)
    assert np.mean(np.abs(rows) < 200) == pytest.approx(0.6827, abs=0.006)
    assert abs(np.corrcoef(rows)[0, 1]) < 0.02
    assert bits(rows) == bits(craft(make_attack("gaussian"), honest, 2))
    assert bits(rows) != bits(craft(make_attack("gaussian"), honest, 2, round_number=4))


def test_sign_flip_turns_the_mean_or_each_devices_own_update_round() -> None:
    honest, own = honest_rows(0, 6, 9), honest_rows(5, 2, 9)
    expected = np.tile(-3 * honest.astype(np.float64).mean(0), (2, 1))
    np.testing.assert_allclose(craft(make_attack("sign-flip", scale=3.0), honest, 2), expected, rtol=1e-6)
    np.testing.assert_array_equal(craft(make_attack("sign-flip", of="own"), honest, 2, own), -own)


def test_ipm_makes_the_inner_product_of_the_mean_negative_from_h_over_m_on() -> None:
    honest = honest_rows(3, 8, 40)
    mu = honest.mean(0)
    for epsilon, sign in ((3.9, 1.0), (4.1, -1.0)):  # h / m = 4
        rows = craft(make_attack("ipm", epsilon=epsilon), honest, 2)
        assert np.sign(np.dot(np.concatenate([honest, rows]).mean(0), mu)) == sign
    np.testing.assert_allclose(craft(make_attack("ipm"), honest, 2)[0], -0.1 * mu, rtol=1e-5)


@pytest.mark.parametrize(
    ("n", "m", "z"),
    [(50, 24, 1.4260769), (51, 12, 0.3612016), (20, 2, 0.0), (20, 1, 0.0), (10, 5, 0.8416212), (10, 7, 0.4307273)],
    ids=["paper's n = 50", "n = 51", "half", "below half", "a tie", "a majority"],
)
def test_alie_computes_z_from_n_and_m(n: int, m: int, z: float) -> None:
    assert reference.alie_z(n, m) == pytest.approx(z, abs=1e-6)
    honest = honest_rows(n, n - m, 30)
    mu, sigma = honest.astype(np.float64).mean(0), honest.astype(np.float64).std(0)
    rows = craft(make_attack("alie"), honest, m)
    np.testing.assert_allclose(rows, np.tile(mu - z * sigma, (m, 1)), rtol=1e-5, atol=1e-5)
    fixed = craft(make_attack("alie", z=1.5), honest, m)[0]
    np.testing.assert_allclose(fixed, mu - 1.5 * sigma, rtol=1e-5, atol=1e-5)


def test_alie_with_a_single_honest_device_sends_what_it_sends() -> None:
    honest = honest_rows(0, 1, 5)
    np.testing.assert_array_equal(craft(make_attack("alie"), honest, 3), np.tile(honest, (3, 1)))


@pytest.mark.parametrize("seed", range(5))
def test_mimic_copies_the_honest_device_farthest_along_the_direction_of_greatest_variance(seed: int) -> None:
    honest = honest_rows(seed, 9, 60)
    honest[seed] += 3 * honest[(seed + 1) % 9]
    rows = craft(make_attack("mimic"), honest, 3)
    np.testing.assert_array_equal(rows, np.tile(honest[reference.most_unusual(honest)], (3, 1)))


@pytest.mark.parametrize("direction", ["mean", "unit", "std", "sign"])
@pytest.mark.parametrize("name", ["min-max", "min-sum"])
def test_min_max_and_min_sum_reach_as_far_as_the_papers_search_and_keep_the_inequality(
    name: str, direction: str
) -> None:
    honest = honest_rows(11, 12, 80)
    rows, p, mu = honest.astype(np.float64), push(honest, direction), honest.astype(np.float64).mean(0)
    gamma = (reference.min_max_gamma if name == "min-max" else reference.min_sum_gamma)(honest, direction)
    assert gamma > 0.1
    sent = craft(make_attack(name, direction=direction), honest, 2)[0].astype(np.float64)
    assert np.dot(sent - mu, p) / np.dot(p, p) == pytest.approx(gamma, rel=1e-4)
    away = ((sent - rows) ** 2).sum(1)
    between = ((rows[:, None] - rows[None]) ** 2).sum(2)
    reached, allowed = (away.max(), between.max()) if name == "min-max" else (away.sum(), between.sum(1).max())
    assert allowed * (1 - 2e-4) < reached <= allowed


def test_min_max_stays_close_to_honest_updates_that_agree_and_are_large() -> None:
    honest = (honest_rows(11, 12, 300, spread=1e-3) + np.float32(5)).astype(np.float32)
    sent = craft(make_attack("min-max"), honest, 1)[0].astype(np.float64)
    rows = honest.astype(np.float64)
    widest = max(np.linalg.norm(a - b) for a in rows for b in rows)
    assert max(np.linalg.norm(sent - row) for row in rows) == pytest.approx(widest, rel=2e-3)


@pytest.mark.parametrize(("h", "m"), [(8, 2), (14, 6), (16, 1)])
def test_fang_krum_is_the_largest_of_the_halvings_that_krum_selects(h: int, m: int) -> None:
    honest = honest_rows(h, h, 50, spread=3.0)
    rows = craft(make_attack("fang-krum"), honest, m)
    lam = reference.fang_krum_lambda(honest, m)
    assert lam > 1e-3
    np.testing.assert_allclose(np.abs(rows), lam, rtol=1e-5)
    np.testing.assert_array_equal(rows[0] < 0, honest.astype(np.float64).mean(0) > 0)
    judged = judge(make_rule("krum", m), np.concatenate([honest, disguised(K, rows)]))
    assert judged.accepted[h:].any()


def test_fang_trim_lies_beyond_every_honest_value_against_the_direction() -> None:
    honest = honest_rows(4, 8, 500)
    rows = craft(make_attack("fang-trim"), honest, 3)
    falls = honest.astype(np.float64).mean(0) <= 0
    low, high = honest.min(0), honest.max(0)
    assert np.all(rows[:, falls] >= high[falls])
    assert np.all(rows[:, ~falls] <= low[~falls])
    assert np.all(rows[:, falls] <= np.where(high > 0, 2 * high, high / 2)[falls])
    assert np.all(rows[:, ~falls] >= np.where(low > 0, low / 2, 2 * low)[~falls])
    assert bits(rows[0]) != bits(rows[1])


@pytest.mark.parametrize(("rule", "f"), [("trimmed-mean", 2), ("median", 2), ("krum", 2)])
def test_adaptive_moves_the_aggregate_at_least_as_far_as_every_factor_it_tried(rule: str, f: int) -> None:
    honest = honest_rows(9, 9, 60)
    mu = honest.astype(np.float64).mean(0)

    def moved(rows: np.ndarray) -> float:
        aggregate = judge(make_rule(rule, f), np.concatenate([honest, disguised(K, rows)])).aggregate
        return float(np.linalg.norm(aggregate - mu))

    found = moved(craft(make_attack("adaptive"), honest, 2, rule=(rule, f)))
    for direction in ("mean", "std"):
        for factor in 0.11 * 2.0 ** np.arange(12):
            row = (mu + factor * push(honest, direction)).astype(np.float32)
            assert moved(np.tile(row, (2, 1))) <= found * (1 + 1e-4)
    assert found > 1.2 * moved(craft(make_attack("none"), honest, 2, honest_rows(9, 11, 60)[9:]))


def test_adaptive_drives_a_plain_mean_to_its_largest_factor() -> None:
    honest = honest_rows(9, 9, 60)
    rows = craft(make_attack("adaptive", direction="mean"), honest, 1, rule=("mean", 0))
    np.testing.assert_allclose(rows[0], (1 - 0.11 * 2**11 * (1 + 0.5 + 0.25 + 0.125)) * honest.mean(0), rtol=1e-4)


def test_adaptive_does_not_send_zeros_where_standing_still_is_the_worst() -> None:
    """With a majority a median is the attacker's; the factor 1 along -mu, all zeros, would be screened out."""
    honest = np.tile(honest_rows(1, 1, 30), (3, 1)) * np.array([[1], [1.001], [0.999]], np.float32)
    rows = craft(make_attack("adaptive", direction="mean", doublings=4, refinements=0), honest, 4, rule=("median", 3))
    assert np.abs(rows / honest.mean(0) - (1 - 0.88)).max() < 1e-3


def fltrust_told(honest: np.ndarray, rows: np.ndarray, trusted: np.ndarray, s: np.ndarray) -> float:
    """s'g' of FLTrust's aggregate g', in float64."""
    units = np.concatenate([honest, rows]).astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    trust = np.maximum(units @ trusted / np.linalg.norm(trusted), 0)
    return float(np.linalg.norm(trusted) * (trust @ units / trust.sum()) @ s)


def knowing_fltrust(honest: np.ndarray, own: np.ndarray, trusted: np.ndarray) -> Any:
    known = reference.knowledge_of(honest, own, ("fltrust", len(own)))
    batch_with: Any = known.batch_with
    return dataclasses.replace(known, batch_with=lambda rows: batch_with(rows)._replace(trusted=trusted))


def test_the_attack_on_fltrust_takes_its_steps_on_the_rules_own_formula() -> None:
    """Algorithm 3 written out, h of FLTrust's whole aggregate for every step; the same random directions."""
    honest, rounds, steps = honest_rows(4, 9, 40), 2, 3
    trusted = (honest.mean(0) + 0.3 * honest_rows(5, 1, 40)[0]).astype(np.float32)
    known = knowing_fltrust(honest, honest_rows(6, 2, 40), trusted)
    attack: Any = make_attack("fltrust-adaptive", rounds=rounds, steps=steps, rate=0.05, start="plane")
    found = attack.craft(K, Updates(honest), 2, known)
    start = dataclasses.replace(attack, rate=0.0).craft(K, Updates(honest), 2, known)

    s = np.where(honest.mean(0) > 0, 1.0, -1.0)
    rows = start.astype(np.float64) / np.linalg.norm(trusted)
    seed, number = seed_of(K, 7, 3), 0
    for _ in range(rounds):
        for device in range(2):
            for _ in range(steps):
                u = np.sqrt(0.5) * np.where(K.random_bits(seed + number, 40) > 0, 1.0, -1.0)
                tried = rows.copy()
                tried[device] += 0.005 * u
                climb = fltrust_told(honest, rows, trusted, s) - fltrust_told(honest, tried, trusted, s)
                rows[device] += 0.05 * climb / 0.005 * u
                rows[device] /= np.linalg.norm(rows[device])
                number += 1
    assert np.abs(found - start).max() > 0.05 * np.abs(start).max()
    np.testing.assert_allclose(found, rows * np.linalg.norm(trusted), atol=1e-3 * np.abs(found).max())


def test_the_attack_on_fltrust_finds_the_worst_unit_vector_for_it() -> None:
    """Against a search by gradients over all unit vectors, every attacker sending the same."""
    honest = honest_rows(4, 18, 30)
    trusted = (honest.mean(0) + 0.5 * honest_rows(5, 1, 30)[0]).astype(np.float32)
    s = np.where(honest.mean(0) > 0, 1.0, -1.0)
    attack = make_attack("fltrust-adaptive", start="plane", rate=0.0, rounds=1, steps=1)
    rows = attack.craft(K, Updates(honest), 4, knowing_fltrust(honest, honest[:4], trusted))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), np.linalg.norm(trusted), rtol=1e-5)
    found = fltrust_told(honest, rows, trusted, s)
    searched = minimize(lambda e: fltrust_told(honest, np.tile(e, (4, 1)), trusted, s), rows[0] + 0.3 * trusted)
    nothing = fltrust_told(honest, -np.tile(trusted, (4, 1)), trusted, s)
    assert found < nothing - 1.0
    assert found == pytest.approx(searched.fun, abs=0.01 * abs(nothing - found))


def test_from_the_trim_attack_no_step_is_taken_where_it_points_away_from_the_trusted_update() -> None:
    honest = honest_rows(4, 18, 300)
    known = knowing_fltrust(honest, honest[:4], honest.mean(0))
    rows = make_attack("fltrust-adaptive").craft(K, Updates(honest), 4, known)
    start = craft(make_attack("fang-trim"), honest, 4)
    ratio = np.linalg.norm(honest.mean(0)) / np.linalg.norm(start, axis=1, keepdims=True)
    np.testing.assert_allclose(rows, start * ratio, rtol=1e-5)


def test_label_flip_reverses_the_labels_and_nothing_else() -> None:
    x, y = np.random.default_rng(0).random((20, 8, 8, 1), np.float32), np.arange(20, dtype=np.int32) % 10
    new_x, new_y = make_attack("label-flip").poison(x, y, SETTING, np.random.default_rng(1))
    np.testing.assert_array_equal(new_y, 9 - y)
    np.testing.assert_array_equal(new_x, x)


def test_the_backdoor_stamps_its_share_of_examples_and_scales_the_update_to_replace_a_mean() -> None:
    attack: Any = make_attack("scaling-backdoor", target=3, poisoned_share=0.25)
    x, y = np.zeros((20, 8, 8, 1), np.float32), np.arange(20, dtype=np.int32) % 3
    new_x, new_y = attack.poison(x, y, SETTING, np.random.default_rng(1))
    stamped = new_x.reshape(20, -1).any(1)
    assert stamped.sum() == 5
    np.testing.assert_array_equal(new_y == 3, stamped)
    assert new_x[stamped][0, -2:, -2:].min() == 1.0
    assert new_x.sum() == 5 * 4
    assert not x.any()
    np.testing.assert_array_equal(attack.triggered(np.zeros((1, 5), np.float32), SETTING), [[0, 0, 0, 1, 1]])
    honest, own = honest_rows(0, 8, 5), honest_rows(1, 2, 5)
    np.testing.assert_allclose(craft(attack, honest, 2, own), 5 * own, rtol=1e-6)
    with pytest.raises(ConfigError, match="10 classes"):
        make_attack("scaling-backdoor", target=10).poison(x, y, SETTING, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["nan", "zero"])
def test_screening_takes_out_what_is_not_a_number_or_nothing(name: str) -> None:
    honest = honest_rows(0, 6, 30)
    rows = disguised(K, craft(make_attack(name), honest, 2))
    screened = screen_updates(np.concatenate([honest, rows]), [1] * 8, list("abcdefgh"), 30)
    assert sorted(screened.reasons) == ["g", "h"]


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in ("nan", "zero")])
def test_disguised_attacks_are_no_copies_and_hardly_changed(name: str) -> None:
    honest = honest_rows(0, 8, 30)
    rows = craft(make_attack(name), honest, 2, honest_rows(1, 2, 30))
    hidden = disguised(K, rows)
    np.testing.assert_allclose(hidden, rows, rtol=1e-4)
    assert not screen_updates(np.concatenate([honest, hidden]), [1] * 10, list("abcdefghij"), 30).reasons


# ---- a rule under attack


@pytest.mark.parametrize("name", ["none", "zero", "alie", "adaptive"])
def test_a_rule_under_attack_gives_the_same_bits_in_both_kernels_and_sees_what_the_attack_sends(name: str) -> None:
    updates = honest_rows(3, 9, 700)
    inner = make_rule("trimmed-mean", 2)
    rule = Attacked(make_attack(name), (1, 6), inner, seed=7)
    found, traced = judge(rule, updates), judge_in_tensorflow(rule, updates)
    assert bits(found.aggregate) == bits(traced.aggregate)
    assert bits(found.scores) == bits(traced.scores)
    honest = np.delete(updates, (1, 6), axis=0)
    expected = updates.copy()
    expected[[1, 6]] = disguised(K, craft(make_attack(name), honest, 2, updates[[1, 6]], round_number=0))
    if name != "adaptive":  # it searches on the batch in its true order, the reference in another
        assert bits(found.aggregate) == bits(judge(inner, expected).aggregate)


@pytest.mark.usefixtures("on_worker")
@pytest.mark.parametrize(
    "name",
    [
        "gaussian",
        "min-max",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("fang-krum", "fang-trim", "mimic", "adaptive")),
    ],
)
def test_a_tff_aggregator_under_attack_gives_the_same_bits(name: str) -> None:
    rule = Attacked(make_attack(name), (0, 4), make_rule("multi-krum", 2))
    process = RuleFactory(rule).create(tff.TensorType(np.float32, [4097]), tff.TensorType(np.float32))
    updates = honest_rows(5, 9, 4097)
    state = process.initialize()
    output = process.next(state, list(updates), [1.0] * 9)
    assert bits(output.result) == bits(judge(rule, updates).aggregate)
    assert (
        bits(process.next(output.state, list(updates), [1.0] * 9).result) == bits(output.result) or name == "gaussian"
    )


def test_a_rule_under_attack_refuses_what_its_inner_rule_refuses_and_attacks_that_are_not_finite() -> None:
    rule = Attacked(make_attack("ipm"), (0,), make_rule("krum", 2))
    with pytest.raises(RuleError, match="krum"):
        rule.check(6)
    with pytest.raises(RuleError, match="honest"):
        Attacked(make_attack("ipm"), (0, 1), make_rule("mean")).check(2)
    with pytest.raises(ConfigError, match="not finite"):
        Attacked(make_attack("nan"), (0,), make_rule("mean"))
    with pytest.raises(ConfigError, match="twice"):
        Attacked(make_attack("ipm"), (0, 0), make_rule("mean"))


def test_a_corrupted_device_that_is_away_is_not_replaced() -> None:
    updates = honest_rows(3, 5, 40)
    for name in ("fang-krum", "min-max", "gaussian", "alie"):
        away = judge(Attacked(make_attack(name), (17,), make_rule("median", 1)), updates)
        assert bits(away.aggregate) == bits(judge(make_rule("median", 1), updates).aggregate)


def test_every_setting_of_every_attack_has_a_default() -> None:
    for name, kind in ATTACKS.items():
        assert set(settings_of(kind)) == {field.name for field in dataclasses.fields(kind)}
        make_attack(name)


def test_numbers_of_python_keep_all_their_bits_in_the_reference_kernels() -> None:
    k = TensorFlowKernels()
    exact = K.divide(0.1, 1.0)
    assert exact == 0.1
    assert k.full((), 0.1).numpy() == exact
    assert k.divide(0.1, 1.0).numpy() == exact
    assert k.real(0.1).numpy() == exact
    assert k.minimum(k.full((), 1.0), 0.1).numpy() == exact
    assert k.where(k.full((), True), 0.1, k.full((), 1.0)).numpy() == exact
