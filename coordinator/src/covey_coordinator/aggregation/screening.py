"""What an update must pass before any rule sees it. Pure numpy; nothing here raises because of what a device sent.

Live rounds screen each update when it arrives, into the matrix that the rule will read (`Arrivals`), so that a round's
end has little left to do; `screen_updates` does the same to updates that are all there.

Refused, with a reason per device: wrong shape or dtype, values that are not finite or too large to square in float32,
an update of zeros only, a copy of another device's update, and a num_examples that is not a positive finite number.
None of these comes from a device that works: each refusal accounts for one of the rule's num_byzantine
(`Screened.num_faulty`; docs/adr/0014). What this does not do: judge whether values are plausible. That is the rules'
work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil

from covey_coordinator.aggregation.rules import Trusted
from covey_coordinator.records import Array
from covey_protocol.errors import RuleError, UsageError
from covey_protocol.parameters import MAX_UPDATE_NORM

MAX_NUM_EXAMPLES = float(1 << 24)  # float32 counts exactly up to here; rules with weights cap far lower by the median
GIB = 1 << 30
MAX_MATRIX_BYTES = 4 * GIB  # of all updates of a round; what the rules are tested to
MEMORY_RATIO = 1.3  # what a rule needs at most, as a multiple of the matrix of updates
SHARE_ROUNDING = 1e-6  # of a share of examples, which is a float32
FINGERPRINT_VALUES = 64  # sampled numbers of an update; only updates equal in these are hashed in full


@dataclass(frozen=True)
class Screened:
    """The updates that may enter a rule, ordered by device id, and why the others may not.

    updates: (n, d) float32. num_examples: (n,) float32, capped at MAX_NUM_EXAMPLES. device_ids: sorted. norms: of every
    update that is a vector of numbers, refused ones too (may be inf or nan). refused_on_arrival: how many devices more
    sent what could not even be stored, such as an update of the wrong size. trusted: for rules that need it; it is the
    coordinator's own, so nothing here judges it.
    """

    updates: Array
    num_examples: Array
    device_ids: tuple[str, ...]
    reasons: dict[str, str] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    refused_on_arrival: int = 0
    trusted: Trusted | None = None

    @property
    def num_faulty(self) -> int:
        """How many devices sent what only a faulty or hostile one can send; so many fewer are among the rest.

        Of c equal updates at most one is a working device's; one stays and c - 1 count, whichever is named.
        """
        return len(self.reasons) + self.refused_on_arrival


def screen_updates(
    updates: Sequence[Any] | Array,
    num_examples: Sequence[Any] | Array,
    device_ids: Sequence[str],
    d: int,
    *,
    refuse_copies: bool = True,
) -> Screened:
    """Sort the updates by device id and take out those that no rule should see.

    updates: one vector per device, or an (n, d) matrix. refuse_copies: take out updates that are bit-equal to another
    device's; two honest devices practically never agree in every bit, one attacker with two identities does. The
    copy of the smallest device id stays: the content is the same, so the aggregate does not depend on which stays, but
    the device that is named need not be the one that copied.
    """
    _require_consistent(updates, num_examples, device_ids)
    reasons: dict[str, str] = {}
    norms: dict[str, float] = {}
    usable: list[int] = []
    for row in sorted(range(len(device_ids)), key=device_ids.__getitem__):
        device_id = device_ids[row]
        reason = _shape_fault(updates[row], d)
        if not reason:
            norms[device_id] = _norm(updates[row])
            reason = _value_fault(updates[row], norms[device_id]) or _count_fault(num_examples[row])
        if reason:
            reasons[device_id] = reason
        else:
            usable.append(row)
    if refuse_copies:
        usable = _first_of_copies(updates, device_ids, usable, reasons)
    counts = np.minimum(np.array([num_examples[row] for row in usable], np.float64), MAX_NUM_EXAMPLES)
    return Screened(
        updates=_rows(updates, usable, d),
        num_examples=counts.astype(np.float32),
        device_ids=tuple(device_ids[row] for row in usable),
        reasons=reasons,
        norms=norms,
    )


class Arrivals:
    """The updates of one round: each is screened when it arrives and written into its row of one matrix.

    Rows lie in the order of the device ids. Raises RuleError where the matrix would be too large for the rules or this
    machine (`require_memory`). value_fault: what is wrong with an update and its norm, "" for nothing. dtype: of the
    updates; float64 for rows of a code.
    """

    def __init__(
        self,
        device_ids: Iterable[str],
        d: int,
        value_fault: Callable[[Array, float], str] | None = None,
        dtype: type[np.floating[Any]] = np.float32,
    ) -> None:
        self._value_fault = _value_fault if value_fault is None else value_fault
        self._rows = {device_id: row for row, device_id in enumerate(sorted(device_ids))}
        require_memory(len(self._rows), d * np.dtype(dtype).itemsize // 4)
        self._matrix = np.empty((len(self._rows), d), dtype)
        self._counts: dict[str, float] = {}
        self._reasons: dict[str, str] = {}
        self._norms: dict[str, float] = {}

    def add(self, device_id: str, update: Any, num_examples: Any) -> None:
        """Screen one device's update, a (d,) array of the dtype if it is any good. A later one replaces it."""
        for notes in (self._counts, self._reasons, self._norms):
            notes.pop(device_id, None)
        reason = _shape_fault(update, self._matrix.shape[1], self._matrix.dtype)
        if not reason:
            row = self._matrix[self._rows[device_id]]
            row[:] = update
            self._norms[device_id] = _norm(row)
            reason = self._value_fault(row, self._norms[device_id]) or _count_fault(num_examples)
        if reason:
            self._reasons[device_id] = reason
        else:
            self._counts[device_id] = float(num_examples)

    def screened(
        self, device_ids: Iterable[str], *, refuse_copies: bool = True, refused_on_arrival: int = 0
    ) -> Screened:
        """What may enter a rule of these devices' updates. To be called once: rows move up to close gaps."""
        asked = set(device_ids)
        usable = [row for device_id, row in self._rows.items() if device_id in asked and device_id in self._counts]
        ids = list(self._rows)
        reasons = {device_id: reason for device_id, reason in self._reasons.items() if device_id in asked}
        if refuse_copies:
            usable = _first_of_copies(self._matrix, ids, usable, reasons)
        for place, row in enumerate(usable):
            if place != row:
                self._matrix[place] = self._matrix[row]
        kept = tuple(ids[row] for row in usable)
        counts = np.minimum(np.array([self._counts[device_id] for device_id in kept], np.float64), MAX_NUM_EXAMPLES)
        norms = {device_id: norm for device_id, norm in self._norms.items() if device_id in asked}
        return Screened(self._matrix[: len(kept)], counts.astype(np.float32), kept, reasons, norms, refused_on_arrival)


def require_memory(n: int, d: int) -> None:
    """Raise RuleError unless n updates of d numbers fit the rules' limit and the free memory of this machine.

    Rules need up to 1.3 times the matrix; beside it, (n, n) matrices and blocks of columns.
    """
    size = n * d * 4
    fewer = "invite fewer devices to a round, or train a smaller model"
    if size > MAX_MATRIX_BYTES:
        raise RuleError(
            f"{n} updates of {d} numbers are {size / GIB:.1f} GiB, more than {MAX_MATRIX_BYTES / GIB:g}", fewer
        )
    needed = int(size * MEMORY_RATIO) + 16 * n * n * 8
    available = psutil.virtual_memory().available
    if needed > available:
        raise RuleError(
            f"{n} updates of {d} numbers need {needed / GIB:.1f} GiB, but {available / GIB:.1f} GiB are free",
            f"{fewer}, or use a machine with more memory",
        )


def _require_consistent(updates: Any, num_examples: Any, device_ids: Sequence[str]) -> None:
    if not len(updates) == len(num_examples) == len(device_ids):
        raise UsageError(f"{len(updates)} updates, {len(num_examples)} num_examples, {len(device_ids)} device ids")
    if len(set(device_ids)) != len(device_ids):
        raise UsageError("a device id occurs twice in one round")


def update_fault(update: Any, d: int) -> str:
    """Why this is no update of d numbers that a rule can work with; "" where it is."""
    return _shape_fault(update, d) or _value_fault(update, _norm(update))


def _shape_fault(update: Any, d: int, dtype: Any = np.float32) -> str:
    if not isinstance(update, np.ndarray):
        return f"update is not an array but {type(update).__name__}"
    if update.dtype != dtype:
        return f"update has dtype {update.dtype} instead of {np.dtype(dtype)}"
    if update.shape != (d,):
        return f"update has shape {update.shape} instead of ({d},)"
    return ""


def _norm(update: Array) -> float:
    """Euclidean norm; nan or inf exactly where a value is."""
    square = float(np.dot(update, update))
    if np.isfinite(square):
        return float(np.sqrt(square))
    with np.errstate(invalid="ignore"):
        return float(np.linalg.norm(update.astype(np.float64)))


def number_fault(update: Array, norm: float) -> str:
    """Why these are not numbers that a rule can work with; "" where they are."""
    if not np.isfinite(norm):
        bad = int(np.count_nonzero(~np.isfinite(update)))
        return f"update holds {bad} values that are not finite (NaN or infinity)"
    if norm > MAX_UPDATE_NORM:
        return f"update has norm {norm:.1e}, beyond what float32 can square"
    return ""


def shares_fault(row: Array, norm: float) -> str:
    """What screening asks of shares of examples. Those of two devices may be the same."""
    fault = number_fault(row, norm)
    if not fault and not (row.min() >= 0 and row.max() <= 1 + SHARE_ROUNDING):
        fault = f"shares of examples from {row.min():g} to {row.max():g}, not from 0 to 1"
    return fault


def _value_fault(update: Array, norm: float) -> str:
    fault = number_fault(update, norm)
    if fault:
        return fault
    if norm == 0 and not update.any():  # the norm alone can underflow
        return "update is all zeros: the device did not train"
    return ""


def _count_fault(num_examples: Any) -> str:
    try:
        count = float(num_examples)
    except (TypeError, ValueError, OverflowError):
        return f"num_examples is {num_examples!r}, not a number"
    if not (np.isfinite(count) and count > 0):
        return f"num_examples is {count:g}, not a positive finite number"
    return ""


def _first_of_copies(updates: Any, device_ids: Sequence[str], usable: list[int], reasons: dict[str, str]) -> list[int]:
    """The rows of `usable` without later bit-equal copies; writes a reason for each copy."""
    alike: dict[bytes, list[int]] = {}
    for row in usable:
        alike.setdefault(_fingerprint(updates[row]), []).append(row)
    for rows in alike.values():
        first: dict[bytes, str] = {}
        for row in rows if len(rows) > 1 else ():
            digest = hashlib.blake2b(np.ascontiguousarray(updates[row]).data).digest()
            original = first.setdefault(digest, device_ids[row])
            if original != device_ids[row]:
                reasons[device_ids[row]] = f"update is bit-equal to that of {original}"
    return [row for row in usable if device_ids[row] not in reasons]


def _fingerprint(update: Array) -> bytes:
    step = max(1, len(update) // FINGERPRINT_VALUES)
    return update[::step].tobytes()


def _rows(updates: Any, rows: list[int], d: int) -> Array:
    """The chosen rows as one matrix; without a copy where that is all of a matrix in order."""
    if isinstance(updates, np.ndarray) and rows == list(range(len(updates))):
        return updates
    require_memory(len(rows), d)
    matrix = np.empty((len(rows), d), np.float32)
    for place, row in enumerate(rows):
        matrix[place] = updates[row]
    return matrix
