"""Pictures as PNG files, with the standard library alone: a device has no plotting."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

_COLOURS = {1: 0, 3: 2}  # channels -> PNG's colour type


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """pixels: (height, width, 1 or 3), grey or RGB. Source: ISO/IEC 15948 (PNG), sections 5 and 9."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOURS[channels], 0, 0, 0)
    rows = b"".join(b"\x00" + row.tobytes() for row in pixels)  # filter type 0 before each row
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
