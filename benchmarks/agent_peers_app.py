"""Flower's side of benchmarks/agent.py: an app that trains the reference CNN in TensorFlow or PyTorch.

Runs in the peers' environments, started by Flower's SuperLink and SuperNode; nothing of covey's is in it. Written after
Flower's own quickstarts: the client reads its data and builds its model in every round, since each round is a process.
Run settings: `framework`, "tensorflow" or "torch"; `data`, an .npz of the images; `rounds`, `batch` and `rate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()  # Flower looks for plain assignments
server = ServerApp()
SHAPES = {
    "tensorflow": [(3, 3, 1, 16), (16,), (3, 3, 16, 32), (32,), (1568, 128), (128,), (128, 10), (10,)],
    "torch": [(16, 1, 3, 3), (16,), (32, 16, 3, 3), (32,), (128, 1568), (128,), (10, 128), (10,)],
}


@server.main()
def serve(grid: Grid, context: Context) -> None:
    settings, random = context.run_config, np.random.default_rng(0)
    start = [0.05 * random.standard_normal(shape).astype(np.float32) for shape in SHAPES[settings["framework"]]]
    one = {"min_train_nodes": 1, "min_available_nodes": 1, "min_evaluate_nodes": 0, "fraction_evaluate": 0.0}
    FedAvg(**one).start(grid=grid, initial_arrays=ArrayRecord(start), num_rounds=settings["rounds"])


@client.train()
def train(message: Message, context: Context) -> Message:
    settings = context.run_config
    with np.load(settings["data"]) as data:
        x, y = data["x"], data["y"]
    trained = {"tensorflow": tensorflow, "torch": torch}[settings["framework"]]
    arrays = trained(message.content["arrays"].to_numpy_ndarrays(), x, y, settings["batch"], settings["rate"])
    content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": len(x)})}
    return Message(RecordDict(content), reply_to=message)


def tensorflow(arrays: Sequence[Any], x: Any, y: Any, batch: int, rate: float) -> list[Any]:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    layers = tf.keras.layers
    model = tf.keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.MaxPool2D(2),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPool2D(2),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf.keras.optimizers.SGD(rate), loss)
    model.set_weights(list(arrays))
    model.fit(x, y, batch, epochs=1, verbose=0)
    return list(model.get_weights())


def torch(arrays: Sequence[Any], x: Any, y: Any, batch: int, rate: float) -> list[Any]:
    import torch
    from torch import nn

    torch.set_num_threads(1)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1568, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    with torch.no_grad():
        for parameter, array in zip(model.parameters(), arrays):
            parameter.copy_(torch.from_numpy(array.copy()))
    images, labels = torch.from_numpy(np.moveaxis(x, -1, 1).copy()), torch.from_numpy(y.astype(np.int64))
    optimizer, loss = torch.optim.SGD(model.parameters(), rate), nn.CrossEntropyLoss()
    for start in range(0, len(images), batch):
        optimizer.zero_grad()
        loss(model(images[start : start + batch]), labels[start : start + batch]).backward()
        optimizer.step()
    return [parameter.detach().numpy() for parameter in model.parameters()]
