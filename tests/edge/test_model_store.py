"""The store of models: whatever is killed when, what model.json names is whole."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from covey_edge.files import write_atomic
from covey_edge.model_store import Kept, ModelStore, Version
from covey_protocol.errors import StorageError

STEPS = ("link", "open", "write", "fsync", "replace", "unlink", "mkdir")


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def source_of(folder: Path, data: bytes) -> Path:
    """A blob in the cache, which replaces files and never writes into them: the store's are the same ones."""
    path = folder / sha(data)
    write_atomic(path, data)
    return path


def version(number: int, parameters: bytes) -> Version:
    return Version("federated", sha(b"bundle"), sha(parameters), ("0" * 64,), number, f"r.{number}", 0)


def put(store: ModelStore, number: int, cache: Path) -> None:
    """What the agent does after a round: stage the blobs, then switch."""
    parameters = b"parameters %d" % number
    new = version(number, parameters)
    for name, data in zip(new.files, (b"bundle", parameters)):
        store.stage(name, source_of(cache, data))
    with store.changing():
        kept = store.load()
        store.commit(Kept(new, new) if kept is None else msgspec.structs.replace(kept.using(new), federated=new), {})


def used(store: ModelStore) -> int:
    """The number of the model in use, after everything model.json names was read and found whole."""
    kept = store.load()
    assert kept is not None
    for one in (kept.used, kept.federated, *([kept.previous] if kept.previous else [])):
        assert store.read(one) == (b"bundle", b"parameters %d" % one.number)
    return kept.used.number


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Run `work` in a fork that ends with SIGKILL before its step-th call of the system, or in the middle of it where
    it is a write. Whether it got so far."""
    pid = os.fork()
    if pid == 0:
        left = step

        def doomed(call: Any) -> Any:
            def called(*arguments: Any, **named: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    if call.__name__ == "write":
                        call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **named)

            return called

        try:
            for name in STEPS:
                setattr(os, name, doomed(getattr(os, name)))
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def test_killed_at_any_step_the_store_holds_the_old_model_or_the_new_one(tmp_path: Path) -> None:
    store, number, seen, step = ModelStore(tmp_path / "state"), 2, set(), 0
    for first in (0, 1):
        put(store, first, tmp_path / "cache")
    while killed_at(step, partial(put, store, number, tmp_path / "cache")):
        held = used(store)
        assert held in (number - 1, number), step
        seen.add(held - number)
        put(store, number, tmp_path / "cache")  # the next start goes on, and sweeps what was left
        kept = store.load()
        assert kept is not None
        assert set(os.listdir(store.folder)) == {".lock", "model.json", *kept.files}
        number, step = number + 1, step + 1
    assert seen == {-1, 0}
    assert step > 10


def test_what_model_json_names_is_synced_before_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut leaves a pointer to nothing, which a kill cannot show."""
    store, calls = ModelStore(tmp_path / "state"), []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(Path(os.readlink(f"/proc/self/fd/{fd}"))), real_sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(Path(b).name), real_replace(a, b)))
    put(store, 1, tmp_path / "cache")
    personal = msgspec.structs.replace(version(1, b"own"), kind="personal")
    calls.clear()
    with store.changing():
        kept = store.load()
        assert kept is not None
        store.commit(msgspec.structs.replace(kept.using(personal), personal=personal), {personal.files[1]: b"own"})
    switch = calls.index("model.json")
    own = calls.index(personal.files[1])
    assert str(calls[own - 1]).endswith(".tmp")  # its bytes
    assert store.folder in calls[own:switch]  # its name
    assert store.folder in calls[switch:]  # and the switch itself


def test_a_bundle_takes_no_space_twice_and_no_links_mean_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ModelStore(tmp_path / "state")
    put(store, 1, tmp_path / "cache")
    assert os.stat(store.path(version(1, b"parameters 1").files[0])).st_nlink == 2

    def refused(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    put(store, 2, tmp_path / "cache")
    assert used(store) == 2


@pytest.mark.parametrize("linked", [True, False])
def test_a_damaged_file_is_replaced_by_the_next_round_that_brings_it(tmp_path: Path, linked: bool) -> None:
    store = ModelStore(tmp_path)
    put(store, 1, tmp_path / "cache")
    bundle = store.path(version(1, b"parameters 1").files[0])
    if linked:
        bundle.write_bytes(b"bundlf")  # and the cache's, which is the same file; it is fetched again
        (tmp_path / "cache" / sha(b"bundle")).unlink()
    else:
        bundle.unlink()
        bundle.write_bytes(b"bundlf")
    put(store, 2, tmp_path / "cache")
    assert used(store) == 2


def test_a_damaged_model_is_named_with_the_way_back(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    put(store, 1, tmp_path / "cache")
    new = version(1, b"parameters 1")
    path = store.path(new.files[1])
    path.unlink()
    path.write_bytes(b"parameters 9")
    with pytest.raises(StorageError, match="damaged; go back to the model before: `covey infer rollback`"):
        store.read(new)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"used": 1}'])
def test_a_model_json_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path, content: bytes) -> None:
    store = ModelStore(tmp_path)
    assert store.load() is None
    put(store, 1, tmp_path / "cache")
    store.pointer.write_bytes(content)
    with pytest.raises(StorageError, match="delete it"):
        store.load()


def test_nothing_is_switched_to_a_model_that_is_not_here(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    put(store, 1, tmp_path / "cache")
    missing = version(2, b"never staged")
    with store.changing(), pytest.raises(StorageError, match="is not there"):
        store.commit(Kept(missing, missing), {})
    assert used(store) == 1


def test_tasks_do_not_share_models(tmp_path: Path) -> None:
    put(ModelStore(tmp_path), 1, tmp_path / "cache")
    put(ModelStore(tmp_path, "doorbell"), 2, tmp_path / "cache")
    put(ModelStore(tmp_path), 3, tmp_path / "cache")
    assert (used(ModelStore(tmp_path)), used(ModelStore(tmp_path, "doorbell"))) == (3, 2)


def test_two_writers_take_turns(tmp_path: Path) -> None:
    """Of forty changes of two threads none is lost."""
    store = ModelStore(tmp_path)
    put(store, 0, tmp_path / "cache")

    def change() -> None:
        for _ in range(20):
            with store.changing():
                kept = store.load()
                assert kept is not None
                refused = (*kept.refused, "x")
                store.commit(msgspec.structs.replace(kept, refused=refused), {})

    threads = [threading.Thread(target=change) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = store.load()
    assert kept is not None
    assert len(kept.refused) == 40


WRITER = """
import sys
sys.path[:0] = [sys.argv[3]]
from pathlib import Path
from test_model_store import ModelStore, put
number = int(sys.argv[2])
print("begins", flush=True)
while True:
    put(ModelStore(Path(sys.argv[1])), number, Path(sys.argv[1]) / "cache")
    number += 1
"""


@pytest.mark.slow
def test_a_reader_beside_writers_that_are_killed_at_random_never_meets_a_torn_model(tmp_path: Path) -> None:
    """60 real processes, killed within 20 ms of beginning, while this one reads."""
    rng, store = random.Random(0), ModelStore(tmp_path)
    put(store, 0, tmp_path / "cache")
    reads = 0
    for turn in range(60):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(1000 * (turn + 1)), str(Path(__file__).parent)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        end = time.monotonic() + rng.uniform(0.0, 0.02)
        while time.monotonic() < end:
            for _ in range(5):
                kept = store.load()
                assert kept is not None
                try:
                    store.read(kept.used)
                    break
                except FileNotFoundError:
                    continue  # replaced since, twice
            else:
                raise AssertionError("a reader that never comes through")
            reads += 1
        writer.kill()
        writer.wait()
        writer.stdout.close()
        used(store)
    assert reads > 60
