"""Whether the connection to the Internet is metered, as NetworkManager has it."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from covey_edge.sensors.asking import Ask, read_text

MANAGER = "org.freedesktop.NetworkManager"
PROPERTY = ["busctl", "get-property", MANAGER, "/org/freedesktop/NetworkManager", MANAGER, "Metered"]
NUMBERS = {"1": True, "2": False, "3": True, "4": False}  # NMMetered: yes, no, guessed yes, guessed no; 0 is unknown
MOBILE = ("wwan", "ppp", "rmnet")  # names of interfaces that are modems


def metered(root: Path, ask: Ask) -> Optional[bool]:
    """Of the primary connection. Without NetworkManager, a modem that holds the default route is taken for metered."""
    words = (ask(PROPERTY) or "").split()
    if len(words) == 2 and words[1] in NUMBERS:
        return NUMBERS[words[1]]
    interface = default_interface(root)
    if interface is None:
        return None
    said = (ask(["nmcli", "-t", "-f", "GENERAL.METERED", "device", "show", interface]) or "").rpartition(":")[2]
    if said.startswith(("yes", "no")):  # also "yes (guessed)"
        return said.startswith("yes")
    return True if interface.startswith(MOBILE) else None


def default_interface(root: Path) -> Optional[str]:
    """Which interface holds the IPv4 default route with the lowest metric."""
    lines = [line.split() for line in (read_text(root / "proc/net/route") or "").splitlines()[1:]]
    routes = [(int(words[6]), words[0]) for words in lines if len(words) >= 8 and words[1] == words[7] == "00000000"]
    return min(routes, default=(0, None))[1]
