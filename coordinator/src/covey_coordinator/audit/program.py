"""`covey audit`: begin with what is asked, do the pieces that the budget allows, judge, write the report."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from covey_coordinator.audit.bench import Bench
from covey_coordinator.audit.budget import Budget, Clock
from covey_coordinator.audit.data import AuditData, read_data
from covey_coordinator.audit.folder import Asked, AuditFolder
from covey_coordinator.audit.policy import Policy
from covey_coordinator.audit.property import check_property
from covey_coordinator.audit.results import Result
from covey_coordinator.audit.settings import PlanSettings, check_bundle_fits
from covey_coordinator.audit.suite import Level, Piece, pieces
from covey_coordinator.audit.updates import TrainingChild
from covey_coordinator.audit.verdict import Outcome, concluded
from covey_coordinator.grid.display import Display, clock
from covey_edge.config import read_file
from covey_protocol.bundle import read_bundle

Check = Callable[[], None]


@dataclass(frozen=True)
class Request:
    """As on the command line. minutes: of the budget. data_dir: where data sets lie, None for COVEY_DATA."""

    bundle: Path
    settings: PlanSettings
    policy: Policy
    level: Level
    minutes: float
    out: Path
    seed: int = 0
    data_dir: Path | None = None


def audit(request: Request, display: Display, check: Check = lambda: None, now: Clock = time.monotonic) -> Outcome:
    """Everything that is found is kept in request.out as it comes; the same request with the same folder goes on.

    check: called between pieces and while attacks run; may raise to end it. Raises ConfigError, DataError, BundleError
    or StorageError. What the policy says is in the outcome, not an error.
    """
    raw = read_file(request.bundle)
    bundle, budget = read_bundle(raw), Budget(60 * request.minutes, now)
    check_bundle_fits(request.settings, bundle.manifest)
    data = read_data(request.settings, bundle.manifest, request.seed, request.data_dir)
    check_property(request.settings.property, data)
    folder, asked = AuditFolder(request.out), _asked(request, raw, data)
    with folder.held(asked), TrainingChild(bundle) as child:
        bench = Bench(bundle, request.settings, data, child, request.seed)
        planned = pieces(bench, request.level)
        _introduce(request, bench, planned, display)
        try:
            results = _done(folder, planned, budget, display, check)
        except BaseException:
            display.line(f"  what is done is kept; the same command with --out {request.out} goes on")
            raise
        outcome = concluded(request.policy, bench, planned, results, raw)
        _conclude(request, folder, bench, outcome, display)
    return outcome


def _asked(request: Request, bundle: bytes, data: AuditData) -> Asked:
    held = hashlib.sha256()
    for part in (*data.devices, data.test):
        held.update(part.x.tobytes() + part.y.tobytes())
    digest = hashlib.sha256(bundle).hexdigest()
    return Asked(digest, held.hexdigest(), _facts(request.settings), request.seed, request.level.name, _versions())


def _facts(settings: PlanSettings) -> dict[str, Any]:
    """ "table.key" -> value as JSON has it. Without where the data lie: what they are is asked by their own hash."""
    tables = msgspec.json.decode(msgspec.json.encode(settings))
    for name in ("set", "path"):
        del tables["data"][name]
    return {f"{table}.{key}": value for table, keys in tables.items() for key, value in keys.items()}


def _versions() -> str:
    import tensorflow as tf

    return f"{version('covey-coordinator')} with TensorFlow {tf.__version__}"


def _introduce(request: Request, bench: Bench, planned: Sequence[Piece], display: Display) -> None:
    data, manifest = bench.data, bench.bundle.manifest
    sizes = [len(part) for part in data.devices]
    display.line(
        f"covey audit: {manifest.name} ({manifest.dimension:,} parameters) on {data.name}, {len(sizes)} devices of "
        f"{min(sizes)} to {max(sizes)} examples"
    )
    display.line(f"  {len(planned)} measurements, at most about {request.minutes:g} minutes; in {request.out}")


def _done(
    folder: AuditFolder, planned: Sequence[Piece], budget: Budget, display: Display, check: Check
) -> dict[str, Result]:
    """By key. Those of an earlier start are taken as they are, unless they were cut off."""
    there = {key: one for key, one in folder.results().items() if key in {piece.key for piece in planned}}
    for piece in planned:
        if piece.key in there:
            budget.spent(piece.kind, there[piece.key].seconds)
    missing = [piece for piece in planned if piece.key not in there or there[piece.key].cut]
    if len(missing) < len(planned):
        display.line(f"  going on: {len(planned) - len(missing)} of {len(planned)} are there already")
    stop = _stopped(budget, check)
    with display.cells(len(planned) - len(missing), len(planned), "measurements") as ticker:
        for piece in missing:
            check()
            if budget.over() or not budget.fits(piece.kind):
                continue
            started = budget.clock()
            result, pictures = piece.work(stop)
            seconds = budget.clock() - started
            budget.spent(piece.kind, seconds)
            result = msgspec.structs.replace(result, seconds=seconds)
            folder.keep(result, pictures)
            there[piece.key] = result
            ticker.finished(f"{piece.said}: {_said(result)}, {clock(max(budget.left(), 0.0))} of the time left")
    return there


def _stopped(budget: Budget, check: Check) -> Callable[[], bool]:
    """What attacks ask: the end of the time, and Ctrl-C in the middle of one."""

    def stop() -> bool:
        check()
        return budget.over()

    return stop


def _said(result: Result) -> str:
    if result.refused:
        return "does not apply"
    told = {
        "psnr_db": "PSNR {:.1f} dB",
        "label_recovery": "labels {:.0%}",
        "accuracy": "accuracy {:.1%}",
        "membership_auc": "AUC {:.2f}",
        "linkability_auc": "AUC {:.2f}",
        "property_auc": "AUC {:.2f}",
        "resolved_share": "{:.0%} resolved",
    }
    found = [form.format(result.metrics[name]) for name, form in told.items() if name in result.metrics]
    return ", ".join(found) or "nothing found"


def _conclude(request: Request, folder: AuditFolder, bench: Bench, outcome: Outcome, display: Display) -> None:
    from covey_coordinator.audit.report import as_json, report_html
    from covey_coordinator.inversion.verdict import write_verdict

    folder.conclude(
        {
            "report.html": report_html(bench, request, outcome, folder.pictures).encode(),
            "results.json": as_json(outcome),
        }
    )
    write_verdict(folder.path / "verdict.json", outcome.verdict)
    display.line()
    for one in outcome.judged:
        display.line(f"  {'ok  ' if one.kept else 'FAIL'} {one.said}")
    if outcome.left_out:
        display.line(f"  {len(outcome.left_out)} measurements did not fit the time; the report names them")
    display.line()
    display.line(f"verdict: {'passed' if outcome.verdict.passed else 'not passed'}")
    display.line(f"report: {folder.path / 'report.html'}")
