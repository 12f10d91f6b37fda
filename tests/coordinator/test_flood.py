"""A stranger that sends more than a coordinator looks at: the memory stays small, and the fleet is served."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from brokers import RunningBroker
from patience import PATIENCE_S

from covey_edge.inbox import HOLD_BYTES, Inbox
from covey_edge.mqtt import MqttTransport, parse_broker
from covey_protocol import codec
from covey_protocol.messages import Answer
from covey_protocol.seals import SealingKey
from covey_protocol.topics import Topics

pytestmark = pytest.mark.broker

TOPICS = Topics("home")
FLOOD, PIECE = 300 * 2**20, bytes(512 * 2**10)
COORDINATOR = """
import dataclasses, sys, time
from covey_coordinator.fleet import Fleet
from covey_edge.mqtt import parse_broker
from covey_protocol.messages import Answer
from covey_protocol.seals import PublicKey, SealingKey

def peak_bytes():
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) * 1024

url, protocol, honest = sys.argv[1:]
key = SealingKey.from_seed(b"coordinator".ljust(32, b"."))
broker = dataclasses.replace(parse_broker(url), protocol=protocol)
fleet = Fleet(broker, "home", key, {"honest": PublicKey.from_hex(honest)})
fleet.connect()
if protocol == "3.1.1":
    fleet.publish_blob(bytes(65536))  # chunks of this size are read back once; nobody floods yet
before = peak_bytes()
print("ready", flush=True)
sys.stdin.readline()  # nothing is looked at meanwhile: a rule that runs for long
fleet.publish_blob(bytes(range(256)) * 1024)  # waits for acknowledgements, behind a full inbox
print("published", flush=True)
end = time.monotonic() + 200
while not isinstance(getattr(fleet.next(1.0), "message", None), Answer):
    assert time.monotonic() < end, fleet.refused
print(peak_bytes() - before, fleet.refused, flush=True)
fleet.close()
"""


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_flood_fills_no_memory_and_keeps_nobody_else_from_being_heard(
    broker_with: Callable[..., RunningBroker], protocol: str
) -> None:
    broker = broker_with("allow_anonymous true", "max_queued_messages 0")
    key = SealingKey.from_seed(b"honest".ljust(32, b"."))
    command = [sys.executable, "-c", COORDINATOR, broker.url, protocol, key.public.hex()]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    sender = MqttTransport(parse_broker(broker.url), "sender", Inbox())
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        sender.connect()
        flood = [sender.publish(TOPICS.up("stranger"), PIECE) for _ in range(FLOOD // len(PIECE))]
        topic = TOPICS.up("honest")
        answer = codec.encode(Answer("r.1.a", True), topic=topic, sender="honest", sequence=1, key=key)
        assert sender.flush([*flood, sender.publish(topic, answer)], PATIENCE_S)
        process.stdin.write("look\n")
        process.stdin.flush()
        assert process.stdout.readline() == "published\n"
        grown, refused = process.stdout.readline().split(maxsplit=1)
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
        sender.close()
    # Mosquitto 2.0.11 may send more than its window while a slow receiver acknowledges; that is dropped
    assert HOLD_BYTES // len(PIECE) - 1 <= json.loads(refused.replace("'", '"'))["stranger"] <= len(flood)
    assert 0.5 * HOLD_BYTES < int(grown) < FLOOD / 3
