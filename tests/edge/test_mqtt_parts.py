"""The parts of the MQTT adapter that need no broker: the send window, waiting times, and what refusals mean."""

from __future__ import annotations

import datetime
import random
import ssl
from pathlib import Path

import pytest
from brokers import certificates
from hypothesis import given
from hypothesis import strategies as st

from covey_edge.mqtt import PACKET_HEADER_BYTES, parse_broker
from covey_edge.mqtt_reasons import HOPELESS, certificate_end, check_certificate, delay_s, remedy_for, tls_remedy
from covey_edge.mqtt_window import Outgoing, SendWindow
from covey_protocol import codec
from covey_protocol.codec import CHUNK_ROOM_BYTES
from covey_protocol.errors import ConfigError, TransportError
from covey_protocol.messages import MAX_CHUNK_BYTES, MAX_CHUNKS, Chunk
from covey_protocol.seals import SealingKey
from covey_protocol.topics import Topics


def message(number: int) -> Outgoing:
    return Outgoing(number, "t", b"x" * number, retain=False)


@given(st.integers(1, 30), st.lists(st.sampled_from(["add", "take", "acknowledge", "reset"]), max_size=200))
def test_messages_go_out_in_order_and_none_is_lost_whatever_happens(limit: int, steps: list[str]) -> None:
    window, added, packet_id = SendWindow(), 0, 0
    window.limit = limit
    under_way: dict[int, int] = {}  # packet id -> number
    done: set[int] = set()
    for step in steps:
        if step == "add":
            added += 1
            window.add(message(added))
        elif step == "take":
            taken = window.take()
            open_numbers = [n for n in range(1, added + 1) if n not in done and n not in under_way.values()]
            if len(under_way) >= limit or not open_numbers:
                assert taken is None
                continue
            assert taken is not None
            assert taken.number == open_numbers[0], "the oldest message that is not under way goes first"
            packet_id += 1
            window.sent(packet_id, taken)
            under_way[packet_id] = taken.number
        elif step == "acknowledge" and under_way:
            first = next(iter(under_way))
            settled = window.acknowledged(first)
            assert settled == message(under_way[first])
            done.add(under_way.pop(first))
        elif step == "reset":
            window.reset()
            under_way.clear()
    assert window.empty == (len(done) == added)


def test_an_acknowledgement_that_belongs_to_nothing_is_nothing() -> None:
    assert SendWindow().acknowledged(7) is None


def test_the_largest_message_under_way_is_the_one_suspected() -> None:
    window = SendWindow()
    assert window.drop_largest() is None
    for number in (2, 9, 3):
        window.add(message(number))
    for packet_id in (1, 2, 3):
        taken = window.take()
        assert taken is not None
        window.sent(packet_id, taken)
    assert window.drop_largest() == message(9)
    window.reset()
    assert [taken.number for taken in (window.take(), window.take()) if taken] == [2, 3]


@given(st.integers(0, 100), st.booleans(), st.integers(0, 2**32))
def test_waiting_doubles_to_its_bound_with_jitter(attempt: int, hopeless: bool, seed: int) -> None:
    least, most = (60.0, 600.0) if hopeless else (1.0, 60.0)
    whole = min(most, least * 2**attempt)
    assert whole / 2 <= delay_s(attempt, hopeless, random.Random(seed)) <= whole


def test_a_fleet_does_not_come_back_in_one_instant() -> None:
    delays = {round(delay_s(0, False, random.Random(f"covey-home-pi-{i}")), 3) for i in range(100)}
    assert len(delays) > 80


def test_wrong_credentials_wait_longest() -> None:
    rng = random.Random(0)
    for attempt in range(10):
        assert delay_s(attempt, True, rng) >= 0.5 * 60 >= delay_s(attempt, False, rng) / 2
    assert {"Not authorized", "Bad user name or password"} <= set(HOPELESS)


@pytest.mark.parametrize("reason", ["Not authorized", "Quota exceeded", "a reason of the year 2040"])
def test_every_reason_has_a_remedy(reason: str) -> None:
    assert len(remedy_for(reason)) > 10


def test_the_room_beside_a_chunk_is_enough_for_the_longest_names() -> None:
    fleet, device = "f" * 63, "d" * 63
    topic, data = Topics(fleet).up(device), b"x" * MAX_CHUNK_BYTES
    longest = Chunk("r" * 95, bytes(32), MAX_CHUNKS - 1, data)
    key = SealingKey.from_seed(bytes(32))
    payload = codec.encode(longest, topic=topic, sender=device, sequence=2**53, key=key)
    packet = len(payload) + len(topic) + PACKET_HEADER_BYTES
    assert packet - len(data) <= CHUNK_ROOM_BYTES
    blob = Topics(fleet).blob(bytes(32), MAX_CHUNKS - 1)
    assert len(blob) + PACKET_HEADER_BYTES <= CHUNK_ROOM_BYTES


# --- certificates


def verification_error(words: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = words
    return error


TLS = {
    "an expired broker": (verification_error("certificate has expired"), "", "clock"),
    "a broker with other names": (
        verification_error("IP address mismatch, certificate is not valid"),
        "",
        "other names",
    ),
    "another authority": (verification_error("unable to get local issuer certificate"), "", "broker.ca_file"),
    "no client certificate": (None, "[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert", "broker.cert_file"),
    "a client certificate of another authority": (None, "[SSL: TLSV1_ALERT_UNKNOWN_CA]", "does not know the authority"),
    "a client certificate that expired": (None, "[SSL: SSLV3_ALERT_CERTIFICATE_EXPIRED]", "renew broker.cert_file"),
    "something else": (None, "", "8883"),
}


@pytest.mark.parametrize("what", TLS)
def test_a_failed_handshake_says_what_to_do(what: str) -> None:
    error, text, words = TLS[what]
    assert words in tls_remedy(error, text)


@pytest.mark.parametrize(
    ("days", "words"),
    [((-3, -1), "expired on"), ((1, 3), "valid only from")],
    ids=["expired: perhaps it is renewed while the agent waits", "not yet: perhaps the clock is set in a moment"],
)
def test_a_client_certificate_that_is_not_valid_today_is_refused_before_connecting(
    tmp_path: Path, days: tuple[int, int], words: str
) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    begins, ends = (now + datetime.timedelta(days=day) for day in days)
    files = certificates(tmp_path, client_dates=(begins, ends))
    with pytest.raises(TransportError, match=f"client.crt (is )?{words}"):
        check_certificate(files["client.crt"])
    check_certificate(files["server.crt"])


def test_a_certificate_says_when_it_ends_and_warns_before(tmp_path: Path) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    for days, words, soon in ((400, "valid until", False), (12.5, "ends in 12 days", True), (-1, "expired on", True)):
        end = now + datetime.timedelta(days=days)
        files = certificates(tmp_path, client_dates=(now - datetime.timedelta(days=9), end))
        said = certificate_end(files["client.crt"])
        assert said[0].startswith(words)
        assert f"{end:%Y-%m-%d}" in said[0]
        assert said[1] is soon
    assert certificate_end(tmp_path / "none") == ("cannot be read (No such file or directory)", True)


def test_a_file_that_is_no_certificate_is_named(tmp_path: Path) -> None:
    (tmp_path / "client.crt").write_text("nothing")
    with pytest.raises(ConfigError, match=r"client\.crt holds no certificate"):
        check_certificate(tmp_path / "client.crt")


def test_a_key_without_its_certificate_is_refused() -> None:
    with pytest.raises(ConfigError, match="key_file without its cert_file"):
        parse_broker("mqtts://host", key_file=Path("key"))
