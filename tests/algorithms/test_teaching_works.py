"""The works of machine teaching in real training children and the coordinator's engine, against the numpy reference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tensorflow as tf
from algorithms import teachers
from numpy.testing import assert_allclose

import covey_models
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.algorithms.comt import Teaching
from covey_coordinator.algorithms.engines import asked_by
from covey_coordinator.algorithms.making import make_algorithm_engine
from covey_coordinator.algorithms.settings import Algorithm
from covey_coordinator.algorithms.teaching_settings import own_teacher
from covey_coordinator.coordinator import arrivals_of, refuses_copies
from covey_coordinator.records import REJECTED
from covey_coordinator.teaching.reference import comt
from covey_coordinator.trusted_training import TrustedSettings
from covey_edge.frames import Done, Open, Problem, Run
from covey_edge.trainer import Trainer
from covey_protocol.bundle import read_bundle
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey
from covey_protocol.teaching import Settings

ROUNDS = 5
LOSSES = ("mean_squared_error", "binary_crossentropy")


@pytest.fixture(scope="module")
def bundles(coordinator_key: SealingKey) -> dict[str, bytes]:
    made = {loss: teachers.linear(coordinator_key, loss) for loss in LOSSES}
    deep = covey_models.export(teachers.deep_model(), name="deep", batch_size=8, key=coordinator_key, teach=True)
    return {**made, "deep": deep}


class Child:
    """One device's training child, in this process, and what the agent keeps for it."""

    def __init__(self, folder: Path, name: str, key: SealingKey, bundle: bytes, data: Any, trusted: Any = None) -> None:
        self.name, self.kept, self.found = name, b"", {}
        self._trainer, self._trusted = Trainer(), ""
        folder.mkdir()
        (folder / "bundle").write_bytes(bundle)
        teachers.write(folder / "data.npz", data)
        if trusted is not None:
            teachers.write(folder / "trusted.npz", trusted)
            self._trusted = str(folder / "trusted.npz")
        digest = hashlib.sha256(bundle).digest()
        frame = Open(str(folder / "bundle"), digest, key.public.hex(), "npz", str(folder / "data.npz"))
        assert isinstance(self._trainer.answer(frame), Done)

    def ask(self, plan: TrainingPlan, parameters: Any, vectors: Any) -> Any:
        sent = tuple(vector.astype("<f4").tobytes() for vector in vectors)
        data = parameters.astype("<f4").tobytes()
        frame = Run("r.1.a", self.name, data, plan, 0.0, 0.0, 1, False, self.kept, False, sent, 9, "npz", self._trusted)
        return self._trainer.answer(frame)

    def do(self, plan: TrainingPlan, parameters: Any, vectors: Any) -> Any:
        done = self.ask(plan, parameters, vectors)
        assert isinstance(done, Done), done
        self.kept, self.found = done.withheld, done.found or self.found
        return np.frombuffer(done.update, "<f4")


Fleet = Callable[..., tuple[list[Child], Any]]


@pytest.fixture
def fleet(tmp_path: Path, coordinator_key: SealingKey, bundles: dict[str, bytes]) -> Fleet:
    """(loss, data, trusted per teacher) -> children, engine."""

    def made(
        loss: str,
        data: list[Any],
        trusted: dict[int, Any],
        own: Any = None,
        rule: Any = None,
        longest_share: float = 0.0,
    ) -> Any:
        children = [
            Child(tmp_path / str(place), str(place), coordinator_key, bundles[loss], one, trusted.get(place))
            for place, one in enumerate(data)
        ]
        plan, teacher = teachers.plan_of(len(data)), None
        if own is not None:
            teachers.write(tmp_path / "own.npz", own)
            teacher = own_teacher(read_bundle(bundles[loss]), plan, TrustedSettings("own.npz"), tmp_path)
        teaching = Teaching(plan, len(trusted), longest_share, teacher)
        algorithm = Algorithm("comt", teaching=plan, holders=bool(trusted))
        specs = read_bundle(bundles[loss]).manifest.parameters
        options = {"rate": 0.1, "devices": len(data), "teaching": teaching}
        return children, make_algorithm_engine(algorithm, "direct", rule or make_rule("mean"), specs, **options)

    return made


def exchange(children: list[Child], engine: Any, parameters: Any, lies: Any = None) -> Any:
    """One exchange with the children that it is for. lies: name -> what it sends instead."""
    work, vectors = asked_by(engine)
    plan = asked_for(work, len(children))
    asked = [one for one in children if work == "teach" or one._trusted]
    arrivals = arrivals_of([one.name for one in asked], plan, len(parameters))
    for one in asked:
        update = one.do(plan, parameters, vectors)
        arrivals.add(one.name, (lies or {}).get(one.name, lambda update: update)(update), 20)
    return engine.aggregate(
        parameters, arrivals.screened([one.name for one in asked], refuse_copies=refuses_copies(plan, engine))
    )


def asked_for(work: str, count: int = 3) -> TrainingPlan:
    return Algorithm("comt", teaching=teachers.plan_of(count)).plan(TrainingPlan(1, 0.1), work)


def data_of(loss: str) -> tuple[list[Any], Any, Any]:
    if loss == "mean_squared_error":
        plain = [teachers.numbers(1, 20), teachers.numbers(2, 25, 2.0), teachers.numbers(3, 17, 2.0)]
        return plain, teachers.numbers(8, 6), teachers.numbers(9, 5)
    plain = [teachers.classes(1, 20), teachers.classes(2, 25, 0.8), teachers.classes(3, 17, 0.8)]
    return plain, teachers.classes(8, 6), teachers.classes(9, 5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("holder", ["devices", "coordinator", "both"])
def test_children_and_engine_are_the_reference(loss: str, holder: str, fleet: Fleet) -> None:
    data, first, second = data_of(loss)
    held = {0: first, 2: second} if holder != "coordinator" else {}
    own = None if holder == "devices" else teachers.classes(7, 6) if "binary" in loss else teachers.numbers(7, 6)
    children, engine = fleet(loss, data, held, own)
    parameters = np.zeros(teachers.FEATURES + 1, np.float32)
    for _ in range(ROUNDS * (2 if held else 1)):
        parameters = exchange(children, engine, parameters).parameters

    told = Settings(**teachers.CONSTANTS, rounds=ROUNDS, tolerance=0.0)
    nothing = tuple(part[:0] for part in teachers.with_intercept(data[0]))
    trusted = [teachers.with_intercept(held[place]) if place in held else nothing for place in range(3)]
    if own is not None:
        trusted.append(teachers.with_intercept(own))
    right = comt([teachers.with_intercept(one) for one in data], trusted, teachers.problem(loss), told)
    assert np.abs(right.theta).max() > 0.3
    assert_allclose(parameters, right.theta, rtol=1e-4, atol=1e-5)


def test_classes_are_taught_on_what_the_last_layer_sees(fleet: Fleet) -> None:
    """One learner for each class against the rest, on the features of a net that is not trained."""
    model = teachers.deep_model()
    until = tf.keras.Model(model.inputs, model.layers[-1].input)

    def three(seed: int, n: int) -> teachers.Data:
        plain = teachers.numbers(seed, n)
        return teachers.Data(plain.x, np.digitize(plain.y, np.quantile(plain.y, (0.3, 0.7))).astype(np.int32))

    def as_reference(data: teachers.Data) -> Any:
        x = np.hstack([np.asarray(until(data.x), np.float64), np.ones((len(data.x), 1))])
        return x, np.where(data.y[:, None] == np.arange(3), 1.0, -1.0)

    data, held = [three(1, 20), three(2, 25)], three(8, 9)
    children, engine = fleet("deep", data, {1: held})
    parameters = np.zeros(18, np.float32)
    for _ in range(2 * ROUNDS):
        parameters = exchange(children, engine, parameters).parameters
    told = Settings(**teachers.CONSTANTS, rounds=ROUNDS, tolerance=0.0)
    nothing = tuple(part[:0] for part in as_reference(held))
    trusted = [nothing, as_reference(held)]
    right = comt([as_reference(one) for one in data], trusted, teachers.problem("binary_crossentropy"), told)
    assert np.abs(right.theta).max() > 0.1
    assert_allclose(parameters.reshape(6, 3), right.theta, rtol=1e-4, atol=1e-5)
    assert {one["label"] for one in json.loads(children[0].found["report.json"])["instances"]} == {"0", "1", "2"}


def test_a_child_that_is_asked_again_or_started_anew_sends_the_same_bits(fleet: Fleet) -> None:
    data, first, _ = data_of("mean_squared_error")
    children, engine = fleet("mean_squared_error", data, {0: first})
    parameters = np.zeros(teachers.FEATURES + 1, np.float32)
    for _ in range(3):
        parameters = exchange(children, engine, parameters).parameters
    work, vectors = asked_by(engine)
    assert work == "teach-correct"
    plan = asked_for(work)
    before = children[0].kept
    once = children[0].ask(plan, parameters, vectors)
    again = children[0].ask(plan, parameters, vectors)
    assert (once.update, once.withheld) == (again.update, again.withheld)
    assert before != once.withheld


def test_other_data_than_the_kept_state_is_of_begin_anew(fleet: Fleet) -> None:
    data, first, _ = data_of("mean_squared_error")
    (one, other, _), engine = fleet("mean_squared_error", data, {0: first})
    plan = asked_for("teach")
    start = np.zeros(teachers.FEATURES + 1, np.float32)
    one.do(plan, start, engine.vectors)
    fresh = other.ask(plan, start, engine.vectors)
    other.kept = one.kept
    assert other.ask(plan, start, engine.vectors).update == fresh.update
    other.kept = b"damaged"
    assert other.ask(plan, start, engine.vectors).update == fresh.update


def test_a_holder_that_missed_a_round_counts_with_the_model_that_it_is_told(fleet: Fleet) -> None:
    """A correction depends on the parameters that come with it, not on those of the last `teach`."""
    data, first, _ = data_of("mean_squared_error")
    (one, *_), engine = fleet("mean_squared_error", data, {0: first})
    theta = np.full(teachers.FEATURES + 1, 0.5, np.float32)
    plain = one.do(asked_for("teach-correct"), theta, ())
    one.kept = b""
    one.do(asked_for("teach"), np.zeros_like(theta), engine.vectors)
    assert_allclose(one.do(asked_for("teach-correct"), theta, ()), plain, atol=1e-6)


def test_the_owner_is_told_which_labels_are_wrong(fleet: Fleet) -> None:
    """30 % of the labels of every device are flipped; those are named before the others."""
    data = [teachers.classes(seed, 40, 0.3) for seed in (1, 2, 3)]
    children, engine = fleet("binary_crossentropy", data, {0: teachers.classes(8, 30)})
    parameters = np.zeros(teachers.FEATURES + 1, np.float32)
    for _ in range(13):
        parameters = exchange(children, engine, parameters).parameters
    for child in children:
        told = json.loads(child.found["report.json"])
        rows = [one["row"] for one in told["instances"]]
        assert sorted(rows) == list(range(40))
        flipped = [place for place, row in enumerate(rows) if row < 12]
        assert np.mean(flipped) < 10  # of 12 first places 5.5; by chance 19.5
        assert told["instances"][0]["label"] != told["instances"][0]["expected"].split()[0]
        page = child.found["report.html"].decode()
        assert "the model expects something else" in page
        assert "http" not in page
        assert "<script" not in page


def test_a_share_that_is_too_long_is_refused_by_name(fleet: Fleet) -> None:
    data, first, _ = data_of("mean_squared_error")
    children, engine = fleet("mean_squared_error", data, {0: first}, longest_share=3.0)
    start = np.zeros(teachers.FEATURES + 1, np.float32)
    result = exchange(children, engine, start, {"1": lambda update: np.full_like(update, 1e4)})
    (refused,) = [verdict for verdict in result.verdicts if verdict.status == REJECTED]
    assert refused.device_id == "1"
    assert "share has norm 2.65e+04, beyond 120 for 20 examples" in refused.reason
    exchange(children, engine, start)
    assert np.abs(engine.vectors[1]).max() < 200


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_a_median_of_shares_bears_what_a_sum_does_not(rule: str, fleet: Fleet) -> None:
    data, first, _ = data_of("mean_squared_error")
    judge = make_rule(rule, 1) if rule == "median" else make_rule(rule)
    children, engine = fleet("mean_squared_error", data, {0: first}, rule=judge)
    start = np.zeros(teachers.FEATURES + 1, np.float32)
    exchange(children, engine, start, {"1": lambda update: np.full_like(update, 1e4)})
    exchange(children, engine, start)
    assert (np.abs(engine.vectors[1]).max() < 100) == (rule == "median")


def test_a_teacher_without_use_for_its_data_may_send_zeros(fleet: Fleet) -> None:
    """Two such shares are equal in every bit, and neither is refused."""
    data, first, _ = data_of("mean_squared_error")
    children, engine = fleet("mean_squared_error", data, {0: first})
    start = np.zeros(teachers.FEATURES + 1, np.float32)
    nothing = dict.fromkeys("12", np.zeros_like)
    result = exchange(children, engine, start, nothing)
    assert [verdict.status for verdict in result.verdicts] == ["accepted"] * 3


@pytest.mark.parametrize("done", [1, 2, 3])
def test_an_engine_goes_on_from_its_saved_state_to_the_same_bits(done: int, fleet: Fleet) -> None:
    data, first, _ = data_of("mean_squared_error")
    _, engine = fleet("mean_squared_error", data, {0: first})
    rows = [np.random.default_rng(seed).normal(size=(3, 7)).astype(np.float32) for seed in range(4)]
    parameters, states = np.zeros(7, np.float32), []
    for values in rows:
        states.append((parameters, engine.saved_state()))
        parameters = engine.aggregate(parameters, of_three(values)).parameters
    end = engine.saved_state()
    before, state = states[done]
    assert engine.load_state(state)
    for values in rows[done:]:
        before = engine.aggregate(before, of_three(values)).parameters
    assert before.tobytes() == parameters.tobytes()
    assert engine.saved_state() == end


def of_three(rows: Any) -> Any:
    arrivals = arrivals_of("abc", TrainingPlan(1, 0.1, work="teach"), rows.shape[1])
    for name, row in zip("abc", rows):
        arrivals.add(name, row, 5)
    return arrivals.screened("abc")


BAD = {
    "without constants": ({"work": "teach"}, "without its constants"),
    "with steps": ({"work": "teach", "steps": 3, "teaching": teachers.plan_of(3)}, "3 steps of teach"),
    "trusted by nobody": ({"work": "teach-correct", "teaching": teachers.plan_of(3)}, "no trusted instances"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_a_device_cannot_do_is_a_failure_that_says_why(what: str, fleet: Fleet) -> None:
    changes, expected = BAD[what]
    data, first, _ = data_of("mean_squared_error")
    (_, other, _), engine = fleet("mean_squared_error", data, {0: first})
    plan = msgspec.structs.replace(TrainingPlan(1, 0.1), **changes)
    vectors = engine.vectors if plan.work == "teach" else ()
    answer = other.ask(plan, np.zeros(teachers.FEATURES + 1, np.float32), vectors)
    assert isinstance(answer, Problem)
    assert expected in answer.what
