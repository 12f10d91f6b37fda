"""How far a long piece of work is: one line that changes on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Optional, TextIO

WIDTH = 24
REDRAW_S = 0.1
PLAIN_S = 15.0


class ProgressLine:
    """what: in words, such as "writing /dev/sdb". total: bytes. Told to `stream`, standard error by default."""

    def __init__(
        self, what: str, total: int, stream: Optional[TextIO] = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._total, self._clock = what, max(total, 1), clock
        self._stream = stream or sys.stderr
        self._begun = self._told = clock()
        self._lively = self._stream.isatty()

    def __call__(self, done: int) -> None:
        now = self._clock()
        if done >= self._total or now - self._told >= (REDRAW_S if self._lively else PLAIN_S):
            self._told = now
            self._tell(done, now - self._begun)

    def _tell(self, done: int, seconds: float) -> None:
        speed = done / seconds if seconds > 0 else 0.0
        left_s = (self._total - done) / speed if speed else 0.0
        bar = ("#" * (WIDTH * done // self._total)).ljust(WIDTH, ".")
        text = f"{self._what}: {100 * done // self._total}% of {self._total / 1e9:.2f} GB, {speed / 1e6:.1f} MB/s"
        text += f", {left_s:.0f} s left" if done < self._total else f", {seconds:.0f} s"
        if self._lively:
            print(f"\r[{bar}] {text}\033[K", end="" if done < self._total else "\n", file=self._stream, flush=True)
        else:
            print(text, file=self._stream, flush=True)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """What is said of an error begins a line of its own."""
        if kind is not None and self._lively:
            print(file=self._stream, flush=True)
