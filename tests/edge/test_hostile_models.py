"""Sound seals over bad models: the child refuses or dies, the reason is said, and the next good bundle trains as ever.

benchmarks/hostile_bundles.py does the same to hundreds of damaged models and counts.
"""

from __future__ import annotations

import queue
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import handmade_bundles as handmade
import msgspec
import numpy as np
import pytest
from patience import PATIENCE_S

from covey_edge.frames import Done, Frame, Open, Problem, Run
from covey_edge.runtime import Model
from covey_edge.training_process import TrainingProcess
from covey_protocol.blobs import blob_ref
from covey_protocol.bundle import read_bundle, write_bundle
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey

MEMORY_MB = 1024


class Device:
    """A training child on real data, asked to train whole bundles."""

    def __init__(self, folder: Path, key: SealingKey) -> None:
        self._folder, self._key = folder, key
        self._answers: queue.Queue[Any] = queue.Queue()
        self.process = TrainingProcess(lambda token, frame: self._answers.put(frame), MEMORY_MB)

    def _ask(self, frame: Frame, timeout_s: float) -> Any:
        self.process.request("round", frame, timeout_s)
        return self._answers.get(timeout=timeout_s + PATIENCE_S)

    def train(self, bundle: bytes, timeout_s: float = 60.0) -> Any:
        path, data = self._folder / "bundle", self._folder / "data.npz"
        path.write_bytes(bundle)
        opened = self._ask(
            Open(str(path), blob_ref(bundle).sha256, self._key.public.hex(), "npz", str(data)), timeout_s
        )
        if isinstance(opened, Problem):
            return opened
        parameters = np.zeros(read_bundle(bundle).manifest.dimension, "<f4").tobytes()
        return self._ask(Run("r.1", "pi", parameters, TrainingPlan(1, 0.01), 0.0, 0.0, 1), timeout_s)


@pytest.fixture(scope="module")
def good(coordinator_key: SealingKey) -> bytes:
    return handmade.linear_bundle(coordinator_key)


@pytest.fixture
def device(tmp_path: Path, coordinator_key: SealingKey) -> Iterator[Device]:
    random = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=random.integers(0, 9, (10, 4)), y=random.standard_normal((10, 3)))
    made = Device(tmp_path, coordinator_key)
    yield made
    made.process.stop()


def resealed(good: bytes, model: bytes, key: SealingKey) -> bytes:
    return write_bundle(read_bundle(good).manifest, model, key)


def test_sealed_garbage_costs_its_round_and_nothing_more(
    good: bytes, device: Device, coordinator_key: SealingKey
) -> None:
    model = read_bundle(good).model
    first = device.train(good)
    assert isinstance(first, Done), first
    random = np.random.default_rng(1)
    garbage = {
        "nothing": b"",
        "noise": random.bytes(5000),
        "half a model": model[: len(model) // 2],
        "the right start and then noise": model[:64] + random.bytes(len(model) - 64),
        "offsets that point far away": model[:1000] + b"\xff\xff\xff\x7f" * 500 + model[3000:],
        "zeros": model[:16] + bytes(len(model) - 16),
    }
    for what, bad in garbage.items():
        problem = device.train(resealed(good, bad, coordinator_key))
        assert isinstance(problem, Problem), what
        died = problem.what.startswith("the training process died (SIG")
        assert died or problem.kind in ("BundleError", "TrainingError"), problem
    last = device.train(good)
    assert isinstance(last, Done)
    assert last.update == first.update


def test_a_model_that_asks_for_more_memory_than_allowed_ends_its_child_only(
    good: bytes, device: Device, coordinator_key: SealingKey
) -> None:
    problem = device.train(handmade.linear_bundle(coordinator_key, "memory"))
    assert isinstance(problem, Problem)
    assert problem.what
    assert isinstance(device.train(good), Done)


def test_a_model_that_never_ends_is_ended_at_the_timeout(
    good: bytes, device: Device, coordinator_key: SealingKey
) -> None:
    bundle = handmade.linear_bundle(coordinator_key, "time")
    assert Model(read_bundle(bundle)).manifest.name == "linear"  # it loads: nothing can be seen before it runs
    problem = device.train(bundle, timeout_s=3.0)
    assert isinstance(problem, Problem)
    assert "longer than 3 s" in problem.what
    assert isinstance(device.train(good), Done)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b"no frame at all", "is no answer"),
        (msgspec.msgpack.encode(Done(found={"report.html": b""})).replace(b"report.html", b"../../x.htm"), "found"),
    ],
    ids=["garbage", "a file outside the owner's folder"],
)
def test_a_child_that_was_taken_over_is_ended_and_its_answer_is_a_failure(
    said: bytes, told: str, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken_over = tmp_path / "python"
    program = f"import sys, time; o = sys.stdout.buffer; o.write({len(said).to_bytes(4, 'little') + said!r}); o.flush()"
    taken_over.write_text(f"#!{sys.executable}\n{program}; time.sleep(600)\n")
    taken_over.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(taken_over))
    answer = device._ask(Open("", b"", "", "npz", ""), PATIENCE_S)
    assert isinstance(answer, Problem)
    assert told in answer.what
    assert device.process.pid is None
