"""Bad data never reach the training step: each kind is refused in one line naming the file and the first bad row."""

from pathlib import Path

import numpy as np
import pytest

from covey_edge.data_sources import check_examples, load_examples, source
from covey_protocol.bundle import REQUIRED_SIGNATURES, Manifest, TensorSpec
from covey_protocol.errors import ConfigError, DataError
from covey_protocol.parameters import ParameterSpec

MANIFEST = Manifest(
    format=1,
    name="m",
    model_sha256="",
    model_bytes=0,
    batch_size=4,
    input=TensorSpec((2,), "float32", 0.0, 1.0),
    label=TensorSpec((), "int32", 0, 2),
    parameters=(ParameterSpec("w", (2,)),),
    signatures=REQUIRED_SIGNATURES,
    loss="l",
    optimizer="sgd",
)
X = np.full((5, 2), 0.5, np.float64)
Y = np.array([0, 1, 2, 1, 0])


def save(folder: Path, **arrays: np.ndarray) -> Path:
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return path


def test_good_data_come_in_the_models_types(tmp_path: Path) -> None:
    path = save(tmp_path, x=X, y=Y.astype(np.float64))
    x, y = check_examples(*load_examples("npz", path), MANIFEST, path)
    assert (x.dtype, y.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(y, Y)


def changed(array: np.ndarray, row: int, value: float) -> np.ndarray:
    copy = array.astype(np.float64)
    copy[row] = value
    return copy


BAD = {
    "no x": ({"y": Y}, "no array x"),
    "unequal lengths": ({"x": X, "y": Y[:4]}, "same length"),
    "no examples": ({"x": X[:0], "y": Y[:0]}, "no examples"),
    "NaN": ({"x": changed(X, 3, np.nan), "y": Y}, r"NaN or infinite values in 1 of 5 rows, first in row 3"),
    "infinite": ({"x": changed(X, 0, np.inf), "y": Y}, "first in row 0"),
    "text": ({"x": np.array(["a"] * 5), "y": Y}, "not numbers"),
    "another shape": ({"x": X[:, :1], "y": Y}, r"shape \(1,\), the model takes \(2,\)"),
    "a label too high": ({"x": X, "y": changed(Y, 2, 3)}, "labels above 2 in 1 of 5 rows, first in row 2"),
    "a negative label": ({"x": X, "y": changed(Y, 1, -1)}, "labels below 0"),
    "half a label": ({"x": X, "y": changed(Y, 1, 0.5)}, "whole numbers"),
    "an input out of range": ({"x": changed(X, 4, 255.0), "y": Y}, "x above 1 in 1 of 5 rows"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_data_are_refused_with_the_first_bad_row(what: str, tmp_path: Path) -> None:
    arrays, message = BAD[what]
    path = save(tmp_path, **arrays)
    with pytest.raises(DataError, match=message):
        check_examples(*load_examples("npz", path), MANIFEST, path)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.array([{"a": 1}], dtype=object), y=np.array([1]))
    with pytest.raises(DataError, match="not a readable"):
        load_examples("npz", path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken"])
def test_files_that_are_no_npz_are_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.npz"):
        load_examples("npz", path)


def test_a_missing_file_and_an_unknown_source_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist; check data\.path"):
        load_examples("npz", tmp_path / "none.npz")
    with pytest.raises(ConfigError, match="did you mean 'npz'"):
        source("nzp")
