"""From when to when a certificate is valid, read off its file without the 2 MB that an X.509 library takes.

An agent with a client certificate asks at every connection. Only the dates are read (RFC 5280, 4.1); whether the rest
is in order is OpenSSL's business when it loads the file.
"""

from __future__ import annotations

import base64
import binascii
import re
from datetime import datetime, timezone

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)
INTEGER, SEQUENCE, VERSION = 0x02, 0x30, 0xA0
TIMES = {0x17: "%y%m%d%H%M%SZ", 0x18: "%Y%m%d%H%M%SZ"}  # UTCTime, GeneralizedTime


def validity(pem: bytes) -> tuple[datetime, datetime]:
    """Of the first certificate in a PEM file. ValueError where there is none."""
    block = _PEM.search(pem)
    if block is None:
        raise ValueError("no certificate in PEM form")
    try:
        certificate = base64.b64decode(block[1])
    except binascii.Error as exc:
        raise ValueError("a damaged certificate") from exc
    tag, content, _ = _element(certificate)
    tag, content, _ = _element(_expect(SEQUENCE, tag, content))
    rest = _expect(SEQUENCE, tag, content)
    for kind in (VERSION, INTEGER, SEQUENCE, SEQUENCE):  # version, serial number, algorithm, issuer
        tag, content, after = _element(rest)
        if kind == VERSION and tag != VERSION:
            continue  # of version 1, which it does not say
        _expect(kind, tag, content)
        rest = after
    tag, content, _ = _element(rest)
    first = _element(_expect(SEQUENCE, tag, content))
    return _time(*first[:2]), _time(*_element(first[2])[:2])


def _element(data: bytes) -> tuple[int, bytes, bytes]:
    """Of DER: the first one's tag and content, and what follows."""
    if len(data) < 2:
        raise ValueError("a certificate that ends too early")
    size, start = data[1], 2
    if size & 0x80:
        start += size & 0x7F
        size = int.from_bytes(data[2:start], "big")
    if start > len(data) or len(data) < start + size:
        raise ValueError("a certificate that ends too early")
    return data[0], data[start : start + size], data[start + size :]


def _expect(wanted: int, tag: int, content: bytes) -> bytes:
    if tag != wanted:
        raise ValueError("not a certificate")
    return content


def _time(tag: int, content: bytes) -> datetime:
    if tag not in TIMES:
        raise ValueError("a certificate without dates")
    moment = datetime.strptime(content.decode("ascii"), TIMES[tag]).replace(tzinfo=timezone.utc)
    # two digits are 1950 to 2049 (RFC 5280, 4.1.2.5.1); Python takes them for 1969 to 2068
    return moment.replace(year=moment.year - 100) if tag == 0x17 and moment.year >= 2050 else moment
