"""TFF's tutorial "Federated Learning for Image Classification" re-run: ten devices, softmax regression, ten rounds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from covey_coordinator.grid.simulation import flat, stream
from covey_coordinator.reproduce import data
from covey_coordinator.reproduce.contract import Case, Claim, Measured, Outcome, Reproduction, Values
from covey_coordinator.reproduce.fedavg import ENGINE
from covey_coordinator.reproduce.pictures import Panel, curves
from covey_models import partitions
from covey_protocol.errors import MachineError

PUBLISHED = {2: 3.0699, 4: 2.7276, 6: 2.5942, 8: 2.2257, 10: 2.0716}  # training loss by round
DEVICES, WRITERS = 10, 600  # of 100 examples, as many as an EMNIST writer has
CHOSEN = 31  # stream of random numbers of a seed
BOTH = {
    "emnist": "ten writers of EMNIST, drawn with the seed",
    "mnist": "MNIST by writer-like shards, as EMNIST could not be downloaded",
}


def cases(quick: bool) -> Sequence[Case]:
    """One run has all rounds; a case is one of its rows. The quick form has fewer of them."""
    shape = {"devices": DEVICES, "epochs": 5, "batch": 20, "learning_rate": 0.02, "download": True}
    return [
        Case(f"round {number}", {**shape, "rounds": number}, loss)
        for number, loss in PUBLISHED.items()
        if not quick or number in (2, 6, 10)
    ]


def run(settings: dict[str, Any], seed: int, folder: Path | None) -> Outcome:
    """curve: [round, training loss]; accuracies: the model after each round, on its devices' own data."""
    from covey_coordinator.aggregation.registry import make_rule
    from covey_coordinator.simulation.learning import Learning
    from covey_coordinator.simulation.process import Simulation
    from covey_protocol.messages import TrainingPlan

    started = time.monotonic()
    found = emnist(settings["devices"], seed, folder) if settings["download"] else None
    devices = found or writers(settings["devices"], seed, folder)
    plan = TrainingPlan(epochs=settings["epochs"], learning_rate=settings["learning_rate"])
    learning = Learning(softmax(), plan, make_rule("mean"), batch_size=settings["batch"], seed=seed)
    everyone = range(len(devices))
    curve, accuracies = [], []
    with Simulation(learning, devices) as simulation:
        state = simulation.initial_state()
        for number in range(1, settings["rounds"] + 1):
            state, outcome = simulation.next(state, everyone, shuffle_seed=seed * 1_000_000 + number)
            curve.append([number, round(outcome.loss, 5)])
            scores = simulation.evaluate_devices(state, everyone).values()
            weights = [one["num_examples"] for one in scores]
            accuracies.append(
                [number, round(float(np.average([one["accuracy"] for one in scores], weights=weights)), 5)]
            )
    return {
        "curve": curve,
        "accuracies": accuracies,
        "data": "emnist" if found else "mnist",
        "seconds": round(time.monotonic() - started, 2),
    }


def softmax() -> Any:
    """784 pixels to 10 logits, from zeros."""
    import tensorflow as tf

    layers = [tf.keras.layers.InputLayer((784,)), tf.keras.layers.Dense(10, kernel_initializer="zeros", name="logits")]
    return tf.keras.Sequential(layers)


def emnist(count: int, seed: int, folder: Path | None) -> list[Any] | None:
    """So many writers of EMNIST, drawn with the seed; None where it can be neither found nor downloaded.

    White is 1 and ink 0, as in the tutorial, which takes the pixels as TFF gives them.
    """
    from covey_coordinator.simulation.emnist import load_emnist
    from covey_coordinator.simulation.learning import DeviceData

    try:
        train, _ = load_emnist("emnist", folder, writers=count, seed=seed)
    except MachineError:
        return None
    inverted, users = 1.0 - flat(train.x), np.asarray(train.users)
    return [
        DeviceData(f"device-{number:03d}", inverted[users == writer], train.y[users == writer])
        for number, writer in enumerate(np.unique(users))
    ]


def writers(count: int, seed: int, folder: Path | None) -> list[Any]:
    """Ten of 600 writer-like shards of MNIST, 100 examples each. White is 1 and ink 0, as in EMNIST."""
    from covey_coordinator.simulation.learning import DeviceData

    train, _ = data.mnist(folder)
    parts = partitions.writer_like(train.x, train.y, WRITERS, seed)
    chosen = sorted(stream(seed, CHOSEN).permutation(WRITERS)[:count].tolist())
    inverted = 1.0 - flat(train.x)
    return [
        DeviceData(f"device-{number:03d}", inverted[parts[shard]], train.y[parts[shard]])
        for number, shard in enumerate(chosen)
    ]


def loss(outcome: Outcome) -> float:
    return float(outcome["curve"][-1][1])


def told(measured: Measured) -> str:
    outcomes = measured.outcomes["round 10"]
    accuracies = [outcome["accuracies"][-1][1] for outcome in outcomes]
    return (
        f"Data: {BOTH[outcomes[0]['data']]}. After round 10 the model is right on {100 * np.mean(accuracies):.1f}% "
        "of its "
        "devices' own examples (the tutorial's 32.0% is counted while it trains, over earlier models)."
    )


def falls(values: Values) -> bool:
    known = [values[f"round {number}"] for number in (2, 6, 10)]
    return known[0] > known[1] > known[2]


TUTORIAL = Reproduction(
    name="tff-image-classification",
    title="TFF's image-classification tutorial: ten writers, softmax regression, ten rounds",
    paper="TensorFlow Federated's tutorial Federated Learning for Image Classification",
    source="the outputs stored in the notebook (March 2020)",
    engine=ENGINE,
    measure="mean training loss over the devices' local steps in that round",
    protocol=(
        "Ten devices, the same in every round; softmax regression from zeros; 5 local epochs of batches of 20, "
        "SGD with rate 0.02; server rate 1.",
        "Data: ten of EMNIST's writers, drawn with the seed, where TFF can load them (or emnist_all.sqlite is in "
        "the data folder); else ten of 600 writer-like shards of MNIST of 100 examples, inverted as EMNIST is.",
    ),
    deviations=(
        "The tutorial takes EMNIST's first ten writers.",
        "A partial last batch is its own here; the tutorial's batches run over the ends of epochs.",
        "With MNIST in place of EMNIST the numbers cannot agree, the course can.",
    ),
    full_time="full form: 15 runs, at most 8 minutes (measured on a busy machine)",
    cases=cases,
    claims=(
        Claim("Training loss decreases (rounds 2, 6, 10)", falls),
        Claim(
            "The model converges: the loss of round 10 is below two thirds of that of round 2",
            lambda v: v["round 10"] < 2 / 3 * v["round 2"],
        ),
    ),
    run=run,
    value=loss,
    figure=lambda cases, measured: curves(
        [Panel("Training loss of the longest run", [cases[-1].label])], measured, up="training loss"
    ),
    found=told,
    needs=("mnist.npz",),
    in_percent=False,
)
