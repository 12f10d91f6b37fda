"""How often a device's screening refuses honest models and hostile ones that its bounds were not made on.

    COVEY_DATA=FOLDER python benchmarks/screening.py [honest] [hostile] [--models 60] [--half tuning|final]

honest: nets drawn at random (architecture, activations, initialisers, normalisation, data, optimizer, rate), looked at
along their training and after what people do to models: pruning, rounding to few bits, low rank, noise, fine-tuning on
two classes, averaging of two trainings, widening by copied units. Every look is of a device with other examples.
hostile: imprints and trap weights in shapes that benchmarks/malicious.py does not have, with what each reads out of one
real TFLite step beside what an honest start gives away.

Numbers of models (seeds) are even for `tuning` and odd for `final`: bounds were adjusted on the former only.
docs/malicious-models.md has the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from covey_coordinator.libraries import prepare

prepare()

import numpy as np
from malicious import Victim

from covey_coordinator.inversion.contract import Seen
from covey_coordinator.inversion.extraction import found, layer_on_input, plausible, read_units, recovered_share
from covey_coordinator.inversion.imprint import Imprint
from covey_coordinator.inversion.properties import trained
from covey_coordinator.inversion.trap_weights import UnitReading
from covey_edge.model_screening import suspicions
from covey_models import zoo
from covey_models._tensorflow import import_tensorflow
from covey_models.datasets import Dataset, load
from covey_protocol.bundle import FORMAT_VERSION, Manifest, TensorSpec
from covey_protocol.messages import TrainingPlan
from covey_protocol.parameters import ParameterSpec, offsets

Array = np.ndarray[Any, Any]
Generator = np.random.Generator
HALVES = {"tuning": 0, "final": 1}
EPOCHS = (0, 1, 4, 16)  # after which a training is looked at
TRAINED_ON = 600


class Drawn(NamedTuple):
    """kind: of architecture. keras: ends in logits. x, y: what it is trained on. input_range: as a bundle states it."""

    kind: str
    keras: Any
    x: Array
    y: Array
    input_range: tuple[float, float] | None


# --- honest nets


def activation(rng: Generator) -> str:
    return str(rng.choice(["relu", "relu", "relu", "tanh", "sigmoid", "elu", "selu", "gelu", "softplus", "swish"]))


def initialiser(rng: Generator) -> Any:
    start, seed = import_tensorflow().keras.initializers, int(rng.integers(2**31))
    kinds: list[Callable[[], Any]] = [
        lambda: start.GlorotUniform(seed),
        lambda: start.GlorotNormal(seed),
        lambda: start.HeNormal(seed),
        lambda: start.HeUniform(seed),
        lambda: start.LecunNormal(seed),
        lambda: start.Orthogonal(float(rng.choice([0.5, 1.0, 1.4])), seed),
        lambda: start.TruncatedNormal(stddev=float(rng.choice([0.01, 0.05, 0.2])), seed=seed),
        lambda: start.RandomUniform(-0.5, 0.5, seed),
    ]
    return kinds[rng.integers(len(kinds))]()


def dense(units: int, rng: Generator, act: str | None = None) -> Any:
    layers = import_tensorflow().keras.layers
    bias = str(rng.choice(["zeros", "zeros", "ones", "random_normal"]))
    return layers.Dense(units, act, kernel_initializer=initialiser(rng), bias_initializer=bias)


def units_of(rng: Generator) -> int:
    return int(rng.choice([8, 12, 16, 24, 48, 64, 100, 160, 256, 512]))


def perceptron(shape: tuple[int, ...], classes: int, rng: Generator) -> Any:
    """One to three dense layers, with or without BatchNorm and Dropout."""
    keras = import_tensorflow().keras
    act, normed, dropped = activation(rng), rng.random() < 0.3, rng.random() < 0.3
    parts = [keras.Input(shape), keras.layers.Flatten()]
    for _ in range(rng.integers(1, 4)):
        parts.append(dense(units_of(rng), rng))
        if normed:
            parts.append(keras.layers.BatchNormalization())
        parts.append(keras.layers.Activation(act))
        if dropped:
            parts.append(keras.layers.Dropout(0.4))
    return keras.Sequential([*parts, dense(classes, rng)])


def tied(shape: tuple[int, ...], classes: int, rng: Generator) -> Any:
    """An autoencoder's kernel used twice, there and transposed back, and logits on what comes back and on the code."""
    tf = import_tensorflow()

    class Back(tf.keras.layers.Layer):  # type: ignore[misc,name-defined]
        def __init__(self, there: Any) -> None:
            super().__init__()
            self._there = there

        def call(self, hidden: Any) -> Any:
            return tf.matmul(hidden, self._there.kernel, transpose_b=True)

    inputs, act = tf.keras.Input(shape), activation(rng)
    flat = tf.keras.layers.Flatten()(inputs)
    code = dense(units_of(rng), rng, act)
    hidden = code(flat)
    back = Back(code)(hidden)
    return tf.keras.Model(inputs, dense(classes, rng)(tf.keras.layers.Concatenate()([back, hidden])))


def residual(shape: tuple[int, ...], classes: int, rng: Generator) -> Any:
    """Dense blocks added to their input: the first is on the input itself, as an imprint's is."""
    keras = import_tensorflow().keras
    inputs, act = keras.Input(shape), activation(rng)
    x = keras.layers.Flatten()(inputs)
    for _ in range(rng.integers(1, 4)):
        x = keras.layers.Add()([x, dense(x.shape[-1], rng)(dense(units_of(rng), rng, act)(x))])
    return keras.Model(inputs, dense(classes, rng)(x))


def convolutional(shape: tuple[int, ...], classes: int, rng: Generator) -> Any:
    """One to three convolutions, plain, separable or depthwise, pooled and normalised or not, and a hidden layer."""
    keras, act = import_tensorflow().keras, activation(rng)
    layers = keras.layers
    x = inputs = keras.Input(shape)
    for _ in range(rng.integers(1, 4)):
        size = int(rng.choice([1, 3, 5]))
        kind = rng.integers(3)
        filters = int(rng.choice([4, 8, 16, 32]))
        if kind == 0:
            x = layers.Conv2D(filters, size, padding="same", kernel_initializer=initialiser(rng))(x)
        elif kind == 1:
            x = layers.SeparableConv2D(filters, size, padding="same", depth_multiplier=int(rng.choice([1, 8])))(x)
        else:
            x = layers.DepthwiseConv2D(size, padding="same", depth_multiplier=int(rng.choice([1, 4])))(x)
        if rng.random() < 0.5:
            x = layers.BatchNormalization()(x)
        x = layers.Activation(act)(x)
        if min(x.shape[1:3]) > 3 and rng.random() < 0.5:
            x = layers.MaxPooling2D()(x)
    x = layers.GlobalAveragePooling2D()(x) if rng.random() < 0.3 else layers.Flatten()(x)
    if rng.random() < 0.5:
        x = dense(units_of(rng), rng, act)(x)
    return keras.Model(inputs, dense(classes, rng)(x))


def recurrent(shape: tuple[int, ...], classes: int, rng: Generator) -> Any:
    """The rows of a picture, or the numbers of a table one by one, as a sequence."""
    keras = import_tensorflow().keras
    rows = (shape[0], int(np.prod(shape[1:])) if len(shape) > 1 else 1)
    kind = [keras.layers.LSTM, keras.layers.GRU, keras.layers.SimpleRNN][rng.integers(3)]
    cell = kind(int(rng.choice([8, 16, 32])))
    cell = keras.layers.Bidirectional(cell) if rng.random() < 0.3 else cell
    return keras.Sequential([keras.Input(shape), keras.layers.Reshape(rows), cell, dense(classes, rng)])


def embedded(shape: tuple[int, ...], classes: int, rng: Generator) -> Any:
    """Inputs are names of things: 16 levels of every number."""
    keras = import_tensorflow().keras
    inputs = keras.Input(shape, dtype="int32")
    wide = keras.layers.Embedding(16, int(rng.choice([2, 8, 16, 32])))(keras.layers.Flatten()(inputs))
    pooled = keras.layers.GlobalAveragePooling1D() if rng.random() < 0.5 else keras.layers.Flatten()
    hidden = dense(units_of(rng), rng, activation(rng))(pooled(wide))
    return keras.Model(inputs, dense(classes, rng)(hidden))


def of_the_zoo(shape: tuple[int, ...], classes: int, rng: Generator) -> Any:
    names = ["mlp", "softmax"] if len(shape) == 1 else ["mlp", "small-cnn", "softmax", "emnist-cnn"]
    return zoo.build(str(rng.choice(names)), shape, classes, int(rng.integers(1000)))


KINDS = {
    "perceptron": perceptron,
    "residual": residual,
    "tied weights": tied,
    "convolutional": convolutional,
    "recurrent": recurrent,
    "embedding": embedded,
    "zoo": of_the_zoo,
}
FREQUENT = ["perceptron"] * 4 + ["residual"] * 2 + ["tied weights"] * 2 + ["convolutional"] * 2 + list(KINDS)[4:]


def drawn_net(number: int) -> tuple[Drawn, Generator]:
    import_tensorflow().keras.utils.set_random_seed(number)
    rng = np.random.default_rng([number, 1])
    kind = FREQUENT[rng.integers(len(FREQUENT))]
    data = load("digits" if kind == "convolutional" else str(rng.choice(["digits", "digits", "breast-cancer", "wine"])))
    data = data.take(np.random.default_rng(number).permutation(len(data)))
    x, bounds = scaled(data, rng)
    if kind == "embedding":
        low, high = data.input_range
        x, bounds = np.clip((data.x - low) / (high - low) * 16, 0, 15).astype(np.int32), (0.0, 15.0)
    return Drawn(kind, KINDS[kind](data.input_shape, data.num_classes, rng), x, data.y, bounds), rng


def scaled(data: Dataset, rng: Generator) -> tuple[Array, tuple[float, float] | None]:
    """The inputs as they are, from -1 to 1, or each number standardised and without a stated range."""
    low, high = data.input_range
    how = rng.integers(3)
    if how == 0:
        return data.x, data.input_range
    if how == 1:
        return (2 * (data.x - low) / (high - low) - 1).astype(np.float32), (-1.0, 1.0)
    spread = data.x.std(0)
    return ((data.x - data.x.mean(0)) / np.where(spread > 1e-3, spread, 1.0)).astype(np.float32), None


def optimizer(rng: Generator) -> Any:
    optimizers = import_tensorflow().keras.optimizers
    kind = rng.integers(4)
    if kind == 0:
        return optimizers.Adam(float(rng.choice([1e-3, 3e-3, 1e-2])))
    if kind == 1:
        return optimizers.AdamW(float(rng.choice([1e-3, 1e-2])), weight_decay=float(rng.choice([1e-3, 1e-1])))
    return optimizers.SGD(float(rng.choice([0.01, 0.05, 0.2, 0.5])), 0.9 if kind == 3 else 0.0)


def trainer(drawn: Drawn, rng: Generator) -> Callable[[Array, int], None]:
    """Trains in place on these rows for so many epochs, in batches of 32."""
    tf = import_tensorflow()
    chosen, loss = optimizer(rng), tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    order = np.random.default_rng(int(rng.integers(2**31)))

    @tf.function(reduce_retracing=True)
    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            value = loss(y, drawn.keras(x, training=True))
        pairs = zip(tape.gradient(value, drawn.keras.trainable_variables), drawn.keras.trainable_variables)
        chosen.apply_gradients([(one, variable) for one, variable in pairs if one is not None])

    def train(rows: Array, epochs: int) -> None:
        for _ in range(epochs):
            shuffled = order.permutation(rows)
            for first in range(0, len(rows) - 31, 32):
                taken = shuffled[first : first + 32]
                step(tf.constant(drawn.x[taken]), tf.constant(drawn.y[taken]))

    return train


# --- what becomes of a model after its training: (d,) parameters, specs -> (d,)


def per_tensor(change: Callable[[Array, Generator], Array]) -> Callable[[Array, Manifest, Generator], Array]:
    def changed(flat: Array, manifest: Manifest, rng: Generator) -> Array:
        flat, places = flat.copy(), offsets(manifest.parameters)
        for spec in manifest.parameters:
            if spec.trainable and len(spec.shape) > 1:
                matrix = flat[places[spec.name]].reshape(-1, spec.shape[-1])
                flat[places[spec.name]] = change(matrix, rng).astype(np.float32).ravel()
        return flat

    return changed


def pruned(matrix: Array, rng: Generator) -> Array:
    share = float(rng.choice([0.3, 0.6, 0.9]))
    return np.where(np.abs(matrix) >= np.quantile(np.abs(matrix), share), matrix, 0.0)


def units_pruned(matrix: Array, rng: Generator) -> Array:
    """Whole units, the shortest."""
    lengths = np.linalg.norm(matrix, axis=0)
    return matrix * (lengths >= np.quantile(lengths, float(rng.choice([0.2, 0.5]))))


def few_bits(matrix: Array, rng: Generator) -> Array:
    levels = float(rng.choice([127, 7, 1]))
    size = max(float(np.abs(matrix).max()), 1e-12)
    return np.asarray(np.round(matrix / size * levels) / levels * size)


def signs(matrix: Array, rng: Generator) -> Array:
    return np.asarray(np.sign(matrix) * np.abs(matrix).mean())


def low_rank(matrix: Array, rng: Generator) -> Array:
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    rank = max(2, len(sizes) // int(rng.choice([2, 4])))
    return np.asarray((left[:, :rank] * sizes[:rank]) @ right[:rank])


def noised(matrix: Array, rng: Generator) -> Array:
    """As by central noise."""
    return matrix + float(rng.choice([0.1, 1.0])) * matrix.std() * rng.standard_normal(matrix.shape)


def widened(matrix: Array, rng: Generator) -> Array:
    """A third of the units became copies of others with a little noise, as when a net is made wider."""
    matrix, units = matrix.copy(), matrix.shape[1]
    copies = rng.permutation(units)[: units // 3]
    matrix[:, copies] = matrix[:, rng.integers(units, size=len(copies))]
    return matrix + 0.01 * matrix.std() * rng.standard_normal(matrix.shape)


AFTER = {
    "magnitude pruning": per_tensor(pruned),
    "units pruned": per_tensor(units_pruned),
    "8, 4 or 2 bits": per_tensor(few_bits),
    "signs alone": per_tensor(signs),
    "low rank": per_tensor(low_rank),
    "noise": per_tensor(noised),
    "widened by copies": per_tensor(widened),
}


def manifest_of(drawn: Drawn) -> Manifest:
    """Names and order as an export's: moving statistics last."""
    keras = drawn.keras
    variables = [*keras.trainable_weights, *keras.non_trainable_weights]
    specs = tuple(
        ParameterSpec(f"{number}/{one.name}", tuple(one.shape), trainable=number < len(keras.trainable_weights))
        for number, one in enumerate(variables)
    )
    low, high = drawn.input_range or (None, None)
    kind = "int32" if drawn.x.dtype == np.int32 else "float32"
    return Manifest(
        format=FORMAT_VERSION, name=drawn.kind, model_sha256="", model_bytes=0, batch_size=32,
        input=TensorSpec(drawn.x.shape[1:], kind, low, high), label=TensorSpec((), "int32"), parameters=specs,
        signatures=(), loss="sparse_categorical_crossentropy", optimizer="sgd", num_classes=int(drawn.y.max()) + 1,
    )  # fmt: skip


def numbers(keras: Any) -> Array:
    variables = [*keras.trainable_weights, *keras.non_trainable_weights]
    return np.concatenate([np.ravel(one.numpy()) for one in variables]).astype(np.float32)


def owners(drawn: Drawn, rng: Generator) -> dict[str, Array]:
    """Inputs of devices: many of all classes, of two, of one, and few."""
    two = rng.choice(int(drawn.y.max()) + 1, 2, replace=False)
    return {
        "all classes": drawn.x[rng.permutation(len(drawn.x))[:300]],
        "two classes": drawn.x[np.isin(drawn.y, two)][:100],
        "one class": drawn.x[drawn.y == two[0]][:60],
        "20 examples": drawn.x[rng.permutation(len(drawn.x))[:20]],
    }


def stages(drawn: Drawn, rng: Generator) -> Iterator[tuple[str, Array]]:
    """(when, parameters) of two trainings from one start, along the first, after fine-tuning, and averaged."""
    rows = np.arange(min(TRAINED_ON, len(drawn.x)))
    train, done, start = trainer(drawn, rng), 0, drawn.keras.get_weights()
    for epochs in EPOCHS:
        train(rows, epochs - done)
        done = epochs
        yield f"{epochs} epochs" if epochs else "untrained", numbers(drawn.keras)
    first = numbers(drawn.keras)
    train(rows[drawn.y[rows] < 2], 4)
    yield "fine-tuned on two classes", numbers(drawn.keras)
    drawn.keras.set_weights(start)
    train(rows, 4)
    yield "mean of two trainings", (first + numbers(drawn.keras)) / 2


class Look(NamedTuple):
    model: int
    kind: str
    when: str
    after: str
    owner: str
    patterns: list[str]
    told: list[str]


def looks(number: int) -> Iterator[Look]:
    drawn, rng = drawn_net(number)
    manifest = manifest_of(drawn)
    for when, flat in stages(drawn, rng):
        if not np.isfinite(flat).all():
            return  # it does not bear its rate
        chosen = rng.permutation(list(AFTER))[:2]
        changed = {"as trained": flat, **{name: AFTER[name](flat, manifest, rng) for name in chosen}}
        for after, parameters in changed.items():
            for owner, x in owners(drawn, rng).items():
                found = [one for one in suspicions(manifest, parameters, x) if one.grave]
                yield Look(
                    number, drawn.kind, when, after, owner, [one.pattern for one in found], [str(one) for one in found]
                )


def honest(half: int, models: int, keep: Callable[[str, Any], None]) -> None:
    all_looks: list[Look] = []
    for place in range(models):
        all_looks += looks(2 * place + half)
        if place % 5 == 4 or place + 1 == models:
            refused = sum(bool(one.patterns) for one in all_looks)
            print(f"{place + 1} of {models} models, {refused} of {len(all_looks)} looks", file=sys.stderr, flush=True)
            keep("honest", [one._asdict() for one in all_looks])
    for name in ("kind", "when", "after", "owner"):
        print(f"\n| {name} | models refused at least once | looks that refused | patterns |\n|---|---|---|---|")
        for value in dict.fromkeys(getattr(one, name) for one in all_looks):
            some = [one for one in all_looks if getattr(one, name) == value]
            bad = [one for one in some if one.patterns]
            seen, refused = {one.model for one in some}, {one.model for one in bad}
            patterns = ", ".join(sorted({pattern for one in bad for pattern in one.patterns})) or "none"
            print(f"| {value} | {len(refused)} of {len(seen)} | {len(bad)} of {len(some)} | {patterns} |")


# --- hostile parameters: specs, start (d,), own examples, seed -> (d,)


def unit_vector(own: Array, kind: str, rng: Generator) -> Array:
    """What an imprint measures: the mean (as published), the first principal direction, a few inputs, or random."""
    rows = own.reshape(len(own), -1).astype(np.float64)
    if kind == "mean":
        direction = np.ones(rows.shape[1])
    elif kind == "principal":
        direction = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][0]
    else:
        direction = rng.standard_normal(rows.shape[1])
        if kind == "few inputs":
            spread = rows.std(0)
            direction *= spread >= np.sort(spread)[-max(4, rows.shape[1] // 10)]
    return np.asarray(direction / np.linalg.norm(direction))


def imprint_of(
    kind: str = "random", groups: int = 1, share: float = 1.0, noise: float = 0.0, uneven: float = 0.0
) -> Callable[..., Array]:
    """An imprint of several directions, each measured by as many units (groups), which are a share of the layer.

    noise: on every row, as long as so many times the direction; within what examples span, so that a look at examples
    sees all of it. uneven: the rows' lengths vary by a factor of 1 + uneven either way.
    """

    def make(specs: Any, start: Array, own: Array, seed: int) -> Array:
        rng = np.random.default_rng([seed, 3])
        rows = own.reshape(len(own), -1).astype(np.float64)
        layer, behind = layer_on_input(specs, rows.shape[1])
        assert behind is not None
        flat = np.array(start, np.float32)
        kernel, later = flat[layer.kernel_place].reshape(layer.kernel.shape), behind
        rear = flat[later.kernel_place].reshape(later.kernel.shape)
        bias = flat[layer.bias_place]
        order = rng.permutation(layer.bias.size)[: round(share * layer.bias.size)]
        axes = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:20]
        for places in np.array_split(order, groups):
            direction = unit_vector(own, kind, rng)
            measured = rows @ direction
            edges = np.quantile(measured, np.arange(len(places)) / len(places)) - 1e-6
            spread = rng.standard_normal((len(places), len(axes))) @ axes / np.sqrt(len(axes))
            scales = (1 + uneven) ** rng.uniform(-1, 1, len(places))
            noisy = direction + noise * spread
            centre = rows.mean(0)
            kernel[:, places] = (noisy * scales[:, None]).T
            bias[places] = -scales * (edges + (noisy - direction) @ centre)  # the noise is around the mean example
            out = rng.standard_normal((1, rear.shape[1]))
            strength = np.maximum(measured[:, None] - edges, 0.0).sum(1).mean() * groups
            rear[places] = out / strength / scales[:, None]
        return flat

    return make


def traps_of(on: float, noise: float = 0.0, share: float = 1.0, biases: bool = False) -> Callable[..., Array]:
    """Units that few examples switch on. biases: honest rows with a bias far below; else half of each row is the other
    half's negative, with noise and made smaller, by a search of its own. share: of the units; the rest are honest."""

    def make(specs: Any, start: Array, own: Array, seed: int) -> Array:
        rng = np.random.default_rng([seed, 5])
        rows = own.reshape(len(own), -1).astype(np.float64)
        layer, _ = layer_on_input(specs, rows.shape[1])
        flat = np.array(start, np.float32)
        kernel, bias = flat[layer.kernel_place].reshape(layer.kernel.shape), flat[layer.bias_place]
        for place in rng.permutation(layer.bias.size)[: round(share * layer.bias.size)]:
            if not biases:
                column = np.abs(rng.standard_normal(len(kernel))) * np.sign(
                    rng.permutation(len(kernel)) - len(kernel) / 2
                )
                negative, positive = np.minimum(column, 0.0), np.maximum(column, 0.0)
                positive[positive > 0] += noise * rng.standard_normal(int((positive > 0).sum()))
                above, below = rows @ positive, -(rows @ negative)
                ratio = np.quantile(below / np.maximum(above, 1e-9), on)
                column = negative + ratio * positive
                kernel[:, place] = column * np.linalg.norm(kernel[:, place]) / np.linalg.norm(column)
            bias[place] = -np.quantile(rows @ kernel[:, place], 1 - on) if biases else 0.0
        return flat

    return make


HOSTILE: dict[str, tuple[Callable[..., Array], Any]] = {
    "honest start": (lambda specs, start, own, seed: start, UnitReading()),
    "imprint of the mean": (imprint_of("mean"), Imprint()),
    "imprint of the first principal direction": (imprint_of("principal"), Imprint()),
    "imprint of a tenth of the inputs": (imprint_of("few inputs"), Imprint()),
    **{f"imprint, noise {noise:g} in what examples span": (imprint_of(noise=noise), Imprint())
       for noise in (0.05, 0.15, 0.2, 0.25, 0.4, 0.6)},
    "imprint, rows 10 times longer and shorter": (imprint_of(uneven=9.0), Imprint()),
    **{f"imprint of {groups} directions": (imprint_of(groups=groups), UnitReading()) for groups in (2, 4, 8, 12)},
    **{f"imprint in {share:.0%} of the units, noise 0.1": (imprint_of(share=share, noise=0.1), Imprint())
       for share in (0.12, 0.25, 0.4)},
    **{f"traps, {on:.0%} on, noise {noise:g}": (traps_of(on, noise), UnitReading())
       for on in (0.02, 0.07, 0.15, 0.22, 0.3) for noise in (0.0, 0.2, 0.5)},
    **{f"traps by bias, {on:.0%} on": (traps_of(on, biases=True), UnitReading()) for on in (0.03, 0.1, 0.2, 0.3)},
    "traps in half of the units, 3% on": (traps_of(0.03, 0.3, share=0.5), UnitReading()),
    "traps in 80% of the units, 3% on": (traps_of(0.03, 0.3, share=0.8), UnitReading()),
}  # fmt: skip


def hostile(half: int, seeds: int, only: str, keep: Callable[[str, Any], None]) -> None:
    names = ["digits", "breast-cancer"] + (["mnist"] if os.environ.get("COVEY_DATA") else [])
    victims = [(name, units, Victim.of(load(name), units, 16)) for name in names for units in (64, 256)]
    rows: list[dict[str, Any]] = []
    print("| parameters | recovered at 20 dB or better | refused | patterns |\n|---|---|---|---|", flush=True)
    for name, (make, attack) in HOSTILE.items():
        if only not in name:
            continue
        if name.startswith("imprint of") and name.endswith("directions"):
            attack = Several()
        for data, units, victim in victims:
            if data == "breast-cancer" and name.startswith("traps") and "bias" not in name:
                continue  # inputs that are negative as often as positive: traps without a bias do not work
            for place in range(seeds):
                rows.append(
                    {"name": name, "data": data, "units": units, **looked_at(victim, 2 * place + half, make, attack)}
                )
        some = [row for row in rows if row["name"] == name]
        patterns = defaultdict(int)
        for row in some:
            for pattern in row["patterns"]:
                patterns[pattern] += 1
        refused, share = sum(bool(row["patterns"]) for row in some), np.mean([row["share"] for row in some])
        told = ", ".join(f"{pattern} {count}" for pattern, count in patterns.items()) or "none"
        print(f"| {name} | {share:.2f} | {refused} of {len(some)} | {told} |", flush=True)
        keep("hostile", rows)


class Several(Imprint):
    """Differences of neighbours within each of several directions: units are sorted into them by their rows."""

    def run(self, model: Any, seen: Any, *, seed: int, **_: Any) -> Any:
        layer, behind = layer_on_input(model.specs, int(np.prod(model.input.shape)))
        assert behind is not None
        sent, bias_sent = layer.gradients(seen.parameters)
        kernel, bias = layer.gradients(seen.update)
        rows = behind.gradients(seen.parameters)[0]
        unit = sent / np.linalg.norm(sent, axis=0)
        left, candidates, strengths = list(range(unit.shape[1])), [], []
        while left:
            group = [place for place in left if unit[:, left[0]] @ unit[:, place] > 0.95]
            left = [place for place in left if place not in group]
            order = sorted(group, key=lambda place: -bias_sent[place])
            gains = rows[order] @ rows[order[0]] / float(rows[order[0]] @ rows[order[0]])
            ours, theirs = kernel[:, order] / gains, bias[order] / gains
            ours[:, :-1] -= ours[:, 1:].copy()
            theirs[:-1] -= theirs[1:].copy()
            some, strength = read_units(ours, theirs)
            candidates.append(some)
            strengths.append(strength)
        inputs = plausible(np.concatenate(candidates), np.concatenate(strengths), model.input, seen.examples)
        return found(self.name, self.sees, model, seen, inputs, 0.0)


def looked_at(victim: Victim, seed: int, make: Any, attack: Any) -> dict[str, Any]:
    """Of one server's parameters: the share that one step on 16 examples gives away, and what a device says to them."""
    order = np.random.default_rng([seed, 9]).permutation(len(victim.data))
    its, own = victim.data.take(order[:200]), victim.data.take(order[200:1200])
    parameters, plan = make(victim.bundle.manifest.parameters, victim.start, own.x, seed), TrainingPlan(1, 0.1)
    x, y = its.x[:16], its.y[:16]
    seen = Seen(parameters, trained(victim.device, parameters, (x, y), plan, "pi"), plan, 16)
    share = recovered_share(x, attack.run(victim.model, seen, seed=0).inputs, victim.data.input_range, 20.0)
    found = [one for one in suspicions(victim.bundle.manifest, parameters, its.x) if one.grave]
    return {
        "seed": seed,
        "share": share,
        "patterns": sorted({one.pattern for one in found}),
        "told": [*map(str, found)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", default=["honest", "hostile"], help="honest, hostile; both if none is named"
    )
    parser.add_argument("--half", choices=HALVES, default="final")
    parser.add_argument("--models", type=int, default=60, help="honest ones")
    parser.add_argument("--seeds", type=int, default=2, help="of each hostile one, on each data set and width")
    parser.add_argument("--only", default="", help="hostile ones whose name holds this")
    parser.add_argument("--json", type=Path, help="every look, written as they come")
    given = parser.parse_args()
    results: dict[str, Any] = {}

    def keep(part: str, rows: Any) -> None:
        results[part] = rows
        if given.json:
            given.json.write_text(json.dumps(results))

    for part in given.parts or ["honest", "hostile"]:
        if part == "honest":
            honest(HALVES[given.half], given.models, keep)
        elif part == "hostile":
            hostile(HALVES[given.half], given.seeds, given.only, keep)
        else:
            parser.error(f"there is no part {part!r}")


if __name__ == "__main__":
    main()
