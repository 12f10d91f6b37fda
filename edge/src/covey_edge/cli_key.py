"""`covey key`: make private keys, the next one of a device or coordinator, and put another seal on a bundle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Optional

import click
from msgspec import Struct


class _Identity(Struct):
    key_file: str


class _Place(Struct):
    """What an agent.toml or a coordinator.toml says of its own key; the rest is not looked at."""

    device_id: str = ""
    identity: Optional[_Identity] = None
    key_file: str = ""


@click.group(short_help="Make and change keys.")
def key() -> None:
    """Keys of devices and coordinators. Nothing here overwrites one."""


@key.command(short_help="Make one private key.")
@click.argument("path", type=click.Path(path_type=Path))
def make(path: Path) -> None:
    """Write a new Ed25519 private key to PATH (mode 600) and print its public key."""
    from covey_edge.key_files import make_key

    click.echo(make_key(path).hex())


@key.command(name="next", short_help="Make the key that this device or coordinator is to have next.")
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=Path("agent.toml"),
    show_default=True,
    help="An agent.toml or a coordinator.toml.",
)
def make_next(config_path: Path) -> None:
    """Make another key beside the current one, which stays, and say what to do with it."""
    from covey_edge.config import read_file, read_toml
    from covey_edge.key_files import make_key
    from covey_protocol.errors import ConfigError
    from covey_protocol.seals import SealingKey

    place = read_toml(config_path, _Place)
    name = place.identity.key_file if place.identity is not None else place.key_file
    if not name:
        raise ConfigError(f"{config_path} names no key_file", "give an agent.toml or a coordinator.toml")
    folder = config_path.parent
    current = SealingKey.from_pem(read_file(folder / name), name).public
    new_name = _next_name(folder, name)
    new = make_key(folder / new_name)
    click.echo(f"{new_name}: {new.hex()}")
    pair = f'["{current.hex()}", "{new.hex()}"]'
    if place.identity is not None:
        click.echo(f"1. coordinator.toml, [devices]:  {place.device_id} = {pair}")
        click.echo(f'2. {config_path}, [identity]:  key_file = "{new_name}"; then start the agent again')
        click.echo("3. when it was heard, the roster needs the second key only")
    else:
        click.echo(f"1. agent.toml of every device, [identity]:  coordinator_key = {pair}; then start the agents again")
        click.echo(f'2. {config_path}:  key_file = "{new_name}", bundle_key = "{current.hex()}"; then start it again')
        click.echo(f"3. seal the bundle anew (covey key reseal --key {new_name}) and take bundle_key out")
        click.echo("4. when all devices have heard it, they need the second key only")


@key.command(short_help="Make this device's keys here, and ask for a certificate.")
@click.argument("device_id", metavar="ID")
@click.option("--fleet", required=True, help="The fleet's name.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path(), help="Where the keys are. Default: here.")
@click.option("--key", "key_name", default="key.pem", show_default=True, help="The TLS key, made where it lacks.")
@click.option("--seal", "seal_name", default="seal.pem", show_default=True, help="The seal key, made where it lacks.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: ID.csr in the folder.")
def request(device_id: str, fleet: str, folder: Path, key_name: str, seal_name: str, output: Optional[Path]) -> None:
    """Write a request that holds no secret. Who runs the fleet signs it: covey provision device --csr FILE.

    To renew with the same keys, make it again; with another TLS key, name a new file with --key.
    """
    from covey_edge.certificate_request import make_request, new_key_pem
    from covey_edge.config import read_file
    from covey_edge.files import write_atomic
    from covey_edge.key_files import make_key
    from covey_protocol.seals import SealingKey
    from covey_protocol.topics import check_device_id, check_name

    check_device_id(device_id)
    check_name(fleet, "fleet")
    if not (folder / key_name).exists():
        write_atomic(folder / key_name, new_key_pem(), mode=0o600)
    if not (folder / seal_name).exists():
        make_key(folder / seal_name)
    seal = SealingKey.from_pem(read_file(folder / seal_name), seal_name)
    path = output if output is not None else folder / f"{device_id}.csr"
    write_atomic(path, make_request(device_id, fleet, read_file(folder / key_name), seal))
    click.echo(f"{path}: give it to who runs the fleet; the keys stay here")


@key.command(short_help="Put another seal on a bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--sealed-by", required=True, metavar="HEX", help="The public key whose seal it must have now.")
@click.option("--key", "key_path", required=True, type=click.Path(path_type=Path), help="The private key to seal with.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Must not exist yet.")
def reseal(bundle: Path, sealed_by: str, key_path: Path, output: Path) -> None:
    """Seal BUNDLE with another coordinator's key. The model and what is said of it stay as they are."""
    from covey_edge.config import read_file
    from covey_edge.files import write_atomic
    from covey_protocol.bundle import read_bundle, write_bundle
    from covey_protocol.errors import ConfigError
    from covey_protocol.seals import PublicKey, SealingKey

    if output.exists():
        raise ConfigError(f"{output} exists", "choose another name")
    opened = read_bundle(read_file(bundle), PublicKey.from_hex(sealed_by))
    new = SealingKey.from_pem(read_file(key_path), str(key_path))
    write_atomic(output, write_bundle(opened.manifest, opened.model, new))
    click.echo(f"{output} is sealed by {new.public.hex()}")


def _next_name(folder: Path, name: str) -> str:
    """device.pem, device-2.pem, device-3.pem: the first number that is free."""
    path = Path(name)
    stem = re.sub(r"-\d+\Z", "", path.stem)
    number = 2
    while (folder / path.with_name(f"{stem}-{number}{path.suffix}")).exists():
        number += 1
    return str(path.with_name(f"{stem}-{number}{path.suffix}"))
