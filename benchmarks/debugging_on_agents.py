"""Wrong labels on real agents that look for them (DUTI): what is found, and what the fleet's model gains.

    python benchmarks/debugging_on_agents.py [--rounds 8] [--seed 0] [--picture FILE.png]

Digits, 200 on each of four agents; on three of them 40 % of the labels are others, drawn at random, and on none of them
any trusted instance is wrong: 50 of their own each. FedAvg of a small convolutional net, from the same start: with all
labels as they are, without the doubted ones, with what is suggested, and with the true ones. Beside it: what doubting
every label would find that a model of the trusted instances alone does not expect. docs/machine-teaching.md has the
figures.
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
from teaching_on_agents import draw

import covey_models
from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses, BrokerProcess
from covey_coordinator.serve import serve
from covey_edge.debugging import DECAY
from covey_edge.runtime import Model
from covey_edge.teaching import seen
from covey_models import zoo
from covey_models.datasets import Dataset, digits
from covey_protocol.bundle import read_bundle
from covey_protocol.learners import LOGISTIC, Data, fitted
from covey_protocol.seals import SealingKey

DEVICES, CLEAN, EACH, WRONG, TRUSTED, TESTED = 4, 1, 200, 0.4, 50, 600
CONFIG = """
fleet = "home"
run = "run"
rounds = {rounds}
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
epochs = 5
learning_rate = 0.1
[devices]
{keys}
"""


def parts(seed: int) -> tuple[list[Dataset], list[Any], list[Dataset], Dataset]:
    """(devices, which labels of each are right, what each trusts, test)."""
    data, rng = digits(), np.random.default_rng(seed)
    order, devices, right, trusted = rng.permutation(len(data)), [], [], []
    for number in range(DEVICES):
        rows = order[number * (EACH + TRUSTED) :][: EACH + TRUSTED]
        own = data.take(rows[:EACH])
        truth = own.y.copy()
        if number >= CLEAN:
            wrong = rng.permutation(EACH)[: round(WRONG * EACH)]
            own.y[wrong] = (own.y[wrong] + rng.integers(1, 10, len(wrong))) % 10
        devices.append(own)
        right.append(truth)
        trusted.append(data.take(rows[EACH:]))
    return devices, right, trusted, data.take(order[DEVICES * (EACH + TRUSTED) :][:TESTED])


def run(folder: Path, rounds: int, debug: str, devices: list[Shard], trusted: list[Dataset]) -> Model:
    """The fleet, until its last model is published; that model."""
    folder.mkdir()
    key = SealingKey.generate()
    (folder / "coordinator.pem").write_bytes(key.pem())
    net = zoo.build("small-cnn", (8, 8, 1), 10, seed=0)
    bundle = covey_models.export(net, name="digits", input_range=(0.0, 1.0), num_classes=10, key=key)
    (folder / "digits.covey").write_bytes(bundle)
    broker = BrokerProcess(folder / "broker.log")
    agents = None
    try:
        table = {"source": "npz", "path": "data.npz", "trusted_path": "trusted.npz", "debug": debug}
        files = [
            make_device(f"d{number}", folder / f"d{number}", "home", {"url": broker.url}, key.public, one, data=table)
            for number, one in enumerate(devices)
        ]
        for made, own in zip(files, trusted):
            np.savez(made.folder / "trusted.npz", x=own.x, y=own.y)
        keys = "\n".join(f'{one.device_id} = "{one.public.hex()}"' for one in files)
        text = CONFIG.format(rounds=rounds, url=broker.url, devices=DEVICES, keys=keys)
        (folder / "coordinator.toml").write_text(text)
        agents = AgentProcesses({one.device_id: one.config for one in files}, folder / "logs")
        serve(folder / "coordinator.toml", lambda line: None)
    finally:
        if agents is not None:
            agents.stop()
        broker.stop()
    model = Model(read_bundle(bundle))
    newest = max((folder / "runs").glob("run/checkpoints/run/*.f32"))
    model.set_parameters(np.frombuffer(newest.read_bytes(), "<f4").copy())
    return model


def told(folder: Path, number: int, y: Any, truth: Any) -> list[dict[str, Any]]:
    """What the owner reads, and a line of how right it is."""
    path = folder / f"d{number}/state/teaching/labels.json"
    instances: list[dict[str, Any]] = json.loads(path.read_text())["instances"]
    doubted = {one["row"]: int(one["expected"]) for one in instances if one["why"]}
    wrong = set(np.flatnonzero(y != truth).tolist())
    right = sum(doubted[row] == truth[row] for row in doubted.keys() & wrong)
    print(
        f"d{number}: {len(wrong)} labels wrong; {len(doubted)} doubted, {len(doubted.keys() & wrong)} of them wrong, "
        f"of which the true label is suggested for {right}",
        flush=True,
    )
    return instances


def plainly(model: Model, own: Dataset, truth: Any, trusted: Dataset) -> str:
    """What a model of the trusted instances alone doubts."""
    x, vouched = seen(model, own.x), seen(model, trusted.x)
    columns = [fitted(LOGISTIC, Data(vouched, np.where(trusted.y == one, 1.0, -1.0)), DECAY) for one in range(10)]
    doubted = (x @ np.stack(columns, axis=1)).argmax(axis=1) != own.y
    return f"{doubted.sum()} doubted, {(doubted & (own.y != truth)).sum()} of them wrong"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    devices, right, trusted, test = parts(asked.seed)
    held = [Shard(one.x, one.y) for one in devices]
    with tempfile.TemporaryDirectory(prefix="covey-debugging-") as name:
        for what, debug, shards in (
            ("labels as they are", "", held),
            ("without the doubted", "drop", held),
            ("as suggested", "mend", held),
            ("true labels", "", [Shard(one.x, truth) for one, truth in zip(devices, right)]),
        ):
            folder = Path(name) / what.replace(" ", "-")
            model = run(folder, asked.rounds, debug, shards, trusted)
            print(f"{what}: {model.evaluate(test.x, test.y)[1]:.3f} on {TESTED} others", flush=True)
            if debug == "drop":
                found = [told(folder, number, devices[number].y, right[number]) for number in range(DEVICES)]
                for number in range(DEVICES):
                    print(
                        f"d{number}, trusted alone: {plainly(model, devices[number], right[number], trusted[number])}"
                    )
        if asked.picture is not None:
            title = "The most doubted labels of one device: label → what is suggested"
            draw(asked.picture, title, found[CLEAN], devices[CLEAN], right[CLEAN])


if __name__ == "__main__":
    main()
