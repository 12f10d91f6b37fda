"""`covey privacy`: what this device's updates have spent, and what was stopped. Reads only; the agent may run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click


@click.command(short_help="What this device's updates have spent of its privacy.")
@click.option("--config", "config_path", type=click.Path(path_type=Path), default="agent.toml", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def privacy(config_path: Path, as_json: bool) -> None:
    """Print this device's privacy ledger: updates sent, epsilon, rounds left; and updates that were stopped."""
    facts = facts_of(config_path)
    click.echo(json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts)))


def facts_of(config_path: Path) -> dict[str, Any]:
    from covey_edge.config import load_agent
    from covey_edge.ledger import Ledger

    agent = load_agent(config_path)
    settings, ledger = agent.config.privacy, Ledger(agent.state_dir, agent.config.privacy)
    book = ledger.book()
    stopped = sorted((agent.state_dir / "stopped").glob("**/stopped.txt"))
    return {
        "since_ms": book.since_ms,
        "noised": book.noised,
        "exact_updates": book.exact_updates,
        "exact_evaluations": book.exact_evaluations,
        "delta": settings.delta,
        "epsilon": book.epsilon(settings.delta),
        "epsilon_limit": settings.epsilon_limit or None,
        "rounds_left": ledger.rounds_left(book),
        "stopped": [str(path) for path in stopped],
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    noised = sum(facts["noised"].values())
    since = time.strftime("%Y-%m-%d", time.gmtime(facts["since_ms"] / 1000))
    lines = [f"{noised} noised updates since {since}: epsilon {facts['epsilon']:.4g} at delta {facts['delta']:g}"]
    if facts["epsilon_limit"] is not None:
        lines.append(f"limit {facts['epsilon_limit']:g}: {facts['rounds_left']} more rounds")
    exact = [
        f"{facts[name]} {what}"
        for name, what in (("exact_updates", "updates without noise"), ("exact_evaluations", "exact evaluations"))
        if facts[name]
    ]
    if exact:
        lines.append(f"not covered by any epsilon: {', '.join(exact)}")
    lines += [f"an update was stopped, see {path}" for path in facts["stopped"]]
    return lines
