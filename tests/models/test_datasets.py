"""Data sets: what loads is clean, and what is not clean is refused with the file's name and a remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_models import load, split
from covey_models.datasets import Dataset
from covey_protocol.errors import ConfigError, DataError


@pytest.mark.parametrize(("name", "shape", "classes", "count"), [
    ("digits", (8, 8, 1), 10, 1797),
    ("breast-cancer", (30,), 2, 569),
    ("wine", (13,), 3, 178),
])  # fmt: skip
def test_built_in_data_is_finite_and_in_its_range(name: str, shape: tuple[int, ...], classes: int, count: int) -> None:
    data = load(name)
    low, high = data.input_range
    assert (len(data), data.input_shape, data.num_classes) == (count, shape, classes)
    assert (data.x.dtype, data.y.dtype) == (np.float32, np.int32)
    assert low <= data.x.min() < data.x.max() <= high
    assert set(np.unique(data.y)) == set(range(classes))
    assert len(data.feature_names) == (0 if name == "digits" else shape[0])
    assert data.users is None


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


X, Y = np.random.default_rng(0).random((6, 3)), np.array([0, 1, 2, 0, 1, 2])


def test_own_data_keeps_its_numbers_and_names(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "mine.npz", x=X * 10 - 5, y=Y[:, None], class_names=["a", "b", "c"], feature_names=["p", "q", "r"]
    )
    data = load(path)
    np.testing.assert_allclose(data.x, X * 10 - 5, atol=1e-6)
    np.testing.assert_array_equal(data.y, Y)
    assert (data.name, data.class_names, data.feature_names) == ("mine", ("a", "b", "c"), ("p", "q", "r"))
    assert data.input_range == (data.x.min(), data.x.max())


def test_integer_images_are_scaled_and_get_a_channel(tmp_path: Path) -> None:
    images = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)
    images[0, 0, 0] = 255
    data = load(str(saved(tmp_path / "mnist.npz", x_train=images, y_train=Y, x_test=images, y_test=Y)))
    assert (data.input_shape, data.input_range, data.x.max()) == ((4, 4, 1), (0.0, 1.0), 1.0)


def test_fractions_between_0_and_1_have_that_range(tmp_path: Path) -> None:
    assert load(saved(tmp_path / "unit.npz", x=X * 0.5, y=Y)).input_range == (0.0, 1.0)


def raw(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


def arrays(**values: Any) -> Callable[[Path], Any]:
    return lambda path: saved(path, **values)


def with_value(value: float) -> Any:
    x = X.copy()
    x[4, 1] = value
    return x


def a_bare_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, X)


def a_truncated_archive(path: Path) -> None:
    saved(path, x=X, y=Y)
    path.write_bytes(path.read_bytes()[:-40])


def a_flipped_byte(path: Path) -> None:
    saved(path, x=X, y=Y)
    content = bytearray(path.read_bytes())
    content[200] ^= 255
    path.write_bytes(bytes(content))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "there is no file"),
    "a folder": (lambda path: path.mkdir(), "cannot be read"),
    "empty": (raw(b""), "cannot be read"),
    "text": (raw(b"x,y\n1,2\n"), "cannot be read"),
    "a bare array": (a_bare_array, "not an .npz archive"),
    "truncated": (a_truncated_archive, "cannot be read"),
    "damaged": (a_flipped_byte, "cannot be read"),
    "pickled objects": (arrays(x=np.array([{}, [], None], object), y=Y[:3]), "Object arrays|pickle"),
    "other keys": (arrays(images=X, labels=Y), "holds images, labels, but not x and y"),
    "no labels": (arrays(x=X), "but not x and y"),
    "more examples than labels": (arrays(x=X, y=Y[:4]), "x has 6 examples, y has 4"),
    "a NaN": (arrays(x=with_value(np.nan), y=Y), "1 numbers of x are NaN or infinite, the first in row 4"),
    "an infinity": (arrays(x=with_value(-np.inf), y=Y), "the first in row 4"),
    "too large for float32": (arrays(x=with_value(1e300), y=Y), "the first in row 4"),
    "integers that are no pixels": (arrays(x=np.arange(18).reshape(6, 3) * 100, y=Y), "from 0 to 1700"),
    "text as input": (arrays(x=np.array([["a"]] * 6), y=Y), "not numbers"),
    "flat input": (arrays(x=X[:, 0], y=Y), r"x has shape \(6,\)"),
    "fractional labels": (arrays(x=X, y=Y + 0.5), "label 0.5 in row 0"),
    "negative labels": (arrays(x=X, y=Y - 1), "label -1 in row 0"),
    "NaN labels": (arrays(x=X, y=np.where(Y == 2, np.nan, Y)), "label nan in row 2"),
    "one-hot labels": (arrays(x=X, y=np.eye(3)[Y]), r"y has shape \(6, 3\)"),
    "text labels": (arrays(x=X, y=np.array(list("abcabc"))), "not numbers"),
    "class numbers with a huge gap": (arrays(x=X, y=Y * 1000), "holds class 2000, with 6 examples"),
    "one class": (arrays(x=X, y=Y * 0), "6 examples of 1 classes"),
    "one example": (arrays(x=X[:1], y=Y[:1]), "1 examples of 1 classes"),
    "no example": (arrays(x=X[:0], y=Y[:0]), "0 examples of 0 classes"),
    "too few class names": (arrays(x=X, y=Y, class_names=["a"]), "class_names has 1 entries, 3 are needed"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused_naming_the_file_and_a_remedy(case: str, tmp_path: Path) -> None:
    make, expected = BAD[case]
    path = tmp_path / "bad.npz"
    make(path)
    with pytest.raises(DataError, match=expected) as caught:
        load(path)
    assert "bad.npz" in caught.value.what
    assert caught.value.remedy


def test_an_unknown_name_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COVEY_DATA", raising=False)
    with pytest.raises(DataError, match=r"no data set 'mnist'.*digits, breast-cancer.*mnist\.npz may lie.*COVEY_DATA"):
        load("mnist")


def test_a_split_is_stratified_disjoint_complete_and_seeded() -> None:
    data = load("digits")
    numbered = Dataset("n", np.arange(len(data))[:, None], data.y, data.class_names, (), (0.0, 1.0))
    train, test = split(numbered, 0.2, seed=1)
    assert sorted([*train.x[:, 0], *test.x[:, 0]]) == list(range(len(data)))
    np.testing.assert_array_equal(data.y[test.x[:, 0]], test.y)
    for label in range(10):
        assert (test.y == label).sum() == pytest.approx(0.2 * (data.y == label).sum(), abs=0.5)
    again, other = split(numbered, 0.2, seed=1), split(numbered, 0.2, seed=2)
    np.testing.assert_array_equal(again[1].x, test.x)
    assert not np.array_equal(np.sort(other[1].x, 0), np.sort(test.x, 0))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_test_fraction_outside_0_and_1_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split(load("digits"), fraction, seed=0)
