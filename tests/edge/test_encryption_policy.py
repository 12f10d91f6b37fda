"""What an agent answers to invitations with and without a key to encrypt to, by its owner's policy."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from covey_edge.agent import AgentProgram
from covey_edge.config import load_agent
from covey_protocol.encryption import ENCRYPTION, KeyPair
from covey_protocol.messages import BlobRef, Invitation, TrainingPlan
from covey_protocol.seals import SealingKey

KEY = SealingKey.from_seed(bytes(32))
PLAIN = Invitation("r.1.a", 1, 0, 1000, BlobRef(bytes(32), 10), BlobRef(bytes(32), 40), TrainingPlan(1, 0.1))
ENCRYPTED = msgspec.structs.replace(
    PLAIN, requires=("train", ENCRYPTION), encryption_key=KeyPair.of(bytes([7]) * 32).public
)
CONFIG = f"""
device_id = "pi"
fleet = "home"
[broker]
url = "mqtt://localhost"
[identity]
key_file = "device.pem"
coordinator_key = "{KEY.public.hex()}"
[data]
path = "data.npz"
[privacy]
require_encryption = {{required}}
"""


def answer(folder: Path, required: bool, invitation: Invitation) -> tuple[bool, str]:
    (folder / "device.pem").write_bytes(KEY.pem())
    (folder / "agent.toml").write_text(CONFIG.format(required=str(required).lower()))
    checked = AgentProgram(load_agent(folder / "agent.toml")).conditions(invitation)
    return checked.ok, checked.reason


@pytest.mark.parametrize("required", [False, True])
def test_an_encrypted_round_is_accepted(required: bool, tmp_path: Path) -> None:
    assert answer(tmp_path, required, ENCRYPTED) == (True, "")


def test_a_plain_round_is_accepted_unless_the_owner_wants_encryption(tmp_path: Path) -> None:
    assert answer(tmp_path, False, PLAIN) == (True, "")
    ok, reason = answer(tmp_path, True, PLAIN)
    assert not ok
    assert "only encrypted (privacy.require_encryption)" in reason


@pytest.mark.parametrize("point", [0, 1])
def test_a_round_whose_key_everybody_could_compute_is_declined(point: int, tmp_path: Path) -> None:
    weak = msgspec.structs.replace(ENCRYPTED, encryption_key=point.to_bytes(32, "little"))
    ok, reason = answer(tmp_path, False, weak)
    assert not ok
    assert "low order" in reason


def test_a_round_that_asks_for_encryption_and_brings_no_key_is_declined(tmp_path: Path) -> None:
    ok, reason = answer(tmp_path, False, msgspec.structs.replace(PLAIN, requires=(ENCRYPTION,)))
    assert not ok
    assert "brings no key" in reason
