"""Writes the report of an experiment: one HTML file that needs nothing else, not even a network.

`write_experiment_report` reads an experiment's folder; `render` takes the results themselves. What a page of a
thousand runs leaves out is bounded here and said on the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from jinja2 import Template
from markupsafe import Markup, escape

from covey_coordinator.records import ACCEPTED, REJECTED, DeviceVerdict, RunRecord
from covey_coordinator.records import RoundRecord as DrawnRound
from covey_coordinator.report import plots, summary
from covey_coordinator.report.html import page_environment
from covey_coordinator.simulation.pictures import partition_plot
from covey_coordinator.simulation.report import drawings, words
from covey_coordinator.simulation.report.axes import Axis, Layout, label
from covey_coordinator.simulation.report.frame import share_floor
from covey_coordinator.simulation.report.points import (
    Gathered,
    Point,
    area_under_roc,
    canonical,
    corrupted_devices,
    gathered,
)
from covey_coordinator.simulation.results import RunResult
from covey_edge.config import toml_content
from covey_edge.files import write_atomic
from covey_protocol.errors import DataError

REPORT = "report.html"
MAX_PANELS = 16  # of curves; 2 drawings each
MAX_LINES = 7  # in a panel: as many as there are colours
MAX_CURVE_ROUNDS = 100
MAX_HEAT_CELLS = 3000  # over all heat maps of the page
MAX_HEAT_SIDE = 30
MAX_TREND_PANELS = 8
MAX_GRIDS = 8
MAX_GRID_ROUNDS = 60
MAX_GRID_DEVICES = 40
MAX_BOXES = 40
MAX_ROWS = 200
MAX_SENTENCE = 1500  # characters
MAX_MEASUREMENTS = 12


def write_experiment_report(folder: str | Path, expected: int | None = None) -> Path:
    """Read FOLDER/experiment.toml and FOLDER/cells/KEY/result.json, write FOLDER/report.html whole or not at all.

    expected: how many runs there should be; None for as many as there are folders of cells. A cell that failed or
    cannot be read is named on the page. Raises DataError where there is no experiment.
    """
    folder = Path(folder)
    if not (folder / "cells").is_dir():
        raise DataError(f"{folder} holds no experiment", "give the folder that `covey simulate` wrote")
    cells = Cells(folder / "cells")
    path = folder / REPORT
    text = render(folder.name, settings_of(folder), cells, failed=cells.failed, expected=expected or len(cells.keys))
    write_atomic(path, text.encode("utf-8"))
    return path


class Cells:
    """The results in a folder, read anew, one after the other, whenever they are looked at.

    failed: key -> why a cell has no result that can be read; filled while reading.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.keys = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        self.failed: dict[str, str] = {}

    def __iter__(self) -> Iterator[RunResult]:
        for key in self.keys:
            result = self.read(key)
            if result is not None:
                yield result

    def read(self, key: str) -> RunResult | None:
        path = self._folder / key / "result.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=RunResult)
        except FileNotFoundError:
            self.failed[key] = self._error(key)
        except (OSError, msgspec.MsgspecError) as exc:
            self.failed[key] = f"{path.name} cannot be read ({exc})"
        return None

    def _error(self, key: str) -> str:
        """What a cell that failed says of it (`folder.CellFolder.fail`)."""
        try:
            told = msgspec.json.decode((self._folder / key / "error.json").read_bytes(), type=dict[str, str])
        except (OSError, msgspec.MsgspecError):
            return "it left no result"
        return told.get("error", "") or "it left no result"


def settings_of(folder: Path) -> dict[str, str]:
    """FOLDER/experiment.toml as a flat table; empty without one."""
    path = folder / "experiment.toml"
    if not path.exists():
        return {}
    return dict(_flat(toml_content(path)))


def _flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", label(value, 200)


def render(
    title: str,
    settings: Mapping[str, str],
    results: Iterable[RunResult],
    *,
    failed: Mapping[str, str] | None = None,
    expected: int | None = None,
    class_names: Sequence[str] = (),
) -> str:
    """The page as text. results: looked at twice, so not an iterator. expected: how many runs there should be.

    failed: key -> reason, of runs without a result; looked at after the results were read.
    """
    found = gathered(results)
    layout = Layout(found.points)
    grids, not_drawn = _grids(found, layout, results)
    return _template().render(
        title=title,
        settings=dict(settings),
        found=found,
        sentences=[_long(sentence) for sentence in words.sentences(found, layout)],
        notes=[_long(note) for note in words.notes(found, dict(failed or {}), expected)],
        heat=_heat_maps(layout),
        curves=_curves(layout, "accuracy"),
        losses=[*_curves(layout, "loss"), *_curves(layout, "training loss")],
        trends=_trends(layout),
        detection=_detection_rows(found, layout),
        roc=_roc(found, layout),
        grids=grids,
        grids_not_drawn=not_drawn,
        boxes=_boxes(found, layout),
        partitions=_partitions(found, class_names),
        measurements=_measurements(found, layout),
        rows=_rows(found, layout),
        axes=layout.axes,
        max_grid_rounds=MAX_GRID_ROUNDS,
        max_grid_devices=MAX_GRID_DEVICES,
        statuses=(ACCEPTED, REJECTED),
    )


def _long(sentence: str) -> Markup:
    """A sentence of ours, which may be longer than a piece of foreign text."""
    return escape(summary.printable(sentence, MAX_SENTENCE))


# --- heat maps


def _heat_maps(layout: Layout) -> dict[str, Any]:
    down, across = layout.lines(), layout.columns()
    if down is None or across is None:
        return {"maps": [], "left_out": 0}
    rows, columns = down.values[:MAX_HEAT_SIDE], across.values[:MAX_HEAT_SIDE]
    panels = layout.panels(down, across)
    drawn = panels[: max(1, MAX_HEAT_CELLS // (len(rows) * len(columns)))]
    return {
        "down": down,
        "across": across,
        "maps": [(layout.title(panel), _heat_map(layout, down, across, panel)) for panel in drawn],
        "left_out": len(panels) - len(drawn),
        "rows_left_out": len(down.values) - len(rows),
        "columns_left_out": len(across.values) - len(columns),
    }


def _heat_map(layout: Layout, down: Axis, across: Axis, panel: dict[str, Any]) -> Any:
    rows, columns = down.values[:MAX_HEAT_SIDE], across.values[:MAX_HEAT_SIDE]
    cells = [
        [_heat_cell(layout.point(**{**panel, down.key: row, across.key: column})) for column in columns] for row in rows
    ]
    return drawings.heat_map(down.labels[:MAX_HEAT_SIDE], across.labels[:MAX_HEAT_SIDE], cells, worst=len(columns) > 1)


def _heat_cell(point: Point | None) -> drawings.Cell:
    if point is None or not math.isfinite(point.accuracy):
        return drawings.Cell(math.nan, "no result")
    low, high = point.spread
    seeds = len(point.final())
    between = f", {summary.percent(low)} to {summary.percent(high)}" if seeds > 1 else ""
    return drawings.Cell(point.accuracy, f"{summary.percent(point.accuracy)}, {words.counted(seeds, 'seed')}{between}")


# --- curves


def _curves(layout: Layout, metric: str) -> list[dict[str, Any]]:
    """Panels of at most MAX_LINES lines. One range of values for all, so that panels can be compared."""
    line = layout.lines()
    panels = [(panel, chunk) for panel in layout.panels(line) for chunk in _chunks(line)]
    drawn = [(panel, _lines(layout, line, panel, chunk, metric)) for panel, chunk in panels]
    drawn = [(panel, lines) for panel, lines in drawn if lines]
    if not drawn:
        return []
    left_out, drawn = len(drawn) - MAX_PANELS, drawn[:MAX_PANELS]
    values = [v for _, lines in drawn for one in lines for v in (*one.band.low, *one.band.high)]
    limits, log = ((share_floor(values), 1.0), False) if metric == "accuracy" else drawings.loss_limits(values)
    shown = [
        {"title": layout.title(panel), "lines": lines, "drawing": drawings.curves(lines, metric, limits, log)}
        for panel, lines in drawn
    ]
    return [{"metric": metric, "panels": shown, "left_out": left_out, "shared": _shared(shown)}]


def _shared(panels: Sequence[dict[str, Any]]) -> bool:
    """Whether one legend serves all panels."""
    return len({tuple((one.number, one.name) for one in panel["lines"]) for panel in panels}) == 1


def _lines(
    layout: Layout, line: Axis | None, panel: dict[str, Any], indices: Iterable[int], metric: str
) -> list[drawings.Line]:
    found = []
    for index in indices:
        chosen = {} if line is None else {line.key: line.values[index]}
        point = layout.point(**{**panel, **chosen})
        band = point.band(metric, MAX_CURVE_ROUNDS) if point is not None else None
        if band is not None and band.rounds:
            found.append(drawings.Line(index, "all runs" if line is None else line.labels[index], band))
    return found


# --- over a number


def _trends(layout: Layout) -> list[dict[str, Any]]:
    """For every number that was varied: the final accuracy over it."""
    found = (_trends_over(layout, axis) for axis in layout.axes if axis.is_numeric)
    return [group for group in found if group["panels"]]


def _trends_over(layout: Layout, axis: Axis) -> dict[str, Any]:
    line = layout.lines() if layout.lines() is not axis else None
    drawn = [
        (layout.title(panel), [_trend(layout, axis, panel, line, index) for index in chunk])
        for panel in layout.panels(axis, line)
        for chunk in _chunks(line)
    ]
    drawn = [(title, measured) for title, trends in drawn if (measured := [one for one in trends if one.values])]
    left_out, drawn = len(drawn) - MAX_TREND_PANELS, drawn[:MAX_TREND_PANELS]
    floor = share_floor([low for _, trends in drawn for trend in trends for _, _, low, _ in trend.values] or [0.0])
    shown = [
        {"title": title, "lines": trends, "drawing": drawings.breakdown(trends, axis.name, floor)}
        for title, trends in drawn
    ]
    return {"axis": axis, "panels": shown, "left_out": left_out, "shared": bool(shown) and _shared(shown)}


def _chunks(line: Axis | None) -> list[range]:
    """The places of the values that share a panel: as many as there are colours."""
    indices = range(len(line.values) if line is not None else 1)
    return [indices[start : start + MAX_LINES] for start in range(0, len(indices), MAX_LINES)]


def _trend(layout: Layout, axis: Axis, panel: dict[str, Any], line: Axis | None, index: int) -> drawings.Trend:
    chosen = panel if line is None else {**panel, line.key: line.values[index]}
    values = []
    for value in axis.values:
        point = layout.point(**{**chosen, axis.key: value})
        if point is not None and math.isfinite(point.accuracy):
            values.append((float(value), point.accuracy, *point.spread))
    return drawings.Trend(index, "all runs" if line is None else line.labels[index], values)


# --- who was turned away


def _detection_rows(found: Gathered, layout: Layout) -> dict[str, Any]:
    points = [point for point in found.points if point.num_corrupted]
    rows = [
        {
            "varied": [label(point.varied.get(axis.key)) for axis in layout.axes],
            "num_corrupted": point.num_corrupted,
            "num_devices": point.num_devices,
            "devices": point.devices,
            "updates": point.updates,
            "auc": point.auc(),
        }
        for point in points[:MAX_ROWS]
    ]
    return {"rows": rows, "left_out": len(points) - len(rows)}


def _roc(found: Gathered, layout: Layout) -> dict[str, Any]:
    """A curve per line, over all its points with corrupted devices."""
    line = layout.lines()
    pooled: dict[int, list[Any]] = {}
    places = {name: index for index, name in enumerate(line.labels)} if line is not None else {}
    for point in found.points:
        if point.num_corrupted:
            index = places[label(point.varied.get(line.key))] if line is not None else 0
            pooled.setdefault(index, []).extend(point.suspicions)
    names = line.labels if line is not None else ["all runs"]
    accused = [drawings.Accused(index, names[index], pooled[index]) for index in sorted(pooled)[:MAX_LINES]]
    legend = [(one.number, one.name, area_under_roc(one.suspicions), len(one.suspicions)) for one in accused]
    return {"drawing": drawings.roc_curves(accused), "legend": legend, "left_out": len(pooled) - len(accused)}


def _grids(found: Gathered, layout: Layout, results: Iterable[RunResult]) -> tuple[list[dict[str, Any]], int]:
    """Verdicts of single runs: the first of a few points in which somebody is corrupted and some update left out."""
    candidates = [point for point in found.points if point.num_corrupted and point.updates.rejected]
    chosen = {point.first: point for point in _of_every_line(layout, candidates)[:MAX_GRIDS]}
    runs = results if not isinstance(results, Cells) else filter(None, map(results.read, chosen))
    drawn = {
        result.key: _grid(result, layout.title(chosen[result.key].varied)) for result in runs if result.key in chosen
    }
    return [drawn[key] for key in chosen if key in drawn], len(candidates) - len(drawn)


def _of_every_line(layout: Layout, points: Sequence[Point]) -> list[Point]:
    """Of every line as many, spread over its points, so that the few that are drawn show different things."""
    line = layout.lines()
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault("" if line is None else canonical(point.varied.get(line.key)), []).append(point)
    each = max(1, MAX_GRIDS // max(1, len(groups)))
    return [group[place] for group in groups.values() for place in _spread(len(group), each)]


def _spread(count: int, most: int) -> list[int]:
    """At most `most` places of count, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))}, reverse=most == 1)


def _grid(result: RunResult, title: str) -> dict[str, Any]:
    corrupted = sorted(corrupted_devices(result))
    rounds = [record for record in result.rounds if record.verdicts]
    run = RunRecord(
        title,
        "",
        "",
        corrupted,
        [
            DrawnRound(
                record.number,
                math.nan,
                math.nan,
                [DeviceVerdict(d, ACCEPTED if one.accepted else REJECTED) for d, one in record.verdicts.items()],
                0.0,
            )
            for record in rounds[-MAX_GRID_ROUNDS:]
        ],
    )
    judged = {device_id for record in rounds for device_id in record.verdicts}
    devices = [*corrupted, *sorted(judged - set(corrupted))]
    shown = devices[:MAX_GRID_DEVICES]
    return {
        "title": title or "all runs",
        "seed": result.seed,
        "grid": plots.verdict_grid(run, summary.statuses(run, shown)),
        "devices_left_out": len(devices) - len(shown),
        "rounds_left_out": len(rounds) - len(run.rounds),
        "faults": [(device_id, ", ".join(result.faults[device_id])) for device_id in corrupted[:MAX_GRID_DEVICES]],
    }


# --- devices and their data


def _boxes(found: Gathered, layout: Layout) -> dict[str, Any]:
    points = [point for point in found.points if point.device_accuracies]
    drawn = []
    for point in points[:MAX_BOXES]:
        statistics = np.mean(
            [np.percentile(values, [0, 25, 50, 75, 100]) for values in point.device_accuracies], axis=0
        )
        name = ", ".join(label(point.varied.get(axis.key), 24) for axis in layout.axes) or "all runs"
        drawn.append(drawings.Box(name, *map(float, statistics)))
    return {"drawing": drawings.boxes(drawn), "left_out": len(points) - len(drawn)}


def _partitions(found: Gathered, class_names: Sequence[str]) -> list[dict[str, Any]]:
    shown = []
    for held in found.data:
        most = max(map(len, held.counts.values()), default=0)
        counts = {device: (*row, *[0] * (most - len(row))) for device, row in sorted(held.counts.items())}
        if most and any(map(any, counts.values())):
            names = class_names or [str(number) for number in range(most)]
            title = f"Run {summary.printable(held.key)}"
            shown.append({"key": held.key, "drawing": partition_plot(counts, names, held.faults, title)})
    return shown


# --- tables


def _measurements(found: Gathered, layout: Layout) -> dict[str, Any]:
    names = list(dict.fromkeys(name for point in found.points for one in point.measurements for name in one))
    shown = names[:MAX_MEASUREMENTS]
    rows = []
    for point in found.points[:MAX_BOXES]:
        means = [words.mean([one[name] for one in point.measurements if name in one]) for name in shown]
        rows.append(
            (layout.title(point.varied) or "all runs", [f"{m:.4g}" if math.isfinite(m) else "–" for m in means])
        )
    return {
        "names": shown,
        "rows": rows,
        "names_left_out": len(names) - len(shown),
        "left_out": len(found.points) - len(rows),
    }


def _rows(found: Gathered, layout: Layout) -> dict[str, Any]:
    """All points, the best first; of too many the best and the worst."""
    points = sorted(found.points, key=lambda p: -p.accuracy if math.isfinite(p.accuracy) else math.inf)
    left_out = max(0, len(points) - MAX_ROWS)
    if left_out:
        points = [*points[: MAX_ROWS // 2], *points[-MAX_ROWS // 2 :]]
    rows = [
        {
            "varied": [label(point.varied.get(axis.key)) for axis in layout.axes],
            "seeds": len(point.final()),
            "accuracy": point.accuracy,
            "spread": point.spread,
            "loss": words.mean(point.final("loss").tolist()),
            "worst_device": words.mean([float(values.min()) for values in point.device_accuracies]),
        }
        for point in points
    ]
    return {"rows": rows, "left_out": left_out}


@lru_cache(maxsize=1)
def _template() -> Template:
    environment = page_environment("covey_coordinator.simulation.report")
    environment.globals.update(counted=words.counted)
    return environment.get_template("experiment.html.jinja")
