"""How a fleet's devices are, one row each: from what they say of themselves, and when this desk saw them last."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Optional

import msgspec
from msgspec import Struct

from covey_deploy.rollout.watching import Watch
from covey_deploy.rollout.words import table
from covey_edge.files import write_atomic
from covey_protocol.releases import Release

SEEN = "seen.json"


class Row(Struct, frozen=True, kw_only=True):
    """online: None for a device that has never been heard. version, runtime: "" where a device is away and the broker's
    last will has taken the place of what it had said. last_seen: Unix time, None where this desk never saw it here."""

    device: str
    online: Optional[bool] = None
    version: str = ""
    runtime: str = ""
    on_trial: bool = False
    bad: tuple[str, ...] = ()
    trouble: str = ""
    last_seen: Optional[float] = None
    revoked: bool = False


def rows(watch: Watch, seen: Mapping[str, float], revoked: Collection[str] = ()) -> list[Row]:
    """Of the whole roster."""
    found = []
    for name in watch.roster:
        row, presence = Row(device=name, last_seen=seen.get(name), revoked=name in revoked), watch.newest.get(name)
        if presence is not None:
            row = msgspec.structs.replace(
                row,
                online=presence.online,
                version=presence.agent_version,
                runtime=presence.runtime,
                on_trial=presence.on_trial is True,
                bad=presence.bad or (),
                trouble=presence.trouble or "",
            )
        found.append(row)
    return found


def seen_now(folder: Path, watch: Watch, now: float) -> dict[str, float]:
    """When each device was last seen here, with those that are here now; kept in `folder`."""
    try:
        seen = msgspec.json.decode((folder / SEEN).read_bytes(), type=dict[str, float])
    except (OSError, msgspec.MsgspecError):
        seen = {}  # costs what was remembered, which is only for people
    here = {name: now for name, presence in watch.newest.items() if presence.online}
    merged = {**seen, **here}
    if merged != seen:
        write_atomic(folder / SEEN, msgspec.json.encode(merged), mode=0o600)
    return merged


def status_text(found: list[Row], release: Optional[Release], refused: Mapping[str, str], now: float) -> str:
    cells = [("device", "", "covey", "runtime", "last seen", "remarks")]
    for row in found:
        here = {True: "online", False: "away", None: "not heard"}[row.online]
        cells.append((row.device, here, row.version or "-", row.runtime or "-", _seen(row, now), remarks(row)))
    online, standing = sum(row.online is True for row in found), sum(not row.revoked for row in found)
    lines = [table(cells), "", f"{online} of {standing} devices are online; {release_words(release)}"]
    lines += [f"ignored on {topic}: {why}" for topic, why in sorted(refused.items())[:5]]
    return "\n".join(lines)


def remarks(row: Row) -> str:
    said = ["revoked"] if row.revoked else []
    said += ["on trial"] if row.on_trial else []
    said += [f"does not take {', '.join(row.bad)}"] if row.bad else []
    said += [row.trouble] if row.trouble else []
    return "; ".join(said)


def release_words(release: Optional[Release]) -> str:
    if release is None:
        return "no release is on the broker"
    named = len(release.devices or ())
    for_whom = f"{100 * release.share:g} % of the devices" + (f" and {named} by name" if named else "")
    return f"release {release.version} is on the broker for {for_whom}"


def _seen(row: Row, now: float) -> str:
    if row.online:
        return "now"
    if row.last_seen is None:
        return "never here"
    ago = max(0.0, now - row.last_seen)
    if ago < 120:
        return f"{ago:.0f} s ago"
    if ago < 7200:
        return f"{ago / 60:.0f} min ago"
    return f"{ago / 3600:.0f} h ago" if ago < 172800 else time.strftime("%Y-%m-%d", time.localtime(row.last_seen))
