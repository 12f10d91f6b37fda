"""What the device's gate reads off updates of ordinary plans, and what it costs.

    .venv/bin/python benchmarks/privacy_gate.py [--quick]

Digits (8x8, scikit-learn's), three models of the zoo, batch 10, rate 0.1: the closest reading (dB) to a true example,
or to its features behind convolutions, and the share of labels told, over devices of 1 to 100 examples, mean of the
seeds (largest in brackets). Then the milliseconds of one look: reference CNN, 206,922 parameters, 600 examples.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

import covey_models
from covey_edge.frames import Run
from covey_edge.leak_gate import look
from covey_edge.runtime import Model
from covey_edge.trainer import protect, train
from covey_models import datasets, zoo
from covey_protocol.bundle import read_bundle
from covey_protocol.messages import TrainingPlan

MODELS = ("softmax", "mlp", "small-cnn")
NOISE = ((0.0, 0.0), (0.1, 0.0), (0.1, 0.01), (0.1, 0.1))  # clip_norm, noise_multiplier


def bundled(model: object, batch: int) -> Model:
    data = covey_models.export(model, name="m", batch_size=batch, input_range=(0.0, 1.0), num_classes=10)
    return Model(read_bundle(data))


def plan_of(epochs: int) -> TrainingPlan:
    return TrainingPlan(epochs, 0.1, shuffle_seed=1)


def told(model: Model, x: np.ndarray, y: np.ndarray, epochs: int, clip: float, noise: float) -> tuple[float, float]:
    received = model.parameters()
    train(model, (x, y), plan_of(epochs), "device")
    update = protect(model.parameters() - received, clip, noise)
    leak = look(model, (x, y), request(received, epochs), received, update)
    model.set_parameters(received)
    return leak.psnr_db or 0.0, leak.label_recovery or 0.0


def request(received: np.ndarray, epochs: int) -> Run:
    return Run("r", "d", received.tobytes(), plan_of(epochs), 0.0, 0.0, 1)


def reference_cnn() -> object:
    import tensorflow as tf

    layers = tf.keras.layers
    return tf.keras.Sequential(
        [
            tf.keras.Input((28, 28, 1)),
            layers.Conv2D(16, 3, activation="relu", padding="same"),
            layers.MaxPool2D(),
            layers.Conv2D(32, 3, activation="relu", padding="same"),
            layers.MaxPool2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    data, seeds = datasets.digits(), 2 if quick else 10
    x, y = data.x.astype(np.float32), data.y
    print("model       examples  epochs  clip  noise   dB mean (max)    labels told")
    for name in MODELS:
        model = bundled(zoo.build(name, x.shape[1:], 10, seed=0), 10)
        for examples in (1, 2, 10, 100):
            for epochs in (1, 5):
                for clip, noise in NOISE if examples in (1, 10) and epochs == 1 else NOISE[:1]:
                    found = []
                    for seed in range(seeds):
                        rows = np.random.default_rng(seed).choice(len(x), examples, replace=False)
                        found.append(told(model, x[rows], y[rows], epochs, clip, noise))
                    decibels, labels = np.array(found).T
                    print(
                        f"{name:11} {examples:8}  {epochs:6}  {clip:4g}  {noise:5g}   "
                        f"{decibels.mean():5.1f} ({decibels.max():5.1f})    {labels.mean():.2f}",
                        flush=True,
                    )
    rng = np.random.default_rng(0)
    for name, keras in (("reference CNN", reference_cnn()), ("mlp 28x28", zoo.build("mlp", (28, 28, 1), 10, seed=0))):
        model = bundled(keras, 20)
        x, y = rng.random((600, 28, 28, 1), np.float32), rng.integers(0, 10, 600).astype(np.int32)
        received = model.parameters()
        started = time.perf_counter()
        train(model, (x, y), plan_of(1), "device")
        trained = time.perf_counter() - started
        update = model.parameters() - received
        spent = []
        for _ in range(3 if quick else 7):
            started = time.perf_counter()
            look(model, (x, y), request(received, 1), received, update)
            spent.append(time.perf_counter() - started)
        print(
            f"{name}, {model.manifest.dimension:,} parameters, 600 examples: one look {1000 * min(spent):.0f} ms "
            f"(median {1000 * float(np.median(spent)):.0f}); training one epoch {1000 * trained:.0f} ms"
        )


if __name__ == "__main__":
    main()
