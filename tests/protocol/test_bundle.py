"""A bundle opens only if every byte of it is what its maker sealed; opening never loads the model."""

import io
import json
import struct
import zipfile

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_protocol.bundle import (
    MANIFEST_NAME,
    REQUIRED_SIGNATURES,
    Manifest,
    Proof,
    TensorSpec,
    read_bundle,
    write_bundle,
)
from covey_protocol.errors import BundleError
from covey_protocol.parameters import ParameterSpec, offsets, total_size
from covey_protocol.seals import SealingKey

KEY = SealingKey.from_seed(bytes(32))
MANIFEST = Manifest(
    format=1,
    name="m",
    model_sha256="",
    model_bytes=0,
    batch_size=4,
    input=TensorSpec((3,), "float32", 0, 1),
    label=TensorSpec((), "int32", 0, 1),
    parameters=(ParameterSpec("dense/kernel", (3, 2)), ParameterSpec("dense/bias", (2,))),
    signatures=REQUIRED_SIGNATURES,
    loss="sparse_categorical_crossentropy",
    optimizer="sgd",
)
SEALED = write_bundle(MANIFEST, b"model bytes", KEY)


def rezip(**changes: bytes | None) -> bytes:
    """SEALED with entries replaced (bytes) or left out (None)."""
    names = {"model": "model.tflite", "manifest": "manifest.json", "seal": "seal", "extra": "extra"}
    with zipfile.ZipFile(io.BytesIO(SEALED)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    for key, content in changes.items():
        if content is None:
            del entries[names[key]]
        else:
            entries[names[key]] = content
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_a_sealed_bundle_opens_with_its_makers_key() -> None:
    bundle = read_bundle(SEALED, KEY.public)
    assert bundle.model == b"model bytes"
    assert bundle.sealed
    assert bundle.manifest.dimension == 8


def test_the_same_model_gives_the_same_bytes() -> None:
    assert write_bundle(MANIFEST, b"model bytes", KEY) == SEALED


def test_an_unsealed_bundle_opens_only_where_no_seal_is_asked() -> None:
    data = write_bundle(MANIFEST, b"model bytes")
    assert not read_bundle(data).sealed
    with pytest.raises(BundleError, match="no seal"):
        read_bundle(data, KEY.public)


OTHER = SealingKey.from_seed(bytes([9]) * 32)
manifest_bytes = zipfile.ZipFile(io.BytesIO(SEALED)).read(MANIFEST_NAME)
BAD = {
    "sealed by someone else": (write_bundle(MANIFEST, b"model bytes", OTHER), "not the expected coordinator's"),
    "another model under the same seal": (rezip(model=b"model byteX"), "does not match its manifest"),
    "a changed manifest under the same seal": (
        rezip(manifest=manifest_bytes.replace(b'"m"', b'"n"')),
        "not the expected coordinator's",
    ),
    "no seal": (rezip(seal=None), "no seal"),
    "an extra file": (rezip(extra=b"x"), "unexpected files"),
    "no model": (rezip(model=None), "unexpected files"),
    "not a zip": (b"PK nonsense", "not a covey bundle"),
    "nothing": (b"", "not a covey bundle"),
    "cut off": (SEALED[:-40], "not a covey bundle"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bundle_is_refused_and_the_error_says_why(what: str) -> None:
    data, message = BAD[what]
    with pytest.raises(BundleError, match=message):
        read_bundle(data, KEY.public)


@given(st.binary(max_size=200))
def test_any_manifest_is_read_or_refused(manifest: bytes) -> None:
    with pytest.raises(BundleError):
        read_bundle(rezip(manifest=manifest, seal=None))


@pytest.mark.parametrize("manifest", [b'{"name": "\xff"}', b"\xff", b"[" * 100_000, b'{"metadata": ' * 100_000])
def test_a_manifest_that_is_no_text_or_without_end_is_refused(manifest: bytes) -> None:
    for data in (rezip(manifest=manifest, seal=None), rezip(manifest=manifest)):
        with pytest.raises(BundleError):
            read_bundle(data)


BAD_MANIFESTS = {
    "a future format": ({"format": 2}, "has format 2"),
    "an entry point too few": ({"signatures": ("train",)}, "lacks the entry points evaluate"),
    "no parameters": ({"parameters": ()}, "parameter list"),
    "a negative size": ({"parameters": (ParameterSpec("a", (-1,)),)}, "parameter list"),
    "no batch": ({"batch_size": 0}, "batch size"),
    "a train input of a later covey": ({"train_inputs": ("seed", "momentum")}, r"\(momentum\); update covey"),
}


@pytest.mark.parametrize("what", BAD_MANIFESTS)
def test_a_manifest_that_cannot_be_used_is_refused(what: str) -> None:
    changes, message = BAD_MANIFESTS[what]
    format_version = changes.get("format", 1)
    data = write_bundle(msgspec.structs.replace(MANIFEST, **changes), b"x")
    if format_version != 1:
        manifest = zipfile.ZipFile(io.BytesIO(data)).read(MANIFEST_NAME)
        data = rezip(model=b"x", manifest=manifest.replace(b'"format": 1', b'"format": 2'), seal=None)
    with pytest.raises(BundleError, match=message):
        read_bundle(data)


def test_a_manifest_that_uses_no_young_field_does_not_name_it() -> None:
    """An old device refuses manifests with keys it does not know, and must be able to read this one."""
    assert "train_inputs" not in json.loads(manifest_bytes)
    proof = Proof(6, 1e-7, 1e-5, "tflite_runtime")
    data = write_bundle(msgspec.structs.replace(MANIFEST, proof=proof), b"x")
    entry = zipfile.ZipFile(io.BytesIO(data)).read(MANIFEST_NAME)
    assert sorted(json.loads(entry)["proof"]) == ["max_abs_error", "runtime", "steps", "tolerance"]
    assert read_bundle(data).manifest.proof == proof


NUMBERS = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 0xFFFF, 0x10000, 2**31, 2**32 - 1]))
DAMAGES = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, len(SEALED) - 1), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.integers(0, len(SEALED) - 1), st.integers(1, len(SEALED))),
    st.tuples(st.just("number"), st.integers(0, len(SEALED) - 1), NUMBERS),  # sizes and offsets of the zip
    st.tuples(st.just("double"), st.integers(0, len(SEALED) - 1), st.integers(1, 200)),
)


def damaged(data: bytes, damage: tuple[str, int, int]) -> bytes:
    what, place, value = damage
    if what == "flip":
        return data[:place] + bytes([data[place] ^ value]) + data[place + 1 :] if place < len(data) else data
    if what == "number":
        return data[:place] + struct.pack("<I", value) + data[place + 4 :]
    return data[:place] + (data[place + value :] if what == "cut" else data[place : place + value] + data[place:])


@given(st.lists(DAMAGES, min_size=1, max_size=4))
@settings(max_examples=400)
def test_no_damaged_file_reaches_the_runtime(damages: list[tuple[str, int, int]]) -> None:
    """Either the bundle is refused, or what is read is exactly what was sealed (zip padding may change)."""
    data = SEALED
    for damage in damages:
        data = damaged(data, damage)
    try:
        bundle = read_bundle(data, KEY.public)
    except BundleError:
        return
    assert bundle == read_bundle(SEALED)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=8))
def test_offsets_tile_the_flat_vector(shapes: list[tuple[int, int]]) -> None:
    specs = [ParameterSpec(f"p{i}", shape) for i, shape in enumerate(shapes)]
    places = list(offsets(specs).values())
    assert places[0].start == 0
    assert places[-1].stop == total_size(specs)
    assert all(a.stop == b.start for a, b in zip(places, places[1:]))


def test_two_parameters_of_one_name_are_refused() -> None:
    with pytest.raises(BundleError, match="occurs twice"):
        offsets([ParameterSpec("a", (1,)), ParameterSpec("a", (2,))])
