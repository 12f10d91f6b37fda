"""What machine teaching found in a device's own data, for its owner: JSON, and one HTML page without scripts or links.

The page holds examples of the device, so it stays on the device: files of mode 600, and nothing here is ever sent.
Pure functions: arrays in, bytes out. Suspicion is how far the taught model is from the label that an instance has;
selection, weight and crafting are what the teacher used it for (covey_protocol.teaching).
"""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Sequence
from typing import Any, Optional

import msgspec
import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[Any]

MOST_ON_PAGE = 200  # rows of the HTML page; the JSON names all instances
STRONG = 0.5  # crafted by more than this share of its own size, an instance is named for it
DOUBTFUL = 0.5  # suspicion from which an instance is named
CHANNELS = (1, 3)
EXPECTED = "the model expects"  # over the column of what an instance is held against
ZOOM_TO, THIN_TO = 96, 128  # pixels of a small picture on the page, and of a large one: 200 of them stay a few MB


class Instance(msgspec.Struct, frozen=True):
    """One example of the device. row: its place in the data, from 0. label, expected: in words. suspicion: from 0 to 1.

    weight: the teacher's dual variable of it. crafted: by which share of its own size the teacher moved it.
    """

    row: int
    label: str
    expected: str
    suspicion: float
    selected: bool
    weight: float
    crafted: float

    @property
    def why(self) -> str:
        """Why it is named; "" where nothing speaks against it."""
        found = [
            "the model expects something else" if self.suspicion >= DOUBTFUL else "",
            "" if self.selected else "not selected for teaching",
            f"moved by {self.crafted:.0%} of its size to be of use" if self.crafted > STRONG else "",
        ]
        return "; ".join(filter(None, found))


class Report(msgspec.Struct, frozen=True):
    """instances: all of the device's, the most suspicious first. shown: how an instance looks, see `pictures`."""

    task: str
    round_id: str
    instances: tuple[Instance, ...]

    @property
    def named(self) -> tuple[Instance, ...]:
        return tuple(one for one in self.instances if one.why)


class Judged(msgspec.Struct, frozen=True):
    """What a teacher says of its n instances, (n,) each: see covey_protocol.teaching.Teacher.judged."""

    selected: Numbers
    weights: Numbers
    crafted: Numbers


def regression_report(task: str, round_id: str, y: Numbers, predicted: Numbers, judged: Judged) -> Report:
    """Of targets y (n,) and the model's predictions (n,)."""
    suspicion = far(np.abs(y - predicted))
    labels, expected = ([f"{value:.6g}" for value in values.tolist()] for values in (y, predicted))
    return _report(task, round_id, labels, expected, suspicion, judged)


def class_report(
    task: str, round_id: str, y: Numbers, chances: Numbers, judged: Judged, names: Sequence[str] = ()
) -> Report:
    """Of classes y (n,) and the model's chances for each, (n, C)."""
    told = list(names) or [str(place) for place in range(chances.shape[1])]
    best = chances.argmax(axis=1)
    labels = [told[place] for place in y.tolist()]
    expected = [f"{told[place]} ({chances[row, place]:.0%})" for row, place in enumerate(best.tolist())]
    return _report(task, round_id, labels, expected, against(y, chances), judged)


def against(y: Numbers, chances: Numbers) -> Numbers:
    """Of classes y (n,) and chances (n, C) the suspicion: 0.5 where another class has the chance of the label's."""
    own = chances[np.arange(len(y)), y]
    others = np.where(np.arange(chances.shape[1]) == y[:, None], 0.0, chances).max(axis=1)
    return np.asarray(others / np.maximum(own + others, 1e-300))


def far(distances: Numbers) -> Numbers:
    """Distances (n,) as suspicion from 0 to 1: 0.5 at four times the median distance, rising to 1 far beyond."""
    usual = 4.0 * max(float(np.median(distances)), 1e-12)
    return np.asarray(distances / (distances + usual))


def _report(
    task: str, round_id: str, labels: Sequence[str], expected: Sequence[str], suspicion: Numbers, judged: Judged
) -> Report:
    instances = [
        Instance(
            row,
            labels[row],
            expected[row],
            float(suspicion[row]),
            bool(judged.selected[row]),
            float(judged.weights[row]),
            float(judged.crafted[row]),
        )
        for row in range(len(labels))
    ]
    return Report(task, round_id, tuple(sorted(instances, key=lambda one: (-one.suspicion, one.row))))


def files(
    report: Report, x: Numbers, name: str = "report", by: str = "teaching", expected: str = EXPECTED
) -> dict[str, bytes]:
    """What is to be written, by name. x: (n, ...), the examples as the model takes them. by: what has found it.

    expected: the head of the column of what instances are held against.
    """
    return {f"{name}.json": as_json(report), f"{name}.html": as_html(report, x, by, expected)}


def as_json(report: Report) -> bytes:
    """All instances, the most suspicious first, each with why it is named."""
    instances = [{**msgspec.to_builtins(one), "why": one.why} for one in report.instances]
    content = {"task": report.task, "round_id": report.round_id, "named": len(report.named), "instances": instances}
    return msgspec.json.format(msgspec.json.encode(content), indent=1)


# --- the page

_STYLE = (
    "body{font:16px sans-serif;margin:2em;max-width:70em}table{border-collapse:collapse}"
    "th,td{padding:.3em .8em;border-bottom:1px solid #ccc;text-align:left;vertical-align:middle}"
    "img{image-rendering:pixelated;border:1px solid #999}.n{text-align:right}"
)
_HEAD = ("", "row", "label here", EXPECTED, "suspicion", "why it is named")


def as_html(report: Report, x: Numbers, by: str = "teaching", expected: str = EXPECTED) -> bytes:
    named, total = report.named, len(report.instances)
    shown = named[:MOST_ON_PAGE]
    with_pictures = is_picture(x)
    head = [expected if name == EXPECTED else name for name in (_HEAD if with_pictures else _HEAD[1:])]
    low, high = (float(x.min()), float(x.max())) if len(x) else (0.0, 1.0)
    rows = [_row(one, picture(x[one.row], low, high) if with_pictures else None) for one in shown]
    title = f"What {by} found in this device's data{f' ({report.task})' if report.task else ''}"
    told = (
        f"{len(named)} of {total} examples are named, the most suspicious first"
        + (f"; the first {len(shown)} are shown, report.json holds all" if len(shown) < len(named) else "")
        + ". A suspicious example need not be wrong: the model may be. Look at it before you drop or mend it. "
        "This page is for the owner of the device and was not sent anywhere."
    )
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(told)} Round {html.escape(report.round_id)}.</p>",
        "<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>",
        *rows,
        "</table>",
    ]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return (f"{page}<style>{_STYLE}</style><body>" + "\n".join(body) + "</body></html>\n").encode()


def _row(one: Instance, image: Optional[str]) -> str:
    cells = [image] if image is not None else []
    cells += [f"{one.row}", *(html.escape(text) for text in (one.label, one.expected))]
    cells += [f"{one.suspicion:.2f}", html.escape(one.why)]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


# --- pictures


def is_picture(x: Numbers) -> bool:
    """Whether examples are pictures: (n, height, width), or with one or three channels."""
    return (x.ndim == 3 and min(x.shape[1:]) > 3) or (x.ndim == 4 and x.shape[3] in CHANNELS)


def picture(example: Numbers, low: float, high: float) -> str:
    """An <img> that holds its own PNG, of every second or third pixel where it is large.

    low, high: the values shown as black and white.
    """
    step = max(1, -(-max(example.shape[:2]) // THIN_TO))
    example = example[::step, ::step]
    data = base64.b64encode(png(as_pixels(example, low, high))).decode()
    height, width = example.shape[:2]
    zoom = max(1, ZOOM_TO // max(height, width))
    return f'<img width="{width * zoom}" height="{height * zoom}" alt="" src="data:image/png;base64,{data}">'


def as_pixels(example: Numbers, low: float, high: float) -> npt.NDArray[np.uint8]:
    """(height, width[, 1 or 3]) of any scale -> uint8 (height, width, 1 or 3)."""
    scaled = (example.astype(np.float64) - low) / max(high - low, 1e-12)
    pixels = np.rint(255.0 * np.clip(scaled, 0.0, 1.0)).astype(np.uint8)
    return np.asarray(pixels.reshape(*example.shape[:2], -1))


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A PNG file (RFC 2083) of uint8 (height, width, 1 or 3): grey or RGB, 8 bits, unfiltered lines."""
    height, width, channels = pixels.shape
    colour = {1: 0, 3: 2}[channels]
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_part(kind, data) for kind, data in parts)


def _part(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
