"""`covey doctor`: looks at a deployment, and says what to do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional

import click

from covey_deploy.cli_provision import passphrase_option

A_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(name="doctor", short_help="Look whether a fleet's broker, certificates and rights are right.")
@click.option("--fleet-folder", type=click.Path(path_type=Path, file_okay=False), help="From its owner's desk.")
@click.option("--config", type=A_FILE, help="From a device's end: its agent.toml.")
@click.option("--coordinator", type=A_FILE, help="From the coordinator's end: its coordinator.toml.")
@click.option("--address", help="HOST:PORT of the broker in place of the fleet's own, with --fleet-folder.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@passphrase_option
def doctor(
    fleet_folder: Optional[Path],
    config: Optional[Path],
    coordinator: Optional[Path],
    address: Optional[str],
    as_json: bool,
    passphrase_file: Optional[Path],
) -> None:
    """Files, name, port, TLS, certificates, rights, sizes of messages, what is retained, clocks: each line says what is
    so, and what to do where it is wrong. Give one of the three ends. Programs that run are not disturbed. Ends with
    code 0 where nothing is wrong (a warning is not), else with that of the first thing that is."""
    from covey_deploy import doctor as looks
    from covey_deploy.cli_provision import asking
    from covey_edge.cli_check import report

    if sum(one is not None for one in (fleet_folder, config, coordinator)) != 1:
        raise click.UsageError("give one of --fleet-folder, --config and --coordinator")
    if address and fleet_folder is None:
        raise click.UsageError("--address goes with --fleet-folder")
    if fleet_folder is not None:
        found = looks.fleet_findings(fleet_folder, address, asking(passphrase_file))
    elif config is not None:
        found = looks.device_findings(config)
    else:
        assert coordinator is not None
        found = looks.coordinator_findings(coordinator)
    sys.exit(report(found, as_json))
