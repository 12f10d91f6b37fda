"""How long tests wait for what must happen. Nothing waits this long unless it hangs, however busy the machine is."""

from __future__ import annotations

PATIENCE_S = 240.0  # the longest wait seen was 150 s, at a load of ten on two cores; below the timeout of pytest
