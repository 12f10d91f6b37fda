"""The systemd unit of one agent: text, and where it goes. docs/service.md says why each line is there.

Nothing here is needed while the agent runs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Optional

from covey_edge.config import Agent
from covey_edge.files import write_atomic
from covey_edge.policy import places
from covey_protocol.errors import EXIT_CONFIG, EXIT_MACHINE, ConfigError, MachineError

UNIT = "covey-agent.service"
FOLDER = Path("/etc/systemd/system")
SYSTEMD_RUNS = Path("/run/systemd/system")
HIDDEN = tuple(map(Path, ("/home", "/root", "/run/user")))  # what ProtectHome hides
_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")

TEXT = """\
# written by `covey agent unit`; docs/service.md explains it
[Unit]
Description=covey federated learning agent ({device_id})
Wants=network-online.target time-sync.target
After=network-online.target time-sync.target
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
User={user}
ExecStart={command}
TimeoutStartSec=15min
TimeoutStopSec=30
KillMode=mixed
WatchdogSec=3min
Restart=on-failure
RestartSec=15
RestartSteps=6
RestartMaxDelaySec=10min
RestartPreventExitStatus={hopeless}
UMask=0077
{writable}
# the training child is part of this: it reads this device's data and runs models that others made
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome={home}
PrivateTmp=yes
PrivateMounts=yes
DevicePolicy=closed
DeviceAllow=/dev/vcio rw
ProtectProc=invisible
ProtectClock=yes
ProtectHostname=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RemoveIPC=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""


def unit_text(agent: Agent, config_path: Path, user: str, python: Optional[str] = None) -> str:
    """The unit that runs this configuration. ConfigError for a name or a path that a unit cannot hold."""
    if not _NAME.fullmatch(user):
        raise ConfigError(f"user {user!r} cannot be used", "give the name of a system user, such as covey")
    python = python or lasting_python()
    config, state = config_path.resolve(), agent.state_dir.resolve()
    command = [python, "-m", "covey_edge.launcher", "--state", str(state), "--", "--config", str(config)]
    for part in command:
        _check(part)
    return TEXT.format(
        device_id=agent.config.device_id,
        user=user,
        command=" ".join(command),
        hopeless=f"{EXIT_CONFIG} {EXIT_MACHINE}",
        writable="\n".join([_state(state), *(f"ReadWritePaths=-{_check(str(path))}" for path in _databases(agent))]),
        home="read-only" if _in_homes([config, *_pythons(python), *_data(agent)]) else "yes",
    )


def lasting_python() -> str:
    """What starts the agent now and after an upgrade: this Python, or the starter of a kit's installation, which takes
    the version that counts (docs/kits.md)."""
    version = Path(sys.prefix)
    starter = version.parent.parent / "bin" / "python"
    from_kit = version.parent.name == "versions" and (version / "manifest.json").is_file() and starter.is_file()
    return str(starter) if from_kit else sys.executable


def _state(state: Path) -> str:
    """Where the agent may write. /var/lib is systemd's to make; another folder must be there."""
    if state.parent == Path("/var/lib"):
        return f"StateDirectory={state.name}\nStateDirectoryMode=0700"
    return f"ReadWritePaths={state}"


def _databases(agent: Agent) -> list[Path]:
    """Folders of SQLite files: who reads one while a recorder writes makes its -shm file (WAL)."""
    found = [place for place in places(agent.config.data) if place.source == "sqlite"]
    return sorted({(agent.folder / place.path).resolve().parent for place in found})


def _pythons(python: str) -> list[Path]:
    """Also what an environment is a link to."""
    return [Path(python), Path(python).resolve(), Path(sys.prefix), Path(sys.base_prefix)]


def _data(agent: Agent) -> list[Path]:
    return [agent.folder, *((agent.folder / place.path).resolve() for place in places(agent.config.data))]


def _in_homes(paths: Iterable[Path]) -> bool:
    return any(home in (path, *path.parents) for path in paths for home in HIDDEN)


def _check(part: str) -> str:
    # % and $ mean something to systemd, and quoting rules are not worth a wrong command
    if not re.fullmatch(r"[A-Za-z0-9/._+@:=-]+", part):
        raise ConfigError(f"{part!r} cannot stand in a unit", "use a path without spaces and special characters")
    return part


def install(text: str, user: str, folder: Path = FOLDER) -> Path:
    """Write the unit, and let systemd read it where it runs. MachineError where the user does not exist."""
    import pwd

    try:
        pwd.getpwnam(user)
    except KeyError as exc:
        make = f"useradd --system --home-dir /var/lib/covey --shell /usr/sbin/nologin {user}"
        raise MachineError(f"there is no user {user} on this machine", f"make one: {make}") from exc
    path = folder / UNIT
    write_atomic(path, text.encode())
    if SYSTEMD_RUNS.is_dir():
        ended = subprocess.run(["systemctl", "daemon-reload"], check=False, capture_output=True, text=True)
        if ended.returncode:
            raise MachineError(f"{path} is written, but systemctl daemon-reload failed ({ended.stderr.strip()})")
    return path
