"""Consensus super teaching (Han et al. 2019): what its abstract claims, judged on our reconstruction of the method."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from covey_coordinator.grid.simulation import stream
from covey_coordinator.reproduce.contract import Case, Claim, Measured, Outcome, Reproduction
from covey_coordinator.reproduce.pictures import new_figure, plain, png
from covey_coordinator.teaching.super_baselines import exhaustive, greedy, learned
from covey_coordinator.teaching.super_teaching import SuperSettings, SuperTaught, super_teach
from covey_models import datasets
from covey_protocol.teaching import LOGISTIC, RIDGE, Array

DATA = 51  # stream of random numbers of a seed
TEACHERS, CORRUPTED = 5, 0.7
TOGETHER, ALONE, GREEDY = "together", "best teacher alone", "greedy"
METHODS = ("everybody", "healthy ones", "dual", "matching", "turns", TOGETHER, ALONE, GREEDY)
PROBLEMS = {
    "ridge": METHODS,
    "logistic": METHODS,
    "split attributes": (TOGETHER, ALONE, GREEDY, "everybody"),
    "diabetes": METHODS,
    "breast-cancer": METHODS,
    "fourteen instances": (TOGETHER, GREEDY, "exhaustive"),
}
SELECTORS: dict[str, dict[str, Any]] = {
    "dual": {"relaxation": "dual", "prices": (0.0, 0.1, 1.0, 10.0), "turns": False},
    "matching": {"turns": False},
    "turns": {"relaxation": "none"},
    TOGETHER: {},
}
ADAPTIVE, UNWEIGHTED = "irrelevant but used, adaptive weights", "irrelevant but used, equal weights"
FOUND = "relevant and found, together"
RELEVANT = 8


class Task(NamedTuple):
    """x (n, d), y (n,) of all teachers; teacher (n,) whose an instance is; healthy (n,); star (d,) is to be taught."""

    x: Array
    y: Array
    teacher: Any
    healthy: Any
    star: Array
    settings: SuperSettings

    def taught(self, **changes: Any) -> SuperTaught:
        return super_teach(self.teachers, self.star, dataclasses.replace(self.settings, **changes))

    @property
    def teachers(self) -> list[tuple[Array, Array]]:
        return [(self.x[self.teacher == k], self.y[self.teacher == k]) for k in range(TEACHERS)]

    def risk(self, theta: Array) -> float:
        """|theta - theta*|^2 in units of |theta*|^2, the risk of a learner that was taught nothing."""
        return float(np.sum((theta - self.star) ** 2) / np.sum(self.star**2))


def linear(kind: str, seed: int, n: int = 200, d: int = 5, split: bool = False) -> Task:
    """Gaussian inputs, a drawn theta*; 70% of the targets are noise of standard deviation 3 or flipped labels.

    split: every teacher's instances are 0 but in its own d / 5 attributes.
    """
    random = stream(seed, DATA, len(kind))
    x, star, teacher = random.standard_normal((n, d)), random.standard_normal(d), np.arange(n) % TEACHERS
    if split:
        x *= np.arange(d) // (d // TEACHERS) == teacher[:, None]
    healthy = random.random(n) >= CORRUPTED
    y = x @ star + 0.3 * random.standard_normal(n)
    if kind == LOGISTIC:
        y = np.where(random.random(n) < 1 / (1 + np.exp(-x @ star)), 1.0, -1.0)
    return Task(x, corrupted(kind, y, healthy, random), teacher, healthy, star, SuperSettings(kind=kind))


def corrupted(kind: str, y: Array, healthy: Any, random: np.random.Generator) -> Array:
    return np.where(healthy, y, -y if kind == LOGISTIC else 3 * random.standard_normal(len(y)))


def table(name: str, seed: int) -> Task:
    """theta* is what the learner makes of one half; the other is the teachers', 70% of it corrupted."""
    random, kind = stream(seed, DATA), RIDGE if name == "diabetes" else LOGISTIC
    x, y = diabetes() if kind == RIDGE else breast_cancer()
    order = random.permutation(len(y))
    half, rest = np.array_split(order, 2)
    healthy = random.random(len(rest)) >= CORRUPTED
    settings = SuperSettings(kind=kind)
    star = learned(x[half], y[half], settings)
    changed = corrupted(kind, y[rest], healthy, random)
    return Task(x[rest], changed, np.arange(len(rest)) % TEACHERS, healthy, star, settings)


def diabetes() -> tuple[Array, Array]:
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return with_intercept(x), (y - y.mean()) / y.std()


def breast_cancer() -> tuple[Array, Array]:
    found = datasets.load("breast-cancer")
    return with_intercept(found.x.astype(np.float64)), np.where(found.y == 1, 1.0, -1.0)


def with_intercept(x: Array) -> Array:
    scaled = (x - x.mean(axis=0)) / x.std(axis=0)
    return np.concatenate([scaled, np.ones((len(x), 1))], axis=1)


def planted(seed: int) -> tuple[Task, Any]:
    """100 instances with targets of pure noise, 60 attributes: theta* is what the first 8 of a drawn order teach."""
    random = stream(seed, DATA)
    x, y = random.standard_normal((100, 60)), random.standard_normal(100)
    relevant = np.zeros(100, bool)
    relevant[random.permutation(100)[:RELEVANT]] = True
    settings = SuperSettings(tolerance=1e-6)
    star = learned(x[relevant], y[relevant], settings)
    return Task(x, y, np.arange(100) % TEACHERS, relevant, star, settings), relevant


TASKS: dict[str, Callable[[int], Task]] = {
    "ridge": lambda seed: linear(RIDGE, seed),
    "logistic": lambda seed: linear(LOGISTIC, seed),
    "split attributes": lambda seed: linear(RIDGE, seed, d=10, split=True),
    "diabetes": lambda seed: table("diabetes", seed),
    "breast-cancer": lambda seed: table("breast-cancer", seed),
    "fourteen instances": lambda seed: linear(RIDGE, seed, n=14, d=3),
}


def label_of(problem: str, method: str) -> str:
    return f"{problem}: {method}"


def cases(quick: bool) -> Sequence[Case]:
    left = ("diabetes", "breast-cancer") if quick else ()
    found = [
        Case(label_of(problem, method), {"problem": problem, "method": method})
        for problem, methods in PROBLEMS.items()
        if problem not in left
        for method in methods
    ]
    found += [Case(label, {"problem": "planted", "method": label}) for label in (ADAPTIVE, UNWEIGHTED, FOUND)]
    for problem in ("logistic",) if quick else ("ridge", "logistic"):
        for method in (TOGETHER, "turns", GREEDY):
            settings = {"problem": problem, "method": method, "seconds": True}
            found.append(Case(f"{label_of(problem, method)}, seconds", settings))
    return found


def run(settings: dict[str, Any], seed: int, folder: Path | None) -> Outcome:
    """value: risk relative to |theta*|^2, or seconds, or a share. used: instances; rounds, vectors: of the teachers."""
    del folder
    problem, method = settings["problem"], settings["method"]
    used: dict[str, Any] = {}
    if problem == "planted":
        started = time.process_time()
        value = shares(method, seed)
    else:
        task = TASKS[problem](seed)
        started = time.process_time()
        value, used = risk_of(task, method)
    seconds = time.process_time() - started
    return {"value": seconds if settings.get("seconds") else value, **used, "seconds": round(seconds, 3)}


def risk_of(task: Task, method: str) -> tuple[float, dict[str, Any]]:
    if method in SELECTORS:
        found = task.taught(**SELECTORS[method])
        used = sum(int(one.sum()) for one in found.selected)
        return task.risk(found.theta), {"used": used, "rounds": found.rounds, "vectors": found.vectors}
    if method == ALONE:
        return min(task.risk(super_teach([one], task.star, task.settings).theta) for one in task.teachers), {}
    if method in (GREEDY, "exhaustive"):
        chosen, _ = (greedy if method == GREEDY else exhaustive)(task.x, task.y, task.star, task.settings)
    else:
        chosen = task.healthy if method == "healthy ones" else np.ones(len(task.y), bool)
    return task.risk(learned(task.x[chosen], task.y[chosen], task.settings)), {"used": int(chosen.sum())}


def shares(method: str, seed: int) -> float:
    """Of the irrelevant, those with a weight above 0; or of the relevant, those selected in the end."""
    task, relevant = planted(seed)
    parts = [relevant[task.teacher == k] for k in range(TEACHERS)]
    if method == FOUND:
        return sum(int((part & one).sum()) for part, one in zip(parts, task.taught().selected)) / RELEVANT
    gamma = 1.0 if method == ADAPTIVE else 0.0
    weights = task.taught(gamma=gamma, prices=(0.01,), turns=False).weights
    return sum(int(((one > 0) & ~part).sum()) for part, one in zip(parts, weights)) / int((~relevant).sum())


def told(measured: Measured) -> str:
    parts = []
    for label, outcomes in measured.outcomes.items():
        if label.endswith(f": {TOGETHER}"):
            used, rounds, vectors = (
                np.mean([one.get(key, 0) for one in outcomes]) for key in ("used", "rounds", "vectors")
            )
            parts.append(f"{label} {used:.0f} instances, {rounds:.0f} rounds and {vectors:.0f} vectors")
    return f"What teaching took, all prices together: {'; '.join(parts)}."


COLOURS = {TOGETHER: "#0072b2", "turns": "#56a0d8", "matching": "#009e73", "dual": "#b8860b", GREEDY: "#d55e00",
           ALONE: "#aa4499", "everybody": "#000000", "healthy ones": "#666666", "exhaustive": "#000000"}  # fmt: skip
MARKS = {TOGETHER: "o", "turns": "s", "matching": "^", "dual": "v", GREEDY: "D", ALONE: "P", "everybody": "x",
         "healthy ones": "+", "exhaustive": "*"}  # fmt: skip


def figure(cases: Sequence[Case], measured: Measured) -> bytes:
    """Teaching risk by problem and method, means over the seeds, on a logarithmic axis."""
    image, axes = new_figure(1, size=(8.0, 4.2))
    one = axes[0][0]
    shown = [name for name in PROBLEMS if any(case.settings["problem"] == name for case in cases)]
    for method, colour in COLOURS.items():
        points = [(place, measured.mean(label)) for place, name in enumerate(shown)
                  if (label := label_of(name, method)) in measured.outcomes]  # fmt: skip
        if points:
            places, values = zip(*points)
            one.plot(places, np.maximum(values, 1e-16), MARKS[method], color=colour, label=method, markersize=7)
    one.set_yscale("log")
    one.set_xticks(range(len(shown)), shown, fontsize=8)
    one.set_ylabel("teaching risk, relative", fontsize=9)
    one.legend(fontsize=8, frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0, 1))
    plain(one)
    return png(image)


def both(holds: Callable[[Any, str], bool], *problems: str) -> Callable[[Any], bool]:
    return lambda values: all(holds(values, problem) for problem in problems)


SUPER_TEACHING = Reproduction(
    name="super-teaching",
    title="Consensus super teaching: the abstract's claims on our reconstruction",
    paper="Han et al. 2019 (IJCNN, arXiv:1905.02796), consensus super teaching",
    source="none: only the paper's abstract could be had, so method, protocol and problems are ours and no number is "
    "published",
    engine="numpy (teaching/super_teaching.py): consensus ADMM, all teachers in one process",
    measure="teaching risk |theta(S) - theta*|^2 / |theta*|^2 of the learner trained on the selected instances; rows "
    "named so: seconds of the processor, or a share of instances",
    protocol=(
        "5 teachers; 70% of all instances are corrupted (ridge: the target is noise; logistic: the label is flipped). "
        "theta* is known to the teachers.",
        "ridge and logistic: 200 drawn instances of 5 attributes. Split attributes: 10, of which each teacher's "
        "instances have 2. Diabetes, breast-cancer: theta* is what the learner makes of a clean half, the teachers "
        "hold the other half.",
        "together: matching, then turns. dual, matching: a relaxation alone, its support retrained. turns: from "
        "nobody, without a relaxation. greedy: forward selection on the true risk, all data in one place.",
        "Planted: 100 instances of pure noise, 60 attributes; theta* is what 8 of them teach.",
    ),
    deviations=("All is ours: see the head of teaching/super_teaching.py for what was reconstructed and how.",),
    full_time="full form: 144 runs, about 3 minutes of one core",
    cases=cases,
    claims=(
        Claim(
            "Collaboration is necessary where attributes are split: the best teacher alone has 10 times the risk",
            lambda v: v[label_of("split attributes", ALONE)] >= 10 * v[label_of("split attributes", TOGETHER)],
        ),
        Claim(
            "It is necessary also where every teacher has instances of all kinds (ridge, logistic, diabetes)",
            both(lambda v, p: v[label_of(p, ALONE)] >= 10 * v[label_of(p, TOGETHER)], "ridge", "logistic", "diabetes"),
            comes_out=False,
        ),
        Claim(
            "Oracle-type: adaptive weights give 0 to at least 95% of the irrelevant, equal weights do not",
            lambda v: v[ADAPTIVE] <= 0.05 < v[UNWEIGHTED],
        ),
        Claim("Together all 8 relevant instances are found", lambda v: v[FOUND] >= 1.0),
        Claim(
            "Together the risk is no more than greedy selection's (ridge, logistic, diabetes)",
            both(lambda v, p: v[label_of(p, TOGETHER)] <= v[label_of(p, GREEDY)], "ridge", "logistic", "diabetes"),
            comes_out=False,
        ),
        Claim(
            "Together is faster than greedy on the logistic learner",
            lambda v: v["logistic: together, seconds"] < v["logistic: greedy, seconds"],
        ),
        Claim(
            "Together is faster than greedy on the ridge learner",
            lambda v: v["ridge: together, seconds"] < v["ridge: greedy, seconds"],
            comes_out=False,
        ),
        Claim(
            "A learner of the selected is 10 times nearer to theta* than one of all healthy instances",
            both(
                lambda v, p: 10 * v[label_of(p, TOGETHER)] <= v[label_of(p, "healthy ones")],
                "ridge",
                "logistic",
                "diabetes",
                "breast-cancer",
            ),
            comes_out=False,
        ),
        Claim(
            "The dual relaxation alone teaches: at most a tenth of everybody's risk (ridge, logistic, diabetes)",
            both(
                lambda v, p: 10 * v[label_of(p, "dual")] <= v[label_of(p, "everybody")], "ridge", "logistic", "diabetes"
            ),
            comes_out=False,
        ),
        Claim(
            "Of fourteen instances together finds a risk within 10 times the best of all subsets'",
            lambda v: v["fourteen instances: together"] <= 10 * v["fourteen instances: exhaustive"],
            comes_out=False,
        ),
    ),
    run=run,
    value=lambda outcome: float(outcome["value"]),
    figure=figure,
    found=told,
    in_percent=False,
)
