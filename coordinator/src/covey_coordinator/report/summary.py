"""The numbers and sentences of a report, without any drawing: tables, detection rates, plain words.

Text from devices (ids, reasons, class names) passes `printable` before it is shown anywhere, so that it cannot move a
terminal's cursor or reverse the reading direction. Escaping for HTML is the template's work.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from covey_coordinator.records import (
    ACCEPTED,
    MISSING,
    REJECTED,
    DemoRecord,
    InversionRecord,
    Reconstruction,
    RunRecord,
)

MAX_TEXT = 300  # characters of one piece of foreign text; a reason is one sentence
HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn")  # control, format (bidi overrides), surrogates, private, unassigned

# How much closer than a blind guess a reconstruction is, in dB, and what to call it. Rules of thumb from looking at 8x8
# digits (at 8 dB people still read most of them), not a standard.
EXPOSED, RECOGNISABLE, TRACES, HIDDEN = "exposed", "recognisable", "traces", "hidden"
GAINS = ((20.0, EXPOSED), (6.0, RECOGNISABLE), (2.0, TRACES))


@dataclass(frozen=True)
class Detection:
    """Who was rejected, counted over all (round, device) pairs of a run whose update was judged.

    Missing updates do not count. precision: of the rejected, the share that really is corrupted (NaN: none was
    rejected). recall: of the judged updates of corrupted devices, the share rejected (NaN: there were none).
    """

    rejected: int
    rejected_corrupted: int
    judged_corrupted: int
    missing: int

    @property
    def precision(self) -> float:
        return self.rejected_corrupted / self.rejected if self.rejected else math.nan

    @property
    def recall(self) -> float:
        return self.rejected_corrupted / self.judged_corrupted if self.judged_corrupted else math.nan


@dataclass(frozen=True)
class RunRow:
    """One line of the main table. difference: final accuracy minus the clean reference's, in points; NaN: unknown."""

    title: str
    rule: str
    engine: str
    num_corrupted: int
    num_rounds: int
    num_abandoned: int
    final_accuracy: float
    difference: float
    is_reference: bool
    detection: Detection


def printable(text: str, most: int = MAX_TEXT) -> str:
    """Foreign text made safe to show: one line, no control, format or surrogate characters, at most `most` of them."""
    flat = " ".join(text.split())
    shown = "".join("\ufffd" if unicodedata.category(letter) in HIDDEN_CATEGORIES else letter for letter in flat)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def reference_run(record: DemoRecord) -> RunRecord | None:
    """The clean reference: the first run without corrupted devices."""
    return next((run for run in record.runs if not run.corrupted), None)


def run_rows(record: DemoRecord) -> list[RunRow]:
    """The main table, in the order of the runs."""
    reference = reference_run(record)
    base = reference.final_accuracy if reference is not None else math.nan
    return [
        RunRow(
            title=run.title,
            rule=run.rule,
            engine=run.engine,
            num_corrupted=len(run.corrupted),
            num_rounds=len(run.rounds),
            num_abandoned=sum(finished.outcome == "abandoned" for finished in run.rounds),
            final_accuracy=run.final_accuracy,
            difference=100 * (run.final_accuracy - base),
            is_reference=run is reference,
            detection=detection(run),
        )
        for run in record.runs
    ]


def detection(run: RunRecord) -> Detection:
    """How well the rejections of a run hit the devices that really are corrupted."""
    corrupted = set(run.corrupted)
    verdicts = [verdict for finished in run.rounds for verdict in finished.verdicts]
    judged = [verdict for verdict in verdicts if verdict.status != MISSING]
    rejected = [verdict for verdict in judged if verdict.status == REJECTED]
    return Detection(
        rejected=len(rejected),
        rejected_corrupted=sum(verdict.device_id in corrupted for verdict in rejected),
        judged_corrupted=sum(verdict.device_id in corrupted for verdict in judged),
        missing=len(verdicts) - len(judged),
    )


def device_ids(record: DemoRecord) -> list[str]:
    """Every device that has data, a verdict or a mark anywhere in the record; pi-2 before pi-10."""
    seen = set(record.shard_counts)
    for run in record.runs:
        seen.update(run.corrupted)
        seen.update(verdict.device_id for finished in run.rounds for verdict in finished.verdicts)
    return sorted(seen, key=_natural)


def statuses(run: RunRecord, devices: Sequence[str]) -> dict[str, list[str]]:
    """device -> its status per round in order; empty text where the device was not invited."""
    by_round = [{verdict.device_id: verdict.status for verdict in finished.verdicts} for finished in run.rounds]
    return {device: [of_round.get(device, "") for of_round in by_round] for device in devices}


def rejections_and_absences(run: RunRecord) -> list[tuple[int, str, str, str]]:
    """(round, device, status, reason) of everything that was not accepted, in order."""
    return [
        (finished.number, verdict.device_id, verdict.status, verdict.reason)
        for finished in run.rounds
        for verdict in finished.verdicts
        if verdict.status != ACCEPTED
    ]


def blind_psnr(inversion: InversionRecord) -> float:
    """The PSNR of the middle of the input range held against the truth: what an attacker gets without any update."""
    low, high = inversion.input_range
    error = float(np.mean((inversion.truth.astype(np.float64) - (low + high) / 2) ** 2))
    return 10 * math.log10((high - low) ** 2 / error) if error > 0 else math.inf


def exposure(inversion: InversionRecord, reconstruction: Reconstruction) -> str:
    """EXPOSED, RECOGNISABLE, TRACES or HIDDEN: how far this reconstruction is above the blind guess.

    It judges the attack that was run; a better attack may find more.
    """
    gain = reconstruction.psnr_db - blind_psnr(inversion)
    return next((name for least, name in GAINS if gain >= least), HIDDEN)


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%" if math.isfinite(share) else "–"


def points(difference: float) -> str:
    """A difference in percentage points with its sign, as in "-3.2"."""
    if not math.isfinite(difference):
        return "–"
    return f"{difference:+.1f}" if abs(difference) >= 0.05 else "0.0"


def decibels(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.1f} dB" if math.isfinite(value) else "exact"


def table_lines(record: DemoRecord) -> list[str]:
    """The plain-text table a terminal prints at the end: a header, then one line per run."""
    rows = run_rows(record)
    cells = [("run", "accuracy", "to clean")]
    cells += [
        (printable(row.title), percent(row.final_accuracy), "reference" if row.is_reference else points(row.difference))
        for row in rows
    ]
    width = max(len(title) for title, _, _ in cells)
    return [f"{title:<{width}}  {accuracy:>8}  {difference:>9}" for title, accuracy, difference in cells]


def sentences(record: DemoRecord) -> list[str]:
    """The summary at the top of the report: at most five sentences in plain words."""
    rows = run_rows(record)
    return [
        sentence
        for sentence in (
            _what_was_done(record),
            _clean(rows),
            _worst(rows, record.num_devices),
            _best(rows),
            _leak(record),
        )
        if sentence
    ]


def _what_was_done(record: DemoRecord) -> str:
    longest = max((len(run.rounds) for run in record.runs), default=0)
    runs = f"{len(record.runs)} {'run' if len(record.runs) == 1 else 'runs'}"
    rounds = f"{longest} {'round' if longest == 1 else 'rounds'}"
    return (
        f"{record.num_devices} devices trained one model on {record.dataset} together, in {runs} of up to "
        f"{rounds}; each kept its own data and sent only changes to the model."
    )


def _clean(rows: Sequence[RunRow]) -> str:
    row = next((row for row in rows if row.is_reference), None)
    if row is None:
        return "There was no run with only healthy devices, so the accuracies have nothing to be compared with."
    if not math.isfinite(row.final_accuracy):
        return "The run with only healthy devices ended without a measured accuracy."
    return f"With only healthy devices the model got {percent(row.final_accuracy)} of the test examples right."


def _attacked(rows: Sequence[RunRow]) -> list[RunRow]:
    return sorted(
        (row for row in rows if row.num_corrupted and math.isfinite(row.final_accuracy)),
        key=lambda row: row.final_accuracy,
    )


def _compared(row: RunRow) -> str:
    if not math.isfinite(row.difference):
        return percent(row.final_accuracy)
    if abs(row.difference) < 0.05:
        return f"{percent(row.final_accuracy)}, the same as without them"
    side = "below" if row.difference < 0 else "above"
    return f"{percent(row.final_accuracy)}, {abs(row.difference):.1f} points {side} the clean reference"


def _worst(rows: Sequence[RunRow], num_devices: int) -> str:
    attacked = _attacked(rows)
    if not attacked:
        return ""
    row = attacked[0]
    share = f"{row.num_corrupted} of {num_devices} devices corrupted"
    return f"With {share}, the rule “{row.rule}” ended at {_compared(row)}."


def _best(rows: Sequence[RunRow]) -> str:
    attacked = _attacked(rows)
    if not attacked:
        return ""
    row = attacked[-1]
    found = row.detection
    who = ""
    if found.judged_corrupted:
        who = (
            f"it turned away {found.rejected_corrupted} of the {found.judged_corrupted} updates corrupted devices "
            f"sent, and {found.rejected - found.rejected_corrupted} from healthy ones"
        )
    if len(attacked) == 1:
        return f"{who[0].upper()}{who[1:]}." if who else ""
    ended = f"Against the same kind of damage the rule “{row.rule}” ended at {_compared(row)}"
    return f"{ended}; {who}." if who else f"{ended}."


def _leak(record: DemoRecord) -> str:
    inversion = record.inversion
    if inversion is None or not inversion.reconstructions:
        return "Whether the updates give data away was not checked in this demo."
    first = inversion.reconstructions[0]
    thing = "picture" if inversion.truth.ndim >= 2 else "record"
    found = {
        EXPOSED: f"the {thing} could be rebuilt almost exactly",
        RECOGNISABLE: f"a recognisable copy of the {thing} could be rebuilt",
        TRACES: f"traces of the {thing} could be rebuilt",
        HIDDEN: f"the {thing} could not be rebuilt by this attack",
    }[exposure(inversion, first)]
    noisy = [r for r in inversion.reconstructions if r.noise_multiplier and exposure(inversion, r) == HIDDEN]
    enough = min((r.noise_multiplier or math.inf for r in noisy), default=None)
    cure = f"; noise with multiplier {enough:g} hid it from this attack" if enough is not None else ""
    return f"From one unprotected update, made from a single example, {found}{cure}."


def _natural(device: str) -> list[tuple[int, int, str]]:
    pieces = re.split(r"([0-9]{1,18})", device)
    return [(0, int(piece), "") if index % 2 else (1, 0, piece) for index, piece in enumerate(pieces)]
