"""`covey fleet`: how a fleet's devices are, and rollouts of agent releases ring by ring (docs/fleet.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import click

from covey_edge.command_groups import NearestGroup

if TYPE_CHECKING:
    from covey_deploy.rollout.program import Desk

FILE = click.Path(path_type=Path)
DESK = (
    click.option("--fleet-folder", type=FILE, help="As covey provision made it; stands for all options below."),
    click.option("--broker", "url", help="mqtts://HOST:PORT"),
    click.option("--fleet", help="The fleet's name."),
    click.option("--ca", type=FILE, help="PEM of the broker's authority."),
    click.option("--cert", type=FILE, help="Client certificate, PEM."),
    click.option("--cert-key", type=FILE),
    click.option("--roster", type=FILE, help="A coordinator.toml, whose [devices] are the fleet's."),
    click.option("--release-key", metavar="HEX", help="The public key that devices pin."),
    click.option("--rollouts", type=FILE, help="Where rollouts are kept. Default: FLEET_FOLDER/rollouts"),
)


def desk_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where the fleet is: they arrive as one dictionary, `desk`."""
    for option in reversed(DESK):
        command = option(command)
    return command


NAMES = ("fleet_folder", "url", "fleet", "ca", "cert", "cert_key", "roster", "release_key", "rollouts")


def _desk(given: dict[str, Any]) -> Desk:
    """Takes the options of `desk_options` out of what was given."""
    from covey_deploy.fleet_folder import FleetFolder
    from covey_deploy.rollout.program import Desk
    from covey_edge.config import read_roster
    from covey_edge.mqtt import parse_broker
    from covey_protocol.errors import ConfigError
    from covey_protocol.seals import PublicKey

    said = {name: given.pop(name) for name in NAMES}
    path = said.pop("fleet_folder")
    revoked: frozenset[str] = frozenset()
    if path is not None:
        folder = FleetFolder.open(path)
        revoked = folder.revoked_ids()
        own = {
            "url": folder.broker_url,
            "fleet": folder.name,
            "ca": folder.operator / "ca.pem",
            "cert": folder.operator / "cert.pem",
            "cert_key": folder.operator / "key.pem",
            "roster": folder.coordinator / "coordinator.toml",
            "release_key": folder.release_key.hex(),
            "rollouts": path / "rollouts",
        }
        if said["url"] is not None and said["url"].startswith("mqtt://"):
            own.update(ca=None, cert=None, cert_key=None)
        said = {name: own[name] if value is None else value for name, value in said.items()}
    for name, option in (("url", "broker"), ("fleet", "fleet"), ("roster", "roster"), ("release_key", "release-key")):
        if said[name] is None:
            raise ConfigError(f"--{option} is not given", "give it, or --fleet-folder, which says all of these")
    broker = parse_broker(said["url"], ca_file=said["ca"], cert_file=said["cert"], key_file=said["cert_key"])
    rollouts = said["rollouts"] if said["rollouts"] is not None else Path("rollouts")
    key = PublicKey.from_hex(said["release_key"])
    return Desk(broker, said["fleet"], read_roster(said["roster"]), rollouts, key, revoked)


def _key_path(given: Optional[Path], fleet_folder: Optional[Path]) -> Optional[Path]:
    from covey_deploy.fleet_folder import FleetFolder

    if given is not None or fleet_folder is None:
        return given
    path = FleetFolder.open(fleet_folder).release_key_path
    return path if path.exists() else None


def gate_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(GATES):
        command = option(command)
    return command


GATES = (
    click.option("--soak", help="So long a ring must be healthy. [default: 30m]"),
    click.option("--max-failures", help="Devices that may fail: a number, or a share such as 5%. [default: 0]"),
    click.option("--min-healthy", type=click.FloatRange(0, 1), help="Of a ring, when patience is over. [default: 0.9]"),
    click.option("--patience", help="So long devices of a ring are waited for. [default: 1d]"),
    click.option("--away", help="A device that was here and is away for so long has failed. [default: 15m]"),
    click.option("--metrics", metavar="URL", help="Of the coordinator: abandoned rounds stop the rollout."),
    click.option("--max-abandoned", type=click.IntRange(0), help="So many in one ring are borne. [default: 2]"),
)
GATE_NAMES = ("soak", "max_failures", "min_healthy", "patience", "away", "metrics", "max_abandoned")


def _gates(given: dict[str, Any]) -> dict[str, Any]:
    """The gates that were given, by their names in `state.Gates`; takes their options out of what was given."""
    from covey_deploy.rollout.rings import failures_from, seconds

    said = {name: value for name in GATE_NAMES if (value := given.pop(name)) is not None}
    made: dict[str, Any] = {f"{name}_s": seconds(said[name]) for name in ("soak", "patience", "away") if name in said}
    if "max_failures" in said:
        made["max_failures"], made["max_failures_share"] = failures_from(said["max_failures"])
    made.update({name: said[name] for name in ("min_healthy", "metrics", "max_abandoned") if name in said})
    return made


@click.group(cls=NearestGroup, name="fleet", short_help="See a fleet's devices, and renew their agents ring by ring.")
def fleet_command() -> None:
    """A fleet's devices: how they are, and rollouts of agent releases (docs/fleet.md)."""


@fleet_command.command(short_help="Say how every device is.")
@desk_options
@click.option("--json", "as_json", is_flag=True)
def status(as_json: bool, **given: Any) -> None:
    """Every device of the roster: online or not, its version, a release on trial or bad, its trouble."""
    import json
    import time

    import msgspec

    from covey_deploy.rollout.program import look
    from covey_deploy.rollout.status import rows, seen_now, status_text

    desk = _desk(given)
    watch, release = look(desk)
    found = rows(watch, seen_now(desk.rollouts, watch, time.time()), desk.revoked)
    if as_json:
        facts = {
            "fleet": desk.fleet,
            "devices": msgspec.to_builtins(found),
            "release": None if release is None else {"version": release.version, "share": release.share},
            "ignored": watch.refused,
        }
        click.echo(json.dumps(facts, indent=2))
    else:
        click.echo(status_text(found, release, watch.refused, time.time()))


@fleet_command.command(short_help="Give a release to a fleet, ring by ring.")
@click.argument("release", type=FILE, required=False)
@click.argument("rings", nargs=-1, metavar="[RING]...")
@desk_options
@gate_options
@click.option("--key", type=FILE, help="The release key, PEM. Default: FLEET_FOLDER/release/release.pem")
@click.option("--dry-run", is_flag=True, help="Say who is in which ring, and publish nothing.")
@click.option("--resume", is_flag=True, help="Go on with the rollout that was killed, or had stopped.")
@click.option("--stop", is_flag=True, help="Stop the rollout that is under way.")
def rollout(
    release: Optional[Path],
    rings: tuple[str, ...],
    key: Optional[Path],
    dry_run: bool,
    resume: bool,
    stop: bool,
    **given: Any,
) -> None:
    """Publish RELEASE for one ring after the other, each when the one before is healthy.

    A RING is NAME=ID,ID or a share of the fleet: canary=kitchen-pi,hall-pi 10% 100%
    """
    from covey_deploy.rollout import commands
    from covey_deploy.rollout.state import Gates
    from covey_edge.updates import read_bounded
    from covey_protocol.errors import ConfigError

    if sum((release is not None, resume, stop)) != 1:
        raise ConfigError("a rollout needs a RELEASE, --resume or --stop", "give one of them")
    gates, key = _gates(given), _key_path(key, given["fleet_folder"])
    desk = _desk(given)
    if resume:
        commands.ended(desk, commands.resume(desk, gates, key))
    elif stop:
        commands.stop(desk)
    elif dry_run:
        assert release is not None
        plan, _ = commands.planned(desk, read_bounded(release), rings, Gates(**gates))
        click.echo(commands.plan_text(desk, plan))
    else:
        assert release is not None
        made = commands.maker_key(_needed(key), desk.key)
        commands.ended(desk, commands.roll_out(desk, read_bounded(release), rings, Gates(**gates), made))


def _needed(key: Optional[Path]) -> Path:
    from covey_protocol.errors import ConfigError

    if key is None:
        raise ConfigError("the release key is not here", "give it with --key; it is read once, at the beginning")
    return key


@fleet_command.command(short_help="Go back to old code, under a higher version.")
@click.argument("rings", nargs=-1, metavar="[RING]...")
@click.option("--to", "file", type=FILE, help="A release or covey-edge's wheel. Default: what was finished before.")
@desk_options
@gate_options
@click.option("--key", type=FILE, help="The release key, PEM. Default: FLEET_FOLDER/release/release.pem")
@click.option("--out", type=FILE, help="Write the release there, and publish nothing.")
def rollback(
    rings: tuple[str, ...], file: Optional[Path], key: Optional[Path], out: Optional[Path], **given: Any
) -> None:
    """Seal the old code under a version above the one to be taken back, and roll that out: to all devices at once, or
    ring by ring."""
    from covey_deploy.rollout import commands
    from covey_deploy.rollout.state import Gates
    from covey_edge.files import write_atomic

    gates, key = _gates(given), _needed(_key_path(key, given["fleet_folder"]))
    desk = _desk(given)
    made = commands.maker_key(key, desk.key)
    data = commands.taken_back(desk, file, made)
    if out is not None:
        write_atomic(out, data)
        click.echo(f"{out} holds the old code under a higher version")
        return
    commands.ended(desk, commands.roll_out(desk, data, rings or ("100%",), Gates(**gates), made))


@fleet_command.command(short_help="Tell how the newest rollout went, or goes.")
@desk_options
@click.option("--json", "as_json", is_flag=True)
@click.option("--picture", type=FILE, help="Write it there, SVG: where devices stood over time.")
def report(as_json: bool, picture: Optional[Path], **given: Any) -> None:
    """From its journal; a rollout under way is not disturbed."""
    import json

    from covey_deploy.rollout import commands, words
    from covey_edge.files import write_atomic

    journal, now = commands.newest_as_told(_desk(given))
    if picture is not None:
        write_atomic(picture, words.picture(journal.events, now).encode())
    facts = words.report_facts(journal.state, now)
    click.echo(json.dumps(facts, indent=2) if as_json else words.report_text(journal.state, now))
