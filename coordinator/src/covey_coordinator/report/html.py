"""Writes the report of a demo: one HTML file that needs nothing else, not even a network.

The template lies beside this file as package data. Everything that is put into it is escaped; a content security
policy in the page forbids scripts and outside resources as a second fence.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from covey_coordinator.records import ACCEPTED, MISSING, REJECTED, DemoRecord, InversionRecord
from covey_coordinator.report import plots, summary
from covey_edge.files import write_atomic

EXPOSURE_WORDS = {
    summary.EXPOSED: "Exposed",
    summary.RECOGNISABLE: "Recognisable",
    summary.TRACES: "Traces are left",
    summary.HIDDEN: "Hidden from this attack",
}


def write_report(path: str | Path, record: DemoRecord) -> None:
    """Writes the report to `path`, whole or not at all (an older report stays until the new one is on disk).

    Raises StorageError if the file cannot be written (disk full, folder not writable).
    """
    write_atomic(Path(path), render(record).encode("utf-8"))


def render(record: DemoRecord) -> str:
    """The page as text. Renders odd records too: no runs, no rounds, nothing measured, no inversion check."""
    devices = summary.device_ids(record)
    return _template().render(
        record=record,
        sentences=summary.sentences(record),
        rows=summary.run_rows(record),
        curves=plots.accuracy_curves(record.runs),
        runs=[_run(run, devices) for run in record.runs],
        shards=plots.class_bars(dict(record.shard_counts), devices, record.class_names),
        inversion=_inversion(record.inversion, record.class_names) if record.inversion is not None else None,
        statuses=(ACCEPTED, REJECTED, MISSING),
    )


def _run(run: Any, devices: list[str]) -> dict[str, Any]:
    grid = summary.statuses(run, devices)
    return {
        "title": run.title,
        "corrupted": list(run.corrupted),
        "grid": plots.verdict_grid(run, grid),
        "detection": summary.detection(run),
        "not_drawn": max(0, len(run.rounds) - plots.MAX_CELLS_ACROSS),
        "events": summary.rejections_and_absences(run),
        "notes": [(finished.number, finished.outcome, finished.note) for finished in run.rounds if finished.note],
    }


def _inversion(inversion: InversionRecord, class_names: Any) -> dict[str, Any]:
    as_picture = plots.is_picture(inversion.truth.shape)
    attempts = []
    for attempt in inversion.reconstructions:
        exposure = summary.exposure(inversion, attempt)
        attempts.append(
            {
                "title": attempt.title,
                "picture": plots.picture(attempt.image, inversion.input_range) if as_picture else "",
                "psnr_db": attempt.psnr_db,
                "label": plots.class_name(class_names, attempt.label),
                "label_is_right": attempt.label == inversion.true_label,
                "label_was_read": attempt.label is not None,
                "resolved": attempt.resolved,
                "exposure": exposure,
                "words": EXPOSURE_WORDS[exposure],
            }
        )
    return {
        "record": inversion,
        "as_picture": as_picture,
        "truth": plots.picture(inversion.truth, inversion.input_range) if as_picture else "",
        "bars": "" if as_picture else plots.feature_bars(inversion),
        "true_label": plots.class_name(class_names, inversion.true_label),
        "numbers": math.prod(inversion.truth.shape),
        "blind_db": summary.blind_psnr(inversion),
        "attempts": attempts,
        "meaning": _meaning(inversion, as_picture),
    }


def _meaning(inversion: InversionRecord, as_picture: bool) -> list[str]:
    """What the pictures mean, for a reader who treats patients and does not train models."""
    thing = "picture" if as_picture else "record"
    if not inversion.reconstructions:
        return ["No reconstruction was tried."]
    by_name = [(attempt, summary.exposure(inversion, attempt)) for attempt in inversion.reconstructions]
    seen = {
        summary.EXPOSED: f"rebuild the {thing} almost exactly",
        summary.RECOGNISABLE: f"rebuild a recognisable copy of the {thing}",
        summary.TRACES: f"rebuild only traces of the {thing}",
        summary.HIDDEN: f"not rebuild the {thing}",
    }[by_name[0][1]]
    first = (
        f"A device never sends its data, only the change its training made to the model. This check asks what that "
        f"change gives away. Whoever runs the coordinator could {seen} from the change as it was sent"
    )
    label = inversion.reconstructions[0].label == inversion.true_label
    said = [f"{first}, and read off its label." if label else f"{first}."]
    clipped = [name for attempt, name in by_name if attempt.clip_norm is not None and not attempt.noise_multiplier]
    if clipped and clipped[0] in (summary.EXPOSED, summary.RECOGNISABLE):
        said.append(
            f"Clipping limits how far one device can move the model. It does not hide the {thing}: a shorter change "
            f"points in the same direction, and the direction is what gives the {thing} away."
        )
    noisy = [(attempt, name) for attempt, name in by_name if attempt.noise_multiplier]
    hiding = [attempt.noise_multiplier for attempt, name in noisy if name == summary.HIDDEN]
    if hiding:
        least = min(multiplier for multiplier in hiding if multiplier)
        said.append(
            f"Random noise does hide it: from a noise multiplier of {least:g} on, this attack finds hardly more than a "
            "guess without any update. The price of noise is accuracy, or more devices to average over."
        )
        still = [a for a, name in noisy if name == summary.HIDDEN and a.label == inversion.true_label]
        if still:
            said.append(
                f"The label was still right for {len(still)} of the {len(hiding)} updates whose {thing} was hidden: it "
                "can survive noise that hides the rest, and it can be right by chance."
            )
    elif noisy:
        said.append("None of the noise levels tried here hides it from this attack.")
    return said


@lru_cache(maxsize=1)
def _template() -> Template:
    return page_environment().get_template("report.html.jinja")


def page_environment(*packages: str) -> Environment:
    """Templates of these packages, then of this one: everything that is put into a page is escaped and printable."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "templates") for package in (*packages, __package__)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters.update(percent=summary.percent, points=summary.points, decibels=summary.decibels)
    environment.globals.update(
        swatch=plots.swatch,
        status_sample=plots.status_sample,
        class_swatch=plots.class_swatch,
        class_name=plots.class_name,
        isfinite=math.isfinite,
    )
    return environment


def _finalize(value: Any) -> Any:
    """Every plain text that leaves the template is made printable; our own drawings (Markup) pass."""
    return summary.printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
