"""One cell from its first round to its result, taken up where a crash left it.

A round is durable in the cell's folder before the next one starts; the learning process's state every `save_every`
rounds. A cell that is taken up repeats the rounds after its newest state, bit for bit. A round that the rule refuses,
or that would make a model that is not finite, leaves the model as it was, as in live rounds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

from covey_coordinator.attacks.data import ScalingBackdoor
from covey_coordinator.coordinator import shuffle_seed
from covey_coordinator.records import Array
from covey_coordinator.simulation.folder import CellFolder, SavedState
from covey_coordinator.simulation.results import RoundRecord, RunResult
from covey_coordinator.simulation.world import World
from covey_models.corruption import Setting, triggered
from covey_models.corruption.trigger import Trigger
from covey_models.population import place
from covey_protocol.errors import RuleError

EVALUATED_TOGETHER = 500  # devices
MOST_REFUSED_NOTES = 3  # so many refused rounds are told with their reasons; all are counted


class Learner(Protocol):
    """What a cell trains with: `process.Simulation`, or another way to make rounds."""

    def initial_state(self) -> Any: ...
    def next(self, state: Any, cohort: list[int], shuffle_seed: int | None = None) -> tuple[Any, Any]: ...
    def evaluate(self, state: Any, x: Array, y: Array) -> dict[str, float]: ...
    def evaluate_devices(self, state: Any, numbers: list[int]) -> dict[str, dict[str, float]]: ...
    def saved(self, state: Any) -> bytes: ...
    def loaded(self, data: bytes) -> Any: ...


class Board(Protocol):
    """Where records are shown beside the folder: `boards.TensorBoard`."""

    def write(self, record: RoundRecord) -> None: ...


class Progress(NamedTuple):
    """Said after every round. number, of: rounds. record: of this one. notes: what happened to workers in it."""

    number: int
    of: int
    record: RoundRecord
    notes: tuple[str, ...] = ()


Tell = Callable[[Progress], None]
Check = Callable[[], None]


def run_cell(
    world: World,
    place: CellFolder,
    learner: Callable[[], AbstractContextManager[Learner]],
    board: AbstractContextManager[Board],
    tell: Tell = lambda progress: None,
    check: Check = lambda: None,
) -> RunResult:
    """Train the cell, or what is left of it, and write its result.

    learner: makes what trains; called once. check: called between rounds; may raise to end the run.
    """
    with learner() as made, board as shown:
        run = _Run(world, place, made, shown, tell)
        run.take_up()
        while run.done < world.settings.rounds:
            check()
            run.round()
        result = run.result()
    place.finish(result)
    return result


class _Run:
    def __init__(self, world: World, place: CellFolder, learner: Learner, board: Board, tell: Tell) -> None:
        self._world, self._place, self._learner, self._board, self._tell = world, place, learner, board, tell
        self._healthy = [number for number, device in enumerate(world.devices) if not device.faults]
        self._records: list[RoundRecord] = []
        self._notes: tuple[str, ...] = ()
        self._state: Any = None
        self._backdoor = _triggered(world)

    @property
    def done(self) -> int:
        """Rounds that lie behind."""
        return len(self._records) - 1

    def take_up(self) -> None:
        """After the newest state, else before the first round."""
        saved, self._records = self._place.taken_up()
        for record in self._records:
            self._board.write(record)
        if saved is not None:
            self._state, self._notes = self._learner.loaded(saved.state), saved.notes
            return
        started = time.monotonic()
        self._state = self._learner.initial_state()
        self._keep(RoundRecord(0, **self._evaluations(), seconds=_since(started)))

    def round(self) -> None:
        number, started = self.done + 1, time.monotonic()
        cohort = self._world.cohort(number)
        try:
            self._state, outcome = self._learner.next(self._state, cohort, self._shuffle_seed(number))
        except RuleError as error:
            notes: tuple[str, ...] = ()
            told: dict[str, Any] = {"measurements": {"refused": 1.0}}
            self._refused(number, error)
        else:
            notes = tuple(f"round {number}: {note}" for note in outcome.notes)
            self._notes = (*self._notes, *notes)
            told = {
                "loss": outcome.loss if math.isfinite(outcome.loss) else None,
                "verdicts": outcome.verdicts,
                "measurements": finite({**outcome.measurements, **_spread(outcome.losses)}),
            }
        evaluations = self._evaluations() if self._is_evaluated(number) else {}
        self._keep(RoundRecord(number, **told, **evaluations, seconds=_since(started)), notes)
        if number % self._world.settings.save_every == 0 and number < self._world.settings.rounds:
            self._place.save(SavedState(number, self._learner.saved(self._state), self._notes))

    def result(self) -> RunResult:
        world = self._world
        devices = self._on_devices(list(range(len(world.devices))))
        return RunResult(
            key=world.cell.key,
            seed=world.cell.seed,
            varied=world.cell.varied,
            rounds=self._records,
            faults=world.faults,
            counts=world.counts,
            devices={name: finite(told) for name, told in devices.items()},
            notes=self._all_notes(),
            seconds=round(sum(record.seconds for record in self._records), 3),
        )

    def _shuffle_seed(self, number: int) -> int:
        return shuffle_seed(self._world.cell.seed, number)

    def _keep(self, record: RoundRecord, notes: tuple[str, ...] = ()) -> None:
        self._place.append(record)
        self._records.append(record)
        self._board.write(record)
        self._tell(Progress(record.number, self._world.settings.rounds, record, notes))

    def _refused(self, number: int, error: RuleError) -> None:
        if sum("refused" in record.measurements for record in self._records) < MOST_REFUSED_NOTES:
            self._notes = (*self._notes, f"round {number} was refused: {error}")

    def _all_notes(self) -> tuple[str, ...]:
        refused = sum("refused" in record.measurements for record in self._records)
        told = (f"{refused} of {self.done} rounds were refused; the model stood still in these",) if refused else ()
        return (*told, *self._notes)

    # --- evaluations

    def _is_evaluated(self, number: int) -> bool:
        settings = self._world.settings
        return number % settings.evaluate_every == 0 or number == settings.rounds

    def _evaluations(self) -> dict[str, Any]:
        test = self._world.test
        central = self._learner.evaluate(self._state, test.x, test.y)
        if self._backdoor is not None:
            central["backdoor_success"] = self._learner.evaluate(self._state, *self._backdoor)["accuracy"]
        found = {"evaluation": finite(central)}
        if self._world.settings.evaluate_devices and self._healthy:
            told = self._on_devices(self._healthy)
            accuracies = np.array([one["accuracy"] for one in told.values()])
            found["device_evaluation"] = {
                "accuracy_mean": float(accuracies.mean()),
                "accuracy_median": float(np.median(accuracies)),
                "accuracy_worst": float(accuracies.min()),
            }
        return found

    def _on_devices(self, numbers: list[int]) -> dict[str, dict[str, float]]:
        """Some at a time, so that memory stays bounded with many devices."""
        found: dict[str, dict[str, float]] = {}
        for start in range(0, len(numbers), EVALUATED_TOGETHER):
            found.update(self._learner.evaluate_devices(self._state, numbers[start : start + EVALUATED_TOGETHER]))
        return found


def _triggered(world: World) -> tuple[Array, Array] | None:
    """Test examples of other classes with the backdoor's trigger, and the attacker's class; None without a backdoor.

    Of the attack, else of the first corruption that puts a trigger in.
    """
    attack, test = world.attack, world.test
    if isinstance(attack, ScalingBackdoor):
        target, patch = attack.target, attack.patch
    else:
        triggers = [place(table).corruption for table in world.settings.corruption]
        found = next((one for one in triggers if isinstance(one, Trigger)), None)
        if found is None:
            return None
        target, patch = Setting.of(test).class_number(found.target), found.patch
    others = test.x[test.y != target]
    return triggered(others, patch, test.input_range), np.full(len(others), target, test.y.dtype)


def _spread(losses: Mapping[str, float]) -> dict[str, float]:
    """How far the devices' training losses lie apart."""
    values = np.array([value for value in losses.values() if math.isfinite(value)])
    if not len(values):
        return {}
    return {
        "device_loss_median": float(np.median(values)),
        "device_loss_worst": float(values.max()),
        "device_loss_std": float(values.std()),
    }


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """JSON knows no NaN and no infinity: a number that is none is left out."""
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def _since(started: float) -> float:
    return round(time.monotonic() - started, 4)
