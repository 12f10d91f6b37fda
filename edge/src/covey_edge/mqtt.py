"""The MQTT adapter: a thin layer over paho that turns callbacks into queue items and failures into TransportError.

Threads: paho's network thread runs the callbacks, which only put items into `inbox`; everything else happens in the
caller's thread. All messages travel with QoS 1. MQTT 3.1.1 with a clean session: nothing depends on what a broker keeps
for a client that is away, because the protocol says again what may be lost.
"""

from __future__ import annotations

import queue
import ssl
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from covey_protocol.errors import ConfigError, TransportError

DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}
KEEPALIVE_S = 30  # a broken connection is noticed by the broker after 1.5 times this
CONNECT_TIMEOUT_S = 10.0
RECONNECT_MIN_S, RECONNECT_MAX_S = 1, 60
FLUSH_POLL_S = 0.005
# MQTT numbers messages from 1 to 65535 and begins again: forget old acknowledgements well before their number returns
REMEMBERED_ACKNOWLEDGEMENTS = 32_768
# CONNACK reasons that trying again cannot mend
HOPELESS = {
    "Bad user name or password",
    "Not authorized",
    "Client identifier not valid",
    "Unsupported protocol version",
}


@dataclass(frozen=True)
class Broker:
    """Where the broker is and how to enter. tls: mqtts://; ca_file None trusts the system's authorities."""

    host: str
    port: int
    tls: bool = False
    username: Optional[str] = None
    password: Optional[str] = None
    ca_file: Optional[Path] = None
    cert_file: Optional[Path] = None
    key_file: Optional[Path] = None

    def __str__(self) -> str:
        return f"{'mqtts' if self.tls else 'mqtt'}://{self.host}:{self.port}"  # never the password

    def __repr__(self) -> str:
        return f"Broker({self})"


def parse_broker(url: str, **files: Optional[Path]) -> Broker:
    """`mqtt://[user:password@]host[:port]` or `mqtts://...`; ConfigError for anything else."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise ConfigError(f"broker address {_redacted(url)!r} cannot be read", "write mqtt://host:1883") from exc
    strange = parts.path not in ("", "/") or parts.query or parts.fragment
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or strange:
        raise ConfigError(
            f"broker address {_redacted(url)!r} cannot be read", "write mqtt://host:1883 or mqtts://host:8883"
        )
    if parts.scheme == "mqtt" and any(files.values()):
        given = ", ".join(name for name, value in files.items() if value)
        raise ConfigError(f"{given} without TLS at {_redacted(url)}", "write mqtts://, or leave the files out")
    if files.get("key_file") and not files.get("cert_file"):
        raise ConfigError("a key_file without its cert_file", "give both or none")
    return Broker(
        host=parts.hostname,
        port=port or DEFAULT_PORTS[parts.scheme],
        tls=parts.scheme == "mqtts",
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        **files,
    )


def _redacted(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.split('//')[0]}//...@{tail}" if at else url


# --- what arrives in the inbox


@dataclass(frozen=True)
class Incoming:
    topic: str
    payload: bytes


@dataclass(frozen=True)
class ConnectionUp:
    pass


@dataclass(frozen=True)
class ConnectionDown:
    reason: str


Item = Union[Incoming, ConnectionUp, ConnectionDown]


class MqttTransport:
    """One connection. Reconnects by itself after the first success and then restores its subscriptions."""

    def __init__(self, broker: Broker, client_id: str, inbox: queue.SimpleQueue[Any]) -> None:
        self.broker = broker
        self._inbox = inbox
        self._subscriptions: set[str] = set()
        self._lock = threading.Lock()
        self._first = threading.Event()
        self._refusal: Optional[ReasonCode] = None
        self._closing = False
        self._acknowledged: dict[int, None] = {}  # in order of arrival; written by the network thread alone
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv311)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = self._on_message
        self._client.on_publish = self._on_publish
        self._client.reconnect_delay_set(RECONNECT_MIN_S, RECONNECT_MAX_S)
        if broker.username is not None:
            self._client.username_pw_set(broker.username, broker.password)
        if broker.tls:
            self._client.tls_set_context(_tls_context(broker))

    def set_will(self, topic: str, payload: bytes) -> None:
        """What the broker retains for us if we vanish. Before `connect`, or for the next connection."""
        self._client.will_set(topic, payload, qos=1, retain=True)

    def connect(self, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Connect for the first time. Raises TransportError naming the broker; transient is False for refusals."""
        try:
            self._client.connect_timeout = timeout_s
            self._client.connect(self.broker.host, self.broker.port, keepalive=KEEPALIVE_S)
        except ssl.SSLError as exc:
            raise TransportError(
                f"{self.broker}: TLS failed ({exc.reason or exc})",
                "check the CA file and the host name",
                transient=False,
            ) from exc
        except OSError as exc:
            raise TransportError(
                f"{self.broker} cannot be reached ({exc.strerror or exc})", "check that the broker runs and the address"
            ) from exc
        self._client.loop_start()
        if not self._first.wait(timeout_s):
            self.close()
            raise TransportError(f"{self.broker} does not answer as an MQTT broker", "check the port")
        if self._refusal is not None:
            reason = str(self._refusal)
            self.close()
            raise TransportError(
                f"{self.broker} refused the connection ({reason})",
                "check the user name, password or certificate",
                transient=reason not in HOPELESS,
            )

    @property
    def connected(self) -> bool:
        return self._client.is_connected()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        """Queue a message and return its number; it goes out as soon as there is a connection."""
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        if info.rc not in (paho.MQTT_ERR_SUCCESS, paho.MQTT_ERR_NO_CONN):
            raise TransportError(f"{self.broker}: {paho.error_string(info.rc)}")
        return info.mid

    def flush(self, sent: Iterable[int], timeout_s: float) -> bool:
        """Wait until the broker has acknowledged these messages; False if it has not in time."""
        end = time.monotonic() + timeout_s
        for number in sent:
            while number not in self._acknowledged:
                if time.monotonic() >= end:
                    return False
                time.sleep(FLUSH_POLL_S)
        return True

    def subscribe(self, topics: Iterable[str]) -> None:
        wanted = list(topics)
        with self._lock:
            self._subscriptions.update(wanted)
        self._send_subscriptions(wanted)

    def unsubscribe(self, topics: Iterable[str]) -> None:
        unwanted = list(topics)
        with self._lock:
            self._subscriptions.difference_update(unwanted)
        if unwanted and self._client.is_connected():
            self._client.unsubscribe(unwanted)

    def close(self) -> None:
        """Say goodbye properly (no last will) and end the network thread."""
        self._closing = True
        self._client.disconnect()
        self._client.loop_stop()

    def _send_subscriptions(self, topics: list[str]) -> None:
        if topics and self._client.is_connected():
            self._client.subscribe([(topic, 1) for topic in topics])

    # --- paho's callbacks, in its network thread

    def _on_connect(self, client: Any, userdata: Any, flags: Any, reason: ReasonCode, properties: Any) -> None:
        if reason != ReasonCode(PacketTypes.CONNACK, "Success"):
            self._refusal = reason
            if not self._first.is_set():
                self._first.set()
            else:
                self._inbox.put(ConnectionDown(f"{self.broker} refused the connection ({reason})"))
            return
        with self._lock:
            topics = sorted(self._subscriptions)
        if topics:
            client.subscribe([(topic, 1) for topic in topics])
        self._first.set()
        self._inbox.put(ConnectionUp())

    def _on_disconnect(self, client: Any, userdata: Any, flags: Any, reason: ReasonCode, properties: Any) -> None:
        if not self._closing:
            self._inbox.put(ConnectionDown(str(reason)))

    def _on_publish(self, client: Any, userdata: Any, number: int, reason: ReasonCode, properties: Any) -> None:
        self._acknowledged[number] = None
        if len(self._acknowledged) > REMEMBERED_ACKNOWLEDGEMENTS:
            del self._acknowledged[next(iter(self._acknowledged))]

    def _on_message(self, client: Any, userdata: Any, message: paho.MQTTMessage) -> None:
        self._inbox.put(Incoming(message.topic, bytes(message.payload)))


def _tls_context(broker: Broker) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(broker.ca_file) if broker.ca_file else None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if broker.cert_file:
            context.load_cert_chain(str(broker.cert_file), str(broker.key_file) if broker.key_file else None)
    except (OSError, ssl.SSLError) as exc:
        names = ", ".join(str(f) for f in (broker.ca_file, broker.cert_file, broker.key_file) if f)
        raise ConfigError(
            f"TLS files cannot be used ({names}: {exc})", "check the paths and that key and certificate match"
        ) from exc
    return context
