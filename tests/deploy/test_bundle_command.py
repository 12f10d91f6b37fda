"""`covey bundle`: what a user types, with a cache that holds the target's wheels."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from kit_helpers import MAKER, small_wheel

from covey_deploy import wheelhouse
from covey_deploy.cli_bundle import bundle
from covey_deploy.kit import open_kit
from covey_deploy.targets import TARGETS
from covey_edge import __version__
from covey_protocol.errors import ConfigError, ReleaseError

TARGET = TARGETS["pios-bookworm-arm64"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(bundle, [str(argument) for argument in arguments])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a release key, a cache, and a lock that names what is in it."""
    (tmp_path / "release.pem").write_bytes(MAKER.pem())
    name, data = small_wheel("tflite-runtime", "2.14.0", {}, "cp311-cp311-manylinux_2_34_aarch64")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / name).write_bytes(data)
    lock = tmp_path / "edge.txt"
    lock.write_text(f"tflite-runtime==2.14.0 \\\n    --hash=sha256:{hashlib.sha256(data).hexdigest()}\n")
    monkeypatch.setattr(wheelhouse, "lock_file", lambda: lock)
    key = wheelhouse._key(wheelhouse.pinned(wheelhouse.lock_file().read_text(), TARGET), TARGET)
    (cache / f"{key}.json").write_text(json.dumps({name: hashlib.sha256(data).hexdigest()}))
    return tmp_path


def make(place: Path, *more: object) -> Result:
    where = ("--out", place / "some.kit", "--cache", place / "cache", "--offline")
    return run("--target", TARGET.name, "--key", place / "release.pem", *where, *more)


def test_a_kit_is_made_without_network_twice_the_same_and_shown(place: Path) -> None:
    made = make(place)
    assert made.exit_code == 0, made.exception
    assert f"covey {__version__} with tflite-runtime 2.14.0" in made.output
    first = (place / "some.kit").read_bytes()
    kit = open_kit(place / "some.kit", MAKER.public)
    assert (kit.target, kit.manifest["glibc"]) == (TARGET.name, "2.34")
    assert make(place).exit_code == 0
    assert (place / "some.kit").read_bytes() == first
    shown = run("show", place / "some.kit", "--release-key", MAKER.public.hex()).output
    assert "for     Python 3.11 on aarch64, glibc 2.34 or newer" in shown
    assert f"whole, sealed by {MAKER.public.hex()}" in shown
    assert json.loads(run("show", place / "some.kit", "--json").output) == kit.manifest
    assert "not looked at" in run("show", place / "some.kit").output
    wrong = run("show", place / "some.kit", "--release-key", "00" * 32)
    assert isinstance(wrong.exception, ReleaseError)


def test_a_wheel_of_ones_own_goes_along(place: Path) -> None:
    name, data = small_wheel("my-sensors", "1.0", {"my_sensors.py": b"x = 1\n"})
    (place / name).write_bytes(data)
    assert make(place, "--wheel", place / name).exit_code == 0
    files = open_kit(place / "some.kit", MAKER.public).files()
    assert files[f"wheels/{name}"] == data
    assert any("covey_edge" in file for file in files)


def test_the_secret_is_never_said(place: Path) -> None:
    made = make(place)
    secret = "".join(MAKER.pem().decode().splitlines()[1:-1])
    assert secret not in made.output
    assert secret.encode() not in (place / "some.kit").read_bytes()


WRONG = {
    "no target": ((), "--target NAME, or --python and --arch"),
    "two targets": (("--target", TARGET.name, "--python", "3.11", "--arch", "arm64"), "target is not clear"),
    "no key": (("--target", TARGET.name), "covey key make release.pem"),
    "what has no wheels": (("--target", "pios-bookworm-armhf", "--key", "x"), "no armv7 wheels"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_with_the_remedy(what: str) -> None:
    arguments, words = WRONG[what]
    error = run(*arguments).exception
    assert isinstance(error, ConfigError)
    assert words in str(error)


def test_the_targets_are_listed_and_what_there_is_none_for() -> None:
    listed = run("--list-targets").output
    for words in ("pios-trixie-arm64", "glibc 2.41", "ai-edge-litert", "no kits for", "armv6"):
        assert words in listed
