"""`covey key`, and what is durable of retired keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from covey_edge.cli_key import key as command
from covey_edge.config import load_agent
from covey_edge.retired import RetiredKeys
from covey_protocol.bundle import read_bundle
from covey_protocol.errors import BundleError, ConfigError, StorageError
from covey_protocol.seals import PublicKey, SealingKey

KEY = SealingKey.from_seed(bytes(32))
OTHER = SealingKey.from_seed(bytes([1]) * 32)
AGENT = """
device_id = "kitchen-pi"
fleet = "home"
[broker]
url = "mqtt://localhost"
[identity]
key_file = "device.pem"
coordinator_key = {coordinator}
[data]
path = "data.npz"
"""


def call(*arguments: Any) -> str:
    result = CliRunner().invoke(command, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "device.pem").write_bytes(KEY.pem())
    (tmp_path / "agent.toml").write_text(AGENT.format(coordinator=json.dumps(OTHER.public.hex())))
    return tmp_path


def public(path: Path) -> PublicKey:
    return SealingKey.from_pem(path.read_bytes()).public


def test_a_key_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "device.pem"
    assert call("make", path).strip() == public(path).hex()
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="exists"):
        call("make", path)


def test_the_next_key_lies_beside_the_current_one_and_the_roster_line_names_both(folder: Path) -> None:
    said = call("next", "--config", folder / "agent.toml")
    assert (folder / "device.pem").read_bytes() == KEY.pem()
    new = public(folder / "device-2.pem")
    assert f'kitchen-pi = ["{KEY.public.hex()}", "{new.hex()}"]' in said
    assert 'key_file = "device-2.pem"' in said
    call("next", "--config", folder / "agent.toml")  # a second one overwrites nothing
    assert public(folder / "device-2.pem") == new
    assert public(folder / "device-3.pem") != new


def test_the_coordinators_next_key_is_told_with_what_the_devices_must_pin(folder: Path) -> None:
    (folder / "coordinator.toml").write_text('fleet = "home"\nkey_file = "device.pem"\n')
    said = call("next", "--config", folder / "coordinator.toml")
    new = public(folder / "device-2.pem")
    assert f'coordinator_key = ["{KEY.public.hex()}", "{new.hex()}"]' in said
    assert f'key_file = "device-2.pem", bundle_key = "{KEY.public.hex()}"' in said


def test_a_file_without_a_key_is_an_error(folder: Path) -> None:
    (folder / "other.toml").write_text('fleet = "home"\n')
    with pytest.raises(ConfigError, match="names no key_file"):
        call("next", "--config", folder / "other.toml")


def test_a_bundle_is_resealed_and_otherwise_stays_as_it_is(folder: Path) -> None:
    from handmade_bundles import linear_bundle

    (folder / "a.covey").write_bytes(linear_bundle(KEY))
    (folder / "new.pem").write_bytes(OTHER.pem())
    arguments = ("--sealed-by", KEY.public.hex(), "--key", folder / "new.pem", "-o", folder / "b.covey")
    call("reseal", folder / "a.covey", *arguments)
    before, after = (read_bundle((folder / name).read_bytes()) for name in ("a.covey", "b.covey"))
    assert after == before
    read_bundle((folder / "b.covey").read_bytes(), OTHER.public)
    with pytest.raises(BundleError, match="seal"):
        read_bundle((folder / "b.covey").read_bytes(), KEY.public)
    with pytest.raises(ConfigError, match="exists"):
        call("reseal", folder / "a.covey", *arguments)
    with pytest.raises(BundleError, match="seal"):  # not by whom the operator thinks
        call("reseal", folder / "b.covey", *arguments[:4], "-o", folder / "c.covey")


def test_a_bundle_opens_with_one_of_two_keys(folder: Path) -> None:
    from handmade_bundles import linear_bundle

    data = linear_bundle(KEY)
    assert read_bundle(data, (KEY.public, OTHER.public)).sealed
    assert read_bundle(data, (OTHER.public, KEY.public)).sealed
    with pytest.raises(BundleError, match="seal"):
        read_bundle(data, (OTHER.public,))


def test_an_agent_pins_one_coordinator_key_or_two(folder: Path) -> None:
    path = folder / "agent.toml"
    assert load_agent(path).coordinators == (OTHER.public,)
    two = json.dumps([OTHER.public.hex(), KEY.public.hex()])
    path.write_text(AGENT.format(coordinator=two))
    assert load_agent(path).coordinators == (OTHER.public, KEY.public)
    path.write_text(AGENT.format(coordinator="[]"))
    with pytest.raises(ConfigError, match="0 keys for the coordinator"):
        load_agent(path)


# --- retired keys


def test_what_was_retired_stays_so(tmp_path: Path) -> None:
    path = tmp_path / "state" / "retired.json"
    retired = RetiredKeys(path)
    assert retired.of("a") == frozenset()
    retired.retire("a")([KEY.public])
    retired.retire("a")([KEY.public, OTHER.public])
    retired.retire("b")([KEY.public])
    assert retired.of("a") == {KEY.public, OTHER.public}
    again = RetiredKeys(path)
    assert (again.of("a"), again.of("b"), again.of("c")) == ({KEY.public, OTHER.public}, {KEY.public}, set())
    assert json.loads(path.read_text())["a"] == [KEY.public.hex(), OTHER.public.hex()]


@pytest.mark.parametrize("content", ["", "[1]", '{"a": [1]}', '{"a": ["00"'])
def test_a_damaged_list_is_an_error_and_not_an_empty_one(content: str, tmp_path: Path) -> None:
    (tmp_path / "retired.json").write_text(content)
    with pytest.raises(StorageError, match="damaged"):
        RetiredKeys(tmp_path / "retired.json")
