"""Client certificates that live for hours: their authority, the broker's door, and an owner who renews them in time,
in two steps, or late.

Real: the certificates, `mqtt.tls_context` and with it `check_certificate`, and the handshake, in memory. OpenSSL
cannot be given a made-up time: the broker's end leaves the dates to this file, its own certificate is good for ever.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import logging
import ssl
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from covey_edge.files import write_atomic
from covey_edge.mqtt_reasons import HOPELESS_MAX_S, tls_remedy
from covey_protocol.errors import StorageError, TransportError

if TYPE_CHECKING:
    from life.world import Life

HOST, CLIENT = "made-up", "pi"
NO_CHECK_TIME = 0x200000  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME
BROKER = """
ca_file = "ca.crt"
cert_file = "mine.crt"
key_file = "mine.key"
"""
STYLES = ("in time", "in time", "the key later", "the certificate later", "late")


def key_of(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes([number % 256]) * 31 + bytes([number // 256 + 77]))


def pem_of(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def certificate(name: str, key: Ed25519PrivateKey, starts: datetime, ends: datetime) -> bytes:
    """Signed by the authority, in PEM. Nothing of it is random, so that lives can be repeated."""
    authority = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")])
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder(authority, subject, key.public_key(), 7, starts, ends)
    builder = builder.add_extension(x509.BasicConstraints(name == "authority", None), True)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
    return builder.sign(key_of(0), None).public_bytes(Encoding.PEM)


@functools.lru_cache(None)
def lasting() -> tuple[bytes, bytes]:
    """The authority's certificate and the broker's, whose dates are nobody's concern here."""
    dates = datetime(2020, 1, 1, tzinfo=timezone.utc), datetime(2120, 1, 1, tzinfo=timezone.utc)
    return certificate("authority", key_of(0), *dates), certificate(HOST, key_of(1), *dates)


class Certificates:
    """lives_s: of each client certificate; 0 for a broker without TLS."""

    def __init__(self, world: Life, device: Path, lives_s: float) -> None:
        self._world, self._lives_s = world, lives_s
        self.on = bool(lives_s)
        self._paths = device / "mine.crt", device / "mine.key"
        self._number = 1
        self._planned = 0  # whose renewal the owner has in mind
        self.secrets: list[bytes] = []
        self._ends = 0.0  # of the newest, in the world's seconds
        self.warned = self.ups = 0
        if not self.on:
            return
        device.mkdir(parents=True, exist_ok=True)
        authority, broker = lasting()
        (device / "ca.crt").write_bytes(authority)
        for path, data in zip(self._paths, self._make()):
            path.write_bytes(data)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        own = device.parent / "broker.pem"
        own.write_bytes(broker + pem_of(key_of(1)))
        self._context.load_cert_chain(str(own))
        self._context.load_verify_locations(str(device / "ca.crt"))
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._context.verify_flags |= NO_CHECK_TIME  # type: ignore[operator]

    def _make(self) -> tuple[bytes, bytes]:
        """The next certificate, from now on, and its key."""
        self._number += 1
        self._ends = self._world.clock.now + self._lives_s
        key, starts = key_of(self._number), self._world.true_time()
        pem = pem_of(key)
        self.secrets += [key.private_bytes_raw()[:16], key.private_bytes_raw()[-16:], pem.splitlines()[1][-40:-4]]
        self.secrets.append(base64.b64encode(key.private_bytes_raw())[4:36])
        ends = starts + timedelta(seconds=self._lives_s)
        return certificate(CLIENT, key, starts - timedelta(minutes=1), ends), pem

    # --- the broker's door

    def admit(self, context: ssl.SSLContext) -> float:
        """Until when this certificate is good. TransportError where it does not open the door."""
        shown = x509.load_der_x509_certificate(self._shake_hands(context))
        here = x509.load_pem_x509_certificate(self._paths[0].read_bytes())
        self._world.require(shown == here, "shows a certificate that is not in its file any more")
        left_s = (shown.not_valid_after_utc - self._world.true_time()).total_seconds()
        if left_s <= 0:
            alert = "[SSL: SSLV3_ALERT_CERTIFICATE_EXPIRED]"
            raise TransportError(f"the broker refuses ({alert})", tls_remedy(None, alert), transient=False)
        return left_s

    def _shake_hands(self, context: ssl.SSLContext) -> bytes:
        """The certificate that the broker sees, in DER."""
        there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(back, there, server_hostname=HOST)
        server = self._context.wrap_bio(there, back, server_side=True)
        for end in (client, server, client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
        seen = server.getpeercert(binary_form=True)
        assert seen is not None
        return seen

    # --- the owner

    def start(self) -> None:
        if self.on:
            self._plan()

    def _plan(self) -> None:
        """When and how the newest certificate is renewed."""
        world, rng = self._world, self._world.rng
        self._planned = self._number
        style = rng.choice(STYLES)
        early_s = -rng.uniform(0.05, 0.2) * self._lives_s if style == "late" else rng.uniform(0.1, 0.3) * self._lives_s
        wait_s = rng.uniform(0.02, 0.12) * self._lives_s if style.endswith("later") else 0.0

        def renew() -> None:
            if not world.over:
                self._renew(style, wait_s)

        world.at(max(0.0, self._ends - world.clock.now - early_s), renew)

    def _renew(self, style: str, wait_s: float) -> None:
        self._world.seen[f"renewal: {style}"] += 1
        files = list(zip(self._paths, self._make()))
        (path, data), (other, more) = files if style != "the certificate later" else files[::-1]
        number = self._number
        self._world.at(wait_s, lambda: self._write(number, other, more, last=True))  # also where the power goes in this
        self._write(number, path, data)

    def _write(self, number: int, path: Path, data: bytes, *, last: bool = False) -> None:
        """Until it has worked: the owner looks again at what was done."""
        world = self._world
        if number != self._number:
            return
        if path.read_bytes() != data:
            world.at(30.0, lambda: self._write(number, path, data, last=last))
            if world.off:
                return
            try:
                write_atomic(path, data, mode=0o600)
            except StorageError:
                return
            world.log(f"{path.name} is renewed")
        if last and self._planned != number:
            self._expect()
            self._plan()

    def calm(self) -> None:
        """The owner puts all in order, once and for all."""
        if self.on:
            self._lives_s = 48 * 3600.0
            self._renew("in time", 0.0)

    # --- what must hold

    def _expect(self) -> None:
        """An agent that runs all the time is back by itself, also when the old certificate ends later."""
        for wait_s in (0.0, self._lives_s / 2):
            self._expect_in(HOPELESS_MAX_S + 60.0 + wait_s)

    def _expect_in(self, wait_s: float) -> None:
        world = self._world
        program, since, number = world.program, world.misfortunes(), self._number

        def look() -> None:
            if program is None or program is not world.program or world.misfortunes() != since:
                return
            if number != self._number:  # renewed again meanwhile: that has its own time
                return
            if self._whole() and world.broker_up and world.wire is not None and world.clock.now < self._ends:
                world.seen["back after a renewal"] += 1
                world.require(world.wire.connected, "does not come back after its certificate was renewed")

        world.at(wait_s, look)

    def _whole(self) -> bool:
        """Whether no renewal is half done."""
        shown = x509.load_pem_x509_certificate(self._paths[0].read_bytes())
        return self._paths[1].read_bytes() == pem_of(key_of(self._number)) and (
            shown.public_key() == key_of(self._number).public_key()
        )

    def listener(self) -> logging.Handler:
        """Hears what the agent tells its owner."""
        handler = logging.Handler(logging.WARNING)
        handler.emit = self._hear  # type: ignore[method-assign]
        return handler

    def _hear(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self.warned += text.startswith(str(self._paths[0])) and ("renew it" in text)
        self._world.require(not any(one in text.encode() for one in self.secrets), "a secret is in the log", text)

    def check_end(self) -> None:
        require, starts = self._world.require, self._world.seen["start"]
        if self.on:
            close = self.ups - starts <= self.warned <= self.ups
            require(close, "its owner is not warned at every connection", self.warned, self.ups)


def virtual(clock: Any) -> type:
    """datetime whose now is the device's."""

    class Virtual(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.fromtimestamp(clock.time(), tz)

    return Virtual
