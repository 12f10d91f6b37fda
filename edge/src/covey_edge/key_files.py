"""Private keys on disk: PKCS #8 PEM, mode 600, never overwritten."""

from __future__ import annotations

from pathlib import Path

from covey_edge.files import write_atomic
from covey_protocol.errors import ConfigError
from covey_protocol.seals import PublicKey, SealingKey


def make_key(path: Path) -> PublicKey:
    """Write a new Ed25519 private key; its public half. ConfigError where the file exists."""
    if path.exists():
        raise ConfigError(f"{path} exists", "choose another name; a lost key cannot be made again")
    key = SealingKey.generate()
    write_atomic(path, key.pem(), mode=0o600)
    return key.public
