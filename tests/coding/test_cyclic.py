"""The cyclic code: for any s liars the sum is the attack-free one, to 1e-9; more are refused where it can be known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_coordinator.coding.cyclic import TOLERANCE, decode
from covey_protocol.coding import CyclicCode
from covey_protocol.errors import ConfigError, RuleError, UsageError

SIZES = [(3, 1), (5, 2), (7, 2), (15, 3), (16, 2), (25, 5), (44, 5), (45, 5)]
Lie = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
LIES: dict[str, Lie] = {
    "reversed gradients": lambda rows, liar, draw: -100 * rows[liar],
    "a constant": lambda rows, liar, draw: np.full_like(rows[liar], -100),
    "zeros": lambda rows, liar, draw: np.zeros_like(rows[liar]),
    "a neighbour's row": lambda rows, liar, draw: rows[(liar + 1) % len(rows)],
    "all the same added": lambda rows, liar, draw: rows[liar] + 7.0,
    "one number": lambda rows, liar, draw: rows[liar] + (np.arange(rows.shape[1]) == 3),
    "a little noise": lambda rows, liar, draw: rows[liar] + 1e-6 * draw.standard_normal(rows.shape[1]),
    "noise of any size": lambda rows, liar, draw: (
        rows[liar] + 10.0 ** draw.integers(-8, 12) * draw.standard_normal(rows.shape[1])
    ),
    "not a number": lambda rows, liar, draw: np.full_like(rows[liar], np.nan),
    "numbers too large to square": lambda rows, liar, draw: 1e200 * rows[liar],
    "numbers of another world": lambda rows, liar, draw: 1e80 * rows[liar],
    "infinity": lambda rows, liar, draw: np.full_like(rows[liar], np.inf),
}


def coded(code: CyclicCode, seed: int, d: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """(n, d) rows of the devices, and (d,) the sum over the shards."""
    shards = np.random.default_rng(seed).standard_normal((code.n, d))
    return np.stack([code.encode(shards[code.shards(device)]) for device in range(code.n)]), shards.sum(axis=0)


def error(found: np.ndarray, total: np.ndarray) -> float:
    return float(np.linalg.norm(found - total) / np.linalg.norm(total))


def chosen(code: CyclicCode, seed: int, count: int) -> list[int]:
    """Anywhere, or side by side, which is where the others say least about them."""
    draw = np.random.default_rng(seed)
    if seed % 2:
        return sorted(draw.permutation(code.n)[:count].tolist())
    return sorted((int(draw.integers(code.n)) + place) % code.n for place in range(count))


@pytest.mark.parametrize("size", SIZES)
def test_honest_rows_hold_no_other_frequencies_and_the_middle_one_is_the_sum(size: tuple[int, int]) -> None:
    code = CyclicCode(*size)
    rows, total = coded(code, seed=0)
    spectrum = np.fft.fft(rows, axis=0) / code.n
    silent = sorted(set(range(code.n)) - {int(k) % code.n for k in code.frequencies})
    assert len(silent) == 2 * code.s
    assert np.abs(spectrum[silent]).max() < 1e-14 * np.abs(rows).max()
    np.testing.assert_allclose(spectrum[0], total, rtol=0, atol=1e-13 * np.abs(rows).max())
    assert np.isrealobj(rows) == (code.n % 2 == 1)
    assert abs(code.coefficients.sum() - code.n) < 1e-12
    assert np.abs(code.coefficients).max() < 11


def test_each_shard_is_held_by_2s_and_1_neighbours() -> None:
    code = CyclicCode(7, 2)
    assert code.shards(5) == [5, 6, 0, 1, 2]
    held = [shard for device in range(7) for shard in code.shards(device)]
    assert sorted(held) == sorted(list(range(7)) * 5)


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("size", [size for size in SIZES if size[1] > 0])
def test_up_to_s_liars_do_not_move_the_sum(size: tuple[int, int], lie: str) -> None:
    code = CyclicCode(*size)
    rows, total = coded(code, seed=1)
    for seed in range(4):
        liars, draw = chosen(code, seed, 1 + seed % code.s if seed < 2 else code.s), np.random.default_rng(seed)
        sent = rows.copy()
        for liar in liars:
            sent[liar] = LIES[lie](rows, liar, draw)
        found = decode(code, sent, draw)
        assert error(found.total, total) < 1e-9
        if lie not in ("noise of any size", "a neighbour's row"):  # which can be as small as rounding, and equal
            assert found.liars == tuple(liars)


def test_without_liars_nobody_is_named_and_the_sum_is_right_to_rounding() -> None:
    for size in SIZES:
        rows, total = coded(CyclicCode(*size), seed=2)
        found = decode(CyclicCode(*size), rows, np.random.default_rng(0))
        assert found.liars == ()
        assert error(found.total, total) < 1e-14
        assert found.misfit < TOLERANCE / 2


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from([(7, 2), (15, 3), (25, 5), (44, 5), (45, 5)]), st.floats(-11, 12))
def test_colluding_liars_of_any_size_move_the_sum_by_at_most_a_billionth(
    seed: int, size: tuple[int, int], power: float
) -> None:
    """Side by side, and all their lies lie along the direction that the others see least."""
    code = CyclicCode(*size)
    rows, total = coded(code, seed, d=20)
    liars = [(seed + place) % code.n for place in range(code.s)]
    waves = np.exp(2j * np.pi * np.outer(range(code.n), code.frequencies) / code.n)
    blind = np.eye(code.n) - waves @ np.linalg.pinv(waves)
    least = np.linalg.svd(blind[:, liars])[2][-1].conj()
    lie = 10.0**power * least[:, None] * np.random.default_rng(seed).standard_normal(20)
    sent = rows.copy()
    sent[liars] += lie if np.iscomplexobj(rows) else lie.real
    assert error(decode(code, sent, np.random.default_rng(seed)).total, total) < 1e-9


def test_rows_that_are_mostly_rounding_are_refused_until_told_to_bear_it() -> None:
    """With n = 2s + 1 a row is the sum itself; of shards that cancel, devices that add in another order differ."""
    code = CyclicCode(5, 2)
    shards = np.random.default_rng(0).standard_normal((5, 60))
    shards -= shards.mean(axis=0) * (1 - 1e-4)
    rows = np.stack([code.encode(shards[code.shards(device)]) for device in range(5)])
    with pytest.raises(RuleError, match="or raise tolerance"):
        decode(code, rows, np.random.default_rng(0))
    found = decode(code, rows, np.random.default_rng(0), tolerance=1e-10)
    assert error(found.total, shards.sum(axis=0)) < 1e-9


def test_a_lie_that_is_large_enough_is_located_and_a_smaller_one_does_not_matter() -> None:
    code = CyclicCode(45, 5)
    rows, total = coded(code, seed=3)
    for power in range(-16, 0):
        sent = rows.copy()
        sent[7] += 10.0**power * np.random.default_rng(power + 16).standard_normal(rows.shape[1]) * np.abs(rows).max()
        found = decode(code, sent, np.random.default_rng(0))
        assert error(found.total, total) < 1e-12
        if power not in (-14, -13):  # the border
            assert found.liars == ((7,) if power > -13 else ())


def test_more_than_s_liars_are_refused() -> None:
    for size in [(7, 2), (15, 3), (25, 5)]:
        code = CyclicCode(*size)
        rows, _ = coded(code, seed=4)
        for count in (code.s + 1, 2 * code.s):
            draw = np.random.default_rng(count)
            sent = rows.copy()
            sent[draw.permutation(code.n)[:count]] += draw.standard_normal((count, rows.shape[1]))
            with pytest.raises(RuleError, match=f"not within {code.s} lies of a codeword"):
                decode(code, sent, draw)


def test_s_and_one_holders_of_a_shard_that_agree_on_another_value_cannot_be_known() -> None:
    """The rows are those of another shard but for s, as few as liars would be: the honest holders are named."""
    code = CyclicCode(7, 2)
    rows, total = coded(code, seed=5)
    wrong = np.random.default_rng(6).standard_normal(rows.shape[1])
    holders = [device for device in range(7) if 4 in code.shards(device)]
    sent = rows.copy()
    for liar in holders[: code.s + 1]:
        sent[liar] += code.coefficients[code.shards(liar).index(4)] * wrong
    found = decode(code, sent, np.random.default_rng(0))
    assert found.liars == tuple(holders[code.s + 1 :])
    assert error(found.total, total + wrong) < 1e-9 < error(found.total, total)


def test_a_missing_row_costs_half_a_liar() -> None:
    code = CyclicCode(15, 3)
    rows, total = coded(code, seed=7)
    sent = rows.copy()
    sent[[2, 9]] = np.nan
    sent[[4, 5]] *= 3
    found = decode(code, sent, np.random.default_rng(0), missing={2, 9})
    assert found.liars == (4, 5)
    assert error(found.total, total) < 1e-9
    sent[6] *= 3
    with pytest.raises(RuleError, match="2 rows are missing or not finite"):
        decode(code, sent, np.random.default_rng(0), missing={2, 9})


def test_rows_in_float32_need_a_tolerance_and_cost_digits() -> None:
    """What docs/coded-redundancy.md says of a wire of float32: what it costs."""
    code = CyclicCode(15, 3)
    rows, total = coded(code, seed=8)
    sent = rows.astype(np.float32).astype(np.float64)
    with pytest.raises(RuleError, match="honest ones do not compute the same"):
        decode(code, sent, np.random.default_rng(0))
    sent[[3, 4, 5]] *= -100
    found = decode(code, sent, np.random.default_rng(0), tolerance=1e-6)
    assert found.liars == (3, 4, 5)
    assert 1e-9 < error(found.total, total) < 1e-5


def test_what_is_no_code_is_refused() -> None:
    with pytest.raises(ConfigError, match="take at least 5 devices"):
        CyclicCode(4, 2)
    with pytest.raises(ConfigError, match="3 vectors for a code of 5"):
        CyclicCode(7, 2).encode(np.zeros((3, 4)))
    with pytest.raises(UsageError, match="for a code of 7 devices"):
        decode(CyclicCode(7, 2), np.zeros((6, 4)), np.random.default_rng(0))
