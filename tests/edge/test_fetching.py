"""What is asked of a broker for a blob, and when again. A cache on the disk; a list stands for the broker."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from covey_edge.cache import BlobCache
from covey_edge.fetching import Fetching
from covey_protocol.blobs import blob_ref, chunk
from covey_protocol.errors import PeerError, StorageError
from covey_protocol.topics import Topics

DATA = b"abcdefgh"
REF = blob_ref(DATA, 3)
TOPICS = Topics("home")
ALL = [TOPICS.blob(REF.sha256, index) for index in range(3)]


class Bench:
    """A Fetching with its cache, a clock to be set, and what it has asked of the broker."""

    def __init__(self, folder: Path) -> None:
        self.now, self.paused = 0.0, False
        self.asked: list[str] = []
        self.left: set[str] = set()
        self.forgotten: list[str] = []
        self.cache = BlobCache(folder)
        self.fetching = Fetching(self.cache, TOPICS, self, 10.0, 30.0, lambda: self.now, paused=lambda: self.paused)

    def subscribe(self, topics: Iterable[str]) -> None:
        self.asked.extend(topics)

    def unsubscribe(self, topics: Iterable[str]) -> None:
        self.left.update(topics)

    def forget(self, topics: Iterable[str]) -> None:
        self.forgotten.extend(topics)

    def take(self, index: int) -> bool:
        return self.fetching.take(REF.sha256, index, chunk(DATA, REF, index))

    def asked_by(self, now: float) -> list[str]:
        self.now, self.asked = now, []
        self.fetching.tick()
        return self.asked


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "blobs")


def test_a_blob_is_fetched_once_and_is_in_the_cache_when_it_is_told(bench: Bench) -> None:
    assert bench.fetching.fetch([REF]) == []
    assert bench.fetching.fetch([REF]) == []
    assert bench.asked == ALL
    assert [bench.take(index) for index in (2, 0, 0, 1)] == [False, False, False, True]
    assert bench.cache.path(REF.sha256).read_bytes() == DATA
    assert bench.left == set(ALL) == set(bench.forgotten)
    assert bench.fetching.fetch([REF]) == [REF]
    assert len(bench.fetching) == 0


def test_what_lacks_is_asked_for_again_ever_more_seldom_and_not_while_some_come(bench: Bench) -> None:
    bench.fetching.fetch([REF])
    assert bench.asked_by(10.0) == []
    assert bench.asked_by(10.5) == ALL
    assert bench.asked_by(30.0) == []  # 20 s from then
    assert bench.asked_by(31.0) == ALL
    assert bench.asked_by(61.5) == ALL  # 30 s, and no more
    bench.take(1)
    assert bench.asked_by(71.0) == []
    assert bench.asked_by(72.0) == [ALL[0], ALL[2]]  # 10 s again, since something came


def test_nothing_is_asked_for_in_a_pause_and_afterwards_what_lacks(bench: Bench) -> None:
    bench.paused = True
    bench.fetching.fetch([REF])
    assert bench.asked_by(100.0) == []
    bench.paused = False
    bench.fetching.go_on()
    assert bench.asked == ALL
    bench.take(0)
    bench.paused = True
    bench.fetching.pause()
    assert bench.left == set(ALL)
    assert bench.asked_by(1000.0) == []
    bench.paused = False
    bench.fetching.go_on()
    assert bench.asked == ALL[1:]


def test_what_is_not_wanted_is_not_taken(bench: Bench) -> None:
    assert not bench.take(0)
    bench.fetching.fetch([REF])
    assert not bench.fetching.take(REF.sha256, 0, b"")  # cleared
    with pytest.raises(PeerError, match="does not fit"):
        bench.fetching.take(REF.sha256, 0, b"ab")
    bench.fetching.stop()
    assert bench.left == set(ALL)
    assert not any(bench.take(index) for index in range(3))
    assert bench.asked_by(1000.0) == []


def test_a_blob_that_cannot_be_kept_is_an_error_and_not_asked_for_again(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("a file where the folder should be")
    bench = Bench(tmp_path / "blobs")
    bench.fetching.fetch([REF])
    bench.take(0)
    bench.take(1)
    with pytest.raises(StorageError):
        bench.take(2)
    assert bench.left == set(ALL)
    assert bench.asked_by(1000.0) == []
