"""Agents from real kits: installed without network on every Python, they train to TensorFlow's weights and report.

What a kit leaves out of its wheels is what these trainings did not need. Slow: needs a package index the first time;
for arm64 root, mmdebstrap and qemu-user-static as well (`arm64`).
"""

from __future__ import annotations

import shutil
import subprocess
import uuid
from pathlib import Path

import pytest
from arm64 import require_emulation, userland
from brokers import RunningBroker
from environments import found_python
from real_kits import MAKER, digits, real_kit, unpacked
from reporting import one_round
from runtime_set import check_set

from covey_deploy import installer
from covey_deploy.targets import Target, described, named
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.slow, pytest.mark.broker, pytest.mark.timeout(7200)]

LARGEST_MB = 85.0  # with tflite-runtime; ai-edge-litert is larger, docs/compatibility.md has the figures
IN_ROOT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}


def installed_mb(prefix: Path) -> float:
    tree = installer.Prefix(prefix).running()
    assert tree is not None
    return installer.size_of(tree) / 1e6


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.11", "3.12", "3.13"])
def test_an_agent_from_a_kit_trains_and_reports(
    version: str,
    everyday_set: Path,
    mosquitto: RunningBroker,
    digits_bundle: bytes,
    coordinator_key: SealingKey,
    tmp_path: Path,
) -> None:
    python = found_python(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    target = described(version, "x86_64", "2.36")
    kit = unpacked(real_kit(target), tmp_path / "kit")
    command = [python, "-I", str(kit / "install.py"), "--prefix", str(tmp_path / "opt")]
    ended = subprocess.run(
        [*command, "--release-key", MAKER.public.hex()],
        check=False,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert ended.returncode == 0, ended.stderr
    size = installed_mb(tmp_path / "opt")
    print(f"\nPython {version}, x86-64: {size:.1f} MB installed")
    assert size < target_bar(target)
    subprocess.run([*command, "--check"], check=True, stdout=subprocess.DEVNULL)
    runtime = check_set(str(tmp_path / "opt" / "bin" / "python"), everyday_set)
    covey = str(tmp_path / "opt" / "bin" / "covey")
    reported = one_round([covey], tmp_path, mosquitto, digits_bundle, coordinator_key, digits(200))
    assert reported.outcome == "published"
    assert reported.change > 0.001
    assert f"with {runtime} on Python {version}." in reported.log


def target_bar(target: Target) -> float:
    return LARGEST_MB if target.runtime == "tflite-runtime" else 100.0


@pytest.mark.parametrize("name", ["pios-bookworm-arm64", "pios-trixie-arm64"])
def test_an_agent_from_a_kit_trains_and_reports_on_arm64(
    name: str, mosquitto: RunningBroker, digits_bundle: bytes, coordinator_key: SealingKey, tmp_path: Path
) -> None:
    require_emulation()
    target = named(name)
    root = userland(name.split("-")[1], "dash", "coreutils")
    inside = root / "srv" / uuid.uuid4().hex
    unpacked(real_kit(target), inside / "kit")
    seen, chroot = Path("/") / inside.relative_to(root), [str(shutil.which("chroot")), str(root)]
    opt = seen / "opt"
    command = [*chroot, "/usr/bin/python3", str(seen / "kit" / "install.py"), "--prefix", str(opt)]
    try:
        subprocess.run([*command, "--release-key", MAKER.public.hex()], check=True, env=IN_ROOT)
        print(f"\n{name}: {installed_mb(inside / 'opt'):.1f} MB installed")
        assert installed_mb(inside / "opt") < target_bar(target)
        reported = one_round(
            [*chroot, str(opt / "bin" / "covey")],
            inside,
            mosquitto,
            digits_bundle,
            coordinator_key,
            digits(32),
            seen_as=seen / "pi",
            environment=IN_ROOT,
        )
        assert reported.outcome == "published"
        assert reported.change > 0.001
        assert f"on Python {target.python}." in reported.log
        print(f"{name}: reported after {reported.seconds:.0f} s")
    finally:
        shutil.rmtree(inside)
