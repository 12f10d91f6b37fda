"""How precise the lowered functions are on the device's interpreter, against TensorFlow in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from parity import in_tflite

from covey_models._tensorflow import import_tensorflow

tf = import_tensorflow()
Array = np.ndarray[Any, Any]


def of_both_signs(low: float, high: float) -> Array:
    sizes = np.geomspace(low, high, 20000)
    return np.concatenate([-sizes[::-1], sizes])


def up(low: float, high: float) -> Array:
    return np.geomspace(low, high, 20000)


# name -> (function, where, largest relative error allowed); the docstrings of the lowerings state these numbers
FUNCTIONS: dict[str, tuple[Callable[..., Any], Array, float]] = {
    "log1p": (tf.math.log1p, np.concatenate([-up(1e-30, 0.9999), up(1e-30, 1e30)]), 2.5e-7),
    "expm1": (tf.math.expm1, of_both_signs(1e-30, 80.0), 6e-7),
    "softplus": (tf.nn.softplus, of_both_signs(1e-6, 80.0), 2.5e-7),
    "erf": (tf.math.erf, of_both_signs(1e-30, 9.0), 4e-7),
    "erfc": (tf.math.erfc, np.linspace(-9.0, 9.0, 20001), 1e-6),
    "sinh": (tf.sinh, of_both_signs(1e-30, 87.0), 6e-7),
    "cosh": (tf.cosh, of_both_signs(1e-6, 87.0), 3e-7),
    "asinh": (tf.asinh, of_both_signs(1e-18, 1e18), 5e-7),
    "acosh": (tf.acosh, 1.0 + up(1e-6, 1e18), 5e-7),
    "atanh": (tf.atanh, of_both_signs(1e-30, 0.9999), 5e-7),
    "atan": (tf.atan, of_both_signs(1e-30, 1e30), 2e-7),
    "asin": (tf.asin, of_both_signs(1e-30, 1.0), 3e-7),
    "acos": (tf.acos, np.linspace(-1.0, 0.9999, 20001), 4e-7),
    "tan": (tf.tan, of_both_signs(1e-30, 1.57), 3e-7),
    "erfinv": (tf.math.erfinv, of_both_signs(1e-6, 0.9999), 1e-6),
    "trigamma": (lambda x: tf.math.polygamma(tf.constant(1.0, x.dtype), x), up(1e-3, 1e4), 1e-6),
}
# the same, but relative to the larger of 1 and the value: these functions cross zero
ABSOLUTE: dict[str, tuple[Callable[..., Any], Array, float]] = {
    "lgamma": (tf.math.lgamma, up(1e-3, 1e4), 4e-6),
    "digamma": (tf.math.digamma, up(1e-3, 1e4), 1e-6),
    "normal quantiles": (tf.math.ndtri, np.linspace(0.001, 0.999, 20001), 1e-5),
}


def computed_and_exact(function: Callable[..., Any], where: Array) -> tuple[Array, Array]:
    x = where.astype(np.float32)
    spec = tf.TensorSpec(x.shape, tf.float32, "x")
    traced = tf.function(lambda x: {"y": function(x)}, input_signature=[spec], autograph=False)
    computed = in_tflite(traced.get_concrete_function())(x=x)["y"].astype(np.float64)
    return computed, function(tf.constant(x, tf.float64)).numpy()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_functions_relative_error_is_what_its_docstring_says(name: str) -> None:
    function, where, most = FUNCTIONS[name]
    computed, exact = computed_and_exact(function, where)
    error = np.abs(computed - exact) / np.maximum(np.abs(exact), 1e-37)
    assert error.max() <= most, where[error.argmax()]


@pytest.mark.parametrize("name", ABSOLUTE)
def test_a_functions_error_is_what_its_docstring_says(name: str) -> None:
    function, where, most = ABSOLUTE[name]
    computed, exact = computed_and_exact(function, where)
    error = np.abs(computed - exact) / np.maximum(np.abs(exact), 1.0)
    assert error.max() <= most, where[error.argmax()]


def test_functions_of_extreme_numbers_are_their_limits_and_not_nan() -> None:
    x = np.array([-1e30, -100.0, 0.0, 100.0, 1e30], np.float32)
    for function in (tf.math.expm1, tf.nn.softplus, tf.math.erf, tf.math.erfc, tf.atan):
        computed, exact = computed_and_exact(function, x)
        exact = np.minimum(exact, np.finfo(np.float32).max)  # TFLite's arithmetic ends there, not at infinity
        np.testing.assert_allclose(computed, exact, rtol=1e-6, atol=1e-30)
