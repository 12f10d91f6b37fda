"""The same bundles train to the weights of TensorFlow in both runtimes; test_alone.py takes every Python."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from environments import FROM_LOCK, FROM_SOURCE, found_python, install, make_environment
from runtime_set import check_set


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
