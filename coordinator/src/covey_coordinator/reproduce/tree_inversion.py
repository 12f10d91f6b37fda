"""Fredrikson et al. 2015, section 4: a sensitive answer read off a decision tree, and where the tree may ask for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from covey_coordinator.grid.simulation import stream
from covey_coordinator.inversion import tree_inversion as inversion
from covey_coordinator.inversion.tree_inversion import Floats, Integers, Person
from covey_coordinator.reproduce import data
from covey_coordinator.reproduce.contract import Case, Claim, Measured, Outcome, Reproduction, Values
from covey_coordinator.reproduce.pictures import STYLES, new_figure, plain, png

TABLE, PARTS = 71, 72  # streams of random numbers of one seed
DEPTH, MIN_LEAF = 6, 2
BASELINE, BLACK, WHITE, IDEAL, TREE = "baseline", "black box", "white box", "ideal", "the tree itself"
PRIORITIES = tuple(range(DEPTH + 1))  # DEPTH: never
SURVEY, GENERAL = "survey", "survey, rare answer"


class Table(NamedTuple):
    """x (n, d), y (n,) from 0. sensitive: its column, of values 0 .. values - 1; positive: the one to be found."""

    x: Floats
    y: Integers
    sensitive: int
    values: int
    positive: int


def survey(seed: int, size: int, rate: float, effect: float) -> Table:
    """A made-up survey with the published size and share of the sensitive answer. All else is ours.

    Ten other answers of 2 to 6 values, some of which go with the sensitive one; the class (of 5, as how a steak is
    liked) depends on three of them and, by `effect`, on the sensitive answer.
    """
    random = stream(seed, TABLE)
    secret = (random.random(size) < rate).astype(np.int64)
    kinds = (2, 4, 5, 5, 6, 2, 2, 2, 3, 4)
    columns = [random.integers(0, kind, size) for kind in kinds]
    for place in (5, 6, 7):  # smoking, drinking, gambling go with it a little
        columns[place] = (random.random(size) < 0.4 + 0.25 * secret).astype(np.int64)
    x = np.column_stack([secret, *columns]).astype(np.float64)
    liking = 0.5 * columns[1] - 0.4 * columns[2] + 0.6 * columns[5] + effect * secret + random.normal(0, 0.5, size)
    y = np.digitize(liking, np.quantile(liking, (0.1, 0.4, 0.7, 0.9)))
    return Table(x, y.astype(np.int64), 0, 2, 1)


def abalone(folder: Path | None) -> Table:
    """Is a shell older than the median (more than 9 rings)? Sensitive: its sex, of which infants are to be found."""
    table, rings = data.regression_table(folder, "abalone.csv")
    x = table.copy()
    x[:, 0] -= 1  # M, F, I
    return Table(x, (rings > 9).astype(np.int64), 0, 3, 2)


def spam(folder: Path | None, seed: int) -> Table:
    """Is a mail spam? Sensitive: whether it names George, to whom this mail went."""
    train, test = data.spambase(folder, seed)
    x = np.concatenate([train.x, test.x]).astype(np.float64)
    column = 26  # word_freq_george
    x[:, column] = x[:, column] > x[:, column].min()
    return Table(x, np.concatenate([train.y, test.y]).astype(np.int64), column, 2, 1)


def tumours() -> Table:
    """Is a tumour benign? Sensitive: whether its mean texture is above the third quartile; all features in tens."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    tens = np.column_stack([np.digitize(one, np.quantile(one, np.arange(1, 10) / 10)) for one in x.T]).astype(
        np.float64
    )
    tens[:, 1] = x[:, 1] > np.quantile(x[:, 1], 0.75)
    return Table(tens, y.astype(np.int64), 1, 2, 1)


TABLES: dict[str, Callable[[int, Path | None], Table]] = {
    SURVEY: lambda seed, folder: survey(seed, 332, 0.171, 1.5),
    GENERAL: lambda seed, folder: survey(seed, 5000, 0.198, 0.4),
    "abalone": lambda seed, folder: abalone(folder),
    "spambase": lambda seed, folder: spam(folder, seed),
    "breast cancer": lambda seed, folder: tumours(),
}
PUBLISHED = {
    SURVEY: {WHITE: 0.864, BLACK: 0.858, BASELINE: 0.829, IDEAL: 0.998},
    GENERAL: {WHITE: 0.803, BLACK: 0.800, BASELINE: 0.802},
}
EVERYWHERE = (SURVEY, GENERAL, "abalone", "spambase", "breast cancer")
SURVEYS = (SURVEY, GENERAL)
QUICK = (SURVEY, GENERAL, "breast cancer")


def label_of(table: str, attack: str, priority: int | None = None) -> str:
    where = "" if priority is None else f", asked {'never' if priority >= DEPTH else f'at depth {priority}'}"
    return f"{table}{where}: {attack}"


def cases(quick: bool) -> Sequence[Case]:
    found = []
    for table in QUICK if quick else EVERYWHERE:
        for attack in (BASELINE, BLACK, WHITE, IDEAL, TREE):
            published = PUBLISHED.get(table, {}).get(attack)
            found.append(Case(label_of(table, attack), {"table": table, "attack": attack, "priority": None}, published))
        for priority in PRIORITIES:
            for attack in (WHITE, TREE):
                settings = {"table": table, "attack": attack, "priority": priority}
                found.append(Case(label_of(table, attack, priority), settings))
    return found


def run(settings: dict[str, Any], seed: int, folder: Path | None) -> Outcome:
    """value: accuracy of the guesses about the training examples; of the tree, on a held-out quarter.

    precision, recall: of the value to be found. outside: the same accuracy about people the tree was not trained on.
    """
    started = time.process_time()
    table = TABLES[settings["table"]](seed, folder)
    order = stream(seed, PARTS).permutation(len(table.y))
    held, rows = np.split(order, [len(order) // 4])
    outcome = judged(table, rows, held, settings["attack"], settings["priority"], seed)
    return {**outcome, "seconds": round(time.process_time() - started, 3)}


def judged(table: Table, rows: Integers, held: Integers, attack: str, priority: int | None, seed: int) -> Outcome:
    x, y = table.x[rows], table.y[rows]
    prior = inversion.marginal(x[:, table.sensitive], table.values)
    inside = Person(x, y, table.sensitive)
    outside = Person(table.x[held], table.y[held], table.sensitive)
    if attack == BASELINE:
        return told(table, inversion.mode(inside, prior), inside, inversion.mode(outside, prior), outside)
    if attack == IDEAL:
        guess = inversion.ideal(x, y, table.sensitive, seed)
        return told(table, guess, inside, inversion.mode(outside, prior), outside)
    tree = inversion.grow(
        x, y, max_depth=DEPTH, min_leaf=MIN_LEAF,
        sensitive=None if priority is None else table.sensitive, priority=priority,
    )  # fmt: skip
    if attack == TREE:
        return {"value": float((tree.predict(outside.x) == outside.y).mean())}
    if attack == WHITE:
        guesses = [inversion.white_box(tree, one, prior) for one in (inside, outside)]
    else:
        errors = inversion.confusion(tree, x, y)
        guesses = [inversion.black_box(tree, one, prior, errors) for one in (inside, outside)]
    return told(table, guesses[0], inside, guesses[1], outside)


def told(table: Table, guess: Integers, inside: Person, other: Integers, outside: Person) -> Outcome:
    found, beyond = (
        inversion.judged(one, people.x[:, table.sensitive].astype(np.int64), table.positive)
        for one, people in ((guess, inside), (other, outside))
    )
    precision = None if np.isnan(found.precision) else found.precision
    return {"value": found.accuracy, "precision": precision, "recall": found.recall, "outside": beyond.accuracy}


def figure(cases: Sequence[Case], measured: Measured) -> bytes:
    """By table: what the white box finds and how good the tree is, against the depth it may ask for the secret at."""
    tables = [name for name in TABLES if label_of(name, BASELINE) in measured.outcomes]
    image, axes = new_figure(len(tables), size=(3.4, 3.2))
    marks = [str(one) for one in PRIORITIES[:-1]] + ["never"]
    for one, name in zip(axes[0], tables):
        for (colour, dashes), attack in zip(STYLES[1:], (WHITE, TREE)):
            labels = [label_of(name, attack, priority) for priority in PRIORITIES]
            means = [measured.mean(label) for label in labels]
            spans = np.array([measured.range(label) for label in labels]).T
            one.plot(marks, means, color=colour, linestyle=dashes, label=f"accuracy of {attack}")
            one.fill_between(marks, *spans, color=colour, alpha=0.15, linewidth=0)
        one.axhline(measured.mean(label_of(name, BASELINE)), color="#666666", linewidth=1, label="baseline")
        one.set_title(name, fontsize=9, loc="left", weight="bold")
        one.set_xlabel("depth at which the tree may ask", fontsize=8)
        one.set_ylim(0, 1.02)
        one.tick_params(labelsize=7)
        plain(one)
    axes[0][0].legend(fontsize=7, frameon=False)
    return png(image)


def found(measured: Measured) -> str:
    parts = []
    for name in TABLES:
        if (label := label_of(name, WHITE)) in measured.outcomes:
            outcomes = measured.outcomes[label]
            precise = [one["precision"] for one in outcomes if one["precision"] is not None]
            precision = f"{100 * np.mean(precise):.0f}%" if precise else "never guessed"
            recall, outside = (100 * np.mean([one[key] for one in outcomes]) for key in ("recall", "outside"))
            parts.append(f"{name} precision {precision}, recall {recall:.0f}%, of others {outside:.1f}% right")
    return f"White box, of the value to be found: {'; '.join(parts)}."


def above(values: Values, table: str, attack: str, priority: int | None = None) -> float:
    return values[label_of(table, attack, priority)] - values[label_of(table, BASELINE)]


def everywhere(values: Values, holds: Callable[[str], bool]) -> bool:
    """On all tables that ran; KeyError where not even the quick form's did."""
    return all(holds(name) for name in TABLES if name in QUICK or label_of(name, BASELINE) in values)


TREE_INVERSION = Reproduction(
    name="tree-inversion",
    title="A sensitive answer read off a decision tree, and at which depth the tree may ask for it",
    paper="Fredrikson, Jha, Ristenpart 2015, Model Inversion Attacks that Exploit Confidence Information (CCS 2015)",
    source="section 4, FiveThirtyEight's steak survey and the General Social Survey, from memory of the paper; the "
    "surveys could not be had, so that our numbers cannot agree, only their order",
    engine="covey_coordinator.inversion.tree_inversion: CART of our own, whose leaves hold counts",
    measure="accuracy of the guesses about the training examples; of the tree itself, on a held-out quarter",
    protocol=(
        "survey: 332 made-up people, a sensitive yes of 17.1%, five classes; survey, rare answer: 5,000 with 19.8%, on "
        "which the class depends less. Sizes and shares are the published ones, all else is ours.",
        "abalone: sex, of three values, from a tree for more than 9 rings. spambase: whether a mail names George, from "
        "a tree for spam. breast cancer: texture above the third quartile, from a tree for benign tumours.",
        f"Trees of depth {DEPTH} on three quarters of the examples. The attacker knows all else and the class.",
        "ideal: a tree trained on the sensitive feature itself. baseline: its most frequent value for everybody.",
        "Depth at which the tree may ask: only there may it split on the sensitive feature, and does where that helps.",
    ),
    deviations=(
        "Other data: the published surveys could not be had.",
        "How the white box shares out a leaf that allows several values is our reading of the paper.",
    ),
    full_time="full form: 285 runs, a minute of computing (measured)",
    cases=cases,
    claims=(
        Claim(
            "The white box with counts is better than the most frequent value, on both surveys",
            lambda v: all(above(v, name, WHITE) > 0 for name in SURVEYS),
        ),
        Claim(
            "The white box with counts is better than the most frequent value, on every table",
            lambda v: everywhere(v, lambda name: above(v, name, WHITE) > 0),
            comes_out=False,
        ),
        Claim(
            "The white box with counts is at least as good as the black box, on both surveys",
            lambda v: all(above(v, name, WHITE) >= above(v, name, BLACK) for name in SURVEYS),
        ),
        Claim(
            "A tree that asks first leaks more than one that asks last (survey)",
            lambda v: above(v, SURVEY, WHITE, 0) > above(v, SURVEY, WHITE, DEPTH - 1),
        ),
        Claim(
            "A tree that asks first leaks more than one that asks last, on every table",
            lambda v: everywhere(v, lambda name: above(v, name, WHITE, 0) > above(v, name, WHITE, DEPTH - 1)),
            comes_out=False,
        ),
        Claim(
            "A tree that never asks tells no more than the most frequent value, on every table",
            lambda v: everywhere(v, lambda name: above(v, name, WHITE, DEPTH) <= 1e-9),
        ),
        Claim(
            "Asking last costs the tree at most 3 points of accuracy against asking first, on every table",
            lambda v: everywhere(
                v, lambda name: v[label_of(name, TREE, DEPTH - 1)] >= v[label_of(name, TREE, 0)] - 0.03
            ),
            comes_out=False,
        ),
    ),
    run=run,
    value=lambda outcome: float(outcome["value"]),
    figure=figure,
    found=found,
    needs=("abalone.csv", "spambase.csv"),
)
