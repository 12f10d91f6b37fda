"""Which files a coordinator needs to go on, by what its coordinator.toml names. Reads no file but that one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from msgspec import Struct

from covey_coordinator.tasks import NamedTask, runs_in
from covey_edge.config import BrokerSettings, read_toml
from covey_protocol.errors import ConfigError


class _Trusted(Struct):
    path: str


class _Task(NamedTask):
    bundle: str = ""
    trusted: _Trusted | None = None


class _Settings(Struct):
    """What of coordinator.toml names files; `covey serve` checks the rest."""

    fleet: str
    run: str
    key_file: str
    broker: BrokerSettings
    bundle: str = ""
    runs_dir: str = "runs"
    trusted: _Trusted | None = None
    tasks: list[_Task] = []


class Named(NamedTuple):
    """A file or folder that coordinator.toml names. name: in the backup. secret: only encrypted, mode 600."""

    name: str
    path: Path
    secret: bool = False


class Content(NamedTuple):
    """moved: path as the file has it -> where it lies after a restore, relative. runs: folders in runs_dir."""

    fleet: str
    runs: tuple[str, ...]
    runs_dir: Path
    runs_in: str
    key_file: Path
    named: tuple[Named, ...]
    moved: dict[str, str]


def content_of(path: Path) -> Content:
    """path: of coordinator.toml. Raises ConfigError."""
    settings = read_toml(path, _Settings)
    folder = path.parent
    moved: dict[str, str] = {}
    named = [Named(f"folder/{path.name}", path, secret=urlsplit(settings.broker.url).password is not None)]
    for value, secret in _paths(settings).items():
        if not _is_beside(value):
            moved[value] = f"outside/{len(moved)}/{Path(value).name}"
        named.append(Named(moved.get(value, f"folder/{PurePosixPath(value)}"), folder / value, secret))
    beside = _is_beside(settings.runs_dir)
    place = str(PurePosixPath(settings.runs_dir)) if beside else "runs"
    if not beside:
        moved[settings.runs_dir] = place
    runs = tuple(runs_in(settings.run, settings.tasks).values())
    key_file, runs_dir = folder / settings.key_file, folder / settings.runs_dir
    return Content(settings.fleet, runs, runs_dir, place, key_file, tuple(named), moved)


def _paths(settings: _Settings) -> dict[str, bool]:
    """Path -> whether it is secret, of every file that is named."""
    broker = settings.broker
    secret = [settings.key_file, broker.key_file, broker.password_file]
    plain = [broker.ca_file, broker.cert_file, settings.bundle, *(task.bundle for task in settings.tasks)]
    told = [settings.trusted, *(task.trusted for task in settings.tasks)]
    trusted = [one.path for one in told if one is not None]
    return {value: value in secret for value in (*secret, *plain, *trusted) if value}


def _is_beside(value: str) -> bool:
    """Whether a path stays within coordinator.toml's folder."""
    path = PurePosixPath(value)
    return not path.is_absolute() and ".." not in path.parts and path.name != ""


def files_below(named: Named) -> Iterator[Named]:
    """The file itself, or all files of the folder (of a data source). ConfigError where there is neither."""
    if not named.path.exists():
        raise ConfigError(f"{named.path} is named in the configuration and not there", "put it there, or leave it out")
    if not named.path.is_dir():
        yield named
        return
    for path in sorted(named.path.rglob("*")):
        if path.is_file():
            yield Named(f"{named.name}/{path.relative_to(named.path).as_posix()}", path, named.secret)
