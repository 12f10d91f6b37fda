"""The systemd unit: what systemd says of it, and what it says of this device."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from patience import PATIENCE_S
from release_helpers import write_device

from covey_edge.cli import covey
from covey_edge.config import load_agent
from covey_edge.unit import UNIT, install, unit_text
from covey_protocol.errors import ConfigError, MachineError
from covey_protocol.seals import SealingKey


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_device(tmp_path / "device", "mqtt://127.0.0.1:1", SealingKey.from_seed(b"c".ljust(32, b".")))


def text_of(config: Path, state: str = "", python: str = "/opt/covey/bin/python") -> str:
    if state:
        config.write_text(f'state_dir = "{state}"\n{config.read_text()}')
    return unit_text(load_agent(config), config, "covey", python)


@pytest.mark.parametrize("state", ["", "/var/lib/covey"])
def test_systemd_finds_no_fault_and_little_exposure(config: Path, tmp_path: Path, state: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian: apt install systemd)")
    path = tmp_path / UNIT
    path.write_text(text_of(config, state, sys.executable))
    analyze = ["systemd-analyze", "--no-pager"]
    asked = [*analyze, "security", "--offline=true", "--threshold=30", str(path)]  # of 100: an exposure of 3.0
    ended = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert ended.returncode == 0, ended.stdout
    verified = subprocess.run([*analyze, "verify", str(path)], capture_output=True, text=True, check=False)
    # what systemd 254 knows and 252 passes over: the time between restarts grows
    faults = [
        line for line in verified.stderr.splitlines() if "RestartSteps" not in line and "RestartMaxDelay" not in line
    ]
    assert faults == []


def test_it_starts_the_launcher_of_this_covey_with_this_state(config: Path) -> None:
    command = "/opt/covey/bin/python -m covey_edge.launcher --state /var/lib/covey -- --config"
    text = text_of(config, "/var/lib/covey")
    assert f"ExecStart={command} {config}\n" in text
    assert "User=covey\n" in text


def test_systemd_makes_the_state_where_it_may_and_opens_it_elsewhere(config: Path) -> None:
    assert f"ReadWritePaths={config.parent}/state\n" in text_of(config)
    assert "StateDirectory=covey\nStateDirectoryMode=0700\n" in text_of(config, "/var/lib/covey")


def test_folders_of_databases_are_writable(config: Path) -> None:
    """In a read-only folder SQLite cannot open a database in WAL mode that nobody else has open."""
    text = config.read_text().replace('path = "data.npz"', 'source = "sqlite"\npath = "/srv/readings/room.sqlite"')
    config.write_text(f"{text}\n[data.options]\ntable = 'readings'\nlabel = 'y'\n")
    assert "ReadWritePaths=-/srv/readings\n" in text_of(config, "/var/lib/covey")


def test_homes_are_hidden_unless_something_of_the_agent_lies_there(config: Path) -> None:
    hidden = "ProtectHome=yes\n" in text_of(config, "/var/lib/covey", "/usr/bin/python3")
    of_this_python = any(
        str(Path(one).resolve()).startswith(("/root", "/home")) for one in (sys.prefix, sys.base_prefix)
    )
    assert hidden is not of_this_python
    assert "ProtectHome=read-only\n" in text_of(config, python="/home/pi/covey/.venv/bin/python")


def test_names_and_paths_that_mean_something_to_systemd_are_refused(config: Path) -> None:
    with pytest.raises(ConfigError, match="user 'a b' cannot be used"):
        unit_text(load_agent(config), config, "a b")
    for python in ("/opt/my covey/python", "/opt/%h/python", "/opt/$X/python", "/opt/a\nb"):
        with pytest.raises(ConfigError, match="cannot stand in a unit"):
            text_of(config, python=python)


def test_it_is_installed_for_a_user_who_exists(config: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"useradd --system .* nobody-of-that-name"):
        install("x", "nobody-of-that-name", tmp_path)
    if Path("/run/systemd/system").is_dir():
        pytest.skip("systemd runs here, and a test is not to reload it")
    assert install("text", "root", tmp_path).read_text() == "text"


def test_the_command_prints_it(config: Path) -> None:
    printed = CliRunner().invoke(
        covey, ["agent", "--config", str(config), "unit", "--user", "pi"], catch_exceptions=False
    )
    assert "User=pi\n" in printed.output
    assert f"--config {config}\n" in printed.output


def test_a_unit_from_a_kits_installation_holds_over_upgrades(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "opt"
    version = prefix / "versions" / "0.1.0-abc"
    for path in (version / "manifest.json", prefix / "bin" / "python"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    text = unit_text(load_agent(config), config, "covey")
    assert f"ExecStart={sys.executable} -m covey_edge.launcher" in text
    monkeypatch.setattr(sys, "prefix", str(version))
    text = unit_text(load_agent(config), config, "covey")
    assert f"ExecStart={prefix}/bin/python -m covey_edge.launcher" in text
