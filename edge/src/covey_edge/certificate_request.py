"""A device's request for a certificate, made where its keys are: they never leave it.

One file of two PEM blocks: a PKCS #10 request (subject: fleet and device id; a name `urn:covey:seal:HEX` with the
public seal key), signed with the TLS key, and `COVEY SEAL`: the seal over all of that request. So each key vouches for
the other: nobody can pass one of them off with a key of his own.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from covey_protocol.errors import ConfigError
from covey_protocol.seals import PublicKey, SealingKey
from covey_protocol.topics import check_device_id, check_name

SEAL_NAME = "urn:covey:seal:"
PURPOSE = b"covey certificate request\0"  # a seal under anything else is not one of these
MAX_BYTES = 16 * 1024
_BLOCK = re.compile(rb"-----BEGIN COVEY SEAL-----\s+([A-Za-z0-9+/=\s]+?)\s+-----END COVEY SEAL-----")


@dataclass(frozen=True)
class Request:
    device_id: str
    fleet: str
    public_key: ec.EllipticCurvePublicKey
    seal_key: PublicKey


def new_key_pem() -> bytes:
    """A TLS key: ECDSA P-256, PKCS #8."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def make_request(device_id: str, fleet: str, key_pem: bytes, seal: SealingKey) -> bytes:
    """ConfigError where key_pem is no ECDSA P-256 key."""
    try:
        key = serialization.load_pem_private_key(key_pem, None)
    except (ValueError, TypeError):
        raise ConfigError("the TLS key is no readable private key", "make another: covey key request") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError("the TLS key is not an ECDSA P-256 key", "make another: covey key request")
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, check_name(fleet, "fleet")),
            x509.NameAttribute(NameOID.COMMON_NAME, check_device_id(device_id)),
        ]
    )
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(SEAL_NAME + seal.public.hex())])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject).add_extension(names, critical=False)
    request = builder.sign(key, hashes.SHA256())
    seal_text = base64.encodebytes(seal.seal(_sealed(request)))
    pem = request.public_bytes(serialization.Encoding.PEM)
    return pem + b"-----BEGIN COVEY SEAL-----\n" + seal_text + b"-----END COVEY SEAL-----\n"


def read_request(data: bytes, where: str) -> Request:
    """ConfigError unless both keys vouch for each other and for the names."""
    try:
        if len(data) > MAX_BYTES:
            raise ValueError
        request = x509.load_pem_x509_csr(data)
        (fleet,) = request.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        (device_id,) = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        (uri,) = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (block,) = _BLOCK.findall(data)
        seal = base64.b64decode(block)
        public_key = request.public_key()
        if not isinstance(uri, x509.UniformResourceIdentifier) or not uri.value.startswith(SEAL_NAME):
            raise ValueError
        seal_key = PublicKey.from_hex(uri.value[len(SEAL_NAME) :])
    except (ValueError, x509.ExtensionNotFound, binascii.Error, ConfigError) as exc:
        raise ConfigError(f"{where} is no request of a device", "make it there: covey key request") from exc
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(public_key.curve, ec.SECP256R1):
        raise ConfigError(f"{where}: the TLS key is not an ECDSA P-256 key", "make another: covey key request")
    if not request.is_signature_valid or not seal_key.verifies(seal, _sealed(request)):
        raise ConfigError(f"{where} was changed, or a key in it is not its sender's", "make it again on the device")
    ids = check_device_id(str(device_id.value)), check_name(str(fleet.value), "fleet")
    return Request(ids[0], ids[1], public_key, seal_key)


def _sealed(request: x509.CertificateSigningRequest) -> bytes:
    return PURPOSE + request.public_bytes(serialization.Encoding.DER)
