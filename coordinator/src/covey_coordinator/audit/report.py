"""The report of an audit: one HTML file that needs nothing else, for people who treat patients and train no models.

As the other reports: everything that enters is escaped, no script, nothing is loaded. It shows people's data; its file
is for its owner's eyes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
from jinja2 import Template
from markupsafe import Markup

from covey_coordinator.audit import drawings
from covey_coordinator.audit.bench import Bench
from covey_coordinator.audit.policy import PROPERTY, RESOLVED
from covey_coordinator.audit.results import BARE, CURVES, MALICIOUS, ONE_EXAMPLE, PLAN, Pictures, Result, largest
from covey_coordinator.audit.verdict import Outcome
from covey_coordinator.report import plots
from covey_coordinator.report.html import page_environment
from covey_coordinator.report.summary import GAINS, HIDDEN

CASES = {
    PLAN: "The plan as it is",
    ONE_EXAMPLE: "The worst case: one step on one example, with the devices' protection",
    BARE: "The worst case without protection: one step on one example, neither clipped nor noised",
    MALICIOUS: "A malicious server: parameters made to be read, sent in place of the model's",
}
SETTINGS = {
    "noise_multiplier": "noise multiplier",
    "clip_norm": "clip norm, as a share of the updates' own length",
    "examples": "examples of a device in one pass",
    "epochs": "passes over the device's examples",
    "rounds": "rounds whose updates an attacker joins",
}
CURVE_CASES = {
    "noise_multiplier": "Attacked: one step on one example.",
    "clip_norm": "Attacked: one step on one example. A shorter update points the same way, and that is what tells.",
    "examples": "Attacked: one pass over so many examples; up to the model's batch size that is one step.",
    "epochs": "Attacked: so many passes over four examples.",
    "rounds": "Attacked: one step on the same example in so many rounds, each with new noise.",
}
MEANING = {
    "exposed": "almost exactly",
    "recognisable": "well enough to be recognised",
    "traces": "in traces",
    HIDDEN: "no better than somebody guesses who has no update",
}
Read = Callable[[str], Pictures | None]


def report_html(bench: Bench, request: Any, outcome: Outcome, pictures: Read) -> str:
    """The page as text. request: what was asked, `program.Request`."""
    results = outcome.results
    return _template().render(
        title=bench.bundle.manifest.name,
        data=bench.data,
        outcome=outcome,
        verdict=outcome.verdict,
        sentences=list(_sentences(outcome)),
        cases=[_case(name, results, bench, pictures) for name in CASES if _of(results, name)],
        rows=[row for name in CASES for row in _rows(results, name)],
        after=_after(results),
        properties=[one for one in _of(results, PLAN) if PROPERTY in one.metrics],
        guarantee=_guarantee(bench, _after(results).get("accuracy")),
        curves=[shown for name in SETTINGS if (shown := _curve(results, name)) is not None],
        trade_off=_trade_off(outcome),
        refused=_refused(results),
        settings=dict(_settings(bench, request)),
    )


def as_json(outcome: Outcome) -> bytes:
    """Everything in numbers."""
    told = {
        "passed": outcome.verdict.passed,
        "guess_db": outcome.guess_db,
        "limits": [
            {"name": one.name, "limit": one.limit, "measured": one.measured, "by": one.by, "kept": one.kept}
            for one in outcome.judged
        ],
        "not_measured": outcome.left_out,
        "results": outcome.results,
    }
    return msgspec.json.format(msgspec.json.encode(told), indent=1) + b"\n"


# ---- in words


def _sentences(outcome: Outcome) -> Iterator[str]:
    """What was found, without a technical word where there is another."""
    results = outcome.results
    failed = [one for one in outcome.judged if not one.kept]
    if outcome.verdict.passed:
        yield "Everything that the policy limits was measured and lies within its limits."
    else:
        yield f"{len(failed)} of {len(outcome.judged)} limits of the policy are not kept."
    for case, opening in (
        (PLAN, "From a device's update under this plan"),
        (ONE_EXAMPLE, "If a device trained on one example in one step (a hostile plan can ask for that)"),
        (BARE, "Without clipping and noise, from one step on one example"),
        (MALICIOUS, "A coordinator that sends parameters made to be read"),
    ):
        best = largest(_of(results, case), "psnr_db")
        if best is not None:
            verb = "could rebuild" if case == MALICIOUS else "an attacker could rebuild"
            comma = "" if case == MALICIOUS else ","
            yield f"{opening}{comma} {verb} an example {MEANING[exposure(best)]} ({_by(best)})."
    labels = [one for one in _of(results, PLAN) if "label_recovery" in one.metrics]
    if labels:
        best = max(labels, key=lambda one: one.metrics["label_recovery"])
        yield f"Up to {best.metrics['label_recovery']:.0%} of the labels of a device can be read off its update."
    linked = largest(_of(results, PLAN), "linkability_auc")
    if linked is not None:
        yield (
            f"Updates of one device can be told from those of others over rounds with an AUC of "
            f"{linked.metrics['linkability_auc']:.2f}; guessing has 0.5. The coordinator knows the sender anyway."
        )
    member = largest(_of(results, PLAN), "membership_auc")
    if member is not None:
        yield (
            f"Whoever holds the finished model and an example can tell whether it was trained on with an AUC of "
            f"{member.metrics['membership_auc']:.2f}; guessing has 0.5."
        )
    told = largest(_of(results, PLAN), PROPERTY)
    if told is not None:
        yield (
            f"Whether a device's data have something in common that has nothing to do with the task can be told from "
            f"its updates with an AUC of {told.metrics[PROPERTY]:.2f}; guessing has 0.5."
        )
    if outcome.left_out:
        left = len(outcome.left_out)
        yield f"{left} measurements did not fit the time and are named below. Not measured is not safe."


def exposure(result: Result) -> str:
    """How much closer than a guess without an update: the words of the demo's report."""
    gain = result.metrics["psnr_db"] - result.metrics["guess_db"]
    return next((name for least, name in GAINS if gain >= least), HIDDEN)


def _by(result: Result) -> str:
    return f"{result.metrics['psnr_db']:.1f} dB by {result.name}, a guess has {result.metrics['guess_db']:.1f}"


# ---- pictures


def _of(results: Sequence[Result], case: str) -> list[Result]:
    return [one for one in results if one.case == case and not one.refused]


def _case(name: str, results: Sequence[Result], bench: Bench, read: Read) -> dict[str, Any]:
    """Of every attack that recovers inputs the update on which it came closest."""
    shown = []
    for attack in dict.fromkeys(one.name for one in _of(results, name) if one.pictures):
        best = largest((one for one in _of(results, name) if one.name == attack and one.pictures), "psnr_db")
        pictures = None if best is None else read(best.key)
        if best is not None and pictures is not None and len(pictures.truth):
            shown.append(_shown(best, pictures, bench))
    return {"title": CASES[name], "attacks": shown}


def _shown(best: Result, pictures: Pictures, bench: Bench) -> dict[str, Any]:
    bounds, shape = bench.data.input_range, pictures.truth.shape[1:]
    as_picture = plots.is_picture(shape)
    pairs = [
        (plots.picture(truth, bounds), plots.picture(found, bounds)) if as_picture else (Markup(""), Markup(""))
        for truth, found in zip(pictures.truth, pictures.found)
    ]
    return {
        "result": best,
        "exposure": exposure(best),
        "as_picture": as_picture,
        "pairs": pairs,
        "numbers": [] if as_picture else _numbers(pictures),
    }


def _numbers(pictures: Pictures) -> list[tuple[int, float, float]]:
    """Of a table: the features of the example that came out best, true and recovered."""
    truth, found = (np.asarray(one[0], np.float64).reshape(-1) for one in (pictures.truth, pictures.found))
    return [(place, float(true), float(said)) for place, (true, said) in enumerate(zip(truth, found))][
        : plots.MAX_FEATURES
    ]


# ---- tables


OVER_ROUNDS = (
    "accuracy",
    "linkability",
    "membership",
    "property",
)  # how the names begin of what has a section of its own


def _rows(results: Sequence[Result], case: str) -> list[dict[str, Any]]:
    """One per attack: its best over the updates, and labels and resolution as means."""
    found = []
    for attack in dict.fromkeys(one.name for one in _of(results, case) if not one.name.startswith(OVER_ROUNDS)):
        group = [one for one in _of(results, case) if one.name == attack]
        found.append(
            {
                "case": case,
                "attack": attack,
                "sees": group[0].sees,
                "updates": len(group),
                "examples": sorted({one.examples for one in group}),
                "psnr_db": _most(group, "psnr_db"),
                "ssim": _most(group, "ssim"),
                "mse": min((one.metrics["mse"] for one in group if "mse" in one.metrics), default=math.nan),
                "labels": _mean(group, "label_recovery"),
                "identified": _mean(group, "identified"),
                "clear_share": _mean(group, "clear_share"),
                "resolved": _mean(group, RESOLVED),
                "seconds": sum(one.seconds for one in group),
                "cut": any(one.cut for one in group),
                "notes": list(dict.fromkeys(note for one in group for note in one.notes)),
            }
        )
    return found


def _most(group: Sequence[Result], metric: str) -> float:
    return max((one.metrics[metric] for one in group if metric in one.metrics), default=math.nan)


def _mean(group: Sequence[Result], metric: str) -> float:
    values = [one.metrics[metric] for one in group if metric in one.metrics]
    return sum(values) / len(values) if values else math.nan


def _after(results: Sequence[Result]) -> dict[str, Result]:
    """What is told of the fleet over rounds and of the finished model, by what."""
    found = {}
    for name in OVER_ROUNDS:
        best = next((one for one in _of(results, PLAN) if one.name.startswith(name)), None)
        if best is not None:
            found[name] = best
    return found


def _guarantee(bench: Bench, accuracy: Result | None) -> str:
    privacy, rounds = bench.settings.privacy, bench.settings.fleet.rounds
    if not privacy.noise_multiplier:
        return "none: without noise there is no epsilon"
    if accuracy is None:
        return "not computed"
    whom = (
        "all of a device's data, against the coordinator"
        if privacy.by == "device"
        else (
            "whether a device takes part, against those who see models; the coordinator sees the updates without noise"
        )
    )
    return f"epsilon {accuracy.metrics['epsilon']:.3g} at delta {privacy.delta:g} after {rounds} rounds: {whom}"


def _refused(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Attacks that cannot be made on this model, and why."""
    return list(dict.fromkeys((one.name, one.refused) for one in results if one.refused))


def _settings(bench: Bench, request: Any) -> Iterator[tuple[str, str]]:
    told = bench.settings
    for table in ("training", "privacy", "fleet", "property"):
        for name, value in msgspec.to_builtins(getattr(told, table)).items():
            yield f"{table}.{name}", str(value)
    if told.wire.compression != "none":
        yield "wire.compression", told.wire.compression
    yield "seed", str(bench.seed)
    yield "level", f"{request.level.name}, {request.minutes:g} minutes"


# ---- trade-offs


def _points(results: Sequence[Result], name: str) -> dict[float, list[Result]]:
    points: dict[float, list[Result]] = {}
    for one in results:
        if one.case == CURVES and one.curve == name and not one.refused:
            points.setdefault(one.at, []).append(one)
    return dict(sorted(points.items()))


def _curve(results: Sequence[Result], name: str) -> dict[str, Any] | None:
    points = _points(results, name)
    if len(points) < 2:
        return None
    at = list(points)
    leaks = [
        drawings.Line(2, "closest copy by any attack", _values(points, "psnr_db")),
        drawings.Line(0, "a guess without any update", _values(points, "guess_db")),
    ]
    shares = [
        drawings.Line(1, "accuracy of the model", _values(points, "accuracy")),
        drawings.Line(4, "labels read", _values(points, "label_recovery")),
        drawings.Line(3, "resolved (Tarantola)", _values(points, RESOLVED)),
        drawings.Line(5, "a property told (AUC, 50% is guessing)", _values(points, PROPERTY)),
    ]
    return {
        "title": SETTINGS[name],
        "told": CURVE_CASES[name],
        "lines": [line for line in (*leaks, *shares) if any(value is not None for value in line.values)],
        "leaks": drawings.over_setting(SETTINGS[name], at, leaks, shares=False),
        "shares": drawings.over_setting(SETTINGS[name], at, shares, shares=True),
    }


def _values(points: dict[float, list[Result]], metric: str) -> list[float | None]:
    """The largest of any attack; PSNR above 60 dB is drawn as 60: both are the same picture."""
    found = [largest(group, metric) for group in points.values()]
    values = [None if one is None else one.metrics[metric] for one in found]
    return [min(value, 60.0) if metric == "psnr_db" and value is not None else value for value in values]


def _trade_off(outcome: Outcome) -> Any:
    groups = []
    for number, name in ((2, "noise_multiplier"), (1, "examples"), (4, "epochs"), (3, "rounds")):
        points = _points(outcome.results, name)
        both = zip(points, _values(points, "accuracy"), _values(points, "psnr_db"))
        group = [(at, accuracy, leak) for at, accuracy, leak in both if accuracy is not None and leak is not None]
        if group:
            groups.append((number, SETTINGS[name], group))
    return {"drawing": drawings.trade_off(groups, outcome.guess_db), "groups": groups}


@lru_cache(maxsize=1)
def _template() -> Template:
    return page_environment("covey_coordinator.audit").get_template("audit.html.jinja")
