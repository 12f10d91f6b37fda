"""What `covey restore` says to the operator: what is there, and what nobody but the operator can do now."""

from __future__ import annotations

import time
from pathlib import Path

import click

from covey_coordinator.backup.archive import Checked, Header
from covey_coordinator.backup.restoring import Restored
from covey_coordinator.watching.display import duration


def whole(path: Path, backup: Checked) -> None:
    keys = "with keys (their passphrase was not tried)" if backup.keys else "without keys"
    click.echo(f"{path} is whole: {len(backup.names)} files, {keys}")
    click.echo(f"  {_what(backup.header)}")
    click.echo(f"  sealed by {backup.header.key}")


def restored(to: Path, done: Restored, only_runs: bool) -> None:
    header = done.header
    click.echo(f"{to}: {done.files} files of {_what(header)}")
    click.echo("what happened since is not in it: rounds published since are lost and are done again")
    click.echo(
        "  give again what was ordered since: revocations, pauses, aborts; put in again what changed in the roster"
    )
    if not done.with_keys and not only_runs:
        for name in header.secret:
            click.echo(f"  missing: put {name} into {to}, mode 600")
    for old, new in done.unchanged.items():
        click.echo(f"  correct in {header.config}: {old!r} is {new!r} now")
    click.echo("  make sure that the old coordinator never starts again: it would answer the same devices")
    config = to / header.config
    click.echo(
        f"then: covey serve --config {config}" if not only_runs else f"then start the coordinator with runs_dir = {to}"
    )


def _what(header: Header) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(header.created_ms / 1000))
    age = duration(max(0.0, time.time() - header.created_ms / 1000))
    return (
        f"fleet {header.fleet}, run{'s' if len(header.runs) > 1 else ''} {', '.join(header.runs)}, of {at}, {age} old"
    )
