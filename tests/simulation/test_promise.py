"""The promise of docs/protocol.md, section 6.1, over thousands of made-up worlds (see `world`).

`COVEY_SEED=N pytest tests/simulation -k crash` runs one seed alone. A seed that fails prints its number and the end of
its story; the same seed on the same code tells the same story.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from simulation.mutations import MUTATIONS
from simulation.world import World, breaks

EVERYDAY, MANY = 1_000, 100_000
SEARCHED = 2_000  # seeds in which a planted bug has to be found
BLOCK = 250  # seeds in one test


def run(seed: int) -> World:
    world = World(seed)
    try:
        return world.run()
    except BaseException as exc:
        raise AssertionError(
            f"{exc!r}\n{world.story()}\nagain: COVEY_SEED={seed} python -m pytest tests/simulation -k crash"
        ) from exc


def seeds(first: int, last: int) -> range:
    only = os.environ.get("COVEY_SEED")
    if only is None:
        return range(first, last)
    return range(int(only), int(only) + 1) if first == 0 else range(0)


PLACES = (
    "before commit",
    "after commit",
    "write",
    "wrote",
    "send",
    "publish round",
    "publish blob",
    "clear blob",
    "wait",
)
HAPPENS = (
    *(f"power cut: {place}" for place in PLACES),
    *(f"device's power cut: {place}" for place in ("write", "wrote", "say Offer", "say Chunk")),
    "aggregated again after a crash",
    "ends: StorageError",
    "hears: Verdict the round was abandoned",
    "hears: Receipt that round is over",
)


@pytest.mark.parametrize("first", range(0, EVERYDAY, BLOCK))
def test_no_crash_loses_or_doubles_what_was_acknowledged(first: int) -> None:
    seen: Counter[str] = Counter()
    acknowledged = 0
    for seed in seeds(first, first + BLOCK):
        world = run(seed)
        seen += world.seen
        acknowledged += len(world.acknowledged)
    if "COVEY_SEED" not in os.environ:  # the worlds are as bad as they are meant to be
        assert [what for what in HAPPENS if not seen[what]] == []
        assert acknowledged > 4 * BLOCK


@pytest.fixture(scope="module")
def workers() -> Iterator[ProcessPoolExecutor]:
    """One for each core."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        yield pool


def told(seed: int) -> str:
    """Its story, where it breaks the promise."""
    try:
        run(seed)
    except AssertionError as exc:
        return str(exc)
    return ""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(EVERYDAY, MANY, 10 * BLOCK))
def test_nor_do_many_more(first: int, workers: ProcessPoolExecutor) -> None:
    stories = workers.map(told, range(first, min(first + 10 * BLOCK, MANY)), chunksize=25)
    broken = [story for story in stories if story]
    assert not broken, f"{len(broken)} seeds; the first of them:\n{broken[0]}"


def test_the_same_seed_tells_the_same_story() -> None:
    for seed in range(5):
        assert run(seed).story(10**6) == run(seed).story(10**6)


RARE = {"a second update of a device replaces the one that was acknowledged": 650}  # seeds before it are in vain


@pytest.mark.parametrize("what", MUTATIONS)
def test_the_simulation_finds_that(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[what](monkeypatch)
    assert any(breaks(World, seed) for seed in range(RARE.get(what, 0), SEARCHED))
