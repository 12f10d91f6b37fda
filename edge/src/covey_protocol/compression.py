"""Updates in fewer bytes: quantised after a random rotation, or only their largest numbers.

docs/protocol.md, section 8.1, specifies every form byte for byte. Pure numpy: arrays and bytes in and out, no I/O.

Sources: rotation and stochastic quantisation, Suresh et al. 2017 (arXiv:1611.00429), section 3, and Konecny et al. 2016
(arXiv:1610.05492); there one pair of bounds per update, here one symmetric bound per block of at most 4096. Top-k with
what was left out kept for later: Stich et al. 2018 (arXiv:1809.07599) and Karimireddy et al. 2019 (arXiv:1901.09847);
who keeps what was left out is not this file's matter (see `covey_edge.trainer`).

Decoding trusts nothing: any bytes give an array or a PeerError, in memory of a few times 4 d bytes. The same bytes
decode to the same bits everywhere: only sums, differences and products in a fixed order, no library's matrix product.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_protocol.errors import PeerError, UsageError
from covey_protocol.forms import (
    BLOCK,
    FLOAT64,
    LARGEST_VARINT,
    NONE,
    ROTATED_4BIT,
    ROTATED_8BIT,
    TOP_K,
    TOP_K_8BIT,
    Compression,
    bits,
    block_sizes,
    compression_of,
    update_seed,
    update_sizes,
    value_bytes,
)
from covey_protocol.messages import TrainingPlan

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[Any]  # float32, or float64 in the form FLOAT64
Codes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

MAX_SCALE = 2.0**100  # above any update that screening takes (norm 1e18); sums of a block stay finite in float32
ROTATED_CODES = {ROTATED_8BIT: 0x11, ROTATED_4BIT: 0x12}  # the first byte
BITMAP = {TOP_K: 0x21, TOP_K_8BIT: 0x23}
GAPS = {TOP_K: 0x22, TOP_K_8BIT: 0x24}
GROUP = 1 << 16  # numbers rotated in one go: they stay in a cache


def encode(update: Numbers, compression: Compression, seed: bytes) -> bytes:
    """The update (d,) in this form. UsageError where it is to be compressed and its norm is not at most MAX_SCALE.

    The same arguments give the same bytes. Over seeds, the rotated forms are unbiased: the mean of what they decode to
    is the update, up to float32 rounding. Top-k is biased: it leaves out the smaller numbers.
    """
    if compression.name == FLOAT64:
        return np.asarray(update, "<f8").tobytes()
    values = np.asarray(update, np.float32)
    if compression.name == NONE:
        return values.astype("<f4").tobytes()
    norm = float(np.linalg.norm(values.astype(np.float64)))
    if not norm <= MAX_SCALE:
        raise UsageError(f"an update of norm {norm:g} cannot be compressed", "lower the learning rate, or clip")
    if compression.name in ROTATED_CODES:
        return _encode_rotated(values, compression.name, seed)
    return _encode_top(values, compression, seed)


def decode(data: bytes, compression: Compression, seed: bytes, d: int) -> Numbers:
    """The update (d,) that these bytes stand for. PeerError where they are none of this form.

    Quantised forms decode to finite numbers; plain ones to whatever float32 or float64 was sent.
    """
    least, most = update_sizes(compression, d)
    if not least <= len(data) <= most:
        raise PeerError(f"the update has {len(data)} bytes; {compression.name} of {d} numbers has {least} to {most}")
    if compression.name == NONE:
        return np.frombuffer(data, "<f4").astype(np.float32, copy=False)
    if compression.name == FLOAT64:
        return np.frombuffer(data, "<f8").astype(np.float64, copy=False)
    if compression.name in ROTATED_CODES:
        return _decode_rotated(data, compression.name, seed, d)
    return _decode_top(data, compression, d)


def decode_update(data: bytes, plan: TrainingPlan, round_id: str, device_id: str, d: int) -> Numbers:
    """What a device sent for a round of this plan. PeerError where it is malformed."""
    return decode(data, compression_of(plan), update_seed(round_id, device_id), d)


# --- rotated forms: [code] [a scale per block, float32] [codes]


def _encode_rotated(values: Floats, name: str, seed: bytes) -> bytes:
    sizes = np.array(block_sizes(len(values)))
    rotated = np.zeros(int(sizes.sum()), np.float32)
    rotated[: len(values)] = values
    rotated *= _signs(seed, len(rotated))
    _hadamard(rotated, sizes)
    scales, codes = _quantised(rotated, sizes, bits(name), seed)
    return bytes([ROTATED_CODES[name]]) + scales.astype("<f4").tobytes() + _packed(codes, bits(name))


def _decode_rotated(data: bytes, name: str, seed: bytes, d: int) -> Floats:
    if data[0] != ROTATED_CODES[name]:
        raise PeerError(f"the update starts with {data[0]:#04x}, {name} with {ROTATED_CODES[name]:#04x}")
    sizes = np.array(block_sizes(d))
    scales = _checked_scales(np.frombuffer(data, "<f4", len(sizes), 1))
    packed = np.frombuffer(data, np.uint8, offset=1 + 4 * len(sizes))
    rotated = _levels(_unpacked(packed, bits(name)), scales, sizes, bits(name))
    _hadamard(rotated, sizes)
    rotated *= _signs(seed, len(rotated))
    return rotated[:d].copy()


def _signs(seed: bytes, count: int) -> Floats:
    """+1 or -1, count (a multiple of 8) of them: the bits of SHAKE-256 of the seed, lowest first, 1 for -1."""
    stream = hashlib.shake_256(b"signs " + seed).digest(count // 8)
    negative = np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little")
    return np.float32(1.0) - np.float32(2.0) * negative


def _hadamard(values: Floats, sizes: Integers) -> None:
    """Multiply every block by the symmetric orthogonal Hadamard matrix of its size, in place. It is its own inverse.

    Butterflies of distance size / 2, size / 4, ... 1, then one product with float32(1 / sqrt(size)).
    """
    full = int((sizes == BLOCK).sum())
    start = full * BLOCK
    for first in range(0, start, GROUP):
        _hadamard_rows(values[first : min(first + GROUP, start)], BLOCK)
    for size in sizes[full:].tolist():
        _hadamard_rows(values[start : start + size], size)
        start += size


def _hadamard_rows(values: Floats, size: int) -> None:
    # distances below `short` would be slow inner loops; the block as a square, turned, makes them long ones
    long = 1 << (size.bit_length() // 2)
    short = size // long
    square = values.reshape(-1, long, short)
    _butterflies(square, long)
    turned = np.ascontiguousarray(square.swapaxes(1, 2))
    _butterflies(turned, short)
    square[...] = turned.swapaxes(1, 2)
    values *= np.float32(size**-0.5)


def _butterflies(values: Floats, count: int) -> None:
    """Over axis 1, of this count, in place."""
    distance = count // 2
    while distance:
        pairs = values.reshape(len(values), count // (2 * distance), 2, distance, -1)
        upper, lower = pairs[:, :, 0], pairs[:, :, 1]
        total = upper + lower
        np.subtract(upper, lower, out=lower)
        upper[...] = total
        distance //= 2


# --- quantisation: a code q of L + 1 levels, L = 2^bits - 1, stands for (2 q - L) (scale / L)


def _quantised(values: Floats, sizes: Integers, width: int, seed: bytes) -> tuple[Floats, Codes]:
    """A scale per block, its largest magnitude, and each number rounded up or down at random, so that its mean is
    itself: floor(y + u), u uniform in steps of 2^-24."""
    levels = (1 << width) - 1
    scales = np.maximum.reduceat(np.abs(values), np.cumsum(sizes) - sizes)
    spread = np.repeat(scales, sizes)
    place = np.divide(values, spread, out=np.zeros_like(values), where=spread > 0)
    place += np.float32(1.0)
    place *= np.float32(levels / 2)
    place += _uniform(seed, len(values))
    return scales, np.clip(np.floor(place), 0, levels).astype(np.uint8)


def _uniform(seed: bytes, count: int) -> Floats:
    """Numbers in [0, 1). Philox' raw stream is the same in every NumPy; a receiver does not need it."""
    key = np.frombuffer(hashlib.sha256(b"rounding " + seed).digest()[:16], "<u8")
    raw = np.random.Philox(key=key).random_raw((count + 1) // 2).astype("<u8")
    return (raw.view("<u4")[:count] >> 8).astype(np.float32) * np.float32(2.0**-24)


def _levels(codes: Codes, scales: Floats, sizes: Integers, width: int) -> Floats:
    levels = np.float32((1 << width) - 1)
    values = codes.astype(np.float32)
    values *= np.float32(2.0)
    values -= levels
    values *= np.repeat(scales / levels, sizes)
    return values


def _checked_scales(scales: Floats) -> Floats:
    if not ((scales >= 0) & (scales <= MAX_SCALE)).all():
        raise PeerError(f"a scale of the update is not between 0 and {MAX_SCALE:g}")
    return scales.astype(np.float32)


def _packed(codes: Codes, width: int) -> bytes:
    """Two codes of 4 bits in a byte, the first one in the low half."""
    return (codes if width == 8 else codes[0::2] | codes[1::2] << 4).tobytes()


def _unpacked(packed: Codes, width: int) -> Codes:
    return packed if width == 8 else np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)


# --- top-k: [code] [indices: bitmap or gaps] [k values]


def _encode_top(values: Floats, compression: Compression, seed: bytes) -> bytes:
    name, indices = compression.name, _largest(values, compression.kept(len(values)))
    bitmap = _bitmap(indices, len(values))
    gaps = _gaps(indices) if len(indices) < len(bitmap) else bitmap  # a gap is a byte or more
    short = len(gaps) < len(bitmap)
    head = bytes([(GAPS if short else BITMAP)[name]]) + (gaps if short else bitmap)
    if name == TOP_K:
        return head + values[indices].astype("<f4").tobytes()
    scales, codes = _quantised(values[indices], _value_blocks(len(indices)), 8, seed)
    return head + scales.astype("<f4").tobytes() + codes.tobytes()


def _decode_top(data: bytes, compression: Compression, d: int) -> Floats:
    name, k = compression.name, compression.kept(d)
    end = len(data) - value_bytes(name, k)
    if data[0] not in (BITMAP[name], GAPS[name]):
        raise PeerError(f"the update starts with {data[0]:#04x}, not as one of {name}")
    packed = np.frombuffer(data, np.uint8, end - 1, 1)
    indices = _from_bitmap(packed, k, d) if data[0] == BITMAP[name] else _from_gaps(packed, k, d)
    update = np.zeros(d, np.float32)
    update[indices] = _top_values(data[end:], name, k)
    return update


def _top_values(data: bytes, name: str, k: int) -> Floats:
    if name == TOP_K:
        return np.frombuffer(data, "<f4").astype(np.float32)
    sizes = _value_blocks(k)
    scales = _checked_scales(np.frombuffer(data, "<f4", len(sizes)))
    return _levels(np.frombuffer(data, np.uint8, offset=4 * len(sizes)), scales, sizes, 8)


def _value_blocks(k: int) -> Integers:
    return np.array([min(BLOCK, k - start) for start in range(0, k, BLOCK)], np.int64)


def _largest(values: Floats, k: int) -> Integers:
    """The indices of the k largest magnitudes, ascending; of equal ones the first."""
    magnitudes = np.abs(values)
    least = np.partition(magnitudes, len(values) - k)[len(values) - k]
    above = np.flatnonzero(magnitudes > least)
    equal = np.flatnonzero(magnitudes == least)[: k - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _bitmap(indices: Integers, d: int) -> bytes:
    named = np.zeros(d, np.uint8)
    named[indices] = 1
    return np.packbits(named, bitorder="little").tobytes()


def _from_bitmap(packed: Codes, k: int, d: int) -> Integers:
    named = np.unpackbits(packed, bitorder="little")
    if len(packed) != -(-d // 8) or named[d:].any() or int(named.sum(dtype=np.int64)) != k:
        raise PeerError(f"the update's bitmap does not name {k} of {d} numbers")
    return np.flatnonzero(named)


def _gaps(indices: Integers) -> bytes:
    """How many numbers are left out before each one, as varints: 7 bits in a byte, lowest first, 128 for more."""
    left = np.diff(indices, prepend=-1) - 1
    columns = [(left >> (7 * place)) & 127 for place in range(LARGEST_VARINT)]
    more = [left >> (7 * (place + 1)) > 0 for place in range(LARGEST_VARINT)]
    wanted = [np.ones(len(left), bool), *more[:-1]]
    table = np.stack([column | (later << 7) for column, later in zip(columns, more)], axis=1).astype(np.uint8)
    return bytes(table[np.stack(wanted, axis=1)])


def _from_gaps(packed: Codes, k: int, d: int) -> Integers:
    ends = np.flatnonzero(packed < 128)
    if len(ends) != k or not len(packed) or ends[-1] != len(packed) - 1:
        raise PeerError(f"the update's indices are not {k} varints")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if (lengths > LARGEST_VARINT).any() or ((packed[ends] == 0) & (lengths > 1)).any():
        raise PeerError("an index of the update is not in its shortest form")
    left = np.zeros(k, np.int64)
    for place in range(int(lengths.max())):
        longer = lengths > place
        left[longer] |= (packed[starts[longer] + place].astype(np.int64) & 127) << (7 * place)
    if float(left.sum(dtype=np.float64)) + k > d:  # in float64, which cannot wrap around
        raise PeerError(f"the update names numbers beyond its {d}")
    indices: Integers = np.cumsum(left + 1) - 1
    return indices
