"""Export: an untouched Keras model becomes a training bundle of TFLite builtin ops that has proved itself.

    bundle_bytes = covey_models.export(model, name="digits", batch_size=16, input_range=(0.0, 1.0))

This file is only the door and imports nothing heavy, so that `import covey_models` stays cheap; the work is done in
`covey_models.exporting`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from covey_protocol.seals import SealingKey


def export(
    model: Any,
    *,
    name: str,
    loss: str = "sparse_categorical_crossentropy",
    batch_size: int = 16,
    input_range: Optional[tuple[float, float]] = None,
    num_classes: Optional[int] = None,
    class_names: Sequence[str] = (),
    key: Optional[SealingKey] = None,
    seed: int = 0,
    metadata: Optional[Mapping[str, str]] = None,
) -> bytes:
    """The bytes of a `.covey` bundle for a built Keras model with one float32 input and one output.

    The model ends in logits: no softmax or sigmoid at the end. The returned bytes are the caller's to write.

    loss: "sparse_categorical_crossentropy" (logits (B, C), int labels), "binary_crossentropy" (one logit, labels 0 and
    1; `infer` gives both probabilities) or "mean_squared_error" (one value, float labels; `correct` is always 0).
    input_range: inclusive bounds of every input number; devices check it, and the proof draws its data from it.
    num_classes, class_names: only checked against the model and recorded. key: seals the bundle. seed: of the proof's
    data. The model is left as it was; its current weights are in the file. The same model, arguments and TensorFlow
    give the same bytes.

    Raises BundleError for a model that cannot be exported, naming the op and the layer, or whose export does not do
    what TensorFlow does, stating the measured error and the tolerance.
    """
    from covey_models.exporting import Settings, exported

    settings = Settings(
        name=name,
        loss=loss,
        batch_size=batch_size,
        input_range=input_range,
        num_classes=num_classes,
        class_names=tuple(class_names),
        seed=seed,
        metadata=dict(metadata or {}),
    )
    return exported(model, settings, key)
