"""`covey record`: append sensor readings to a SQLite table that this device's agent trains on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Callable, Optional

import click

MB = 2**20


@click.group(short_help="Record sensor readings for this device's agent to train on.")
def record() -> None:
    """Append readings to a table of a SQLite file, made at first use; old rows go as the limits say.

    In agent.toml: source = "sqlite", path = FILE, options.table = "readings".
    """


def _where(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of all commands that add."""
    for option in reversed(
        (
            click.option("--table", default="readings", show_default=True),
            click.option("--keep-rows", type=click.IntRange(0), default=0, help="Only so many of the newest rows."),
            click.option("--keep-days", type=click.FloatRange(0), default=0.0, help="Only rows of so many days."),
            click.option("--keep-mb", type=click.FloatRange(0), default=0.0, help="Only so many MiB."),
        )
    ):
        function = option(function)
    return function


def _long(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of those that go on."""
    for option in reversed(
        (
            click.option("--columns", default="", help="Names of the values of CSV lines, separated by commas."),
            click.option(
                "--batch",
                type=click.IntRange(1, 10_000),
                default=1,
                show_default=True,
                help="Write so many readings at once: spares an SD card, and a power cut costs up to so many.",
            ),
            click.option(
                "--batch-seconds", type=click.FloatRange(0.1), default=60.0, show_default=True, help="Or after so long."
            ),
            click.option("--quiet", is_flag=True, help="Only what goes wrong."),
        )
    ):
        function = option(function)
    return function


@record.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("values", nargs=-1, required=True, metavar="NAME=VALUE...")
@_where
def add(file: Path, values: tuple[str, ...], **where: Any) -> None:
    """Add one reading, as in: covey record add room.sqlite temperature=21.5 humidity=40"""
    from covey_edge.record_lines import from_pairs

    recorder = _recorder(file, where)
    try:
        recorder.add([from_pairs(list(values))])
    finally:
        recorder.close()


@record.command()
@click.argument("file", type=click.Path(path_type=Path))
@_where
@_long
def lines(file: Path, columns: str, batch: int, batch_seconds: float, quiet: bool, **where: Any) -> None:
    """Add each line of the standard input: a JSON object, NAME=VALUE pairs, or CSV under a line of names."""
    from covey_edge.recording_loop import Waiting, record_lines

    recorder = _recorder(file, where)
    try:
        record_lines(sys.stdin.fileno(), Waiting(recorder, batch, batch_seconds, quiet=quiet), _parser(columns))
    finally:
        recorder.close()


@record.command()
@click.argument("seconds", type=click.FloatRange(0.1))
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("command", nargs=-1, required=True)
@click.option("--times", type=click.IntRange(0), default=0, help="End after so many runs.")
@_where
@_long
def every(
    seconds: float,
    file: Path,
    command: tuple[str, ...],
    times: int,
    columns: str,
    batch: int,
    batch_seconds: float,
    quiet: bool,
    **where: Any,
) -> None:
    """Run a command every so many seconds and add the lines it prints: covey record every 60 room.sqlite -- ./read"""
    from covey_edge.recording_loop import Waiting, record_every

    recorder = _recorder(file, where)
    try:
        record_every(seconds, command, Waiting(recorder, batch, batch_seconds, quiet=quiet), _parser(columns), times)
    finally:
        recorder.close()


@record.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True))
@click.argument("value")
@click.option("--from", "since", help="From this time on (2026-11-26T15:30 in UTC, or Unix seconds).")
@click.option("--to", "until", help="Before this time.")
@click.option("--again", is_flag=True, help="Also rows that have a label.")
@click.option("--table", default="readings", show_default=True)
def label(file: Path, value: str, since: Optional[str], until: Optional[str], again: bool, table: str) -> None:
    """Label the rows of a span of time that have no label yet."""
    from covey_edge.recorder import Recorder, number_or_text, optional_moment

    recorder = Recorder(file, table)
    try:
        span = optional_moment(since, float("-inf")), optional_moment(until, float("inf"))
        count = recorder.label(number_or_text(value), *span, again=again)
    finally:
        recorder.close()
    click.echo(f"{count} rows labelled {value}")


def _recorder(file: Path, where: dict[str, Any]) -> Any:
    from covey_edge.recorder import Recorder, Retention

    kept = Retention(where["keep_rows"], where["keep_days"], round(where["keep_mb"] * MB))
    return Recorder(file, where["table"], kept)


def _parser(columns: str) -> Any:
    from covey_edge.record_lines import LineParser

    return LineParser(tuple(name.strip() for name in columns.split(",")) if columns else ())
