"""What defences of an update are worth against somebody who knows them, and what Tarantola's number says beforehand.

    .venv/bin/python benchmarks/defences.py [--part NAME]... [--draws 3] [--json FILE] [--pictures FOLDER] [--quick]

Handwritten digits (scikit-learn's, 8 x 8), a small convolution net with sigmoids as in the papers on deep leakage (two
convolutions, one dense layer, 2,500 numbers), freshly initialised, in float64. Four parts:

  resolution  one digit, nine noises: the resolution number and the PSNR it expects beside the PSNR that two attacks
              reach, Tarantola's most probable batch (also with a prior learned of 1,000 other digits) and inverting
              gradients (cosine distance). Rank correlation
  defences    for each defence the PSNR of inverting gradients, of the most probable batch for somebody who takes the
              update for undefended, and of the one who knows the defence
  imprint     the same defences against a malicious server, which sends parameters made to read a batch (a net of 64
              ReLUs): the share of examples that comes out for who takes the update for undefended, and for who knows
  trade-off   the curves of `covey audit` (`audit.curves`) without its attacks: what an update resolves per example and
              the accuracy of ten devices after 20 rounds, over noise, clip norm, examples, passes and joined rounds

PSNR is that of the mean squared error over draws and examples. A blind guess of the range's middle has about 7 dB, a
guess of the mean digit 11. Labels are known to all attackers. Results are of one model and one data set.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from covey_coordinator.libraries import prepare

prepare()

import numpy as np

from covey_coordinator.audit import curves
from covey_coordinator.audit.bench import Bench
from covey_coordinator.audit.data import read_data
from covey_coordinator.audit.settings import CurveSettings, FleetSettings, PlanSettings
from covey_coordinator.audit.updates import TrainingChild
from covey_coordinator.inversion.adaptive import (
    CentralNoise,
    ClippingAndNoise,
    Compressed,
    Defence,
    Nothing,
    Pruned,
    Soteria,
    attacked_adaptively,
    attacked_unaware,
    leakage_of,
)
from covey_coordinator.inversion.contract import Finding, Seen
from covey_coordinator.inversion.extraction import nearest_errors, recovered_share
from covey_coordinator.inversion.grading import grade
from covey_coordinator.inversion.imprint import Imprint, imprinted
from covey_coordinator.inversion.imprint_defended import read_imprint
from covey_coordinator.inversion.inverting_gradients import InvertingGradients
from covey_coordinator.inversion.keras_model import KerasModel
from covey_coordinator.inversion.metrics import mse, psnr
from covey_coordinator.inversion.priors import learned_prior
from covey_coordinator.inversion.resolution import Leakage, leakage_number, planned
from covey_coordinator.inversion.tarantola import Tarantola
from covey_coordinator.simulation.settings import DataSettings, PrivacySettings
from covey_protocol.bundle import read_bundle
from covey_protocol.messages import TrainingPlan

RANGE = (0.0, 1.0)
NOISES = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2, 0.2)
RATE = 0.1
KERNEL = "last/kernel"


def small_net(digits: np.ndarray, batch_size: int, seed: int = 0) -> tuple[KerasModel, Callable[[Any], Any]]:
    """The model, and its features before the last layer."""
    import tensorflow as tf

    tf.keras.utils.set_random_seed(seed)
    layers = tf.keras.layers
    before = [
        tf.keras.Input(digits.shape[1:]),
        layers.Conv2D(8, 3, padding="same", activation="sigmoid", name="conv2d"),
        layers.Conv2D(8, 3, strides=2, padding="same", activation="sigmoid", name="conv2d_1"),
        layers.Flatten(),
    ]
    keras = tf.keras.Sequential([*before, layers.Dense(10, name="last")])
    for weight in keras.trainable_weights:  # as the papers on deep leakage start it: sigmoids pass little otherwise
        weight.assign(tf.random.stateless_uniform(weight.shape, (seed, hash_of(weight.name)), -0.5, 0.5))
    cut = tf.keras.models.clone_model(tf.keras.Model(keras.inputs, keras.layers[-2].output))
    cut.set_weights([weight.numpy() for weight in keras.trainable_weights[:-2]])

    def represent(x: Any) -> Any:
        return tf.cast(cut(tf.cast(x, tf.float32)), tf.float64)

    return KerasModel(keras, batch_size=batch_size, dtype="float64"), represent


def hash_of(name: str) -> int:
    import zlib

    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def load() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pictures))
    return (pictures / 16).reshape(-1, 8, 8, 1)[order], labels[order]


# --- resolution


def resolution(draws: int, iterations: int, say: Callable[[str], None]) -> list[dict[str, float]]:
    x, y = load()
    model, _ = small_net(x, 1)
    prior = learned_prior(model.input, x[500:1500])
    parameters, rows = model.parameters(), []
    for noise in NOISES:
        found: dict[str, list[float]] = {"tarantola": [], "learned": [], "cosine": []}
        numbers: list[Leakage] = []
        learned: list[Leakage] = []
        for draw in range(draws):
            one, label = x[draw : draw + 1], y[draw : draw + 1]
            clean = planned(model, Seen(parameters, parameters, plan(), 1, noise_std=noise), one, label)
            numbers.append(leakage_number(model, clean, one, label))
            learned.append(leakage_number(model, clean, one, label, prior=prior))
            sent = noised(clean, noise, draw)
            attacks = (
                Tarantola(labels=label),
                Tarantola(labels=label, prior=prior),
                InvertingGradients(labels=label, iterations=iterations, restarts=1),
            )
            for name, attack in zip(found, attacks):
                found[name].append(error(attack.run(model, sent, seed=draw), one, label))
        row = {
            "noise": noise,
            "resolved": float(np.mean([one.resolved for one in numbers])),
            "bits": float(np.mean([one.bits for one in numbers])),
            "expected_db": decibel([10 ** (-one.here_psnr_db / 10) for one in numbers]),
            "learned_resolved": float(np.mean([one.resolved for one in learned])),
            "learned_expected_db": decibel([10 ** (-one.here_psnr_db / 10) for one in learned]),
            **{f"{name}_db": decibel(errors) for name, errors in found.items()},
        }
        rows.append(row)
        say("  ".join(f"{name} {value:8.4g}" for name, value in row.items()))
    say(f"rank correlation of learned_expected_db with learned: {ranks(rows, 'learned_expected_db', 'learned_db'):.3f}")
    for name in ("tarantola", "cosine"):
        for of in ("resolved", "expected_db"):
            say(f"rank correlation of {of} with {name}: {ranks(rows, of, f'{name}_db'):.3f}")
    return rows


def ranks(rows: Sequence[dict[str, float]], first: str, second: str) -> float:
    """Spearman's."""
    from scipy.stats import spearmanr

    return float(spearmanr([row[first] for row in rows], [row[second] for row in rows])[0])


# --- defences


def cases(quick: bool) -> list[tuple[str, Defence, int, int, int]]:
    """(group, defence, examples, batch size, epochs)"""
    none = Nothing()
    found: list[tuple[str, Defence, int, int, int]] = [
        ("none", none, 1, 1, 1),
        ("clipping", ClippingAndNoise(0.05), 1, 1, 1),
        ("local noise", ClippingAndNoise(0.2, 0.01), 1, 1, 1),
        ("local noise", ClippingAndNoise(0.2, 0.1), 1, 1, 1),
        ("local noise", ClippingAndNoise(0.2, 1.0), 1, 1, 1),
        ("local noise", ClippingAndNoise(0.2, 0.1, rounds=8), 1, 1, 1),
        ("compression", Compressed("rotated-8bit"), 1, 1, 1),
        ("compression", Compressed("rotated-4bit"), 1, 1, 1),
        ("compression", Compressed("top-k", 0.1), 1, 1, 1),
        ("broken", Pruned(0.7), 1, 1, 1),
        ("broken", Soteria(KERNEL, no_features, 0.4), 1, 1, 1),
        ("local steps", none, 2, 1, 2),
        ("batch", none, 4, 4, 1),
        ("central noise", CentralNoise(1.0, 0.1, devices=4), 4, 4, 1),
        ("local noise", ClippingAndNoise(1.0, 0.1), 4, 4, 1),
    ]
    return found[:3] if quick else found


def no_features(x: Any) -> Any:
    raise AssertionError("the net's own features are put in its place")


def defences(
    draws: int, iterations: int, quick: bool, say: Callable[[str], None], keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """keep: is given the rows so far after each, since all take long."""
    x, y = load()
    rows: list[dict[str, Any]] = []
    for group, defence, examples, batch_size, epochs in cases(quick):
        model, represent = small_net(x, batch_size)
        if isinstance(defence, Soteria):
            defence = replace(defence, represent=represent)
        parameters, started = model.parameters(), time.monotonic()
        errors: dict[str, list[float]] = {"cosine": [], "unaware": [], "adaptive": []}
        expected, resolved = [], []
        for draw in range(draws):
            part = slice(100 + draw * examples, 100 + (draw + 1) * examples)
            one, label = x[part], y[part]
            clean = planned(model, Seen(parameters, parameters, plan(epochs), examples), one, label)
            sent = defence.sent(model, clean, one, label, np.random.default_rng([draw, 7]))
            cosine = InvertingGradients(labels=label, iterations=iterations, restarts=1)
            errors["cosine"].append(error(cosine.run(model, sent.unaware, seed=draw), one, label))
            errors["unaware"].append(error(attacked_unaware(model, sent, label, seed=draw), one, label))
            errors["adaptive"].append(error(attacked_adaptively(model, sent, label, seed=draw), one, label))
            told = leakage_of(model, sent, one, label)
            expected.append(10 ** (-told.here_psnr_db / 10))
            resolved.append(told.resolved / examples)
        several = f", {examples} examples" if group == "local noise" and examples > 1 else ""
        steps = f"{examples} examples, {epochs * -(-examples // batch_size)} steps"
        row = {
            "group": group,
            "defence": steps if group in ("batch", "local steps") else defence.name + several,
            "knows": defence.knows,
            **{name: decibel(some) for name, some in errors.items()},
            "expected": decibel(expected),
            "resolved": float(np.mean(resolved)),
            "seconds": time.monotonic() - started,
        }
        rows.append(row)
        say(as_row([row[name] for name in COLUMNS]))
        keep(rows)
    return rows


COLUMNS = ("group", "defence", "cosine", "unaware", "adaptive", "expected", "resolved")


def as_row(values: Sequence[Any]) -> str:
    return "| " + " | ".join(f"{value:.1f}" if isinstance(value, float) else str(value) for value in values) + " |"


# --- imprint

UNITS, LEAST_DB = 64, 20.0


def imprint_cases() -> list[tuple[Defence, int]]:
    """(defence, examples of one step). No central noise: who sends hostile parameters has every update before it."""
    noises = [ClippingAndNoise(0.2, noise) for noise in (0.003, 0.01, 0.03, 0.1, 1.0)]
    some: list[Defence] = [Nothing(), ClippingAndNoise(0.05), *noises]
    more = [Compressed("rotated-8bit"), Compressed("rotated-4bit"), Compressed("top-k", 0.1), Pruned(0.7)]
    rows = [(one, examples) for one in [*some, *more] for examples in (1, 8)]
    return [*rows, (Nothing(), 32), (Nothing(), 128)]


def imprint(draws: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """unaware: differences divided by one another. known, sparse: both imprints, read by who knows the defence."""
    x, y = load()
    own, rows = x[500:1500], []
    models: dict[tuple[bool, int], KerasModel] = {}
    say(as_row(IMPRINT_COLUMNS))
    for defence, examples in imprint_cases():
        found: dict[str, list[tuple[float, float]]] = {"unaware": [], "known": [], "sparse": []}
        for draw in range(draws):
            part = slice(draw * examples, (draw + 1) * examples)
            for name, some in found.items():
                sparse = name == "sparse"
                if (sparse, examples) not in models:
                    models[sparse, examples] = dense_net("relu6" if sparse else "relu", examples)
                some.append(read(models[sparse, examples], defence, own, x[part], y[part], draw, name))
        means = {name: np.mean(some, axis=0) for name, some in found.items()}
        row = {
            "defence": defence.name,
            "examples": examples,
            **{f"{name}, share": float(mean[0]) for name, mean in means.items()},
            **{f"{name}, dB": psnr(float(mean[1]), RANGE) for name, mean in means.items()},
        }
        rows.append(row)
        say(as_row([f"{row[name]:.2f}" if "share" in name else row[name] for name in IMPRINT_COLUMNS]))
    return rows


IMPRINT_COLUMNS = (
    "defence", "examples", "unaware, share", "known, share", "sparse, share", "unaware, dB", "known, dB", "sparse, dB"
)  # fmt: skip


def dense_net(activation: str, batch_size: int) -> KerasModel:
    import tensorflow as tf

    tf.keras.utils.set_random_seed(0)
    layers = tf.keras.layers
    hidden = layers.Dense(UNITS, getattr(tf.nn, activation))
    keras = tf.keras.Sequential([tf.keras.Input((8, 8, 1)), layers.Flatten(), hidden, layers.Dense(10)])
    return KerasModel(keras, batch_size=batch_size, dtype="float64")


def read(
    model: KerasModel, defence: Defence, own: np.ndarray, x: np.ndarray, y: np.ndarray, draw: int, how: str
) -> tuple[float, float]:
    """(share of the examples at LEAST_DB or better, mean squared error; where nothing is read, of the mean digit)"""
    hostile = imprinted(model.specs, model.parameters(), own, seed=draw, sparse=how == "sparse")
    clean = planned(model, Seen(hostile, hostile, plan(), len(x)), x, y)
    sent = defence.sent(model, clean, x, y, np.random.default_rng([draw, 7]))
    if how == "unaware":
        finding = Imprint().run(model, sent.unaware, seed=0)
    else:
        finding = read_imprint(model, sent, learned_prior(model.input, own), sparse=how == "sparse")
    guess = own.mean(0)[None] if finding.inputs is None else finding.inputs
    return recovered_share(x, finding.inputs, RANGE, LEAST_DB), float(np.mean(nearest_errors(x, guess)))


# --- trade-off


def audited(quick: bool) -> PlanSettings:
    rounds = 3 if quick else 20
    told = CurveSettings(
        noise_multiplier=(0.001, 0.01, 0.1, 0.5),
        clip_norm=(0.1, 0.3, 1.0),
        examples=(1, 4, 16),
        epochs=(1, 2, 4),
        rounds=(1, 5, 20),
    )
    if quick:
        told = CurveSettings((0.01,), (0.3,), (4,), (1,), (1,))
    return PlanSettings(
        privacy=PrivacySettings(clip_norm=1.0, noise_multiplier=0.01),
        fleet=FleetSettings(devices=10, rounds=rounds, partition={"kind": "iid"}),
        data=DataSettings(set="digits", test_fraction=0.4),
        curves=told,
    )


def tradeoff(quick: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    import tensorflow as tf

    from covey_models import export

    tf.keras.utils.set_random_seed(0)
    layers = tf.keras.layers
    keras = tf.keras.Sequential(
        [tf.keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(24, "tanh"), layers.Dense(10)]
    )
    bundle, settings = read_bundle(export(keras, name="trade-off", batch_size=8, input_range=RANGE)), audited(quick)
    rows = []
    with TrainingChild(bundle) as child:
        bench = Bench(bundle, settings, read_data(settings, bundle.manifest, 0), child, 0)
        for name in curves.NAMES:
            for at in sorted(curves.values(bench, name)):
                found = curves.resolution(bench, curves.case_at(bench, name, at))
                told = {
                    "resolved_per_example": float(found.per_example.mean()),
                    "psnr_db": found.here_psnr_db,
                    "accuracy_percent": 100 * curves.accuracy_at(bench, name, at),
                }
                rows.append({"curve": name, "at": at, **told})
                say(as_row([name, f"{at:g}", *told.values()]))
    return rows


# --- what all share


def plan(epochs: int = 1) -> TrainingPlan:
    return TrainingPlan(epochs=epochs, learning_rate=RATE)


def noised(clean: Seen, noise: float, draw: int) -> Seen:
    drawn = np.random.default_rng([draw, 11]).normal(size=len(clean.update))
    return replace(clean, update=(clean.update + noise * drawn).astype(np.float32))


def error(finding: Finding, truth: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared error over the examples, each beside the recovered input that was taken for it."""
    matched = grade(finding, truth, labels, RANGE).matched
    assert finding.inputs is not None
    return mse(truth, np.asarray(finding.inputs, np.float64)[matched])


def decibel(errors: Sequence[float]) -> float:
    return psnr(float(np.mean(errors)), RANGE)


def pictures(found: dict[str, Any], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("resolution", draw_resolution), ("defences", draw_defences), ("trade-off", draw_tradeoff)):
        if name in found:
            draw(found[name], folder / f"{name}.png")


def draw_resolution(rows: Sequence[dict[str, float]], path: Path) -> None:
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(7, 4))
    noises = [row["noise"] for row in rows]
    for name, label in (
        ("expected_db", "expected from the resolution"),
        ("tarantola_db", "most probable batch, measured"),
        ("learned_expected_db", "expected, prior of 1,000 other digits"),
        ("learned_db", "most probable batch with it, measured"),
        ("cosine_db", "inverting gradients, measured"),
    ):
        left.semilogx(noises, [row[name] for row in rows], "--" if "expected" in name else "o-", label=label)
    right = left.twinx()
    right.semilogx(noises, [row["resolved"] for row in rows], "k:", label="numbers resolved")
    left.set(xlabel="standard deviation of the noise on each number of the update", ylabel="PSNR, dB")
    right.set(ylabel="numbers resolved, of 64 (dotted)", ylim=(0, 66))
    left.legend()
    saved(figure, path)


def draw_defences(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(rows) + 1.2))
    places = np.arange(len(rows))
    attackers = (
        ("cosine", "0.75", "inverting gradients"),
        ("unaware", "0.5", "most probable batch, unaware"),
        ("adaptive", "tab:red", "most probable batch, knows the defence"),
    )
    for shift, (name, colour, label) in enumerate(attackers):
        axes.barh(places + (shift - 1) * 0.27, [min(row[name], 60.0) for row in rows], 0.25, label=label, color=colour)
    axes.axvline(7.1, color="k", linestyle=":", label="blind guess")
    axes.set(yticks=places, yticklabels=[row["defence"] for row in rows], xlabel="PSNR of the attack, dB (60 and more)")
    axes.invert_yaxis()
    axes.legend()
    saved(figure, path)


def draw_tradeoff(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["curve"] for row in rows))
    figure, panels = pyplot.subplots(1, len(names), figsize=(3.4 * len(names), 3.4), sharey=True)
    for name, axes in zip(names, panels):
        some = [row for row in rows if row["curve"] == name]
        axes.plot([row["at"] for row in some], [row["resolved_per_example"] for row in some], "o-", color="tab:red")
        axes.set(xscale="log", xlabel=name.replace("_", " "), ylim=(0, 66))
        axes.set_xticks([row["at"] for row in some], [f"{row['at']:g}" for row in some])
        axes.minorticks_off()
        beside = axes.twinx()
        beside.plot([row["at"] for row in some], [row["accuracy_percent"] for row in some], "s--", color="tab:blue")
        beside.set(ylim=(0, 100))
    panels[0].set(ylabel="resolved of 64 (red)")
    beside.set(ylabel="accuracy, % (blue)")
    saved(figure, path)


def saved(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("resolution", "defences", "imprint", "trade-off")
    parser.add_argument("--part", action="append", choices=parts, help="only this part; may be given again")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=1200, help="of inverting gradients")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    draws, iterations = (1, 50) if given.quick else (given.draws, given.iterations)
    found: dict[str, Any] = {}

    def say(line: str) -> None:
        print(line, flush=True)

    def keep(results: dict[str, Any]) -> None:
        if given.json:
            given.json.write_text(json.dumps(results, indent=1))

    for part in given.part or parts:
        say(f"--- {part}")
        if part == "resolution":
            found[part] = resolution(draws, iterations, say)
        elif part == "defences":
            say(as_row(COLUMNS))
            found[part] = defences(draws, iterations, given.quick, say, lambda rows: keep({**found, "defences": rows}))
        elif part == "imprint":
            found[part] = imprint(draws, say)
        else:
            found[part] = tradeoff(given.quick, say)
        keep(found)
    if given.pictures:
        pictures(found, given.pictures)


if __name__ == "__main__":
    main()
