"""`covey agent update`: hand a release file to the agent of this device, running or not."""

from __future__ import annotations

import os
from pathlib import Path

import click

from covey_edge.cli_agent import config_option


@click.command(short_help="Give the agent a new release of itself.")
@config_option
@click.argument("file", type=click.Path(path_type=Path))
def update(config_path: Path, file: Path) -> None:
    """Check the release in FILE and leave it to the agent, which installs it and starts it between two rounds."""
    from covey_edge import __version__
    from covey_edge.boot import Folder
    from covey_edge.config import load_agent
    from covey_edge.files import write_atomic
    from covey_edge.updates import ARRIVED, PYTHON, read_bounded
    from covey_edge.wheels import checked
    from covey_protocol.errors import ConfigError, ReleaseError
    from covey_protocol.releases import read_release_file, refusal
    from covey_protocol.seals import PublicKey

    agent = load_agent(config_path)
    if not agent.config.update.release_key:
        raise ConfigError(f"{config_path} pins no release_key", "set update.release_key to the key of the maker")
    data = read_bounded(file)
    _, release, wheels = read_release_file(data, PublicKey.from_hex(agent.config.update.release_key))
    folder = Folder(agent.state_dir / "releases")
    running = folder.boot().current or __version__
    why = refusal(release, running, PYTHON, 0)
    if why:
        raise ReleaseError(why)
    if release.version == running:
        click.echo(f"{release.version} is what this device runs")
        return
    checked(release, wheels, PYTHON)
    if not agent.state_dir.is_dir():
        raise ConfigError(f"{agent.state_dir} is not there", "start the agent once before")
    write_atomic(folder.path / ARRIVED, data)
    if os.geteuid() == 0:  # the agent, which is another user's, must be able to remove it
        owner = agent.state_dir.stat()
        for path in (folder.path, folder.path / ARRIVED):
            os.chown(path, owner.st_uid, owner.st_gid)
    click.echo(f"release {release.version} lies ready; the agent starts it when no round is under way")
