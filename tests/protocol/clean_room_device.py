"""A device written from docs/protocol.md, docs/bundle.md and docs/glossary.md alone. It imports nothing of covey.

It shows that the documents are enough to write one in another language, and stays independent: do not "share" code with
edge/src. Only training is not here: an update is made of the received parameters by a rule of its own (`make_update`).
Numbers of rows (D1, ...) and sections are those of docs/protocol.md. MQTT 3.1.1, one thread, no NumPy.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import random
import re
import signal
import struct
import sys
import time
import zipfile
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256 as Sha256Hash
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import load_pem_private_key

Message = dict[str, Any]

MAX_ENVELOPE_BYTES = 2_097_152
MAX_CHUNKS = 16_384
PACKET_ROOM_BYTES = 512  # an MQTT packet with a chunk is at most so much longer than the chunk
TWO_53 = 2**53


class Refused(Exception):
    """The bytes break the protocol; the message is dropped."""


# --- msgpack


def pack(value: Any) -> bytes:
    """msgpack in its shortest forms; floats as float64, maps in their own order."""
    if value is None or value is False or value is True:
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        return _pack_int(value)
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode()
        head = bytes([0xA0 | len(data)]) if len(data) < 32 else _length(len(data), 0xD9, 0xDA, 0xDB)
        return head + data
    if isinstance(value, bytes):
        return _length(len(value), 0xC4, 0xC5, 0xC6) + value
    if isinstance(value, list):
        return _collection(len(value), 0x90, 0xDC) + b"".join(map(pack, value))
    if isinstance(value, dict):
        return _collection(len(value), 0x80, 0xDE) + b"".join(pack(k) + pack(v) for k, v in value.items())
    raise TypeError(type(value).__name__)


def _pack_int(value: int) -> bytes:
    if value < 0:
        raise ValueError("no message holds a negative integer")
    if value < 128:
        return bytes([value])
    for code, form, limit in ((0xCC, ">B", 2**8), (0xCD, ">H", 2**16), (0xCE, ">I", 2**32), (0xCF, ">Q", 2**64)):
        if value < limit:
            return bytes([code]) + struct.pack(form, value)
    raise ValueError(value)


def _length(size: int, one: int, two: int, four: int) -> bytes:
    if size < 2**8:
        return bytes([one, size])
    return bytes([two]) + struct.pack(">H", size) if size < 2**16 else bytes([four]) + struct.pack(">I", size)


def _collection(size: int, fixed: int, two: int) -> bytes:
    if size < 16:
        return bytes([fixed | size])
    return bytes([two]) + struct.pack(">H", size) if size < 2**16 else bytes([two + 1]) + struct.pack(">I", size)


NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I",
    0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
LENGTHS = {
    0xC4: (bytes, ">B"), 0xC5: (bytes, ">H"), 0xC6: (bytes, ">I"),
    0xD9: (str, ">B"), 0xDA: (str, ">H"), 0xDB: (str, ">I"),
    0xDC: (list, ">H"), 0xDD: (list, ">I"), 0xDE: (dict, ">H"), 0xDF: (dict, ">I"),
}  # fmt: skip


def unpack(data: bytes) -> Any:
    """One msgpack value that fills the bytes. Raises Refused."""
    try:
        value, end = _unpack(data, 0, 0)
    except (struct.error, IndexError, UnicodeDecodeError, TypeError) as exc:
        raise Refused("not msgpack") from exc
    if end != len(data):
        raise Refused("bytes after the end")
    return value


def _unpack(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    code, at = data[at], at + 1
    if code < 0x80 or code >= 0xE0:
        return (code if code < 0x80 else code - 256), at
    if code in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[code], at
    if code in NUMBERS:
        return struct.unpack_from(NUMBERS[code], data, at)[0], at + struct.calcsize(NUMBERS[code])
    kind, size, at = _head(data, code, at)
    if kind in (bytes, str):
        if at + size > len(data):
            raise Refused("cut short")
        piece = data[at : at + size]
        return (piece if kind is bytes else piece.decode()), at + size
    if depth > 8:
        raise Refused("nested too deep")
    values: list[Any] = []
    for _ in range(size if kind is list else 2 * size):
        value, at = _unpack(data, at, depth + 1)
        values.append(value)
    return (values if kind is list else dict(zip(values[::2], values[1::2]))), at


def _head(data: bytes, code: int, at: int) -> tuple[type, int, int]:
    """The kind of a string, array or map, its length, and where its content begins."""
    if code < 0x90:
        return dict, code & 15, at
    if code < 0xA0:
        return list, code & 15, at
    if code < 0xC0:
        return str, code & 31, at
    if code not in LENGTHS:
        raise Refused(f"msgpack code {code:#x}")
    kind, form = LENGTHS[code]
    return kind, struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)


# --- messages (section 4)

Check = Callable[[Any], Any]
REQUIRED: Any = object()


def whole(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise Refused(f"{value!r} is no whole number from {low} to {high}")
        return value

    return check


def real(low: float, high: float, above: bool = False) -> Check:
    def check(value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high or (above and value == low):
            raise Refused(f"{value!r} is no number from {low} to {high}")
        return float(value)

    return check


def text(limit: int, pattern: str = "(?s:.*)") -> Check:
    def check(value: Any) -> str:
        if type(value) is not str or len(value) > limit or not re.fullmatch(pattern, value):
            raise Refused(f"{value!r} is no text of this pattern")
        return value

    return check


def binary(low: int, high: int) -> Check:
    def check(value: Any) -> bytes:
        if type(value) is not bytes or not low <= len(value) <= high:
            raise Refused("not binary, or of another size")
        return value

    return check


def flag(value: Any) -> bool:
    if type(value) is not bool:
        raise Refused(f"{value!r} is neither true nor false")
    return value


def listing(item: Check, low: int, high: int) -> Check:
    def check(value: Any) -> list[Any]:
        if type(value) is not list or not low <= len(value) <= high:
            raise Refused("not an array, or of another length")
        return [item(each) for each in value]

    return check


def mapping(key: Check, item: Check, high: int) -> Check:
    def check(value: Any) -> dict[Any, Any]:
        if type(value) is not dict or len(value) > high:
            raise Refused("not a map, or too long")
        return {key(k): item(v) for k, v in value.items()}

    return check


Fields = dict[str, tuple[Check, Any]]


def structure(fields: Fields) -> Check:
    """A map with these fields; what is missing gets its default, what is unknown is left out."""

    def check(value: Any) -> Message:
        if type(value) is not dict:
            raise Refused("not a map")
        if any(type(key) is not str for key in value):
            raise Refused("a key that is no text")
        for name, (_, default) in fields.items():
            if default is REQUIRED and name not in value:
                raise Refused(f"{name} is missing")
        return {n: c(value[n]) if n in value else default for n, (c, default) in fields.items()}

    return check


COUNT, NAME, REASON = whole(0, TWO_53), text(64), text(500)
DEVICE_ID = text(63, "[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
ROUND_ID = text(95, "[A-Za-z0-9][A-Za-z0-9._-]{0,94}")
SHA256, INDEX = binary(32, 32), whole(0, MAX_CHUNKS - 1)
CAPABILITIES = listing(NAME, 0, 64)

BLOB_FIELDS: Fields = {
    "sha256": (SHA256, REQUIRED),
    "size": (whole(1, 2**34), REQUIRED),
    "chunk_bytes": (whole(1, 1_048_576), 65_536),
}
TEACHING_FIELDS: Fields = {
    "lambda_w": (real(0, 1e12, above=True), REQUIRED),
    "lambda_t": (real(0, 1e12), REQUIRED),
    "rho": (real(0, 1e12, above=True), REQUIRED),
    "curvature": (real(0, 1e12, above=True), REQUIRED),
    "teachers": (whole(1, 10_000), REQUIRED),
    "lambda_a": (real(0, 1e12), 0.0),
    "lambda_z": (real(0, math.inf, above=True), math.inf),
    "lambda_y": (real(0.5, math.inf, above=True), math.inf),
}
CODING_FIELDS: Fields = {
    "devices": (listing(DEVICE_ID, 1, 255), REQUIRED),
    "shards": (listing(DEVICE_ID, 1, 255), REQUIRED),  # the same letters
    "s": (whole(0, 255), REQUIRED),
}


def coding(value: Any) -> Message:
    plan: Message = structure(CODING_FIELDS)(value)
    devices, shards = plan["devices"], plan["shards"]
    if len(set(devices)) < len(devices) or len(set(shards)) < len(shards):
        raise Refused("a code that names something twice")
    if len(devices) != len(shards) or 2 * plan["s"] >= len(devices):
        raise Refused("a code of sizes that do not go together")
    return plan


PLAN_FIELDS: Fields = {
    "epochs": (whole(1, 1000), REQUIRED),
    "learning_rate": (real(0, 1000, above=True), REQUIRED),
    "max_examples": (COUNT, 0),
    "shuffle_seed": (COUNT, 0),
    "gradient_clip_norm": (real(0, 1e9), 0.0),
    "proximal_weight": (real(0, 1000), 0.0),
    "compression": (NAME, "none"),
    "kept_fraction": (real(0, 1), 0.0),
    "evaluate": (listing(NAME, 0, 32), []),
    "task": (text(63, "|[A-Za-z0-9][A-Za-z0-9_-]{0,62}"), ""),
    "work": (NAME, "train"),
    "steps": (whole(0, 1_000_000), 0),
    "teaching": (structure(TEACHING_FIELDS), None),
    "coding": (coding, None),
}


def blob_ref(value: Any) -> Message:
    ref: Message = structure(BLOB_FIELDS)(value)
    if chunk_count(ref) > MAX_CHUNKS:
        raise Refused("a blob of too many chunks")
    return ref


def chunk_count(ref: Message) -> int:
    return -(-ref["size"] // ref["chunk_bytes"])


FROM_COORDINATOR: dict[str, Fields] = {
    "invitation": {
        "round_id": (ROUND_ID, REQUIRED),
        "number": (COUNT, REQUIRED),
        "issued_at_ms": (COUNT, REQUIRED),
        "duration_ms": (whole(1, 2_592_000_000), REQUIRED),
        "bundle": (blob_ref, REQUIRED),
        "parameters": (blob_ref, REQUIRED),
        "plan": (structure(PLAN_FIELDS), REQUIRED),
        "devices": (listing(DEVICE_ID, 0, 10_000), []),
        "requires": (CAPABILITIES, []),
        "max_staleness": (whole(0, 100), 0),
        "earlier": (listing(ROUND_ID, 0, 100), []),
        "encryption_key": (binary(32, 32), None),
        "vectors": (listing(blob_ref, 0, 4), []),
    },
    "closed": {"round_id": (ROUND_ID, REQUIRED), "outcome": (NAME, REQUIRED), "reason": (REASON, "")},
    "need": {
        "round_id": (ROUND_ID, REQUIRED),
        "sha256": (SHA256, REQUIRED),
        "indices": (listing(INDEX, 1, MAX_CHUNKS), REQUIRED),
    },
    "receipt": {
        "round_id": (ROUND_ID, REQUIRED),
        "sha256": (SHA256, REQUIRED),
        "kept": (flag, REQUIRED),
        "reason": (REASON, ""),
    },
    "verdict": {"round_id": (ROUND_ID, REQUIRED), "status": (NAME, REQUIRED), "reason": (REASON, "")},
}
FROM_DEVICE: dict[str, Fields] = {
    "presence": {
        "online": (flag, REQUIRED),
        "session": (COUNT, REQUIRED),
        "agent_version": (NAME, ""),
        "runtime": (NAME, ""),
        "capabilities": (CAPABILITIES, []),
        "trouble": (REASON, None),
        "on_trial": (flag, None),
        "bad": (listing(NAME, 0, 16), None),
    },
    "answer": {"round_id": (ROUND_ID, REQUIRED), "accept": (flag, REQUIRED), "reason": (REASON, "")},
    "offer": {
        "round_id": (ROUND_ID, REQUIRED),
        "update": (blob_ref, REQUIRED),
        "num_examples": (whole(1, TWO_53), REQUIRED),
        "metrics": (mapping(NAME, real(-math.inf, math.inf), 32), {}),
    },
    "chunk": {
        "round_id": (ROUND_ID, REQUIRED),
        "sha256": (SHA256, REQUIRED),
        "index": (INDEX, REQUIRED),
        "data": (binary(1, 1_048_576), REQUIRED),
    },
    "failure": {"round_id": (ROUND_ID, REQUIRED), "reason": (REASON, REQUIRED)},
    "seen": {"round_id": (ROUND_ID, REQUIRED)},
}
ON_ROUND, ON_DOWN = ("invitation", "closed"), ("need", "receipt", "verdict")
LEFT_OUT_AT_DEFAULT = ("max_staleness", "earlier", "encryption_key", "vectors", "trouble", "on_trial", "bad")


def decode_body(body: bytes, kinds: dict[str, Fields]) -> Message:
    value = unpack(body)
    if type(value) is not dict or value.get("type") not in kinds:
        raise Refused("no message of a known type")
    return {"type": value["type"], **structure(kinds[value["type"]])(value)}


def encode_body(message: Message) -> bytes:
    """All fields in the order of section 4, but of a plan only those that differ from their defaults."""
    fields = {**FROM_COORDINATOR, **FROM_DEVICE}[message["type"]]
    said = there(message)
    if "plan" in said:
        said["plan"] = there(said["plan"])
    whole_message = {"type": message["type"], **structure(fields)(said)}
    for name in LEFT_OUT_AT_DEFAULT:
        if name in whole_message and whole_message[name] == fields[name][1]:
            del whole_message[name]
    if "plan" in whole_message:
        plan = whole_message["plan"] = changed(whole_message["plan"], PLAN_FIELDS)
        if "teaching" in plan:
            plan["teaching"] = changed(plan["teaching"], TEACHING_FIELDS)
    return pack(whole_message)


def there(value: Message) -> Message:
    return {name: part for name, part in value.items() if part is not None}


def changed(value: Message, fields: Fields) -> Message:
    return {name: value[name] for name, (_, default) in fields.items() if value[name] != default}


# --- envelope and seal (section 3)


def sealed_bytes(topic: str, sender: str, sequence: int, body: bytes) -> bytes:
    return b"covey message\0" + pack([1, topic, sender, sequence]) + body


def wrap(key: Ed25519PrivateKey, topic: str, sender: str, sequence: int, body: bytes) -> bytes:
    return pack([1, sender, sequence, body, key.sign(sealed_bytes(topic, sender, sequence, body))])


def unwrap(data: bytes, topic: str, sender: str, key: Ed25519PublicKey) -> tuple[int, bytes]:
    """The number and the body of an envelope that `sender` sealed for this topic. Raises Refused."""
    if len(data) > MAX_ENVELOPE_BYTES:
        raise Refused("too long")
    envelope = unpack(data)
    if type(envelope) is not list or len(envelope) != 5:
        raise Refused("not an array of five")
    version, said, sequence, body, seal = envelope
    whole(-(2**63), 2**64)(version)
    text(64)(said)
    COUNT(sequence)
    binary(0, MAX_ENVELOPE_BYTES)(body)
    binary(64, 64)(seal)
    if version != 1:
        raise Refused(f"version {version}")
    if said != sender:
        raise Refused(f"sender {said}")
    if not sealed_by(key, seal, sealed_bytes(topic, sender, sequence, body)):
        raise Refused("wrong seal")
    return sequence, body


def sealed_by(key: Ed25519PublicKey, seal: bytes, data: bytes) -> bool:
    try:
        key.verify(seal, data)
    except InvalidSignature:
        return False
    return True


class Window:
    """Lets each number pass once; remembers the newest 1024."""

    def __init__(self) -> None:
        self.highest, self.heard = -1, set[int]()

    def passes(self, number: int) -> bool:
        if number in self.heard or number <= self.highest - 1024:
            return False
        self.highest = max(self.highest, number)
        self.heard = {n for n in self.heard if n > self.highest - 1024} | {number}
        return True


class Numbers:
    """Message numbers that grow over restarts, reserved on disk in blocks of 2^20 before the first is used."""

    BLOCK = 2**20

    def __init__(self, path: Path) -> None:
        self.path = path
        reserved = int(path.read_text()) if path.exists() else 0
        self.following = max(time.time_ns() // 1000, reserved)
        self._reserve()

    def _reserve(self) -> None:
        self.end = self.following + self.BLOCK
        write_durably(self.path, str(self.end).encode())

    def take(self) -> int:
        if self.following >= self.end:
            self._reserve()
        self.following += 1
        return self.following - 1


def write_durably(path: Path, data: bytes) -> None:
    """After this the file is there with all its bytes, or as it was, also after a power cut."""
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# --- the bundle (docs/bundle.md): checked, never run

MANIFEST_KEYS = {
    "format", "name", "model_sha256", "model_bytes", "batch_size", "input", "label", "parameters", "signatures", "loss",
    "optimizer", "num_classes", "class_names", "tensorflow", "proof", "metadata", "train_inputs",
}  # fmt: skip


def open_bundle(data: bytes, keys: Iterable[Ed25519PublicKey]) -> Message:
    """The manifest of a bundle that one of the keys sealed and whose model has the right hash. Raises Refused."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if sorted(entry.filename for entry in entries) != ["manifest.json", "model.tflite", "seal"]:
                raise Refused("the bundle lacks an entry or has one too many")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise Refused("an entry of the bundle is compressed")
            model, manifest, seal = (archive.read(name) for name in ("model.tflite", "manifest.json", "seal"))
    except zipfile.BadZipFile as exc:
        raise Refused(f"the bundle is damaged: {exc}") from exc
    if not any(sealed_by(key, seal, b"covey bundle 1\0" + manifest) for key in keys):
        raise Refused("the bundle is not sealed by the coordinator")
    if len(manifest) > 4_194_304:
        raise Refused("the manifest is too long")
    said: Message = json.loads(manifest)
    if said["format"] != 1 or set(said) - MANIFEST_KEYS:
        raise Refused("a bundle of a newer format")
    if (len(model), hashlib.sha256(model).hexdigest()) != (said["model_bytes"], said["model_sha256"]):
        raise Refused("the model is not the one of the manifest")
    return said


# --- the forms of an update (section 8.1)


def float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def from_bytes(data: bytes) -> array[float]:
    """float32, little-endian."""
    return array("f", struct.unpack(f"<{len(data) // 4}f", data))


def to_bytes(values: Iterable[float]) -> bytes:
    values = list(values)
    return struct.pack(f"<{len(values)}f", *values)


def block_sizes(d: int) -> list[int]:
    sizes = [4096] * (d // 4096) + [size for size in (2048, 1024, 512, 256, 128, 64) if d % 4096 & size]
    return sizes + [64] * (d % 64 > 0)


def hadamard(block: array[float]) -> None:
    """In place, every step rounded to float32 (which array("f") does)."""
    n = len(block)
    distance = n // 2
    while distance:
        for start in range(0, n, 2 * distance):
            for i in range(start, start + distance):
                a, b = block[i], block[i + distance]
                block[i], block[i + distance] = a + b, a - b
        distance //= 2
    factor = float32(n**-0.5)
    for i in range(n):
        block[i] *= factor


def signs(seed: bytes, count: int) -> Iterator[int]:
    stream = hashlib.shake_256(b"signs " + seed).digest(count // 8)
    return (-1 if stream[i // 8] >> (i % 8) & 1 else 1 for i in range(count))


def encode_rotated(update: array[float], seed: bytes, bits: int) -> bytes:
    sizes = block_sizes(len(update))
    padded = [*update, *[0.0] * (sum(sizes) - len(update))]
    turned = array("f", (value * sign for value, sign in zip(padded, signs(seed, len(padded)))))
    draws = random.Random(seed)
    scales, codes, start = [], [], 0
    for size in sizes:
        block = turned[start : start + size]
        hadamard(block)
        scales.append(scale := max(map(abs, block)))
        codes += [code(value, scale, 2**bits - 1, draws.random()) for value in block]
        start += size
    if bits == 4:
        codes = [low | high << 4 for low, high in zip(codes[::2], codes[1::2])]
    return bytes([{8: 0x11, 4: 0x12}[bits]]) + to_bytes(scales) + bytes(codes)


def code(value: float, scale: float, top: int, r: float) -> int:
    y = (value / scale + 1) * top / 2 if scale else 0.0
    return min(math.floor(y + r), top)


def decode_form(data: bytes, form: str, d: int, seed: bytes = b"", kept_fraction: float = 0.0) -> array[float]:
    """The d numbers that an update in this form stands for. Raises Refused."""
    if form in ("rotated-8bit", "rotated-4bit"):
        return decode_rotated(data, d, seed, 8 if form == "rotated-8bit" else 4)
    return decode_top_k(data, d, max(1, math.floor(kept_fraction * d)), form == "top-k-8bit")


def read_scales(data: bytes) -> array[float]:
    scales = from_bytes(data)
    if not all(0 <= scale <= 2.0**100 for scale in scales):
        raise Refused("a scale out of its bounds")
    return scales


def decode_rotated(data: bytes, d: int, seed: bytes, bits: int) -> array[float]:
    sizes, top = block_sizes(d), 2**bits - 1
    first_code = 1 + 4 * len(sizes)
    if len(data) != first_code + sum(sizes) * bits // 8 or data[0] != {8: 0x11, 4: 0x12}[bits]:
        raise Refused("another form or size")
    scales, codes = read_scales(data[1:first_code]), list(data[first_code:])
    if bits == 4:
        codes = [half for byte in codes for half in (byte & 15, byte >> 4)]
    values, start = array("f"), 0
    for size, scale in zip(sizes, scales):
        step = float32(scale / top)
        block = array("f", ((2 * q - top) * step for q in codes[start : start + size]))
        hadamard(block)
        values.extend(block)
        start += size
    return array("f", (value * sign for value, sign in zip(values, signs(seed, len(values)))))[:d]


def decode_top_k(data: bytes, d: int, k: int, coded: bool) -> array[float]:
    bitmap, gaps = (0x23, 0x24) if coded else (0x21, 0x22)
    if not data or data[0] not in (bitmap, gaps):
        raise Refused("another form")
    indices, at = read_bitmap(data, d) if data[0] == bitmap else read_gaps(data, k)
    if len(indices) != k or indices[-1] >= d:
        raise Refused("not k indices below d")
    if not coded:
        if len(data) != at + 4 * k:
            raise Refused("another size")
        values = from_bytes(data[at:])
    else:
        blocks = -(-k // 4096)
        if len(data) != at + 4 * blocks + k:
            raise Refused("another size")
        steps = [float32(scale / 255) for scale in read_scales(data[at : at + 4 * blocks])]
        values = array("f", ((2 * q - 255) * steps[i // 4096] for i, q in enumerate(data[at + 4 * blocks :])))
    update = array("f", bytes(4 * d))
    for index, value in zip(indices, values):
        update[index] = value
    return update


def read_bitmap(data: bytes, d: int) -> tuple[list[int], int]:
    end = 1 + -(-d // 8)
    number = int.from_bytes(data[1:end], "little")
    return [i for i in range(8 * (end - 1)) if number >> i & 1], end


def read_gaps(data: bytes, k: int) -> tuple[list[int], int]:
    indices: list[int] = []
    at, last = 1, -1
    for _ in range(k):
        gap = shift = 0
        while True:
            if at >= len(data) or shift > 28:
                raise Refused("gaps that do not end")
            byte, at = data[at], at + 1
            gap |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
        if byte == 0 and shift:
            raise Refused("a gap in a longer form than it needs")
        last += gap + 1
        indices.append(last)
    return indices, at


# --- encryption (section 8.2)

HEADER_BYTES = 512


def encrypt(
    update: bytes, num_examples: int, metrics: dict[str, float], invitation: Message, device_id: str, private: bytes
) -> bytes:
    """What travels in place of the update. private: 32 random bytes, for this update alone. Raises Refused."""
    header = pack({"num_examples": num_examples, "metrics": metrics})
    if len(header) > HEADER_BYTES - 2:
        raise Refused("the metrics do not fit into an encrypted update")
    framed = (struct.pack("<H", len(header)) + header).ljust(HEADER_BYTES, b"\0")
    pair = X25519PrivateKey.from_private_bytes(private)
    public = pair.public_key().public_bytes_raw()
    parts = [1, invitation["encryption_key"], public, invitation["round_id"], device_id]
    info = b"covey encrypted update\0" + pack(parts)
    secret = shared_secret(pair, invitation["encryption_key"])
    key = HKDF(Sha256Hash(), 32, None, info).derive(secret)
    return public + ChaCha20Poly1305(key).encrypt(bytes(12), framed + update, None)


def shared_secret(pair: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return pair.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # all zeros
        raise Refused("the round's encryption key is a point of low order") from None


# --- the coordinator's keys (section 3.1)


class PinnedKeys:
    """One key, or the current and the next, each with a window. A message under the next retires the current."""

    def __init__(self, hexadecimal: list[str], retired: Path) -> None:
        self.file = retired
        self.retired = set(retired.read_text().split()) if retired.exists() else set[str]()
        self.all = {name: Ed25519PublicKey.from_public_bytes(bytes.fromhex(name)) for name in hexadecimal}
        self.windows = {name: Window() for name in hexadecimal}

    def open(self, payload: bytes, topic: str) -> Message:
        """The message that a key which is not retired has sealed. Raises Refused; OSError if none can be retired."""
        problem = Refused("every key is retired")
        for name, key in self.all.items():
            if name in self.retired:
                continue
            try:
                number, body = unwrap(payload, topic, "coordinator", key)
            except Refused as exc:
                problem = exc
                continue
            message = decode_body(body, FROM_COORDINATOR)
            if not self.windows[name].passes(number):
                raise Refused(f"number {number} was heard before")
            self._retire_those_before(name)
            return message
        raise problem

    def _retire_those_before(self, name: str) -> None:
        names = list(self.all)
        older = set(names[: names.index(name)]) - self.retired
        if older:
            write_durably(self.file, "\n".join(sorted(self.retired | older)).encode())
            self.retired |= older


# --- the outbox


class Outbox:
    """One file per update: its Offer and its bytes, on disk before anybody is told of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, offer: Message, update: bytes) -> None:
        write_durably(self.file(offer["round_id"]), pack([time.time_ns(), offer, update]))

    def offers(self) -> list[Message]:
        """Those whose update can be read, the oldest first. The others are removed."""
        found = []
        for path in list(self.folder.iterdir()):
            try:
                kept_at, offer, _ = unpack(path.read_bytes())
                self.update(offer)
                if path != self.file(offer["round_id"]):
                    raise Refused("a file that was not finished")
                found.append((kept_at, offer))
            except (Refused, ValueError, OSError):
                path.unlink()
        return [offer for _, offer in sorted(found, key=lambda pair: pair[0])]

    def update(self, offer: Message) -> bytes:
        data: bytes = unpack(self.file(offer["round_id"]).read_bytes())[2]
        if hashlib.sha256(data).digest() != offer["update"]["sha256"]:
            raise Refused("the update is damaged on disk")
        return data

    def forget(self, round_id: str) -> None:
        self.file(round_id).unlink(missing_ok=True)

    def file(self, round_id: str) -> Path:
        return self.folder / f"{round_id}.update"


# --- fetching


class Fetch:
    """The chunks of one blob as they come, in any order and repeatedly."""

    def __init__(self, ref: Message) -> None:
        self.ref, self.chunks = ref, dict[int, bytes]()

    def missing(self) -> list[int]:
        return [i for i in range(chunk_count(self.ref)) if i not in self.chunks]

    def take(self, index: int, data: bytes) -> bool:
        """False for a chunk that does not exist, has another size or is here already."""
        start = index * self.ref["chunk_bytes"]
        size = min(self.ref["chunk_bytes"], self.ref["size"] - start)
        if size <= 0 or len(data) != size or index in self.chunks:
            return False
        self.chunks[index] = data
        return True

    def whole(self) -> bytes | None:
        """The blob; None where its hash is wrong, and then everything is forgotten."""
        data = b"".join(self.chunks[i] for i in sorted(self.chunks))
        if hashlib.sha256(data).digest() == self.ref["sha256"]:
            return data
        self.chunks.clear()
        return None


def make_update(parameters: bytes, device_id: str) -> array[float]:
    """In place of training: a step towards 0, and a pattern that differs from device to device."""
    turn = zlib.crc32(device_id.encode()) % 13
    return array("f", (-0.01 * p + 0.0001 * ((7 * i + turn) % 13 - 6) for i, p in enumerate(from_bytes(parameters))))


def make_metrics(parameters: bytes) -> dict[str, float]:
    """In place of an evaluation (section 8.3)."""
    values = from_bytes(parameters)
    return {"loss": math.fsum(map(abs, values)) / len(values), "accuracy": 0.25}


def make_shares(parameters: bytes) -> array[float]:
    """In place of counting (section 8.4)."""
    return array("f", [0.5] * (len(parameters) // 4))


# --- the device (sections 5 and 7)

IDLE, FETCHING, TRAINING, REPORTING = "idle", "fetching", "training", "reporting"
CAN = ["train", "float32", "rotated-8bit", "rotated-4bit", "encryption", "late", "evaluate", "tasks", "svrg"]
METRICS = {"loss", "accuracy"}
WORKS = {"train": (0, 0), "features": (0, 0), "gradient": (0, 0), "svrg": (1, 2)}  # fewest and most vectors
REPEAT_S, SLOW_REPEAT_S, FETCH_AGAIN_S, FETCH_AGAIN_MOST_S, OWED_MOST = 5.0, 30.0, 10.0, 160.0, 8


class Device:
    """The table of section 5 with its effects. INVITED is no state here: the policy answers at once."""

    def __init__(self, settings: argparse.Namespace, connection: Any = None) -> None:
        self.settings, self.id = settings, settings.id
        state = Path(settings.state)
        self.outbox = Outbox(state / "outbox")
        self.blobs = state / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.pinned = PinnedKeys(settings.coordinator_key, state / "retired")
        self.state, self.round, self.waiting = IDLE, Message(), Message()
        self.settled, self.deadline, self.last_chunk = "", 0.0, 0.0
        self.excuse = Message()  # the Answer(no) or Failure that ended the settled round for this device
        self.now = time.monotonic()  # the same for all that one step does
        self.fetches: dict[str, Fetch] = {}
        self.owed = {offer["round_id"]: offer for offer in self.outbox.offers()}
        self.touched = dict.fromkeys(self.owed, -math.inf)  # when an Offer, a Need or a Receipt was last sent or heard
        self.unanswered: dict[str, int] = {}  # repeats of an Offer since a Need or a Receipt came
        self.fetch_again_s = FETCH_AGAIN_S
        self.connection = connection or Connection(settings, state)

    # what comes in

    def hear(self, topic: str, payload: bytes) -> None:
        prefix = f"covey/1/{self.settings.fleet}/"
        if topic.startswith(prefix + "blob/"):
            self.chunk_came(topic, payload)
        elif payload:  # nothing on fleet/round: no coordinator serves the fleet
            message = self.pinned.open(payload, topic)
            if message["type"] not in (ON_ROUND if topic == prefix + "fleet/round" else ON_DOWN):
                raise Refused(f"{message['type']} on {topic}")
            self.take(message)

    def take(self, message: Message) -> None:
        getattr(self, message["type"])(message)
        self.admit_the_waiting()

    def admit_the_waiting(self) -> None:
        if self.waiting and self.state not in (FETCHING, TRAINING):
            message, self.waiting = self.waiting, Message()
            self.invitation(message)

    def works_for(self, round_id: str) -> bool:
        return bool(self.round) and self.round["round_id"] == round_id

    def invitation(self, message: Message) -> None:
        """D1 and D2."""
        round_id = message["round_id"]
        if self.works_for(round_id) or round_id == self.settled:
            self.answer_again()
            return
        if round_id in self.owed:
            return
        for earlier in message["earlier"]:
            if earlier in self.owed and self.touched[earlier] < self.now:
                self.send_offer(earlier)
        invited = not message["devices"] or self.id in message["devices"]
        if self.state in (FETCHING, TRAINING) and self.round["round_id"] in message["earlier"]:
            self.waiting = message if invited else Message()
            log("waits" if invited else "not invited", round_id)
            return
        if not invited:
            return
        self.discard()
        self.waiting, self.excuse = Message(), Message()
        if reason := self.objection(message):
            self.give_up({"type": "answer", "round_id": round_id, "accept": False, "reason": reason})
            return
        self.round, self.state = message, FETCHING
        self.deadline = self.now + message["duration_ms"] / 1000
        self.send("answer", round_id=round_id, accept=True)
        self.start_fetching()

    def objection(self, message: Message) -> str:
        for name in [*message["requires"], message["plan"]["compression"]]:
            if name not in (*CAN, "none"):
                return f"this device cannot {name}; update its agent"
        plan = message["plan"]
        if plan["task"] and plan["task"] not in self.settings.task:
            return f"this device takes no part in the task {plan['task']}"
        if unknown := set(plan["evaluate"]) - METRICS:
            return f"this device cannot evaluate {', '.join(sorted(unknown))}"
        if plan["evaluate"] and plan["compression"] != "none":
            return "metrics do not travel compressed"
        if plan["work"] not in WORKS:
            return f"this device cannot do {plan['work']}"
        if "encryption" in message["requires"] and message["encryption_key"] is None:
            return "the round is to be encrypted and brings no key"
        if message["encryption_key"] is not None:
            try:
                shared_secret(X25519PrivateKey.generate(), message["encryption_key"])
            except Refused as exc:
                return str(exc)
        largest = max(message["bundle"]["chunk_bytes"], message["parameters"]["chunk_bytes"])
        limit = self.settings.max_message_bytes
        if limit and largest + PACKET_ROOM_BYTES > limit:
            return f"chunks of {largest} bytes do not fit into messages of {limit}"
        return ""

    def start_fetching(self) -> None:
        refs = (self.round["bundle"], self.round["parameters"], *self.round["vectors"])
        wanted = {m["sha256"].hex(): m for m in refs}
        for path in self.blobs.iterdir():
            if path.name not in wanted:
                path.unlink()
        self.fetches = {sha: Fetch(ref) for sha, ref in wanted.items() if not (self.blobs / sha).exists()}
        self.subscribe_missing()
        self.train_if_all_is_here()

    def subscribe_missing(self) -> None:
        self.last_chunk = self.now
        topics = [f"blob/{sha}/{i}" for sha, fetch in self.fetches.items() for i in fetch.missing()]
        for start in range(0, len(topics), 64):
            self.connection.subscribe(topics[start : start + 64])

    def leave(self, sha: str) -> None:
        fetch = self.fetches.pop(sha)
        topics = [f"blob/{sha}/{i}" for i in range(chunk_count(fetch.ref))]
        for start in range(0, len(topics), 64):
            self.connection.unsubscribe(topics[start : start + 64])

    def chunk_came(self, topic: str, payload: bytes) -> None:
        sha, index = topic.split("/")[-2:]
        if sha not in self.fetches or not self.fetches[sha].take(int(index), payload):
            return
        self.last_chunk, self.fetch_again_s = self.now, FETCH_AGAIN_S
        fetch = self.fetches[sha]
        if fetch.missing():
            return
        if (data := fetch.whole()) is None:
            return  # all of it is missing again, and is subscribed again when no chunk has come for 10 s
        self.leave(sha)
        write_durably(self.blobs / sha, data)
        self.train_if_all_is_here()

    def train_if_all_is_here(self) -> None:
        """D3."""
        if not self.fetches:
            self.state = TRAINING
            log("training", self.round["round_id"])

    def train(self) -> None:
        """D4 and D5."""
        round_id, plan = self.round["round_id"], self.round["plan"]
        try:
            bundle = (self.blobs / self.round["bundle"]["sha256"].hex()).read_bytes()
            manifest = open_bundle(bundle, self.pinned.all.values())
            for field, name in (("gradient_clip_norm", "clip_norm"), ("proximal_weight", "proximal")):
                if plan[field] and name not in manifest.get("train_inputs", []):
                    raise Refused(f"the bundle takes no {name}")
            parameters = (self.blobs / self.round["parameters"]["sha256"].hex()).read_bytes()
            if plan["evaluate"]:
                metrics = make_metrics(parameters)
                self.keep(round_id, to_bytes(metrics[name] for name in plan["evaluate"]), 10, {"held_out": 0.0})
            else:
                self.check_vectors(len(parameters))
                update = make_shares(parameters) if plan["work"] == "features" else make_update(parameters, self.id)
                self.keep(round_id, self.in_form(update), 10, {"seconds": 0.5})
        except (Refused, OSError) as exc:
            self.give_up({"type": "failure", "round_id": round_id, "reason": str(exc)[:500]})
            return
        if self.settings.hold_after_keeping:
            log("holding", round_id)
            time.sleep(3600)
        self.state = REPORTING
        self.send_offer(round_id)

    def check_vectors(self, size: int) -> None:
        """They are as many as the work needs, each as large as the parameters, and numbers."""
        refs, (fewest, most) = self.round["vectors"], WORKS[self.round["plan"]["work"]]
        if not fewest <= len(refs) <= most or any(ref["size"] != size for ref in refs):
            raise Refused(f"{len(refs)} vectors for {self.round['plan']['work']}, or of another size")
        for ref in refs:
            if not all(map(math.isfinite, from_bytes((self.blobs / ref["sha256"].hex()).read_bytes()))):
                raise Refused("a vector that is not finite")

    def in_form(self, update: array[float]) -> bytes:
        form = self.round["plan"]["compression"]
        if form == "none":
            return to_bytes(update)
        seed = f"covey update {self.round['round_id']} {self.id}".encode()
        return encode_rotated(update, seed, 8 if form == "rotated-8bit" else 4)

    def keep(self, round_id: str, data: bytes, num_examples: int, metrics: dict[str, float]) -> None:
        if self.round["encryption_key"] is not None:
            data = encrypt(data, num_examples, metrics, self.round, self.id, os.urandom(32))
            num_examples, metrics = 1, {}  # what is true of them is inside
        if len(self.owed) >= OWED_MOST:
            self.forget(next(iter(self.owed)))
        size = self.round["parameters"]["chunk_bytes"]
        update = {"sha256": hashlib.sha256(data).digest(), "size": len(data), "chunk_bytes": size}
        offer = {"round_id": round_id, "update": update, "num_examples": num_examples, "metrics": metrics}
        self.outbox.keep(offer, data)
        self.owed[round_id] = offer

    def need(self, message: Message) -> None:
        """D6, and D12 where the update can no longer be read."""
        if not self.owes(message):
            return
        round_id, ref = message["round_id"], self.owed[message["round_id"]]["update"]
        self.touched[round_id], self.unanswered[round_id] = self.now, 0
        known = [index for index in dict.fromkeys(message["indices"]) if index < chunk_count(ref)]
        if not known:
            return
        try:
            update = self.outbox.update(self.owed[round_id])
        except (Refused, OSError) as exc:
            failure = {"type": "failure", "round_id": round_id, "reason": f"the update is lost: {exc}"[:500]}
            if self.works_for(round_id):
                self.give_up(failure)
            else:
                self.send(**failure)
            self.forget(round_id)
            return
        for index in known:
            data = update[index * ref["chunk_bytes"] :][: ref["chunk_bytes"]]
            self.send("chunk", round_id=round_id, sha256=ref["sha256"], index=index, data=data)

    def owes(self, message: Message) -> bool:
        offer = self.owed.get(message["round_id"])
        return offer is not None and bool(offer["update"]["sha256"] == message["sha256"])

    def receipt(self, message: Message) -> None:
        """D7."""
        round_id = message["round_id"]
        if not self.owes(message):
            return
        self.touched[round_id], self.unanswered[round_id] = self.now, 0
        if not message["kept"]:
            log("not kept", round_id, message["reason"])
            self.forget(round_id)
        else:
            log("kept", round_id)
            if self.works_for(round_id):
                self.settle(round_id)

    def verdict(self, message: Message) -> None:
        """D8."""
        if message["round_id"] in self.owed:
            log("verdict", message["round_id"], message["status"], message["reason"])
            self.forget(message["round_id"])
        self.send("seen", round_id=message["round_id"])

    def closed(self, message: Message) -> None:
        """D9."""
        round_id = message["round_id"]
        if self.waiting and self.waiting["round_id"] == round_id:
            self.waiting = Message()
        elif round_id == self.settled:
            self.excuse = Message()
        elif self.works_for(round_id):
            if self.state in (FETCHING, TRAINING) and self.round["max_staleness"]:
                log("goes on", round_id)
            else:
                self.settle(round_id)

    # what time and the connection bring

    def connected(self) -> None:
        """D10."""
        self.answer_again()
        if self.state == FETCHING:
            self.subscribe_missing()
        for round_id in self.owed:
            self.send_offer(round_id)

    def tick(self) -> None:
        """D11, the end of training, and chunks that do not come."""
        if self.state == TRAINING and self.settings.training_waits_for.exists():
            self.train()
        if self.round and self.now >= self.deadline:
            round_id = self.round["round_id"]
            if self.state == REPORTING:
                self.settle(round_id)
            else:
                self.give_up({"type": "failure", "round_id": round_id, "reason": "the round's time is over"})
        for round_id in self.owed:
            repeats = self.unanswered.get(round_id, 0)
            patience = min(SLOW_REPEAT_S, REPEAT_S * 2**repeats) if self.works_for(round_id) else SLOW_REPEAT_S
            if self.now - self.touched[round_id] >= patience:
                self.unanswered[round_id] = repeats + 1
                self.send_offer(round_id)
        if self.state == FETCHING and self.now - self.last_chunk >= self.fetch_again_s:
            self.fetch_again_s = min(2 * self.fetch_again_s, FETCH_AGAIN_MOST_S)
            self.subscribe_missing()
        self.admit_the_waiting()

    # effects

    def discard(self) -> None:
        for sha in list(self.fetches):
            self.leave(sha)
        self.round, self.state = Message(), IDLE

    def answer_again(self) -> None:
        """What this device last answered to an invitation may be lost."""
        if self.state in (FETCHING, TRAINING):
            self.send("answer", round_id=self.round["round_id"], accept=True)
        elif self.excuse:
            self.send(**self.excuse)

    def give_up(self, excuse: Message) -> None:
        self.send(**excuse)
        self.settle(excuse["round_id"])
        self.excuse = excuse

    def settle(self, round_id: str) -> None:
        self.discard()
        self.settled = round_id

    def forget(self, round_id: str) -> None:
        self.outbox.forget(round_id)
        del self.owed[round_id], self.touched[round_id]
        if self.works_for(round_id):
            self.settle(round_id)

    def send_offer(self, round_id: str) -> None:
        self.touched[round_id] = self.now
        self.send("offer", **self.owed[round_id])

    def send(self, type: str, **fields: Any) -> None:
        if type in ("offer", "chunk") and not self.connection.up:
            return  # sent again or asked for again when the connection is back
        self.connection.say("up", {"type": type, **fields})

    def run(self) -> None:
        while not self.connection.stopping:
            fresh = self.connection.turn()
            self.now = time.monotonic()
            if fresh:
                self.connected()
            while self.connection.inbox:
                topic, payload = self.connection.inbox.popleft()
                self.now = time.monotonic()
                try:
                    self.hear(topic, payload)
                except (Refused, OSError) as exc:
                    log("dropped", topic, str(exc))
            self.now = time.monotonic()
            self.tick()
        self.connection.goodbye()


class Connection:
    """MQTT 3.1.1 with a clean session, seals, and a wait that doubles."""

    def __init__(self, settings: argparse.Namespace, state: Path) -> None:
        self.settings, self.prefix = settings, f"covey/1/{settings.fleet}/"
        key = load_pem_private_key(Path(settings.key).read_bytes(), None)
        assert isinstance(key, Ed25519PrivateKey)
        self.key, self.numbers = key, Numbers(state / "sequence")
        self.session = self.numbers.take()
        self.inbox: deque[tuple[str, bytes]] = deque()
        self.up, self.stopping, self.fresh = False, False, False
        self.wait_s, self.next_try, self.since = 1.0, 0.0, 0.0
        self.first_by = time.monotonic() + 10
        self.client = paho.Client(
            paho.CallbackAPIVersion.VERSION2, f"covey-{settings.fleet}-{settings.id}", clean_session=True
        )
        self.client.on_connect = self._on_connect
        self.client.on_message = lambda client, data, message: self.inbox.append((message.topic, message.payload))

    def _on_connect(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        self.fresh = not reason.is_failure

    def envelope(self, channel: str, message: Message) -> tuple[str, bytes]:
        topic = f"{self.prefix}device/{self.settings.id}/{channel}"
        return topic, wrap(self.key, topic, self.settings.id, self.numbers.take(), encode_body(message))

    def say(self, channel: str, message: Message) -> None:
        topic, payload = self.envelope(channel, message)
        self.client.publish(topic, payload, qos=1, retain=channel == "presence")

    def presence(self, online: bool) -> Message:
        if not online:
            return {"type": "presence", "online": False, "session": self.session}
        return {
            "type": "presence", "online": True, "session": self.session, "agent_version": "clean-room",
            "runtime": "none", "capabilities": CAN,
        }  # fmt: skip

    def subscribe(self, topics: list[str]) -> None:
        if self.up and topics:
            self.client.subscribe([(self.prefix + topic, 1) for topic in topics])

    def unsubscribe(self, topics: list[str]) -> None:
        if self.up and topics:
            self.client.unsubscribe([self.prefix + topic for topic in topics])

    def turn(self) -> bool:
        """Read and write for up to 0.1 s. True when the connection has just come up."""
        now = time.monotonic()
        if self.client.socket() is None and now >= self.next_try:
            self._try(now)
        if self.client.loop(0.1) != paho.MQTT_ERR_SUCCESS:
            if self.up and now - self.since > 5:
                self.wait_s = 1.0
            self.up = False
            time.sleep(0.05)
        if not self.fresh:
            return False
        self.fresh, self.up, self.since = False, True, now
        self.subscribe(["fleet/round", f"device/{self.settings.id}/down"])
        self.say("presence", self.presence(True))
        return True

    def _try(self, now: float) -> None:
        if not self.since and now > self.first_by:
            raise SystemExit("no connection within 10 s")
        self.next_try = now + random.uniform(self.wait_s / 2, self.wait_s)
        self.wait_s = min(2 * self.wait_s, 60.0)
        self.client.will_set(*self.envelope("presence", self.presence(False)), qos=1, retain=True)
        try:
            self.client.connect(self.settings.host, self.settings.port, keepalive=30)
        except OSError as exc:
            log("no connection:", str(exc))

    def goodbye(self) -> None:
        topic, payload = self.envelope("presence", self.presence(False))
        told = self.client.publish(topic, payload, qos=1, retain=True)
        end = time.monotonic() + 5
        while self.up and not told.is_published() and time.monotonic() < end:
            self.client.loop(0.1)
        self.client.disconnect()


def log(*words: str) -> None:
    print(*words, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--host", "--fleet", "--id", "--key", "--state"):
        parser.add_argument(name, required=True)
    parser.add_argument(
        "--coordinator-key", action="append", required=True, help="twice while it changes, the next one last"
    )
    parser.add_argument("--task", action="append", default=[], help="one that its owner allows")
    parser.add_argument("--port", type=int, default=1883)
    parser.add_argument("--max-message-bytes", type=int, default=0, help="what the broker takes, where it is known")
    parser.add_argument(
        "--training-waits-for", type=Path, default=Path("/"), help="training lasts until this file exists"
    )
    parser.add_argument(
        "--hold-after-keeping", action="store_true", help="stop after an update is on disk, to be killed"
    )
    device = Device(parser.parse_args())

    def stop(*_: Any) -> None:
        device.connection.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    device.run()
    sys.exit(0)


if __name__ == "__main__":
    main()
