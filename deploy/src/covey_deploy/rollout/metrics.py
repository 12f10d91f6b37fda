"""How many rounds were abandoned, as a coordinator's metrics count them."""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request

from covey_protocol.errors import ConfigError, TransportError

TIMEOUT_S = 3.0
MOST_BYTES = 4 * 2**20
_ABANDONED = re.compile(rb'^covey_rounds_total\{outcome="abandoned"\} (\d+)', re.MULTILINE)


def abandoned_rounds(url: str) -> int:
    """Of all runs that this coordinator serves. TransportError where none answers, ConfigError for others."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is no address of metrics", "give http://HOST:9464/metrics")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:  # noqa: S310 - the scheme was looked at
            data: bytes = answer.read(MOST_BYTES)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as exc:
        raise TransportError(f"{url} does not answer ({exc})", "is `covey serve` running, with [metrics]?") from exc
    found = _ABANDONED.search(data)
    if found is None:
        raise ConfigError(f"{url} does not count rounds", "give the address of a coordinator's [metrics]")
    return int(found[1])
