"""What each form of an update costs: accuracy on digits, bytes per round, and the time to encode and decode.

The demo's data, model and settings (ten devices, Dirichlet alpha 1, 20 rounds, plain mean, nobody corrupted), trained
with the agent's own code in this process. Updates are decoded as the coordinator does it; only the network is left out.
Run: python benchmarks/compression.py [--quick] [--plot docs/compression.png]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from covey_coordinator.libraries import prepare

prepare()

import covey_models
from covey_edge.frames import Run
from covey_edge.runtime import Model
from covey_edge.trainer import compressed, train
from covey_models import datasets, partitions, zoo
from covey_protocol.bundle import read_bundle
from covey_protocol.compression import decode, decode_update, encode
from covey_protocol.forms import NONE, ROTATED_4BIT, ROTATED_8BIT, TOP_K, TOP_K_8BIT, Compression
from covey_protocol.messages import TrainingPlan

FORMS = {
    "float32": Compression(NONE),
    "rotated-8bit": Compression(ROTATED_8BIT),
    "rotated-4bit": Compression(ROTATED_4BIT),
    "top-k 10%": Compression(TOP_K, 0.1),
    "top-k 1%": Compression(TOP_K, 0.01),
    "top-k-8bit 10%": Compression(TOP_K_8BIT, 0.1),
    "top-k-8bit 1%": Compression(TOP_K_8BIT, 0.01),
}
DEVICES, BATCH, LEARNING_RATE, EPOCHS = 10, 16, 0.1, 3  # as in the demo


Examples = tuple[np.ndarray, np.ndarray]


class Task(NamedTuple):
    model: Model
    initial: np.ndarray
    shards: list[Examples]
    test: Examples


def make_task(seed: int) -> Task:
    """The demo's model, its shards and its test set."""
    train_set, test = datasets.split(datasets.load("digits"), test_fraction=0.2, seed=seed)
    parts = partitions.dirichlet(train_set.y, DEVICES, alpha=1.0, seed=seed, min_examples=8)
    bundle = covey_models.export(
        zoo.build("small-cnn", (8, 8, 1), 10, seed=seed), name="digits", batch_size=BATCH, num_classes=10, seed=seed
    )
    model = Model(read_bundle(bundle))
    return Task(model, model.parameters(), [(train_set.x[rows], train_set.y[rows]) for rows in parts], (test.x, test.y))


def run(seed: int, form: Compression, rounds: int, task: Task) -> tuple[list[float], int]:
    """(accuracy after every round, mean bytes of an update)."""
    model, parameters = task.model, task.initial
    withheld = [b""] * DEVICES
    accuracies, sizes = [], []
    for number in range(1, rounds + 1):
        plan = TrainingPlan(EPOCHS, LEARNING_RATE, 0, seed * 1_000_003 + number, 0.0, 0.0, *form)
        total = np.zeros_like(parameters)
        for index, shard in enumerate(task.shards):
            request = Run(f"run.{number}.0", f"device-{index:02d}", b"", plan, 0.0, 0.0, 1, withheld=withheld[index])
            model.set_parameters(parameters)
            train(model, shard, plan, request.device_id)
            update = model.parameters() - parameters
            data, withheld[index] = compressed(update, request)
            total += decode_update(data, plan, request.round_id, request.device_id, len(update))
            sizes.append(len(data))
        parameters = parameters + total / np.float32(DEVICES)
        model.set_parameters(parameters)
        accuracies.append(model.evaluate(*task.test)[1])
    return accuracies, round(statistics.mean(sizes))


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def accuracy_table(seeds: int, rounds: int) -> dict[str, np.ndarray]:
    """Prints the table and returns the curves, (seeds, rounds) for each form."""
    tasks = [make_task(seed) for seed in range(seeds)]
    curves = {}
    print(f"digits, {DEVICES} devices, {rounds} rounds, mean over {seeds} seeds (the worst of them)")
    print(f"| form | bytes of an update | of float32 | after {rounds // 2} rounds | at the end |")
    print("|---|---|---|---|---|")
    plain = 0
    for name, form in FORMS.items():
        runs = [run(seed, form, rounds, task) for seed, task in enumerate(tasks)]
        accuracy = np.array([one[0] for one in runs]) * 100
        size = round(statistics.mean(one[1] for one in runs))
        plain = plain or size
        half, end = accuracy[:, rounds // 2 - 1], accuracy[:, -1]
        print(
            f"| {name} | {size:,} | {size / plain:.1%} | {half.mean():.1f} ({half.min():.1f}) | "
            f"{end.mean():.1f} ({end.min():.1f}) |",
            flush=True,
        )
        curves[name] = accuracy
    return curves


def time_table(sizes: tuple[int, ...], repeats: int) -> None:
    print("\nmilliseconds to encode and to decode, median, one thread")
    print("| form | " + " | ".join(f"d = {d:,}" for d in sizes) + " |")
    print("|---|" + "---|" * len(sizes))
    for name, form in FORMS.items():
        cells = []
        for d in sizes:
            update = np.random.default_rng(d).standard_normal(d).astype(np.float32)
            data = encode(update, form, b"seed")
            there = milliseconds(lambda: encode(update, form, b"seed"), repeats)  # noqa: B023 - called at once
            back = milliseconds(lambda: decode(data, form, b"seed", d), repeats)  # noqa: B023 - called at once
            cells.append(f"{there:.1f}, {back:.1f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def plot(curves: dict[str, np.ndarray], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, accuracy in curves.items():
        axes.plot(range(1, accuracy.shape[1] + 1), accuracy.mean(axis=0), label=name)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.set_xlabel("round")
    axes.set_ylabel("test accuracy, %")
    axes.legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, four rounds, small vectors")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file")
    chosen = parser.parse_args()
    curves = accuracy_table(1, 4) if chosen.quick else accuracy_table(3, 20)
    time_table((10_000,) if chosen.quick else (100_000, 1_000_000), 3 if chosen.quick else 9)
    if chosen.plot:
        plot(curves, chosen.plot)


if __name__ == "__main__":
    main()
