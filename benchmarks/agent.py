"""What the edge agent costs: memory of its two processes, time to be ready, and one training step against TensorFlow.

Everything is measured side by side in one run on this machine; quote the ratios, not the seconds.
Run: python benchmarks/agent.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from covey_coordinator.libraries import prepare

prepare()

import covey_models
from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.coordinator import Coordinator
from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses, BrokerProcess
from covey_coordinator.fleet import Fleet
from covey_coordinator.store import RunStore
from covey_edge.mqtt import parse_broker
from covey_edge.runtime import Model
from covey_models import datasets, zoo
from covey_protocol.bundle import read_bundle
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey

BATCH = 16


def milliseconds(function: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return times


def training_step(keras: object, bundle: bytes, x: np.ndarray, y: np.ndarray, repeats: int) -> None:
    """The same step in the TFLite runtime and in TensorFlow (tf.function), in turn."""
    import tensorflow as tf

    model = Model(read_bundle(bundle))
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step(bx: object, by: object) -> object:
        with tf.GradientTape() as tape:
            value = loss(by, keras(bx))  # type: ignore[operator]
        variables = keras.trainable_variables  # type: ignore[attr-defined]
        for variable, gradient in zip(variables, tape.gradient(value, variables)):
            variable.assign_sub(0.01 * gradient)
        return value

    tx, ty = tf.constant(x[:BATCH]), tf.constant(y[:BATCH])
    step(tx, ty)
    lite, full, ratios = [], [], []
    for _ in range(repeats):
        a = statistics.median(milliseconds(lambda: model.train_batch(x[:BATCH], y[:BATCH], 0.01), 20))
        b = statistics.median(milliseconds(lambda: step(tx, ty), 20))
        lite.append(a)
        full.append(b)
        ratios.append(a / b)
    print(
        f"training step, digits small-cnn, batch {BATCH}: {model.runtime} {statistics.median(lite):.2f} ms,"
        f" tf.function {statistics.median(full):.2f} ms, ratio {statistics.median(ratios):.2f}"
        f" ({min(ratios):.2f} to {max(ratios):.2f})"
    )


def live_round(bundle: bytes, key: SealingKey, x: np.ndarray, y: np.ndarray, rounds: int) -> None:
    """Four agents on the embedded broker: seconds to be online, seconds per round, memory after the rounds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        broker = BrokerProcess(folder / "broker.log")
        ids = [f"device-{number}" for number in range(4)]
        table = {"url": broker.url}
        devices = [
            make_device(i, folder / i, "bench", table, key.public, Shard(x[n::10], y[n::10])) for n, i in enumerate(ids)
        ]
        started = time.perf_counter()
        agents = AgentProcesses({device.device_id: device.config for device in devices}, folder / "logs")
        fleet = Fleet(parse_broker(broker.url), "bench", key, {device.device_id: device.public for device in devices})
        try:
            fleet.connect()
            coordinator = Coordinator(fleet, RunStore(folder / "run"))
            coordinator.wait_for(len(ids), 60)
            print(f"4 agents online after {time.perf_counter() - started:.1f} s")
            manifest = read_bundle(bundle).manifest
            engine = make_engine("direct", make_rule("mean"), manifest.parameters)
            parameters = Model(read_bundle(bundle)).parameters()
            seconds = []
            for number in range(rounds):
                result = coordinator.run_round(
                    run_id="bench",
                    number=number,
                    bundle=bundle,
                    parameters=parameters,
                    plan=TrainingPlan(epochs=1, learning_rate=0.1),
                    device_ids=ids,
                    quorum=4,
                    engine=engine,
                )
                parameters = result.parameters
                seconds.append(result.seconds)
            print(f"a round of 4 agents (180 examples each, 1 epoch): median {statistics.median(seconds[1:]):.2f} s")
            memory(agents)
        finally:
            agents.stop()
            fleet.close()
            broker.stop()


def memory(agents: AgentProcesses) -> None:
    own, child = [], []
    for pid in agents.pids().values():
        process = psutil.Process(pid)
        own.append(process.memory_info().rss / 1e6)
        child += [c.memory_info().rss / 1e6 for c in process.children()]
    print(f"resident memory, largest of 4: agent {max(own):.0f} MB, its training child {max(child):.0f} MB")


def command_line(repeats: int) -> None:
    command = [sys.executable, "-m", "covey_edge", "--help"]
    times = milliseconds(lambda: subprocess.run(command, check=True, capture_output=True), repeats)
    print(f"covey --help: median {statistics.median(times) / 1000:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    quick = parser.parse_args().quick
    data = datasets.load("digits")
    key = SealingKey.generate()
    keras = zoo.build("small-cnn", (8, 8, 1), 10, seed=0)
    bundle = covey_models.export(
        keras, name="digits", batch_size=BATCH, input_range=(0.0, 1.0), num_classes=10, key=key
    )
    print(f"bundle: {len(bundle)} bytes, {read_bundle(bundle).manifest.dimension} parameters")
    command_line(3 if quick else 10)
    training_step(keras, bundle, data.x, data.y, 3 if quick else 15)
    live_round(bundle, key, data.x, data.y, 3 if quick else 10)


if __name__ == "__main__":
    main()
