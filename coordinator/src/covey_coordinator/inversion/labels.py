"""Which labels are in a batch: read off the last layer's share of an update. NumPy, SciPy for linear programs.

With softmax and cross-entropy the last layer's bias gradient is the mean of p - onehot(label) over the examples and
its kernel gradient the mean of h (p - onehot(label))' for the last features h and predictions p. From an update of
several steps all of this holds for the means along the way. Nothing here recovers inputs, or works for losses whose
gradient is not p - label.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.contract import AttackedModel, Finding, Progress, Seen, Stop
from covey_coordinator.inversion.dense import label_proportions, read_label
from covey_coordinator.inversion.matching import mean_gradient, rows_of_steps, was_clipped
from covey_protocol.errors import ConfigError, UsageError
from covey_protocol.parameters import offsets

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

LOSSES = ("sparse_categorical_crossentropy", "categorical_crossentropy", "binary_crossentropy")
PROBES = 64  # random inputs on which the attacker looks at the model's mean prediction
RANK_TOLERANCE = 1e-5  # of the largest singular value: float32 updates carry rounding of about 1e-7 of theirs
SURE = 1e-3  # of an example: a negative bias gradient below it may be rounding
PRESENT = 1e-3  # how far below 0 RLG's separating vector must reach, in units of its largest entry


@dataclass(frozen=True)
class LastLayer:
    """What an update says about the model's last layer, per class.

    kernel: (features, units) mean gradient; None where the last layer is no dense one. bias: (units,), None without.
    """

    kernel: Floats | None
    bias: Floats | None
    classes: int


def last_layer(model: AttackedModel, gradient: Floats) -> LastLayer:
    """The last layer's part of a flat gradient (d,).

    ConfigError for a model whose labels cannot be read so.
    """
    manifest = model.manifest
    if (
        manifest.loss not in LOSSES
        or not manifest.num_classes
        or manifest.label.shape not in ((), (manifest.num_classes,))
    ):
        raise ConfigError(
            f"labels cannot be read off the loss {manifest.loss!r} with labels of shape {manifest.label.shape}",
            "they can for one class an example, with cross-entropy",
        )
    classes = manifest.num_classes
    widths = {classes, 1} if classes == 2 else {classes}
    places = offsets(model.specs)
    bias = kernel = None
    for spec in [spec for spec in model.specs if spec.trainable][:-3:-1]:
        if spec.shape and spec.shape[-1] in widths:
            part = np.asarray(gradient[places[spec.name]], np.float64).reshape(spec.shape)
            bias = part if bias is None and len(spec.shape) == 1 else bias
            kernel = part if kernel is None and len(spec.shape) == 2 else kernel
    if bias is None and kernel is None:
        raise ConfigError("the model's last parameters are not one number per class", "its labels cannot be read so")
    return LastLayer(kernel, bias, classes)


def soft_labels_possible(model: AttackedModel) -> bool:
    """Whether an example's label is one class of several, so that shares of classes mean something."""
    told = model.manifest
    return told.loss in LOSSES and bool(told.num_classes) and told.label.shape in ((), (told.num_classes,))


# --- methods: (layer, examples, mean prediction or None) -> labels


def single(layer: LastLayer, examples: int, prediction: Floats) -> Labels:
    """The label of one example: the only negative entry of the bias gradient, or without a bias the only column of the
    kernel gradient whose inner products with all others are not positive.

    Source: iDLG, Zhao et al. 2020 (arXiv:2001.02610), eq. 6, with the bias where there is one.
    """
    if layer.bias is not None:
        return np.array([read_label(layer.bias)])
    kernel = _kernel(layer)
    if kernel.shape[1] == 1:
        return np.array([int(kernel.sum() < 0)])  # the features' signs are not known: right where they are positive
    products = kernel.T @ kernel
    return np.array([int(np.argmin(products.sum(1) - np.diag(products)))])


def counts(layer: LastLayer, examples: int, prediction: Floats) -> Labels:
    """As many of each class as the bias gradient b leaves: n (p - b) for n examples and their mean prediction p.

    prediction: (classes,), an estimate of p. Exact where p is; the counts are rounded to sum n. A class with b below 0
    occurs, whatever p is, and at least -n b times. An estimate that says otherwise is of no use (of a trained model,
    which is sure of its own examples and not of random inputs): the rest then goes to these classes in shares of -b.
    Source: the batch form of iDLG's argument; compare LLG's offsets (Wainakh et al. 2022, arXiv:2105.09369).
    """
    if layer.bias is None:
        raise ConfigError("counts needs the last layer's bias, and there is none", "use llg or columns")
    bias = layer.bias if layer.bias.size > 1 else np.array([-layer.bias[0], layer.bias[0]])
    found = _rounded(examples * label_proportions(-bias, 1.0, 1, prediction), examples)
    negative = np.maximum(-bias, 0.0)
    sure = np.ceil(examples * negative - SURE).astype(np.int64)
    left = examples - int(sure.sum())
    if np.all(found >= sure) or left < 0:
        return _spelled(found)
    return _spelled(sure + _rounded(left * negative / negative.sum(), left))


def columns(layer: LastLayer, examples: int, prediction: Floats) -> Labels:
    """The n classes whose kernel column has the lowest minimum; right where no class occurs twice.

    Source: GradInversion, Yin et al. 2021 (arXiv:2104.07586), eq. 6. Needs features that are not negative.
    """
    lowest = _kernel(layer).min(0)
    return np.asarray(np.sort(np.argsort(lowest, kind="stable")[:examples]))


def llg(layer: LastLayer, examples: int, prediction: Floats) -> Labels:
    """Classes one by one, each taking its share of the negative gradients away.

    Source: LLG, Wainakh et al. 2022 (arXiv:2105.09369), Algorithm 1, with shared gradients only. Needs features that
    are not negative.
    """
    left = _kernel(layer).sum(0)
    impact = left[left < 0].sum() * (1 + 1 / layer.classes) / examples
    found = [int(place) for place in np.flatnonzero(left < 0)][:examples]
    left[found] -= impact
    while len(found) < examples:
        found.append(int(left.argmin()))
        left[found[-1]] -= impact
    return np.sort(np.array(found))


def rlg(layer: LastLayer, examples: int, prediction: Floats) -> Labels:
    """Which classes occur, each named once, for fewer examples than classes.

    The rows of the kernel gradient span the vectors p - onehot(label) of the examples. A class occurs only if that span
    holds a vector which is negative there and nowhere else; a linear program finds one or says there is none.
    Source: RLG, Dang et al. 2021 (arXiv:2111.00556), section 3.
    """
    from scipy.optimize import linprog

    kernel = _kernel(layer)
    _, sizes, span = np.linalg.svd(kernel, full_matrices=False)
    span = span[: min(examples, int(np.sum(sizes > RANK_TOLERANCE * sizes[0])))]
    if len(span) >= layer.classes:
        raise ConfigError(f"{examples} examples of {layer.classes} classes", "rlg needs fewer examples than classes")
    found = []
    for one in range(layer.classes):
        others = np.delete(span.T, one, 0)
        solved = linprog(
            span[:, one], A_ub=-others, b_ub=np.zeros(len(others)), bounds=[(-1.0, 1.0)] * len(span), method="highs"
        )
        if solved.success and solved.fun < -PRESENT:
            found.append(one)
    return np.array(found, np.int64)


def _kernel(layer: LastLayer) -> Floats:
    if layer.kernel is None:
        raise ConfigError("this way of reading labels needs a dense last layer", "use counts")
    return layer.kernel.copy()


def _rounded(amounts: Floats, total: int) -> Labels:
    """Whole numbers near the amounts, which sum to `total` as these do (largest remainders)."""
    whole: Labels = np.floor(amounts + 1e-9).astype(np.int64)
    missing = total - int(whole.sum())
    whole[np.argsort(-(amounts - whole), kind="stable")[:missing]] += 1
    return whole


def _spelled(how_many: Labels) -> Labels:
    return np.repeat(np.arange(how_many.size), how_many)


METHODS: dict[str, Callable[[LastLayer, int, Floats], Labels]] = {
    "idlg": single,
    "counts": counts,
    "columns": columns,
    "llg": llg,
    "rlg": rlg,
}


@dataclass(frozen=True)
class LabelRecovery:
    """method: one of METHODS, or "auto": idlg for one example, else counts with a bias and llg without.

    Where the update was clipped its length is unknown; counts then takes the largest that leaves no class negative.
    """

    method: str = "auto"

    def __post_init__(self) -> None:
        if self.method not in ("auto", *METHODS):
            raise ConfigError(f"no way {self.method!r} to read labels", f"choose from auto, {', '.join(METHODS)}")

    @property
    def name(self) -> str:
        return "labels" if self.method == "auto" else f"labels-{self.method}"

    @property
    def sees(self) -> str:
        return "The update, the parameters sent out, the plan and how many examples the device has."

    def run(
        self, model: AttackedModel, seen: Seen, *, seed: int, stop: Stop | None = None, progress: Progress | None = None
    ) -> Finding:
        started = time.monotonic()
        layer = last_layer(model, mean_gradient(model, seen))
        method, notes = self.method, []
        if method == "auto":
            method = "idlg" if seen.examples == 1 else "counts" if layer.bias is not None else "llg"
        if method == "idlg" and seen.examples != 1:
            raise UsageError(f"idlg reads one label, and there are {seen.examples} examples", "use auto")
        prediction = mean_prediction(model, seen, seed) if method == "counts" else np.zeros(layer.classes)
        if method == "counts" and was_clipped(seen):
            layer = _lengthened(layer, prediction)
            notes.append("The update was clipped; its length was guessed from the classes that do not occur.")
        if method == "counts" and len(rows_of_steps(seen, model.manifest.batch_size)) > 1:
            notes.append("Several steps: the mean prediction along the way was taken as that of both ends.")
        labels = METHODS[method](layer, seen.examples, prediction)
        return Finding(self.name, self.sees, labels=labels, seconds=time.monotonic() - started, notes=tuple(notes))


def mean_prediction(model: AttackedModel, seen: Seen, seed: int) -> Floats:
    """(classes,): of random inputs, before and after the update. What the attacker takes for the device's own."""
    import tensorflow as tf

    low, high = model.input.minimum, model.input.maximum
    rng = np.random.default_rng(seed)
    shape = (PROBES, *model.input.shape)
    drawn = rng.uniform(low, high, shape) if low is not None and high is not None else rng.standard_normal(shape)
    x = tf.constant(drawn, model.dtype)
    ends = [seen.parameters, seen.parameters + seen.update]
    found = [np.asarray(model.outputs(tf.constant(end, model.dtype), x), np.float64) for end in ends]
    return np.asarray(np.mean([outputs.reshape(PROBES, -1).mean(0) for outputs in found], 0))


def _lengthened(layer: LastLayer, prediction: Floats) -> LastLayer:
    if layer.bias is None or layer.bias.size == 1:
        return layer
    above = layer.bias > 0
    if not above.any():
        return layer
    factor = float(np.min(prediction[above] / layer.bias[above]))
    return LastLayer(layer.kernel, layer.bias * factor, layer.classes)


def labels_for(model: AttackedModel, seen: Seen, given: Any, seed: int) -> Labels:
    """(n,): the labels that an attack on inputs starts from: those it was given, else read off the update."""
    if given is not None:
        labels = np.asarray(given, np.int64).reshape(-1)
        if labels.size != seen.examples:
            raise UsageError(f"{labels.size} labels for {seen.examples} examples", "give one for each")
        return labels
    found = LabelRecovery().run(model, seen, seed=seed).labels
    assert found is not None
    return found
