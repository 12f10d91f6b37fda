"""Bundles of many kinds, exported once: about 15 seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
from runtime_set import KINDS, LONG, write_set


@pytest.fixture(scope="session")
def everyday_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    write_set(folder, [name for name in KINDS if name not in LONG])
    return folder


@pytest.fixture(scope="session")
def bundle_set(tmp_path_factory: pytest.TempPathFactory, everyday_set: Path) -> Path:
    folder = tmp_path_factory.mktemp("set")
    write_set(folder, LONG)
    for path in everyday_set.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
