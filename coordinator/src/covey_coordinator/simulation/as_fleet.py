"""The same experiment through real agents: every device a process that trains the exported bundle with a TFLite
runtime, every update sealed over MQTT, every round run by the coordinator and engine of live fleets.

`FleetLearner` stands where `process.Simulation` does. What is done by whom:

    data corruption     in the device's own file, as its agent reads it
    cohorts, batches    the same devices are invited, with the same shuffle_seed
    clipping and noise  by the agents' own policy (`Privacy`); noise is drawn from the system, so it differs
    trusted data        by a training child of the coordinator's, as in `covey serve`
    model attacks       by replacing the hostile devices' rows at the coordinator, before the rule and after screening,
                        with the simulation's own `Attacked`: the attacks know all honest updates, which no device can.
                        The hostile agents train and send like the others; what they send is not used.

Not as in a simulation: updates that are bit-equal to another's are refused (but under draco), and refused devices lower
num_byzantine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import covey_models
from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.kernels import FLOAT32_MAX
from covey_coordinator.aggregation.rules import Rule
from covey_coordinator.attacks.attacked import Attacked
from covey_coordinator.coordinator import NO_TRAINING, OwnTraining, RoundResult, Timing
from covey_coordinator.records import ACCEPTED, MISSING, DeviceVerdict
from covey_coordinator.simulation.learning import Array, DeviceData, Learning, Privacy
from covey_coordinator.simulation.local_fleet import LocalFleet
from covey_coordinator.simulation.process import RoundOutcome
from covey_coordinator.simulation.results import Judged
from covey_coordinator.trusted_training import TrustedSettings, TrustedTraining
from covey_edge.runtime import Model
from covey_protocol.bundle import Bundle, read_bundle
from covey_protocol.errors import ConfigError, RuleError, RunError
from covey_protocol.messages import TrainingPlan
from covey_protocol.round import Progress
from covey_protocol.seals import SealingKey

RUN = "as-fleet"
TIMING = Timing(duration_s=3600.0, answer_s=120.0, grace_s=30.0)  # all devices are here; a busy machine is patient
ALGORITHMS = ("fedavg",)


class FleetState(msgspec.Struct, frozen=True):
    """parameters: (d,) float32, little-endian. engine: what the rule and the server optimizer remember."""

    parameters: bytes
    engine: bytes

    @property
    def vector(self) -> Array:
        return np.frombuffer(self.parameters, "<f4").astype(np.float32)


class FleetLearner:
    """One learning on some devices, by real agents. Use it in a with block: it holds their processes.

    folder: for keys, data, logs and the coordinator's store; a new one inside it for every start. url: of the user's
    own broker, None starts the embedded one. check: called while waiting; may raise to end the run.
    Raises ConfigError for what only a simulation can do, BundleError for a model that cannot be exported.
    """

    def __init__(
        self,
        learning: Learning,
        devices: Sequence[DeviceData],
        folder: Path,
        *,
        url: str | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        _check_learning(learning)
        self._learning, self._devices, self._rounds = learning, list(devices), 0
        with contextlib.ExitStack() as stack:
            self.fleet = stack.enter_context(
                LocalFleet(self._devices, _fresh(folder), url=url, tables=_policy(learning), check=check)
            )
            self.bundle = exported(learning, self._devices, self.fleet.key)  # while the agents start
            self._model = Model(_opened(self.bundle))
            self._engine = make_engine(
                "direct",
                _rule(learning),
                self._model.manifest.parameters,
                learning.server_optimizer,
                learning.server_learning_rate,
                device_ids=[device.device_id for device in devices],
            )
            stack.callback(self._engine.close)
            self._coordinator = self.fleet.connect(self._own_training(stack, folder))
            self._stack = stack.pop_all()

    def _own_training(self, stack: contextlib.ExitStack, folder: Path) -> OwnTraining:
        """What makes the coordinator's own updates, from a file as an operator would have it."""
        trusted, needs = self._learning.trusted, self._learning.rule.needs_trusted
        if trusted is None or not needs:
            return NO_TRAINING
        path = folder / "trusted.npz"
        np.savez(path, x=trusted.x, y=trusted.y)
        own = TrustedTraining(needs, TrustedSettings(str(path)), path, self.bundle, self.fleet.key.public.hex())
        stack.callback(own.close)
        own.check()
        return own

    def __enter__(self) -> FleetLearner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the agents and the broker."""
        self._stack.close()

    def initial_state(self) -> FleetState:
        """The bundle's parameters, and an engine before its first round."""
        fresh = Model(_opened(self.bundle)).parameters()
        return FleetState(fresh.astype("<f4").tobytes(), self._engine.saved_state())

    def next(
        self, state: FleetState, cohort: Sequence[int], shuffle_seed: int | None = None
    ) -> tuple[FleetState, RoundOutcome]:
        """One round of the devices with these numbers.

        Raises RuleError where the rule refuses the round (`state` is then still good), RunError where a device that is
        asked does not take part.
        """
        self._learning.rule.check(len(cohort))
        plan = self._learning.plan
        if shuffle_seed is not None:
            plan = msgspec.structs.replace(plan, shuffle_seed=shuffle_seed)
        result = self._round(state, [self._devices[number].device_id for number in cohort], plan)
        parameters = result.parameters.astype("<f4").tobytes()
        return FleetState(parameters, self._engine.saved_state()), _outcome(result)

    def _round(self, state: FleetState, device_ids: list[str], plan: TrainingPlan) -> RoundResult:
        if not self._engine.load_state(state.engine):
            raise ConfigError("a saved state belongs to other settings", "start the run anew")
        self._rounds += 1
        result = self._coordinator.run_round(
            run_id=RUN,
            number=self._rounds,
            bundle=self.bundle,
            parameters=state.vector,
            plan=plan,
            device_ids=device_ids,
            quorum=1,
            engine=self._engine,
            timing=TIMING,
        )
        for verdict in result.verdicts:
            # a device whose training fails is left out, as in a simulation; any other absence is no simulation
            if verdict.status == MISSING and self.fleet.progress.get(verdict.device_id) is not Progress.FAILED:
                raise RunError(f"{verdict.device_id} took no part in a round ({verdict.reason})", "see its log")
        if result.outcome != "published":
            raise (RuleError if result.offers else RunError)(result.reason)
        return result

    def parameters(self, state: FleetState) -> Array:
        """The global model, (d,) float32, in the order of the bundle."""
        return state.vector

    def evaluate(self, state: FleetState, x: Array, y: Array) -> dict[str, float]:
        """ "loss" and "accuracy" of the global model on central data, by the TFLite runtime."""
        self._model.set_parameters(state.vector)
        loss, accuracy = self._model.evaluate(x, y)
        return {"loss": loss, "accuracy": accuracy}

    def evaluate_devices(self, state: FleetState, numbers: Sequence[int]) -> dict[str, dict[str, float]]:
        """The same on each of these devices' own data, here and not by the agents, with "num_examples"."""
        devices = [self._devices[number] for number in numbers]
        return {
            one.device_id: {**self.evaluate(state, one.x, one.y), "num_examples": float(len(one.y))} for one in devices
        }

    def saved(self, state: FleetState) -> bytes:
        return msgspec.msgpack.encode(state)

    def loaded(self, data: bytes) -> FleetState:
        return msgspec.msgpack.decode(data, type=FleetState)


def exported(learning: Learning, devices: Sequence[DeviceData], key: SealingKey) -> bytes:
    """The bundle of what is learned: its steps are those that `process.Simulation` runs in TensorFlow."""
    low = min(float(np.min(device.x)) for device in devices)
    high = max(float(np.max(device.x)) for device in devices)
    return covey_models.export(
        learning.model,
        name=RUN,
        loss=learning.loss,
        optimizer=learning.optimizer,
        batch_size=learning.batch_size,
        input_range=(low, high if high > low else low + 1.0),
        clip=learning.plan.gradient_clip_norm > 0,
        proximal=learning.plan.proximal_weight > 0,
        moving_statistics=learning.moving_statistics,
        key=key,
        seed=learning.seed,
    )


def _opened(bundle: bytes) -> Bundle:
    return read_bundle(bundle)


def _check_learning(learning: Learning) -> None:
    if learning.algorithm not in ALGORITHMS:
        raise ConfigError(
            f"algorithm {learning.algorithm!r} through a fleet", f"choose {', '.join(ALGORITHMS)}, or simulate it"
        )
    if learning.privacy is not None and not isinstance(learning.privacy, Privacy):
        raise ConfigError("central differential privacy through a fleet", "let devices clip and noise, or simulate it")


def _rule(learning: Learning) -> Rule:
    if learning.attack is None or not learning.hostile:
        return learning.rule
    return Attacked(learning.attack, tuple(learning.hostile), learning.rule, learning.seed, sampled=True)


def _policy(learning: Learning) -> dict[str, dict[str, Any]]:
    """What every agent.toml gets beside the usual."""
    tables: dict[str, dict[str, Any]] = {"training": {"max_epochs": max(100, learning.plan.epochs)}}
    if isinstance(learning.privacy, Privacy):
        told = learning.privacy
        tables["privacy"] = {"clip_norm": told.clip_norm, "noise_multiplier": told.noise_multiplier}
    return tables


def _fresh(folder: Path) -> Path:
    """A folder that no earlier start has used: its agents had other keys."""
    number = 1
    while (path := folder / f"start-{number}").exists():
        number += 1
    return path


def _outcome(result: RoundResult) -> RoundOutcome:
    losses = {one: offer.metrics.get("training_loss", float("nan")) for one, offer in result.offers.items()}
    known = {one: loss for one, loss in losses.items() if np.isfinite(loss)}
    weights = [result.offers[one].num_examples for one in known]
    return RoundOutcome(
        loss=float(np.average([*known.values()], weights=weights)) if known else float("nan"),
        losses=losses,
        verdicts={verdict.device_id: _judged(verdict) for verdict in result.verdicts},
        measurements=dict(result.measurements),
    )


def _judged(verdict: DeviceVerdict) -> Judged:
    """As a simulation says it: what could not be used is not accepted and most suspicious."""
    score = FLOAT32_MAX if verdict.score is None else verdict.score
    return Judged(verdict.status == ACCEPTED, float(score))
