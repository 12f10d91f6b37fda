"""Rounds of simulated federated averaging: ours beside a hand-written loop, TFF's defaults and Flower on Ray.

    python benchmarks/simulation.py [--quick] [--models mlp cnn] [--rounds N] [--setup] [--memory]

50 devices a round, each with 20 batches of 20 examples; "ragged" gives them 381 to 400 examples, so that last batches
are partial. All get the same examples, batches and first weights, and must hold the same model after a round
(`AGREEMENT`). Each contestant is a process of its own and takes turns with ours, round by round, so that a busy machine
slows both alike. Quote the ratios to ours, which are medians over turns, not the seconds. `--setup` makes
.bench/flower with Flower, Ray and TensorFlow (1.5 GB); without it Flower is left out, and that is said. `--memory` also
runs 50 of 100, 1,000 and 10,000 devices and prints what is resident.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from covey_coordinator.libraries import prepare

prepare()

import numpy as np
import psutil
from simulation_contestants import FLOWER_STYLES

HERE = Path(__file__).resolve().parent
FLOWER = HERE.parent / ".bench" / "flower"
FLOWER_NEEDS = ("flwr[simulation]==1.41.0", "tensorflow-cpu")
DEVICES, STEPS, BATCH = 50, 20, 20
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "mlp": [(784, 128), (128,), (128, 10), (10,)],
    "cnn": [(3, 3, 1, 8), (8,), (3, 3, 8, 16), (16,), (7 * 7 * 16, 10), (10,)],
}
# Largest difference of the models after the first round, in lengths of its change. In the CNN's data one ReLU of one
# device sees an input of 3e-8, whose sign is a matter of rounding: it moves the mean of all by 2.3e-4. Batches in
# another order move it by 1.2e-2.
AGREEMENT = {"mlp": 1e-4, "cnn": 1e-3}
TURNS, QUICK_TURNS, WARM_UP = 10, 3, 2
PATIENCE_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--quick", action="store_true", help="the MLP alone, few turns")
    parser.add_argument("--setup", action="store_true", help="make .bench/flower first")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rounds", type=int, help=f"turns per contestant, {TURNS} otherwise")
    asked = parser.parse_args()
    if asked.setup:
        set_up()
    turns = asked.rounds or (QUICK_TURNS if asked.quick else TURNS)
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    for model in ["mlp"] if asked.quick else asked.models:
        for ragged in (False,) if asked.quick else (False, True):
            compare(model, ragged, turns)
    if asked.memory:
        for devices in (100, 1000, 10_000):
            memory(devices)


def set_up() -> None:
    if not (FLOWER / "bin" / "python").exists():
        venv.create(FLOWER, with_pip=True)
    pip = [str(FLOWER / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *FLOWER_NEEDS], check=True)


def compare(model: str, ragged: bool, turns: int) -> None:
    print(f"\n{model}{', ragged last batches' if ragged else ''}: {DEVICES} devices, {STEPS} batches of {BATCH}")
    print(f"  {'':<26}{'s a round':>10}{'covey beside':>14}{'ratio':>8}{'start s':>9}{'first round s':>15}")
    with tempfile.TemporaryDirectory() as folder:
        initial = write_task(Path(folder), model, ragged)
        for name in ("hand", "covey, Multi-Krum", "TFF's defaults"):
            beside(name, sys.executable, Path(folder), initial, turns, AGREEMENT[model])
        if (FLOWER / "bin" / "python").exists():
            for name in FLOWER_STYLES:
                beside(name, str(FLOWER / "bin" / "python"), Path(folder), initial, turns, AGREEMENT[model])
        else:
            print("  Flower is left out: run with --setup once")


def beside(name: str, python: str, folder: Path, initial: list[Any], turns: int, agreement: float) -> None:
    """One contestant and ours, in turns; no other runs meanwhile, since Ray is not idle between rounds."""
    with contextlib.ExitStack() as stack:
        pair = [Contestant("covey", sys.executable, folder), Contestant(name, python, folder)]
        for contestant in pair:
            stack.callback(contestant.stop)
        ours, other = pair
        for contestant in pair:
            contestant.first_s = contestant.round()
        if name != "covey, Multi-Krum":
            check_agreement(name, ours.model(), other.model(), initial, agreement)
        for number in range(WARM_UP - 1 + turns):
            for contestant in pair:
                seconds = contestant.round()
                if number >= WARM_UP - 1:
                    contestant.times.append(seconds)
    medians = statistics.median(other.times), statistics.median(ours.times)
    print(
        f"  {name:<26}{medians[0]:>10.3f}{medians[1]:>14.3f}{ratio(other.times, ours.times):>8.2f}"
        f"{other.start_s:>9.1f}{other.first_s:>15.2f}",
        flush=True,
    )
    if name == "hand":
        print(f"  {'covey':<26}{'':>10}{'':>14}{'':>8}{ours.start_s:>9.1f}{ours.first_s:>15.2f}")


def check_agreement(name: str, ours: list[Any], theirs: list[Any], initial: list[Any], agreement: float) -> None:
    change = np.concatenate([np.ravel(a - b) for a, b in zip(ours, initial)])
    difference = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs))
    if difference > agreement * float(np.linalg.norm(change)):
        sys.exit(f"{name} holds another model after a round: {difference:.2e}")


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median over turns of the quotients."""
    return statistics.median(a / b for a, b in zip(times, others))


def write_task(folder: Path, model: str, ragged: bool) -> list[Any]:
    """The files that the contestants read; the first weights."""
    random = np.random.default_rng(0)
    count = STEPS * BATCH
    shape = (784,) if model == "mlp" else (28, 28, 1)
    np.save(folder / "x.npy", random.standard_normal((DEVICES, count, *shape)).astype(np.float32))
    np.save(folder / "y.npy", random.integers(0, 10, (DEVICES, count)).astype(np.int32))
    from covey_coordinator.simulation.schedule import training_schedule
    from covey_protocol.messages import TrainingPlan

    sizes = np.array([count - (device % BATCH if ragged else 0) for device in range(DEVICES)])
    plan = TrainingPlan(epochs=1, learning_rate=0.1, shuffle_seed=0)
    schedules = [training_schedule(plan, f"device-{n:03d}", int(size), BATCH, False) for n, size in enumerate(sizes)]
    scale = {2: 0.05, 4: 0.2, 1: 0.0}
    initial = [(scale[len(s)] * random.standard_normal(s)).astype(np.float32) for s in SHAPES[model]]
    np.savez(
        folder / "task.npz",
        model=model,
        rows=np.stack([one.rows for one in schedules]),
        counts=np.stack([one.counts for one in schedules]),
        sizes=sizes,
        num_weights=len(initial),
        **{f"weight_{number}": weight for number, weight in enumerate(initial)},
    )
    return initial


class Contestant:
    """A process of `simulation_contestants.py`."""

    def __init__(self, name: str, python: str, folder: Path) -> None:
        self.name, self.times, self.first_s = name, [], 0.0  # type: ignore[var-annotated]
        self._log = folder / f"{name}.log"
        self._saved = folder / f"{name}.npz"
        started = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, str(HERE / "simulation_contestants.py"), name, str(folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip
        self._answer()
        self.start_s = time.perf_counter() - started

    def round(self) -> float:
        return float(self._ask("round"))

    def model(self) -> list[Any]:
        self._ask(f"save {self._saved}")
        with np.load(self._saved) as saved:
            return [saved[name] for name in saved.files]

    def stop(self) -> None:
        processes = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def _ask(self, request: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        """The next line that is ours; Flower and Ray print lines of their own."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
        raise SystemExit(f"{self.name} ended:\n" + "\n".join(self._log.read_text().splitlines()[-15:]))


def memory(devices: int) -> None:
    """What is resident after 30 rounds of 50 of so many devices, 40 examples of 784 numbers each."""
    from covey_coordinator.aggregation.registry import make_rule
    from covey_coordinator.aggregation.worker import Worker
    from covey_coordinator.simulation.learning import DeviceData, Learning
    from covey_coordinator.simulation.process import Simulation
    from covey_models import zoo
    from covey_protocol.messages import TrainingPlan

    random = np.random.default_rng(0)
    x = random.standard_normal((devices * 40, 784)).astype(np.float32)
    y = random.integers(0, 10, devices * 40)
    cut = [slice(start, start + 40) for start in range(0, devices * 40, 40)]
    population = [DeviceData(f"device-{number:05d}", x[part], y[part]) for number, part in enumerate(cut)]
    learning = Learning(
        model=zoo.build("mlp", (784,), 10, 0),
        plan=TrainingPlan(epochs=1, learning_rate=0.1),
        rule=make_rule("mean"),
        batch_size=BATCH,
    )
    started = time.perf_counter()
    with Worker() as worker, Simulation(learning, population, worker=worker) as simulation:
        ready_s = time.perf_counter() - started
        state, sizes, assert_pid = simulation.initial_state(), [], worker.pid
        for number in range(30):
            cohort = np.sort(random.choice(devices, DEVICES, replace=False)).tolist()
            state, _ = simulation.next(state, cohort, number)
            sizes.append(psutil.Process(assert_pid).memory_info().rss / 1e6)
        own = psutil.Process().memory_info().rss / 1e6
    print(
        f"{devices:>6} devices ({x.nbytes / 1e6:.0f} MB of examples): ready after {ready_s:.1f} s, worker "
        f"{sizes[4]:.0f} MB after 5 rounds, {sizes[-1]:.0f} after 30, this process {own:.0f} MB"
    )


if __name__ == "__main__":
    main()
