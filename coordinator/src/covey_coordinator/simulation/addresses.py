"""Addresses of workers: HOST:PORT, with an IPv6 host in brackets."""

from __future__ import annotations

from covey_protocol.errors import ConfigError

MAX_PORT = 65535


def split_address(address: str) -> tuple[str, int]:
    """Host and port. Raises ConfigError naming the address."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or not host or (":" in host and not bracketed) or not _is_port(port):
        raise ConfigError(f"{address!r} is not HOST:PORT", "for example 127.0.0.1:8470, or [::1]:8470")
    return host, int(port)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) <= MAX_PORT
