"""The other ways to simulate federated averaging, and ours, each as a process that runs one round whenever it is told.

    python simulation_contestants.py NAME FOLDER

FOLDER holds `task.npz` (see `simulation.py`: the same examples, batches and first weights for all). Told "round" on its
input it runs a round and prints its seconds as JSON; told "save PATH" it writes the model. The first line it prints
says that it is ready. Those of Flower run in an environment of its own that has flwr, Ray and TensorFlow,
and no covey.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

LEARNING_RATE = 0.1
Weights = list[Any]


class Task:
    """What all train: examples and labels of each device, its batches (rows, counts), the model and first weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        data = np.load(folder / "task.npz")
        self.model_name = str(data["model"])
        self.x, self.y = np.load(folder / "x.npy", mmap_mode="r"), np.load(folder / "y.npy", mmap_mode="r")
        self.rows, self.counts, self.sizes = data["rows"], data["counts"], data["sizes"]
        self.initial = [data[f"weight_{number}"] for number in range(int(data["num_weights"]))]

    def examples(self, device: int) -> tuple[Any, Any]:
        size = int(self.sizes[device])
        return np.asarray(self.x[device, :size]), np.asarray(self.y[device, :size])


def forward(name: str, weights: Weights, x: Any) -> Any:
    """Logits, hand-written: "mlp" 784-128-10, or "cnn", the zoo's small CNN on 28 x 28."""
    import tensorflow as tf

    if name == "mlp":
        return tf.nn.relu(x @ weights[0] + weights[1]) @ weights[2] + weights[3]
    hidden = x
    for place in range(0, len(weights) - 2, 2):
        hidden = tf.nn.relu(tf.nn.conv2d(hidden, weights[place], 2, "SAME") + weights[place + 1])
    return tf.reshape(hidden, [tf.shape(x)[0], -1]) @ weights[-2] + weights[-1]


def gradient_step(name: str) -> Callable[[Weights, Any, Any], Weights]:
    """One step of gradient descent on a batch."""
    import tensorflow as tf

    def step(weights: Weights, x: Any, y: Any) -> Weights:
        with tf.GradientTape() as tape:
            tape.watch(weights)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, forward(name, weights, x))
            loss = tf.reduce_mean(losses)
        return [weight - LEARNING_RATE * gradient for weight, gradient in zip(weights, tape.gradient(loss, weights))]

    return step


def local_training(name: str) -> Any:
    """A tf.function (weights, x, y, rows, counts) -> weights: a loop over tensors, ragged batches as they are."""
    import tensorflow as tf

    step = gradient_step(name)

    def train(weights: Weights, x: Any, y: Any, rows: Any, counts: Any) -> Weights:
        def body(number: Any, weights: Weights) -> tuple[Any, Weights]:
            batch = rows[number][: counts[number]]
            return number + 1, step(weights, tf.gather(x, batch), tf.gather(y, batch))

        return tf.while_loop(lambda number, _: number < tf.shape(counts)[0], body, (tf.constant(0), weights))[1]

    return tf.function(train, autograph=False, reduce_retracing=True)


def hand(task: Task) -> tuple[Callable[[], None], Callable[[], Weights]]:
    """A loop over devices, each one call of a tf.function, and a weighted mean. Examples are tensors already."""
    import tensorflow as tf

    train = local_training(task.model_name)
    devices = [
        (*(tf.constant(part) for part in task.examples(device)), tf.constant(rows), tf.constant(counts))
        for device, (rows, counts) in enumerate(zip(task.rows, task.counts))
    ]
    shares = [tf.constant(share, tf.float32) for share in task.sizes / task.sizes.sum()]
    held = [tf.constant(weight) for weight in task.initial]

    def one_round() -> None:
        nonlocal held
        trained = [train(held, *device) for device in devices]
        held = [tf.add_n([share * part for share, part in zip(shares, parts)]) for parts in zip(*trained)]
        held[0].numpy()

    return one_round, lambda: [weight.numpy() for weight in held]


def covey(task: Task, rule: str = "mean") -> tuple[Callable[[], None], Callable[[], Weights]]:
    from covey_coordinator.aggregation.registry import make_rule
    from covey_coordinator.simulation.learning import DeviceData, Learning
    from covey_coordinator.simulation.process import Simulation
    from covey_protocol.messages import TrainingPlan

    devices = [DeviceData(f"device-{n:03d}", *task.examples(n)) for n in range(len(task.sizes))]
    learning = Learning(
        model=keras_model(task),
        plan=TrainingPlan(epochs=1, learning_rate=LEARNING_RATE),
        rule=make_rule(rule, 0 if rule == "mean" else 10),
        batch_size=task.rows.shape[2],
    )
    simulation = Simulation(learning, devices)
    state = simulation.initial_state()

    def one_round() -> None:
        nonlocal state
        state, _ = simulation.next(state, range(len(devices)), 0)

    def weights() -> Weights:
        flat, ends = simulation.parameters(state), np.cumsum([weight.size for weight in task.initial])
        return [part.reshape(weight.shape) for part, weight in zip(np.split(flat, ends), task.initial)]

    return one_round, weights


def keras_model(task: Task) -> Any:
    import tensorflow as tf

    layers, shape = tf.keras.layers, task.x.shape[2:]
    if task.model_name == "mlp":
        body = [layers.Dense(128, activation="relu")]
    else:
        body = [
            layers.Conv2D(weight.shape[-1], 3, 2, "same", activation="relu")
            for weight in task.initial[:-2]
            if weight.ndim == 4
        ] + [layers.Flatten()]
    model = tf.keras.Sequential([layers.InputLayer(shape), *body, layers.Dense(10)])
    model.set_weights(task.initial)
    return model


def tff_default(task: Task) -> tuple[Callable[[], None], Callable[[], Weights]]:
    """`tff.learning.algorithms.build_weighted_fed_avg` with its defaults, on tf.data sets of the same batches."""
    import tensorflow as tf
    import tensorflow_federated as tff

    from covey_coordinator.aggregation.worker import Worker

    def dataset(device: int) -> Any:
        x, y = task.examples(device)
        order = np.concatenate([row[:count] for row, count in zip(task.rows[device], task.counts[device])])
        return tf.data.Dataset.from_tensor_slices((x[order], y[order])).batch(task.rows.shape[2])

    datasets = [dataset(device) for device in range(len(task.sizes))]
    model = tff.learning.models.functional_model_from_keras(
        keras_model(task), tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True), datasets[0].element_spec
    )
    worker = Worker()
    worker.start()

    def made() -> Any:
        return tff.learning.algorithms.build_weighted_fed_avg(
            model,
            client_optimizer_fn=tff.learning.optimizers.build_sgdm(LEARNING_RATE),
            server_optimizer_fn=tff.learning.optimizers.build_sgdm(1.0),
        )

    process = worker.call(made)
    state = worker.call(process.initialize)
    first = tff.learning.models.ModelWeights(tuple(task.initial), ())
    state = worker.call(process.set_model_weights, state, first)

    def one_round() -> None:
        nonlocal state
        state = worker.call(process.next, state, datasets).state

    return one_round, lambda: list(worker.call(process.get_model_weights, state).trainable)


def flower(task: Task, style: str) -> None:
    """Flower's simulation on Ray; rounds begin when they are told to. style: how a client trains, see FLOWER_STYLES."""
    from flwr.client import ClientApp, NumPyClient
    from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.server import ServerApp, ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.simulation import run_simulation

    folder = str(task.folder)

    def client_fn(context: Any) -> Any:
        return FlowerClient(folder, int(context.node_config["partition-id"])).to_client()

    class FlowerClient(NumPyClient):  # type: ignore[misc]
        def __init__(self, folder: str, device: int) -> None:
            self._folder, self._device = folder, device

        def fit(self, parameters: Weights, config: Any) -> Any:
            sys.path.insert(0, str(Path(__file__).parent))
            from simulation_contestants import flower_fit

            return flower_fit(self._folder, self._device, parameters, style)

    class Told(FedAvg):  # type: ignore[misc]
        started = 0.0

        def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
            client_manager.wait_for(len(task.sizes))  # all are there before the clock starts
            if server_round == 1:
                print(json.dumps("ready"), flush=True)
            wait_for_round(lambda: parameters_to_ndarrays(parameters))
            self.started = time.perf_counter()
            return super().configure_fit(server_round, parameters, client_manager)

        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            if failures or len(results) != len(task.sizes):
                raise RuntimeError(f"{len(results)} results, {len(failures)} failures: {failures[:1]}")
            aggregated = super().aggregate_fit(server_round, results, failures)
            parameters_to_ndarrays(aggregated[0])
            print(json.dumps(time.perf_counter() - self.started), flush=True)
            return aggregated

    def server_fn(context: Any) -> Any:
        everyone = len(task.sizes)
        strategy = Told(
            fraction_fit=1.0, fraction_evaluate=0.0, min_fit_clients=everyone, min_available_clients=everyone,
            initial_parameters=ndarrays_to_parameters(task.initial),
        )  # fmt: skip
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=10_000))

    run_simulation(
        server_app=ServerApp(server_fn=server_fn), client_app=ClientApp(client_fn=client_fn),
        num_supernodes=len(task.sizes), backend_config={"client_resources": {"num_cpus": 1}},
    )  # fmt: skip


KEPT: dict[str, Any] = {}  # what a Ray actor keeps from call to call: better than loading examples in every call


def flower_fit(folder: str, device: int, parameters: Weights, style: str) -> tuple[Weights, int, dict[str, Any]]:
    import tensorflow as tf

    if not KEPT:
        tf.config.threading.set_intra_op_parallelism_threads(1)  # an actor has one of the cores
        task = Task(Path(folder))
        KEPT.update(task=task, train=FLOWER_STYLES[style](task))
    task = KEPT["task"]
    if device not in KEPT:
        KEPT[device] = (*task.examples(device), task.rows[device], task.counts[device])
    return KEPT["train"](parameters, *KEPT[device]), int(task.sizes[device]), {}


def by_keras_fit(task: Task) -> Callable[..., Weights]:
    """As in Flower's own quickstart for TensorFlow: a Keras model's fit."""
    import tensorflow as tf

    model = keras_model(task)
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf.keras.optimizers.SGD(LEARNING_RATE), loss)

    def train(weights: Weights, x: Any, y: Any, rows: Any, counts: Any) -> Weights:
        order = np.concatenate([row[:count] for row, count in zip(rows, counts)])
        model.set_weights(weights)
        model.fit(x[order], y[order], epochs=1, batch_size=rows.shape[1], shuffle=False, verbose=0)
        return list(model.get_weights())

    return train


def by_steps(task: Task) -> Callable[..., Weights]:
    """A tf.function for one batch, called from Python: how a training loop is usually written by hand."""
    import tensorflow as tf

    step = tf.function(gradient_step(task.model_name), autograph=False, reduce_retracing=True)

    def train(weights: Weights, x: Any, y: Any, rows: Any, counts: Any) -> Weights:
        held = [tf.constant(weight) for weight in weights]
        for row, count in zip(rows, counts):
            held = step(held, tf.constant(x[row[:count]]), tf.constant(y[row[:count]]))
        return [weight.numpy() for weight in held]

    return train


def by_tensor_loop(task: Task) -> Callable[..., Weights]:
    """The loop of the hand-written contestant, all batches in one call."""
    import tensorflow as tf

    loop = local_training(task.model_name)

    def train(weights: Weights, *arrays: Any) -> Weights:
        held = [tf.constant(weight) for weight in weights]
        return [weight.numpy() for weight in loop(held, *(tf.constant(one) for one in arrays))]

    return train


FLOWER_STYLES = {
    "Flower, Keras fit": by_keras_fit,
    "Flower, tf.function step": by_steps,
    "Flower, tensor loop": by_tensor_loop,
}


def wait_for_round(weights: Callable[[], Weights]) -> None:
    """Until "round" comes; a "save" before it is obeyed. Ends the process when nobody asks any more."""
    for line in sys.stdin:
        said, _, path = line.strip().partition(" ")
        if said == "round":
            return
        np.savez(path, *weights())
        print(json.dumps("saved"), flush=True)
    os._exit(0)  # Flower's threads would go on


CONTESTANTS: dict[str, Callable[[Task], tuple[Callable[[], None], Callable[[], Weights]]]] = {
    "hand": hand,
    "covey": covey,
    "covey, Multi-Krum": lambda task: covey(task, "multi-krum"),
    "TFF's defaults": tff_default,
}


def main() -> None:
    name, task = sys.argv[1], Task(Path(sys.argv[2]))
    if name in FLOWER_STYLES:
        flower(task, name)
        return
    one_round, weights = CONTESTANTS[name](task)
    print(json.dumps("ready"), flush=True)
    while True:
        wait_for_round(weights)
        started = time.perf_counter()
        one_round()
        print(json.dumps(time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    main()
