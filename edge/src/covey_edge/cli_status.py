"""`covey agent status`, `leave`, `join`: asked over the agent's local socket, or done on its files where none runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from covey_edge.cli_agent import config_option

STARTING_S = 30.0  # for an agent that has its lock, and does not listen yet or any more


@click.command(short_help="What the agent is doing.")
@config_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(config_path: Path, as_json: bool) -> None:
    """Say what the agent of this configuration is doing; where it does not run, what its files say."""
    from covey_edge.config import load_agent

    facts = facts_of(load_agent(config_path))
    click.echo(json.dumps(facts, indent=2) if as_json else "\n".join(lines_of(facts)))


def facts_of(agent: Any) -> dict[str, Any]:
    """agent: a `config.Agent`. As JSON holds it."""
    import msgspec

    from covey_edge.local_socket import NotRunning, ask, lock_holder
    from covey_edge.status import stopped_status

    try:
        facts: dict[str, Any] = ask(agent.state_dir, "status")
    except NotRunning:
        holder = lock_holder(agent.state_dir)
        why = "does not run; this is from its files" if holder is None else f"is starting or ending (process {holder})"
        facts = msgspec.to_builtins(stopped_status(agent, why))
    return facts


def lines_of(facts: dict[str, Any]) -> list[str]:
    """For people."""
    lines = [f"{facts['device_id']} of {facts['fleet']}: {facts['state']}, {facts['doing']}"]
    if facts["left_ms"] is not None:
        since = (
            time.strftime(" on %Y-%m-%d %H:%M UTC", time.gmtime(facts["left_ms"] / 1000)) if facts["left_ms"] else ""
        )
        lines.append(f"owner      opted out{since}; `covey agent join` takes that back")
    if facts["round_id"]:
        task = f", task {facts['task']}" if facts["task"] else ""
        lines.append(f"round      {facts['round_id']}{task}, ends in {_span(facts['ends_in_s'])}")
    if facts["working_s"] is not None:
        lines.append(f"training   for {_span(facts['working_s'])} in a process of {_mb(facts['child_memory_mb'])}")
    if facts["problem"]:
        lines.append(f"problem    {facts['problem']}")
    if facts["connected"] is not None:
        lines.append(f"broker     {facts['broker']}, MQTT {facts['mqtt']}, {facts['connection']}")
    else:
        lines.append(f"broker     {facts['broker']}")
    owed = ", ".join(facts["outbox"])
    lines.append(f"outbox     without a verdict: {owed}" if owed else "outbox     empty")
    lines += _privacy_lines(facts["privacy"])
    for name, section in sorted(facts["sections"].items()):
        lines.append(f"{name:<10} {_section(section)}")
    if facts["pid"] is not None:
        lines.append(
            f"process    {facts['pid']}, {_mb(facts['memory_mb'])}, up {_span(facts['uptime_s'])}, "
            f"covey {facts['version']}, {facts['runtime']}"
        )
    for line in facts["rounds"]:
        lines.append(f"  {line['at']} {line['kind']:<10} {line.get('round', '')}: {line['words']}")
    return lines


def _section(section: Any) -> str:
    """A value of another part, in one line."""
    if isinstance(section, dict):
        return "; ".join(f"{key}: {_section(value)}" if key else _section(value) for key, value in section.items())
    if isinstance(section, list):
        return ", ".join(_section(value) for value in section)
    return str(section)


def _privacy_lines(privacy: dict[str, Any]) -> list[str]:
    said = f"{privacy['noised']} noised updates, epsilon {privacy['epsilon']:.4g} at delta {privacy['delta']:g}"
    if privacy["epsilon_limit"] is not None:
        said += f" of {privacy['epsilon_limit']:g} ({privacy['rounds_left']} more rounds)"
    exact = privacy["exact_updates"], privacy["exact_evaluations"]
    if any(exact):
        said += f"; without noise {exact[0]} updates and {exact[1]} evaluations"
    return [f"privacy    {said}"]


def _span(seconds: float) -> str:
    """45 s, 00:03:20, 2 d 04:00:00."""
    days, rest = divmod(max(0, round(seconds)), 86400)
    clock = time.strftime("%H:%M:%S", time.gmtime(rest))
    return f"{days} d {clock}" if days else f"{rest} s" if rest < 120 else clock


def _mb(megabytes: Any) -> str:
    return "unknown size" if megabytes is None else f"{megabytes:g} MB"


@click.command(short_help="Decline every round from now on.")
@config_option
def leave(config_path: Path) -> None:
    """Opt out, for good: the round under way is given up, what is in the outbox is not delivered, and every round is
    declined until `covey agent join`. Works while the agent runs and while it does not."""
    _opt(config_path, "leave")
    click.echo("this device declines every round from now on; `covey agent join` takes that back")


@click.command(short_help="Take part again after `leave`.")
@config_option
def join(config_path: Path) -> None:
    """Take part again, from the next round on."""
    _opt(config_path, "join")
    click.echo("this device takes part again, from the next round on")


def _opt(config_path: Path, which: str) -> None:
    from covey_edge.config import load_agent
    from covey_edge.local_socket import NotRunning, StateLock, ask, lock_holder
    from covey_edge.opting_out import OptOut

    folder = load_agent(config_path).state_dir
    end = time.monotonic() + STARTING_S
    while True:
        try:
            ask(folder, which)
            return
        except NotRunning:
            if lock_holder(folder) is None or time.monotonic() > end:
                break
            time.sleep(0.1)  # an agent that starts or ends
    lock = StateLock(folder)
    getattr(OptOut(folder), which)()
    lock.close()
