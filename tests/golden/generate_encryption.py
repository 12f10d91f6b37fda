"""Golden vectors of encrypted updates: what each encrypts to with fixed keys, and what it says.

`python tests/golden/generate_encryption.py` adds vectors and never changes an old one. The test in
tests/protocol/test_encryption.py verifies all of them. A coordinator that has `round_private` must read `encrypted` as
`num_examples`, `metrics` and `update`; a device that draws `ephemeral_private` must make these very bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

from covey_protocol.encryption import KeyPair, encrypted
from covey_protocol.messages import BlobRef, Invitation, TrainingPlan

FILE = Path(__file__).with_name("encryption-v1.json")
ROUND = KeyPair.of(bytes(range(64, 96)))
EPHEMERAL = KeyPair.of(bytes(range(96, 128)))  # in the field a fresh one for every update
ROUND_ID, DEVICE = "run.3.abe", "kitchen-pi"
CASES: dict[str, tuple[bytes, int, dict[str, float]]] = {
    "ten float32 ones": (b"\x00\x00\x80\x3f" * 10, 143, {"training_loss": 0.5, "seconds": 12.0}),
    "compressed, without metrics": (bytes([0x21, *range(50)]), 1, {}),
}


def invitation() -> Invitation:
    """Of what is bound only the id and the key matter."""
    blob = BlobRef(bytes(32), 800)
    return Invitation(ROUND_ID, 3, 0, 1, blob, blob, TrainingPlan(1, 0.5), encryption_key=ROUND.public)


def vectors() -> dict[str, dict[str, object]]:
    """What today's code makes."""
    made = {}
    for name, (update, num_examples, metrics) in CASES.items():
        data = encrypted(invitation(), DEVICE, update, num_examples, metrics, lambda size: EPHEMERAL.private)
        made[name] = {
            "update": update.hex(),
            "num_examples": num_examples,
            "metrics": metrics,
            "encrypted": data.hex(),
        }
    return made


def main() -> None:
    known = json.loads(FILE.read_text())["vectors"] if FILE.exists() else {}
    content = {
        "round_id": ROUND_ID,
        "device_id": DEVICE,
        "round_private": ROUND.private.hex(),
        "round_public": ROUND.public.hex(),
        "ephemeral_private": EPHEMERAL.private.hex(),
        "vectors": {**vectors(), **known},
    }
    FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
