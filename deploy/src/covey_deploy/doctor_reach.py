"""The doctor's way to a broker, step by step: its name, its port, TLS, its certificate, what it thinks of ours.

Nothing here speaks MQTT with a broker that takes us, so no session is disturbed: a broker that takes a certificate and
hears nothing more is left at once.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Optional

from covey_edge.mqtt import CONNECT_TIMEOUT_S, Broker, tls_context
from covey_edge.mqtt_reasons import NO_CERTIFICATE, tls_remedy
from covey_edge.preflight import OK, WARNING, WRONG, Finding, dated
from covey_protocol.errors import EXIT_CONFIG, EXIT_TRANSPORT

ALERT_S = 0.5  # in TLS 1.3 a refusal comes after the handshake; besides, three times as long as that took
# CONNECT of MQTT 3.1.1, clean session, client id "covey-doctor": what a listener without TLS answers
PLAIN_CONNECT = b"\x10\x18\x00\x04MQTT\x04\x02\x00\x14\x00\x0ccovey-doctor"


def reach(broker: Broker, whose: str = "") -> Iterator[Finding]:
    """whose: certificate that is shown, for the words. ConfigError where a file of `broker` is wrong."""
    try:
        found = socket.getaddrinfo(broker.host, broker.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        what = f"{broker.host} has no address ({getattr(exc, 'strerror', None) or exc})"
        yield _lost("name", what, "check the name, and this machine's name server (names in .local need mDNS)")
        return
    addresses = sorted({str(one[4][0]) for one in found})
    yield Finding("name", OK, f"{broker.host} is {', '.join(addresses)}")
    try:
        started = time.monotonic()
        raw = socket.create_connection((broker.host, broker.port), CONNECT_TIMEOUT_S)
    except OSError as exc:
        yield _lost("port", f"{broker} cannot be reached ({exc.strerror or exc})", _port_remedy(exc))
        return
    yield Finding("port", OK, f"{broker.port} is open, {1000 * (time.monotonic() - started):.0f} ms")
    if not broker.tls:
        raw.close()
        what = f"{broker} is not encrypted on its way"
        yield Finding("tls", WARNING, what, "use mqtts:// on any network that is not yours alone")
        return
    yield from _tls(broker, raw, whose)


def _lost(check: str, what: str, remedy: str) -> Finding:
    return Finding(check, WRONG, what, remedy, EXIT_TRANSPORT)


def _port_remedy(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there: start the broker, or correct the port (mqtts is usually 8883)"
    if isinstance(error, TimeoutError):
        return "a firewall drops it, or the machine is off: allow the port there"
    return "check the network between here and the broker"


def _tls(broker: Broker, raw: socket.socket, whose: str) -> Iterator[Finding]:
    context = tls_context(broker)
    assert context is not None
    started = time.monotonic()
    try:
        with context.wrap_socket(raw, server_hostname=broker.host) as wrapped:  # closes `raw`, also where it fails
            took = time.monotonic() - started
            yield Finding("tls", OK, f"{wrapped.version()}; the broker's certificate is for {broker.host}")
            shown = wrapped.getpeercert(binary_form=True)
            assert shown is not None
            yield dated(f"the certificate of {broker}", shown)
            yield _verdict(broker, wrapped, max(ALERT_S, 3 * took), whose)
    except ssl.SSLCertVerificationError as exc:
        yield _unverified(broker, exc)
    except (ssl.SSLError, OSError) as exc:
        yield _failed(broker, exc, whose)


def _verdict(broker: Broker, wrapped: ssl.SSLSocket, patience_s: float, whose: str) -> Finding:
    """Whether it takes our certificate: it says nothing if it does."""
    ours = f"the {whose or 'client'} certificate" if broker.cert_file else "us without a certificate"
    wrapped.settimeout(patience_s)
    try:
        said = wrapped.recv(1)
    except TimeoutError:
        return Finding("certificate", OK, f"{broker} takes {ours}")
    except OSError as exc:
        return _failed(broker, exc, whose)
    what = f"{broker} closed the connection after the TLS handshake" if not said else f"{broker} speaks before us"
    return _lost("certificate", what, "look at the broker's log")


def _unverified(broker: Broker, error: ssl.SSLCertVerificationError) -> Finding:
    what = f"the certificate of {broker} is not to be trusted: {error.verify_message}"
    names = _names(broker)
    if names and "ismatch" in error.verify_message:
        what = f"the certificate of {broker} is for {', '.join(names)}, not for {broker.host}"
    return _lost("tls", what, tls_remedy(error))


def _names(broker: Broker) -> list[str]:
    """In the certificate that it shows, whoever signed it; [] where that cannot be seen."""
    from cryptography import x509

    context = tls_context(broker)
    assert context is not None
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with suppress(OSError, ValueError, x509.ExtensionNotFound):
        raw = socket.create_connection((broker.host, broker.port), CONNECT_TIMEOUT_S)
        with context.wrap_socket(raw, server_hostname=broker.host) as wrapped:
            shown = x509.load_der_x509_certificate(wrapped.getpeercert(binary_form=True) or b"")
        names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return [str(one.value) for one in names]
    return []


def _failed(broker: Broker, error: OSError, whose: str) -> Finding:
    """A handshake that the other side ended, or that was none."""
    reason = str(getattr(error, "reason", None) or error.strerror or error)
    if speaks_plainly(broker):
        what = f"port {broker.port} of {broker.host} is a listener without TLS"
        return _lost("tls", what, "use the port of TLS, or give that listener certificates (covey broker config)")
    remedy = tls_remedy(error)
    about_us = "ALERT" in reason.upper() and "VERSION" not in reason.upper()
    if about_us and broker.cert_file:
        return _lost("certificate", f"{broker} refuses the {whose or 'client'} certificate ({reason})", remedy)
    if about_us:
        return _lost("certificate", f"{broker} takes nobody without a certificate ({reason})", NO_CERTIFICATE)
    return _lost("tls", f"TLS with {broker} failed ({reason})", remedy)


def speaks_plainly(broker: Broker) -> bool:
    """Whether this port answers MQTT without TLS."""
    with suppress(OSError), socket.create_connection((broker.host, broker.port), CONNECT_TIMEOUT_S) as plain:
        plain.settimeout(2.0)
        plain.sendall(PLAIN_CONNECT)
        return plain.recv(2) == b"\x20\x02"
    return False


def own_name(broker: Broker, name: str) -> Optional[Finding]:
    """Whether our certificate says who we are; None without one. ConfigError where the file is none."""
    from cryptography import x509

    from covey_edge.config import read_file

    if broker.cert_file is None:
        return None
    try:
        certificate = x509.load_pem_x509_certificate(read_file(broker.cert_file))
    except ValueError:
        return Finding("certificate", WRONG, f"{broker.cert_file} is no certificate", "check the path", EXIT_CONFIG)
    names = [str(one.value) for one in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
    if names == [name]:
        return Finding("certificate", OK, f"our certificate is {name}'s")
    what = f"our certificate is {', '.join(names) or 'nobody'}'s, and we are {name}: the broker goes by it"
    return Finding("certificate", WRONG, what, f"use the certificate that was made for {name}", EXIT_CONFIG)
