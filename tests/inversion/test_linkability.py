"""Whose update is it, and what data does its maker have? On updates made by the device's own code and runtime."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from covey_coordinator.inversion.contract import Seen
from covey_coordinator.inversion.grading import auc
from covey_coordinator.inversion.linkability import SKETCH_SIZE, centred, cosines, linkability, picture, sketch
from covey_coordinator.inversion.matching import was_clipped
from covey_coordinator.inversion.properties import SIZE, Auxiliary, Played, PropertyInference, trained
from covey_coordinator.inversion.several_rounds import mean_of
from covey_edge.runtime import Model
from covey_protocol.bundle import read_bundle
from covey_protocol.errors import UsageError
from covey_protocol.messages import TrainingPlan
from covey_protocol.privacy import add_gaussian_noise, clip

Array = np.ndarray[Any, Any]
DEVICES, ROUNDS = 6, 3


@pytest.fixture(scope="module")
def device(dense_bundle: bytes) -> Model:
    return Model(read_bundle(dense_bundle))


def fleet(device: Model, shards: list[tuple[Array, Array]], noise: float = 0.0) -> tuple[Array, list[str], list[int]]:
    """(rows, ids, rounds): FedAvg of these devices, clipped to 0.5 and noised where noise is above 0."""
    start, rng = read_start(device), np.random.default_rng(0)
    parameters, rows, ids, rounds = start, [], [], []
    for number in range(ROUNDS):
        updates = []
        for name, examples in enumerate(shards):
            update = trained(device, parameters, examples, TrainingPlan(1, 0.1, shuffle_seed=number), f"pi-{name}")
            updates.append(add_gaussian_noise(clip(update, 0.5), 0.5, noise, rng) if noise else update)
            ids.append(f"pi-{name}")
            rounds.append(number)
        rows += updates
        parameters = parameters + np.mean(updates, axis=0).astype(np.float32)
    device.set_parameters(start)
    return np.stack(rows), ids, rounds


def read_start(device: Model) -> Array:
    return device.parameters()


def own_classes(digits: tuple[Array, Array]) -> list[tuple[Array, Array]]:
    """Device k has 40 digits of classes k and k + 1."""
    x, y = digits
    places = [np.flatnonzero((y == name) | (y == name + 1))[:40] for name in range(DEVICES)]
    return [(x[part], y[part].astype(np.int32)) for part in places]


def test_devices_of_different_data_are_told_apart_and_noise_that_covers_the_update_hides_them(
    device: Model, digits: Any
) -> None:
    shards = own_classes(digits)
    rows, ids, rounds = fleet(device, shards)
    bare = linkability(rows, ids, rounds)
    assert bare.auc is not None
    assert bare.auc > 0.99
    assert bare.identified == 1.0
    assert bare.chance == pytest.approx(1 / DEVICES)
    covered = linkability(*fleet(device, shards, noise=1.0))
    assert covered.auc is not None
    assert 0.3 < covered.auc < 0.7
    assert covered.identified is not None
    assert covered.identified < 0.5


def test_sketches_tell_the_same_as_whole_updates(device: Model, digits: Any) -> None:
    rows, ids, rounds = fleet(device, own_classes(digits))
    assert rows.shape[1] > SKETCH_SIZE
    small = np.stack([sketch(row, 7) for row in rows])
    assert small.shape == (len(rows), SKETCH_SIZE)
    whole, short = linkability(rows, ids, rounds), linkability(small, ids, rounds)
    assert np.abs(whole.likeness - short.likeness).max() < 5 / np.sqrt(SKETCH_SIZE)
    assert short.identified == whole.identified
    np.testing.assert_allclose(
        sketch(rows[0] + rows[1], 7), small[0] + small[1], atol=1e-5
    )  # so they can be centred, and added up


def test_updates_of_nobody_in_particular_are_told_by_chance() -> None:
    """40 devices, 5 rounds of independent numbers: the AUC is 0.5 within 4 standard errors of 400 pairs."""
    rng = np.random.default_rng(0)
    ids, rounds = [f"pi-{name}" for name in range(40)] * 5, np.repeat(np.arange(5), 40).tolist()
    found = linkability(rng.standard_normal((200, 50)) + 3.0, ids, rounds)
    assert found.auc == pytest.approx(0.5, abs=4 * 0.29 / np.sqrt(400))
    assert found.identified == pytest.approx(1 / 40, abs=4 * np.sqrt(0.025 / 160))


def test_the_common_part_of_a_round_links_nobody() -> None:
    rng = np.random.default_rng(0)
    own = rng.standard_normal((3, 20))
    rows = np.concatenate([own + 100.0, own - 100.0])
    np.testing.assert_allclose(cosines(centred(rows, [0, 0, 0, 1, 1, 1]))[:3, 3:].diagonal(), 1.0)
    assert linkability(rows, list("abcabc"), [0, 0, 0, 1, 1, 1]).identified == 1.0


def test_one_round_links_nothing_and_unequal_lengths_are_refused() -> None:
    one = linkability(np.eye(3), list("abc"), [1, 1, 1])
    assert (one.auc, one.identified, one.chance) == (None, None, None)
    with pytest.raises(UsageError, match="3 updates, 2 devices"):
        linkability(np.eye(3), list("ab"), [1, 1, 1])
    assert np.isfinite(linkability(np.zeros((4, 3)), list("abab"), [0, 0, 1, 1]).likeness).all()


def test_the_picture_is_one() -> None:
    rng = np.random.default_rng(0)
    found = linkability(rng.standard_normal((6, 9)), list("abcabc"), [0, 0, 0, 1, 1, 1])
    assert picture(found, list("abcabc"), "three devices").startswith(b"\x89PNG")


def bright(x: Array) -> Array:
    changed = x.copy()
    changed[:, :2, :2] = 1.0
    return changed


def test_a_property_beside_the_task_is_read_from_single_updates_and_noise_hides_it(device: Model, digits: Any) -> None:
    """A bright corner on all of a device's 32 pictures. The attacker's 700 pictures are nobody else's."""
    x, y = digits[0], digits[1].astype(np.int32)
    start, plan = device.parameters(), TrainingPlan(1, 0.1, shuffle_seed=1)
    attack = PropertyInference(examples=32, share=1.0, updates=24)
    classifier = attack.fit(device, start, plan, Auxiliary((bright(x[:700]), y[:700]), (x[:700], y[:700])), seed=0)
    rng, updates = np.random.default_rng(1), {True: [], False: []}
    for number in range(24):
        places, has = rng.choice(np.arange(700, len(x)), 32, replace=False), number % 2 == 0
        own = bright(x[places]) if has else x[places]
        updates[has].append(trained(device, start, (own, y[places]), plan, f"pi-{number}"))
    bare = auc(classifier.scores(updates[True]), classifier.scores(updates[False]))
    assert bare > 0.95
    noisy = {
        has: [add_gaussian_noise(clip(one, 0.5), 0.5, 1.0, rng) for one in group] for has, group in updates.items()
    }
    adapted = PropertyInference(32, 1.0, 24, clip_norm=0.5, noise_multiplier=1.0)
    made_for_it = adapted.fit(device, start, plan, Auxiliary((bright(x[:700]), y[:700]), (x[:700], y[:700])), seed=0)
    assert auc(made_for_it.scores(noisy[True]), made_for_it.scores(noisy[False])) < 0.85


def test_clipping_and_noise_of_a_sketch_are_those_of_the_update() -> None:
    """Of 40 updates larger than a sketch: clipped alike to rounding, and the noise as strong, within 5 %."""
    rng, d, seed = np.random.default_rng(0), 100_000, 3
    updates = rng.standard_normal((40, d)).astype(np.float32) * rng.uniform(1e-4, 1e-2, (40, 1)).astype(np.float32)
    rows = np.stack([sketch(one, seed, SIZE) for one in updates]).astype(np.float64)
    norms = np.linalg.norm(updates.astype(np.float64), axis=1)
    assert norms.min() < 0.5 < norms.max()
    played = Played(rows, norms, np.arange(40) % 2 == 0, d, seed)
    clipped = np.stack([sketch(clip(one, 0.5), seed, SIZE) for one in updates])
    np.testing.assert_allclose(played.protected(0.5), clipped, atol=1e-6)
    np.testing.assert_array_equal(played.protected(0.0), rows)
    noise = sketch(add_gaussian_noise(np.zeros(d, np.float32), 0.5, 0.2, rng), seed, SIZE)
    added = played.protected(0.5, 0.2, rng) - played.protected(0.5)
    assert added.std() == pytest.approx(float(noise.std()), rel=0.05)


def test_the_mean_of_rounds_has_less_noise_and_what_is_not_of_one_device_is_not_joined() -> None:
    rng, true = np.random.default_rng(0), np.linspace(-0.1, 0.1, 500).astype(np.float32)
    plan, parameters = TrainingPlan(1, 0.1), np.zeros(500, np.float32)
    sent = [add_gaussian_noise(true, 1.0, 0.1, rng) for _ in range(16)]
    several = [Seen(parameters + k, one, plan, 1, 0.1, 1.0, "pi-1", k) for k, one in enumerate(sent)]
    joined = mean_of(several)
    assert (joined.update - true).std() == pytest.approx(0.1 / 4, rel=0.1)
    assert joined.noise_std == pytest.approx(0.1 / 4)
    np.testing.assert_allclose(joined.parameters, 7.5)
    assert was_clipped(several[0])
    assert was_clipped(joined)  # its length says nothing, although it is shorter
    short = [replace(one, clip_norm=100.0) for one in several]
    assert mean_of(short).clip_norm == 100.0
    assert not was_clipped(mean_of(short))
    with pytest.raises(UsageError, match="not of one device"):
        mean_of([*several, replace(several[0], device_id="pi-2")])
