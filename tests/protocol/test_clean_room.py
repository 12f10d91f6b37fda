"""A device that was written from the documents alone meets the golden vectors.

`clean_room_device.py` shares no code with covey, so these tests hold docs/protocol.md against the bytes, not covey
against itself.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import sys
from array import array
from pathlib import Path
from typing import Any

import clean_room_device as clean
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

GOLDEN = Path(__file__).parents[1] / "golden"
V1 = json.loads((GOLDEN / "v1.json").read_text())
FORMS = json.loads((GOLDEN / "compression-v1.json").read_text())
ENCRYPTED = json.loads((GOLDEN / "encryption-v1.json").read_text())
KEYS = {
    "coordinator": Ed25519PrivateKey.from_private_bytes(bytes(range(0x20, 0x40))),
    "kitchen-pi": Ed25519PrivateKey.from_private_bytes(bytes(range(0x20))),
}
PUBLIC = {"coordinator": V1["coordinator_key"], "kitchen-pi": V1["device_key"]}
BUNDLES = [name for name in V1["vectors"] if name.startswith("bundle")]
MESSAGES = [name for name in V1["vectors"] if name not in BUNDLES]


def public_key(sender: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(PUBLIC[sender]))


def opened(name: str) -> tuple[dict[str, Any], bytes, int, bytes]:
    vector = V1["vectors"][name]
    data = bytes.fromhex(vector["hex"])
    number, body = clean.unwrap(data, vector["topic"], vector["sender"], public_key(vector["sender"]))
    return vector, data, number, body


def test_the_device_imports_only_the_standard_library_an_mqtt_client_and_cryptography() -> None:
    tree = ast.parse(Path(clean.__file__).read_text())
    imported = {n.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    imported |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"paho", "cryptography"}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_golden_message_is_read_checked_and_written_again_to_the_same_bytes(name: str) -> None:
    vector, data, number, body = opened(name)
    kinds = clean.FROM_COORDINATOR if vector["sender"] == "coordinator" else clean.FROM_DEVICE
    again = clean.encode_body(clean.decode_body(body, kinds))
    assert clean.wrap(KEYS[vector["sender"]], vector["topic"], vector["sender"], number, again) == data


@pytest.mark.parametrize("name", MESSAGES)
def test_a_golden_message_with_any_other_number_topic_or_key_is_refused(name: str) -> None:
    vector, data, number, body = opened(name)
    sender, other = vector["sender"], next(who for who in KEYS if who != vector["sender"])
    with pytest.raises(clean.Refused, match="seal"):
        clean.unwrap(data, vector["topic"] + "x", sender, public_key(sender))
    with pytest.raises(clean.Refused, match="seal"):
        clean.unwrap(data, vector["topic"], sender, public_key(other))
    version, said, _, _, seal = clean.unpack(data)
    with pytest.raises(clean.Refused, match="seal"):
        clean.unwrap(clean.pack([version, said, number + 1, body, seal]), vector["topic"], sender, public_key(sender))


@pytest.mark.parametrize("name", BUNDLES)
def test_a_golden_bundle_opens_with_the_coordinators_key_only(name: str) -> None:
    data = bytes.fromhex(V1["vectors"][name]["hex"])
    assert clean.open_bundle(data, [public_key("kitchen-pi"), public_key("coordinator")])["name"] == "golden"
    with pytest.raises(clean.Refused, match="not sealed"):
        clean.open_bundle(data, [public_key("kitchen-pi")])


# --- forms of updates


def golden_update(d: int) -> array[float]:
    assert FORMS["update"] == "((37 i^2 + 11 i) mod 257 - 128) / 64"
    return array("f", (((37 * i * i + 11 * i) % 257 - 128) / 64 for i in range(d)))


def same(data: bytes, golden: str) -> bool:
    return golden in (data.hex(), "sha256:" + hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize(
    "name", [n for n in FORMS["vectors"] if not FORMS["vectors"][n]["encoded"].startswith("sha256:")]
)
def test_a_golden_update_stands_for_the_same_numbers(name: str) -> None:
    vector = FORMS["vectors"][name]
    data, seed = bytes.fromhex(vector["encoded"]), FORMS["seed"].encode()
    decoded = clean.decode_form(data, vector["compression"], vector["d"], seed, vector["kept_fraction"])
    assert same(clean.to_bytes(decoded), vector["decoded"])
    for wrong in (data[:-1], data + b"\0", bytes([data[0] ^ 0x40]) + data[1:]):
        with pytest.raises(clean.Refused):
            clean.decode_form(wrong, vector["compression"], vector["d"], seed, vector["kept_fraction"])


@pytest.mark.parametrize("bits", [8, 4])
def test_what_the_device_encodes_has_the_golden_scales_and_the_golden_codes_but_for_the_rounding(bits: int) -> None:
    golden = bytes.fromhex(FORMS["vectors"][f"rotated-{bits}bit"]["encoded"])
    ours = clean.encode_rotated(golden_update(200), FORMS["seed"].encode(), bits)
    scales = 1 + 4 * len(clean.block_sizes(200))
    assert (len(ours), ours[:scales]) == (len(golden), golden[:scales])
    halves = [(byte & 15, byte >> 4) if bits == 4 else (byte,) for data in (ours, golden) for byte in data[scales:]]
    codes = [code for half in halves for code in half]
    differences = [a - b for a, b in zip(codes[: len(codes) // 2], codes[len(codes) // 2 :])]
    assert set(differences) == {-1, 0, 1}


def test_an_update_of_three_kinds_of_blocks_comes_back_within_a_step() -> None:
    update, seed = golden_update(8711), b"covey update run.1.abc kitchen-pi"
    decoded = clean.decode_form(clean.encode_rotated(update, seed, 8), "rotated-8bit", 8711, seed)
    error = math.fsum((a - b) ** 2 for a, b in zip(update, decoded)) / math.fsum(a * a for a in update)
    assert error < 3e-4  # 1.5e-4 of its square for normal numbers (section 8.1)


def test_an_update_of_zeros_is_zeros() -> None:
    zeros = array("f", bytes(4 * 100))
    assert not any(clean.decode_form(clean.encode_rotated(zeros, b"seed", 8), "rotated-8bit", 100, b"seed"))


# --- encryption


@pytest.mark.parametrize("name", ENCRYPTED["vectors"])
def test_a_golden_update_is_encrypted_to_the_same_bytes(name: str) -> None:
    vector = ENCRYPTED["vectors"][name]
    invitation = {"round_id": ENCRYPTED["round_id"], "encryption_key": bytes.fromhex(ENCRYPTED["round_public"])}
    private = bytes.fromhex(ENCRYPTED["ephemeral_private"])
    update, said = bytes.fromhex(vector["update"]), (vector["num_examples"], vector["metrics"])
    encrypted = clean.encrypt(update, *said, invitation, ENCRYPTED["device_id"], private)
    assert encrypted.hex() == vector["encrypted"]
    assert clean.encrypt(update, *said, invitation, "attic-pi", private) != encrypted


@pytest.mark.parametrize("point", [bytes(32), b"\1" + bytes(31)], ids=["zero", "one"])
def test_a_key_that_gives_everybody_the_same_secret_is_refused(point: bytes) -> None:
    with pytest.raises(clean.Refused, match="low order"):
        clean.encrypt(b"update", 1, {}, {"round_id": "r", "encryption_key": point}, "kitchen-pi", bytes(range(32)))


# --- the coordinator's next key

OLD, NEXT = KEYS["coordinator"], Ed25519PrivateKey.from_private_bytes(b"the next one".ljust(32, b"."))
TOPIC = "covey/1/golden/fleet/round"


def pinned(retired: Path) -> clean.PinnedKeys:
    return clean.PinnedKeys([key.public_key().public_bytes_raw().hex() for key in (OLD, NEXT)], retired)


def closed(key: Ed25519PrivateKey, number: int) -> bytes:
    body = clean.encode_body({"type": "closed", "round_id": "run.1.abc", "outcome": "published"})
    return clean.wrap(key, TOPIC, "coordinator", number, body)


def test_the_first_message_under_the_next_key_retires_the_old_one_for_good(tmp_path: Path) -> None:
    keys = pinned(tmp_path / "retired")
    assert keys.open(closed(OLD, 2**50), TOPIC)["outcome"] == "published"
    assert keys.open(closed(NEXT, 7), TOPIC)["outcome"] == "published"  # its numbers have a window of their own
    for again in (keys, pinned(tmp_path / "retired")):
        with pytest.raises(clean.Refused, match="seal"):
            again.open(closed(OLD, 2**50 + 1), TOPIC)


def test_where_a_retired_key_cannot_be_noted_the_message_is_not_taken(tmp_path: Path) -> None:
    keys = pinned(tmp_path / "no such folder" / "retired")
    with pytest.raises(OSError, match="no such folder"):
        keys.open(closed(NEXT, 7), TOPIC)
    assert keys.open(closed(OLD, 7), TOPIC)["type"] == "closed"


# --- parts


def test_message_numbers_grow_over_restarts_of_a_device_whose_clock_fell_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = [clean.Numbers(tmp_path / "sequence").take() for _ in range(2)]
    monkeypatch.setattr(clean.time, "time_ns", lambda: 0)
    later = clean.Numbers(tmp_path / "sequence")
    assert first[0] < first[1] < later.take() < later.take()


def test_a_window_lets_every_number_pass_once_and_nothing_that_is_too_old() -> None:
    window = clean.Window()
    assert [window.passes(n) for n in (5000, 4990, 5000, 4990, 3977, 3976, 5001, 3977)] == [
        True, True, False, False, True, False, True, False,
    ]  # fmt: skip


def test_what_was_not_finished_or_is_damaged_in_the_outbox_is_not_owed(tmp_path: Path) -> None:
    outbox = clean.Outbox(tmp_path / "outbox")
    offers = [
        {"round_id": name, "update": {"sha256": hashlib.sha256(name.encode()).digest()}}
        for name in ("r.2", "r.10", "r.3")
    ]
    for offer in offers:
        outbox.keep(offer, offer["round_id"].encode())
    whole = outbox.file("r.10").read_bytes()
    outbox.file("r.4").with_suffix(".update.part").write_bytes(whole.replace(b"r.10", b"r.40"))
    outbox.file("r.3").write_bytes(whole[:-1])
    assert clean.Outbox(tmp_path / "outbox").offers() == offers[:2]  # in the order of keeping
    assert len(list(outbox.folder.iterdir())) == 2
