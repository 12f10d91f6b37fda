"""The proof never refuses a right bundle and never passes a wrong one, shown with faults planted in the lowering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from covey_models import export
from covey_models._tensorflow import import_tensorflow
from covey_models.lowering import LOWERINGS, Node, convolution, normalisation, variables
from covey_protocol.bundle import Proof, read_bundle
from covey_protocol.errors import BundleError

tf = import_tensorflow()
layers = tf.keras.layers


def convolutions(activation: str = "relu") -> Any:
    """A small net: agrees with float32 TensorFlow, so that is its judge."""
    tf.keras.utils.set_random_seed(3)
    parts = [layers.Conv2D(6, 3, activation=activation), layers.BatchNormalization(), layers.MaxPool2D(2)]
    return tf.keras.Sequential([layers.InputLayer((8, 8, 2)), *parts, layers.Flatten(), layers.Dense(3)])


def amplifier() -> Any:
    """BatchNorm over few values, deep enough that one flipped ReLU6 moves the step by more than any tolerance."""
    tf.keras.utils.set_random_seed(1)
    inputs = x = layers.Input((8, 8, 3))
    for strides in (2, 1, 2, 1, 1, 1):
        x = layers.BatchNormalization()(layers.DepthwiseConv2D(3, strides, "same", use_bias=False)(x))
        x = layers.BatchNormalization()(layers.Conv2D(24, 1, use_bias=False)(x))
        x = layers.Activation(tf.nn.relu6)(x)
    return tf.keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


def proved(model: Any, **settings: Any) -> Proof:
    found = read_bundle(
        export(model, name="proved", **{"batch_size": 4, "input_range": (0.0, 1.0), **settings})
    ).manifest.proof
    assert found is not None
    return found


def test_a_small_net_is_judged_by_float32_tensorflow() -> None:
    found = proved(convolutions())
    assert (found.judgement, found.steps) == ("float32", 6)
    assert found.max_abs_error < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_net_whose_relus_flip_is_judged_by_float64_and_passes(seed: int) -> None:
    found = proved(amplifier(), batch_size=2, seed=seed)
    assert found.judgement == "float64"


# --- faults. Each makes the lowering wrong by the least that still matters.


def without_a_kink(node: Node, dy: Any, y: Any) -> Any:
    return dy


def without_the_upper_kink(node: Node, dy: Any, y: Any) -> Any:
    return dy * tf.sign(tf.nn.relu6(y))


def to_the_last_maximum(original: Callable[..., Any]) -> Callable[..., Any]:
    def fault(node: Node, images: Any, pooled: Any, dy: Any) -> Any:
        return tf.reverse(original(node, tf.reverse(images, [2]), tf.reverse(pooled, [2]), tf.reverse(dy, [2])), [2])

    return fault


def scaled(original: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """The first output, off by a factor."""

    def fault(node: Node, *inputs: Any) -> Any:
        outputs = original(node, *inputs)
        return (outputs[0] * factor, *outputs[1:]) if isinstance(outputs, (tuple, list)) else outputs * factor

    return fault


def slower_descent(node: Node, handle: Any, value: Any) -> Any:
    return variables.assign(handle, variables.read(handle, value) - 0.999 * value)


def without_the_mean(node: Node, dy: Any, x: Any, scale: Any, mean: Any, variance: Any, unused: Any) -> Any:
    """BatchNorm's gradient as if the batch mean did not depend on the batch."""
    dx, d_scale, d_offset, *rest = normalisation.batch_norm_gradient(node, dy, x, scale, mean, variance, unused)
    inverse = tf.math.rsqrt(variance + node.attribute("epsilon"))
    count = float(np.prod(x.shape[:-1]))
    return (dx + scale * inverse * d_offset / count, d_scale, d_offset, *rest)


SMALL_NET_FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "a ReLU without a kink": ("ReluGrad", without_a_kink),
    "a convolution 1e-4 too large": ("Conv2D", scaled(convolution.convolution, 1.0001)),
    "a filter gradient 1e-4 too large": (
        "Conv2DBackpropFilter",
        scaled(convolution.convolution_filter_gradient, 1.0001),
    ),
    "a step 1e-3 too short": ("AssignSubVariableOp", slower_descent),
    "a BatchNorm whose mean is a constant": ("FusedBatchNormGradV3", without_the_mean),
    "a loss 1e-4 too large": (
        "SparseSoftmaxCrossEntropyWithLogits",
        scaled(LOWERINGS["SparseSoftmaxCrossEntropyWithLogits"], 1.0001),
    ),
    "a bias gradient 1e-4 too large": ("BiasAddGrad", scaled(LOWERINGS["BiasAddGrad"], 1.0001)),
}

FLIPPING_NET_FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "a ReLU6 without a kink": ("Relu6Grad", without_a_kink),
    "a ReLU6 without its upper kink": ("Relu6Grad", without_the_upper_kink),
    "a depthwise filter gradient 1e-3 too large": (
        "DepthwiseConv2dNativeBackpropFilter",
        scaled(convolution.depthwise_filter_gradient, 1.001),
    ),
    "a BatchNorm 1e-4 too large": ("FusedBatchNormV3", scaled(normalisation.batch_norm, 1.0001)),
    "a BatchNorm whose mean is a constant": ("FusedBatchNormGradV3", without_the_mean),
    "a step 1e-3 too short": ("AssignSubVariableOp", slower_descent),
}


EVERYDAY = ("a ReLU without a kink", "a filter gradient 1e-4 too large", "a BatchNorm whose mean is a constant")


@pytest.mark.parametrize(
    "fault", [name if name in EVERYDAY else pytest.param(name, marks=pytest.mark.slow) for name in SMALL_NET_FAULTS]
)
def test_a_fault_in_a_small_net_is_refused(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op_type, wrong = SMALL_NET_FAULTS[fault]
    assert op_type in LOWERINGS
    monkeypatch.setitem(LOWERINGS, op_type, wrong)
    with pytest.raises(BundleError, match="does not do what TensorFlow does"):
        proved(convolutions())


@pytest.mark.slow
@pytest.mark.parametrize("fault", FLIPPING_NET_FAULTS)
def test_a_fault_in_a_net_whose_relus_flip_is_refused(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op_type, wrong = FLIPPING_NET_FAULTS[fault]
    assert op_type in LOWERINGS
    monkeypatch.setitem(LOWERINGS, op_type, wrong)
    with pytest.raises(BundleError, match="does not do what TensorFlow does"):
        proved(amplifier(), batch_size=2)
