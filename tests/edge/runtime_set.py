"""Bundles of many kinds, and the weights TensorFlow gets from the same batches: what every runtime must reproduce.

The reference is a Keras training loop written out here; nothing of covey's export is in it. Only a model that draws
random numbers has none in Keras: there the two runtimes must agree with each other.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

BATCH, STEPS, RATE = 8, 5, 0.1
RELATIVE_TOLERANCE = 1e-5

# run by the Python of an environment that has the edge distribution alone
TRAIN = """
import json, sys
from pathlib import Path
import numpy as np
from covey_edge.runtime import Model
from covey_protocol.bundle import read_bundle
from covey_protocol.messages import TrainingPlan
folder, errors = Path(sys.argv[1]), {}
for path in sorted(folder.glob("*.covey")):
    model = Model(read_bundle(path.read_bytes()))
    with np.load(path.with_suffix(".npz")) as data:
        plan = TrainingPlan(1, 1.0, gradient_clip_norm=float(data["clip_norm"]), proximal_weight=float(data["mu"]))
        correction = data["correction"] if data["correction"].any() else None
        model.start_training(plan, correction)
        for step, (x, y) in enumerate(zip(data["x"], data["y"])):
            model.train_batch(x, y, float(data["rate"]), 1000 + step)
        expected, got = data["expected"], model.parameters()
    errors[path.stem] = [float(np.abs(got - expected).max()), float(np.abs(expected).max())]
heavy = sorted({"tensorflow", "keras"} & set(sys.modules))
print(json.dumps({"runtime": model.runtime, "errors": errors, "heavy": heavy}))
"""


@dataclass(frozen=True)
class Kind:
    """build: the Keras model. optimizer: its name for the export and its class's for the reference.

    words: the input is whole numbers below this. one_hot: the labels are vectors. random: the model draws.
    """

    build: Callable[[Any], Any]
    optimizer: str = "sgd"
    keras_optimizer: str = "SGD"
    clip_norm: float = 0.0
    mu: float = 0.0
    correct: bool = False
    words: int = 0
    one_hot: bool = False
    random: bool = False
    export: dict[str, Any] = field(default_factory=dict)


def _digits(tf: Any) -> Any:
    from covey_models import zoo

    return zoo.build("small-cnn", (8, 8, 1), 10, seed=0)


def _batch_norm(tf: Any) -> Any:
    layers = tf.keras.layers
    first, second = layers.Conv2D(6, 3, strides=2, padding="same"), layers.BatchNormalization()
    rest = [layers.Activation("swish"), layers.Flatten(), layers.Dense(4)]
    return tf.keras.Sequential([layers.InputLayer((9, 9, 2)), first, second, *rest])


def _depthwise(tf: Any) -> Any:
    """MobileNet's block: expand, depthwise, project, add."""
    layers = tf.keras.layers
    start = layers.Input((8, 8, 4))
    wide = layers.Activation("swish")(layers.BatchNormalization()(layers.Conv2D(12, 1, use_bias=False)(start)))
    deep = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(wide)
    deep = layers.Activation("swish")(layers.BatchNormalization()(deep))
    added = layers.Add()([start, layers.Conv2D(4, 1)(deep)])
    return tf.keras.Model(start, layers.Dense(3)(layers.GlobalAveragePooling2D()(added)))


def _attention(tf: Any) -> Any:
    layers = tf.keras.layers
    start = layers.Input((6, 8))
    attended = layers.MultiHeadAttention(2, 4)(start, start)
    normal = layers.LayerNormalization()(layers.Add()([start, attended]))
    return tf.keras.Model(start, layers.Dense(3)(layers.Flatten()(layers.Dense(8, activation="gelu")(normal))))


def _recurrent(tf: Any) -> Any:
    layers = tf.keras.layers
    return tf.keras.Sequential([layers.InputLayer((5, 3)), layers.LSTM(7, unroll=True), layers.Dense(4)])


def _dense(tf: Any) -> Any:
    layers = tf.keras.layers
    return tf.keras.Sequential([layers.InputLayer((6,)), layers.Dense(9, activation="tanh"), layers.Dense(4)])


def _words(tf: Any) -> Any:
    layers = tf.keras.layers
    start = layers.Input((6,), dtype="int32")
    return tf.keras.Model(start, layers.Dense(4)(layers.GlobalAveragePooling1D()(layers.Embedding(20, 5)(start))))


def _dropout(tf: Any) -> Any:
    layers = tf.keras.layers
    rest = [layers.Dense(16, activation="tanh"), layers.Dropout(0.4), layers.Dense(4)]
    return tf.keras.Sequential([layers.InputLayer((6,)), *rest])


EVERYTHING = {"clip": True, "proximal": True, "correction": True}
KINDS = {
    "digits": Kind(_digits),
    "batch-norm": Kind(_batch_norm),
    "depthwise": Kind(_depthwise),
    "attention": Kind(_attention),
    "recurrent": Kind(_recurrent),
    "adam": Kind(_dense, "adam", "Adam"),
    "words": Kind(_words, words=20, export={"input_range": (0, 19)}),
    "one-hot": Kind(_dense, one_hot=True, export={"loss": "categorical_crossentropy"}),
    "dropout": Kind(_dropout, random=True),
    "clipped-fedprox": Kind(_dense, "sgd", "SGD", clip_norm=0.3, mu=4.0, correct=True, export=EVERYTHING),
}


LONG = ("depthwise", "one-hot")  # to export; the others are in the everyday set


def write_set(folder: Path, kinds: Sequence[str] = tuple(KINDS)) -> None:
    """NAME.covey and NAME.npz (batches, settings, expected weights) of these kinds."""
    import covey_models
    from covey_models._tensorflow import import_tensorflow
    from covey_protocol.bundle import read_bundle

    tf = import_tensorflow()
    for name, kind in ((name, KINDS[name]) for name in kinds):
        tf.keras.utils.set_random_seed(1)
        model = kind.build(tf)
        data = covey_models.export(model, name=name, optimizer=kind.optimizer, batch_size=BATCH, **kind.export)
        (folder / f"{name}.covey").write_bytes(data)
        random = np.random.default_rng(2)
        shape = (STEPS, BATCH, *model.input_shape[1:])
        x = random.integers(0, kind.words, shape, np.int32) if kind.words else random.random(shape, np.float32)
        y = random.integers(0, model.output_shape[-1], (STEPS, BATCH), np.int32)
        specs = read_bundle(data).manifest.parameters
        size = sum(spec.size for spec in specs)
        correction = random.standard_normal(size).astype(np.float32) * np.float32(0.1 * kind.correct)
        names = [spec.name for spec in specs]
        start = _flat(model, names)
        expected = _drawn(data, x, y) if kind.random else _trained(tf, model, kind, x, y, correction, names)
        if kind.one_hot:
            y = np.eye(model.output_shape[-1], dtype=np.float32)[y]
        assert np.abs(expected - start).max() > 0.01, f"{name} hardly trains: the comparison would say nothing"
        np.savez(
            folder / f"{name}.npz",
            x=x, y=y, rate=RATE, clip_norm=kind.clip_norm, mu=kind.mu, correction=correction, expected=expected,
        )  # fmt: skip


def _trained(tf: Any, model: Any, kind: Kind, x: Any, y: Any, correction: Any, names: list[str]) -> Any:
    """The flat parameters after Keras has trained on these batches, one step each."""
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = getattr(tf.keras.optimizers, kind.keras_optimizer)(RATE)
    trained = model.trainable_variables
    centers = [tf.constant(variable.numpy()) for variable in trained]
    parts = tf.split(correction, [int(tf.size(variable)) for variable in trained]) if kind.correct else []

    @tf.function
    def step(bx: Any, by: Any) -> None:
        with tf.GradientTape() as tape:
            value = loss(by, model(bx, training=True))
        gradients = tape.gradient(value, trained)
        if kind.clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, kind.clip_norm)
        gradients = [g + kind.mu * (v - center) for g, v, center in zip(gradients, trained, centers)]
        if kind.correct:
            gradients = [g + tf.reshape(part, g.shape) for g, part in zip(gradients, parts)]
        optimizer.apply_gradients(zip(gradients, trained))

    for bx, by in zip(x, y):
        step(tf.constant(bx), tf.constant(by))
    return _flat(model, names)


def _drawn(data: bytes, x: Any, y: Any) -> Any:
    """The parameters after this process's own runtime has trained; other seeds must lead elsewhere."""
    from covey_edge.runtime import Model
    from covey_protocol.bundle import read_bundle

    ends = []
    for first_seed in (2000, 1000):
        model = Model(read_bundle(data))
        for step, (bx, by) in enumerate(zip(x, y)):
            model.train_batch(bx, by, RATE, first_seed + step)
        ends.append(model.parameters())
    assert np.abs(ends[0] - ends[1]).max() > 0.001
    return ends[1]


def _flat(model: Any, names: list[str]) -> Any:
    values = {variable.name.split(":")[0]: variable.numpy().reshape(-1) for variable in model.variables}
    return np.concatenate([values[name] for name in names])


def check_set(python: str, folder: Path, environment: dict[str, str] | None = None) -> str:
    """Train the set with another Python's runtime; its name. Fails where a weight is further off than promised."""
    command = [python, "-c", TRAIN, str(folder)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["heavy"] == []
    assert sorted(result["errors"]) == sorted(path.stem for path in folder.glob("*.npz"))
    worst = {name: error / max(1.0, largest) for name, (error, largest) in result["errors"].items()}
    print(f"\n{result['runtime']}:", ", ".join(f"{name} {error:.1e}" for name, error in worst.items()))
    assert max(worst.values()) < RELATIVE_TOLERANCE, worst
    runtime: str = result["runtime"]
    return runtime
