"""A fleet and a simulation side by side: the same rounds by real agents and in TFF, and how far the models lie apart.

Both train the same steps on the same batches, a fleet in a TFLite runtime and a simulation in TensorFlow, so from equal
parameters they agree to rounding (`results.ONE_ROUND`), but where a ReLU's kink lies within it (`results.ONE_KINK`).
Over many rounds rounding grows; that is measured beside it (docs/simulation-report.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import msgspec
import numpy as np

from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.simulation.as_fleet import FleetLearner, FleetState
from covey_coordinator.simulation.learning import Array, DeviceData, Learning, Privacy
from covey_coordinator.simulation.process import RoundOutcome, Simulation
from covey_coordinator.simulation.report.agreement import sentence, write_agreement
from covey_coordinator.simulation.results import ONE_ROUND, Judged, RoundAgreement
from covey_protocol.errors import RuleError
from covey_protocol.parameters import ParameterSpec, offsets

Say = Callable[[str], None]
Check = Callable[[], None]
RESOLUTION = 2.0**-23  # of a float32, relative


def fleet_of(
    learning: Learning,
    devices: Sequence[DeviceData],
    folder: Path,
    test: tuple[Array, Array],
    *,
    title: str,
    worker: Worker | None,
    say: Say,
    check: Check,
) -> FleetLearner | ComparedFleet:
    """The fleet of an experiment. Noise that devices draw cannot be drawn again, so with it nothing is compared."""
    if isinstance(learning.privacy, Privacy) and learning.privacy.noise_multiplier:
        return FleetLearner(learning, devices, folder, check=check)
    return ComparedFleet(learning, devices, folder, test, title=title, worker=worker, say=say, check=check)


class BothStates(NamedTuple):
    """fleet: what counts. together: of the simulation that starts every round at the fleet's model. alone: of the one
    that goes its own way."""

    fleet: FleetState
    together: Any
    alone: Any


class _Saved(msgspec.Struct, frozen=True):
    fleet: bytes
    together: bytes
    alone: bytes
    found: list[RoundAgreement]


class ComparedFleet:
    """A `FleetLearner` whose every round the simulation makes, too: `found`, and FOLDER/agreement.html at the end.

    Use it in a with block. test: central x and y. title: of the page. worker: for the simulation, as there. say: told
    the outcome in a sentence. Where devices add noise to their updates, the two differ by it.
    """

    def __init__(
        self,
        learning: Learning,
        devices: Sequence[DeviceData],
        folder: Path,
        test: tuple[Array, Array],
        *,
        title: str = "",
        url: str | None = None,
        worker: Worker | None = None,
        say: Say = lambda told: None,
        check: Check = lambda: None,
    ) -> None:
        self.found: list[RoundAgreement] = []
        self._folder, self._test, self._title, self._say = folder, test, title or folder.name, say
        self._fleet = FleetLearner(learning, devices, folder, url=url, check=check)
        try:
            self._simulation = Simulation(learning, devices, worker=worker)
        except BaseException:
            self._fleet.close()
            raise

    def __enter__(self) -> ComparedFleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._say(f"{sentence(self.found)} {write_agreement(self._folder, self._title, self.found)}")
        finally:
            self.close()

    def close(self) -> None:
        try:
            self._fleet.close()
        finally:
            self._simulation.close()

    def initial_state(self) -> BothStates:
        fleet = self._fleet.initial_state()
        first = with_parameters(self._simulation, self._simulation.initial_state(), fleet.vector)
        return BothStates(fleet, first, first)

    def next(
        self, state: BothStates, cohort: Sequence[int], shuffle_seed: int | None = None
    ) -> tuple[BothStates, RoundOutcome]:
        """The fleet's outcome. Raises as `FleetLearner.next`; a round that it refuses is not compared."""
        simulation, before = self._simulation, state.fleet.vector
        fleet, outcome = self._fleet.next(state.fleet, cohort, shuffle_seed)
        same_start = with_parameters(simulation, state.together, before)
        together, simulated = simulation.next(same_start, cohort, shuffle_seed)
        alone = _next(simulation, state.alone, cohort, shuffle_seed)
        after = fleet.vector
        length = measure(before, after)
        x, y = self._test
        self.found.append(
            RoundAgreement(
                number=len(self.found) + 1,
                one_round=float(np.linalg.norm(simulation.parameters(together) - after)) / length,
                all_rounds=float(np.linalg.norm(simulation.parameters(alone) - after)) / length,
                fleet=self._fleet.evaluate(fleet, x, y)["accuracy"],
                simulation=simulation.evaluate(alone, x, y)["accuracy"],
                same_verdicts=_accepted(outcome.verdicts) == _accepted(simulated.verdicts),
            )
        )
        return BothStates(fleet, together, alone), outcome

    def parameters(self, state: BothStates) -> Array:
        return self._fleet.parameters(state.fleet)

    def evaluate(self, state: BothStates, x: Array, y: Array) -> dict[str, float]:
        return self._fleet.evaluate(state.fleet, x, y)

    def evaluate_devices(self, state: BothStates, numbers: Sequence[int]) -> dict[str, dict[str, float]]:
        return self._fleet.evaluate_devices(state.fleet, numbers)

    def saved(self, state: BothStates) -> bytes:
        together, alone = self._simulation.saved(state.together), self._simulation.saved(state.alone)
        return msgspec.msgpack.encode(_Saved(self._fleet.saved(state.fleet), together, alone, self.found))

    def loaded(self, data: bytes) -> BothStates:
        saved = msgspec.msgpack.decode(data, type=_Saved)
        self.found = saved.found
        fleet = self._fleet.loaded(saved.fleet)
        return BothStates(fleet, self._simulation.loaded(saved.together), self._simulation.loaded(saved.alone))


def measure(before: Array, after: Array) -> float:
    """What differences of one round are held against: the length of the update, but not less than can be told.

    The parameters themselves are float32: an update shorter than RESOLUTION / ONE_ROUND of them is rounded by more than
    ONE_ROUND of its own length, whoever computes it.
    """
    told = RESOLUTION / ONE_ROUND * float(np.linalg.norm(after))
    return max(float(np.linalg.norm(after - before)), told) or 1.0


def _next(simulation: Simulation, state: Any, cohort: Sequence[int], shuffle_seed: int | None) -> Any:
    """A round that only this simulation's rule refuses leaves its model as it was."""
    try:
        return simulation.next(state, cohort, shuffle_seed)[0]
    except RuleError:
        return state


def _accepted(verdicts: dict[str, Judged]) -> dict[str, bool]:
    return {device_id: judged.accepted for device_id, judged in verdicts.items()}


def with_parameters(simulation: Simulation, state: Any, parameters: Array) -> Any:
    """The simulation's state with another global model, (d,) float32 in the order of a bundle's parameters."""
    parts = _split(simulation.parameter_specs, parameters)
    weights = state.global_model_weights._replace(trainable=parts[True], non_trainable=parts[False])
    return state._replace(global_model_weights=weights)


def _split(specs: Sequence[ParameterSpec], parameters: Array) -> dict[bool, list[Array]]:
    places = offsets(specs)
    return {
        kind: [parameters[places[one.name]].reshape(one.shape) for one in specs if one.trainable is kind]
        for kind in (True, False)
    }
