"""The contestants of `benchmarks/train_step.py`: each is a process that makes training steps when it is asked to.

    python benchmarks/train_step_workers.py CONTESTANT JOB.json

Reads one JSON object per line from standard input and answers with one: {"do": "steps", "count": n} makes n steps and
gives their CPU and wall seconds, {"do": "parameters", "path": ...} saves the flat parameter vector. Contestants run in
environments of their own, so this file imports nothing of covey, and a library only in the contestant that needs it.
All start from the same weights and take the same batches in the same order.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

LEARNING_RATE = 0.01


@dataclass
class Job:
    """What the benchmark hands to a contestant.

    core: which CPU core to stay on. model: a TFLite file, or a Keras file for TensorFlow. data: .npz with x (batches,
    batch, *shape) and y (batches, batch), and weights as arrays "w0", "w1", ... in Keras' order.
    """

    core: int
    model: str
    data: str


@dataclass
class Contestant:
    """step: takes the next batch and trains on it. parameters: all of them, flat, in Keras' order and layout."""

    step: Callable[[], None]
    parameters: Callable[[], Any]


def batches(data: Any) -> Iterator[tuple[Any, Any]]:
    while True:
        yield from zip(data["x"], data["y"])


def weights(data: Any) -> list[Any]:
    return [data[f"w{index}"] for index in range(sum(name.startswith("w") for name in data))]


def interpreted(interpreter_class: Any, job: Job, data: Any) -> Contestant:
    """A TFLite file with the entry points `train`, `set_parameters` and `get_parameters`, called as devices call it."""
    import numpy as np

    interpreter = interpreter_class(model_path=job.model, num_threads=1)
    runner = interpreter.get_signature_runner("train")
    set_parameters, get_parameters = (
        interpreter.get_signature_runner(name) for name in ("set_parameters", "get_parameters")
    )
    set_parameters(parameters=np.concatenate([array.ravel() for array in weights(data)]))
    stream = batches(data)
    rate, example_weight = np.float32(LEARNING_RATE), np.ones(data["y"].shape[1], np.float32)

    def step() -> None:
        x, y = next(stream)
        runner(x=x, y=y, example_weight=example_weight, learning_rate=rate)

    return Contestant(step, lambda: get_parameters()["parameters"])


def tflite_runtime(job: Job, data: Any) -> Contestant:
    from tflite_runtime.interpreter import Interpreter

    return interpreted(Interpreter, job, data)


def litert(job: Job, data: Any) -> Contestant:
    from ai_edge_litert.interpreter import Interpreter

    return interpreted(Interpreter, job, data)


def flex(job: Job, data: Any) -> Contestant:
    return interpreted(one_thread_tensorflow().lite.Interpreter, job, data)


def one_thread_tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    return tf


def naive_step(tf: Any, model: Any) -> Callable[..., dict[str, Any]]:
    """The training step anyone would write: SGD on the weighted mean cross entropy of logits."""

    def train(x: Any, y: Any, example_weight: Any, learning_rate: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=model(x, training=True))
            loss = tf.reduce_sum(example_weight * losses) / tf.reduce_sum(example_weight)
        variables = model.trainable_variables
        for variable, gradient in zip(variables, tape.gradient(loss, variables)):
            variable.assign_sub(learning_rate * gradient)
        return {"loss": loss}

    return train


def tensorflow(job: Job, data: Any) -> Contestant:
    """The same step as a tf.function in full TensorFlow. oneDNN is switched by TF_ENABLE_ONEDNN_OPTS."""
    import numpy as np

    tf = one_thread_tensorflow()
    model = tf.keras.models.load_model(job.model, compile=False)
    model.set_weights(weights(data))
    train = tf.function(naive_step(tf, model), autograph=False)
    stream = batches({name: tf.unstack(tf.constant(data[name])) for name in ("x", "y")})
    rate, example_weight = tf.constant(LEARNING_RATE), tf.ones(data["y"].shape[1])

    def step() -> None:
        x, y = next(stream)
        float(train(x, y, example_weight, rate)["loss"])

    return Contestant(step, lambda: np.concatenate([array.ravel() for array in model.get_weights()]))


def pytorch(job: Job, data: Any) -> Contestant:
    """The reference CNN in eager PyTorch; its own layout is NCHW, the images are turned beforehand."""
    import numpy as np
    import torch
    from torch import nn

    torch.set_num_threads(1)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(7 * 7 * 32, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    with torch.no_grad():
        for parameter, array in zip(model.parameters(), weights(data)):
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(to_pytorch(array))))
    images = torch.from_numpy(np.ascontiguousarray(np.moveaxis(data["x"], -1, 2)))
    stream = batches({"x": images, "y": torch.from_numpy(data["y"].astype(np.int64))})
    optimizer, loss = torch.optim.SGD(model.parameters(), LEARNING_RATE), nn.CrossEntropyLoss()

    def step() -> None:
        x, y = next(stream)
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    return Contestant(
        step, lambda: np.concatenate([from_pytorch(p.detach().numpy()).ravel() for p in model.parameters()])
    )


AFTER_POOL = (7, 7, 32)  # what the flatten layer of the reference CNN sees: height, width, channels


def to_pytorch(array: Any) -> Any:
    """A weight of Keras in PyTorch's layout, (out, in, ...) and flattened images channels first."""
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if array.ndim == 2 and array.shape[0] == 7 * 7 * 32:
        return array.reshape(*AFTER_POOL, -1).transpose(3, 2, 0, 1).reshape(array.shape[1], -1)
    return array.T


def from_pytorch(array: Any) -> Any:
    """The way back."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    if array.ndim == 2 and array.shape[1] == 7 * 7 * 32:
        height, width, channels = AFTER_POOL
        return array.reshape(-1, channels, height, width).transpose(2, 3, 1, 0)
    return array.T


CONTESTANTS: dict[str, Callable[[Job, Any], Contestant]] = {
    "tflite_runtime": tflite_runtime,
    "litert": litert,
    "flex": flex,
    "tensorflow": tensorflow,
    "pytorch": pytorch,
}


def answer(contestant: Contestant, request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    if request["do"] == "parameters":
        np.save(request["path"], contestant.parameters())
        return {}
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(request["count"]):
        contestant.step()
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def main() -> None:
    with open(sys.argv[2], encoding="utf-8") as file:
        job = Job(**json.load(file))
    os.sched_setaffinity(0, {job.core})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    import numpy as np

    with np.load(job.data) as file:
        data = dict(file)
    contestant = CONTESTANTS[sys.argv[1]](job, data)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(contestant, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
