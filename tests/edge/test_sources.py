"""What each data source reads, and how it names what is wrong; the files are real ones."""

from __future__ import annotations

import io
import random
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_edge import data_sources, image_decoding
from covey_edge.data_sources import read_source, state_of
from covey_edge.png import png
from covey_edge.table_rows import Table
from covey_protocol.errors import ConfigError, DataError, MachineError

# --- csv

PLAIN = "temperature,humidity,label\n21.5,40,0\n22.5,50,1\n"
CSV: dict[str, tuple[bytes, dict[str, Any]]] = {
    "a header and numbers": (PLAIN.encode(), {}),
    "a byte order mark": (PLAIN.encode("utf-8-sig"), {}),
    "UTF-16": (PLAIN.encode("utf-16"), {"encoding": "utf-16"}),
    "lines that end as on Windows, and blank ones": (PLAIN.replace("\n", "\r\n").encode() + b"\r\n\r\n", {}),
    "semicolons and decimal commas": (
        PLAIN.replace(",", ";").replace(".", ",").encode(),
        {"delimiter": ";", "decimal": ","},
    ),
    "quotes": (b'"temperature","humidity","label"\n"21.5","40","0"\n"22.5","50","1"\n', {}),
    "other quotes": (b"temperature,'humidity',label\n21.5,'40',0\n22.5,50,1\n", {"quote": "'"}),
    "blanks around cells": (b"temperature, humidity, label\n21.5, 40, 0\n22.5 , 50 , 1\n", {}),
    "no header": (b"21.5,40,0\n22.5,50,1\n", {"header": False, "label": "2"}),
    "columns by name, others left out": (
        b"when,label,humidity,temperature\nmon,0,40,21.5\ntue,1,50,22.5\n",
        {"columns": ["temperature", "humidity"]},
    ),
    "texts with codes": (
        b"temperature,humidity,label\n21.5,dry,off\n22.5,wet,on\n",
        {"codes": {"humidity": {"dry": 40, "wet": 50}, "label": ["off", "on"]}},
    ),
    "a value for what is missing, though it is a number": (
        b"temperature,humidity,label\n21.5,-999,0\n22.5,50,1\n",
        {"fill": 40.0, "missing": ["-999"]},
    ),
}


@pytest.mark.parametrize("what", CSV)
def test_a_table_is_read_with(what: str, tmp_path: Path) -> None:
    content, options = CSV[what]
    (tmp_path / "t.csv").write_bytes(content)
    table = read_source("csv", tmp_path / "t.csv", options)
    np.testing.assert_array_equal(table.x, [[21.5, 40], [22.5, 50]])
    np.testing.assert_array_equal(table.y, [0, 1])
    assert table.left_out == ()
    assert table.x.dtype == np.float32


def test_bad_rows_are_left_out_by_line_column_and_reason(tmp_path: Path) -> None:
    lines = ["a,b,label", "1,2,0", "x,2,0", "1,,0", "1,2", "1,2,", "1,2,0", "y,2,0"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    table = read_source("csv", tmp_path / "t.csv", {})
    assert list(table.places or ()) == [2, 7]
    assert {(one.column, one.reason): (one.count, one.first) for one in table.left_out} == {
        ("a", "not a number"): (2, ("3", "8")),
        ("b", "no value"): (1, ("4",)),
        ("", "2 cells in place of 3"): (1, ("5",)),
        ("label", "no label"): (1, ("6",)),
    }


def test_several_labels_a_shape_and_whole_numbers_above_float32(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b,c,d,p,q\n16777217,2,3,4,5,6\n")
    table = read_source("csv", tmp_path / "t.csv", {"label": ["p", "q"], "shape": [2, 2], "precise": True})
    np.testing.assert_array_equal(table.x, [[[16777217, 2], [3, 4]]])
    np.testing.assert_array_equal(table.y, [[5, 6]])


BAD_CSV: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "an unknown column names the nearest": (PLAIN.encode(), {"columns": ["temprature"]}, "did you mean 'temperature'"),
    "the wrong delimiter shows what is there": (PLAIN.replace(",", ";").encode(), {}, "temperature;humidity;label"),
    "a column twice": (b"a,a,label\n1,1,1\n", {}, "two columns 'a'"),
    "another encoding": ("a,label\n1é,1\n".encode("latin-1"), {}, "not text in utf-8"),
    "a quote that does not end": (b'a,label\n"1,1\n', {}, "line 2"),
    "a NUL": (b"a,label\n1\x00,1\n", {}, "t.csv"),
    "nothing": (b"", {}, "no rows"),
    "a head alone": (b"a,label\n", {}, "no examples"),
    "only a label": (b"label\n1\n", {}, "no column beside"),
    "a shape of another size": (PLAIN.encode(), {"shape": [3]}, "do not make examples"),
}


@pytest.mark.parametrize("what", BAD_CSV)
def test_a_table_is_refused_with(what: str, tmp_path: Path) -> None:
    content, options, message = BAD_CSV[what]
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepared_rows(read_source("csv", tmp_path / "t.csv", options))


def prepared_rows(table: Table) -> None:
    """A row with a NUL is a bad row to new Pythons and an error of the file to old ones."""
    if table.left_out:
        raise DataError("t.csv: " + str(table.left_out[0]))


@pytest.mark.slow
def test_a_table_of_200_mb_is_read_in_little_more_than_its_numbers_take(tmp_path: Path) -> None:
    """100,000 rows of 100 columns: 40 MB of numbers, 202 MB of text."""
    import subprocess
    import sys

    row = ",".join(["-0.12345678901234567"] * 100)
    with (tmp_path / "t.csv").open("w") as file:
        file.write(",".join([*(f"c{place}" for place in range(100)), "label"]) + "\n")
        for _ in range(100_000):
            file.write(f"{row},1\n")
    script = """
import resource, sys
from pathlib import Path
from covey_edge.examples import prepared
from covey_edge.reading import Reading
import covey_edge.csv_source
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
done = prepared("csv", Path(sys.argv[1]), Reading())
print(done.x.nbytes // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "t.csv")], capture_output=True, check=True)
    size_kb, more_kb = map(int, ended.stdout.split())
    print(f"{size_kb} KiB of numbers, {more_kb} KiB at most")
    assert more_kb < 2 * size_kb


# --- sqlite


def database(path: Path, *statements: str) -> sqlite3.Connection:
    made = sqlite3.connect(path)
    for statement in (
        "CREATE TABLE readings (id INTEGER PRIMARY KEY, time REAL, a REAL, kind TEXT, label REAL)",
        *statements,
    ):
        made.execute(statement)
    made.commit()
    return made


def insert(made: sqlite3.Connection, *rows: tuple[object, ...]) -> None:
    made.executemany("INSERT INTO readings (time, a, kind, label) VALUES (?, ?, ?, ?)", rows)
    made.commit()


KINDS = {"codes": {"kind": ["cold", "warm"]}}


def test_a_table_of_a_database_is_read_without_its_key_its_time_and_what_has_no_label(tmp_path: Path) -> None:
    made = database(tmp_path / "d.sqlite")
    insert(made, (1, 1.5, "cold", 0), (2, 2.5, "warm", None), (3, 3.5, "warm", 1), (4, None, "warm", 1))
    table = read_source("sqlite", tmp_path / "d.sqlite", {"table": "readings", **KINDS})
    np.testing.assert_array_equal(table.x, [[1.5, 0], [3.5, 1]])
    np.testing.assert_array_equal(table.y, [0, 1])
    assert table.columns == ("a", "kind")
    assert list(table.places or ()) == [1, 3]
    assert table.notes == ("1 rows have no label yet",)
    assert [str(one) for one in table.left_out] == ["1 rows: a: no value (4)"]


def test_the_newest_rows_and_the_last_days(tmp_path: Path) -> None:
    now = time.time()
    made = database(tmp_path / "d.sqlite")
    insert(made, *((now - 86400 * days, days, "cold", 0) for days in (9.5, 4.5, 1.5, 0.5)), (now, 0, "cold", None))
    path, options = tmp_path / "d.sqlite", {"table": "readings", "columns": ["a"]}
    assert read_source("sqlite", path, {**options, "newest": 2}).x.tolist() == [[1.5], [0.5]]
    assert read_source("sqlite", path, {**options, "days": 5}).x.tolist() == [[4.5], [1.5], [0.5]]
    made.execute("UPDATE readings SET time = time * 1000")
    made.commit()
    assert read_source("sqlite", path, {**options, "days": 5}).x.tolist() == [[4.5], [1.5], [0.5]]
    made.execute("CREATE TABLE texts AS SELECT datetime(time / 1000, 'unixepoch') AS time, a, label FROM readings")
    made.commit()
    assert read_source("sqlite", path, {**options, "table": "texts", "days": 2}).x.tolist() == [[1.5], [0.5]]


def test_a_query_is_read_and_can_change_nothing(tmp_path: Path) -> None:
    made = database(tmp_path / "d.sqlite")
    insert(made, (1, 1.5, "cold", 0), (2, 2.5, "warm", 1))
    path = tmp_path / "d.sqlite"
    table = read_source("sqlite", path, {"query": "SELECT a * 2 AS double, label FROM readings ORDER BY a DESC"})
    assert table.x.tolist() == [[5.0], [3.0]]
    for query in ("DELETE FROM readings", "CREATE TABLE other (a)"):
        with pytest.raises(DataError, match="readonly"):
            read_source("sqlite", path, {"query": query})
    assert made.execute("SELECT count(*) FROM readings").fetchone() == (2,)


BAD_SQLITE = {
    "no such table": ({"table": "redings"}, "no table 'redings'; it has: readings"),
    "no such column": ({"table": "readings", "columns": ["b"]}, "no column 'b'"),
    "wrong SQL": ({"query": "SELEC 1"}, "syntax error"),
    "days without a time": ({"table": "readings", "days": 1, "time": "at"}, "no column 'at' for `days`"),
}


@pytest.mark.parametrize("what", BAD_SQLITE)
def test_a_database_is_refused_with(what: str, tmp_path: Path) -> None:
    options, message = BAD_SQLITE[what]
    insert(database(tmp_path / "d.sqlite"), (1, 1.5, "cold", 0))
    with pytest.raises(DataError, match=message):
        read_source("sqlite", tmp_path / "d.sqlite", options)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(DataError, match=r"d\.sqlite cannot be read \(file is not a database\)"):
        read_source("sqlite", tmp_path / "d.sqlite", {"table": "readings"})


def test_what_a_recorder_wrote_is_noticed_before_it_is_in_the_file_itself(tmp_path: Path) -> None:
    path, options = tmp_path / "d.sqlite", {"table": "readings", "columns": ["a"]}
    made = database(path)
    made.execute("PRAGMA journal_mode = WAL")
    insert(made, (1, 1.0, "cold", 0))
    states = [state_of("sqlite", path, options)]
    size = path.stat().st_size
    insert(made, (2, 2.0, "cold", 0))
    assert path.stat().st_size == size  # it lies in the log
    states.append(state_of("sqlite", path, options))
    assert states[0] != states[1] == state_of("sqlite", path, options)
    assert len(read_source("sqlite", path, options).x) == 2


# --- python

FUNCTION = """
import numpy as np

def read(scale=1.0):
    return np.ones((3, 2)) * scale, np.zeros(3)

def broken():
    secret = "37.2"
    return float(secret + "x")

def odd():
    return [1, 2]

def gone():
    raise SystemExit(3)
"""


@pytest.fixture
def function(tmp_path: Path) -> Path:
    (tmp_path / "own_data.py").write_text(FUNCTION)
    return tmp_path


def test_a_function_of_the_owner_by_file_or_module(function: Path) -> None:
    for path in ("own_data.py:read", "own_data:read"):
        table = read_source("python", function / path, {"arguments": {"scale": 2.0}})
        np.testing.assert_array_equal(table.x, np.full((3, 2), 2.0))
    (function / "own_data.py").write_text(FUNCTION.replace("scale=1.0", "scale=5.0"))
    assert read_source("python", function / "own_data.py:read", {}).x[0, 0] == 5.0  # without a restart


BAD_FUNCTIONS = {
    "an error of its own": ("own_data.py:broken", r"failed with ValueError in line 9 of own_data\.py; the log"),
    "an end of the process": ("own_data.py:gone", "SystemExit in line 15"),
    "what is no pair": ("own_data.py:odd", "returned list, not a pair"),
    "another name": ("own_data.py:red", "no function 'red'"),
    "no name": ("own_data.py", "names no function"),
    "no file": ("none.py:read", "cannot be read"),
    "no module": ("no_such_module:read", "ModuleNotFoundError"),
}


@pytest.mark.parametrize("what", BAD_FUNCTIONS)
def test_a_function_is_refused_for(what: str, function: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, message = BAD_FUNCTIONS[what]
    with pytest.raises(DataError, match=message) as caught:
        read_source("python", function / path, {})
    if what == "an error of its own":
        assert "37.2" not in str(caught.value)  # it may be told to the coordinator
        assert "37.2x" in capfd.readouterr().err


def test_a_function_that_everybody_can_change_is_not_called(function: Path) -> None:
    (function / "own_data.py").chmod(0o666)
    with pytest.raises(DataError, match="can be changed by everybody"):
        read_source("python", function / "own_data.py:read", {})


# --- images


def pillow_png(array: np.ndarray, mode: str, **how: Any) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(array, **({} if mode == "I;16" else {"mode": None})).convert(mode).save(file, "PNG", **how)
    return file.getvalue()


def noisy(height: int, width: int, channels: int) -> np.ndarray:
    """Smooth with some noise: Pillow then uses every filter of PNG."""
    rng = np.random.default_rng(height + channels)
    slope = np.add.outer(np.arange(height), np.arange(width))[:, :, None] * (1 + np.arange(channels)) * 2
    return ((slope + rng.integers(0, 4, (height, width, channels))) % 256).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (37, 23), (16, 64)])
def test_a_png_of_another_program_is_decoded_bit_by_bit(shape: tuple[int, int], channels: int) -> None:
    array = noisy(*shape, channels)
    data = pillow_png(array[:, :, 0] if channels == 1 else array, "L" if channels == 1 else "RGB")
    np.testing.assert_array_equal(np.rint(image_decoding.decoded(data) * 255), array)
    np.testing.assert_array_equal(np.rint(image_decoding.decoded(png(array)) * 255), array)


def test_every_filter_of_png_is_undone() -> None:
    """Against a plain loop over bytes, as the standard has it, for each filter and for rows of all kinds mixed."""
    rng = random.Random(1)
    for kinds in ([0], [1], [2], [3], [4], [4, 3, 2, 1, 0]):
        for step in (1, 3, 8):
            rows = [[kinds[row % len(kinds)], *(rng.randrange(256) for _ in range(5 * step))] for row in range(6)]
            found = image_decoding._unfiltered(np.array(rows, np.uint8), step)
            assert found.tolist() == unfiltered_by_the_book(rows, step)


def unfiltered_by_the_book(rows: list[list[int]], step: int) -> list[list[int]]:
    before, done = [0] * (len(rows[0]) - 1), []
    for kind, *line in rows:
        out: list[int] = []
        for place, value in enumerate(line):
            left, between = (out[place - step], before[place - step]) if place >= step else (0, 0)
            above = before[place]
            guess = left + above - between
            paeth = min((left, above, between), key=lambda one: abs(guess - one))
            out.append((value + (0, left, above, (left + above) // 2, paeth)[kind]) % 256)
        done.append(out)
        before = out
    return done


def test_palettes_transparency_and_sixteen_bits() -> None:
    from PIL import Image

    grey = noisy(9, 11, 1)[:, :, 0]
    palette = Image.fromarray(grey // 64 * 64).quantize(4)
    file = io.BytesIO()
    palette.save(file, "PNG", bits=2)
    np.testing.assert_allclose(
        image_decoding.decoded(file.getvalue()) * 255, np.asarray(palette.convert("RGB")), atol=1e-4
    )
    layered = noisy(9, 11, 4)
    seen = layered[:, :, :3] * (layered[:, :, 3:] / 255) + 255 - layered[:, :, 3:]
    np.testing.assert_allclose(image_decoding.decoded(pillow_png(layered, "RGBA")) * 255, seen, atol=1e-3)
    deep = np.arange(99, dtype=np.uint16).reshape(9, 11) * 600
    np.testing.assert_allclose(image_decoding.decoded(pillow_png(deep, "I;16"))[:, :, 0], deep / 65535, atol=1e-6)
    single = np.array([[0, 255, 255, 0, 255, 0, 0, 0, 255]] * 2, np.uint8)
    np.testing.assert_array_equal(image_decoding.decoded(pillow_png(single, "1"))[:, :, 0], single / 255)


PNM = {
    "PGM of text": b"P2 # made by hand\n2 1\n# most\n10\n0 5\n",
    "PGM of bytes": b"P5\n2 1\n10\n\x00\x05",
    "PGM of two bytes": b"P5 2 1 2000 \x00\x00\x03\xe8",
    "PPM of text": b"P3 2 1 10 0 0 0 5 5 5",
    "PPM of bytes": b"P6 2 1 10 \x00\x00\x00\x05\x05\x05",
}


@pytest.mark.parametrize("what", PNM)
def test_portable_maps_are_decoded(what: str) -> None:
    pixels = image_decoding.decoded(PNM[what])
    assert pixels.shape == (1, 2, 3 if "PPM" in what else 1)
    np.testing.assert_allclose(pixels[0].max(axis=1), [0, 0.5])


def test_any_damage_to_a_png_is_an_error_about_data() -> None:
    whole, rng = png(noisy(8, 8, 3)), random.Random(0)
    for _ in range(300):
        data = bytearray(whole[: rng.randrange(9, len(whole) + 1)])
        for _ in range(rng.randrange(4)):
            data[rng.randrange(8, len(data))] = rng.randrange(256)
        try:
            image_decoding.decoded(bytes(data))
        except DataError:
            continue
        assert data[: len(whole) - 12] == whole[: len(whole) - 12]  # only after its last row


def test_an_image_that_says_it_is_huge_and_an_interlaced_one_are_refused() -> None:
    import struct
    import zlib

    def headed(*head: int) -> bytes:
        content = b"IHDR" + struct.pack(">IIBBBBB", *head)
        return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + content + struct.pack(">I", zlib.crc32(content))

    with pytest.raises(DataError, match="100000 x 100000 pixels"):
        image_decoding.decoded(headed(100_000, 100_000, 8, 2, 0, 0, 0))
    with pytest.raises(DataError, match="interlaced"):
        image_decoding.decoded(headed(8, 8, 8, 2, 0, 0, 1))


def test_an_image_is_resized_by_the_area_that_each_new_pixel_covers() -> None:
    image = np.arange(6, dtype=np.float32).reshape(1, 6, 1)
    np.testing.assert_allclose(image_decoding.resized(image, 1, 3)[0, :, 0], [0.5, 2.5, 4.5])
    np.testing.assert_allclose(image_decoding.resized(image, 1, 4)[0, :, 0], [1 / 3, 5 / 3, 10 / 3, 14 / 3], rtol=1e-6)
    np.testing.assert_allclose(image_decoding.resized(image, 2, 12)[1, :, 0], np.repeat(np.arange(6), 2), rtol=1e-6)
    big = noisy(31, 17, 3) / np.float32(255)
    np.testing.assert_allclose(image_decoding.resized(big, 7, 5).mean(axis=(0, 1)), big.mean(axis=(0, 1)), rtol=1e-5)


def folder_of(path: Path, **classes: list[bytes]) -> Path:
    for name, images in classes.items():
        (path / name).mkdir(parents=True)
        for number, data in enumerate(images):
            (path / name / f"{number}.png").write_bytes(data)
    return path


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    one, other = png(noisy(4, 4, 1)), png(noisy(8, 8, 3))
    folder = folder_of(tmp_path / "images", dog=[one], cat=[other, b"no image"])
    (folder / "cat" / "notes.txt").write_text("not an image")
    table = read_source("images", folder, {"size": [2, 2], "classes": ["bird", "cat", "dog"], "colour": "grey"})
    assert table.x.shape == (2, 2, 2, 1)
    np.testing.assert_array_equal(table.y, [1, 2])
    assert table.places == ["cat/0.png", "dog/0.png"]
    assert [one.first for one in table.left_out] == [("cat/1.png",)]
    raw = read_source("images", folder_of(tmp_path / "b", **{"3": [one]}), {"values": "bytes", "colour": "grey"})
    assert raw.x.dtype == np.uint8
    np.testing.assert_array_equal(raw.x[0], noisy(4, 4, 1))
    np.testing.assert_array_equal(raw.y, [3])


def test_folders_are_never_numbered_by_their_order_here(tmp_path: Path) -> None:
    """A device without birds would call the cat 0."""
    folder = folder_of(tmp_path / "images", cat=[png(noisy(4, 4, 1))])
    with pytest.raises(DataError, match="name all classes of the model"):
        read_source("images", folder, {})
    with pytest.raises(DataError, match=r"'cat' that is none of options\.classes"):
        read_source("images", folder, {"classes": ["dog"]})


def test_a_table_of_labels_beside_the_images(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "images", all=[png(noisy(4, 4, 1)), png(noisy(4, 4, 3)), png(noisy(5, 4, 3))])
    (folder / "labels.csv").write_text(
        "file,label\nall/1.png,on\nall/0.png,off\nall/2.png,off\nall/9.png,on\nall/0.png,?\n"
    )
    table = read_source("images", folder, {"labels": "labels.csv", "classes": ["off", "on"]})
    np.testing.assert_array_equal(table.y, [1, 0])
    reasons = {one.what: one.first for one in table.left_out}
    assert reasons == {
        "not 4 x 4 pixels as the first (set options.size)": ("all/2.png",),
        "cannot be read (No such file or directory)": ("all/9.png",),
        "label: a text without a code": ("all/0.png",),
    }


def test_a_jpeg_without_pillow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    Image.fromarray(noisy(8, 8, 3)).save(tmp_path / "a.jpg", quality=100, subsampling=0)
    data = (tmp_path / "a.jpg").read_bytes()
    np.testing.assert_allclose(image_decoding.decoded(data) * 255, np.asarray(Image.open(io.BytesIO(data))), atol=1e-3)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(MachineError, match="pip install pillow"):
        image_decoding.decoded(data)


def test_a_new_image_in_a_folder_is_noticed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "images", **{"0": [png(noisy(4, 4, 1))], "1": []})
    before = state_of("images", folder, {})
    assert before == state_of("images", folder, {})
    (folder / "1" / "new.png").write_bytes(png(noisy(4, 4, 1)))
    assert before != state_of("images", folder, {})


# --- sources of other distributions, and options


def old_source(path: Path) -> data_sources.Examples:
    return np.ones((2, 1)), np.zeros(2)


def new_source(path: Path, options: dict[str, Any]) -> data_sources.Examples:
    return np.full((2, 1), options["value"]), np.zeros(2)


def test_sources_of_both_kinds_of_other_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    points = [
        EntryPoint(name, f"{__name__}:{name}", data_sources.ENTRY_POINTS) for name in ("old_source", "new_source")
    ]
    monkeypatch.setattr(data_sources, "_installed", lambda: points)
    assert read_source("old_source", Path("x"), {}).x.tolist() == [[1], [1]]
    assert read_source("new_source", Path("x"), {"value": 7}).x.tolist() == [[7], [7]]
    with pytest.raises(ConfigError, match="'old_source' takes no options"):
        read_source("old_source", Path("x"), {"value": 7})


def test_a_mistyped_option_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean `delimiter`"):
        read_source("csv", tmp_path, {"delimeter": ";"})
