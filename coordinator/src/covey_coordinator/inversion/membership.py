"""Membership inference: was this example among those the model was trained on?

The attacker holds the model (or may ask it) and an example with its label. `threshold` calls the examples members that
the model explains best (Yeom et al. 2018, arXiv:1709.01604). `regression` learns from examples it knows about what a
member looks like (tensorflow-privacy's logistic-regression attack). `likelihood_ratio` (LiRA, Carlini et al. 2022,
arXiv:2112.03570) also trains models of its own with and without the example.

The attacks are tensorflow-privacy's, written anew: the released 0.9.0, which TFF 0.87 asks for, comes without its
`privacy_tests` package (tensorflow/privacy issue 555). Against the one of 0.8.12 they were checked; see
docs/model-inversion.md. TensorFlow is imported by `scores` alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.contract import AttackedModel
from covey_coordinator.inversion.grading import auc, tpr_at_fpr
from covey_protocol.errors import UsageError

Floats = npt.NDArray[np.float64]
Examples = tuple[npt.NDArray[Any], npt.NDArray[Any]]  # (x (n, *input shape), y (n, *label shape))

LOW_RATE = 0.001  # the false-positive rate at which attacks are compared (Carlini et al. 2022, section 4)
ENOUGH = 1000  # nonmembers of which one is LOW_RATE: with fewer the true-positive rate there is that at no false alarm
FOLDS = 5
CONFIDENCES = 3  # largest probabilities that `regression` looks at
ONE_SPREAD = 64  # models with, or without, an example from which LiRA estimates each example's own spread (section VI)
SEES_MODEL = "The finished model, and the examples it asks about with their labels."
SEES_MEMBERS = f"{SEES_MODEL[:-1]}, and of some of them whether they are members."
SEES_DATA = f"{SEES_MODEL[:-1]}, and data like the members' to train models of its own on."


@dataclass(frozen=True)
class Membership:
    """What an attack tells of members.

    auc: how often a member looks more like one than a nonmember does; 0.5 is guessing. auc_error: its standard
    deviation where nothing leaks, so that an AUC within 0.5 +- 2 auc_error says nothing. tpr_at_0_1_percent_fpr: the
    share of members found while at most one nonmember in 1,000 is called a member. advantage: the largest difference
    of the two rates at any threshold; a little above 0 even where nothing leaks, as it is the best of many.
    resolution: 1 / nonmembers, the smallest false-positive rate that these examples can show.
    """

    attack: str
    sees: str
    auc: float
    auc_error: float
    tpr_at_0_1_percent_fpr: float
    advantage: float
    members: int
    nonmembers: int
    resolution: float
    notes: tuple[str, ...] = ()


def membership(
    model: AttackedModel, parameters: Any, members: Examples, nonmembers: Examples, *, attack: str = "threshold"
) -> Membership:
    """What the model with these parameters (d,) tells of who was trained on.

    attack: "threshold", or "regression" for models that tell classes apart (seeded, so that it repeats). nonmembers: of
    the same kind as the members and never trained on. Examples are asked about in inference mode, as `infer` does;
    of models without classes the loss is used as it is trained on.
    """
    if attack == "threshold":
        return threshold(scores(model, parameters, *members), scores(model, parameters, *nonmembers))
    if attack == "regression":
        of_members, of_nonmembers = (_looks(_probabilities(model, parameters, x), y) for x, y in (members, nonmembers))
        return regression(of_members, of_nonmembers)
    raise UsageError(f"there is no membership attack {attack!r} here", "take threshold or regression")


def scores(model: AttackedModel, parameters: Any, x: Any, y: Any) -> Floats:
    """(n,): how well the model explains each example, larger is better: log(p / (1 - p)) of its class, else -loss.

    Give a float64 model where probabilities of nearly 1 are to be told apart.
    """
    if model.manifest.num_classes is None:
        return -_losses(model, parameters, x, y)
    probabilities = _probabilities(model, parameters, x)
    return _log_odds(_of_class(probabilities, y))


def threshold(members: Floats, nonmembers: Floats, *, attack: str = "threshold", sees: str = SEES_MODEL) -> Membership:
    """From scores, larger for members. Ties count as half in the AUC and are never split by a threshold."""
    inside, outside = (np.asarray(one, np.float64) for one in (members, nonmembers))
    if inside.ndim != 1 or outside.ndim != 1 or not len(inside) or not len(outside):
        raise UsageError(
            f"scores of shapes {inside.shape} and {outside.shape}", "give one number per member and per nonmember"
        )
    if np.isnan(inside).any() or np.isnan(outside).any():
        raise UsageError("a score is NaN", "attack a model whose outputs are finite")
    resolution = 1 / len(outside)
    notes: tuple[str, ...] = ()
    if len(outside) < ENOUGH:
        what = f"With {len(outside)} nonmembers the smallest false-positive rate above 0 is {resolution:.2g}"
        notes = (f"{what}: the rate at 0.1% is the one at no false alarm.",)
    return Membership(
        attack=attack,
        sees=sees,
        auc=auc(inside, outside),
        auc_error=math.sqrt((len(inside) + len(outside) + 1) / (12 * len(inside) * len(outside))),
        tpr_at_0_1_percent_fpr=tpr_at_fpr(inside, outside, LOW_RATE),
        advantage=advantage(inside, outside),
        members=len(inside),
        nonmembers=len(outside),
        resolution=resolution,
        notes=notes,
    )


def advantage(members: Floats, nonmembers: Floats) -> float:
    """The largest true- minus false-positive rate at any threshold (the one-sided Kolmogorov-Smirnov distance)."""
    values, places = np.unique(np.concatenate([members, nonmembers]), return_inverse=True)
    inside, outside = (
        np.bincount(part, minlength=len(values)).cumsum() / len(part) for part in np.split(places, [len(members)])
    )
    return float((outside - inside).max())


def regression(members: Floats, nonmembers: Floats, *, seed: int = 0) -> Membership:
    """A logistic regression on what the model says (n, features), each example judged by one that did not see it.

    The attacker knows of four fifths of the examples whether they are members. FOLDS parts drawn by the seed.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = np.concatenate([members, nonmembers])
    y = np.repeat([1, 0], [len(members), len(nonmembers)])
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    attacker = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    found = cross_val_predict(attacker, x, y, cv=folds, method="decision_function")
    return threshold(found[y == 1], found[y == 0], attack="regression", sees=SEES_MEMBERS)


def likelihood_ratio(target: Floats, is_member: Any, shadow: Floats, shadow_member: Any) -> Membership:
    """LiRA, online: the example's score under the target, held against its scores under models with and without it.

    target (n,), is_member (n,) bool: the attacked model's scores and the truth to grade by. shadow (k, n),
    shadow_member (k, n) bool: of k models of the attacker's, each trained on a part of the same examples; every example
    must be inside and outside of some. Scores are log-odds, which are near Gaussian (section VI-A there). Where an
    example is inside, or outside, of fewer than ONE_SPREAD models, one spread is used for all (section VI-C).
    """
    inside, outside = (_moments(shadow, mask) for mask in (shadow_member, ~shadow_member))
    ratio = _log_density(target, *inside) - _log_density(target, *outside)
    told = np.asarray(is_member, bool)
    return threshold(ratio[told], ratio[~told], attack="likelihood ratio", sees=SEES_DATA)


def _moments(shadow: Floats, mask: Any) -> tuple[Floats, Any]:
    counts = mask.sum(axis=0)
    freedom = int(counts.sum()) - len(counts)
    if not counts.all():
        raise UsageError(
            "some example is in all models of the attacker's, or in none", "train more of them, each on a half"
        )
    if not freedom:
        raise UsageError("no example is inside, or outside, of two models of the attacker's", "train more of them")
    means = np.where(mask, shadow, 0.0).sum(axis=0) / counts
    squares = np.where(mask, (shadow - means) ** 2, 0.0)
    if counts.min() >= ONE_SPREAD:
        return means, np.sqrt(squares.sum(axis=0) / counts) + np.finfo(np.float64).tiny
    return means, math.sqrt(float(squares.sum()) / freedom) + np.finfo(np.float64).tiny


def _log_density(values: Floats, means: Floats, spreads: Any) -> Floats:
    return np.asarray(-(((values - means) / spreads) ** 2) / 2 - np.log(spreads), np.float64)


def _probabilities(model: AttackedModel, parameters: Any, x: Any) -> Floats:
    """(n, ..., C)"""
    import tensorflow as tf

    given = tf.constant(np.asarray(x), model.dtype)
    return np.asarray(model.outputs(tf.constant(np.asarray(parameters), model.dtype), given), np.float64)


def _of_class(probabilities: Floats, y: Any) -> Floats:
    """(n,): the probability of each example's own class; of several places (pixels) their geometric mean."""
    classes = np.asarray(y)
    if classes.shape == probabilities.shape:  # one-hot
        classes = classes.argmax(-1)
    chosen = np.take_along_axis(probabilities, classes.astype(np.int64)[..., None], -1)[..., 0]
    if chosen.ndim == 1:
        return np.asarray(chosen)
    logs = np.log(np.maximum(chosen, np.finfo(np.float64).tiny))
    return np.asarray(np.exp(logs.reshape(len(logs), -1).mean(axis=1)))


def _log_odds(probabilities: Floats) -> Floats:
    smallest = np.finfo(np.float64).tiny
    others = np.maximum(1 - probabilities, np.finfo(np.float64).eps / 2)
    return np.asarray(np.log(np.maximum(probabilities, smallest)) - np.log(others))


def _looks(probabilities: Floats, y: Any) -> Floats:
    """(n, features) for `regression`: log-odds of the own class and of the largest probabilities of any."""
    own = _log_odds(_of_class(probabilities, y))
    flat = probabilities.reshape(len(probabilities), -1, probabilities.shape[-1]).mean(axis=1)
    largest = -np.sort(-flat, axis=1)[:, :CONFIDENCES]
    return np.column_stack([own, _log_odds(largest)])


def _losses(model: AttackedModel, parameters: Any, x: Any, y: Any) -> Floats:
    """(n,), of one pass: with weights w the loss is sum(w l) / sum(w) + r, so that at w = 1 l_i - mean = n dL/dw_i.

    r, the model's own regularisation, is in all of them alike.
    """
    import tensorflow as tf

    flat, given = (tf.constant(np.asarray(one), model.dtype) for one in (parameters, x))
    weights = tf.ones(len(x), model.dtype)
    with tf.GradientTape() as tape:
        tape.watch(weights)
        loss = model.loss(flat, given, tf.constant(np.asarray(y)), weights)
    slopes = tape.gradient(loss, weights)
    return np.asarray(loss + len(x) * slopes, np.float64)


def best(found: Sequence[Membership]) -> Membership:
    """Of several attacks, the one that finds most members at few false alarms; by AUC where they are equal."""
    return max(found, key=lambda one: (one.tpr_at_0_1_percent_fpr, one.auc))
