"""Devices of which most are corrupted, with few trusted instances: data, split and corruption of the experiments.

A world is drawn from a table with a seed: devices with noisy instances, trusted, validation and test instances.
Features are in [-1, 1] before corruption and get a column of ones. Targets are made comparable by the *trusted*
instances' mean and standard deviation, since nobody knows others. What happens to devices is one of CORRUPTIONS below.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from covey_coordinator.grid.simulation import stream
from covey_coordinator.reproduce import data
from covey_coordinator.teaching.baselines import Problem
from covey_coordinator.teaching.fitting import LOGISTIC, RIDGE, Data, Floats
from covey_models.datasets import breast_cancer, digits

SPLIT, NOISE, FEATURES, FOLDS = 61, 62, 63, 64  # streams of random numbers of a seed
TRAIN, VALIDATION = 0.6, 0.1
LEAST_TRUSTED = 6
MEAN_SHIFT, TARGET_SHIFT = 5.0, 2.5
POSITIVE_FLIPS = 2.0 / 3.0
KINDS = {
    "abalone": RIDGE,
    "cpusmall": RIDGE,
    "spambase": LOGISTIC,
    "breast-cancer": LOGISTIC,
    "deep-digits": LOGISTIC,
}
DEEP_CLASSES, DEEP_UNITS = (3, 8), 32


class World(NamedTuple):
    """problem: what a method gets. validation and test: clean. clean: the devices' instances before corruption."""

    problem: Problem
    validation: Data
    test: Data
    clean: Problem


def table(name: str, folder: Path | None) -> tuple[str, Data]:
    """(kind, the whole table): a name of KINDS. Features in [-1, 1]."""
    kind = KINDS[name]
    x, y = data.regression_table(folder, f"{name}.csv") if kind == RIDGE else _classes(name, folder)
    return kind, Data(scaled(x), y)


@functools.lru_cache(maxsize=4)
def _classes(name: str, folder: Path | None) -> tuple[Floats, Floats]:
    if name == "breast-cancer":
        found = breast_cancer()
        return found.x.astype(np.float64), np.where(found.y > 0, 1.0, -1.0)
    if name == "deep-digits":
        return _deep_digits()
    train, test = data.spambase(folder, 0)
    x, y = np.concatenate([train.x, test.x]), np.concatenate([train.y, test.y])
    return x.astype(np.float64), np.where(y > 0, 1.0, -1.0)


def _deep_digits() -> tuple[Floats, Floats]:
    """3 (-1) against 8 (1) of the digits, by the hidden units of a net that learned to tell the other eight apart."""
    from sklearn.neural_network import MLPClassifier

    found = digits()
    x = found.x.reshape(len(found.y), -1).astype(np.float64)
    ours = np.isin(found.y, DEEP_CLASSES)
    net = MLPClassifier((DEEP_UNITS,), random_state=0, max_iter=60, tol=0.0, n_iter_no_change=60)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Stochastic Optimizer")  # 60 passes are meant, not convergence
        net.fit(x[~ours], found.y[~ours])
    hidden = np.maximum(x[ours] @ net.coefs_[0] + net.intercepts_[0], 0.0)
    return hidden, np.where(found.y[ours] == DEEP_CLASSES[1], 1.0, -1.0)


def scaled(x: Floats) -> Floats:
    """To [-1, 1] by each feature's least and largest value; a constant one becomes -1."""
    low, high = x.min(0), x.max(0)
    return np.asarray(2.0 * (x - low) / np.where(high > low, high - low, 1.0) - 1.0)


def drawn(settings: dict[str, Any], seed: int, folder: Path | None) -> World:
    """settings: data, devices, trusted (a share of the table, or a number of instances from 1 on), corruption and its
    own settings (`CORRUPTIONS`), corrupted (the share of devices), fourier (random Fourier features, 0 for none)."""
    kind, whole = table(settings["data"], folder)
    order = _order(kind, whole.y, settings, seed)
    parts = {name: whole.take(rows) for name, rows in order.items()}
    clean = _shares(parts.pop("train"), settings["devices"])
    hit = max(0, min(settings["devices"], round(settings["corrupted"] * settings["devices"])))
    change, random = CORRUPTIONS[settings["corruption"]], stream(seed, NOISE)
    noisy = [change(part, settings, random) if place < hit else part for place, part in enumerate(clean)]
    if settings["corruption"] == "hidden":
        noisy, clean, parts = _appearing(noisy, clean, parts, settings["appear"])
    lift = lifted(settings["fourier"], whole.x.shape[1], seed)
    middle, spread = (0.0, 1.0) if kind == LOGISTIC else (parts["trusted"].y.mean(), parts["trusted"].y.std() + 1e-9)

    def ready(part: Data) -> Data:
        return Data(lift(part.x), (part.y - middle) / spread)

    trusted = [ready(part) for part in _shares(parts["trusted"], settings["devices"])]
    return World(
        Problem(kind, [ready(part) for part in noisy], trusted),
        ready(parts["validation"]),
        ready(parts["test"]),
        Problem(kind, [ready(part) for part in clean], trusted),
    )


def _order(kind: str, y: Floats, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Rows of train, validation, trusted and test. Trusted instances of both classes: one in two of the first four is
    of each."""
    n = len(y)
    order = stream(seed, SPLIT).permutation(n)
    train, validation = round(TRAIN * n), round(VALIDATION * n)
    rest = order[train + validation :]
    asked = settings["trusted"]
    number = max(LEAST_TRUSTED if asked < 1 else 1, round(asked * n) if asked < 1 else int(asked))
    if kind == LOGISTIC:
        ones, others = rest[y[rest] > 0][:2], rest[y[rest] <= 0][:2]
        first = np.stack([ones, others], axis=1).ravel()
        rest = np.concatenate([first, rest[~np.isin(rest, first)]])
    return {
        "train": order[:train],
        "validation": order[train : train + validation],
        "trusted": rest[:number],
        "test": rest[number:],
    }


def _shares(part: Data, devices: int) -> list[Data]:
    return [part.take(rows) for rows in np.array_split(np.arange(len(part.y)), devices)]


def lifted(features: int, width: int, seed: int) -> Callable[[Floats], Floats]:
    """Adds the column of ones; before it, random Fourier features (Rahimi, Recht 2007) of a Gaussian kernel whose
    length is the square root of the width, if asked for."""
    if not features:
        return lambda x: np.concatenate([x, np.ones((len(x), 1))], axis=1)
    random = stream(seed, FEATURES)
    directions = random.normal(size=(width, features)) / np.sqrt(width)
    phases = random.uniform(0, 2 * np.pi, features)

    def lift(x: Floats) -> Floats:
        return np.concatenate([np.sqrt(2.0 / features) * np.cos(x @ directions + phases), np.ones((len(x), 1))], axis=1)

    return lift


Random = np.random.Generator


def noisy_features(part: Data, settings: dict[str, Any], random: Random) -> Data:
    """Normal noise of variance `variance`; the mean of each feature's is U(-5, 5), drawn once for the device."""
    width = part.x.shape[1]
    shift = random.uniform(-MEAN_SHIFT, MEAN_SHIFT, width)
    return Data(part.x + shift + np.sqrt(settings["variance"]) * random.normal(size=part.x.shape), part.y)


def noisy_targets(part: Data, settings: dict[str, Any], random: Random) -> Data:
    """Normal noise of variance `variance`, in the table's unit; its mean is U(-2.5, 2.5) times the mean |y|."""
    shift = random.uniform(-TARGET_SHIFT, TARGET_SHIFT) * np.abs(part.y).mean()
    return Data(part.x, part.y + shift + np.sqrt(settings["variance"]) * random.normal(size=len(part.y)))


def flipped(part: Data, settings: dict[str, Any], random: Random) -> Data:
    """A share `flips` of the labels; two thirds of the flipped ones are positive, or all positive ones there are."""
    number = round(settings["flips"] * len(part.y))
    ones, others = (random.permutation(np.flatnonzero(part.y * sign > 0)) for sign in (1, -1))
    of_ones = min(round(POSITIVE_FLIPS * number), len(ones))
    y = part.y.copy()
    y[ones[:of_ones]] *= -1
    y[others[: number - of_ones]] *= -1
    return Data(part.x, y)


def hidden(part: Data, settings: dict[str, Any], random: Random) -> Data:
    """NaN where a user hides an attribute. Not at random: of the `attributes` share of the attributes that tell most of
    the target (largest |correlation| on the device), every value above the device's own median is hidden."""
    del random
    shown = np.where(part.x.std(0) > 0, part.x.std(0), 1.0)
    telling = np.abs((part.x - part.x.mean(0)).T @ (part.y - part.y.mean())) / shown
    number = max(1, round(settings["attributes"] * part.x.shape[1]))
    chosen = np.argsort(-telling, kind="stable")[:number]
    x = part.x.copy()
    values = x[:, chosen]
    values[values > np.median(values, axis=0)] = np.nan
    x[:, chosen] = values
    return Data(x, part.y)


CORRUPTIONS: dict[str, Callable[[Data, dict[str, Any], Random], Data]] = {
    "features": noisy_features,
    "targets": noisy_targets,
    "flips": flipped,
    "hidden": hidden,
}


def _appearing(
    noisy: list[Data], clean: list[Data], parts: dict[str, Data], how: str
) -> tuple[list[Data], list[Data], dict[str, Data]]:
    """What stands in the place of hidden values: `zero` (the middle of the scale), `mean` of the device's shown ones,
    or `missing`: the trusted instances' mean, and for every attribute a column that is 1 where it is hidden."""
    if how == "zero":
        return [Data(np.nan_to_num(part.x, nan=0.0), part.y) for part in noisy], clean, parts
    if how == "mean":
        return [Data(_filled(part.x, np.nanmean(part.x, axis=0)), part.y) for part in noisy], clean, parts
    known = parts["trusted"].x.mean(0)

    def marked(part: Data) -> Data:
        return Data(np.concatenate([_filled(part.x, known), np.isnan(part.x) * 1.0], axis=1), part.y)

    return [marked(part) for part in noisy], [marked(part) for part in clean], {k: marked(p) for k, p in parts.items()}


def _filled(x: Floats, values: Floats) -> Floats:
    return np.where(np.isnan(x), values, x)
