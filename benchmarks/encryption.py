"""What encrypting an update costs: bytes, and milliseconds on the device and at the coordinator. One thread.

The same calls that agent and coordinator make, on random bytes of the size that the form has.
Run: python benchmarks/encryption.py [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from covey_protocol.encryption import KeyPair, decrypted, encrypted
from covey_protocol.forms import ROTATED_8BIT, TOP_K_8BIT, Compression, update_sizes
from covey_protocol.messages import BlobRef, Invitation, TrainingPlan

FORMS = {
    "float32": Compression(),
    "rotated-8bit": Compression(ROTATED_8BIT),
    "top-k-8bit 1%": Compression(TOP_K_8BIT, 0.01),
}
METRICS = {"loss_before": 2.3, "accuracy_before": 0.1, "training_loss": 1.5, "seconds": 12.0}


def milliseconds(action: Callable[[], Any], repeats: int) -> float:
    """The median of so many."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    repeats = 20 if parser.parse_args().quick else 300
    pair, blob = KeyPair.made(), BlobRef(bytes(32), 400_000)
    invitation = Invitation("run.1.a", 1, 0, 1, blob, blob, TrainingPlan(1, 0.1), encryption_key=pair.public)
    print("| form | d | bytes | encrypted | more | encrypt ms | decrypt ms |\n|---|---|---|---|---|---|---|")
    for d in (100_000, 1_000_000):
        for name, form in FORMS.items():
            update = os.urandom(update_sizes(form, d)[1])
            data = encrypted(invitation, "pi", update, 100, METRICS)
            there = milliseconds(lambda: encrypted(invitation, "pi", update, 100, METRICS), repeats)  # noqa: B023
            here = milliseconds(lambda: decrypted(pair.private, "run.1.a", "pi", data), repeats)  # noqa: B023
            more = 100 * (len(data) / len(update) - 1)
            print(
                f"| {name} | {d:,} | {len(update):,} | {len(data):,} | {more:.2f}% | {there:.2f} | {here:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
