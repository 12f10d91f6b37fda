"""Parity of the lowerings: every export proves itself, so a table of models is a table of proofs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from export_helpers import opened
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_models import export
from covey_models._tensorflow import import_tensorflow
from covey_models.convert import operators
from covey_models.lowering import LOWERINGS, layer_of, lower, lowers
from covey_models.lowering.geometry import Window
from covey_protocol.bundle import read_bundle

tf = import_tensorflow()
layers = tf.keras.layers


class Sliced(layers.Layer):  # type: ignore[misc,name-defined]
    def call(self, x: Any) -> Any:
        part = x[:, 2:9, :, 1:]
        return part[:, :, -1, :] * 2.0 + part[..., 0, :] + x[:, -8:-1, 0, tf.newaxis, 0]


class Mathematics(layers.Layer):  # type: ignore[misc,name-defined]
    def call(self, x: Any) -> Any:
        y = tf.sqrt(tf.abs(x) + 0.1) + tf.math.rsqrt(x * x + 1.0) + tf.pow(tf.abs(tf.tanh(x)) + 1.0, 1.5)
        y += tf.math.log1p(x * x) + tf.math.expm1(-x * x) + tf.math.divide_no_nan(x, tf.sign(tf.nn.relu(x)))
        y += x / (1.0 + tf.reduce_sum(x * x, -1, keepdims=True)) + tf.math.squared_difference(x, 0.3) + tf.square(x)
        y += x - tf.reduce_mean(x, [1, 2], keepdims=True) + tf.nn.leaky_relu(x, 0.3)
        y += tf.maximum(x, 0.2) + tf.clip_by_value(x, -0.5, 0.5) + tf.math.reciprocal(x * x + 1.0)
        return 0.1 * y  # outputs of size one, so that the steps converge and do not amplify rounding


class Decorated(layers.Layer):  # type: ignore[misc,name-defined]
    """Calls a nested tf.function, whose body and gradient are other graphs."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight("scale", (shape[-1],), initializer="ones")

    @tf.function  # type: ignore[untyped-decorator]
    def scaled(self, x: Any) -> Any:
        return tf.nn.relu(x * self.scale)

    def call(self, x: Any) -> Any:
        return self.scaled(x)


def pooled_and_summed(x: Any) -> Any:
    """A ReLU that feeds a max pool and something else, so that the pool's gradient is not all it gets."""
    x = layers.Conv2D(6, 3, activation="relu", padding="same")(x)
    return layers.Concatenate()([layers.MaxPool2D(2)(x), layers.AveragePooling2D(2)(x)])


class Pooled(layers.Layer):  # type: ignore[misc,name-defined]
    """ReLU and max pool in a nested tf.function, and a gradient that leaves the function between the two."""

    @tf.function  # type: ignore[untyped-decorator]
    def positive(self, x: Any) -> Any:
        return tf.nn.relu(x)

    @tf.function  # type: ignore[untyped-decorator]
    def pooled(self, x: Any) -> Any:
        return tf.nn.max_pool2d(tf.nn.relu(x), 2, 2, "VALID") + tf.nn.max_pool2d(self.positive(x), 2, 2, "VALID")

    def call(self, x: Any) -> Any:
        return self.pooled(x)


def squeeze_and_excite(x: Any) -> Any:
    """Residual add, concatenation, gating and zero padding."""
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(x)
    gate = layers.Dense(8, activation="sigmoid")(layers.Dense(4, activation="relu")(layers.GlobalAveragePooling2D()(x)))
    x = layers.Multiply()([x, layers.Reshape((1, 1, 8))(gate)])
    return layers.ZeroPadding2D(1)(layers.Concatenate()([layers.Add()([x, layers.Conv2D(8, 1)(x)]), x]))


def frozen(x: Any) -> Any:
    convolution, norm = layers.Conv2D(6, 3, activation="relu", trainable=False), layers.BatchNormalization()
    norm.trainable = False
    return norm(convolution(x))


def activations(*names: str) -> list[Any]:
    """One convolution per activation, in a row."""
    return [layers.Conv2D(4, 1, activation=name) for name in names]


CASES: dict[str, Any] = {
    "dense layers": lambda: [layers.Flatten(), layers.Dense(16, "relu")],
    "convolutions, valid and same, strided": lambda: [
        layers.Conv2D(6, 3),
        layers.Conv2D(5, 3, 2, "same"),
        layers.Conv2D(4, 5, 2, "same"),
    ],
    "convolutions, dilated, 1x1, grouped": lambda: [
        layers.Conv2D(6, 3, dilation_rate=2),
        layers.Conv2D(6, 1),
        layers.Conv2D(6, 3, groups=2),
        layers.Conv2D(4, 1, 2),
    ],
    "transposed convolution": lambda: [layers.Conv2D(6, 3), layers.Conv2DTranspose(4, 3, 2, "same")],
    "depthwise convolutions": lambda: [
        layers.Conv2D(6, 3),
        layers.DepthwiseConv2D(3, padding="same"),
        layers.DepthwiseConv2D(3, 2, "same", depth_multiplier=2),
    ],
    "separable and dilated depthwise": lambda: [
        layers.SeparableConv2D(6, 3),
        layers.DepthwiseConv2D(3, dilation_rate=2),
    ],
    "one-dimensional": lambda: [
        layers.Reshape((36, 12)),
        layers.Conv1D(6, 3, padding="same", activation="relu"),
        layers.MaxPooling1D(2),
    ],
    "max pools": lambda: [
        layers.Conv2D(6, 3, padding="same"),
        layers.MaxPool2D(2),
        layers.Conv2D(6, 3, padding="same"),
        layers.MaxPool2D(3, 2, "same"),
    ],
    "a ReLU before a max pool": lambda: [
        layers.Conv2D(6, 3, activation="relu"),
        layers.MaxPool2D(2),
        pooled_and_summed,
    ],
    "a ReLU and a max pool in nested functions": lambda: [layers.Conv2D(6, 3), Pooled()],
    "few channels, large strides, dilated": lambda: [
        layers.Conv2D(2, 5, (2, 3), "same"),
        layers.Conv2D(3, (3, 2), padding="same", dilation_rate=2),
        layers.Conv2D(4, (2, 3), 2),
    ],
    "average pools": lambda: [layers.Conv2D(6, 3), layers.AveragePooling2D(2), layers.AveragePooling2D(3, 2, "same")],
    "global average": lambda: [layers.Conv2D(6, 3), layers.GlobalAveragePooling2D()],
    "global maximum": lambda: [layers.Conv2D(6, 3), layers.GlobalMaxPooling2D()],
    "ReLU family": lambda: [
        *activations("relu", "relu6", "elu", "selu"),
        layers.LeakyReLU(0.1),
        layers.Conv2D(4, 1),
        layers.PReLU(),
    ],
    "smooth activations": lambda: activations("gelu", "swish", "sigmoid", "tanh", "softplus", "softsign"),
    "other activations": lambda: activations("softmax", "exponential", "hard_sigmoid"),
    "batch norm of images and vectors": lambda: [
        layers.Conv2D(6, 3),
        layers.BatchNormalization(),
        layers.Activation("swish"),
        layers.Flatten(),
        layers.Dense(9),
        layers.BatchNormalization(),
    ],
    "layer, group and unit norm": lambda: [
        layers.Conv2D(6, 3),
        layers.LayerNormalization(),
        layers.GroupNormalization(2),
        layers.UnitNormalization(),
    ],
    "residual, gate and concatenation": lambda: [squeeze_and_excite],
    "a frozen base": lambda: [frozen],
    "slices": lambda: [layers.Conv2D(6, 3), Sliced()],
    "elementwise mathematics": lambda: [layers.Conv2D(6, 3), Mathematics()],
    "cropping and upsampling": lambda: [layers.Conv2D(6, 3), layers.Cropping2D(2), layers.UpSampling2D(2)],
    "a nested tf.function": lambda: [layers.Conv2D(6, 3), Decorated()],
    "weight decay": lambda: [layers.Conv2D(6, 3, kernel_regularizer="l2")],
}


def model_of(parts: list[Any]) -> Any:
    tf.keras.utils.set_random_seed(7)
    inputs = x = layers.Input((12, 12, 3))
    for part in parts:
        x = part(x)
    return tf.keras.Model(inputs, layers.Dense(5)(layers.Flatten()(x)))


@pytest.mark.parametrize("case", CASES)
def test_training_equals_tensorflow(case: str) -> None:
    bundle = read_bundle(export(model_of(CASES[case]()), name="case", batch_size=8, input_range=(0.0, 1.0)))
    assert bundle.manifest.proof is not None
    assert bundle.manifest.proof.max_abs_error < 2e-6
    assert not [name for name in operators(bundle.model) if name.startswith("custom")]


def test_one_example_per_batch_and_one_input_number_train_too() -> None:
    inputs = layers.Input((1,))
    model = tf.keras.Model(inputs, layers.Dense(3)(layers.Dense(4, "tanh")(inputs)))
    for batch_size in (1, 2):
        export(model, name="narrow", batch_size=batch_size)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("case", [case for case in CASES if "batch norm" not in case])
def test_training_equals_tensorflow_at_other_batch_sizes(case: str, batch_size: int) -> None:
    export(model_of(CASES[case]()), name="case", batch_size=batch_size, input_range=(0.0, 1.0))


class Offset(layers.Layer):  # type: ignore[misc,name-defined]
    """Adds a trained image, so that its gradient shows which pixel a pool gave its gradient to."""

    def build(self, shape: Any) -> None:
        self.image = self.add_weight("image", shape[1:], initializer="zeros")

    def call(self, x: Any) -> Any:
        return x + self.image


@pytest.mark.parametrize("pool", [(2, 2, "valid"), (3, 2, "same"), (3, 1, "valid")], ids=str)
def test_tied_maxima_give_their_gradient_to_the_pixel_tensorflow_gives_it_to(pool: tuple[int, int, str]) -> None:
    model = tf.keras.Sequential(
        [layers.InputLayer((6, 6, 2)), Offset(), layers.MaxPool2D(*pool), layers.Flatten(), layers.Dense(3)]
    )
    bundle = read_bundle(export(model, name="ties", batch_size=4))
    x = np.random.default_rng(0).integers(0, 2, (4, 6, 6, 2)).astype(np.float32)  # zeros and ones: ties everywhere
    y = np.array([0, 1, 2, 0], np.int32)
    with tf.GradientTape() as tape:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=model(x))
        loss = tf.reduce_mean(losses)
    expected = np.concatenate([np.ravel(gradient) for gradient in tape.gradient(loss, model.trainable_variables)])
    computed = opened(bundle)["gradient"](x=x, y=y, example_weight=np.ones(4, np.float32))["gradient"]
    np.testing.assert_allclose(computed, expected, atol=1e-6, rtol=0)


def test_two_stage_sums_are_closer_to_float64_than_a_running_sum() -> None:
    from covey_models.lowering.formulations import column_sum

    numbers = np.random.default_rng(0).random((4096, 4)).astype(np.float32)
    exact = numbers.astype(np.float64).sum(0)
    running = np.zeros(4, np.float32)
    for row in numbers:
        running += row
    two_stage = column_sum(tf.constant(numbers)).numpy()
    assert np.abs(two_stage - exact).max() < np.abs(running - exact).max() / 2


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.sampled_from(["SAME", "VALID"]),
)
def test_the_inverse_table_names_exactly_the_taps_that_read_each_pixel(
    size: tuple[int, int], kernel: tuple[int, int], stride: int, dilation: int, padding: str
) -> None:
    reach = [(side - 1) * dilation + 1 for side in kernel]
    if padding == "VALID" and (reach[0] > size[0] or reach[1] > size[1]):
        return  # no output at all
    window = Window(kernel, (stride, stride), (dilation, dilation), padding)
    reads = window.inputs_of_outputs(*size)
    assert len(reads) == np.prod(window.output_size(*size))
    entries = reads.reshape(-1)
    for pixel, touching in enumerate(window.outputs_of_inputs(*size)):
        assert [entry for entry in touching if entry < len(entries)] == np.flatnonzero(entries == pixel).tolist()


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.sampled_from(["SAME", "VALID", "EXPLICIT"]),
    channels=st.integers(1, 3),
)
def test_patches_cut_as_slices_are_the_gathered_patches(
    size: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int],
    padding: str,
    channels: int,
) -> None:
    from covey_models.lowering.convolution import _gathered_patches, _sliced_patches

    window = Window(kernel, strides, dilations, padding, ((1, 2), (0, 1)))
    if min(window.output_size(*size)) < 1:
        return  # no output at all
    images = tf.constant(np.random.default_rng(0).random((2, *size, channels)).astype(np.float32))
    np.testing.assert_array_equal(tf.transpose(_sliced_patches(images, window)), _gathered_patches(images, window))


def test_an_op_type_has_one_lowering() -> None:
    with pytest.raises(ValueError, match="two lowerings"):
        lowers("MatMul")(lambda node: None)
    assert len(LOWERINGS) > 40


@pytest.mark.parametrize(
    ("op_name", "layer"),
    [
        ("model/conv/Conv2D", "conv"),
        ("gradient_tape/model/conv/Conv2D/Conv2DBackpropFilter", "conv"),
        ("model/conv_1/Conv2D", "conv"),  # the same layer, called again
        ("model/block/conv/add", "conv"),
        ("Sum_1", ""),
    ],
)
def test_an_ops_name_leads_to_its_layer(op_name: str, layer: str) -> None:
    assert layer_of(op_name, {"conv", "block"}) == layer


def test_a_rewritten_function_computes_the_same_in_tensorflow() -> None:
    state = tf.Variable([1.0, 2.0])

    def step(x: Any) -> Any:
        state.assign_add(tf.nn.softplus(x))
        return {"total": tf.reduce_sum(tf.math.softplus(state)), "state": state.read_value()}

    traced = tf.function(step, input_signature=[tf.TensorSpec([2], tf.float32, "x")]).get_concrete_function()
    lowered = lower(traced)
    assert "Softplus" not in {op.type for op in lowered.function.graph.get_operations()}
    x = tf.constant([0.5, -0.5])
    expected = traced(x)
    state.assign([1.0, 2.0])
    for name, value in lowered.function(x).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6)
