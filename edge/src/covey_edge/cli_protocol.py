"""`covey protocol`: record a fleet's conversation, and judge a recorded one. docs/protocol.md, section 11."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional

import click


@click.group(short_help="Record a fleet's messages; check a recording against the protocol.")
def protocol() -> None:
    """Record a fleet's messages, and check a recording against docs/protocol.md."""


@protocol.command()
@click.argument("transcript", type=click.Path(path_type=Path))
@click.option("--fleet", help="The fleet's name, if not that of the first line.")
@click.option(
    "--coordinator-key",
    metavar="HEX",
    multiple=True,
    help="The coordinator's public key; without it its seals are not checked. While it changes: twice, the next last.",
)
@click.option(
    "--roster",
    type=click.Path(path_type=Path),
    help="A coordinator.toml, or any TOML file with the devices' public keys in [devices].",
)
def check(transcript: Path, fleet: Optional[str], coordinator_key: tuple[str, ...], roster: Optional[Path]) -> None:
    """Judge a recording: seals, versions, bounds, order, repeats.

    Prints each violation with its line and the section of docs/protocol.md it breaks. Ends with code 1 if there is one.
    """
    from covey_edge.config import read_roster
    from covey_edge.recording import check_file
    from covey_protocol.keys import keys_from

    key = keys_from(coordinator_key, "the coordinator") if coordinator_key else None
    keys = read_roster(roster) if roster else None
    sys.exit(1 if check_file(transcript, fleet, key, keys, click.echo) else 0)


@protocol.command()
@click.option("--broker", "url", required=True, metavar="URL", help="mqtt://HOST or mqtts://HOST.")
@click.option("--fleet", required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The transcript; must not exist yet.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="Stop after so long; else with Ctrl-C.")
@click.option("--username")
@click.option("--password-file", type=click.Path())
@click.option("--ca-file", type=click.Path())
@click.option("--cert-file", type=click.Path())
@click.option("--key-file", type=click.Path())
def record(
    url: str,
    fleet: str,
    output: Path,
    seconds: Optional[float],
    username: Optional[str],
    password_file: Optional[str],
    ca_file: Optional[str],
    cert_file: Optional[str],
    key_file: Optional[str],
) -> None:
    """Write all messages of a fleet to a file, with the models and updates in them."""
    from covey_edge.config import BrokerSettings, read_broker
    from covey_edge.recording import Recorder

    settings = BrokerSettings(url, username, password_file, ca_file, cert_file, key_file)
    recorder = Recorder(read_broker(settings, Path()), fleet, output)
    click.echo(f"{output}: {recorder.run(seconds, click.echo)} messages")
