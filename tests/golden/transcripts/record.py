"""Records `good.jsonl` and `encrypted.jsonl`, real rounds of two agents over a Mosquitto, and makes the bad ones of the
former.

`python tests/golden/transcripts/record.py` writes only files that are not there: like the golden vectors they are never
changed. It needs a Mosquitto.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from brokers import start_mosquitto, stop_broker

from covey_protocol import codec
from covey_protocol.messages import Answer, BlobRef, Chunk, Envelope, Message, Need, Offer, Receipt, Verdict
from covey_protocol.seals import SealingKey
from covey_protocol.transcript import Record, write_record

FOLDER = Path(__file__).parent
FLEET = "golden"
DEVICES = {
    name: SealingKey.from_seed(bytes([number]) * 32) for number, name in enumerate(("attic-pi", "kitchen-pi"), 1)
}
COORDINATOR = SealingKey.from_seed(bytes(range(32, 64)))


def tiny_bundle() -> bytes:
    import covey_models
    from covey_models import zoo

    model = zoo.build("softmax", (2,), 3, seed=0)
    return covey_models.export(model, name="tiny", batch_size=4, num_classes=3, key=COORDINATOR)


def record(path: Path, *, encrypt: bool = False) -> None:
    """One round of both agents, seen by `covey protocol record`."""
    from covey_coordinator.aggregation.engines import make_engine
    from covey_coordinator.aggregation.registry import make_rule
    from covey_coordinator.coordinator import Coordinator, Timing
    from covey_coordinator.demo.devices import Shard, make_device
    from covey_coordinator.demo.processes import AgentProcesses
    from covey_coordinator.fleet import Fleet
    from covey_coordinator.store import RunStore
    from covey_edge.mqtt import parse_broker
    from covey_protocol.bundle import read_bundle
    from covey_protocol.messages import TrainingPlan

    rng, bundle = np.random.default_rng(0), tiny_bundle()
    manifest = read_bundle(bundle).manifest
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        broker = start_mosquitto(folder)
        configs = {}
        for device_id, key in DEVICES.items():
            shard = Shard(rng.random((8, 2), np.float32), rng.integers(0, 3, 8, np.int32))
            made = make_device(device_id, folder / device_id, FLEET, {"url": broker.url}, COORDINATOR.public, shard)
            (folder / device_id / "device.pem").write_bytes(key.pem())
            configs[device_id] = made.config
        command = [sys.executable, "-m", "covey_edge", "protocol", "record"]
        command += ["--broker", broker.url, "--fleet", FLEET, "--output", str(path)]
        recorder = subprocess.Popen(command)
        time.sleep(3)
        agents = AgentProcesses(configs, folder / "logs")
        roster = {device_id: key.public for device_id, key in DEVICES.items()}
        fleet = Fleet(parse_broker(broker.url), FLEET, COORDINATOR, roster, chunk_bytes=4096)
        try:
            fleet.connect()
            coordinator = Coordinator(fleet, RunStore(folder / "run"))
            coordinator.wait_for(2, 60)
            coordinator.run_round(
                run_id="run",
                number=1,
                bundle=bundle,
                parameters=np.zeros(manifest.dimension, np.float32),
                plan=TrainingPlan(1, 0.1),
                device_ids=list(DEVICES),
                quorum=2,
                engine=make_engine("direct", make_rule("mean", 0), manifest.parameters),
                timing=Timing(60.0, 20.0, 3.0),
                encrypt=encrypt,
            )
        finally:
            fleet.close()
            agents.stop()
            time.sleep(1)
            recorder.send_signal(signal.SIGINT)
            recorder.wait(20)
            stop_broker(broker)


# --- bad ones

Records = list[Record]


def read(path: Path) -> Records:
    return [msgspec.json.decode(line, type=Record) for line in path.read_bytes().splitlines()]


def message_of(record: Record) -> Message | None:
    """What a record says; None for a chunk or nothing."""
    if not record.payload or "/blob/" in record.topic:
        return None
    sender = msgspec.msgpack.decode(record.payload, type=Envelope).sender
    return codec.decode_unverified(record.payload, topic=record.topic, sender=sender)[0]


def first(records: Records, kind: type[Any]) -> int:
    return next(index for index, record in enumerate(records) if isinstance(message_of(record), kind))


def resealed(record: Record, message: Message, extra: int = 0) -> Record:
    """The record with another message in it, sealed by its sender; `extra` is added to its number."""
    envelope = msgspec.msgpack.decode(record.payload, type=Envelope)
    key = DEVICES.get(envelope.sender, COORDINATOR)
    number = envelope.sequence + extra
    payload = codec.encode(message, topic=record.topic, sender=envelope.sender, sequence=number, key=key)
    return msgspec.structs.replace(record, payload=payload)


def with_line(records: Records, index: int, record: Record) -> Records:
    return [*records[:index], record, *records[index + 1 :]]


def an_update_kept_too_early(records: Records) -> Records:
    """The receipt comes before the chunk that makes the update whole."""
    chunk = first(records, Chunk)
    device = records[chunk].topic.rsplit("/", 1)[0]
    receipt = next(
        i for i, r in enumerate(records) if isinstance(message_of(r), Receipt) and r.topic.startswith(device)
    )
    early = msgspec.structs.replace(records[receipt], time_s=records[chunk].time_s)
    return [*records[:chunk], early, *records[chunk:receipt], *records[receipt + 1 :]]


def an_offer_without_an_answer(records: Records) -> Records:
    index = first(records, Answer)
    return [*records[:index], *records[index + 1 :]]


def a_replay(records: Records) -> Records:
    return [*records, msgspec.structs.replace(records[first(records, Answer)], time_s=records[-1].time_s)]


def a_forged_message(records: Records) -> Records:
    index = first(records, Offer)
    broken = bytearray(records[index].payload)
    broken[-1] ^= 1
    return with_line(records, index, msgspec.structs.replace(records[index], payload=bytes(broken)))


def a_future_version(records: Records) -> Records:
    index = first(records, Need)
    envelope = msgspec.structs.replace(msgspec.msgpack.decode(records[index].payload, type=Envelope), version=2)
    later = msgspec.structs.replace(records[index], payload=msgspec.msgpack.encode(envelope))
    return [*records[: index + 1], later, *records[index + 1 :]]


def a_second_verdict(records: Records) -> Records:
    index = first(records, Verdict)
    again = resealed(records[index], Verdict(message_of(records[index]).round_id, "rejected"), extra=100)
    return [*records[: index + 1], again, *records[index + 1 :]]


def an_update_of_another_size(records: Records) -> Records:
    index = first(records, Offer)
    offer = message_of(records[index])
    return with_line(
        records, index, resealed(records[index], msgspec.structs.replace(offer, update=BlobRef(bytes(32), 40)))
    )


BAD: dict[str, Callable[[Records], Records]] = {
    "an-offer-without-an-answer": an_offer_without_an_answer,
    "an-update-kept-too-early": an_update_kept_too_early,
    "a-replay": a_replay,
    "a-forged-message": a_forged_message,
    "a-future-version": a_future_version,
    "a-second-verdict": a_second_verdict,
    "an-update-of-another-size": an_update_of_another_size,
}


def main() -> None:
    good = FOLDER / "good.jsonl"
    if not good.exists():
        record(good)
    encrypted = FOLDER / "encrypted.jsonl"
    if not encrypted.exists():
        record(encrypted, encrypt=True)
    for name, make in BAD.items():
        path = FOLDER / f"{name}.jsonl"
        if not path.exists():
            path.write_bytes(b"".join(map(write_record, make(read(good)))))
    keys = "".join(f'{device_id} = "{key.public.hex()}"\n' for device_id, key in DEVICES.items())
    (FOLDER / "roster.toml").write_text(f"# coordinator: {COORDINATOR.public.hex()}\n[devices]\n{keys}")


if __name__ == "__main__":
    main()
