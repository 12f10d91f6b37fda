"""The user's own data: splits that a source brings along, data folders, tables and images."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from covey_models import load, load_split
from covey_models.datasets import split
from covey_protocol.errors import ConfigError, DataError

X, Y = np.random.default_rng(0).random((6, 3)).astype(np.float32), np.array([0, 1, 2, 0, 1, 2])


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COVEY_DATA", raising=False)


# --- splits and data folders


def keras_layout(path: Path, **changed: Any) -> Path:
    images = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)
    arrays = {"x_train": images, "y_train": Y, "x_test": images[:2] + 100, "y_test": np.array([3, 0]), **changed}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_a_source_with_a_test_part_keeps_it(tmp_path: Path) -> None:
    users = {"users_train": np.array(list("aabbcc")), "users_test": np.array(["d", "d"])}
    train, test = load_split(keras_layout(tmp_path / "both.npz", **users))
    assert (len(train), len(test), train.name) == (6, 2, "both")
    assert train.class_names == test.class_names == ("0", "1", "2", "3")  # class 3 occurs in the test part only
    assert train.input_shape == test.input_shape == (4, 4, 1)
    assert test.x[0, 0, 0, 0] == pytest.approx(100 / 255)
    assert train.users is not None
    assert train.users.tolist() == list("aabbcc")
    assert len(load(tmp_path / "both.npz")) == 6


def test_a_source_without_one_is_split_as_asked() -> None:
    for ours, theirs in zip(load_split("wine", test_fraction=0.3, seed=5), split(load("wine"), 0.3, 5)):
        np.testing.assert_array_equal(ours.x, theirs.x)
    assert len(load_split("digits")[1]) == pytest.approx(0.2 * 1797, abs=5)


@pytest.mark.parametrize(("changed", "expected"), [
    ({"x_test": np.zeros((2, 5, 4), np.uint8)}, r"x_train has examples of shape \(4, 4, 1\), x_test of \(5, 4, 1\)"),
    ({"y_test": np.array([0, 1, 2])}, "x_test has 2 examples, y_test has 3"),
    ({"x_test": np.zeros((0, 4, 4), np.uint8), "y_test": np.zeros(0, int)}, "x_test is empty"),
    ({"y_test": np.array([0, 7])}, "y_test holds class 7"),
    ({"users_train": np.arange(5)}, r"users_train is int64 of shape \(5,\)"),
    ({"users_train": np.full(6, 0.5)}, "users_train is float64"),
])  # fmt: skip
def test_a_bad_test_part_or_bad_users_are_refused(changed: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        load_split(keras_layout(tmp_path / "bad.npz", **changed))
    assert "bad.npz" in caught.value.what


def test_names_are_looked_for_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keras_layout(tmp_path / "mnist.npz")
    table(tmp_path / "spam.csv", "a,class\n1,0\n2,1\n")
    for name in ("mnist", "mnist.npz"):
        assert len(load(name, tmp_path)) == 6
    monkeypatch.setenv("COVEY_DATA", str(tmp_path))
    assert load("spam").name == "spam"
    assert load("digits").name == "digits"
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"no data set 'spam', also not in .*other"):
        load("spam", tmp_path / "other")  # what is said wins over the environment
    monkeypatch.setenv("COVEY_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"data folder of COVEY_DATA, .*gone, is not there"):
        load("spam")


@pytest.mark.parametrize(("name", "settings", "expected"), [
    ("digits", {"standardise": True}, "digits does not take standardise; it takes none"),
    ("digits", {"lable": "x"}, "no setting 'lable'; did you mean 'label'"),
    ("both.npz", {"label": "y"}, "both.npz does not take label"),
    ("both.npz", {"standardise": True}, "holds images and is not to be standardised"),
])  # fmt: skip
def test_settings_that_a_source_does_not_take_are_refused(
    name: str, settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    keras_layout(tmp_path / "both.npz")
    with pytest.raises(ConfigError, match=expected):
        load(name, tmp_path, **settings)


REAL = Path(os.environ.get("COVEY_DATA", "") or "/nowhere")


@pytest.mark.skipif(not (REAL / "mnist.npz").exists(), reason="needs mnist.npz in the folder COVEY_DATA")
def test_mnist_has_its_own_split() -> None:
    train, test = load_split("mnist", REAL)
    assert (len(train), len(test), train.input_shape, train.num_classes) == (60_000, 10_000, (28, 28, 1), 10)
    assert (train.x.dtype, train.x.min(), train.x.max()) == (np.float32, 0.0, 1.0)


@pytest.mark.skipif(not (REAL / "spambase.csv").exists(), reason="needs spambase.csv in the folder COVEY_DATA")
def test_spambase_loads_by_path_and_by_name() -> None:
    data = load(REAL / "spambase.csv")
    assert (data.x.shape, data.class_names, int(data.y.sum())) == ((4601, 57), ("0", "1"), 1813)
    train, _ = load_split("spambase", REAL, standardise=True)
    np.testing.assert_allclose(np.median(train.x.std(0)), 0.8, atol=0.2)  # heavy tails are clipped


# --- tables


def table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


MIXED = "size,Sex,id,class,User\n1.5,M,7,15.0,ann\n-2,F,8,1.0,bob\n3,I,9,2.0,ann\n4,F,10,15.0,ann\n"


def test_numbers_are_features_and_texts_are_one_hot(tmp_path: Path) -> None:
    data = load(table(tmp_path / "mixed.csv", MIXED), ignore=["id"])
    assert data.feature_names == ("size", "Sex=F", "Sex=I", "Sex=M")
    np.testing.assert_array_equal(data.x, [[1.5, 0, 0, 1], [-2, 1, 0, 0], [3, 0, 1, 0], [4, 1, 0, 0]])
    assert (data.x.dtype, data.y.dtype, data.input_range) == (np.float32, np.int32, (-2.0, 4.0))
    assert (data.class_names, data.y.tolist()) == (("1", "2", "15"), [2, 0, 1, 2])  # by size, not by letter
    assert data.users is not None
    assert data.users.tolist() == ["ann", "bob", "ann", "ann"]


def test_label_users_and_nominal_columns_can_be_named(tmp_path: Path) -> None:
    data = load(table(tmp_path / "m.csv", MIXED), label="Sex", users="id", nominal=["class"])
    assert data.class_names == ("F", "I", "M")
    assert data.feature_names == ("size", "class=1.0", "class=15.0", "class=2.0", "User=ann", "User=bob")
    assert data.users is not None
    assert data.users.tolist() == ["7", "8", "9", "10"]


@pytest.mark.parametrize(("header", "column"), [("a,Target,b", 1), ("a,b,c", 2), ("label,class,c", 2)])
def test_the_label_is_the_column_that_is_called_so_or_the_last(header: str, column: int, tmp_path: Path) -> None:
    rows = [[0.5, 0.5, 0.5], [0.25, 0.25, 0.25]]
    for number, row in enumerate(rows):
        row[column] = number
    text = "\n".join([header, *(",".join(map(str, row)) for row in rows)])
    assert load(table(tmp_path / "t.csv", text)).y.tolist() == [0, 1]


def test_standardised_tables_use_the_training_part_scale_and_say_their_range(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [f"{a},{1000 * b},7,{int(a > 0)}" for a, b in random.standard_normal((400, 2))]
    path = table(tmp_path / "t.csv", "\n".join(["a,b,constant,y", *rows]))
    train, test = load_split(path, standardise=True)
    np.testing.assert_allclose(train.x.mean(0), 0, atol=0.01)
    np.testing.assert_allclose(train.x.std(0), [1, 1, 0], atol=0.01)
    plain_train, plain_test = load_split(path)
    np.testing.assert_array_equal(plain_train.y, train.y)
    expected = (plain_test.x[:, :2] - plain_train.x[:, :2].mean(0)) / plain_train.x[:, :2].std(0)
    np.testing.assert_allclose(test.x[:, :2], expected, atol=1e-5)
    assert np.abs(test.x[:, :2].mean(0)).min() > 1e-3  # on a scale of its own it would be 0
    assert train.input_range == test.input_range == (-5.0, 5.0)
    raw = load(path)
    assert raw.input_range == (raw.x.min(), raw.x.max())
    np.testing.assert_allclose(load(path, standardise=True).x.std(0), [1, 1, 0], atol=0.01)


def long_text_column() -> str:
    return "\n".join(["name,y", *(f"n{number},{number % 2}" for number in range(101))])


BAD_TABLES: dict[str, tuple[str, dict[str, Any], str]] = {
    "an empty file": ("", {}, "the first line of .*bad.csv has no name"),
    "a name twice": ("a,a,y\n1,2,0\n", {}, "names the column 'a' twice"),
    "a nameless column": ("a,,y\n1,2,0\n", {}, "has no name for a column"),
    "a short row": ("a,y\n1,0\n2\n", {}, "line 3: 1 cells; give one for each of the 2"),
    "an empty cell": ("a,y\n1,0\n\n,1\n", {}, "line 4, column 'a': empty"),
    "an empty label": ("a,y\n1,0\n2,\n", {}, "line 3, column 'y': empty"),
    "a NaN": ("a,y\n1,0\nnan,1\n", {}, "line 3, column 'a': 'nan'"),
    "too large for float32": ("a,y\n1,0\n1e39,1\n", {}, "line 3, column 'a': '1e39'"),
    "a word among numbers": ("a,y\n1,0\nmany,1\n", {}, "line 3, column 'a': 'many' is no number"),
    "a number with underscores": ("a,y\n1,0\n1_0,1\n", {}, "'1_0' is no number"),
    "a label that is a quantity": ("a,y\n1,0.5\n2,1\n", {}, "line 2, column 'y': '0.5' is no class"),
    "an infinite label": ("a,y\n1,inf\n2,1\n", {}, "'inf' is no class"),
    "one class": ("a,y\n1,0\n2,0\n", {}, "2 examples of 1 classes"),
    "no row": ("a,y\n", {}, "0 examples"),
    "semicolons": ("a;y\n1;0\n2;1\n", {}, "separate columns by commas"),
    "names as features": (long_text_column(), {}, "'name' holds 101 different texts"),
    "an open quotation": ('a,y\n"1,0\n', {}, "cannot be read as a table"),
    "no such label": ("size,y\n1,0\n2,1\n", {"label": "siez"}, "no column 'siez'; did you mean 'size'"),
    "no such user": ("size,y\n1,0\n2,1\n", {"users": "who"}, "no column 'who'"),
    "nothing to ignore": ("size,y\n1,0\n2,1\n", {"ignore": ["z"]}, "no column 'z'"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables_are_refused_naming_line_and_column(case: str, tmp_path: Path) -> None:
    text, settings, expected = BAD_TABLES[case]
    with pytest.raises(DataError, match=expected) as caught:
        load(table(tmp_path / "bad.csv", text), **settings)
    assert "bad.csv" in caught.value.what
    assert caught.value.remedy


def test_text_that_is_no_utf8_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("größe,y\n1,0\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.csv cannot be read"):
        load(tmp_path / "latin.csv")
    with pytest.raises(DataError, match=r"no file .*none.csv"):
        load(tmp_path / "none.csv")


def test_a_byte_order_mark_belongs_to_no_name(tmp_path: Path) -> None:
    (tmp_path / "bom.csv").write_bytes("\ufeffa,y\n1,0\n2,1\n".encode())
    assert load(tmp_path / "bom.csv").feature_names == ("a",)


# --- images


def drawn(path: Path, *, mode: str = "L", size: tuple[int, int] = (5, 4), value: Any = 51) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def test_sub_folders_are_the_classes(tmp_path: Path) -> None:
    drawn(tmp_path / "cat" / "b.png", value=51)
    drawn(tmp_path / "cat" / "a.pgm", value=255)
    drawn(tmp_path / "ant" / "c.PNG", value=0)
    (tmp_path / "cat" / ".hidden").write_text("no image")
    data = load(tmp_path)
    assert (data.class_names, data.y.tolist(), data.name) == (("ant", "cat"), [0, 1, 1], tmp_path.name)
    assert (data.x.shape, data.x.dtype, data.input_range) == ((3, 4, 5, 1), np.float32, (0.0, 1.0))
    np.testing.assert_allclose(data.x[:, 0, 0, 0], [0, 1.0, 0.2])


def test_a_list_of_images_says_label_and_user(tmp_path: Path) -> None:
    drawn(tmp_path / "a.png")
    drawn(tmp_path / "deep" / "b.jpg", value=204)
    text = "user,path,label\n7,a.png,yes\n8,deep/b.jpg,no\n"
    for data in (load(table(tmp_path / "labels.csv", text)), load(tmp_path)):
        assert (data.class_names, data.y.tolist(), data.name) == (("no", "yes"), [1, 0], tmp_path.name)
        assert data.users is not None
        assert data.users.tolist() == ["7", "8"]
        np.testing.assert_allclose(data.x[:, 1, 1, 0], [0.2, 0.8], atol=1e-6)


def test_coloured_images_keep_their_colours_also_among_grey_ones(tmp_path: Path) -> None:
    drawn(tmp_path / "a" / "1.png", mode="RGB", value=(255, 0, 51))
    drawn(tmp_path / "b" / "2.png", value=51)
    x = load(tmp_path).x
    np.testing.assert_allclose(x[:, 0, 0], [[1, 0, 0.2], [0.2, 0.2, 0.2]])


@pytest.mark.parametrize(
    ("mode", "value", "expected"), [("1", 1, 1.0), ("I;16", 32768, 128 / 255), ("LA", (51, 9), 0.2)]
)
def test_other_kinds_of_grey_become_8_bits(mode: str, value: Any, expected: float, tmp_path: Path) -> None:
    for label in ("a", "b"):
        drawn(tmp_path / label / "1.png", mode=mode, value=value)
    x = load(tmp_path).x
    assert x.shape == (2, 4, 5, 1)
    np.testing.assert_allclose(x, expected)


def test_images_are_brought_to_one_size_where_it_is_said(tmp_path: Path) -> None:
    drawn(tmp_path / "a" / "1.png", size=(5, 4))
    drawn(tmp_path / "b" / "2.png", size=(9, 9))
    with pytest.raises(DataError, match=r"2\.png is 9 x 9 pixels, .*1\.png is 5 x 4"):
        load(tmp_path)
    assert load(tmp_path, size=[6, 3]).input_shape == (6, 3, 1)
    with pytest.raises(ConfigError, match="size"):
        load(tmp_path, size=[0, 3])


def text_as_image(folder: Path) -> None:
    drawn(folder / "a" / "1.png")
    (folder / "b").mkdir()
    (folder / "b" / "2.png").write_text("no image")


def truncated_image(folder: Path) -> None:
    drawn(folder / "a" / "1.png")
    path = drawn(folder / "b" / "2.png", mode="RGB", size=(90, 90), value=(1, 2, 3))
    path.write_bytes(path.read_bytes()[:-60])


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing there": (lambda folder: None, "has no sub-folders"),
    "one class": (lambda folder: [drawn(folder / "a" / f"{n}.png") for n in range(2)], "2 examples of 1 classes"),
    "an empty class": (lambda folder: (drawn(folder / "a" / "1.png"), (folder / "b").mkdir()), "/b is empty"),
    "another kind of file": (
        lambda folder: [drawn(folder / name / "1.bmp") for name in "ab"],
        r"1\.bmp is no image by its name",
    ),
    "text": (text_as_image, r"2\.png cannot be read as an image"),
    "a truncated image": (truncated_image, r"2\.png cannot be read as an image"),
    "a list without labels": (lambda folder: table(folder / "labels.csv", "path\na.png\n"), "no column for the class"),
    "a list of what is not there": (
        lambda folder: table(folder / "labels.csv", "path,y\na.png,1\nb.png,2\n"),
        r"no file .*a\.png",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_refused_naming_the_file(case: str, tmp_path: Path) -> None:
    make, expected = BAD_FOLDERS[case]
    make(tmp_path)
    with pytest.raises(DataError, match=expected) as caught:
        load(tmp_path)
    assert caught.value.remedy
