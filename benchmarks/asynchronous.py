"""What slow devices cost: rounds for everyone, rounds that end at a goal, asynchronous rounds; accuracy over time.

Eight real agents on digits, an embedded broker, the real coordinator, plain mean. Two agents are slow: their training
processes may only run a twentieth of the time (stopped and continued, so that they take no time from the others), and
they alone hold the eights and nines: who leaves them out cannot learn these. The three kinds of rounds run one after
the other for the same time on the same data.
Run: python benchmarks/asynchronous.py [--quick] [--plot docs/asynchronous.png]
"""

from __future__ import annotations

import argparse
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from covey_coordinator.libraries import prepare

prepare()

import covey_models
from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.coordinator import Coordinator, Timing, shuffle_seed
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

DEVICES, SLOW = 8, 2
RARE = (8, 9)  # classes that only slow devices hold
EPOCHS, BATCH, LEARNING_RATE = 20, 16, 0.05
RUNS_S, PERIOD_S = 0.05, 1.0  # of every period a slow device's training may run so long
KINDS = {"everyone": (0, 0), "goal of 4": (4, 0), "asynchronous, goal of 4": (4, 40)}


class Task(NamedTuple):
    bundle: bytes
    key: SealingKey
    model: Model
    shards: list[Shard]
    test: tuple[np.ndarray, np.ndarray]


class Moment(NamedTuple):
    seconds: float
    accuracy: float
    rare_accuracy: float


def make_task(seed: int) -> Task:
    train_set, test = datasets.split(datasets.load("digits"), test_fraction=0.2, seed=seed)
    key = SealingKey.from_seed(bytes([seed]) * 32)
    bundle = covey_models.export(
        zoo.build("small-cnn", (8, 8, 1), 10, seed=seed), name="digits", batch_size=BATCH, num_classes=10, key=key
    )
    rare = np.isin(train_set.y, RARE)
    quick, slow = DEVICES - SLOW, SLOW
    rows = [np.flatnonzero(~rare)[i::quick] for i in range(quick)] + [
        np.flatnonzero(rare)[i::slow] for i in range(slow)
    ]
    shards = [Shard(train_set.x[of], train_set.y[of].astype(np.int32)) for of in rows]
    return Task(bundle, key, Model(read_bundle(bundle)), shards, (test.x, test.y))


@contextmanager
def slowed(pids: list[int]) -> Iterator[None]:
    """Children of these processes run for RUNS_S of every PERIOD_S."""
    over = threading.Event()

    def children() -> list[psutil.Process]:
        return [child for pid in pids if psutil.pid_exists(pid) for child in psutil.Process(pid).children()]

    def say(number: signal.Signals) -> None:
        for child in children():
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    def keep() -> None:
        while not over.is_set():
            say(signal.SIGCONT)
            over.wait(RUNS_S)
            say(signal.SIGSTOP)
            over.wait(PERIOD_S - RUNS_S)
        say(signal.SIGCONT)

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def measure(task: Task, parameters: np.ndarray) -> tuple[float, float]:
    """Accuracy on the test set, and on its rare classes."""
    x, y = task.test
    task.model.set_parameters(parameters)
    rare = np.isin(y, RARE)
    return task.model.evaluate(x, y)[1], task.model.evaluate(x[rare], y[rare])[1]


def run(task: Task, goal: int, max_staleness: int, seconds: float, folder: Path) -> tuple[list[Moment], dict[str, int]]:
    """The moments when models were published, and how many updates of each device they hold."""
    with ExitStack() as stack:
        broker = BrokerProcess(folder / "broker.log")
        stack.callback(broker.stop)
        ids = [f"device-{number}" for number in range(DEVICES)]
        files = [
            make_device(name, folder / name, "bench", {"url": broker.url}, task.key.public, shard)
            for name, shard in zip(ids, task.shards)
        ]
        agents = AgentProcesses({one.device_id: one.config for one in files}, folder / "logs")
        stack.callback(agents.stop)
        fleet = Fleet(parse_broker(broker.url), "bench", task.key, {one.device_id: one.public for one in files})
        fleet.connect()
        stack.callback(fleet.close)
        store = RunStore(folder / "run")
        stack.callback(store.close)
        coordinator = Coordinator(fleet, store)
        coordinator.wait_for(DEVICES, 120.0)
        engine = make_engine("direct", make_rule("mean", 0), read_bundle(task.bundle).manifest.parameters)
        stack.callback(engine.close)
        pids = agents.pids()
        stack.enter_context(slowed([pids[name] for name in ids[-SLOW:]]))
        parameters = Model(read_bundle(task.bundle)).parameters()
        moments = [Moment(0.0, *measure(task, parameters))]
        used = dict.fromkeys(ids, 0)
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            number = len(moments)
            result = coordinator.run_round(
                run_id="run",
                number=number,
                bundle=task.bundle,
                parameters=parameters,
                plan=TrainingPlan(EPOCHS, LEARNING_RATE, shuffle_seed=shuffle_seed(0, number)),
                device_ids=ids,
                quorum=goal or DEVICES,
                engine=engine,
                timing=Timing(600.0, 60.0, 10.0),
                goal=goal,
                max_staleness=max_staleness,
            )
            parameters = result.parameters
            for verdict in result.verdicts:
                used[verdict.device_id] += verdict.status == "accepted"
            moments.append(Moment(time.monotonic() - started, *measure(task, parameters)))
        return moments, used


def draw(results: dict[str, list[Moment]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    for kind, moments in results.items():
        times = [moment.seconds for moment in moments]
        axes[0].step(times, [100 * moment.accuracy for moment in moments], where="post", label=kind)
        axes[1].step(times, [100 * moment.rare_accuracy for moment in moments], where="post", label=kind)
    axes[0].set(title="all classes", xlabel="seconds", ylabel="test accuracy, %")
    axes[1].set(title="classes that only slow devices hold", xlabel="seconds")
    axes[0].legend(loc="lower right")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    print(f"plot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90.0, help="for each kind of rounds")
    parser.add_argument("--quick", action="store_true", help="15 seconds each")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    seconds = 15.0 if options.quick else options.seconds
    task = make_task(0)
    results = {}
    print(f"{DEVICES} devices, {SLOW} of them at {RUNS_S / PERIOD_S:.0%} of the speed; {seconds:g} s each")
    for kind, (goal, max_staleness) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            moments, used = run(task, goal, max_staleness, seconds, Path(folder))
        results[kind] = moments
        published, last = len(moments) - 1, moments[-1]
        print(
            f"{kind}: {published} models in {last.seconds:.0f} s, accuracy {last.accuracy:.3f}, of the slow devices'"
            f" classes {last.rare_accuracy:.3f}; updates of quick devices"
            f" {sum(list(used.values())[:-SLOW])}, of slow ones {sum(list(used.values())[-SLOW:])}",
            flush=True,
        )
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
