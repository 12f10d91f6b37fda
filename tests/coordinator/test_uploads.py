"""When devices are asked for their updates."""

from __future__ import annotations

from covey_coordinator.uploads import ASK_AGAIN_S, BUSY_S, LET_GO_BYTES, LET_GO_S, UploadGate
from covey_protocol.device import RESEND_S
from covey_protocol.messages import BlobRef, Need

SIZE = LET_GO_BYTES // 4
UPDATE = BlobRef(bytes(32), SIZE, SIZE // 2)


def need(*indices: int) -> Need:
    return Need("run.1.a", UPDATE.sha256, indices)


def names(gone: list[tuple[str, Need]]) -> list[str]:
    return [name for name, _ in gone]


def test_no_more_is_asked_for_at_once_than_the_limit() -> None:
    gate = UploadGate()
    for number in range(6):
        gate.add(f"d{number}", need(0, 1), UPDATE, 0.0)
    assert names(gate.let_go(0.0, True)) == ["d0", "d1", "d2", "d3"]
    assert gate.let_go(LET_GO_S / 2, True) == []
    assert names(gate.let_go(LET_GO_S, True)) == ["d4", "d5"]
    assert gate.let_go(1.0, True) == []


def test_only_the_chunks_that_are_missing_count() -> None:
    gate = UploadGate()
    for number in range(9):
        gate.add(f"d{number}", need(1), UPDATE, 0.0)
    assert len(gate.let_go(0.0, True)) == 8


def test_an_update_above_the_limit_goes_alone() -> None:
    gate = UploadGate()
    large = BlobRef(bytes(32), 3 * LET_GO_BYTES, 3 * LET_GO_BYTES // 10000)
    gate.add("large", Need("run.1.a", large.sha256, tuple(range(10000))), large, 0.0)
    gate.add("small", need(0), UPDATE, 0.0)
    assert names(gate.let_go(0.0, True)) == ["large"]
    assert names(gate.let_go(1.0, True)) == ["small"]


def test_a_device_that_offers_again_while_it_waits_is_asked_once_and_keeps_its_place() -> None:
    gate = UploadGate()
    gate.add("a", need(0, 1), UPDATE, 0.0)
    gate.add("b", need(0, 1), UPDATE, 0.0)
    gate.add("a", need(1), UPDATE, 0.0)
    assert gate.let_go(0.0, True) == [("a", need(1)), ("b", need(0, 1))]


def test_a_need_that_came_after_all_others_were_let_go_waits_its_turn() -> None:
    gate = UploadGate()
    gate.add("a", need(0), UPDATE, 0.0)
    assert names(gate.let_go(5.0, True)) == ["a"]
    gate.add("b", need(0), UPDATE, 0.0)
    assert gate.let_go(5.0 + LET_GO_S / 2, True) == []
    assert names(gate.let_go(5.0 + 2 * LET_GO_S, True)) == ["b"]


def test_an_offer_that_crossed_its_need_is_not_answered_again_but_one_that_is_repeated_is() -> None:
    gate = UploadGate()
    gate.add("a", need(0, 1), UPDATE, 0.0)
    assert names(gate.let_go(1.0, True)) == ["a"]
    gate.add("a", need(0, 1), UPDATE, 1.0 + ASK_AGAIN_S / 2)
    assert gate.let_go(10.0, True) == []
    gate.add("a", need(1), UPDATE, 1.0 + RESEND_S)
    assert gate.let_go(10.0, True) == [("a", need(1))]
    assert ASK_AGAIN_S < RESEND_S


def test_a_coordinator_that_is_never_idle_asks_all_the_same_but_seldom() -> None:
    gate = UploadGate()
    for number in range(8):
        gate.add(f"d{number}", need(0, 1), UPDATE, 0.0)
    assert len(gate.let_go(0.0, False)) == 4
    assert gate.let_go(BUSY_S / 2, False) == []
    assert len(gate.let_go(BUSY_S, False)) == 4


def test_another_update_is_asked_for_at_once() -> None:
    gate = UploadGate()
    gate.add("a", need(0), UPDATE, 0.0)
    gate.let_go(1.0, True)
    another = BlobRef(bytes([1]) * 32, 8, 8)
    gate.add("a", Need("run.1.a", another.sha256, (0,)), another, 1.0)
    assert names(gate.let_go(2.0, True)) == ["a"]


def test_nothing_is_asked_for_after_the_round() -> None:
    gate = UploadGate()
    gate.add("a", need(0), UPDATE, 0.0)
    gate.clear()
    assert gate.let_go(1.0, True) == []
