"""One cell of the grid: a fleet trains for some rounds under one attack, behind the engine that live rounds use.

Per round: every device trains from the global model on its own shard; the attack crafts what the corrupted devices
send; `engine.step` screens, judges and applies. Data, partition, batches, weights and the choice of corrupted devices
depend on the seed alone, so cells of one seed differ only in rule and attack. Needs TensorFlow (through the engine).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from covey_coordinator.aggregation.engines import Engine, make_engine, needed_of
from covey_coordinator.aggregation.kernels import Updates
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.rules import LOSSES, Batch, Rule, Trusted
from covey_coordinator.attacks.contract import Attack, DataSetting, Knowledge
from covey_coordinator.attacks.data import ScalingBackdoor
from covey_coordinator.attacks.mathematics import disguised
from covey_coordinator.attacks.plain import NoAttack
from covey_coordinator.grid.settings import Cell, GridSettings, Plan
from covey_coordinator.grid.training import Floats, Integers, Network
from covey_coordinator.simulation.trusted_data import TrustedSettings, parted
from covey_models import datasets, partitions
from covey_protocol.errors import RuleError
from covey_protocol.parameters import ParameterSpec

TEST_FRACTION = 0.2
MIN_EXAMPLES = 8  # fewest a shard may hold, as in the demo
BATCHES, CORRUPTED, POISON, OWN_BATCHES = 1, 2, 3, 6  # streams of random numbers of one seed
NONE = Trusted()


@dataclass(frozen=True)
class World:
    """What does not depend on rule and attack. shards: of train's rows; initial: (d,). trusted: none of train's."""

    train: datasets.Dataset
    test: datasets.Dataset
    shards: list[Integers]
    network: Network
    specs: list[ParameterSpec]
    initial: Floats
    trusted: datasets.Dataset | None = None

    @property
    def setting(self) -> DataSetting:
        return DataSetting(self.train.num_classes, self.train.input_range)


@functools.lru_cache(maxsize=8)
def world_of(data: str, model: str, devices: int, alpha: float, seed: int, trusted: int = 0) -> World:
    from covey_models import zoo

    train, test = datasets.split(datasets.load(data), TEST_FRACTION, seed)
    own, train = parted(train, TrustedSettings(trusted), seed)
    shards = partitions.dirichlet(train.y, devices, alpha, seed, MIN_EXAMPLES)
    keras = zoo.build(model, train.input_shape, train.num_classes, seed)
    specs = [ParameterSpec(weight.name.removesuffix(":0"), tuple(weight.shape)) for weight in keras.weights]
    initial = np.concatenate([np.ravel(weight.numpy()) for weight in keras.weights]).astype(np.float32)
    return World(train, test, shards, Network(specs), specs, initial, own)


def stream(seed: int, *which: int) -> np.random.Generator:
    return np.random.default_rng([seed, *which])


def corrupted_devices(devices: int, num_hostile: int, seed: int) -> Integers:
    """Sorted device numbers; those of a smaller fraction are among those of a larger."""
    return np.sort(stream(seed, CORRUPTED).permutation(devices)[:num_hostile])


class Fleet:
    """All devices of one cell: their data (poisoned where the attack does that), batches and momentum."""

    def __init__(self, world: World, settings: GridSettings, attack: Attack, hostile: Integers, seed: int) -> None:
        self._world, self._settings, self._seed = world, settings, seed
        parts = [(world.train.x[rows], world.train.y[rows]) for rows in world.shards]
        for device in hostile if attack.poisons_data else ():
            x, y = parts[device]
            parts[device] = attack.poison(x, y, world.setting, stream(seed, POISON, int(device)))
        self._x = flat(np.concatenate([x for x, _ in parts]))
        self._y = np.concatenate([y for _, y in parts])
        self.sizes = np.array([len(y) for _, y in parts])
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._momentum = np.zeros((settings.devices, len(world.initial)), np.float32)

    def updates(self, parameters: Floats, number: int) -> Floats:
        """(n, d): what every device would send honestly in this round."""
        settings = self._settings
        drawn = stream(self._seed, BATCHES, number).random((settings.steps, settings.devices, settings.batch))
        rows = self._starts[None, :, None] + (drawn * self.sizes[None, :, None]).astype(np.int64)
        change = self.change(parameters, rows)
        if not settings.momentum:
            return change
        beta = np.float32(settings.momentum)
        self._momentum = beta * self._momentum + (1 - beta) * change
        return self._momentum.copy()

    def change(self, parameters: Floats, rows: Integers) -> Floats:
        """(n, d): what training on these rows (steps, n, batch) of the fleet's examples changes."""
        trained = self._world.network.trained(parameters, self._x, self._y, rows, self._settings.learning_rate)
        return trained - parameters


class OwnData:
    """The coordinator's own examples, on which it trains as a device does."""

    def __init__(self, world: World, trusted: datasets.Dataset, settings: GridSettings, seed: int) -> None:
        self._network, self._settings, self._seed = world.network, settings, seed
        self._x, self._y = flat(trusted.x), trusted.y
        self._momentum = np.zeros_like(world.initial)

    def given(self, needs: str, parameters: Floats, number: int) -> Trusted:
        """What a rule needs in this round."""
        if needs == LOSSES:
            return Trusted(losses=lambda models: self._network.losses(models, self._x, self._y))
        settings = self._settings
        drawn = stream(self._seed, OWN_BATCHES, number).random((settings.steps, 1, settings.batch))
        rows = (drawn * len(self._y)).astype(np.int64)
        change = self._network.trained(parameters, self._x, self._y, rows, settings.learning_rate)[0] - parameters
        beta = np.float32(settings.momentum)
        self._momentum = beta * self._momentum + (1 - beta) * change
        return Trusted(self._momentum.copy())


class Attackers:
    """The hostile devices of one run, who know all that an attack may know."""

    def __init__(
        self, attack: Attack, hostile: Integers, sizes: Integers, rule: Rule, engine: Engine, seed: int
    ) -> None:
        self._attack, self._hostile, self._sizes = attack, hostile, sizes
        self._rule, self._engine, self._seed = rule, engine, seed
        self._kernels = NumpyKernels()

    def crafted(self, updates: Floats, parameters: Floats, number: int, trusted: Trusted = NONE) -> Floats:
        """What they send in this round, in place of their rows of the (n, d) updates. They know what is trusted."""
        given = needed_of(self._rule, trusted, parameters)

        def batch_with(rows: Any) -> Batch:
            matrix = updates.copy()
            matrix[self._hostile] = rows
            return Batch(Updates(matrix), self._sizes.astype(np.float32), np.arange(len(matrix)), *given)

        knowledge = Knowledge(
            own=updates[self._hostile],
            num_byzantine=self._rule.num_byzantine,
            seed=self._seed,
            round_number=number,
            rule=self._rule,
            rule_state=self._engine.rule_state,
            batch_with=batch_with,
            parameters=parameters,
        )
        honest = Updates(np.delete(updates, self._hostile, axis=0))
        rows = self._attack.craft(self._kernels, honest, len(self._hostile), knowledge)
        return np.asarray(disguised(self._kernels, rows))


def flat(x: Any) -> Floats:
    return np.ascontiguousarray(x.reshape(len(x), -1), np.float32)


def simulated(plan: Plan, cell: Cell, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Train one cell; the result as plain JSON values (see `docs/attacks.md`). check is called every round."""
    started = time.monotonic()
    settings, attack = plan.settings, plan.attacks[cell.attack].attack if cell.num_hostile else None
    rule = plan.rules[cell.rule].made(cell.num_hostile)
    world = world_of(settings.data, settings.model, settings.devices, settings.alpha, cell.seed, settings.trusted)
    with np.errstate(all="ignore"):  # attacked models overflow; the engine refuses what is not finite
        run = _Run(world, settings, rule, attack, cell)
        for number in range(settings.rounds):
            check()
            run.round(number)
    return {
        **cell._asdict(),
        "told": rule.num_byzantine,
        "refused": "",
        "accuracy": run.curve[-1],
        "best_accuracy": max(run.curve),
        "backdoor_success": backdoor_success(world, run.attack, run.parameters),
        "rounds_refused": run.rounds_refused,
        "last_refusal": run.last_refusal,
        "curve": run.curve,
        "seconds": round(time.monotonic() - started, 3),
    }


class _Run:
    def __init__(self, world: World, settings: GridSettings, rule: Rule, attack: Attack | None, cell: Cell) -> None:
        self._world, self._settings, self._rule = world, settings, rule
        self.attack = attack if attack is not None else NoAttack()
        self._seed = cell.seed
        self._hostile = corrupted_devices(settings.devices, cell.num_hostile, cell.seed)
        self._fleet = Fleet(world, settings, self.attack, self._hostile, cell.seed)
        self._engine = make_engine("direct", rule, world.specs)
        self._own = OwnData(world, world.trusted, settings, cell.seed) if world.trusted is not None else None
        self._attackers = Attackers(self.attack, self._hostile, self._fleet.sizes, rule, self._engine, cell.seed)
        self.parameters = world.initial
        self._ids = [f"device-{number:04d}" for number in range(settings.devices)]  # sorts as it counts
        self._test_x = flat(world.test.x)
        self.curve: list[float] = []
        self.rounds_refused, self.last_refusal = 0, ""

    def round(self, number: int) -> None:
        """One round; a refused one leaves the model as it was, as in live rounds."""
        updates = self._fleet.updates(self.parameters, number)
        needs, trusted = self._rule.needs_trusted, NONE
        if needs and self._own is not None:
            trusted = self._own.given(needs, self.parameters, number)
        try:
            if len(self._hostile):
                updates[self._hostile] = self._attackers.crafted(updates, self.parameters, number, trusted)
            sent = updates, self._fleet.sizes, self._ids, trusted
            self.parameters = self._engine.step(self.parameters, *sent).parameters
        except RuleError as error:
            self.rounds_refused += 1
            self.last_refusal = str(error)
        right = self._world.network.predicted(self.parameters, self._test_x) == self._world.test.y
        self.curve.append(round(float(right.mean()), 6))


def backdoor_success(world: World, attack: Attack, parameters: Floats) -> float | None:
    """Share of the test examples of other classes that the trigger turns into the target; None without one."""
    if not isinstance(attack, ScalingBackdoor):
        return None
    others = world.test.x[world.test.y != attack.target]
    found = world.network.predicted(parameters, flat(attack.triggered(others, world.setting)))
    return round(float((found == attack.target).mean()), 6)
