"""Pictures of partitions: what is drawn is what was counted, and no name can break out of the drawing."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from covey_coordinator.simulation.pictures import (
    HIGH,
    MAX_POINTS,
    TOP,
    effective_classes,
    partition_plot,
    standalone,
)
from covey_models import load, populate

SVG = "{http://www.w3.org/2000/svg}"


def parsed(picture: Any) -> Any:
    return ElementTree.fromstring(standalone(picture))  # noqa: S314 - our own picture


def drawn(counts: Any, faulty: set[int] | None = None, names: tuple[str, ...] = ("cat", "dog", "emu")) -> Any:
    """The parsed picture of devices named by their numbers."""
    ids = [f"device-{number:03d}" for number in range(len(counts))]
    faults = {name: ("flip-labels",) if number in (faulty or set()) else () for number, name in enumerate(ids)}
    picture = partition_plot(dict(zip(ids, counts)), names, faults, title="A <title> & more")
    return parsed(picture)


def of_class(picture: Any, name: str) -> list[Any]:
    return [element for element in picture.iter() if element.get("class") == name]


def spoken_bars(picture: Any) -> dict[str, float]:
    """What a bar is said to be -> its height."""
    rects = [rect for rect in picture.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    return {rect.find(f"{SVG}title").text: float(rect.get("height")) for rect in rects}


def test_every_count_has_a_bar_in_proportion() -> None:
    bars = spoken_bars(drawn([[10, 0, 30], [5, 5, 0]]))
    assert set(bars) == {f"device-{d}: {n}" for d, n in (
        ("000, cat", 10), ("000, emu", 30), ("001, cat", 5), ("001, dog", 5))}  # fmt: skip
    assert bars["device-000, emu: 30"] == pytest.approx(HIGH * 30 / 40, abs=0.01)
    assert bars["device-001, dog: 5"] == pytest.approx(HIGH * 5 / 40, abs=0.01)


def test_corrupted_devices_are_marked_under_their_bars() -> None:
    picture = drawn([[1, 2, 3]] * 4, faulty={1, 3})
    marks = [float(re.match(r"M([\d.]+) ", mark.get("d"))[1]) for mark in of_class(picture, "mark")]  # type: ignore[index]
    rects = [rect for rect in picture.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    middles = sorted({round(float(rect.get("x")) + float(rect.get("width")) / 2, 1) for rect in rects})
    assert marks == pytest.approx([middles[1], middles[3]], abs=0.11)
    assert not of_class(drawn([[1, 2, 3]] * 4), "mark")


def heights(path: str) -> list[float]:
    return [float(point.split()[1]) for point in path.removeprefix("M").split("L")]


def test_many_devices_are_sorted_curves_of_bounded_size() -> None:
    random = np.random.default_rng(0)
    counts = random.integers(0, 50, (5000, 3)) + np.array([1, 0, 0])
    picture = drawn(counts.tolist(), faulty=set(range(0, 5000, 2)))
    assert not spoken_bars(picture)
    for name in ("curve", "corrupted-curve"):
        curves = of_class(picture, name)
        assert len(curves) == 2
        for curve in curves:
            down = heights(curve.get("d"))
            assert len(down) == MAX_POINTS
            assert down == sorted(down)  # the largest first
            assert TOP <= down[0] < down[-1] <= TOP + HIGH
    assert len(ElementTree.tostring(picture)) < 60_000


def test_few_corrupted_devices_among_many_are_strokes() -> None:
    strokes = of_class(drawn([[n + 1, 1, 1] for n in range(100)], faulty={0, 7, 99}), "strokes")
    assert [path.get("d").count("M") for path in strokes] == [3, 3]


def test_curves_are_logarithmic_where_one_device_would_press_the_others_flat() -> None:
    def words(largest: int) -> str:
        picture = drawn([[largest, 0, 0]] + [[10, 0, 0]] * 99)
        return " ".join(element.text or "" for element in of_class(picture, "axis"))

    assert "logarithmic" in words(10_000)
    assert "logarithmic" not in words(100)


def test_more_classes_than_colours_are_curves_too() -> None:
    picture = drawn([[1] * 62] * 5, names=tuple(map(str, range(62))))
    assert not spoken_bars(picture)
    assert "62.0 to 62.0 of 62" in ElementTree.tostring(picture, encoding="unicode")


def test_the_effective_number_of_classes_counts_equally_frequent_ones() -> None:
    np.testing.assert_allclose(effective_classes(np.array([[5, 5, 5, 0], [9, 0, 0, 0], [0, 0, 0, 0]])), [3, 1, 1])
    assert effective_classes(np.array([[9, 1]]))[0] == pytest.approx(1.384, abs=1e-3)


def test_names_stay_text() -> None:
    picture = partition_plot({"<script>": [1, 2]}, ["</svg><b>", '"'], {}, title="</style><i>")
    document = parsed(picture)
    tags = {element.tag.removeprefix(SVG) for element in document.iter()}
    assert tags == {"svg", "style", "text", "rect", "title", "line"}


@pytest.mark.parametrize("counts", [[[7, 0, 0]], [[0, 0, 0], [1, 0, 0]], [[0, 0, 0]] * 80, [[60_000, 0, 0]] * 3])
def test_extremes_are_drawn(counts: list[list[int]]) -> None:
    assert of_class(drawn(counts), "title")
    assert partition_plot({}, ["a"]) == ""


def test_a_population_is_drawn_as_it_is() -> None:
    data = load("digits")
    corruptions = [{"kind": "shift-labels", "fraction": 0.25}]
    population = populate(data, devices=8, partition={"kind": "dirichlet", "alpha": 0.3}, corruptions=corruptions)
    counts = dict(zip(population.faults(), population.counts().tolist()))
    picture = parsed(partition_plot(counts, data.class_names, population.faults()))
    assert len(of_class(picture, "mark")) == 2
    bars = spoken_bars(picture)
    assert sum(int(name.rsplit(" ", 1)[1]) for name in bars) == len(data)
