"""The same bundles train to the weights of TensorFlow in both runtimes; test_alone.py takes every Python."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from environments import FROM_LOCK, FROM_SOURCE, found_python, install, make_environment
from runtime_set import check_set

from covey_edge.runtime import installed, runner
from covey_protocol.bundle import read_bundle


def test_tflite_runtime_trains_all_kinds_of_models_as_tensorflow_does(everyday_set: Path) -> None:
    assert check_set(sys.executable, everyday_set) == "tflite_runtime 2.14.0"


def test_litert_trains_all_kinds_of_models_as_tensorflow_does(everyday_set: Path, tmp_path: Path) -> None:
    found = found_python("3.12")
    if found is None:
        pytest.skip("no Python 3.12 on this machine")
    python = make_environment(found, tmp_path / "env")
    complaint = install(python, *FROM_LOCK)
    if complaint:
        pytest.skip(f"the lock does not install here: {complaint}")
    assert check_set(python, everyday_set, FROM_SOURCE).startswith("ai_edge_litert 2.")


class Listening:
    """The runtime's own wrapper; notes of how many dimensions are the inputs that are resized."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper, self.resized = wrapper, list[int]()

    def ResizeInputTensor(self, index: int, shape: Any, *more: Any) -> None:
        self.resized.append(len(shape))
        self._wrapper.ResizeInputTensor(index, shape, *more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)


def test_an_input_without_dimensions_is_not_resized(digits_bundle: bytes) -> None:
    """On arm64 ai-edge-litert 2.3.0 does not survive it; test_kits_alone.py has a whole round there."""
    train = runner(installed()[0](model_content=read_bundle(digits_bundle).model), "train")
    train._interpreter_wrapper._wrapper = heard = Listening(train._interpreter_wrapper._wrapper)
    details = train.get_input_details()
    assert 0 in [len(one["shape"]) for one in details.values()]
    result = train(**{name: np.ones(one["shape"], one["dtype"]) for name, one in details.items()})
    assert np.isfinite(result["loss"])
    assert sorted(heard.resized) == sorted(len(one["shape"]) for one in details.values() if len(one["shape"]))
