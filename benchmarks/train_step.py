"""What a training step on a device costs, beside the other ways to train the same model.

    python benchmarks/train_step.py [--quick] [--layers] [--export-large]

The reference CNN is exported and then trained, on one core and with one thread, by the bundle in tflite_runtime, by the
same bundle in ai-edge-litert, by full TensorFlow's TFLite interpreter with Flex ops (the step as it is, converted with
SELECT_TF_OPS), by tf.function with and without oneDNN, and by PyTorch. Every contestant is a process of its own, and
they take turns, so that a busy machine slows them alike. Quote the ratios, which are medians over turns, not the
milliseconds. Before anything is timed, all must hold the same weights after some steps from the same start.

Environments other than this one lie in .bench: .bench/edge-3.x are made here from locks/edge.txt, where that Python is
found; .bench/pytorch is measured where somebody made it (python -m venv .bench/pytorch, pip install torch numpy).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from covey_coordinator.libraries import prepare

prepare()

import numpy as np
import tensorflow as tf
from train_step_workers import naive_step

import covey_models
from covey_models._tensorflow import quiet
from covey_models.convert import convert
from covey_models.losses import loss_for
from covey_models.lowering import lower
from covey_models.steps import Recipe, training_steps
from covey_protocol.bundle import read_bundle
from covey_protocol.seals import SealingKey

ROOT = Path(__file__).resolve().parent.parent
WORKERS = Path(__file__).with_name("train_step_workers.py")
ENVIRONMENTS = ROOT / ".bench"
BATCHES = 8  # different batches, taken in turn
AGREEING_STEPS = 5
AGREEMENT = 1e-5  # largest difference of any weight after AGREEING_STEPS steps
LITERT = "ai-edge-litert"
FLEX, ONEDNN = "Flex in full TensorFlow", "tf.function, oneDNN"
# The project's bars: at least so many times faster than Flex, at most so many times the tf.function step.
BARS = {"tflite_runtime": (1.25, 2.2), LITERT: (1.8, 1.5)}


def reference_cnn() -> Any:
    """206,922 parameters: two 3x3 convolutions, two max pools, two dense layers on 28x28x1."""
    layers = tf.keras.layers
    tf.keras.utils.set_random_seed(0)
    return tf.keras.Sequential(
        [
            layers.InputLayer((28, 28, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.MaxPool2D(2),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPool2D(2),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )


def same_padded(filters: int, **options: Any) -> Any:
    return tf.keras.layers.Conv2D(filters, 3, padding="same", **options)


def block(shape: Sequence[int], layers: Sequence[Any], classes: int = 10) -> Any:
    """A model around some layers: logits at its end, after a global mean where there are images."""
    inputs = x = tf.keras.Input(shape)
    for layer in layers:
        x = layer(x)
    if len(x.shape) > 2:
        x = tf.keras.layers.GlobalAveragePooling2D()(x)
    return tf.keras.Model(inputs, tf.keras.layers.Dense(classes)(x))


def mobile_block() -> list[Any]:
    """MobileNetV2's inverted residual without the addition: expand, depthwise, project, each normalised."""
    layers = tf.keras.layers
    return [
        *(layers.Conv2D(96, 1, use_bias=False), layers.BatchNormalization(), layers.ReLU(6.0)),
        *(layers.DepthwiseConv2D(3, padding="same", use_bias=False), layers.BatchNormalization(), layers.ReLU(6.0)),
        *(layers.Conv2D(16, 1, use_bias=False), layers.BatchNormalization()),
    ]


LAYERS: dict[str, tuple[int, Any]] = {
    "reference CNN, batch 1": (1, reference_cnn),
    "reference CNN, batch 8": (8, reference_cnn),
    "reference CNN, batch 64": (64, reference_cnn),
    "3x3 64 to 64, 14x14, batch 20": (20, lambda: block((14, 14, 64), [same_padded(64), same_padded(64)])),
    "3x3 32 to 64 stride 2, 28x28, batch 20": (20, lambda: block((28, 28, 32), [same_padded(64, strides=2)])),
    "5x5 valid 8 to 16, 24x24, batch 20": (
        20,
        lambda: block((24, 24, 1), [same_padded(8), tf.keras.layers.Conv2D(16, 5, activation="relu")]),
    ),
    "MobileNetV2 block, 16x16x16, batch 20": (20, lambda: block((16, 16, 16), mobile_block())),
    "dense 784-512-10, batch 20": (20, lambda: block((784,), [tf.keras.layers.Dense(512, "relu")])),
    "conv, batch norm, relu, 16x16x32, batch 20": (
        20,
        lambda: block(
            (16, 16, 16),
            [same_padded(32, use_bias=False), tf.keras.layers.BatchNormalization(), tf.keras.layers.ReLU()],
        ),
    ),
}


# The files that contestants get.


def exported(model: Any, batch_size: int) -> tuple[bytes, float]:
    """The model's bundle, sealed with a throw-away key, and the seconds it took."""
    start = time.perf_counter()
    bundle = covey_models.export(
        model, name="bench", batch_size=batch_size, input_range=(0.0, 1.0), key=SealingKey.generate()
    )
    return bundle, time.perf_counter() - start


def unproved(model: Any, batch_size: int) -> bytes:
    """The TFLite file that an export makes, without its proof, which takes most of an export's time."""
    labels = tuple(model.output_shape[1:])
    with quiet():
        steps = training_steps(model, Recipe(loss_for("sparse_categorical_crossentropy", labels), batch_size))
        lowered = {name: lower(function, (), steps.constants) for name, function in steps.functions.items()}
        return convert(lowered, steps.variables)


def flex_model(model: Any, batch_size: int) -> bytes:
    """The naive step of the same model, converted as it is: what TensorFlow's converter does with SELECT_TF_OPS."""
    variables = model.weights
    sizes = [int(np.prod(variable.shape)) for variable in variables]
    vector = tf.TensorSpec([sum(sizes)], tf.float32, name="parameters")
    specs = [
        tf.TensorSpec([batch_size, *model.input_shape[1:]], tf.float32, name="x"),
        tf.TensorSpec([batch_size], tf.int32, name="y"),
        tf.TensorSpec([batch_size], tf.float32, name="example_weight"),
        tf.TensorSpec([], tf.float32, name="learning_rate"),
    ]

    def get_parameters() -> dict[str, Any]:
        return {"parameters": tf.concat([tf.reshape(variable, [-1]) for variable in variables], 0)}

    def set_parameters(parameters: Any) -> dict[str, Any]:
        for variable, part in zip(variables, tf.split(parameters, sizes)):
            variable.assign(tf.reshape(part, variable.shape))
        return {"dimension": tf.size(parameters)}

    holder = tf.Module()
    holder.held = variables
    signatures = {
        "train": tf.function(naive_step(tf, model), input_signature=specs, autograph=False),
        "get_parameters": tf.function(get_parameters, input_signature=[]),
        "set_parameters": tf.function(set_parameters, input_signature=[vector]),
    }
    concrete = {name: function.get_concrete_function() for name, function in signatures.items()}
    with tempfile.TemporaryDirectory() as folder, quiet():
        tf.saved_model.save(holder, folder, concrete)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
        converter.experimental_enable_resource_variables = True
        return bytes(converter.convert())


def write_data(path: Path, model: Any, batch_size: int) -> None:
    """Random batches and the start weights, as `train_step_workers.Job` describes them."""
    random = np.random.default_rng(0)
    x = random.random((BATCHES, batch_size, *model.input_shape[1:]), np.float32)
    y = random.integers(0, model.output_shape[1], (BATCHES, batch_size)).astype(np.int32)
    np.savez(path, x=x, y=y, **{f"w{index}": array for index, array in enumerate(model.get_weights())})


# The contestants.


@dataclass(frozen=True)
class Entry:
    """One contestant: its name in the tables, which worker it is, with which Python, on which file."""

    name: str
    worker: str
    python: Path
    file: str
    environment: Mapping[str, str]


class Worker:
    """A running contestant; made when its process has loaded the model. What it says on stderr ends up in a log."""

    def __init__(self, entry: Entry, folder: Path, core: int) -> None:
        self.name = entry.name
        self._folder = folder
        self._said = open(folder / f"{entry.worker}-{os.urandom(4).hex()}.log", "w+")  # noqa: SIM115 (closed in stop)
        job = folder / f"{entry.worker}-{os.urandom(4).hex()}.json"
        job.write_text(json.dumps({"core": core, "model": entry.file, "data": str(folder / "data.npz")}))
        self._process = subprocess.Popen(
            [str(entry.python), str(WORKERS), entry.worker, str(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **entry.environment},
        )
        self._answer()

    def steps(self, count: int) -> dict[str, float]:
        """CPU and wall seconds of `count` steps."""
        return self._ask({"do": "steps", "count": count})

    def parameters(self) -> np.ndarray:
        path = self._folder / "parameters.npy"
        self._ask({"do": "parameters", "path": str(path)})
        return np.load(path)

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._said.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, float]:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, float]:
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            sys.exit(f"{self.name} ended: " + "".join(self._said.readlines()[-5:]))
        return json.loads(line)


@contextmanager
def running(entries: Sequence[Entry], folder: Path, core: int) -> Iterator[list[Worker]]:
    with ExitStack() as stack:
        workers = []
        for entry in entries:
            workers.append(Worker(entry, folder, core))
            stack.callback(workers[-1].stop)
        yield workers


def check_agreement(workers: Sequence[Worker]) -> None:
    """All contestants hold the same weights after some steps; ends the run otherwise."""
    held = []
    for worker in workers:
        worker.steps(AGREEING_STEPS)
        held.append(worker.parameters())
    for worker, parameters in zip(workers, held):
        difference = float(np.abs(parameters - held[0]).max())
        if not difference <= AGREEMENT:
            sys.exit(f"{worker.name} differs by {difference:.1e} from {workers[0].name} after {AGREEING_STEPS} steps")
    spread = max(float(np.abs(parameters - held[0]).max()) for parameters in held)
    print(f"weights after {AGREEING_STEPS} steps from the same start agree within {spread:.1e}")


@dataclass(frozen=True)
class Times:
    """Milliseconds per step of one contestant, one number per turn."""

    cpu: list[float]
    wall: list[float]


def measured(workers: Sequence[Worker], rounds: int, steps: int) -> dict[str, Times]:
    """The contestants take turns; the first turn of each warms up and is not counted."""
    times = {worker.name: Times([], []) for worker in workers}
    for number in range(rounds + 1):
        for worker in workers:
            took = worker.steps(steps)
            if number:
                times[worker.name].cpu.append(1e3 * took["cpu_s"] / steps)
                times[worker.name].wall.append(1e3 * took["wall_s"] / steps)
    return times


def ratio(of: Times, to: Times) -> float:
    """The median over turns of one contestant's CPU time to another's."""
    return statistics.median(a / b for a, b in zip(of.cpu, to.cpu))


def print_steps(times: Mapping[str, Times]) -> None:
    print(f"{'training step, ms':<28}{'cpu':>8}{'from':>8}{'to':>8}{'wall':>8}{'x tf.function':>15}{'Flex / it':>11}")
    for name, one in times.items():
        middle, low, high = statistics.median(one.cpu), min(one.cpu), max(one.cpu)
        print(
            f"{name:<28}{middle:>8.2f}{low:>8.2f}{high:>8.2f}{statistics.median(one.wall):>8.2f}"
            f"{ratio(one, times[ONEDNN]):>15.2f}{ratio(times[FLEX], one):>11.2f}"
        )
    for name, (faster, slower) in BARS.items():
        if name in times:
            gain, factor = ratio(times[FLEX], times[name]), ratio(times[name], times[ONEDNN])
            print(
                f"{name}: {gain:.2f} times faster than Flex (wanted {faster} or more: {verdict(gain >= faster)}),"
                f" {factor:.2f} times tf.function's time (wanted {slower} or less: {verdict(factor <= slower)})"
            )


def verdict(holds: bool) -> str:
    return "met" if holds else "missed"


# Environments.


def python_of(version: str) -> Optional[str]:
    """A Python of this version, from PATH or the places version managers keep them, or None."""
    managed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    fetched = sorted(Path.home().glob(f".local/share/uv/python/cpython-{version}.*/bin/python3"))
    for candidate in (*map(str, managed), *map(str, fetched), shutil.which(f"python{version}")):
        if candidate and subprocess.run([candidate, "-c", ""], check=False, capture_output=True).returncode == 0:
            return candidate
    return None


def edge_environment(*versions: str) -> Optional[Path]:
    """The Python of an environment of locks/edge.txt alone, made at the first call; None where it cannot be."""
    for version in versions:
        folder = ENVIRONMENTS / f"edge-{version}"
        python = folder / "bin" / "python"
        if (folder / ".ready").exists():
            return python
        found = python_of(version)
        if found is None:
            continue
        print(f"making {folder.relative_to(ROOT)} from locks/edge.txt", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        lock = ["--require-hashes", "--only-binary", ":all:", "-r", str(ROOT / "locks" / "edge.txt")]
        for command in ([found, "-m", "venv", str(folder)], [*pip, *lock]):
            ended = subprocess.run(command, check=False, capture_output=True, text=True)
            if ended.returncode != 0:
                print(f"not possible: {ended.stderr.strip().splitlines()[-1:]}")
                return None
        (folder / ".ready").touch()
        return python
    return None


def made_by_hand(name: str) -> Optional[Path]:
    python = ENVIRONMENTS / name / "bin" / "python"
    return python if python.exists() else None


def entries_of(model: Any, batch_size: int, tflite: bytes, folder: Path, others: bool) -> list[Entry]:
    """The contestants for one model; says which cannot take part. others: Flex, no oneDNN and PyTorch too."""
    paths = {name: str(folder / name) for name in ("model.tflite", "flex.tflite", "model.keras")}
    Path(paths["model.tflite"]).write_bytes(tflite)
    model.save(paths["model.keras"])
    write_data(folder / "data.npz", model, batch_size)
    here = Path(sys.executable)
    entries = [Entry("tflite_runtime", "tflite_runtime", here, paths["model.tflite"], {})]
    newer = edge_environment("3.12", "3.13")
    if newer is not None:
        entries.append(Entry(LITERT, "litert", newer, paths["model.tflite"], {}))
    elif others:
        print(f"{LITERT}: not measured, no Python 3.12 or 3.13 was found or its environment cannot be made")
    entries.append(Entry(ONEDNN, "tensorflow", here, paths["model.keras"], {"TF_ENABLE_ONEDNN_OPTS": "1"}))
    if not others:
        return entries
    Path(paths["flex.tflite"]).write_bytes(flex_model(model, batch_size))
    entries.append(Entry(FLEX, "flex", here, paths["flex.tflite"], {}))
    entries.append(
        Entry("tf.function, no oneDNN", "tensorflow", here, paths["model.keras"], {"TF_ENABLE_ONEDNN_OPTS": "0"})
    )
    torch = made_by_hand("pytorch")
    if torch is not None:
        entries.append(Entry("PyTorch, eager", "pytorch", torch, paths["model.keras"], {}))
    else:
        print("PyTorch: not measured, there is no .bench/pytorch")
    print("onnxruntime-training, MNN: not measured, this script has no contestant for them")
    return entries


# What else a device pays.

DEVICE = """
import json, sys, time
start = time.perf_counter()
import numpy as np
try:
    from tflite_runtime.interpreter import Interpreter
except ImportError:
    from ai_edge_litert.interpreter import Interpreter
imported = time.perf_counter() - start
from covey_edge.runtime import Model
from covey_protocol.bundle import read_bundle
bundle = read_bundle(open(sys.argv[1], "rb").read())
start = time.perf_counter()
model = Model(bundle)
loaded = time.perf_counter() - start
def resident():
    return next(1024 * int(line.split()[1]) / 1e6 for line in open("/proc/self/status") if line.startswith("VmRSS"))
shape = (bundle.manifest.batch_size, *bundle.manifest.input.shape)
at_load = resident()
start = time.perf_counter()
model.train_batch(np.zeros(shape, np.float32), np.zeros(shape[0], np.int32), 0.01)
first = time.perf_counter() - start
print(json.dumps({"import_s": imported, "load_ms": 1e3 * loaded, "first_ms": 1e3 * first, "loaded_mb": at_load,
                  "trained_mb": resident()}))
"""


def print_device_costs(bundle: bytes, folder: Path, repeats: int) -> None:
    """A process in the environment of the edge's lock that loads the bundle and makes one step."""
    path = folder / "bench.covey"
    path.write_bytes(bundle)
    for name, python in (("tflite_runtime", edge_environment("3.11")), (LITERT, edge_environment("3.12", "3.13"))):
        if python is None:
            print(f"process on a device, {name}: not measured, no environment for it")
            continue
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "edge" / "src")}
        command = [str(python), "-c", DEVICE, str(path)]
        runs = [
            json.loads(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)
            for _ in range(repeats)
        ]
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(
            f"process on a device, {name}: {middle['loaded_mb']:.0f} MB resident with the model loaded,"
            f" {middle['trained_mb']:.0f} after a step (wanted 70), import {middle['import_s']:.2f} s (wanted 0.5),"
            f" load {middle['load_ms']:.1f} ms (wanted 20), first step {middle['first_ms']:.1f} ms"
        )
        print_installed_size(name, python)


def print_installed_size(name: str, python: Path) -> None:
    packages = next((python.parent.parent / "lib").glob("python3*/site-packages"))
    runtime = name.replace("-", "_")
    both = sum(megabytes(packages / part) for part in (runtime, "numpy", "numpy.libs"))
    everything = sum(megabytes(part) for part in packages.iterdir() if not part.name.startswith(("pip", "setuptools")))
    wanted = " (wanted 75)" if name == "tflite_runtime" else ""
    print(f"installed, {name}: {both:.0f} MB with numpy{wanted}, {everything:.0f} MB with all that the agent needs")


def megabytes(path: Path) -> float:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file() and "__pycache__" not in file.parts) / 1e6


def print_large_exports() -> None:
    for alpha in (0.35, 1.0):
        size = (32, 32, 3)
        model = tf.keras.applications.MobileNetV2(
            size, alpha=alpha, weights=None, classes=10, classifier_activation=None
        )
        cpu = time.process_time()
        bundle, seconds = exported(model, 8)
        print(
            f"export of MobileNetV2 32x32, alpha {alpha}: {seconds:.1f} s (wanted 60), of which CPU"
            f" {time.process_time() - cpu:.1f} s, {len(bundle)} bytes",
            flush=True,
        )


def print_layers(core: int, rounds: int, steps: int) -> None:
    """Other models than the reference: ours against tf.function."""
    print(
        f"\n{'training step, cpu ms':<44}{'tf.function':>12}{'tflite_runtime':>16}{'ratio':>7}{LITERT:>16}{'ratio':>7}"
    )
    for name, (batch_size, build) in LAYERS.items():
        model = build()
        tflite = unproved(model, batch_size)
        with tempfile.TemporaryDirectory() as kept:
            entries = entries_of(model, batch_size, tflite, Path(kept), others=False)
            with running(entries, Path(kept), core) as workers:
                times = measured(workers, rounds, steps)
        row = f"{name:<44}{statistics.median(times[ONEDNN].cpu):>12.2f}"
        for runtime in ("tflite_runtime", LITERT):
            if runtime in times:
                one = times[runtime]
                row += f"{statistics.median(one.cpu):>16.2f}{ratio(one, times[ONEDNN]):>7.2f}"
        print(row, flush=True)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    return f"{fields.get('model name', 'unknown')} (family {fields.get('cpu family')}, model {fields.get('model')})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--rounds", type=int, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=20, help="steps in a turn")
    parser.add_argument("--layers", action="store_true", help="also other layers and batch sizes, against tf.function")
    parser.add_argument("--export-large", action="store_true", help="also time the export of MobileNetV2")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (5 if arguments.quick else 15)
    core = max(os.sched_getaffinity(0))
    batch_size, model = 20, reference_cnn()
    bundle, seconds = exported(model, batch_size)
    print(f"CPU: {cpu_name()}, core {core}, load {os.getloadavg()[0]:.1f}; batch {batch_size}")
    print(
        f"reference CNN: {model.count_params()} parameters, bundle {len(bundle)} bytes,"
        f" export {seconds:.1f} s (wanted 10)"
    )
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        entries = entries_of(model, batch_size, read_bundle(bundle).model, folder, others=True)
        with running(entries, folder, core) as workers:
            check_agreement(workers)
            print_steps(measured(workers, rounds, arguments.steps))
        print_device_costs(bundle, folder, 3 if arguments.quick else 7)
    if arguments.layers:
        print_layers(core, rounds, arguments.steps)
    if arguments.export_large:
        print_large_exports()


if __name__ == "__main__":
    main()
