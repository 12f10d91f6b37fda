"""Labels stand in the last layer's gradient: of one example always, of batches and several steps mostly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from inversion_helpers import digits_model

from covey_coordinator.inversion.contract import Seen
from covey_coordinator.inversion.grading import label_leak_rate
from covey_coordinator.inversion.keras_model import KerasModel
from covey_coordinator.inversion.labels import LabelRecovery
from covey_coordinator.inversion.small_models import relu_mlp, train
from covey_protocol.errors import ConfigError, UsageError
from covey_protocol.messages import TrainingPlan

RATE = 0.01


class Attacked:
    """A model of digits and updates of plain steps on it."""

    def __init__(self, keras: Any, batch_size: int = 1) -> None:
        import tensorflow as tf

        self.model = KerasModel(keras, batch_size=batch_size)
        self.parameters = self.model.parameters()
        start = tf.constant(self.parameters)
        self.gradient = tf.function(lambda x, y: self.model.gradient(start, x, y), reduce_retracing=True)

    def seen(self, x: np.ndarray, y: np.ndarray, **more: Any) -> Seen:
        """Of one step."""
        update = -RATE * np.asarray(self.gradient(x, y.astype(np.int32)))
        return Seen(self.parameters, update, TrainingPlan(epochs=1, learning_rate=RATE), len(x), **more)

    def labels(self, seen: Seen, method: str = "auto") -> np.ndarray:
        found = LabelRecovery(method).run(self.model, seen, seed=0).labels
        assert found is not None
        return found

    def rate(self, x: np.ndarray, y: np.ndarray, batches: list[np.ndarray], method: str) -> float:
        """The mean label rate over batches of these rows. The model's batch size must hold each."""
        return float(
            np.mean([label_leak_rate(y[rows], self.labels(self.seen(x[rows], y[rows]), method)) for rows in batches])
        )


@pytest.fixture(scope="module")
def trained(digits) -> Any:
    x, y = digits
    model = relu_mlp((8, 8, 1), 10, 0)
    assert train(model, x[:1000], y[:1000], epochs=5, seed=0) > 0.9
    return model


def random_batches(count: int, size: int, rows: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.choice(rows, size, replace=False) for _ in range(count)]


@pytest.mark.parametrize("kind", ["fresh", "trained"])
def test_one_examples_label_is_always_read(digits, trained, kind):
    x, y = digits
    attacked = Attacked(digits_model() if kind == "fresh" else trained)
    assert attacked.rate(x, y, [np.array([row]) for row in range(0, 1790, 18)], "auto") == 1.0


def test_without_a_bias_the_inner_products_of_the_columns_say_it(digits):
    import tensorflow as tf

    x, y = digits
    tf.keras.utils.set_random_seed(0)
    layers = [tf.keras.Input((8, 8, 1)), tf.keras.layers.Flatten(), tf.keras.layers.Dense(10, use_bias=False)]
    attacked = Attacked(tf.keras.Sequential(layers))
    assert attacked.rate(x, y, [np.array([row]) for row in range(25)], "auto") == 1.0


@pytest.mark.parametrize(("method", "at_least"), [("counts", 0.97), ("llg", 0.9), ("columns", 0.6)])
def test_of_batches_of_eight_most_labels_are_read_off_a_fresh_model(digits, method, at_least):
    """Batches drawn blindly, so that classes repeat, which `columns` cannot see."""
    x, y = digits
    attacked = Attacked(digits_model(), batch_size=8)
    assert attacked.rate(x, y, random_batches(40, 8, len(x)), method) >= at_least


def test_where_no_class_repeats_columns_names_them_all(digits):
    x, y = digits
    rows = np.array([np.flatnonzero(y == label)[3] for label in (0, 2, 3, 5, 8, 9)])
    attacked = Attacked(digits_model(), batch_size=6)
    assert list(attacked.labels(attacked.seen(x[rows], y[rows]), "columns")) == [0, 2, 3, 5, 8, 9]


def test_rlg_names_which_classes_occur_each_once(digits):
    x, y = digits
    attacked = Attacked(digits_model(), batch_size=4)
    for rows in random_batches(10, 4, len(x)):
        assert set(attacked.labels(attacked.seen(x[rows], y[rows]), "rlg")) == set(y[rows])


def test_counts_are_exact_where_predictions_do_not_depend_on_the_input(digits):
    """A last layer of zeros predicts one tenth for every class of every input."""
    x, y = digits
    keras = digits_model()
    keras.layers[-1].set_weights([np.zeros_like(values) for values in keras.layers[-1].get_weights()])
    attacked = Attacked(keras, batch_size=30)
    assert attacked.rate(x, y, random_batches(8, 30, len(x)), "counts") == 1.0


def test_of_a_trained_model_every_class_with_a_negative_gradient_is_named(digits, trained):
    """It is sure of its own examples, so that its predictions on random inputs say nothing of the batch."""
    x, y = digits
    attacked = Attacked(trained, batch_size=4)
    rates = []
    for rows in random_batches(20, 4, len(x)):
        seen = attacked.seen(x[rows], y[rows])
        bias = -seen.update[-10:] / RATE
        labels = attacked.labels(seen, "counts")
        assert set(np.flatnonzero(bias < -1e-3)) <= set(labels)
        rates.append(label_leak_rate(y[rows], labels))
    assert np.mean(rates) > 0.7


def test_clipping_does_not_hide_labels(digits):
    x, y = digits
    attacked = Attacked(digits_model(), batch_size=5)
    for rows in random_batches(5, 5, len(x)):
        whole = attacked.seen(x[rows], y[rows])
        norm = 0.1 * float(np.linalg.norm(whole.update))
        clipped = Seen(whole.parameters, 0.1 * whole.update, whole.plan, 5, clip_norm=norm)
        assert label_leak_rate(y[rows], attacked.labels(clipped)) >= 0.8


def test_an_update_of_several_steps_says_how_often_each_class_occurs(digits):
    import tensorflow as tf

    from covey_coordinator.inversion.matching import rows_of_steps

    x, y = digits
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.choice(np.flatnonzero(y == 3), 18), rng.choice(np.flatnonzero(y == 7), 6)])
    attacked, plan = Attacked(digits_model(), batch_size=8), TrainingPlan(epochs=2, learning_rate=RATE)
    told = Seen(attacked.parameters, attacked.parameters, plan, len(rows), device_id="device-1")
    steps = rows_of_steps(told, 8)
    assert len(steps) == 6
    batches = [(x[rows[step]], y[rows[step]].astype(np.int32), tf.ones(len(step))) for step in steps]
    update = np.asarray(attacked.model.update(attacked.parameters, batches, plan))
    seen = Seen(attacked.parameters, update, plan, len(rows), device_id="device-1")
    assert label_leak_rate(y[rows], attacked.labels(seen)) >= 0.95


def test_noise_as_large_as_the_gradient_leaves_nothing_but_chance(digits):
    x, y = digits
    attacked, rng = Attacked(digits_model()), np.random.default_rng(0)
    hits = []
    for row in range(0, 300, 3):
        clean = attacked.seen(x[[row]], y[[row]])
        noise = np.linalg.norm(clean.update) * rng.standard_normal(clean.update.size).astype(np.float32)
        noisy = Seen(clean.parameters, clean.update + noise, clean.plan, 1)
        hits.append(attacked.labels(noisy)[0] == y[row])
    assert 0.02 < np.mean(hits) < 0.2


def test_what_cannot_be_read_is_refused(digits):
    import tensorflow as tf

    x, y = digits
    regression = tf.keras.Sequential([tf.keras.Input((3,)), tf.keras.layers.Dense(1)])
    model = KerasModel(regression, "mean_squared_error")
    seen = Seen(model.parameters(), np.ones(4, np.float32), TrainingPlan(epochs=1, learning_rate=RATE), 1)
    with pytest.raises(ConfigError, match="mean_squared_error"):
        LabelRecovery().run(model, seen, seed=0)
    attacked = Attacked(digits_model(), batch_size=2)
    with pytest.raises(UsageError, match="one label"):
        attacked.labels(attacked.seen(x[:2], y[:2]), "idlg")
    with pytest.raises(ConfigError, match="choose from"):
        LabelRecovery("guess")
    with pytest.raises(UsageError, match="NaN"):
        attacked.labels(Seen(attacked.parameters, np.full_like(attacked.parameters, np.nan), seen.plan, 1))
