"""The secret files of a backup under a passphrase: scrypt (RFC 7914) makes the key, ChaCha20-Poly1305 encrypts.

Bound to the backup's header, so that nobody puts them into another one. Nothing of a passphrase is ever said.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import click
import msgspec

from covey_coordinator.backup.archive import Checked
from covey_edge.config import read_file
from covey_protocol.errors import ConfigError, DataError

SALT_BYTES, NONCE_BYTES, KEY_BYTES = 16, 12, 32
SCRYPT_N, MOST_SCRYPT_N = 2**17, 2**20  # 128 MB and 0.5 s; a file may not ask for more than 1 GB
SHORTEST = 12


def asked(file: Path | None, *, new: bool) -> str:
    """The first line of the file, or what is typed. new: twice, and long enough."""
    if file is not None:
        words = read_file(file).decode(errors="replace").split("\n", 1)[0].rstrip("\r")
    else:
        try:
            words = click.prompt("passphrase", hide_input=True, confirmation_prompt=new, err=True)
        except click.Abort as exc:
            raise ConfigError("no passphrase was given", "type one, or name a file with --passphrase-file") from exc
    if new and len(words) < SHORTEST:
        raise ConfigError(f"a passphrase of {len(words)} characters", f"take {SHORTEST} or more: several words")
    return str(words)


def encrypted(files: Mapping[str, bytes], passphrase: str, salt: bytes, header: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    nonce = os.urandom(NONCE_BYTES)
    sealed = ChaCha20Poly1305(_key(passphrase, salt, SCRYPT_N)).encrypt(nonce, msgspec.msgpack.encode(files), header)
    return nonce + sealed


def decrypted(backup: Checked, passphrase: str, path: Path) -> dict[str, bytes]:
    """Name -> content. ConfigError for a wrong passphrase, which nobody can tell from changed bytes."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    header = backup.header
    if not 1 < header.scrypt_n <= MOST_SCRYPT_N or header.scrypt_n & (header.scrypt_n - 1):
        raise DataError(f"the backup {path} is damaged: scrypt with N = {header.scrypt_n}", "take another one")
    key = _key(passphrase, bytes.fromhex(header.salt), header.scrypt_n)
    nonce, data = backup.keys[:NONCE_BYTES], backup.keys[NONCE_BYTES:]
    try:
        plain = ChaCha20Poly1305(key).decrypt(nonce, data, backup.header_bytes)
    except (InvalidTag, ValueError) as exc:
        raise ConfigError(f"the keys in {path} do not open with this passphrase", "try the right one") from exc
    return msgspec.msgpack.decode(plain, type=dict[str, bytes])


def _key(passphrase: str, salt: bytes, n: int) -> bytes:
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    return Scrypt(salt=salt, length=KEY_BYTES, n=n, r=8, p=1).derive(passphrase.encode())
