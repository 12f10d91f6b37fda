"""What keeps honest updates from being equal is refused by its name, before any device is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from covey_coordinator.demo.settings import DemoSettings
from covey_coordinator.grid.settings import GridSettings, plan_of
from covey_coordinator.serve import serve
from covey_protocol.errors import ConfigError, CoveyError
from covey_protocol.seals import SealingKey

CONFIG = """
fleet = "clinic"
run = "copies"
rounds = 1
bundle = "digits.covey"
key_file = "coordinator.pem"
[broker]
url = "mqtt://127.0.0.1:1"
[round]
devices = 3
quorum = 3
#round
[aggregation]
rule = "draco"
num_byzantine = 1
#aggregation
[training]
#training
[wire]
#wire
[devices]
"""

REFUSED = {
    # what: (section, its line, what is said)
    "a sample": ("round", "sample = 3", "draco with round.sample = 3"),
    "a goal": ("round", "goal = 3", "draco with round.goal = 3"),
    "asynchronous rounds": ("round", "goal = 3\nmax_staleness = 2", "draco with round.goal = 3"),
    "compression": ("wire", 'compression = "rotated-8bit"', "draco with wire.compression = 'rotated-8bit'"),
    "top-k": ("wire", 'compression = "top-k"\nkept_fraction = 0.1', "draco with wire.compression = 'top-k'"),
    "another algorithm": (
        "training",
        'algorithm = "fsvrg-naive"\nlocal_steps = 2',
        "with training.algorithm = 'fsvrg-",
    ),
    "a group of a stranger": ("aggregation", 'groups = [["a", "b", "x"]]', "'x', which is not in the fleet"),
    "groups that leave a device out": ("aggregation", 'groups = [["a", "b"]]', "'c' is in no group"),
    "groups too small": ("aggregation", "group_size = 1", "needs 2f \\+ 1 devices in a group"),
    "a step that mixes": ("aggregation", 'before = ["nnm"]', "counts on equal updates, and nnm mixes them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_could_never_have_equal_updates_does_not_start(
    case: str, tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    section, line, told = REFUSED[case]
    keys = "".join(f'{name} = "{SealingKey.generate().public.hex()}"\n' for name in "abc")
    (tmp_path / "digits.covey").write_bytes(digits_bundle)
    (tmp_path / "coordinator.pem").write_bytes(coordinator_key.pem())
    (tmp_path / "coordinator.toml").write_text(CONFIG.replace(f"#{section}\n", line + "\n") + keys)
    with pytest.raises(CoveyError, match=told) as refused:
        serve(tmp_path / "coordinator.toml", print)
    assert isinstance(refused.value, ConfigError) or "groups too small" in case


def test_where_no_devices_share_data_the_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match="'draco' needs devices that share data, of which the demo has none"):
        DemoSettings(rule="draco").check_rule()
    with pytest.raises(ConfigError, match="'draco' needs devices that share data, of which a grid has none"):
        plan_of(GridSettings(rules=("draco",)))
    assert any(note.startswith("draco is left out") for note in plan_of(GridSettings()).notes)
