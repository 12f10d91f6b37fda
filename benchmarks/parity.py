"""How far exported nets are from float64, beside TensorFlow's own float32 with and without oneDNN.

For every family and draw of data: the largest error of any number of one training step's gradient, relative to the
largest gradient (or 1), of the bundle in the TFLite runtime, of TensorFlow with oneDNN and of TensorFlow without. Where
a ReLU's pre-activation lies within rounding of its kink, or BatchNorm divides by a tiny spread, correct programs differ
by up to 1e-2; draws above 1e-5 are counted. The rank test says whether TFLite's errors are larger than TensorFlow's (a
p below 1e-4 would).

    python benchmarks/parity.py                          # everything; about 20 minutes on two cores
    python benchmarks/parity.py mobilenet-v2 --draws 5   # some of it
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu

from covey_models import zoo
from covey_models._tensorflow import import_tensorflow, quiet

tf = import_tensorflow()
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)

from covey_models.exporting import convert_functions
from covey_models.losses import loss_for
from covey_models.proof import DataRange, DoubleSide, Side, TensorFlowSide, TFLiteSide, Trial
from covey_models.steps import Recipe, Steps, training_steps

BATCH = 8
CLASSES = 5
AMPLIFIED = 1e-5  # relative; without amplification errors stay well below


@dataclass(frozen=True)
class Family:
    """A net to be measured. bounds: of its inputs."""

    build: Callable[[], Any]
    bounds: tuple[float, float] = (0.0, 1.0)


def application(name: str, side: int, **settings: Any) -> Callable[[], Any]:
    build = getattr(tf.keras.applications, name)
    return lambda: build(
        input_shape=(side, side, 3), weights=None, classes=CLASSES, classifier_activation=None, **settings
    )


FAMILIES = {
    "mobilenet-v2": Family(application("MobileNetV2", 32, alpha=0.35)),
    "mobilenet-v3-small": Family(application("MobileNetV3Small", 32), (0.0, 255.0)),
    "efficientnet-b0": Family(application("EfficientNetB0", 32), (0.0, 255.0)),
    "resnet-50": Family(application("ResNet50", 32)),
    "mobilenet-v2-96": Family(application("MobileNetV2", 96, alpha=0.35)),
    "ds-cnn": Family(lambda: zoo.build("ds-cnn", (49, 10, 1), CLASSES)),
    "activity-cnn": Family(lambda: zoo.build("activity-cnn", (128, 9), CLASSES)),
    "emnist-cnn": Family(lambda: zoo.build("emnist-cnn", (28, 28, 1), CLASSES)),
    "transformer": Family(lambda: zoo.build("transformer", (16, 8), CLASSES)),
}


def traced(family: Family) -> tuple[Any, Steps, DataRange]:
    tf.keras.utils.set_random_seed(0)
    model = family.build()
    loss = loss_for("sparse_categorical_crossentropy", (CLASSES,))
    steps = training_steps(model, Recipe(loss, BATCH))
    return model, steps, DataRange(tuple(model.inputs[0].shape[1:]), "float32", family.bounds, loss.labels)


def errors(side: Side, exact: Side, trial: Trial, draws: int) -> list[float]:
    """Per draw: the largest error of the gradient, relative to the largest number of it (or 1)."""
    found = []
    for draw in range(draws):
        batch = trial.batches(draw, 1)[0]
        for one in (side, exact):
            trial.begin(one)
        mine, true = (trial.gradient(one, batch)["gradient"] for one in (side, exact))
        found.append(float(np.abs(mine - true).max() / max(1.0, np.abs(true).max())))
    return found


def measured(name: str, draws: int, only_tensorflow: bool = False) -> dict[str, list[float]]:
    """Program -> its errors; float64 TensorFlow is the measure."""
    with quiet():
        model, steps, data = traced(FAMILIES[name])
        theirs = TensorFlowSide(steps.functions, steps.variables)
        exact = DoubleSide({name: steps.functions[name] for name in NEEDED}, steps)
        trial = Trial(steps, data, 0, theirs.parameters())
        result = {"tensorflow": errors(theirs, exact, trial, draws)}
        if not only_tensorflow:
            functions = {name: steps.functions[name] for name in NEEDED}
            ours = TFLiteSide(convert_functions(functions, model, steps), NEEDED)
            result["tflite"] = errors(ours, exact, trial, draws)
    return result


NEEDED = ("gradient", "get_parameters", "set_parameters")


def without_onednn(name: str, draws: int) -> list[float]:
    """The errors of TensorFlow without oneDNN, which is chosen when TensorFlow is imported: in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, name, "--draws", str(draws), "--worker"],
        env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0"},
        check=True,
        capture_output=True,
        text=True,
    )
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(name: str, draws: int) -> dict[str, list[float]]:
    """Program -> errors, all three."""
    return {**measured(name, draws), "tensorflow without oneDNN": without_onednn(name, draws)}


def row(name: str, found: dict[str, list[float]]) -> str:
    cells = [name]
    for program in ("tflite", "tensorflow", "tensorflow without oneDNN"):
        values = np.array(found[program])
        cells.append(f"{np.median(values):.1e}, {values.max():.1e}, {int((values > AMPLIFIED).sum())}")
    both = [*found["tensorflow"], *found["tensorflow without oneDNN"]]
    cells.append(f"{mannwhitneyu(found['tflite'], both, alternative='greater').pvalue:.2g}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}; all if left out")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.families if name not in FAMILIES]
    if unknown:
        parser.error(f"there is no family {unknown[0]!r}; choose of {', '.join(FAMILIES)}")
    if arguments.worker:
        print(json.dumps(measured(arguments.families[0], arguments.draws, only_tensorflow=True)["tensorflow"]))
        return
    print(f"{arguments.draws} draws of {BATCH} examples, one thread; median, largest, draws above {AMPLIFIED:g}\n")
    print("| net | TFLite | TensorFlow, oneDNN | TensorFlow, no oneDNN | p, TFLite larger |\n|---|---|---|---|---|")
    for name in arguments.families or FAMILIES:
        print(row(name, compared(name, arguments.draws)), flush=True)


if __name__ == "__main__":
    main()
