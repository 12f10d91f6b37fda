"""How much an attack got: its finding held against the truth. Pure NumPy, SciPy only for the assignment.

Attacks never see this module. MSE and PSNR are `metrics`; here are SSIM, the matching of a recovered batch to the true
one, and shares of labels and examples that came out. Not here: distances that need a trained network (LPIPS).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.contract import Finding
from covey_coordinator.inversion.metrics import mse, psnr
from covey_protocol.errors import UsageError

Numbers = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

WINDOW, WINDOW_STD = 11, 1.5  # Wang et al. 2004 (IEEE TIP 13(4)), section III.B; smaller where the picture is smaller
STEADY = (0.01, 0.03)  # their K1 and K2
MISSING = -1


@dataclass(frozen=True)
class Grade:
    """One finding against n true examples; one entry per true example, in their order.

    matched: (n,) which recovered input was taken for it, MISSING for none. mse, psnr_db, ssim: (n,), NaN where none
    was; ssim is None for inputs that are no pictures. label_rate: share of the true labels found (None: no labels).
    identified: share of true examples whose recovered input is nearer to them than to all others of the gallery
    (None: no gallery). One that is missing counts as not identified.
    """

    matched: Indices
    mse: Floats
    psnr_db: Floats
    ssim: Floats | None
    label_rate: float | None
    identified: float | None

    @property
    def best(self) -> int:
        """The true example that came out best; UsageError where none came out."""
        if not np.isfinite(self.mse).any():
            raise UsageError("no example was recovered", "look at matched first")
        return int(np.nanargmin(self.mse))

    @property
    def mean_psnr_db(self) -> float:
        """Of the recovered examples; NaN without one."""
        found = self.psnr_db[self.matched != MISSING]
        return float(found.mean()) if found.size else float("nan")


def grade(
    finding: Finding,
    truth: Numbers,
    labels: Numbers,
    input_range: tuple[float, float],
    gallery: Numbers | None = None,
) -> Grade:
    """truth: (n, *input shape), all that the device trained on. labels: (n,). gallery: (g, *input shape), others that a
    recovered one could be taken for; the true ones are added.

    A finding of more inputs than n is matched n to n at the least total squared error: what it made up beside that is
    not counted against it.
    """
    label_rate = None if finding.labels is None else label_leak_rate(labels, finding.labels)
    if finding.inputs is None or not len(finding.inputs):
        nothing, matched = np.full(len(truth), np.nan), np.full(len(truth), MISSING)
        unfound = None if gallery is None else 0.0
        return Grade(matched, nothing, nothing, nothing if _is_picture(truth) else None, label_rate, unfound)
    matched = matching(truth, finding.inputs)
    pairs = [(one, finding.inputs[place] if place != MISSING else None) for one, place in zip(truth, matched)]
    errors = np.array([np.nan if found is None else mse(one, found) for one, found in pairs])
    likeness = [
        np.nan if found is None else ssim(one, found, input_range) for one, found in pairs if _is_picture(truth)
    ]
    return Grade(
        matched,
        errors,
        np.array([psnr(error, input_range) for error in errors]),
        np.array(likeness) if _is_picture(truth) else None,
        label_rate,
        None if gallery is None else identification_rate(truth, finding.inputs, matched, gallery),
    )


def matching(truth: Numbers, recovered: Numbers) -> Indices:
    """(n,): for every true example the recovered one it is paired with, MISSING where there are too few.

    truth: (n, ...), recovered: (m, ...), the same shape of an example. The pairs have the least total squared error.
    """
    from scipy.optimize import linear_sum_assignment

    if truth.shape[1:] != recovered.shape[1:]:
        raise UsageError(f"cannot match inputs of shapes {truth.shape[1:]} and {recovered.shape[1:]}")
    rows, columns = linear_sum_assignment(_distances(truth, recovered))
    found = np.full(len(truth), MISSING)
    found[rows] = columns
    return found


def identification_rate(truth: Numbers, recovered: Numbers, matched: Indices, gallery: Numbers) -> float:
    """The share of true examples that their recovered input picks out of all true ones and the gallery (nearest, MSE).

    Chance is 1 / (n + g). Copies of a true example in the gallery make it a tie, which counts as not identified.
    """
    everyone = np.concatenate([truth, gallery])
    hits = 0
    for one, place in enumerate(matched):
        if place == MISSING:
            continue
        distances = _distances(recovered[place][None], everyone)[0]
        others = np.delete(distances, one)
        hits += bool(distances[one] < others.min()) if others.size else True
    return hits / len(truth)


def label_leak_rate(true: Numbers, found: Numbers) -> float:
    """The share of the true labels that were found, each as often as it occurs. true: (n,), found: (m,), in any order.

    Whoever names every class often enough would find all: only the first n of `found` count.
    """
    there, said = Counter(_numbers(true)), Counter(_numbers(found)[: np.size(true)])
    return sum((there & said).values()) / max(np.size(true), 1)


def _numbers(labels: Numbers) -> list[int]:
    return [int(label) for label in np.asarray(labels).reshape(-1)]


def _distances(first: Numbers, second: Numbers) -> Floats:
    """(n, m): mean squared differences. Written as differences: exact recoveries lie far below rounding of |x|^2."""
    left, right = (np.asarray(part, np.float64).reshape(len(part), -1) for part in (first, second))
    return np.stack([np.mean((right - row) ** 2, 1) for row in left])


# --- pictures


def _is_picture(inputs: Numbers) -> bool:
    """(n, height, width, channels), at least 2 x 2."""
    return inputs.ndim == 4 and min(inputs.shape[1:3]) > 1


def ssim(truth: Numbers, recovered: Numbers, input_range: tuple[float, float]) -> float:
    """Structural similarity of two pictures (height, width, channels), the mean over windows and channels; 1 is equal.

    Gaussian windows of 11 x 11 (the picture's side where that is smaller), standard deviation 1.5, no padding.
    Source: Wang et al. 2004 (IEEE TIP 13(4)), eq. 13; the values are those of tf.image.ssim.
    """
    if truth.shape != recovered.shape or truth.ndim != 3:
        raise UsageError(f"cannot compare pictures of shapes {truth.shape} and {recovered.shape}")
    span = input_range[1] - input_range[0]
    c1, c2 = ((steady * span) ** 2 for steady in STEADY)
    x, y = truth.astype(np.float64), recovered.astype(np.float64)
    mean_x, mean_y = _blurred(x), _blurred(y)
    variances = _blurred(x * x + y * y) - mean_x**2 - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float(np.mean(luminance * (2 * covariance + c2) / (variances + c2)))


def _blurred(picture: Floats) -> Floats:
    size = min(WINDOW, *picture.shape[:2])
    rows, columns = (_windows(side, size) for side in picture.shape[:2])
    return np.asarray(np.einsum("ih,hwc,jw->ijc", rows, picture, columns, optimize=True))


def _windows(side: int, size: int) -> Floats:
    """(side - size + 1, side): one Gaussian window a row."""
    bell = np.exp(-((np.arange(size) - (size - 1) / 2) ** 2) / (2 * WINDOW_STD**2))
    bell /= bell.sum()
    return np.stack([np.pad(bell, (start, side - size - start)) for start in range(side - size + 1)])


# --- scores that say yes or no


def auc(positive: Numbers, negative: Numbers) -> float:
    """The probability that a positive's score is above a negative's; a tie counts half. Either (n,), finite."""
    _check_scores(positive, negative)
    ordered = np.sort(np.asarray(negative, np.float64))
    below, not_above = (np.searchsorted(ordered, positive, side) for side in ("left", "right"))
    return float((below + not_above).mean() / (2 * ordered.size))


def tpr_at_fpr(positive: Numbers, negative: Numbers, fpr: float) -> float:
    """The share of positives above a threshold that at most this share of negatives exceeds, at the best threshold.

    With n negatives the smallest rate above 0 that can be told is 1 / n; below it this is the share of positives
    above all negatives.
    """
    _check_scores(positive, negative)
    allowed = int(np.floor(fpr * np.size(negative) + 1e-9))
    descending = np.sort(np.asarray(negative, np.float64))[::-1]
    if allowed >= descending.size:
        return 1.0
    return float(np.mean(np.asarray(positive, np.float64) > descending[allowed]))


def _check_scores(positive: Numbers, negative: Numbers) -> None:
    if not (np.size(positive) and np.size(negative)):
        raise UsageError("no scores to compare", "give at least one of each side")
    if not (np.isfinite(positive).all() and np.isfinite(negative).all()):
        raise UsageError("a score is NaN or infinite", "leave it out or say what it means")
