"""Our optimisation attacks beside those of `breaching` (Geiping et al.) on the same gradients, at the same budget.

    python benchmarks/inversion.py --setup             # .bench/breaching, about 1.3 GB
    python benchmarks/inversion.py --data DIR          # DIR holds mnist.npz; without it only scikit-learn's digits

A budget is a number of evaluations of the objective with its derivative. Both sides get one thread, one start
(our DLG may start anew within the budget), float32, the gradient that TensorFlow computed, no labels, and seeds of
their own. breaching runs its configurations `deepleakage` and `invertinggradients` as published, and the latter also
with our total variation. Before a row, torch's gradient of the true examples is held against ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

HERE = Path(__file__).resolve().parent
DEFAULT = HERE.parent / ".bench" / "breaching"
SAME_GRADIENT = 1e-3  # float32 convolutions of two libraries, relative to the largest number
RATE = 0.1


@dataclass(frozen=True)
class Row:
    data: str
    model: str
    state: str
    examples: int


def set_up(folder: Path) -> None:
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(HERE / "breaching.txt")], check=True)


class Breaching:
    """A running process of breaching's Python."""

    def __init__(self, folder: Path) -> None:
        command = [str(folder / "bin" / "python"), str(HERE / "breaching_worker.py")]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.torch = self._read()["torch"]

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._read()
        if "error" in answer:
            raise SystemExit(f"breaching: {answer['error']}")
        return answer

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("breaching's process ended; run its Python with breaching_worker.py to see why")
        return dict(json.loads(line))

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


# --- models and data


def lenet(shape: tuple[int, ...], seed: int) -> Any:
    """The net of DLG's paper: three convolutions of 12 filters with sigmoids, weights uniform in (-0.5, 0.5)."""
    from covey_coordinator.inversion.small_models import sigmoid_lenet

    return sigmoid_lenet(shape, 10, seed)


def mlp(shape: tuple[int, ...], seed: int) -> Any:
    from covey_coordinator.inversion.small_models import relu_mlp

    return relu_mlp(shape, 10, seed)


MODELS = {"lenet": lenet, "mlp": mlp}


def layers_of(keras_model: Any) -> list[dict[str, Any]]:
    found = []
    for layer in keras_model.layers:
        kind = type(layer).__name__
        name = None if kind == "Flatten" else layer.activation.__name__
        activation = None if name == "linear" else name
        if kind == "Conv2D":
            size, stride = layer.kernel_size[0], layer.strides[0]
            told = {"kind": "conv", "size": size, "stride": stride, "filters": layer.filters}
            found.append({**told, "activation": activation})
        elif kind == "Dense":
            found.append({"kind": "dense", "units": layer.units, "activation": activation})
    return found


def data_of(name: str, folder: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """(pictures in [0, 1], labels), shuffled with seed 0."""
    if name == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x = (x / 16).reshape(-1, 8, 8, 1)
    else:
        from covey_coordinator.reproduce.data import mnist

        train, _ = mnist(folder)
        x, y = train.x, train.y
    order = np.random.default_rng(0).permutation(len(x))[:6000]
    return x[order].astype(np.float32), np.asarray(y)[order].astype(np.int32)


# --- one row


def attacked(row: Row, x: np.ndarray, y: np.ndarray, keras_model: Any) -> tuple[Any, Any]:
    """(model, what the attacker sees) of one step on all examples."""
    import tensorflow as tf

    from covey_coordinator.inversion.contract import Seen
    from covey_coordinator.inversion.keras_model import KerasModel
    from covey_protocol.messages import TrainingPlan

    model = KerasModel(keras_model, batch_size=row.examples)
    parameters = model.parameters()
    gradient = np.asarray(model.gradient(tf.constant(parameters), tf.constant(x), y))
    seen = Seen(parameters, -RATE * gradient, TrainingPlan(epochs=1, learning_rate=RATE), len(x))
    return model, seen


def ours(attack: str, model: Any, seen: Any, evaluations: int, seed: int) -> Any:
    from covey_coordinator.inversion.deep_leakage import DeepLeakage
    from covey_coordinator.inversion.inverting_gradients import InvertingGradients

    chosen = DeepLeakage(evaluations) if attack == "deepleakage" else InvertingGradients(evaluations, 1)
    return chosen.run(model, seen, seed=seed)


def stored(path: Path, model: Any, seen: Any, x: np.ndarray, y: np.ndarray) -> None:
    from covey_protocol.parameters import offsets

    places = offsets(model.specs)
    arrays: dict[str, Any] = {"x": x, "y": y}
    for number, spec in enumerate(model.specs):
        arrays[f"weight_{number}"] = seen.parameters[places[spec.name]].reshape(spec.shape)
        arrays[f"gradient_{number}"] = (-seen.update / RATE)[places[spec.name]].reshape(spec.shape)
    np.savez(path, **arrays)


def measured(row: Row, images: int, evaluations: int, peer: Breaching | None, folder: Path | None) -> dict[str, Any]:
    """column -> a list of (PSNR, seconds, CPU seconds, evaluations) over the images; "pictures": of the first image."""
    import covey_coordinator.inversion.matching as matching
    from covey_coordinator.inversion.contract import Finding
    from covey_coordinator.inversion.grading import grade
    from covey_coordinator.inversion.small_models import train

    x, y = data_of(row.data, folder)
    found: dict[str, Any] = {}
    variation = matching.DIRECTION.total_variation
    for image in range(images):
        keras_model = MODELS[row.model](x.shape[1:], image)
        if row.state == "trained":
            train(keras_model, x[1000:], y[1000:], epochs=3, seed=image)
        place = slice(image * row.examples, (image + 1) * row.examples)
        model, seen = attacked(row, x[place], y[place], keras_model)
        pictures: dict[str, Any] = {"truth": x[place]}

        def note(column: str, inputs: Any, *costs: float) -> None:
            graded = grade(Finding("", "", inputs=inputs), x[place], y[place], (0.0, 1.0))  # noqa: B023
            found.setdefault(column, []).append((graded.mean_psnr_db, *costs))
            pictures[column] = inputs[graded.matched]  # noqa: B023

        for attack in ("deepleakage", "invertinggradients"):
            started, cpu = time.perf_counter(), time.process_time()
            finding = ours(attack, model, seen, evaluations, image)
            spent = time.perf_counter() - started, time.process_time() - cpu
            note(f"{attack}, ours", finding.inputs, *spent, finding.iterations)
            if peer is None:
                continue
            with tempfile.TemporaryDirectory() as temporary:
                path, save = Path(temporary) / "job.npz", Path(temporary) / "found.npy"
                stored(path, model, seen, x[place], y[place])
                job = {
                    "do": "check", "path": str(path), "layers": layers_of(keras_model), "shape": x.shape[1:],
                    "examples": row.examples, "config": attack, "evaluations": evaluations, "seed": image,
                    "threads": 1, "save": str(save),
                }  # fmt: skip
                difference = peer.ask(job)["difference"]
                if not difference < SAME_GRADIENT:
                    raise SystemExit(f"{row}: torch's gradient differs by {difference:.1e} of its largest number")
                columns = {f"{attack}, breaching": None}
                if attack == "invertinggradients":
                    columns[f"{attack}, breaching, our total variation"] = variation
                for column, scale in columns.items():
                    answer = peer.ask({**job, "do": "run", "total_variation": scale})
                    note(column, np.load(save), answer["seconds"], answer["cpu_seconds"], answer["evaluations"])
        if image == 0:
            found["pictures"] = pictures
    return found


ATTACKS = {"deepleakage": "DLG", "invertinggradients": "inverting gradients"}
PEERS = ("breaching", "breaching, our total variation")
HEAD = (
    "| gradient of | batch | attack | ours | breaching, as published | breaching, our total variation "
    "| time of an evaluation, ours to theirs |"
    "\n|---|---|---|---|---|---|---|"
)


def shown(row: Row, found: dict[str, Any], evaluations: int) -> list[str]:
    """A line of the table for each attack: mean PSNR and seconds; evaluations where the budget was not spent.

    The ratio is of wall seconds for an evaluation, to breaching's faster form: either side may end before the budget.
    """
    lines = []
    for attack, name in ATTACKS.items():
        means = {
            column: np.mean(found[key], axis=0)
            for column in ("ours", *PEERS)
            if (key := f"{attack}, {column}") in found
        }
        cells = [cell(means[column], evaluations) if column in means else "" for column in ("ours", *PEERS)]
        pace = {column: mean[1] / mean[3] for column, mean in means.items()}
        theirs = [pace[column] for column in pace if column != "ours"]
        ratio = f"{pace['ours'] / min(theirs):.2f}" if theirs else ""
        what = f"{row.data}, {row.model}, {row.state}"
        lines.append(f"| {what} | {row.examples} | {name} | {' | '.join([*cells, ratio])} |")
    return lines


def as_numbers(row: Row, found: dict[str, Any]) -> dict[str, Any]:
    """column -> for every gradient [PSNR dB, seconds, CPU seconds, evaluations]."""
    return {**asdict(row), "found": {name: some for name, some in found.items() if name != "pictures"}}


def cell(mean: np.ndarray, evaluations: int) -> str:
    psnr, seconds, _, used = mean
    early = f", {used:.0f} evaluations" if used < 0.95 * evaluations else ""
    return f"{psnr:.1f} dB, {seconds:.1f} s{early}"


def picture(path: Path, all_found: list[tuple[Row, dict[str, Any]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = list(all_found[0][1]["pictures"])
    figure, axes = plt.subplots(
        len(all_found), len(columns), figsize=(1.7 * len(columns), 1.7 * len(all_found)), squeeze=False
    )
    for line, (row, found) in zip(axes, all_found):
        for axis, column in zip(line, columns):
            axis.imshow(np.clip(found["pictures"][column][0, :, :, 0], 0, 1), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if row is all_found[0][0]:
                axis.set_title(column.replace(", ", "\n"), fontsize=6)
        line[0].set_ylabel(f"{row.data}\n{row.model}, {row.state}\nbatch {row.examples}", fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", nargs="?", const=DEFAULT, type=Path, help="install breaching there and stop")
    parser.add_argument("--breaching", type=Path, default=DEFAULT, help="where --setup put it")
    parser.add_argument("--data", type=Path, default=os.environ.get("COVEY_DATA"), help="a folder with mnist.npz")
    parser.add_argument("--images", type=int, default=3, help="gradients of each row, each of another model")
    parser.add_argument("--evaluations", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="digits, one image, 200 evaluations")
    parser.add_argument("--rows", default="", help='only rows with all of these words, such as "mnist lenet 4"')
    parser.add_argument("--picture", type=Path, help="a PNG of the first gradient of each row, written after every row")
    parser.add_argument("--json", type=Path, help="every gradient's numbers, written after every row")
    options = parser.parse_args()
    if options.setup:
        set_up(options.setup)
        return
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    folder = Path(options.data) if options.data else None
    names = ["digits"] if options.quick or folder is None else ["mnist", "digits"]
    rows = [
        Row(data, model, state, examples)
        for examples in (1, 4)
        for data in names
        for model in MODELS
        for state in ("untrained", "trained")
    ]
    wanted = set(options.rows.split())
    rows = [row for row in rows if wanted <= {row.data, row.model, row.state, str(row.examples)}]
    images, evaluations = (1, 200) if options.quick else (options.images, options.evaluations)
    peer = Breaching(options.breaching) if (options.breaching / "bin" / "python").exists() else None
    if peer is None:
        print("breaching is not installed (--setup): ours alone", file=sys.stderr)
    print(f"{images} gradients a row, {evaluations} evaluations\n", flush=True)
    print(HEAD, flush=True)
    all_found = []
    try:
        for number, row in enumerate(rows, 1):
            found = measured(row, images, evaluations, peer, folder)
            all_found.append((row, found))
            if options.picture:
                picture(options.picture, all_found)
            print("\n".join(shown(row, found, evaluations)), flush=True)
            if options.json:
                options.json.write_text(json.dumps([as_numbers(*one) for one in all_found], indent=1))
            print(f"{number} of {len(rows)} rows", file=sys.stderr, flush=True)
    finally:
        if peer is not None:
            peer.stop()


if __name__ == "__main__":
    main()
