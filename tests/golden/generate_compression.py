"""Golden vectors of the forms of updates: what each encodes to and decodes to.

`python tests/golden/generate_compression.py` adds vectors and never changes an old one. The test in
tests/protocol/test_compression.py verifies all of them. A receiver must decode `encoded` to exactly `decoded`. Another
sender may draw otherwise when it rounds; covey's goes on making these bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from covey_protocol.compression import decode, encode
from covey_protocol.forms import Compression, update_seed

FILE = Path(__file__).with_name("compression-v1.json")
SEED = update_seed("run.1.abc", "kitchen-pi")
CASES = {
    "rotated-8bit": (Compression("rotated-8bit"), 200),
    "rotated-4bit": (Compression("rotated-4bit"), 200),
    "rotated-8bit, three kinds of blocks": (Compression("rotated-8bit"), 2 * 4096 + 512 + 7),
    "rotated-4bit, three kinds of blocks": (Compression("rotated-4bit"), 2 * 4096 + 512 + 7),
    "top-k, gaps": (Compression("top-k", 0.02), 600),
    "top-k, bitmap": (Compression("top-k", 0.5), 200),
    "top-k-8bit, gaps": (Compression("top-k-8bit", 0.02), 600),
    "top-k-8bit, bitmap": (Compression("top-k-8bit", 0.5), 200),
    "top-k-8bit, two scales": (Compression("top-k-8bit", 0.5), 8300),
}


def update(d: int) -> np.ndarray:
    """Exact in float32, and without pattern for the eye: ((37 i^2 + 11 i) mod 257 - 128) / 64."""
    i = np.arange(d)
    return (((37 * i * i + 11 * i) % 257 - 128) / 64).astype(np.float32)


def vectors() -> dict[str, dict[str, object]]:
    """What today's code makes. Long ones as their sha256."""
    made = {}
    for name, (form, d) in CASES.items():
        encoded = encode(update(d), form, SEED)
        decoded = decode(encoded, form, SEED, d).astype("<f4").tobytes()
        made[name] = {
            "compression": form.name,
            "kept_fraction": form.kept_fraction,
            "d": d,
            "encoded": encoded.hex() if d < 1000 else f"sha256:{hashlib.sha256(encoded).hexdigest()}",
            "decoded": decoded.hex() if d < 1000 else f"sha256:{hashlib.sha256(decoded).hexdigest()}",
        }
    return made


def main() -> None:
    known = json.loads(FILE.read_text())["vectors"] if FILE.exists() else {}
    content = {
        "seed": SEED.decode(),
        "update": "((37 i^2 + 11 i) mod 257 - 128) / 64",
        "vectors": {**vectors(), **known},
    }
    FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
