"""`covey agent sent`: everything that ever left this device. Reads only; the agent may run."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, Optional

import click

from covey_edge.cli_agent import config_option


@click.command(short_help="Everything that ever left this device.")
@config_option
@click.option(
    "--since", metavar="DATE", help="A day (2026-11-01), a time (2026-11-01T08:00:00Z), or 7d, 12h before now."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, as in the log's files.")
def sent(config_path: Path, since: Optional[str], as_json: bool) -> None:
    """Print the log of everything that left this device: the oldest first, what is summed up by month before it."""
    import msgspec

    from covey_edge.config import load_agent
    from covey_edge.files import DISK
    from covey_edge.sent_log import entries, read_summary

    folder, start = load_agent(config_path).state_dir, _start(since)
    summary = read_summary(DISK, folder)
    for month, kinds in sorted(summary.months.items()):
        if month >= start[:7]:
            told = {"month": month, "kinds": msgspec.to_builtins(kinds)}
            click.echo(msgspec.json.encode(told).decode() if as_json else _month(month, kinds))
    unreadable = summary.unreadable
    for entry in entries(folder):
        if isinstance(entry, int):
            unreadable += entry
        elif entry.at >= start:
            click.echo(msgspec.json.encode(entry).decode() if as_json else _line(entry))
    if unreadable:
        click.echo(f"{unreadable} lines cannot be read: a power cut has torn them", err=True)


def _start(since: Optional[str]) -> str:
    """As the log writes times; "" for the beginning."""
    from covey_protocol.errors import ConfigError

    if not since:
        return ""
    ago = re.fullmatch(r"(\d{1,5})([dh])", since)
    if ago:
        seconds = int(ago[1]) * (86400 if ago[2] == "d" else 3600)
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - seconds))
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2}Z?)?)?", since):
        raise ConfigError(f"--since {since!r} is no date", "write 2026-11-01, or 7d for the last seven days")
    return since


def _month(month: str, kinds: dict[str, Any]) -> str:
    told = ", ".join(
        f"{one.lines} {kind}" + (f" ({one.bytes:,} bytes)" if one.bytes else "") for kind, one in kinds.items()
    )
    return f"{month}               {told}"


def _line(line: Any) -> str:
    size = f" ({line.bytes:,} bytes)" if line.bytes else ""
    task = f" task {line.task}" if line.task else ""
    digest = f" sha256 {line.sha256[:12]}" if line.sha256 else ""
    return f"{line.at}  {line.kind:<10} {line.round}{task}{' ' if line.round else ''}{line.words}{size}{digest}"
