"""The agent under a real systemd, booted in a container of this machine's own files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
DRIVER = """
[Service]
Type=oneshot
ExecStart={python} {driver} {tests} /facts/digits.covey /facts
StandardOutput=journal+console
TimeoutStartSec=15min
[Unit]
SuccessAction=poweroff-force
FailureAction=poweroff-force
"""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """This machine's files, of which nothing that is changed stays."""
    if os.geteuid() != 0 or shutil.which("systemd-nspawn") is None:
        pytest.skip("needs root and systemd-nspawn (Debian: apt install systemd-container)")
    base = tmp_path / "container"
    base.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(base)], check=True)
    try:
        for name in ("upper", "work", "root"):
            (base / name).mkdir()
        layers = f"lowerdir=/,upperdir={base}/upper,workdir={base}/work"
        if subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", layers, str(base / "root")], check=False
        ).returncode:
            pytest.skip("this kernel makes no overlay of /")
        yield base / "root"
        subprocess.run(["umount", str(base / "root")], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(base)], check=True)


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.fleet
@pytest.mark.timeout(1200)
def test_under_systemd_the_agent_trains_in_its_sandbox_is_watched_renews_itself_and_is_started_again(
    root: Path, digits_bundle: bytes, tmp_path: Path
) -> None:
    facts = tmp_path / "facts"
    facts.mkdir()
    (facts / "digits.covey").write_bytes(digits_bundle)
    service = root / "etc/systemd/system/driver.service"
    service.write_text(
        DRIVER.format(python=sys.executable, driver=Path(__file__).with_name("systemd_driver.py"), tests=TESTS)
    )
    for waits in ("systemd-networkd-wait-online", "NetworkManager-wait-online"):  # there is no network to wait for
        (service.parent / f"{waits}.service").symlink_to("/dev/null")
    (root / "etc/machine-id").unlink(missing_ok=True)
    (root / "root").chmod(0o755)  # where some keep their Pythons
    boot = ["-b", "systemd.unit=basic.target", "systemd.wants=driver.service"]
    command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network", "--link-journal=no"]
    binds = [f"--bind-ro={TESTS.parent}", f"--bind={facts}:/facts"]
    command += [*binds, "-D", str(root), "-M", f"covey-{os.getpid()}", *boot]
    with (tmp_path / "console").open("w") as console:
        container = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console)
        try:
            container.wait(1000)
        finally:
            while container.poll() is None:  # who kills it leaves what runs in it
                container.terminate()
                time.sleep(5)
    found = json.loads((facts / "facts.json").read_text())
    assert found["problem"] == "", found["journal"][-4000:]
    assert "there is no user covey" in found["without a user"]
    assert "covey-agent.service is written" in found["installed"]
    assert found["started"] == ["active", "waits for the next round", "covey"]
    assert found["sandbox"] == {"Seccomp": "2", "NoNewPrivs": "1", "CapEff": "0" * 16, "CapBnd": "0" * 16}
    assert found["state"] == ["0o700", "covey"]
    assert found["trained"] == found["trained after the update"] == "Offer"
    assert found["watchdog"]
    assert found["restarts after updates"] == "1"  # that of the watchdog: a renewal is no restart
    assert found["stopped"] == ["inactive", "success"]
    assert found["wrong configuration"] == ["failed", "2"]
    assert any("unknown field `nonsense`" in line for line in found["errors in the journal"])
