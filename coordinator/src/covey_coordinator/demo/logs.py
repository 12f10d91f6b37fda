"""covey's own log in a file, while the terminal shows something else."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from covey_edge.files import write_atomic


@contextlib.contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """From here to the end of the with block; the file begins empty."""
    write_atomic(path, b"")
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("covey")
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False  # TensorFlow's import gives the root logger a handler on the terminal
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
        handler.close()
