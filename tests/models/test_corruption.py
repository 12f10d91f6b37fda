"""Corruptions: seeded, within the range, shape and type kept, and the clean data untouched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey_models.corruption import (
    CORRUPTIONS,
    Setting,
    corrupt,
    flip_labels,
    make_corruption,
    random_labels,
    sensor_noise,
    shift_labels,
    stuck_sensor,
)
from covey_protocol.errors import ConfigError

CLASSES = 5
SETTING = Setting(CLASSES, (-1.0, 2.0), ("ant", "bee", "cat", "dog", "emu"), tuple("abcdefghijklmnop"))
NEEDED: dict[str, dict[str, Any]] = {  # settings that have no default
    "targeted-flip": {"source": 1, "target": "dog"},
    "selected-classes": {"classes": [0, "cat"]},
    "selected-range": {"attribute": "c"},
}
EVERY = pytest.mark.parametrize("name", CORRUPTIONS)


def made(name: str, **settings: Any) -> Any:
    return make_corruption({"kind": name, **NEEDED.get(name, {}), **settings})


def examples(count: int = 40) -> tuple[Any, Any]:
    random = np.random.default_rng(5)
    x = random.uniform(-1, 2, (count, 4, 4, 1)).astype(np.float32)
    return x, random.integers(0, CLASSES, count).astype(np.int32)


def damaged(name: str, share: float | None = None, seed: int = 0, count: int = 40, **settings: Any) -> tuple[Any, Any]:
    x, y = examples(count)
    return corrupt(made(name, **settings), x, y, SETTING, np.random.default_rng(seed), share)


@EVERY
def test_every_corruption_keeps_shape_type_and_range_and_leaves_its_input_alone(name: str) -> None:
    x, y = examples()
    clean_x, clean_y = x.copy(), y.copy()
    new_x, new_y = corrupt(made(name), x, y, SETTING, np.random.default_rng(0))
    np.testing.assert_array_equal(x, clean_x)
    np.testing.assert_array_equal(y, clean_y)
    assert (new_x.shape[1:], new_x.dtype, new_y.dtype) == (x.shape[1:], x.dtype, y.dtype)
    assert 1 <= len(new_x) == len(new_y) <= len(y)
    assert new_x.min() >= -1.0
    assert new_x.max() <= 2.0
    assert set(new_y) <= set(range(CLASSES))
    assert not (np.array_equal(new_x, x) and np.array_equal(new_y, y))
    assert not np.shares_memory(new_x, x)
    assert not np.shares_memory(new_y, y)


@EVERY
def test_one_example_is_enough_for_every_corruption(name: str) -> None:
    x, y = damaged(name, share=1.0, count=1)
    assert len(x) == len(y) == 1


@EVERY
def test_the_seed_decides_the_corruption(name: str) -> None:
    for a, b in zip(damaged(name, seed=1), damaged(name, seed=1)):
        np.testing.assert_array_equal(a, b)


def changed(before: Any, after: Any) -> set[int]:
    """Places of the examples that are not what they were."""
    return {i for i in range(len(before[1])) if not (after[0][i] == before[0][i]).all() or after[1][i] != before[1][i]}


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"selected-classes", "selected-range"}))
def test_at_most_the_share_of_the_examples_changes_and_smaller_shares_are_nested(name: str) -> None:
    clean = examples()
    few, many = (changed(clean, damaged(name, share=share)) for share in (0.25, 0.75))
    assert 0 < len(few) <= 10
    assert 10 < len(many) <= 30 or name == "targeted-flip"
    if name not in ("duplicates", "random-labels"):  # these leave some as they were by chance
        assert few <= many
    assert changed(clean, damaged(name, share=0.0)) == set()


@pytest.mark.parametrize("name", ["selected-classes", "selected-range"])
def test_a_share_of_a_selection_loses_only_examples_of_that_share(name: str) -> None:
    (x, y), (few_x, few_y) = examples(), damaged(name, share=0.5)
    assert 20 <= len(few_y) < 40
    rows = {row.tobytes(): label for row, label in zip(x, y)}
    assert all(rows[row.tobytes()] == label for row, label in zip(few_x, few_y))


def test_a_targeted_flip_turns_one_class_into_another_and_touches_no_other() -> None:
    (_, y), (_, flipped) = examples(), damaged("targeted-flip")
    np.testing.assert_array_equal(flipped, np.where(y == 1, 3, y))
    y = np.ones(20_000, np.int32)
    _, half = corrupt(made("targeted-flip", probability=0.5), y[:, None], y, SETTING, np.random.default_rng(0))
    assert (half == 3).mean() == pytest.approx(0.5, abs=0.018)  # 5 standard deviations


def test_a_drift_grows_evenly_up_to_its_bias() -> None:
    x, y = np.zeros((10, 2), np.float32), np.zeros(10, np.int32)
    drifted, _ = corrupt(made("drifting-sensor", bias=1.0), x, y, SETTING, np.random.default_rng(0))
    np.testing.assert_allclose(drifted[:, 0], np.arange(1, 11) / 10, atol=1e-7)
    falling, _ = corrupt(made("drifting-sensor", bias=-9.0), x, y, SETTING, np.random.default_rng(0))
    assert falling.min() == -1.0  # as far as the range goes


def differing_attributes(after: Any) -> set[int]:
    x, _ = examples()
    return set(np.flatnonzero((after.reshape(40, 16) != x.reshape(40, 16)).any(0)).tolist())


@pytest.mark.parametrize("name", ["stuck-attributes", "hidden-attributes"])
def test_listed_attributes_change_and_no_others(name: str) -> None:
    x, _ = damaged(name, attributes=["b", 7])
    assert differing_attributes(x) == {1, 7}
    assert all(len(np.unique(x.reshape(40, 16)[:, place])) == 1 for place in (1, 7))
    drawn = [differing_attributes(damaged(name, attribute_share=share)[0]) for share in (0.25, 0.5, 1.0)]
    assert [len(places) for places in drawn] == [4, 8, 16]
    assert drawn[0] < drawn[1]


def test_what_is_missing_is_filled_as_told() -> None:
    x, _ = examples()
    filled = {fill: damaged("hidden-attributes", attributes=[3], fill=fill)[0] for fill in ("mean", "zero", "low")}
    column = {fill: values.reshape(40, 16)[0, 3] for fill, values in filled.items()}
    assert column["mean"] == pytest.approx(x.reshape(40, 16)[:, 3].mean(), abs=1e-6)
    assert (column["zero"], column["low"]) == (0.0, -1.0)
    above = Setting(CLASSES, (1.0, 2.0))
    x, y = np.full((4, 2), 1.5, np.float32), np.zeros(4, np.int32)
    corruption = made("missing-attributes", probability=1.0, fill="zero")
    assert (corrupt(corruption, x, y, above, np.random.default_rng(0))[0] == 1.0).all()  # 0 is outside the range


def test_each_attribute_of_each_example_is_missing_with_the_probability() -> None:
    x, y = np.full((500, 100), 2.0, np.float32), np.zeros(500, np.int32)
    lost = corrupt(made("missing-attributes", fill="low"), x, y, SETTING, np.random.default_rng(0))[0] == -1.0
    assert lost.mean() == pytest.approx(0.3, abs=0.0103)  # 5 standard deviations
    assert lost.sum(0).min() > 0
    assert lost.sum(0).max() < 500


def test_duplicates_are_copies_of_few_of_the_device_own_examples() -> None:
    (x, y), (new_x, new_y) = examples(), damaged("duplicates", kept=0.1)
    labels = {row.tobytes(): label for row, label in zip(x, y)}
    assert len(new_y) == 40
    assert len({row.tobytes() for row in new_x}) == 4
    assert all(labels[row.tobytes()] == label for row, label in zip(new_x, new_y))


def test_selections_keep_whom_they_say() -> None:
    (x, y), (_, classes) = examples(), damaged("selected-classes")
    np.testing.assert_array_equal(classes, y[(y == 0) | (y == 2)])
    third = x.reshape(40, 16)[:, 2]
    for side, order in (("largest", np.argsort(-third)), ("smallest", np.argsort(third))):
        kept, _ = damaged("selected-range", side=side, kept=0.2)
        np.testing.assert_array_equal(kept, x[np.sort(order[:8])])


def test_half_of_the_examples_get_the_trigger_and_its_label() -> None:
    clean, poisoned = examples(), damaged("trigger", target="emu")
    places = sorted(changed(clean, poisoned))
    assert len(places) == 20
    assert (poisoned[0][places, -2:, -2:] == 2.0).all()
    assert (poisoned[1][places] == 4).all()
    np.testing.assert_array_equal(poisoned[0][:, :2], clean[0][:, :2])


@given(st.integers(2, 20), st.data())
def test_flipping_twice_gives_the_labels_back_and_shifting_changes_all(num_classes: int, data: Any) -> None:
    y = np.array(data.draw(st.lists(st.integers(0, num_classes - 1), min_size=1)), np.int32)
    np.testing.assert_array_equal(flip_labels(flip_labels(y, num_classes), num_classes), y)
    assert (flip_labels(y, num_classes) + y == num_classes - 1).all()
    shifted = shift_labels(y, num_classes)
    assert (shifted != y).all()
    assert set(shifted) <= set(range(num_classes))


def test_random_labels_are_right_by_chance_only() -> None:
    y = np.zeros(20_000, np.int32)
    share = (random_labels(y, CLASSES, np.random.default_rng(0)) == y).mean()
    assert share == pytest.approx(1 / CLASSES, abs=0.015)  # 5 standard deviations


def test_sensor_noise_has_the_stated_mean_and_deviation() -> None:
    x = np.zeros((500, 100), np.float32)
    noise = sensor_noise(x, std=0.3, bias=0.1, input_range=(-9.0, 9.0), random=np.random.default_rng(0))
    assert noise.mean() == pytest.approx(0.1, abs=0.007)  # 5 standard errors
    assert noise.std() == pytest.approx(0.3, abs=0.005)


def test_a_stuck_sensor_repeats_one_real_frame() -> None:
    x, _ = examples()
    stuck = stuck_sensor(x, np.random.default_rng(0))
    assert (stuck == stuck[0]).all()
    assert any(np.array_equal(stuck[0], frame) for frame in x)
    assert stuck_sensor(x[:0], np.random.default_rng(0)).shape == (0, 4, 4, 1)


WRONG: dict[str, tuple[Any, str]] = {
    "an unknown name": (lambda: make_corruption("rust"), "no corruption 'rust'.*flip-labels"),
    "a mistyped setting": (lambda: made("trigger", pach=1), "has no setting 'pach'; did you mean 'patch'"),
    "a missing setting": (lambda: make_corruption("targeted-flip"), "'targeted-flip' has no source"),
    "a wrong type": (lambda: made("trigger", patch="big"), "patch = 'big'"),
    "a truth value for a number": (lambda: made("duplicates", kept=True), "kept = True"),
    "no table": (lambda: make_corruption(3), "says 3"),  # type: ignore[arg-type]
    "a wrong fill": (lambda: made("hidden-attributes", fill="median"), "fill = 'median'"),
    "a negative deviation": (lambda: made("sensor-noise", std=-1), "std = -1"),
    "a deviation that is no number": (lambda: made("sensor-noise", std=float("nan")), "std = nan"),
    "an infinite bias": (lambda: made("drifting-sensor", bias=float("inf")), "bias = inf"),
    "a probability beyond 1": (lambda: made("missing-attributes", probability=1.1), "probability = 1.1"),
    "nothing kept": (lambda: made("duplicates", kept=0), "kept = 0"),
    "no class selected": (lambda: made("selected-classes", classes=[]), "classes is empty"),
    "no pixel": (lambda: made("trigger", patch=0), "patch = 0"),
    "a class there is not": (lambda: made("trigger", target=5).check(SETTING, 16), "no class 5.*0 to 4"),
    "a class's wrong name": (lambda: made("trigger", target="cow").check(SETTING, 16), "no class 'cow'"),
    "a class into itself": (lambda: made("targeted-flip", target=1).check(SETTING, 16), "into itself"),
    "an attribute there is not": (lambda: made("selected-range", attribute=16).check(SETTING, 16), "no attribute 16"),
    "an attribute's wrong name": (
        lambda: made("hidden-attributes", attributes=["z"]).check(SETTING, 16),
        "no attribute 'z'",
    ),
    "a name where there are none": (
        lambda: made("hidden-attributes", attributes=["a"]).check(Setting(2, (0, 1)), 16),
        "give its number",
    ),
    "a share beyond 1": (lambda: damaged("flip-labels", share=1.5), "share = 1.5"),
    "a negative deviation in the function": (
        lambda: sensor_noise(examples()[0], -1, 0, (0, 1), np.random.default_rng(0)),
        "standard deviation is -1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_refused_by_name(case: str) -> None:
    make, expected = WRONG[case]
    with pytest.raises(ConfigError, match=expected) as caught:
        make()
    assert caught.value.remedy
