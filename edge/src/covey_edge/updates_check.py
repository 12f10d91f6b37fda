"""The agent's releases as `covey agent check` tells them: whether any can come here, and what became of the last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Optional

from covey_edge import __version__
from covey_edge.boot import ATTEMPTS, Boot, Folder
from covey_edge.config import Agent
from covey_edge.local_socket import ask
from covey_edge.preflight import OK, WARNING, Facts, Finding
from covey_protocol.errors import CoveyError

START = "start it with `python -m covey_edge.launcher`, as the unit of `covey agent unit` does"


def updates(facts: Facts) -> Iterator[Finding]:
    """None is wrong: a device without releases takes part. A release_key that is the coordinator's ends `settings`."""
    settings = facts.agent.config.update
    if not settings.release_key:
        yield Finding("updates", OK, "no release of the agent is taken: [update] release_key is not set")
        return
    yield _taken(facts.agent)
    yield from _last(Folder(facts.agent.state_dir / "releases").boot())


def _taken(agent: Agent) -> Finding:
    """Whether the agent that runs can take one; the launcher is known to its children alone."""
    whose = f"releases sealed by {agent.config.update.release_key[:16]}..."
    where = "from the fleet and from files" if agent.config.update.from_fleet else "from files"
    facts = _told(agent)
    if facts is None:
        return Finding("updates", OK, f"{whose} are taken {where} once an agent runs under its launcher")
    if "update" not in facts.get("sections", {}):
        what = "the agent that runs here takes no releases: it was not started by its launcher"
        return Finding("updates", WARNING, what, START)
    return Finding("updates", OK, f"{whose} are taken {where}; version {facts['version']} runs")


def _told(agent: Agent) -> Optional[dict[str, Any]]:
    """What the agent says that works here; None where none does, or it does not answer us."""
    try:
        told = ask(agent.state_dir, "status")
    except CoveyError:
        return None
    return told if isinstance(told, dict) else None


def _last(boot: Boot) -> Iterator[Finding]:
    if boot.trial:
        what = f"release {boot.trial} is on trial, at attempt {boot.attempts} of {ATTEMPTS}"
        yield Finding("updates", OK, what)
    if boot.failed:
        what = f"release {boot.failed}; it is not tried again, {boot.current or f'the installed {__version__}'} goes on"
        remedy = "release it again under a new version, or give it once more with `covey agent update`"
        yield Finding("updates", WARNING, what, remedy)
