"""The texts of fleet.toml, agent.toml and coordinator.toml, and changes of the roster in a coordinator.toml.

The operator owns these files once they are made: a change of the roster touches the lines of [devices] and no other.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from covey_deploy.fleet_folder import FleetFolder, FleetSettings, toml_value, url_host
from covey_edge.config import toml_content
from covey_protocol.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILES = 'ca_file = "ca.pem"\ncert_file = "cert.pem"\nkey_file = "key.pem"'


def fleet_text(settings: FleetSettings) -> str:
    lines = [
        "# Made by `covey provision init`; docs/provisioning.md. There is no secret in this file.",
        f"name = {toml_value(settings.name)}",
        "# public keys that devices pin",
        f"coordinator_key = {toml_value(settings.coordinator_key)}",
        f"release_key = {toml_value(settings.release_key)}",
        "",
        "[broker]  # names and addresses in its certificate; devices use the first",
        f"hosts = {toml_value(settings.broker.hosts)}",
        f"port = {settings.broker.port}",
        "",
        "[lifetimes]  # days, of certificates made from now on",
        *(f"{name} = {value:.12g}" for name, value in msgspec.structs.asdict(settings.lifetimes).items()),
    ]
    return "\n".join(lines) + "\n"


def agent_text(fleet: FleetFolder, device_id: str, data_source: str, data_path: str) -> str:
    return f"""\
# Made by `covey provision device {device_id}`. Every setting: docs/agent.md
device_id = {toml_value(device_id)}
fleet = {toml_value(fleet.name)}
state_dir = "/var/lib/covey"

[broker]
url = {toml_value(fleet.broker_url)}
{FILES}

[identity]
key_file = "seal.pem"
coordinator_key = {toml_value(fleet.settings.coordinator_key)}

[data]
source = {toml_value(data_source)}
path = {toml_value(data_path)}

[update]
release_key = {toml_value(fleet.settings.release_key)}
"""


def coordinator_text(settings: FleetSettings, bundle: str, bundle_key: str, num_devices: int) -> str:
    quorum, num_byzantine = bearable(num_devices)
    rule = f'rule = "multi-krum"\nnum_byzantine = {num_byzantine}' if num_byzantine else 'rule = "mean"'
    why = (
        ""
        if num_byzantine
        else "# the plain mean: from 6 devices on take a rule that bears wrong ones, docs/rules.md\n"
    )
    sealed = f"bundle_key = {toml_value(bundle_key)}  # whose seal the bundle has\n" if bundle_key else ""
    broker = settings.broker
    return f"""\
# Made by `covey provision init`. Every setting: docs/coordinator.md
fleet = {toml_value(settings.name)}
run = "first"
bundle = {toml_value(bundle)}
{sealed}key_file = "seal.pem"
rounds = 20

[broker]
url = "mqtts://{url_host(broker.hosts[0])}:{broker.port}"
{FILES}

[round]
devices = {num_devices}
quorum = {quorum}

[aggregation]
{why}{rule}

[devices]  # the roster; `covey provision device` adds lines
"""


def bearable(num_devices: int) -> tuple[int, int]:
    """The quorum and how many wrong devices multi-krum is told to bear: about one in five, and quorum > 2f + 2."""
    num_byzantine = max(0, min(num_devices // 5, (num_devices - 3) // 3))
    return num_devices - num_byzantine, num_byzantine


def with_devices(text: str, keys: Mapping[str, object], path: Path) -> str:
    """The text of a coordinator.toml whose roster also has these devices, or has these keys for them.

    keys: device -> public key, hex digits, or a list of two. ConfigError where the file's form does not allow it: the
    operator is told which lines to write.
    """
    lines = text.splitlines()
    heads = [number for number, line in enumerate(lines) if re.match(r"\s*\[devices\]\s*(#.*)?\Z", line)]
    if len(heads) == 1:
        start = heads[0] + 1
        end = next((n for n in range(start, len(lines)) if lines[n].lstrip().startswith("[")), len(lines))
        section = lines[start:end]
        for device_id, key in keys.items():
            _put(section, device_id, f"{device_id} = {toml_value(key)}")
        new = "\n".join([*lines[:start], *section, *lines[end:]]) + "\n"
        before = _parsed(text)
        if _parsed(new) == {**before, "devices": {**before.get("devices", {}), **keys}}:
            return new
    wanted = ", ".join(f"{device_id} = {toml_value(key)}" for device_id, key in keys.items())
    raise ConfigError(f"{path}: [devices] cannot be changed by a program", f"write into it yourself: {wanted}")


def roster(path: Path) -> dict[str, Any]:
    """[devices] as it stands: device -> a key or a list of two."""
    found: dict[str, Any] = toml_content(path).get("devices", {})
    return found


def _put(section: list[str], device_id: str, line: str) -> None:
    """In the place of the device's line, else after the last line that is not empty."""
    for number, old in enumerate(section):
        if re.match(rf"\s*[\"']?{re.escape(device_id)}[\"']?\s*=", old):
            section[number] = line
            return
    last = max((number for number, old in enumerate(section) if old.strip()), default=-1)
    section.insert(last + 1, line)


def _parsed(text: str) -> dict[str, Any]:
    try:
        return dict(tomllib.loads(text))
    except tomllib.TOMLDecodeError:
        return {}
