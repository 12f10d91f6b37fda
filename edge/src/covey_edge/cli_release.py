"""`covey release`: for who makes releases of the agent: seal wheels, look at a release, put it on a broker."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Optional

import click


@click.group(short_help="Make releases of the agent and put them on a broker.")
def release() -> None:
    """Releases that agents install by themselves (docs/updates.md)."""


@release.command(short_help="Seal wheels as a release.")
@click.option("--wheel", "wheels", type=click.Path(path_type=Path), multiple=True, required=True, help="Repeat it.")
@click.option("--key", "key_path", type=click.Path(path_type=Path), required=True, help="The release key, PEM.")
@click.option("--out", "out", type=click.Path(path_type=Path), required=True)
@click.option("--share", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="Of the devices, for now.")
@click.option("--minimum-version", default="", help="Older agents do not step to this release.")
@click.option("--notes", default="", help="A sentence for operators.")
@click.option("--serial", type=int, help="Default: the time in ms. Of two releases the larger one holds.")
def make(
    wheels: tuple[Path, ...],
    key_path: Path,
    out: Path,
    share: float,
    minimum_version: str,
    notes: str,
    serial: Optional[int],
) -> None:
    """Check the wheels as a device will, seal them, and write one file."""
    from covey_edge.config import read_file
    from covey_edge.files import write_atomic
    from covey_edge.releasing import described
    from covey_protocol.releases import release_file, seal_release
    from covey_protocol.seals import SealingKey

    key = SealingKey.from_pem(read_file(key_path), str(key_path))
    contents = {path.name: read_file(path) for path in wheels}
    made = described(
        contents,
        serial=serial or int(time.time() * 1000),
        share=share,
        minimum_version=minimum_version,
        notes=notes,
    )
    write_atomic(out, release_file(seal_release(made, key), list(contents.values())))
    click.echo(f"{out}: release {made.version}, serial {made.serial}, {made.size} bytes of wheels")
    click.echo(f'agent.toml, [update]:  release_key = "{key.public.hex()}"')


@release.command(short_help="Seal a release again for a larger share of the devices.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--key", "key_path", type=click.Path(path_type=Path), required=True)
@click.option("--share", type=click.FloatRange(0, 1), required=True)
@click.option("--out", "out", type=click.Path(path_type=Path), required=True)
def widen(file: Path, key_path: Path, share: float, out: Path) -> None:
    """Write the release in FILE with another share and a newer serial; the wheels stay the same."""
    import msgspec

    from covey_edge.config import read_file
    from covey_edge.files import write_atomic
    from covey_edge.updates import read_bounded
    from covey_protocol.releases import read_release_file, release_file, seal_release
    from covey_protocol.seals import SealingKey

    key = SealingKey.from_pem(read_file(key_path), str(key_path))
    _, old, wheels = read_release_file(read_bounded(file), key.public)
    new = msgspec.structs.replace(old, share=share, serial=max(int(time.time() * 1000), old.serial + 1))
    write_atomic(out, release_file(seal_release(new, key), wheels))
    click.echo(f"{out}: release {new.version}, serial {new.serial}, for {100 * share:g} % of the devices")


@release.command(short_help="Say what a release is.")
@click.argument("file", type=click.Path(path_type=Path))
def show(file: Path) -> None:
    """Print, as JSON, what the release in FILE says of itself. Its seal is not looked at."""
    import json

    import msgspec

    from covey_edge.updates import read_bounded
    from covey_protocol.releases import described_unverified, sealed_part

    facts = msgspec.to_builtins(described_unverified(sealed_part(read_bounded(file))))
    click.echo(json.dumps(facts, indent=2))


@release.command(short_help="Put a release on a broker for a fleet's devices.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--broker", "url", required=True, help="mqtt://HOST:PORT or mqtts://...")
@click.option("--fleet", required=True)
@click.option("--release-key", required=True, help="The maker's public key, 64 hex digits, as devices pin it.")
@click.option("--ca", "ca_file", type=click.Path(path_type=Path), help="PEM of the broker's authority.")
@click.option("--cert", "cert_file", type=click.Path(path_type=Path), help="Client certificate, PEM.")
@click.option("--cert-key", "key_file", type=click.Path(path_type=Path))
def publish(
    file: Path,
    url: str,
    fleet: str,
    release_key: str,
    ca_file: Optional[Path],
    cert_file: Optional[Path],
    key_file: Optional[Path],
) -> None:
    """Publish the wheels, then the release, retained; wheels of the release before are cleared."""
    from covey_edge.mqtt import parse_broker
    from covey_edge.releasing import publish_release
    from covey_edge.updates import read_bounded
    from covey_protocol.releases import read_release_file
    from covey_protocol.seals import PublicKey

    sealed, made, wheels = read_release_file(read_bounded(file), PublicKey.from_hex(release_key))
    broker = parse_broker(url, ca_file=ca_file, cert_file=cert_file, key_file=key_file)
    publish_release(broker, fleet, sealed, made, wheels, PublicKey.from_hex(release_key), click.echo)
    click.echo(f"release {made.version} is on {broker} for {fleet}")
