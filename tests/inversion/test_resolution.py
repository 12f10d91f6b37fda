"""The resolution of an update is Tarantola's: exact where everything is linear, the same however it is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from inversion_helpers import small_net

from covey_coordinator.inversion.contract import Seen
from covey_coordinator.inversion.forward import Forward
from covey_coordinator.inversion.keras_model import KerasModel
from covey_coordinator.inversion.lanczos import lanczos
from covey_coordinator.inversion.metrics import mse, psnr
from covey_coordinator.inversion.priors import Prior, learned_prior, plain_prior, smooth_prior
from covey_coordinator.inversion.resolution import OutOfTime, data_weights, leakage_number, planned
from covey_coordinator.inversion.tarantola import Tarantola
from covey_protocol.bundle import TensorSpec
from covey_protocol.errors import UsageError
from covey_protocol.messages import TrainingPlan

ONE_STEP = TrainingPlan(epochs=1, learning_rate=0.1)


def seen_of(model: KerasModel, x: Any, y: Any, plan: TrainingPlan = ONE_STEP, **settings: float) -> Seen:
    parameters = model.parameters()
    return planned(model, Seen(parameters, parameters, plan, len(x), **settings), x, y)


def jacobian(model: KerasModel, seen: Seen, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """By central differences, at the point where the resolution is taken."""
    forward = Forward(model, [seen], y)
    point = np.clip(x.astype(np.float64).ravel(), 1e-3, 1 - 1e-3)
    steps = 1e-5 * np.eye(point.size)
    return np.array([(forward.values(point + h) - forward.values(point - h)) / 2e-5 for h in steps]).T


def test_the_update_of_linear_regression_resolves_what_the_formula_says() -> None:
    """Squared error e = W'x + b - y: the gradients x e' and e have the derivatives e_c I + x W_c' and W_c'."""
    import tensorflow as tf

    tf.keras.utils.set_random_seed(1)
    keras = tf.keras.Sequential([tf.keras.Input((5,)), tf.keras.layers.Dense(2)])
    model = KerasModel(keras, "mean_squared_error", dtype="float64")
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0.2, 0.8, (1, 5)), rng.normal(size=(1, 2))
    kernel, bias = model.parameters()[:10].reshape(5, 2).astype(float), model.parameters()[10:].astype(float)
    error = x[0] @ kernel + bias - y[0]
    by_hand = np.zeros((12, 5))
    for output in range(2):
        by_hand[output:10:2] = error[output] * np.eye(5) + np.outer(x[0], kernel[:, output])
        by_hand[10 + output] = kernel[:, output]
    by_hand *= -0.1  # the rate; the mean over two outputs takes the 2 of the square away
    seen = seen_of(model, x, y, noise_std=0.01)
    white = by_hand * np.sqrt(1 / 12) * data_weights(seen)[:, None]
    curvature = white.T @ white
    found = leakage_number(model, seen, x, y)
    resolution = curvature @ np.linalg.inv(np.eye(5) + curvature)
    assert found.method == "exact"
    assert found.resolved == pytest.approx(np.trace(resolution), rel=1e-9)
    np.testing.assert_allclose(found.resolved_map[0], np.diag(resolution), rtol=1e-9)
    assert found.bits == pytest.approx(0.5 * np.log2(np.linalg.det(np.eye(5) + curvature)), rel=1e-9)
    posterior = np.linalg.inv(np.eye(5) + curvature) / 12
    np.testing.assert_allclose(found.posterior_std[0] ** 2, np.diag(posterior), rtol=1e-9)
    assert found.psnr_db == pytest.approx(psnr(np.trace(posterior) / 5, (0, 1)))


@pytest.mark.parametrize(("noise", "prior"), [(1e-4, "plain"), (3e-3, "learned")])
def test_products_and_dense_algebra_agree(net: KerasModel, pictures: Any, noise: float, prior: str) -> None:
    """Dense: the Jacobian by differences and an inverse. Ours: singular values; and Lanczos, within 4 error bars."""
    x, y = pictures[0][:2], pictures[1][:2]
    believed = plain_prior(net.input) if prior == "plain" else learned_prior(net.input, pictures[0][500:700])
    seen = seen_of(net, x, y, noise_std=noise)
    root = np.eye(16) * believed.spread if believed.root is None else believed.root
    white = jacobian(net, seen, x, y) * data_weights(seen)[:, None] @ np.kron(np.eye(2), root)
    left = np.linalg.inv(np.eye(32) + white.T @ white)
    exact = leakage_number(net, seen, x, y, prior=believed)
    assert exact.resolved == pytest.approx(32 - np.trace(left), abs=1e-4)
    wide = np.kron(np.eye(2), root)
    assert exact.expected_mse == pytest.approx(np.trace(wide @ left @ wide) / 32, rel=1e-4)
    drawn = leakage_number(net, seen, x, y, prior=believed, exact=False, probes=8, steps=24, seed=1)
    assert drawn.method == "lanczos"
    assert abs(drawn.resolved - exact.resolved) < 4 * drawn.resolved_error + 0.05
    assert drawn.per_example.sum() == pytest.approx(drawn.resolved, abs=4 * drawn.resolved_error + 0.05)
    assert drawn.here_psnr_db == pytest.approx(exact.here_psnr_db, abs=0.5)


def test_the_predicted_error_is_the_measured_one_of_the_map_estimate(net: KerasModel, pictures: Any) -> None:
    """Mean over noises; the range, which the linear prediction does not know, may make the attack a little better."""
    x, y = pictures[0][20:21], pictures[1][20:21]
    seen = seen_of(net, x, y, noise_std=1e-3)
    expected = leakage_number(net, seen, x, y)
    errors = []
    for draw in range(4):
        noise = 1e-3 * np.random.default_rng(draw).normal(size=len(seen.update))
        sent = replace(seen, update=(seen.update + noise).astype(np.float32))
        found = Tarantola(labels=y).run(net, sent, seed=draw)
        errors.append(mse(x, found.inputs))
    measured = psnr(float(np.mean(errors)), (0, 1))
    assert -1.0 < measured - expected.here_psnr_db < 3.0
    assert expected.here_psnr_db > 20


@pytest.mark.slow
def test_without_noise_the_map_estimate_is_a_copy_also_of_a_batch_over_several_steps(pictures: Any) -> None:
    net = small_net(batch_size=1)
    x, y = pictures[0][30:32], pictures[1][30:32]
    seen = seen_of(net, x, y)  # two steps, one on each
    found = Tarantola(labels=y).run(net, seen, seed=0)
    assert psnr(mse(x, found.inputs), (0, 1)) > 60


def test_conjugate_gradients_find_what_the_dense_steps_find(net: KerasModel, pictures: Any, monkeypatch: Any) -> None:
    x, y = pictures[0][20:21], pictures[1][20:21]
    seen = seen_of(net, x, y, noise_std=1e-3)
    dense = Tarantola(labels=y).run(net, seen, seed=0)
    monkeypatch.setattr("covey_coordinator.inversion.tarantola.DENSE_UP_TO", 0)
    products = Tarantola(labels=y).run(net, seen, seed=0)
    assert products.score == pytest.approx(dense.score, rel=1e-2)
    assert psnr(mse(dense.inputs, products.inputs), (0, 1)) > 40


def test_more_noise_less_clipping_of_nothing_and_more_rounds_order_as_they_must(net: KerasModel, pictures: Any) -> None:
    x, y = pictures[0][:1], pictures[1][:1]
    seen = seen_of(net, x, y, noise_std=1e-2)
    resolved = leakage_number(net, seen, x, y).resolved
    louder = leakage_number(net, replace(seen, noise_std=3e-2), x, y).resolved
    again = leakage_number(net, [seen, replace(seen, round_number=1)], x, y)
    assert louder < resolved < again.resolved
    quieter = leakage_number(net, replace(seen, noise_std=1e-2 / np.sqrt(2)), x, y)
    assert again.resolved == pytest.approx(quieter.resolved, rel=1e-3)  # the mean of two updates has half the variance
    long = leakage_number(net, replace(seen, clip_norm=1e3), x, y)
    assert long.resolved == pytest.approx(resolved, rel=1e-9)
    short = leakage_number(net, replace(seen, clip_norm=0.1 * float(np.linalg.norm(seen.update))), x, y)
    assert short.resolved < resolved / 2


def test_what_is_left_out_or_not_sent_resolves_nothing(net: KerasModel, pictures: Any) -> None:
    x, y = pictures[0][:1], pictures[1][:1]
    seen = seen_of(net, x, y, noise_std=1e-3)
    everything = np.ones(len(seen.update), bool)
    assert leakage_number(net, seen, x, y, ignored=everything).resolved == 0
    plan = TrainingPlan(epochs=1, learning_rate=0.1, compression="top-k", kept_fraction=0.02)
    assert leakage_number(net, replace(seen, plan=plan), x, y).resolved < leakage_number(net, seen, x, y).resolved
    assert np.count_nonzero(data_weights(replace(seen, plan=plan))) == int(0.02 * len(seen.update))


def test_the_noise_of_quantisation_is_measured(net: KerasModel, pictures: Any) -> None:
    seen = seen_of(net, pictures[0][:1], pictures[1][:1])
    coarse = replace(seen, plan=TrainingPlan(1, 0.1, compression="rotated-4bit"))
    fine = replace(seen, plan=TrainingPlan(1, 0.1, compression="rotated-8bit"))
    ratio = data_weights(fine).mean() / data_weights(coarse).mean()
    assert 8 < ratio < 32  # 255 steps in place of 15


def test_the_time_may_end_between_products_and_what_was_drawn_counts(net: KerasModel, pictures: Any) -> None:
    x, y = pictures[0][:2], pictures[1][:2]
    seen, asked = seen_of(net, x, y), []

    def after(count: int) -> Any:
        asked.clear()
        return lambda: asked.append(True) or len(asked) > count

    with pytest.raises(OutOfTime, match="give more time"):
        leakage_number(net, seen, x, y, stop=after(0))
    with pytest.raises(OutOfTime):  # in the middle of the first vector
        leakage_number(net, seen, x, y, exact=False, probes=4, steps=8, stop=after(20))
    drawn = leakage_number(net, seen, x, y, exact=False, probes=4, steps=8, stop=after(60))
    assert 60 < len(asked) < 65  # two products for each of 8 steps of the distance, and of 2 of the 4 vectors
    two = leakage_number(net, seen, x, y, exact=False, probes=2, steps=8)
    assert drawn.resolved == pytest.approx(two.resolved)


def test_lanczos_bounds_hold_the_true_number() -> None:
    rng = np.random.default_rng(0)
    turned, _ = np.linalg.qr(rng.normal(size=(200, 200)))
    values = np.concatenate([10.0 ** rng.uniform(-3, 6, 120), np.zeros(80)])
    matrix, start = (turned * values) @ turned.T, rng.choice([-1.0, 1.0], 200)
    truth = float(start @ np.linalg.solve(np.eye(200) + matrix, start))
    widths = []
    for steps in (5, 20, 60):
        found = lanczos(lambda vector: matrix @ vector, start, steps)
        least, most = found.gauss(lambda s: 1 / (1 + s)), found.radau(lambda s: 1 / (1 + s))
        assert least <= truth + 1e-6 <= most + 2e-6
        widths.append(most - least)
    assert widths[0] > widths[1] > widths[2]
    whole = lanczos(lambda vector: matrix @ vector, start, 200)
    np.testing.assert_allclose(whole.times(lambda s: s), matrix @ start, rtol=1e-6, atol=1e-3)


def test_priors_have_the_covariance_they_say(pictures: Any) -> None:
    spec = TensorSpec((4, 4, 1), "float32", 0.0, 1.0)
    smooth = smooth_prior(spec, 2.0)
    np.testing.assert_allclose(smooth.variances(16), 1 / 12, rtol=1e-9)
    covariance = smooth.root @ smooth.root
    assert covariance[0, 1] == pytest.approx(np.exp(-0.5) / 12)
    learned = learned_prior(spec, pictures[0][:300], shrunk=0.1)
    rows = np.random.default_rng(0).normal(size=(3, 16))
    np.testing.assert_allclose(learned.unscaled(learned.scaled(rows)), rows, rtol=1e-6, atol=1e-9)
    measured = np.cov(pictures[0][:300].reshape(300, -1), rowvar=False)
    np.testing.assert_allclose(learned.root @ learned.root, 0.9 * measured + np.eye(16) / 120, atol=1e-9)
    with pytest.raises(UsageError, match="lowest"):
        Prior(1.0, 1.0)


def test_a_model_in_float32_and_labels_that_do_not_fit_are_refused(pictures: Any) -> None:
    model = small_net(dtype="float32")
    x, y = pictures[0][:1], pictures[1][:1]
    seen = Seen(model.parameters(), model.parameters(), ONE_STEP, 1)
    with pytest.raises(UsageError, match="float32"):
        leakage_number(model, seen, x, y)
    double = small_net()
    with pytest.raises(UsageError, match="labels"):
        leakage_number(double, seen, x, pictures[1][:2])
