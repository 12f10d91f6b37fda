"""The dates of certificates, against cryptography's reading of the same ones, and what is no certificate."""

from __future__ import annotations

import base64
import contextlib
import datetime
import subprocess
import sys
from pathlib import Path

import pytest
from brokers import certificates
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_edge.certificate_dates import validity

UTC = datetime.timezone.utc


@pytest.mark.parametrize(
    "dates",
    [
        ((1950, 1, 1), (1969, 12, 31)),
        ((1999, 12, 31), (2000, 2, 29)),
        ((2026, 11, 26), (2049, 12, 31)),
        ((2049, 12, 31), (2050, 1, 1)),  # the form of a date changes here
        ((2068, 12, 31), (9999, 12, 31)),
    ],
)
def test_the_dates_are_those_that_cryptography_reads(
    tmp_path: Path, dates: tuple[tuple[int, int, int], tuple[int, int, int]]
) -> None:
    first, last = (datetime.datetime(*date, 23, 59, 58, tzinfo=UTC) for date in dates)
    path = certificates(tmp_path, client_dates=(first, last))["client.crt"]
    one = x509.load_pem_x509_certificate(path.read_bytes())
    assert validity(path.read_bytes()) == (one.not_valid_before_utc, one.not_valid_after_utc) == (first, last)
    chain = b"subject: somebody\n" + path.read_bytes() + (tmp_path / "ca.crt").read_bytes()
    assert validity(chain) == (first, last)


def test_certificates_of_version_1_which_name_none_are_read(tmp_path: Path) -> None:
    one = x509.load_pem_x509_certificate(certificates(tmp_path)["ca.crt"].read_bytes())
    der = one.tbs_certificate_bytes
    assert der[4:9] == b"\xa0\x03\x02\x01\x02"
    body = der[9:]
    inner = b"\x30\x82" + len(body).to_bytes(2, "big") + body
    whole = b"\x30\x82" + len(inner).to_bytes(2, "big") + inner
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(whole) + b"-----END CERTIFICATE-----\n"
    assert validity(pem) == (one.not_valid_before_utc, one.not_valid_after_utc)


@pytest.fixture(scope="module")
def der(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = certificates(tmp_path_factory.mktemp("der"))["client.crt"]
    return base64.b64decode(b"".join(path.read_bytes().splitlines()[1:-1]))


@settings(max_examples=200, deadline=None)  # a busy machine is no error
@given(data=st.data())
def test_any_bytes_give_dates_or_a_value_error(der: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(der)))
    damaged = der[:at] + data.draw(st.binary(max_size=8)) + der[at + data.draw(st.integers(0, 8)) :]
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(damaged) + b"-----END CERTIFICATE-----\n"
    with contextlib.suppress(ValueError):
        assert all(moment.tzinfo is UTC for moment in validity(pem))


def test_what_ends_too_early_is_no_certificate(der: bytes) -> None:
    for size in range(120):
        pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der[:size]) + b"-----END CERTIFICATE-----\n"
        with pytest.raises(ValueError, match="certificate"):
            validity(pem)


def test_a_connection_with_a_client_certificate_loads_no_x509_library(tmp_path: Path) -> None:
    files = certificates(tmp_path)
    code = (
        "import sys; from pathlib import Path; from covey_edge.mqtt import parse_broker, tls_context\n"
        f"assert tls_context(parse_broker('mqtts://localhost', ca_file=Path({str(files['ca.crt'])!r}),"
        f" cert_file=Path({str(files['client.crt'])!r}), key_file=Path({str(files['client.key'])!r})))\n"
        "assert 'cryptography' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
