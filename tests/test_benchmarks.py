"""The benchmark of the training step runs and says what it measured. Slow, and needs a package index once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_benchmark_of_the_training_step_compares_all_contestants() -> None:
    command = [sys.executable, "benchmarks/train_step.py", "--quick", "--rounds", "1", "--steps", "2"]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    said = ended.stdout
    assert "weights after 5 steps from the same start agree within" in said
    for contestant in ("tflite_runtime", "tf.function, oneDNN", "tf.function, no oneDNN", "Flex in full TensorFlow"):
        assert f"\n{contestant}  " in said
    assert "times faster than Flex" in said
    assert "MB resident" in said


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_deep_nets_are_no_further_from_float64_than_tensorflow_is() -> None:
    command = [sys.executable, "benchmarks/parity.py", "mobilenet-v2", "mobilenet-v3-small", "ds-cnn"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["mobilenet-v2", "mobilenet-v3-small", "ds-cnn"]
    for _, tflite, with_onednn, without_onednn, larger in rows:
        medians = [float(cell.split(",")[0]) for cell in (tflite, with_onednn, without_onednn)]
        assert medians[0] <= max(1e-5, 2.0 * max(medians[1:]))
        assert float(larger) > 1e-4
