"""What top-k leaves out is kept for its task, and for nothing else; and what the training child makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from covey_edge.frames import Run
from covey_edge.trainer import compressed
from covey_edge.withheld import WithheldFile
from covey_protocol.compression import decode_update
from covey_protocol.errors import TrainingError
from covey_protocol.messages import BlobRef, Invitation, TrainingPlan

D = 50
BUNDLE, OTHER = bytes(32), bytes([1]) * 32
PLAN = TrainingPlan(epochs=1, learning_rate=0.1, compression="top-k", kept_fraction=0.1)


def invitation(round_id: str = "run.1.a", bundle: bytes = BUNDLE, d: int = D) -> Invitation:
    return Invitation(round_id, 1, 0, 1000, BlobRef(bundle, 100), BlobRef(OTHER, 4 * d), PLAN)


def numbers(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(D).astype(np.float32)


def request(withheld: bytes = b"", **changes: Any) -> Run:
    values: dict[str, Any] = {"plan": PLAN, "clip_norm": 0.0, "noise_multiplier": 0.0, "withheld": withheld}
    return Run("run.1.a", "pi", b"", min_examples=1, **{**values, **changes})


def sent(data: bytes, plan: TrainingPlan = PLAN) -> np.ndarray:
    return decode_update(data, plan, "run.1.a", "pi", D)


# --- the file


def test_what_is_withheld_is_there_for_the_next_round_of_the_run(tmp_path: Path) -> None:
    kept = numbers().tobytes()
    WithheldFile(tmp_path / "w").store(invitation(), kept)
    assert WithheldFile(tmp_path / "w").load(invitation("run.2.b")) == kept
    assert (tmp_path / "w").stat().st_mode & 0o777 == 0o600


TEACH = msgspec.structs.replace(PLAN, work="teach", compression="none", kept_fraction=0.0)
AFTER = {  # the file knows rounds 1 and 2; what a round begins with
    "the next round": ("run.3.c", b"second"),
    "the same round again": ("run.2.b", b"first"),
    "the same number again, after the round was abandoned": ("run.2.z", b"first"),
    "another run": ("other.3.c", b""),
}


@pytest.mark.parametrize("what", AFTER)
def test_a_teacher_begins_with_what_the_fleet_has_taken(what: str, tmp_path: Path) -> None:
    """Its state has any size, and is another file than what top-k withholds."""
    round_id, expected = AFTER[what]

    def asked(name: str, work: str = "teach") -> Invitation:
        plan = msgspec.structs.replace(TEACH, work=work)
        return msgspec.structs.replace(invitation(name), plan=plan)

    file = WithheldFile.of(tmp_path, asked("run.1.a"))
    file.store(asked("run.1.a"), b"first")
    file.store(asked("run.2.b", "teach-correct"), b"second")
    assert WithheldFile.of(tmp_path, asked(round_id)).load(asked(round_id)) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.msgpack"]
    assert WithheldFile.of(tmp_path, invitation(round_id)).load(invitation(round_id)) == b""


OTHERS = {
    "another run": invitation("another.2.b"),
    "a run whose name begins alike": invitation("run.1.2.b"),
    "another bundle": invitation("run.2.b", bundle=OTHER),
    "a model of another size": invitation("run.2.b", d=D + 1),
}


@pytest.mark.parametrize("what", OTHERS)
def test_it_is_not_for(what: str, tmp_path: Path) -> None:
    file = WithheldFile(tmp_path / "w")
    file.store(invitation(), numbers().tobytes())
    assert file.load(OTHERS[what]) == b""


def test_a_round_that_is_trained_again_starts_from_what_there_was_before_it(tmp_path: Path) -> None:
    file = WithheldFile(tmp_path / "w")
    file.store(invitation("run.1.a"), numbers(1).tobytes())
    assert file.load(invitation("run.1.a")) == b""
    for _ in range(2):
        file.store(invitation("run.2.b"), numbers(2).tobytes())
        assert file.load(invitation("run.2.b")) == numbers(1).tobytes()
        assert file.load(invitation("run.3.c")) == numbers(2).tobytes()


def test_tasks_that_take_turns_keep_their_own(tmp_path: Path) -> None:
    rounds = {
        task: msgspec.structs.replace(invitation(f"run-{task}.1.a"), plan=msgspec.structs.replace(PLAN, task=task))
        for task in ("", "x", "y")
    }
    for seed, asked in enumerate(rounds.values()):
        WithheldFile.of(tmp_path, asked).store(asked, numbers(seed).tobytes())
    for seed, asked in enumerate(rounds.values()):
        later = msgspec.structs.replace(asked, round_id=asked.round_id.replace(".1.a", ".2.b"))
        assert WithheldFile.of(tmp_path, later).load(later) == numbers(seed).tobytes()
    assert (tmp_path / "withheld.msgpack").exists()  # of a fleet without tasks, as ever


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xc1", b"\x80"])
def test_a_damaged_file_is_as_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(content)
    assert WithheldFile(tmp_path / "w").load(invitation()) == b""


# --- what the training child makes of it


def test_what_is_sent_and_what_is_withheld_are_the_update_and_what_was_withheld() -> None:
    update, before = numbers(1), numbers(2)
    data, withheld = compressed(update, request(before.tobytes()))
    np.testing.assert_allclose(sent(data) + np.frombuffer(withheld, "<f4"), update + before, atol=1e-6)
    assert np.count_nonzero(sent(data)) == D // 10


def test_a_number_that_is_always_small_is_sent_in_the_end() -> None:
    update = np.full(D, 0.1, np.float32)
    update[:3] = 1.0
    withheld, seen = b"", np.zeros(D, bool)
    for _ in range(60):
        data, withheld = compressed(update, request(withheld))
        seen |= sent(data) != 0
    assert seen.all()


def test_what_is_sent_stays_within_the_clip_norm_and_the_rest_is_withheld() -> None:
    update, before = numbers(1) / 100, numbers(2) * 10
    data, withheld = compressed(update, request(before.tobytes(), clip_norm=0.5))
    assert 0 < np.linalg.norm(sent(data)) <= 0.5
    np.testing.assert_allclose(sent(data) + np.frombuffer(withheld, "<f4"), update + before, atol=1e-5)


def test_noised_updates_are_not_cut_down_to_their_largest_numbers() -> None:
    with pytest.raises(TrainingError, match="mostly noise"):
        compressed(numbers(), request(clip_norm=1.0, noise_multiplier=0.1))
    plan = TrainingPlan(epochs=1, learning_rate=0.1, compression="rotated-8bit")
    data, withheld = compressed(numbers(), request(plan=plan, clip_norm=1.0, noise_multiplier=0.1))
    np.testing.assert_allclose(sent(data, plan), numbers(), atol=0.05)
    assert withheld == b""
