"""What rules, pre-steps and attacks are written in: one set of array operations, implemented twice.

`Kernels` says what there is and what it means. `reference.TensorFlowKernels` implements it in operations that
TensorFlow can trace, for TFF; `fast.NumpyKernels` in numpy and compiled loops, for live rounds. A rule is written once
against `Kernels`, and **both implementations give the same bits**, whatever the number of threads, the vector length
of the processor or the TensorFlow that runs them. For that,

- sums of float64 numbers run in an order that is fixed here: *halving* (`Kernels.sum_rows`);
- inner products are sums of whole numbers small enough that float64 holds every partial sum exactly, so that any order
  and any fused multiply-add give the same bits (`Kernels.gram`, `Kernels.square_norms`);
- everything else is comparisons, sorting, and element-wise float64 arithmetic, which IEEE 754 fixes. Division is
  `Kernels.divide`: TensorFlow's graph optimiser turns `a / constant` into a multiplication. A logarithm is
  `mathematics.log`, made of these parts, since libraries differ in the last bit of theirs.

Scalars, vectors of n numbers and (n, n) matrices are used with Python's operators; n is a Python int in one
implementation and a tensor in the other, so it may not stand in an `if`. Loops are `Kernels.while_loop`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

# Inner products. A row's numbers in a block of columns become whole numbers v of at most 2^23, in a unit of 2^-22 of
# the power of two below the largest, and v = h 2^11 + l with |h| <= 2^12 and |l| <= 2^10. Sums of 512 products of parts
# fit 32 bits, sums of 1024 products of v 64 bits: exact in any order.
GRAM_COLUMNS = 1024
QUANTUM_BITS = 22
LOW_BITS = 11
LEAST_PEAK = 2.0**-103  # below it the unit shrinks no further, since its reciprocal would leave float32's range
GREATEST_EXPONENT = 127  # for differences that are infinite in float32
EXPONENT_MASK = 0x7F800000  # the exponent bits of a float32: what remains is the power of two below
UPPER_ERROR = 1026.0  # units: how far x - centre is from h 2^11 at most; l and two roundings
BLOCK_VALUES = 1 << 18  # numbers in one block of columns: 1 MB, stays in the cache
LEAST_BLOCK_COLUMNS = 1024
FLOAT32_MAX = 3.4028234e38
MANTISSA_BITS = 52
MANTISSA_MASK = (1 << MANTISSA_BITS) - 1
EXPONENT_BIAS = 1023


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


# Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 16 (mix64, variant 13 of Stafford)
SPLIT_MIX_STEP = _signed(0x9E3779B97F4A7C15)
SPLIT_MIX_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))
SPLIT_MIX_LAST = 31


class Stage(NamedTuple):
    """New rows made of old ones: row i = sum over j of weights[i, j] * row indices[i, j].

    indices: (m, k) int32 or int64. weights: (m, k) float64. Summed in float64 by halving over j, rounded to float32.
    """

    indices: Any
    weights: Any


class Mixture(NamedTuple):
    """New rows that are means of many old ones: row i = share * the sum of the rows j with members[i, j].

    members: (m, n) bool. share: scalar float64; rows are multiplied by it before they are added. Summed in float64 over
    groups of four rows by number, (a + b) + (c + d) with 0.0 for those that are no members, then by halving over the
    groups, and rounded to float32. Many rows can so share the sums of groups: at n = 100 a third of the additions.
    """

    members: Any
    share: Any


class Updates(NamedTuple):
    """One round's updates: the rows of matrix, (n, d) float32, all finite, after the stages, applied in order.

    Stages are what pre-steps do. They are applied per block of columns where rows are read, so mixed rows never lie in
    memory as a whole and the matrix is never written to.
    """

    matrix: Any
    stages: tuple[Stage | Mixture, ...] = ()

    def through(self, indices: Any, weights: Any) -> Updates:
        """These updates with one more stage."""
        return Updates(self.matrix, (*self.stages, Stage(indices, weights)))

    def mixed(self, members: Any, share: Any) -> Updates:
        """These updates with a Mixture as one more stage."""
        return Updates(self.matrix, (*self.stages, Mixture(members, share)))


class Kernels(ABC):
    """Operations on updates, (n, d), and on small arrays. Shapes in the docstrings; `b` is any number of columns."""

    # ---- on the updates

    @abstractmethod
    def count(self, updates: Updates) -> Any:
        """n, the number of rows after all stages."""

    @abstractmethod
    def dimension(self, updates: Updates) -> Any:
        """d, the number of columns."""

    @abstractmethod
    def row(self, updates: Updates, index: Any) -> Any:
        """(d,) float32: one row."""

    @abstractmethod
    def columns(self, updates: Updates, indices: Any) -> Any:
        """(n, b) float32: the columns with these indices, (b,) int32 or int64."""

    @abstractmethod
    def ranked_means(self, updates: Updates, low: Any, high: Any, cut: Any) -> tuple[Any, Any]:
        """Sort each column: mean of the values of rank low to high - 1, and who lies outside ranks cut to n - 1 - cut.

        Returns (d,) float32, never -0.0, and (n,) int64: in how many columns the row's value is less than the one of
        rank cut or greater than that of rank n - 1 - cut.
        """

    @abstractmethod
    def nearest_means(self, updates: Updates, keep: Any) -> tuple[Any, Any]:
        """Mean, per column, of the `keep` values nearest the median, and who lies outside them.

        The values kept are consecutive in sorted order; of windows with equal greatest distance from the median (the
        mean of the two middle values for even n) the lower one. Returns (d,) float32, never -0.0, and (n,) int64: in
        how many columns the row's value lies outside the range of the kept.
        """

    @abstractmethod
    def combination(self, updates: Updates, weights: Any, centre: Any = None) -> Any:
        """(d,) float32: centre + sum of weights[i] * (row i - centre), in float64 by halving; centre None is zero.

        weights: (n,) float64.
        """

    @abstractmethod
    def gram(self, updates: Updates, centre: Any = None) -> Any:
        """(n, n) float64: inner products of the rows after subtracting centre, (d,) float32 or None for zero.

        The difference is rounded to float32, then to 2^-23 of the largest in its row and block of GRAM_COLUMNS columns;
        nothing else rounds but a block's sum, to float64, and the blocks are added from left to right.
        """

    @abstractmethod
    def rough_gram(self, updates: Updates, centre: Any = None) -> tuple[Any, Any]:
        """(n, n) float64: `gram` of rows rounded to 2^-12 of their largest, in a third of the time; (n,) float64: how
        far a row minus centre is at most from what it was rounded to.
        """

    @abstractmethod
    def square_norms(self, updates: Updates, centre: Any = None) -> Any:
        """(n,) float64: the diagonal of `gram`."""

    @abstractmethod
    def over_columns(
        self, updates: Updates, per_block: Callable[[Any, Any], tuple[Any, Any]], carry: Any = ()
    ) -> tuple[Any, Any]:
        """Run per_block(block (n, b) float32, carry) -> (values (b,) float32, carry) over blocks from left to right.

        Returns the values of all blocks as one vector (d,) and the last carry. For what has no kernel of its own.
        """

    # ---- on small arrays

    @abstractmethod
    def sum_rows(self, rows: Any) -> Any:
        """(n, ...) float64 -> (...): the sum over rows by halving, n >= 1.

        Halving: with h = ceil(n / 2), rows[: n - h] + rows[h:], then rows[n - h : h] (the middle one of an odd n); and
        again, until one is left.
        """

    @abstractmethod
    def real(self, values: Any) -> Any:
        """As float64."""

    @abstractmethod
    def single(self, values: Any) -> Any:
        """As float32."""

    @abstractmethod
    def whole(self, values: Any) -> Any:
        """As int64, towards zero."""

    @abstractmethod
    def length(self, values: Any) -> Any:
        """The size of the first axis."""

    @abstractmethod
    def arange(self, n: Any) -> Any:
        """(n,) int64: 0 to n - 1."""

    @abstractmethod
    def full(self, shape: tuple[Any, ...], value: Any) -> Any:
        """An array of this shape, all value (float64, or bool for a bool)."""

    @abstractmethod
    def where(self, condition: Any, yes: Any, no: Any) -> Any:
        """Element-wise choice with broadcasting."""

    @abstractmethod
    def minimum(self, a: Any, b: Any) -> Any: ...

    @abstractmethod
    def maximum(self, a: Any, b: Any) -> Any: ...

    @abstractmethod
    def equal(self, a: Any, b: Any) -> Any:
        """Element-wise a == b. Python's operator compares tensors by identity inside TFF."""

    @abstractmethod
    def equal_bits(self, a: Any, b: Any) -> Any:
        """Element-wise whether two arrays of float32 hold the same bits: 0.0 is not -0.0, and nothing is flushed."""

    @abstractmethod
    def sqrt(self, values: Any) -> Any: ...

    @abstractmethod
    def floor(self, values: Any) -> Any: ...

    @abstractmethod
    def divide(self, a: Any, b: Any) -> Any:
        """a / b in float64; 0 where b is 0. The only division rules may use (see the module)."""

    @abstractmethod
    def sort(self, values: Any) -> Any:
        """Ascending along the last axis."""

    @abstractmethod
    def argsort(self, values: Any) -> Any:
        """int64 indices that sort the last axis ascending; equal values keep their order."""

    @abstractmethod
    def argmin(self, values: Any) -> Any:
        """Index of the smallest of a vector, the first of equals."""

    @abstractmethod
    def smallest(self, values: Any) -> Any:
        """The smallest along the last axis."""

    @abstractmethod
    def largest(self, values: Any) -> Any:
        """The largest along the last axis."""

    @abstractmethod
    def take(self, values: Any, indices: Any) -> Any:
        """values[indices] along the first axis; indices of any shape."""

    @abstractmethod
    def take_along(self, values: Any, indices: Any) -> Any:
        """(n, m), (n, b) -> (n, b): values[i, indices[i, j]]."""

    @abstractmethod
    def members(self, indices: Any, n: Any) -> Any:
        """(m,) indices -> (n,) bool: which of 0 to n - 1 occur."""

    @abstractmethod
    def replaced(self, values: Any, indices: Any, rows: Any) -> Any:
        """A copy of values with values[indices[i]] = rows[i]; indices: (m,), each once."""

    @abstractmethod
    def transpose(self, matrix: Any) -> Any: ...

    @abstractmethod
    def reshape(self, values: Any, shape: tuple[Any, ...]) -> Any: ...

    @abstractmethod
    def concat(self, parts: list[Any]) -> Any:
        """Along the first axis."""

    @abstractmethod
    def diagonal(self, matrix: Any) -> Any:
        """(n, n) -> (n,)."""

    @abstractmethod
    def with_diagonal(self, matrix: Any, value: float) -> Any:
        """A copy of (n, n) with this value on the diagonal."""

    @abstractmethod
    def any(self, values: Any) -> Any:
        """Whether any element is true, a scalar."""

    @abstractmethod
    def all(self, values: Any) -> Any:
        """Whether all elements are true, a scalar."""

    @abstractmethod
    def number_true(self, values: Any) -> Any:
        """int64: how many along the last axis are true."""

    @abstractmethod
    def running_counts(self, values: Any) -> Any:
        """(..., m) bool -> int64: how many are true up to and with each place along the last axis."""

    @abstractmethod
    def while_loop(self, goes_on: Callable[..., Any], body: Callable[..., Any], state: tuple[Any, ...]) -> Any:
        """state = body(*state) while goes_on(*state). Shapes and dtypes in the state do not change."""

    @abstractmethod
    def exponent_parts(self, values: Any) -> tuple[Any, Any]:
        """float64, positive and normal -> (mantissa in [1, 2) float64, exponent int64) with value = m * 2^e."""

    @abstractmethod
    def required(self, values: Any, condition: Any, what: str, remedy: str) -> Any:
        """The values if the scalar bool holds; else the round fails, in numpy with RuleError(what, remedy)."""

    @abstractmethod
    def random_bits(self, seed: Any, n: Any) -> Any:
        """(n,) int64 of uniform bits, a function of the seed (int64 scalar) and the index: SplitMix64's mixer."""
