"""A real round captured: consent on real agents over Mosquitto, the seal, what the consistency check names."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from clinic import Clinic, digits_shards, make_clinic, run_with_kills

from covey_coordinator.capture import replaying
from covey_coordinator.capture.consistency import check_capture, check_record, problems
from covey_coordinator.capture.program import Request, capture
from covey_coordinator.grid.display import Display
from covey_edge.runtime import Model
from covey_edge.trainer import protect, train
from covey_protocol.bundle import read_bundle
from covey_protocol.captures import Capture, DeviceRecord, Work, opened, sealed, work_of
from covey_protocol.errors import ConfigError, DataError, StorageError
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey

OPEN, CLIPPED, CLOSED = "ward-1", "ward-2", "ward-3"
CLIP = 0.05


@pytest.fixture(scope="module")
def clinic(
    tmp_path_factory: pytest.TempPathFactory, digits_bundle: bytes, coordinator_key: SealingKey
) -> Iterator[Clinic]:
    """Two rounds are over. Of the three owners two allow captures and keep records; one of these clips."""
    folder = tmp_path_factory.mktemp("captured")
    made = make_clinic(folder, digits_bundle, coordinator_key, digits_shards())
    try:
        allow = "\n[capture]\nallow = true\nkeep_records = 1\n"
        for name, more in ((OPEN, allow), (CLIPPED, f"{allow}[privacy]\nclip_norm = {CLIP}\n"), (CLOSED, "")):
            path = folder / name / "agent.toml"
            path.write_text(path.read_text() + more)
        made.configure(2, quorum=3, epochs=2)
        run_with_kills(made, 2, seed=0, most_kills=0)
        yield made
    finally:
        made.stop()


def taken(clinic: Clinic, number: int = 2) -> tuple[Path, list[str]]:
    said: list[str] = []
    output = clinic.folder / f"{number}.covey-capture"
    capture(Request(clinic.folder / "coordinator.toml", number=number, output=output), said.append)
    return output, said


@pytest.fixture(scope="module")
def file(clinic: Clinic) -> bytes:
    return taken(clinic)[0].read_bytes()


@pytest.fixture(scope="module")
def round_2(file: bytes, coordinator_key: SealingKey) -> Capture:
    return opened(file, Capture, "2.covey-capture", coordinator_key.public)


def record_of(clinic: Clinic, name: str) -> tuple[DeviceRecord, Work]:
    (path,) = (clinic.folder / name / "state" / "records").glob("*.covey-record")
    record = opened(path.read_bytes(), DeviceRecord, path.name)
    return record, work_of(record, path.name)


def test_a_capture_holds_the_updates_of_those_who_allow_it_and_says_who_does_not(
    clinic: Clinic, round_2: Capture
) -> None:
    path, said = taken(clinic)
    assert [one.device_id for one in round_2.updates] == [OPEN, CLIPPED]
    assert round_2.left_out == {CLOSED: "its owner does not allow captures"}
    assert any(CLOSED in line and "does not allow" in line for line in said)
    assert path.stat().st_mode & 0o777 == 0o600
    assert round_2.parameters == clinic.checkpoint(1).read_bytes()
    assert round_2.aggregate == clinic.checkpoint(2).read_bytes()
    for one in round_2.updates:  # without compression what travels is the update itself
        assert hashlib.sha256(one.update).digest() == one.sha256
        assert one.status == "accepted"


def test_the_first_round_starts_from_the_bundle(clinic: Clinic, digits_bundle: bytes) -> None:
    found = opened(taken(clinic, 1)[0].read_bytes(), Capture, "1")
    assert found.parameters == Model(read_bundle(digits_bundle)).parameters().tobytes()
    assert not problems(check_capture(found))


def test_what_is_not_there_is_said(clinic: Clinic, digits_bundle: bytes) -> None:
    with pytest.raises(StorageError, match="no round 3 that is over"):
        taken(clinic, 3)
    other = clinic.folder / "other.toml"
    (clinic.folder / "other.covey").write_bytes(digits_bundle + b" ")
    other.write_text((clinic.folder / "coordinator.toml").read_text().replace("digits.covey", "other.covey"))
    with pytest.raises(ConfigError, match="not that of round"):
        capture(Request(other, number=2), print)


def test_without_any_consent_nothing_is_captured(
    clinic: Clinic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from covey_coordinator.capture import taking

    monkeypatch.setattr(taking, "is_allowed", lambda metrics: False)
    with pytest.raises(ConfigError, match="allow = true"):
        capture(Request(clinic.folder / "coordinator.toml", output=tmp_path / "none"), print)
    assert not (tmp_path / "none").exists()


def test_records_stay_on_the_device_and_the_oldest_goes(clinic: Clinic, round_2: Capture) -> None:
    record, work = record_of(clinic, OPEN)
    assert record.round_id == round_2.invitation.round_id  # the record of round 1 is gone
    assert work.x.shape[0] == len(digits_shards()[OPEN].x)
    assert not (clinic.folder / CLOSED / "state" / "records").exists()
    store = b"".join(path.read_bytes() for path in clinic.runs.rglob("*") if path.is_file())
    assert work.x.data[:256] not in store
    assert work.x.data[:256] not in sealed(round_2, SealingKey.generate())


def test_everything_fits_together_and_training_again_gives_the_bits(clinic: Clinic, round_2: Capture) -> None:
    assert not problems(check_capture(round_2))
    for name in (OPEN, CLIPPED):
        checks = check_record(round_2, *record_of(clinic, name))
        assert [one.told for one in checks if one.holds is not True] == []
        assert any("the same bits" in one.told for one in checks)
    assert any(f"clipped to {CLIP:g}" in one.told for one in checks)


def told(checks: list) -> str:  # type: ignore[type-arg]
    return " | ".join(f"{one.what}: {one.told}" for one in problems(checks))


def changed(capture: Capture, name: str, update: np.ndarray) -> Capture:
    """With another update of this device, as if it had sent that."""
    updates = [
        msgspec.structs.replace(one, update=update.astype("<f4").tobytes()) if one.device_id == name else one
        for one in capture.updates
    ]
    return msgspec.structs.replace(capture, updates=tuple(updates))


def replayed(capture: Capture, record: DeviceRecord, work: Work, update: np.ndarray, **changes: object) -> str:
    """What the check says of a device that did something else, and says that it did this."""
    data = update.astype("<f4").tobytes()
    other = msgspec.structs.replace(work, trained=data, sent_sha256=hashlib.sha256(data).digest(), **changes)
    return told(check_record(changed(capture, record.device_id, update), record, other))


def trained(capture: Capture, work: Work, plan: TrainingPlan, **changes: np.ndarray) -> np.ndarray:
    from covey_coordinator.capture.consistency import numbers

    x, y = changes.get("x", numbers(work.x)), changes.get("y", numbers(work.y))
    model = Model(read_bundle(capture.bundle))
    received = changes.get("received", np.frombuffer(capture.parameters, "<f4"))
    model.set_parameters(received)
    train(model, (x, y), plan, work.order_name)
    return model.parameters() - received


def test_what_does_not_match_is_named_with_what_explains_it(clinic: Clinic, round_2: Capture) -> None:
    from covey_coordinator.capture.consistency import numbers

    record, work = record_of(clinic, OPEN)
    plan, x = round_2.invitation.plan, numbers(work.x)
    planted = {
        "started from the model that came of the round": trained(
            round_2, work, plan, received=np.frombuffer(round_2.aggregate, "<f4")
        ),
        "times as long: another learning rate, or clipped": 0.5 * trained(round_2, work, plan),
        "it made 1 epochs, not 2": trained(round_2, work, msgspec.structs.replace(plan, epochs=1)),
        "inputs were 0.003922 times": trained(round_2, work, plan, x=(x / 255).astype(np.float32)),
        "in the order of ward-2": trained(round_2, msgspec.structs.replace(work, order_name=CLIPPED), plan),
    }
    for expected, update in planted.items():
        assert expected in replayed(round_2, record, work, update), expected
    noisy = trained(round_2, work, plan) + np.random.default_rng(0).normal(size=len(x[0]) * 0 + len(update))
    assert "no other order" in replayed(round_2, record, work, noisy.astype(np.float32))


def test_a_layer_that_was_changed_is_named(clinic: Clinic, round_2: Capture) -> None:
    record, work = record_of(clinic, OPEN)
    manifest = read_bundle(round_2.bundle).manifest
    update = np.frombuffer(work.trained, "<f4").copy()
    update[: manifest.parameters[0].size] *= -1
    assert f"differing: {manifest.parameters[0].name}" in replayed(round_2, record, work, update)


def test_protection_that_the_record_does_not_say_is_found(clinic: Clinic, round_2: Capture) -> None:
    record, work = record_of(clinic, OPEN)
    sent = protect(np.frombuffer(work.trained, "<f4"), 0.01, 0.0)
    data = sent.astype("<f4").tobytes()
    other = msgspec.structs.replace(work, sent_sha256=hashlib.sha256(data).digest())
    said = told(check_record(changed(round_2, OPEN, sent), record, other))
    assert "protection" in said
    assert "what was sent differs" in said
    assert "is not the one that the record says" in told(check_record(changed(round_2, OPEN, sent), record, work))


def test_a_capture_whose_parts_are_of_different_rounds_is_named(clinic: Clinic, round_2: Capture) -> None:
    first = opened(taken(clinic, 1)[0].read_bytes(), Capture, "1")
    mixed = msgspec.structs.replace(round_2, parameters=first.parameters)
    assert "parameters are not as announced" in told(check_capture(mixed))
    short = changed(round_2, OPEN, np.zeros(3, np.float32))
    assert f"{OPEN}: update" in told(check_capture(short))
    record, work = record_of(clinic, OPEN)
    assert "round of record and capture differ" in told(check_record(first, record, work))
    fewer = msgspec.structs.replace(work, y=msgspec.structs.replace(work.y, shape=(3,), data=work.y.data[:12]))
    assert "3 labels in the record" in told(check_record(round_2, record, fewer))


def test_torn_changed_and_foreign_files_are_refused(file: bytes) -> None:
    with pytest.raises(DataError, match="damaged"):
        opened(file[: len(file) // 2], Capture, "torn")
    flipped = bytearray(file)
    flipped[-100] ^= 1
    with pytest.raises(DataError, match="damaged"):
        opened(bytes(flipped), Capture, "flipped")
    with pytest.raises(DataError, match="no capture"):
        opened(b"PK\x03\x04 something else", Capture, "zip")
    with pytest.raises(DataError, match="the other of the two"):
        opened(file, DeviceRecord, "capture")
    with pytest.raises(DataError, match="sealed by"):
        opened(file, Capture, "theirs", SealingKey.generate().public)


def replay_of(clinic: Clinic, file: Path, output: Path, **asked: object) -> tuple[list, str]:  # type: ignore[type-arg]
    said = io.StringIO()
    request = replaying.Request(file, output=output, **asked)  # type: ignore[arg-type]
    found = replaying.replay(request, Display(said))
    return found, said.getvalue()


def test_a_replay_attacks_what_fits_and_holds_it_against_the_record(clinic: Clinic, tmp_path: Path) -> None:
    file, _ = taken(clinic)
    (record,) = (clinic.folder / OPEN / "state" / "records").iterdir()
    found, said = replay_of(clinic, file, tmp_path / "out", records=(record,), attacks=("labels", "units"))
    assert "absent  ward-3: its owner does not allow captures" in said
    assert {(one.device_id, one.attack) for one in found} == {
        (name, attack) for name in (OPEN, CLIPPED) for attack in ("labels", "units")
    }
    by_labels = next(one for one in found if one.device_id == OPEN and one.attack == "labels")
    assert by_labels.grade is not None
    assert by_labels.grade.label_rate > 0.5  # of 599, of which every class is there
    assert next(one for one in found if one.device_id == CLIPPED).grade is None  # its record was not given
    facts = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert len(facts["attacks"]) == 4
    assert (tmp_path / "out" / "replay.json").stat().st_mode & 0o077 == 0


def test_an_update_that_does_not_fit_is_not_attacked_and_the_replay_fails(
    clinic: Clinic, round_2: Capture, tmp_path: Path
) -> None:
    file = tmp_path / "changed.covey-capture"
    file.write_bytes(sealed(changed(round_2, OPEN, np.ones(3, np.float32)), SealingKey.generate()))
    with pytest.raises(DataError, match="does not fit together in 1 places: ward-1: update"):
        replay_of(clinic, file, tmp_path / "out", attacks=("labels",))
    facts = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert {one["device"] for one in facts["attacks"]} == {CLIPPED}
    with pytest.raises(ConfigError, match="its owner does not allow captures"):
        replay_of(clinic, taken(clinic)[0], tmp_path / "out", devices=(CLOSED,))
    with pytest.raises(ConfigError, match="did you mean 'labels'"):
        replay_of(clinic, taken(clinic)[0], tmp_path / "out", attacks=("label",))
