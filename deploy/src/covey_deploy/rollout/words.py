"""A rollout in words, as JSON and as a picture; and its progress on a terminal. Reads states, decides nothing."""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from typing import Optional

import click

from covey_deploy.rollout.state import Event, Opened, Phase, Stand, State, Stopping, apply, begin, stands

ORDER = (Stand.HEALTHY, Stand.TRIAL, Stand.PENDING, Stand.BAD, Stand.AWAY)
COLOURS = {
    Stand.HEALTHY: "#3a9a5b",
    Stand.TRIAL: "#8fc7a3",
    Stand.PENDING: "#c9ced6",
    Stand.BAD: "#c8473d",
    Stand.AWAY: "#eef0f3",
}


def counts(state: State, now: float) -> Counter[Stand]:
    return Counter(where for where, _ in stands(state, now).values())


def line(state: State, now: float) -> str:
    """Where it is, in one line without times."""
    ring, rings = state.ring, state.plan.rings
    if state.phase is Phase.FINISHED:
        where = "finished"
    elif state.phase in (Phase.STOPPING, Phase.STOPPED):
        where = f"{state.phase.value}: {state.reason}"
    else:
        where = f"ring {max(ring, 0) + 1} of {len(rings)}, {rings[max(ring, 0)].name}"
    found = counts(state, now)
    return f"{where}: " + ", ".join(f"{found[one]} {one.value}" for one in ORDER if found[one] or one is not Stand.AWAY)


def soaking(state: State, now: float) -> str:
    """How long the youngest of the healthy has been so; "" where there is none or nothing is waited for."""
    since = [
        device.healthy_since
        for name in state.members
        if (device := state.devices.get(name)) is not None and device.healthy_since is not None
    ]
    if state.phase is not Phase.WATCHING or not since:
        return ""
    return f", healthy for {clock(now - max(since))} of {clock(state.plan.gates.soak_s)}"


def clock(seconds: float) -> str:
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


class Progress:
    """One line that is written over on a terminal, lines for what changes elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._shown = ""

    def state(self, state: State, now: float) -> None:
        text = line(state, now)
        if self._terminal:
            click.echo(f"\r\x1b[K{text}{soaking(state, now)}", nl=False)
        elif text != self._shown:
            click.echo(f"{_time(now)}  {text}")
        self._shown = text

    def say(self, text: str) -> None:
        click.echo(f"\r\x1b[K{text}" if self._terminal else text)

    def end(self) -> None:
        if self._terminal and self._shown:
            click.echo()


def _time(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


# --- the report


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as what is in them; the last one as it comes."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def report_text(state: State, now: float) -> str:
    plan = state.plan
    rows = [("device", "ring", "stand", "version", "why")]
    for name, (where, why) in stands(state, now).items():
        device = state.devices.get(name)
        version = device.known.version if device is not None and device.known is not None else ""
        rows.append((name, ring_of(state, name), where.value, version, why))
    head = f"{plan.fleet}: release {plan.version}, {line(state, now)}"
    skipped = f"\nnot waited for: {', '.join(state.left)}" if state.left else ""
    return f"{head}\n\n{table(rows)}{skipped}" if len(rows) > 1 else head


def ring_of(state: State, device_id: str) -> str:
    """The first that has it."""
    version = state.plan.version
    return next((ring.name for ring in state.plan.rings if ring.has(version, device_id)), "")


def report_facts(state: State, now: float) -> dict[str, object]:
    """The same for programs."""
    found = stands(state, now)
    return {
        "fleet": state.plan.fleet,
        "version": state.plan.version,
        "phase": state.phase.value,
        "ring": state.plan.rings[state.ring].name if state.ring >= 0 else "",
        "rings": [ring.name for ring in state.plan.rings],
        "reason": state.reason,
        "counts": {one.value: counts(state, now)[one] for one in ORDER},
        "not_waited_for": list(state.left),
        "devices": {
            name: {"ring": ring_of(state, name), "stand": where.value, "why": why}
            for name, (where, why) in found.items()
        },
    }


# --- the picture

WIDTH, HEIGHT, LEFT, TOP, LEGEND = 720, 220, 40, 24, 26
STEPS = 240  # columns


def picture(events: Sequence[Event], now: float) -> str:
    """SVG: how many of all devices stood where over time; lines where rings opened, and where it stopped."""
    state = begin(events[0])
    start, last = state.at, len(state.plan.rings) - 1
    step_s = max(now - start, 1.0) / STEPS
    every = max(1, len(state.plan.members(last)))
    columns: list[tuple[int, ...]] = []
    left = list(events[1:])
    for column in range(STEPS):
        until = start + (column + 1) * step_s
        while left and left[0].at <= until:
            state = apply(state, left.pop(0))
        found = Counter(where for where, _ in stands(state, until, last).values())
        columns.append(tuple(found[one] for one in ORDER))
    bars = list(_bars(columns, every))
    marks = [_mark(event, start, step_s, state) for event in events]
    return "\n".join([_head(state, every), *bars, *filter(None, marks), _legend(), _ends(now - start), "</svg>\n"])


def _bars(columns: Sequence[tuple[int, ...]], every: int) -> Iterator[str]:
    """Equal columns beside each other are one."""
    width, begun = (WIDTH - LEFT) / STEPS, 0
    for found, same in itertools.groupby(columns):
        x, long, y = LEFT + begun * width, len(list(same)), float(TOP + HEIGHT)
        begun += long
        for one, count in zip(ORDER, found):
            height = HEIGHT * count / every
            y -= height
            if count:
                place = f'x="{x:.2f}" y="{y:.2f}" width="{long * width + 0.3:.2f}" height="{height:.2f}"'
                yield f'<rect {place} fill="{COLOURS[one]}"/>'


def _mark(event: Event, start: float, step_s: float, state: State) -> Optional[str]:
    if isinstance(event, Opened):
        text = state.plan.rings[event.ring].name
    elif isinstance(event, Stopping):
        text = "stopped"
    else:
        return None
    x = LEFT + min(STEPS, (event.at - start) / step_s) * (WIDTH - LEFT) / STEPS
    anchor = "end" if x > WIDTH - 80 else "start"
    return (
        f'<line x1="{x:.1f}" y1="{TOP - 4}" x2="{x:.1f}" y2="{TOP + HEIGHT}" stroke="#333" stroke-dasharray="3 3"/>'
        f'<text x="{x:.1f}" y="{TOP - 8}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _head(state: State, every: int) -> str:
    tall = TOP + HEIGHT + 2 * LEGEND
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 8} {tall}" font-family="sans-serif" '
        f'font-size="12"><title>{escape(f"{state.plan.fleet}: release {state.plan.version}")}</title>'
        f'<rect width="100%" height="100%" fill="white"/>'
        f'<text x="{LEFT - 6}" y="{TOP + 10}" text-anchor="end">{every}</text>'
        f'<text x="{LEFT - 6}" y="{TOP + HEIGHT}" text-anchor="end">0</text>'
    )


def _legend() -> str:
    y, parts = TOP + HEIGHT + 2 * LEGEND - 10, []
    for place, one in enumerate(ORDER):
        x = LEFT + 110 * place
        parts.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{COLOURS[one]}" stroke="#999"/>')
        parts.append(f'<text x="{x + 18}" y="{y}">{one.value}</text>')
    return "".join(parts)


def _ends(seconds: float) -> str:
    y = TOP + HEIGHT + 16
    return (
        f'<text x="{LEFT}" y="{y}">0:00</text><text x="{WIDTH}" y="{y}" text-anchor="end">{clock(seconds)} '
        f"after the start</text>"
    )
