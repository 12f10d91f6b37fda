"""Engines of Federated SVRG and SCAFFOLD: what the plain engines (aggregation.engines) do, and what is kept between.

The rule judges every exchange: of gradients with a memory of its own, of local updates with another. What one exchange
leaves for the next, the fleet's gradient or control, is part of the engine's saved state, so it is durable in one step
with the end of the round that made it, and a restart goes on from it. The server optimizer is plain sgd.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np

from covey_coordinator.aggregation.engines import Engine, StepResult
from covey_coordinator.aggregation.evaluating import cut_mean, number_of_liars
from covey_coordinator.aggregation.screening import Screened
from covey_coordinator.algorithms.combining import boosted, boosts, fleet_control
from covey_coordinator.records import ACCEPTED, REJECTED, Array, DeviceVerdict
from covey_protocol.errors import RuleError
from covey_protocol.messages import TRAIN
from covey_protocol.works import FEATURES, GRADIENT, SCAFFOLD, SVRG


@runtime_checkable
class Asking(Protocol):
    """An engine that says what the next round is to ask of the devices."""

    @property
    def work(self) -> str: ...

    @property
    def vectors(self) -> tuple[Array, ...]:
        """What the devices need for it beside the parameters."""


def asked_by(engine: Any) -> tuple[str, tuple[Array, ...]]:
    """(work, vectors) of the next round."""
    return (engine.work, engine.vectors) if isinstance(engine, Asking) else (TRAIN, ())


class _Saved(msgspec.Struct, frozen=True, tag="covey algorithm", forbid_unknown_fields=True, omit_defaults=True):
    """description: what the state belongs to. engines: the saved states of the plain ones. kept: float32, by name.
    more: of an algorithm that keeps other things."""

    description: str
    engines: list[bytes]
    kept: dict[str, bytes]
    more: bytes = b""


class AlgorithmEngine:
    """What the two have in common: plain engines, and vectors that are kept."""

    def __init__(self, description: str, engines: list[Engine], close: Callable[[], None] = lambda: None) -> None:
        self._description, self._engines, self._close = description, engines, close
        self._kept: dict[str, Array] = {}

    @property
    def num_byzantine(self) -> int:
        return self._engines[0].num_byzantine

    @property
    def expects_copies(self) -> bool:
        return self._engines[0].expects_copies

    def saved_state(self) -> bytes:
        kept = {name: vector.astype("<f4").tobytes() for name, vector in self._kept.items()}
        states = [engine.saved_state() for engine in self._engines]
        return msgspec.msgpack.encode(_Saved(self._description, states, kept, self._more()))

    def load_state(self, data: bytes) -> bool:
        """As Engine.load_state; also False for the state of a plain engine: the run had another algorithm."""
        try:
            saved = msgspec.msgpack.decode(data, type=_Saved)
        except msgspec.MsgspecError:
            return False
        before, more = [engine.saved_state() for engine in self._engines], self._more()
        if saved.description != self._description or len(saved.engines) != len(before):
            return False
        loaded = all(engine.load_state(state) for engine, state in zip(self._engines, saved.engines))
        if not loaded or not self._load_more(saved.more):
            self._load_more(more)
            for engine, state in zip(self._engines, before):
                engine.load_state(state)
            return False
        self._kept = {name: np.frombuffer(data, "<f4").astype(np.float32) for name, data in saved.kept.items()}
        return True

    def _more(self) -> bytes:
        return b""

    def _load_more(self, data: bytes) -> bool:
        """False, with nothing changed, for what `_more` of other settings has given."""
        return not data

    def close(self) -> None:
        for engine in self._engines:
            engine.close()
        self._close()


class SvrgEngine(AlgorithmEngine):
    """Federated SVRG: exchanges of `features` (once, where scaled), then `gradient` and `svrg` in turn.

    gradients, updates: plain engines with the server optimizer sgd, the first with a learning rate of 1. equal: every
    device counts the same in the local exchange (the naive form), else by its examples.
    """

    def __init__(
        self,
        gradients: Engine,
        updates: Engine,
        learning_rate: float,
        *,
        scaled: bool,
        equal: bool,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(f"svrg, {learning_rate!r}, {scaled}, {equal}", [gradients, updates], close)
        self._gradients, self._updates, self._rate = gradients, updates, learning_rate
        self._scaled, self._equal = scaled, equal

    @property
    def work(self) -> str:
        if self._scaled and "shares" not in self._kept:
            return FEATURES
        return SVRG if "gradient" in self._kept else GRADIENT

    @property
    def vectors(self) -> tuple[Array, ...]:
        names = ("gradient", "shares") if self._scaled else ("gradient",)
        return tuple(self._kept[name] for name in names) if self.work == SVRG else ()

    def aggregate(self, parameters: Array, screened: Screened) -> StepResult:
        work = self.work
        if work == FEATURES:
            return self._count(parameters, screened)
        if work == GRADIENT:
            result = self._gradients.aggregate(np.zeros_like(parameters), screened)
            self._kept = {**self._kept, "gradient": result.parameters}
            return dataclasses.replace(result, parameters=parameters)
        boost = self._kept["boosts"] if self._scaled else np.ones_like(parameters)
        with all_or_nothing(self._updates):
            result = self._updates.aggregate(parameters, equal(screened) if self._equal else screened)
            new = boosted(parameters, np.float32(self._rate) * result.aggregate, boost)
            require_finite(new)
        self._kept = {name: vector for name, vector in self._kept.items() if name != "gradient"}
        return moved_by(result, parameters, new)

    def _count(self, parameters: Array, screened: Screened) -> StepResult:
        """phi and A of the fleet. Raises RuleError where so few devices cannot bear num_byzantine."""
        left = number_of_liars(screened, self.num_byzantine)
        shares = cut_mean(screened, left)
        self._kept = {"shares": shares, "boosts": boosts(screened.updates)}
        measurements = {"num_byzantine": float(self.num_byzantine), "num_byzantine_left": float(left)}
        return StepResult(parameters, _all_accepted(screened), measurements, shares)


class ScaffoldEngine(AlgorithmEngine):
    """SCAFFOLD: every exchange is `scaffold`, and moves the model and the fleet's control. Every device counts alike.

    updates: a plain engine with the server optimizer sgd. steps, rate: K and eta, every device's. devices: N, how many
    may take part, whether they do or not.
    """

    def __init__(self, updates: Engine, d: int, steps: int, rate: float, devices: int) -> None:
        super().__init__(f"scaffold, {steps}, {rate!r}", [updates])
        self._updates, self._steps, self._rate, self._devices = updates, steps, rate, devices
        self._kept = {"control": np.zeros(d, np.float32)}

    work = SCAFFOLD

    @property
    def vectors(self) -> tuple[Array, ...]:
        return (self._kept["control"],)

    def aggregate(self, parameters: Array, screened: Screened) -> StepResult:
        with all_or_nothing(self._updates):
            result = self._updates.aggregate(parameters, equal(screened))
            used = sum(verdict.status == ACCEPTED for verdict in result.verdicts)
            control = fleet_control(
                self._kept["control"], result.aggregate, self._steps, self._rate, used, self._devices
            )
            require_finite(control)
        self._kept = {"control": control}
        return result


@contextlib.contextmanager
def all_or_nothing(engine: Engine) -> Iterator[None]:
    """A round that is refused leaves the plain engine as it was, also where it did not refuse it itself."""
    before = engine.saved_state()
    try:
        yield
    except RuleError:
        engine.load_state(before)
        raise


def equal(screened: Screened) -> Screened:
    return dataclasses.replace(screened, num_examples=np.ones_like(screened.num_examples))


def moved_by(result: StepResult, parameters: Array, new: Array) -> StepResult:
    change = float(np.linalg.norm(new - parameters))
    return dataclasses.replace(
        result, parameters=new, measurements={**result.measurements, "parameter_change_norm": change}
    )


def require_finite(vector: Array) -> None:
    if not np.isfinite(vector).all():
        raise RuleError("the round would make numbers that are not finite", "lower the learning rates")


def _all_accepted(screened: Screened) -> list[DeviceVerdict]:
    used = [
        DeviceVerdict(device_id, ACCEPTED, "", None, int(count), screened.norms[device_id])
        for device_id, count in zip(screened.device_ids, screened.num_examples)
    ]
    refused = [DeviceVerdict(device_id, REJECTED, reason) for device_id, reason in screened.reasons.items()]
    return sorted([*used, *refused], key=lambda verdict: verdict.device_id)
