"""A kit is taken whole and sealed by its maker or not at all, on the desktop as on a device with nothing but Python."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from kit_helpers import HERE, MAKER, changed, packed, small_kit, small_wheel, small_wheels, unpacked

from covey_deploy import installer
from covey_deploy.installer import InstallError, Source, opened, verifies
from covey_deploy.kit import installer_text, make_kit, open_kit, read_kit
from covey_protocol.errors import ConfigError, ReleaseError
from covey_protocol.seals import SealingKey

OTHER = SealingKey.from_seed(b"somebody else".ljust(32, b"."))
KIT = small_kit()
FILES = dict(installer.members(KIT))
WHEEL = next(name for name in FILES if "covey_edge" in name)


def resealed(**changes: object) -> bytes:
    """The same kit by the same maker with another manifest."""
    manifest = json.dumps({**json.loads(FILES[installer.MANIFEST]), **changes}).encode()
    seal = MAKER.seal(installer.SEAL_CONTEXT + manifest)
    return packed(*{**FILES, installer.MANIFEST: manifest, installer.SEAL: seal}.items())


def test_the_same_inputs_give_the_same_kit_and_it_opens() -> None:
    assert small_kit() == KIT
    kit = read_kit(KIT, MAKER.public)
    assert (kit.name, kit.version, kit.target) == ("covey-agent-9.0-here", "9.0", "here")
    assert set(kit.files()) == set(FILES)
    assert kit.manifest["glibc"] == "2.17"  # what its wheels ask for


REFUSED = {
    "nothing": (lambda: b"", "this is not a"),
    "half a kit": (lambda: KIT[: len(KIT) // 2], "not a whole kit"),
    "another maker's": (lambda: small_kit(key=OTHER), "not sealed by this release key"),
    "a changed manifest": (
        lambda: changed(KIT, installer.MANIFEST, FILES[installer.MANIFEST].replace(b"9.0", b"9.1")),
        "not sealed by this release key",
    ),
    "no seal": (lambda: packed(*[(n, d) for n, d in FILES.items() if n != installer.SEAL]), "seal|not a kit"),
    "a short seal": (lambda: changed(KIT, installer.SEAL, FILES[installer.SEAL][:40]), "not sealed by this release"),
    "a changed wheel": (lambda: changed(KIT, WHEEL, FILES[WHEEL][:-1] + b"x"), "not what the kit's manifest says"),
    "a changed installer": (lambda: changed(KIT, "install.py", b"print('evil')"), "not what the kit's manifest says"),
    "a missing wheel": (lambda: packed(*[(n, d) for n, d in FILES.items() if n != WHEEL]), "not both in|holds no"),
    "a path to elsewhere": (lambda: packed(*FILES.items(), ("../evil", b"")), "which is not its own"),
    "a file twice": (lambda: packed(*FILES.items(), (WHEEL, b"")), "which is not its own"),
    "a link": (lambda: packed((installer.MANIFEST, b""), kind=tarfile.SYMTYPE), "which is not its own"),
    "another format": (lambda: resealed(format=2), "a kit of format 2"),
    "a name that is a path": (lambda: resealed(name="../../etc"), "not in its form"),
    "a version that is a path": (lambda: resealed(version="../../etc"), "not in its form"),
    "a file that is a path": (
        lambda: resealed(files=[{"name": "wheels/../../x.whl", "sha256": "0" * 64, "size": 0}]),
        "not in its form",
    ),
    "no list of files": (lambda: resealed(files=None), "cannot be read"),
}


def looked_at(path: Path) -> None:
    """As the installer does it."""
    source = Source(path)
    made, _ = opened(source, MAKER.public.hex())
    for entry in made["files"]:
        installer.check_file(entry, source.read(entry["name"]))


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_on_the_desktop_and_on_the_device(what: str, tmp_path: Path) -> None:
    make, words = REFUSED[what]
    data = make()
    with pytest.raises(ReleaseError, match=words):
        read_kit(data, MAKER.public)
    (tmp_path / "a.kit").write_bytes(data)
    with pytest.raises(InstallError, match=words):
        looked_at(tmp_path / "a.kit")


def test_a_wheel_more_than_the_manifest_names_is_refused_on_the_desktop() -> None:
    data = packed(*FILES.items(), ("wheels/evil-1-py3-none-any.whl", b""))
    with pytest.raises(ReleaseError, match="not both in the kit and in its manifest"):
        read_kit(data, MAKER.public)


def test_a_kit_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        open_kit(tmp_path / "no.kit", MAKER.public)


def test_wheels_that_make_no_kit_are_named() -> None:
    wheels = small_wheels()
    name = next(iter(wheels))
    with pytest.raises(ReleaseError, match="is not a whole wheel"):
        make_kit(HERE, {**wheels, name: wheels[name][:-30]}, MAKER)
    with pytest.raises(ConfigError, match="no wheel of covey-edge"):
        make_kit(HERE, {name: data for name, data in wheels.items() if "covey" not in name}, MAKER)
    with pytest.raises(ConfigError, match=f"no wheel of {HERE.runtime}"):
        make_kit(HERE, dict([small_wheel("covey-edge", "1.0", {})]), MAKER)


# --- the seal, without cryptography

VECTORS = (  # RFC 8032, section 7.1, tests 1 to 3: public key, message, signature
    (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
        "387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
        "4a7c15e9716ed28dc027beceea1ec40a",
    ),
)


@pytest.mark.parametrize("number", range(3))
def test_the_installers_own_ed25519_takes_the_vectors_of_its_standard(number: int) -> None:
    key, message, seal = map(bytes.fromhex, VECTORS[number])
    assert verifies(key, seal, message)
    assert not verifies(key, seal, message + b"x")


def test_the_installers_own_ed25519_judges_as_cryptography_does() -> None:
    draw = np.random.default_rng(1)
    for _ in range(6):
        key = SealingKey.from_seed(draw.bytes(32))
        data = draw.bytes(100)
        seal = key.seal(data)
        assert verifies(key.public.raw, seal, data)
        at = int(draw.integers(0, 64 * 8))
        flipped = bytes(byte ^ (1 << at % 8 if index == at // 8 else 0) for index, byte in enumerate(seal))
        assert not key.public.verifies(flipped, data)
        assert not verifies(key.public.raw, flipped, data)


def test_a_seal_cannot_be_written_in_a_second_way() -> None:
    """The same point and an answer larger by the order of the group: the equation holds, and it is refused."""
    key = SealingKey.from_seed(bytes(32))
    seal = key.seal(b"data")
    second = int.from_bytes(seal[32:], "little") + installer._ORDER
    assert not verifies(key.public.raw, seal[:32] + second.to_bytes(32, "little"), b"data")
    assert not verifies(b"\xff" * 32, seal, b"data")
    assert not verifies(key.public.raw[:-1], seal, b"data")


# --- the installer stands alone


def test_the_installer_of_a_kit_needs_nothing_of_covey_and_runs_on_python_3_9(tmp_path: Path) -> None:
    text = installer_text()
    tree = ast.parse(text, feature_version=(3, 9))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.split(".")[0] not in sys.stdlib_module_names]
    folder = unpacked(KIT, tmp_path)
    command = [sys.executable, "-I", "-S", str(folder / "install.py"), "--prefix", str(tmp_path / "opt")]
    ended = subprocess.run([*command, "--release-key", OTHER.public.hex()], check=False, capture_output=True, text=True)
    assert ended.returncode == installer.EXIT_BUNDLE
    assert ended.stderr == "install.py: error: the kit is not sealed by this release key; ask its maker for another\n"
    assert not (tmp_path / "opt").exists()
    assert hashlib.sha256((folder / "install.py").read_bytes()).hexdigest() in (folder / "manifest.json").read_text()
