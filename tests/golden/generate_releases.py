"""Golden vectors of releases: the sealed bytes of each with a fixed key.

`python tests/golden/generate_releases.py` adds vectors and never changes an old one. The test in
tests/protocol/test_releases.py verifies all of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from covey_protocol.messages import BlobRef
from covey_protocol.releases import Release, Wheel, seal_release
from covey_protocol.seals import SealingKey

FILE = Path(__file__).with_name("releases-v1.json")
KEY = SealingKey.from_seed(bytes(range(128, 160)))
AGENT = Wheel("covey_edge-0.2.0-py3-none-any.whl", BlobRef(bytes(range(32)), 206_027))
OTHER = Wheel("click-8.2.0-py3-none-any.whl", BlobRef(bytes(range(32, 64)), 98_000, 32_768))
CASES = {
    "one wheel for everybody": Release("0.2.0", 1_795_708_165_088, (AGENT,)),
    "two wheels for a tenth, with all fields": Release(
        "0.2.0", 7, (AGENT, OTHER), ">=3.9,<3.14", "0.1.5", 0.1, "mends the outbox"
    ),
    "one wheel for two devices alone": Release("0.2.1", 8, (AGENT,), share=0.0, devices=("kitchen-pi", "hall-pi")),
}


def vectors() -> dict[str, dict[str, object]]:
    """What today's code makes."""
    return {
        name: {"release": msgspec.to_builtins(release), "sealed": seal_release(release, KEY).hex()}
        for name, release in CASES.items()
    }


def main() -> None:
    known = json.loads(FILE.read_text())["vectors"] if FILE.exists() else {}
    content = {"public_key": KEY.public.hex(), "vectors": {**vectors(), **known}}
    FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
