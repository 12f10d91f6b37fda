"""Real digits in the layout of MNIST's file, and real tumours as wide as Spambase: the data of experiments, small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits

TEST = 297


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mnist.npz of scikit-learn's 1,797 digits, three times as large and padded to 28x28; spambase.csv."""
    folder = tmp_path_factory.mktemp("data")
    raw = load_digits()
    large = np.kron(raw.images, np.ones((1, 3, 3))) * (255 / 16)
    images = np.pad(large, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    x, y = images[order], raw.target[order].astype(np.uint8)
    np.savez(folder / "mnist.npz", x_train=x[TEST:], y_train=y[TEST:], x_test=x[:TEST], y_test=y[:TEST])
    tumours = load_breast_cancer()
    features = np.concatenate([tumours.data, tumours.data[:, :27]], axis=1)
    names = ",".join([*(f"feature_{number}" for number in range(57)), "class"])
    table = np.column_stack([features, tumours.target])
    np.savetxt(folder / "spambase.csv", table, fmt="%.9g", delimiter=",", header=names, comments="")
    return folder
