"""`covey provision`: a fleet's authority, certificates, keys and complete settings (docs/provisioning.md)."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Optional

import click

from covey_edge.cli_key import make as make_key
from covey_edge.cli_key import request as request_command
from covey_edge.command_groups import NearestGroup

LIST_ENDS_SOON_DAYS = 7
MANY = 50  # devices: they take more than a second or two
FILE = click.Path(path_type=Path)


def fleet_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--fleet-folder", "fleet", type=FILE, required=True, help="As `covey provision init` made it.")(
        command
    )


def passphrase_option(command: Callable[..., Any]) -> Callable[..., Any]:
    help_text = "Holds the passphrase of the authority's key; without it you are asked."
    return click.option("--passphrase-file", type=FILE, help=help_text)(command)


@click.group(cls=NearestGroup, name="provision", short_help="Make the identities of a fleet: certificates and keys.")
def provision() -> None:
    """A fleet's authority, certificates, seal keys and settings, all in one folder (docs/provisioning.md)."""


provision.add_command(make_key, "key")
provision.add_command(request_command, "csr")


# --- a new fleet


@provision.command(short_help="Make a fleet's folder.")
@click.argument("name", metavar="FLEET")
@click.option("--folder", type=FILE, help="Default: ./FLEET")
@click.option(
    "--broker-host", "hosts", multiple=True, required=True, metavar="HOST", help="Repeat it; first for devices."
)
@click.option("--port", type=click.IntRange(1, 65535), default=8883, show_default=True)
@click.option("--model", type=FILE, help="The bundle that the coordinator trains. Default: model.covey in its folder.")
@click.option("--sealed-by", default="", metavar="HEX", help="The public key that sealed --model, where it exists.")
@click.option("--devices", "num_devices", type=click.IntRange(1), default=2, show_default=True, help="Of a round.")
@click.option("--authority-days", type=click.FloatRange(1, 36525), default=3652.0, show_default=True)
@click.option("--days", type=click.FloatRange(1, 36525), default=730.0, show_default=True, help="Of all others.")
@click.option("--encrypt", is_flag=True, help="Asks for a passphrase for the authority's key.")
@passphrase_option
def init(
    name: str,
    folder: Optional[Path],
    hosts: tuple[str, ...],
    port: int,
    model: Optional[Path],
    sealed_by: str,
    num_devices: int,
    authority_days: float,
    days: float,
    encrypt: bool,
    passphrase_file: Optional[Path],
) -> None:
    """Make the authority, the certificates of broker, coordinator and operator, and the coordinator's settings."""
    from covey_deploy import provisioning
    from covey_deploy.fleet_folder import Lifetimes

    folder = folder if folder is not None else Path(name)
    bundle = _checked_bundle(model, sealed_by, folder / "coordinator")
    fleet = provisioning.init(
        folder,
        name,
        hosts,
        port,
        Lifetimes(authority=authority_days, broker=days, coordinator=days, operator=days, device=days),
        bundle=bundle,
        bundle_key=sealed_by,
        num_devices=num_devices,
        passphrase=_new_passphrase(encrypt, passphrase_file),
    )
    click.echo(f"{folder} is the fleet {name}: keep it private, and keep a copy")
    if model is None:
        click.echo(
            f"a model: covey export model.py:build --key {folder}/coordinator/seal.pem -o {folder}/coordinator/{bundle}"
        )
    click.echo(f"devices: covey provision device ID --fleet-folder {folder}")
    click.echo(f"the broker: covey broker run --fleet-folder {folder}; devices will connect to {fleet.broker_url}")


def _checked_bundle(model: Optional[Path], sealed_by: str, folder: Path) -> str:
    """As coordinator.toml names it."""
    from covey_edge.config import read_file
    from covey_protocol.bundle import read_bundle
    from covey_protocol.errors import ConfigError
    from covey_protocol.seals import PublicKey

    if model is None:
        return "model.covey"
    if model.exists():
        if not sealed_by:
            raise ConfigError(
                f"{model} exists, so this new fleet's key has not sealed it", "say whose has with --sealed-by"
            )
        read_bundle(read_file(model), PublicKey.from_hex(sealed_by))
    return os.path.relpath(model.absolute(), folder.absolute())


# --- devices


@provision.command(short_help="Make the keys, certificate and settings of devices, or sign their requests.")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@fleet_option
@click.option("--csv", "table", type=FILE, help="A table of devices: docs/provisioning.md has its columns.")
@click.option("--csr", "requests", type=FILE, multiple=True, help="A device's request (covey key request). Repeat it.")
@click.option("--data-source", default="npz", show_default=True, help="As in agent.toml.")
@click.option("--data-path", default="/var/lib/covey-data/data.npz", show_default=True, help="On the device.")
@passphrase_option
def device(
    ids: tuple[str, ...],
    fleet: Path,
    table: Optional[Path],
    requests: tuple[Path, ...],
    data_source: str,
    data_path: str,
    passphrase_file: Optional[Path],
) -> None:
    """Add devices to the fleet: all that are named, or none. They are in the coordinator's roster then, too."""
    from covey_deploy import provisioning
    from covey_deploy.device_table import read_table
    from covey_deploy.fleet_folder import FleetFolder
    from covey_edge.certificate_request import read_request
    from covey_edge.config import read_file
    from covey_protocol.errors import ConfigError

    new = [provisioning.NewDevice(one, data_source, data_path) for one in ids]
    for row in read_table(table) if table is not None else ():
        new.append(provisioning.NewDevice.of_row(row, data_source, data_path))
    for path in requests:
        request = read_request(read_file(path), str(path))
        new.append(provisioning.NewDevice(request.device_id, data_source, data_path, request))
    if not new:
        raise ConfigError("no device is named", "give ids, --csv or --csr")
    if len(new) > MANY:
        click.echo(f"making the keys and certificates of {len(new)} devices", err=True)
    keys = provisioning.add_devices(fleet, new, asking(passphrase_file))
    folder = FleetFolder.open(fleet)
    for one in new:
        name = one.device_id
        lacks = "" if one.request is None else "; its keys are on the device: put these beside them"
        click.echo(f"{name}: {folder.device(name)}{lacks}")
    if not (folder.coordinator / "coordinator.toml").exists():
        click.echo("into [devices] of coordinator.toml:")
        for name, key in keys.items():
            click.echo(f'{name} = "{key}"')


# --- renewing and revoking


@provision.command(short_help="New certificates before the old ones end.")
@click.argument("names", metavar="[ID|broker|coordinator|operator]...", nargs=-1)
@fleet_option
@click.option("--due", type=click.FloatRange(0), metavar="DAYS", help="All that end within so many days.")
@click.option("--all", "everybody", is_flag=True, help="All that are not revoked.")
@click.option("--new-key", is_flag=True, help="With new TLS keys, where they lie in the folder.")
@click.option("--csr", "request_path", type=FILE, help="A device's new request, with the key it shall be for.")
@passphrase_option
def renew(
    names: tuple[str, ...],
    fleet: Path,
    due: Optional[float],
    everybody: bool,
    new_key: bool,
    request_path: Optional[Path],
    passphrase_file: Optional[Path],
) -> None:
    """Make new certificates, for the keys that are there. Copy the folder's files to where they are used: programs
    that run read them at their next connection."""
    from covey_deploy import provisioning
    from covey_deploy.fleet_folder import FleetFolder
    from covey_edge.certificate_request import read_request
    from covey_edge.config import read_file
    from covey_protocol.errors import ConfigError

    wanted: list[str] = list(names)
    request = None
    if new_key and request_path is not None:
        raise ConfigError("--new-key with --csr: the request's key is meant", "leave one of them out")
    if everybody or due is not None:
        wanted += provisioning.due(FleetFolder.open(fleet), 36525 if due is None else due)
    if request_path is not None:
        request = read_request(read_file(request_path), str(request_path))
        if wanted not in ([], [request.device_id]):
            raise ConfigError(f"{request_path} is of {request.device_id}", "renew others by themselves")
        wanted = [request.device_id]
    if not wanted and due is None:
        raise ConfigError("nobody is named", "give ids, --due, --all or --csr")
    wanted = list(dict.fromkeys(wanted))
    if not wanted:
        click.echo("nothing is due")
        return
    made = provisioning.renew(fleet, wanted, new_key=new_key, request=request, passphrase=asking(passphrase_file))
    for one in made:
        folder = fleet / provisioning.place(one.role, one.id)
        click.echo(f"{one.id}: valid until {one.not_after:%Y-%m-%d}; copy {folder}")
    click.echo(f"the list of revoked certificates is new, too: {fleet / 'broker/crl.pem'}")


@provision.command(short_help="Shut a device out: stolen, lost, broken.")
@click.argument("name", metavar="ID")
@fleet_option
@click.option(
    "--reason",
    default="unspecified",
    show_default=True,
    type=click.Choice(["unspecified", "key-compromise", "superseded", "cessation-of-operation", "privilege-withdrawn"]),
    help="It is in the list that everybody may read.",
)
@passphrase_option
def revoke(name: str, fleet: Path, reason: str, passphrase_file: Optional[Path]) -> None:
    """Put all certificates of ID on the list that the broker reads, and tell the coordinator."""
    from covey_deploy import provisioning
    from covey_deploy.fleet_folder import FleetFolder
    from covey_protocol.topics import RESERVED_IDS

    count = provisioning.revoke(fleet, name, reason, asking(passphrase_file))
    folder = FleetFolder.open(fleet)
    click.echo(f"{name}: certificates revoked: {count}" if count else f"{name} was revoked before; the list is new")
    click.echo(f"the broker: give it {folder.broker / 'crl.pem'} and restart it (covey broker run: kill -HUP)")
    click.echo(f"if it cannot be restarted, reload it, then: covey broker disconnect {name} --fleet-folder {fleet}")
    if name not in RESERVED_IDS:
        _tell_coordinator(name, folder.coordinator / "coordinator.toml", reason)


def _tell_coordinator(name: str, config: Path, reason: str) -> None:
    """`covey revoke`, where covey-coordinator is installed: this distribution does not import it."""
    from covey_protocol.errors import CoveyError

    said = f"the coordinator: covey revoke {name} --config {config}, where it runs"
    found = [point for point in entry_points(group="covey.commands") if point.name == "revoke"]
    if not found or not config.exists():
        click.echo(said)
        return
    try:
        found[0].load().main([name, "--config", str(config), "--reason", reason], standalone_mode=False)
    except (CoveyError, ImportError) as exc:
        click.echo(f"{said} ({exc})")


@provision.group(cls=NearestGroup, short_help="Move a fleet to its next authority.")
def authority() -> None:
    """The fleet's certificate authority, before it ends or where its key is lost (docs/provisioning.md)."""


@authority.command(name="next", short_help="Make the next authority beside the present one.")
@fleet_option
@passphrase_option
def next_authority(fleet: Path, passphrase_file: Optional[Path]) -> None:
    """Everybody's ca.pem holds both from now on, and certificates are signed by the new one."""
    from covey_deploy import provisioning

    number = provisioning.next_authority(fleet, asking(passphrase_file))
    click.echo(f"authority {number} signs from now on; every ca.pem holds both")
    click.echo("1. copy ca.pem and crl.pem to the broker, ca.pem to every device, the coordinator and the operator")
    click.echo(f"2. renew the clients and copy their files: covey provision renew --all --fleet-folder {fleet}")
    click.echo("3. when every device has the new ca.pem, copy the broker's new cert.pem")
    click.echo(f"4. when nobody uses the old one: covey provision authority retire --fleet-folder {fleet}; copy again")


@authority.command(short_help="Trust the older authority no longer.")
@fleet_option
@passphrase_option
def retire(fleet: Path, passphrase_file: Optional[Path]) -> None:
    """Take the older authority out of every ca.pem and remove its key. Refused while a certificate of it is in use."""
    from covey_deploy import provisioning

    number = provisioning.retire_authority(fleet, asking(passphrase_file))
    click.echo(f"authority {number} is retired; copy ca.pem and crl.pem to the broker, ca.pem to everybody else")


# --- looking


@provision.command(name="list", short_help="Who has a certificate, until when.")
@fleet_option
@click.option("--json", "as_json", is_flag=True, help="For programs: a list of objects.")
def list_command(fleet: Path, as_json: bool) -> None:
    """The newest certificate of everybody; what ends within 30 days, or has ended, is said on standard error, too."""
    import json

    from covey_deploy.fleet_folder import FleetFolder, utc_now

    now = utc_now()
    rows = [_row(one, now) for one in FleetFolder.open(fleet).newest()]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    width = max(len(row["id"]) for row in rows)
    for row in rows:
        click.echo(f"{row['id']:<{width}}  {row['role']:<11}  {row['not_after'][:10]}  {row['state']}")
    _warn_of_list(FleetFolder.open(fleet).ca / "crl.pem", now)
    late = [row["id"] for row in rows if row["state"] in ("ends soon", "expired")]
    if late:
        click.echo(f"covey: warning: renew {', '.join(late)} (covey provision renew)", err=True)


def _warn_of_list(path: Path, now: Any) -> None:
    from covey_deploy.authority import read_crl
    from covey_edge.config import read_file

    end = read_crl(read_file(path), str(path)).next_update_utc
    if end is not None and (end - now).days < LIST_ENDS_SOON_DAYS:
        what = f"the list of revoked certificates ends on {end:%Y-%m-%d %H:%M} UTC; then brokers take nobody"
        click.echo(f"covey: warning: {what}: covey provision renew broker, and copy broker/crl.pem", err=True)


def _row(one: Any, now: Any) -> dict[str, Any]:
    import msgspec

    from covey_edge.mqtt_reasons import EXPIRES_SOON_DAYS

    days = (one.not_after - now).total_seconds() / 86400
    state = "ends soon" if days < EXPIRES_SOON_DAYS else "valid"
    gone = "retired" if one.role == "authority" else "revoked"
    state = gone if one.revoked is not None else "expired" if days <= 0 else state
    return {**msgspec.to_builtins(one), "state": state, "days_left": int(days)}


# --- the passphrase


def _new_passphrase(encrypt: bool, path: Optional[Path]) -> Optional[bytes]:
    if path is not None:
        return _from_file(path)
    if not encrypt:
        return None
    text: str = click.prompt("Passphrase for the authority's key", hide_input=True, confirmation_prompt=True)
    return text.encode()


def asking(path: Optional[Path]) -> Callable[[], Optional[bytes]]:
    """Asked only where the key is encrypted."""

    def ask() -> Optional[bytes]:
        import sys

        from covey_protocol.errors import ConfigError

        if path is not None:
            return _from_file(path)
        if not sys.stdin.isatty():
            raise ConfigError("the authority's key is encrypted", "give --passphrase-file, or run this on a terminal")
        text: str = click.prompt("Passphrase of the authority's key", hide_input=True)
        return text.encode()

    return ask


def _from_file(path: Path) -> bytes:
    from covey_edge.config import read_file
    from covey_protocol.errors import ConfigError

    found = read_file(path).strip()
    if not found:
        raise ConfigError(f"{path} holds no passphrase", "write one line into it")
    return found
