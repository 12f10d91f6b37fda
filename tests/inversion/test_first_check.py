"""The first inversion check on real updates: what is recovered as sent, clipped, and with noise."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
from inversion_helpers import Step, digits_model, flat, one_step, softmax_loss

from covey_coordinator.inversion.check import first_inversion_check
from covey_coordinator.records import InversionRecord
from covey_protocol.errors import UsageError
from covey_protocol.parameters import ParameterSpec


def check(step: Step, **changes: Any) -> InversionRecord:
    arguments: dict[str, Any] = {
        "keras_model": step.model,
        "parameters": step.parameters,
        "parameter_specs": step.specs,
        "update": step.update,
        "learning_rate": step.learning_rate,
        "truth": step.truth,
        "true_label": step.label,
        "input_range": (0.0, 1.0),
        "device_id": "pi-07",
        "clip_norm": 0.1,
        "seed": 1,
    }
    return first_inversion_check(**{**arguments, **changes})


@pytest.fixture(scope="module")
def fresh(fresh_digit_step) -> InversionRecord:
    return check(fresh_digit_step)


@pytest.fixture(scope="module")
def trained(trained_digit_step) -> InversionRecord:
    return check(trained_digit_step)


@pytest.mark.parametrize("model", ["fresh", "trained"])
def test_the_unprotected_update_gives_the_picture_and_the_label_away(model, request):
    record = request.getfixturevalue(model)
    as_sent = record.reconstructions[0]
    assert as_sent.title == "as sent"
    assert as_sent.psnr_db > 40
    assert as_sent.label == record.true_label
    assert as_sent.image.shape == record.truth.shape
    assert as_sent.resolved == pytest.approx(64, abs=1)


@pytest.mark.parametrize("model", ["fresh", "trained"])
def test_clipping_alone_hides_neither_the_picture_nor_the_label(model, request):
    record = request.getfixturevalue(model)
    clipped = record.reconstructions[1]
    assert clipped.title == "clipped to 0.1"
    assert clipped.psnr_db > 40
    assert clipped.label == record.true_label


@pytest.mark.parametrize("model", ["fresh", "trained"])
def test_more_noise_shows_less_of_the_picture(model, request):
    noisy = request.getfixturevalue(model).reconstructions[2:]
    assert [r.noise_multiplier for r in noisy] == [0.01, 0.1, 1.0]
    assert noisy[0].psnr_db > noisy[1].psnr_db > noisy[2].psnr_db - 1
    assert 40 < noisy[0].resolved < 64
    assert noisy[0].resolved > noisy[1].resolved >= noisy[2].resolved
    assert noisy[2].resolved < 5
    assert noisy[2].psnr_db < 10


def test_clipping_really_happened_where_the_title_says_so(fresh, fresh_digit_step):
    norm = float(np.linalg.norm(fresh_digit_step.update))
    assert norm > 0.1
    assert any(f"{norm:.3g}" in note and "shortened" in note for note in fresh.notes)


def test_an_update_below_the_clip_norm_is_said_to_be_unchanged(fresh_digit_step):
    record = check(fresh_digit_step, clip_norm=1000.0, noise_multipliers=())
    assert any("left it as it was" in note for note in record.notes)


def test_the_same_seed_gives_the_same_record_and_the_model_keeps_its_weights(fresh, fresh_digit_step):
    model = fresh_digit_step.model
    model.trainable_variables[0].assign_add(0.5 * np.ones((3, 3, 1, 8)))
    moved = flat(model.trainable_variables)
    again = check(fresh_digit_step)
    for first, second in zip(fresh.reconstructions, again.reconstructions):
        np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(flat(model.trainable_variables), moved)
    model.trainable_variables[0].assign_sub(0.5 * np.ones((3, 3, 1, 8)))


def test_the_whole_check_of_a_digit_takes_less_than_eight_seconds_of_the_processor(trained_digit_step):
    start = time.process_time()  # not of the clock: other programs' work is no error
    check(trained_digit_step)
    assert time.process_time() - start < 8


def test_a_table_row_is_read_off_a_dense_model_directly_with_its_label():
    """30 standardised measurements, one hidden layer, one sigmoid unit: the first dense layer sees the row itself."""
    import tensorflow as tf
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    rows = ((data.data - data.data.mean(0)) / data.data.std(0)).astype(np.float32)
    tf.keras.utils.set_random_seed(0)
    model = tf.keras.Sequential(
        [tf.keras.Input((30,)), tf.keras.layers.Dense(16, activation="relu"), tf.keras.layers.Dense(1)]
    )
    loss = tf.keras.losses.BinaryCrossentropy(from_logits=True)
    for row in (0, 19):  # one of each class
        step = one_step(model, loss, rows[row], int(data.target[row]))
        record = check(step, input_range=(-6.0, 6.0), feature_names=list(data.feature_names))
        assert record.reconstructions[0].psnr_db > 60
        assert record.reconstructions[1].psnr_db > 60
        assert record.reconstructions[0].label == data.target[row]
        assert record.reconstructions[-1].resolved < 5
        assert record.reconstructions[-1].psnr_db < record.reconstructions[0].psnr_db - 40
        assert tuple(record.feature_names) == tuple(data.feature_names)


def test_a_picture_flattened_into_a_dense_layer_keeps_its_pixel_order(digits):
    import tensorflow as tf

    pictures, labels = digits
    tf.keras.utils.set_random_seed(0)
    model = tf.keras.Sequential([tf.keras.Input((8, 8, 1)), tf.keras.layers.Flatten(), tf.keras.layers.Dense(10)])
    record = check(one_step(model, softmax_loss(), pictures[3], int(labels[3])), noise_multipliers=())
    np.testing.assert_allclose(record.reconstructions[0].image, pictures[3], atol=1e-4)


def test_a_model_without_a_dense_layer_is_attacked_for_its_label_only_and_says_so(digits):
    import tensorflow as tf

    pictures, labels = digits
    tf.keras.utils.set_random_seed(0)
    model = tf.keras.Sequential(
        [tf.keras.Input((8, 8, 1)), tf.keras.layers.Conv2D(10, 3), tf.keras.layers.GlobalAveragePooling2D()]
    )
    record = check(one_step(model, softmax_loss(), pictures[3], int(labels[3])))
    assert record.reconstructions[0].label == labels[3]
    assert record.reconstructions[0].resolved is None
    assert any("no dense layer" in note for note in record.notes)


def test_a_dense_layer_inside_a_nested_model_is_not_silently_skipped(digits):
    import tensorflow as tf

    pictures, labels = digits
    inner = digits_model()
    outer = tf.keras.Sequential([tf.keras.Input((8, 8, 1)), inner])
    record = check(one_step(outer, softmax_loss(), pictures[3], int(labels[3])), noise_multipliers=())
    assert record.reconstructions[0].label == labels[3]
    assert any("cannot be followed back" in note for note in record.notes) or record.reconstructions[0].psnr_db > 40


def test_an_example_the_model_already_fits_perfectly_leaves_the_attacker_with_the_prior(fresh_digit_step):
    record = check(fresh_digit_step, update=np.zeros_like(fresh_digit_step.update), noise_multipliers=())
    assert record.reconstructions[0].label is None
    np.testing.assert_array_equal(record.reconstructions[0].image, np.full((8, 8, 1), 0.5, np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"update": np.zeros(3, np.float32)}, "update have shape"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"input_range": (1.0, 0.0)}, "range"),
        ({"feature_names": ["one"]}, "feature names"),
        ({"clip_norm": -1.0}, "clip_norm"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(fresh_digit_step, changes, message):
    with pytest.raises(UsageError, match=message):
        check(fresh_digit_step, **changes)


def test_updates_and_specifications_of_another_model_are_refused(fresh_digit_step):
    broken = fresh_digit_step.update.copy()
    broken[0] = np.nan
    with pytest.raises(UsageError, match="NaN"):
        check(fresh_digit_step, update=broken)
    first = fresh_digit_step.specs[0]
    other = dataclasses.replace(
        fresh_digit_step, specs=[ParameterSpec(first.name, (9, 8)), *fresh_digit_step.specs[1:]]
    )
    with pytest.raises(UsageError, match="differ"):
        check(other)
