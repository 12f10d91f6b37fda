"""Evaluation rounds: numbers for the model that is there, from devices of which some lie; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scripted import Scripted, manifest_of

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.coordinator import Coordinator, RoundResult, Timing
from covey_coordinator.orders import Orders
from covey_coordinator.records import ACCEPTED, MISSING, REJECTED
from covey_coordinator.serve import CoordinatorConfig, EvaluationSettings, RoundSettings, Task, Work, run_tasks
from covey_coordinator.store import RunStore
from covey_coordinator.watching import events
from covey_coordinator.watching.board import Board
from covey_coordinator.watching.metrics import Traffic, exposition
from covey_edge.config import BrokerSettings
from covey_protocol.bundle import write_bundle
from covey_protocol.device import CAPABILITIES
from covey_protocol.errors import TrainingError
from covey_protocol.messages import Invitation, TrainingPlan
from covey_protocol.parameters import ParameterSpec
from covey_protocol.seals import SealingKey

D = 6
NAMES = ("loss", "accuracy")
MANIFEST = manifest_of(ParameterSpec("w", (D,)))
BUNDLE = write_bundle(MANIFEST, b"model", SealingKey.from_seed(bytes(32)))
MODEL = np.arange(D, dtype=np.float32)
PLAN = TrainingPlan(1, 0.5, evaluate=NAMES)
HONEST = {"a": (0.5, 0.9), "b": (0.7, 0.8), "c": (0.6, 0.85), "d": (0.9, 0.7)}
Make = Callable[[Invitation], bytes]


def says(loss: float, accuracy: float) -> Make:
    """Metrics where they are asked for; else an update that is its own."""

    def make(invitation: Invitation) -> bytes:
        if invitation.plan.evaluate:
            values = {"loss": loss, "accuracy": accuracy}
            return np.array([values[name] for name in invitation.plan.evaluate], "<f4").tobytes()
        return np.full(D, loss / 100, "<f4").tobytes()

    return make


def fleet(more: dict[str, Make] | None = None, **options: Any) -> Scripted:
    return Scripted({**{name: says(*row) for name, row in HONEST.items()}, **(more or {})}, **options)


def engine(num_byzantine: int = 1) -> Any:
    return make_engine("direct", make_rule("trimmed-mean", num_byzantine), MANIFEST.parameters, "adam", 0.01)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    made = RunStore(tmp_path / "run")
    yield made
    made.close()


def evaluate(store: RunStore, devices: Scripted, quorum: int = 3, **options: Any) -> RoundResult:
    return Coordinator(devices, store).run_round(
        run_id="run",
        number=7,
        bundle=BUNDLE,
        parameters=MODEL,
        plan=options.pop("plan", PLAN),
        device_ids=devices.online(),
        quorum=quorum,
        engine=options.pop("engine", None) or engine(),
        timing=Timing(5.0, 1.0, 0.1),
    )


def rows(store: RunStore) -> dict[str, tuple[Any, ...]]:
    found = store._all("SELECT metric, number, mean, median, spread, devices, held_out FROM evaluations")
    return {row[0]: row[1:] for row in found}


def test_an_evaluation_gives_numbers_and_changes_neither_model_nor_memory(store: RunStore) -> None:
    used = engine()
    before = used.saved_state()
    devices = fleet(metrics={"a": {"held_out": 1.0}, "b": {"held_out": 1.0}, "c": {"held_out": 0.0}})
    result = evaluate(store, devices, engine=used)
    assert (result.outcome, result.number, result.evaluates) == ("published", 7, NAMES)
    np.testing.assert_array_equal(result.parameters, MODEL)
    assert used.saved_state() == before
    assert store._all("SELECT * FROM checkpoints") == []
    loss, accuracy = result.evaluation
    assert (loss.median, accuracy.median) == (pytest.approx(0.65), pytest.approx(0.825))
    assert (loss.devices, loss.held_out) == (4, 2)
    assert rows(store)["loss"] == (7, loss.mean, loss.median, loss.spread, 4, 2)
    assert devices.invitation is not None
    assert devices.invitation.round_id.startswith("run.e7.")
    assert devices.invitation.requires == ("train", "float32", "evaluate")
    told = {device_id: verdict.status for device_id, verdict in devices.verdicts}
    assert told == dict.fromkeys(HONEST, "accepted")


LIES = {
    "NaN": (float("nan"), 0.5),
    "1e30": (1e30, 0.5),
    "an accuracy of 2": (0.5, 2.0),
}


@pytest.mark.parametrize("what", LIES)
def test_a_device_that_sends_nonsense_is_named_and_counts_for_nothing(what: str, store: RunStore) -> None:
    result = evaluate(store, fleet({"liar": says(*LIES[what])}))
    assert result.outcome == "published"
    assert {v.device_id for v in result.verdicts if v.status == REJECTED} == {"liar"}
    assert result.evaluation[0].median == pytest.approx(0.65)
    assert result.evaluation[0].devices == 4


def test_a_device_that_lies_plausibly_moves_nothing_beyond_the_others(store: RunStore) -> None:
    result = evaluate(store, fleet({"liar": says(0.0, 1.0)}))
    loss, accuracy = result.evaluation
    assert 0.5 <= loss.median <= 0.9
    assert 0.5 <= loss.mean <= 0.9
    assert 0.7 <= accuracy.mean <= 0.9 + 1e-6
    assert accuracy.median == pytest.approx(0.85)


def test_devices_that_agree_to_the_bit_are_no_copies_here(store: RunStore) -> None:
    same = {name: says(0.0, 1.0) for name in HONEST}
    result = evaluate(store, Scripted(same))
    assert {v.status for v in result.verdicts} == {ACCEPTED}
    assert (result.evaluation[1].mean, result.evaluation[1].spread) == (1.0, 0.0)


def test_an_update_of_a_model_is_not_taken_for_metrics(store: RunStore) -> None:
    result = evaluate(store, fleet({"old": lambda invitation: bytes(4 * D)}))
    verdicts = {v.device_id: v for v in result.verdicts}
    assert verdicts["old"].status == MISSING
    assert "24 bytes, the model needs 8" in verdicts["old"].reason


def test_an_evaluation_below_its_quorum_is_abandoned_without_numbers(store: RunStore) -> None:
    late = dict.fromkeys("bcd", lambda invitation: bytes(4))
    result = evaluate(store, fleet(late))
    assert (result.outcome, result.evaluation, rows(store)) == ("abandoned", (), {})


def test_too_few_devices_for_num_byzantine_abandon_it(store: RunStore) -> None:
    devices = Scripted({name: says(*HONEST[name]) for name in "ab"})
    result = evaluate(store, devices, quorum=2)
    assert result.outcome == "abandoned"
    assert "n > 2f" in result.reason
    assert {verdict.status for _, verdict in devices.verdicts} == {"rejected"}


@pytest.mark.parametrize("names", [("f1",), ("loss", "loss")])
def test_unknown_and_repeated_metrics_are_refused_before_anything_is_sent(
    names: tuple[str, ...], store: RunStore
) -> None:
    devices = fleet()
    with pytest.raises(TrainingError, match="asks for the metrics"):
        evaluate(store, devices, plan=TrainingPlan(1, 0.5, evaluate=names))
    assert devices.invitations == []


def test_an_evaluation_goes_on_after_a_stop_in_its_middle(store: RunStore) -> None:
    class Stop(BaseException):
        pass

    def stop(invitation: Invitation) -> bytes:
        raise Stop

    first = Coordinator(fleet({"d": stop}), store, leave_open=True)
    with pytest.raises(Stop):
        first.run_round(
            run_id="run",
            number=7,
            bundle=BUNDLE,
            parameters=MODEL,
            plan=PLAN,
            device_ids=list(HONEST),
            quorum=3,
            engine=engine(),
        )
    devices = fleet()
    result = Coordinator(devices, store).resume_round(run_id="run", bundle=BUNDLE, parameters=MODEL, engine=engine())
    assert result is not None
    assert (result.outcome, result.evaluates, result.number) == ("published", NAMES, 7)
    assert devices.invitation is not None
    assert rows(store)["accuracy"][2] == pytest.approx(0.825)


# --- in a run

CONFIG = CoordinatorConfig(
    fleet="home",
    run="run",
    bundle="",
    key_file="",
    rounds=5,
    broker=BrokerSettings(url="mqtt://nowhere"),
    devices={},
    round=RoundSettings(devices=4, quorum=3, duration_s=5.0, answer_s=0.2, grace_s=0.1, wait_s=0.5),
    evaluation=EvaluationSettings(every=2),
)
replace = msgspec.structs.replace


def run(
    store: RunStore, devices: Scripted, config: CoordinatorConfig = CONFIG, watch: Any = events.unwatched
) -> list[str]:
    lines: list[str] = []
    coordinator = Coordinator(devices, store, leave_open=True, watch=watch)
    work = Work(config, BUNDLE, MODEL)
    run_tasks([Task(coordinator, engine(), work, lines.append, Orders(store.folder), watch)])
    return lines


def order(devices: Scripted) -> list[str]:
    return [one.round_id.split(".")[1] for one in devices.invitations]


def test_every_second_model_is_evaluated_and_the_last_one(store: RunStore) -> None:
    devices = fleet()
    lines = run(store, devices)
    assert order(devices) == ["1", "2", "e2", "3", "4", "e4", "5", "e5"]
    (line,) = (line for line in lines if line.startswith("evaluation of round 4/5"))
    assert line.startswith("evaluation of round 4/5 published: 4 of 4 updates, loss 0.65 (mean 0.6")
    assert line.endswith("0 of 4 on held-out data")
    plan = devices.invitations[2].plan
    assert (plan.evaluate, plan.compression) == (NAMES, "none")
    again = fleet()
    assert run(store, again) == ["going on after round 5"]
    assert again.invitations == []


def test_a_run_that_is_done_can_be_evaluated_later(store: RunStore) -> None:
    run(store, fleet(), replace(CONFIG, evaluation=EvaluationSettings()))
    assert rows(store) == {}
    devices = fleet()
    run(store, devices, replace(CONFIG, evaluation=EvaluationSettings(every=3, metrics=("accuracy",))))
    assert order(devices) == ["e5"]
    assert rows(store)["accuracy"][0] == 5


def test_training_goes_on_where_too_few_can_evaluate(store: RunStore) -> None:
    old = tuple(name for name in CAPABILITIES if name != "evaluate")
    devices = fleet(capabilities={"a": old})
    lines = run(store, devices, replace(CONFIG, rounds=2))
    assert order(devices) == ["1", "2"]
    assert "evaluation of round 2 left out: 3 of 4 devices are here, a cannot evaluate" in lines
    fewer = replace(CONFIG, evaluation=EvaluationSettings(every=2, devices=3))
    devices = fleet(capabilities={"a": old})
    run(store, devices, replace(fewer, rounds=2))
    assert order(devices) == ["e2"]
    assert devices.invitations[0].devices == ("b", "c", "d")


def test_what_an_evaluation_gave_is_on_the_board_and_in_the_metrics(store: RunStore) -> None:
    board = Board(list(HONEST))
    run(store, fleet(), watch=board)
    state = board.state()
    assert (state.done, state.runs["run"].done, state.runs["run"].evaluated) == (5, 5, 5)
    page = exposition(state, Traffic(0, 0, 0), 0.0)
    assert 'covey_evaluation{run="run",metric="accuracy",of="median"} 0.8' in page
    assert 'covey_evaluation_round{run="run"} 5' in page
    assert "covey_rounds_published 5" in page
