"""Whether a fleet did what a simulation does: the same rounds again in TFF, and how far the models lie apart.

Both train the same steps on the same batches, a fleet in a TFLite runtime and a simulation in TensorFlow, so from equal
parameters they agree to rounding (`results.ONE_ROUND`). Over many rounds rounding grows, and faster where a ReLU's kink
or a rule's choice lies between two numbers that differ by it; that is measured beside it (docs/simulation-report.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np

from covey_coordinator.simulation.learning import Array
from covey_coordinator.simulation.process import RoundOutcome, Simulation
from covey_coordinator.simulation.results import Judged, RoundAgreement
from covey_protocol.errors import RuleError
from covey_protocol.parameters import ParameterSpec, offsets


class Step(NamedTuple):
    """One round that a fleet made. before, after: the global model, (d,) float32."""

    cohort: tuple[int, ...]
    shuffle_seed: int | None
    before: Array
    after: Array
    outcome: RoundOutcome


class Learner(Protocol):
    """As `process.Simulation`."""

    def initial_state(self) -> Any: ...
    def next(self, state: Any, cohort: Sequence[int], shuffle_seed: int | None = None) -> tuple[Any, RoundOutcome]: ...
    def parameters(self, state: Any) -> Array: ...
    def evaluate(self, state: Any, x: Array, y: Array) -> dict[str, float]: ...
    def evaluate_devices(self, state: Any, numbers: Sequence[int]) -> dict[str, dict[str, float]]: ...
    def saved(self, state: Any) -> bytes: ...
    def loaded(self, data: bytes) -> Any: ...
    def close(self) -> None: ...


class Recorded:
    """A learner, and the rounds it makes. steps: those that were not refused, in order."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self.steps: list[Step] = []

    def __enter__(self) -> Recorded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._learner.close()

    def next(self, state: Any, cohort: Sequence[int], shuffle_seed: int | None = None) -> tuple[Any, RoundOutcome]:
        before = self._learner.parameters(state)
        state, outcome = self._learner.next(state, cohort, shuffle_seed)
        self.steps.append(Step(tuple(cohort), shuffle_seed, before, self._learner.parameters(state), outcome))
        return state, outcome

    def __getattr__(self, name: str) -> Any:
        """The rest of a learner."""
        return getattr(self._learner, name)


def agreement(steps: Sequence[Step], simulation: Simulation, x: Array, y: Array) -> list[RoundAgreement]:
    """The fleet's rounds again in the simulation. x, y: central test data."""
    alone = together = simulation.initial_state()
    found = []
    for number, step in enumerate(steps, 1):
        alone, outcome = simulation.next(
            with_parameters(simulation, alone, step.before), step.cohort, step.shuffle_seed
        )
        together = _next(simulation, together, step)
        length = float(np.linalg.norm(step.after - step.before)) or 1.0
        distances = [np.linalg.norm(simulation.parameters(one) - step.after) / length for one in (alone, together)]
        of_fleet = simulation.evaluate(with_parameters(simulation, alone, step.after), x, y)
        found.append(
            RoundAgreement(
                number,
                float(distances[0]),
                float(distances[1]),
                of_fleet["accuracy"],
                simulation.evaluate(together, x, y)["accuracy"],
                _accepted(outcome.verdicts) == _accepted(step.outcome.verdicts),
            )
        )
    return found


def _next(simulation: Simulation, state: Any, step: Step) -> Any:
    """A round that only the simulation's rule refuses leaves its model as it was."""
    try:
        return simulation.next(state, step.cohort, step.shuffle_seed)[0]
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
