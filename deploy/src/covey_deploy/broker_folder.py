"""Writing a broker's folder: the texts of `broker_files` and the certificates of the fleet's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional

from covey_deploy.broker_files import broker_files
from covey_deploy.fleet_folder import FleetFolder
from covey_deploy.mosquitto import ACL_NAME, CERTIFICATE_FILES
from covey_edge.config import read_file
from covey_edge.files import make_folder, write_atomic
from covey_protocol.errors import StorageError

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
        write_atomic(folder / name, text.encode(), mode=0o600 if name == ACL_NAME else 0o644)
    make_folder(folder / "data")  # a container's user could not make it
    if os.geteuid() == 0:
        _give(folder, user)
    return folder


def _give(folder: Path, user: tuple[int, int]) -> None:
    """What root has written, to the container's user, who alone may read the key. Mosquitto asks the same of acl."""
    try:
        for name in ("key.pem", ACL_NAME, "data"):
            os.chown(folder / name, *user, follow_symlinks=False)
        (folder / "data").chmod(0o700)
        mode = folder.stat().st_mode
        if not mode & 0o001 and folder.stat().st_uid != user[0]:  # the fleet's own is root's alone
            os.chown(folder, -1, user[1])
            folder.chmod(mode & 0o777 | 0o050)
    except OSError as exc:
        raise StorageError(f"cannot give {folder} to user {user[0]} ({exc.strerror})", "give --out") from exc
