"""Reading an imprint out of a defended update, for a server that knows the defence.

`Imprint` divides differences of neighbouring units by one another; noise or missing numbers spoil that. Here each
bin's numbers d = (the kernel's difference, the bias's difference) are data in Tarantola's sense,

    d = a (x, 1) + noise,    x from the prior N(m0, C_M),

with the noise's size known for each number (`resolution.data_weights`). Numbers that a defence spoiled are left out;
those that it dropped because they are small are 0, give or take their size. For a factor a the most probable x is
linear in d; a is taken where the evidence N(d; a (m0, 1), a^2 C_M + noise) is largest. Clipping needs nothing: it is
in a.

For one local step. A bin of several examples gives a mixture, as without a defence. Bins are read one by one, though
neighbours share a unit and its noise, so what is read here is no bound.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.adaptive import Sent
from covey_coordinator.inversion.contract import AttackedModel, Finding
from covey_coordinator.inversion.extraction import Matrix, found, layer_on_input, plausible
from covey_coordinator.inversion.imprint import order_of_units
from covey_coordinator.inversion.priors import Prior
from covey_coordinator.inversion.resolution import data_weights
from covey_protocol.errors import UsageError
from covey_protocol.parameters import offsets

Vector = npt.NDArray[np.float64]

FACTORS, REFINED = 100, 6  # tried for a, of either sign; how often between the neighbours of the best
GAIN = 3.0  # nats by which a bin must be likelier with an example in it than empty
SEES = (
    "The update of one local step and the parameters, which this server chose; the settings of the defence; some data "
    "like the devices' own."
)


def read_imprint(model: AttackedModel, sent: Sent, prior: Prior, *, sparse: bool = False) -> Finding:
    """What came of parameters that `imprint.imprinted` made. sparse: as they were made.

    In clipped and noised updates a sparse one says less: more of the update's length is that of the layers behind.

    prior: of one example, best from data of the server's own (`learned_prior`). UsageError for several rounds.
    """
    started = time.monotonic()
    if len(sent.seen) != 1:
        raise UsageError(f"an imprint in {len(sent.seen)} rounds", "each round's parameters are its own; read one")
    (seen,) = sent.seen
    layer, behind = layer_on_input(model.specs, int(np.prod(model.input.shape)))
    variances = _variances(model, sent)
    order, gains = (slice(None), np.ones(layer.bias.size)) if sparse else order_of_units(seen.parameters, layer, behind)
    values = _by_unit(layer.gradients(np.asarray(seen.update)), order) / gains[:, None]
    spread = _by_unit(layer.gradients(variances), order) / gains[:, None] ** 2
    if not sparse:
        values[:-1] -= values[1:].copy()
        spread[:-1] += spread[1:].copy()
    inputs, evidence = _bins(values, spread, prior)
    full = evidence > GAIN
    shown = plausible(np.clip(inputs[full], *prior.range), evidence[full], model.input, seen.examples)
    return found("imprint, defence known", SEES, model, seen, shown, started)


def _variances(model: AttackedModel, sent: Sent) -> Vector:
    """(d,): of each number of the update, infinite where it is not known.

    Numbers that are 0 because the defence drops the small ones are at most as large as the smallest that is left in
    their tensor.
    """
    seen = sent.seen[0]
    weights, update = data_weights(seen, sent.spoiled), np.abs(np.asarray(seen.update, np.float64))
    missing = weights == 0.0
    variances = np.full(len(update), np.inf)
    variances[~missing] = weights[~missing] ** -2.0
    if not update[missing].any():
        for place in offsets(model.specs).values():
            left = update[place][~missing[place]]
            if left.size:
                variances[place][missing[place]] = left.min() ** 2 / 3
    return variances


def _by_unit(of_layer: tuple[Vector, Vector], order: Any) -> Matrix:
    """(units, inputs + 1): each unit's kernel and bias."""
    kernel, bias = of_layer
    return np.vstack([kernel, bias])[:, order].T


def _bins(values: Matrix, variances: Matrix, prior: Prior) -> tuple[Matrix, Vector]:
    """values, variances: (bins, S + 1), the variance infinite where a number is not known.

    (bins, S) the most probable inputs; (bins,) by how many nats they are likelier than an empty bin.
    """
    size = values.shape[1] - 1
    mean, root = np.append(prior.center(np.zeros((1, size)))[0], 1.0), prior.scaled(np.eye(size))
    covariance = np.pad(root @ root, (0, 1))
    inputs, evidence = np.tile(mean[:size], (len(values), 1)), np.full(len(values), -np.inf)
    for place, known in enumerate(np.isfinite(variances)):
        if known.any():
            weights = 1.0 / np.sqrt(variances[place, known])
            shifts, evidence[place] = _likeliest(
                values[place, known] * weights, mean[known] * weights, covariance[:, known] * weights, known, weights
            )
            inputs[place] += shifts[:size]
    return inputs, evidence


def _likeliest(data: Vector, mean: Vector, reach: Matrix, known: Any, weights: Vector) -> tuple[Vector, float]:
    """All in units of the noise: data (k,), mean (k,), reach (S + 1, k) the covariance of all numbers with the known.

    (S + 1,): how far the most probable input is from the mean; by how many nats it is likelier than none.
    """
    spread, axes = np.linalg.eigh(reach[known] * weights[:, None])
    spread = np.maximum(spread, 0.0)
    along, middle = axes.T @ data, axes.T @ mean
    most = np.linalg.norm(data) / max(float(np.linalg.norm(mean)), 1e-300)
    if most == 0.0:
        return np.zeros(len(reach)), 0.0
    sizes = most * np.geomspace(1e-4, 4.0, FACTORS)
    best, evidence = 0.0, -np.inf
    for _ in range(REFINED):
        factors = np.concatenate([sizes, -sizes]) if best == 0.0 else sizes
        widths = 1.0 + factors[:, None] ** 2 * spread
        rest = along - factors[:, None] * middle
        likelier = 0.5 * (data @ data - np.sum(rest**2 / widths + np.log(widths), axis=1))
        place = int(np.argmax(likelier))
        best, evidence = float(factors[place]), float(likelier[place])
        step = sizes[1] / sizes[0]
        sizes = (
            best * np.geomspace(1 / step, step, FACTORS) if best > 0 else best * np.geomspace(step, 1 / step, FACTORS)
        )
    weighted = (along - best * middle) / (1.0 + best**2 * spread)
    return best * reach @ (axes @ weighted), evidence
