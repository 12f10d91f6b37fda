"""Random numbers of a training step: a function of the seed alone, and distributed as their names say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from export_helpers import opened
from scipy import stats

from covey_models import export
from covey_models._tensorflow import import_tensorflow
from covey_models.convert import convert
from covey_models.lowering import lower, seeded
from covey_protocol.bundle import Bundle, read_bundle
from covey_protocol.errors import BundleError

tf = import_tensorflow()
layers = tf.keras.layers

COUNT = 60_000
SEED = tf.TensorSpec([], tf.int32, "seed")


def drawing(draw: Any) -> Any:
    """A concrete function seed -> numbers, made the way an export makes it."""
    return seeded(tf.function(lambda seed: {"numbers": draw()}, input_signature=[SEED]).get_concrete_function())


def numbers(function: Any, seed: int) -> Any:
    return function(tf.constant(seed))["numbers"].numpy()


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, -5])
def test_uniform_numbers_fill_the_unit_interval_evenly(seed: int) -> None:
    drawn = numbers(drawing(lambda: tf.random.uniform([COUNT])), seed)
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    assert stats.kstest(drawn, "uniform").pvalue > 1e-3
    counts = np.bincount((drawn * 256).astype(int), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 4 / np.sqrt(COUNT)


@pytest.mark.parametrize("seed", [0, 7])
def test_normal_numbers_are_normal(seed: int) -> None:
    drawn = numbers(drawing(lambda: tf.random.normal([COUNT], 2.0, 3.0)), seed)
    assert stats.kstest(drawn, "norm", args=(2.0, 3.0)).pvalue > 1e-3
    assert abs(stats.kurtosis(drawn)) < 0.1


def test_whole_numbers_are_even_over_their_range() -> None:
    drawn = numbers(drawing(lambda: tf.random.uniform([COUNT], -2, 5, tf.int32)), 3)
    counts = np.bincount(drawn + 2, minlength=7)
    assert len(counts) == 7
    assert stats.chisquare(counts).pvalue > 1e-3


def test_the_same_seed_draws_the_same_and_neighbouring_seeds_have_nothing_in_common() -> None:
    function = drawing(lambda: tf.random.uniform([COUNT]))
    first = numbers(function, 11)
    np.testing.assert_array_equal(first, numbers(function, 11))
    for other in (12, 10, 11 + 2**16, -11):
        assert abs(np.corrcoef(first, numbers(function, other))[0, 1]) < 4 / np.sqrt(COUNT)
        assert len(np.intersect1d(first[:1000], numbers(function, other)[:1000])) < 10


def test_two_random_ops_of_one_step_draw_apart() -> None:
    function = drawing(lambda: tf.stack([tf.random.uniform([COUNT]), tf.random.uniform([COUNT])]))
    drawn = numbers(function, 4)
    assert abs(np.corrcoef(drawn)[0, 1]) < 4 / np.sqrt(COUNT)


def test_the_device_runtime_draws_tensorflows_bits() -> None:
    from tflite_runtime.interpreter import Interpreter

    function = drawing(lambda: tf.random.uniform([37, 41]))
    model = convert({"draw": lower(function)}, [])
    draw = Interpreter(model_content=model, num_threads=1).get_signature_runner("draw")
    for seed in (0, 1, -1, 2**31 - 1):
        np.testing.assert_array_equal(draw(seed=np.array(seed, np.int32))["numbers"], numbers(function, seed))


def test_random_numbers_without_a_seed_are_refused() -> None:
    function = tf.function(lambda x: x + tf.random.uniform([2]), input_signature=[tf.TensorSpec([2], tf.float32, "x")])
    with pytest.raises(BundleError, match="no seed reaches it"):
        lower(function.get_concrete_function())


# --- dropout and its relatives, in a bundle


def bundle_of(layer: Any, width: int = 400, batch: int = 1) -> Bundle:
    """One layer between the input and a sum: the gradient of the sum's weights shows what the layer made of ones."""
    parts = [layers.InputLayer((width,)), layer, layers.Dense(1, use_bias=False, kernel_initializer="zeros")]
    model = tf.keras.Sequential(parts)
    return read_bundle(export(model, name="random", loss="mean_squared_error", batch_size=batch, seed=1))


def made_of_ones(bundle: Bundle, seeds: range) -> Any:
    """(seeds, width): the layer's output for an input of ones; d loss / d kernel = 2 (0 - y) output, with y = -0.5."""
    device = opened(bundle)
    width = bundle.manifest.input.shape[0]
    given = {"x": np.ones((1, width), np.float32), "y": np.array([-0.5], np.float32)}
    weight = np.ones(1, np.float32)
    return np.stack(
        [
            device["gradient"](**given, example_weight=weight, seed=np.array(seed, np.int32))["gradient"]
            for seed in seeds
        ]
    )


def test_dropout_drops_its_rate_and_scales_up_the_rest() -> None:
    bundle = bundle_of(layers.Dropout(0.3))
    assert bundle.manifest.train_inputs == ("seed",)
    output = made_of_ones(bundle, range(100))
    dropped = output == 0.0
    assert abs(dropped.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / dropped.size)
    np.testing.assert_allclose(output[~dropped], 1.0 / 0.7, rtol=1e-6)
    assert (
        stats.kstest(dropped.sum(0), "binom", args=(100, 0.3)).statistic < 0.15
    )  # no place is dropped more than others
    assert len({tuple(row) for row in dropped}) == 100


def test_gaussian_noise_and_gaussian_dropout_have_their_spread() -> None:
    noise = made_of_ones(bundle_of(layers.GaussianNoise(0.2)), range(50))
    assert stats.kstest(noise.ravel(), "norm", args=(1.0, 0.2)).pvalue > 1e-3
    multiplied = made_of_ones(bundle_of(layers.GaussianDropout(0.2)), range(50))  # sqrt(0.2 / 0.8) = 0.5
    assert stats.kstest(multiplied.ravel(), "norm", args=(1.0, 0.5)).pvalue > 1e-3


def test_the_same_seed_trains_the_same_and_another_does_not() -> None:
    bundle = bundle_of(layers.Dropout(0.5))
    rows = made_of_ones(bundle, range(3))
    np.testing.assert_array_equal(rows, made_of_ones(bundle, range(3)))
    assert not np.array_equal(rows[0], rows[1])


def test_nothing_is_dropped_when_a_model_is_evaluated_or_asked() -> None:
    device = opened(bundle_of(layers.Dropout(0.9), width=6))
    device["set_parameters"](parameters=np.ones(6, np.float32))
    x = np.ones((1, 6), np.float32)
    assert device["infer"](x=x)["output"] == pytest.approx(6.0)
    assert (
        device["evaluate"](x=x, y=np.array([6.0], np.float32), example_weight=np.ones(1, np.float32))["loss_sum"] == 0
    )
