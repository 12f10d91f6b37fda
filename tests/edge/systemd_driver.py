"""Runs inside a booted systemd as root (test_systemd.py): installs the agent's unit, and writes down what happens.

Arguments: the folder of the tests, a bundle, a folder for the facts. It expects to be alone on the machine.
"""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

TESTS, BUNDLE, OUT = map(Path, sys.argv[1:4])
sys.path[:0] = [str(TESTS), str(TESTS / "edge")]

import numpy as np  # noqa: E402
from brokers import start_mosquitto, stop_broker  # noqa: E402
from release_helpers import DEVICE, agent_files, as_file, released, wheel, write_device  # noqa: E402

from covey_coordinator.fleet import Fleet  # noqa: E402
from covey_edge.mqtt import parse_broker  # noqa: E402
from covey_protocol.bundle import read_bundle  # noqa: E402
from covey_protocol.device import needed_capabilities  # noqa: E402
from covey_protocol.messages import Failure, Invitation, Offer, TrainingPlan  # noqa: E402
from covey_protocol.seals import SealingKey  # noqa: E402

UNIT = "covey-agent.service"
COVEY = [sys.executable, "-m", "covey_edge"]
COORDINATOR = SealingKey.from_seed(b"coordinator".ljust(32, b"."))
FIRST = "from __future__ import annotations\n"
FACTS: dict[str, object] = {}
PATIENCE_S = 120.0


def run(*command: str, fails: bool = False) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode and not fails:
        raise RuntimeError(f"{' '.join(command)}: {ended.stdout}{ended.stderr}")
    return ended.stdout + (ended.stderr if fails else "")


def shown(name: str) -> str:
    return run("systemctl", "show", "-P", name, UNIT).strip()


def until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > end:
            raise RuntimeError(f"it did not happen: {what}")
        time.sleep(0.2)


def running(version: str) -> bool:
    asked = run(*COVEY, "agent", "status", "--json", "--config", str(CONFIG), fails=True)
    try:
        update = json.loads(asked)["sections"]["update"]
    except (ValueError, KeyError):
        return False
    return update["version"] == version and not update["on_trial"]


def train(url: str) -> str:
    """One round; what the device said at its end."""
    bundle = BUNDLE.read_bytes()
    manifest, plan = read_bundle(bundle).manifest, TrainingPlan(1, 0.1)
    fleet = Fleet(parse_broker(url), "home", COORDINATOR, {"kitchen-pi": DEVICE.public})
    fleet.connect()
    try:
        parameters = np.linspace(-0.2, 0.2, manifest.dimension, dtype=np.float32).tobytes()
        refs = fleet.publish_blob(bundle), fleet.publish_blob(parameters)
        requires = needed_capabilities(manifest, plan)
        fleet.publish_round(Invitation(f"r.1.{time.time_ns():x}", 1, 0, 90_000, *refs, plan, requires=requires))
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            heard = fleet.next(1.0)
            if heard is not None and isinstance(heard.message, (Offer, Failure)):
                return type(heard.message).__name__ + getattr(heard.message, "reason", "")
        return "nothing"
    finally:
        fleet.close()


def drop_in(*lines: str) -> None:
    folder = Path("/etc/systemd/system") / f"{UNIT}.d"
    folder.mkdir(exist_ok=True)
    (folder / "test.conf").write_text("\n".join(["[Service]", *lines, ""]))
    run("systemctl", "daemon-reload")


CONFIG = Path("/etc/covey/agent.toml")


def main() -> None:
    folder = Path("/srv")
    broker = start_mosquitto(folder)
    write_device(CONFIG.parent, broker.url, COORDINATOR)
    text = CONFIG.read_text().replace("[broker]", 'state_dir = "/var/lib/covey"\n[broker]', 1)
    CONFIG.write_text(f'{text}\n[privacy]\nscreen_models = "off"\n')  # the parameters are no model's
    arguments = ("agent", "unit", "--install", "--config", str(CONFIG))
    FACTS["without a user"] = run(*COVEY, *arguments, fails=True)
    run("useradd", "--system", "--home-dir", "/var/lib/covey", "--shell", "/usr/sbin/nologin", "covey")
    owner = pwd.getpwnam("covey")
    for path in [CONFIG.parent, *CONFIG.parent.iterdir()]:
        os.chown(path, owner.pw_uid, owner.pw_gid)
        path.chmod(0o700 if path.is_dir() else 0o600)
    FACTS["installed"] = run(*COVEY, *arguments)
    launcher = next(line for line in Path(f"/etc/systemd/system/{UNIT}").read_text().splitlines() if "launcher" in line)
    quick = launcher.replace("--state", "--healthy-for 3 --pause 0.5 --state").partition("=")[2]
    drop_in("WatchdogSec=20", "RestartSec=1", "ExecStart=", f"ExecStart={quick}")

    run("systemctl", "start", UNIT)  # returns when it is ready
    until(lambda: bool(shown("StatusText")), "a word of how it is")
    FACTS["started"] = [shown("ActiveState"), shown("StatusText")[:24], shown("User")]
    process = Path("/proc") / shown("MainPID")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    FACTS["sandbox"] = {name: status[name].strip() for name in ("Seccomp", "NoNewPrivs", "CapEff", "CapBnd")}
    FACTS["state"] = [oct(Path("/var/lib/covey").stat().st_mode & 0o777), Path("/var/lib/covey").owner()]
    FACTS["trained"] = train(broker.url)

    os.kill(int(shown("MainPID")), 19)  # SIGSTOP: it hangs
    until(lambda: shown("NRestarts") == "1" and shown("ActiveState") == "active", "a restart of a hung agent")
    FACTS["watchdog"] = "Watchdog timeout" in run("journalctl", "-u", UNIT, "--no-pager")

    broken = wheel(agent_files("0.2.0", {"covey_edge/agent.py": (FIRST, f"{FIRST}raise SystemExit(2)\n")}), "0.2.0")
    mended = wheel(agent_files("0.2.1"), "0.2.1")
    for made, serial, then in ((broken, 1, "0.1.0"), (mended, 2, "0.2.1")):
        file = folder / f"{serial}.covey-release"
        file.write_bytes(as_file(released(made, serial=serial), made))
        FACTS[f"given {serial}"] = run(*COVEY, "agent", "update", "--config", str(CONFIG), str(file))
        boot = Path("/var/lib/covey/releases/boot.json")
        word = {"0.1.0": '"0.2.0 ended with code 2"', "0.2.1": '"current": "0.2.1"'}[then]
        until(lambda word=word, boot=boot: boot.exists() and word in boot.read_text(), f"release {serial}")
        until(lambda then=then: running(then), f"{then} after release {serial}")
    FACTS["restarts after updates"] = shown("NRestarts")
    FACTS["trained after the update"] = train(broker.url)

    stop_broker(broker)
    run("systemctl", "restart", "--no-block", UNIT)
    until(lambda: int(shown("NRestarts")) >= 2, "restarts without a broker")
    broker = start_mosquitto(folder, port=broker.port)
    until(lambda: shown("ActiveState") == "active", "active when the broker is back")
    run("systemctl", "stop", UNIT)
    FACTS["stopped"] = [shown("ActiveState"), shown("Result")]
    CONFIG.write_text("nonsense = 1\n" + CONFIG.read_text())
    run("systemctl", "start", UNIT, fails=True)
    until(lambda: shown("ActiveState") == "failed", "a wrong configuration is not tried again")
    time.sleep(3)
    FACTS["wrong configuration"] = [shown("ActiveState"), shown("ExecMainStatus")]
    lines = run("journalctl", "-u", UNIT, "--no-pager", "-p", "err", "-o", "cat").splitlines()
    FACTS["errors in the journal"] = [line for line in lines if line.startswith("covey: error")]
    FACTS["journal"] = run("journalctl", "-u", UNIT, "--no-pager", "-o", "cat")


try:
    main()
    FACTS["problem"] = ""
except BaseException:
    FACTS["problem"] = traceback.format_exc()
    FACTS["journal"] = run("journalctl", "-u", UNIT, "--no-pager", fails=True)
OUT.joinpath("facts.json").write_text(json.dumps(FACTS, indent=1))
