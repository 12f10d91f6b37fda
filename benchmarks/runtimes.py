"""How far the updates of two TFLite runtimes are apart on one machine, and what that does to coded redundancy.

Every model is trained on the same shards by the Python that runs this file and by another one, with the same order of
examples. Printed: how many numbers have equal bits, the largest difference as a share of the update's largest number,
and the same of the gradient; then what the cyclic code makes of rows of which every other device's is the other
runtime's: how far they are from a codeword (what its tolerance must be above), and the error of the sum.
Run: python benchmarks/runtimes.py --other PYTHON, which has ai-edge-litert and what else covey_edge depends on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from covey_edge.runtime import Model
from covey_edge.trainer import train
from covey_protocol.bundle import read_bundle
from covey_protocol.coding import CyclicCode, weighed
from covey_protocol.messages import TrainingPlan

MODELS = ("softmax", "mlp", "small-cnn")
EPOCHS = (1, 5)
SHARDS, EXAMPLES, RATE, BATCH = 7, 64, 0.1, 16
CODES = ((4, 1), (7, 2))
EDGE = Path(__file__).resolve().parent.parent / "edge" / "src"


def write(folder: Path) -> None:
    """Bundles, and the shards of digits that both train on."""
    from sklearn.datasets import load_digits

    import covey_models
    from covey_models import zoo

    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1), y.astype(np.int32)
    for shard in range(SHARDS):
        np.savez(folder / f"shard-{shard}.npz", x=x[shard::SHARDS][:EXAMPLES], y=y[shard::SHARDS][:EXAMPLES])
    for name in MODELS:
        model = zoo.build(name, (8, 8, 1), 10, seed=0)
        bundle = covey_models.export(model, name=name, batch_size=BATCH, input_range=(0.0, 1.0), num_classes=10)
        (folder / f"{name}.covey").write_bytes(bundle)


def train_all(folder: Path, output: Path) -> None:
    """What this Python's runtime makes of it: NAME/gradient and NAME/EPOCHS, (shards, d) each."""
    found: dict[str, Any] = {}
    for name in MODELS:
        model = Model(read_bundle((folder / f"{name}.covey").read_bytes()))
        start, rows = model.parameters(), {}
        for shard in range(SHARDS):
            with np.load(folder / f"shard-{shard}.npz") as data:
                examples = data["x"], data["y"]
            model.set_parameters(start)
            rows.setdefault("gradient", []).append(model.gradient(*examples, seed=0))
            for epochs in EPOCHS:
                model.set_parameters(start)
                train(model, examples, TrainingPlan(epochs, RATE, shuffle_seed=7), f"shard-{shard}")
                rows.setdefault(str(epochs), []).append(model.parameters() - start)
        found.update({f"{name}/{what}": np.stack(values) for what, values in rows.items()})
    np.savez(output, runtime=model.runtime, **found)


def mixed(code: CyclicCode, here: Any, there: Any) -> tuple[float, float]:
    """(misfit, error of the sum): every other device's row is made with the other runtime."""
    from covey_coordinator.coding.cyclic import decode  # the other Python has no coordinator

    rows = []
    for device in range(code.n):
        vectors = there if device % 2 else here
        rows.append(code.encode([weighed(vectors[shard], EXAMPLES) for shard in code.shards(device)]))
    found = decode(code, np.stack(rows), np.random.default_rng(0), tolerance=1.0)
    true = np.sum([weighed(vector, EXAMPLES) for vector in here[: code.n]], axis=0)
    return found.misfit, float(np.abs(found.total - true)[:-1].max() / np.abs(true[:-1]).max())


def compare(here: Any, there: Any) -> None:
    print(f"{here['runtime']} on Python {sys.version.split()[0]}, and {there['runtime']}\n")
    codes = " | ".join(f"misfit, error, n = {n}, s = {s}" for n, s in CODES)
    print(f"| model | what | equal bits | largest difference | {codes} |\n|---|---|---|---|" + "---|" * len(CODES))
    for key in (key for key in here if key != "runtime"):
        one, other = here[key].astype(np.float64), there[key].astype(np.float64)
        equal = float(np.mean(here[key].view(np.uint32) == there[key].view(np.uint32)))
        largest = float(np.max(np.abs(one - other).max(axis=1) / np.abs(one).max(axis=1)))
        told = " | ".join("{:.1e}, {:.1e}".format(*mixed(CyclicCode(*size), one, other)) for size in CODES)
        name, what = key.split("/")
        what = what if what == "gradient" else f"update of {what} epochs"
        print(f"| {name} | {what} | {100 * equal:.1f}% | {largest:.1e} | {told} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--other", help="the Python of the other runtime")
    parser.add_argument("--train", nargs=2, help="(for the other Python: a folder, and where to write)")
    arguments = parser.parse_args()
    if arguments.train:
        train_all(*map(Path, arguments.train))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        for python, output in ((sys.executable, "here.npz"), (arguments.other or sys.executable, "there.npz")):
            command = [python, __file__, "--train", name, str(folder / output)]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(EDGE)})
        with np.load(folder / "here.npz") as here, np.load(folder / "there.npz") as there:
            compare(dict(here), dict(there))


if __name__ == "__main__":
    main()
