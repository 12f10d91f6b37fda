"""Updates in fewer bytes: what the forms promise, and that no bytes of a device break the decoder."""

from __future__ import annotations

import importlib.util
import json
import struct
import tracemalloc
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_protocol.compression import MAX_SCALE, _hadamard, decode, encode
from covey_protocol.errors import ConfigError, PeerError, UsageError
from covey_protocol.forms import (
    BLOCK,
    COMPRESSIONS,
    WITHHOLDING,
    Compression,
    block_sizes,
    compression_of,
    update_sizes,
)
from covey_protocol.messages import TrainingPlan

GOLDEN = Path(__file__).parent.parent / "golden"
STORED = json.loads((GOLDEN / "compression-v1.json").read_text())
ROTATED_8, ROTATED_4 = Compression("rotated-8bit"), Compression("rotated-4bit")
FORMS = (Compression(), ROTATED_8, ROTATED_4, Compression("top-k", 0.1), Compression("top-k-8bit", 0.1))
SIZES = (1, 2, 63, 64, 65, 127, 3818, BLOCK, BLOCK + 1, 3 * BLOCK + 1000, 70_000)


def normal(d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(d).astype(np.float32)


def squared_error(decoded: np.ndarray, update: np.ndarray) -> float:
    return float(np.square(decoded.astype(np.float64) - update).sum() / np.square(update.astype(np.float64)).sum())


# --- the bytes


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_compression", GOLDEN / "generate_compression.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(STORED["vectors"]))
def test_todays_code_still_makes_the_stored_bytes(name: str) -> None:
    assert generator().vectors()[name] == STORED["vectors"][name]


def test_every_form_has_a_golden_vector() -> None:
    assert {vector["compression"] for vector in STORED["vectors"].values()} == set(COMPRESSIONS)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("d", SIZES)
def test_what_is_encoded_has_an_announced_size_and_decodes(form: Compression, d: int) -> None:
    data = encode(normal(d), form, b"seed")
    least, most = update_sizes(form, d)
    assert least <= len(data) <= most
    decoded = decode(data, form, b"seed", d)
    assert decoded.shape == (d,)
    assert decoded.dtype == np.float32
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize("d", [10_000, 100_003, 1_000_000])
def test_eight_bits_are_d_bytes_and_four_bits_half_of_them(d: int) -> None:
    assert update_sizes(ROTATED_8, d)[1] == pytest.approx(d, rel=0.012)
    assert update_sizes(ROTATED_4, d)[1] == pytest.approx(d / 2, rel=0.012)


def test_blocks_waste_fewer_than_64_numbers_and_are_powers_of_two() -> None:
    for d in range(1, 3 * BLOCK):
        sizes = block_sizes(d)
        assert d <= sum(sizes) < d + 64
        assert all(size & (size - 1) == 0 and 64 <= size <= BLOCK for size in sizes)
        assert len(sizes) <= d // BLOCK + 7


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others() -> None:
    update = normal(1000)
    for form in (ROTATED_8, ROTATED_4, Compression("top-k-8bit", 0.1)):
        assert encode(update, form, b"a") == encode(update, form, b"a")
        assert encode(update, form, b"a") != encode(update, form, b"b")


def test_float32_is_what_it_always_was() -> None:
    update = normal(1000)
    assert encode(update, Compression(), b"") == update.astype("<f4").tobytes()
    np.testing.assert_array_equal(decode(encode(update, Compression(), b""), Compression(), b"", 1000), update)


# --- rotation and quantisation


@pytest.mark.parametrize("size", [64, 128, 2048, BLOCK])
def test_the_fast_transform_is_the_hadamard_matrix(size: int) -> None:
    i = np.arange(size, dtype=np.uint64)
    ones = np.array([bin(value).count("1") for value in range(size)], np.uint64)
    matrix = 1.0 - 2.0 * (ones[np.bitwise_and.outer(i, i)] & np.uint64(1))  # (-1)^popcount(i & j)
    update = normal(2 * size if size == BLOCK else size)
    expected = (update.reshape(-1, size).astype(np.float64) @ matrix / np.sqrt(size)).reshape(-1)
    _hadamard(update, np.array([size] * (len(update) // size)))
    np.testing.assert_allclose(update, expected, atol=2e-5)


@pytest.mark.parametrize("form", [ROTATED_8, ROTATED_4], ids=lambda form: form.name)
def test_the_mean_over_seeds_is_the_update(form: Compression) -> None:
    """The mean of n draws errs by 1 / n of one draw's squared error: held within 1.2 of that."""
    d, draws = 1000, 400
    update = normal(d) * np.linspace(0.001, 3.0, d).astype(np.float32)
    decoded = [decode(encode(update, form, b"%d" % n), form, b"%d" % n, d) for n in range(draws)]
    one = np.mean([squared_error(each, update) for each in decoded])
    assert squared_error(np.mean(np.array(decoded, np.float64), axis=0), update) < 1.2 * one / draws


@pytest.mark.parametrize(("form", "levels"), [(ROTATED_8, 255), (ROTATED_4, 15)])
def test_the_error_is_below_its_bound(form: Compression, levels: int) -> None:
    """A number rounded at random between neighbours a step apart errs by at most step^2 / 4 in the mean; the scale is
    at most the block's norm. Whatever the input, in float32: 1.001."""
    d = 4 * BLOCK + 200
    spike = np.zeros(d, np.float32)
    spike[17] = 5.0
    for update in (normal(d), spike, np.ones(d, np.float32), normal(d) ** 9):
        data = encode(update, form, b"seed")
        scales = np.frombuffer(data, "<f4", len(block_sizes(d)), 1).astype(np.float64)
        bound = np.sum(np.array(block_sizes(d)) * (2 * scales / levels) ** 2 / 4)
        mean = np.mean(
            [
                np.square(decode(encode(update, form, seed), form, seed, d).astype(np.float64) - update).sum()
                for seed in (b"1", b"2", b"3", b"4")
            ]
        )
        assert mean < 1.2 * bound


def test_rotation_makes_one_large_number_as_cheap_as_many_equal_ones() -> None:
    """Without it, one spike sets the step for all small numbers beside it."""
    update = normal(BLOCK) * np.float32(0.01)
    update[5] = 10.0
    small = np.delete(np.arange(BLOCK), 5)
    decoded = decode(encode(update, ROTATED_4, b"s"), ROTATED_4, b"s", BLOCK)
    step = 2 * 10.0 / 15  # of 4 bits between -10 and 10
    assert np.abs(decoded - update)[small].std() < step / 10


def test_zeros_stay_zeros_and_one_scale_serves_one_block() -> None:
    assert not decode(encode(np.zeros(500, np.float32), ROTATED_4, b"s"), ROTATED_4, b"s", 500).any()
    update = np.concatenate([np.full(BLOCK, 1e-6, np.float32), np.full(BLOCK, 1e6, np.float32)])
    decoded = decode(encode(update, ROTATED_8, b"s"), ROTATED_8, b"s", len(update))
    assert np.abs(decoded[:BLOCK] - 1e-6).max() < 1e-7


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e35])
@pytest.mark.parametrize("form", FORMS[1:], ids=lambda form: form.name)
def test_what_has_no_place_on_a_scale_is_refused(value: float, form: Compression) -> None:
    update = normal(100)
    update[7] = value
    with pytest.raises(UsageError, match="cannot be compressed"):
        encode(update, form, b"s")


def test_the_largest_scale_decodes_to_finite_numbers() -> None:
    data = bytes([0x11]) + struct.pack("<f", MAX_SCALE) + bytes([255] * BLOCK)
    decoded = decode(data, ROTATED_8, b"s", BLOCK)
    assert np.isfinite(decoded).all()
    assert np.abs(decoded).max() > 1e30


# --- top-k


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.2, 0.9, 1.0])
def test_top_k_keeps_the_largest_exactly_and_nothing_else(fraction: float) -> None:
    update, form = normal(5000), Compression("top-k", fraction)
    decoded = decode(encode(update, form, b""), form, b"", 5000)
    kept = np.flatnonzero(decoded)
    assert len(kept) == int(fraction * 5000)
    np.testing.assert_array_equal(decoded[kept], update[kept])
    left_out = np.delete(np.abs(update), kept)
    assert left_out.size == 0 or left_out.max() <= np.abs(update[kept]).min()


def test_of_equal_numbers_the_first_are_kept() -> None:
    form = Compression("top-k", 0.25)
    decoded = decode(encode(np.ones(8, np.float32), form, b""), form, b"", 8)
    np.testing.assert_array_equal(decoded, [1, 1, 0, 0, 0, 0, 0, 0])


def test_indices_travel_in_the_shorter_form() -> None:
    few, many = Compression("top-k", 0.01), Compression("top-k", 0.5)
    assert encode(normal(5000), few, b"")[0] == 0x22
    assert encode(normal(5000), many, b"")[0] == 0x21


def test_far_indices_need_long_varints() -> None:
    update = np.zeros(300_000, np.float32)
    update[[0, 299_999]] = (1.0, -2.0)
    form = Compression("top-k", 2 / 300_000)
    data = encode(update, form, b"")
    assert data[1:5] == bytes([0x00, 0xDE, 0xA7, 0x12])  # 0 left out before the first, 299,998 before the second
    np.testing.assert_array_equal(decode(data, form, b"", 300_000), update)


def test_eight_bit_values_err_by_less_than_a_step() -> None:
    update, form = normal(20_000), Compression("top-k-8bit", 0.5)
    decoded = decode(encode(update, form, b"s"), form, b"s", 20_000)
    kept = np.flatnonzero(decoded)
    assert np.abs(decoded - update)[kept].max() < 2 * np.abs(update).max() / 255 * 1.001


# --- hostile bytes


def varints(*values: int) -> bytes:
    out = bytearray()
    for value in values:
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return bytes(out)


TEN_OF_100 = Compression("top-k", 0.1)
VALUES = struct.pack("<10f", *range(1, 11))
HOSTILE = {
    "a foreign first byte": (ROTATED_8, bytes([0x12]) + struct.pack("<2f", 1, 1) + bytes(128), "starts with 0x12"),
    "one byte too few": (ROTATED_8, bytes([0x11]) + struct.pack("<2f", 1, 1) + bytes(127), "bytes; rotated-8bit"),
    "one byte too many": (ROTATED_8, bytes([0x11]) + struct.pack("<2f", 1, 1) + bytes(129), "bytes; rotated-8bit"),
    "a scale that is not a number": (ROTATED_8, bytes([0x11]) + struct.pack("<2f", 1, np.nan) + bytes(128), "scale"),
    "a negative scale": (ROTATED_8, bytes([0x11]) + struct.pack("<2f", -1, 1) + bytes(128), "scale"),
    "an infinite scale": (ROTATED_8, bytes([0x11]) + struct.pack("<2f", np.inf, 1) + bytes(128), "scale"),
    "a scale that overflows": (ROTATED_8, bytes([0x11]) + struct.pack("<2f", 3e38, 1) + bytes(128), "scale"),
    "nothing": (ROTATED_8, b"", "0 bytes"),
    "a bitmap of too few": (TEN_OF_100, bytes([0x21, 0xFF]) + bytes(12) + VALUES, "bitmap does not name"),
    "a bitmap beyond d": (TEN_OF_100, bytes([0x21, 0xFF, 0x01]) + bytes(10) + b"\x80" + VALUES, "bitmap does not name"),
    "a short bitmap": (TEN_OF_100, bytes([0x21, 0xFF, 0x03]) + bytes(10) + VALUES, "bitmap does not name"),
    "indices beyond d": (TEN_OF_100, b"\x22" + varints(*[9] * 9, 10) + VALUES, "beyond its 100"),
    "a gap beyond d": (TEN_OF_100, b"\x22" + varints(*[0] * 9, 2**14) + VALUES, "beyond its 100"),
    "an endless varint": (TEN_OF_100, b"\x22" + b"\x80" * 12 + VALUES, "are not 10 varints"),
    "a cut varint": (TEN_OF_100, b"\x22" + varints(*[0] * 10) + b"\x80" + VALUES, "are not 10 varints"),
    "too few indices": (TEN_OF_100, b"\x22" + varints(*[0] * 8, 200) + VALUES, "are not 10 varints"),
    "a long varint": (TEN_OF_100, b"\x22" + varints(*[0] * 9) + b"\x81\x80\x00" + VALUES, "shortest form"),
    "a scale of top-k": (
        Compression("top-k-8bit", 0.1),
        b"\x24" + varints(*[0] * 10) + struct.pack("<f", np.nan) + bytes(10),
        "scale",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_bytes_are_refused_with_a_reason(what: str) -> None:
    form, data, words = HOSTILE[what]
    with pytest.raises(PeerError, match=words):
        decode(data, form, b"s", 100)


def test_a_varint_of_six_bytes_is_refused() -> None:
    form = Compression("top-k", 0.1)
    data = b"\x22" + bytes(9) + b"\x81\x80\x80\x80\x80\x01" + VALUES
    with pytest.raises(PeerError, match=r"bytes; top-k|shortest form"):
        decode(data, form, b"s", 1000 // 10)
    thousand = Compression("top-k", 0.01)
    with pytest.raises(PeerError, match="shortest form"):
        decode(data, thousand, b"s", 1000)


def test_gaps_that_would_wrap_around_64_bits_are_refused() -> None:
    d = 100_000
    form = Compression("top-k", 0.01)
    data = b"\x22" + b"\xff\xff\xff\xff\x7f" * 1000 + bytes(4000)
    with pytest.raises(PeerError, match="beyond"):
        decode(data, form, b"s", d)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.integers(1, 400),
    st.sampled_from([None, 0x11, 0x12, 0x21, 0x22, 0x23, 0x24]),
    st.data(),
)
def test_any_bytes_are_an_update_or_a_peer_error(
    form: Compression, d: int, first: int | None, data: st.DataObject
) -> None:
    least, most = update_sizes(form, d)
    body = data.draw(st.binary(min_size=max(0, least - 1), max_size=most + 1))
    if first is not None:
        body = bytes([first]) + body[1:]
    try:
        decoded = decode(body, form, b"s", d)
    except PeerError:
        return
    assert decoded.shape == (d,)
    assert decoded.dtype == np.float32


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FORMS[1:]), st.integers(1, 400), st.integers(0, 2**31), st.data())
def test_any_change_of_good_bytes_is_an_update_or_a_peer_error(
    form: Compression, d: int, seed: int, data: st.DataObject
) -> None:
    good = bytearray(encode(normal(d, seed), form, b"s"))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode(bytes(good), form, b"s", d).shape == (d,)
    except PeerError:
        return


@pytest.mark.parametrize("form", FORMS[1:], ids=lambda form: form.name)
def test_memory_is_a_few_times_the_update(form: Compression) -> None:
    d = 500_000
    data = encode(normal(d), form, b"s")
    tracemalloc.start()
    decode(data, form, b"s", d)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * 4 * d


# --- what a plan may ask for


@pytest.mark.parametrize("name", ["none", *COMPRESSIONS])
def test_a_fraction_goes_with_top_k_and_with_nothing_else(name: str) -> None:
    def plan(fraction: float) -> TrainingPlan:
        return TrainingPlan(epochs=1, learning_rate=0.1, compression=name, kept_fraction=fraction)

    right, wrong = (0.1, 0.0) if name in WITHHOLDING else (0.0, 0.1)
    assert compression_of(plan(right)) == Compression(name, right)
    with pytest.raises(ConfigError, match="kept_fraction"):
        compression_of(plan(wrong))


def test_an_unknown_form_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'rotated-8bit'"):
        compression_of(TrainingPlan(epochs=1, learning_rate=0.1, compression="rotated-8bits"))
