"""What one piece of an audit found, as plain values: written by `folder`, judged by `policy`, shown by the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from msgspec import Struct

from covey_coordinator.audit.data import Numbers

# kinds of cases
PLAN = "plan"  # what the user asked about, and what is judged
ONE_EXAMPLE = "one example"  # one step on one example, under the plan's protection
BARE = "one example, bare"  # the same without protection
MALICIOUS = "malicious server"
CURVES = "curves"


class Result(Struct, frozen=True, omit_defaults=True):
    """key: of its file. case: which updates. curve, at: of a trade-off, which and at what value. name: of the attack or
    measurement. metrics: by name, finite. cut: it ran out of time, so its numbers are lower bounds. refused: why it
    could not be done here, "" where it was. pictures: whether `key`.npz holds truth and found, (k, *input shape) each.
    """

    key: str
    case: str
    name: str
    sees: str = ""
    device: str = ""
    examples: int = 0
    metrics: dict[str, float] = {}
    seconds: float = 0.0
    iterations: int = 0
    cut: bool = False
    refused: str = ""
    notes: tuple[str, ...] = ()
    pictures: bool = False
    curve: str = ""
    at: float = 0.0


@dataclass(frozen=True)
class Pictures:
    """truth, found: (k, *input shape). Of a found one that is missing, NaN."""

    truth: Numbers
    found: Numbers


def finite(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Those that are numbers. PSNR of an exact recovery is infinite; 200 dB is what float64 could show."""
    found = {name: float(value) for name, value in metrics.items() if value is not None and not math.isnan(value)}
    return {name: min(max(value, -200.0), 200.0) for name, value in found.items()}


def largest(results: Iterable[Result], metric: str) -> Result | None:
    """The result with the largest number of this metric; None where none has it."""
    having = [one for one in results if metric in one.metrics]
    return max(having, key=lambda one: one.metrics[metric], default=None)
