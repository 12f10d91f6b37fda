"""What an attacker's step costs on a bundle that is read back, beside the Keras model it was exported from.

    python benchmarks/reading_back.py [--models mlp,small-cnn] [--batch 16] [--repeats 15]

An attacker's step is the derivative, in the input, of the squared distance between the gradient of an example and a
gradient that was seen: two passes back. Both sides are traced once and take turns; each figure is the median. With
XLA: the same, in a tf.function with jit_compile=True. Quote the ratios; the milliseconds are this machine's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from covey_coordinator.libraries import prepare

prepare()

import numpy as np
import tensorflow as tf

from covey_coordinator.inversion.bundle_model import BundleModel
from covey_models import build, export
from covey_protocol.bundle import read_bundle

SHAPES: dict[str, tuple[int, ...]] = {
    "softmax": (30,),
    "mlp": (30,),
    "small-cnn": (8, 8, 1),
    "emnist-cnn": (28, 28, 1),
    "activity-cnn": (128, 9),
    "transformer": (16, 8),
}
CLASSES = 10
Step = Callable[[Any], Any]


def of_bundle(model: BundleModel, parameters: Any, y: Any, seen: Any) -> Step:
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            distance = tf.reduce_sum((model.gradient(parameters, x, y) - seen) ** 2)
        return tape.gradient(distance, x)

    return step


def of_keras(model: Any, y: Any, seen: Any) -> Step:
    variables = model.trainable_variables

    def step(x: Any) -> Any:
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x, training=True))
                loss = tf.reduce_mean(losses)
            parts = [tf.reshape(part, [-1]) for part in inner.gradient(loss, variables)]
            distance = tf.reduce_sum((tf.concat(parts, 0) - seen) ** 2)
        return outer.gradient(distance, x)

    return step


def measured(steps: dict[str, Step], x: Any, repeats: int) -> dict[str, tuple[float, float]]:
    """Name -> (median milliseconds of a step, seconds until the first was done)."""
    first, times = {}, {name: [] for name in steps}
    for name, step in steps.items():
        started = time.perf_counter()
        step(x).numpy()
        first[name] = time.perf_counter() - started
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            step(x).numpy()
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: (statistics.median(times[name]), first[name]) for name in steps}


def contestants(name: str, batch: int, count: int) -> tuple[dict[str, Step], Any]:
    keras = build(name, SHAPES[name], CLASSES, seed=0)
    model = BundleModel(read_bundle(export(keras, name=name, batch_size=batch, input_range=(0.0, 1.0))))
    random = np.random.default_rng(0)
    x = tf.constant(random.random((count, *SHAPES[name])), tf.float32)
    y = tf.constant(random.integers(0, CLASSES, count), tf.int32)
    parameters = tf.concat([tf.reshape(one, [-1]) for one in keras.trainable_variables], 0)
    read, plain = of_bundle(model, parameters, y, 0.1), of_keras(keras, y, 0.1)
    steps = {"read": read, "xla": read, "keras": plain}
    return {key: tf.function(step, autograph=False, jit_compile=key == "xla") for key, step in steps.items()}, x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    asked = parser.parse_args()
    print("| model | examples | read back | with XLA | Keras | read back / Keras | first step, read back, XLA, Keras |")
    print("|---|---|---|---|---|---|---|")
    for name in asked.models.split(","):
        for count in (1, asked.batch):
            steps, x = contestants(name, asked.batch, count)
            found = measured(steps, x, asked.repeats)
            figures = " | ".join(f"{found[key][0]:.1f} ms" for key in steps)
            ratio = found["read"][0] / found["keras"][0]
            firsts = ", ".join(f"{found[key][1]:.1f} s" for key in steps)
            print(f"| {name} | {count} | {figures} | {ratio:.2f} | {firsts} |", flush=True)


if __name__ == "__main__":
    main()
