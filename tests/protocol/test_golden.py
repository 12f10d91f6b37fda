"""The bytes on the wire are a promise to devices in the field."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from covey_protocol import codec
from covey_protocol.bundle import read_bundle
from covey_protocol.seals import PublicKey

GOLDEN = Path(__file__).parent.parent / "golden"
STORED = json.loads((GOLDEN / "v1.json").read_text())
BUNDLES = {"bundle", "bundle-train-inputs"}


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_generate", GOLDEN / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(STORED["vectors"]))
def test_todays_code_still_makes_the_stored_bytes(name: str) -> None:
    assert generator().vectors()[name]["hex"] == STORED["vectors"][name]["hex"]


@pytest.mark.parametrize("name", sorted(set(STORED["vectors"]) - BUNDLES))
def test_the_stored_bytes_decode_to_the_message_they_were_made_from(name: str) -> None:
    vector, made = STORED["vectors"][name], generator()
    data = bytes.fromhex(vector["hex"])
    if vector["sender"] == codec.COORDINATOR:
        key = PublicKey.from_hex(STORED["coordinator_key"])
        message, _ = codec.decode_from_coordinator(data, topic=vector["topic"], key=key)
        assert message == made.FROM_COORDINATOR[name][1]
    else:
        key = PublicKey.from_hex(STORED["device_key"])
        message, _ = codec.decode_from_device(data, topic=vector["topic"], sender=vector["sender"], key=key)
        assert message == made.FROM_DEVICE[name][1]


def test_every_message_has_a_golden_vector() -> None:
    made = generator()
    kinds = {type(message) for _, message in (*made.FROM_COORDINATOR.values(), *made.FROM_DEVICE.values())}
    from typing import get_args

    from covey_protocol.messages import FromCoordinator, FromDevice

    assert kinds == set(get_args(FromCoordinator)) | set(get_args(FromDevice))


@pytest.mark.parametrize("name", sorted(BUNDLES))
def test_the_stored_bundle_opens_with_its_seal(name: str) -> None:
    data = bytes.fromhex(STORED["vectors"][name]["hex"])
    assert read_bundle(data, PublicKey.from_hex(STORED["coordinator_key"])).manifest.dimension == 16


def test_fields_younger_than_a_stored_bundle_read_as_their_defaults() -> None:
    manifest = read_bundle(bytes.fromhex(STORED["vectors"]["bundle"]["hex"])).manifest
    assert manifest.train_inputs == ()
    later = read_bundle(bytes.fromhex(STORED["vectors"]["bundle-train-inputs"]["hex"])).manifest
    assert later.train_inputs == ("seed", "clip_norm", "proximal", "correction")
    assert later.proof is not None
    assert later.proof.judgement == "float64"


def test_a_plan_says_only_what_differs_from_its_defaults() -> None:
    import msgspec

    from covey_protocol.messages import TrainingPlan

    zero, none = float("0"), "".join(["no", "ne"])  # equal to the defaults, but not the same objects
    plan = TrainingPlan(1, 0.5, 0, 0, zero, zero, none, zero)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan)) == {"epochs": 1, "learning_rate": 0.5}


def test_the_bytes_of_a_plan_that_asks_for_compression_stay_as_they_are() -> None:
    import msgspec

    from covey_protocol.messages import TrainingPlan

    stored = bytes.fromhex(
        "84a665706f63687301ad6c6561726e696e675f72617465cb3fe0000000000000ab636f6d7072657373696f6ea5746f70"
        "2d6bad6b6570745f6672616374696f6ecb3fd0000000000000"
    )
    plan = TrainingPlan(1, 0.5, compression="top-k", kept_fraction=0.25)
    assert msgspec.msgpack.encode(plan) == stored
    assert msgspec.msgpack.decode(stored, type=TrainingPlan) == plan
