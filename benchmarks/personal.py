"""What a personal copy of the model is worth on each device's own data, and what the local endpoint costs.

    python benchmarks/personal.py [--seeds 5] [--devices 10] [--rounds 20] [--quick] [--picture FILE.png]
    python benchmarks/personal.py --endpoint [--requests 2000]

Digits, dealt to devices: IID, and by Dirichlet with alpha 1 and 0.1 (few classes each). Of each device's examples 60 %
are trained on, 20 % are held out to judge by, and 20 % are the test, which nothing sees. Everything is computed by what
devices run: the bundle in the TFLite runtime, `covey_edge.trainer.train`, `covey_edge.personal.scored` and the rules of
`covey_edge.model_rules`; the rounds between are plain FedAvg (mean weighted by examples), without a broker.

* federated: the model of the last round. local: trained on the device's own data alone, from the same start, for as
  many epochs. personal: the federated one fine-tuned on the device's data.
* better: federated or personal, whichever the device's rule takes from the held-out data (by loss, and by accuracy).
  oracle: whichever is better on the test itself, which nobody can know: the most that choosing could give.

docs/personal-models.md has the figures.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

from covey_coordinator.libraries import prepare

prepare()

import numpy as np

import covey_models
from covey_edge.model_rules import gain, is_preferred
from covey_edge.personal import scored
from covey_edge.runtime import Floats, Model
from covey_edge.trainer import train
from covey_models import zoo
from covey_models.datasets import Dataset, digits
from covey_models.partitions import dirichlet, iid
from covey_protocol.bundle import read_bundle
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey

RATE, EPOCHS, TUNING = 0.1, 2, 5  # of a round; of fine-tuning
LEAST = 15  # examples of a device: 9 to train on, 3 held out, 3 to test
COLUMNS = ("federated", "local", "personal", "better by loss", "better by accuracy", "oracle")


class Parts(NamedTuple):
    """One device's examples."""

    training: Dataset
    held_out: Dataset
    test: Dataset


class Outcome(NamedTuple):
    """One device: accuracy on its test, by column; how many examples that has; which the rules took the personal."""

    accuracy: dict[str, float]
    tested: int
    took: dict[str, bool]


def dealt(kind: str, devices: int, seed: int) -> list[Parts]:
    data, random = digits(), np.random.default_rng(seed)
    if kind == "IID":
        parts = iid(data.y, devices, seed)
    else:
        parts = dirichlet(data.y, devices, float(kind.split()[-1]), seed, LEAST)
    every = []
    for part in parts:
        own = random.permutation(part)
        held, test = round(0.2 * len(own)), round(0.2 * len(own))
        cut = (own[held + test :], own[:held], own[held : held + test])
        every.append(Parts(*(data.take(rows) for rows in cut)))
    return every


def trained(model: Model, start: Floats, data: Dataset, epochs: int, seed: int, name: str) -> Floats:
    model.set_parameters(start)
    train(model, (data.x, data.y), TrainingPlan(epochs, RATE, shuffle_seed=seed), name)
    return model.parameters()


def federated(model: Model, start: Floats, devices: list[Parts], rounds: int, seed: int) -> Floats:
    weights = np.array([len(one.training) for one in devices], np.float64)
    parameters = start
    for number in range(rounds):
        every = [
            trained(model, parameters, one.training, EPOCHS, 1000 * seed + number, f"d{place}")
            for place, one in enumerate(devices)
        ]
        parameters = np.average(np.stack(every), axis=0, weights=weights).astype(np.float32)
    return parameters


def outcome(model: Model, start: Floats, fleet: Floats, own: Parts, rounds: int, seed: int, name: str) -> Outcome:
    models = {
        "federated": fleet,
        "local": trained(model, start, own.training, rounds * EPOCHS, seed, name),
        "personal": trained(model, fleet, own.training, TUNING, seed, name),
    }
    accuracy = {}
    for what, parameters in models.items():
        model.set_parameters(parameters)
        accuracy[what] = model.evaluate(own.test.x, own.test.y)[1]
    held_out = (own.held_out.x, own.held_out.y)
    counts, of_fleet = scored(model, fleet, held_out)
    _, of_own = scored(model, models["personal"], held_out)
    took: dict[str, bool] = {}
    for measure in ("loss", "accuracy"):
        took[measure] = is_preferred(gain(of_own, of_fleet, counts, measure), 0.0, in_use=False)
        accuracy[f"better by {measure}"] = accuracy["personal" if took[measure] else "federated"]
    accuracy["oracle"] = max(accuracy["federated"], accuracy["personal"])
    return Outcome(accuracy, len(own.test), took)


def fleets(bundle: bytes, kind: str, asked: argparse.Namespace) -> Iterator[list[Outcome]]:
    model = Model(read_bundle(bundle))
    start = model.parameters()
    for seed in range(asked.seeds):
        devices = dealt(kind, asked.devices, seed)
        fleet = federated(model, start, devices, asked.rounds, seed)
        yield [outcome(model, start, fleet, own, asked.rounds, seed, f"d{place}") for place, own in enumerate(devices)]
        print(f"{kind}: seed {seed} done", file=sys.stderr, flush=True)


def summary(runs: list[list[Outcome]]) -> dict[str, Any]:
    """Over seeds: mean and standard deviation of the mean accuracy over all test examples, and of the device that
    fares worst of those with ten test examples or more."""
    told: dict[str, Any] = {}
    for column in COLUMNS:
        means = [np.average([o.accuracy[column] for o in run], weights=[o.tested for o in run]) for run in runs]
        worst = [min(o.accuracy[column] for o in run if o.tested >= 10) for run in runs]
        told[column] = (float(np.mean(means)), float(np.std(means, ddof=1)) if len(means) > 1 else 0.0, np.mean(worst))
    every = [o for run in runs for o in run]
    told["took"] = {name: float(np.mean([o.took[name] for o in every])) for name in ("loss", "accuracy")}
    return told


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| data | " + " | ".join(COLUMNS) + " | personal taken, by loss / by accuracy |"]
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    for kind, told in results.items():
        cells = [f"{100 * told[c][0]:.1f} ± {100 * told[c][1]:.1f} ({100 * told[c][2]:.0f})" for c in COLUMNS]
        took = f"{100 * told['took']['loss']:.0f} % / {100 * told['took']['accuracy']:.0f} %"
        lines.append(f"| {kind} | " + " | ".join(cells) + f" | {took} |")
    return "\n".join(lines)


def picture(path: Path, everything: dict[str, list[list[Outcome]]]) -> None:
    """One point per device: what the federated model gives it, and what its own copy does."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(everything), figsize=(4 * len(everything), 4), sharex=True, sharey=True)
    for axis, (kind, runs) in zip(np.atleast_1d(axes), everything.items()):
        every = [o for run in runs for o in run]
        for taken, colour, label in ((True, "tab:green", "personal used"), (False, "tab:gray", "federated used")):
            some = [o for o in every if o.took["loss"] == taken]
            x, y = ([100 * o.accuracy[what] for o in some] for what in ("federated", "personal"))
            axis.scatter(x, y, s=[8 + o.tested for o in some], c=colour, alpha=0.6, label=label)
        low = min(100 * o.accuracy[w] for runs in everything.values() for r in runs for o in r for w in COLUMNS[::2])
        axis.plot([low, 100], [low, 100], "k:", linewidth=1)
        axis.set_title(kind)
        axis.set_xlabel("federated model, % right on the device's test")
    np.atleast_1d(axes)[0].set_ylabel("its own fine-tuned copy, % right")
    np.atleast_1d(axes)[0].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# --- the endpoint


def kept(state_dir: Path, bundle: bytes, key: SealingKey) -> None:
    import hashlib

    from covey_edge.model_store import Kept, ModelStore, Version

    parameters = Model(read_bundle(bundle)).parameters().astype("<f4").tobytes()
    names = [hashlib.sha256(one).hexdigest() for one in (bundle, parameters)]
    version = Version("federated", names[0], names[1], (key.public.hex(),), 1, "r.1", 0)
    store = ModelStore(state_dir)
    with store.changing():
        store.commit(Kept(version, version), dict(zip(version.files, (bundle, parameters))))


class _OverUnix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def endpoint(bundle: bytes, key: SealingKey, requests: int) -> None:
    """Latency of one client and throughput of four, on kept-alive connections, one digit in a request."""
    lines = ['device_id = "pi"', 'fleet = "home"', "[broker]", 'url = "mqtt://x"', "[identity]", 'key_file = "none"']
    lines += [f'coordinator_key = "{key.public.hex()}"', "[data]", 'path = "data.npz"']
    body = json.dumps({"x": digits().x[:1].tolist()})
    with tempfile.TemporaryDirectory(prefix="covey-personal-") as name:
        folder = Path(name)
        (folder / "agent.toml").write_text("\n".join(lines))
        kept(folder / "state", bundle, key)
        for what, option in (("unix", ["--socket", "s"]), ("tcp", ["--port", "0"])):
            command = [sys.executable, "-m", "covey_edge", "infer", "serve", *option]
            begun = time.monotonic()
            server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            assert server.stdout is not None
            said = server.stdout.readline()
            start_s = time.monotonic() - begun
            port = int(said.rsplit(":", 1)[1]) if what == "tcp" else None
            times: list[float] = []

            def ask(count: int, port: Optional[int] = port, into: list[float] = times) -> None:
                client = http.client.HTTPConnection("127.0.0.1", port) if port else _OverUnix(folder / "s")
                for _ in range(count):
                    began = time.perf_counter()
                    client.request("POST", "/predict", body, {"Content-Type": "application/json"})
                    assert len(client.getresponse().read()) > 100
                    into.append(time.perf_counter() - began)
                client.close()

            ask(requests)
            alone = sorted(times)
            threads = [threading.Thread(target=ask, args=(requests // 4,)) for _ in range(4)]
            began = time.monotonic()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            rate = 4 * (requests // 4) / (time.monotonic() - began)
            status = Path(f"/proc/{server.pid}/status").read_text()
            rss = int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024
            server.terminate()
            server.wait()
            server.stdout.close()
            print(
                f"{what}: start {start_s:.2f} s; one client {1e3 * statistics.median(alone):.2f} ms median, "
                f"{1e3 * alone[int(0.99 * len(alone))]:.2f} ms at 99 %; four clients {rate:.0f} requests/s; "
                f"RSS {rss:.0f} MB"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--devices", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="one seed, five rounds")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--endpoint", action="store_true")
    parser.add_argument("--requests", type=int, default=2000)
    asked = parser.parse_args()
    if asked.quick:
        asked.seeds, asked.rounds = 1, 5
    key = SealingKey.generate()
    net = zoo.build("small-cnn", (8, 8, 1), 10, seed=0)
    bundle = covey_models.export(net, name="digits", input_range=(0.0, 1.0), num_classes=10, key=key)
    if asked.endpoint:
        endpoint(bundle, key, asked.requests)
        return
    everything = {kind: list(fleets(bundle, kind, asked)) for kind in ("IID", "Dirichlet 1", "Dirichlet 0.1")}
    print(f"{asked.devices} devices, {asked.rounds} rounds of {EPOCHS} epochs, seeds 0 to {asked.seeds - 1}")
    print(table({kind: summary(runs) for kind, runs in everything.items()}))
    if asked.picture:
        picture(asked.picture, everything)


if __name__ == "__main__":
    main()
