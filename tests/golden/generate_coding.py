"""Golden vectors of the cyclic code: coefficients, rows of every device and their bytes, and the sum over the shards.

`python tests/golden/generate_coding.py` adds vectors and never changes an old one. The test in
tests/coding/test_cyclic_work.py verifies all of them. Coefficients go through sines, so another device's rows may
differ from these by a few units in the last place: 2e-15 of the row's largest number.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from covey_protocol.coding import CyclicCode, as_numbers, weighed
from covey_protocol.compression import encode
from covey_protocol.forms import FLOAT64, Compression

FILE = Path(__file__).with_name("coding-v1.json")
CASES = {"three devices": (3, 1), "four devices, complex": (4, 1), "seven devices, s = 2": (7, 2)}
D = 5


def update(shard: int) -> np.ndarray:
    """Exact in float32: ((37 i^2 + 11 i + 5 shard^2) mod 257 - 128) / 64."""
    i = np.arange(D)
    return (((37 * i * i + 11 * i + 5 * shard * shard) % 257 - 128) / 64).astype(np.float32)


def num_examples(shard: int) -> int:
    return 40 + 7 * shard


def vectors() -> dict[str, dict[str, object]]:
    """What today's code makes."""
    made = {}
    for name, (n, s) in CASES.items():
        code = CyclicCode(n, s)
        parts = [weighed(update(shard), num_examples(shard)) for shard in range(n)]
        rows = [as_numbers(code.encode(parts[shard] for shard in code.shards(device))) for device in range(n)]
        made[name] = {
            "n": n,
            "s": s,
            "coefficients": [[float(value.real), float(value.imag)] for value in code.coefficients],
            "rows": [encode(row, Compression(FLOAT64), b"").hex() for row in rows],
            "total": np.sum(parts, axis=0).tolist(),
        }
    return made


def main() -> None:
    known = json.loads(FILE.read_text())["vectors"] if FILE.exists() else {}
    content = {
        "update": "((37 i^2 + 11 i + 5 shard^2) mod 257 - 128) / 64, i from 0 to 4",
        "num_examples": "40 + 7 shard",
        "vectors": {**vectors(), **known},
    }
    FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
