"""TensorFlow, imported once and quietly.

Every file of this package that needs TensorFlow asks here, so that the log levels are set before the import (later is
too late) and a missing TensorFlow is an error that says what to install. Importing this file imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

from covey_protocol.errors import MachineError


def import_tensorflow() -> Any:
    """The `tensorflow` module. An operator who set TF_CPP_MIN_LOG_LEVEL keeps that level."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        return importlib.import_module("tensorflow")
    except ImportError as exc:
        raise MachineError(
            "TensorFlow is not installed", "install covey-models on a desktop (x86-64 or arm64)"
        ) from exc


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing on stderr and no log records below ERROR while TensorFlow converts or a TFLite interpreter starts.

    The converter and the TFLite delegates write to file descriptor 2 from C++, past Python's logging, so the
    descriptor itself is replaced. Other threads are silenced for that time too: use it in command-line work.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "tensorflow")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with _stderr_replaced(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextlib.contextmanager
def _stderr_replaced() -> Iterator[None]:
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as sink:
            os.dup2(sink.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(kept, 2)
    finally:
        os.close(kept)
