"""What a defence is worth is what is left against somebody who knows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from covey_coordinator.inversion.adaptive import (
    CentralNoise,
    ClippingAndNoise,
    Compressed,
    Defence,
    Pruned,
    Sent,
    Soteria,
    attacked_adaptively,
    attacked_unaware,
    leakage_of,
)
from covey_coordinator.inversion.contract import Seen
from covey_coordinator.inversion.extraction import nearest_errors, recovered_share
from covey_coordinator.inversion.imprint import Imprint, imprinted
from covey_coordinator.inversion.imprint_defended import read_imprint
from covey_coordinator.inversion.keras_model import KerasModel
from covey_coordinator.inversion.metrics import mse, psnr
from covey_coordinator.inversion.priors import learned_prior
from covey_coordinator.inversion.resolution import planned
from covey_protocol.errors import UsageError
from covey_protocol.messages import TrainingPlan


@pytest.fixture(scope="module")
def example(pictures: Any) -> tuple[np.ndarray, np.ndarray]:
    return pictures[0][40:41], pictures[1][40:41]


def sent_with(net: Any, defence: Defence, x: Any, y: Any, seed: int = 0) -> Sent:
    parameters = net.parameters()
    clean = planned(net, Seen(parameters, parameters, TrainingPlan(1, 0.1), len(x)), x, y)
    return defence.sent(net, clean, x, y, np.random.default_rng(seed))


def reached(attack: Any, net: Any, sent: Sent, x: Any, y: Any) -> float:
    return psnr(mse(x, attack(net, sent, y, seed=0).inputs), (0, 1))


def hidden_of(net: Any) -> Any:
    """The representation before the last layer, out of the flat parameters."""
    import tensorflow as tf

    flat = net.parameters().astype(np.float64)
    kernel, bias = flat[: 16 * 16].reshape(16, 16), flat[16 * 16 : 16 * 17]
    return lambda x: tf.sigmoid(tf.reshape(x, [-1, 16]) @ kernel + bias)


# the most PSNR that the unaware attack may reach, the least of the adaptive one
BROKEN = {
    "clipping keeps the direction": (lambda net: ClippingAndNoise(0.01), 15, 60),
    "pruning leaves exact numbers": (lambda net: Pruned(0.6), 20, 60),
    "Soteria spoils one layer": (lambda net: Soteria("last/kernel", hidden_of(net), 0.4), 20, 60),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_defence_stops_who_does_not_know_it_and_nobody_else(net: Any, example: Any, case: str) -> None:
    make, unaware, adaptive = BROKEN[case]
    sent = sent_with(net, make(net), *example)
    assert reached(attacked_unaware, net, sent, *example) < unaware
    assert reached(attacked_adaptively, net, sent, *example) > adaptive


def test_compression_is_no_defence(net: Any, example: Any) -> None:
    for form, least in ((Compressed("rotated-8bit"), 20), (Compressed("top-k", 0.4), 60)):
        sent = sent_with(net, form, *example)
        assert reached(attacked_adaptively, net, sent, *example) > least
        told = leakage_of(net, sent, *example)
        assert told.here_psnr_db > least - 3


def test_noise_holds_against_who_knows_it_for_one_round_and_less_for_many(net: Any, example: Any) -> None:
    once = sent_with(net, ClippingAndNoise(0.1, 0.3), *example)
    often = sent_with(net, ClippingAndNoise(0.1, 0.3, rounds=30), *example)
    assert len(often.seen) == 30
    assert reached(attacked_adaptively, net, once, *example) < 12
    assert leakage_of(net, often, *example).resolved > 3 * leakage_of(net, once, *example).resolved
    at_once = reached(attacked_adaptively, net, once, *example)
    assert reached(attacked_adaptively, net, often, *example) > at_once + 1


def test_the_mean_of_a_fleet_tells_less_of_each_with_noise_and_is_refused_where_it_was_clipped(
    net: Any, pictures: Any
) -> None:
    x, y = pictures[0][40:44], pictures[1][40:44]
    sent = sent_with(net, CentralNoise(1.0, 0.1, devices=4), x, y)
    assert sent.seen[0].noise_std == pytest.approx(0.025)
    alone = sent_with(net, ClippingAndNoise(1.0, 0.025), x[:1], y[:1])  # the same noise on one device's own
    assert leakage_of(net, sent, x, y).per_example.mean() < 0.5 * leakage_of(net, alone, x[:1], y[:1]).resolved
    with pytest.raises(UsageError, match="clip_norm"):
        sent_with(net, CentralNoise(0.01, 0.1, devices=4), x, y)


def test_soteria_on_a_layer_that_is_not_there_is_refused(net: Any, example: Any) -> None:
    with pytest.raises(UsageError, match="last/kernel"):
        sent_with(net, Soteria("first/kernel", hidden_of(net)), *example)


@pytest.fixture(scope="module")
def imprint_of(pictures: Any) -> Any:
    """defence -> (model, what a device with four examples sends of imprinted parameters, its examples, a prior)."""
    import tensorflow as tf

    tf.keras.utils.set_random_seed(0)
    layers = tf.keras.layers
    keras = tf.keras.Sequential(
        [tf.keras.Input((4, 4, 1)), layers.Flatten(), layers.Dense(48, "relu"), layers.Dense(10)]
    )
    model, own = KerasModel(keras, batch_size=4, dtype="float64"), pictures[0][500:1000]
    hostile, x, y = imprinted(model.specs, model.parameters(), own, seed=0), pictures[0][40:44], pictures[1][40:44]
    clean = planned(model, Seen(hostile, hostile, TrainingPlan(1, 0.1), 4), x, y)

    def made(defence: Defence) -> Any:
        return model, defence.sent(model, clean, x, y, np.random.default_rng(0)), x, learned_prior(model.input, own)

    return made


def test_an_imprint_in_an_undefended_update_is_read_as_exactly_with_a_prior_as_without(imprint_of: Any) -> None:
    model, sent, x, prior = imprint_of(ClippingAndNoise(0.01))
    plain, known = Imprint().run(model, sent.unaware, seed=0), read_imprint(model, sent, prior)
    assert recovered_share(x, plain.inputs, (0, 1), 50.0) == recovered_share(x, known.inputs, (0, 1), 50.0) == 1.0


@pytest.mark.parametrize(
    ("defence", "gain_db"),
    [
        (ClippingAndNoise(0.2, 0.001), 1),
        (Compressed("rotated-8bit"), 4),
        (Compressed("top-k", 0.2), 4),
        (Pruned(0.5), 7),
    ],
    ids=repr,
)
def test_what_hides_an_imprint_from_who_divides_differences_hides_less_from_who_knows(
    imprint_of: Any, defence: Defence, gain_db: float
) -> None:
    """Over four examples; who reads nothing guesses the mean picture."""
    model, sent, x, prior = imprint_of(defence)
    plain, known = Imprint().run(model, sent.unaware, seed=0), read_imprint(model, sent, prior)
    errors = [
        np.mean(nearest_errors(x, prior.mean[None] if one.inputs is None else one.inputs)) for one in (plain, known)
    ]
    assert 10 * np.log10(errors[0] / errors[1]) > gain_db


def test_noise_of_a_tenth_of_the_clip_norm_hides_an_imprint_also_from_who_knows(imprint_of: Any) -> None:
    model, sent, x, prior = imprint_of(ClippingAndNoise(0.05, 0.1))
    assert recovered_share(x, read_imprint(model, sent, prior).inputs, (0, 1), 16.0) == 0.0


def test_an_imprint_of_several_rounds_is_refused(imprint_of: Any) -> None:
    model, sent, _, prior = imprint_of(ClippingAndNoise(0.05, 0.1, rounds=2))
    with pytest.raises(UsageError, match="2 rounds"):
        read_imprint(model, sent, prior)
