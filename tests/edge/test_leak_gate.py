"""The gate before an update leaves the training child: real bundles, real TFLite, real digits."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_edge import leak_gate, policy
from covey_edge.config import AgentConfig, BrokerSettings, DataSettings, IdentitySettings, PrivacySettings
from covey_edge.frames import Done, Open, Problem, Run
from covey_edge.leak_told import JUDGED, STOPPED
from covey_edge.png import png
from covey_edge.trainer import Trainer
from covey_protocol.blobs import blob_ref
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey
from covey_protocol.works import WORKS


@dataclass
class Device:
    """A trainer with an open bundle and forty digits."""

    trainer: Trainer
    request: Open
    parameters: bytes

    def run(self, examples: int = 0, epochs: int = 1, **changes: Any) -> Any:
        self.trainer.answer(self.request)
        plan = TrainingPlan(epochs=epochs, learning_rate=0.1, max_examples=examples, **changes.pop("plan", {}))
        values: dict[str, Any] = {"clip_norm": 0.0, "noise_multiplier": 0.0, "min_examples": 1, **changes}
        return self.trainer.answer(Run("r.1.1", "pi", self.parameters, plan, **values))


def device(folder: Path, bundle: bytes, key: SealingKey) -> Device:
    from sklearn.datasets import load_digits

    from covey_edge.runtime import Model
    from covey_protocol.bundle import read_bundle

    x, y = load_digits(return_X_y=True)
    np.savez(folder / "data.npz", x=(x[:40] / 16).reshape(-1, 8, 8, 1), y=y[:40])
    (folder / "bundle").write_bytes(bundle)
    request = Open(str(folder / "bundle"), blob_ref(bundle).sha256, key.public.hex(), "npz", str(folder / "data.npz"))
    return Device(Trainer(), request, Model(read_bundle(bundle)).parameters().astype("<f4").tobytes())


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory, coordinator_key: SealingKey) -> Device:
    import covey_models
    from covey_models import zoo

    bundle = covey_models.export(
        zoo.build("mlp", (8, 8, 1), 10, seed=0),
        name="mlp",
        batch_size=16,
        input_range=(0.0, 1.0),
        num_classes=10,
        key=coordinator_key,
    )
    return device(tmp_path_factory.mktemp("mlp"), bundle, coordinator_key)


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory, digits_bundle: bytes, coordinator_key: SealingKey) -> Device:
    return device(tmp_path_factory.mktemp("cnn"), digits_bundle, coordinator_key)


def pixels_of(data: bytes) -> np.ndarray:
    """A PNG read back by the standard (ISO/IEC 15948) and not by our own code."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    assert depth == 8
    channels = {0: 1, 2: 3}[colour]
    start = data.index(b"IDAT") + 4
    length = struct.unpack(">I", data[start - 8 : start - 4])[0]
    rows = np.frombuffer(zlib.decompress(data[start : start + length]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, channels)


@pytest.mark.parametrize("epochs", [1, 3])
def test_an_update_of_one_example_is_stopped_with_a_picture_for_the_owner(mlp: Device, epochs: int) -> None:
    answer = mlp.run(examples=1, epochs=epochs, max_psnr_db=30.0)
    assert isinstance(answer, Problem)
    assert answer.kind == STOPPED
    assert "max_psnr_db is 30" in answer.what
    picture = pixels_of(answer.found["stopped.png"])
    true, read = picture[:, : picture.shape[0]], picture[:, -picture.shape[0] :]
    with np.load(mlp.request.data_path) as data:
        expected = data["x"][0].repeat(32, axis=0).repeat(32, axis=1) * 255
    assert np.abs(true - expected).max() <= 1
    assert np.abs(read.astype(float) - expected).max() <= 2  # what leaves would have shown the example
    assert b"did not send" in answer.found["stopped.txt"]


def test_it_leaves_where_the_owner_allows_it_and_where_nothing_is_limited(mlp: Device) -> None:
    assert isinstance(mlp.run(examples=1), Done)
    assert isinstance(mlp.run(examples=1, max_psnr_db=200.0, max_label_recovery=1.0), Done)


def test_an_update_of_many_examples_leaves(mlp: Device, cnn: Device) -> None:
    for one in (mlp, cnn):
        answer = one.run(max_psnr_db=30.0)
        assert isinstance(answer, Done), answer
        assert answer.update == one.run().update  # looking changes nothing


def test_features_behind_convolutions_count_as_well(cnn: Device) -> None:
    answer = cnn.run(examples=1, max_psnr_db=60.0)
    assert isinstance(answer, Problem)
    assert "the features of an example" in answer.what
    assert b"what the update would have told" in answer.found["stopped.txt"]
    assert "stopped.png" not in answer.found


def test_labels_that_are_told_stop_it_as_well(mlp: Device) -> None:
    answer = mlp.run(examples=1, max_label_recovery=0.9)
    assert isinstance(answer, Problem)
    assert "100% of the labels" in answer.what


def test_what_is_judged_is_what_travels_with_its_noise(mlp: Device) -> None:
    private = {"clip_norm": 0.1, "max_psnr_db": 30.0}
    assert isinstance(mlp.run(examples=1, **private), Problem)
    assert isinstance(mlp.run(examples=1, noise_multiplier=1.0, **private), Done)


def test_a_compressed_update_is_judged_as_it_is_read(mlp: Device) -> None:
    answer = mlp.run(examples=1, max_psnr_db=20.0, plan={"compression": "rotated-8bit"})
    assert isinstance(answer, Problem)
    assert answer.kind == STOPPED


def test_works_that_cannot_be_judged_are_declined_where_anything_is_limited() -> None:
    """Else whoever wants to read asks for another work."""

    def said(work: str, **privacy: Any) -> str:
        config = AgentConfig(
            "a",
            "f",
            BrokerSettings("mqtt://localhost"),
            IdentitySettings("", ""),
            DataSettings("data.npz", trusted_path="trusted.npz"),
            privacy=PrivacySettings(**privacy),
        )
        return policy.unwilling(config, TrainingPlan(1, 0.1, work=work))

    for work in JUDGED:
        assert said(work, max_psnr_db=30.0) == ""
    for work in sorted(set(WORKS) - set(JUDGED) - {"cyclic-code"}):
        assert said(work) == ""
        assert "cannot judge" in said(work, max_psnr_db=30.0)
        assert "cannot judge" in said(work, max_label_recovery=0.5)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_one_that_others_read(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels)).astype(np.uint8)
    assert (pixels_of(png(pixels)) == pixels).all()


def test_the_gate_knows_every_work_that_sends_gradients() -> None:
    assert set(leak_gate.JUDGED) < set(WORKS)
