"""Distributed descent in which every device sends one gradient per round: the setting of most robustness papers.

The devices' gradients are numpy's (`grid.training.Network`), attacks, rules and server optimizer those of live rounds:
`engine.step` screens, judges and applies, as in `covey grid`. Thousands of rounds a minute, which no process of TFF's
manages; the engine's own tests hold rule and optimizer against TFF's.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import rule_from_table
from covey_coordinator.aggregation.rules import LOSSES, Rule, Trusted
from covey_coordinator.attacks.contract import Attack
from covey_coordinator.attacks.registry import make_attack
from covey_coordinator.grid.settings import GridSettings
from covey_coordinator.grid.simulation import (
    NONE,
    OWN_BATCHES,
    Attackers,
    Fleet,
    OwnData,
    World,
    backdoor_success,
    corrupted_devices,
    flat,
    stream,
)
from covey_coordinator.grid.training import Floats, Integers, Network
from covey_coordinator.reproduce import data
from covey_coordinator.reproduce.contract import Outcome
from covey_coordinator.simulation.trusted_data import TrustedSettings, parted
from covey_models import partitions
from covey_models.datasets import Dataset
from covey_protocol.errors import ConfigError, RuleError
from covey_protocol.parameters import ParameterSpec

ENGINE = (
    "one gradient per round in numpy; engine.step of live rounds for screening, rule and optimizer (no TFF process)"
)
INITIAL, SHARES = 11, 12  # streams of random numbers of one seed, beside those of the grid's simulation


class Descent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run. hidden: widths of the hidden layers (ReLU). devices: all, of which `hostile` attack.

    rule: as in TOML; its num_byzantine is what it is told. attack: with the key `attack`, other keys are its settings.
    partition: "iid"; "biased", `bias` the share of each class that goes to the devices of its group (Fang et al. 2020);
    "similar", `bias` the share of all examples dealt out at random, the others by class (ByzFL). momentum: of each
    device. server: the server's optimizer with `learning_rate`. measured: rounds between measurements on the test set.
    standardised: inputs minus mean over standard deviation of all training inputs. trusted: so many training examples
    are the coordinator's and no device's, drawn as `[trusted]` of an experiment draws, with `trusted_bias` its bias.
    """

    data: str
    hidden: tuple[int, ...]
    devices: int
    hostile: int
    rule: dict[str, Any]
    attack: dict[str, Any]
    batch: int
    rounds: int
    learning_rate: float
    server: str = "sgd"
    momentum: float = 0.0
    partition: str = "iid"
    bias: float = 0.0
    measured: int = 10
    standardised: bool = False
    trusted: int = 0
    trusted_bias: float = 0.0


def settings_of(**settings: Any) -> dict[str, Any]:
    """A case's settings as plain JSON values, defaults written out. TypeError for an unknown one."""
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(Descent(**settings)))
    return plain


@functools.lru_cache(maxsize=2)
def world_of(
    name: str,
    hidden: tuple[int, ...],
    devices: int,
    partition: str,
    bias: float,
    standardised: bool,
    seed: int,
    folder: Path | None,
    trusted: int = 0,
    trusted_bias: float = 0.0,
) -> World:
    train, test = data.spambase(folder, seed) if name == "spambase" else data.mnist(folder)
    if standardised:
        train, test = _standardised(train, test)
    own, train = parted(train, TrustedSettings(trusted, trusted_bias), seed)
    shards = shares_of(partition, train.y, devices, bias, seed)
    specs, initial = dense_layers((int(np.prod(train.input_shape)), *hidden, train.num_classes), seed)
    return World(train, test, shards, Network(specs), specs, initial, own)


def _standardised(train: Dataset, test: Dataset) -> tuple[Dataset, Dataset]:
    mean, deviation = float(train.x.mean(dtype=np.float64)), float(train.x.std(dtype=np.float64))
    low, high = ((bound - mean) / deviation for bound in train.input_range)

    def changed(one: Dataset) -> Dataset:
        x = (one.x - np.float32(mean)) / np.float32(deviation)
        return dataclasses.replace(one, x=x, input_range=(low, high))

    return changed(train), changed(test)


def dense_layers(widths: tuple[int, ...], seed: int) -> tuple[list[ParameterSpec], Floats]:
    """Specs and first weights: Glorot-uniform kernels and zero biases."""
    random, specs, tensors = stream(seed, INITIAL), [], []
    for number, (ins, outs) in enumerate(zip(widths, widths[1:])):
        bound = np.sqrt(6 / (ins + outs))
        specs += [ParameterSpec(f"dense_{number}/kernel", (ins, outs)), ParameterSpec(f"dense_{number}/bias", (outs,))]
        tensors += [random.uniform(-bound, bound, ins * outs), np.zeros(outs)]
    return specs, np.concatenate(tensors).astype(np.float32)


def shares_of(partition: str, y: Any, devices: int, bias: float, seed: int) -> list[Integers]:
    if partition == "iid":
        return partitions.iid(y, devices, seed)
    if partition == "biased":
        return biased_shares(y, devices, bias, seed)
    if partition == "similar":
        return similar_shares(y, devices, bias, seed)
    raise ConfigError(f"there is no partition {partition!r} here", "take iid, biased or similar")


def similar_shares(y: Any, devices: int, similarity: float, seed: int) -> list[Integers]:
    """A random share `similarity` dealt out evenly, the rest sorted by class and cut in consecutive pieces (ByzFL)."""
    order = stream(seed, SHARES).permutation(len(y))
    alike = round(similarity * len(y))
    rest = order[alike:]
    by_class = rest[np.argsort(y[rest], kind="stable")]
    pairs = zip(np.array_split(order[:alike], devices), np.array_split(by_class, devices))
    return [np.sort(np.concatenate(pair)) for pair in pairs]


def biased_shares(y: Any, devices: int, bias: float, seed: int) -> list[Integers]:
    """Devices in as many groups as classes; an example of class l goes to group l with probability bias.

    Else it goes to any other group alike, and within a group to any device alike. bias = 1 / classes is IID.
    Source: Fang et al. 2020 (arXiv:1911.11815), section 5.1, also in FLTrust.
    """
    random, classes = stream(seed, SHARES), int(y.max()) + 1
    if devices < classes:
        raise ConfigError(f"{devices} devices for {classes} groups", "take at least as many devices as classes")
    others = (y + random.integers(1, classes, len(y))) % classes
    group = np.where(random.random(len(y)) < bias, y, others)
    sizes = np.array([len(range(number, devices, classes)) for number in range(classes)])
    device = group + classes * (random.random(len(y)) * sizes[group]).astype(np.int64)
    return [np.flatnonzero(device == number) for number in range(devices)]


class OwnGradients(OwnData):
    """The coordinator's change is minus its gradient on one batch of its own examples, as every device's is."""

    def given(self, needs: str, parameters: Floats, number: int) -> Trusted:
        if needs == LOSSES:
            return super().given(needs, parameters, number)
        rows = stream(self._seed, OWN_BATCHES, number).integers(0, len(self._y), (1, self._settings.batch))
        return Trusted(-self._network.gradients(parameters, self._x[rows], self._y[rows])[0])


class GradientFleet(Fleet):
    """Every device's change is minus its gradient on one batch, drawn with replacement from its own examples."""

    def change(self, parameters: Floats, rows: Integers) -> Floats:
        return -self._world.network.gradients(parameters, self._x[rows[0]], self._y[rows[0]])


def run(
    settings: dict[str, Any],
    seed: int,
    folder: Path | None,
    watch: Callable[[int, Floats], None] | None = None,
    aggregate: Callable[[Floats], Floats] | None = None,
    rule: Rule | None = None,
) -> Outcome:
    """curve: [round, accuracy on the test set]; last, best: of it. backdoor: how often a trigger works, or None.

    watch: called with every round's number and updates (n, d). aggregate: another library's rule, updates -> (d,), in
    place of the engine; the server then takes plain steps. rule: one that the registry does not have, in place of the
    settings'.
    """
    started = time.process_time()
    descent = msgspec.convert(settings, Descent)
    shape = (descent.data, descent.hidden, descent.devices, descent.partition, descent.bias, descent.standardised)
    world = world_of(*shape, seed, folder, descent.trusted, descent.trusted_bias)
    with np.errstate(all="ignore"):  # attacked models overflow; the engine refuses what is not finite
        one = _Run(descent, world, seed, rule or rule_from_table(descent.rule), watch, aggregate)
        for number in range(descent.rounds):
            one.round(number)
    accuracies = [accuracy for _, accuracy in one.curve]
    return {
        "curve": one.curve,
        "last": accuracies[-1],
        "best": max(accuracies),
        "backdoor": backdoor_success(world, one.attack, one.parameters),
        "rounds_refused": one.rounds_refused,
        "last_refusal": one.last_refusal,
        "seconds": round(time.process_time() - started, 2),
    }


class _Run:
    def __init__(self, descent: Descent, world: World, seed: int, rule: Rule, watch: Any, aggregate: Any) -> None:
        self._descent, self._world, self._watch, self._aggregate = descent, world, watch, aggregate
        table = dict(descent.attack)
        self.attack: Attack = make_attack(table.pop("attack"), **table)
        self._hostile = corrupted_devices(descent.devices, descent.hostile, seed)
        fleet = GridSettings(devices=descent.devices, steps=1, batch=descent.batch, momentum=descent.momentum)
        self._fleet = GradientFleet(world, fleet, self.attack, self._hostile, seed)
        self._needs = rule.needs_trusted
        self._own = (
            OwnGradients(world, world.trusted, fleet, seed) if world.trusted is not None and self._needs else None
        )
        self._engine = make_engine("direct", rule, world.specs, descent.server, descent.learning_rate)
        self._attackers = Attackers(self.attack, self._hostile, self._fleet.sizes, rule, self._engine, seed)
        self.parameters = world.initial
        self._ids = [f"device-{number:04d}" for number in range(descent.devices)]  # sorts as it counts
        self._equal = np.ones(descent.devices, np.float32)  # every gradient counts alike, as in the papers
        self._test_x = flat(world.test.x)
        self.curve: list[list[float]] = [[0, self._accuracy()]]
        self.rounds_refused, self.last_refusal = 0, ""

    def round(self, number: int) -> None:
        """One round; a refused one leaves the model as it was, as in live rounds."""
        updates = self._fleet.updates(self.parameters, number)
        trusted = NONE if self._own is None else self._own.given(self._needs, self.parameters, number)
        if len(self._hostile):
            updates[self._hostile] = self._attackers.crafted(updates, self.parameters, number, trusted)
        if self._watch is not None:
            self._watch(number, updates)
        if self._aggregate is not None:
            rate = np.float32(self._descent.learning_rate)
            self.parameters = self.parameters + rate * self._aggregate(updates)
        else:
            self._step(updates, trusted)
        done = number + 1
        if done % self._descent.measured == 0 or done == self._descent.rounds:
            self.curve.append([done, self._accuracy()])

    def _step(self, updates: Floats, trusted: Trusted) -> None:
        try:
            self.parameters = self._engine.step(self.parameters, updates, self._equal, self._ids, trusted).parameters
        except RuleError as error:
            self.rounds_refused += 1
            self.last_refusal = str(error)

    def _accuracy(self) -> float:
        found = self._world.network.predicted(self.parameters, self._test_x)
        return round(float((found == self._world.test.y).mean()), 6)
