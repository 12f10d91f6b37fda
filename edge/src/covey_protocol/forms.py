"""The forms in which an update travels: their names, their sizes, what a plan may ask for.

docs/protocol.md, section 8.1. Without NumPy, which the agent's own process does not load; encoding and decoding are in
`compression`.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

from msgspec import UNSET

from covey_protocol.encryption import ENCRYPTION_BYTES
from covey_protocol.errors import ConfigError
from covey_protocol.messages import Invitation, TrainingPlan

NONE, ROTATED_8BIT, ROTATED_4BIT, TOP_K, TOP_K_8BIT = "none", "rotated-8bit", "rotated-4bit", "top-k", "top-k-8bit"
FLOAT64 = "float64"  # of the rows of the cyclic code: no plan names it, and none of its works goes with another
COMPRESSIONS = (ROTATED_8BIT, ROTATED_4BIT, TOP_K, TOP_K_8BIT)  # their names are capabilities, too
ROTATED = (ROTATED_8BIT, ROTATED_4BIT)
WITHHOLDING = (TOP_K, TOP_K_8BIT)  # send a part of an update; the rest is kept for a later one

BLOCK = 4096  # numbers rotated together and with one scale: 16 KiB stay in a small device's cache
SMALLEST_BLOCK = 64
LARGEST_VARINT = 5  # bytes: 35 bits, more than any d


class Compression(NamedTuple):
    """One of COMPRESSIONS, NONE or FLOAT64. kept_fraction: of top-k, the share of the d numbers sent; else 0."""

    name: str = NONE
    kept_fraction: float = 0.0

    def kept(self, d: int) -> int:
        """k, how many of d numbers top-k sends."""
        return max(1, int(self.kept_fraction * d))


def compression_of(plan: TrainingPlan) -> Compression:
    """What the plan asks for. ConfigError for a name or a fraction that is not to be had."""
    if plan.evaluate and plan.compression != NONE:
        raise ConfigError(
            f"an evaluation with compression {plan.compression!r}", "metrics are a few numbers: leave it out"
        )
    if plan.compression not in (NONE, *COMPRESSIONS):
        close = difflib.get_close_matches(plan.compression, (NONE, *COMPRESSIONS), n=1, cutoff=0.0)
        raise ConfigError(f"there is no compression {plan.compression!r} here", f"did you mean {close[0]!r}?")
    if (plan.compression in WITHHOLDING) != (plan.kept_fraction > 0):
        raise ConfigError(
            f"compression {plan.compression!r} with kept_fraction = {plan.kept_fraction:g}",
            f"give {' and '.join(WITHHOLDING)} a fraction above 0, to 1, and others none",
        )
    if plan.coding is not UNSET:
        if plan.compression != NONE:
            raise ConfigError(f"a code's rows with compression {plan.compression!r}", "they are exact: leave it out")
        return Compression(FLOAT64)
    return Compression(plan.compression, plan.kept_fraction)


def update_seed(round_id: str, device_id: str) -> bytes:
    """Of everything random in one device's update of one round. Both ids are without spaces."""
    return f"covey update {round_id} {device_id}".encode()


def update_sizes(compression: Compression, d: int) -> tuple[int, int]:
    """The fewest and the most bytes that an encoded update of d numbers may have."""
    if compression.name == NONE:
        return 4 * d, 4 * d
    if compression.name == FLOAT64:
        return 8 * d, 8 * d
    if compression.name in ROTATED:
        sizes = block_sizes(d)
        size = 1 + 4 * len(sizes) + sum(sizes) * bits(compression.name) // 8
        return size, size
    k = compression.kept(d)
    bitmap, values = -(-d // 8), 1 + value_bytes(compression.name, k)
    return values + min(k, bitmap), values + min(LARGEST_VARINT * k, bitmap)


def offered_sizes(invitation: Invitation) -> tuple[int, int]:
    """The fewest and the most bytes that an update offered for this invitation may have, encryption included."""
    least, most = update_sizes(compression_of(invitation.plan), invitation.update_dimension)
    more = ENCRYPTION_BYTES if invitation.encryption_key else 0
    return least + more, most + more


def bits(name: str) -> int:
    """Of one quantised number."""
    return 4 if name == ROTATED_4BIT else 8


def block_sizes(d: int) -> list[int]:
    """Of a rotated form: 4096 each, then the rest by its binary digits down to 64; what is left is filled up to 64.

    So fewer than 64 numbers and 8 scales are wasted, where one block more would waste up to 4095 numbers.
    """
    rest = d % BLOCK
    tail = [1 << bit for bit in range(11, 5, -1) if rest >> bit & 1] + [SMALLEST_BLOCK] * (rest % SMALLEST_BLOCK > 0)
    return [BLOCK] * (d // BLOCK) + tail


def value_bytes(name: str, k: int) -> int:
    """Of top-k's k values: float32, or one byte each and a scale for every 4096."""
    return 4 * k if name == TOP_K else k + 4 * -(-k // BLOCK)
