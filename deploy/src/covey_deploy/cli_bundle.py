"""`covey bundle`: the agent with all it needs for devices without a package index."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import click


class BundleGroup(click.Group):
    """`covey bundle` itself makes a kit; its sub-commands look at one."""

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "--target NAME --key FILE | show FILE")


def _list_targets(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from covey_deploy.targets import IMPOSSIBLE, TARGETS

    for target in TARGETS.values():
        facts = f"Python {target.python}, {target.machine}, glibc {target.glibc}, {target.runtime}"
        click.echo(f"{target.name:22} {facts:58} {target.what}")
    click.echo("\nno kits for:")
    for name, reason in IMPOSSIBLE.items():
        click.echo(f"{name:22} {reason}")
    ctx.exit()


@click.group(
    name="bundle", cls=BundleGroup, invoke_without_command=True, short_help="An offline kit of the agent for a target."
)
@click.option("--target", "name", help="Such as pios-bookworm-arm64; --list-targets has them.")
@click.option("--list-targets", is_flag=True, is_eager=True, expose_value=False, callback=_list_targets)
@click.option("--python", "python", help="Instead of --target: the device's Python, such as 3.11.")
@click.option("--arch", help="Instead of --target: aarch64 or x86_64.")
@click.option("--glibc", default="2.34", show_default=True, help="With --python: of the device's system.")
@click.option("--key", "key_path", type=click.Path(path_type=Path), help="The release key, PEM, that seals it.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: covey-agent-VERSION-TARGET.kit here.")
@click.option("--wheel", "own", type=click.Path(path_type=Path), multiple=True, help="One more wheel; or covey-edge's.")
@click.option("--lock", "lock_path", type=click.Path(path_type=Path), help="Default: covey's own.")
@click.option("--cache", type=click.Path(path_type=Path), help="Of wheels. Default: in COVEY_CACHE or ~/.cache/covey.")
@click.option("--offline", is_flag=True, help="Take wheels from the cache alone.")
@click.pass_context
def bundle(ctx: click.Context, /, **options: Any) -> None:
    """Write one sealed file with covey's agent and all its wheels, for a kind of device that needs no package index.

    On the device: `tar xf FILE && sudo python3 install.py`; `covey flash` puts it on cards. docs/kits.md.
    """
    if ctx.invoked_subcommand is None:
        _make(**options)


def _make(
    name: Optional[str],
    python: Optional[str],
    arch: Optional[str],
    glibc: str,
    key_path: Optional[Path],
    out: Optional[Path],
    own: tuple[Path, ...],
    lock_path: Optional[Path],
    cache: Optional[Path],
    offline: bool,
) -> None:
    from covey_deploy import targets
    from covey_deploy.cache import cache_folder
    from covey_deploy.kit import make_kit, read_kit
    from covey_deploy.wheelhouse import Wheelhouse, lock_file, pinned
    from covey_edge.config import read_file
    from covey_edge.files import write_atomic
    from covey_protocol.errors import ConfigError
    from covey_protocol.seals import SealingKey

    if bool(name) == bool(python and arch) or (name and (python or arch)):
        raise ConfigError("the kit's target is not clear", "give --target NAME, or --python and --arch")
    if key_path is None:
        raise ConfigError("no release key", "give --key; `covey key make release.pem` makes one")
    target = targets.named(name) if name else targets.described(str(python), str(arch), glibc)
    key = SealingKey.from_pem(read_file(key_path), str(key_path))
    wanted = pinned(read_file(lock_path or lock_file()).decode(), target)
    click.echo(f"{target.name}: {len(wanted)} packages for Python {target.python} on {target.machine}", err=True)
    wheels = Wheelhouse(cache or cache_folder() / "wheels").wheels(wanted, target, offline=offline)
    wheels = {**wheels, **_own_wheels(own)}
    data = make_kit(target, wheels, key)
    manifest = read_kit(data, key.public).manifest
    path = out or Path(f"{manifest['name']}.kit")
    write_atomic(path, data)
    click.echo(f"{path}: covey {manifest['version']} with {manifest['runtime']}, {len(data) / 1e6:.1f} MB")
    click.echo(f"installed at most {manifest['installed_bytes'] / 1e6:.0f} MB; release key {key.public.hex()}")


def _own_wheels(paths: tuple[Path, ...]) -> dict[str, bytes]:
    """Those that were given, and the agent's where it is not among them."""
    from covey_deploy.agent_wheel import agent_wheel
    from covey_edge.config import read_file

    given = {path.name: read_file(path) for path in paths}
    return given if any(name.startswith("covey_edge-") for name in given) else {**given, **dict([agent_wheel()])}


@bundle.command(short_help="Say what a kit is.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--release-key", help="Check seal and content with its maker's public key.")
@click.option("--json", "as_json", is_flag=True, help="The whole manifest.")
def show(file: Path, release_key: Optional[str], as_json: bool) -> None:
    """Print what the kit in FILE holds and is for. Without --release-key its seal is not looked at."""
    import json

    from covey_deploy.kit import described_unverified, open_kit
    from covey_protocol.seals import PublicKey

    made = open_kit(file, PublicKey.from_hex(release_key)).manifest if release_key else described_unverified(file)
    if as_json:
        click.echo(json.dumps(made, indent=1))
        return
    click.echo(f"{made['name']}: covey {made['version']} with {made['runtime']}")
    click.echo(f"for     Python {made['python']} on {made['machine']}, glibc {made['glibc']} or newer")
    click.echo(f"room    {made['installed_bytes'] / 1e6:.0f} MB at most when installed")
    click.echo(f"seal    {'whole, sealed by ' + release_key if release_key else 'not looked at: give --release-key'}")
    for entry in made["files"]:
        click.echo(f"        {entry['size'] / 1e6:6.2f} MB  {entry['name']}")
    click.echo(f"without {', '.join(made['left_out'])}")
