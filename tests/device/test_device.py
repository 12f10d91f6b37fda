"""A whole device: a card of `covey flash` boots in qemu, installs itself, enrols, trains, loses its power and goes on.

`make test-device`. Everything is real but the processor: Debian for arm64 from packages, systemd, the kit,
tflite_runtime, Mosquitto with TLS and client certificates, `covey serve`. The Debian is made once and kept.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from house import DEVICE, House, booting, flash, make_house, running, until, verdicts

from covey_deploy import debian_image, emulator
from covey_deploy.boot_partition import open_boot
from covey_deploy.debian_image import MIB, build, root_offset
from covey_deploy.emulator import Machine
from covey_deploy.programs import found_program, require_programs
from covey_protocol.errors import MachineError
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.device, pytest.mark.broker, pytest.mark.timeout(9000)]

BOOT_S = 2400.0  # nothing takes so long but on a machine with a load of twenty
ROUND_S = 2400.0


@pytest.fixture(autouse=True)
def _needs() -> None:
    """All that is missing at once, before minutes of work."""
    try:
        require_programs({**emulator.PROGRAMS, **debian_image.PROGRAMS, "mosquitto": "mosquitto"})
    except MachineError as exc:
        pytest.fail(str(exc))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    (tmp_path / "card.img").unlink(missing_ok=True)  # 1.5 GB


class Told:
    """What happened when, in seconds since the beginning: the figures of docs/emulation.md."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, what: str) -> None:
        print(f"  {time.monotonic() - self._began:6.0f} s  {what}", flush=True)


def test_a_device_enrols_trains_loses_its_power_in_a_training_and_finishes(folder: Path) -> None:
    told = Told()
    build(say=told)
    told("the image of Debian is there")
    house = make_house(folder, rounds=2)
    card = flash(house, "--debian")
    with card.open("r+b") as file:
        file.truncate(2500 * MIB)  # a card that is larger than the image, as all are
    told("fleet, kit and card are made")
    broker = running(house, "broker", "broker", "run", "--fleet-folder", "home", ready="listening on")
    serve = running(house, "serve", "serve", "--config", "home/coordinator/coordinator.toml", ready="waiting for")
    with broker, booting(house, card) as machine, serve as coordinator:
        first_boot(machine, told)
        machine.wait_for("all is fetched, training begins", ROUND_S)
        told("it trains for the first round")
        began = time.monotonic()
        machine.wait_for(TRAINED, ROUND_S)
        training_s = time.monotonic() - began
        until(lambda: published(house) == 1, ROUND_S, "round 1")
        told("round 1 is published")

        machine.wait_for("all is fetched, training begins", ROUND_S)
        time.sleep(training_s / 3)
        assert progress(house) == [(2, DEVICE, "accepted", None)]  # nothing of its update is here
        assert not re.search(TRAINED, machine.unseen), "it had trained already, in a third of the time of the first"
        machine.power_cut()
        told("the power was cut in the training of the second round")
        machine.start()
        machine.wait_for(f"{DEVICE} connected to", BOOT_S)
        told("it is back after the power cut")
        machine.wait_for("all is fetched, training begins", ROUND_S)
        machine.wait_for(TRAINED, ROUND_S)
        assert coordinator.wait(ROUND_S) == 0, (folder / "serve.log").read_text()
        told("round 2 is published, the run has ended")
        assert machine.stop(180), "no orderly shutdown"
        told("it has shut down")

    rounds = house.rows("SELECT number, phase FROM rounds ORDER BY number")
    assert [number for number, phase in rounds if phase == "published"] == [1, 2]
    # where the broker missed the device before it was back, the second round was given up without it and opened anew
    assert [one for one in rounds if one[1] != "published"] in ([], [(2, "abandoned")])
    # one update of this device in each, taken and counted once, under one key: the roster has no other
    delivered = house.rows("SELECT round, id, status, sha256 FROM devices WHERE sha256 IS NOT NULL")
    assert [(device, status) for _, device, status, _ in delivered] == [(DEVICE, "accepted")] * 2
    assert len({round_id for round_id, *_ in delivered}) == len({sha256 for *_, sha256 in delivered}) == 2
    (facts,) = verdicts(house)
    assert (facts["device"], facts["accepted"], facts["rejected"]) == (DEVICE, 2, 0)
    no_secret_is_left_on_the_boot_partition(card, house)
    the_root_has_grown(card)


def test_cloud_init_makes_a_device_of_a_card_for_raspberry_pi_os_trixie(folder: Path) -> None:
    """The same user-data that a Raspberry Pi reads, by Debian's cloud-init and its NoCloud data source."""
    told = Told()
    image = build(cloud_init=True, say=told)
    told("the image of Debian with cloud-init is there")
    house = make_house(folder, rounds=1)
    card = flash(house, "--image", str(image))
    told("fleet, kit and card are made")
    broker = running(house, "broker", "broker", "run", "--fleet-folder", "home", ready="listening on")
    serve = running(house, "serve", "serve", "--config", "home/coordinator/coordinator.toml", ready="waiting for")
    with broker, booting(house, card) as machine, serve as coordinator:
        first_boot(machine, told)
        machine.wait_for(TRAINED, ROUND_S)
        assert coordinator.wait(ROUND_S) == 0, (folder / "serve.log").read_text()
        told("the round is published")
        assert machine.stop(180), "no orderly shutdown"
    assert house.rows("SELECT id, status FROM devices") == [(DEVICE, "accepted")]
    no_secret_is_left_on_the_boot_partition(card, house)


TRAINED = r"round \S+: trained on \d+ examples"


def first_boot(machine: Machine, told: Told) -> None:
    machine.wait_for("covey first boot: taking the device's identity", BOOT_S)
    told("it boots, and takes its identity")
    machine.wait_for("covey first boot: done", BOOT_S)
    told("the agent is installed")
    machine.wait_for(f"{DEVICE} connected to mqtts://10.0.2.2:", BOOT_S)
    told("it is enrolled: connected with its own certificate")


def published(house: House) -> int:
    return len(house.rows("SELECT number FROM rounds WHERE phase = 'published'"))


def progress(house: House) -> list[tuple[object, ...]]:
    query = "SELECT number, devices.id, progress, sha256 FROM devices JOIN rounds ON rounds.id = round"
    return house.rows(f"{query} WHERE phase NOT IN ('published', 'abandoned')")


def no_secret_is_left_on_the_boot_partition(card: Path, house: House) -> None:
    """Neither a file of covey's, nor a private key anywhere in the bytes of the partition."""
    with card.open("rb") as file:
        assert open_boot(file).names("covey") == ["first-boot.log"]
        file.seek(0)
        start = file.read(root_offset())
    secrets = [house.fleet / "devices" / DEVICE / name for name in ("key.pem", "seal.pem")]
    for path in secrets:
        inner = path.read_bytes().split(b"\n")[1]
        assert len(inner) > 40
        assert inner not in start, f"{path.name} can still be read from the card"
    assert SealingKey.from_pem(secrets[1].read_bytes())  # they are what we looked for


def the_root_has_grown(card: Path) -> None:
    place = f"{card}?offset={root_offset()}"
    ended = subprocess.run([str(found_program("dumpe2fs")), "-h", place], capture_output=True, text=True, check=True)
    facts = dict(line.split(":", 1) for line in ended.stdout.splitlines() if ":" in line)
    assert int(facts["Block count"]) * int(facts["Block size"]) > 2000 * MIB
