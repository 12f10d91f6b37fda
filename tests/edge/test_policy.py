"""Which tasks a device works for, on which data, and when it evaluates: its owner's word in agent.toml."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from covey_edge.config import Agent, load_agent
from covey_edge.frames import Done, Open, Problem, Run
from covey_edge.policy import DataPlace, data_for, places, unwilling
from covey_edge.reading import Reading
from covey_edge.runtime import Model
from covey_edge.trainer import Trainer
from covey_protocol.blobs import blob_ref
from covey_protocol.bundle import read_bundle
from covey_protocol.errors import ConfigError
from covey_protocol.messages import CodingPlan, TrainingPlan
from covey_protocol.seals import SealingKey

KEY = SealingKey.from_seed(bytes(32))
HEAD = f"""
device_id = "kitchen-pi"
fleet = "home"
[broker]
url = "mqtt://broker.local"
[identity]
key_file = "device.pem"
coordinator_key = "{KEY.public.hex()}"
"""
ONE = HEAD + '[data]\npath = "data.npz"\n'
HELD_OUT = ONE + 'evaluation_path = "test.npz"\n'
TASKS = HEAD + '[data.tasks.faces]\npath = "faces.npz"\nevaluation_path = "faces-test.npz"\n[data.tasks.bells]\n'
TASKS += 'path = "bells"\nsource = "folder"\n'
BOTH = ONE + TASKS.removeprefix(HEAD)
NOISE = "[privacy]\nclip_norm = 1.0\nnoise_multiplier = 0.5\n"
THREADS = "[training]\nthreads = 2\n"


def agent(folder: Path, text: str) -> Agent:
    (folder / "device.pem").write_bytes(KEY.pem())
    (folder / "agent.toml").write_text(text)
    return load_agent(folder / "agent.toml")


def plan(task: str = "", *evaluate: str) -> TrainingPlan:
    return TrainingPlan(1, 0.1, evaluate=evaluate, task=task)


TRUSTED = ONE + 'trusted_path = "trusted.npz"\n'
WHERE = {
    "what the owner vouches for beside the data": (
        TRUSTED,
        plan(),
        DataPlace("npz", "data.npz", trusted="trusted.npz"),
    ),
    "the data of a device with one set, for any task": (ONE, plan("faces"), DataPlace("npz", "data.npz")),
    "the same for an evaluation where nothing is held out": (ONE, plan("", "loss"), DataPlace("npz", "data.npz")),
    "what is held out": (HELD_OUT, plan("", "loss"), DataPlace("npz", "test.npz", True)),
    "what is not held out, for training": (HELD_OUT, plan(), DataPlace("npz", "data.npz")),
    "the task's own": (TASKS, plan("bells"), DataPlace("folder", "bells")),
    "what the task holds out": (TASKS, plan("faces", "loss"), DataPlace("npz", "faces-test.npz", True)),
    "nothing for a task that is not named": (TASKS, plan("birds"), None),
    "nothing for a round without a task": (TASKS, plan(), None),
    "never another task's": (BOTH, plan("birds"), None),
    "the device's own for a round without a task": (BOTH, plan(), DataPlace("npz", "data.npz")),
}


@pytest.mark.parametrize("what", WHERE)
def test_the_data_of_a_round_are(what: str, tmp_path: Path) -> None:
    text, asked, place = WHERE[what]
    found = data_for(agent(tmp_path, text).config.data, asked)
    assert (found and found._replace(reading=Reading())) == place


def test_all_data_are_looked_at_before_the_device_connects(tmp_path: Path) -> None:
    found = {place.path for place in places(agent(tmp_path, TASKS).config.data)}
    assert found == {"faces.npz", "faces-test.npz", "bells"}
    assert [place.path for place in places(agent(tmp_path, HELD_OUT).config.data)] == ["data.npz", "test.npz"]
    assert [place.path for place in places(agent(tmp_path, SHARDS).config.data)] == ["n.npz", "s.npz", "e.npz"]


SHARDS = HEAD + '[data.shards]\nnorth = "n.npz"\nsouth = "s.npz"\neast = "e.npz"\n'
RING = ("a", "kitchen-pi", "c", "d"), ("west", "north", "east", "south")


def coded(*changes: tuple[str, ...]) -> TrainingPlan:
    return TrainingPlan(1, 0.1, work="cyclic-code", coding=CodingPlan(*(changes or RING), 1))


WHERE["the shards of a code, whatever else there is"] = (
    SHARDS.replace("[data.shards]", '[data]\npath = "data.npz"\n[data.shards]'),
    coded(),
    DataPlace("npz", "", shards=(("north", "n.npz"), ("south", "s.npz"), ("east", "e.npz"))),
)
WHERE["what becomes of doubted labels"] = (
    TRUSTED + 'debug = "drop"\n',
    plan(),
    DataPlace("npz", "data.npz", trusted="trusted.npz", debug="drop"),
)
WHERE["nothing for a code, of a device without shards"] = (ONE, coded(), None)
WHERE["what a device with shards holds out"] = (
    SHARDS.replace("[data.shards]", '[data]\nevaluation_path = "test.npz"\n[data.shards]'),
    plan("", "loss"),
    DataPlace("npz", "test.npz", True),
)
WHERE["nothing for training, of a device with shards alone"] = (SHARDS, plan(), None)
WILLING = {
    "a row of its shards": (SHARDS, coded(), ""),
    "a row of one that it does not hold": (
        SHARDS,
        coded(RING[0], ("west", "north", "centre", "south")),
        "this device holds no shard 'centre'",
    ),
    "a row of a code of others": (SHARDS, coded(("a", "b", "c"), ("x", "y", "z")), "has no place in the code"),
    "a round without a task": (ONE, plan(), ""),
    "any task, on its one set of data": (ONE, plan("faces"), ""),
    "a task that is allowed": (ONE + '[policy]\ntasks = ["faces"]\n', plan("faces"), ""),
    "one that is not": (ONE + '[policy]\ntasks = ["faces"]\n', plan("bells"), "does not work for task 'bells'"),
    "no task where some are allowed": (ONE + '[policy]\ntasks = ["faces"]\n', plan(), "a round without a task"),
    "a task that is refused": (ONE + '[policy]\nrefuse_tasks = ["bells"]\n', plan("bells"), "does not work for"),
    "another than the refused one": (ONE + '[policy]\nrefuse_tasks = ["bells"]\n', plan("faces"), ""),
    "a task without data": (TASKS, plan("birds"), "no data for task 'birds'"),
    "an evaluation": (ONE, plan("", "accuracy", "loss"), ""),
    "a metric of a later covey": (ONE, plan("", "loss", "f1"), "cannot measure f1; update its agent"),
    "training, with noise": (ONE + NOISE, plan(), ""),
    "an evaluation, with noise": (ONE + NOISE, plan("", "loss"), "metrics have none"),
    "the same with its owner's leave": (ONE + NOISE + "exact_evaluation = true\n", plan("", "loss"), ""),
}


@pytest.mark.parametrize("what", WILLING)
def test_a_device_is_asked_for(what: str, tmp_path: Path) -> None:
    text, asked, words = WILLING[what]
    reason = unwilling(agent(tmp_path, text).config, asked)
    assert words in reason
    assert bool(words) == bool(reason)


BAD = {
    "debugging without trusted instances": (ONE + 'debug = "mend"\n', "debug = 'mend' without trusted_path"),
    "debugging that is none": (TRUSTED + 'debug = "repair"\n', "Invalid enum value 'repair'"),
    "shards, with threads": (SHARDS + THREADS, "shard = 'north' with training.threads above 1"),
    "shards, with noise": (SHARDS + NOISE, "shard = 'north' with noise_multiplier: a noised update equals nobody's"),
    "a shard whose name is none": (HEAD + '[data.shards]\n"a b" = "x"\n', "shard 'a b'"),
    "no data at all": (HEAD + "[data]\n", "has no path"),
    "a task without a path": (HEAD + "[data.tasks.faces]\n", r"\[data.tasks.faces\] has no path; say where"),
    "a task of no name": (HEAD + '[data.tasks."a b"]\npath = "x"\n', "task 'a b'"),
    "a misspelt key of a task": (HEAD + '[data.tasks.faces]\npaht = "x"\n', "unknown field `paht`"),
    "a name that is none": (ONE + '[policy]\nrefuse_tasks = ["a/b"]\n', "task 'a/b'"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_is_refused_with(what: str, tmp_path: Path) -> None:
    text, words = BAD[what]
    with pytest.raises(ConfigError, match=words):
        agent(tmp_path, text)


# --- the training child


@pytest.fixture
def child(tmp_path: Path, digits_bundle: bytes) -> tuple[Trainer, Model, np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = (x[:45] / 16).reshape(-1, 8, 8, 1).astype(np.float32), y[:45].astype(np.int32)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    (tmp_path / "bundle").write_bytes(digits_bundle)
    trainer = Trainer()
    key = SealingKey.from_seed(b"coordinator".ljust(32, b".")).public.hex()
    opened = Open(str(tmp_path / "bundle"), blob_ref(digits_bundle).sha256, key, "npz", str(tmp_path / "data.npz"))
    assert isinstance(trainer.answer(opened), Done)
    return trainer, Model(read_bundle(digits_bundle)), x, y


def request(parameters: np.ndarray, asked: TrainingPlan, **changes: object) -> Run:
    data = parameters.astype("<f4").tobytes()
    return Run("run.e1.a", "pi", data, asked, 0.001, 0.0, min_examples=1, **changes)  # type: ignore[arg-type]


def test_an_evaluation_sends_the_metrics_of_the_received_model_in_the_order_asked(
    child: tuple[Trainer, Model, np.ndarray, np.ndarray],
) -> None:
    trainer, model, x, y = child
    received = model.parameters() * np.float32(1.5)
    model.set_parameters(received)
    loss, accuracy = model.evaluate(x, y)
    answer = trainer.answer(request(received, plan("", "accuracy", "loss"), held_out=True))
    assert isinstance(answer, Done), answer
    assert answer.update == np.array([accuracy, loss], "<f4").tobytes()  # clip_norm is for updates of a model
    assert (answer.num_examples, answer.metrics["held_out"], answer.withheld) == (45, 1.0, b"")
    only = trainer.answer(request(received, plan("", "loss")))
    assert isinstance(only, Done)
    assert (only.update, only.metrics["held_out"]) == (np.array([loss], "<f4").tobytes(), 0.0)


def test_an_evaluation_says_what_training_says_of_the_received_model(
    child: tuple[Trainer, Model, np.ndarray, np.ndarray],
) -> None:
    trainer, model, _, _ = child
    trained = trainer.answer(request(model.parameters(), plan()))
    found = trainer.answer(request(model.parameters(), plan("", "loss", "accuracy")))
    assert isinstance(trained, Done)
    assert isinstance(found, Done)
    told = [trained.metrics["loss_before"], trained.metrics["accuracy_before"]]
    np.testing.assert_array_equal(np.frombuffer(found.update, "<f4"), np.array(told, np.float32))


def test_numbers_that_a_coordinator_refuses_are_a_failure_that_says_them(
    child: tuple[Trainer, Model, np.ndarray, np.ndarray],
) -> None:
    trainer, model, _, _ = child
    broken = np.full_like(model.parameters(), math.nan)
    answer = trainer.answer(request(broken, plan("", "loss")))
    assert isinstance(answer, Problem)
    assert answer.kind == "TrainingError"
    assert "cannot be evaluated on these data: loss nan" in answer.what


def test_unknown_or_repeated_metrics_and_compression_are_refused_by_the_child(
    child: tuple[Trainer, Model, np.ndarray, np.ndarray],
) -> None:
    trainer, model, _, _ = child
    compressed = TrainingPlan(1, 0.1, compression="rotated-8bit", evaluate=("loss",))
    for asked in (plan("", "f1"), plan("", "loss", "loss"), compressed):
        answer = trainer.answer(request(model.parameters(), asked))
        assert isinstance(answer, Problem), asked


def test_a_device_without_trusted_instances_declines_corrections(tmp_path: Path) -> None:
    asked = TrainingPlan(1, 0.1, work="teach-correct")
    assert "no trusted instances" in unwilling(agent(tmp_path, ONE).config, asked)
    config = agent(tmp_path, TRUSTED).config
    assert unwilling(config, asked) == ""
    assert [place.path for place in places(config.data)] == ["data.npz", "trusted.npz"]
