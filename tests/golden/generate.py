"""Golden vectors of protocol version 1: the bytes of every message, and a check that today's code still makes them.

`python tests/golden/generate.py` adds vectors for new messages and never changes an old one: they are the promise to
devices in the field. The test in tests/protocol/test_golden.py verifies all of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from covey_protocol import codec
from covey_protocol.bundle import TRAIN_INPUTS, Manifest, Proof, TensorSpec, write_bundle
from covey_protocol.codec import COORDINATOR
from covey_protocol.encryption import KeyPair
from covey_protocol.messages import (
    Answer,
    BlobRef,
    Chunk,
    CodingPlan,
    Failure,
    Invitation,
    Message,
    Need,
    Offer,
    Presence,
    Receipt,
    RoundClosed,
    Seen,
    TeachingPlan,
    TrainingPlan,
    Verdict,
)
from covey_protocol.parameters import ParameterSpec
from covey_protocol.seals import SealingKey
from covey_protocol.topics import Topics

FILE = Path(__file__).with_name("v1.json")
DEVICE = "kitchen-pi"
TOPICS = Topics("golden")
DEVICE_KEY = SealingKey.from_seed(bytes(range(32)))
COORDINATOR_KEY = SealingKey.from_seed(bytes(range(32, 64)))
HASH = bytes(range(32))
OTHER = bytes(range(100, 132))

FROM_COORDINATOR: dict[str, tuple[str, Message]] = {
    "invitation": (
        TOPICS.round,
        Invitation(
            round_id="run.1.abc",
            number=1,
            issued_at_ms=1_700_000_000_000,
            duration_ms=600_000,
            bundle=BlobRef(HASH, 100_000),
            parameters=BlobRef(OTHER, 15_272, 4096),
            plan=TrainingPlan(epochs=3, learning_rate=0.25, max_examples=7, shuffle_seed=42),
            devices=("kitchen-pi", "porch_pi"),
            requires=("train", "float32"),
        ),
    ),
    "closed": (TOPICS.round, RoundClosed("run.1.abc", "abandoned", "2 updates came, the quorum is 5")),
    "need": (TOPICS.down(DEVICE), Need("run.1.abc", HASH, (0, 3, 16_383))),
    "receipt": (TOPICS.down(DEVICE), Receipt("run.1.abc", HASH, True)),
    "receipt-refused": (TOPICS.down(DEVICE), Receipt("run.1.abc", HASH, False, "that round is over")),
    "verdict": (TOPICS.down(DEVICE), Verdict("run.1.abc", "rejected", "Krum score too large")),
    "invitation-clip-proximal": (
        TOPICS.round,
        Invitation(
            round_id="run.2.abd",
            number=2,
            issued_at_ms=1_700_000_600_000,
            duration_ms=600_000,
            bundle=BlobRef(HASH, 100_000),
            parameters=BlobRef(OTHER, 15_272, 4096),
            plan=TrainingPlan(epochs=1, learning_rate=0.5, gradient_clip_norm=0.25, proximal_weight=0.125),
            requires=("train", "float32", "clip_norm", "proximal"),
        ),
    ),
    "invitation-asynchronous": (
        TOPICS.round,
        Invitation(
            round_id="run.3.abe",
            number=3,
            issued_at_ms=1_700_001_200_000,
            duration_ms=600_000,
            bundle=BlobRef(HASH, 100_000),
            parameters=BlobRef(OTHER, 15_272, 4096),
            plan=TrainingPlan(epochs=1, learning_rate=0.5),
            requires=("train", "float32", "late"),
            max_staleness=2,
            earlier=("run.2.abd", "run.1.abc"),
        ),
    ),
    "invitation-encrypted": (
        TOPICS.round,
        Invitation(
            round_id="run.3.abe",
            number=3,
            issued_at_ms=1_700_001_200_000,
            duration_ms=600_000,
            bundle=BlobRef(HASH, 100_000),
            parameters=BlobRef(OTHER, 800, 4096),
            plan=TrainingPlan(epochs=1, learning_rate=0.5),
            requires=("train", "float32", "encryption"),
            encryption_key=KeyPair.of(bytes(range(64, 96))).public,
        ),
    ),
    "invitation-evaluate-task": (
        TOPICS.round,
        Invitation(
            round_id="run-faces.e2.abe",
            number=2,
            issued_at_ms=1_700_001_200_000,
            duration_ms=600_000,
            bundle=BlobRef(HASH, 100_000),
            parameters=BlobRef(OTHER, 15_272, 4096),
            plan=TrainingPlan(epochs=1, learning_rate=0.5, evaluate=("loss", "accuracy"), task="faces"),
            requires=("train", "float32", "evaluate", "tasks"),
        ),
    ),
    "invitation-svrg": (
        TOPICS.round,
        Invitation(
            round_id="run.4.abe",
            number=4,
            issued_at_ms=1_700_001_200_000,
            duration_ms=600_000,
            bundle=BlobRef(HASH, 100_000),
            parameters=BlobRef(OTHER, 15_272, 4096),
            plan=TrainingPlan(epochs=1, learning_rate=0.5, work="svrg", steps=20),
            requires=("train", "float32", "svrg"),
            vectors=(BlobRef(HASH, 15_272, 4096), BlobRef(OTHER, 15_272, 4096)),
        ),
    ),
    "invitation-teach": (
        TOPICS.round,
        Invitation(
            round_id="run.5.abe",
            number=5,
            issued_at_ms=1_700_001_200_000,
            duration_ms=600_000,
            bundle=BlobRef(HASH, 100_000),
            parameters=BlobRef(OTHER, 28, 4096),
            plan=TrainingPlan(
                epochs=1,
                learning_rate=0.5,
                work="teach",
                teaching=TeachingPlan(0.5, 4.0, 8.0, 3.0, teachers=9, lambda_a=0.02, lambda_y=20.0),
            ),
            requires=("train", "float32", "teach"),
            vectors=(BlobRef(HASH, 28, 4096), BlobRef(OTHER, 28, 4096)),
        ),
    ),
    "invitation-coded": (
        TOPICS.round,
        Invitation(
            round_id="run.6.abe",
            number=6,
            issued_at_ms=1_700_001_200_000,
            duration_ms=600_000,
            bundle=BlobRef(HASH, 100_000),
            parameters=BlobRef(OTHER, 28, 4096),
            plan=TrainingPlan(
                epochs=2,
                learning_rate=0.5,
                shuffle_seed=42,
                work="cyclic-code",
                coding=CodingPlan(("kitchen-pi", "porch_pi", "attic-pi"), ("north", "east", "south"), 1),
            ),
            devices=("attic-pi", "kitchen-pi", "porch_pi"),
            requires=("train", "float32", "cyclic-code"),
        ),
    ),
}
FROM_DEVICE: dict[str, tuple[str, Message]] = {
    "presence-online": (
        TOPICS.presence(DEVICE),
        Presence(True, 1_700_000_000_000_000, "0.1.0", "tflite_runtime 2.14.0", ("train", "float32")),
    ),
    "presence-offline": (TOPICS.presence(DEVICE), Presence(False, 1_700_000_000_000_000)),
    "answer": (TOPICS.up(DEVICE), Answer("run.1.abc", True)),
    "answer-declined": (TOPICS.up(DEVICE), Answer("run.1.abc", False, "on battery")),
    "offer": (TOPICS.up(DEVICE), Offer("run.1.abc", BlobRef(HASH, 15_272), 143, {"training_loss": 0.5})),
    "chunk": (TOPICS.up(DEVICE), Chunk("run.1.abc", HASH, 2, b"\x00\x01\x02\xff")),
    "failure": (TOPICS.up(DEVICE), Failure("run.1.abc", "the training process died (SIGSEGV)")),
    "seen": (TOPICS.up(DEVICE), Seen("run.1.abc")),
    "presence-trouble": (
        TOPICS.presence(DEVICE),
        Presence(True, 1_700_000_000_000_000, "0.1.0", trouble="release 0.2.0 ended with code 1"),
    ),
    "presence-on-trial": (
        TOPICS.presence(DEVICE),
        Presence(True, 1_700_000_000_000_000, "0.2.1", on_trial=True, bad=("0.1.9", "0.2.0")),
    ),
}


def golden_manifest() -> Manifest:
    return Manifest(
        format=1,
        name="golden",
        model_sha256="",
        model_bytes=0,
        batch_size=16,
        input=TensorSpec((8, 8, 1), "float32", 0.0, 1.0),
        label=TensorSpec((), "int32", 0, 9),
        parameters=(ParameterSpec("dense/kernel", (3, 4)), ParameterSpec("norm/mean", (4,), trainable=False)),
        signatures=("train", "evaluate", "infer", "get_parameters", "set_parameters"),
        loss="sparse_categorical_crossentropy",
        optimizer="sgd",
        num_classes=10,
    )


def golden_bundles() -> dict[str, bytes]:
    """The first form of the manifest, and one that uses every field added since."""
    first = golden_manifest()
    later = msgspec.structs.replace(
        first,
        optimizer="adam",
        signatures=(*first.signatures, "reset_optimizer"),
        proof=Proof(6, 2.5e-7, 1e-5, "tflite_runtime", judgement="float64"),
        train_inputs=TRAIN_INPUTS,
    )
    return {
        name: write_bundle(manifest, b"not a real model", COORDINATOR_KEY)
        for name, manifest in (("bundle", first), ("bundle-train-inputs", later))
    }


def vectors() -> dict[str, dict[str, str]]:
    """What today's code makes."""
    made = {}
    for sender, key, table in ((COORDINATOR, COORDINATOR_KEY, FROM_COORDINATOR), (DEVICE, DEVICE_KEY, FROM_DEVICE)):
        for number, (name, (topic, message)) in enumerate(table.items(), start=1_700_000_000):
            data = codec.encode(message, topic=topic, sender=sender, sequence=number, key=key)
            made[name] = {"topic": topic, "sender": sender, "hex": data.hex()}
    for name, data in golden_bundles().items():
        made[name] = {"topic": "", "sender": COORDINATOR, "hex": data.hex()}
    return made


def main() -> None:
    known = json.loads(FILE.read_text())["vectors"] if FILE.exists() else {}
    content = {
        "protocol": 1,
        "device_key": DEVICE_KEY.public.hex(),
        "coordinator_key": COORDINATOR_KEY.public.hex(),
        "vectors": {**vectors(), **known},
    }
    FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
