"""ByzFL's aggregators behind a pipe. Runs in a Python that has ByzFL (COVEY_PEERS_PYTHON), not in covey's.

Arguments: the name of the aggregator and f. Before it ByzFL's Clipping to 2 and NNM. Every request on standard input is
two int64 (n, d) and n d float32; the answer is d float32. Imports nothing of covey.
"""

import importlib
import importlib.machinery
import os
import sys
import types
from typing import Any

import numpy as np

CLIP_NORM = 2.0


def aggregators() -> Any:
    """byzfl.aggregators without `byzfl/__init__.py`, which also imports a training benchmark with needs of its own."""
    spec = importlib.machinery.PathFinder.find_spec("byzfl")
    if spec is None:
        raise ModuleNotFoundError("byzfl")
    package = types.ModuleType("byzfl")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["byzfl"] = package
    return importlib.import_module("byzfl.aggregators")


def steps_of(name: str, f: int) -> list[Any]:
    library = aggregators()
    last = library.TrMean(f) if name == "trimmed-mean" else library.GeometricMedian()
    return [library.Clipping(CLIP_NORM), library.NNM(f), last]


def main() -> None:
    """Standard output carries answers only; what the libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    steps = steps_of(sys.argv[1], int(sys.argv[2]))
    while len(header := sys.stdin.buffer.read(16)) == 16:
        n, d = np.frombuffer(header, np.int64)
        value: Any = np.frombuffer(sys.stdin.buffer.read(4 * int(n) * int(d)), np.float32).reshape(n, d).copy()
        for step in steps:
            value = step(value)
        answers.write(np.asarray(value, np.float32).tobytes())
        answers.flush()


if __name__ == "__main__":
    main()
