"""The agent renews itself: hears of releases, fetches, checks and unpacks them, and asks to be started anew.

What happens then is the launcher's (`covey_edge.launcher`). Loaded only where agent.toml pins a release_key. All in the
agent's one thread. Every file is durable before anything relies on it: what was heard (`heard.json`), the unpacked
release, and last that it is staged. docs/updates.md.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Optional

from covey_edge import __version__
from covey_edge.boot import RELEASE, RELEASES, TRIAL, Folder, Staged
from covey_edge.cache import BlobCache
from covey_edge.config import Agent
from covey_edge.fetching import Fetching, Subscribes
from covey_edge.files import DISK, sync_folder, told_of, write_atomic
from covey_protocol.errors import ConfigError, ReleaseError, StorageError
from covey_protocol.messages import MAX_BAD, reason_text
from covey_protocol.releases import (
    MAGIC,
    MAX_RELEASE_BYTES,
    MAX_SEALED_BYTES,
    Release,
    check_wheel,
    is_for,
    open_release,
    read_release_file,
    refusal,
)
from covey_protocol.seals import PublicKey
from covey_protocol.topics import Topics

log = logging.getLogger("covey.agent")

LOOK_S = 10.0  # how often the disk is looked at for a release that the owner gave
REFETCH_S = 120.0  # without a chunk for so long, what lacks is asked for again
ARRIVED = "arrived.covey-release"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
MAX_FILE_BYTES = MAX_RELEASE_BYTES + MAX_SEALED_BYTES + len(MAGIC) + 4


class Updates:
    """told: what the operator should hear of the newest release that failed or was refused; "" for nothing."""

    def __init__(self, agent: Agent, transport: Subscribes, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError where the launcher looks for releases in another folder than this agent's."""
        self._device_id = agent.config.device_id
        self._key = PublicKey.from_hex(agent.config.update.release_key)
        self._from_fleet = agent.config.update.from_fleet
        self._topics, self._clock = Topics(agent.config.fleet), clock
        self._folder = Folder(agent.state_dir.resolve() / "releases")
        self._cache = BlobCache(self._folder.path / "incoming", keep=0)
        self._fetching = Fetching(self._cache, self._topics, transport, REFETCH_S, REFETCH_S, clock)
        _check_folder(self._folder.path)
        self._boot = self._folder.boot()
        self._heard = _heard(self._folder.path / "heard.json")
        self._wanted: Optional[Release] = None  # that is being fetched
        self._looked = clock()
        self._refused: dict[int, str] = {}  # what could not be installed, by serial: not fetched again in this run
        self._staged = ""
        self._left = "" if self.on_trial else self._folder.staged().version  # the launcher could not take it up
        self._cannot_remove = False
        self.told = reason_text(f"release {self._boot.failed}") if self._boot.failed else ""
        if self.told:
            log.error("%s; it is not tried again, %s goes on", self.told, __version__)
        if self._left:
            log.error("release %s could not be tried; see what the launcher said, and start the agent anew", self._left)
        if not self.on_trial:
            self._folder.remove_others([self._boot.current, self._boot.previous, self._boot.trial, self._left])
            DISK.sweep(self._folder.path / "incoming")

    @property
    def on_trial(self) -> bool:
        """Whether this very process is a release that the launcher tries."""
        return bool(os.environ.get(TRIAL))

    @property
    def listens(self) -> list[str]:
        return [self._topics.release] if self._from_fleet else []

    @property
    def waits(self) -> bool:
        """Whether a release is ready and only a round is in its way: no other is to be begun."""
        return bool(self._staged) or self._confirmed

    @property
    def unproven(self) -> bool:
        """Whether this very process is on trial and not confirmed yet."""
        return self.on_trial and not self._confirmed

    @property
    def bad(self) -> tuple[str, ...]:
        """Versions that this device does not take: tried and given up, or refused when they were looked at."""
        return tuple(dict.fromkeys((*self._boot.bad, *self._refused.values())))[-MAX_BAD:]

    @property
    def _confirmed(self) -> bool:
        return self.on_trial and self._boot.current == os.environ.get(RELEASE)

    def facts(self) -> dict[str, object]:
        """For whoever asks the agent how it is."""
        return {
            "version": __version__,
            "release": os.environ.get(RELEASE, ""),
            "on_trial": self.unproven,
            "fetching": self._wanted.version if self._wanted is not None else "",
            "staged": self._staged,
            "failed": self.told,
        }

    # --- from the broker

    def take_description(self, payload: bytes) -> None:
        """Of the newest release, as it is retained. Raises ReleaseError for what is not ours to take."""
        if not payload:
            return  # withdrawn: what is fetched is not worth less for it
        release = open_release(payload, self._key)
        if not self._is_for_us(release):
            return
        self._stop_fetching()
        self._wanted = release
        self._cache.prune({wheel.blob.sha256 for wheel in release.wheels})
        self._fetching.fetch(wheel.blob for wheel in release.wheels)
        log.info("release %s: fetching %d of %d wheels", release.version, len(self._fetching), len(release.wheels))
        self._install_whole()

    def take_chunk(self, sha256: bytes, index: int, payload: bytes) -> None:
        """One that is not a round's. Raises PeerError for a wrong one; ignores those of others."""
        try:
            whole = self._fetching.take(sha256, index, payload)
        except StorageError as exc:
            self._give_up(exc)
            return
        if whole:
            self._install_whole()

    def _is_for_us(self, release: Release) -> bool:
        """Also makes durable which serial was heard. Nothing older is followed from then on."""
        why = refusal(release, __version__, PYTHON, self._heard)
        if why:
            raise ReleaseError(why)
        if release.serial > self._heard:
            _remember(self._folder.path / "heard.json", release.serial)
            self._heard = release.serial
        if (
            release.version in (__version__, self._staged, self._left)
            or release.serial in self._refused
            or self.on_trial
        ):
            return False  # on trial: it comes again with the next start
        if release.version in self._boot.bad:
            log.warning("release %s failed on this device before and is not tried again", release.version)
            return False
        if self._wanted is not None and self._wanted.serial == release.serial:
            self._fetching.go_on()
            return False
        if not is_for(release, self._device_id):
            log.info("release %s goes to others first (%g %% of the devices)", release.version, 100 * release.share)
            self._stop_fetching()
            return False
        return True

    def _stop_fetching(self) -> None:
        self._fetching.stop()
        self._wanted = None

    def _give_up(self, why: Exception) -> None:
        """Of what is being fetched. It is tried again after the next start of the agent."""
        if self._wanted is not None:
            self._refused[self._wanted.serial] = self._wanted.version
            self._say(f"release {self._wanted.version} was not installed", why)
        self._stop_fetching()
        if not isinstance(why, ReleaseError):  # on a full disk what has come of it is in everything's way
            self._forget_fetched()

    def _forget_fetched(self) -> None:
        shutil.rmtree(self._folder.path / "incoming", ignore_errors=True)

    def _say(self, what: str, why: Exception) -> None:
        """In full in the log; the operator hears of no file's place."""
        log.error("%s: %s", what, why)
        of_a_file = not isinstance(why, ReleaseError) or isinstance(why.__cause__, OSError)
        self.told = reason_text(f"{what}: {told_of(why) if of_a_file else why}")

    def _install_whole(self) -> None:
        release = self._wanted
        if release is None or len(self._fetching):
            return
        try:
            wheels = [self._cache.path(wheel.blob.sha256).read_bytes() for wheel in release.wheels]
            self._install(release, wheels, again=False)
        except (ReleaseError, StorageError, OSError) as exc:
            self._give_up(exc)
            return
        self._stop_fetching()
        self._forget_fetched()

    # --- from the owner, and the clock

    def tick(self, *, idle: bool) -> bool:
        """About once a second. idle: no round is under way. True: end in order, and let the launcher start anew."""
        now = self._clock()
        self._fetching.tick()
        if self.on_trial or now - self._looked >= LOOK_S:
            self._looked = now
            self._look()
        return idle and self.waits

    def _look(self) -> None:
        if self.on_trial:
            self._boot = self._folder.boot()
            return
        path = self._folder.path / ARRIVED
        if self._cannot_remove or not path.exists():
            return
        try:
            _, release, wheels = read_release_file(read_bounded(path), self._key)
            if release.version != __version__:
                self._check_given(release)
                self._install(release, wheels, again=True)
        except (ReleaseError, StorageError) as exc:
            self._say("a release that was given to this device was not installed", exc)
        try:
            path.unlink(missing_ok=True)
            sync_folder(path.parent)  # or a power cut gives it once more
        except OSError as exc:  # put there by somebody else in a folder of his: do not begin again and again
            self._cannot_remove = True
            log.error("cannot remove %s (%s); give the folder to the user of this agent", path, exc.strerror)

    def _check_given(self, release: Release) -> None:
        why = refusal(release, __version__, PYTHON, 0)
        if why:
            raise ReleaseError(why)

    def _install(self, release: Release, wheels: list[bytes], *, again: bool) -> None:
        from covey_edge.wheels import checked, unpack

        for wheel, data in zip(release.wheels, wheels):
            check_wheel(wheel, data)
        unpack(checked(release, wheels, PYTHON), self._folder.path / release.version)
        self._folder.stage(Staged(release.version, again))
        self._staged = release.version
        log.info("release %s is installed; the agent starts it when no round is under way", release.version)


def updates_for(agent: Agent, transport: Subscribes) -> Optional[Updates]:
    """None where agent.toml pins no release_key, or no launcher started this agent."""
    if not agent.config.update.release_key:
        return None
    if not os.environ.get(RELEASES):
        log.warning("no release is taken: start this agent with `python -m covey_edge.launcher` (docs/updates.md)")
        return None
    return Updates(agent, transport, time.monotonic)


def read_bounded(path: Path) -> bytes:
    """A release file. ReleaseError where it cannot be read, or is larger than any release."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise ReleaseError(f"{path} cannot be read ({exc.strerror})", "check the path and the permissions") from exc
    if len(data) > MAX_FILE_BYTES:
        too_large = OSError(errno.EFBIG, "larger than any release")  # what others hear of a file: see _say
        raise ReleaseError(f"{path} is {too_large.strerror}", f"at most {MAX_FILE_BYTES} bytes are read") from too_large
    return data


def _check_folder(path: Path) -> None:
    given = Path(os.environ.get(RELEASES, path))
    if given.resolve() != path:
        raise ConfigError(
            f"the launcher's --state is {given.parent}, this agent's state_dir is {path.parent}", "make them the same"
        )


def _heard(path: Path) -> int:
    """StorageError where the file is damaged: old releases must not come back by that."""
    if not path.exists():
        return 0
    try:
        return int(json.loads(path.read_bytes())["serial"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise StorageError(f"{path} cannot be read ({exc})", "remove it to take releases of any serial again") from exc


def _remember(path: Path, serial: int) -> None:
    write_atomic(path, json.dumps({"serial": serial}).encode(), mode=0o600)
