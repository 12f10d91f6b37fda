"""DRACO (Chen et al. 2018): with coded redundancy training under attack is training without it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.coding.cyclic import decode
from covey_coordinator.grid.simulation import flat, stream
from covey_coordinator.grid.training import Floats
from covey_coordinator.reproduce import descent
from covey_coordinator.reproduce.contract import Case, Claim, Measured, Outcome, Reproduction
from covey_coordinator.reproduce.pictures import Panel, curves
from covey_protocol.coding import CyclicCode
from covey_protocol.errors import RuleError

LIARS, BATCHES = 31, 32  # streams of random numbers of one seed
ATTACKS = ("no attack", "reversed", "constant")
CODES = ("repetition", "cyclic")
SIZE = 100.0  # the paper's: liars send -100 times what they should, or -100 in every number
SAME = 0.02  # of accuracy, between runs of different arithmetic


class Descent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run. by: a rule's name, or one of CODES. s: how many devices of each round lie, as `attack` says."""

    by: str
    attack: str
    devices: int
    s: int
    rounds: int
    batch: int = 4
    learning_rate: float = 0.1
    hidden: tuple[int, ...] = (100,)
    measured: int = 10


def lied(row: Any, attack: str) -> Any:
    return -SIZE * row if attack == "reversed" else np.full_like(row, -SIZE)


class _Run:
    def __init__(self, settings: Descent, seed: int, folder: Path | None) -> None:
        self._settings, self._seed = settings, seed
        shape = "mnist", settings.hidden, settings.devices, "iid", 0.0, False
        self._world = descent.world_of(*shape, trusted=0, trusted_bias=0.0, seed=seed, folder=folder)
        self.parameters = self._world.initial
        self._code = CyclicCode(settings.devices, settings.s)
        self._ids = [f"device-{number:04d}" for number in range(settings.devices)]
        rule = make_rule("draco", settings.s).for_fleet(self._ids) if settings.by == "repetition" else None
        rule = rule or make_rule("mean" if settings.by == "cyclic" else settings.by, 0)
        ids = self._ids if settings.by == "repetition" else ()
        self._engine = make_engine("direct", rule, self._world.specs, "sgd", settings.learning_rate, device_ids=ids)
        self._x = flat(self._world.train.x)
        self.seconds: list[float] = []
        self.refused = 0

    def round(self, number: int) -> None:
        told = self._settings
        shards, draw = self._gradients(number), stream(self._seed, LIARS, number)
        rows = self._rows(shards)
        if told.attack != "no attack":
            for liar in draw.permutation(told.devices)[: told.s]:
                rows[liar] = lied(rows[liar], told.attack)
        started = time.perf_counter()
        try:
            self.parameters = self._step(rows, draw)
        except RuleError:
            self.refused += 1
        self.seconds.append(time.perf_counter() - started)

    def accuracy(self) -> float:
        test = self._world.test
        return round(float((self._world.network.predicted(self.parameters, flat(test.x)) == test.y).mean()), 6)

    def _gradients(self, number: int) -> Floats:
        """(devices, d) float32: minus the gradient of one batch of each shard; as many shards as devices."""
        batches = [
            rows[stream(self._seed, BATCHES, number, shard).integers(len(rows), size=self._settings.batch)]
            for shard, rows in enumerate(self._world.shards)
        ]
        x, y = self._x[np.stack(batches)], self._world.train.y[np.stack(batches)]
        return -self._world.network.gradients(self.parameters, x, y)

    def _rows(self, shards: Floats) -> Any:
        """What honest devices send. Those of a group, or of a support, compute the same: each shard is done once."""
        told, load = self._settings, self._code.load
        if told.by == "repetition":
            means = shards.reshape(-1, load, shards.shape[1]).mean(axis=1)
            return np.repeat(means, load, axis=0)
        if told.by == "cyclic":
            return np.stack([self._code.encode(shards[self._code.shards(device)]) for device in range(told.devices)])
        return shards

    def _step(self, rows: Any, draw: np.random.Generator) -> Floats:
        told = self._settings
        if told.by != "cyclic":
            return self._engine.step(self.parameters, rows, np.ones(len(rows), np.float32), self._ids).parameters
        mean = decode(self._code, rows, draw).total / told.devices
        return np.asarray(self.parameters + np.float32(told.learning_rate) * mean.astype(np.float32))


def run(settings: dict[str, Any], seed: int, folder: Path | None) -> Outcome:
    """curve: [round, accuracy]; last of it. bits: a hash of the last model. aggregation_ms: the median round's."""
    told = msgspec.convert(settings, Descent)
    one = _Run(told, seed, folder)
    curve: list[list[float]] = [[0, one.accuracy()]]
    with np.errstate(all="ignore"):  # attacked models overflow; the engine refuses what is not finite
        for number in range(1, told.rounds + 1):
            one.round(number)
            if number % told.measured == 0 or number == told.rounds:
                curve.append([number, one.accuracy()])
    return {
        "curve": curve,
        "last": curve[-1][1],
        "bits": hashlib.sha256(one.parameters.tobytes()).hexdigest(),
        "rounds_refused": one.refused,
        "aggregation_ms": round(1e3 * float(np.median(one.seconds)), 3),
    }


class Shape(NamedTuple):
    """s: liars, of the rules and of each code; the repetition code needs 2s + 1 to divide the devices."""

    devices: int
    s: int
    repetition: int
    rounds: int


QUICK, FULL = Shape(15, 2, 2, 80), Shape(45, 5, 4, 300)


def cases(quick: bool) -> Sequence[Case]:
    shape = QUICK if quick else FULL
    found = []
    for by in ("mean", "geometric-median", *CODES):
        s = shape.repetition if by == "repetition" else shape.s
        for attack in ATTACKS:
            settings = msgspec.json.decode(msgspec.json.encode(Descent(by, attack, shape.devices, s, shape.rounds)))
            found.append(Case(f"{by}, {attack}", settings))
    return found


def figure(cases: Sequence[Case], measured: Measured) -> bytes:
    panels = [Panel(attack, [case.label for case in cases if case.label.endswith(attack)]) for attack in ATTACKS]
    return curves(panels, measured, up="accuracy on the test set", limits=(0.0, 1.0))


def found(measured: Measured) -> str:
    """Whose last models are equal, and what aggregation took."""

    def bits(label: str) -> list[str]:
        return [outcome["bits"] for outcome in measured.outcomes[label]]

    equal = [
        f"{code}, {attack}: {sum(a == b for a, b in zip(bits(f'{code}, {attack}'), bits(f'{code}, no attack')))} of "
        f"{measured.seeds} last models have the bits of the run without attack"
        for code in CODES
        for attack in ATTACKS[1:]
    ]
    times = [
        f"{by} {np.mean([one['aggregation_ms'] for one in measured.outcomes[f'{by}, reversed']]):.3g} ms"
        for by in ("mean", "geometric-median", *CODES)
    ]
    return f"{'; '.join(equal)}. Median aggregation of a round under reversed gradients: {', '.join(times)}."


def holds_as_without(values: Any, by: str, within: float) -> bool:
    return all(abs(values[f"{by}, {attack}"] - values[f"{by}, no attack"]) <= within for attack in ATTACKS[1:])


DRACO = Reproduction(
    name="draco",
    title="MNIST: coded redundancy trains under attack as without one",
    paper="Chen, Wang, Charles, Papailiopoulos 2018, DRACO (arXiv:1803.09877)",
    source="section 5 in words: DRACO trains as if there were no attack, the mean diverges; no numbers were taken over",
    engine=descent.ENGINE,
    measure="accuracy on the test set after the last round (full 300, quick 80)",
    protocol=(
        "As many IID shards of MNIST as devices; every round a gradient of a batch of 4 of each shard; a net of "
        "784-100-10 with ReLU; learning rate 0.1, plain sgd.",
        "Full: 45 devices, 5 of them liars, drawn anew every round (repetition: 4, as 2s + 1 must divide 45). Quick: "
        "15 devices, 2 liars.",
        "Liars send -100 times what they should (reversed), or -100 in every number (constant).",
        "Repetition: the 2s + 1 devices of a group send the mean of the group's shards, and the rule draco votes. "
        "Cyclic: every device sends the combination of its 2s + 1 shards, which is decoded.",
    ),
    deviations=(
        "The paper trains for wall-clock time on 45 machines, LeNet, ResNet-18 and a text model too; here only the "
        "model counts, and each shard's gradient is computed once and handed to all its devices.",
        "The cyclic code is conditioned otherwise (covey_protocol.coding) and its decoder is ours.",
    ),
    full_time="full form: 36 runs; not measured as a whole",
    cases=cases,
    claims=(
        Claim(
            "Both attacks ruin the mean (accuracy below 0.5)",
            lambda v: max(v["mean, reversed"], v["mean, constant"]) < 0.5,
        ),
        Claim(
            "The repetition code under attack ends exactly where it ends without",
            lambda v: holds_as_without(v, "repetition", 0.0),
        ),
        Claim(
            "The cyclic code under attack ends where it ends without (to 0.02)",
            lambda v: holds_as_without(v, "cyclic", SAME),
        ),
        Claim(
            "Without attack both codes train as the plain mean (to 0.02)",
            lambda v: all(abs(v[f"{code}, no attack"] - v["mean, no attack"]) <= SAME for code in CODES),
        ),
        Claim(
            "Under attack the codes are at least as accurate as the geometric median",
            lambda v: all(
                v[f"{code}, {attack}"] >= v[f"geometric-median, {attack}"] for code in CODES for attack in ATTACKS[1:]
            ),
        ),
    ),
    run=run,
    value=lambda outcome: float(outcome["last"]),
    figure=figure,
    found=found,
    needs=("mnist.npz",),
)
