"""The engine of an algorithm, from the settings of a run. Checks what can be checked before any device is asked."""

from __future__ import annotations

from collections.abc import Sequence

from covey_coordinator.aggregation.engines import Engine, make_engine
from covey_coordinator.aggregation.mean import Mean
from covey_coordinator.aggregation.rules import Rule
from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.algorithms.coded import Coded, CodedEngine
from covey_coordinator.algorithms.comt import Teaching, TeachingEngine
from covey_coordinator.algorithms.engines import ScaffoldEngine, SvrgEngine
from covey_coordinator.algorithms.settings import COMT, FEDAVG, FSVRG_NAIVE, Algorithm
from covey_protocol.errors import ConfigError
from covey_protocol.parameters import ParameterSpec, total_size
from covey_protocol.works import CYCLIC, SCAFFOLD


def check_algorithm(algorithm: Algorithm, server_optimizer: str) -> None:
    """ConfigError where the algorithm's step of the server would not be its own."""
    if algorithm.name not in (FEDAVG, CYCLIC) and server_optimizer != "sgd":
        raise ConfigError(
            f"algorithm {algorithm.name!r} with the server optimizer {server_optimizer!r}",
            'its step of the server is its own: set the optimizer to "sgd", with any learning rate',
        )


def make_algorithm_engine(
    algorithm: Algorithm,
    name: str,
    rule: Rule,
    specs: Sequence[ParameterSpec],
    server_optimizer: str = "sgd",
    server_learning_rate: float = 1.0,
    *,
    rate: float,
    devices: int,
    worker: Worker | None = None,
    teaching: Teaching | None = None,
    coded: Coded | None = None,
    device_ids: Sequence[str] = (),
) -> Engine | SvrgEngine | ScaffoldEngine | TeachingEngine | CodedEngine:
    """As make_engine, for an algorithm. rate: the devices' learning rate. devices: how many may take part.

    teaching: of comt. coded: of cyclic-code. Raises ConfigError.
    """
    check_algorithm(algorithm, server_optimizer)
    optimizer = server_optimizer, server_learning_rate
    if coded is not None:
        return CodedEngine(make_engine(name, Mean(), specs, *optimizer, worker=worker), coded)
    if algorithm.name in (FEDAVG, SCAFFOLD):
        plain = make_engine(name, rule, specs, *optimizer, worker=worker, device_ids=device_ids)
        if algorithm.name == FEDAVG:
            return plain
        return ScaffoldEngine(plain, total_size(specs), algorithm.steps, rate, devices)
    shared = Worker() if name == "tff" and worker is None else worker  # one for both engines
    try:
        gradients = make_engine(name, rule, specs, worker=shared, device_ids=device_ids)
        # holders of trusted instances are named by the operator, who takes their word
        rule = Mean() if algorithm.name == COMT else rule
        updates = make_engine(name, rule, specs, *optimizer, worker=shared, device_ids=device_ids)
    except BaseException:
        if shared is not None and worker is None:
            shared.stop()
        raise
    close = shared.stop if shared is not None and worker is None else lambda: None
    if teaching is not None:
        return TeachingEngine(gradients, updates, total_size(specs), teaching, close)
    equal = algorithm.name == FSVRG_NAIVE
    return SvrgEngine(gradients, updates, server_learning_rate, scaled=algorithm.scaled, equal=equal, close=close)
