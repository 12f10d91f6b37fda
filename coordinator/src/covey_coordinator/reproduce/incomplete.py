"""Incomplete data: users of most devices hide attributes, not at random. No paper ran it; the protocol is ours."""

from __future__ import annotations

from collections.abc import Sequence

from covey_coordinator.reproduce.contract import Case, Claim, Measured, Reproduction, Values
from covey_coordinator.reproduce.pictures import STYLES, new_figure, plain, png
from covey_coordinator.reproduce.standings import (
    CLEAN,
    COMT,
    TRUSTED,
    Place,
    case,
    gaps,
    label,
    matrix,
    place,
    run,
    value,
)

FRACTIONS = (0.3, 0.5, 0.7, 0.9)
POOLED, DEVICES = "trusted + noisy", "devices only"
METHODS = (CLEAN, TRUSTED, DEVICES, POOLED, "weighted", "best devices", "geometric median", "FLTrust", COMT)
BUDGET, QUICK_BUDGET = 12, 8
SHAPE = {"devices": 10, "attributes": 0.5}
NEAR = 0.01


def hiding(data: str, appear: str, fraction: float) -> Place:
    """20 trusted instances; `appear`: what stands in the place of hidden values (`majority`)."""
    return place(
        f"{data}, {appear}, {fraction:.0%} hide", data, "hidden", 20, corrupted=fraction, appear=appear, **SHAPE
    )


CURVES = [hiding(data, "mean", fraction) for data in ("abalone", "breast-cancer") for fraction in FRACTIONS]
OTHERS = [hiding("abalone", "zero", 0.7), hiding("abalone", "missing", 0.7), hiding("spambase", "mean", 0.7)]
QUICK = (hiding("abalone", "mean", 0.3), hiding("abalone", "mean", 0.7))


def cases(quick: bool) -> Sequence[Case]:
    places, budget = (QUICK, QUICK_BUDGET) if quick else ((*CURVES, *OTHERS), BUDGET)
    return [case(where, method, budget) for where in places for method in METHODS]


def figure(cases: Sequence[Case], measured: Measured) -> bytes:
    """Number over the share of devices that hide, a panel per table; the band is least to most over seeds."""
    del cases
    tables = [name for name in ("abalone", "breast-cancer") if any(one.startswith(name) for one in measured.outcomes)]
    picture, axes = new_figure(len(tables))
    for table, one in zip(tables, axes[0]):
        for number, method in enumerate(METHODS):
            names = {100 * share: label(hiding(table, "mean", share).name, method) for share in FRACTIONS}
            there = {percent: name for percent, name in names.items() if name in measured.outcomes}
            colour, dashes = STYLES[number % len(STYLES)]
            width = 2.6 if method in (TRUSTED, COMT) else 1.3
            means = [measured.mean(name) for name in there.values()]
            one.plot(list(there), means, color=colour, linestyle=dashes, linewidth=width, label=method)
            if method in (TRUSTED, COMT) and there:
                low, high = zip(*(measured.range(name) for name in there.values()))
                one.fill_between(list(there), low, high, color=colour, alpha=0.12, linewidth=0)
        one.set_title(table, fontsize=10, loc="left", weight="bold")
        one.set_xlabel("devices that hide, %", fontsize=9)
        one.set_ylabel("R2" if table == "abalone" else "AUC", fontsize=9)
        plain(one)
    axes[0][-1].legend(fontsize=7, frameon=False)
    return png(picture)


def told(measured: Measured) -> str:
    return f"{matrix(measured)}\nPaired over seeds:\n\n{gaps(measured)}"


def of(values: Values, fraction: float, method: str, data: str = "abalone") -> float:
    return values[label(hiding(data, "mean", fraction).name, method)]


INCOMPLETE = Reproduction(
    name="incomplete-data",
    title="Users of 30% to 90% of the devices hide attributes, where these would tell most",
    paper="none: an experiment of ours",
    source="none",
    engine="numpy: teaching/baselines.py and teaching/reference.py; the geometric median is covey's rule",
    measure="R2 (abalone) or AUC (breast-cancer, spambase) on complete test instances, settings tuned on the "
    "validation set",
    protocol=(
        "60% of the table on 10 devices in equal shares; 10% complete validation; 20 trusted, complete instances, two "
        "with each device; the rest is the test set. Features in [-1, 1] and a 1.",
        "On 30%, 50%, 70% or 90% of the devices the user hides, in the half of the attributes that are most correlated "
        "with the target there, every value above the device's own median: what is hidden depends on its value.",
        "What stands in its place: the mean of the device's shown values (`mean`), the middle of the scale (`zero`), "
        "or the trusted instances' mean and a column that says so (`missing`).",
        f"Every method tries {BUDGET} settings (quick: {QUICK_BUDGET}), as in `comt`.",
    ),
    deviations=("Nothing is published that this could deviate from.",),
    full_time="full form: 10 seeds; about 20 minutes of one core (scaled)",
    cases=cases,
    claims=(
        Claim(
            f"While 30% hide, all instances together beat the trusted ones alone by more than {NEAR} (abalone)",
            lambda v: of(v, 0.3, POOLED) > of(v, 0.3, TRUSTED) + NEAR,
        ),
        Claim(
            "When 70% hide, they no longer do (abalone)",
            lambda v: of(v, 0.7, POOLED) <= of(v, 0.7, TRUSTED) + NEAR,
        ),
        Claim(
            "When 70% hide, a tuned weight of the devices, or choosing devices by trusted loss, still is no worse than "
            "the trusted instances alone (abalone)",
            lambda v: min(of(v, 0.7, "weighted"), of(v, 0.7, "best devices")) >= of(v, 0.7, TRUSTED),
        ),
        Claim(
            f"When 70% hide, CoMT is above tuned trusted-only by more than {NEAR} (abalone)",
            lambda v: of(v, 0.7, COMT) > of(v, 0.7, TRUSTED) + NEAR,
        ),
        Claim(
            "When 70% hide, nothing simple is above CoMT (abalone)",
            lambda v: of(v, 0.7, COMT) >= max(of(v, 0.7, method) for method in METHODS if method not in (CLEAN, COMT)),
            comes_out=False,
        ),
        Claim(
            "On breast cancer hiding costs little: with 90% of the devices, all together lose less than 0.03",
            lambda v: of(v, 0.9, POOLED, "breast-cancer") > of(v, 0.9, CLEAN, "breast-cancer") - 0.03,
        ),
    ),
    run=run,
    value=value,
    figure=figure,
    found=told,
    needs=("abalone.csv", "spambase.csv"),
    seeds=10,
    in_percent=False,
)
