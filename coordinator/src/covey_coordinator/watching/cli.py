"""The commands of who watches and steers a run, as click sees them. Cheap to import: what they do is in `commands`.

Which run: that of coordinator.toml, or with --runs-dir any.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

A_PATH = click.Path(path_type=Path)
Command = Callable[..., None]


def which_run(command: Command) -> Command:
    """The options that name a run."""
    for option in (
        click.option("--task", help="Of a file with several tasks this one [default: all; abort needs one]."),
        click.option("--run", help="Name of the run [default: that of the file, or the only one in --runs-dir]."),
        click.option("--runs-dir", type=A_PATH, help="Where runs are kept, instead of a configuration file."),
        click.option("--config", "config_path", type=A_PATH, default=Path("coordinator.toml"), show_default=True),
    ):
        command = option(command)
    return command


as_json_option = click.option("--json", "as_json", is_flag=True, help="As JSON.")
reason_option = click.option("--reason", default="", help="Why; shown to whoever asks, and after an abort to devices.")


@click.command(name="status", short_help="Say what a coordinator is doing now.")
@which_run
@as_json_option
def status_command(config_path: Path, runs_dir: Path | None, run: str | None, task: str | None, as_json: bool) -> None:
    """Say what is going on in a run, from its store; also while its coordinator runs, and when none does."""
    from covey_coordinator.watching import commands

    commands.status(config_path, runs_dir, run, task, as_json)


@click.command(name="devices", short_help="List the devices of a run with what became of their updates.")
@which_run
@as_json_option
def devices_command(config_path: Path, runs_dir: Path | None, run: str | None, task: str | None, as_json: bool) -> None:
    """List every device that a run knows: when it was last heard, its rounds and its verdicts."""
    from covey_coordinator.watching import commands

    commands.devices(config_path, runs_dir, run, task, as_json)


@click.command(name="leakage", short_help="Say how much could be read off a run's updates.")
@which_run
@click.option("--out", type=A_PATH, help="Write a page with a drawing over all rounds (HTML).")
@as_json_option
def leakage_command(
    config_path: Path, runs_dir: Path | None, run: str | None, task: str | None, out: Path | None, as_json: bool
) -> None:
    """Say, round by round, how much could be read off the updates and who could be told again."""
    from covey_coordinator.watching import commands

    commands.leakage(config_path, runs_dir, run, task, out, as_json)


@click.command(name="runs", short_help="List all runs with their outcome.")
@click.option("--config", "config_path", type=A_PATH, default=Path("coordinator.toml"), show_default=True)
@click.option("--runs-dir", type=A_PATH, help="Where runs are kept, instead of a configuration file.")
@as_json_option
def runs_command(config_path: Path, runs_dir: Path | None, as_json: bool) -> None:
    """List the runs that are kept beside each other, with how far they are and how they ended."""
    from covey_coordinator.watching import commands

    commands.runs(config_path, runs_dir, as_json)


@click.command(name="pause", short_help="Let a run open no new round.")
@which_run
@reason_option
def pause_command(config_path: Path, runs_dir: Path | None, run: str | None, task: str | None, reason: str) -> None:
    """Let a run open no new round until `covey resume`. The round under way ends. Holds over a restart."""
    from covey_coordinator.watching import commands

    commands.pause(config_path, runs_dir, run, task, reason)


@click.command(name="resume", short_help="Lift a pause.")
@which_run
def resume_command(config_path: Path, runs_dir: Path | None, run: str | None, task: str | None) -> None:
    """Lift a pause."""
    from covey_coordinator.watching import commands

    commands.resume(config_path, runs_dir, run, task)


@click.command(name="abort", short_help="Abandon the round under way and end the run for good.")
@which_run
@reason_option
def abort_command(config_path: Path, runs_dir: Path | None, run: str | None, task: str | None, reason: str) -> None:
    """Abandon the round under way and end the run for good: `covey serve` ends with code 8, also when started again."""
    from covey_coordinator.watching import commands

    commands.abort(config_path, runs_dir, run, task, reason)


of_fleet_option = click.option(
    "--config", "config_path", type=A_PATH, default=Path("coordinator.toml"), show_default=True, help="Says the fleet."
)


@click.command(name="revoke", short_help="Take nothing of a device any more: stolen, broken, hostile.")
@click.argument("device_id", metavar="DEVICE")
@of_fleet_option
@click.option("--reason", default="", help="Why; shown to whoever asks, and to the device.")
def revoke_command(config_path: Path, device_id: str, reason: str) -> None:
    """Take nothing of DEVICE any more, in all runs of the fleet, until `covey readmit`.

    In the round under way its update does not enter the model, also when it was delivered before.
    """
    from covey_coordinator.watching import commands

    commands.revoke(config_path, device_id, reason)


@click.command(name="readmit", short_help="Lift a revocation.")
@click.argument("device_id", metavar="DEVICE")
@of_fleet_option
def readmit_command(config_path: Path, device_id: str) -> None:
    """Lift the revocation of DEVICE; it is invited again from the next round on."""
    from covey_coordinator.watching import commands

    commands.readmit(config_path, device_id)
