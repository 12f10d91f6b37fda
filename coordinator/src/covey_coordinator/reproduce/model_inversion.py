"""Fredrikson et al. 2015, section 5: faces read off face recognisers, and what rounding their answers changes."""

from __future__ import annotations

import base64
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.grid.simulation import stream
from covey_coordinator.grid.training import Network
from covey_coordinator.inversion import model_inversion as inversion
from covey_coordinator.inversion.model_inversion import Array, Inverted, Search, Slope, Slopes
from covey_coordinator.reproduce import data
from covey_coordinator.reproduce.contract import Case, Claim, Measured, Outcome, Reproduction
from covey_coordinator.reproduce.pictures import new_figure, png
from covey_protocol.parameters import ParameterSpec

FEDERATED, MOVES, NOISE, WEIGHTS = 61, 62, 63, 64  # streams of random numbers of one seed
UNITS = (0.001, 0.005, 0.01, 0.05, 0.1)  # what the paper rounds to
SMALL, LARGE = 1e-3, 1.0  # steps of the numerical slope, in pixels of [0, 1]
MOVED = 0.1  # of the adaptive attack: the deviation of a move in one pixel
SHOWN, THUMB = 6, 2  # people in the figure, and by how much their pictures are reduced there
SOFTMAX, MLP, DAE, FLEET = "softmax", "MLP", "DAE", "softmax, federated"
NO_PROCESS = "DAE, no Process"
ERROR, WHITE = "test error", "white box"
BLACK, DITHER, LABELS = "black box", "dithered", "labels only"


class Faces(NamedTuple):
    """Pictures as rows (n, d) in [0, 1] and whose they are. shape: (height, width)."""

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array
    shape: tuple[int, int]

    @property
    def people(self) -> int:
        return int(self.train_y.max()) + 1

    @property
    def means(self) -> Array:
        """(people, d): of each one's held-out pictures, which no model has seen."""
        return np.stack([self.test_x[self.test_y == person].mean(axis=0) for person in range(self.people)])


def faces_of(seed: int, folder: Path | None, reduced: int) -> Faces:
    train, test = data.faces(folder, seed)
    small = [shrunk(one.x, reduced) for one in (train, test)]
    height, width = small[0].shape[1:]
    return Faces(small[0].reshape(len(train), -1), train.y, small[1].reshape(len(test), -1), test.y, (height, width))


def shrunk(pictures: Array, by: int) -> Array:
    """Means of by x by pixels; (n, height, width), both divisible."""
    count, height, width = pictures.shape
    return np.asarray(pictures.reshape(count, height // by, by, width // by, by).mean(axis=(2, 4)))


def alike(pictures: Array, means: Array) -> Array:
    """(n,): the person whose mean held-out picture correlates most with each picture, -1 for a flat picture."""

    def standardised(rows: Array) -> Array:
        centred = rows - rows.mean(axis=1, keepdims=True)
        return np.asarray(centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12))

    found = (standardised(pictures) @ standardised(means).T).argmax(axis=1)
    return np.where(np.ptp(pictures, axis=1) > 0, found, -1)


# --- the models


class Recogniser(NamedTuple):
    """predicted: pictures (n, d) -> people (n,). start, slopes: where and with what the white-box search goes.

    seen: what the search's results look like as pictures (n, d). process: of the search.
    """

    predicted: Callable[[Array], Array]
    slopes: Slopes
    start: Array
    seen: Callable[[Array], Array]
    process: inversion.Process | None = None


def trained(layers: Sequence[Any], x: Array, y: Array, epochs: int, rate: float, seed: int) -> Any:
    """A Keras model of these layers after full-batch Adam on the cross entropy."""
    import tensorflow as tf

    tf.keras.utils.set_random_seed(seed)
    model = tf.keras.Sequential([tf.keras.Input((x.shape[1],)), *layers])
    optimizer = tf.keras.optimizers.Adam(rate)
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    given, labels = tf.constant(x, tf.float32), tf.constant(y)

    @tf.function  # type: ignore[untyped-decorator]  # TensorFlow ships no types
    def step() -> None:
        with tf.GradientTape() as tape:
            value = loss(labels, model(given, training=True))
        optimizer.apply_gradients(zip(tape.gradient(value, model.trainable_variables), model.trainable_variables))

    optimizer.build(model.trainable_variables)
    for _ in range(epochs):
        step()
    return model


def from_keras(model: Any, faces: Faces) -> Recogniser:
    from covey_coordinator.inversion.keras_model import KerasModel

    attacked = KerasModel(model)
    slopes = inversion.white_box(attacked, attacked.parameters())
    zero = np.zeros(faces.train_x.shape[1], np.float32)
    return Recogniser(lambda x: model(x.astype(np.float32)).numpy().argmax(1), slopes, zero, lambda x: x)


def softmax_weights(faces: Faces, seed: int) -> tuple[Array, Array]:
    """(kernel (d, people), bias (people,)) of softmax regression: 300 epochs of Adam with rate 0.001."""
    import tensorflow as tf

    model = trained([tf.keras.layers.Dense(faces.people)], faces.train_x, faces.train_y, 300, 1e-3, seed)
    kernel, bias = (np.asarray(weight, np.float64) for weight in model.get_weights())
    return kernel, bias


def softmax(faces: Faces, seed: int) -> Recogniser:
    import tensorflow as tf

    return from_keras(
        trained([tf.keras.layers.Dense(faces.people)], faces.train_x, faces.train_y, 300, 1e-3, seed), faces
    )


def mlp(faces: Faces, seed: int) -> Recogniser:
    """3000 sigmoid units, 60 epochs of Adam with rate 0.0003."""
    import tensorflow as tf

    layers = [tf.keras.layers.Dense(3000, activation="sigmoid"), tf.keras.layers.Dense(faces.people)]
    return from_keras(trained(layers, faces.train_x, faces.train_y, 60, 3e-4, seed), faces)


def dae(faces: Faces, seed: int) -> Recogniser:
    """Denoising autoencoders of 1000 and 300 sigmoid units, layer by layer, then softmax regression on the code.

    Every second pixel's noise is N(0, 0.2^2) on average: all inputs of a layer get it while that layer is trained.
    """
    import tensorflow as tf

    first_in, first_out = autoencoder(faces.train_x, 1000, seed, 0)
    hidden = first_in(faces.train_x)
    second_in, second_out = autoencoder(hidden, 300, seed, 1)

    def encode(x: Array) -> Array:
        return second_in(first_in(x))

    def decode(code: Array) -> Array:
        return first_out(second_out(code))

    top = trained([tf.keras.layers.Dense(faces.people)], encode(faces.train_x), faces.train_y, 600, 1e-2, seed)
    kernel, bias = (np.asarray(weight, np.float64) for weight in top.get_weights())
    picture = inversion.denoised_and_sharpened()

    def processed(rows: Array) -> Array:
        return picture(rows.reshape(-1, *faces.shape)).reshape(len(rows), -1)

    return Recogniser(
        lambda x: (encode(x) @ kernel + bias).argmax(axis=1),
        linear_slopes(kernel, bias),
        encode(np.zeros((1, faces.train_x.shape[1])))[0],
        decode,
        inversion.in_code_space(encode, decode, processed),
    )


def autoencoder(
    x: Array, width: int, seed: int, layer: int
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """(encode, decode) with sigmoids: 200 epochs of full-batch Adam on the cross entropy of pixels, inputs noisy."""
    import tensorflow as tf

    tf.keras.utils.set_random_seed(seed + layer)
    into = tf.keras.layers.Dense(width, activation="sigmoid")
    out = tf.keras.layers.Dense(x.shape[1])
    given, noise = tf.constant(x, tf.float32), tf.random.Generator.from_seed(seed + NOISE + layer)
    optimizer = tf.keras.optimizers.Adam(1e-3)
    variables = [*_built(into, x.shape[1]), *_built(out, width)]
    optimizer.build(variables)

    @tf.function  # type: ignore[untyped-decorator]  # TensorFlow ships no types
    def step() -> None:
        with tf.GradientTape() as tape:
            noisy = given + noise.normal(given.shape, stddev=0.2)
            value = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(given, out(into(noisy))))
        optimizer.apply_gradients(zip(tape.gradient(value, variables), variables))

    for _ in range(200):
        step()

    def encode(rows: Array) -> Array:
        return np.asarray(into(tf.constant(rows, tf.float32)), np.float64)

    def decode(codes: Array) -> Array:
        return np.asarray(tf.sigmoid(out(tf.constant(codes, tf.float32))), np.float64)

    return encode, decode


def _built(layer: Any, width: int) -> list[Any]:
    layer.build((None, width))
    return list(layer.trainable_variables)


DEVICES, ROUNDS, STEPS, RATE = 10, 150, 5, 0.05


def federated(faces: Faces, seed: int) -> Recogniser:
    """Softmax regression by federated averaging: ten devices with the pictures of four people each."""
    kernel, bias = federated_weights(faces, seed)
    zero = np.zeros(len(kernel))
    slopes = linear_slopes(kernel, bias)
    return Recogniser(lambda x: (x @ kernel + bias).argmax(axis=1), slopes, zero, lambda x: x)


def federated_weights(faces: Faces, seed: int) -> tuple[Array, Array]:
    width = faces.train_x.shape[1]
    specs = [ParameterSpec("kernel", (width, faces.people)), ParameterSpec("bias", (faces.people,))]
    network, engine = Network(specs), make_engine("direct", make_rule("mean", 0), specs, "sgd", 1.0)
    shards = [np.flatnonzero(faces.train_y % DEVICES == device) for device in range(DEVICES)]
    ids, counts = [f"device-{device}" for device in range(DEVICES)], np.array([len(one) for one in shards], np.float32)
    parameters, x = np.zeros((width + 1) * faces.people, np.float32), faces.train_x.astype(np.float32)
    for number in range(ROUNDS):
        draw = stream(seed, FEDERATED, number)
        batches = np.stack([[draw.choice(one, 10) for one in shards] for _ in range(STEPS)])
        sent = network.trained(parameters, x, faces.train_y, batches, RATE) - parameters
        parameters = engine.step(parameters, sent, counts, ids).parameters
    kernel, bias = (tensor.astype(np.float64) for tensor in network.tensors(parameters))
    return kernel, bias


RECOGNISERS: dict[str, Callable[[Faces, int], Recogniser]] = {
    SOFTMAX: softmax,
    FLEET: federated,
    MLP: mlp,
    DAE: dae,
    NO_PROCESS: lambda faces, seed: dae(faces, seed)._replace(process=None),
}


# --- softmax regression asked and differentiated by hand


def softmax_of(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def linear_slopes(kernel: Array, bias: Array) -> Slopes:
    """What `white_box` gives, of softmax regression."""

    def slopes(x: Array, labels: Array) -> Slope:
        probabilities = softmax_of(x @ kernel + bias)
        places = np.arange(len(labels)), labels
        own = probabilities[places]
        by_logit = -own[:, None] * probabilities
        by_logit[places] += own
        return Slope(own, by_logit @ kernel.T)

    return slopes


def linear_black_box(kernel: Array, bias: Array, step: float, unit: float) -> Slopes:
    """What `black_box` gives of rounded softmax regression, without multiplying 2 d whole pictures for one slope.

    A moved pixel changes the logits by its row of the kernel, so that the 2 d answers cost what one did. unit: 0 for
    answers that are not rounded.
    """

    def answered(logits: Array, label: int) -> Array:
        own = softmax_of(logits)[:, label]
        return np.round(own / unit) * unit if unit else own

    def slopes(x: Array, labels: Array) -> Slope:
        confidences, found = [], []
        for one, label in zip(x, labels):
            logits = one @ kernel + bias
            up, down = (answered(logits + sign * step * kernel, label) for sign in (1, -1))
            found.append((up - down) / (2 * step))
            confidences.append(answered(logits[None], label)[0])
        return Slope(np.array(confidences), np.stack(found), len(x) * (2 * x.shape[1] + 1))

    return slopes


# --- the runs


class Attack(NamedTuple):
    """model, attack: of the names above. people: how many are attacked, drawn by the seed. step, unit: black box."""

    model: str
    attack: str
    people: int = 40
    reduced: int = 1
    step: float = 0.0
    unit: float = 0.0
    iterations: int = 5000


DITHERED = Search(iterations=400, patience=10**6, confidence=2.0, rate=0.5, unit=True)


def run(settings: dict[str, Any], seed: int, folder: Path | None) -> Outcome:
    """value: share of people identified, or the test error. empty: share of flat pictures. answers: a person's."""
    started = time.process_time()
    told = Attack(**settings)
    faces = faces_of(seed, folder, told.reduced)
    people = stream(seed, WEIGHTS).permutation(faces.people)[: told.people]
    outcome = error(told, faces, seed) if told.attack == ERROR else attacked(told, faces, people, seed)
    return {**outcome, "seconds": round(time.process_time() - started, 2)}


def error(told: Attack, faces: Faces, seed: int) -> Outcome:
    predicted = RECOGNISERS[told.model](faces, seed).predicted(faces.test_x)
    return {"value": float((predicted != faces.test_y).mean())}


def attacked(told: Attack, faces: Faces, people: Array, seed: int) -> Outcome:
    if told.attack == WHITE:
        one = RECOGNISERS[told.model](faces, seed)
        found = inversion.invert(one.slopes, people, one.start, Search(iterations=told.iterations), process=one.process)
        pictures = one.seen(found.inputs)
    else:
        kernel, bias = softmax_weights(faces, seed)
        found = asked(told, kernel, bias, faces, people, seed)
        pictures = found.inputs
    pictures = np.where(found.empty[:, None], 0.0, pictures)
    return {
        "value": float((alike(pictures, faces.means) == people).mean()),
        "empty": float(found.empty.mean()),
        "confidence": float(np.mean(found.confidences)),
        "iterations": float(np.mean(found.iterations)),
        "answers": found.answers / len(people),
        "confident": float(np.mean([why == inversion.CONFIDENT for why in found.ended])),
        "people": [int(person) for person in people[:SHOWN]],
        "pictures": packed(pictures[:SHOWN], faces.shape, told.reduced),
        "truth": packed(faces.means[people[:SHOWN]], faces.shape, told.reduced),
    }


def asked(told: Attack, kernel: Array, bias: Array, faces: Faces, people: Array, seed: int) -> Inverted:
    zero = np.zeros(len(kernel))
    if told.attack == BLACK:
        slopes = linear_black_box(kernel, bias, told.step, told.unit)
        return inversion.invert(slopes, people, zero, Search(iterations=told.iterations))

    def ask(x: Array) -> Array:
        return softmax_of(x.reshape(len(x), -1) @ kernel + bias)

    seen = inversion.labels_only(ask) if told.attack == LABELS else inversion.rounded(ask, told.unit)
    draw = inversion.blotches(faces.shape, 12)
    slopes = inversion.smoothed(seen, draw, told.step, 50, seed + MOVES)
    start = np.zeros(faces.shape)
    found = inversion.invert(slopes, people, start, DITHERED, process=inversion.within(0, 1))
    return dataclasses.replace(found, inputs=found.inputs.reshape(len(people), -1))


def packed(pictures: Array, shape: tuple[int, int], reduced: int) -> str:
    """Each picture stretched to 0..255 and reduced, as base64 of (n, height, width) uint8 of half the full size."""
    whole = pictures.reshape(-1, *shape)
    small = shrunk(whole, THUMB // reduced) if reduced < THUMB else whole
    low, high = (edge(small, axis=(1, 2), keepdims=True) for edge in (np.min, np.max))
    scaled = 255 * (small - low) / np.maximum(high - low, 1e-12)
    return base64.b64encode(np.round(scaled).astype(np.uint8).tobytes()).decode()


def unpacked(text: str, count: int) -> Array:
    height, width = (side // THUMB for side in data.FACE)
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(count, height, width)


# --- the reproduction


def label_of(model: str, attack: str) -> str:
    return f"{model}: {attack}"


def asked_label(step: float, unit: float) -> str:
    answers = f"rounded to {unit:g}" if unit else "not rounded"
    return label_of(SOFTMAX, f"{BLACK}, step {step:g}, {answers}")


def adaptive_label(attack: str) -> str:
    return label_of(SOFTMAX, f"{attack}, rounded to 0.1" if attack == DITHER else attack)


PUBLISHED_ERRORS = {SOFTMAX: 0.075, MLP: 0.042, DAE: 0.033}
IDENTIFIED = 0.75  # by people at Mechanical Turk, over all line-ups


def cases(quick: bool) -> Sequence[Case]:
    whole, few, asked_people = (2, 2, 4) if quick else (1, 10, 6)
    found = []
    for model in (SOFTMAX, FLEET, MLP, DAE):
        published = PUBLISHED_ERRORS.get(model)
        settings = Attack(model, ERROR, reduced=whole if model in (SOFTMAX, FLEET) else 2)._asdict()
        found.append(Case(label_of(model, ERROR), settings, published))
    for model in (SOFTMAX, FLEET, MLP, DAE) if quick else RECOGNISERS:
        linear = model in (SOFTMAX, FLEET)
        settings = Attack(model, WHITE, *((40, whole) if linear else (few, 2)))._asdict()
        found.append(Case(label_of(model, WHITE), settings, IDENTIFIED if model == SOFTMAX else None))
    for step in (SMALL, LARGE):
        for unit in (0.0, 0.01, 0.1) if quick else (0.0, *UNITS):
            settings = Attack(SOFTMAX, BLACK, asked_people, 2, step, unit)._asdict()
            found.append(Case(asked_label(step, unit), settings, 0.0 if unit == UNITS[-1] else None))
    for attack in (DITHER, LABELS):
        settings = Attack(SOFTMAX, attack, asked_people, 2, MOVED, UNITS[-1])._asdict()
        found.append(Case(adaptive_label(attack), settings))
    return found


def figure(cases: Sequence[Case], measured: Measured) -> bytes:
    """Truth above what each attack recovered, of the first seed; one line per attack."""
    lines = [case.label for case in cases if "pictures" in measured.outcomes[case.label][0]]
    first = measured.outcomes[lines[0]][0]
    image, axes = new_figure(SHOWN, len(lines) + 1, size=(0.95, 1.15))
    rows = [("truth: mean of held-out pictures", first["truth"], first), *(
        (label, measured.outcomes[label][0]["pictures"], measured.outcomes[label][0]) for label in lines
    )]  # fmt: skip
    for line, (label, packed_pictures, outcome) in zip(axes, rows):
        pictures = unpacked(packed_pictures, len(outcome["people"]))
        for one in line:
            one.set_axis_off()
        for one, picture in zip(line, pictures):
            one.imshow(picture, cmap="gray", vmin=0, vmax=255)
        line[0].set_title(label, fontsize=6.5, loc="left")
    image.set_layout_engine(None)  # the constrained one makes the titled column wider than the others
    image.subplots_adjust(left=0.02, right=0.98, bottom=0.01, top=0.95, wspace=0.05, hspace=0.3)
    image.suptitle("Pictures: AT&T Laboratories Cambridge; reconstructions: covey", fontsize=6)
    return png(image)


def found(measured: Measured) -> str:
    parts = []
    for label, outcomes in measured.outcomes.items():
        if "pictures" in outcomes[0]:
            iterations, answers, empty = (np.mean([one[key] for one in outcomes])
                                          for key in ("iterations", "answers", "empty"))  # fmt: skip
            asked_for = f", {answers:.2g} answers" if answers else ""
            flat = f", {100 * empty:.0f}% flat" if empty else ""
            parts.append(f"{label} {iterations:.0f} steps{asked_for}{flat}")
    return f"Per person: {'; '.join(parts)}."


MODEL_INVERSION = Reproduction(
    name="model-inversion",
    title="Faces read off face recognisers, and what rounding their answers changes",
    paper="Fredrikson, Jha, Ristenpart 2015, Model Inversion Attacks that Exploit Confidence Information (CCS 2015)",
    source="section 5 and table of errors, from memory of the paper: its text could not be had here",
    engine="covey_coordinator.inversion.model_inversion; federated: ten devices in numpy, engine.step of live rounds",
    measure="error: share of wrong held-out pictures; else the share of attacked people whose picture is identified",
    protocol=(
        "AT&T's faces, 40 people with ten pictures each, 7 to train and 3 held out by the seed; of 112 x 92 pixels in "
        "the full form's errors and white-box rows of the softmax models, else of 56 x 46.",
        "MI-Face as in the paper: 5000 steps of rate 0.1 from a black picture, patience 100, confidence 0.99; no "
        "Process but for the autoencoder (denoise and sharpen, in code space).",
        "A picture counts as identified where, of the mean held-out pictures of all 40 people, it correlates most with "
        "its own person's. A flat picture is not identified.",
        "Attacked: all 40 people of both softmax models; of MLP and autoencoder 10 (quick form 2), as black box 6 (4).",
        "Black box: central differences in every pixel; answers of softmax regression to single moved pixels are "
        "computed from the kernel's rows.",
        "Adaptive: confidences (rounded to 0.1) or labels alone, averaged over 100 random moves of coarse blotches of "
        f"deviation {MOVED}, {DITHERED.iterations} steps of length {DITHERED.rate}.",
        "Softmax: 300 epochs of full-batch Adam; MLP of 3000 sigmoids: 60 epochs; autoencoder 1000 and 300 sigmoids; "
        "federated: ten devices with four people each, 150 rounds of 5 steps of SGD.",
    ),
    deviations=(
        "People at Mechanical Turk chose in the paper; here a program does, with pictures no model has seen. It sees "
        "in a reconstruction what linear classifiers see, which is more than an eye does.",
        "The paper's stopping rule as printed (cost at most 0.99) would stop at the start: ours is a confidence.",
        "The denoiser is a median filter, the paper's is non-local means; its optimizers are not known to us.",
        "The adaptive attacks are not in the paper.",
    ),
    full_time="full form: about half an hour of one core's time per seed (scaled from single runs of the quick form)",
    cases=cases,
    claims=(
        Claim(
            "Softmax regression errs on at most 7.5% of held-out pictures",
            lambda v: v[label_of(SOFTMAX, ERROR)] <= 0.075,
        ),
        Claim(
            "At least 75% of the faces are identified (softmax, white box)",
            lambda v: v[label_of(SOFTMAX, WHITE)] >= 0.75,
        ),
        Claim("A federated model gives its devices' people away as well", lambda v: v[label_of(FLEET, WHITE)] >= 0.75),
        Claim(
            "MLP and autoencoder give away less than softmax regression",
            lambda v: max(v[label_of(MLP, WHITE)], v[label_of(DAE, WHITE)]) < v[label_of(SOFTMAX, WHITE)],
        ),
        Claim(
            "A black box gives away as much as a white one, given a small step and exact answers",
            lambda v: v[asked_label(SMALL, 0.0)] >= 0.75,
        ),
        Claim("Rounding to 0.1 leaves the paper's attack nothing", lambda v: v[asked_label(SMALL, 0.1)] == 0),
        Claim(
            "Rounding to 0.1 holds off an attacker who knows of it",
            lambda v: max(v[adaptive_label(DITHER)], v[adaptive_label(LABELS)]) < 0.25,
            comes_out=False,
        ),
    ),
    run=run,
    value=lambda outcome: float(outcome["value"]),
    figure=figure,
    found=found,
    needs=("att_faces.npz",),
)
