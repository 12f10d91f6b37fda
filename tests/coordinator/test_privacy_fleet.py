"""The privacy gate as its people meet it: `covey serve`, agents as processes, a Mosquitto; three rounds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brokers import RunningBroker
from click.testing import CliRunner
from patience import PATIENCE_S

from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses
from covey_coordinator.watching.history import opened
from covey_edge.cli_privacy import privacy
from covey_edge.leak_told import TOLD
from covey_edge.ledger import SPENT
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.broker, pytest.mark.fleet, pytest.mark.slow]

SERVE = """
fleet = "clinic"
run = "digits"
rounds = 3
bundle = "digits.covey"
key_file = "coordinator.pem"
[broker]
url = "{url}"
[round]
devices = 3
quorum = 1
[aggregation]
rule = "mean"
[privacy]
max_psnr_db = 60.0
min_examples = 40
[devices]
{devices}
"""
OWNERS: dict[str, dict[str, Any]] = {
    "spends": {"clip_norm": 0.1, "noise_multiplier": 2.0, "epsilon_limit": 7.0},  # two rounds
    "watches": {"max_psnr_db": 60.0},  # and has one example
    "bears": {},
}


def test_a_stopped_update_never_leaves_and_a_budget_ends(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey, mosquitto: RunningBroker
) -> None:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1), y.astype(np.int32)
    shards = {
        "spends": Shard(x[:60], y[:60]),
        "watches": Shard(x[60:61], y[60:61]),
        "bears": Shard(x[61:121], y[61:121]),
    }
    url = {"url": mosquitto.url}
    devices = [
        make_device(name, tmp_path / name, "clinic", url, coordinator_key.public, shards[name], privacy=OWNERS[name])
        for name in OWNERS
    ]
    (tmp_path / "digits.covey").write_bytes(digits_bundle)
    (tmp_path / "coordinator.pem").write_bytes(coordinator_key.pem())
    keys = "\n".join(f'{device.device_id} = "{device.public.hex()}"' for device in devices)
    path = tmp_path / "coordinator.toml"
    path.write_text(SERVE.replace("{url}", mosquitto.url).replace("{devices}", keys))
    agents = AgentProcesses({device.device_id: device.config for device in devices}, tmp_path / "logs")
    try:
        command = [sys.executable, "-m", "covey_edge", "serve", "--config", str(path)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    finally:
        agents.stop()
    assert ended.returncode == 0, ended.stderr
    assert "warning: [privacy] max_psnr_db with no audit" in ended.stdout

    # the coordinator: a fixed sentence, and what it could measure of those that came
    with opened(tmp_path / "runs" / "digits") as history:
        rounds, measured = history.status()["last_rounds"], history.leakage()
    reasons = [{one["device"]: one["reason"] for one in facts["not_used"]} for facts in rounds]
    assert [one["watches"] for one in reasons] == [f"failed: {TOLD}"] * 3
    assert "spends" not in reasons[0]
    assert "spends" not in reasons[1]
    assert SPENT in reasons[2]["spends"]
    assert [facts["checked"] for facts in measured] == [2, 2, 1]
    assert all(facts["max_rank_one"] < 0.99 for facts in measured)

    # the owners: why, and what is spent
    told = (tmp_path / "watches" / "state" / "stopped" / "stopped.txt").read_text()
    assert "max_psnr_db is 60" in told
    assert not list((tmp_path / "watches" / "state").glob("outbox/*"))
    assert facts_of(tmp_path / "watches")["exact_updates"] == 0
    assert facts_of(tmp_path / "bears")["exact_updates"] == 3
    spent = facts_of(tmp_path / "spends")
    assert spent["noised"] == {"2.0": 2}
    assert spent["epsilon"] == pytest.approx(6.57, abs=0.01)
    assert spent["rounds_left"] == 0


def facts_of(folder: Path) -> Any:
    return json.loads(CliRunner().invoke(privacy, ["--config", str(folder / "agent.toml"), "--json"]).output)
