"""How long an audit may take, and whether the next piece of work still fits: by costs measured, never guessed.

The amount of work of every piece is fixed beforehand, so that the same seed gives the same numbers on any machine. The
budget only decides which pieces are begun; one that is under way when the time is up is cut off, and says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

Clock = Callable[[], float]
SLACK = 1.25  # of the longest time that a kind took: a piece is begun if so much is left


@dataclass
class Budget:
    """seconds: of the whole audit, by this clock. costs: kind of work -> longest seconds a piece of it took."""

    seconds: float
    clock: Clock = time.monotonic
    costs: dict[str, float] = field(default_factory=dict)
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._started = self.clock()

    def left(self) -> float:
        return self.seconds - (self.clock() - self._started)

    def fits(self, kind: str) -> bool:
        """A kind that never ran fits as long as anything is left: that is how its cost becomes known."""
        return self.left() > SLACK * self.costs.get(kind, 0.0)

    def spent(self, kind: str, seconds: float) -> None:
        """One piece of this kind took so long."""
        self.costs[kind] = max(seconds, self.costs.get(kind, 0.0))

    def over(self) -> bool:
        """As a `Stop` of an attack: the time is up."""
        return self.left() <= 0
