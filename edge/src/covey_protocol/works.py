"""What a plan may ask a device to make of its data instead of a trained update: names, and what a bundle must have.

docs/protocol.md, section 8.4. Without NumPy, which the agent's own process does not load; the arithmetic is in `svrg`
and `scaffold`, `teaching`, `coding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional

from msgspec import UNSET

from covey_protocol.errors import TrainingError
from covey_protocol.messages import TRAIN, TrainingPlan
from covey_protocol.parameters import ParameterSpec

FEATURES, GRADIENT, SVRG, SCAFFOLD = "features", "gradient", "svrg", "scaffold"
TEACH, CORRECT = "teach", "teach-correct"
CYCLIC = "cyclic-code"
WORKS = (TRAIN, FEATURES, GRADIENT, SVRG, SCAFFOLD, TEACH, CORRECT, CYCLIC)
# the capability that a work needs; one of a later version is its own, so that this device declines by its name
CAPABILITY_OF = {
    TRAIN: "train",
    FEATURES: SVRG,
    GRADIENT: SVRG,
    SVRG: SVRG,
    SCAFFOLD: SCAFFOLD,
    TEACH: TEACH,
    CORRECT: TEACH,
    CYCLIC: CYCLIC,
}
LEARNERS = {  # a bundle's loss -> the learner of its last layer, as teaching.Problem calls it
    "mean_squared_error": "ridge",
    "binary_crossentropy": "logistic",
    "sparse_categorical_crossentropy": "logistic",
}
VECTORS = {SVRG: (1, 2), SCAFFOLD: (1, 1), TEACH: (2, 2)}  # fewest and most of an invitation; others have none


class BundleFacts(NamedTuple):
    """What matters here of a bundle's manifest. input_size: numbers in one example. loss: its name."""

    name: str
    parameters: Sequence[ParameterSpec]
    signatures: Sequence[str]
    train_inputs: Sequence[str]
    optimizer: str
    input_size: int
    loss: str = ""


def feature_units(bundle: BundleFacts) -> Optional[int]:
    """How many numbers of the first tensor multiply one number of an example: u, where it is a kernel (F, u) on
    examples of F numbers, as of a Dense layer that sees the inputs. None for other models."""
    first = bundle.parameters[0]
    fits = first.trainable and len(first.shape) == 2 and first.shape[0] == bundle.input_size
    return first.shape[1] if fits else None


def check_work(bundle: BundleFacts, plan: TrainingPlan) -> None:
    """TrainingError where the plan's work is none, or not this bundle's, or does not go with the rest of the plan."""
    if (plan.work == CYCLIC) != (plan.coding is not UNSET):
        raise TrainingError(f"the plan asks for {plan.work} {'without' if plan.work == CYCLIC else 'with'} a code")
    if plan.work == CYCLIC:
        _check_coding(plan)
        return
    if plan.work == TRAIN:
        if plan.steps:
            raise TrainingError(f"the plan asks for {plan.steps} steps of {TRAIN!r}", "set epochs instead")
        return
    if plan.work not in WORKS:
        raise TrainingError(f"the plan asks for the work {plan.work!r}", f"ask for one of {', '.join(WORKS)}")
    _check_beside(plan)
    moving = [spec.name for spec in bundle.parameters if not spec.trainable]
    if moving:
        raise TrainingError(
            f"the plan asks for {plan.work}, and {len(moving)} tensors of bundle {bundle.name!r} are moving statistics "
            f"({moving[0]}, ...), which have no gradient",
            "export the model with `--moving-statistics local`, or use GroupNormalization",
        )
    if plan.work in (GRADIENT, SVRG) and "gradient" not in bundle.signatures:
        raise TrainingError(f"bundle {bundle.name!r} has no entry point `gradient`", "export it again")
    if plan.work == FEATURES and feature_units(bundle) is None:
        raise TrainingError(
            f"the first tensor of bundle {bundle.name!r}, {bundle.parameters[0].name}, is no kernel on its inputs, so "
            "no parameter belongs to a feature",
            "turn feature_scaling off",
        )
    if plan.work == SCAFFOLD:
        _check_scaffold(bundle, plan)
    if plan.work in (TEACH, CORRECT):
        _check_teaching(bundle, plan)


def taught_layer(bundle: BundleFacts) -> Optional[tuple[int, int]]:
    """(F, C) where the bundle's parameters are one kernel (F, C) and its bias (C,), and what the layer sees is known.

    That is by the entry point `represent`, or as the F numbers of an example. None for other models.
    """
    if len(bundle.parameters) != 2:
        return None
    kernel, bias = (spec.shape for spec in bundle.parameters)
    seen = "represent" in bundle.signatures or kernel[:1] == (bundle.input_size,)
    return (kernel[0], kernel[1]) if len(kernel) == 2 and bias == kernel[1:] and seen else None


def _check_teaching(bundle: BundleFacts, plan: TrainingPlan) -> None:
    if plan.teaching is UNSET:
        raise TrainingError(f"the plan asks for {plan.work} without its constants", "set teaching in the plan")
    if plan.steps:
        raise TrainingError(f"the plan asks for {plan.steps} steps of {plan.work}", "leave steps out")
    layer = taught_layer(bundle)
    if layer is None:
        raise TrainingError(
            f"the parameters of bundle {bundle.name!r} are not those of one last Dense layer with a bias",
            "export the model with `covey export --teach`",
        )
    if bundle.loss not in LEARNERS or (bundle.loss == "binary_crossentropy" and layer[1] > 1):
        raise TrainingError(
            f"the loss of bundle {bundle.name!r} is {bundle.loss} of {layer[1]} outputs, which cannot be taught",
            f"export the model with one of {', '.join(LEARNERS)} (binary: one output)",
        )


def _check_coding(plan: TrainingPlan) -> None:
    """A row is made of trained updates, so all that shapes one goes with it: clipping of gradients, FedProx."""
    beside = {"metrics to evaluate": plan.evaluate, "steps": plan.steps, "compression": plan.compression != "none"}
    for name, value in beside.items():
        if value:
            raise TrainingError(f"the plan asks for {plan.work} with {name}", "leave one of them out")


def _check_beside(plan: TrainingPlan) -> None:
    """What would make another algorithm of it, or mix two kinds of numbers in what a device withholds."""
    beside = {
        "metrics to evaluate": plan.evaluate,
        "gradient_clip_norm": plan.gradient_clip_norm,
        "proximal_weight": plan.proximal_weight,
        "kept_fraction (top-k)": plan.kept_fraction,
        "compression": plan.work == FEATURES and plan.compression != "none",
    }
    for name, value in beside.items():
        if value:
            raise TrainingError(f"the plan asks for {plan.work} with {name}", "leave one of them out")


def _check_scaffold(bundle: BundleFacts, plan: TrainingPlan) -> None:
    if "correction" not in bundle.train_inputs:
        raise TrainingError(
            f"bundle {bundle.name!r} cannot add a correction to its gradient",
            "export the model with `covey export --correction`",
        )
    if bundle.optimizer != "sgd":
        raise TrainingError(
            f"SCAFFOLD reads a device's mean gradient off its update, which {bundle.optimizer} does not allow",
            "export the model with `--optimizer sgd`",
        )
    if not plan.steps:
        raise TrainingError("SCAFFOLD without a number of steps", "set steps: the same on every device")
