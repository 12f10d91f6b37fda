"""What one cell is about: data, devices, who of them is corrupted, the rule, the attack, and every round's cohort.

Everything here follows from the cell alone; data come from datasets by name or path. `learning_of` builds the model
and needs TensorFlow, nothing else here does. The seed gives the split, the partition, who is corrupted, the cohorts,
the batches and the model's first weights, so cells of one seed differ in nothing but what is varied.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np

from covey_coordinator.aggregation.rules import Rule
from covey_coordinator.attacks.contract import Attack, DataSetting
from covey_coordinator.coding.conditions import check_equal_updates, check_replicas
from covey_coordinator.eligibility import sampled
from covey_coordinator.grid.simulation import POISON, corrupted_devices, stream
from covey_coordinator.records import Array
from covey_coordinator.simulation import emnist
from covey_coordinator.simulation.learning import CentralPrivacy, DeviceData, Learning, Privacy
from covey_coordinator.simulation.settings import DataSettings, ExperimentSettings, is_user_code
from covey_coordinator.simulation.sweep import Cell
from covey_coordinator.simulation.trusted_data import TrustedSettings, parted
from covey_models import population
from covey_models.datasets import Dataset
from covey_models.user_code import UserCode
from covey_protocol.errors import CoveyError, RuleError
from covey_protocol.messages import TrainingPlan
from covey_protocol.topics import RESERVED_ID
from covey_protocol.works import SCAFFOLD

DEFAULT_DATA = "digits"


class People(NamedTuple):
    """The data of a seed: the central test data, and the devices with what they train on. parts: rows of train.

    trusted: the coordinator's, none of which is in train.
    """

    train: Dataset
    test: Dataset
    devices: list[DeviceData]
    parts: list[Array]
    trusted: Dataset | None


@dataclass(frozen=True)
class World:
    """devices: with their data as they train on them, faults and attacks among `faults`. hostile: numbers of devices
    that attack. rule: with the num_byzantine it is told.
    """

    cell: Cell
    train: Dataset
    test: Dataset
    devices: list[DeviceData]
    parts: list[Array]
    attack: Attack | None
    hostile: tuple[int, ...]
    rule: Rule
    trusted: Dataset | None = None

    @property
    def settings(self) -> ExperimentSettings:
        return self.cell.settings

    def cohort(self, number: int) -> list[int]:
        """Sorted numbers of the devices of round `number`."""
        return cohort_of(self.settings, self.cell.seed, number)

    @property
    def faults(self) -> dict[str, tuple[str, ...]]:
        return {device.device_id: device.faults for device in self.devices}

    @property
    def counts(self) -> dict[str, tuple[int, ...]]:
        classes = self.train.num_classes
        return {device.device_id: tuple(np.bincount(device.y, minlength=classes).tolist()) for device in self.devices}


def world_of(cell: Cell) -> World:
    """Raises ConfigError, DataError or RuleError, naming the cell, for what cannot work."""
    try:
        return _world(cell)
    except CoveyError as exc:
        raise type(exc)(f"{cell.said}: {exc.what}", exc.remedy) from exc


def _world(cell: Cell) -> World:
    settings = cell.settings
    people = _people(people_key(cell))
    spec = settings.attack_spec()
    hostile = tuple(corrupted_devices(settings.devices, settings.num_hostile, cell.seed).tolist())
    devices = list(people.devices)
    for number in hostile:
        devices[number] = _attacking(devices[number], number, spec.attack, spec.label, people.train, cell.seed)
    corrupted = {number for number, device in enumerate(devices) if device.faults}
    most = max(len(corrupted.intersection(cohort)) for cohort in _cohorts(settings, cell.seed))
    rule = settings.rule_spec().made(most).for_fleet(population.device_ids(settings.devices))
    rule.check(settings.cohort_size)
    check_replicas(rule, devices)
    check_equal_updates(rule, _unequal(settings))
    for number, cohort in enumerate(_cohorts(settings, cell.seed), 1):
        _check_honest(number, cohort, hostile)
    attack = spec.attack if hostile else None
    return World(cell, people.train, people.test, devices, people.parts, attack, hostile, rule, people.trusted)


def _unequal(settings: ExperimentSettings) -> dict[str, tuple[Any, str]]:
    privacy, training = settings.privacy, settings.training
    return {
        "sample": (settings.sample, "a group needs its devices in every round"),
        "privacy.noise_multiplier": (privacy.noise_multiplier, "a noised update equals nobody's"),
        "training.algorithm": (training.algorithm == SCAFFOLD and SCAFFOLD, "controls differ once a device is missing"),
    }


def cohort_of(settings: ExperimentSettings, seed: int, number: int) -> list[int]:
    """Drawn as a live round's sample; the same in all cells of a seed that have as many devices."""
    if not settings.sample:
        return list(range(settings.devices))
    return list(_drawn(settings.devices, settings.sample, seed, settings.name, number))


@functools.lru_cache(
    maxsize=2000
)  # every round is asked for when a cell is checked and when it runs; a draw hashes all
def _drawn(devices: int, sample: int, seed: int, name: str, number: int) -> tuple[int, ...]:
    ids = population.device_ids(devices)
    numbers = {device_id: place for place, device_id in enumerate(ids)}
    return tuple(numbers[one] for one in sampled(ids, sample, seed, name, number, 0))


def _cohorts(settings: ExperimentSettings, seed: int) -> list[list[int]]:
    """All rounds', or one that stands for them where every device is always there."""
    rounds = settings.rounds if settings.sample else 1
    return [cohort_of(settings, seed, number) for number in range(1, rounds + 1)]


def people_key(cell: Cell) -> bytes:
    """The same for cells whose devices hold the same data."""
    settings = cell.settings
    devices = [settings.devices, settings.partition, settings.corruption]
    return msgspec.json.encode([settings.data, *devices, settings.trusted, cell.seed, cell.data_dir])


@functools.lru_cache(maxsize=1)
def _people(key: bytes) -> People:
    """Kept for the next cell, which mostly asks for the same."""
    data, devices, partition, corruptions, asked, seed, data_dir = msgspec.json.decode(key)
    told = msgspec.convert(data, DataSettings)
    train, test = emnist.load_split(
        told.path or told.set or DEFAULT_DATA, data_dir, test_fraction=told.test_fraction, seed=seed, **told.reading()
    )
    trusted, train = parted(train, msgspec.convert(asked, TrustedSettings), seed, data_dir)
    found = population.populate(train, devices=devices, partition=partition, corruptions=corruptions, seed=seed)
    return People(train, test, found.devices, found.parts, trusted)


def _attacking(device: DeviceData, number: int, attack: Attack, label: str, train: Dataset, seed: int) -> DeviceData:
    """A device that attacks; its data are poisoned where the attack does that."""
    x, y = device.x, device.y
    if attack.poisons_data:
        setting = DataSetting(train.num_classes, train.input_range)
        x, y = attack.poison(x, y, setting, stream(seed, POISON, number))
    return device._replace(x=x, y=y, faults=(*device.faults, label))


def _check_honest(number: int, cohort: list[int], hostile: tuple[int, ...]) -> None:
    if set(cohort) <= set(hostile):
        raise RuleError(f"all {len(cohort)} devices of round {number} attack", "raise sample, or lower attack.fraction")


# ---- what needs TensorFlow


def learning_of(world: World) -> Learning:
    """What `Simulation` learns: the model, the plan, the rule, the attack."""
    settings, cell = world.settings, world.cell
    training, model, code = settings.training, settings.model, UserCode()
    return Learning(
        model=model_of(world, code),
        plan=TrainingPlan(
            epochs=training.epochs,
            learning_rate=training.learning_rate,
            gradient_clip_norm=training.gradient_clip_norm,
            proximal_weight=training.proximal_weight,
            steps=training.local_steps,
        ),
        rule=world.rule,
        batch_size=model.batch,
        loss=code.function(model.loss) if is_user_code(model.loss) else model.loss,
        optimizer=code.built(model.optimizer) if is_user_code(model.optimizer) else model.optimizer,
        moving_statistics=model.moving_statistics,
        algorithm=training.algorithm,
        feature_scaling=training.feature_scaling,
        attack=world.attack,
        hostile=world.hostile,
        server_optimizer=settings.server.optimizer,
        server_learning_rate=settings.server.learning_rate,
        privacy=_privacy(settings),
        seed=cell.seed,
        trusted=DeviceData(RESERVED_ID, world.trusted.x, world.trusted.y) if world.trusted is not None else None,
    )


def model_of(world: World, code: UserCode) -> Any:
    """With first weights of the seed, also where the user's function draws them from Keras's global generator."""
    from covey_models import zoo

    name, train, seed = world.settings.model.name, world.train, world.cell.seed
    if not is_user_code(name):
        return zoo.build(name or zoo.default_for(train.input_shape), train.input_shape, train.num_classes, seed)
    import tensorflow as tf

    tf.keras.utils.set_random_seed(seed)
    return code.built(name)


def _privacy(settings: ExperimentSettings) -> Privacy | CentralPrivacy | None:
    privacy = settings.privacy
    if not privacy.clip_norm:
        return None
    if privacy.by == "device":
        return Privacy(privacy.clip_norm, privacy.noise_multiplier)
    return CentralPrivacy(
        privacy.clip_norm,
        privacy.noise_multiplier,
        devices_per_round=settings.cohort_size,
        rounds=settings.rounds,
        sampling_rate=settings.cohort_size / settings.devices,
        delta=privacy.delta,
    )
