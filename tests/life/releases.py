"""The releases of the agent in a simulated life: who makes and offers them, good and bad ones, and what must hold.

Real: sealed descriptions and wheels, and all that the device does with them (`Updates`, `wheels`, `boot`, the
launcher). Made up: how a release's agent behaves, which a file in its wheel says; else it is the agent under test.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from release_helpers import MAKER, wheel

from covey_edge.boot import ATTEMPTS, RELEASE, TRIAL, Boot, Folder, newer
from covey_edge.cli_update import update
from covey_edge.launcher import HEALTHY_S, WATCHDOG_S
from covey_edge.updates import ARRIVED
from covey_edge.wheels import look_at
from covey_protocol.blobs import blob_ref, chunks
from covey_protocol.errors import ReleaseError, StorageError
from covey_protocol.messages import Presence
from covey_protocol.releases import Release, Wheel, release_file, seal_release
from covey_protocol.seals import SealingKey
from covey_protocol.topics import Topics

if TYPE_CHECKING:
    from life.world import Life

STRANGER = SealingKey.from_seed(b"stranger".ljust(32, b"."))
BEHAVES = "covey_edge/behaves"
CHUNK_BYTES = 640
FAILING = ("never connects", "ends at once", "dies", "hangs")
REFUSED = ("a stranger's seal", "a damaged piece", "no whole wheel", "lacks something", "older news", "an older agent")
KINDS = ("good", *FAILING, *REFUSED, "given", "given again")
WEIGHTS = (6, *(1 for _ in FAILING), *(1 for _ in REFUSED), 2, 1)
RIPE_S = 1000.0  # a day without trouble has made up its mind about a release
LIVED_S = HEALTHY_S - WATCHDOG_S / 2  # at least, from being ready to the last sign of life, before one is healthy


@dataclass(frozen=True)
class Made:
    release: Release
    wheels: tuple[bytes, ...]
    behaves: str
    key: SealingKey = MAKER

    @property
    def sealed(self) -> bytes:
        return seal_release(self.release, self.key)

    @property
    def files(self) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for one, data in zip(self.release.wheels, self.wheels):
            found.update(look_at(one.name, data).files)
        return found


def made(version: str, serial: int, behaves: str = "good", *, requires: tuple[str, ...] = (), torn: int = 0) -> Made:
    """A release of one small wheel. torn: so many bytes of it are missing."""
    name, data = wheel({"covey_edge/__init__.py": b"", BEHAVES: behaves.encode()}, version, requires=requires)
    data = data[: len(data) - torn]
    release = Release(version, serial, (Wheel(name, blob_ref(data, CHUNK_BYTES)),))
    return Made(release, (data,), behaves)


class Releases:
    """every_s: the mean time between two; 0 is never. script: kinds to come first, one after the other."""

    def __init__(self, world: Life, every_s: float, script: tuple[str, ...] = ()) -> None:
        self._world, self._every_s, self._script = world, every_s, list(script)
        self.topics = Topics("home")
        self._published: list[str] = []
        self._folder = Folder(world.state / "releases")
        self._number = 0
        self.whole: dict[str, Made] = {}  # what a device may start, by version
        self._lived: Counter[str] = Counter()  # seconds
        self._trials: Counter[str] = Counter()
        self._allowed: Counter[str] = Counter()
        self._best = ""  # the newest that is known durably to be healthy
        self._offered: list[tuple[float, Made]] = []  # what a device may start, and when it could
        self.told_bad: set[str] = set()

    # --- who makes them

    def start(self) -> None:
        if self._every_s:
            self._world.at(self._world.rng.uniform(0.2, 0.5) * self._every_s, self._next)

    def _next(self) -> None:
        rng = self._world.rng
        if self._world.over:
            return
        self._world.at(rng.uniform(0.6, 1.4) * self._every_s, self._next)
        kind = self._script.pop(0) if self._script else rng.choices(KINDS, WEIGHTS)[0]
        self._world.seen[f"release: {kind}"] += 1
        self._number += 1
        self._world.log(f"release 9.{self._number}: {kind}")
        self._offer(kind, f"9.{self._number}", 1000 + self._number)

    def _offer(self, kind: str, version: str, serial: int) -> None:
        offers: dict[str, Callable[[], None]] = {
            "a stranger's seal": lambda: self._publish(replace(made(version, serial), key=STRANGER)),
            "a damaged piece": lambda: self._damaged(self._known(made(version, serial))),
            "no whole wheel": lambda: self._publish(made(version, serial, torn=9)),
            "lacks something": lambda: self._publish(made(version, serial, requires=("covey-no-such>=1",))),
            "older news": lambda: self._older_news(version),
            "an older agent": lambda: self._publish(made("0.0.1", serial)),
            "given": lambda: self._give(self._known(made(version, serial))),
            "given again": self._give_again,
        }
        behaves = kind if kind in FAILING else "good"
        offers.get(kind, lambda: self._publish(self._known(made(version, serial, behaves))))()

    def _known(self, one: Made) -> Made:
        """One that a device may take."""
        self.whole[one.release.version] = one
        self._offered.append((self._world.clock.now, one))
        self._allowed[one.release.version] += ATTEMPTS
        return one

    def _publish(self, one: Made, *, damaged: bool = False) -> None:
        """Chunks first, the description last; those of the one before go."""
        retained = self._world.retained
        for topic in self._published:
            retained.pop(topic, None)
        self._published = []
        for described, data in zip(one.release.wheels, one.wheels):
            for index, piece in chunks(data, described.blob):
                topic = self.topics.blob(described.blob.sha256, index)
                retained[topic] = piece[::-1] if damaged and not index else piece
                self._published.append(topic)
                self._world.deliver(topic, retained[topic])
        retained[self.topics.release] = one.sealed
        self._world.deliver(self.topics.release, one.sealed)

    def _damaged(self, one: Made) -> None:
        """Somebody has changed a piece on the broker; later its maker puts it right."""
        self._publish(one, damaged=True)
        latest = self._number
        self._world.at(300.0, lambda: self._publish(one) if latest == self._number else None)

    def _older_news(self, version: str) -> None:
        """Sealed by its maker, before what the device has surely heard: not to be followed."""
        heard = self._world.disk.sure(self._folder.path / "heard.json")
        if heard is not None:
            self._publish(made(version, int(json.loads(heard)["serial"]) - 1))

    # --- from the owner

    def _give(self, one: Made) -> None:
        """`covey agent update`, until it has worked."""
        world, file = self._world, self._world.state.parent.parent / f"{one.release.version}.covey-release"
        if not file.exists():
            file.write_bytes(release_file(one.sealed, list(one.wheels)))
        world.at(40.0, lambda: self._give(one) if file.exists() else None)
        if world.off:
            return
        assert update.callback is not None
        with contextlib.suppress(StorageError):
            with contextlib.suppress(ReleaseError):  # a newer one runs already
                update.callback(world.config, file)
            file.unlink()

    def _give_again(self) -> None:
        """What failed before: its owner's word."""
        bad = [version for version in self._folder.boot().bad if version in self.whole]
        if bad:
            self._allowed[bad[-1]] += ATTEMPTS
            self._give(self.whole[bad[-1]])

    # --- what must hold

    def behaviour(self, environment: dict[str, str]) -> str:
        return (self._place(environment) / BEHAVES).read_text()

    def _place(self, environment: dict[str, str]) -> Path:
        """Where Python would find this release."""
        return Path(environment["PYTHONPATH"].split(os.pathsep)[0])

    def sure(self) -> Optional[Boot]:
        """What the launcher knows whatever happens now."""
        path = self._folder.path / "boot.json"
        unsure = path.exists() and self._world.disk.sure(path) is None
        return None if unsure else self._folder.boot()

    def note(self) -> None:
        """Which release is surely the one to run: there is no way back from it."""
        boot = self.sure()
        if boot is not None and newer(boot.current, self._best):
            self._best = boot.current

    def woke(self) -> None:
        """After a power cut: what was staged may be there as it was given, too, and is then taken twice."""
        if (self._folder.path / ARRIVED).exists():
            self._allowed[self._folder.staged().version] += ATTEMPTS

    def starts(self, environment: dict[str, str]) -> None:
        """An agent is about to run."""
        world, require, version = self._world, self._world.require, environment[RELEASE]
        world.log(f"starts {version or 'what is installed'}{', on trial' if TRIAL in environment else ''}")
        if version:
            require(version in self.whole, "starts a release that is to be refused", version)
            there = {path: path.read_bytes() for path in self._place(environment).rglob("*") if path.is_file()}
            found = {path.relative_to(self._place(environment)).as_posix(): data for path, data in there.items()}
            require(found == self.whole[version].files, "starts a release that is not whole", version)
        boot = self.sure()
        if TRIAL in environment:
            self._trials[version] += 1
            require(boot is not None and boot.trial == version, "tries a release that is not surely on trial", version)
            allowed, tried = self._allowed[version], self._trials[version]
            require(tried <= allowed, "tries again and again", version, tried)
            return
        require(not version or self._lived[version] >= LIVED_S, "runs a release that was never seen healthy", version)
        require(version == self._best or newer(version, self._best), "leaves a healthy release", self._best, version)
        require(not version or (boot is not None and boot.current == version), "runs one that is not surely healthy")
        self._best = version

    def began(self, environment: dict[str, str]) -> None:
        """An agent has looked after its folder."""
        if TRIAL in environment or not self._every_s:
            return
        boot, staged, here = self._folder.boot(), self._folder.staged().version, self._folder.here()
        require, needed = self._world.require, [one for one in (boot.current, boot.previous) if one]
        require(all(one in here for one in needed), "removes a release that is needed", needed, here)
        require(set(here) <= {*needed, boot.trial, staged}, "keeps old releases", needed, here)
        left = [path.name for path in self._folder.path.glob(".*")]
        require(not left, "keeps what is left of an installation", left)

    def lives(self, version: str, seconds: float) -> None:
        self._lived[version] = max(self._lived[version], int(seconds))

    def stops(self, version: str) -> None:
        """Its trial is ended from outside: that is no attempt."""
        self._allowed[version] += 1

    def said(self, text: str) -> None:
        """By the launcher."""
        self._world.log(f"launcher: {text}")
        for words, what in (("is healthy", "upgrade"), ("is not tried again", "rollback")):
            self._world.seen[what] += text.endswith(words)

    def heard(self, presence: Presence) -> None:
        self.told_bad.update(presence.bad or ())

    def sizes(self) -> dict[str, int]:
        """What must not grow."""
        incoming = self._folder.path / "incoming"
        return {
            "releases": len(self._folder.here()),
            "incoming": len(list(incoming.iterdir())) if incoming.is_dir() else 0,
        }

    def check_end(self) -> None:
        boot, require = self._folder.boot(), self._world.require
        if self._world.quiet:
            ripe = [one for at, one in self._offered if at < self._world.clock.now - RIPE_S]
            good = [one.release.version for one in ripe if one.behaves == "good"]
            failing = {one.release.version for one in ripe if one.behaves != "good"}
            require(not good or not newer(good[-1], boot.current), "does not run the newest good release", good)
            require(failing <= set(boot.bad), "does not give up a release that fails", failing)
        told = {version for version in boot.bad if version in self.told_bad}
        require(not boot.bad or told, "nobody hears of a release that failed", boot.bad)
        require(self.sizes()["incoming"] <= 2, "pieces of releases pile up", self.sizes())
