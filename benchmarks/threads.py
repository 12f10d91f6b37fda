"""What more threads of the TFLite runtime ([training] threads in agent.toml) do to a training's bits and time.

    python benchmarks/threads.py [--quick]

Each model is exported once and trained from the same start on the same batches with 1, 2 and 4 threads, twice each, in
turns. Weights are compared bit by bit with those of one thread. Quote ratios, not milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from train_step import LAYERS, exported

from covey_edge.runtime import Model, installed
from covey_protocol.bundle import read_bundle
from covey_protocol.messages import TrainingPlan

THREADS = (1, 2, 4)
MODELS = (
    "reference CNN, batch 8",
    "reference CNN, batch 64",
    "3x3 64 to 64, 14x14, batch 20",
    "MobileNetV2 block, 16x16x16, batch 20",
    "dense 784-512-10, batch 20",
)


class Trained:
    """One model with a number of threads, which is trained step by step."""

    def __init__(self, data: bytes, threads: int) -> None:
        self.model = Model(read_bundle(data), threads)
        self.model.start_training(TrainingPlan(1, 0.05))
        shape = (self.model.manifest.batch_size, *self.model.manifest.input.shape)
        rng = np.random.default_rng(0)
        self.x, self.y = rng.random(shape, np.float32), rng.integers(0, 10, shape[0]).astype(np.int32)
        self.times: list[float] = []

    def steps(self, count: int) -> None:
        for _ in range(count):
            start = time.perf_counter()
            self.model.train_batch(self.x, self.y, 0.05)
            self.times.append(time.perf_counter() - start)

    @property
    def bits(self) -> bytes:
        return self.model.parameters().tobytes()


def measured(name: str, steps: int, turns: int) -> None:
    batch_size, build = LAYERS[name]
    data, _ = exported(build(), batch_size)
    contestants = [(threads, Trained(data, threads)) for threads in THREADS for _ in range(2)]
    for _ in range(turns):
        for _, one in contestants:
            one.steps(steps // turns)
    alone, again = (one for threads, one in contestants if threads == 1)
    base = statistics.median(alone.times + again.times)
    for threads in THREADS:
        first, second = (one for number, one in contestants if number == threads)
        ratio = statistics.median(first.times + second.times) / base
        same = "same bits as one thread" if first.bits == alone.bits else "OTHER BITS than one thread"
        same += ", also the second time" if first.bits == second.bits else ", OTHER BITS the second time"
        print(f"{name:40} {threads} threads: {ratio:5.2f} of one thread's time, {same}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two models")
    chosen = MODELS[:1] + MODELS[-1:] if parser.parse_args().quick else MODELS
    print(installed()[1])
    for name in chosen:
        measured(name, steps=60, turns=6)


if __name__ == "__main__":
    main()
