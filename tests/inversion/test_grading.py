"""Grading says how much of a batch came out, whatever order it came in, and agrees with TensorFlow's and sklearn's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import roc_auc_score, roc_curve

from covey_coordinator.inversion.contract import Finding
from covey_coordinator.inversion.grading import (
    MISSING,
    auc,
    grade,
    identification_rate,
    label_leak_rate,
    matching,
    ssim,
    tpr_at_fpr,
)
from covey_protocol.errors import UsageError

RANGE = (0.0, 1.0)
scores = hnp.arrays(np.float64, st.integers(1, 30), elements=st.sampled_from([-2.0, 0.0, 0.5, 0.7, 3.0]))


def found(inputs=None, labels=None) -> Finding:
    return Finding("test", "nothing", inputs=inputs, labels=labels)


@pytest.mark.parametrize("shape", [(28, 28, 1), (8, 8, 1), (17, 12, 3)])
def test_ssim_is_tensorflows(shape):
    import tensorflow as tf

    rng = np.random.default_rng(0)
    truth = rng.uniform(-1, 1, shape)
    recovered = np.clip(truth + rng.normal(0, 0.3, shape), -1, 1)
    theirs = tf.image.ssim(tf.constant(truth), tf.constant(recovered), 2.0, filter_size=min(11, *shape[:2]))
    assert ssim(truth, recovered, (-1.0, 1.0)) == pytest.approx(float(theirs), abs=1e-5)
    assert ssim(truth, truth, (-1.0, 1.0)) == pytest.approx(1.0)


@given(order=st.permutations(range(5)), noise=st.floats(0, 0.01))
def test_a_batch_in_another_order_is_matched_to_itself(order, noise):
    rng = np.random.default_rng(1)
    truth = rng.uniform(0, 1, (5, 4))
    recovered = (truth + noise * rng.normal(size=truth.shape))[list(order)]
    assert [order[place] for place in matching(truth, recovered)] == list(range(5))


def test_matching_takes_the_least_total_error_and_not_the_nearest_first():
    truth, recovered = np.array([[0.0], [1.0]]), np.array([[0.9], [2.5]])
    assert list(matching(truth, recovered)) == [0, 1] == list(linear_sum_assignment((truth - recovered.T) ** 2)[1])


def test_too_few_inputs_leave_true_examples_missing_and_too_many_do_no_harm():
    truth = np.array([[0.0], [1.0], [2.0]])
    assert list(matching(truth, np.array([[1.9]]))) == [MISSING, MISSING, 0]
    few = grade(found(np.array([[1.9]])), truth, np.arange(3), (0.0, 2.0), gallery=np.array([[1.5]]))
    assert np.isnan(few.mse[:2]).all()
    assert few.mse[2] == pytest.approx(0.01)
    assert (few.best, few.mean_psnr_db) == (2, pytest.approx(10 * np.log10(4 / 0.01)))
    assert few.identified == pytest.approx(1 / 3)
    many = grade(found(np.vstack([truth, truth + 5])), truth, np.arange(3), (0.0, 2.0))
    assert np.isinf(many.psnr_db).all()


def test_pictures_get_ssim_and_findings_without_inputs_only_labels():
    pictures = np.random.default_rng(0).uniform(0, 1, (2, 8, 8, 1))
    full = grade(found(pictures[::-1], np.array([4, 3])), pictures, np.array([3, 4]), RANGE)
    assert full.ssim == pytest.approx([1.0, 1.0])
    assert full.label_rate == 1.0
    labels_only = grade(found(labels=np.array([3, 3])), pictures, np.array([3, 4]), RANGE)
    assert labels_only.label_rate == 0.5
    assert list(labels_only.matched) == [MISSING, MISSING]
    assert labels_only.identified is None
    assert grade(found(), pictures, np.array([3, 4]), RANGE, gallery=pictures).identified == 0.0
    with pytest.raises(UsageError, match="no example"):
        _ = labels_only.best


def test_identification_needs_the_true_one_to_be_nearer_than_everyone_else():
    truth, gallery = np.array([[0.0], [1.0]]), np.array([[0.6], [3.0]])
    assert identification_rate(truth, np.array([[0.1], [0.7]]), np.array([0, 1]), gallery) == 0.5
    assert identification_rate(truth, truth, np.array([0, 1]), truth) == 0.0  # copies: a tie tells nobody apart


def test_labels_count_as_often_as_they_occur_and_naming_everything_does_not_help():
    assert label_leak_rate(np.array([1, 1, 2, 3]), np.array([1, 2, 2, 9])) == 0.5
    assert label_leak_rate(np.array([1, 1]), np.array([0, 1, 1, 1])) == 0.5


@given(positive=scores, negative=scores)
def test_auc_is_sklearns(positive, negative):
    truth = np.concatenate([np.ones(len(positive)), np.zeros(len(negative))])
    assert auc(positive, negative) == pytest.approx(roc_auc_score(truth, np.concatenate([positive, negative])))


@given(positive=scores, negative=scores, fpr=st.floats(0, 1))
def test_the_true_positive_rate_is_sklearns_best_within_the_false_ones(positive, negative, fpr):
    truth = np.concatenate([np.ones(len(positive)), np.zeros(len(negative))])
    false, true, _ = roc_curve(truth, np.concatenate([positive, negative]), drop_intermediate=False)
    assert tpr_at_fpr(positive, negative, fpr) == pytest.approx(true[false <= fpr + 1e-9].max())


def test_scores_that_are_none_are_refused():
    with pytest.raises(UsageError, match="NaN"):
        auc(np.array([np.nan]), np.array([0.0]))
    with pytest.raises(UsageError, match="no scores"):
        tpr_at_fpr(np.array([]), np.array([0.0]), 0.1)
