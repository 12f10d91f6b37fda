"""Cells trained in earnest: what is recorded, what is refused, and that an interrupted one ends with the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import covey_coordinator as cc
from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.simulation.boards import tensor_board
from covey_coordinator.simulation.folder import CellFolder
from covey_coordinator.simulation.process import Simulation
from covey_coordinator.simulation.results import RoundRecord, RunResult
from covey_coordinator.simulation.running import Progress, run_cell
from covey_coordinator.simulation.sweep import Cell, cells_of
from covey_coordinator.simulation.world import World, learning_of, world_of
from covey_protocol.errors import RunError

SMALL: dict[str, Any] = {
    "name": "small",
    "rounds": 5,
    "devices": 8,
    "sample": 6,
    "save_every": 2,
    "model": {"name": "softmax"},
    "training": {"learning_rate": 0.3},
    "aggregation": {"rule": "median"},
    "attack": {"attack": "sign-flip", "fraction": 0.25},
    "server": {"optimizer": "adam", "learning_rate": 0.02},
}
NONE = {"attack": "none"}


def cell(**more: Any) -> Cell:
    (one,) = cells_of({**SMALL, **more})
    return one


class Interrupted(Exception):
    """Stands for whatever ends a process."""


class Runner:
    """Runs cells on one worker, those with the same settings in one simulation. parameters: of the last run's model."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        self._worker, self._folder = worker, folder
        self._made: dict[bytes, Simulation] = {}
        self.parameters: Any = None

    def __call__(self, one: Cell, name: str, tell: Callable[[Progress], None] = lambda progress: None) -> RunResult:
        world = world_of(one)
        board = tensor_board(self._folder / f"board-{name}", one)
        return run_cell(world, self.place(name), lambda: nullcontext(self._simulation(world)), board, tell)

    def place(self, name: str) -> CellFolder:
        return CellFolder(self._folder / name)

    def board(self, name: str) -> Path:
        return self._folder / f"board-{name}"

    def close(self) -> None:
        for made in self._made.values():
            made.close()

    def _simulation(self, world: World) -> Simulation:
        runner, key = self, msgspec.json.encode(world.settings)

        class Kept(Simulation):
            """Keeps the last model."""

            def next(self, *arguments: Any) -> Any:
                state, outcome = super().next(*arguments)
                runner.parameters = self.parameters(state)
                return state, outcome

        if key not in self._made:
            self._made[key] = Kept(learning_of(world), world.devices, worker=self._worker)
        return self._made[key]


@pytest.fixture(scope="module")
def runner(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    made = Runner(worker, tmp_path_factory.mktemp("cells"))
    yield made
    made.close()


def timeless(result: RunResult) -> RunResult:
    rounds = [msgspec.structs.replace(record, seconds=0.0) for record in result.rounds]
    return msgspec.structs.replace(result, rounds=rounds, seconds=0.0)


@pytest.fixture(scope="module")
def whole(runner: Runner) -> tuple[RunResult, Any]:
    """A run without interruption, and its model."""
    return runner(cell(evaluate_devices=True), "whole"), runner.parameters


def test_a_run_records_every_round_from_before_the_first(whole: tuple[RunResult, Any]) -> None:
    result = whole[0]
    assert [record.number for record in result.rounds] == [0, 1, 2, 3, 4, 5]
    first, last = result.rounds[0], result.rounds[-1]
    assert first.loss is None
    assert first.verdicts == {}
    assert first.evaluation["accuracy"] < 0.3 < last.evaluation["accuracy"]
    assert last.loss is not None
    assert all(len(record.verdicts) == 6 for record in result.rounds[1:])
    assert last.device_evaluation["accuracy_worst"] <= last.device_evaluation["accuracy_median"]
    assert last.measurements["device_loss_worst"] >= last.measurements["device_loss_median"]
    assert sorted(result.devices) == sorted(result.faults) == sorted(result.counts)
    assert list(result.faults.values()).count(("sign-flip",)) == 2
    assert {told["num_examples"] for told in result.devices.values()} <= {float(sum(c)) for c in result.counts.values()}


def test_devices_own_accuracies_are_of_the_healthy_ones(whole: tuple[RunResult, Any]) -> None:
    result = whole[0]
    healthy = [told["accuracy"] for name, told in result.devices.items() if not result.faults[name]]
    assert result.rounds[-1].device_evaluation["accuracy_mean"] == pytest.approx(np.mean(healthy), abs=1e-9)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_a_run_that_is_interrupted_in_any_round_ends_the_same(
    number: int, runner: Runner, whole: tuple[RunResult, Any]
) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.number == number:
            raise Interrupted

    name = f"interrupted-{number}"
    with pytest.raises(Interrupted):
        runner(cell(evaluate_devices=True), name, interrupt)
    told: list[int] = []
    result = runner(cell(evaluate_devices=True), name, lambda progress: told.append(progress.number))
    assert told[0] == {1: 0, 2: 0, 3: 3, 4: 3, 5: 5}[number]  # a state is saved after rounds 2 and 4 were told
    assert timeless(result) == timeless(whole[0])
    np.testing.assert_array_equal(runner.parameters, whole[1])


def events(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars of a folder's event files: name -> step -> value; a step that is there twice is an error."""
    from tensorflow.core.util import event_pb2
    from tensorflow.python.framework import tensor_util
    from tensorflow.python.lib.io.tf_record import tf_record_iterator

    found: dict[str, dict[int, float]] = {}
    for path in folder.glob("events.out.tfevents.*"):
        for data in tf_record_iterator(str(path)):
            event = event_pb2.Event.FromString(data)
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    steps = found.setdefault(value.tag, {})
                    assert event.step not in steps
                    steps[event.step] = float(tensor_util.MakeNdarray(value.tensor))
    return found


def hparams(folder: Path) -> dict[str, Any]:
    from tensorboard.plugins.hparams import plugin_data_pb2
    from tensorflow.core.util import event_pb2
    from tensorflow.python.lib.io.tf_record import tf_record_iterator

    found = {}
    for path in folder.glob("events.out.tfevents.*"):
        for data in tf_record_iterator(str(path)):
            for value in event_pb2.Event.FromString(data).summary.value:
                if value.metadata.plugin_data.plugin_name == "hparams":
                    told = plugin_data_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
                    for key, held in told.session_start_info.hparams.items():
                        found[key] = getattr(held, str(held.WhichOneof("kind")))
    return found


@pytest.mark.parametrize("name", ["whole", "interrupted-3"])
def test_tensorboard_shows_every_round_once_also_of_an_interrupted_run(
    name: str, runner: Runner, whole: tuple[RunResult, Any]
) -> None:
    if not runner.board(name).exists():
        pytest.skip("the run that is looked at was not asked for")
    shown, rounds = events(runner.board(name)), whole[0].rounds
    for tag, values in (
        ("evaluation/accuracy", {record.number: record.evaluation["accuracy"] for record in rounds}),
        ("devices/accuracy_worst", {record.number: record.device_evaluation["accuracy_worst"] for record in rounds}),
        ("loss/train", {record.number: record.loss for record in rounds[1:]}),
        ("rule/device_loss_std", {record.number: record.measurements["device_loss_std"] for record in rounds[1:]}),
    ):
        assert shown[tag] == pytest.approx(values, rel=1e-6), tag
    assert hparams(runner.board(name)) == {"seed": 0.0}


def test_varied_keys_are_tensorboards_hyperparameters(tmp_path: Path) -> None:
    attacks = [{"attack": "alie", "fraction": 0.25}]
    (one,) = cells_of({**SMALL, "sweep": {"aggregation.rule": ["median"], "attack": attacks, "training.epochs": [2]}})
    with tensor_board(tmp_path / "b", one) as board:
        board.write(RoundRecord(3, 0.5, {"accuracy": 0.25}))
    assert hparams(tmp_path / "b") == {
        "aggregation.rule": "median",
        "attack": "alie fraction=0.25",
        "training.epochs": 2.0,
        "seed": 0.0,
    }
    assert events(tmp_path / "b")["evaluation/accuracy"] == {3: 0.25}


def test_refused_rounds_leave_the_model_as_it_was_and_are_counted(runner: Runner) -> None:
    """With this much pull back to the received model every device's parameters overflow, and no update is usable."""
    wild = {"learning_rate": 1000.0, "proximal_weight": 1000.0, "epochs": 5}
    result = runner(cell(rounds=2, training=wild), "refused")
    assert [record.measurements for record in result.rounds[1:]] == [{"refused": 1.0}] * 2
    assert len({record.evaluation["loss"] for record in result.rounds}) == 1
    assert result.notes[0] == "2 of 2 rounds were refused; the model stood still in these"
    assert "usable updates" in result.notes[1]


@pytest.mark.slow
def test_a_backdoors_success_is_measured_beside_the_accuracy(runner: Runner) -> None:
    attack = {"attack": "scaling-backdoor", "fraction": 0.25}
    result = runner(cell(rounds=3, attack=attack, aggregation={"rule": "mean"}, server={}), "backdoor")
    assert result.rounds[-1].evaluation["backdoor_success"] > 0.9
    assert result.rounds[0].evaluation["backdoor_success"] < 0.5


@pytest.mark.slow
def test_the_success_of_a_trigger_in_the_data_is_measured_too(runner: Runner) -> None:
    corruption = [{"kind": "trigger", "target": 3, "fraction": 1.0}]
    result = runner(cell(rounds=1, corruption=corruption, attack=NONE, aggregation={"rule": "mean"}), "trigger")
    assert set(result.rounds[1].evaluation) == {"loss", "accuracy", "backdoor_success"}


# ---- the library's way in


def test_an_experiment_from_python_gives_results_and_is_not_run_twice(tmp_path: Path) -> None:
    corruption = [{"kind": "shift-labels", "fraction": 0.5}]
    sweep = {"aggregation.rule": ["median", "krum"]}
    table = {**SMALL, "rounds": 1, "attack": NONE, "corruption": corruption, "sweep": sweep}
    results = cc.simulate(table, out=tmp_path / "e", quiet=True, seeds=[3])
    told = [(one.seed, one.varied["aggregation.rule"], len(one.rounds), len(one.faults)) for one in results]
    assert told == [(3, "median", 2, 8), (3, "krum", 0, 0)]
    assert "krum needs n > 2f + 2" in results[1].notes[0]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "e" / "cells").rglob("result.json")}
    assert cc.simulate(table, out=tmp_path / "e", quiet=True, seeds=[3]) == results
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "e" / "cells").rglob("result.json")}


def test_a_run_that_fails_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(
        "import tensorflow as tf\n"
        "def good():\n"
        "    return tf.keras.Sequential([tf.keras.layers.InputLayer((8, 8, 1)), tf.keras.layers.Flatten(),"
        " tf.keras.layers.Dense(10)])\n"
        "def bad():\n"
        "    raise ValueError('no such layer')\n"
    )
    names = [str(tmp_path / "models.py:bad"), str(tmp_path / "models.py:good")]
    table = {**SMALL, "rounds": 1, "model": {}, "sweep": {"model.name": names}}
    with pytest.raises(RunError, match=r"1 runs failed.*no such layer"):
        cc.simulate(table, out=tmp_path / "e", quiet=True)
    (bad, good) = sorted((tmp_path / "e" / "cells").iterdir())
    assert "no such layer" in (bad / "error.json").read_text()
    assert not (bad / "result.json").exists()
    assert (good / "result.json").exists()
