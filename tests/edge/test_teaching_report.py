"""What a device's owner is told of the data: order, reasons, a page that is safe to open, real pictures."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from covey_edge.teaching_report import (
    MOST_ON_PAGE,
    THIN_TO,
    Judged,
    against,
    as_html,
    as_json,
    as_pixels,
    class_report,
    is_picture,
    png,
    regression_report,
)


def judged(n: int, **changes: Any) -> Judged:
    return Judged(**{"selected": np.ones(n, bool), "weights": np.ones(n), "crafted": np.zeros(n), **changes})


def test_suspicion_is_a_half_where_another_class_takes_over() -> None:
    chances = np.array([[0.8, 0.1, 0.1], [0.4, 0.4, 0.2], [0.1, 0.7, 0.2], [0.0, 0.0, 0.0]])
    assert_allclose(against(np.zeros(4, int), chances), [1 / 9, 0.5, 7 / 8, 0.0])


def test_the_most_suspicious_comes_first_and_what_is_named_says_why() -> None:
    chances = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]])
    selected, crafted = np.array([True, True, False, True]), np.array([0.0, 0.0, 0.0, 0.75])
    report = class_report("doors", "r.1.a", np.zeros(4, int), chances, judged(4, selected=selected, crafted=crafted),
                          ("shut", "open"))  # fmt: skip
    assert [one.row for one in report.instances] == [1, 2, 3, 0]
    told = json.loads(as_json(report))
    assert [one["why"] for one in told["instances"]] == [
        "the model expects something else",
        "not selected for teaching",
        "moved by 75% of its size to be of use",
        "",
    ]
    assert (told["instances"][0]["label"], told["instances"][0]["expected"]) == ("shut", "open (80%)")
    assert told["named"] == 3


def test_a_number_four_times_as_far_off_as_most_is_doubted() -> None:
    y, predicted = np.array([1.0, 2.0, 3.0, 4.0, 50.0]), np.array([1.1, 1.9, 3.1, 3.9, 5.0])
    report = regression_report("", "r.1.a", y, predicted, judged(5))
    assert [one.row for one in report.named] == [4]
    assert (report.named[0].label, report.named[0].expected) == ("50", "5")


class Page(HTMLParser):
    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[bytes] = []
        self.feed(data.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "src":
                assert value is not None
                assert value.startswith("data:image/png;base64,")
                self.images.append(base64.b64decode(value.split(",")[1]))


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 1), (7, 5, 3), (300, 200, 3)])
def test_the_page_has_pictures_and_runs_nothing_of_the_datas(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(np.uint8)
    x[0].flat[:2] = 0, 255
    chances = np.tile([0.1, 0.9], (3, 1))
    names = ("<script>alert(1)</script>", "b")
    page = Page(as_html(class_report("<b>", "r", np.zeros(3, int), chances, judged(3), names), x))
    assert not {"script", "b", "link", "a", "iframe"} & set(page.tags)
    assert len(page.images) == 3
    shown = np.asarray(Image.open(io.BytesIO(page.images[0])))
    step = -(-max(shape[:2]) // THIN_TO)
    assert_array_equal(shown, x[0][::step, ::step].reshape(shown.shape))


def test_a_page_shows_no_more_than_it_says() -> None:
    n = MOST_ON_PAGE + 50
    report = class_report("", "r", np.zeros(n, int), np.tile([0.1, 0.9], (n, 1)), judged(n))
    page = as_html(report, np.zeros((n, 4)))
    assert page.count(b"<tr>") == MOST_ON_PAGE + 1
    assert b"250 of 250 examples are named" in page
    assert b"the first 200 are shown" in page
    assert len(json.loads(as_json(report))["instances"]) == n


def test_what_is_a_picture() -> None:
    shown = {(8, 8): True, (8, 8, 1): True, (8, 8, 3): True, (30,): False, (128, 3): False, (8, 8, 2): False}
    assert {shape: is_picture(np.zeros((2, *shape))) for shape in shown} == shown


def test_pixels_are_scaled_between_the_two_values() -> None:
    pixels = as_pixels(np.array([[-1.0, 0.0], [1.0, 5.0]]), -1.0, 1.0)
    assert_array_equal(pixels[..., 0], [[0, 128], [255, 255]])
    assert_array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels[..., 0])
