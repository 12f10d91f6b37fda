"""`covey backup` and `covey restore`, as click sees them. Cheap to import; needs neither a broker nor TensorFlow."""

from __future__ import annotations

import time
from pathlib import Path

import click

A_PATH = click.Path(path_type=Path)
passphrase_option = click.option(
    "--passphrase-file", type=A_PATH, help="Its first line is the passphrase, instead of asking for it."
)


@click.command(name="backup", short_help="Write all that a coordinator needs to go on elsewhere to one file.")
@click.argument("config_path", metavar="[CONFIG]", type=A_PATH, default=Path("coordinator.toml"))
@click.option("--out", type=A_PATH, help="The file [default: FLEET-DATE-TIME.backup here].")
@click.option("--with-keys", is_flag=True, help="Also the private keys, encrypted with a passphrase.")
@passphrase_option
def backup_command(config_path: Path, out: Path | None, with_keys: bool, passphrase_file: Path | None) -> None:
    """Write what the coordinator of CONFIG (coordinator.toml) needs to go on elsewhere; also while it runs."""
    from covey_coordinator.backup import making, passphrase
    from covey_coordinator.backup.content import content_of
    from covey_protocol.errors import ConfigError

    if passphrase_file is not None and not with_keys:
        raise ConfigError("--passphrase-file without --with-keys", "give both: only keys are encrypted")
    fleet = content_of(config_path).fleet
    out = out or Path(time.strftime(f"{fleet}-%Y%m%d-%H%M%S.backup"))
    words = passphrase.asked(passphrase_file, new=True) if with_keys else None
    made = making.back_up(config_path, out, words)
    click.echo(f"{made.path}: {made.files} files, {made.size:,} bytes{', with keys' if with_keys else ''}")
    for name in made.left_out:
        click.echo(f"  not in it: {name} (--with-keys)")
    for name in made.absent:
        click.echo(f"  missing in runs_dir, and so in it: {name}")


@click.command(name="restore", short_help="Put a coordinator's backup into a new folder.")
@click.argument("file", metavar="FILE", type=A_PATH)
@click.option("--to", type=A_PATH, help="A folder that is empty or does not exist.")
@click.option("--only-runs", is_flag=True, help="Only what is in runs_dir: --to becomes the new one.")
@click.option("--without-keys", is_flag=True, help="Leave the private keys in it, and ask for no passphrase.")
@passphrase_option
@click.option(
    "--sealed-by", metavar="KEY", help="Refuse a backup of another coordinator than that with this public key."
)
@click.option("--check", is_flag=True, help="Only check that the file is whole and can be used.")
def restore_command(
    file: Path,
    to: Path | None,
    only_runs: bool,
    without_keys: bool,
    passphrase_file: Path | None,
    sealed_by: str | None,
    check: bool,
) -> None:
    """Put the backup FILE into a new folder, from which `covey serve` goes on. Stop the old coordinator first."""
    from covey_coordinator.backup import passphrase, restoring, telling
    from covey_protocol.errors import ConfigError
    from covey_protocol.seals import PublicKey

    key = PublicKey.from_hex(sealed_by) if sealed_by is not None else None
    if check:
        telling.whole(file, restoring.checked(file, key))
        return
    if to is None:
        raise ConfigError("restore where?", "name a new folder with --to, or look at the file with --check")
    words = None if without_keys else lambda: passphrase.asked(passphrase_file, new=False)
    telling.restored(to, restoring.restore(file, to, words, only_runs=only_runs, sealed_by=key), only_runs)
