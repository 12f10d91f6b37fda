"""`covey serve` with Federated SVRG, SCAFFOLD and FedProx: real agents, Mosquitto, and numpy's word for it."""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from algorithms import words
from brokers import RunningBroker
from clinic import retained_topics
from numpy.testing import assert_allclose
from patience import PATIENCE_S

from covey_coordinator.algorithms import reference
from covey_coordinator.algorithms.combining import fleet_control
from covey_coordinator.algorithms.sparse_logistic import gradient
from covey_coordinator.coordinator import shuffle_seed
from covey_coordinator.demo.processes import AgentProcesses
from covey_protocol import scaffold
from covey_protocol.seals import SealingKey
from covey_protocol.svrg import order_of, passes

pytestmark = [pytest.mark.broker, pytest.mark.fleet]

NAMES = ("a", "b", "c")
CONFIG = """
fleet = "home"
run = "{run}"
rounds = {rounds}
bundle = "words.covey"
key_file = "coordinator.pem"
[broker]
url = "{url}"
[round]
devices = 3
quorum = 3
[aggregation]
rule = "mean"
[training]
seed = 4
{training}
[devices]
{devices}
"""
Serve = Callable[..., tuple[np.ndarray, str]]


class Fleet:
    """Three agents, and `covey serve` for one run after another."""

    def __init__(self, folder: Path, url: str, keys: str) -> None:
        self.folder, self._values = folder, {"url": url, "devices": keys}

    def configure(self, run: str, rounds: int, training: str) -> list[str]:
        text = CONFIG.format(run=run, rounds=rounds, training=training, **self._values)
        (self.folder / "coordinator.toml").write_text(text)
        return [sys.executable, "-m", "covey_edge", "serve", "--config", str(self.folder / "coordinator.toml")]

    def serve(self, run: str, rounds: int, training: str) -> str:
        """What it says. All rounds are published."""
        command = self.configure(run, rounds, training)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr[-2000:] + done.stdout
        return done.stdout

    def models(self, run: str) -> list[Any]:
        """After each exchange."""
        folder = self.folder / "runs" / run / "checkpoints" / run
        return [np.frombuffer(path.read_bytes(), "<f4") for path in sorted(folder.glob("*.f32"))]


@pytest.fixture(scope="module")
def words_bundle(coordinator_key: SealingKey) -> bytes:
    return words.bundle(coordinator_key)


@pytest.fixture
def fleet(
    tmp_path: Path, words_bundle: bytes, coordinator_key: SealingKey, mosquitto: RunningBroker
) -> Iterator[Fleet]:
    devices = words.devices(tmp_path, mosquitto.url, coordinator_key)
    (tmp_path / "words.covey").write_bytes(words_bundle)
    (tmp_path / "coordinator.pem").write_bytes(coordinator_key.pem())
    keys = "\n".join(f'{one.device_id} = "{one.public.hex()}"' for one in devices.values())
    agents = AgentProcesses({name: one.config for name, one in devices.items()}, tmp_path / "logs")
    yield Fleet(tmp_path, mosquitto.url, keys)
    agents.stop()


def order(exchange: Callable[[int], int]) -> reference.Order:
    """exchange: round of the algorithm -> the number of its local exchange, whose seed the devices get."""
    return lambda number, device: order_of(shuffle_seed(4, exchange(number)), NAMES[device])


def test_federated_svrg_is_the_references_also_stopped_in_its_middle(fleet: Fleet, mosquitto: RunningBroker) -> None:
    training = 'algorithm = "fsvrg"\nlearning_rate = 2.0'
    command = fleet.configure("scaled", 3, training)
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("round 4/7"):
            break
    first.send_signal(signal.SIGKILL)
    first.wait()
    said = fleet.serve("scaled", 3, training)
    assert "going on after round" in said
    assert "round 6/7 (gradient) published: 3 of 3" in said
    assert "round 7/7 (svrg) published: 3 of 3" in said
    models = fleet.models("scaled")
    assert len(models) == 7  # one of features, and a gradient and a local one each round
    found = [models[number] for number in (2, 4, 6)]
    assert all(np.array_equal(models[number], models[number - 1]) for number in (1, 3, 5))  # a gradient moves nothing
    expected = reference.fsvrg(words.authors(), words.DECAY, 2.0, batch=words.BATCH, order=order(lambda n: 2 * n + 1))
    for model, right in zip(found, itertools.islice(expected, 3)):
        assert_allclose(model, right, atol=5e-6)
    assert np.abs(found[-1]).max() > 0.1
    left = {topic.split("/")[-1] for topic in retained_topics(mosquitto.port)}
    assert left <= {"presence"}  # no vector stays on the broker


def test_the_naive_form_and_scaffold_and_fedprox(fleet: Fleet) -> None:
    fleet.serve("naive", 2, 'algorithm = "fsvrg-naive"\nlocal_steps = 6\nlearning_rate = 0.3')
    expected = reference.fsvrg_naive(
        words.authors(), words.DECAY, 0.3, 6, batch=words.BATCH, order=order(lambda n: 2 * n)
    )
    models = fleet.models("naive")
    for model, right in zip((models[1], models[3]), itertools.islice(expected, 2)):
        assert_allclose(model, right, atol=5e-6)

    fleet.serve("controlled", 3, 'algorithm = "scaffold"\nlocal_steps = 5\nlearning_rate = 0.3')
    for model, right in zip(fleet.models("controlled"), scaffolded(5, 0.3)):
        assert_allclose(model, right, atol=1e-5)

    fleet.serve("near", 1, "proximal_weight = 0.5\nepochs = 2\nlearning_rate = 0.3")
    assert_allclose(fleet.models("near")[0], near(0.5, 2, 0.3), atol=5e-6)


def scaffolded(steps: int, rate: float) -> Iterator[Any]:
    """Algorithm 1, option II, as the paper has it: devices send the changes of their controls."""
    authors = words.authors()
    w, fleet, own = np.zeros(words.D), np.zeros(words.D), [np.zeros(words.D)] * 3
    for number in itertools.count(1):
        ends, changes = [], []
        for place, posts in enumerate(authors):
            y = w
            for rows in scaffold.batches(len(posts), words.BATCH, steps, order(lambda n: n)(number, place)):
                y = y - rate * (gradient(y, posts.taken(rows), words.DECAY) - own[place] + fleet)
            after = own[place] - fleet + (w - y) / (steps * rate)
            ends.append(y)
            changes.append(after - own[place])
            own[place] = after
        step = np.mean(ends, axis=0) - w
        assert_allclose(fleet_control(fleet, step, steps, rate, 3, 3), fleet + np.mean(changes, axis=0), atol=1e-12)
        w, fleet = w + step, fleet + np.mean(changes, axis=0)
        yield w


def near(weight: float, epochs: int, rate: float) -> Any:
    """FedProx, one round."""
    ends, authors = [], words.authors()
    for place, posts in enumerate(authors):
        w = np.zeros(words.D)
        for rows in passes(len(posts), words.BATCH, epochs, order(lambda n: n)(1, place)):
            w = w - rate * (gradient(w, posts.taken(rows), words.DECAY) + weight * w)
        ends.append(w)
    sizes = [len(posts) for posts in authors]
    return np.average(ends, axis=0, weights=sizes)


BAD = {
    "a misspelt algorithm": ('algorithm = "fsvrk"', "did you mean 'fsvrg'"),
    "steps where epochs count": ('algorithm = "fsvrg"\nlocal_steps = 3', "local_steps = 3"),
    "no steps where they count": ('algorithm = "scaffold"', "local_steps = 0"),
    "clipped gradients": ('algorithm = "fsvrg"\ngradient_clip_norm = 1.0', "--clip|leave one of them out"),
    "FedProx beside it": ('algorithm = "fsvrg"\nproximal_weight = 1.0', "leave one of them out"),
    "top-k": ('algorithm = "fsvrg"\n[wire]\ncompression = "top-k"\nkept_fraction = 0.1', "leave one of them out"),
    "another server optimizer": ('algorithm = "fsvrg"\n[server]\noptimizer = "adam"', 'set the optimizer to "sgd"'),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_go_together_is_said_before_anything_starts(
    what: str, tmp_path: Path, words_bundle: bytes, coordinator_key: SealingKey
) -> None:
    from covey_coordinator.serve import serve
    from covey_protocol.errors import ConfigError

    training, expected = BAD[what]
    (tmp_path / "words.covey").write_bytes(words_bundle)
    (tmp_path / "coordinator.pem").write_bytes(coordinator_key.pem())
    keys = "\n".join(f'{name} = "{SealingKey.from_seed(name.encode() * 32).public.hex()}"' for name in NAMES)
    Fleet(tmp_path, "mqtt://127.0.0.1:9", keys).configure("bad", 1, training)
    with pytest.raises(ConfigError) as refused:
        serve(tmp_path / "coordinator.toml", print)
    assert re.search(expected, str(refused.value)), refused.value
    assert not (tmp_path / "runs").exists()
