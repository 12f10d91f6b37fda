"""CoMT as one more algorithm of an experiment: what `covey simulate` trains a cell with, as `simulation.process` does.

Every device teaches, the coordinator holds the trusted data. The model is linear or logistic, one class against the
rest, on what the last Dense layer of the experiment's model sees (`representing`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np

from covey_coordinator.aggregation.states import pack_state, unpack_state
from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.simulation.process import RoundOutcome
from covey_coordinator.simulation.remote import RemoteWorkers
from covey_coordinator.simulation.world import World, model_of
from covey_coordinator.teaching.process import State, TeachingProcess
from covey_coordinator.teaching.representing import representer
from covey_coordinator.teaching.tuning import balanced
from covey_models.user_code import UserCode
from covey_protocol.errors import StorageError, UsageError
from covey_protocol.features import one_vs_rest
from covey_protocol.teaching import RIDGE, Problem
from covey_protocol.works import LEARNERS

Array = np.ndarray[Any, Any]
LEAST_CHANCE = 1e-12


class TaughtWorld:
    """A `running.Learner`. Use it in a with block; the worker is left running."""

    def __init__(self, world: World, worker: Worker | RemoteWorkers) -> None:
        told, trusted = world.settings.teaching, world.trusted
        assert told is not None  # settings.check_settings
        assert trusted is not None
        held, loss = (trusted.x, trusted.y), world.settings.model.loss
        self._problem = Problem(LEARNERS[loss])
        self._seen = representer(told, model_of(world, UserCode()), loss, held, world.cell.seed)
        self._classes, self._worker = world.train.num_classes, worker
        self._names = [device.device_id for device in world.devices]
        self._devices = [self._instances(device.x, device.y) for device in world.devices]
        nothing = [(x[:0], y[:0]) for x, y in self._devices]
        teaching = [*nothing, self._instances(*held)]  # the coordinator is a holder without other instances
        settings = told.settings(world.settings.rounds)
        from_data = balanced(self._problem, self._devices, teaching, settings)
        rho, curvature = told.rho or from_data.rho, told.curvature or from_data.curvature
        self._settings = dataclasses.replace(settings, rho=rho, curvature=curvature)
        self._process = TeachingProcess(self._devices, teaching, self._problem, self._settings, worker)
        self._tests: tuple[Array, tuple[Array, Array]] | None = None

    def __enter__(self) -> TaughtWorld:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.close()

    def initial_state(self) -> State:
        return self._process.initial_state()

    def next(self, state: State, cohort: Sequence[int], shuffle_seed: int | None = None) -> tuple[State, RoundOutcome]:
        """One round. cohort: all devices. Nothing is drawn, so that the seed does not matter."""
        if list(cohort) != list(range(len(self._devices))):
            raise UsageError(f"a round of teaching by {len(cohort)} of {len(self._devices)} devices", "name all")
        after, residuals = self._process.next(state)
        measured = {f"{name}_residual": getattr(residuals, name) for name in ("primal", "dual", "trusted")}
        return after, RoundOutcome(float("nan"), {}, {}, measured, self._worker.take_notes())

    def evaluate(self, state: State, x: Array, y: Array) -> dict[str, float]:
        """ "loss" and "accuracy" of the model. loss: logistic, of the classes' chances made to add up to 1; ridge, mean
        squared error of the columns."""
        if self._tests is None or self._tests[0] is not x:
            self._tests = (x, self._instances(x, y))
        return self._measured(state, *self._tests[1])

    def evaluate_devices(self, state: State, numbers: Sequence[int]) -> dict[str, dict[str, float]]:
        """The same on each of these devices' own data, with "num_examples"."""
        return {
            self._names[number]: {
                **self._measured(state, *self._devices[number]),
                "num_examples": float(len(self._devices[number][0])),
            }
            for number in numbers
        }

    def saved(self, state: State) -> bytes:
        return pack_state(self._description, [], state)

    def loaded(self, data: bytes) -> State:
        """Raises StorageError for a state of other settings or data."""
        unpacked = unpack_state(data, self._description, self.initial_state())
        if unpacked is None:
            raise StorageError("a saved state belongs to other settings", "start the run anew")
        return unpacked[1]  # type: ignore[no-any-return]

    @property
    def _description(self) -> str:
        return f"comt, {self._problem!r}, {self._settings!r}, {len(self._devices)} devices"

    def _instances(self, x: Array, y: Array) -> tuple[Array, Array]:
        return self._seen(x), one_vs_rest(y, self._classes)

    def _measured(self, state: State, x: Array, y: Array) -> dict[str, float]:
        outputs = x @ state.standing.theta
        accuracy = float(np.mean(outputs.argmax(axis=1) == y.argmax(axis=1)))
        if self._problem.kind == RIDGE:
            return {"loss": float(np.mean((outputs - y) ** 2)), "accuracy": accuracy}
        chances = np.exp(-np.logaddexp(0.0, -outputs))
        own = chances[y > 0] / np.maximum(chances.sum(axis=1), LEAST_CHANCE)
        return {"loss": float(-np.mean(np.log(np.maximum(own, LEAST_CHANCE)))), "accuracy": accuracy}
