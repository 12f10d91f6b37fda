"""`covey flash`: cards that become devices of a fleet at their first boot. docs/flashing.md.

Parses, asks, and calls; what is done is in card, prepared, disks, card_writing and series.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import click

from covey_protocol.errors import ConfigError

if TYPE_CHECKING:
    from covey_deploy.card import Card, Login, System, Wifi
    from covey_deploy.device_table import Wanted
    from covey_deploy.disks import Disk, Machine
    from covey_deploy.fleet_folder import FleetFolder
    from covey_deploy.kit import Kit
    from covey_deploy.prepared import Base, Prepared

FILE = click.Path(path_type=Path)
FIXED = "Allow a disk that is built in."
LARGE = "Allow a disk of more than 256 GB."


@dataclass(frozen=True)
class Options:
    """What the command line says; docs/flashing.md has each."""

    image: Optional[Path]
    debian: bool
    sha256: str
    device: Optional[Path]
    output: str
    fleet: Optional[Path]
    kit: Optional[Path]
    device_id: str
    hostname: str
    count: int
    first: int
    csv: Optional[Path]
    wifi: str
    wifi_password_file: Optional[Path]
    wifi_country: str
    user: str
    ssh_keys: tuple[Path, ...]
    data: Optional[Path]
    passphrase_file: Optional[Path]
    journal: Optional[Path]
    again: bool
    fixed_disk: bool
    large_disk: bool
    verify: bool
    yes: bool


@click.command(name="flash", short_help="Make cards that become devices of a fleet.")
@click.option("--image", type=FILE, help="Raspberry Pi OS, 64-bit: .img, .img.xz, .img.gz or .img.zst.")
@click.option("--debian", is_flag=True, help="Build a Debian arm64 image instead (covey emulate boots it).")
@click.option("--sha256", default="", metavar="HEX", help="Of the image file, as its maker publishes it.")
@click.option("--device", type=FILE, help="The card, a whole disk such as /dev/sdX. It is erased.")
@click.option("--output", default="", metavar="FILE", help="Write an image file instead; {id} is the device's.")
@click.option("--fleet-folder", "fleet", type=FILE, help="The folder that `covey provision init` made.")
@click.option("--kit", type=FILE, help="The agent for this system: covey bundle.")
@click.option("--id", "device_id", default="", help="The device; with --count a pattern such as pi-{n:03}.")
@click.option("--hostname", default="", help="Default: the id.")
@click.option("--count", type=click.IntRange(1, 10_000), default=1, help="So many cards, one after the other.")
@click.option("--first", type=click.IntRange(0), default=1, show_default=True, help="The first number of --count.")
@click.option("--csv", type=FILE, help="A table of devices: docs/flashing.md has its columns.")
@click.option("--wifi", default="", metavar="SSID", help="Asks for the password, unless a file has it.")
@click.option("--wifi-password-file", type=FILE, help="Its first line is the password.")
@click.option("--wifi-country", default="", metavar="XX", help="Where the device is, such as DE.")
@click.option("--user", default="pi", show_default=True, help="Who may log in with --ssh-key.")
@click.option("--ssh-key", "ssh_keys", type=FILE, multiple=True, help="A public key; without one nobody logs in.")
@click.option("--data", type=FILE, help="The device's data, which become data.path of its configuration.")
@click.option("--passphrase-file", type=FILE, help="Of the fleet's authority, where new devices are made.")
@click.option("--journal", type=FILE, help="Of a series. Default: flashed.jsonl in the fleet's folder.")
@click.option("--again", is_flag=True, help="Also devices whose cards the journal knows.")
@click.option("--fixed-disk", is_flag=True, help=FIXED)
@click.option("--large-disk", is_flag=True, help=LARGE)
@click.option("--verify/--no-verify", default=True, show_default=True, help="Read the card back and compare.")
@click.option("--yes", is_flag=True, help="Do not ask before the card is erased. For scripts.")
@click.option("--list", "list_cards", is_flag=True, help="Show the cards in this computer, and nothing else.")
def flash(list_cards: bool, **given: Any) -> None:
    """Write a system's image and one device's files to a card: it installs itself at its first boot, without network.

    Disks that are mounted, in use, of this computer's system, too small, built in or large are refused. All that can
    be found wrong with image, kit and device is found before the card is touched.
    """
    from covey_deploy.disks import Machine

    if list_cards:
        _list(Machine())
        return
    options = Options(**given)
    wanted = _check(options)
    kit, fleet = _open(options)
    wanted = _to_do(options, wanted, fleet)
    if not wanted:
        click.echo("all of these cards are made already; --again makes them anew")
        return
    machine = Machine()
    _early(options, machine)
    wifi, login = _wifi(options), _login(options)
    with closing(_base(options, kit)) as base:
        _provision(options, fleet, wanted)
        for number, one in enumerate(wanted, 1):
            if len(wanted) > 1:
                click.echo(f"{one.device_id} ({number} of {len(wanted)})", err=True)
            with closing(base.prepare(_maker(options, kit, fleet, one, wifi, login))) as prepared:
                _write(options, machine, fleet, one, base, prepared, next_card=number > 1)


def _list(machine: Machine) -> None:
    from covey_deploy.disks import contents

    cards = machine.cards()
    for disk in cards:
        click.echo("\n".join([disk.described(), *contents(disk)]))
    if not cards:
        click.echo("there is no card in this computer")


# --- before anything is done


def _check(options: Options) -> list[Wanted]:
    """What was asked for fits together; the devices."""
    from covey_deploy.device_table import read_table
    from covey_deploy.series import numbered

    for given, what in ((options.fleet, "--fleet-folder"), (options.kit, "--kit")):
        if given is None:
            raise ConfigError(f"{what} is missing", "covey flash --help; docs/flashing.md has examples")
    if (options.image is None) == (not options.debian):
        raise ConfigError("give --image or --debian, one of them", "--image raspios.img.xz")
    if (options.device is None) == (not options.output):
        raise ConfigError("give --device or --output, one of them", "--device /dev/sdX; covey flash --list shows them")
    if bool(options.csv) == bool(options.device_id):
        raise ConfigError("give --id or --csv, one of them", "--id kitchen-pi")
    wanted = read_table(options.csv) if options.csv else numbered(options.device_id, options.count, options.first)
    if options.output and len(wanted) > 1 and "{id}" not in options.output:
        raise ConfigError("--output names one file for several devices", "write {id} in it: --output card-{id}.img")
    if options.hostname and len(wanted) > 1:
        raise ConfigError("--hostname is one name for several devices", "leave it out, or give a table with --csv")
    return wanted


def _open(options: Options) -> tuple[Kit, FleetFolder]:
    from covey_deploy.fleet_folder import FleetFolder
    from covey_deploy.kit import open_kit

    assert options.fleet is not None
    assert options.kit is not None
    fleet = FleetFolder.open(options.fleet)
    return open_kit(options.kit, fleet.release_key), fleet


def _journal(options: Options, fleet: FleetFolder) -> Path:
    return options.journal or fleet.path / "flashed.jsonl"


def _to_do(options: Options, wanted: list[Wanted], fleet: FleetFolder) -> list[Wanted]:
    """A series goes on where it was broken off; a single card is made whenever it is asked for."""
    from covey_deploy.series import finished, left_to_do

    done = finished(_journal(options, fleet))
    if options.again or len(wanted) == 1:
        for one in wanted:
            if one.device_id in done:
                click.echo(
                    f"{one.device_id} has a card already: use one of the two only, or they disturb each other", err=True
                )
        return wanted
    left = left_to_do(wanted, done)
    if len(left) < len(wanted):
        click.echo(f"{len(wanted) - len(left)} of {len(wanted)} cards are made already", err=True)
    return left


def _provision(options: Options, fleet: FleetFolder, wanted: list[Wanted]) -> None:
    """Devices that the fleet has not yet are made, all at once. ConfigError for revoked ones."""
    from covey_deploy.cli_provision import asking
    from covey_deploy.fleet_folder import DEVICE
    from covey_deploy.provisioning import NewDevice, add_devices

    known = {one.id for one in fleet.issued() if one.role == DEVICE}  # an authority's id is a number
    revoked = fleet.revoked_ids()
    for one in wanted:
        if one.device_id in revoked:
            raise ConfigError(f"{one.device_id} is revoked", "choose a new id: covey provision list has those in use")
    new = [NewDevice.of_row(one) for one in wanted if one.device_id not in known]
    if new:
        add_devices(fleet.path, new, asking(options.passphrase_file))
        click.echo(f"new in the fleet {fleet.name}: {', '.join(one.device_id for one in new)}", err=True)


def _wifi(options: Options) -> Optional[Wifi]:
    from covey_deploy.card import Wifi

    if not options.wifi:
        return None
    if options.wifi_password_file is not None:
        password = _first_line(options.wifi_password_file)
    else:
        password = click.prompt(f"Password of the Wi-Fi {options.wifi}", hide_input=True, err=True)
    return Wifi(options.wifi, password, options.wifi_country)


def _login(options: Options) -> Optional[Login]:
    from covey_deploy.card import Login

    lines = [line.strip() for path in options.ssh_keys for line in _text(path).splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    return Login(options.user, keys) if options.ssh_keys else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read", "give a text file") from exc


def _first_line(path: Path) -> str:
    lines = _text(path).splitlines()
    return lines[0] if lines else ""


def _base(options: Options, kit: Kit) -> Base:
    from covey_deploy.images import find_image
    from covey_deploy.prepared import Base
    from covey_deploy.progress_line import ProgressLine

    system: Optional[System] = "debian" if options.debian else None
    path, python = options.image or _debian(), str(kit.manifest.get("python", ""))
    with ProgressLine(f"reading {path.name}", path.stat().st_size if path.exists() else 0) as tell:
        image = find_image(path, options.sha256, tell)
    return Base(image, system, python)


def _debian() -> Path:
    from covey_deploy.debian_image import build

    return build(say=lambda text: click.echo(text, err=True))


def _maker(
    options: Options, kit: Kit, fleet: FleetFolder, one: Wanted, wifi: Optional[Wifi], login: Optional[Login]
) -> Callable[[System], Card]:
    from covey_deploy.card import card

    data = Path(one.data) if one.data else options.data

    def make(system: System) -> Card:
        hostname = one.hostname or options.hostname
        folder = fleet.device(one.device_id)
        return card(kit, folder, hostname=hostname, wifi=wifi, login=login, data=data, os=system)

    return make


# --- writing


def _early(options: Options, machine: Machine) -> None:
    """What can be said of the target before minutes of reading."""
    if options.device is not None:
        disk = machine.find(options.device)
        machine.check(disk, 0, fixed=options.fixed_disk, large=options.large_disk)


def _write(
    options: Options,
    machine: Machine,
    fleet: FleetFolder,
    one: Wanted,
    base: Base,
    prepared: Prepared,
    *,
    next_card: bool,
) -> None:
    from covey_deploy.series import note

    if options.device is not None:
        where, written = str(options.device), _write_card(options, machine, prepared, next_card)
    else:
        where = options.output.replace("{id}", one.device_id)
        written = _write_file(Path(where), options.yes, prepared)
    note(_journal(options, fleet), one.device_id, base.image.sha256, where, written)
    click.echo(f"{where} is {one.device_id}")


def _write_file(path: Path, overwrite: bool, prepared: Prepared) -> str:
    from covey_deploy.card_writing import write_file
    from covey_deploy.progress_line import ProgressLine

    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no file", "for a card: --device")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} is there already", "choose another name, or --yes to replace it")
    with ProgressLine(f"writing {path.name}", prepared.size) as tell:
        return write_file(path, prepared, tell)


def _write_card(options: Options, machine: Machine, prepared: Prepared, next_card: bool) -> str:
    from covey_deploy import card_writing
    from covey_deploy.progress_line import ProgressLine

    assert options.device is not None
    disk = machine.find(options.device)
    if next_card:
        disk = _next(options, machine, disk)
    machine.check(disk, prepared.size, fixed=options.fixed_disk, large=options.large_disk)
    if not options.yes:
        _confirm(disk)
    with card_writing.opened(disk, machine) as written:
        machine.check(disk, prepared.size, fixed=options.fixed_disk, large=options.large_disk)  # again: it is ours now
        with ProgressLine(f"writing {disk.path}", prepared.size) as tell:
            sha256 = card_writing.write(written, prepared.chunks(), tell)
        if options.verify:
            with ProgressLine(f"reading {disk.path} back", prepared.size) as tell:
                card_writing.verify(written, prepared.size, sha256, tell)
        card_writing.finish(written)
    return sha256


def _next(options: Options, machine: Machine, disk: Disk) -> Disk:
    """The next card of a series, in the same reader."""
    from covey_deploy.series import wait_for_next_card

    click.echo(f"take the card out of {disk.path} and put the next one in", err=True)
    if disk.removable or options.yes:
        wait_for_next_card(disk.name, machine)
    else:  # a disk that has no medium to change
        click.prompt("Press Enter when it is there", default="", show_default=False, err=True)
    return machine.disk(disk.name)


def _confirm(disk: Disk) -> None:
    from covey_deploy.disks import contents

    if not sys.stdin.isatty():
        raise ConfigError(f"{disk.path} would be erased, and nobody can be asked", "--yes, if you are sure")
    for line in [disk.described(), *(contents(disk) or ["  no partitions were found on it"])]:
        click.echo(line, err=True)
    typed = click.prompt(f"All of it is erased. Type {disk.path} to go on", default="", show_default=False, err=True)
    if typed.strip() != str(disk.path):
        raise ConfigError(f"{disk.path} was not confirmed", "nothing was written")
