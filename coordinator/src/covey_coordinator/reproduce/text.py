"""A reproduction in words: the table of published and measured, the claims, and the report's Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from covey_coordinator.reproduce.contract import Case, Measured, Reproduction, Verdict

HEAD = ("", "published", "measured", "over seeds")


def rows(reproduction: Reproduction, cases: Sequence[Case], measured: Measured) -> list[tuple[str, str, str, str]]:
    """(case, published, mean over seeds, least to most)."""
    found = []
    for case in cases:
        low, high = measured.range(case.label)
        spread = "" if len(measured.values(case.label)) == 1 else _span(reproduction, low, high)
        mean = reproduction.shown(measured.mean(case.label))
        found.append((case.label, reproduction.shown(case.published) or "-", mean, spread))
    return found


def _span(reproduction: Reproduction, low: float, high: float) -> str:
    return f"{reproduction.shown(low)} to {reproduction.shown(high)}"


def table_lines(reproduction: Reproduction, cases: Sequence[Case], measured: Measured) -> list[str]:
    """For a terminal."""
    table = [HEAD, *rows(reproduction, cases, measured)]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEAD))]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return lines


def markdown_table(reproduction: Reproduction, cases: Sequence[Case], measured: Measured) -> str:
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---:|---:|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(reproduction, cases, measured)]
    return "\n".join(lines) + "\n"


def verdict_lines(verdicts: Sequence[Verdict]) -> list[str]:
    return [f"{verdict.sentence}: {verdict.text}" for verdict in verdicts]


def report(
    reproduction: Reproduction,
    cases: Sequence[Case],
    measured: Measured,
    verdicts: Sequence[Verdict],
    form: str,
    seconds: float,
) -> str:
    """The whole report. seconds: of computing, all runs together; of the processor's time where no TFF worker runs."""
    seeds = f"{measured.seeds} seed{'s' if measured.seeds > 1 else ''}"
    parts = [
        f"# {reproduction.title}\n",
        f"{reproduction.paper}. Published numbers: {reproduction.source}.\n",
        f"Form: {form}, {seeds}; {clock(seconds)} of computing on one core. Numbers: {reproduction.measure}.\n",
        markdown_table(reproduction, cases, measured),
        _noted(cases),
        f"{told}\n" if (told := reproduction.found(measured)) else "",
        "![Our curves](figure.png)\n",
        _listed("Claims", verdict_lines(verdicts)),
        _listed("Protocol", (f"Engine: {reproduction.engine}", *reproduction.protocol)),
        _listed("Deviations from the paper", reproduction.deviations),
        _listed("Remarks", reproduction.remarks) if reproduction.remarks else "",
    ]
    return "\n".join(part for part in parts if part)


def _noted(cases: Sequence[Case]) -> str:
    notes = [f"{case.label}: {case.note}" for case in cases if case.note]
    return "".join(f"- {note}\n" for note in notes)


def _listed(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + "".join(f"- {line}\n" for line in lines)


def clock(seconds: float) -> str:
    """'45 s', '12 min', '3.4 h'."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
