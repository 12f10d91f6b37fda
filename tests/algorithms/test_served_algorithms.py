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
from brokers import RunningBroker, retained
from numpy.testing import assert_allclose
from patience import PATIENCE_S

from covey_coordinator.algorithms import reference
from covey_coordinator.algorithms.combining import fleet_control
from covey_coordinator.algorithms.sparse_logistic import gradient
from covey_coordinator.coordinator import shuffle_seed
from covey_coordinator.demo.processes import AgentProcesses
from covey_coordinator.serve import serve
from covey_protocol import scaffold
from covey_protocol.errors import ConfigError
from covey_protocol.seals import SealingKey
from covey_protocol.svrg import order_of, passes

pytestmark = [pytest.mark.broker, pytest.mark.fleet]

NAMES = ("a", "b", "c")
CONFIG = """
fleet = "home"
run = "run"
rounds = 1
bundle = "words.covey"
key_file = "coordinator.pem"
[broker]
url = "{url}"
[aggregation]
rule = "mean"
[round]
devices = 3
quorum = 3
{more}
[devices]
{devices}
"""


TASKS = {  # name: rounds of the algorithm, [training]
    "scaled": (3, 'algorithm = "fsvrg", learning_rate = 2.0'),
    "naive": (2, 'algorithm = "fsvrg-naive", local_steps = 6, learning_rate = 0.3'),
    "controlled": (3, 'algorithm = "scaffold", local_steps = 5, learning_rate = 0.3'),
    "near": (1, "proximal_weight = 0.5, epochs = 2, learning_rate = 0.3"),
}


class Fleet:
    """Three agents, and `covey serve` for four tasks, each with an algorithm of its own."""

    def __init__(self, folder: Path, url: str, keys: str) -> None:
        self.folder, self._values = folder, {"url": url, "devices": keys}

    def configure(self, tasks: dict[str, tuple[int, str]], more: str = "") -> list[str]:
        text = CONFIG.format(**self._values, more=more)
        for name, (rounds, training) in tasks.items():
            text += f'[[tasks]]\nname = "{name}"\nrounds = {rounds}\ntraining = {{ seed = 4, {training} }}\n'
        (self.folder / "coordinator.toml").write_text(text)
        return [sys.executable, "-m", "covey_edge", "serve", "--config", str(self.folder / "coordinator.toml")]

    def models(self, task: str) -> list[Any]:
        """After each exchange."""
        folder = self.folder / "runs" / f"run-{task}" / "checkpoints" / f"run-{task}"
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


def test_every_algorithm_is_what_numpy_says_also_where_the_coordinator_is_killed(
    fleet: Fleet, mosquitto: RunningBroker
) -> None:
    command = fleet.configure(TASKS)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        for line in first.stdout:
            if line.startswith("scaled: round 4/7"):  # a gradient, which the next exchange needs
                break
        first.send_signal(signal.SIGKILL)
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert second.returncode == 0, second.stderr[-2000:] + second.stdout
    assert "scaled: going on after round" in second.stdout
    assert "scaled: round 6/7 (gradient) published: 3 of 3" in second.stdout
    assert "scaled: round 7/7 (svrg) published: 3 of 3" in second.stdout

    authors, decay, batch = words.authors(), words.DECAY, words.BATCH
    models = fleet.models("scaled")
    assert len(models) == 7  # one of features, and a gradient and a local one for each round
    assert all(np.array_equal(models[place], models[place - 1]) for place in (1, 3, 5))  # a gradient moves nothing
    expected = reference.fsvrg(authors, decay, 2.0, batch=batch, order=order(lambda number: 2 * number + 1))
    for model, right in zip(models[2::2], itertools.islice(expected, 3)):
        assert_allclose(model, right, atol=5e-6)
    assert np.abs(models[-1]).max() > 0.1

    models = fleet.models("naive")
    expected = reference.fsvrg_naive(authors, decay, 0.3, 6, batch=batch, order=order(lambda number: 2 * number))
    for model, right in zip(models[1::2], itertools.islice(expected, 2)):
        assert_allclose(model, right, atol=5e-6)

    models = fleet.models("controlled")
    assert len(models) == 3
    for model, right in zip(models, scaffolded(5, 0.3)):
        assert_allclose(model, right, atol=1e-5)

    assert_allclose(fleet.models("near")[0], near(0.5, 2, 0.3), atol=5e-6)
    left = {topic.split("/")[-1] for topic in retained(mosquitto.port, "covey/1/clinic/#")}
    assert left <= {"presence"}  # no model and no vector stays on the broker


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


ASYNCHRONOUS = "goal = 3\nmax_staleness = 1"
BAD = {
    "a misspelt algorithm": ('algorithm = "fsvrk"', "did you mean 'fsvrg'"),
    "steps where epochs count": ('algorithm = "fsvrg", local_steps = 3', "local_steps = 3"),
    "no steps where they count": ('algorithm = "scaffold"', "local_steps = 0"),
    "clipped gradients": ('algorithm = "fsvrg", gradient_clip_norm = 1.0', "--clip|leave one of them out"),
    "FedProx beside it": ('algorithm = "fsvrg", proximal_weight = 1.0', "leave one of them out"),
    "top-k": ('algorithm = "fsvrg"', "leave one of them out", '[wire]\ncompression = "top-k"\nkept_fraction = 0.1'),
    "another server optimizer": ('algorithm = "fsvrg"', 'optimizer to "sgd"', '[server]\noptimizer = "adam"'),
    "asynchronous rounds": ('algorithm = "scaffold", local_steps = 2', "leave max_staleness out", ASYNCHRONOUS),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_go_together_is_said_before_anything_starts(
    what: str, tmp_path: Path, words_bundle: bytes, coordinator_key: SealingKey
) -> None:
    training, expected, *more = BAD[what]
    (tmp_path / "words.covey").write_bytes(words_bundle)
    (tmp_path / "coordinator.pem").write_bytes(coordinator_key.pem())
    keys = "\n".join(f'{name} = "{SealingKey.from_seed(name.encode() * 32).public.hex()}"' for name in NAMES)
    Fleet(tmp_path, "mqtt://127.0.0.1:9", keys).configure({"bad": (1, training)}, *more)
    with pytest.raises(ConfigError) as refused:
        serve(tmp_path / "coordinator.toml", print)
    assert re.search(expected, str(refused.value)), refused.value
    assert not (tmp_path / "runs").exists()
