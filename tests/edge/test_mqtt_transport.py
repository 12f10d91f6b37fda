"""The MQTT adapter against real brokers: both versions, limits, refusals, TLS, and connections that break."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import gc
import hashlib
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from brokers import RunningBroker, certificates, free_port, stop_broker, tls_lines
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from proxy import Proxy

from covey_edge import mqtt
from covey_edge.inbox import Inbox
from covey_edge.mqtt import ConnectionDown, ConnectionUp, Incoming, MqttTransport, Refused, parse_broker
from covey_protocol.blobs import BlobAssembly, blob_ref, chunks
from covey_protocol.errors import ConfigError, TransportError
from covey_protocol.topics import Topics

pytestmark = pytest.mark.broker

ANYONE = "allow_anonymous true"
TOPICS = Topics("test")
UP = TOPICS.up("a")
MEGABYTE = bytes(range(256)) * 4096
CHUNK = 64 * 1024


class Ends:
    """Transports of one test, and what each has received."""

    def __init__(self) -> None:
        self.made: list[MqttTransport] = []

    def connect(
        self, url: str, name: str = "a", topics: tuple[str, ...] = (), timeout_s: float = 10.0, **changes: Any
    ) -> MqttTransport:
        files = {key: changes.pop(key) for key in ("ca_file", "cert_file", "key_file") if key in changes}
        broker = dataclasses.replace(parse_broker(url, **files), **changes)
        transport = MqttTransport(broker, f"covey-test-{name}", Inbox())
        transport.subscribe([*topics, f"ready/{name}"])
        transport.connect(timeout_s)
        self.made.append(transport)
        assert isinstance(self.next(transport), ConnectionUp)
        transport.publish(f"ready/{name}", b"")  # it comes back when the subscriptions before it are in force
        assert self.next(transport).topic == f"ready/{name}"
        # and behind this the broker has our acknowledgement, too: it would say it again after a cut
        assert transport.flush([transport.publish(f"ready/{name}/too", b"")], 20)
        return transport

    def next(self, transport: MqttTransport, timeout_s: float = 60.0) -> Any:
        return transport._inbox.get(timeout=timeout_s)

    def until(self, transport: MqttTransport, kind: type, timeout_s: float = 60.0) -> Any:
        while not isinstance(item := self.next(transport, timeout_s), kind):
            pass
        return item

    def nothing(self, transport: MqttTransport, timeout_s: float = 1.0) -> None:
        with pytest.raises(queue.Empty):
            pytest.fail(str(self.next(transport, timeout_s))[:300])

    def close(self) -> None:
        for transport in self.made:
            transport.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


# --- both versions


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_messages_arrive_in_order_and_retained_ones_come_later(
    ends: Ends, mosquitto: RunningBroker, protocol: str
) -> None:
    sender, listener = (ends.connect(mosquitto.url, name, (UP,), protocol=protocol) for name in "ab")
    assert sender.protocol == protocol
    payloads = [bytes([number]) * 1000 for number in range(200)]
    sent = [sender.publish(UP, payload) for payload in payloads]
    assert sender.flush(sent, 20)
    assert [ends.next(listener) for _ in payloads] == [Incoming(UP, payload) for payload in payloads]
    assert sender.flush([sender.publish(TOPICS.round, b"now", retain=True)], 20)
    listener.subscribe([TOPICS.round])
    assert ends.next(listener) == Incoming(TOPICS.round, b"now", retained=True)
    listener.unsubscribe([UP])
    listener.subscribe([TOPICS.round])  # behind the other in the same connection: when it is answered, both are done
    assert ends.next(listener) == Incoming(TOPICS.round, b"now", retained=True)
    sender.flush([sender.publish(UP, b"unheard")], 20)
    ends.nothing(listener)


def test_a_broker_that_knows_only_the_older_mqtt_gets_it(ends: Ends) -> None:
    """The embedded broker does not answer MQTT 5 at all."""
    command = [sys.executable, "-m", "covey_edge", "broker", "run", "--port", "0", "--parent", str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            transport = ends.connect(url, topics=(UP,))
            assert transport.protocol == "3.1.1"
            assert transport.flush([transport.publish(UP, b"hello", expiry_s=60.0)], 20)
            assert ends.next(transport) == Incoming(UP, b"hello")
            with pytest.raises(TransportError, match="does not answer"):
                ends.connect(url, "b", timeout_s=2.0, protocol="5")
        finally:
            ends.close()
            process.terminate()


def test_a_port_where_no_broker_listens_is_named() -> None:
    url = f"mqtt://127.0.0.1:{free_port()}"
    with pytest.raises(TransportError, match=f"{url} cannot be reached .*check that the broker runs"):
        MqttTransport(parse_broker(url), "a", Inbox()).connect()


# --- limits


def test_a_limit_of_128_kb_takes_default_chunks(ends: Ends, broker_with: Callable[..., RunningBroker]) -> None:
    for line in ("max_packet_size 131072", "message_size_limit 131072"):
        for protocol in ("5", "3.1.1"):
            transport = ends.connect(broker_with(ANYONE, line).url, protocol=protocol, topics=(UP,))
            assert transport.flush([transport.publish(UP, bytes(CHUNK))], 20)
            assert ends.next(transport) == Incoming(UP, bytes(CHUNK))


def test_the_limit_that_the_broker_announces_is_learned_and_kept(
    ends: Ends, broker_with: Callable[..., RunningBroker]
) -> None:
    broker = broker_with(ANYONE, "max_packet_size 16384")
    transport = ends.connect(broker.url, topics=(UP,))
    assert transport.max_message_bytes == 16384
    with pytest.raises(TransportError, match=r"at most 16384 bytes, .* smaller chunk_bytes") as caught:
        transport.publish(UP, bytes(16384))
    assert not caught.value.transient
    most = 16384 - 15 - len(UP)
    assert transport.flush([transport.publish(UP, bytes(most), expiry_s=60.0)], 20)
    assert ends.next(transport) == Incoming(UP, bytes(most))


def test_a_configured_limit_holds_where_the_broker_announces_none(
    ends: Ends, broker_with: Callable[..., RunningBroker]
) -> None:
    broker = broker_with(ANYONE, "message_size_limit 16384")
    transport = ends.connect(broker.url, max_message_bytes=16384)
    with pytest.raises(TransportError, match="at most 16384 bytes"):
        transport.publish(UP, bytes(16384))


def test_a_message_above_a_limit_that_nobody_announced_is_refused_and_the_rest_arrives(
    ends: Ends, broker_with: Callable[..., RunningBroker]
) -> None:
    broker = broker_with(ANYONE, "message_size_limit 16384")
    transport = ends.connect(broker.url, topics=(UP,))
    large, small = transport.publish(UP, bytes(20000)), transport.publish(UP, b"small")
    with pytest.raises(TransportError, match=r"20000 bytes on .*set broker\.max_message_bytes"):
        transport.flush([large], 20)
    refused = ends.until(transport, Refused)
    assert refused.topic == UP
    assert transport.flush([small], 20)
    assert ends.until(transport, Incoming).payload == b"small"


def test_a_small_receive_maximum_is_respected(ends: Ends, broker_with: Callable[..., RunningBroker]) -> None:
    transport = ends.connect(broker_with(ANYONE, "max_inflight_messages 2").url)
    sent = [transport.publish(UP, bytes(1000)) for _ in range(300)]
    assert transport.flush(sent, 30)
    assert transport._window.limit == 2
    ends.nothing(transport, 0.2)  # a broker ends the connection of who sends more


# --- refusals


def password_lines(folder: Path) -> tuple[str, ...]:
    """Settings of a Mosquitto that lets in `pi` with `right`; the password file's form is PBKDF2-SHA512."""
    salt = bytes(12)
    told = hashlib.pbkdf2_hmac("sha512", b"right", salt, 101)
    file = folder / "passwords"
    file.write_text(f"pi:$7$101${base64.b64encode(salt).decode()}${base64.b64encode(told).decode()}\n")
    return "allow_anonymous false", f"password_file {file}"


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_wrong_password_is_refused_at_once_with_the_remedy(
    ends: Ends, broker_with: Callable[..., RunningBroker], readable: Path, protocol: str
) -> None:
    broker = broker_with(*password_lines(readable))
    ends.connect(broker.url, username="pi", password="right", protocol=protocol)
    with pytest.raises(TransportError, match=r"refused the connection \(Not authorized\); check the user") as caught:
        ends.connect(broker.url, "b", username="pi", password="wrong", protocol=protocol)
    assert not caught.value.transient


def test_who_is_refused_after_a_reconnection_waits_long(
    ends: Ends, broker_with: Callable[..., RunningBroker], proxy_to: Callable[..., Proxy], readable: Path
) -> None:
    """Half a minute at least: a fleet with a wrong password must not hammer its broker."""
    first = broker_with(ANYONE)
    proxy = proxy_to(first)
    transport = ends.connect(proxy.url)
    stop_broker(first)
    ends.until(transport, ConnectionDown)
    broker_with(*password_lines(readable), port=first.port)
    while "Not authorized" not in (reason := ends.until(transport, ConnectionDown).reason):
        pass  # cut by the proxy while there was no broker
    assert "check the user" in reason
    seen = proxy.connections
    time.sleep(5)
    assert proxy.connections == seen


def test_a_topic_that_the_broker_does_not_allow_is_refused_by_name(
    ends: Ends, broker_with: Callable[..., RunningBroker], readable: Path
) -> None:
    rules = readable / "acl"
    rules.write_text(f"topic readwrite {UP}\ntopic readwrite ready/#\n")
    transport = ends.connect(broker_with(ANYONE, f"acl_file {rules}").url)
    assert transport.flush([transport.publish(UP, b"mine")], 20)
    with pytest.raises(TransportError, match=rf"{TOPICS.down('b')} \(Not authorized\); .*access rules"):
        transport.flush([transport.publish(TOPICS.down("b"), b"not mine")], 20)


class Scripted:
    """A broker that gives every connection the same answer to its CONNECT. For answers that no Mosquitto gives."""

    def __init__(self, answer: bytes) -> None:
        self.connections = 0
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtt://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                client.recv(65536)
                client.sendall(self._answer)
                threading.Timer(0.5, client.close).start()

    def close(self) -> None:
        self._listener.close()


WELCOME = bytes.fromhex("20 03 00 00 00")
ANSWERS = {
    "busy": ("20 03 00 89 00", "Server busy.*wait", True),
    "banned": ("20 03 00 8a 00", "Banned.*ask who runs the broker", False),
    "a name it does not like": ("20 03 00 85 00", "Client identifier not valid.*shorten fleet and device_id", False),
    "no retained messages": ("20 05 00 00 02 25 00", "keeps no retained messages", False),
    "no QoS 1": ("20 05 00 00 02 24 00", "takes no messages of QoS 1", False),
    "something that is not MQTT": ("48 54 54 50", "closed the connection without an answer", True),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_an_answer_that_is_no_welcome_is_an_error_with_its_remedy(what: str) -> None:
    answer, words, transient = ANSWERS[what]
    broker = Scripted(bytes.fromhex(answer))
    try:
        with pytest.raises(TransportError, match=words) as caught:
            MqttTransport(parse_broker(broker.url), "a", Inbox()).connect()
        assert caught.value.transient == transient
    finally:
        broker.close()


def test_two_programs_of_one_name_do_not_throw_each_other_out_for_ever() -> None:
    broker = Scripted(WELCOME + bytes.fromhex("e0 02 8e 00"))
    inbox = Inbox()
    transport = MqttTransport(parse_broker(broker.url), "a", inbox)
    try:
        transport.connect()
        assert isinstance(inbox.get(timeout=10), ConnectionUp)
        words = "another program uses this name: give each device its own device_id, run one coordinator"
        assert inbox.get(timeout=10) == ConnectionDown(f"Session taken over; {words}")
        time.sleep(3)
        assert broker.connections == 1
    finally:
        transport.close()
        broker.close()


# --- TLS


def secure(broker: RunningBroker) -> str:
    return broker.url.replace("mqtt:", "mqtts:")


def entry(files: dict[str, Path]) -> dict[str, Path]:
    return {"ca_file": files["ca.crt"], "cert_file": files["client.crt"], "key_file": files["client.key"]}


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_client_with_its_certificate_gets_in_and_one_without_reads_what_it_lacks(
    ends: Ends, broker_with: Callable[..., RunningBroker], readable: Path, protocol: str
) -> None:
    files = certificates(readable)
    url = secure(broker_with(*tls_lines(files)))
    transport = ends.connect(url, topics=(UP,), protocol=protocol, **entry(files))
    assert transport.flush([transport.publish(UP, MEGABYTE)], 20)
    assert ends.next(transport) == Incoming(UP, MEGABYTE)
    with pytest.raises(TransportError, match=r"TLS handshake .*set broker\.cert_file and broker\.key_file") as caught:
        ends.connect(url, "b", ca_file=files["ca.crt"], protocol=protocol)
    assert caught.value.transient == ("[SSL" not in str(caught.value))  # the alert may be lost with the connection


def test_a_certificate_of_another_authority_is_refused_in_words(
    ends: Ends, broker_with: Callable[..., RunningBroker], readable: Path
) -> None:
    files = certificates(readable)
    (readable / "other").mkdir()
    others = certificates(readable / "other")
    url = secure(broker_with(*tls_lines(files)))
    with pytest.raises(
        TransportError, match=r"TLS handshake .*(does not know the authority of broker\.cert_file|and the certificates)"
    ):
        ends.connect(url, ca_file=files["ca.crt"], cert_file=others["client.crt"], key_file=others["client.key"])


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # paho leaves the socket of a failed handshake to the collector
def test_a_broker_whose_certificate_expired_is_refused_in_words(
    ends: Ends, broker_with: Callable[..., RunningBroker], readable: Path
) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    files = certificates(readable, server_dates=(now - datetime.timedelta(days=9), now - datetime.timedelta(days=1)))
    url = secure(broker_with(*tls_lines(files)))
    with pytest.raises(TransportError, match=r"certificate has expired\); renew the broker's certificate"):
        ends.connect(url, **entry(files))
    gc.collect()


def test_a_certificate_renewed_under_a_running_agent_is_used_when_it_is_whole(
    ends: Ends, broker_with: Callable[..., RunningBroker], readable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files change while the connection stands. What is half-written, or does not fit, is named and tried again."""
    monkeypatch.setattr(mqtt, "delay_s", lambda *given: 0.05)
    files, now, day = certificates(readable), datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=1)
    old, new, late = (client_of(readable, end) for end in (now + day, now + day, now - day))
    certificate, key = readable / "mine.crt", readable / "mine.key"

    def on_disk(pair: tuple[bytes, bytes]) -> None:
        certificate.write_bytes(pair[0])
        key.write_bytes(pair[1])

    on_disk(old)
    broker = broker_with(*tls_lines(files))
    mine = ends.connect(secure(broker), ca_file=files["ca.crt"], cert_file=certificate, key_file=key)
    on_disk((new[0][: len(new[0]) // 2], old[1]))
    ends.nothing(mine, 0.2)  # the connection that stands does not mind
    stop_broker(broker)
    ends.until(mine, ConnectionDown)
    broker_with(*tls_lines(files), port=broker.port)
    for pair, said in (
        ((new[0][: len(new[0]) // 2], old[1]), "TLS files cannot be used"),
        (late, "expired on"),
        ((new[0], old[1]), "KEY_VALUES_MISMATCH"),
        ((new[0], new[1][:-40]), "TLS files cannot be used"),
    ):
        on_disk(pair)
        while said not in ends.until(mine, ConnectionDown).reason:
            pass
        assert mine.alive
    on_disk(new)
    ends.until(mine, ConnectionUp)
    assert mine.flush([mine.publish(UP, b"still here")], 20)


def client_of(folder: Path, end: datetime.datetime) -> tuple[bytes, bytes]:
    """A new client certificate of the folder's authority, and its key."""
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    signing: Any = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "renewed")]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(end - datetime.timedelta(days=9))
        .not_valid_after(end)
        .sign(signing, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(*pem)


def test_a_key_that_does_not_match_its_certificate_is_named(tmp_path: Path) -> None:
    files = certificates(tmp_path)
    broker = parse_broker(
        "mqtts://h", ca_file=files["ca.crt"], cert_file=files["client.crt"], key_file=files["server.key"]
    )
    with pytest.raises(ConfigError, match="key and certificate match"):
        MqttTransport(broker, "a", Inbox())


# --- connections that break


def blob_topics(count: int, sha256: bytes) -> list[str]:
    return [TOPICS.blob(sha256, index) for index in range(count)]


def upload(transport: MqttTransport, timeout_s: float) -> bool:
    ref = blob_ref(MEGABYTE, CHUNK)
    return transport.flush([transport.publish(UP, piece) for _, piece in chunks(MEGABYTE, ref)], timeout_s)


def heard(ends: Ends, listener: MqttTransport) -> list[bytes]:
    """The payloads that came, once nothing has come for two seconds."""
    payloads = []
    while True:
        try:
            item = ends.next(listener, 2.0)
        except queue.Empty:
            return payloads
        if isinstance(item, Incoming):
            payloads.append(item.payload)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_an_upload_over_a_connection_that_is_cut_sends_only_what_was_not_acknowledged(
    ends: Ends, mosquitto: RunningBroker, proxy_to: Callable[..., Proxy], protocol: str
) -> None:
    proxy = proxy_to(mosquitto, bytes_per_s=1_000_000, cut_every=400_000)
    listener = ends.connect(mosquitto.url, "b", (UP,))
    sender = ends.connect(proxy.url, protocol=protocol)
    assert upload(sender, 60)
    expected = [piece for _, piece in chunks(MEGABYTE, blob_ref(MEGABYTE, CHUNK))]
    assert list(dict.fromkeys(heard(ends, listener))) == list(dict.fromkeys(expected))
    up, _ = proxy.settled()
    print(f"{len(MEGABYTE)} bytes took {up} over {proxy.cuts} cuts")
    assert proxy.cuts >= 2
    # of each connection that was cut, one chunk that was half sent and one whose acknowledgement was lost
    assert len(MEGABYTE) < up < len(MEGABYTE) + (2 * proxy.cuts + 1) * CHUNK


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_download_over_a_connection_that_is_cut_goes_on_with_the_missing_chunks(
    ends: Ends, mosquitto: RunningBroker, proxy_to: Callable[..., Proxy], protocol: str
) -> None:
    ref = blob_ref(MEGABYTE, 32 * 1024)
    keeper = ends.connect(mosquitto.url, "b")
    sent = [
        keeper.publish(TOPICS.blob(ref.sha256, index), piece, retain=True) for index, piece in chunks(MEGABYTE, ref)
    ]
    assert keeper.flush(sent, 20)
    proxy = proxy_to(mosquitto, bytes_per_s=400_000)
    device = ends.connect(proxy.url, protocol=protocol)
    assembly = BlobAssembly(ref)
    device.subscribe(blob_topics(ref.num_chunks, ref.sha256))
    whole, cut_at = None, {8, 16, 24}
    while whole is None:
        item = ends.next(device)
        if not isinstance(item, Incoming):
            continue
        place = TOPICS.parse_blob(item.topic)
        assert place is not None
        whole = assembly.add(place.chunk, item.payload)
        device.forget([item.topic])
        if ref.num_chunks - len(assembly.missing()) in cut_at:
            cut_at.discard(ref.num_chunks - len(assembly.missing()))
            proxy.cut()
    assert whole == MEGABYTE
    _, down = proxy.settled()
    print(f"{len(MEGABYTE)} bytes took {down} over {proxy.cuts} cuts")
    # a cut loses what is in the sockets; it does not begin anew
    assert len(MEGABYTE) < down < 1.5 * len(MEGABYTE)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_broker_that_restarts_in_the_middle_of_an_upload_gets_the_rest(
    ends: Ends, broker_with: Callable[..., RunningBroker], proxy_to: Callable[..., Proxy], protocol: str
) -> None:
    first = broker_with(ANYONE)
    proxy = proxy_to(first, bytes_per_s=500_000)
    sender = ends.connect(proxy.url, protocol=protocol)
    ref = blob_ref(MEGABYTE, CHUNK)
    sent = [sender.publish(UP, piece) for _, piece in chunks(MEGABYTE, ref)]
    assert sender.flush(sent[:5], 30)
    stop_broker(first)
    ends.until(sender, ConnectionDown)
    broker_with(ANYONE, port=first.port)
    assert sender.flush(sent, 60)
    up, _ = proxy.settled()
    print(f"{len(MEGABYTE)} bytes took {up} over a restart")
    assert up < len(MEGABYTE) + 4 * CHUNK


def test_a_stalled_connection_goes_on_where_it_was(
    ends: Ends, mosquitto: RunningBroker, proxy_to: Callable[..., Proxy]
) -> None:
    proxy = proxy_to(mosquitto, bytes_per_s=1_000_000)
    sender = ends.connect(proxy.url)
    sent = [sender.publish(UP, piece) for _, piece in chunks(MEGABYTE, blob_ref(MEGABYTE, CHUNK))]
    assert sender.flush(sent[:4], 20)
    proxy.stall()
    assert not sender.flush(sent, 3)
    proxy.go_on()
    assert sender.flush(sent, 20)
    up, _ = proxy.settled()
    assert (proxy.connections, up // CHUNK) == (1, len(MEGABYTE) // CHUNK)


def test_what_comes_while_a_device_is_away_is_waiting_for_it(
    ends: Ends, mosquitto: RunningBroker, proxy_to: Callable[..., Proxy]
) -> None:
    """MQTT 5 keeps the session: a verdict is sent once, and a short gap must not lose it. What has expired is gone."""
    proxy = proxy_to(mosquitto)
    down = TOPICS.down("a")
    device, coordinator = ends.connect(proxy.url, topics=(down,)), ends.connect(mosquitto.url, "b")
    proxy.settled()  # what has come is acknowledged, or it would come again
    proxy.stall()  # so that it cannot come back at once
    proxy.cut()
    assert isinstance(ends.next(device), ConnectionDown)
    sent = [coordinator.publish(down, b"need", expiry_s=1.0), coordinator.publish(down, b"verdict")]
    assert coordinator.flush(sent, 20)
    time.sleep(2.0)
    proxy.go_on()
    assert heard(ends, device) == [b"verdict"]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_what_was_left_while_away_stays_left(
    ends: Ends, mosquitto: RunningBroker, proxy_to: Callable[..., Proxy], protocol: str
) -> None:
    proxy = proxy_to(mosquitto)
    device, other = ends.connect(proxy.url, topics=(UP,), protocol=protocol), ends.connect(mosquitto.url, "b")
    proxy.cut()
    ends.until(device, ConnectionDown)
    device.unsubscribe([UP])
    ends.until(device, ConnectionUp)
    assert device.flush([device.publish(TOPICS.round, b"a message behind the UNSUBSCRIBE")], 20)
    assert other.flush([other.publish(UP, b"unheard")], 20)
    ends.nothing(device)


def test_a_queued_message_that_expires_before_there_is_a_connection_is_dropped(
    ends: Ends, mosquitto: RunningBroker, proxy_to: Callable[..., Proxy]
) -> None:
    proxy = proxy_to(mosquitto)
    listener, device = ends.connect(mosquitto.url, "b", (UP,)), ends.connect(proxy.url, protocol="3.1.1")
    proxy.cut()
    ends.until(device, ConnectionDown)
    sent = [device.publish(UP, b"stale", expiry_s=0.01), device.publish(UP, b"fresh", expiry_s=60.0)]
    assert device.flush(sent, 20)
    assert ends.next(listener) == Incoming(UP, b"fresh")


def test_closing_sends_what_is_queued_and_no_last_will(ends: Ends, mosquitto: RunningBroker) -> None:
    listener = ends.connect(mosquitto.url, "b", (UP, TOPICS.presence("a")))
    broker = parse_broker(mosquitto.url)
    device = MqttTransport(broker, "covey-test-c", Inbox())
    device.set_will(TOPICS.presence("a"), b"gone")
    device.connect()
    for number in range(100):
        device.publish(UP, bytes([number]))
    device.close()
    assert [ends.next(listener).payload for _ in range(100)] == [bytes([number]) for number in range(100)]
    ends.nothing(listener)
