"""Releases on the wire: only what their maker sealed, never backwards, and any other bytes are refused by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_protocol.errors import ReleaseError, UsageError
from covey_protocol.messages import BlobRef
from covey_protocol.releases import (
    MAGIC,
    MAX_NAMED,
    MAX_RELEASE_BYTES,
    MAX_SEALED_BYTES,
    Release,
    Wheel,
    is_for,
    open_release,
    place_of,
    read_release_file,
    refusal,
    release_file,
    seal_release,
)
from covey_protocol.seals import PublicKey, SealingKey
from covey_protocol.versions import fits, requirement, version_of

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "releases-v1.json").read_text())
KEY = SealingKey.from_seed(bytes(range(128, 160)))
DATA = b"not a wheel, which nobody here looks at"


def a_release(**changes: object) -> Release:
    wheel = Wheel("covey_edge-0.2.0-py3-none-any.whl", BlobRef(hashlib.sha256(DATA).digest(), len(DATA)))
    return msgspec.structs.replace(Release("0.2.0", 20, (wheel,)), **changes)


@pytest.mark.parametrize("name", GOLDEN["vectors"])
def test_sealed_releases_are_the_golden_bytes(name: str) -> None:
    vector = GOLDEN["vectors"][name]
    opened = open_release(bytes.fromhex(vector["sealed"]), PublicKey.from_hex(GOLDEN["public_key"]))
    assert json.loads(msgspec.json.encode(opened)) == vector["release"]
    assert seal_release(opened, KEY).hex() == vector["sealed"]


def test_a_file_gives_back_what_was_put_into_it() -> None:
    release = a_release()
    sealed = seal_release(release, KEY)
    assert read_release_file(release_file(sealed, [DATA]), KEY.public) == (sealed, release, [DATA])


@settings(deadline=None)  # a busy machine is slow
@given(st.binary(max_size=300))
def test_any_bytes_are_a_release_or_a_refusal(data: bytes) -> None:
    for read in (open_release, read_release_file):
        with pytest.raises(ReleaseError):
            read(data, KEY.public)
    with pytest.raises(ReleaseError):
        read_release_file(MAGIC + data, KEY.public)


WHOLE = release_file(seal_release(a_release(), KEY), [DATA])


@settings(deadline=None)  # a busy machine is slow
@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_no_byte_of_a_file_can_be_changed(place: int, change: int) -> None:
    changed = bytearray(WHOLE)
    changed[place] ^= change
    with pytest.raises(ReleaseError):
        read_release_file(bytes(changed), KEY.public)


@settings(deadline=None)  # a busy machine is slow
@given(st.integers(0, len(WHOLE) - 1))
def test_a_file_that_ends_early_is_refused(length: int) -> None:
    with pytest.raises(ReleaseError, match=r"too early|not a covey release"):
        read_release_file(WHOLE[:length], KEY.public)


def test_a_file_with_something_behind_it_is_refused() -> None:
    with pytest.raises(ReleaseError, match="more in it"):
        read_release_file(WHOLE + b"x", KEY.public)


def test_another_key_is_refused_by_name() -> None:
    with pytest.raises(ReleaseError, match="not sealed by the pinned release_key"):
        open_release(seal_release(a_release(), SealingKey.generate()), KEY.public)


def test_a_description_of_any_size_is_not_decoded() -> None:
    with pytest.raises(ReleaseError, match="description of"):
        open_release(bytes(MAX_SEALED_BYTES + 1), KEY.public)


BOUNDS = {
    "a version with letters": {"version": "0.2.0rc1"},
    "a version that is a path": {"version": "../../etc"},
    "a share above one": {"share": 1.5},
    "no wheel": {"wheels": ()},
    "a wheel that is a path": {"wheels": (Wheel("../x.whl", BlobRef(bytes(32), 1)),)},
    "the same wheel twice": {"wheels": (Wheel("a.whl", BlobRef(bytes(32), 1)),) * 2},
    "too much": {"wheels": (Wheel("a.whl", BlobRef(bytes(32), MAX_RELEASE_BYTES + 1, 2**20)),)},
    "a serial of zero": {"serial": 0},
    "nobody named": {"devices": ()},
    "a device whose name is a path": {"devices": ("../x",)},
    "too many devices": {"devices": tuple(f"device-{number}" for number in range(MAX_NAMED + 1))},
}


@pytest.mark.parametrize("what", BOUNDS)
def test_values_out_of_bounds_are_refused_though_sealed(what: str) -> None:
    known = {name: value for name, value in msgspec.structs.asdict(a_release()).items() if value is not msgspec.UNSET}
    fields = {**known, **BOUNDS[what]}
    body = msgspec.msgpack.encode({"type": "release", **fields})
    sealed = msgspec.msgpack.encode([1, body, KEY.seal(b"covey release\x00" + body)])
    with pytest.raises(ReleaseError, match="cannot be read"):
        open_release(sealed, KEY.public)


def test_a_seal_over_a_message_is_none_over_a_release() -> None:
    body = msgspec.msgpack.encode(a_release())
    sealed = msgspec.msgpack.encode([1, body, KEY.seal(b"covey message\x00" + body)])
    with pytest.raises(ReleaseError, match="not sealed"):
        open_release(sealed, KEY.public)


REFUSALS = {
    "older news than what was heard": ({"serial": 19}, "older news"),
    "a downgrade": ({"version": "0.0.9"}, "older than this agent"),
    "another Python": ({"requires_python": ">=3.12"}, "needs Python >=3.12, this one is 3.11"),
    "too large a step": ({"minimum_version": "0.1.5"}, "can follow 0.1.5 and newer"),
    "a Python that cannot be read": ({"requires_python": "snake"}, "no version specifier"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_who_does_not_install_it(what: str) -> None:
    changes, words = REFUSALS[what]
    assert words in refusal(a_release(**changes), "0.1.0", "3.11", 20)


def test_who_installs_it() -> None:
    fit = a_release(requires_python=">=3.9,<3.14", minimum_version="0.1.0")
    assert refusal(fit, "0.1.0", "3.11", 20) == ""
    assert refusal(fit, "0.2.0", "3.11", 20) == ""  # its own: nothing to do, nothing wrong


def test_a_description_that_names_as_many_devices_as_it_may_is_read() -> None:
    named = a_release(share=0.0, devices=tuple(f"{number:063}" for number in range(MAX_NAMED)))
    assert open_release(seal_release(named, KEY), KEY.public) == named


def test_a_device_that_is_named_need_not_wait_for_the_share() -> None:
    canary = a_release(share=0.0, devices=("kitchen-pi",))
    assert [is_for(canary, name) for name in ("kitchen-pi", "hall-pi")] == [True, False]
    assert is_for(a_release(share=1.0, devices=("kitchen-pi",)), "hall-pi")
    assert not is_for(a_release(share=0.0), "kitchen-pi")


def test_a_share_is_about_that_many_devices_and_others_with_another_version() -> None:
    names = [f"device-{number}" for number in range(2000)]
    first = {name for name in names if place_of("0.2.0", name) < 0.1}
    second = {name for name in names if place_of("0.3.0", name) < 0.1}
    assert 160 <= len(first) <= 240  # binomial: mean 200, 3 standard deviations are 40
    assert len(first & second) < 50
    assert first <= {name for name in names if place_of("0.2.0", name) < 0.3}  # who has it stays within


def test_a_place_is_what_the_specification_says() -> None:
    assert round(place_of("0.2.0", "kitchen-pi"), 6) == 0.041252


def test_versions_are_compared_as_numbers() -> None:
    assert version_of("1.20.0") == version_of("1.20")
    assert version_of("0.10") > version_of("0.9.9")


SPECIFIERS = {
    ">=1.22,<2": {"1.22": True, "1.26.4": True, "2.0": False, "1.21.9": False},
    "==2.14.0": {"2.14": True, "2.14.0": True, "2.14.1": False},
    "~=1.4.2": {"1.4.2": True, "1.4.9": True, "1.5.0": False},
    "==1.*": {"1.9": True, "2.0": False},
    "!=1.5": {"1.5.0": False, "1.6": True},
    "": {"7": True},
}


@pytest.mark.parametrize("specifier", SPECIFIERS)
def test_specifiers(specifier: str) -> None:
    for version, fitting in SPECIFIERS[specifier].items():
        assert fits(version, specifier) is fitting, version


def test_requirements_apply_to_this_python_or_are_named() -> None:
    assert requirement("numpy<2,>=1.22; python_version < '3.12'", "3.11") == ("numpy", "<2,>=1.22")
    assert requirement("numpy<2,>=1.22; python_version < '3.12'", "3.12") == ("", "")
    assert requirement("rich (>=10); extra == 'pretty'", "3.11") == ("", "")
    assert requirement("paho-mqtt", "3.11") == ("paho-mqtt", "")
    with pytest.raises(UsageError, match="platform_machine"):
        requirement("x; platform_machine == 'armv7l'", "3.11")
