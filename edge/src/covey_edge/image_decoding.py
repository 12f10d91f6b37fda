"""Pictures into arrays with the standard library and NumPy: PNG, PGM and PPM; JPEG where Pillow is installed.

Of PNG: grey, RGB and palettes of 1 to 16 bits, with or without alpha, not interlaced. What is see-through is laid over
white; a single colour that is declared see-through (tRNS of grey and RGB) is shown as it is. Source: ISO/IEC 15948
(PNG), sections 5, 7, 9 and 12. Colour spaces and gamma are not looked at.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from covey_protocol.errors import DataError, MachineError

Pixels = npt.NDArray[np.float32]  # (height, width, 1 or 3), from 0 to 1
MOST_PIXELS = 50_000_000  # a small file can say it is huge
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # PNG's colour type -> samples of a pixel
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
GREY, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 3, 4, 6


class _Broken(Exception):
    """One sentence: what is wrong with a picture."""


def decoded(data: bytes) -> Pixels:
    """DataError, without the file's name, for what cannot be decoded; MachineError for a JPEG without Pillow."""
    try:
        if data.startswith(_SIGNATURE):
            return _png(data)
        if data[:2] in (b"P2", b"P3", b"P5", b"P6"):
            return _pnm(data)
        if data.startswith(b"\xff\xd8"):
            return _jpeg(data)
    except _Broken as exc:
        raise DataError(str(exc), "save it as a PNG without interlacing") from exc
    except (struct.error, zlib.error, ValueError, IndexError, OSError, SyntaxError) as exc:
        raise DataError(f"a damaged image ({exc})", "save it again") from exc
    raise DataError("neither PNG, PGM, PPM nor JPEG", "save it as a PNG")


def grey(pixels: Pixels) -> Pixels:
    return pixels if pixels.shape[2] == 1 else (pixels @ LUMA)[:, :, None]


def rgb(pixels: Pixels) -> Pixels:
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)


def resized(pixels: Pixels, height: int, width: int) -> Pixels:
    """Each new pixel is the mean of the area of old ones that it covers, parts of pixels counted as parts."""
    if pixels.shape[:2] == (height, width):
        return pixels
    rows, columns = _areas(pixels.shape[0], height), _areas(pixels.shape[1], width)
    narrow = np.tensordot(rows, pixels, axes=(1, 0))
    both: Pixels = np.ascontiguousarray(np.tensordot(columns, narrow, axes=(1, 1)).transpose(1, 0, 2))
    return both


def _areas(old: int, new: int) -> npt.NDArray[np.float32]:
    """(new, old): which share of each new pixel every old one is."""
    edges = np.arange(new + 1) * (old / new)
    starts, places = edges[:-1, None], np.arange(old)[None, :]
    overlap = np.clip(np.minimum(edges[1:, None], places + 1) - np.maximum(starts, places), 0, None)
    shares: npt.NDArray[np.float32] = (overlap * (new / old)).astype(np.float32)
    return shares


# --- PNG


class _Head(NamedTuple):
    width: int
    height: int
    depth: int
    colour: int
    compression: int
    filtering: int
    interlace: int

    @property
    def samples(self) -> int:
        return _SAMPLES[self.colour]

    @property
    def row_bytes(self) -> int:
        return (self.width * self.samples * self.depth + 7) // 8


def _png(data: bytes) -> Pixels:
    head, palette, alpha, packed = _read_chunks(data)
    unpacker = zlib.decompressobj()
    size = head.height * (head.row_bytes + 1)
    raw = unpacker.decompress(packed, size)
    if len(raw) < size:
        raise _Broken("an image that ends too early")
    lines = np.frombuffer(raw, np.uint8).reshape(head.height, head.row_bytes + 1)
    values = _samples(_unfiltered(lines, max(1, head.samples * head.depth // 8)), head)
    if head.colour == PALETTE:
        return _coloured(values[:, :, 0], palette, alpha)
    scaled = values.astype(np.float32) / np.float32(2**head.depth - 1)
    return _over_white(scaled) if head.colour in (GREY_ALPHA, RGB_ALPHA) else scaled


def _read_chunks(data: bytes) -> tuple[_Head, bytes, bytes, bytes]:
    """(head, palette, its alphas, the compressed rows). Sums of checks must be right."""
    place, head, palette, alpha, packed = len(_SIGNATURE), None, b"", b"", []
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        content = data[place + 8 : place + 8 + length]
        (check,) = struct.unpack_from(">I", data, place + 8 + length)
        if zlib.crc32(kind + content) != check:
            raise _Broken(f"an image with a damaged part ({kind.decode('latin-1')})")
        place += length + 12
        if kind == b"IHDR":
            head = _checked(_Head(*struct.unpack(">IIBBBBB", content)))
        elif kind == b"PLTE":
            palette = content
        elif kind == b"tRNS":
            alpha = content
        elif kind == b"IDAT":
            packed.append(content)
        elif kind == b"IEND":
            break
    if head is None:
        raise _Broken("an image without a head")
    return head, palette, alpha, b"".join(packed)


def _checked(head: _Head) -> _Head:
    if head.depth not in _DEPTHS.get(head.colour, ()) or head.compression or head.filtering:
        raise _Broken(f"a PNG of an unknown kind (colour type {head.colour}, {head.depth} bits)")
    if head.interlace:
        raise _Broken("an interlaced PNG")
    _check_size(head.width, head.height)
    return head


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MOST_PIXELS:
        raise _Broken(f"an image of {width} x {height} pixels (at most {MOST_PIXELS} are read)")


def _unfiltered(lines: npt.NDArray[np.uint8], step: int) -> npt.NDArray[np.uint8]:
    """(height, bytes) from (height, 1 + bytes), whose first column says how each row is filtered (section 9.2).

    A byte depends on the one left of it, the one above and the one between. So all on a diagonal, which goes down one
    row as it goes left one pixel, are computed at once: width + height steps, not width times height. step: bytes from
    a pixel to the next.
    """
    kinds = lines[:, 0]
    if kinds.max(initial=0) > 4:
        raise _Broken("a PNG with an unknown filter")
    height, width = len(lines), (lines.shape[1] - 1) // step
    given = lines[:, 1:].reshape(height, width, step).astype(np.int16)
    if not kinds.any():
        return lines[:, 1:]
    out = np.zeros((height + 1, width + 1, step), np.int16)  # with a row above and a column left of it, all 0
    for diagonal in range(width + height - 1):
        rows = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        columns = diagonal - rows
        left, above, between = out[rows + 1, columns], out[rows, columns + 1], out[rows, columns]
        kind = kinds[rows][:, None]
        guess = np.select(
            [kind == 1, kind == 2, kind == 3, kind == 4],
            [left, above, (left + above) >> 1, _paeth(left, above, between)],
            np.int16(0),
        )
        out[rows + 1, columns + 1] = (given[rows, columns] + guess) & 255
    return out[1:, 1:].reshape(height, width * step).astype(np.uint8)


def _paeth(left: Any, above: Any, between: Any) -> Any:
    """Of the three the one nearest to left + above - between; in this order where several are (section 9.4)."""
    guess = left + above - between
    by_left, by_above, by_between = (np.abs(guess - one) for one in (left, above, between))
    return np.where(
        (by_left <= by_above) & (by_left <= by_between), left, np.where(by_above <= by_between, above, between)
    )


def _samples(rows: npt.NDArray[np.uint8], head: _Head) -> npt.NDArray[Any]:
    """(height, width, samples) of whole numbers."""
    shape = (head.height, head.width, head.samples)
    if head.depth == 16:
        return np.ascontiguousarray(rows).view(">u2").reshape(shape)
    if head.depth == 8:
        return rows.reshape(shape)
    bits = np.unpackbits(rows, axis=1)[:, : head.width * head.depth].reshape(head.height, head.width, head.depth)
    weights = 1 << np.arange(head.depth - 1, -1, -1)
    return (bits @ weights).reshape(shape)


def _coloured(places: npt.NDArray[Any], palette: bytes, alpha: bytes) -> Pixels:
    colours = np.frombuffer(palette[: len(palette) // 3 * 3], np.uint8).reshape(-1, 3)
    if places.max(initial=0) >= len(colours):
        raise _Broken("a PNG whose palette is too short")
    opaque = np.full(len(colours), 255, np.uint8)
    known = np.frombuffer(alpha, np.uint8)[: len(colours)]
    opaque[: len(known)] = known
    table = np.concatenate([colours, opaque[:, None]], axis=1).astype(np.float32) / 255
    return _over_white(table[places])


def _over_white(pixels: Pixels) -> Pixels:
    """The last channel is how opaque a pixel is."""
    alpha = pixels[:, :, -1:]
    laid: Pixels = pixels[:, :, :-1] * alpha + (1 - alpha)
    return laid


# --- PGM, PPM, JPEG

_NUMBER = re.compile(rb"(?:\s|#[^\n]*\n)*(\d+)")


def _pnm(data: bytes) -> Pixels:
    """Source: netpbm's pgm(5) and ppm(5)."""
    kind, place, head = data[:2], 2, []
    for _ in range(3):
        found = _NUMBER.match(data, place)
        if not found:
            raise _Broken("an image without a head")
        head.append(int(found[1]))
        place = found.end()
    width, height, most = head
    _check_size(width, height)
    if not 0 < most < 65536:
        raise _Broken(f"an image whose largest value is {most}")
    channels = 3 if kind in (b"P3", b"P6") else 1
    if kind in (b"P2", b"P3"):
        text = re.sub(rb"#[^\n]*", b"", data[place:]).split()
        values = np.array(text[: width * height * channels], dtype=np.float32)
    else:
        values = np.frombuffer(data[place + 1 :], ">u2" if most > 255 else np.uint8).astype(np.float32)
    if len(values) < width * height * channels:
        raise _Broken("an image that ends too early")
    return values[: width * height * channels].reshape(height, width, channels) / np.float32(most)


def _jpeg(data: bytes) -> Pixels:
    try:
        from PIL import Image
    except ImportError as exc:
        raise MachineError(
            "a JPEG, and Pillow is not installed", "run `pip install pillow`, or save the images as PNG"
        ) from exc
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        _check_size(*image.size)
        told = image.convert("L" if image.mode == "L" else "RGB")
    pixels = np.asarray(told, np.float32) / 255
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
