"""What `covey serve` shows: a live status on a terminal, plain lines otherwise."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from covey_coordinator.records import FleetMetric
from covey_coordinator.watching.board import Board, DeviceLine, RoundLine, State

REFRESH_PER_S = 4
MOST_DEVICES = 30  # lines; a terminal scrolls no live picture


@contextlib.contextmanager
def live_status(board: Board, console: Console) -> Iterator[Callable[[str], None]]:
    """Show the board until the end of the with block; gives what prints a line above it.

    A thread of rich's draws it. Logs come above it, too, where standard error is a terminal.
    """
    live = Live(
        get_renderable=lambda: render(board.state(), time.monotonic()),
        console=console,
        refresh_per_second=REFRESH_PER_S,
        redirect_stdout=False,
        redirect_stderr=sys.stderr.isatty(),
    )
    with live:
        yield lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)


def render(state: State, now: float) -> Group:
    """The whole picture at the time `now` (that of the board)."""
    parts: list[Text | Table] = [Text(headline(state, now), style="bold"), _devices(state, now)]
    parts += [Text(printable(line)) for last in state.last for line in _round(last)]
    return Group(*parts)


def headline(state: State, now: float) -> str:
    """Run, round k of n, phase, deadline left; or what is waited for."""
    if not state.run:
        return "starting"
    head = f"{state.fleet}/{state.run}"
    if state.phase:
        left_s = max(0.0, state.deadline_at - now)
        what = "evaluation of round" if state.evaluates else "round"
        return f"{head}  {what} {state.number} of {state.rounds}  {state.phase}  {duration(left_s)} left"
    if len(state.runs) > 1:
        done = ", ".join(f"{run} {line.done} of {line.rounds}" for run, line in state.runs.items())
        return f"{state.fleet}  rounds done: {done}  {state.waits}".rstrip()
    return f"{head}  {state.done} of {state.rounds} rounds done  {state.waits}".rstrip()


def _devices(state: State, now: float) -> Table:
    online = sum(line.online for line in state.devices.values())
    table = Table(title=f"devices: {online} of {len(state.devices)} online", title_justify="left", box=None)
    for column in ("device", "state", "received", "last heard"):
        table.add_column(column, justify="left", no_wrap=True)
    for device_id, line in list(state.devices.items())[:MOST_DEVICES]:
        table.add_row(Text(device_id), _state(line), _received(line), _heard(line, now))
    hidden = len(state.devices) - MOST_DEVICES
    if hidden > 0:
        table.add_row(f"and {hidden} more", "", "", "")
    return table


def _state(line: DeviceLine) -> str:
    word = "online" if line.online else "offline"
    return f"{word}, {line.progress}" if line.progress else word


def _received(line: DeviceLine) -> str:
    return f"{size(line.received)} of {size(line.expected)}" if line.expected else ""


def _heard(line: DeviceLine, now: float) -> str:
    return "never" if line.heard_at is None else f"{duration(max(0.0, now - line.heard_at))} ago"


def _round(line: RoundLine) -> list[str]:
    numbers = [
        f"{name} {statistics.median(values):.4g}"
        for name, values in (("median loss", line.losses), ("median accuracy before", line.accuracies))
        if values and not line.evaluation
    ]
    if line.evaluation:
        numbers = [evaluation_text(line.evaluation)]
    what = f"{line.run} " if line.run else ""
    what += "evaluation of round" if line.evaluates else "round"
    head = ", ".join([f"{what} {line.number} {line.outcome}: {line.used} of {line.invited} updates", *numbers])
    why = f" ({line.reason})" if line.reason else ""
    return [head + why, *(f"  {device_id} {status}: {reason}" for device_id, status, reason in line.refused)]


def evaluation_text(metrics: Sequence[FleetMetric]) -> str:
    """'loss 0.31 (mean 0.35, spread 0.02), accuracy ...': the medians first, which few devices cannot move."""
    parts = [f"{one.name} {one.median:.4g} (mean {one.mean:.4g}, spread {one.spread:.2g})" for one in metrics]
    held_out = f"{metrics[0].held_out} of {metrics[0].devices} on held-out data" if metrics else ""
    return ", ".join([*parts, held_out])


def printable(text: str) -> str:
    """Devices choose some of the words we show; none may steer the operator's terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def duration(seconds: float) -> str:
    """Short, rounded down: 42 s, 3 min, 5 h, 2 d."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"


def size(count: int) -> str:
    """Short: 512 B, 15 kB, 2.1 MB. Powers of 1000."""
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= length:
            return f"{count / length:.3g} {unit}"
    return f"{count} B"
