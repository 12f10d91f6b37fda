"""The last look at an update before it leaves the training child: does it state an example of this device?

The device knows its examples, so it needs no attack: it holds what can be read off the update (covey_protocol.leakage)
against them. What is judged is what travels: clipped, noised, compressed. docs/privacy-gate.md says what this cannot
see. The owner gets the reasons and a picture; the coordinator hears that there is no update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Optional

import numpy as np

from covey_edge.data_sources import Examples
from covey_edge.frames import Run
from covey_edge.leak_told import JUDGED, STOPPED
from covey_edge.png import png
from covey_edge.runtime import Floats, Model, Numbers
from covey_protocol.bundle import Manifest, TensorSpec
from covey_protocol.compression import decode
from covey_protocol.errors import TrainingError
from covey_protocol.forms import compression_of, update_seed
from covey_protocol.leakage import DenseLayer, Leak, Truth, dense_layers, label_place, leak_check, recover_input
from covey_protocol.works import GRADIENT, feature_units

__all__ = ["JUDGED", "STOPPED", "Stopped", "judge", "look"]
# whose features are compared where the first dense layer does not see the examples; each costs a gradient
FEATURE_EXAMPLES = 8
PICTURE_PIXELS = 256  # about the height of a picture


class Stopped(TrainingError):
    """found: files for the owner."""

    def __init__(self, what: str, remedy: str, found: Mapping[str, bytes]) -> None:
        super().__init__(what, remedy)
        self.found = found


def judge(model: Model, examples: Examples, request: Run, received: Floats, data: bytes) -> None:
    """Raises Stopped where the update tells more than its owner allows. data: as it travels. Changes the parameters the
    model holds. Nothing is looked at where nothing is limited, or in works that send no gradients."""
    if not (request.max_psnr_db or request.max_label_recovery) or request.plan.work not in JUDGED:
        return
    form, seed = compression_of(request.plan), update_seed(request.round_id, request.device_id)
    leak = look(model, examples, request, received, decode(data, form, seed, len(received)))
    reasons = []
    if request.max_psnr_db and leak.psnr_db is not None and leak.psnr_db > request.max_psnr_db:
        whose = "an example" if leak.direct else "the features of an example"
        reasons.append(
            f"it states {whose} (number {leak.example}) to {leak.psnr_db:.1f} dB, and max_psnr_db is "
            f"{request.max_psnr_db:g}"
        )
    if request.max_label_recovery and (leak.label_recovery or 0.0) > request.max_label_recovery:
        reasons.append(
            f"it tells {leak.label_recovery:.0%} of the labels, and max_label_recovery is "
            f"{request.max_label_recovery:.0%}"
        )
    if reasons:
        raise Stopped(
            f"the update was stopped: {'; '.join(reasons)}",
            "raise privacy.noise_multiplier or lower clip_norm, train on more examples, or allow more",
            _told(model.manifest, leak, reasons, request.round_id),
        )


def look(model: Model, examples: Examples, request: Run, received: Floats, sent: Floats) -> Leak:
    """What the update `sent` says of the examples. Leaves other parameters in the model."""
    manifest, plan = model.manifest, request.plan
    place = label_place(manifest.parameters, manifest.loss, manifest.num_classes)
    if plan.work == GRADIENT:
        update, rate, steps = -sent, 1.0, 1
    else:
        batches = -(-len(examples[0]) // manifest.batch_size)
        update, rate, steps = sent, plan.learning_rate, plan.steps or plan.epochs * batches
    truth = _truth(model, examples, received)
    return leak_check(update, received, truth, place, rate, steps)


def _truth(model: Model, examples: Examples, received: Floats) -> Truth:
    (x, y), manifest = examples, model.manifest
    labels = _labels(manifest, y)
    layers = dense_layers(manifest.parameters)
    layer = layers[0] if layers else None
    if layer is None:
        return Truth(None, x, (0.0, 0.0), True, labels)
    if feature_units(manifest.facts) is not None and layer.kernel == manifest.parameters[0]:
        return Truth(layer, x.reshape(len(x), -1), _span(manifest.input, x), True, labels)
    features = _features(model, examples, received, layer)
    if features is None:
        return Truth(None, x, (0.0, 0.0), False, labels)
    return Truth(layer, features, (float(features.min()), float(features.max())), False, labels)


def _labels(manifest: Manifest, y: Numbers) -> Optional[Numbers]:
    """(n,): each example's class; None where it has none of its own (labels of pixels, numbers to fit)."""
    flat = y.reshape(len(y), -1)
    if flat.shape[1] == 1:
        return flat[:, 0]
    one_hot = manifest.loss == "categorical_crossentropy" and len(manifest.label.shape) == 1
    return flat.argmax(axis=1) if one_hot else None


def _span(spec: TensorSpec, x: Numbers) -> tuple[float, float]:
    low, high = spec.minimum, spec.maximum
    return (float(x.min()) if low is None else low, float(x.max()) if high is None else high)


def _features(model: Model, examples: Examples, received: Floats, layer: DenseLayer) -> Optional[Numbers]:
    """What the layer sees of some examples: the gradient of one alone has rank one, and states it. None where the
    bundle has no gradient, or it says nothing."""
    if "gradient" not in model.manifest.signatures:
        return None
    x, y = examples
    model.set_parameters(received)
    rows = np.linspace(0, len(x) - 1, min(len(x), FEATURE_EXAMPLES)).astype(int)
    read = [recover_input(*layer.gradients(model.gradient(x[row : row + 1], y[row : row + 1]))) for row in rows]
    values = [one.values for one in read if one is not None and np.isfinite(one.values).all()]
    return np.stack(values).astype(np.float32) if values else None


# --- for the owner


def _told(manifest: Manifest, leak: Leak, reasons: list[str], round_id: str) -> dict[str, bytes]:
    lines = [f"round {round_id}: this device did not send its update.", *reasons, ""]
    found = {}
    if leak.reading is not None and leak.truth is not None:
        what = "the example" if leak.direct else "the features"
        picture = _picture(manifest.input, leak) if leak.direct else None
        if picture is not None:
            found["stopped.png"] = picture
            lines.append("stopped.png: left the true example, right what the update would have told.")
        else:
            lines += [f"number  {what}  what the update would have told"]
            pairs = zip(leak.truth.tolist(), leak.reading.tolist())
            lines += [f"{number}  {true:.6g}  {read:.6g}" for number, (true, read) in enumerate(pairs)]
    found["stopped.txt"] = ("\n".join(lines) + "\n").encode()
    return found


def _picture(spec: TensorSpec, leak: Leak) -> Optional[bytes]:
    """Truth and reading side by side, enlarged; None where an example is no picture."""
    shape = spec.shape if len(spec.shape) == 3 else (*spec.shape, 1)
    fits = len(spec.shape) in (2, 3) and shape[2] in (1, 3) and min(shape) >= 1
    if not fits or leak.truth is None or leak.reading is None:
        return None
    both = np.stack([leak.truth, leak.reading]).reshape(2, *shape)
    low = float(both[0].min()) if spec.minimum is None else spec.minimum
    high = float(both[0].max()) if spec.maximum is None else spec.maximum
    grey = np.clip((both - low) / max(high - low, 1e-12) * 255, 0, 255).astype(np.uint8)
    scale = max(1, math.ceil(PICTURE_PIXELS / shape[0]))
    gap = np.full((shape[0], 1, shape[2]), 255, np.uint8)
    side = np.concatenate([grey[0], gap, grey[1]], axis=1)
    return png(side.repeat(scale, axis=0).repeat(scale, axis=1))
