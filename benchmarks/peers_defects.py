"""Where Flower's and ByzFL's rules are not what they say, each shown on the smallest input we know.

Runs in the peers' Python (benchmarks/peers.py makes it):

    .bench/peers/bin/python benchmarks/peers_defects.py [--json]

prints one row per case: what the installed version gives and what it should give. It ends with 1 if a case no longer
shows, so that docs/rules-compared.md is put right after a new version. Which numbers appear may differ a little from
processor to processor where the case is one of rounding.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from peers_worker import Job, call_of, import_byzfl, result_of, versions

ROUNDS = 100  # seeds per case of rounding


@dataclass(frozen=True)
class Shown:
    """What a case gave. shows: the defect is there. gives: what came out. right: what should have."""

    shows: bool
    gives: str
    right: str


@dataclass(frozen=True)
class Case:
    """kind: a defect, a convention (documented, or a choice), or a default that does not do what one expects."""

    key: str
    kind: str
    where: str
    what: str
    run: Callable[[], Shown]


CASES: list[Case] = []


def case(key: str, kind: str, where: str, what: str) -> Callable[[Callable[[], Shown]], Callable[[], Shown]]:
    def register(run: Callable[[], Shown]) -> Callable[[], Shown]:
        CASES.append(Case(key, kind, where, what, run))
        return run

    return register


def job(library: str, rule: str, f: int = 0, **settings: Any) -> Job:
    return {"library": library, "rule": rule, "f": f, "settings": settings}


def column(*values: float) -> Any:
    """Vectors of one number each."""
    return np.array(values, np.float64)[:, None]


def said(value: Any) -> str:
    """A short text of a result."""
    if value is None:
        return "None"
    return " ".join(f"{number:.6g}" for number in np.ravel(value)[:4])


def outcome(run: Callable[[], Any]) -> str:
    """The result, or the exception."""
    try:
        return said(run())
    except Exception as error:  # whatever the peer raises is what it gives
        return f"{type(error).__name__}: {error}"


# Flower.


@case(
    "trim-rounds-down",
    "defect",
    "flwr aggregate_trimmed_avg, FedTrimmedAvg",
    "cuts int(beta * n) values, rounded down in floats",
)
def trim_rounds_down() -> Shown:
    vectors = column(1e6, *[0.0] * 48)
    found = result_of(job("flwr", "trimmed-mean", proportiontocut=1 / 49), vectors)
    also = result_of(job("flwr", "trimmed-mean", proportiontocut=0.1), column(1e6, *[0.0] * 8))
    gives = f"49 clients, beta = 1/49, one at 1e6: {said(found)}; 9 clients, beta = 0.1: {said(also)}"
    return Shown(bool(found[0] > 1e4 and also[0] > 1e4), gives, "0: one value is cut at each end")


@case(
    "krum-two-colluders",
    "defect",
    "flwr aggregate_krum, select_multikrum",
    "no check of n > 2f + 2; max(1, n - f - 2) neighbours",
)
def krum_two_colluders() -> Shown:
    vectors = column(0.0, 1.0, 2.0, 100.0, 100.0)
    found = [result_of(job(library, "krum", 2), vectors) for library in ("flwr", "flwr-messages")]
    return Shown(
        all(one[0] == 100.0 for one in found),
        f"0, 1, 2, 100, 100 with f = 2: {said(found[0])}",
        "a refusal: two equal vectors always win",
    )


@case(
    "multikrum-weighted",
    "convention",
    "flwr aggregate_krum, MultiKrum",
    "the selected are averaged by num_examples, which clients claim",
)
def multikrum_weighted() -> Shown:
    vectors, claims = column(*np.arange(7) / 10), [10] * 5 + [10**9, 10]
    found = [
        result_of(job(library, "multi-krum", 1, num_examples=claims), vectors) for library in ("flwr", "flwr-messages")
    ]
    return Shown(
        all(abs(one[0] - 0.5) < 1e-6 for one in found),
        f"0, 0.1 ... 0.6, f = 1, the client at 0.5 claims 1e9 examples: {said(found[0])}",
        "0.25 or 0.35, the plain mean of the six selected",
    )


@case("flwr-krum-nan", "defect", "flwr aggregate_krum", "one NaN client: argmin takes the NaN score for the least")
def flwr_krum_nan() -> Shown:
    found = result_of(job("flwr", "krum", 1), column(np.nan, 0.0, 0.1, 0.2, 0.3))
    return Shown(bool(np.isnan(found).all()), f"NaN, 0, 0.1, 0.2, 0.3 with f = 1: {said(found)}", "a finite vector")


@case(
    "flwr-median-nan", "defect", "flwr aggregate_median, FedMedian, aggregate", "one NaN client makes the aggregate NaN"
)
def flwr_median_nan() -> Shown:
    found = [result_of(job("flwr", rule), column(np.nan, 0.0, 0.1, 0.2, 0.3)) for rule in ("median", "mean")]
    return Shown(bool(np.isnan(found).all()), f"NaN, 0, 0.1, 0.2, 0.3: {said(found)}", "a finite vector")


@case("flwr-bulyan-nan", "defect", "flwr aggregate_bulyan", "one NaN client ends the round in an exception")
def flwr_bulyan_nan() -> Shown:
    found = outcome(lambda: result_of(job("flwr", "bulyan", 1), column(np.nan, *np.arange(6) / 10)))
    return Shown("ValueError" in found, f"NaN, 0, 0.1 ... 0.5 with f = 1: {found}", "a finite vector")


@case(
    "krum-uncentred",
    "defect",
    "flwr select_multikrum (Krum, MultiKrum, Bulyan of the message API)",
    "distances from an uncentred float32 Gram",
)
def krum_uncentred() -> Shown:
    exact = times_hostile_picked("flwr", n=10)
    found = times_hostile_picked("flwr-messages", n=10)
    lowest = lowest_distance()
    return Shown(
        found > exact and lowest < 0.0,
        f"10 models of 1000 weights that differ by 1e-4 among weights of size 3, one hostile at three times that, "
        f"f = 2: Krum picks the hostile one in {found} of {ROUNDS} rounds; "
        f"squared distances down to {lowest:.1e}",
        f"{exact} of {ROUNDS}, as with the distances of aggregate_krum; no negative distance",
    )


def times_hostile_picked(library: str, n: int) -> int:
    """Weights of size 3, honest ones 1e-4 apart, one hostile off by 3e-4 everywhere: how often Krum takes it."""
    picked = 0
    for seed in range(ROUNDS):
        generator = np.random.default_rng(seed)
        models = 3 * generator.standard_normal(1000) + 1e-4 * generator.standard_normal((n, 1000))
        models[0] += 3e-4
        models = models.astype(np.float32)
        picked += np.array_equal(result_of(job(library, "krum", n // 5), models), models[0])
    return picked


def lowest_distance() -> float:
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp.strategy.multikrum import compute_distances

    models = 1 + 1e-4 * np.random.default_rng(3).standard_normal((4, 2000))
    return float(compute_distances([ArrayRecord({"0": Array(row)}) for row in models.astype(np.float32)]).min())


@case("bulyan-at-once", "defect", "flwr Bulyan of the message API", "selects all at once by one Krum ranking")
def bulyan_at_once() -> Shown:
    different = same = 0
    for seed in range(ROUNDS):
        vectors = np.random.default_rng(seed).standard_normal((11, 6))
        wanted = paper_bulyan(vectors, 2)
        different += not np.allclose(message_bulyan(vectors, 2), wanted)
        same += np.allclose(result_of(job("flwr", "bulyan", 2), vectors), wanted)
    return Shown(
        different > 0 and same == ROUNDS,
        f"11 x 6 normal vectors, f = 2: another aggregate than the paper's in {different} of {ROUNDS} cases",
        f"Krum again after each selection, as aggregate_bulyan does ({same} of {ROUNDS} as in the paper)",
    )


def message_bulyan(vectors: Any, f: int) -> Any:
    """Flower's strategy on replies such as its clients send."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp.strategy import Bulyan
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1

    def reply(number: int, row: Any) -> Any:
        arrays, metrics = ArrayRecord({"0": Array(np.array(row))}), MetricRecord({"num-examples": 1})
        asked = Message(content=RecordDict({}), dst_node_id=number + 1, message_type="train")
        return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=asked)

    arrays, _ = Bulyan(num_malicious_nodes=f).aggregate_train(1, [reply(*row) for row in enumerate(vectors)])
    return arrays["0"].numpy()


def paper_bulyan(vectors: Any, f: int) -> Any:
    """El Mhamdi et al. 2018, arXiv:1802.07927, section 4, in plain loops."""
    left, chosen = list(range(len(vectors))), []
    count = len(vectors) - 2 * f
    for _ in range(count):
        rows = vectors[left]
        distances = np.sort(((rows[:, None] - rows[None]) ** 2).sum(-1), axis=1)[:, 1:]
        neighbours = max(1, len(rows) - f - 2)
        chosen.append(left.pop(int(np.argmin(distances[:, :neighbours].sum(axis=1)))))
    rows = vectors[chosen]
    nearest = np.argsort(np.abs(rows - np.median(rows, axis=0)), axis=0, kind="stable")[: count - 2 * f]
    return np.take_along_axis(rows, nearest, axis=0).mean(axis=0)


@case("bulyan-default", "defect", "flwr strategy.Bulyan", "its default settings cannot aggregate")
def bulyan_default() -> Shown:
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
    from flwr.server.strategy import Bulyan

    results = [
        (None, FitRes(Status(Code.OK, ""), ndarrays_to_parameters([np.array([float(row)])]), 1, {}))
        for row in range(11)
    ]
    found = outcome(lambda: Bulyan(num_malicious_clients=2).aggregate_fit(1, results, []))
    return Shown("TypeError" in found, f"Bulyan(num_malicious_clients=2), 11 results: {found}", "an aggregate")


@case("bulyan-to-keep", "defect", "flwr aggregate_bulyan", "to_keep > 0 (Multi-Krum) ends in an exception")
def bulyan_to_keep() -> Shown:
    from flwr.server.strategy import aggregate as flower

    vectors = np.random.default_rng(0).standard_normal((11, 3))
    found = outcome(lambda: flower.aggregate_bulyan([([v], 1) for v in vectors], 2, flower.aggregate_krum, to_keep=5))
    return Shown("ValueError" in found, f"11 vectors, f = 2, to_keep = 5: {found}", "a refusal of the setting")


@case("bulyan-empties-list", "defect", "flwr aggregate_bulyan", "takes the selected out of the caller's list")
def bulyan_empties_list() -> Shown:
    from flwr.server.strategy import aggregate as flower

    results = [([row], 1) for row in np.random.default_rng(0).standard_normal((11, 3))]
    flower.aggregate_bulyan(results, 2, flower.aggregate_krum, to_keep=0)
    return Shown(len(results) == 4, f"a list of 11 results has {len(results)} afterwards", "11")


# ByzFL.


@case("krum-neighbours", "convention", "byzfl Krum, MultiKrum", "sums n - f - 1 distances; the paper n - f - 2")
def krum_neighbours() -> Shown:
    vectors = column(0, 0, 1, 9, 11, 11)
    found, wanted = result_of(job("byzfl", "krum", 1), vectors), result_of(job("flwr", "krum", 1), vectors)
    differing = 0
    for seed in range(20 * ROUNDS):
        rows = np.random.default_rng(seed).standard_normal((10, 5))
        distances = np.sort(((rows[:, None] - rows[None]) ** 2).sum(-1), axis=1)
        picked = result_of(job("byzfl", "krum", 3), rows)
        differing += not np.array_equal(picked, rows[np.argmin(distances[:, 1:6].sum(axis=1))])
    return Shown(
        bool(found[0] == 9 and wanted[0] == 1 and differing),
        f"0, 0, 1, 9, 11, 11 with f = 1: {said(found)}; another pick than the paper's in {differing} of {20 * ROUNDS} "
        f"draws of 10 normal vectors in 5 dimensions, f = 3",
        "1",
    )


@case("krum-precondition", "convention", "byzfl Krum, MultiKrum", "accepts any n > 2f; the proof needs n > 2f + 2")
def krum_precondition() -> Shown:
    found = outcome(lambda: result_of(job("byzfl", "krum", 2), column(0, 1, 2, 100, 100)))
    return Shown("Error" not in found, f"n = 5, f = 2: {found}", "a refusal")


@case(
    "byzfl-nan",
    "defect",
    "byzfl Krum, Median, GeometricMedian, CenteredClipping, CAF, ARC",
    "one NaN client decides the result",
)
def byzfl_nan() -> Shown:
    vectors = np.random.default_rng(1).standard_normal((10, 4))
    vectors[0] = np.nan
    rules = ("krum", "median", "geometric-median", "centred-clipping", "arc", "caf")
    found = {rule: call_of(job("byzfl", rule, 2 if rule != "median" else 0))(vectors.copy())() for rule in rules}
    caf = found.pop("caf")
    return Shown(
        caf is None and all(np.isnan(one).any() for one in found.values()),
        "10 normal vectors, one all NaN, f = 2: a result with NaN; of CAF None",
        "a finite vector",
    )


@case(
    "byzfl-inf",
    "defect",
    "byzfl CenteredClipping, Clipping, ARC",
    "one infinite client: infinity times 0 is NaN, and CenteredClipping keeps it",
)
def byzfl_inf() -> Shown:
    vectors = np.ones((4, 2))
    hostile = vectors.copy()
    hostile[0] = np.inf
    rule = import_byzfl().CenteredClipping()
    first, second = rule(hostile), rule(vectors)
    clipped = [result_of(job("byzfl", step, **kw), hostile) for step, kw in (("clipping", {"c": 2.0}), ("arc", {}))]
    arc = call_of(job("byzfl", "arc", 1))(hostile.copy())()
    return Shown(
        bool(np.isnan(first).all() and np.isnan(second).all() and np.isnan(clipped[0]).any() and np.isnan(arc).any()),
        f"four vectors of ones, one infinite: {said(first)}; the next round, all ones: {said(second)}",
        "finite vectors; 1 1 in the next round",
    )


@case("caf-identical", "defect", "byzfl CAF, SMEA", "identical vectors: None, and an IndexError")
def caf_identical() -> Shown:
    vectors = np.ones((4, 2))
    caf = outcome(lambda: call_of(job("byzfl", "caf", 1))(vectors)())
    smea = outcome(lambda: call_of(job("byzfl", "smea", 1))(vectors)())
    return Shown(caf == "None" and "IndexError" in smea, f"four vectors of ones: CAF {caf}; SMEA {smea}", "1 1")


@case("caf-endless", "defect", "byzfl CAF", "a vector whose weight is 0 still sets max tau: no weight falls any more")
def caf_endless() -> Shown:
    vectors = column(0, 1, 2, 3, 1e6)
    ended = finishes_within(5.0, call_of(job("byzfl", "caf", 1))(vectors))
    return Shown(
        not ended, f"0, 1, 2, 3, 1e6 with f = 1: still running after 5 s{' (ended)' * ended}", "between 0 and 3"
    )


def finishes_within(seconds: float, run: Callable[[], Any]) -> bool:
    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        run()
    except TimeoutError:
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    return True


@case(
    "caf-random",
    "defect",
    "byzfl CAF, SMEA",
    "one power iteration from a random vector stands for the top eigenvector and eigenvalue",
)
def caf_random() -> Shown:
    vectors = np.random.default_rng(0).standard_normal((10, 20))
    vectors[:2] += 1
    spans = []
    for rule in ("caf", "smea"):
        results = [result_of({**job("byzfl", rule, 2), "seed": seed}, vectors) for seed in range(20)]
        spans.append(max(float(np.linalg.norm(one - other)) for one in results for other in results))
    size = float(np.linalg.norm(vectors[2:].mean(axis=0)))
    return Shown(
        min(spans) > 0.01,
        f"10 x 20 normal vectors, two of them + 1: calls on the same input differ by up to {spans[0]:.2f} (CAF) and "
        f"{spans[1]:.2f} (SMEA); the honest mean has norm {size:.2f}",
        "the same result every time",
    )


@case(
    "centred-clipping-m", "defect", "byzfl CenteredClipping", "a start m is always refused (`or` where `and` is meant)"
)
def centred_clipping_m() -> Shown:
    found = outcome(lambda: import_byzfl().CenteredClipping(m=np.zeros(2)))
    return Shown("TypeError" in found, f"CenteredClipping(m=numpy.zeros(2)): {found}", "an object that starts there")


@case("geometric-median-start", "default", "byzfl GeometricMedian", "three steps from the origin, by default")
def geometric_median_start() -> Shown:
    vectors = 1000 + np.random.default_rng(0).standard_normal((10, 50))
    vectors[:3] += 1000
    found = result_of(job("byzfl", "geometric-median"), vectors)
    wanted = result_of(job("byzfl", "geometric-median", nu=1e-9, T=3000), vectors)
    honest = vectors[3:].mean(axis=0)
    off, best = float(np.linalg.norm(found - honest)), float(np.linalg.norm(wanted - honest))
    gives = f"7 vectors around 1000 and 3 around 2000 in 50 dimensions: {off:.0f} from the honest mean"
    return Shown(off > 10 * best, gives, f"{best:.1f}, the geometric median")


@case(
    "geometric-median-nu",
    "default",
    "byzfl GeometricMedian",
    "nu = 0.1 is a length: updates smaller than that are averaged",
)
def geometric_median_nu() -> Shown:
    vectors = 1e-3 * np.random.default_rng(0).standard_normal((10, 5))
    vectors[0] = 0.04
    found = result_of(job("byzfl", "geometric-median", T=1000), vectors)
    scaled = result_of(job("byzfl", "geometric-median", T=1000), 1000 * vectors) / 1000
    equal = np.allclose(found, vectors.mean(axis=0), rtol=1e-6)
    return Shown(
        bool(equal and np.linalg.norm(scaled) < 0.2 * np.linalg.norm(found)),
        f"9 vectors of size 0.001, one of 0.04 per coordinate: the plain mean, norm {np.linalg.norm(found):.1e}",
        f"norm {np.linalg.norm(scaled):.1e}, a thousandth of what it gives for the same vectors times 1000",
    )


@case("clipping-writes", "defect", "byzfl Clipping, ARC", "writes into the caller's array")
def clipping_writes() -> Shown:
    first = {}
    for name, settings, f in (("clipping", {"c": 2.0}, 0), ("arc", {}, 1)):
        vectors = np.array([[3.0, 4.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
        call_of(job("byzfl", name, f, **settings))(vectors)()
        first[name] = vectors[0]
    return Shown(
        all(one[0] != 3.0 for one in first.values()),
        f"the row 3 4 of the input is {said(first['clipping'])} after Clipping(2.0), {said(first['arc'])} after ARC(1)",
        "3 4: the input is as it was",
    )


@case(
    "clipping-whole-numbers",
    "defect",
    "byzfl Clipping",
    "whole numbers in, and the clipped values are cut to whole numbers",
)
def clipping_whole_numbers() -> Shown:
    found = call_of(job("byzfl", "clipping", c=2.0))(np.array([[3, 4], [0, 1]]))()
    return Shown(bool(found[0].tolist() == [1, 1]), f"the row 3 4, c = 2: {said(found[0])}", "1.2 1.6")


@case(
    "torch-distances",
    "defect",
    "byzfl with tensors: Krum, MultiKrum, MDA, NNM, MoNNA",
    "above 25 vectors torch.cdist is an uncentred float32 Gram",
)
def torch_distances() -> Shown:
    few, many, exact = (
        times_hostile_picked(*case) for case in (("byzfl-torch", 25), ("byzfl-torch", 26), ("byzfl", 26))
    )
    return Shown(
        many > max(few, exact),
        f"models as in krum-uncentred, 26 of them: Krum picks the hostile one in {many} of {ROUNDS} rounds",
        f"{exact} of {ROUNDS}, as with numpy arrays; with 25 models {few}",
    )


@case("alie-tau", "default", "byzfl ALittleIsEnough", "mean + 1.5 sigma whatever n and f are")
def alie_tau() -> Shown:
    from statistics import NormalDist

    from byzfl.attacks.attacks import ALittleIsEnough

    factors = []
    for honest in (40, 30):
        rows = np.random.default_rng(honest).standard_normal((honest, 1))
        factors.append(float(((ALittleIsEnough()(rows) - rows.mean(0)) / rows.std(0, ddof=1))[0]))
    wanted = []
    for n, m in ((50, 10), (50, 20)):
        supporters = n // 2 + 1 - m
        wanted.append(NormalDist().inv_cdf((n - m - supporters) / (n - m)))
    return Shown(
        bool(np.allclose(factors, 1.5)),
        f"40 honest of 50: {factors[0]:.2f} sigma; 30 honest of 50: {factors[1]:.2f} sigma",
        f"{wanted[0]:.2f} sigma; {wanted[1]:.2f} sigma (Baruch et al. 2019, arXiv:1902.06156, 3.3)",
    )


def described(one: Case) -> dict[str, str]:
    return {"key": one.key, "kind": one.kind, "where": one.where, "what": one.what}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    warnings.simplefilter("ignore")
    logging.disable()
    shown = [(one, one.run()) for one in CASES]
    if as_json:
        rows = [{**described(one), **asdict(found)} for one, found in shown]
        print(json.dumps({"versions": versions(), "cases": rows}, indent=1))
    else:
        print(", ".join(f"{name} {number}" for name, number in versions().items()) + "\n")
        print("| | kind | where | what | gives | right |\n|---|---|---|---|---|---|")
        for one, found in shown:
            gives = found.gives if found.shows else f"**no longer** ({found.gives})"
            print(f"| `{one.key}` | {one.kind} | {one.where} | {one.what} | {gives} | {found.right} |")
    sys.exit(0 if all(found.shows for _, found in shown) else 1)


if __name__ == "__main__":
    main()
