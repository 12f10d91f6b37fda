"""How much could be read off a run's updates, round by round: lines for a terminal, and a page with a drawing.

From the store alone, as everything in this folder. What the measures mean: docs/privacy-gate.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from covey_coordinator.report import svg
from covey_coordinator.watching.history import Facts

DRAWN = {  # measure -> in words; all lie between 0 and 1
    "max_rank_one": "largest rank one of an update",
    "aggregate_rank_one": "rank one of the aggregate",
    "max_label_share": "largest share of one class",
    "linkability_auc": "linkability (AUC)",
    "identified": "devices recognised",
}
COUNTED = ("max_separable", "aggregate_separable")
STYLE = Markup("""body{font:16px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#1b1b1b}
table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right}.gridline{stroke:#ddd}
.tick,.axis{font-size:13px;fill:#444}.end{font-size:13px;font-weight:600}svg{max-width:100%;height:auto}""")


def leakage_lines(run: str, rounds: Sequence[Facts]) -> list[str]:
    if not rounds:
        return [f"{run}: nothing was measured"]
    lines = [f"{run}:"]
    for facts in rounds:
        parts = [f"{name} {facts[name]:.3g}" for name in (*DRAWN, *COUNTED) if name in facts]
        lines.append(f"  round {facts['number']}: {', '.join(parts)}")
    return lines


def leakage_page(run: str, rounds: Sequence[Facts]) -> str:
    """HTML that loads nothing."""
    columns = [name for name in (*DRAWN, *COUNTED) if any(name in facts for facts in rounds)]
    head = Markup("").join(svg.formatted("<th>{}</th>", name) for name in ("round", *columns))
    body = Markup("").join(
        Markup("<tr>")
        + Markup("").join(
            svg.formatted("<td>{}</td>", value)
            for value in (str(facts["number"]), *(_shown(facts.get(name)) for name in columns))
        )
        + Markup("</tr>")
        for facts in rounds
    )
    page = svg.formatted(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>{} - what updates tell</title><style>{}</style>'
        "<h1>What the updates of {} tell</h1><p>Measured without the truth, by the coordinator, in every published "
        "round. A rank one of 1 is an update that states one example, or its features; an AUC of 0.5 is chance.</p>"
        "{}<table><tr>{}</tr>{}</table></html>",
        run,
        STYLE,
        run,
        leakage_curves(rounds),
        head,
        body,
    )
    return f"{page}\n"


def leakage_curves(rounds: Sequence[Facts]) -> Markup:
    """The measures of DRAWN over rounds, one line each. Empty where nothing was measured."""
    measured = [name for name in DRAWN if any(name in facts for facts in rounds)]
    if not measured:
        return Markup("")
    width, height, left, right, top, bottom = 1040, 360, 56, 250, 14, 46
    numbers = [facts["number"] for facts in rounds]
    first, last = min(numbers), max(max(numbers), min(numbers) + 1)

    def place(number: int, value: float) -> tuple[float, float]:
        across = left + (number - first) / (last - first) * (width - left - right)
        return across, top + (1 - value) * (height - top - bottom)

    parts = [svg.opening(width, height, f"What updates tell over rounds: {', '.join(DRAWN[one] for one in measured)}")]
    parts += [svg.gridline(left, width - right, place(first, level)[1], level) for level in svg.levels(0.0)]
    parts += [svg.text(place(one, 0)[0], height - bottom + 20, str(one), "middle") for one in svg.ticks(first, last)]
    parts.append(svg.text((left + width - right) / 2, height - 6, "round", "middle", "axis"))
    ends = []
    for index, name in enumerate(measured):
        points = [place(facts["number"], facts[name]) for facts in rounds if name in facts]
        path = " ".join(f"{svg.number(across)},{svg.number(down)}" for across, down in points)
        parts.append(svg.formatted('<polyline points="{}" {}/>', path, svg.stroke(index)))
        parts += [svg.formatted('<circle cx="{}" cy="{}" r="3" fill="{}"/>', *dot, _colour(index)) for dot in points]
        ends.append((points[-1][1], index, DRAWN[name]))
    for down, index, label in svg.spread(ends, 16.0):
        parts.append(svg.text(width - right + 8, down + 4, label, "start", "end", _colour(index)))
    return Markup("").join(parts) + svg.END


def _colour(index: int) -> str:
    return svg.LINE_COLOURS[index % len(svg.LINE_COLOURS)]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
