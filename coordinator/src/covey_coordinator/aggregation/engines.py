"""One round of aggregation: screen, sort, check, rule, server optimizer, verdicts. Two engines with the same bits
(with Adagrad but for the last one).

An engine keeps what lasts from round to round (the rule's state, the server optimizer's state), and gives it as bytes
to whoever stores it. The *door* behind it does the arithmetic: `DirectDoor` calls the rule and TFF's optimizer object
in this process, `TffDoor` runs TFF's aggregation process and finalizer on a worker. All decisions are made here, once,
for both.

An update is trained minus received, so the optimizer sees the negative aggregate as its gradient; with sgd at a
learning rate of 1 the new parameters are exactly received + aggregate. Parameters that are not trainable (BatchNorm's
moving statistics) take part in the rule like all others but bypass the optimizer: their aggregate is added as it is.
A round that fails, whatever the reason, leaves the engine as it was.

Devices that screening refuses were among the num_byzantine that the rule was told, so the rule runs with so many fewer
on the rest (docs/adr/0014); otherwise they could starve rounds below the rule's precondition by sending NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from covey_coordinator.aggregation.kernels import Updates
from covey_coordinator.aggregation.registry import suggest
from covey_coordinator.aggregation.rules import LOSSES, TRUSTED_PLACE, Batch, Judgement, Rule, Trusted
from covey_coordinator.aggregation.screening import Screened, screen_updates, update_fault
from covey_coordinator.aggregation.states import pack_state, unpack_state
from covey_coordinator.aggregation.worker import Worker, refusal_of
from covey_coordinator.records import ACCEPTED, REJECTED, Array, DeviceVerdict
from covey_protocol.errors import ConfigError, RuleError, UsageError
from covey_protocol.parameters import ParameterSpec, offsets, total_size

Places = npt.NDArray[np.int64]

ENGINE_NAMES = ("direct", "tff")
SERVER_OPTIMIZERS = ("sgd", "sgdm", "adagrad", "adam", "yogi")
SERVER_MOMENTUM = 0.9  # of sgdm; the value of Reddi et al. 2021 (arXiv:2003.00295)


@dataclass(frozen=True)
class StepResult:
    """parameters: (d,) float32, new. verdicts: in the order of the device ids given. measurements: numbers to log.
    aggregate: (d,), what the rule made of the updates."""

    parameters: Array
    verdicts: list[DeviceVerdict]
    measurements: dict[str, float]
    aggregate: Array


class Engine(Protocol):
    """One aggregation round after another."""

    def step(
        self,
        parameters: Array,
        updates: Array | Sequence[Array],
        num_examples: Array | Sequence[float],
        device_ids: Sequence[str],
        trusted: Trusted | None = None,
    ) -> StepResult:
        """(d,), (n, d) or n vectors, n counts, n ids -> the result. Raises RuleError if the round is refused.

        trusted: for rules that need it.
        """

    def aggregate(self, parameters: Array, screened: Screened) -> StepResult:
        """The same for updates that have been screened already; verdicts in the order of the device ids."""

    @property
    def rule_state(self) -> Any:
        """What the rule remembers, as the door keeps it: for simulated attackers who know everything."""

    @property
    def num_byzantine(self) -> int:
        """As the rule was told."""

    @property
    def expects_copies(self) -> bool:
        """Whether bit-equal updates are what honest devices send: see `Rule.expects_copies`."""

    def saved_state(self) -> bytes:
        """All that lasts from round to round, to be kept with the parameters it belongs to."""

    def load_state(self, data: bytes) -> bool:
        """Go on from `saved_state`. False, with nothing changed, where rule, server optimizer or model are others now.

        Raises StorageError for bytes that are no saved state.
        """

    def close(self) -> None:
        """Free what the engine started. It cannot be used afterwards."""


class Door(Protocol):
    """The arithmetic of an engine, without decisions. States are whatever the door likes; it does not keep them."""

    def initial_states(self) -> tuple[Any, Any]:
        """State of the rule and state of the server optimizer before the first round."""

    def judge(
        self, rule: Rule, state: Any, updates: Array, num_examples: Array, places: Places, trusted: Trusted
    ) -> tuple[Any, Judgement]:
        """The rule on screened rows; numpy arrays in the judgement. rule: the door's own, perhaps with another f.

        trusted: what the rule needs of it; its losses are of aggregates, as in `Batch`.
        """

    def apply(self, state: Any, weights: list[Array], gradients: list[Array]) -> tuple[Any, list[Array]]:
        """The server optimizer on the trainable parameters."""

    def close(self) -> None: ...


def make_engine(
    name: str,
    rule: Rule,
    parameter_specs: Sequence[ParameterSpec],
    server_optimizer: str = "sgd",
    server_learning_rate: float = 1.0,
    *,
    worker: Worker | None = None,
    refuse_copies: bool = True,
    device_ids: Sequence[str] = (),
) -> Engine:
    """The engine "direct" or "tff" for this rule and model.

    worker: the TFF engine runs on it and leaves it running; without one it starts its own and stops it in `close`.
    refuse_copies: see `screen_updates`. device_ids: have the places 0, 1, ... of `Batch.places`; others get the next
    ones as they come. Raises ConfigError for unknown names and a learning rate that is not positive.
    """
    _known("aggregation engine", name, ENGINE_NAMES)
    optimizer = build_server_optimizer(server_optimizer, server_learning_rate)
    door: Door
    if name == "direct":
        door = DirectDoor(rule, parameter_specs, optimizer)
    elif rule.needs_trusted == LOSSES:
        raise ConfigError(
            f"{rule.name} in the engine {name!r}: it asks for losses, which are not computed on TFF's worker",
            'set engine = "direct"',
        )
    else:
        door = TffDoor(rule, parameter_specs, optimizer, worker)
    layout = [(spec.shape, spec.trainable) for spec in parameter_specs]
    description = f"{rule!r}, {server_optimizer}, {server_learning_rate!r}, {layout}"
    return _RoundEngine(rule, parameter_specs, door, refuse_copies, description, device_ids)


def build_server_optimizer(name: str, learning_rate: float) -> Any:
    """TFF's optimizer of this name: sgd, sgdm (momentum 0.9), adagrad, adam or yogi with TFF's own defaults."""
    _known("server optimizer", name, SERVER_OPTIMIZERS)
    if not (np.isfinite(learning_rate) and learning_rate > 0):
        raise ConfigError(f"server_learning_rate = {learning_rate}", "set it to a positive number")
    import tensorflow_federated as tff

    if name == "sgd":
        return tff.learning.optimizers.build_sgdm(learning_rate)
    if name == "sgdm":
        return tff.learning.optimizers.build_sgdm(learning_rate, momentum=SERVER_MOMENTUM)
    if name == "adagrad":
        return tff.learning.optimizers.build_adagrad(learning_rate)
    if name == "adam":
        return tff.learning.optimizers.build_adam(learning_rate)
    return tff.learning.optimizers.build_yogi(learning_rate)


def _known(kind: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise ConfigError(f"there is no {kind} {name!r}", suggest(name, names))


class _RoundEngine:
    """The one engine; what differs is the door. description: of all settings that a saved state belongs to."""

    def __init__(
        self,
        rule: Rule,
        specs: Sequence[ParameterSpec],
        door: Door,
        refuse_copies: bool,
        description: str,
        device_ids: Sequence[str],
    ) -> None:
        self._rule, self._door, self._refuse_copies, self._description = rule, door, refuse_copies, description
        self._layout = _Layout(specs)
        self._rule_state, self._optimizer_state = door.initial_states()
        # numbers of devices: of those named first, then in the order in which they were first seen
        self._places = {device_id: place for place, device_id in enumerate(device_ids)}

    def step(
        self,
        parameters: Array,
        updates: Array | Sequence[Array],
        num_examples: Array | Sequence[float],
        device_ids: Sequence[str],
        trusted: Trusted | None = None,
    ) -> StepResult:
        refuse_copies = self._refuse_copies and not self.expects_copies
        screened = screen_updates(updates, num_examples, device_ids, self._layout.d, refuse_copies=refuse_copies)
        result = self.aggregate(parameters, dataclasses.replace(screened, trusted=trusted))
        verdicts = {verdict.device_id: verdict for verdict in result.verdicts}
        return dataclasses.replace(result, verdicts=[verdicts[device_id] for device_id in device_ids])

    def aggregate(self, parameters: Array, screened: Screened) -> StepResult:
        if parameters.shape != (self._layout.d,) or parameters.dtype != np.float32:
            raise UsageError(f"parameters {parameters.dtype}{parameters.shape} instead of float32 ({self._layout.d},)")
        rule = self._rule.with_num_byzantine(max(0, self._rule.num_byzantine - screened.num_faulty))
        self._check(rule, screened)
        places = np.array([self._places.setdefault(one, len(self._places)) for one in screened.device_ids], np.int64)
        rows = screened.updates, screened.num_examples, places
        trusted = needed_of(self._rule, screened.trusted, parameters)
        rule_state, judgement = self._door.judge(rule, self._rule_state, *rows, trusted)
        optimizer_state, new_parameters = self._apply(parameters, judgement.aggregate)
        if not np.isfinite(new_parameters).all():
            raise RuleError(
                f"the round of {self._rule.name} would make parameters that are not finite",
                "lower server_learning_rate, or choose a rule that bears corrupted devices",
            )
        self._rule_state, self._optimizer_state = rule_state, optimizer_state
        return StepResult(
            parameters=new_parameters,
            verdicts=_verdicts(rule, screened, judgement),
            measurements={
                "num_byzantine": float(self._rule.num_byzantine),
                "num_byzantine_left": float(rule.num_byzantine),
                **_measurements(screened, judgement, new_parameters - parameters),
            },
            aggregate=np.asarray(judgement.aggregate),
        )

    @property
    def rule_state(self) -> Any:
        return self._rule_state

    @property
    def num_byzantine(self) -> int:
        return self._rule.num_byzantine

    @property
    def expects_copies(self) -> bool:
        return self._rule.expects_copies

    def saved_state(self) -> bytes:
        return pack_state(self._description, list(self._places), (self._rule_state, self._optimizer_state))

    def load_state(self, data: bytes) -> bool:
        unpacked = unpack_state(data, self._description, (self._rule_state, self._optimizer_state))
        if unpacked is None:
            return False
        places, (self._rule_state, self._optimizer_state) = unpacked
        self._places = {device_id: place for place, device_id in enumerate(places)}
        return True

    def close(self) -> None:
        self._door.close()

    def _check(self, rule: Rule, screened: Screened) -> None:
        """The rule's precondition on what survived screening; a refusal says what was screened out."""
        try:
            rule.check(len(screened.device_ids))
        except RuleError as error:
            if not screened.reasons:
                raise
            refused = ", ".join(f"{device_id}: {reason}" for device_id, reason in sorted(screened.reasons.items()))
            told = f"refused before the rule, each one of num_byzantine = {self._rule.num_byzantine}"
            raise RuleError(f"{error.what} ({told}: {refused})", error.remedy) from error

    def _apply(self, parameters: Array, aggregate: Array) -> tuple[Any, Array]:
        layout = self._layout
        weights, gradients = layout.trainable(parameters), layout.trainable(-aggregate)
        state, new_weights = self._door.apply(self._optimizer_state, weights, gradients)
        return state, layout.merged(parameters + aggregate, new_weights)


def needed_of(rule: Rule, trusted: Trusted | None, parameters: Array) -> Trusted:
    """What the rule needs of the trusted data, checked; losses of aggregates on these (d,) parameters.

    Raises RuleError where the coordinator's own update is none that a device could send.
    """
    if not rule.needs_trusted:
        return Trusted()
    update, losses = trusted if trusted is not None else Trusted()
    if rule.needs_trusted == LOSSES and losses is not None:
        losses_of = losses
        return Trusted(losses=lambda aggregates: losses_of(parameters + aggregates))
    if rule.needs_trusted == LOSSES or update is None:
        raise UsageError(f"{rule.name} was given no {rule.needs_trusted} of trusted data")
    fault = update_fault(update, len(parameters))
    if fault:
        raise RuleError(f"the coordinator's own {fault}", "look at the data and the settings of [trusted]")
    return Trusted(update)


class _Layout:
    """Where the trainable parameters lie in the flat vector."""

    def __init__(self, specs: Sequence[ParameterSpec]) -> None:
        self.d = total_size(specs)
        places = offsets(specs)
        self._trainable = [(places[spec.name], spec.shape) for spec in specs if spec.trainable]

    def trainable(self, vector: Array) -> list[Array]:
        return [vector[place].reshape(shape) for place, shape in self._trainable]

    def merged(self, vector: Array, tensors: list[Array]) -> Array:
        """vector with its trainable parts replaced by tensors."""
        result = vector.copy()
        for (place, _), tensor in zip(self._trainable, tensors):
            result[place] = np.ravel(tensor)
        return result


def _verdicts(rule: Rule, screened: Screened, judgement: Judgement) -> list[DeviceVerdict]:
    """One verdict per device that sent something, in the order of the ids."""
    accepted_scores = judgement.scores[judgement.accepted]
    n = len(screened.device_ids)
    verdicts = []
    for row, device_id in enumerate(screened.device_ids):
        score, accepted = float(judgement.scores[row]), bool(judgement.accepted[row])
        status = ACCEPTED if accepted else REJECTED
        reason = "" if accepted else rule.explain(score, accepted_scores, n)
        count, norm = int(screened.num_examples[row]), screened.norms[device_id]
        verdicts.append(DeviceVerdict(device_id, status, reason, score, count, norm))
    for device_id, reason in screened.reasons.items():
        known = screened.norms.get(device_id)
        finite = known if known is not None and np.isfinite(known) else None
        verdicts.append(DeviceVerdict(device_id, REJECTED, reason, None, 0, finite))
    return sorted(verdicts, key=lambda verdict: verdict.device_id)


def _measurements(screened: Screened, judgement: Judgement, change: Array) -> dict[str, float]:
    return {
        "num_updates": float(len(screened.device_ids) + len(screened.reasons)),
        "num_refused_before_rule": float(len(screened.reasons)),
        "num_accepted": float(np.count_nonzero(judgement.accepted)),
        "aggregate_norm": float(np.linalg.norm(judgement.aggregate)),
        "parameter_change_norm": float(np.linalg.norm(change)),
        "max_score": float(np.max(judgement.scores)),
        "median_score": float(np.median(judgement.scores)),
        **{name: float(value) for name, value in judgement.measurements.items()},
    }


class DirectDoor:
    """The rule in numpy and compiled loops, and TFF's optimizer object as a tf.function, in this process."""

    def __init__(self, rule: Rule, specs: Sequence[ParameterSpec], optimizer: Any) -> None:
        import tensorflow as tf

        from covey_coordinator.aggregation.kernels.fast import NumpyKernels

        self._first_state, self._kernels = rule.initial_state(total_size(specs)), NumpyKernels()
        tensor_specs = [tf.TensorSpec(spec.shape, tf.float32) for spec in specs if spec.trainable]
        self._optimizer_state = _as_tensors(optimizer.initialize(tensor_specs))
        state_specs = tf.nest.map_structure(tf.TensorSpec.from_tensor, self._optimizer_state)
        # traced for these shapes once: a tf.function that looks at its arguments in every call takes twice the time
        step = tf.function(optimizer.next, autograph=False)
        self._next = step.get_concrete_function(state_specs, tensor_specs, tensor_specs)

    def initial_states(self) -> tuple[Any, Any]:
        return self._first_state, self._optimizer_state

    def judge(
        self, rule: Rule, state: Any, updates: Array, num_examples: Array, places: Places, trusted: Trusted
    ) -> tuple[Any, Judgement]:
        with np.errstate(all="ignore"):  # as in TensorFlow: rules deal with what is not finite themselves
            return rule.advance(self._kernels, state, Batch(Updates(updates), num_examples, places, *trusted))

    def apply(self, state: Any, weights: list[Array], gradients: list[Array]) -> tuple[Any, list[Array]]:
        state, new_weights = self._next(state, _as_tensors(weights), _as_tensors(gradients))
        return state, [tensor.numpy() for tensor in new_weights]

    def close(self) -> None:
        pass


def _as_tensors(nest: Any) -> Any:
    """Python numbers too: left as they are, they would be folded into the graph in double precision, unlike in TFF."""
    import tensorflow as tf

    return tf.nest.map_structure(tf.convert_to_tensor, nest)


class TffDoor:
    """TFF's aggregation process around the rule and TFF's optimizer finalizer, run on a worker with real updates.

    A rule's f is part of its traced function, so each f that comes up gets a process, made when it first does.
    """

    def __init__(
        self, rule: Rule, specs: Sequence[ParameterSpec], optimizer: Any, worker: Worker | None = None
    ) -> None:
        self._shapes = [(place, spec.shape) for spec, place in zip(specs, offsets(specs).values())]
        self._owns_worker = worker is None
        self._worker = Worker() if worker is None else worker
        self._rule, self._specs = rule, specs
        self._aggregations: dict[int, Any] = {}
        try:
            self._aggregation(rule)
            self._finalizer = self._worker.call(_build_finalizer, specs, optimizer)
        except BaseException:
            self.close()
            raise

    def initial_states(self) -> tuple[Any, Any]:
        aggregation = self._aggregation(self._rule)
        return self._worker.call(lambda: (aggregation.initialize(), self._finalizer.initialize()))

    def _aggregation(self, rule: Rule) -> Any:
        f = rule.num_byzantine
        if f not in self._aggregations:
            self._aggregations[f] = self._worker.call(_build_aggregation, rule, self._specs)
        return self._aggregations[f]

    def judge(
        self, rule: Rule, state: Any, updates: Array, num_examples: Array, places: Places, trusted: Trusted
    ) -> tuple[Any, Judgement]:
        told = list(zip(num_examples, places))
        rows = list(updates)
        if trusted.update is not None:
            rows, told = [*rows, trusted.update], [*told, (np.float32(1), np.int64(TRUSTED_PLACE))]
        values = [[row[place].reshape(shape) for place, shape in self._shapes] for row in rows]
        try:
            output = self._worker.call(self._aggregation(rule).next, state, values, told)
        except Exception as error:
            refusal = refusal_of(error)
            if refusal is None:
                raise
            raise refusal from error
        aggregate = np.concatenate([np.ravel(tensor) for tensor in output.result])
        measurements = dict(output.measurements)
        return output.state, Judgement(
            aggregate, measurements.pop("accepted"), measurements.pop("scores"), measurements
        )

    def apply(self, state: Any, weights: list[Array], gradients: list[Array]) -> tuple[Any, list[Array]]:
        import tensorflow_federated as tff

        model = tff.learning.models.ModelWeights(weights, [])
        output = self._worker.call(self._finalizer.next, state, model, gradients)
        return output.state, list(output.result.trainable)

    def close(self) -> None:
        if self._owns_worker:
            self._worker.stop()


def _build_aggregation(rule: Rule, specs: Sequence[ParameterSpec]) -> Any:
    """The aggregation process over all parameters."""
    import tensorflow_federated as tff

    from covey_coordinator.aggregation.factory import RuleFactory

    return RuleFactory(rule).create(_tensors(specs), tff.types.to_type((np.float32, np.int64)))


def _build_finalizer(specs: Sequence[ParameterSpec], optimizer: Any) -> Any:
    """The server optimizer over the trainable parameters."""
    import tensorflow_federated as tff

    model_type = tff.types.StructWithPythonType(
        [("trainable", _tensors([spec for spec in specs if spec.trainable])), ("non_trainable", _tensors([]))],
        tff.learning.models.ModelWeights,
    )
    return tff.learning.templates.build_apply_optimizer_finalizer(optimizer, model_type)


def _tensors(specs: Sequence[ParameterSpec]) -> Any:
    """TFF's type of a list of these parameters."""
    import tensorflow_federated as tff

    types = [(None, tff.TensorType(np.float32, spec.shape)) for spec in specs]
    return tff.types.StructWithPythonType(types, list)
