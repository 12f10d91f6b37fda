"""What a broker's refusals mean: reasons as errors that name the remedy, and how long to wait before trying again.

Pure functions: no sockets, no clock. Reasons are the names paho gives to MQTT 5 reason codes and to 3.1.1 return codes.
"""

from __future__ import annotations

import random
import ssl
from datetime import datetime, timezone
from pathlib import Path
from typing import Optional

from covey_protocol.errors import ConfigError, TransportError

RECONNECT_MIN_S, RECONNECT_MAX_S = 1.0, 60.0
HOPELESS_MIN_S, HOPELESS_MAX_S = 60.0, 600.0  # an operator has to mend it: do not hammer the broker meanwhile
EXPIRES_SOON_DAYS = 30  # a certificate's owner is warned

OLD_BROKER = "Unsupported protocol version"
# What trying again cannot mend, and what can.
HOPELESS = {
    "Bad user name or password": "check broker.username and broker.password_file",
    "Not authorized": "check the user, the client certificate and the broker's access rules",
    "Bad authentication method": "use a user and a password, or a client certificate",
    "Banned": "ask who runs the broker",
    "Client identifier not valid": "let the broker take client ids of any length, or shorten fleet and device_id",
    OLD_BROKER: "use a broker that speaks MQTT 3.1.1 or 5, and leave out broker.protocol",
    "Session taken over": "another program uses this name: give each device its own device_id, run one coordinator",
    "Retain not supported": "allow retained messages on the broker",
    "QoS not supported": "allow QoS 1 on the broker",
    "Use another server": "set broker.url to the address that who runs the broker names",
    "Server moved": "set broker.url to the address that who runs the broker names",
    "Packet too large": "set broker.max_message_bytes to the broker's limit",
    "Topic name invalid": "allow topics of five levels that begin with covey/",
    "Topic filter invalid": "allow topics of five levels that begin with covey/",
    "Wildcard subscription not supported": "allow the wildcard + on the broker",
}
PASSING = {
    "Server unavailable": "look at the broker's log",
    "Server busy": "wait, or give the broker more room",
    "Server shutting down": "start the broker again",
    "Quota exceeded": "raise the broker's quota for this client",
    "Receive maximum exceeded": "report it as a bug",
    "Message rate too high": "raise the broker's rate limit",
    "Connection rate exceeded": "raise the broker's rate limit",
    "Keep alive timeout": "check the network",
    "Administrative action": "ask who runs the broker",
}


def remedy_for(reason: str) -> str:
    return HOPELESS.get(reason) or PASSING.get(reason) or "look at the broker's log"


def delay_s(attempt: int, hopeless: bool, rng: random.Random) -> float:
    """How long to wait before trying again: doubling from 1 to 60 s, from 60 to 600 s where an operator is needed.

    attempt: 0 for the first wait. The whole time is drawn between half of it and all of it, so that a fleet does not
    come back in one instant.
    """
    least, most = (HOPELESS_MIN_S, HOPELESS_MAX_S) if hopeless else (RECONNECT_MIN_S, RECONNECT_MAX_S)
    whole = min(most, least * 2.0 ** min(attempt, 20))
    return whole * rng.uniform(0.5, 1.0)


# --- TLS

_OTHER_AUTHORITY = "broker.ca_file is not the authority that signed the broker's certificate"
_VERIFY = {
    "certificate has expired": "renew the broker's certificate (or its authority's), or set this machine's clock",
    "certificate is not yet valid": "this machine's clock is behind, or the broker's certificate begins in the future",
    "self-signed certificate": "the broker's certificate is self-signed: name it in broker.ca_file",
    "unable to get local issuer certificate": _OTHER_AUTHORITY,
    "self-signed certificate in certificate chain": _OTHER_AUTHORITY,
}
NO_CERTIFICATE = "if the broker asks for a client certificate, set broker.cert_file and broker.key_file"
# OpenSSL's names for what a broker thinks of our certificate, in the alerts it sends
_ALERTS = {
    "CERTIFICATE_REQUIRED": NO_CERTIFICATE,
    "HANDSHAKE_FAILURE": NO_CERTIFICATE,
    "UNKNOWN_CA": "the broker does not know the authority of broker.cert_file: get a certificate from the broker's own",
    "DECRYPT_ERROR": "the broker does not take broker.cert_file: get a certificate from the broker's own authority",
    "CERTIFICATE_EXPIRED": "the client certificate has expired: renew broker.cert_file, or set this machine's clock",
    "CERTIFICATE_REVOKED": "the client certificate was revoked: get another broker.cert_file",
    "BAD_CERTIFICATE": "the broker does not take broker.cert_file: get a certificate from the broker's own authority",
}


def tls_remedy(error: Optional[BaseException], text: str = "") -> str:
    """What to do about a failed TLS handshake. text: what paho logged, where OpenSSL's error came while reading."""
    if isinstance(error, ssl.SSLCertVerificationError):
        told = error.verify_message
        if "ismatch" in told:
            return "the broker's certificate is for other names: use one of them in broker.url, or renew it"
        return next((remedy for words, remedy in _VERIFY.items() if told == words), "check broker.ca_file")
    told = f"{getattr(error, 'reason', '')} {text}".upper().replace(" ", "_")
    found = next((remedy for words, remedy in _ALERTS.items() if words in told), "")
    return found or "check the port (mqtts is usually 8883), broker.ca_file and the certificates"


def check_certificate(path: Path) -> None:
    """TransportError where the first certificate of a PEM file is not valid today, by this machine's clock.

    Not a ConfigError, after which nobody starts the agent again: a device that comes out of a drawer gets its renewed
    certificate while it waits, and one without a battery for its clock wakes up in the past.
    """
    starts, ended = _dates(path)
    now = datetime.now(timezone.utc)
    if now > ended:
        raise TransportError(f"{path} expired on {ended:%Y-%m-%d %H:%M} UTC", "renew it, or set this machine's clock")
    if now < starts:
        raise TransportError(f"{path} is valid only from {starts:%Y-%m-%d %H:%M} UTC", "set this machine's clock")


def certificate_end(path: Path) -> tuple[str, bool]:
    """Until when the first certificate of a PEM file is valid, in words, and whether that is soon."""
    try:
        _, ends = _dates(path)
    except ConfigError as exc:
        return str(exc), True
    except OSError as exc:
        return f"cannot be read ({exc.strerror})", True
    left = ends - datetime.now(timezone.utc)
    if left.days >= EXPIRES_SOON_DAYS:
        return f"valid until {ends:%Y-%m-%d}", False
    if left.days < 0:
        return f"expired on {ends:%Y-%m-%d}: renew it", True
    return f"ends in {left.days} days, on {ends:%Y-%m-%d}: renew it", True


def _dates(path: Path) -> tuple[datetime, datetime]:
    from covey_edge.certificate_dates import validity  # most agents that run without TLS do not need it

    try:
        return validity(path.read_bytes())
    except ValueError as exc:
        raise ConfigError(f"{path} holds no certificate in PEM form", "check the path") from exc
