"""Writing a broker's folder: the texts of `broker_files` and the certificates of the fleet's."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from covey_deploy.broker_files import broker_files
from covey_deploy.fleet_folder import FleetFolder
from covey_deploy.mosquitto import CERTIFICATE_FILES
from covey_edge.config import read_file
from covey_edge.files import make_folder, write_atomic

MOSQUITTO_IN_IMAGE = (1883, 1883)  # user and group of eclipse-mosquitto: a container's broker is never root


def write_broker_folder(fleet: FleetFolder, out: Optional[Path], max_connections: int) -> Path:
    """The folder itself. out: None for the fleet's own broker/. ConfigError where a certificate lacks, StorageError."""
    folder = out or fleet.broker
    certificates = {name: read_file(fleet.broker / name) for name in CERTIFICATE_FILES}
    make_folder(folder)
    if folder.resolve() != fleet.broker.resolve():
        for name, data in certificates.items():
            write_atomic(folder / name, data, mode=0o600 if name == "key.pem" else 0o644)
    owner = (folder / "key.pem").stat()
    user = (owner.st_uid, owner.st_gid) if owner.st_uid else MOSQUITTO_IN_IMAGE
    texts = broker_files(fleet.name, fleet.settings.broker.port, max_connections, user)
    for name, text in texts.items():
        make_folder((folder / name).parent)
        write_atomic(folder / name, text.encode())
    make_folder(folder / "data")  # a container's user could not make it
    return folder
