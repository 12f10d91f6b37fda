"""Certificates that a fleet's owner makes for a moment: for the doctor's tests, and to take a session over.

They are signed by the fleet's authority, live in a private folder for as long as they are used, and are in no list.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Optional

from covey_deploy import authority as ca
from covey_deploy.fleet_folder import DEVICE, FleetFolder
from covey_edge.config import read_file
from covey_edge.mqtt import Broker, parse_broker

LIFE = timedelta(minutes=10)
SLACK = timedelta(days=1)  # for brokers whose clock is behind
Passphrase = Callable[[], Optional[bytes]]


def no_passphrase() -> Optional[bytes]:
    return None


@contextlib.contextmanager
def passing_broker(
    fleet: FleetFolder, name: str, address: Optional[str] = None, passphrase: Passphrase = no_passphrase
) -> Iterator[Broker]:
    """The fleet's broker, to be entered as `name` with a certificate that ends in ten minutes.

    address: HOST:PORT in place of the fleet's own. passphrase: asked only where the authority's key is encrypted.
    ConfigError where the key of the authority is not in the folder.
    """
    pem = read_file(fleet.ca / "ca.key")
    own = ca.read_certificates(read_file(fleet.ca / "ca.pem"), str(fleet.ca / "ca.pem"))
    key = ca.read_key(pem, str(fleet.ca / "ca.key"), passphrase() if ca.is_encrypted(pem) else None)
    signer = next(one for one in own if one.public_key() == key.public_key())
    now, new = datetime.now(timezone.utc), ca.new_key()
    dates = ca.Dates(now - SLACK, now + LIFE)
    certificate = ca.issue(ca.Authority(signer, key), fleet.name, DEVICE, name, new.public_key(), dates)
    with tempfile.TemporaryDirectory(prefix="covey-") as folder:  # mode 700
        both = Path(folder) / "passing.pem"
        both.touch(mode=0o600)
        both.write_bytes(ca.certificate_pem(certificate) + ca.key_pem(new))
        url = f"mqtts://{address}" if address else fleet.broker_url
        yield parse_broker(url, ca_file=fleet.ca / "ca.pem", cert_file=both, key_file=both)
