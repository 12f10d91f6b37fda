"""What a demo run is asked to do, checked before anything starts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from covey_coordinator.aggregation.registry import make_rule
from covey_edge.mqtt import Broker, parse_broker
from covey_protocol.errors import ConfigError
from covey_protocol.topics import check_name

MIN_DEVICES = 2


@dataclass(frozen=True)
class DemoSettings:
    """data: a name or path as of `covey_models.load`. broker: None starts an embedded one.

    rule: the robust rule the plain mean is compared with. corrupted: how many devices are corrupted, and the rule's
    num_byzantine. alpha: of the Dirichlet partition; smaller is less alike.
    """

    data: str = "digits"
    broker: str | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    fleet: str = "demo"
    engine: str = "tff"
    rule: str = "multi-krum"
    rounds: int = 20
    devices: int = 10
    corrupted: int = 3
    alpha: float = 1.0
    seed: int = 0
    name: str = ""
    runs_dir: Path = Path("runs")

    def check(self) -> None:
        """ConfigError for what cannot work."""
        check_name(self.fleet, "fleet name")
        if self.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", self.name):
            raise ConfigError(f"run name {self.name!r} cannot be used", "use letters, digits, ., - and _")
        if self.devices < MIN_DEVICES:
            raise ConfigError(f"{self.devices} devices are no fleet", f"ask for at least {MIN_DEVICES}")
        if not 0 <= self.corrupted < self.devices:
            raise ConfigError(f"{self.corrupted} of {self.devices} devices cannot be corrupted", "lower --corrupted")
        if self.rounds < 1:
            raise ConfigError(f"{self.rounds} rounds train nothing", "ask for at least 1")
        if self.broker is not None:
            self.external_broker()

    def external_broker(self) -> Broker:
        """The user's own broker. ConfigError where its address or files cannot be used."""
        return parse_broker(self.broker or "", ca_file=self.ca_file, cert_file=self.cert_file, key_file=self.key_file)

    def check_rule(self) -> None:
        """ConfigError for an unknown rule, RuleError for one that cannot bear this fleet."""
        rule = make_rule(self.rule, self.num_byzantine)
        if rule.needs_trusted:
            raise ConfigError(
                f"the rule {self.rule!r} needs trusted data, of which the demo has none",
                "choose another, or try it with covey simulate (docs/trusted-data.md)",
            )
        if rule.expects_copies:
            raise ConfigError(
                f"the rule {self.rule!r} needs devices that share data, of which the demo has none",
                "choose another, or try it with covey simulate (docs/coded-redundancy.md)",
            )
        rule.check(self.devices)

    @property
    def num_byzantine(self) -> int:
        """What the robust rule is told. The mean bears nobody."""
        return 0 if self.rule == "mean" else self.corrupted

    @property
    def data_name(self) -> str:
        return Path(self.data).stem if self.data.endswith(".npz") else self.data

    def device_ids(self) -> list[str]:
        return [f"device-{number:02d}" for number in range(self.devices)]
