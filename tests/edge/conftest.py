"""Bundles of many kinds, exported once: about 15 seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
from runtime_set import write_set


@pytest.fixture(scope="session")
def bundle_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    write_set(folder)
    return folder
