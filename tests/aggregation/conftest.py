"""TFF on the session's worker; small helpers as fixtures."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest

from covey_coordinator.aggregation.worker import Worker
from covey_protocol.errors import MachineError


@pytest.fixture
def on_worker(worker: Worker) -> Iterator[Worker]:
    """TFF calls of the test run on the session's worker."""
    try:
        with worker.installed():
            yield worker
    except MachineError as error:
        pytest.fail(f"the session's worker is gone: {error}")
