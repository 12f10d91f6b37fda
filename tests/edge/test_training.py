"""Training in the child: real TFLite, and a child that dies, hangs or grows is a failed round, never a dead agent."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patience import PATIENCE_S

from covey_edge import training_process
from covey_edge.frames import Done, Open, Probe, Problem, Run
from covey_edge.runtime import Model
from covey_edge.trainer import Trainer, check_sendable, protect
from covey_edge.training_process import TrainingProcess
from covey_protocol.blobs import blob_ref
from covey_protocol.bundle import read_bundle
from covey_protocol.errors import BundleError, TrainingError
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey


@pytest.fixture
def device(tmp_path: Path, digits_bundle: bytes) -> Path:
    """A folder with a bundle and forty real digits."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    np.savez(tmp_path / "data.npz", x=(x[:40] / 16).reshape(-1, 8, 8, 1), y=y[:40])
    (tmp_path / "bundle").write_bytes(digits_bundle)
    return tmp_path


def open_request(folder: Path, key: SealingKey) -> Open:
    bundle = folder / "bundle"
    return Open(str(bundle), blob_ref(bundle.read_bytes()).sha256, key.public.hex(), "npz", str(folder / "data.npz"))


def run_request(parameters: np.ndarray, **changes: Any) -> Run:
    values: dict[str, Any] = {
        "round_id": "r.1",
        "device_id": "kitchen-pi",
        "parameters": parameters.astype("<f4").tobytes(),
        "plan": TrainingPlan(epochs=2, learning_rate=0.1, shuffle_seed=1),
        "clip_norm": 0.0,
        "noise_multiplier": 0.0,
        "min_examples": 1,
    }
    return Run(**{**values, **changes})


@pytest.fixture
def opened(device: Path, coordinator_key: SealingKey, digits_bundle: bytes) -> tuple[Trainer, np.ndarray]:
    trainer = Trainer()
    answer = trainer.answer(open_request(device, coordinator_key))
    assert isinstance(answer, Done), answer
    return trainer, Model(read_bundle(digits_bundle)).parameters()


def update_of(answer: object) -> np.ndarray:
    assert isinstance(answer, Done), answer
    return np.frombuffer(answer.update, "<f4")


def test_training_lowers_the_loss_and_the_update_is_trained_minus_received(
    opened: tuple[Trainer, np.ndarray], digits_bundle: bytes
) -> None:
    trainer, received = opened
    answer = trainer.answer(run_request(received))
    assert isinstance(answer, Done)
    assert answer.num_examples == 40
    assert answer.metrics["training_loss"] < answer.metrics["loss_before"]
    update = update_of(answer)
    assert update.shape == received.shape
    model = Model(read_bundle(digits_bundle))
    model.set_parameters(received + update)
    with np.load(Path(trainer._data_state[1])) as data:  # type: ignore[arg-type]
        loss, _ = model.evaluate(data["x"].astype(np.float32), data["y"].astype(np.int32))
    assert loss < answer.metrics["loss_before"]


def test_devices_with_one_replica_name_send_equal_bits_and_others_do_not(opened: tuple[Trainer, np.ndarray]) -> None:
    """The order of examples is drawn from the replica's name in place of the device's id."""
    trainer, received = opened
    alone, mine, yours, elsewhere = (
        update_of(trainer.answer(run_request(received, device_id=device_id, replica=replica))).tobytes()
        for device_id, replica in (("a", ""), ("a", "shard-1"), ("b", "shard-1"), ("b", "shard-2"))
    )
    assert mine == yours
    assert len({alone, mine, elsewhere}) == 3
    assert alone == update_of(trainer.answer(run_request(received, device_id="a"))).tobytes()


def test_the_same_request_gives_the_same_bits_and_another_seed_others(opened: tuple[Trainer, np.ndarray]) -> None:
    trainer, received = opened
    first = update_of(trainer.answer(run_request(received)))
    np.testing.assert_array_equal(first, update_of(trainer.answer(run_request(received))))
    plan = TrainingPlan(epochs=2, learning_rate=0.1, shuffle_seed=2)
    assert not np.array_equal(first, update_of(trainer.answer(run_request(received, plan=plan))))


def test_what_a_coordinator_refuses_is_a_failure_on_the_device(opened: tuple[Trainer, np.ndarray]) -> None:
    trainer, received = opened
    for rate, what in ((1e-46, "all zeros"), (1e25, "training diverged")):
        answer = trainer.answer(run_request(received, plan=TrainingPlan(epochs=1, learning_rate=rate)))
        assert isinstance(answer, Problem)
        assert (answer.kind, what in answer.what) == ("TrainingError", True), answer
    with pytest.raises(TrainingError, match="has norm inf"):
        check_sendable(np.full(4, 3e38, np.float32))
    with pytest.raises(TrainingError, match=r"has norm 2\.0e\+18"):
        check_sendable(np.full(4, 1e18, np.float32))
    check_sendable(np.full(4, 1e-40, np.float32))


def test_an_update_of_zeros_leaves_under_noise(opened: tuple[Trainer, np.ndarray]) -> None:
    """Or its absence would tell what the noise is to hide."""
    trainer, received = opened
    plan = TrainingPlan(epochs=1, learning_rate=1e-46)
    assert update_of(trainer.answer(run_request(received, plan=plan, clip_norm=1.0, noise_multiplier=0.1))).any()


def test_one_example_means_one_example(opened: tuple[Trainer, np.ndarray]) -> None:
    trainer, received = opened
    answer = trainer.answer(run_request(received, plan=TrainingPlan(epochs=1, learning_rate=0.1, max_examples=1)))
    assert isinstance(answer, Done)
    assert answer.num_examples == 1


def test_the_owners_clip_norm_bounds_what_leaves(opened: tuple[Trainer, np.ndarray]) -> None:
    trainer, received = opened
    free = update_of(trainer.answer(run_request(received)))
    clipped = update_of(trainer.answer(run_request(received, clip_norm=0.01)))
    assert np.linalg.norm(free) > 0.02
    assert np.linalg.norm(clipped) == pytest.approx(0.01, rel=1e-5)
    np.testing.assert_allclose(clipped / np.linalg.norm(clipped), free / np.linalg.norm(free), atol=1e-6)


def test_the_owners_noise_is_there_and_never_twice_the_same() -> None:
    update = np.zeros(20_000, np.float32)
    noised = [protect(update, 2.0, 0.5) for _ in range(2)]
    assert not np.array_equal(*noised)
    assert np.std(noised[0]) == pytest.approx(1.0, rel=0.03)
    assert abs(np.mean(noised[0])) < 0.04


def test_new_data_are_used_in_the_next_round(
    opened: tuple[Trainer, np.ndarray], device: Path, coordinator_key: SealingKey
) -> None:
    trainer, received = opened
    with np.load(device / "data.npz") as data:
        x, y = data["x"], data["y"]
    np.savez(device / "data.npz", x=x[:7], y=y[:7])
    assert isinstance(trainer.answer(open_request(device, coordinator_key)), Done)
    answer = trainer.answer(run_request(received))
    assert isinstance(answer, Done)
    assert answer.num_examples == 7


def test_labels_out_of_the_models_range_are_a_problem_not_nonsense(device: Path, coordinator_key: SealingKey) -> None:
    with np.load(device / "data.npz") as data:
        np.savez(device / "data.npz", x=data["x"], y=data["y"] + 5)
    problem = Trainer().answer(open_request(device, coordinator_key))
    assert isinstance(problem, Problem)
    assert problem.kind == "DataError"
    assert "labels above 9" in problem.what


def test_a_bundle_of_another_coordinator_is_refused(device: Path) -> None:
    problem = Trainer().answer(open_request(device, SealingKey.from_seed(bytes([5]) * 32)))
    assert isinstance(problem, Problem)
    assert problem.kind == "BundleError"


def test_divergence_is_named_and_nothing_is_sent(opened: tuple[Trainer, np.ndarray]) -> None:
    trainer, received = opened
    asked = run_request(received * np.float32(1e30), plan=TrainingPlan(20, 1000.0), screen_models="off")
    problem = trainer.answer(asked)
    assert isinstance(problem, Problem), problem
    assert "not finite" in problem.what


def test_too_few_examples_for_the_owners_policy_is_a_problem(opened: tuple[Trainer, np.ndarray]) -> None:
    trainer, received = opened
    problem = trainer.answer(run_request(received, min_examples=41))
    assert isinstance(problem, Problem)
    assert "policy" in problem.what


def test_a_parameter_vector_of_the_wrong_length_is_refused(digits_bundle: bytes) -> None:
    with pytest.raises(BundleError, match="3 parameters came"):
        Model(read_bundle(digits_bundle)).set_parameters(np.zeros(3, np.float32))


# --- the child as a process


def check_probed(expected: str, token: object, answer: object) -> None:
    assert token == expected
    assert isinstance(answer, Done), answer
    assert (answer.num_examples, answer.runtime) == (40, "tflite_runtime 2.14.0")


@pytest.fixture
def child() -> Iterator[tuple[TrainingProcess, queue.Queue[tuple[object, Any]]]]:
    answers: queue.Queue[tuple[object, Any]] = queue.Queue()
    process = TrainingProcess(lambda token, frame: answers.put((token, frame)))
    yield process, answers
    process.stop()


def test_a_killed_child_is_a_problem_and_the_next_request_starts_a_new_one(
    child: tuple[TrainingProcess, queue.Queue[tuple[object, Any]]], device: Path
) -> None:
    process, answers = child
    probe = Probe("npz", str(device / "data.npz"))
    process.request("first", probe, PATIENCE_S)
    check_probed("first", *answers.get(timeout=PATIENCE_S))
    first = process.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)  # as a training that hangs
    process.request("second", probe, PATIENCE_S)
    os.kill(first, signal.SIGKILL)
    token, problem = answers.get(timeout=PATIENCE_S)
    assert token == "second"
    assert isinstance(problem, Problem)
    assert "SIGKILL" in problem.what
    process.request("third", probe, PATIENCE_S)
    check_probed("third", *answers.get(timeout=PATIENCE_S))
    assert process.pid != first


def test_a_child_that_has_long_had_nothing_to_do_ends_and_the_next_request_starts_a_new_one(
    child: tuple[TrainingProcess, queue.Queue[tuple[object, Any]]], device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, answers = child
    probe = Probe("npz", str(device / "data.npz"))
    process.rest()
    process.request("first", probe, PATIENCE_S)
    check_probed("first", *answers.get(timeout=PATIENCE_S))
    first = process.pid
    assert first is not None
    process.rest()
    assert process.pid == first  # it answered a moment ago
    monkeypatch.setattr(training_process, "IDLE_S", 0.0)
    os.kill(first, signal.SIGSTOP)
    process.request("second", probe, PATIENCE_S)
    process.rest()
    assert process.pid == first  # it is at work
    os.kill(first, signal.SIGCONT)
    check_probed("second", *answers.get(timeout=PATIENCE_S))
    process.rest()
    assert process.pid is None
    process.request("third", probe, PATIENCE_S)
    check_probed("third", *answers.get(timeout=PATIENCE_S))
    assert process.pid not in (None, first)


@pytest.mark.parametrize(("setting", "value"), [("OPENINGS", 0.0), ("MOST_S", 0.0), ("MUCH_FREE_MB", 1e9)])
def test_a_child_that_has_read_long_stays_until_that_is_worth_no_more_or_memory_is_short(
    child: tuple[TrainingProcess, queue.Queue[tuple[object, Any]]],
    device: Path,
    coordinator_key: SealingKey,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    value: float,
) -> None:
    process, answers = child
    usual = {"IDLE_S": -1.0, "LONG_S": 0.0, "OPENINGS": 1e6, "MOST_S": 1e6, "MUCH_FREE_MB": 0.0}
    for name, number in usual.items():
        monkeypatch.setattr(training_process, name, number)
    process.request("round", open_request(device, coordinator_key), PATIENCE_S)
    assert isinstance(answers.get(timeout=PATIENCE_S)[1], Done)
    process.rest()
    assert process.pid is not None
    monkeypatch.setattr(training_process, setting, value)
    process.rest()
    assert process.pid is None


def test_a_training_that_takes_too_long_is_ended(
    child: tuple[TrainingProcess, queue.Queue[tuple[object, Any]]], device: Path
) -> None:
    process, answers = child
    probe = Probe("npz", str(device / "data.npz"))
    process.request("first", probe, PATIENCE_S)
    answers.get(timeout=PATIENCE_S)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    process.request("slow", probe, 0.3)
    token, problem = answers.get(timeout=PATIENCE_S)
    assert token == "slow"
    assert "longer than 0.3 s" in problem.what
    assert process.pid is None


def test_the_child_dies_with_its_agent(device: Path) -> None:
    script = f"""
import queue, sys
from covey_edge.frames import Probe
from covey_edge.training_process import TrainingProcess
answers = queue.Queue()
process = TrainingProcess(lambda token, frame: answers.put(frame))
process.request("p", Probe("npz", {str(device / "data.npz")!r}), 30)
answers.get()
print(process.pid, flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdin is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the training child outlived its agent")


FORKED = """
import hashlib, json, sys
from pathlib import Path
from covey_edge.frames import Open, Problem
from covey_edge.trainer import Trainer
path, data, right, wrong = sys.argv[1:]
sha256 = hashlib.sha256(Path(path).read_bytes()).digest()
answers = [Trainer().answer(Open(path, sha256, key, "npz", data)) for key in (wrong, right)]
needless = {"cryptography", "paho", "ssl", "http", "html", "tomllib", "tomli", "click"}
print(json.dumps([[getattr(answer, "what", "") for answer in answers], sorted(needless & set(sys.modules))]))
"""


def test_a_training_child_checks_the_seal_without_loading_what_checks_it_or_any_other_needless_thing(
    device: Path, coordinator_key: SealingKey
) -> None:
    keys = [coordinator_key.public.hex(), SealingKey.from_seed(bytes([5]) * 32).public.hex()]
    command = [sys.executable, "-c", FORKED, str(device / "bundle"), str(device / "data.npz"), *keys]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    (refused, accepted), loaded = json.loads(ended.stdout)
    assert "seal is not the expected coordinator's" in refused
    assert accepted == ""
    assert loaded == []  # each takes memory that is short while it trains: edge/README.md


def test_nothing_the_edge_imports_is_tensorflow(device: Path, coordinator_key: SealingKey) -> None:
    script = """
import sys
import covey_edge.agent, covey_edge.trainer, covey_edge.cli_agent, covey_protocol.round
from covey_edge.trainer import Trainer
from tests_request import request
answer = Trainer().answer(request)
assert type(answer).__name__ == "Done", answer
heavy = {"tensorflow", "keras", "sklearn", "matplotlib", "tensorflow_federated", "scipy"} & set(sys.modules)
print(sorted(heavy))
"""
    request = open_request(device, coordinator_key)
    (device / "tests_request.py").write_text(f"from covey_edge.frames import Open, Reading\nrequest = {request!r}\n")
    environment = {**os.environ, "PYTHONPATH": str(device)}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert ended.stdout.strip() == "[]"
