"""The `covey` command: quick help, near names, one line and a documented code for every error."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from patience import PATIENCE_S

from covey_edge.runtime import installed
from covey_protocol import errors
from covey_protocol.seals import SealingKey

ROOT = Path(__file__).parent.parent.parent


def covey(*arguments: str, timeout: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "covey_edge", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)


def test_help_lists_every_command_of_the_desktop() -> None:
    ended = covey("--help")
    assert ended.returncode == 0
    for name in ("agent", "broker", "demo", "export", "inspect", "provision", "serve"):
        assert re.search(rf"^  {name} ", ended.stdout, re.MULTILINE), name
    assert "not completely installed" not in ended.stdout


@pytest.mark.parametrize("arguments", [("--help",), ("agent", "--help"), ("demo", "--help"), ("export", "--help")])
def test_help_never_imports_what_is_heavy(arguments: tuple[str, ...]) -> None:
    script = f"""
import sys
from covey_edge.cli import main
try:
    main({list(arguments)!r})
except SystemExit:
    pass
print("HEAVY", sorted({{"tensorflow", "numpy", "sklearn", "paho", "matplotlib"}} & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "HEAVY []" in ended.stdout


def test_a_mistyped_command_names_the_nearest() -> None:
    ended = covey("agnet")
    assert ended.returncode == errors.EXIT_CONFIG
    assert "agent" in ended.stderr


def test_a_missing_configuration_is_one_line_with_the_documented_code() -> None:
    ended = covey("agent", "--config", "/nonexistent/agent.toml")
    assert ended.returncode == errors.EXIT_CONFIG
    assert ended.stderr.count("\n") == 1
    assert "/nonexistent/agent.toml" in ended.stderr


def write_agent(folder: Path, data: str = "data.npz", url: str = "mqtt://127.0.0.1:1") -> str:
    key = SealingKey.generate()
    (folder / "device.pem").write_bytes(key.pem())
    (folder / "agent.toml").write_text(
        f'device_id = "pi"\nfleet = "home"\n[broker]\nurl = "{url}"\n[data]\npath = "{data}"\n'
        f'[identity]\nkey_file = "device.pem"\ncoordinator_key = "{key.public.hex()}"\n'
    )
    return str(folder / "agent.toml")


def test_an_agent_without_its_data_says_so_at_once(tmp_path: Path) -> None:
    ended = covey("agent", "--config", write_agent(tmp_path))
    assert ended.returncode == errors.EXIT_DATA
    assert ended.stderr.count("\n") == 1
    assert f"{tmp_path}/data.npz does not exist; check data.path" in ended.stderr


def test_an_agent_without_a_broker_names_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((3, 2)), y=np.zeros(3))
    ended = covey("agent", "--quiet", "--config", write_agent(tmp_path))
    assert ended.returncode == errors.EXIT_TRANSPORT
    assert ended.stderr.count("\n") == 1
    assert "mqtt://127.0.0.1:1 cannot be reached" in ended.stderr


def test_an_agent_says_at_its_start_what_it_trains_with(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((3, 2)), y=np.zeros(3))
    ended = covey("agent", "--config", write_agent(tmp_path))
    assert "data.npz holds 3 examples" in ended.stderr
    assert f"trains with {installed()[1]} on Python {platform.python_version()}" in ended.stderr
    assert re.search(r"(tflite_runtime|ai_edge_litert) \d+\.\d+", ended.stderr)


def test_every_exit_code_is_documented_and_every_documented_code_exists() -> None:
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    table = re.findall(r"^\| *(\d+) *\|", (ROOT / "docs" / "exit-codes.md").read_text(), re.MULTILINE)
    assert {int(code) for code in table} == codes
    assert len(table) == len(codes)


def test_the_embedded_broker_says_that_its_port_is_taken(tmp_path: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-m", "covey_edge", "broker", "run", "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    port = first.stdout.readline().strip().rpartition(":")[2]
    try:
        ended = covey("broker", "run", "--port", port)
        assert ended.returncode == errors.EXIT_TRANSPORT
        assert f"port {port} on 127.0.0.1 is in use" in ended.stderr
        assert "Traceback" not in ended.stderr
    finally:
        first.terminate()
        assert first.wait(10) == 0
        first.stdout.close()


def test_a_new_key_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "device.pem"
    ended = covey("provision", "key", str(path))
    assert re.fullmatch(r"[0-9a-f]{64}\n", ended.stdout)
    assert path.stat().st_mode & 0o777 == 0o600
    again = covey("provision", "key", str(path))
    assert again.returncode == errors.EXIT_CONFIG
    assert "exists" in again.stderr


def test_an_interrupt_ends_the_broker_quietly() -> None:
    broker = subprocess.Popen(
        [sys.executable, "-m", "covey_edge", "broker", "run", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert broker.stdout is not None
    broker.stdout.readline()
    time.sleep(0.2)
    broker.send_signal(2)
    _, error = broker.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in error
