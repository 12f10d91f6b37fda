"""The row of a device, made in its training child by a real TFLite runtime, and its golden vectors."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from covey_coordinator.coding.cyclic import decode
from covey_edge.frames import Done, Open, Problem, Run
from covey_edge.trainer import Trainer, train
from covey_protocol.bundle import check_plan, read_bundle
from covey_protocol.coding import CyclicCode, as_numbers, as_rows, weighed
from covey_protocol.compression import decode as decoded_bytes
from covey_protocol.compression import encode
from covey_protocol.errors import ConfigError, PeerError, TrainingError
from covey_protocol.forms import FLOAT64, Compression, compression_of, offered_sizes
from covey_protocol.messages import BlobRef, CodingPlan, Invitation, TrainingPlan
from covey_protocol.privacy import clip
from covey_protocol.seals import SealingKey

sys.path.insert(0, str(Path(__file__).parent.parent / "golden"))
import generate_coding

NAMES = ("north", "east", "south", "west", "yard")
Array = np.ndarray[Any, Any]
Ask = Callable[..., Any]


def plan_of(n: int, **changes: Any) -> TrainingPlan:
    coding = CodingPlan(tuple("abcde"[:n]), NAMES[:n], 1)
    return TrainingPlan(2, 0.1, shuffle_seed=7, work="cyclic-code", coding=coding, **changes)


def examples_of(place: int) -> tuple[Array, Array]:
    draw = np.random.default_rng(place)
    count = 20 + 3 * place
    return draw.random((count, 8, 8, 1), np.float32), draw.integers(0, 10, count).astype(np.int32)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, digits_bundle: bytes, coordinator_key: SealingKey) -> Trainer:
    path = tmp_path_factory.mktemp("coded") / "bundle"
    path.write_bytes(digits_bundle)
    made = Trainer()
    sha256, key = hashlib.sha256(digits_bundle).digest(), coordinator_key.public.hex()
    opened = made.answer(Open(str(path), sha256, key, "npz", ""))
    assert isinstance(opened, Done), opened
    return made


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("shards")
    for place, name in enumerate(NAMES):
        x, y = examples_of(place)
        np.savez(folder / f"{name}.npz", x=x, y=y)
    return {name: str(folder / f"{name}.npz") for name in NAMES}


@pytest.fixture
def ask(trainer: Trainer, shards: dict[str, str]) -> Ask:
    """(device, plan, policy) -> what its child answers."""

    def asked(device: str, plan: TrainingPlan, *, held: dict[str, str] = shards, **policy: Any) -> Any:
        limits = {"clip_norm": 0.0, "noise_multiplier": 0.0, "min_examples": 1, **policy}
        return trainer.answer(Run("r.1.a", device, parameters(trainer), plan, **limits, shards=held))

    return asked


START: dict[int, bytes] = {}


def parameters(trainer: Trainer) -> bytes:
    """Of the model as it was exported."""
    assert trainer._model is not None
    return START.setdefault(id(trainer), trainer._model.parameters().astype("<f4").tobytes())


def alone(trainer: Trainer, plan: TrainingPlan, clip_norm: float = 0.0) -> list[Array]:
    """What each shard's update is, times its examples, with their number behind it."""
    model, start = trainer._model, np.frombuffer(parameters(trainer), "<f4").astype(np.float32)
    assert model is not None
    found = []
    for place, name in enumerate(NAMES):
        x, y = examples_of(place)
        most = plan.max_examples or len(x)
        model.set_parameters(start)
        train(model, (x[:most], y[:most]), plan, name)
        update = model.parameters() - start
        found.append(weighed(clip(update, clip_norm) if clip_norm else update, min(most, len(x))))
    return found


def row_of(done: Any, d: int, plan: TrainingPlan) -> Array:
    assert isinstance(done, Done), done
    assert isinstance(plan.coding, CodingPlan)
    return decoded_bytes(done.update, compression_of(plan), b"", plan.coding.row_numbers(d))


@pytest.mark.parametrize("n", [4, 5])
@pytest.mark.parametrize("policy", [{}, {"clip_norm": 0.05}], ids=["plain", "clipped"])
def test_the_rows_of_all_devices_are_a_codeword_of_their_shards_updates(
    ask: Ask, trainer: Trainer, n: int, policy: dict[str, float]
) -> None:
    plan = plan_of(n, max_examples=25)
    code, true = CyclicCode(n, 1), np.sum(alone(trainer, plan, policy.get("clip_norm", 0.0))[:n], axis=0)
    rows = [row_of(ask(device, plan, **policy), len(true) - 1, plan) for device in "abcde"[:n]]
    found = decode(code, as_rows(code, np.stack(rows)), np.random.default_rng(1))
    assert found.liars == ()
    np.testing.assert_allclose(found.total, true, rtol=0, atol=1e-14 * np.abs(true).max())
    assert found.total[-1] == pytest.approx(sum(min(25, 20 + 3 * place) for place in range(n)), abs=1e-9)
    rows[2] = rows[2] + 1e-6 * np.abs(rows[2]).max()
    lied = decode(code, as_rows(code, np.stack(rows)), np.random.default_rng(1))
    assert lied.liars == (2,)
    np.testing.assert_allclose(lied.total, true, rtol=0, atol=1e-13 * np.abs(true).max())


def test_a_device_tells_its_loss_and_the_examples_of_its_shards_together(ask: Ask) -> None:
    done = ask("b", plan_of(4))
    assert done.num_examples == 23 + 26 + 29
    assert set(done.metrics) == {"training_loss", "seconds"}
    assert 2.0 < done.metrics["training_loss"] < 2.6  # ten classes, and two passes over noise


REFUSED = {
    "a device that adds noise": ({"clip_norm": 1.0, "noise_multiplier": 0.5}, "rows of a code have to be exact"),
    "a device without one of its shards": ({"held": {}}, "holds no shard 'east'; name it in \\[data.shards\\]"),
    "a shard too small for its owner's policy": ({"min_examples": 24}, "shard 'east' are fewer than this device's"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_is(what: str, ask: Ask) -> None:
    policy, told = REFUSED[what]
    answer = ask("b", plan_of(4), **policy)
    assert isinstance(answer, Problem)
    with pytest.raises(TrainingError, match=told):
        raise TrainingError(answer.what, answer.remedy)


def test_the_owners_limit_on_what_an_update_tells_holds_for_each_shard(
    ask: Ask, shards: dict[str, str], tmp_path: Path
) -> None:
    """A shard of one example: its update alone would state it, whatever the others add to the row."""
    x, y = examples_of(2)
    np.savez(tmp_path / "one.npz", x=x[:1], y=y[:1])
    plan = msgspec.structs.replace(plan_of(4), epochs=1)
    held = {**shards, "south": str(tmp_path / "one.npz")}
    stopped = ask("b", plan, held=held, max_psnr_db=50.0)  # east, south, west
    assert isinstance(stopped, Problem), stopped
    assert stopped.what.startswith("the update was stopped: it states the features of an example (number 0)")
    assert isinstance(ask("d", plan, held=held, max_psnr_db=50.0), Done)  # west, north, east
    assert isinstance(ask("b", plan, held=held), Done)  # no limit


BESIDE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "compression": ({"compression": "rotated-8bit"}, TrainingError, "cyclic-code with compression"),
    "steps": ({"steps": 3}, TrainingError, "cyclic-code with steps"),
    "metrics": ({"evaluate": ("loss",)}, TrainingError, "cyclic-code with metrics"),
    "another work": ({"work": "train"}, TrainingError, "train with a code"),
    "no code": ({"coding": msgspec.UNSET}, TrainingError, "cyclic-code without a code"),
}


@pytest.mark.parametrize("what", BESIDE)
def test_a_code_does_not_go_with(what: str, digits_bundle: bytes) -> None:
    changes, error, told = BESIDE[what]
    plan = msgspec.structs.replace(plan_of(4), **changes)
    with pytest.raises(error, match=told):
        check_plan(read_bundle(digits_bundle).manifest, plan)
    if plan.compression != "none":
        with pytest.raises(ConfigError, match="rows with compression"):
            compression_of(plan)


def test_a_plan_whose_code_cannot_be_is_refused_when_it_is_read() -> None:
    right = msgspec.to_builtins(plan_of(4))
    wrong = {
        "a device twice": {"devices": ["a", "b", "b", "d"]},
        "a shard twice": {"shards": ["x", "x", "y", "z"]},
        "a shard too few": {"shards": ["x", "y", "z"]},
        "too many liars": {"s": 2},
        "a name that is a path": {"shards": ["../x", "y", "z", "w"]},
        "no device": {"devices": [], "shards": []},
    }
    for what, change in wrong.items():
        content = {**right, "coding": {**right["coding"], **change}}
        with pytest.raises(msgspec.ValidationError):
            pytest.fail(f"{what}: {msgspec.convert(content, TrainingPlan)}")


@pytest.mark.parametrize(("n", "numbers"), [(4, 2 * 8), (5, 8)])
def test_an_offer_has_eight_bytes_for_each_number_of_a_row(n: int, numbers: int) -> None:
    ref = BlobRef(bytes(32), 28)
    size = 8 * numbers
    assert offered_sizes(Invitation("r.1.a", 1, 0, 1, ref, ref, plan_of(n))) == (size, size)
    encrypted = Invitation("r.1.a", 1, 0, 1, ref, ref, plan_of(n), encryption_key=bytes(32))
    assert offered_sizes(encrypted) == (size + 560, size + 560)
    with pytest.raises(PeerError, match="float64"):
        decoded_bytes(bytes(size - 8), Compression(FLOAT64), b"", numbers)


def test_rows_are_those_of_the_golden_vectors() -> None:
    stored = json.loads(generate_coding.FILE.read_text())["vectors"]
    assert stored.keys() == generate_coding.vectors().keys()
    for vector in stored.values():
        code = CyclicCode(vector["n"], vector["s"])
        told = np.array([complex(*pair) for pair in vector["coefficients"]])
        np.testing.assert_allclose(code.coefficients, told, rtol=0, atol=2e-15 * np.abs(told).max())
        parts = [weighed(generate_coding.update(j), generate_coding.num_examples(j)) for j in range(code.n)]
        form, numbers = Compression(FLOAT64), (generate_coding.D + 1) * (2 - code.n % 2)
        sent = [decoded_bytes(bytes.fromhex(row), form, b"", numbers) for row in vector["rows"]]
        for device, row in enumerate(sent):
            made = as_numbers(code.encode(parts[shard] for shard in code.shards(device)))
            np.testing.assert_allclose(made, row, rtol=0, atol=2e-15 * np.abs(row).max())
            assert encode(row, form, b"").hex() == vector["rows"][device]
        found = decode(code, as_rows(code, np.stack(sent)), np.random.default_rng(0))
        np.testing.assert_allclose(found.total, vector["total"], rtol=1e-14)
