"""Decoding DRACO's cyclic code: which rows are lies, and the exact sum from the others. Pure NumPy, float64.

Honest rows hold n - 2s of n frequencies (`covey_protocol.coding`); in the 2s others, the syndromes, only lies are seen:
sums of exponentials, whose bases are the liars (Prony). Beside the paper's decoder, which solves one s x s system
and takes its roots:

- several random projections of the rows at once, and a singular vector in place of the solution of a system, so that
  fewer than s liars, equal lies and lies of very different size are found, too;
- the polynomial is only evaluated where a liar can be, and the candidates near the best are all tried against what
  counts: whether the rows that are left are a codeword, to `tolerance`;
- a located row is left out before one looks on, so that a huge lie does not hide a small one;
- the sum is the least-norm combination of all rows that are left, where any n - 2s of them would do.

What it cannot do: see that s + 1 of the 2s + 1 holders of a shard agree on another value of it; then the s honest ones
look like the liars. More than s that do not agree on a codeword are refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from covey_protocol.coding import Array, CyclicCode
from covey_protocol.errors import RuleError, UsageError

TOLERANCE = 8e-15  # of the largest row that is left; honest float64 rows were 2.1e-15 off at most, in 3,500 draws
PROJECTIONS = 3
WIDER = 1  # rows between liars that hide
NEAR = 4  # candidates beside the best that are tried
HELPS = 1e-2  # of the misfit before: what is left after rows were rightly left out
LARGEST = 1e100  # of a projection: its square is a float64
BLOCK = 1 << 16  # numbers of a row projected at once


class Decoded(NamedTuple):
    """total: (d,) float64, the sum over all shards. liars: numbers of devices, sorted. misfit: how far the rows that
    were used are from a codeword, in their largest."""

    total: Array
    liars: tuple[int, ...]
    misfit: float


def decode(
    code: CyclicCode,
    rows: Array,
    random: np.random.Generator,
    *,
    missing: Collection[int] = (),
    tolerance: float = TOLERANCE,
) -> Decoded:
    """(n, d) rows, by device -> the sum over the shards.

    random: draws what liars must not know before they send. missing: devices whose row did not come, whatever is in
    its place; each costs half a liar. tolerance: how far honest rows may be from a codeword, as a share of the largest.
    It has to be raised where the vectors of a device's shards all but cancel in its row, which then is mostly rounding.
    Raises RuleError where the rows are not within s lies of a codeword.
    """
    if rows.shape[:1] != (code.n,) or rows.ndim != 2:
        raise UsageError(f"rows of shape {rows.shape} for a code of {code.n} devices")
    gone = set(missing)
    seen = _projected(rows, random)
    broken = {row for row in range(code.n) if not np.abs(seen[row]).max() <= LARGEST} - gone
    search = _Search(code, seen, tolerance)
    found = search.liars(gone | broken, len(gone) + 2 * len(broken))
    left = [row for row in range(code.n) if row not in found]
    liars = broken | search.proven(found - gone - broken, gone | broken)
    return Decoded(_sum(code, rows, left), tuple(sorted(liars)), _misfit(code, seen, left))


class _Search:
    """seen: (n, p) complex, projections of the rows; those of rows that are left out are not looked at."""

    def __init__(self, code: CyclicCode, seen: Array, tolerance: float) -> None:
        self._code, self._seen, self._tolerance = code, seen, tolerance
        self._nodes = np.exp(-2j * np.pi * np.arange(code.n) / code.n)

    def liars(self, out: set[int], spent: int) -> set[int]:
        """`out` and the liars. spent: how much of the distance 2s went for what is out; a lie costs two."""
        found = self._further(out, (2 * self._code.s - spent) // 2) if spent <= 2 * self._code.s else None
        if found is None:
            raise RuleError(
                f"the rows are not within {self._code.s} lies of a codeword of {self._code.n} devices"
                + (f" ({len(out)} rows are missing or not finite)" if out else ""),
                "more than s devices lie, or honest ones do not compute the same of the same shard: look, or raise "
                "tolerance",
            )
        return found

    def proven(self, found: set[int], out: set[int]) -> set[int]:
        """Those without whom the others would be no codeword; who only lies near them may have been left out, too."""
        return {row for row in found if self._left(out | found - {row}) > self._tolerance}

    def _further(self, out: set[int], most: int) -> set[int] | None:
        """`out` and at most so many rows more, such that the others are a codeword; None where there are none."""
        if self._left(out) <= self._tolerance:
            return out
        for near in (0, NEAR):  # mostly the polynomial is right; what is near it takes a hundred times as long
            found = self._by_steps(out, most, near)
            if found is not None:
                return found
        return self._side_by_side(out, most)

    def _side_by_side(self, out: set[int], most: int) -> set[int] | None:
        """Liars next to each other can make their lies all but vanish in the syndromes; then they are found by trial.

        Whoever of them does not lie may be left out with them: what is left is a codeword for the truth alone.
        """
        span = range(1, most + WIDER)
        for first in range(self._code.n) if most else ():
            for others in itertools.combinations(span, most - 1):
                chosen = {(first + place) % self._code.n for place in (0, *others)} - out
                if self._left(out | chosen) <= self._tolerance:
                    return out | chosen
        return None

    def _by_steps(self, out: set[int], most: int, near: int) -> set[int] | None:
        helped: list[tuple[int, float, set[int]]] = []
        enough = HELPS * self._left(out) * self._largest(out)
        for count in range(1, most + 1):
            for chosen in self._candidates(out, count, near):
                left = self._left(out | chosen)
                if left <= self._tolerance:
                    return out | chosen
                left *= self._largest(out | chosen)
                if left <= enough and count < most:
                    helped.append((count, left, out | chosen))
        for count, _, more in sorted(helped, key=lambda one: one[:2]):
            found = self._further(more, most - count)
            if found is not None:
                return found
        return None

    def _left(self, out: set[int]) -> float:
        return _misfit(self._code, self._seen, self._others(out))

    def _largest(self, out: set[int]) -> float:
        return _largest(self._seen[self._others(out)])

    def _others(self, out: set[int]) -> list[int]:
        return [row for row in range(self._code.n) if row not in out]

    def _candidates(self, out: set[int], count: int, near: int) -> Iterator[set[int]]:
        """Sets of `count` rows at which the polynomial of the syndromes is least, and at `near` rows more."""
        syndromes = self._syndromes(out)
        rows = len(syndromes) - count
        if rows < 1:
            return
        # every stretch of count + 1 syndromes is annihilated by the polynomial whose roots are the liars
        windows = [syndromes[first : first + count + 1].T for first in range(rows)]
        polynomial = np.linalg.svd(np.concatenate(windows))[2][-1].conj()
        values = np.abs(self._nodes[:, None] ** np.arange(count + 1) @ polynomial)
        values[list(out)] = np.inf
        least = np.argsort(values, kind="stable")[: min(count + near, self._code.n - len(out))]
        for chosen in itertools.combinations(least.tolist(), count):
            yield set(chosen)

    def _syndromes(self, out: set[int]) -> Array:
        """(2s - len(out), p): free of the rows that are out, and scaled to 1."""
        code = self._code
        here = self._seen.copy()
        here[list(out)] = 0.0
        high = code.frequencies[-1] + 1 + np.arange(2 * code.s)
        found = self._nodes[None, :] ** high[:, None] @ here
        for row in out:
            found = found[1:] - self._nodes[row] * found[:-1]
        scale = np.abs(found).max(initial=0.0)
        return np.asarray(found / scale if scale > 0 else found)


def _projected(rows: Array, random: np.random.Generator) -> Array:
    """(n, d) -> (n, PROJECTIONS) on random directions."""
    seen = np.zeros((len(rows), PROJECTIONS), np.complex128)
    with np.errstate(all="ignore"):  # what is not finite stays so, and is a lie
        for start in range(0, rows.shape[1], BLOCK):
            block = rows[:, start : start + BLOCK]
            seen += block @ random.standard_normal((block.shape[1], PROJECTIONS))
    return seen


def _waves(code: CyclicCode, rows: Collection[int]) -> Array:
    """(rows, n - 2s): what honest rows are combinations of."""
    return np.asarray(np.exp(2j * np.pi * np.outer(list(rows), code.frequencies) / code.n))


def _largest(rows: Array) -> float:
    return float(np.linalg.norm(rows, axis=1).max(initial=0.0))


def _misfit(code: CyclicCode, seen: Array, left: list[int]) -> float:
    """How far these rows are from a codeword, as a share of the largest of them."""
    own = seen[left]
    largest = _largest(own)
    if largest == 0.0:
        return 0.0
    basis = np.linalg.qr(_waves(code, left))[0]
    own = own / largest
    return float(np.abs(own - basis @ (basis.conj().T @ own)).max())


def _sum(code: CyclicCode, rows: Array, left: list[int]) -> Array:
    """The least-norm combination of these rows that is the sum over the shards for every codeword."""
    wanted = (code.frequencies == 0).astype(np.complex128)
    weights = np.zeros(code.n, np.complex128)
    weights[left] = np.linalg.lstsq(_waves(code, left).T, wanted, rcond=None)[0]
    total = np.zeros(rows.shape[1])
    is_real = not np.iscomplexobj(rows)
    for start in range(0, rows.shape[1], BLOCK):
        block = rows[left, start : start + BLOCK]
        total[start : start + BLOCK] = weights[left].real @ (block if is_real else block.real)
        if not is_real:
            total[start : start + BLOCK] -= weights[left].imag @ block.imag
    return total
