"""What an experiment came to, for a terminal: a line per point, means over seeds."""

from __future__ import annotations

from collections.abc import Sequence

from covey_coordinator.simulation.results import RunResult
from covey_coordinator.simulation.sweep import Cell, label_of


def table_lines(cells: Sequence[Cell], results: Sequence[RunResult], failed: set[str]) -> list[str]:
    """failed: keys of cells without a result. Points stand in the order of the sweep."""
    by_key = {result.key: result for result in results}
    keys = list(cells[0].varied)
    seeds = len({cell.seed for cell in cells})
    head = [*(_short(key) for key in keys), "accuracy", *(["lowest", "highest"] if seeds > 1 else []), "loss", ""]
    rows = [head]
    for point in _points(cells):
        labels = [label_of(value) for value in point[0].varied.values()]
        rows.append([*labels, *_numbers(point, by_key, failed, seeds)])
    title = f"test accuracy after the last round{f', mean of {seeds} seeds' if seeds > 1 else ''}"
    return [title, *_aligned(rows, len(keys))]


def _points(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of each point."""
    seeds = len({cell.seed for cell in cells})
    points = len(cells) // seeds
    return [list(cells[number::points]) for number in range(points)]


def _numbers(point: list[Cell], by_key: dict[str, RunResult], failed: set[str], seeds: int) -> list[str]:
    results = [by_key[cell.key] for cell in point if cell.key in by_key]
    accuracies = [value for result in results if (value := last(result, "accuracy")) is not None]
    losses = [value for result in results if (value := last(result, "loss")) is not None]
    spread = [f"{min(accuracies):.1%}", f"{max(accuracies):.1%}"] if accuracies else ["-", "-"]
    return [
        f"{sum(accuracies) / len(accuracies):.1%}" if accuracies else "-",
        *(spread if seeds > 1 else []),
        f"{sum(losses) / len(losses):.4f}" if losses else "-",
        _remarks(point, results, failed),
    ]


def last(result: RunResult, metric: str) -> float | None:
    """The newest central evaluation's; None without one."""
    found = [record.evaluation[metric] for record in result.rounds if metric in record.evaluation]
    return found[-1] if found else None


def _remarks(point: list[Cell], results: list[RunResult], failed: set[str]) -> str:
    refused = sum(not result.rounds for result in results)
    lost = sum(cell.key in failed for cell in point)
    stood = sum(bool(result.rounds) and bool(result.notes) for result in results)
    told = ((refused, "refused"), (lost, "failed"), (stood, "with refused rounds"))
    return ", ".join(f"{count} {what}" for count, what in told if count)


def _short(key: str) -> str:
    return key.removesuffix(".rule").removesuffix(".attack")


def _aligned(rows: list[list[str]], left: int) -> list[str]:
    """The first `left` columns and the last to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        parts = [
            text.ljust(width) if column < left or column == len(row) - 1 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(parts).rstrip())
    return lines
