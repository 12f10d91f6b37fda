"""Where what was fetched or made is kept, to be used again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """COVEY_CACHE, or covey's folder among the user's caches."""
    given, base = os.environ.get("COVEY_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else (Path(base) if base else Path.home() / ".cache") / "covey"
