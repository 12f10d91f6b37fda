"""`covey serve` as an operator runs it: from a TOML file, with agents as processes, stopped and started again."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from brokers import RunningBroker, retained
from patience import PATIENCE_S

from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses
from covey_coordinator.serve import CoordinatorConfig, _warn_of_sparse_rows
from covey_coordinator.store import RunStore
from covey_coordinator.watching.history import opened
from covey_edge.runtime import Model
from covey_protocol import errors
from covey_protocol.bundle import read_bundle
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.broker, pytest.mark.fleet]

CONFIG = """
fleet = "clinic"
run = "digits"
rounds = {rounds}
bundle = "digits.covey"
key_file = "coordinator.pem"
[broker]
url = "{url}"
[round]
devices = 3
quorum = 3
[aggregation]
rule = "trimmed-mean"
num_byzantine = 1
before = ["norm-clipping", { step = "bucketing", size = 1 }]
[server]
optimizer = "adam"
learning_rate = 0.01
[training]
learning_rate = 0.1
[devices]
{devices}
"""


@pytest.fixture
def clinic(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey, mosquitto: RunningBroker
) -> Iterator[Path]:
    """A folder with all that `covey serve` needs, and three running agents."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    devices = [
        make_device(
            name,
            tmp_path / name,
            "clinic",
            {"url": mosquitto.url},
            coordinator_key.public,
            Shard(x[i::15][:60], y[i::15][:60].astype(np.int32)),
        )
        for i, name in enumerate(("ward-1", "ward-2", "ward-3"))
    ]
    (tmp_path / "digits.covey").write_bytes(digits_bundle)
    (tmp_path / "coordinator.pem").write_bytes(coordinator_key.pem())
    keys = "\n".join(f'{device.device_id} = "{device.public.hex()}"' for device in devices)
    (tmp_path / "template").write_text(CONFIG.replace("{url}", mosquitto.url).replace("{devices}", keys))
    agents = AgentProcesses({device.device_id: device.config for device in devices}, tmp_path / "logs")
    yield tmp_path
    agents.stop()


def serve(folder: Path, rounds: int) -> subprocess.CompletedProcess[str]:
    path = folder / "coordinator.toml"
    path.write_text((folder / "template").read_text().replace("{rounds}", str(rounds)))
    command = [sys.executable, "-m", "covey_edge", "serve", "--config", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


def test_a_run_goes_on_after_its_newest_readable_checkpoint(clinic: Path, digits_bundle: bytes) -> None:
    first = serve(clinic, 2)
    assert first.returncode == 0, first.stderr
    assert "round 2/2 published: 3 of 3 updates" in first.stdout
    with opened(clinic / "runs" / "digits") as history:
        one, two = history.leakage()
    assert one["checked"] == two["checked"] == 3
    assert 0 < two["max_rank_one"] < 0.99  # sixty examples each
    assert two["chance"] == pytest.approx(1 / 3)  # each is compared with the round before
    assert 0 <= two["linkability_auc"] <= 1
    assert "linkability_auc" not in one
    store = RunStore(clinic / "runs" / "digits")
    model = Model(read_bundle(digits_bundle))
    found = store.newest_checkpoint("digits", 3818)
    assert found is not None
    assert found.number == 2
    assert found.state  # of Adam
    assert not np.array_equal(model.parameters(), found.parameters)
    store.close()
    damaged = store.checkpoints("digits") / "round-00007.f32"
    damaged.write_bytes(b"half a chec")
    second = serve(clinic, 3)
    assert "going on after round 2" in second.stdout
    assert "round 3/3 published" in second.stdout
    assert "round 1/3" not in second.stdout


def test_a_stop_by_the_service_manager_is_orderly(clinic: Path, mosquitto: RunningBroker) -> None:
    path = clinic / "coordinator.toml"
    path.write_text((clinic / "template").read_text().replace("{rounds}", "1000"))
    process = subprocess.Popen(
        [sys.executable, "-m", "covey_edge", "serve", "--config", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round 1/"):
            break
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == errors.EXIT_INTERRUPTED
    assert "Traceback" not in error, error[-3000:]
    with opened(clinic / "runs" / "digits") as history:
        noted = history.run()
    assert (noted["state"], noted["code"], noted["reason"]) == ("stopped", 130, "stopped by a signal")
    presence = [f"covey/1/clinic/device/ward-{number}/presence" for number in (1, 2, 3)]
    assert sorted(retained(mosquitto.port, "covey/1/clinic/#")) == presence  # the round and the model are gone


BAD = {
    "a mistyped key": ("devices = 3", "device = 3", errors.EXIT_CONFIG, "did you mean `devices`"),
    "a quorum above the devices": ("quorum = 3", "quorum = 4", errors.EXIT_CONFIG, "quorum"),
    "a misspelt rule": ('"trimmed-mean"', '"trimed-mean"', errors.EXIT_CONFIG, "did you mean 'trimmed-mean'"),
    "a misspelt pre-step": ('"norm-clipping"', '"normclipping"', errors.EXIT_CONFIG, "did you mean 'norm-clipping'"),
    "a misspelt key of the aggregation": ("before =", "befor =", errors.EXIT_CONFIG, "did you mean 'before'"),
    "a string for a number": ("size = 1", 'size = "1"', errors.EXIT_CONFIG, "size = '1', expected `int`"),
    "a truth value for a number": (
        "num_byzantine = 1",
        "num_byzantine = true",
        errors.EXIT_CONFIG,
        "[aggregation]: num_byzantine = True",
    ),
    "an aggregation without a rule": ('rule = "trimmed-mean"\n', "", errors.EXIT_CONFIG, "no key 'rule'"),
    "the table of before": ("[aggregation]", "[rule]", errors.EXIT_CONFIG, "write [aggregation] with rule ="),
    "a rule that the quorum cannot bear": ("num_byzantine = 1", "num_byzantine = 2", errors.EXIT_RULE, "trimmed-mean"),
    "fewer keys than devices": ("devices = 3", "devices = 4", errors.EXIT_CONFIG, "but [devices] holds"),
    "a missing bundle": ("digits.covey", "other.covey", errors.EXIT_CONFIG, "other.covey cannot be read"),
    "a device key that is none": ('ward-1 = "', 'ward-1 = "zz', errors.EXIT_CONFIG, "not a public key"),
    "a mistyped training setting": (
        "[devices]",
        "proximal_wieght = 0.1\n[devices]",
        errors.EXIT_CONFIG,
        "did you mean `proximal_weight`",
    ),
    "a negative clip norm": (
        "[devices]",
        "gradient_clip_norm = -1.0\n[devices]",
        errors.EXIT_CONFIG,
        "gradient_clip_norm",
    ),
    "FedProx with a bundle that cannot": (
        "[devices]",
        "proximal_weight = 0.1\n[devices]",
        errors.EXIT_CONFIG,
        "covey export --proximal",
    ),
    "a misspelt compression": (
        "[devices]",
        '[wire]\ncompression = "rotated-8bits"\n[devices]',
        errors.EXIT_CONFIG,
        "did you mean 'rotated-8bit'",
    ),
    "top-k without a fraction": (
        "[devices]",
        '[wire]\ncompression = "top-k"\n[devices]',
        errors.EXIT_CONFIG,
        "kept_fraction = 0",
    ),
    "asynchronous rounds without a goal": (
        "quorum = 3",
        "quorum = 3\nmax_staleness = 2",
        errors.EXIT_CONFIG,
        "max_staleness = 2 without a round.goal",
    ),
    "a goal below the quorum": ("quorum = 3", "quorum = 3\ngoal = 2", errors.EXIT_CONFIG, "goal = 2 is not between"),
    "a plan that states one example": (
        "[server]",
        "[privacy]\nmax_psnr_db = 30.0\n[server]",
        errors.EXIT_CONFIG,
        "refuses the plan",
    ),
    "an audit that is not there": (
        "[server]",
        '[privacy]\naudit = "verdict.json"\n[server]',
        errors.EXIT_CONFIG,
        "verdict.json cannot be read",
    ),
    "an unknown optimizer": ('"adam"', '"adamw"', errors.EXIT_CONFIG, "adam"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_one_line_with_the_documented_code(
    what: str, tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    old, new, code, words = BAD[what]
    text = CONFIG.replace("{url}", "mqtt://127.0.0.1:1").replace("{rounds}", "1")
    keys = "\n".join(f'ward-{number} = "{coordinator_key.public.hex()}"' for number in (1, 2, 3))
    text = text.replace("{devices}", keys)
    (tmp_path / "digits.covey").write_bytes(digits_bundle)
    (tmp_path / "coordinator.pem").write_bytes(coordinator_key.pem())
    (tmp_path / "template").write_text(text.replace(old, new))
    ended = serve(tmp_path, 1)
    assert ended.returncode == code, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("covey: error: ")
    assert words in last
    assert "Traceback" not in ended.stderr


def test_top_k_with_a_rule_that_sees_only_zeros_is_warned_of(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    keys = "\n".join(f'ward-{number} = "{coordinator_key.public.hex()}"' for number in (1, 2, 3))
    text = CONFIG.replace("{url}", "mqtt://127.0.0.1:1").replace("{devices}", keys)
    text = text.replace("[devices]", '[wire]\ncompression = "top-k"\nkept_fraction = 0.1\n[devices]')
    (tmp_path / "digits.covey").write_bytes(digits_bundle)
    (tmp_path / "coordinator.pem").write_bytes(coordinator_key.pem())
    (tmp_path / "template").write_text(text)
    warned = serve(tmp_path, 1)
    assert warned.returncode == errors.EXIT_TRANSPORT, warned.stderr  # there is no broker
    assert "warning: trimmed-mean sees mostly zeros in top-k updates" in warned.stdout
    for change in (('["norm-clipping"', '["nnm", "norm-clipping"'), ('rule = "trimmed-mean"', 'rule = "krum"')):
        said: list[str] = []
        filled = text.replace("{rounds}", "1").replace(*change)
        _warn_of_sparse_rows(msgspec.toml.decode(filled, type=CoordinatorConfig), said.append)
        assert said == []
