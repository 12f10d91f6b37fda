"""What a rule of copies asks of a run, checked before any device is asked. Imports no TensorFlow.

Whatever makes honest updates differ in a bit would make every round fail, so it is refused by its name here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from covey_coordinator.aggregation.draco import Draco
from covey_coordinator.aggregation.presteps import Before
from covey_coordinator.aggregation.rules import Rule
from covey_models.population import Device
from covey_protocol.errors import ConfigError


def check_equal_updates(rule: Rule, unequal: Mapping[str, tuple[Any, str]]) -> None:
    """ConfigError for the first of the settings that stands, if the rule counts on equal updates.

    unequal: setting -> (its value, "" or 0 for off; why it keeps honest updates from being equal).
    """
    if not rule.expects_copies:
        return
    for setting, (value, why) in unequal.items():
        if value:
            raise ConfigError(f"{rule.name} with {setting} = {value!r}: {why}", "leave it out, or choose another rule")


def check_replicas(rule: Rule, devices: Sequence[Device]) -> None:
    """ConfigError unless the devices of each of the rule's groups hold one shard of this population."""
    while isinstance(rule, Before):
        rule = rule.inner
    if not isinstance(rule, Draco):
        return
    shards = {device.device_id: device.replica for device in devices}
    for group in rule.groups:
        found = {shards[device_id] for device_id in group}
        if "" in found or len(found) > 1:
            raise ConfigError(
                f"{rule.name}: the devices {', '.join(group)} are a group and do not hold one shard",
                f'set partition = {{ kind = "replicated", replicas = {len(group)} }}, or name other groups',
            )
