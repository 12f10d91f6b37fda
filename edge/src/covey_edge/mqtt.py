"""The MQTT adapter: a layer over paho that turns callbacks into queue items and failures into TransportError.

All messages travel with QoS 1. It speaks MQTT 5, or 3.1.1 with a clean session where the broker is older. Of MQTT 5 it
uses expiry of messages and sessions, Receive Maximum, Maximum Packet Size and reason codes; nothing depends on them,
because the protocol says again what may be lost. What reasons mean: `mqtt_reasons`. What is under way: `mqtt_window`.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import queue
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, LogLevel
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from covey_edge.inbox import Inbox, waiting_bytes
from covey_edge.mqtt_reasons import (
    HOPELESS,
    NO_CERTIFICATE,
    OLD_BROKER,
    check_certificate,
    delay_s,
    remedy_for,
    tls_remedy,
)
from covey_edge.mqtt_window import WINDOW, Outgoing, SendWindow
from covey_protocol.codec import MAX_ENVELOPE_BYTES
from covey_protocol.errors import ConfigError, TransportError

log = logging.getLogger("covey.mqtt")

DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}
PROTOCOLS = {"auto": (paho.MQTTv5, paho.MQTTv311), "5": (paho.MQTTv5,), "3.1.1": (paho.MQTTv311,)}
KEEPALIVE_S = 30  # a broken connection is noticed by the broker after 1.5 times this
CONNECT_TIMEOUT_S = 10.0
NEWEST_ANSWER_S = 3.0  # then the older MQTT is tried: some 3.1.1 brokers (amqtt) do not answer MQTT 5 at all
SESSION_EXPIRY_S = 300  # MQTT 5: how long the broker keeps what comes for us while we are away
STEADY_S = 5.0  # a connection that lived so long lets the waiting times begin again
LOOP_S = 1.0  # how often a network thread looks whether it is still wanted
POLL_S, FLUSH_POLL_S = 0.05, 0.005
STUCK_S = 120.0  # a thread that is so late hangs; a name server that does not answer keeps one for up to a minute
GOODBYE_S = 2.0  # for what is still queued when we leave, and for the goodbye itself
# of a PUBLISH beside topic and payload: 5 fixed header, 2 topic length, 2 packet id, 1 + 5 properties (expiry)
PACKET_HEADER_BYTES = 15
# topics in one SUBSCRIBE or UNSUBSCRIBE, and at most bytes of each: brokers limit the size of packets
TOPICS_AT_ONCE, TOPIC_BYTES = 64, 160
REMEMBERED_REFUSALS = 1024


@dataclass(frozen=True)
class Broker:
    """Where the broker is and how to enter.

    tls: mqtts://; ca_file None trusts the system's authorities. protocol: "5", "3.1.1", or "auto" for the newest that
    the broker speaks. max_message_bytes: of the largest MQTT packet it takes; 0 for what it says itself.
    """

    host: str
    port: int
    tls: bool = False
    username: Optional[str] = None
    password: Optional[str] = None
    ca_file: Optional[Path] = None
    cert_file: Optional[Path] = None
    key_file: Optional[Path] = None
    protocol: str = "auto"
    max_message_bytes: int = 0

    def __str__(self) -> str:
        return f"{'mqtts' if self.tls else 'mqtt'}://{self.host}:{self.port}"  # never the password

    def __repr__(self) -> str:
        return f"Broker({self})"


def parse_broker(
    url: str, *, ca_file: Optional[Path] = None, cert_file: Optional[Path] = None, key_file: Optional[Path] = None
) -> Broker:
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
    files = {"ca_file": ca_file, "cert_file": cert_file, "key_file": key_file}
    if parts.scheme == "mqtt" and any(files.values()):
        given = ", ".join(name for name, value in files.items() if value)
        raise ConfigError(f"{given} without TLS at {_redacted(url)}", "write mqtts://, or leave the files out")
    if key_file and not cert_file:
        raise ConfigError("a key_file without its cert_file", "give both or none")
    return Broker(
        host=parts.hostname,
        port=port or DEFAULT_PORTS[parts.scheme],
        tls=parts.scheme == "mqtts",
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        ca_file=ca_file,
        cert_file=cert_file,
        key_file=key_file,
    )


def _redacted(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.split('//')[0]}//...@{tail}" if at else url


# --- what arrives in the inbox


@dataclass(frozen=True)
class Incoming:
    """retained: the broker had kept it before we subscribed."""

    topic: str
    payload: bytes
    retained: bool = False


@dataclass(frozen=True)
class ConnectionUp:
    pass


@dataclass(frozen=True)
class ConnectionDown:
    reason: str


@dataclass(frozen=True)
class Refused:
    """The broker did not take a message on this topic, or a subscription to it."""

    topic: str
    error: TransportError


Item = Union[Incoming, ConnectionUp, ConnectionDown, Refused]


@dataclass(frozen=True)
class _Ended:
    """How a connection, or the attempt at one, ended.

    accepted: the broker had taken us. hopeless: an operator is needed. old_broker: perhaps it is too old for MQTT 5.
    """

    what: str
    remedy: str = ""
    accepted: bool = False
    hopeless: bool = False
    old_broker: bool = False

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}" if self.remedy else self.what


class MqttTransport:
    """One connection. Reconnects by itself after the first success and then restores its subscriptions.

    Threads: a keeper thread owns the state, sends, and connects again; each connection has a network thread that runs
    paho. Callers put commands into a queue and return at once; only `connect`, `flush` and `close` block.
    Limits: at most the broker's Receive Maximum of messages are unacknowledged (20 where it names none). The queue
    before that is not bounded: who sends much waits with `flush`. What comes is acknowledged when `inbox` has room.
    """

    def __init__(self, broker: Broker, client_id: str, inbox: Inbox) -> None:
        self.broker = broker
        self._client_id = client_id
        self._inbox = inbox
        tls_context(broker)  # a wrong file is known now
        self._rng = random.Random(client_id)  # noqa: S311 - only spreads the reconnections of a fleet
        self._will: Optional[tuple[str, bytes]] = None
        self._limit = broker.max_message_bytes or None
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._unsettled: set[int] = set()  # with _lock held
        self._refused: dict[int, TransportError] = {}  # with _lock held
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._first: queue.SimpleQueue[Optional[TransportError]] = queue.SimpleQueue()
        self._keeper = threading.Thread(target=self._run, name=f"keeper of {client_id}", daemon=True)
        self._timeout_s = CONNECT_TIMEOUT_S
        self._connected = False
        self._keeper_due = self._network_due = math.inf  # by when each thread is to have looked around
        # the keeper's own from here
        self._closing = False
        self._window = SendWindow()
        self._subscriptions: set[str] = set()
        self._left: set[str] = set()  # unsubscribed while the connection was down
        self._subscribing: dict[int, list[str]] = {}  # by packet id
        self._protocol = PROTOCOLS[broker.protocol][0]
        self._been_up = False
        self._client: Optional[paho.Client] = None
        self._ended: Optional[_Ended] = None

    def set_will(self, topic: str, payload: bytes) -> None:
        """What the broker retains for us if we vanish. Before `connect`, or for the next connection."""
        self._will = (topic, payload)

    def connect(self, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Connect for the first time: MQTT 5, and 3.1.1 where the broker does not speak it. Blocks.

        timeout_s: for the network connection, and again for the broker's answer.
        Raises TransportError naming the broker; transient is False where trying again cannot help.
        """
        self._timeout_s = timeout_s
        self._keeper.start()
        problem = self._first.get()
        if problem is not None:
            self._keeper.join()
            raise problem

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def alive(self) -> bool:
        """Whether the threads go on: with or without a connection, neither ended nor stuck."""
        latest = min(self._keeper_due, self._network_due) + STUCK_S
        return self._keeper.is_alive() and time.monotonic() < latest

    @property
    def protocol(self) -> str:
        """What the connection speaks: "5" or "3.1.1"."""
        return "5" if self._protocol == paho.MQTTv5 else "3.1.1"

    @property
    def max_message_bytes(self) -> Optional[int]:
        """Bytes of the largest MQTT packet that the broker takes, as configured or as it said; None if unknown."""
        return self._limit

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, expiry_s: Optional[float] = None) -> int:
        """Queue a message and return its number; it goes out as soon as there is a connection.

        expiry_s: after this time the message is dropped where it is, here or (MQTT 5) at the broker.
        Raises TransportError where the broker is known not to take a message of this size.
        """
        expires_at = None if expiry_s is None else time.monotonic() + expiry_s
        message = Outgoing(next(self._numbers), topic, payload, retain, expires_at)
        error = self._too_large(message)
        if error is not None:
            raise error
        with self._lock:
            self._unsettled.add(message.number)
        self._commands.put(lambda: self._window.add(message))
        return message.number

    def flush(self, sent: Iterable[int], timeout_s: float) -> bool:
        """Wait until the broker has acknowledged these messages; False if it has not in time.

        Raises TransportError where it refused one (MQTT 5; a 3.1.1 broker has no word for it).
        """
        wanted, end = set(sent), time.monotonic() + timeout_s
        while True:
            with self._lock:
                open_ones = not wanted.isdisjoint(self._unsettled)
                refused = [self._refused.pop(number) for number in sorted(wanted & self._refused.keys())]
            if refused:
                raise refused[0]
            if not open_ones or time.monotonic() >= end:
                return not open_ones
            time.sleep(FLUSH_POLL_S)  # cheaper than to be woken by every acknowledgement

    def subscribe(self, topics: Iterable[str]) -> None:
        """From now on, also over reconnections. Subscribing again makes the broker send retained messages again."""
        wanted = list(topics)
        self._commands.put(lambda: self._add_subscriptions(wanted))

    def unsubscribe(self, topics: Iterable[str]) -> None:
        unwanted = list(topics)
        self._commands.put(lambda: self._drop_subscriptions(unwanted))

    def forget(self, topics: Iterable[str]) -> None:
        """Do not subscribe to these again after a reconnection: what they retain has come. They are not left yet."""
        known = list(topics)
        self._commands.put(lambda: self._subscriptions.difference_update(known))

    def close(self) -> None:
        """Say goodbye properly (no last will) and end the threads. What is still queued has 2 s to go out."""
        self._commands.put(self._begin_to_close)
        if self._keeper.is_alive():
            self._keeper.join(2 * CONNECT_TIMEOUT_S)

    # --- the keeper thread: connections

    def _run(self) -> None:
        try:
            self._keep()
        except Exception as exc:  # a bug: say so in the caller's thread, and do not look connected
            log.exception("the MQTT adapter failed")
            self._connected = False
            error = TransportError(f"{self.broker}: the MQTT adapter failed ({exc!r})", "report it", transient=False)
            self._first.put(error)
            self._inbox.put(Refused("", error))

    def _keep(self) -> None:
        failures, last = 0, ""
        while True:
            started = time.monotonic()
            ended = self._one_connection()
            if not self._been_up:
                if ended.old_broker and self._speak_older():
                    continue
                self._first.put(TransportError(ended.what, ended.remedy, transient=not ended.hopeless))
                return
            if self._closing:
                return
            if ended.accepted or str(ended) != last:  # one line for a hundred equal refusals
                self._inbox.put(ConnectionDown(str(ended)))
            last = str(ended)
            if ended.what.endswith(f"({OLD_BROKER})"):
                self._speak_older()
            if ended.accepted and time.monotonic() - started > STEADY_S:
                failures = 0
            self._wait_until(time.monotonic() + delay_s(failures, ended.hopeless, self._rng))
            failures += 1

    def _speak_older(self) -> bool:
        """Speak the older MQTT from the next attempt on; False if there is none or the settings do not allow it."""
        older = [version for version in PROTOCOLS[self.broker.protocol] if version < self._protocol]
        self._protocol = older[0] if older else self._protocol
        return bool(older)

    def _may_speak_older(self) -> bool:
        return not self._been_up and self._protocol != PROTOCOLS[self.broker.protocol][-1]

    def _wait_until(self, end: float) -> None:
        while not self._closing and (left := end - time.monotonic()) > 0:
            self._take_command(left)

    def _take_command(self, timeout_s: float) -> None:
        self._keeper_due = time.monotonic() + timeout_s
        try:
            self._commands.get(timeout=timeout_s)()
        except queue.Empty:
            return
        self._send_waiting()

    def _begin_to_close(self) -> None:
        self._closing = True

    def _one_connection(self) -> _Ended:
        """From the attempt to the end of the connection."""
        self._ended = None
        try:
            client = self._client = self._make_client()
            client.connect(self.broker.host, self.broker.port, KEEPALIVE_S, **self._connect_options())
        except ConfigError as exc:
            return _Ended(exc.what, exc.remedy, hopeless=True)
        except TransportError as exc:  # a certificate that has ended, or begins later
            return _Ended(exc.what, exc.remedy)
        except ssl.SSLError as exc:
            words = getattr(exc, "verify_message", "") or exc.reason or exc
            return _Ended(f"{self.broker}: TLS failed ({words})", tls_remedy(exc), hopeless=True)
        except (OSError, UnicodeError) as exc:
            what = f"{self.broker} cannot be reached ({getattr(exc, 'strerror', None) or exc})"
            return _Ended(what, "check that the broker runs and the address")
        network = threading.Thread(
            target=self._network, args=(client,), name=f"network of {self._client_id}", daemon=True
        )
        network.start()
        ended = self._serve(client)
        self._connected, self._client = False, None
        self._window.reset()
        network.join(GOODBYE_S + LOOP_S)
        return ended

    def _serve(self, client: paho.Client) -> _Ended:
        """Take commands and reports until the connection ends or we want to leave."""
        answer_by = time.monotonic() + (NEWEST_ANSWER_S if self._may_speak_older() else self._timeout_s)
        while self._ended is None and not self._closing and (self._connected or time.monotonic() < answer_by):
            self._take_command(LOOP_S if self._connected else POLL_S)
        leave_by = time.monotonic() + GOODBYE_S
        while self._ended is None and self._connected and not self._window.empty and time.monotonic() < leave_by:
            self._take_command(POLL_S)
        if self._ended is None:
            client.disconnect(properties=self._properties(PacketTypes.DISCONNECT, SessionExpiryInterval=0))
        return self._ended or _Ended(
            f"{self.broker} does not answer as an MQTT broker", "check the port", old_broker=True
        )

    def _make_client(self) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            protocol=self._protocol,
            reconnect_on_failure=False,
            manual_ack=True,  # by the inbox
        )
        client.connect_timeout = self._timeout_s
        client.max_inflight_messages = 0  # the window is ours: a broker may ask for a smaller one
        client.on_socket_register_write = _leave_it_to_the_loop
        client.on_connect = self._on_connect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        if self.broker.username is not None:
            client.username_pw_set(self.broker.username, self.broker.password)
        context = tls_context(self.broker)  # read again for every connection: certificates are renewed
        if context is not None:
            client.tls_set_context(context)
        if self._will is not None:
            client.will_set(*self._will, qos=1, retain=True)
        return client

    def _connect_options(self) -> dict[str, Any]:
        if self._protocol != paho.MQTTv5:
            return {}
        properties = self._properties(
            PacketTypes.CONNECT,
            SessionExpiryInterval=SESSION_EXPIRY_S,
            ReceiveMaximum=WINDOW,
            MaximumPacketSize=MAX_ENVELOPE_BYTES + TOPIC_BYTES + PACKET_HEADER_BYTES,
        )
        return {"clean_start": not self._been_up, "properties": properties}

    def _properties(self, packet: int, **values: int) -> Optional[Properties]:
        """MQTT 5 properties; None for none, and on an older connection."""
        if self._protocol != paho.MQTTv5 or not values:
            return None  # making an empty one costs paho more than sending a message
        properties = Properties(packet)  # type: ignore[no-untyped-call]  # paho's own
        for name, value in values.items():
            setattr(properties, name, value)
        return properties

    # --- the keeper thread: what the network thread reports

    def _answered(self, client: paho.Client, reason: ReasonCode, resumed: bool, properties: Properties) -> None:
        if client is not self._client:
            return
        lacking = _lacking(properties)
        if reason.is_failure:
            what = f"{self.broker} refused the connection ({reason})"
            old = str(reason) == OLD_BROKER
            self._ended = _Ended(what, remedy_for(str(reason)), hopeless=str(reason) in HOPELESS, old_broker=old)
        elif lacking:
            self._ended = _Ended(f"{self.broker} {lacking}", "allow it there, or use another broker", hopeless=True)
        else:
            self._begin(client, resumed, properties)

    def _begin(self, client: paho.Client, resumed: bool, properties: Properties) -> None:
        """The broker takes us: learn its limits and say again what we listen to."""
        self._window.limit = min(WINDOW, getattr(properties, "ReceiveMaximum", WINDOW))
        limits = [self.broker.max_message_bytes, getattr(properties, "MaximumPacketSize", 0)]
        self._limit = min(filter(None, limits), default=None)
        self._connected = True
        if resumed:
            for topics in self._batches(sorted(self._left)):
                client.unsubscribe(topics)
        self._left.clear()
        self._subscribing.clear()
        # a resumed session has the old subscriptions, and has queued what came meanwhile: do not let it come twice
        self._send_subscriptions(sorted(self._subscriptions), retain_handling=1 if resumed else 0)
        if not self._been_up:
            self._been_up = True
            self._first.put(None)
        self._inbox.put(ConnectionUp())

    def _lost(self, client: paho.Client, reason: str, alert: str, malformed: bool) -> None:
        """The network thread ended. alert: a TLS error while reading. malformed: the broker broke MQTT."""
        if client is not self._client or self._ended is not None:
            return
        if malformed:
            self._suspect_the_largest(reason)
        if self._connected:
            self._ended = _Ended(reason, HOPELESS.get(reason, ""), accepted=True, hopeless=reason in HOPELESS)
        elif self.broker.tls:
            what = f"{self.broker} closed the connection after the TLS handshake ({alert or reason})"
            remedy = tls_remedy(None, alert) if alert or self.broker.cert_file else NO_CERTIFICATE
            self._ended = _Ended(what, remedy, hopeless=bool(alert), old_broker=not alert)
        else:
            what = f"{self.broker} closed the connection without an answer ({reason})"
            self._ended = _Ended(what, "check the port; a port for TLS needs mqtts://", old_broker=True)

    def _suspect_the_largest(self, reason: str) -> None:
        # Mosquitto 2.0 acknowledges a message above its message_size_limit with a code that MQTT 5 does not allow
        # there: who sent it again would be answered so for ever
        message = self._window.drop_largest()
        if message is not None:
            what = (
                f"{self.broker} could not take a message of {len(message.payload)} bytes on {message.topic} ({reason})"
            )
            remedy = "it is probably above the broker's limit: set broker.max_message_bytes"
            self._settle(message, TransportError(what, remedy, transient=False))

    def _acknowledged(self, client: paho.Client, packet_id: int, reason: ReasonCode) -> None:
        message = self._window.acknowledged(packet_id) if client is self._client else None
        if message is None:
            return
        error = None
        if reason.is_failure:
            what = f"{self.broker} did not take a message of {len(message.payload)} bytes on {message.topic} ({reason})"
            error = TransportError(what, remedy_for(str(reason)), transient=str(reason) not in HOPELESS)
        self._settle(message, error)

    def _settle(self, message: Outgoing, error: Optional[TransportError] = None) -> None:
        with self._lock:
            self._unsettled.discard(message.number)
            if error is not None:
                self._refused[message.number] = error
                if len(self._refused) > REMEMBERED_REFUSALS:
                    del self._refused[next(iter(self._refused))]
        if error is not None:
            self._inbox.put(Refused(message.topic, error))

    def _subscribed(self, client: paho.Client, packet_id: int, reasons: list[ReasonCode]) -> None:
        topics = self._subscribing.pop(packet_id, []) if client is self._client else []
        for topic, reason in zip(topics, reasons):
            if reason.is_failure:
                what = f"{self.broker} refused the subscription to {topic} ({reason})"
                error = TransportError(what, "check the broker's access rules", transient=False)
                self._inbox.put(Refused(topic, error))

    # --- the keeper thread: sending

    def _send_waiting(self) -> None:
        client = self._client
        while client is not None and self._connected and (message := self._window.take()) is not None:
            left = None if message.expires_at is None else math.ceil(message.expires_at - time.monotonic())
            error = self._too_large(message)  # the limit of an earlier connection may have been another one
            if error is not None or (left is not None and left <= 0):
                self._settle(message, error)
                continue
            expiry = {} if left is None else {"MessageExpiryInterval": left}
            properties = self._properties(PacketTypes.PUBLISH, **expiry)
            info = client.publish(message.topic, message.payload, qos=1, retain=message.retain, properties=properties)
            self._window.sent(info.mid, message)

    def _too_large(self, message: Outgoing) -> Optional[TransportError]:
        size = len(message.payload) + len(message.topic.encode()) + PACKET_HEADER_BYTES
        if self._limit is None or size <= self._limit:
            return None
        return TransportError(
            f"{self.broker} takes messages of at most {self._limit} bytes, one on {message.topic} needs {size}",
            "set a smaller chunk_bytes in coordinator.toml, or raise the broker's limit",
            transient=False,
        )

    def _add_subscriptions(self, topics: list[str]) -> None:
        self._subscriptions.update(topics)
        self._left.difference_update(topics)
        self._send_subscriptions(topics)

    def _drop_subscriptions(self, topics: list[str]) -> None:
        self._subscriptions.difference_update(topics)
        if self._client is None or not self._connected:
            self._left.update(topics)
            return
        for batch in self._batches(topics):
            self._client.unsubscribe(batch)

    def _send_subscriptions(self, topics: list[str], retain_handling: int = 0) -> None:
        """retain_handling, of MQTT 5: 0 sends retained messages, 1 only those of subscriptions that are new."""
        if self._client is None or not self._connected:
            return
        for batch in self._batches(topics):
            options: Any = 1
            if self._protocol == paho.MQTTv5:
                options = SubscribeOptions(qos=1, retainHandling=retain_handling)
            _, packet_id = self._client.subscribe([(topic, options) for topic in batch])
            if packet_id is not None:
                self._subscribing[packet_id] = batch

    def _batches(self, topics: list[str]) -> Iterable[list[str]]:
        size = max(1, min(TOPICS_AT_ONCE, (self._limit or MAX_ENVELOPE_BYTES) // TOPIC_BYTES))
        return (topics[start : start + size] for start in range(0, len(topics), size))

    # --- the network thread: runs paho and its callbacks

    def _network(self, client: paho.Client) -> None:
        """Run one connection's traffic until it ends, then report it."""
        said: list[str] = []  # by the broker in its DISCONNECT
        alerts: list[str] = []

        def on_disconnect(client: Any, userdata: Any, flags: Any, reason: ReasonCode, properties: Any) -> None:
            if flags.is_disconnect_packet_from_server:
                said.append(str(reason))

        def on_log(client: Any, userdata: Any, level: int, text: str) -> None:
            if level == LogLevel.MQTT_LOG_ERR and "[SSL" in text:
                alerts.append(text[text.index("[SSL") :])

        client.on_disconnect = on_disconnect
        client.on_log = on_log
        code, malformed, goodbyes = paho.MQTT_ERR_SUCCESS, False, 2
        try:
            while code == paho.MQTT_ERR_SUCCESS and goodbyes > 0:
                self._network_due = time.monotonic() + LOOP_S
                code = client.loop(LOOP_S)
                goodbyes -= client is not self._client  # a moment for what is still to be written, not for ever
            reason = said[0] if said else paho.error_string(code).rstrip(".")
            malformed = code == paho.MQTT_ERR_PROTOCOL
        except Exception as exc:  # paho raises many kinds where the other side breaks MQTT
            reason, malformed = f"it broke MQTT: {exc or type(exc).__name__}", True
        self._network_due = math.inf
        connection = client.socket()
        if connection is not None:
            connection.close()
        self._commands.put(lambda: self._lost(client, reason, "".join(alerts[:1]), malformed))

    def _on_connect(self, client: Any, userdata: Any, flags: Any, reason: ReasonCode, properties: Any) -> None:
        client.on_log = None
        self._commands.put(lambda: self._answered(client, reason, flags.session_present, properties))

    def _on_publish(self, client: Any, userdata: Any, packet_id: int, reason: ReasonCode, properties: Any) -> None:
        self._commands.put(lambda: self._acknowledged(client, packet_id, reason))

    def _on_subscribe(
        self, client: Any, userdata: Any, packet_id: int, reasons: list[ReasonCode], properties: Any
    ) -> None:
        self._commands.put(lambda: self._subscribed(client, packet_id, reasons))

    def _on_message(self, client: Any, userdata: Any, message: paho.MQTTMessage) -> None:
        acknowledge = functools.partial(client.ack, message.mid, message.qos)
        try:
            topic = message.topic
        except UnicodeDecodeError:  # no topic of ours
            acknowledge()
            return
        item = Incoming(topic, bytes(message.payload), bool(message.retain))
        self._inbox.put_message(item, waiting_bytes(item.payload), acknowledge if message.qos else None)


def _leave_it_to_the_loop(client: Any, userdata: Any, connection: Any) -> None:
    """With this callback paho never writes in the thread that publishes, only in the one that runs `loop`."""


def _lacking(properties: Properties) -> str:
    """What covey needs and this broker says (MQTT 5) that it has not."""
    if getattr(properties, "RetainAvailable", 1) == 0:
        return "keeps no retained messages"
    if getattr(properties, "MaximumQoS", 2) == 0:
        return "takes no messages of QoS 1"
    return ""


def tls_context(broker: Broker) -> Optional[ssl.SSLContext]:
    """As every connection to this broker uses it; None without TLS. ConfigError where a file is wrong, TransportError
    where the client's certificate is not valid now."""
    if not broker.tls:
        return None
    try:
        context = ssl.create_default_context(cafile=str(broker.ca_file) if broker.ca_file else None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if broker.cert_file:
            context.load_cert_chain(str(broker.cert_file), str(broker.key_file) if broker.key_file else None)
            check_certificate(broker.cert_file)
    except (OSError, ssl.SSLError) as exc:
        names = ", ".join(str(f) for f in (broker.ca_file, broker.cert_file, broker.key_file) if f)
        raise ConfigError(
            f"TLS files cannot be used ({names}: {exc})", "check the paths and that key and certificate match"
        ) from exc
    return context
