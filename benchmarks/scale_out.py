"""What several TFF workers give on this machine, each on a core of its own, and what splitting a round costs.

Every line runs the same rounds of `Simulation`: on a worker as `covey simulate` starts it, on one and two `covey
worker`s, and on the same two through TFF's own MergeableCompExecutionContext. All see the devices' files.
Run: python benchmarks/scale_out.py [--quick]     It needs two cores and taskset.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.worker import GRPC_OPTIONS, Worker
from covey_coordinator.simulation.learning import DeviceData, Learning
from covey_coordinator.simulation.process import Simulation
from covey_coordinator.simulation.remote import connect
from covey_protocol.messages import TrainingPlan

BATCH = 20


@contextlib.contextmanager
def covey_worker(core: int) -> Iterator[str]:
    """The address of a `covey worker` that has this core alone."""
    command = ["taskset", "-c", str(core), sys.executable, "-m", "covey_edge", "worker", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[4].rstrip(",")
        finally:
            process.terminate()


@contextlib.contextmanager
def own_worker(core: int) -> Iterator[Worker]:
    """The worker of `covey simulate`, with this core alone: a process has the cores of the thread that starts it."""
    all_cores = os.sched_getaffinity(0)
    worker = Worker()
    os.sched_setaffinity(0, {core})
    try:
        worker.start()
    finally:
        os.sched_setaffinity(0, all_cores)
    with worker:
        yield worker


class Mergeable:
    """TFF's own way to use several workers, with as much of a Worker's interface as `Simulation` needs."""

    read_our_files = True

    def __init__(self, addresses: list[str]) -> None:
        import grpc
        import tensorflow_federated as tff
        from tensorflow_federated.python.core.environments.tensorflow_frontend import tensorflow_computation

        def asynchronous(address: str) -> Any:
            stub = tff.framework.RemoteExecutorGrpcStub(grpc.insecure_channel(address, GRPC_OPTIONS))

            def executor(cardinalities: Any) -> Any:
                remote = tff.framework.RemoteExecutor(stub, dispose_batch_size=1)
                remote.set_cardinalities({tff.CLIENTS: 0, **cardinalities})
                return remote

            return tff.framework.AsyncExecutionContext(
                tff.framework.ResourceManagingExecutorFactory(executor),
                tff.backends.native.desugar_and_transform_to_native,
                transform_args=tensorflow_computation.transform_args,
                transform_result=tensorflow_computation.transform_result,
            )

        contexts = [asynchronous(address) for address in addresses]
        self._context = tff.backends.native.create_mergeable_comp_execution_context(contexts)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        import tensorflow_federated as tff

        with tff.framework.get_context_stack().install(self._context):
            return function(*arguments)

    def take_notes(self) -> tuple[str, ...]:
        return ()


def learning(rule: str, hidden: int, epochs: int) -> Learning:
    import tensorflow as tf

    tf.keras.utils.set_random_seed(0)
    layers = [tf.keras.Input((784,)), tf.keras.layers.Dense(hidden, activation="relu"), tf.keras.layers.Dense(10)]
    settings = {"num_byzantine": 4} if rule == "multi-krum" else {}
    plan = TrainingPlan(epochs=epochs, learning_rate=0.05)
    return Learning(tf.keras.Sequential(layers), plan, make_rule(rule, **settings), batch_size=BATCH)


def population(devices: int, examples: int) -> list[DeviceData]:
    random = np.random.default_rng(0)
    return [
        DeviceData(f"device-{n}", random.random((examples, 784), np.float32), random.integers(0, 10, examples))
        for n in range(devices)
    ]


def measure(worker: Any, told: Learning, devices: list[DeviceData], rounds: int) -> tuple[list[float], Any]:
    """Seconds of each round after the first, which traces, and the parameters at the end."""
    with Simulation(told, devices, worker=worker) as simulation:
        state, times = simulation.initial_state(), []
        for number in range(rounds + 1):
            start = time.perf_counter()
            state, _ = simulation.next(state, range(len(devices)), number)
            times.append(time.perf_counter() - start)
        return times[1:], simulation.parameters(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller ones")
    quick = parser.parse_args().quick
    rounds, examples, epochs = (3, 200, 1) if quick else (7, 400, 5)
    work = {
        f"mean, 784-128-10, 20 devices x {epochs * examples // BATCH} steps": ("mean", 128, epochs, 20, examples),
        f"multi-krum, the same ({20 * 101_770 * 4 / 1e6:.0f} MB gathered)": ("multi-krum", 128, epochs, 20, examples),
        "mean, 784-1-10, 10 devices x 1 step": ("mean", 1, 1, 10, BATCH),
    }
    with covey_worker(0) as first, covey_worker(1) as second:
        contestants: dict[str, Callable[[], Any]] = {
            "own worker": lambda: own_worker(0),
            "1 covey worker": lambda: connect([first]),
            "2 covey workers": lambda: connect([first, second]),
            "TFF mergeable, 1": lambda: contextlib.nullcontext(Mergeable([first])),
            "TFF mergeable, 2": lambda: contextlib.nullcontext(Mergeable([first, second])),
        }
        print(
            "| round | worker | best s | median s | own / this (best) | parameters from own |\n"
            "|---|---|---|---|---|---|"
        )
        for what, (rule, hidden, passes, devices, size) in work.items():
            told, people = learning(rule, hidden, passes), population(devices, size)
            own: tuple[float, Any] | None = None
            for name, made in contestants.items():
                with made() as worker:
                    times, parameters = measure(worker, told, people, rounds)
                best = min(times)
                own = own or (best, parameters)
                middle, apart = statistics.median(times), float(np.abs(parameters - own[1]).max())
                print(
                    f"| {what} | {name} | {best:.3f} | {middle:.3f} | {own[0] / best:.2f} | {apart:.0e} |", flush=True
                )
    print(f"\nload average {', '.join(f'{one:.1f}' for one in os.getloadavg())} at the end")


if __name__ == "__main__":
    main()
