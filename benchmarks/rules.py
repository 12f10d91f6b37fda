"""How fast the aggregation rules are, beside Flower's and ByzFL's own, numpy, and reading the updates once.

    python benchmarks/peers.py --setup                              # once: the peers' environment
    python benchmarks/rules.py [--peers [DIR]] [--rules median,krum] [--shapes 10x10000,50x100000] [--quick]
                               [--budget SECONDS] [--memory] [--json FILE]

All contestants of one row work on the same updates and take turns, so that a busy machine slows them alike: compare
within a row, not between runs. In a turn each runs twice and the second run counts: the first finds a processor that
was idle and caches full of another's data, which on shared machines takes up to twice as long. The times are medians in
milliseconds. The peers run in a process of their own, which reads the same file, and only their own function is timed,
on the objects it takes; each runs with the threads it takes by itself and with one, and the better counts, as does the
better of Flower's two implementations. Our side has one BLAS thread.

direct     the rule in the kernels that live rounds use
live       the end of a live round, whose updates were screened as they came: the rule, the sgd server step, verdicts
round      a whole round on updates that come all at once: screening and that
reference  the rule in traced TensorFlow, which TFF's worker runs
numpy      what one would write in numpy without further thought
read       reading the matrix once with all cores, the best of the turns: no rule can be faster
least      under Krum's rules: two readings and half of the time that numpy's BLAS takes for all inner products in
           float32 on one core, divided by the cores. What computes these products can hardly take less
memory     with --memory: the most memory beyond the updates that direct / round take, in parts of the updates

A cell whose calls would take longer than --budget (60 s) is left out ("> 60 s"), one that needs more than half of the
free memory too ("memory"). Rules that iterate stop by different criteria; under each such row stand the distances to
the exact point, computed in float64, and the peers run a second time with as many steps as reach our distance.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from covey_coordinator.libraries import prepare

prepare()

import numpy as np
import psutil
from peers import DEFAULT, PeerError, Peers, TooSlow, python_of
from threadpoolctl import threadpool_limits

from covey_coordinator.aggregation.kernels import Updates
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.registry import RULES, make_rule
from covey_coordinator.aggregation.rules import Batch, Rule

ALL_N, ALL_D = (10, 20, 50, 100, 500), (10_000, 100_000, 1_000_000)
QUICK = ((10, 10_000), (50, 10_000))
WARM_UP_S = 0.25  # what takes less runs twice in a turn, and the second run counts
DIFFERENT = 1e-5  # results further apart than this, in parts of the largest value, are reported
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
LIMITS = ("read", "product")  # not contestants
COLUMNS = ("direct", "live", "round", "reference", "flwr", "byzfl", "torch", "numpy", "read")


# What is compared.


@dataclass(frozen=True)
class Row:
    """A rule: our settings, the peers' jobs by column (without f), numpy's way, and f as a function of n.

    conventions: by column, the settings with which ours gives the same. They are for comparing results, not timed.
    """

    rule: str
    settings: dict[str, Any] = field(default_factory=dict)
    pre: tuple[str, ...] = ()
    jobs: tuple[tuple[str, dict[str, Any]], ...] = ()
    numpy: Optional[Callable[[Any, int], Any]] = None
    conventions: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_byzantine: Callable[[int], int] = lambda n: n // 5
    shift: float = 2.0  # of the hostile rows' numbers, in standard deviations of the honest ones'
    by_products: bool = False


def numpy_multi_krum(updates: Any, f: int, selected: Optional[int] = None) -> Any:
    """From a centred float32 Gram matrix."""
    centred = updates - updates.mean(axis=0)
    products = centred @ centred.T
    squares = np.diag(products)
    distances = np.sort(squares[:, None] + squares - 2 * products, axis=1)
    scores = distances[:, 1 : len(updates) - f - 1].sum(axis=1)
    return updates[np.argsort(scores, kind="stable")[: selected or len(updates) - f]].mean(axis=0)


def numpy_meamed(updates: Any, f: int) -> Any:
    distances = np.abs(updates - np.median(updates, axis=0))
    nearest = np.argpartition(distances, len(updates) - f - 1, axis=0)[: len(updates) - f]
    return np.take_along_axis(updates, nearest, axis=0).mean(axis=0)


def byzfl(rule: str, **job: Any) -> tuple[tuple[str, dict[str, Any]], ...]:
    """The job on numpy arrays and on tensors."""
    return tuple(
        (column, {"library": library, "rule": rule, **job})
        for column, library in (("byzfl", "byzfl"), ("torch", "byzfl-torch"))
    )


def flwr(rule: str, *libraries: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    return tuple(("flwr", {"library": library, "rule": rule}) for library in libraries or ("flwr",))


BYZFL_KRUM = {column: {"neighbours": "n-f-1"} for column in ("byzfl", "torch")}

ROWS: dict[str, Row] = {
    "median": Row("median", jobs=(*flwr("median"), *byzfl("median")), numpy=lambda u, f: np.median(u, axis=0)),
    "trimmed-mean": Row(
        "trimmed-mean",
        jobs=(*flwr("trimmed-mean"), *byzfl("trimmed-mean")),
        numpy=lambda u, f: np.sort(u, axis=0)[f : len(u) - f].mean(axis=0),
    ),
    "multi-krum": Row(
        "multi-krum",
        jobs=(*flwr("multi-krum", "flwr", "flwr-messages"), *byzfl("multi-krum")),
        numpy=numpy_multi_krum,
        conventions=BYZFL_KRUM,
        by_products=True,
    ),
    "multi-krum-alike": Row(  # nobody is hostile: whom to keep is a close call, and rounded distances do not decide it
        "multi-krum",
        jobs=(*flwr("multi-krum", "flwr", "flwr-messages"), *byzfl("multi-krum")),
        numpy=numpy_multi_krum,
        conventions=BYZFL_KRUM,
        shift=0.0,
        by_products=True,
    ),
    "krum": Row(
        "krum",
        jobs=(*flwr("krum", "flwr", "flwr-messages"), *byzfl("krum")),
        numpy=lambda u, f: numpy_multi_krum(u, f, 1),
        conventions=BYZFL_KRUM,
        by_products=True,
    ),
    "meamed": Row("meamed", jobs=byzfl("meamed"), numpy=numpy_meamed),
    "bulyan": Row("bulyan", jobs=flwr("bulyan"), num_byzantine=lambda n: min(n // 5, (n - 3) // 4)),
    "geometric-median": Row("geometric-median", jobs=byzfl("geometric-median")),
    "centred-clipping": Row(
        "centred-clipping",
        settings={"iterations": 3, "clip_radius": 100.0},
        jobs=byzfl("centred-clipping", settings={"L": 3, "tau": 100.0}),
    ),
    "nnm+median": Row("median", pre=("nnm",), jobs=byzfl("median", pre=[{"rule": "nnm"}])),
}


def our_rule(row: Row, f: int, **convention: Any) -> Optional[Rule]:
    """Our rule of this row, or None if there is none."""
    if row.rule not in RULES:
        return None
    return make_rule(row.rule, f, before=row.pre, **row.settings, **convention)


def direct(rule: Rule, updates: Any) -> Callable[[], Any]:
    """The rule in the fast kernels, from its first state."""
    n, d = updates.shape
    kernels, state = NumpyKernels(), rule.initial_state(d)
    batch = Batch(Updates(updates), np.ones(n, np.float32), np.arange(n))

    def run() -> Any:
        with np.errstate(all="ignore"):
            return rule.advance(kernels, state, batch)[1].aggregate

    return run


def live_end(rule: Rule, updates: Any) -> Callable[[], Any]:
    """`engine.aggregate` of a fresh direct engine on updates that have passed screening."""
    from covey_coordinator.aggregation.engines import make_engine
    from covey_coordinator.aggregation.screening import screen_updates
    from covey_protocol.parameters import ParameterSpec

    n, d = updates.shape
    engine = make_engine("direct", rule, [ParameterSpec("model", (d,))])
    screened = screen_updates(updates, np.full(n, 10.0, np.float32), [f"d{i:04}" for i in range(n)], d)
    parameters = np.zeros(d, np.float32)
    return lambda: engine.aggregate(parameters, screened).parameters


def whole_round(rule: Rule, updates: Any) -> Callable[[], Any]:
    """`engine.step` of a fresh direct engine; the parameters start at zero, so they end as the aggregate."""
    from covey_coordinator.aggregation.engines import make_engine
    from covey_protocol.parameters import ParameterSpec

    n, d = updates.shape
    engine = make_engine("direct", rule, [ParameterSpec("model", (d,))])
    parameters, counts, ids = np.zeros(d, np.float32), np.full(n, 10.0, np.float32), [f"d{i:04}" for i in range(n)]
    return lambda: engine.step(parameters, updates, counts, ids).parameters


def reference(rule: Rule, updates: Any) -> Callable[[], Any]:
    """The rule as a tf.function on tensors already in place."""
    import tensorflow as tf

    from covey_coordinator.aggregation.factory import traced

    n, d = updates.shape
    run, state = traced(rule), tf.nest.map_structure(tf.constant, rule.initial_state(d))
    placed, counts, places = tf.constant(updates), tf.ones([n]), tf.range(tf.constant(n, tf.int64))
    return lambda: run(state, placed, counts, places)[1].aggregate.numpy()


OURS = (("direct", direct), ("live", live_end), ("round", whole_round), ("reference", reference))


# The contestants.


class Contestant:
    """One way to compute one row. `run` returns seconds; `result` is there after the first run."""

    def __init__(self, column: str, run: Callable[[float], float], result: Callable[[], Any]) -> None:
        self.column, self.result = column, result
        self._run = run
        self.times: list[float] = []
        self.why = ""  # why there are no times
        self._first, self._spent = 0.0, 0.0
        self._turns, self.done = 0, False

    def turn(self, budget_s: float) -> None:
        """Run once, if the budget allows. The first run warms up and counts only if there is no other."""
        try:
            if self._turns and self._first < WARM_UP_S:
                self._run(budget_s)
            seconds = self._run(budget_s)
        except TooSlow:
            self.why, self.done = f"> {budget_s:g} s", True
            return
        except (PeerError, MemoryError) as error:
            small = "MemoryError" in f"{type(error).__name__} {error}" or "allocate" in str(error)
            self.why, self.done = "memory" if small else str(error), True
            return
        self._spent += seconds
        self._turns += 1
        if self._turns == 1:
            self._first = seconds
        else:
            self.times.append(seconds)
        self.done = self._spent + seconds > budget_s

    def seconds(self) -> Optional[float]:
        if self.why:
            return None
        times = self.times or [self._first]
        return min(times) if self.column in LIMITS else statistics.median(times)


def in_process(column: str, prepared: Callable[[], Any]) -> Contestant:
    results: list[Any] = []

    def run(_: float) -> float:
        start = time.perf_counter()
        result = prepared()
        seconds = time.perf_counter() - start
        results[:] = results or [result]
        return seconds

    return Contestant(column, run, lambda: results[0])


def of_peer(column: str, peers: Peers, job: dict[str, Any], threads: Optional[int], folder: Path) -> Contestant:
    path = folder / f"{column}-{job['library']}-{threads}.npy"

    def run(budget_s: float) -> float:
        return peers.seconds(job, threads, None if path.exists() else path, budget_s)

    return Contestant(column, run, lambda: np.load(path))


def product(updates: Any) -> Contestant:
    """All inner products in float32 on one core; symmetry would halve them."""
    return in_process("product", lambda: updates @ updates.T)


def reading(updates: Any) -> Contestant:
    """All cores read the matrix once; the sum of squares of one BLAS thread each is the fastest reading there is."""
    parts, pool = np.array_split(updates.reshape(-1), CORES), ThreadPoolExecutor(CORES)
    return in_process("read", lambda: list(pool.map(lambda part: float(part.dot(part)), parts)) and None)


def contestants(row: Row, rule: Optional[Rule], updates: Any, f: int, peers: Optional[Peers], folder: Path) -> Any:
    """All that can compute this row, ours first."""
    found = []
    if rule is not None:
        for column, make in OURS:
            found.append(in_process(column, make(rule, updates)))
    for column, job in row.jobs if peers else ():
        full = {**job, "f": f, "pre": [{**step, "f": f} for step in job.get("pre", ())]}
        for threads in (None, 1):
            found.append(of_peer(column, peers, full, threads, folder))
    if row.numpy is not None:
        one_liner = row.numpy
        found.append(in_process("numpy", lambda: one_liner(updates, f)))
    return [*found, *([product(updates)] if row.by_products else []), reading(updates)]


def measured(entrants: Sequence[Contestant], repeats: int, budget_s: float) -> None:
    """Everyone takes turns, until the repeats or their budget are used up."""
    for _ in range(repeats + 1):
        for entrant in entrants:
            if not entrant.done:
                entrant.turn(budget_s)


def best(entrants: Sequence[Contestant], column: str) -> tuple[Optional[float], str]:
    """Seconds of the fastest contestant of a column, or why there is none."""
    mine = [entrant for entrant in entrants if entrant.column == column]
    times = [seconds for seconds in (entrant.seconds() for entrant in mine) if seconds is not None]
    return (min(times), "") if times else (None, mine[0].why if mine else "")


# The updates.


def write_updates(path: Path, n: int, d: int, f: int, shift: float) -> Any:
    """(n, d) float32, and in a file for the peers: a common vector, noise of the same size, and f rows shifted."""
    generator = np.random.default_rng(n * d)
    updates = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, d))
    common = generator.standard_normal(d, np.float32)
    for row in range(n):
        updates[row] = common + generator.standard_normal(d, np.float32) + (shift if row < f else 0.0)
    updates.flush()
    del updates
    return np.load(path)


def scratch() -> str:
    """A folder in memory where there is one: the file is shared by our process and the peers'."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()  # noqa: S108 (a fresh folder in it)


# Geometric medians: how far from the exact point.


class Weiszfeld:
    """Iterations that start at the origin and are followed by their weights alone, in float64.

    Every iterate but the first is a weighted mean of the rows, so distances come from the Gram matrix.
    """

    def __init__(self, updates: Any) -> None:
        self._mean = updates.mean(axis=0, dtype=np.float64)
        self._gram = np.zeros((len(updates),) * 2)
        for start in range(0, updates.shape[1], 1 << 16):
            stop = start + (1 << 16)
            rows = updates[:, start:stop] - self._mean[start:stop]
            self._gram += rows @ rows.T
        self._norms = np.array([np.linalg.norm(row.astype(np.float64)) for row in updates])
        self._updates = updates
        self.weights = self.after(2000)
        self.point = self._mean + np.concatenate(
            [
                self.weights @ (updates[:, start : start + (1 << 16)] - self._mean[start : start + (1 << 16)])
                for start in range(0, updates.shape[1], 1 << 16)
            ]
        )

    def after(self, steps: int, nu: float = 0.0) -> Any:
        """(n,) weights after so many steps from the origin; nu bounds the distances from below."""
        distances = self._norms
        for _ in range(steps):
            inverse = 1.0 / np.maximum(distances, max(nu, 1e-30))
            weights = inverse / inverse.sum()
            distances = self._distances(weights)
        return weights

    def _distances(self, weights: Any) -> Any:
        products = self._gram @ weights
        return np.sqrt(np.maximum(np.diag(self._gram) - 2 * products + weights @ products, 0.0))

    def steps_to(self, distance: float) -> int:
        """The least number of steps from the origin, with ByzFL's nu = 0.1, that come this near the exact point."""
        for steps in (3, 4, 5, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 512):
            difference = self.after(steps, nu=0.1) - self.weights
            if float(np.sqrt(max(difference @ self._gram @ difference, 0.0))) <= distance * self.scale():
                return steps
        return 1024

    def scale(self) -> float:
        """The median distance of a row from the exact point: what distances are given in."""
        return float(np.median(self._distances(self.weights)))

    def distance(self, result: Any) -> float:
        return float(np.linalg.norm(result.astype(np.float64) - self.point)) / self.scale()


def at_our_accuracy(
    exact: Weiszfeld, entrants: list[Contestant], peers: Optional[Peers], f: int, folder: Path
) -> Iterator[Contestant]:
    """The peers again, with as many steps as reach our distance, under columns of their own."""
    ours = next((entrant for entrant in entrants if entrant.column == "direct"), None)
    tolerance = 1e-6
    if ours is not None:
        ours.turn(float("inf"))
        tolerance = max(exact.distance(ours.result()), 1e-7)
    steps = exact.steps_to(tolerance)
    for column, library in (("byzfl", "byzfl"), ("torch", "byzfl-torch")) if peers else ():
        job = {"library": library, "rule": "geometric-median", "f": f, "settings": {"T": steps}}
        for threads in (None, 1):
            yield of_peer(f"{column} T={steps}", peers, job, threads, folder)


def distances_said(exact: Weiszfeld, entrants: Sequence[Contestant]) -> str:
    present = [entrant for entrant in entrants if entrant.seconds() is not None and entrant.column not in LIMITS]
    distances = {entrant.column: exact.distance(entrant.result()) for entrant in present}
    return "distance to the exact point: " + ", ".join(f"{column} {by:.1e}" for column, by in distances.items())


# Memory.


def memory_of(name: str, n: int, d: int) -> dict[str, float]:
    """In a fresh process: the most resident memory that direct and round add, in parts of the updates."""
    command = [sys.executable, __file__, "--memory-child", f"{name} {n} {d}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def memory_child(name: str, n: int, d: int) -> dict[str, float]:
    row = ROWS[name]
    rule = our_rule(row, row.num_byzantine(n))
    assert rule is not None
    generator = np.random.default_rng(0)
    updates = np.empty((n, d), np.float32)
    for vector in updates:
        generator.standard_normal(out=vector, dtype=np.float32)
    found = {}
    with threadpool_limits(1):
        for column, make in (("direct", direct), ("round", whole_round)):
            make(rule, updates[:, : min(d, 2000)].copy())()
            run = make(rule, updates)
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            before = resident("VmRSS")
            run()
            found[column] = (resident("VmHWM") - before) / updates.nbytes
    return found


def resident(line: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(entry.split()[1]) for entry in status.splitlines() if entry.startswith(line + ":"))


# The table.


@dataclass
class Known:
    """What earlier, smaller rows of a run say about larger ones: every rule takes at least as long per number."""

    budget_s: float
    entries: dict[tuple[str, str], list[tuple[int, int, float, str]]] = field(default_factory=dict)

    def note(self, name: str, entrants: Sequence[Contestant], n: int, d: int) -> None:
        for column in {entrant.column for entrant in entrants}:
            seconds, why = best(entrants, column)
            entry = (n, d, seconds or 0.0, why)
            self.entries.setdefault((name, column.split()[0]), []).append(entry)

    def reason(self, name: str, column: str, n: int, d: int) -> str:
        """Why not to try this column on n x d, or nothing."""
        for at_n, at_d, seconds, why in self.entries.get((name, column.split()[0]), []):
            if n >= at_n and d >= at_d:
                if why:
                    return why
                if seconds * (n * d) / (at_n * at_d) > self.budget_s:
                    return f"> {self.budget_s:g} s"
        return ""


def measure(name: str, n: int, d: int, peers: Optional[Peers], known: Known, options: Any) -> dict[str, Any]:
    """One row of the table as a dict: milliseconds by column, or the reason why not; notes."""
    row = ROWS[name]
    f = row.num_byzantine(n)
    with tempfile.TemporaryDirectory(dir=scratch()) as scratch_folder:
        folder = Path(scratch_folder)
        (folder / "exact").mkdir()
        updates = write_updates(folder / "updates.npy", n, d, f, row.shift)
        if peers:
            peers.load(folder / "updates.npy")
        entrants = contestants(row, our_rule(row, f), updates, f, peers, folder)
        exact = Weiszfeld(updates) if name == "geometric-median" else None
        if exact is not None:
            entrants += at_our_accuracy(exact, entrants, peers, f, folder / "exact")
        for entrant in entrants:
            why = known.reason(name, entrant.column, n, d)
            entrant.why, entrant.done = why, bool(why)
        measured(entrants, options.repeats, options.budget)
        known.note(name, entrants, n, d)
        notes = disagreements(entrants, name, f, updates) if exact is None else [distances_said(exact, entrants)]
    found: dict[str, Any] = {"rule": name, "n": n, "d": d, "f": f, "milliseconds": {}, "not measured": {}}
    for column in dict.fromkeys(entrant.column for entrant in entrants):
        seconds, why = best(entrants, column)
        if seconds is None:
            found["not measured"][column] = why
        else:
            found["milliseconds"][column] = 1e3 * seconds
    found["notes"] = notes
    limits = [found["milliseconds"].get(column) for column in LIMITS]
    if row.by_products and None not in limits:
        found["least"] = 2 * limits[0] + limits[1] / 2 / CORES
    if options.memory and our_rule(row, f) is not None:
        found["memory"] = memory_of(name, n, d)
    return found


def disagreements(entrants: Sequence[Contestant], name: str, f: int, updates: Any) -> list[str]:
    """Contestants whose result is not ours (or, where we have no such rule, that of the first)."""
    present = [entrant for entrant in entrants if entrant.seconds() is not None and entrant.column not in LIMITS]
    said = []
    for entrant in present[1:]:
        wanted = by_convention(ROWS[name], entrant.column, f, updates)
        wanted = present[0].result() if wanted is None else wanted
        by = float(np.abs(entrant.result() - wanted.astype(np.float64)).max() / np.abs(wanted).max())
        if by > DIFFERENT:
            said.append(f"{entrant.column} differs by {by:.1e} from {present[0].column}")
    return said


def by_convention(row: Row, column: str, f: int, updates: Any) -> Any:
    """Our result with the settings under which it is the same as this column's; None where the row's own are."""
    rule = our_rule(row, f, **row.conventions[column]) if column in row.conventions else None
    return None if rule is None else direct(rule, updates)()


def print_heading() -> None:
    cells = "".join(f"{column:>11}" for column in COLUMNS)
    print(f"{'rule':<17}{'n':>4}{'d':>9}{cells}{'flwr/':>8}{'byzfl/':>8}{'torch/':>8}{'numpy/':>8}{'/read':>8}")


def print_row(found: dict[str, Any]) -> None:
    times, missing = found["milliseconds"], found["not measured"]
    cells = "".join(
        f"{times[column]:>11.2f}" if column in times else f"{missing.get(column, '-')[:10]:>11}" for column in COLUMNS
    )
    ratios = [ratio(times, column, "direct") for column in ("flwr", "byzfl", "torch", "numpy")]
    print(f"{found['rule']:<17}{found['n']:>4}{found['d']:>9}{cells}{''.join(ratios)}{ratio(times, 'direct', 'read')}")
    for column, took in times.items():
        if column not in COLUMNS and column not in LIMITS:
            print(f"{'':<17}{column}: {took:.2f}{ratio(times, column, 'direct')} times direct")
    if "least" in found:
        print(f"{'':<17}least: {found['least']:.2f}")
    for note in found["notes"]:
        print(f"{'':<17}{note}")
    if "memory" in found:
        print(f"{'':<17}memory: " + ", ".join(f"{column} {share:.2f}" for column, share in found["memory"].items()))
    sys.stdout.flush()


def ratio(times: dict[str, float], of: str, to: str) -> str:
    return f"{times[of] / times[to]:>8.1f}" if of in times and to in times else f"{'-':>8}"


def shapes_of(text: Optional[str], quick: bool) -> list[tuple[int, int]]:
    """'10x10000,50x100000' -> pairs, small ones first."""
    if text is None:
        return list(QUICK) if quick else sorted(((n, d) for n in ALL_N for d in ALL_D), key=lambda s: s[0] * s[1])
    pairs = [(int(n), int(d)) for n, _, d in (part.partition("x") for part in text.split(","))]
    return sorted(pairs, key=lambda shape: shape[0] * shape[1])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="?", type=Path, const=DEFAULT, metavar="DIR", help="the peers' environment")
    parser.add_argument("--rules", default=",".join(ROWS), help="of " + ", ".join(ROWS))
    parser.add_argument("--shapes", help="n x d, such as 10x10000,50x100000")
    parser.add_argument("--quick", action="store_true", help="two small shapes, three repeats")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS", help="for all turns of one cell")
    parser.add_argument("--memory", action="store_true", help="measure our memory, too (Linux)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--memory-child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.repeats = options.repeats or (3 if options.quick else 9)
    options.rules = options.rules.split(",")
    unknown = [name for name in options.rules if name not in ROWS]
    if unknown:
        parser.error(f"no such rule: {', '.join(unknown)}; known: {', '.join(ROWS)}")
    return options


def results(options: argparse.Namespace, peers: Optional[Peers]) -> Iterator[dict[str, Any]]:
    known = Known(options.budget)
    for name in options.rules:
        for n, d in shapes_of(options.shapes, options.quick):
            yield measure(name, n, d, peers, known, options)


def main() -> None:
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # every row has engines of its own and so traces anew
    options = arguments()
    if options.memory_child:
        name, n, d = options.memory_child.split()
        print(json.dumps(memory_child(name, int(n), int(d))))
        return
    with ExitStack() as stack:
        peers = None
        if options.peers is not None:
            free = psutil.virtual_memory().available // 2
            peers = stack.enter_context(Peers(python_of(options.peers.resolve()), free))
            print(", ".join(f"{library} {number}" for library, number in peers.versions.items()))
        stack.enter_context(threadpool_limits(1))
        print(f"medians of up to {options.repeats} turns, ms; the ratios are to direct; numpy {np.__version__} is ours")
        print_heading()
        rows = []
        for found in results(options, peers):
            print_row(found)
            rows.append(found)
    if options.json:
        about = {"versions": peers.versions if peers else {}, "cores": os.cpu_count(), "rows": rows}
        options.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
