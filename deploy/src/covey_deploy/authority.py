"""The fleet's certificate authority: keys, certificates and the list of revoked ones, as values.

No files, no clock: whoever calls passes the time. ECDSA P-256, because every TLS stack and broker takes it, also AWS
IoT Core and Android (docs/adr/0040). Seals are another thing: Ed25519, covey_protocol.seals.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple, Optional, Union

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from covey_protocol.errors import ConfigError

SERIAL_BYTES = 16
BROKER = "broker"  # the only role that serves; the others are clients
REASONS = {
    "unspecified": x509.ReasonFlags.unspecified,
    "key-compromise": x509.ReasonFlags.key_compromise,
    "superseded": x509.ReasonFlags.superseded,
    "cessation-of-operation": x509.ReasonFlags.cessation_of_operation,
    "privilege-withdrawn": x509.ReasonFlags.privilege_withdrawn,
}
Key = ec.EllipticCurvePrivateKey


class Authority(NamedTuple):
    certificate: x509.Certificate
    key: Key


class Dates(NamedTuple):
    begin: datetime
    end: datetime

    @classmethod
    def of(cls, now: datetime, days: float, slack_hours: float) -> Dates:
        """From slack_hours ago, for clocks that are behind, until `days` from now. In whole seconds."""
        now = now.replace(microsecond=0)
        return cls(now - timedelta(hours=slack_hours), now + timedelta(days=days))


class Revoked(NamedTuple):
    serial: int
    at: datetime
    reason: str


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


def make_authority(fleet: str, number: int, dates: Dates) -> Authority:
    """Signs certificates of the fleet and nothing else: no authority under it. number: of the fleet's authorities."""
    key = new_key()
    name = _name(fleet, f"authority {number} of {fleet}"[:64])
    builder = _builder(name, name, key.public_key(), dates)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return Authority(builder.sign(key, hashes.SHA256()), key)


def issue(
    authority: Authority,
    fleet: str,
    role: str,
    name: str,
    public_key: ec.EllipticCurvePublicKey,
    dates: Dates,
    hosts: Sequence[str] = (),
) -> x509.Certificate:
    """A certificate for one of the fleet. name: the MQTT user. hosts: DNS names and addresses of a broker.

    It ends no later than the authority.
    """
    dates = Dates(dates.begin, min(dates.end, authority.certificate.not_valid_after_utc))
    usage = ExtendedKeyUsageOID.SERVER_AUTH if role == BROKER else ExtendedKeyUsageOID.CLIENT_AUTH
    names: list[x509.GeneralName] = [host_name(host) for host in hosts]
    names = names or [x509.UniformResourceIdentifier(f"urn:covey:{fleet}:{role}:{name}")]
    builder = _builder(_name(fleet, name), authority.certificate.subject, public_key, dates)
    issuer_id = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(signs_certificates=False), True),
        (x509.ExtendedKeyUsage([usage]), False),
        (x509.SubjectAlternativeName(names), False),
        (x509.SubjectKeyIdentifier.from_public_key(public_key), False),
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), False),
    ):
        builder = builder.add_extension(extension, critical)
    return builder.sign(authority.key, hashes.SHA256())


def make_crl(authority: Authority, revoked: Iterable[Revoked], number: int, dates: Dates) -> bytes:
    """The signed list, PEM. number: larger than that of every list before. Outside its dates a broker takes no client
    at all."""
    issuer_id = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(dates.begin)
        .next_update(dates.end)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), critical=False)
    )
    for one in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(one.serial).revocation_date(one.at)
        if one.reason != "unspecified":  # RFC 5280, 5.3.1: then the extension is left out
            entry = entry.add_extension(x509.CRLReason(REASONS[one.reason]), critical=False)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def host_name(host: str) -> Union[x509.DNSName, x509.IPAddress]:
    """As a certificate names it. ConfigError for what is neither a DNS name nor an address."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.rstrip(".").split(".")
    fine = host.isascii() and all(one.replace("-", "").isalnum() and len(one) < 64 for one in labels)
    if not fine or len(host) > 253:
        raise ConfigError(f"{host[:80]!r} is neither a DNS name nor an IP address", "write it without port and scheme")
    return x509.DNSName(host)


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: Key, passphrase: Optional[bytes] = None) -> bytes:
    """PKCS #8; encrypted where there is a passphrase."""
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def is_encrypted(pem: bytes) -> bool:
    return b"BEGIN ENCRYPTED PRIVATE KEY" in pem


def read_key(pem: bytes, where: str, passphrase: Optional[bytes] = None) -> Key:
    """ConfigError names the file and never shows what is in it."""
    wrong = "passphrase is wrong, or it" if passphrase else "file"
    try:
        key = serialization.load_pem_private_key(pem, passphrase)
    except (ValueError, TypeError):
        # without its cause: what a parser says of a secret stays here
        raise ConfigError(f"{where}: the {wrong} is no readable private key", "check the file") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(f"{where} is not an ECDSA P-256 key", "name the key that covey made")
    return key


def read_certificates(pem: bytes, where: str) -> list[x509.Certificate]:
    """All of a file, at least one."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as exc:
        raise ConfigError(f"{where} holds no certificate in PEM form", "restore the file from a backup") from exc


def read_crl(pem: bytes, where: str) -> x509.CertificateRevocationList:
    """The first of a file."""
    try:
        return x509.load_pem_x509_crl(pem)
    except ValueError as exc:
        raise ConfigError(f"{where} holds no list of revoked certificates", "restore it from a backup") from exc


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, dates: Dates
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(int.from_bytes(secrets.token_bytes(SERIAL_BYTES), "big") or 1)
        .not_valid_before(dates.begin)
        .not_valid_after(dates.end)
    )


def _name(fleet: str, common_name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet), x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
