"""A few threads that share the parts of one computation. The calling thread always works too.

For functions that let go of Python's lock. Several threads may call `spread` at once; when the pool is busy with
another call, the caller does its parts alone, so nobody waits for a free thread.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

SIZE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(parts: int, work: Callable[[int], None]) -> None:
    """Call work(0) to work(parts - 1), begun in this order, on up to SIZE threads. Raises what a part raises."""
    claim = itertools.count()

    def go_on() -> None:
        while (part := next(claim)) < parts:
            work(part)

    others = [pool().submit(go_on) for _ in range(min(SIZE, parts) - 1)]
    try:
        go_on()
    finally:
        started = [other for other in others if not other.cancel()]
        errors = [other.exception() for other in started]
    for error in errors:
        if error is not None:
            raise error


@cache
def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(SIZE - 1, 1), thread_name_prefix="covey-columns")


os.register_at_fork(after_in_child=pool.cache_clear)
