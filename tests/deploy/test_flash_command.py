"""`covey flash` as a user calls it, into image files: no root, no disk. Disks are in test_flash_safety.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kit_helpers import small_kit
from made_up_image import BOOKWORM, BOOT_START, make_image

from covey_deploy import provisioning
from covey_deploy.fat import Fat
from covey_deploy.fleet_folder import FleetFolder
from covey_deploy.provisioning import init, revoke
from covey_edge.cli import main
from covey_edge.config import load_agent
from covey_protocol.errors import EXIT_BUNDLE, EXIT_CONFIG
from covey_protocol.seals import SealingKey

PASSWORD = "correct horse battery"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> FleetFolder:
    folder = tmp_path_factory.mktemp("desk")
    made = init(folder / "home", "home", ["broker.lan"])
    release = SealingKey.from_pem(made.release_key_path.read_bytes(), "release")
    (folder / "here.kit").write_bytes(small_kit(key=release))
    (folder / "strange.kit").write_bytes(small_kit())
    make_image(folder / "pios.img", BOOKWORM)
    (folder / "wifi.txt").write_text(f"{PASSWORD}\n")
    return made


def flash(fleet: FleetFolder, *more: str, kit: str = "here.kit") -> object:
    desk = fleet.path.parent
    command = ["--image", str(desk / "pios.img"), "--fleet-folder", str(fleet.path), "--kit", str(desk / kit)]
    with pytest.raises(SystemExit) as ended:
        main(["flash", *command, *more])
    return ended.value.code


def boot_of(image: Path, name: str) -> bytes:
    with image.open("rb") as file:
        return Fat(file, BOOT_START).read(name) or b""


def test_a_series_makes_its_devices_and_goes_on_where_it_was_broken_off(
    fleet: FleetFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pi-2.img").write_bytes(b"somebody's")
    series = ("--id", "pi-{n}", "--count", "3", "--output", str(tmp_path / "{id}.img"))
    for more, code, done in (((), EXIT_CONFIG, ["pi-1"]), (("--yes",), 0, ["pi-1", "pi-2", "pi-3"])):
        assert flash(fleet, *series, *more) == code
        lines = (fleet.path / "flashed.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == done
    said = capsys.readouterr().err
    assert f"{tmp_path}/pi-2.img is there already" in said
    assert "1 of 3 cards are made already" in said
    assert fleet.device_ids() == done
    for device_id in done:
        image = tmp_path / f"{device_id}.img"
        assert image.stat().st_mode & 0o777 == 0o600
        assert f'device_id = "{device_id}"'.encode() in boot_of(image, "covey/device/agent.toml")
    assert flash(fleet, *series) == 0
    assert "made already; --again" in capsys.readouterr().out


def test_a_table_for_provision_makes_the_same_devices_here(fleet: FleetFolder, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,hostname,data_source,data_path\nden-pi,den,csv,/data/den.csv\n")
    assert flash(fleet, "--csv", str(tmp_path / "t.csv"), "--output", str(tmp_path / "den.img")) == 0
    assert load_agent(fleet.device("den-pi") / "agent.toml").config.data.path == "/data/den.csv"
    settings = boot_of(tmp_path / "den.img", "covey/device/agent.toml")
    assert b'source = "csv"\npath = "/data/den.csv"' in settings


def test_a_number_is_a_devices_id_as_well_as_the_authoritys(fleet: FleetFolder, tmp_path: Path) -> None:
    assert [one.id for one in fleet.issued() if one.role == "authority"] == ["1"]
    assert flash(fleet, "--id", "1", "--output", str(tmp_path / "1.img")) == 0
    assert "1" in fleet.device_ids()


def test_a_device_without_its_key_gets_no_card(
    fleet: FleetFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    provisioning.add_devices(fleet.path, [provisioning.NewDevice("keyless")])
    (fleet.device("keyless") / "key.pem").unlink()
    assert flash(fleet, "--id", "keyless", "--output", str(tmp_path / "x.img")) == EXIT_CONFIG
    assert "keyless/key.pem is not there" in capsys.readouterr().err
    assert not (tmp_path / "x.img").exists()


def test_the_wifi_password_is_neither_said_nor_kept(
    fleet: FleetFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wifi = ("--wifi", "home", "--wifi-password-file", str(fleet.path.parent / "wifi.txt"), "--wifi-country", "DE")
    assert flash(fleet, "--id", "hall", "--output", str(tmp_path / "hall.img"), *wifi) == 0
    said = capsys.readouterr()
    key = boot_of(tmp_path / "hall.img", "covey/wifi.nmconnection").split(b"psk=")[1].split()[0].decode()
    kept = (tmp_path / "hall.img").read_bytes() + (fleet.path / "flashed.jsonl").read_bytes()
    assert PASSWORD.encode() not in kept
    for secret in (PASSWORD, key):
        assert secret not in said.out + said.err


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--output", "x.img"), "give --id or --csv"),
        (("--id", "a"), "give --device or --output"),
        (("--id", "a", "--output", "x.img", "--device", "/dev/null"), "give --device or --output"),
        (("--id", "a", "--output", "x.img", "--debian"), "give --image or --debian"),
        (("--id", "a-{n}", "--count", "2", "--output", "x.img"), "write {id} in it"),
        (("--id", "a-{n}", "--count", "2", "--output", "{id}.img", "--hostname", "b"), "one name for several"),
        (("--id", "coordinator", "--output", "x.img"), "coordinator"),
        (("--id", "a", "--device", "/dev/null", "--yes"), "is not a disk"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_is_made(
    more: tuple[str, ...], complaint: str, fleet: FleetFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    before = fleet.issued()
    assert flash(fleet, *more) == EXIT_CONFIG
    assert complaint in capsys.readouterr().err
    assert fleet.issued() == before


def test_a_kit_that_the_fleets_release_key_has_not_sealed_goes_on_no_card(fleet: FleetFolder, tmp_path: Path) -> None:
    assert flash(fleet, "--id", "a", "--output", str(tmp_path / "x.img"), kit="strange.kit") == EXIT_BUNDLE
    assert list(tmp_path.iterdir()) == []


def test_a_revoked_device_gets_no_card(fleet: FleetFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = ("--id", "stolen", "--output", str(tmp_path / "x.img"))
    assert flash(fleet, *target) == 0
    revoke(fleet.path, "stolen", "key-compromise")
    assert flash(fleet, *target, "--yes") == EXIT_CONFIG
    assert "stolen is revoked" in capsys.readouterr().err
