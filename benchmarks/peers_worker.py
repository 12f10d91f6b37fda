"""Flower's and ByzFL's own aggregation functions, behind one way to call them. Runs in the peers' Python, not in ours.

A *job* is a dict: `library` ("flwr", "flwr-messages", "byzfl" or "byzfl-torch"), `rule` (our name for it), `f`, and
`settings` of the rule under the peer's own names. `pre` may list steps before it, each a dict with `rule`, `f` and
`settings`; `dtype` is what the float32 vectors are turned into first; `seed` seeds the generator that the peer uses.
"flwr" are the functions of `flwr.server.strategy.aggregate`, "flwr-messages" those of Flower's newer message API.
`call_of(job)(vectors)` gives a function without arguments that runs the peer's code and nothing else.

As a program it takes one JSON request per line and answers each with one line; `peers.Peers` is the other end.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import resource
import sys
import time
import types
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import numpy as np

Job = dict[str, Any]
Call = Callable[[], Any]


def import_byzfl() -> Any:
    """byzfl.aggregators without `byzfl/__init__.py`, which also imports a training benchmark that we do not install."""
    if "byzfl" not in sys.modules:
        spec = importlib.machinery.PathFinder.find_spec("byzfl")
        if spec is None:
            raise ModuleNotFoundError("byzfl")
        package = types.ModuleType("byzfl")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["byzfl"] = package
    import byzfl.aggregators

    return byzfl.aggregators


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("flwr", "byzfl", "numpy", "scipy", "torch")}


def call_of(job: Job) -> Callable[[Any], Call]:
    """The peer's function for this job: takes (n, d) vectors, gives what runs it."""
    makers = {"flwr": flwr_call, "flwr-messages": message_call, "byzfl": byzfl_call, "byzfl-torch": torch_call}
    prepare = makers[job["library"]](job)
    if "dtype" not in job:
        return prepare
    return lambda vectors: prepare(np.asarray(vectors, job["dtype"]))


# Flower: one list of arrays per client beside its number of examples.

FLWR_RULES = ("mean", "median", "trimmed-mean", "krum", "multi-krum", "bulyan")


def flwr_call(job: Job) -> Callable[[Any], Call]:
    """settings: `num_examples`, one per client; `proportiontocut`, else that which cuts f values; `to_keep`."""
    from flwr.server.strategy import aggregate as flower

    rule, f, settings = job["rule"], job.get("f", 0), job.get("settings", {})

    def run(results: list[tuple[list[Any], int]]) -> Any:
        n = len(results)
        if rule == "mean":
            return flower.aggregate(results)
        if rule == "median":
            return flower.aggregate_median(results)
        if rule == "trimmed-mean":
            return flower.aggregate_trimmed_avg(results, settings.get("proportiontocut", (f + 0.5) / n))
        if rule in ("krum", "multi-krum"):
            to_keep = settings.get("to_keep", 0 if rule == "krum" else n - f)
            return flower.aggregate_krum(results, f, to_keep)
        if rule == "bulyan":
            return flower.aggregate_bulyan(results, f, flower.aggregate_krum, to_keep=0)
        raise KeyError(rule)

    if rule not in FLWR_RULES:
        raise KeyError(rule)

    def prepare(vectors: Any) -> Call:
        counts = settings.get("num_examples", [1] * len(vectors))
        results = [([row], count) for row, count in zip(vectors, counts)]
        return lambda: run(list(results))[0]

    return prepare


def message_call(job: Job) -> Callable[[Any], Call]:
    """Krum and Multi-Krum of Flower's message API. Its arrays arrive serialised; reading them is part of the call."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.multikrum import select_multikrum
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    rule, f, settings = job["rule"], job.get("f", 0), job.get("settings", {})
    if rule not in ("krum", "multi-krum"):
        raise KeyError(rule)

    def prepare(vectors: Any) -> Call:
        n = len(vectors)
        counts = settings.get("num_examples", [1] * n)
        contents = [
            RecordDict({"arrays": ArrayRecord({"0": Array(np.array(row))}), "counts": MetricRecord({"n": count})})
            for row, count in zip(vectors, counts)
        ]

        def run() -> Any:
            chosen = select_multikrum(contents, f, 1 if rule == "krum" else settings.get("to_keep", n - f))
            return aggregate_arrayrecords(chosen, "n")["0"].numpy()

        return run

    return prepare


# ByzFL: one object per rule.

BYZFL_RULES = {
    "mean": "Average",
    "median": "Median",
    "trimmed-mean": "TrMean",
    "krum": "Krum",
    "multi-krum": "MultiKrum",
    "meamed": "Meamed",
    "geometric-median": "GeometricMedian",
    "centred-clipping": "CenteredClipping",
    "mda": "MDA",
    "monna": "MoNNA",
    "caf": "CAF",
    "smea": "SMEA",
    "nnm": "NNM",
    "bucketing": "Bucketing",
    "clipping": "Clipping",
    "arc": "ARC",
}
WITHOUT_F = ("mean", "median", "geometric-median", "centred-clipping", "bucketing", "clipping")


def byzfl_object(step: Job) -> Any:
    """A fresh object: CenteredClipping keeps its last result."""
    own = {} if step["rule"] in WITHOUT_F else {"f": step.get("f", 0)}
    return getattr(import_byzfl(), BYZFL_RULES[step["rule"]])(**own, **step.get("settings", {}))


def byzfl_call(job: Job) -> Callable[[Any], Call]:
    """On numpy arrays. `calls` in the job: so many calls of one object on the same vectors, the last result counts."""
    steps = [*job.get("pre", ()), job]
    for step in steps:
        byzfl_object(step)  # a wrong name or setting shows here

    def prepare(vectors: Any) -> Call:
        def run() -> Any:
            objects = [byzfl_object(step) for step in steps]
            for _ in range(job.get("calls", 1)):
                result = vectors
                for one in objects:
                    result = one(result)
            return result

        return run

    return prepare


def torch_call(job: Job) -> Callable[[Any], Call]:
    """On torch tensors, which share the memory of the numpy array."""
    import torch

    prepare = byzfl_call(job)
    return lambda vectors: prepare(torch.from_numpy(vectors))


# The program.


def result_of(job: Job, vectors: Any) -> Any:
    """What the peer gives, as a numpy array. The peer gets a copy of the vectors: some write into them."""
    call = call_of(job)(np.array(vectors))
    seed_for(job)
    return np.asarray(call())


def seed_for(job: Job) -> None:
    """Set the generator that ByzFL draws from."""
    if "seed" in job:
        np.random.seed(job["seed"])
        if job["library"] == "byzfl-torch":
            import torch

            torch.manual_seed(job["seed"])


class Server:
    """The vectors in use and the thread limits."""

    def __init__(self) -> None:
        from threadpoolctl import ThreadpoolController

        import_byzfl()
        import torch

        self._torch, self._pools = torch, ThreadpoolController()
        self._default_threads = torch.get_num_threads()
        self._vectors: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "hello":
            return {"versions": versions(), "threads": self._default_threads}
        if request["do"] == "load":
            self._vectors = None
            self._vectors = np.load(request["path"])  # into ordinary memory, as on our side and in real rounds
            return {"shape": list(self._vectors.shape)}
        if request["do"] == "run":
            return self._run(request)
        raise ValueError(request["do"])

    def _run(self, request: dict[str, Any]) -> dict[str, Any]:
        """One timed call. threads: None leaves every library as it came."""
        job, threads = request["job"], request.get("threads")
        call = call_of(job)(self._vectors)
        seed_for(job)
        self._torch.set_num_threads(threads or self._default_threads)
        with nullcontext() if threads is None else self._pools.limit(limits=threads):
            start = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - start
        if request.get("save") is not None:
            np.save(request["save"], np.asarray(result))
        return {"seconds": seconds}


def main() -> None:
    """Standard output carries answers only; what the libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if len(sys.argv) > 1:
        limit = int(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    server = Server()
    for line in sys.stdin:
        try:
            answer = server.answer(json.loads(line))
        except (Exception, MemoryError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
