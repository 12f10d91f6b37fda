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
    loss: Any = "sparse_categorical_crossentropy",
    optimizer: Any = "sgd",
    batch_size: int = 16,
    input_range: Optional[tuple[float, float]] = None,
    label_dtype: Optional[str] = None,
    label_shape: Optional[Sequence[int]] = None,
    num_classes: Optional[int] = None,
    class_names: Sequence[str] = (),
    clip: bool = False,
    proximal: bool = False,
    correction: bool = False,
    moving_statistics: str = "average",
    teach: bool = False,
    round_outputs: float = 0.0,
    key: Optional[SealingKey] = None,
    seed: int = 0,
    metadata: Optional[Mapping[str, str]] = None,
) -> bytes:
    """The bytes of a `.covey` bundle for a built Keras model with one input and one output.

    The returned bytes are the caller's to write. The model is left as it was; its current weights are in the file. The
    same model, arguments and TensorFlow give the same bytes.

    loss: a name, a Keras loss object, or a function (labels, outputs) -> one number per example. For outputs of shape
        (..., C): "sparse_categorical_crossentropy" (int labels (...)), "categorical_crossentropy" (one-hot labels);
        "binary_crossentropy" (one output: labels 0 and 1; several: float labels of their shape);
        "mean_squared_error", "mean_absolute_error", "huber" (float labels, () for one output, else of its shape).
        Models end in logits, or in a softmax or sigmoid, which the cross entropies reach behind.
    optimizer: "sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "adagrad" or a Keras optimizer. The learning
        rate is an input of the step: the plan of a round sets it.
    input_range: inclusive bounds of every input number; devices check it, and the proof draws its data from it. Models
        of whole numbers (int32) need it.
    label_dtype, label_shape: of a user's own loss ("float32" and the output's shape, if left out).
    num_classes, class_names: checked against the model and recorded; for a user's own loss on int labels, their range.
    clip, proximal, correction: give `train` the inputs for global-norm gradient clipping, for the proximal term of
        FedProx (Li et al. 2020, arXiv:1812.06127), and for a vector added to the gradient (SVRG, SCAFFOLD).
    moving_statistics: "average" sends BatchNorm's moving mean and variance along with the trained parameters; "local"
        keeps them on each device. What is neither trained nor moving is a constant of the file and never travels.
    teach: train the last Dense layer only, with all before it as constants, and give the bundle the entry point
        `represent`, which gives what that layer sees (machine teaching).
    round_outputs: `infer` answers with probabilities rounded to multiples of this, 0 for off. Training and evaluation
        stay as they are. It hides little: docs/model-inversion.md.
    key: seals the bundle. seed: of the proof's data.

    Raises BundleError for a model that cannot be exported, naming the op and the layer, or whose export does not do
    what TensorFlow does, stating the measured error and the tolerance.
    """
    from covey_models.exporting import Settings, exported

    settings = Settings(
        name=name,
        loss=loss,
        optimizer=optimizer,
        batch_size=batch_size,
        input_range=input_range,
        label_dtype=label_dtype,
        label_shape=None if label_shape is None else tuple(label_shape),
        num_classes=num_classes,
        class_names=tuple(class_names),
        clip=clip,
        proximal=proximal,
        correction=correction,
        moving_statistics=moving_statistics,
        teach=teach,
        round_outputs=round_outputs,
        seed=seed,
        metadata=dict(metadata or {}),
    )
    return exported(model, settings, key)
