"""Malformed payloads, seeded: what a broken device, a hostile one with a key, or anybody on the broker may send."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from covey_protocol import codec
from covey_protocol.messages import Envelope
from covey_protocol.seals import SealingKey

STORED = json.loads((Path(__file__).parent.parent / "golden" / "v1.json").read_text())
KEYS = {"kitchen-pi": SealingKey.from_seed(bytes(range(32))), "coordinator": SealingKey.from_seed(bytes(range(32, 64)))}
STRANGER = SealingKey.from_seed(bytes(32))


@dataclass(frozen=True)
class Vector:
    """A good message."""

    topic: str
    sender: str
    data: bytes

    @property
    def envelope(self) -> Envelope:
        return msgspec.msgpack.decode(self.data, type=Envelope)


VECTORS = [
    Vector(vector["topic"], vector["sender"], bytes.fromhex(vector["hex"]))
    for vector in STORED["vectors"].values()
    if vector["topic"]
]


@dataclass(frozen=True)
class Hostile:
    """Bytes that come on a topic; `good` is the message they were made from."""

    kind: str
    good: Vector
    data: bytes
    topic: str


def sealed(good: Vector, body: bytes, version: int = 1, sequence: int = 7, key: SealingKey | None = None) -> bytes:
    """An envelope around any body, sealed by the right key unless told otherwise."""
    seal = (key or KEYS[good.sender]).seal(codec._sealed_bytes(version, good.topic, good.sender, sequence, body))
    return msgspec.msgpack.encode([version, good.sender, sequence, body, seal])


def mutated(rng: random.Random, data: bytes) -> bytes:
    """One to four bytes changed, removed, added, or a piece moved."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        how = rng.randrange(4)
        if how == 0 and at < len(out):
            out[at] ^= rng.randint(1, 255)
        elif how == 1:
            del out[at : at + rng.randint(1, 8)]
        elif how == 2:
            out[at:at] = rng.randbytes(rng.randint(1, 8))
        else:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + rng.randint(1, 16)]
    return bytes(out)


HUGE = [  # msgpack headers that promise far more than follows
    *(
        bytes([code]) + struct.pack(">I", size)
        for code in (0xC6, 0xDB, 0xDD, 0xDF, 0xC9)
        for size in (2**20, 2**32 - 1)
    ),
    *(bytes([code]) + struct.pack(">H", 2**16 - 1) for code in (0xC5, 0xDA, 0xDC, 0xDE, 0xC8)),
]
NESTS = [b"\x91", b"\x81\xa1a", b"\x81", b"\xdd\x00\x00\x00\x01"]


def with_field(rng: random.Random, body: bytes) -> bytes:
    """A map body with one value replaced, a key added, or one removed, all of any kind."""
    content = msgspec.msgpack.decode(body)
    values = [
        None,
        True,
        -1,
        2**53,
        2**64 - 1,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "x" * 600,
        b"",
        bytes(32),
        bytes(33),
    ]
    values += [[], [0] * 20_000, [[[]]], {}, {"a": 1}, {"sha256": bytes(32), "size": 2**34, "chunk_bytes": 1}]
    name = rng.choice([*content, "surplus"])
    if name != "type" and rng.random() < 0.15:
        content.pop(name, None)
    else:
        content[name] = rng.choice(values)
    return msgspec.msgpack.encode(content)


def _deep(rng: random.Random) -> bytes:
    unit = rng.choice(NESTS)
    return unit * (rng.choice([50, 2000, 50_000]) // len(unit)) + b"\xc0"


def _envelope_with(rng: random.Random, good: Vector, piece: bytes) -> bytes:
    """The good envelope with one of its five elements replaced by raw bytes, perhaps cut there."""
    parts = [msgspec.msgpack.encode(part) for part in msgspec.structs.astuple(good.envelope)]
    at = rng.randrange(5)
    parts[at] = piece
    return b"\x95" + b"".join(parts[: at + 1] if rng.random() < 0.5 else parts)


KINDS: dict[str, Callable[[random.Random, Vector], bytes]] = {
    "random bytes": lambda rng, good: rng.randbytes(rng.randrange(300)),
    "a mutated message": lambda rng, good: mutated(rng, good.data),
    "a truncated message": lambda rng, good: good.data[: rng.randrange(len(good.data))],
    "more than a message": lambda rng, good: good.data + rng.randbytes(rng.randint(1, 50)),
    "two messages in one": lambda rng, good: good.data + rng.choice(VECTORS).data,
    "a promise of much": lambda rng, good: _envelope_with(rng, good, rng.choice(HUGE) + rng.randbytes(9)),
    "a sealed promise of much": lambda rng, good: sealed(good, mutated_header(rng, good)),
    "deep nesting": lambda rng, good: _envelope_with(rng, good, _deep(rng)),
    "sealed deep nesting": lambda rng, good: sealed(good, b"\x82\xa4type\xa6answer\xa1x" + _deep(rng)),
    "a sealed mutated body": lambda rng, good: sealed(good, mutated(rng, good.envelope.body)),
    "a sealed body with a strange field": lambda rng, good: sealed(good, with_field(rng, good.envelope.body)),
    "sealed by a stranger": lambda rng, good: sealed(good, good.envelope.body, key=STRANGER),
    "a future version": lambda rng, good: sealed(good, good.envelope.body, version=rng.choice([0, 2, 3, 255, 2**40])),
    "an envelope of six": lambda rng, good: b"\x96" + good.data[1:] + b"\xc0",
    "oversize": lambda rng, good: good.data + bytes(codec.MAX_ENVELOPE_BYTES),
}
RARE = {"oversize": 50, "deep nesting": 5, "sealed deep nesting": 5}  # large ones: one in so many of their turns


def mutated_header(rng: random.Random, good: Vector) -> bytes:
    """A body whose last value promises much more than comes."""
    return b"\x83\xa4type\xa6answer\xa8round_id\xa1r\xa6reason" + rng.choice(HUGE) + rng.randbytes(20)


def payloads(count: int, seed: int) -> Iterator[Hostile]:
    """`count` of them, of all kinds in turn; a tenth on a topic they were not made for."""
    rng = random.Random(seed)
    names = list(KINDS)
    for turn in range(count):
        kind = names[turn % len(names)]
        if rng.randrange(RARE.get(kind, 1)):
            kind = "a mutated message"
        good = rng.choice(VECTORS)
        topic = good.topic if rng.random() < 0.9 else rng.choice(VECTORS).topic.replace("kitchen-pi", "porch-pi")
        yield Hostile(kind, good, KINDS[kind](rng, good), topic)
