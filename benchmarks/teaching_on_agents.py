"""Machine teaching on real agents of which most hold wrong labels: how good the model is, and what owners are told.

    python benchmarks/teaching_on_agents.py [--steps 20] [--seed 0] [--picture FILE.png]

Digits, 200 on each of four agents; on three of them 70 % of the labels y are 9 - y. 100 trusted ones with the
coordinator. What is taught is the last layer of a small convolutional net that nobody trained. The plain learners
beside it see the same features; their decay is the best of seven on the test digits, which teaching's constants are
not. docs/machine-teaching.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from covey_coordinator.libraries import prepare

prepare()

import numpy as np

import covey_models
from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses, BrokerProcess
from covey_coordinator.serve import serve
from covey_coordinator.teach.comparing import score
from covey_coordinator.teach.data import Examples, Work
from covey_coordinator.teach.methods import DECAYS, joined, learned
from covey_edge.runtime import Model
from covey_edge.teaching import as_matrix, seen
from covey_models.datasets import Dataset, digits
from covey_protocol.bundle import read_bundle
from covey_protocol.seals import SealingKey
from covey_protocol.teaching import LOGISTIC

DEVICES, CLEAN, EACH, FLIPPED, TRUSTED, TESTED = 4, 1, 200, 0.7, 100, 600
CONSTANTS = {"lambda_w": 0.0463, "lambda_t": 1.263, "rho": 0.066, "curvature": 0.0225}
CONFIG = """
fleet = "home"
run = "teach"
rounds = {steps}
bundle = "digits.covey"
key_file = "coordinator.pem"
[broker]
url = "{url}"
[aggregation]
rule = "mean"
[round]
devices = {devices}
quorum = {devices}
[training]
algorithm = "comt"
[teaching]
{teaching}
[trusted]
path = "trusted.npz"
[devices]
{keys}
"""


def bundle(key: SealingKey) -> bytes:
    from covey_models._tensorflow import import_tensorflow

    tf = import_tensorflow()
    tf.keras.utils.set_random_seed(1)
    layers = tf.keras.layers
    convolutions = [layers.Conv2D(16, 3, activation="relu"), layers.Conv2D(32, 3, activation="relu")]
    after = [layers.Flatten(), layers.Dense(64, activation="relu"), layers.Dense(10, kernel_initializer="zeros")]
    model = tf.keras.Sequential([layers.InputLayer((8, 8, 1)), *convolutions, *after])
    return covey_models.export(model, name="digits", input_range=(0.0, 1.0), key=key, teach=True)


def parts(seed: int) -> tuple[list[Dataset], list[Any], Dataset, Dataset]:
    """(devices, which labels of each are right, trusted, test)."""
    data, rng = digits(), np.random.default_rng(seed)
    order = rng.permutation(len(data))
    trusted, devices, right = data.take(order[:TRUSTED]), [], []
    for number in range(DEVICES):
        own = data.take(order[TRUSTED + number * EACH :][:EACH])
        truth = own.y.copy()
        if number >= CLEAN:
            wrong = rng.permutation(EACH)[: round(FLIPPED * EACH)]
            own.y[wrong] = 9 - own.y[wrong]
        devices.append(own)
        right.append(truth)
    return devices, right, trusted, data.take(order[TRUSTED + DEVICES * EACH :][:TESTED])


def run(folder: Path, steps: int, data: tuple[list[Dataset], list[Any], Dataset, Dataset]) -> Model:
    """The fleet, until its model is published; the model with what was taught."""
    devices, _, trusted, _ = data
    key = SealingKey.generate()
    (folder / "coordinator.pem").write_bytes(key.pem())
    (folder / "digits.covey").write_bytes(bundle(key))
    np.savez(folder / "trusted.npz", x=trusted.x, y=trusted.y)
    broker = BrokerProcess(folder / "broker.log")
    agents = None
    try:
        files = [
            make_device(
                f"d{number}", folder / f"d{number}", "home", {"url": broker.url}, key.public, Shard(one.x, one.y)
            )
            for number, one in enumerate(devices)
        ]
        teaching = "\n".join(f"{name} = {value}" for name, value in CONSTANTS.items())
        keys = "\n".join(f'{one.device_id} = "{one.public.hex()}"' for one in files)
        text = CONFIG.format(steps=steps, url=broker.url, devices=DEVICES, teaching=teaching, keys=keys)
        (folder / "coordinator.toml").write_text(text)
        agents = AgentProcesses({one.device_id: one.config for one in files}, folder / "logs")
        serve(folder / "coordinator.toml", print)
    finally:
        if agents is not None:
            agents.stop()
        broker.stop()
    model = Model(read_bundle((folder / "digits.covey").read_bytes()))
    newest = max((folder / "runs").glob("teach/checkpoints/teach/*.f32"))
    model.set_parameters(np.frombuffer(newest.read_bytes(), "<f4").copy())
    return model


def told(folder: Path, number: int, y: Any, truth: Any) -> list[dict[str, Any]]:
    """What the owner reads, and a line of how right it is."""
    report: list[dict[str, Any]] = json.loads((folder / f"d{number}/state/teaching/report.json").read_text())[
        "instances"
    ]
    doubted = {one["row"] for one in report if one["suspicion"] >= 0.5}
    wrong = set(np.flatnonzero(y != truth).tolist())
    found = sum(one["row"] in wrong and int(one["expected"].split()[0]) == truth[one["row"]] for one in report)
    print(
        f"d{number}: {len(wrong)} labels wrong, {len(doubted & wrong)} of them doubted, {len(doubted - wrong)} of the "
        f"others; the true label is expected for {found} of the wrong ones"
    )
    return report


def draw(path: Path, title: str, report: list[dict[str, Any]], data: Dataset, truth: Any) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 10, figsize=(10, 5))
    for axis, one in zip(axes.flat, report):
        axis.imshow(data.x[one["row"]][..., 0], cmap="gray_r")
        axis.set_axis_off()
        right = data.y[one["row"]] == truth[one["row"]]
        axis.set_title(
            f"{one['label']} → {str(one['expected']).split()[0]}", fontsize=10, color="red" if right else "black"
        )
    figure.suptitle(f"{title} (red: the label is right)")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    data = devices, right, trusted, test = parts(asked.seed)
    with tempfile.TemporaryDirectory(prefix="covey-teaching-") as name:
        folder = Path(name)
        model = run(folder, asked.steps, data)
        examples = [Examples(one.x, seen(model, one.x), one.y) for one in (*devices, trusted, test)]
        work = Work("digits", LOGISTIC, trusted.class_names, examples[0], examples[-2], ())
        theta = as_matrix(model, model.parameters())
        print(f"taught: {score(work, examples[-1], theta):.3f} on {TESTED} others")
        for title, own in (("trusted alone", examples[-2]), ("all together", joined(examples[:-1]))):
            best = max(score(work, examples[-1], learned(work, own, decay)) for decay in DECAYS)
            print(f"{title}: {best:.3f} (best of {len(DECAYS)} decays)")
        reports = [told(folder, number, devices[number].y, right[number]) for number in range(DEVICES)]
        if asked.picture is not None:
            title = "The most suspicious of one device: label → what the model expects"
            draw(asked.picture, title, reports[CLEAN], devices[CLEAN], right[CLEAN])


if __name__ == "__main__":
    main()
