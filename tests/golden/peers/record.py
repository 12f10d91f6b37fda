"""What Flower's and ByzFL's own rules give on a few inputs, recorded so that everyday tests compare without them.

Runs in the peers' Python (benchmarks/peers.py makes it):

    .bench/peers/bin/python tests/golden/peers/record.py            # do the installed versions still give the same?
    .bench/peers/bin/python tests/golden/peers/record.py --write    # record what is new, or all after a new version

inputs.npz is written once and then kept. results.npz holds one array per case and, in `about`, the versions, and the
job of each case as `peers_worker` describes it, with the name of its input.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "benchmarks"))

from peers_worker import Job, result_of, versions  # noqa: E402 (found through the line above)

INPUTS, RESULTS = HERE / "inputs.npz", HERE / "results.npz"
SEED = 1199  # the two countings of neighbours select differently, and the subset of least diameter is unique
TOLERANCE = 1e-6  # of the largest value; the same code on another processor sums in another order


def make_inputs() -> dict[str, Any]:
    """name -> (n, d) float32. Hostile rows come first, and are neither alike nor so far off that all rules agree."""
    generator = np.random.default_rng(SEED)

    def crowd(n: int, d: int, hostile: int, spread: float = 1.0, common: float = 1.0) -> Any:
        latent = generator.standard_normal((n, 3)) @ generator.standard_normal((3, d))
        rows = common * generator.standard_normal(d) + spread * (latent + 0.3 * generator.standard_normal((n, d)))
        rows[:hostile] += spread * generator.uniform(-0.5, 2.0, (hostile, d))
        return rows.astype(np.float32)

    return {
        "odd": crowd(11, 48, hostile=2),
        "even": crowd(10, 33, hostile=3),
        "many": crowd(31, 60, hostile=7),
        "close": crowd(12, 40, hostile=2, spread=1e-3),
        "small": crowd(7, 20, hostile=2),
        "numbers": crowd(9, 1, hostile=2),
    }


# How many hostile rows the rules are told of, per input.
TOLD = {"odd": 2, "even": 3, "many": 7, "close": 2, "small": 2, "numbers": 2}


def cases() -> dict[str, tuple[str, Job]]:
    """name -> (input, job)."""
    made: dict[str, tuple[str, Job]] = {}

    def add(libraries: str, rule: str, inputs: str, suffix: str = "", **job: Any) -> None:
        for library in libraries.split():
            for name in inputs.split():
                f = job.get("f", TOLD[name])
                full = {"library": library, "rule": rule, **job, "f": f}
                made[" ".join(filter(None, (library, rule, name, suffix)))] = (name, full)

    crowds, byzfl = "odd even many close", "byzfl byzfl-torch"
    counts = {"num_examples": [20, 35, 11, 60, 20, 20, 50, 9, 31, 18, 27]}
    add("flwr", "mean", "odd", "weighted", f=0, settings=counts)
    add("flwr", "median", crowds)
    add("flwr", "trimmed-mean", crowds)
    add("flwr flwr-messages", "krum", "odd even many")
    add("flwr flwr-messages", "multi-krum", "odd even many")
    add("flwr", "krum", "close")
    add("flwr", "multi-krum", "close")
    add("flwr", "bulyan", "odd many", f=2)
    add("flwr", "bulyan", "many", "widest", f=7)
    add(byzfl, "mean", crowds, f=0)
    for rule in ("median", "trimmed-mean", "meamed"):
        add(byzfl, rule, crowds)
    for rule in ("krum", "multi-krum", "mda"):
        inputs = "odd even small" if rule == "mda" else crowds
        add("byzfl", rule, inputs)
        add("byzfl-torch", rule, inputs.replace("many", "").replace("close", ""))
    converged = {"nu": 1e-9, "T": 3000}
    add("byzfl", "geometric-median", crowds, "converged", settings=converged, dtype="float64")
    add(byzfl, "geometric-median", "odd", "as it comes")
    for passes in (1, 3):
        add(byzfl, "centred-clipping", crowds, f"{passes} passes", settings={"L": passes, "tau": 4.0})
    add(byzfl, "centred-clipping", "odd", "two rounds", settings={"L": 1, "tau": 4.0}, calls=2)
    # one power iteration is enough for the top eigenvector and eigenvalue of numbers
    add("byzfl", "caf", "numbers", seed=1)
    add("byzfl", "caf", "odd", "seed 1", seed=1)
    add("byzfl", "caf", "odd", "seed 2", seed=2)
    add(byzfl, "nnm", crowds.replace("many", "").replace("close", ""))
    add("byzfl", "nnm", "many close")
    for rule in ("median", "trimmed-mean", "krum", "multi-krum", "geometric-median"):
        settings = converged if rule == "geometric-median" else {}
        pre = [{"rule": "nnm", "f": 2}]
        add("byzfl", rule, "odd", "after nnm", pre=pre, settings=settings, dtype="float64")
    add(byzfl, "bucketing", "odd even", seed=5, settings={"s": 2})
    add("byzfl", "bucketing", "odd", "threes", seed=6, settings={"s": 3})
    add(byzfl, "clipping", "odd even", settings={"c": 8.0})
    add(byzfl, "arc", crowds)
    return made


def permutation_of(job: Job, n: int) -> list[int]:
    """The order in which Bucketing takes the rows with this seed."""
    if job["library"] == "byzfl":
        np.random.seed(job["seed"])
        return [int(row) for row in np.random.permutation(np.arange(n))]
    import torch

    torch.manual_seed(job["seed"])
    return [int(row) for row in torch.randperm(n)]


def recorded() -> tuple[dict[str, Any], dict[str, Any]]:
    """What results.npz holds: `about` and the arrays; empty if there is none."""
    if not RESULTS.exists():
        return {}, {}
    with np.load(RESULTS) as stored:
        arrays = {name: stored[name] for name in stored.files if name != "about"}
        return json.loads(str(stored["about"])), arrays


def close(found: Any, wanted: Any) -> bool:
    return bool(found.shape == wanted.shape and np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max())


def compute(inputs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    jobs, results = {}, {}
    for name, (input_name, job) in cases().items():
        job = dict(job, input=input_name)
        if job["rule"] == "bucketing":
            job["permutation"] = permutation_of(job, len(inputs[input_name]))
        jobs[name], results[name] = job, result_of(job, inputs[input_name])
    return jobs, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    writes = parser.parse_args().write
    if writes and not INPUTS.exists():
        np.savez(INPUTS, **make_inputs())
    with np.load(INPUTS) as stored:
        inputs = {name: stored[name] for name in stored.files}
    jobs, results = compute(inputs)
    about, known = recorded()
    if not (known or writes):
        sys.exit("nothing is recorded yet: --write")
    changed = [name for name in results if name not in known or not close(results[name], known[name])]
    gone = [name for name in known if name not in results]
    if writes:
        about = {"versions": versions(), "jobs": jobs}
        np.savez_compressed(RESULTS, about=np.array(json.dumps(about)), **results)
    for name in changed + gone:
        print(("recorded: " if writes else "not as recorded: ") + name)
    print(f"{len(results)} cases, recorded with " + ", ".join(f"{k} {v}" for k, v in about["versions"].items()))
    sys.exit(0 if writes or not (changed or gone) else 1)


if __name__ == "__main__":
    main()
