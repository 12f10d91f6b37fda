"""The edge distribution alone, from its wheel and its lock, on every Python it promises: it installs, trains, reports.

Slow: builds a wheel and makes an environment for each Python found on this machine; needs a package index.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from brokers import RunningBroker
from environments import FROM_LOCK, built_wheel, found_python, install, make_environment
from reporting import one_round
from runtime_set import check_set

from covey_coordinator.demo.devices import Shard
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

VERSIONS = ["3.9", "3.10", "3.11", "3.12", "3.13"]

TRAIN = """
import hashlib, json, resource, sys
from pathlib import Path
import covey_edge.agent, covey_edge.cli_agent
from covey_edge.frames import Done, Open, Run
from covey_edge.runtime import Model
from covey_edge.trainer import Trainer
from covey_protocol.bundle import read_bundle
from covey_protocol.messages import TrainingPlan
folder, key = Path(sys.argv[1]), sys.argv[2]
bundle = (folder / "bundle").read_bytes()
trainer = Trainer()
sha256 = hashlib.sha256(bundle).digest()
opened = trainer.answer(Open(str(folder / "bundle"), sha256, key, "npz", str(folder / "data.npz")))
assert isinstance(opened, Done), opened
received = Model(read_bundle(bundle)).parameters()
plan = TrainingPlan(epochs=3, learning_rate=0.1, shuffle_seed=1)
done = trainer.answer(Run("r", "pi", received.astype("<f4").tobytes(), plan, 0.0, 0.0, 1))
assert isinstance(done, Done), done
(folder / "update").write_bytes(done.update)
heavy = sorted({"tensorflow", "keras", "sklearn"} & set(sys.modules))
print(json.dumps({"runtime": done.runtime, "heavy": heavy, "before": done.metrics["loss_before"],
                  "after": done.metrics["training_loss"]}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, digits_bundle: bytes) -> Path:
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("device")
    x, y = load_digits(return_X_y=True)
    np.savez(folder / "data.npz", x=(x[:200] / 16).reshape(-1, 8, 8, 1), y=y[:200])
    (folder / "bundle").write_bytes(digits_bundle)
    return folder


# fine-tune, keep, and answer: what an owner does
KEEP = """
import hashlib, json, sys, tempfile
from pathlib import Path
import numpy as np
from covey_edge.frames import Personalise, Personalised, Tune
from covey_edge.inference import Predictor
from covey_edge.model_store import Kept, ModelStore, Version
from covey_edge.runtime import Model
from covey_edge.trainer import Trainer
from covey_protocol.bundle import read_bundle
from covey_protocol.messages import TrainingPlan
folder, key, state = Path(sys.argv[1]), sys.argv[2], Path(tempfile.mkdtemp())
bundle, store = (folder / "bundle").read_bytes(), ModelStore(state)
received = Model(read_bundle(bundle)).parameters().astype("<f4").tobytes()
names = [hashlib.sha256(one).hexdigest() for one in (bundle, received)]
version = Version("federated", names[0], names[1], (key,), 1, "r", 0)
with store.changing():
    store.commit(Kept(version, version), dict(zip(version.files, (bundle, received))))
files, data = [str(store.path(name)) for name in version.files], str(folder / "data.npz")
tune = Tune("npz", data, TrainingPlan(3, 0.1, shuffle_seed=1), (), "pi")
made = Trainer().answer(Personalise(files[0], names[0], (key,), ((files[1], names[1]),), "npz", data, tune))
assert isinstance(made, Personalised), made
names[1] = hashlib.sha256(made.parameters).hexdigest()
own = Version("personal", names[0], names[1], (key,), 1, "r", 0)
predictor = Predictor.open(state)
with np.load(data) as examples:
    x, y = examples["x"], examples["y"]
right = [float((predictor.predict(x).argmax(axis=1) == y).mean())]
with store.changing():
    store.commit(store.load().using(own), {own.files[1]: made.parameters})
right.append(float((predictor.predict(x).argmax(axis=1) == y).mean()))
print(json.dumps({"right": right, "model": str(predictor.version)}))
"""
UPDATES: dict[str, np.ndarray] = {}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_edge_alone_installs_trains_and_reports(
    version: str,
    wheel: Path,
    device: Path,
    bundle_set: Path,
    coordinator_key: SealingKey,
    mosquitto: RunningBroker,
    tmp_path: Path,
) -> None:
    found = found_python(version)
    if found is None:
        pytest.skip(f"no Python {version} on this machine")
    python = make_environment(found, tmp_path / "env")
    for arguments in (FROM_LOCK, ("--no-deps", str(wheel))):
        assert not (complaint := install(python, *arguments)), complaint
    ended = subprocess.run(
        [python, "-c", TRAIN, str(device), coordinator_key.public.hex()], check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["heavy"] == []
    assert result["after"] < result["before"]
    helped = subprocess.run([python, "-m", "covey_edge", "--help"], check=True, capture_output=True, text=True)
    assert "agent" in helped.stdout
    assert "demo" not in helped.stdout
    print(f"\nPython {version}: {result['runtime']}, loss {result['before']:.4f} -> {result['after']:.4f}")
    kept = subprocess.run(
        [python, "-c", KEEP, str(device), coordinator_key.public.hex()], check=False, capture_output=True, text=True
    )
    assert kept.returncode == 0, kept.stderr[-2000:]
    answers = json.loads(kept.stdout)
    assert answers["model"].startswith("personal model")
    assert answers["right"][1] > answers["right"][0] + 0.2
    update = np.frombuffer((device / "update").read_bytes(), "<f4")
    for other, known in UPDATES.items():
        np.testing.assert_allclose(update, known, atol=1e-5, err_msg=f"{version} against {other}")
    UPDATES[version] = update
    assert check_set(python, bundle_set) == result["runtime"]
    assert result["runtime"].startswith("tflite_runtime" if version in ("3.9", "3.10", "3.11") else "ai_edge_litert")
    with np.load(device / "data.npz") as data:
        shard = Shard(data["x"].astype(np.float32), data["y"])
    covey = str(tmp_path / "env" / "bin" / "covey")
    reported = one_round([covey], tmp_path, mosquitto, (device / "bundle").read_bytes(), coordinator_key, shard)
    assert reported.outcome == "published"
    assert reported.change > 0.001
    assert f"with {result['runtime']} on Python {version}." in reported.log
    print(f"Python {version}: reported after {reported.seconds:.1f} s")
