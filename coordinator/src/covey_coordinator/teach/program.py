"""`covey teach`: compare, teach once more with all trusted examples, write what was found, say how a fleet does it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np

from covey_coordinator.grid.display import Display
from covey_coordinator.teach.comparing import FOLDS, Compared, compared, steps
from covey_coordinator.teach.data import Work, read_work
from covey_coordinator.teach.methods import CONTESTANTS, as_data, taught
from covey_coordinator.teaching.reference import Crafted
from covey_coordinator.teaching.tuning import balanced
from covey_edge.config import read_file
from covey_edge.files import write_atomic
from covey_edge.runtime import Model
from covey_edge.teaching import chances_of
from covey_edge.teaching_report import Judged, Report, class_report, files, regression_report
from covey_protocol.bundle import read_bundle
from covey_protocol.teaching import RIDGE, SELECTED_ABOVE, Array, Problem, Settings


@dataclass(frozen=True)
class Request:
    """As on the command line. tries: settings of teaching that are tried. bundle: of whose last layer. output: None for
    no files.
    """

    data: str
    trusted: str
    teachers: int = 5
    users: str | None = None
    label: str | None = None
    numbers: bool = False
    tries: int = 20
    seed: int = 0
    bundle: Path | None = None
    output: Path | None = None


def teach(request: Request, display: Display, check: Callable[[], None] = lambda: None) -> Compared:
    """check: called between steps; may raise to end it. Raises DataError, ConfigError, StorageError."""
    work = read_work(
        request.data,
        request.trusted,
        numbers=request.numbers,
        label=request.label,
        users=request.users,
        teachers=request.teachers,
        seed=request.seed,
        model=None if request.bundle is None else Model(read_bundle(read_file(request.bundle))),
    )
    sizes = [len(rows) for rows in work.parts]
    display.line(
        f"{work.name}: {len(work.data)} examples with {len(sizes)} teachers ({min(sizes)} to {max(sizes)} each), "
        f"{len(work.trusted)} trusted, {work.data.features.shape[1] - 1} features, "
        + (f"{len(work.class_names)} classes" if work.class_names else "numbers")
    )
    with display.cells(0, steps(), "steps") as ticker:

        def finished(said: str) -> None:
            check()
            ticker.finished(said)

        found = compared(work, request.seed, request.tries, finished)
    for line in told(work, found):
        display.line(line)
    report, settings = final(work, found)
    display.line()
    if request.output is not None:
        write(request.output, work, found, report)
        display.line(f"{len(report.named)} of {len(work.data)} examples are named in {request.output / 'report.html'}")
    for line in for_a_fleet(None if request.bundle is None else settings):
        display.line(line)
    return found


def told(work: Work, found: Compared) -> list[str]:
    """The table, and in words what it says."""
    unit = "R2" if work.kind == RIDGE else "accuracy"
    width = max(len(one.title) for one in CONTESTANTS.values())
    lines = [f"{unit} on trusted examples that were not learned from, mean and deviation of {FOLDS} folds"]
    for name, one in CONTESTANTS.items():
        lines.append(f"  {one.title:{width}}  {found.mean(name):6.3f} +- {np.std(found.scores[name], ddof=1):.3f}")
    gain, error = found.gain()
    if found.helps():
        lines.append(
            f"Teaching helps here: {gain:+.3f} (standard error {error:.3f}) beside the trusted examples alone."
        )
    else:
        lines.append(
            f"The trusted examples alone are as good ({gain:+.3f}, standard error {error:.3f}): use them and leave the "
            "rest; what is below still says which of the others to doubt."
        )
    return lines


def final(work: Work, found: Compared) -> tuple[Report, Settings]:
    """Teaching with all trusted examples at its tuned setting, and what it found in the others, by row of the data."""
    parts, setting = [work.data.take(rows) for rows in work.parts], found.settings["teaching"]
    result = taught(work, parts, work.trusted, setting)
    rows = np.concatenate(work.parts)
    weights = np.concatenate([np.abs(alpha) for alpha in result.alphas[: len(parts)]])
    moved = np.concatenate([_moved(one) for one in result.crafted[: len(parts)]])
    order = np.argsort(rows, kind="stable")
    weights, moved, rows = weights[order], moved[order], rows[order]
    sizes = np.maximum(np.linalg.norm(work.data.features[rows, :-1], axis=1), 1e-12)
    judged = Judged((weights > SELECTED_ABOVE).any(axis=1), weights.max(axis=1), moved / sizes)
    outputs, y = work.data.features[rows] @ result.theta, work.data.y[rows]
    settings = balanced(Problem(work.kind), *as_data(work, parts, work.trusted), setting)
    if work.kind == RIDGE:
        return regression_report(work.name, "covey teach", y, outputs[:, 0], judged), settings
    return class_report(work.name, "covey teach", y, chances_of(outputs), judged, work.class_names), settings


def _moved(crafted: Crafted) -> Array:
    """(n,): by how much features are changed, over all columns."""
    return np.asarray(np.sqrt(np.sum(crafted.features**2, axis=(0, 2))))


def write(folder: Path, work: Work, found: Compared, report: Report) -> None:
    summary = {
        "data": work.name,
        "scores": found.scores,
        "settings": {name: _plain(setting) for name, setting in found.settings.items()},
        "helps": found.helps(),
        "gain": found.gain(),
    }
    made = {**files(report, work.data.x), "summary.json": msgspec.json.format(msgspec.json.encode(summary), indent=1)}
    for name, data in made.items():
        write_atomic(folder / name, data, mode=0o600)


def _plain(setting: float | Settings) -> dict[str, float | str]:
    """JSON has no infinity."""
    if not isinstance(setting, Settings):
        return {"decay": setting}
    return {name: value if math.isfinite(value) else "inf" for name, value in asdict(setting).items()}


def for_a_fleet(settings: Settings | None) -> list[str]:
    """What to write for these constants, which belong to the features of one bundle."""
    if settings is None:
        told = "--bundle MODEL.covey, of `covey export --teach`, tunes its constants"
        return [f"For a fleet: {told} (docs/machine-teaching.md)."]
    return [
        "On a fleet, in its coordinator.toml (docs/machine-teaching.md):",
        "  [training]",
        '  algorithm = "comt"',
        *(f"  {line}" for line in _table(settings)),
        '  [trusted]           # or holders = ["DEVICE", ...] in [teaching], with data.trusted_path on these devices',
        '  path = "trusted.npz"',
    ]


def _table(settings: Settings) -> list[str]:
    names = ("lambda_w", "lambda_t", "lambda_a", "lambda_z", "lambda_y", "rho", "curvature")
    return ["[teaching]", *(f"{name} = {float(getattr(settings, name)):.6g}" for name in names)]
