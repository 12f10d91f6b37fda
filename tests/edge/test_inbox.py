"""A flood stops at the broker: what waits for a program is bounded, nothing is lost, and nothing waits for itself."""

from __future__ import annotations

import dataclasses
import queue
import random
import time
from collections.abc import Callable

import pytest
from brokers import RunningBroker
from patience import PATIENCE_S

from covey_edge import mqtt
from covey_edge.inbox import ITEM_BYTES, Inbox, waiting_bytes
from covey_edge.mqtt import ConnectionDown, ConnectionUp, Incoming, MqttTransport, parse_broker
from covey_edge.mqtt_window import WINDOW

Start = Callable[..., RunningBroker]


def test_messages_are_acknowledged_at_once_while_there_is_room() -> None:
    inbox, said = Inbox(100, 200), []
    for number in range(2):
        inbox.put_message(number, 50, lambda number=number: said.append(number))
    assert said == [0, 1]


def test_beyond_the_room_they_are_acknowledged_in_order_when_it_is_there_again() -> None:
    inbox, said = Inbox(100, 1000), []
    for number in range(5):
        inbox.put_message(number, 50, lambda number=number: said.append(number))
    assert said == [0, 1]
    heard = []
    for _ in range(5):
        heard.append((inbox.get(), list(said)))
    assert heard == [(0, [0, 1]), (1, [0, 1]), (2, [0, 1, 2]), (3, [0, 1, 2, 3]), (4, [0, 1, 2, 3, 4])]


def test_what_a_broker_sends_beyond_its_window_is_dropped_and_acknowledged(caplog: pytest.LogCaptureFixture) -> None:
    inbox, said = Inbox(100, 200), []
    for number in range(9):
        inbox.put_message(number, 50, lambda number=number: said.append(number))
    assert said == [0, 1, 4, 5, 6, 7, 8]
    assert [inbox.get(0) for _ in range(4)] == [0, 1, 2, 3]
    assert said[-2:] == [2, 3]
    with pytest.raises(queue.Empty):
        inbox.get(0)
    assert len(caplog.records) == 1  # for a thousand dropped ones, too


def test_messages_that_nothing_holds_back_get_the_room_that_needs_no_holding() -> None:
    inbox = Inbox(100, 1000)
    for number in range(5):
        inbox.put_message(number, 50)
    inbox.put("no message")
    assert [inbox.get(0) for _ in range(3)] == [0, 1, "no message"]


@pytest.mark.parametrize("seed", range(50))
def test_every_message_is_acknowledged_once_and_the_bytes_that_wait_are_bounded(seed: int) -> None:
    rng = random.Random(seed)
    inbox, said, sent, heard, waiting = Inbox(100, 300), [], 0, 0, 0  # said: what was acknowledged
    for _ in range(300):
        if rng.random() < 0.6 and sent - len(said) < 4:  # a broker with a window
            inbox.put_message(sent, 50, lambda number=sent: said.append(number))
            sent, waiting = sent + 1, waiting + 50
        elif heard < sent:
            assert inbox.get(0) == heard
            heard, waiting = heard + 1, waiting - 50
        assert waiting <= 100 + 4 * 50
        assert len(said) == sent or waiting
    assert said == list(range(len(said)))
    while heard < sent:
        assert inbox.get(0) == heard
        heard += 1
    assert said == list(range(sent))


# --- a real broker

PROTOCOLS = ("5", "3.1.1")
PAYLOAD, NUMBER = bytes(50_000), 400  # 20 MB
HOLD = 1_000_000


@pytest.mark.broker
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_flood_waits_at_the_broker_until_it_is_looked_at(
    broker_with: Start, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the connection lives on meanwhile, in both directions: pings, and messages of our own with their answers."""
    monkeypatch.setattr(mqtt, "KEEPALIVE_S", 1)  # the broker cuts after 1.5 s of silence
    broker = broker_with("allow_anonymous true", "max_queued_messages 0")
    inbox = Inbox(HOLD, 100 * HOLD)
    receiver = MqttTransport(dataclasses.replace(parse_broker(broker.url), protocol=protocol), "receiver", inbox)
    sender = MqttTransport(parse_broker(broker.url), "sender", Inbox())
    receiver.subscribe(["flood"])
    receiver.connect()
    sender.connect()
    try:
        assert isinstance(inbox.get(PATIENCE_S), ConnectionUp)
        # one by one until it is full: Mosquitto 2.0.11 may send more than its window while it has a queue and is being
        # acknowledged to
        number, end = 0, time.monotonic() + PATIENCE_S
        while inbox._waiting <= HOLD:
            before = inbox._waiting
            assert sender.flush([sender.publish("flood", b"%06d" % number + PAYLOAD)], PATIENCE_S)
            while inbox._waiting == before:
                assert time.monotonic() < end
                time.sleep(0.001)
            number += 1
        sent = [sender.publish("flood", b"%06d" % later + PAYLOAD) for later in range(number, NUMBER)]
        assert sender.flush(sent, PATIENCE_S)
        time.sleep(5.0)  # several keep-alives
        most = HOLD + WINDOW * (len(PAYLOAD) + 6 + ITEM_BYTES)
        assert HOLD < inbox._waiting <= most
        assert receiver.flush([receiver.publish("other", b"we may still speak")], PATIENCE_S)
        found = []
        while len(found) < NUMBER:
            item = inbox.get(PATIENCE_S)
            assert not isinstance(item, ConnectionDown), item
            if isinstance(item, Incoming):
                found.append(int(item.payload[:6]))
        assert found == list(range(NUMBER))
        assert inbox._waiting == 0
    finally:
        sender.close()
        receiver.close()


def test_a_message_counts_more_than_its_payload() -> None:
    assert waiting_bytes(b"") == ITEM_BYTES
