"""The wheels of a kit are those that the lock names for its target, with the lock's hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from covey_deploy import targets, wheelhouse
from covey_deploy.agent_wheel import agent_wheel
from covey_deploy.targets import PYTHONS, TARGETS, Target, described, glibc_of, named
from covey_deploy.wheelhouse import Wheelhouse, lock_file, pinned
from covey_edge.wheels import look_at
from covey_protocol.errors import ConfigError, TransportError

LOCK = lock_file().read_text()
BOOKWORM, TRIXIE = TARGETS["pios-bookworm-arm64"], TARGETS["pios-trixie-arm64"]


def versions(target: Target) -> dict[str, str]:
    found = pinned(LOCK, target)
    assert len({one.name for one in found}) == len(found), "one version of each"
    return {one.name: one.version for one in found}


def test_a_condition_of_the_lock_is_judged_for_the_target_and_not_for_the_python_that_runs() -> None:
    """pip judges it for itself: a kit for trixie would get the runtime of bookworm."""
    bookworm, trixie = versions(BOOKWORM), versions(TRIXIE)
    assert bookworm["numpy"].startswith("1.")
    assert trixie["numpy"].startswith("2.")
    assert "ai-edge-litert" not in bookworm
    assert "tflite-runtime" not in trixie
    assert "colorama" not in trixie  # for Windows alone
    assert "tomli" in versions(described("3.10", "aarch64", "2.36"))
    assert not set(wheelhouse.NOT_CARRIED) & (set(bookworm) | set(trixie))


@pytest.mark.parametrize("python", PYTHONS)
def test_every_python_has_all_that_the_agent_asks_for(python: str) -> None:
    target = described(python, "arm64", "2.36")
    found = versions(target)
    assert {"click", "cryptography", "msgspec", "numpy", "paho-mqtt", target.runtime} <= set(found)
    assert all(len(digest) == 64 for one in pinned(LOCK, target) for digest in one.hashes)


def test_a_lock_without_hashes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"numpy==1\.26\.4"):
        pinned("numpy==1.26.4\n", BOOKWORM)
    with pytest.raises(ConfigError, match="numpy>=1"):
        pinned(f"numpy>=1 --hash=sha256:{'0' * 64}\n", BOOKWORM)


def test_a_target_takes_the_wheels_that_its_c_library_allows() -> None:
    platforms = list(BOOKWORM.platforms())
    assert platforms[0] == "manylinux_2_36_aarch64"
    assert platforms[-2:] == ["manylinux_2_17_aarch64", "manylinux2014_aarch64"]
    assert "manylinux1_x86_64" in TARGETS["debian-12-amd64"].platforms()
    assert glibc_of("numpy-1.26.4-cp311-cp311-manylinux_2_17_aarch64.manylinux2014_aarch64.whl") == "2.17"
    assert glibc_of("tflite_runtime-2.14.0-cp311-cp311-manylinux2014_x86_64.whl") == "2.17"
    assert glibc_of("msgspec-0.22.0-cp311-cp311-manylinux_2_17_aarch64.manylinux_2_28_aarch64.whl") == "2.17"
    assert glibc_of("click-8.5.1-py3-none-any.whl") == "2.0"


NO_TARGETS = {
    "pios-bookworm-armhf": "numpy, msgspec and ai-edge-litert have no armv7 wheels",
    "alpine-3.20-arm64": "no TFLite runtime has a musl wheel",
    "pios-bullseye-arm64": "glibc 2.31 is too old",
    "pios-bookwurm-arm64": "did you mean pios-bookworm-arm64",
}


@pytest.mark.parametrize("name", NO_TARGETS)
def test_what_has_no_kit_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=NO_TARGETS[name]):
        named(name)


@pytest.mark.parametrize(
    ("python", "arch", "glibc"), [("3.8", "arm64", "2.36"), ("3.11", "armv7l", "2.36"), ("3.11", "arm64", "musl")]
)
def test_facts_that_describe_no_target_are_refused(python: str, arch: str, glibc: str) -> None:
    with pytest.raises(ConfigError, match=r"armv7|Python 3\.8|glibc"):
        described(python, arch, glibc)
    assert all(target.machine in targets.MACHINES for target in TARGETS.values())


def test_the_cache_is_taken_where_it_is_whole_and_never_where_it_is_not(tmp_path: Path) -> None:
    wanted = pinned(LOCK, BOOKWORM)
    house = Wheelhouse(tmp_path)
    with pytest.raises(TransportError, match="without --offline"):
        house.wheels(wanted, BOOKWORM, offline=True)
    digest = hashlib.sha256(b"a wheel").hexdigest()
    (tmp_path / f"{wheelhouse._key(wanted, BOOKWORM)}.json").write_text(json.dumps({"a-1-py3-none-any.whl": digest}))
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(b"a wheel")
    assert house.wheels(wanted, BOOKWORM, offline=True) == {"a-1-py3-none-any.whl": b"a wheel"}
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(b"a whell")
    with pytest.raises(TransportError, match="without --offline"):
        house.wheels(wanted, BOOKWORM, offline=True)
    with pytest.raises(TransportError, match="without --offline"):
        house.wheels(wanted[:-1], BOOKWORM, offline=True)  # another lock


def test_the_agents_wheel_is_whole_and_the_same_again() -> None:
    name, data = agent_wheel()
    assert agent_wheel() == (name, data)
    facts = look_at(name, data)  # as a device looks at a release
    assert facts.name == "covey-edge"
    assert {"covey_edge/agent.py", "covey_edge/py.typed", "covey_protocol/codec.py"} <= set(facts.files)
    assert "covey_edge/sensors/__init__.py" in facts.files
    assert (
        b"agent = covey_edge.cli_agent:agent" in facts.files[f"covey_edge-{facts.version}.dist-info/entry_points.txt"]
    )
    assert any(need.startswith("numpy") for need in facts.requires)
