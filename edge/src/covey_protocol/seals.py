"""Seals: Ed25519 signatures and the keys that make and check them.

Called *seals* because *signature* is TFLite's word for an entry point. Keys travel as 64 hex digits (public) and lie
on disk as PKCS #8 PEM (private). This file does not read or write files and knows nothing of messages. The
cryptography package (9 MB of memory) is loaded where a seal is first made or checked.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from covey_protocol.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ed25519

SEAL_BYTES = 64
KEY_BYTES = 32


class PublicKey:
    """Checks seals. Equal when the key is equal."""

    def __init__(self, raw: bytes) -> None:
        if len(raw) != KEY_BYTES:
            raise ConfigError(f"a public key has {KEY_BYTES} bytes, not {len(raw)}", "copy the key again")
        self.raw = raw

    @cached_property
    def _key(self) -> ed25519.Ed25519PublicKey:
        from cryptography.hazmat.primitives.asymmetric import ed25519

        return ed25519.Ed25519PublicKey.from_public_bytes(self.raw)

    @classmethod
    def from_hex(cls, text: str) -> PublicKey:
        try:
            return cls(bytes.fromhex(text.strip()))
        except ValueError as exc:
            raise ConfigError(f"{text[:80]!r} is not a public key", "give 64 hex digits") from exc

    def hex(self) -> str:
        return self.raw.hex()

    def verifies(self, seal: bytes, data: bytes) -> bool:
        """Whether `seal` was made over exactly `data` by this key's owner."""
        from cryptography.exceptions import InvalidSignature

        try:
            self._key.verify(seal, data)
        except InvalidSignature:
            return False
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        return f"PublicKey({self.hex()[:16]}...)"


class SealingKey:
    """Makes seals. Its repr never shows the secret."""

    def __init__(self, key: ed25519.Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> SealingKey:
        from cryptography.hazmat.primitives.asymmetric import ed25519

        return cls(ed25519.Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> SealingKey:
        """A key from 32 given bytes: for tests and golden vectors only."""
        from cryptography.hazmat.primitives.asymmetric import ed25519

        return cls(ed25519.Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def from_pem(cls, pem: bytes, name: str = "key") -> SealingKey:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519

        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as exc:
            raise ConfigError(f"{name} is not a readable private key", "create it again") from exc
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise ConfigError(f"{name} is not an Ed25519 key", "create it again")
        return cls(key)

    def pem(self) -> bytes:
        from cryptography.hazmat.primitives import serialization

        return self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def seal(self, data: bytes) -> bytes:
        return self._key.sign(data)

    def __repr__(self) -> str:
        return f"SealingKey({self.public.hex()[:16]}...)"
