"""Most devices of a fleet are wrong: what aggregation rules, trusted data and machine teaching make of it.

    .venv/bin/python benchmarks/corrupted_majority.py [--desk] [--seeds 3] [--picture FILE] [--json FILE] [--quick]

Ten devices share handwritten digits, seven of them are corrupted: every label l is 9 - l, or every pixel has noise, or
70 % of the pixels are hidden. The coordinator has 50 trusted images that no device has. Everybody trains the same
model, softmax regression, so that methods differ and nothing else does:

  mean, median, Multi-Krum   20 rounds of 2 epochs. Multi-Krum is told 3, the most it bears of ten
  FLTrust                    the same, with the coordinator's own update from its 50 images
  CoMT                       30 rounds of machine teaching; constants chosen from 4 as `covey teach` does it, by cutting
                             the trusted images in three, with the same arithmetic in numpy
  trusted-only, same plan    the coordinator's own updates in 20 rounds, no device
  trusted-only, tuned        a model of the 50 images, its regularisation chosen by cutting them in three: no fleet at
                             all, what every other method has to beat

Without --desk all of it happens: ten agents, each a process with its own data, that train the exported bundle with a
TFLite runtime; a real Mosquitto; a coordinator that takes sealed updates and trains on its own data in a child. --desk
computes the same in numpy in this process, for more seeds (batches drawn with replacement instead of in epochs; CoMT is
the same arithmetic). Prints a table of accuracies on 360 other images, means over the seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from covey_coordinator.libraries import prepare

prepare()

import numpy as np
from fleet import start_mosquitto

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.rules import UPDATE, Rule, Trusted
from covey_coordinator.algorithms.comt import Teaching
from covey_coordinator.algorithms.engines import asked_by
from covey_coordinator.algorithms.making import make_algorithm_engine
from covey_coordinator.algorithms.settings import Algorithm
from covey_coordinator.algorithms.teaching_settings import own_teacher
from covey_coordinator.coordinator import NO_TRAINING, Coordinator, OwnTraining
from covey_coordinator.grid.training import Network
from covey_coordinator.simulation.as_fleet import TIMING
from covey_coordinator.simulation.local_fleet import LocalFleet
from covey_coordinator.simulation.trusted_data import TrustedSettings, parted
from covey_coordinator.teach.comparing import tuned
from covey_coordinator.teach.data import Examples, Work
from covey_coordinator.teach.methods import CONTESTANTS, as_data, learned
from covey_coordinator.teaching.reference import comt
from covey_coordinator.teaching.tuning import balanced
from covey_coordinator.trusted_training import TrustedSettings as OwnFile
from covey_coordinator.trusted_training import TrustedTraining
from covey_models import export, populate
from covey_models.datasets import Dataset, load_split
from covey_protocol.bundle import read_bundle
from covey_protocol.messages import TeachingPlan, TrainingPlan
from covey_protocol.parameters import ParameterSpec
from covey_protocol.teaching import LOGISTIC, Problem, Settings

DEVICES, CORRUPTED, TRUSTED = 10, 0.7, 50
ROUNDS, EPOCHS, RATE, BATCH, TEACHING_ROUNDS = 20, 2, 0.5, 16, 30
TRIES = 4  # of tuning CoMT
PIXELS, CLASSES = 64, 10
CONDITIONS: dict[str, dict[str, Any]] = {
    "flipped labels": {"kind": "flip-labels"},
    "noise": {"kind": "sensor-noise", "std": 1.0, "bias": 0.5},
    "hidden pixels": {"kind": "hidden-attributes", "attribute_share": 0.7, "fill": "zero"},
    "nobody is wrong": {},
}
RULES = {
    "mean": make_rule("mean"),
    "median": make_rule("median", 4),
    "Multi-Krum": make_rule("multi-krum", 3),
    "FLTrust": make_rule("fltrust"),
    "trusted-only, same plan": make_rule("trusted-only"),
}
TEACHING, TUNED = "CoMT", "trusted-only, tuned"
METHODS = (*RULES, TEACHING, TUNED)
SPECS = [ParameterSpec("dense/kernel", (PIXELS, CLASSES)), ParameterSpec("dense/bias", (CLASSES,))]
COLOURS = ("#000000", "#666666", "#b8860b", "#0072b2", "#56a0d8", "#d55e00", "#009e73")


class World(NamedTuple):
    """devices: what `populate` made. trusted: the coordinator's. test: nobody's."""

    devices: Sequence[Any]
    trusted: Dataset
    test: Dataset

    @property
    def work(self) -> Work:
        """The same, as `covey teach` has it: for tuning on the trusted images."""
        every = Examples(*_joined([examples(device.x, device.y) for device in self.devices]))
        sizes = np.cumsum([len(device.y) for device in self.devices])
        parts = tuple(np.split(np.arange(sizes[-1]), sizes[:-1]))
        names = tuple(str(number) for number in range(CLASSES))
        return Work("digits", LOGISTIC, names, every, examples(self.trusted.x, self.trusted.y), parts)

    def accuracy(self, theta: Any) -> float:
        """theta: (d,), or (F + 1, C) with the bias last."""
        scores = examples(self.test.x, self.test.y).features @ np.asarray(theta).reshape(PIXELS + 1, CLASSES)
        return float(np.mean(scores.argmax(axis=1) == self.test.y))


def examples(x: Any, y: Any) -> Examples:
    flat = np.asarray(x, np.float64).reshape(len(y), -1)
    return Examples(x, np.concatenate([flat, np.ones((len(y), 1))], axis=1), y)


def _joined(parts: Sequence[Examples]) -> list[Any]:
    return [np.concatenate([getattr(part, name) for part in parts]) for name in ("x", "features", "y")]


def world_of(condition: str, seed: int) -> World:
    train, test = load_split("digits", seed=seed)
    trusted, left = parted(train, TrustedSettings(TRUSTED), seed)
    assert trusted is not None
    table = CONDITIONS[condition]
    wrong = [{**table, "fraction": CORRUPTED}] if table else []
    devices = populate(left, devices=DEVICES, partition={"kind": "iid"}, corruptions=wrong, seed=seed).devices
    return World(devices, trusted, test)


def tuned_alone(world: World, seed: int) -> float:
    work, one = world.work, CONTESTANTS["trusted-only"]
    return world.accuracy(learned(work, work.trusted, tuned(work, one, [], work.trusted, seed, 0)))


def teaching_settings(work: Work, parts: list[Examples], seed: int) -> Settings:
    """As `covey teach` tunes them, with few tries."""
    told: Settings = tuned(work, CONTESTANTS["teaching"], parts, work.trusted, seed, TRIES)
    return balanced(Problem(LOGISTIC), *as_data(work, parts, work.trusted), told)


# ---- at the desk


def at_the_desk(method: str, world: World, seed: int, rounds: int) -> float:
    if method == TEACHING:
        work = world.work
        parts = [work.data.take(rows) for rows in work.parts]
        told = dataclasses.replace(teaching_settings(work, parts, seed), rounds=rounds, tolerance=0.0)
        return world.accuracy(comt(*as_data(work, parts, work.trusted), Problem(LOGISTIC), told).theta)
    rule, network = RULES[method], Network(SPECS)
    engine = make_engine("direct", rule, SPECS)
    parameters = np.zeros(PIXELS * CLASSES + CLASSES, np.float32)
    ids, sizes = [one.device_id for one in world.devices], [len(one.y) for one in world.devices]
    held = [(one.x, one.y) for one in world.devices] + [(world.trusted.x, world.trusted.y)]
    for number in range(rounds):
        updates = [
            _trained(network, parameters, x, y, np.random.default_rng([seed, number, place]))
            for place, (x, y) in enumerate(held)
        ]
        trusted = Trusted(updates[-1]) if rule.needs_trusted == UPDATE else None
        parameters = engine.step(parameters, np.stack(updates[:-1]), sizes, ids, trusted).parameters
    return world.accuracy(parameters)


def _trained(network: Network, parameters: Any, x: Any, y: Any, random: np.random.Generator) -> Any:
    steps = EPOCHS * -(-len(y) // BATCH)
    rows = random.integers(0, len(y), (steps, 1, BATCH))
    flat = np.ascontiguousarray(x.reshape(len(y), -1), np.float32)
    return network.trained(parameters, flat, y, rows, RATE)[0] - parameters


# ---- through real agents


class RealFleet:
    """Agents of one world on a Mosquitto, and their coordinator, for one method after another."""

    def __init__(self, world: World, folder: Path, url: str, stack: contextlib.ExitStack) -> None:
        self._world, self._folder = world, folder
        tables = {"training": {"max_epochs": 100}}
        self._fleet = stack.enter_context(LocalFleet(world.devices, folder, url=url, tables=tables))
        self.bundle = softmax(self._fleet.key)
        self._coordinator: Coordinator = self._fleet.connect()
        self._ids = [one.device_id for one in world.devices]
        np.savez(folder / "trusted.npz", x=world.trusted.x, y=world.trusted.y)

    def run(self, method: str, seed: int, rounds: int) -> float:
        specs = read_bundle(self.bundle).manifest.parameters
        if method == TEACHING:
            return self._taught(specs, seed, rounds)
        rule = RULES[method]
        with contextlib.ExitStack() as stack:
            engine = make_engine("direct", rule, specs, device_ids=self._ids)
            stack.callback(engine.close)
            self._coordinator.own = self._own(rule, stack)
            plan = TrainingPlan(epochs=EPOCHS, learning_rate=RATE)
            return self._rounds(method, engine, lambda work: plan, seed, rounds)

    def _own(self, rule: Rule, stack: contextlib.ExitStack) -> OwnTraining:
        if not rule.needs_trusted:
            return NO_TRAINING
        path, key = self._folder / "trusted.npz", self._fleet.key.public.hex()
        own = TrustedTraining(rule.needs_trusted, OwnFile(str(path)), path, self.bundle, key)
        stack.callback(own.close)
        return own

    def _taught(self, specs: Any, seed: int, rounds: int) -> float:
        work = self._world.work
        parts = [work.data.take(rows) for rows in work.parts]
        told = teaching_settings(work, parts, seed)
        plan = TeachingPlan(
            told.lambda_w, told.lambda_t, told.rho, told.curvature, DEVICES, told.lambda_a, told.lambda_z, told.lambda_y
        )
        teacher = own_teacher(read_bundle(self.bundle), plan, OwnFile("trusted.npz"), self._folder)
        algorithm = Algorithm("comt", teaching=plan)
        engine = make_algorithm_engine(
            algorithm, "direct", make_rule("mean"), specs, rate=RATE, devices=DEVICES,
            teaching=Teaching(plan, own=teacher), device_ids=self._ids,
        )  # fmt: skip
        self._coordinator.own = NO_TRAINING
        base = TrainingPlan(epochs=1, learning_rate=RATE)
        try:
            return self._rounds(TEACHING, engine, lambda work: algorithm.plan(base, work), seed, rounds)
        finally:
            engine.close()

    def _rounds(self, method: str, engine: Any, plan: Callable[[str], TrainingPlan], seed: int, rounds: int) -> float:
        parameters = np.zeros(PIXELS * CLASSES + CLASSES, np.float32)
        name = "".join(letter for letter in method.lower() if letter.isalnum())
        for number in range(1, rounds + 1):
            work, vectors = asked_by(engine)
            result = self._coordinator.run_round(
                run_id=name,
                number=number,
                bundle=self.bundle,
                parameters=parameters,
                plan=plan(work),
                device_ids=self._ids,
                quorum=DEVICES,
                engine=engine,
                timing=TIMING,
                vectors=vectors,
            )
            if result.outcome != "published":
                raise SystemExit(f"{method}, round {number}: {result.reason}")
            parameters = result.parameters
        return self._world.accuracy(parameters)


def softmax(key: Any) -> bytes:
    """One dense layer on the pixels, from zeros: it trains plainly, and can be taught."""
    import tensorflow as tf

    layers = [
        tf.keras.layers.InputLayer((8, 8, 1)),
        tf.keras.layers.Flatten(),
        tf.keras.layers.Dense(CLASSES, kernel_initializer="zeros"),
    ]
    model, loss = tf.keras.Sequential(layers), "sparse_categorical_crossentropy"
    return export(model, name="digits", loss=loss, batch_size=BATCH, input_range=(0.0, 1.0), key=key, teach=True)


@contextlib.contextmanager
def real_fleet(world: World, folder: Path) -> Iterator[RealFleet]:
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        process, port = start_mosquitto(folder)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        yield RealFleet(world, folder / "fleet", f"mqtt://127.0.0.1:{port}", stack)


# ---- all of it


class Result(NamedTuple):
    condition: str
    method: str
    seed: int
    accuracy: float
    seconds: float


def measured(asked: argparse.Namespace, folder: Path) -> Iterator[Result]:
    for condition in asked.conditions:
        for seed in range(asked.seeds):
            world = world_of(condition, seed)
            with (
                contextlib.nullcontext()
                if asked.desk
                else real_fleet(world, folder / f"{seed}-{condition[:5]}") as fleet
            ):
                for method in asked.methods:
                    started = time.monotonic()
                    rounds = asked.rounds or (TEACHING_ROUNDS if method == TEACHING else ROUNDS)
                    if method == TUNED:
                        found = tuned_alone(world, seed)
                    elif fleet is None:
                        found = at_the_desk(method, world, seed, rounds)
                    else:
                        found = fleet.run(method, seed, rounds)
                    yield Result(condition, method, seed, found, time.monotonic() - started)


def table(results: Sequence[Result]) -> list[str]:
    """Mean accuracies in percent, and from least to most where there are several seeds."""
    conditions = list(dict.fromkeys(one.condition for one in results))
    lines = [f"| method | {' | '.join(conditions)} |", "|---" + "|---:" * len(conditions) + "|"]
    for method in [name for name in METHODS if any(one.method == name for one in results)]:
        cells = []
        for condition in conditions:
            values = [100 * one.accuracy for one in results if (one.condition, one.method) == (condition, method)]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def picture(results: Sequence[Result], path: Path, title: str) -> None:
    """Bars of mean accuracies by condition, whiskers from the least to the most of the seeds."""
    from covey_coordinator.reproduce.pictures import new_figure, plain, png

    image, axes = new_figure(1, size=(9.0, 4.0))
    one = axes[0][0]
    conditions = list(dict.fromkeys(result.condition for result in results))
    shown = [(method, colour) for method, colour in zip(METHODS, COLOURS) if any(r.method == method for r in results)]
    for place, (method, colour) in enumerate(shown):
        of = [
            [r.accuracy * 100 for r in results if (r.condition, r.method) == (name, method)] or [np.nan]
            for name in conditions
        ]
        means = np.array([np.mean(values) for values in of])
        whiskers = np.array([[mean - min(values), max(values) - mean] for mean, values in zip(means, of)]).T
        at = np.arange(len(conditions)) + (place - 3) * 0.12
        one.bar(at, means, 0.11, color=colour, label=method, yerr=whiskers, capsize=2, ecolor="#999999")
    one.set_xticks(range(len(conditions)), conditions)
    one.set_ylabel("accuracy, %")
    one.set_ylim(0, 100)
    one.set_title(title, fontsize=9, loc="right")
    one.legend(fontsize=8, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.05))
    plain(one)
    path.write_bytes(png(image))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--desk", action="store_true", help="in numpy, without agents and a broker: seconds a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=0, help="of every method, in place of its own number")
    parser.add_argument("--quick", action="store_true", help="one seed, flipped labels, 3 rounds")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.quick:
        asked.seeds, asked.conditions, asked.rounds = 1, ["flipped labels"], 3
    results = []
    with tempfile.TemporaryDirectory(prefix="covey-majority-") as folder:
        for one in measured(asked, Path(folder)):
            results.append(one)
            told = f"{one.condition}, seed {one.seed}: {one.method} {100 * one.accuracy:.1f}% ({one.seconds:.0f} s)"
            print(told, file=sys.stderr, flush=True)
            if asked.json is not None:
                asked.json.write_text(json.dumps([result._asdict() for result in results], indent=1) + "\n")
    print("\n".join(table(results)))
    if asked.picture is not None:
        how = "numpy" if asked.desk else "real agents on Mosquitto"
        picture(results, asked.picture, f"{how}; {asked.seeds} seed{'s' if asked.seeds > 1 else ''}")


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    main()
