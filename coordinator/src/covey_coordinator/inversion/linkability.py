"""Linkability: whose update is this? Devices of unlike data make updates that resemble their own earlier ones.

Whoever sees the updates of several rounds without names (behind a mixer, after ids were changed) compares them: within
a round the mean of all is what the model had to learn anyway, so it is taken away, and what is left points the way of
the device's own data. Pure NumPy, linear in d; for every round of a live run keep `sketch`es in place of updates.

What the numbers mean: `auc` is the probability that two updates of one device resemble each other more than two of two
devices, 0.5 for chance; `identified` the share of updates whose device is named rightly out of all that were seen
before, beside `chance`. Source of the idea: the seed of this project ("A and B look alike"); compare Melis et al. 2019
(arXiv:1805.04049), section 7. It does not say what makes two devices alike: similar data do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.grading import auc
from covey_protocol.errors import UsageError

Matrix = npt.NDArray[np.float64]
SKETCH_SIZE = 4096  # numbers kept of an update: a cosine is then off by about 1 / 64


@dataclass(frozen=True)
class Linkability:
    """likeness: (n, n), the cosine of centred updates. auc: None where no device was seen in two rounds, or only one
    device was. identified: of the updates whose device was seen in an earlier round, None where none was. chance: what
    guessing among the devices seen before would reach, on average over these updates."""

    likeness: Matrix
    auc: float | None
    identified: float | None
    chance: float | None


def linkability(rows: npt.NDArray[Any], device_ids: Sequence[str], rounds: Sequence[int]) -> Linkability:
    """rows: (n, d) updates or sketches of them, finite; device_ids, rounds: whose each is and of which round.

    Pairs within one round are left out of `auc` and `identified`: taking their common mean away makes them unlike.
    """
    if not len(rows) == len(device_ids) == len(rounds):
        raise UsageError(f"{len(rows)} updates, {len(device_ids)} devices and {len(rounds)} rounds")
    likeness = cosines(centred(rows, rounds))
    ids, when = np.asarray(device_ids), np.asarray(rounds)
    apart = np.triu(when[:, None] != when[None, :])
    same = ids[:, None] == ids[None, :]
    own, others = likeness[apart & same], likeness[apart & ~same]
    found, chance = _identified(likeness, ids, when)
    return Linkability(likeness, auc(own, others) if own.size and others.size else None, found, chance)


def centred(rows: npt.NDArray[Any], rounds: Sequence[int]) -> Matrix:
    """Each round's updates without their mean; a round of one update stays as it is."""
    result, when = np.asarray(rows, np.float64).copy(), np.asarray(rounds)
    for number in np.unique(when):
        inside = when == number
        if inside.sum() > 1:
            result[inside] -= result[inside].mean(0)
    return result


def cosines(rows: Matrix) -> Matrix:
    """(n, n); 0 for a row of zeros."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(norms > 0, norms, 1.0)
    return np.asarray(np.clip(unit @ unit.T, -1.0, 1.0))


def _identified(likeness: Matrix, ids: Any, when: Any) -> tuple[float | None, float | None]:
    """Each update goes to the device whose earlier updates resemble it most, on average over these."""
    hits, chances = [], []
    for row, (device, number) in enumerate(zip(ids, when)):
        earlier = when < number
        known = sorted(set(ids[earlier]))
        if device not in known or len(known) < 2:
            continue
        alike = [float(likeness[row, earlier & (ids == one)].mean()) for one in known]
        hits.append(known[int(np.argmax(alike))] == device)
        chances.append(1 / len(known))
    return (float(np.mean(hits)), float(np.mean(chances))) if hits else (None, None)


def sketch(update: npt.NDArray[Any], seed: int, size: int = SKETCH_SIZE) -> npt.NDArray[np.float32]:
    """(size,) numbers whose inner products are those of the updates (d,), up to noise; the update itself if d <= size.

    Sums of the numbers by a random place and sign, the same for all updates of one seed and d: the count sketch of
    Charikar et al. 2002. Linear, so that sketches can be centred. An aggregate of the update, and no protection of it.
    """
    values = np.asarray(update, np.float64)
    if values.size <= size:
        return values.astype(np.float32)
    rng = np.random.default_rng([seed, values.size])
    places = rng.integers(0, size, values.size, dtype=np.int32)
    signs = rng.integers(0, 2, values.size, dtype=np.int8) * 2.0 - 1.0
    return np.bincount(places, signs * values, size).astype(np.float32)


def picture(found: Linkability, device_ids: Sequence[str], title: str) -> bytes:
    """A PNG of who resembles whom, in the order of the devices: blocks on the diagonal are devices that can be told."""
    from covey_coordinator.reproduce.pictures import new_figure, png

    ids = np.asarray(device_ids)
    order = np.argsort(ids, kind="stable")
    figure, panels = new_figure(1, size=(5.4, 4.6))
    axes = panels[0, 0]
    image = axes.imshow(found.likeness[np.ix_(order, order)], cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest")
    names, starts, counts = np.unique(ids[order], return_index=True, return_counts=True)
    axes.set_xticks([])
    axes.set_yticks(starts + counts / 2 - 0.5, names, fontsize=7)
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="#bbbbbb", linewidth=0.5)
        axes.axvline(start - 0.5, color="#bbbbbb", linewidth=0.5)
    told = "" if found.auc is None else f"\nsame device: AUC {found.auc:.2f}"
    if found.identified is not None and found.chance is not None:
        told += f"; named rightly {found.identified:.0%} (chance {found.chance:.0%})"
    axes.set_title(title + told, fontsize=8)
    figure.colorbar(image, label="likeness of updates (cosine)")
    return png(figure)
