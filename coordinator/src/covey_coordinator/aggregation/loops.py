"""The compiled loops behind `compiled.py`, written with numba. Nothing else imports numba.

Loops work on *tiles*: TILE columns of all rows, one row after another, small enough for the processor's first cache.
Numbers are handled WIDTH at a time in explicit vectors, because the compiler's own vectoriser gives up on the sorting
networks. Every function compiled into the cache of machine code is in this file: numba sees only changes of the file
in which a cached function stands.

TensorFlow computes on threads that take numbers below 2^-126 (in float64 below 2^-1022) as zero; so each kernel here
switches the processor to that mode and back (`flushing`, `restore`).
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from covey_coordinator.aggregation import networks

WIDTH = 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8  # float32 numbers in a register
HALF = WIDTH // 2  # float64 numbers in a register
FEW_ROWS = 16  # so many are read a tile at a time where they lie; of more, longer pieces are copied, which is faster
TILE = 32  # columns of a tile: 128 rows of it are 16 KB
GRAM_COLUMNS = 4096  # as in kernels.py, where both are explained
QUANTUM_BITS = 19
EXPONENT_MASK = 0x7FF0000000000000
PACKED_COLUMNS = 256  # columns of whole numbers multiplied at once; 100 rows of them are 200 KB
PACKED_STRIDE = PACKED_COLUMNS + 8  # not a power of two: rows would fall on the same lines of the cache
GROUP = 12  # rows, 24 KB of whole numbers
ROUNDER = 1.5 * 2.0**52  # adding and subtracting it rounds to whole numbers, half to even
X86 = platform.machine() in ("x86_64", "AMD64")
FLUSH_BITS = 0x8040  # of the control register: results and inputs below the normal range are zero

# ---- vectors: types and operations the loops below are written in


class Vector(types.Type):
    """`count` numbers in registers: a type for numba."""

    def __init__(self, number: ir.Type, count: int) -> None:
        self.llvm = ir.VectorType(number, count)
        super().__init__(name=f"vector of {count} {number}")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


SINGLES = Vector(ir.FloatType(), WIDTH)
TILE_ROW = Vector(ir.FloatType(), TILE)
DOUBLES = Vector(ir.DoubleType(), WIDTH)
PACKED = Vector(ir.DoubleType(), HALF)


def operation(result: Any, emit: Callable[..., Any]) -> Any:
    """A function for compiled code. result: its numba type, or None for that of the first argument."""

    def typed(typing: Any, first: Any, second: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return emit(builder, *arguments)

        return (first if result is None else result)(first, second), generate

    return intrinsic(typed)


def elementwise(builder: Any, name: str, arguments: Sequence[Any], **options: Any) -> Any:
    """A call of LLVM's operation of that name on vectors of one type."""
    vector = arguments[0].type
    letters = "f32" if isinstance(vector.element, ir.FloatType) else "f64"
    kind = ir.FunctionType(vector, [vector] * len(arguments))
    function = cgutils.get_or_insert_function(builder.module, kind, f"{name}.v{vector.count}{letters}")
    return builder.call(function, arguments, **options)


# As a comparison and a choice, the compiler would make masked stores of these, which some processors do very slowly.
FINITE = {"fastmath": ("nnan", "nsz")}
lower = operation(None, lambda builder, x, y: elementwise(builder, "llvm.minnum", [x, y], **FINITE))
upper = operation(None, lambda builder, x, y: elementwise(builder, "llvm.maxnum", [x, y], **FINITE))
plus = operation(None, lambda builder, x, y: builder.fadd(x, y))
minus = operation(None, lambda builder, x, y: builder.fsub(x, y))
times = operation(None, lambda builder, x, y: builder.fmul(x, y))


def pointer(context: Any, builder: Any, kind: Any, arguments: Any, vector: ir.Type) -> Any:
    """To the vector at arguments[1] of the array arguments[0]."""
    data = context.make_array(kind)(context, builder, arguments[0]).data
    return builder.bitcast(builder.gep(data, [arguments[1]]), vector.as_pointer())


def loader(vector: Vector) -> Any:
    def typed(typing: Any, array: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            where = pointer(context, builder, signature.args[0], arguments, vector.llvm)
            return builder.load(where, align=vector.llvm.element.get_abi_alignment(context.target_data))

        return vector(array, types.intp), generate

    return intrinsic(typed)


load = loader(SINGLES)  # load(array, at): numbers at to at + WIDTH - 1 of a one-dimensional array
load_row = loader(TILE_ROW)
load_doubles = loader(DOUBLES)
load_packed = loader(PACKED)


@intrinsic
def item(typing: Any, array: Any, at: Any) -> Any:
    """array[at] for an index that is not negative, about which numba need not ask."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load(builder.gep(data, [arguments[1]]))

    return array.dtype(array, types.intp), generate


@intrinsic
def store(typing: Any, array: Any, at: Any, vector: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = pointer(context, builder, signature.args[0], arguments, vector.llvm)
        builder.store(arguments[2], where, align=vector.llvm.element.get_abi_alignment(context.target_data))
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def widen(typing: Any, singles: Any) -> Any:
    return DOUBLES(singles), lambda context, builder, signature, arguments: builder.fpext(arguments[0], DOUBLES.llvm)


@intrinsic
def narrow(typing: Any, doubles: Any) -> Any:
    return SINGLES(doubles), lambda context, builder, signature, arguments: builder.fptrunc(arguments[0], SINGLES.llvm)


def filler(vector: Vector, number: Any) -> Any:
    def typed(typing: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            filled = builder.insert_element(ir.Constant(vector.llvm, None), arguments[0], ir.IntType(32)(0))
            places = ir.Constant(ir.VectorType(ir.IntType(32), vector.llvm.count), None)
            return builder.shuffle_vector(filled, ir.Constant(vector.llvm, None), places)

        return vector(number), generate

    return intrinsic(typed)


doubles = filler(DOUBLES, types.float64)  # the same number in every place
packed = filler(PACKED, types.float64)


@intrinsic
def count_outside(typing: Any, values: Any, least: Any, most: Any) -> Any:
    """How many values are below `least` or above `most`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, low, high = arguments
        outside = builder.or_(builder.fcmp_ordered("<", value, low), builder.fcmp_ordered(">", value, high))
        return builder.zext(builder.ctpop(builder.bitcast(outside, ir.IntType(value.type.count))), ir.IntType(64))

    return types.int64(values, least, most), generate


@intrinsic
def choose(typing: Any, x: Any, y: Any, one: Any, other: Any) -> Any:
    """`one` where x < y, else `other`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *arguments[:2]), *arguments[2:])

    return one(x, y, one, other), generate


@intrinsic
def plus_product(typing: Any, total: Any, x: Any, y: Any) -> Any:
    """total + x * y, for whole numbers small enough that no rounding happens, fused or not."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return elementwise(builder, "llvm.fmuladd", [arguments[1], arguments[2], arguments[0]])

    return total(total, x, y), generate


@intrinsic
def magnitude(typing: Any, vector: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return elementwise(builder, "llvm.fabs", arguments)

    return vector(vector), generate


@intrinsic
def total_of(typing: Any, vector: Any) -> Any:
    """The sum of a vector of whole numbers, in any order."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        parts = [builder.extract_element(arguments[0], ir.IntType(32)(i)) for i in range(vector.llvm.count)]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [builder.fadd(x, y) for x, y in zip(parts[:half], parts[half:])]
        return parts[0]

    return types.float64(vector), generate


@intrinsic
def as_bits(typing: Any, value: Any) -> Any:
    return types.int64(types.float64), lambda _, builder, signature, x: builder.bitcast(x[0], ir.IntType(64))


@intrinsic
def from_bits(typing: Any, bits: Any) -> Any:
    return types.float64(types.int64), lambda _, builder, signature, x: builder.bitcast(x[0], ir.DoubleType())


def control(builder: Any, name: str, slot: Any) -> None:
    byte = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [byte]), name)
    builder.call(function, [builder.bitcast(slot, byte)])


@intrinsic
def set_control(typing: Any, bits: Any, keep: Any) -> Any:
    """Set the processor's floating-point control register to (old & keep) | bits; return what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        slot = cgutils.alloca_once_value(builder, ir.IntType(32)(0))
        if not X86:
            return builder.load(slot)
        control(builder, "llvm.x86.sse.stmxcsr", slot)
        old = builder.load(slot)
        builder.store(builder.or_(builder.and_(old, arguments[1]), arguments[0]), slot)
        control(builder, "llvm.x86.sse.ldmxcsr", slot)
        return old

    return types.uint32(types.uint32, types.uint32), generate


@njit
def flushing():
    return set_control(FLUSH_BITS, 0xFFFFFFFF)


@njit
def restore(old):
    set_control(old, 0)


# ---- sorting networks on tiles


@njit
def in_order(x, y):
    return lower(x, y), upper(x, y)


@njit
def in_order4(a, b, c, d):
    """A bitonic sort of four."""
    a, c = in_order(a, c)
    b, d = in_order(b, d)
    a, b = in_order(a, b)
    c, d = in_order(c, d)
    return a, b, c, d


@njit
def load4(tile, at, step):
    return load(tile, at), load(tile, at + step), load(tile, at + 2 * step), load(tile, at + 3 * step)


@njit
def store4(tile, at, step, a, b, c, d):
    store(tile, at, a)
    store(tile, at + step, b)
    store(tile, at + 2 * step, c)
    store(tile, at + 3 * step, d)


@njit
def compare(tile, i, j):
    for at in range(0, TILE, WIDTH):
        x, y = load(tile, i + at), load(tile, j + at)
        store(tile, i + at, lower(x, y))
        store(tile, j + at, upper(x, y))


@njit
def keep_lower(tile, i, j):
    for at in range(0, TILE, WIDTH):
        store(tile, i + at, lower(load(tile, i + at), load(tile, j + at)))


@njit
def keep_upper(tile, i, j):
    for at in range(0, TILE, WIDTH):
        store(tile, j + at, upper(load(tile, i + at), load(tile, j + at)))


@njit
def sort8(tile, first):
    """The comparators of networks.EIGHT."""
    for at in range(first, first + TILE, WIDTH):
        a, b, c, d = load4(tile, at, TILE)
        e, f, g, h = load4(tile, at + 4 * TILE, TILE)
        a, c = in_order(a, c)
        b, d = in_order(b, d)
        e, g = in_order(e, g)
        f, h = in_order(f, h)
        a, e = in_order(a, e)
        b, f = in_order(b, f)
        c, g = in_order(c, g)
        d, h = in_order(d, h)
        a, b = in_order(a, b)
        c, d = in_order(c, d)
        e, f = in_order(e, f)
        g, h = in_order(g, h)
        c, e = in_order(c, e)
        d, f = in_order(d, f)
        b, e = in_order(b, e)
        d, g = in_order(d, g)
        b, c = in_order(b, c)
        d, e = in_order(d, e)
        f, g = in_order(f, g)
        store4(tile, at, TILE, a, b, c, d)
        store4(tile, at + 4 * TILE, TILE, e, f, g, h)


@njit
def clean8(tile, first, step):
    for at in range(first, first + TILE, WIDTH):
        a, b, c, d = load4(tile, at, step)
        e, f, g, h = load4(tile, at + 4 * step, step)
        a, e = in_order(a, e)
        b, f = in_order(b, f)
        c, g = in_order(c, g)
        d, h = in_order(d, h)
        store4(tile, at, step, *in_order4(a, b, c, d))
        store4(tile, at + 4 * step, step, *in_order4(e, f, g, h))


@njit
def clean4(tile, first, step):
    for at in range(first, first + TILE, WIDTH):
        store4(tile, at, step, *in_order4(*load4(tile, at, step)))


@njit
def flip8(tile, first, step, mirrored):
    for at in range(0, TILE, WIDTH):
        a, b, c, d = load4(tile, first + at, step)
        e, f, g, h = load4(tile, mirrored + at, step)
        a, h = in_order(a, h)
        b, g = in_order(b, g)
        c, f = in_order(c, f)
        d, e = in_order(d, e)
        store4(tile, first + at, step, *in_order4(a, b, c, d))
        store4(tile, mirrored + at, step, *in_order4(e, f, g, h))


@njit
def flip4(tile, first, step, mirrored):
    for at in range(0, TILE, WIDTH):
        a, d = in_order(load(tile, first + at), load(tile, mirrored + step + at))
        b, c = in_order(load(tile, first + step + at), load(tile, mirrored + at))
        a, b = in_order(a, b)
        c, d = in_order(c, d)
        store(tile, first + at, a)
        store(tile, first + step + at, b)
        store(tile, mirrored + at, c)
        store(tile, mirrored + step + at, d)


@njit
def sort_tile(tile, steps):
    """Run a network (networks.Network.steps) on a tile; row r of it begins at r * TILE."""
    for s in range(steps.shape[0]):
        kind = steps[s, 0]
        first, step, mirrored = steps[s, 1] * TILE, steps[s, 2] * TILE, steps[s, 3] * TILE
        if kind == networks.FLIP8:
            flip8(tile, first, step, mirrored)
        elif kind == networks.CLEAN8:
            clean8(tile, first, step)
        elif kind == networks.SORT8:
            sort8(tile, first)
        elif kind == networks.FLIP4:
            flip4(tile, first, step, mirrored)
        elif kind == networks.CLEAN4:
            clean4(tile, first, step)
        elif kind == networks.BOTH:
            compare(tile, first, step)
        elif kind == networks.LOWER:
            keep_lower(tile, first, step)
        else:
            keep_upper(tile, first, step)


# ---- sums in the halving order


@njit
def halving_sum(terms, k):
    """The sum of k >= 1 vectors, number j at terms[j * WIDTH:], in the order of kernels.sum_rows; overwrites terms.

    A pass does two halvings: after the first, number j is x[j] + x[j + half], or x[j] where that does not exist.
    """
    while k > 1:
        half = (k + 1) // 2
        quarter = (half + 1) // 2
        whole = max(k - half - quarter, 0)
        for j in range(whole):
            at = j * WIDTH
            first = plus(load_doubles(terms, at), load_doubles(terms, at + half * WIDTH))
            at += quarter * WIDTH
            second = plus(load_doubles(terms, at), load_doubles(terms, at + half * WIDTH))
            store(terms, j * WIDTH, plus(first, second))
        for j in range(whole, quarter):
            total = load_doubles(terms, j * WIDTH)
            if j + half < k:
                total = plus(total, load_doubles(terms, (j + half) * WIDTH))
            if j + quarter < half:
                total = plus(total, load_doubles(terms, (j + quarter) * WIDTH))
            store(terms, j * WIDTH, total)
        k = quarter
    return load_doubles(terms, 0)


@njit
def halving_sum_at(terms, places, first, k, sums):
    """As halving_sum, of the vectors at terms[places[first]:], ..., places[first + k - 1]; leaves terms as they are."""
    half = (k + 1) // 2
    quarter = (half + 1) // 2
    whole = max(k - half - quarter, 0)
    for j in range(whole):
        at = first + j
        one = plus(load_doubles(terms, item(places, at)), load_doubles(terms, item(places, at + half)))
        at += quarter
        two = plus(load_doubles(terms, item(places, at)), load_doubles(terms, item(places, at + half)))
        store(sums, j * WIDTH, plus(one, two))
    for j in range(whole, quarter):
        at = first + j
        total = load_doubles(terms, item(places, at))
        if j + half < k:
            total = plus(total, load_doubles(terms, item(places, at + half)))
        if j + quarter < half:
            total = plus(total, load_doubles(terms, item(places, at + quarter)))
        store(sums, j * WIDTH, total)
    return halving_sum(sums, quarter)


# ---- blocks of columns, through the stages


@njit
def singles(count):
    """Memory for float32 numbers, on a line of the cache: vectors that straddle lines take twice the time."""
    memory = np.empty(count + 16, np.float32)
    first = -memory.ctypes.data % 64 // 4
    return memory[first : first + count]


@njit
def stack(count):
    """Memory for `count` vectors of float64."""
    memory = np.empty(count * WIDTH + 8, np.float64)
    first = -memory.ctypes.data % 64 // 8
    return memory[first : first + count * WIDTH]


@njit
def copy_columns(x, n, d, column, count, target, stride):
    """Columns column to column + count - 1 of x (flat, n rows of d) to rows of `stride` numbers, zeros up to a tile."""
    whole = count // WIDTH * WIDTH
    end = (count + TILE - 1) // TILE * TILE
    for i in range(n):
        source, to = i * d + column, i * stride
        for at in range(0, whole, WIDTH):
            store(target, to + at, load(x, source + at))
        for at in range(whole, count):
            target[to + at] = x[source + at]
        for at in range(count, end):
            target[to + at] = np.float32(0)


@njit
def mix(source, n, target, stride, count, places, weights, first, m, k, equal, terms, sums):
    """One stage on `count` columns: m rows, each a weighted sum of k of the n. equal: all m * k weights are one."""
    for at in range(0, count, WIDTH):
        for i in range(n):
            value = widen(load(source, i * stride + at))
            store(terms, i * WIDTH, times(doubles(weights[first]), value) if equal else value)
        for i in range(m):
            here = first + i * k
            if equal:
                total = halving_sum_at(terms, places, here, k, sums)
            else:
                for j in range(here, here + k):
                    store(
                        sums, (j - here) * WIDTH, times(doubles(item(weights, j)), load_doubles(terms, item(places, j)))
                    )
                total = halving_sum(sums, k)
            store(target, i * stride + at, narrow(total))


@njit
def resize(source, target, stride, count, places, weights, first, m):
    """A stage with k = 1: each new row is one row times a number."""
    for i in range(m):
        weight, row = doubles(item(weights, first + i)), item(places, first + i) // WIDTH * stride
        for at in range(0, count, WIDTH):
            store(target, i * stride + at, narrow(times(weight, widen(load(source, row + at)))))


@njit
def fill(x, n, d, column, count, stages, places, weights, first, second, stride, terms, sums):
    """Columns of the rows after all stages, in `first`. stages: (s, 4): m, k, first of places and weights, equal."""
    end = (count + TILE - 1) // TILE * TILE
    odd = stages.shape[0] % 2 == 1
    source, target = (second, first) if odd else (first, second)
    copy_columns(x, n, d, column, count, source, stride)
    rows = n
    for s in range(stages.shape[0]):
        m, k, at, equal = stages[s, 0], stages[s, 1], stages[s, 2], stages[s, 3]
        if k == 1:
            resize(source, target, stride, end, places, weights, at, m)
        else:
            mix(source, rows, target, stride, end, places, weights, at, m, k, equal == 1, terms, sums)
        source, target = target, source
        rows = m


@njit
def gather(x, n, d, column, count, may_stay, stages, places, weights, first, second, stride, terms, sums):
    """As `fill`, or the columns where they lie. Returns the memory, the place of row 0 and the distance of rows."""
    if may_stay and stages.shape[0] == 0 and count % TILE == 0:
        return x, column, d
    fill(x, n, d, column, count, stages, places, weights, first, second, stride, terms, sums)
    return first, 0, stride


@njit
def scratch(rows, stages, columns):
    """Two blocks of columns and two stacks of vectors for `fill`. rows: the most before, between or after stages."""
    stride = columns + WIDTH
    blocks = 2 if stages.shape[0] else 1
    first, second = singles(rows * stride), singles(rows * stride if blocks == 2 else 1)
    return first, second, stride, stack(rows), stack(rows)


# ---- kernels: one range of columns each


@njit
def load_tile(block, at, stride, m, tile, front):
    for i in range(m):
        for lane in range(0, TILE, WIDTH):
            store(tile, (front + i) * TILE + lane, load(block, at + i * stride + lane))


@njit
def padded_tile(rows, front, m):
    tile = singles(rows * TILE)
    for at in range(rows * TILE):
        tile[at] = -np.inf if at < front * TILE else np.inf  # the rows between are overwritten
    return tile


@njit
def count_rows_outside(block, at, stride, m, bounds, low, high, outside):
    """Add to outside[i] how many numbers of row i are below bounds[low:] or above bounds[high:], lane by lane."""
    least, most = load_row(bounds, low), load_row(bounds, high)
    for i in range(m):
        outside[i] += count_outside(load_row(block, at + i * stride), least, most)


@njit
def put(line, out, column, count):
    """A tile's results to out[column:column + count]; -0.0 becomes 0.0, as sorting does not tell them apart."""
    for lane in range(count):
        value = line[lane]
        out[column + lane] = np.float32(0) if value == 0 else value


@njit
def rank_tile(block, at, stride, m, tile, net, low, high, cut, terms, line, outside):
    """ranked_means of one tile, to `line`. Row i of it is at block[at + i * stride:]; net: steps, front."""
    steps, front = net
    load_tile(block, at, stride, m, tile, front)
    sort_tile(tile, steps)
    reciprocal = doubles(1.0 / np.float64(high - low))
    for lane in range(0, TILE, WIDTH):
        for j in range(high - low):
            store(terms, j * WIDTH, widen(load(tile, (front + low + j) * TILE + lane)))
        store(line, lane, narrow(times(halving_sum(terms, high - low), reciprocal)))
    count_rows_outside(block, at, stride, m, tile, (front + cut) * TILE, (front + m - 1 - cut) * TILE, outside)


@njit(nogil=True, cache=True)
def ranked_range(x, n, d, start, stop, stages, places, weights, rows, m, columns, net, low, high, cut, out, outside):
    """ranked_means on columns start to stop - 1. net: steps, padded rows, front of the network."""
    old = flushing()
    steps, padded, front = net
    first, second, stride, terms, sums = scratch(rows, stages, columns)
    tile, line = padded_tile(padded, front, m), singles(TILE)
    for column in range(start, stop, columns):
        count = min(columns, stop - column)
        few = n <= FEW_ROWS
        block, origin, step = gather(
            x, n, d, column, count, few, stages, places, weights, first, second, stride, terms, sums
        )
        for at in range(0, count, TILE):
            rank_tile(block, origin + at, step, m, tile, (steps, front), low, high, cut, terms, line, outside)
            put(line, out, column + at, min(TILE, count - at))
    restore(old)


@njit
def nearest_starts(tile, front, m, keep, starts):
    """For each column of a tile sorted from row `front` the first row of the `keep` values nearest the median."""
    low, high = (front + (m - 1) // 2) * TILE, (front + m // 2) * TILE
    for lane in range(0, TILE, WIDTH):
        middle = times(plus(widen(load(tile, low + lane)), widen(load(tile, high + lane))), doubles(0.5))
        best, start = doubles(np.inf), doubles(0.0)
        for row in range(front, front + m - keep + 1):
            below = minus(middle, widen(load(tile, row * TILE + lane)))
            above = minus(widen(load(tile, (row + keep - 1) * TILE + lane)), middle)
            reach = upper(below, above)
            start = choose(reach, best, doubles(np.float64(row)), start)
            best = lower(reach, best)
        store(starts, lane, start)


@njit(nogil=True, cache=True)
def nearest_range(x, n, d, start, stop, stages, places, weights, rows, m, columns, net, keep, out, outside):
    """nearest_means on columns start to stop - 1. net: a network that sorts all ranks."""
    old = flushing()
    steps, padded, front = net
    first, second, stride, terms, sums = scratch(rows, stages, columns)
    tile, line, starts = padded_tile(padded, front, m), singles(TILE), stack(TILE // WIDTH)
    bounds = singles(2 * TILE)
    reciprocal = doubles(1.0 / np.float64(keep))
    for column in range(start, stop, columns):
        count = min(columns, stop - column)
        fill(x, n, d, column, count, stages, places, weights, first, second, stride, terms, sums)
        for at in range(0, count, TILE):
            load_tile(first, at, stride, m, tile, front)
            sort_tile(tile, steps)
            nearest_starts(tile, front, m, keep, starts)
            for lane in range(TILE):
                start = np.int64(starts[lane])
                bounds[lane] = tile[start * TILE + lane]
                bounds[TILE + lane] = tile[(start + keep - 1) * TILE + lane]
            for lane in range(0, TILE, WIDTH):
                for i in range(WIDTH):
                    at_start = np.int64(starts[lane + i]) * TILE + lane + i
                    for j in range(keep):
                        terms[j * WIDTH + i] = np.float64(item(tile, at_start + j * TILE))
                store(line, lane, narrow(times(halving_sum(terms, keep), reciprocal)))
            put(line, out, column + at, min(TILE, count - at))
            count_rows_outside(first, at, stride, m, bounds, 0, TILE, outside)
    restore(old)


@njit
def copy_centre(centre, column, count, shift):
    """Part of the centre as float64, zeros behind it. An empty centre is zero."""
    for at in range(shift.shape[0]):
        shift[at] = np.float64(centre[column + at]) if at < count and centre.shape[0] > 0 else 0.0


@njit(nogil=True, cache=True)
def combination_range(x, n, d, start, stop, stages, places, weights, rows, columns, shares, chosen, scale, centre, out):
    """combination on columns start to stop - 1. shares, chosen: weight and index of each row that takes part."""
    old = flushing()
    first, second, stride, terms, sums = scratch(rows, stages, columns)
    shift, line = stack(columns // WIDTH + 1), singles(WIDTH)
    centred, k = centre.shape[0] > 0, shares.shape[0]
    for column in range(start, stop, columns):
        count = min(columns, stop - column)
        few = n <= FEW_ROWS
        block, origin, step = gather(
            x, n, d, column, count, few, stages, places, weights, first, second, stride, terms, sums
        )
        copy_centre(centre, column, count, shift)
        for at in range(0, count, WIDTH):
            middle = load_doubles(shift, at)
            for j in range(k):
                value = widen(load(block, origin + item(chosen, j) * step + at))
                if centred:
                    value = minus(value, middle)
                store(terms, j * WIDTH, times(doubles(item(shares, j)), value))
            total = times(halving_sum(terms, k), doubles(scale))
            if centred:
                total = plus(middle, total)
            store(line, 0, narrow(total))
            for lane in range(min(WIDTH, count - at)):
                out[column + at + lane] = line[lane]
    restore(old)


# ---- inner products


@njit
def unit_of(peak):
    """The unit of whole numbers for a row whose largest number is `peak`: a power of two, 2^-19 of peak's."""
    power = from_bits(as_bits(peak) & EXPONENT_MASK)
    return (power if power > 0.0 else 1.0) * 2.0**-QUANTUM_BITS


@njit
def raise_peaks(block, origin, step, m, count, shift, offset, peaks):
    """peaks[i]: the largest |row i - shift| so far. count: a multiple of WIDTH."""
    line = stack(1)
    for i in range(m):
        largest = doubles(peaks[i])
        for at in range(0, count, WIDTH):
            value = minus(widen(load(block, origin + i * step + at)), load_doubles(shift, offset + at))
            largest = upper(largest, magnitude(value))
        store(line, 0, largest)
        for lane in range(WIDTH):
            peaks[i] = max(peaks[i], line[lane])


@njit
def whole_numbers(block, at, shift, offset, inverse):
    value = minus(widen(load(block, at)), load_doubles(shift, offset))
    rounder = doubles(ROUNDER)
    return minus(plus(times(value, inverse), rounder), rounder)


@njit
def pack(block, origin, step, m, count, shift, offset, units, numbers):
    """The whole numbers of `count` columns to rows of PACKED_STRIDE, zeros behind them."""
    for i in range(m):
        inverse = doubles(1.0 / units[i])
        for at in range(0, count, WIDTH):
            whole = whole_numbers(block, origin + i * step + at, shift, offset + at, inverse)
            store(numbers, i * PACKED_STRIDE + at, whole)
        for at in range(count, PACKED_COLUMNS, WIDTH):
            store(numbers, i * PACKED_STRIDE + at, doubles(0.0))


@njit
def products_3_by_4(numbers, i, j, total):
    """Add the inner products of rows i to i + 2 with rows j to j + 3 to total."""
    zero = packed(0.0)
    a0, a1, a2, a3 = zero, zero, zero, zero
    b0, b1, b2, b3 = zero, zero, zero, zero
    c0, c1, c2, c3 = zero, zero, zero, zero
    left, right = i * PACKED_STRIDE, j * PACKED_STRIDE
    for at in range(0, PACKED_COLUMNS, HALF):
        x = load_packed(numbers, left + at)
        y = load_packed(numbers, left + PACKED_STRIDE + at)
        z = load_packed(numbers, left + 2 * PACKED_STRIDE + at)
        u = load_packed(numbers, right + at)
        a0, b0, c0 = plus_product(a0, x, u), plus_product(b0, y, u), plus_product(c0, z, u)
        u = load_packed(numbers, right + PACKED_STRIDE + at)
        a1, b1, c1 = plus_product(a1, x, u), plus_product(b1, y, u), plus_product(c1, z, u)
        u = load_packed(numbers, right + 2 * PACKED_STRIDE + at)
        a2, b2, c2 = plus_product(a2, x, u), plus_product(b2, y, u), plus_product(c2, z, u)
        u = load_packed(numbers, right + 3 * PACKED_STRIDE + at)
        a3, b3, c3 = plus_product(a3, x, u), plus_product(b3, y, u), plus_product(c3, z, u)
    add4(total, i, j, a0, a1, a2, a3)
    add4(total, i + 1, j, b0, b1, b2, b3)
    add4(total, i + 2, j, c0, c1, c2, c3)


@njit
def add4(total, i, j, a, b, c, d):
    total[i, j] += total_of(a)
    total[i, j + 1] += total_of(b)
    total[i, j + 2] += total_of(c)
    total[i, j + 3] += total_of(d)


@njit(nogil=True, cache=True)
def gram_block(x, n, d, column, count, stages, places, weights, rows, m, centre):
    """The inner products of one block of at most GRAM_COLUMNS columns: (m + 4, m + 4), right where j <= i < m."""
    old = flushing()
    first, second, stride, terms, sums = scratch(rows, stages, PACKED_COLUMNS)
    shift = stack(GRAM_COLUMNS // WIDTH + 1)
    copy_centre(centre, column, count, shift)
    units, numbers = np.zeros(m), stack((m + 4) * PACKED_STRIDE // WIDTH + 1)
    for at in range(m * PACKED_STRIDE, numbers.shape[0]):
        numbers[at] = 0.0
    total = np.zeros((m + 4, m + 4))
    for offset in range(0, count, PACKED_COLUMNS):
        size = min(PACKED_COLUMNS, count - offset)
        block, origin, step = gather(
            x, n, d, column + offset, size, True, stages, places, weights, first, second, stride, terms, sums
        )
        raise_peaks(block, origin, step, m, (size + WIDTH - 1) // WIDTH * WIDTH, shift, offset, units)
    for i in range(m):
        units[i] = unit_of(units[i])
    for offset in range(0, count, PACKED_COLUMNS):
        size = min(PACKED_COLUMNS, count - offset)
        block, origin, step = gather(
            x, n, d, column + offset, size, True, stages, places, weights, first, second, stride, terms, sums
        )
        pack(block, origin, step, m, (size + WIDTH - 1) // WIDTH * WIDTH, shift, offset, units, numbers)
        for group in range(0, m, GROUP):  # these rows stay in the first cache while the others pass
            for i in range(group // 3 * 3, m, 3):
                for j in range(group, min(group + GROUP, i + 3, m), 4):
                    products_3_by_4(numbers, i, j, total)
    for i in range(m):
        for j in range(i + 1):
            total[i, j] *= units[i] * units[j]
    restore(old)
    return total


@njit(nogil=True, cache=True)
def square_norms_block(x, n, d, column, count, stages, places, weights, rows, m, centre):
    """The sums of squares of one block of at most GRAM_COLUMNS columns: (m,)."""
    old = flushing()
    first, second, stride, terms, sums = scratch(rows, stages, PACKED_COLUMNS)
    shift = stack(GRAM_COLUMNS // WIDTH + 1)
    copy_centre(centre, column, count, shift)
    units, result = np.zeros(m), np.zeros(m)
    for offset in range(0, count, PACKED_COLUMNS):
        size = min(PACKED_COLUMNS, count - offset)
        block, origin, step = gather(
            x, n, d, column + offset, size, True, stages, places, weights, first, second, stride, terms, sums
        )
        raise_peaks(block, origin, step, m, (size + WIDTH - 1) // WIDTH * WIDTH, shift, offset, units)
    for i in range(m):
        units[i] = unit_of(units[i])
    for offset in range(0, count, PACKED_COLUMNS):
        size = min(PACKED_COLUMNS, count - offset)
        block, origin, step = gather(
            x, n, d, column + offset, size, True, stages, places, weights, first, second, stride, terms, sums
        )
        for i in range(m):
            inverse, total = doubles(1.0 / units[i]), doubles(0.0)
            for at in range(0, size, WIDTH):
                value = whole_numbers(block, origin + i * step + at, shift, offset + at, inverse)
                total = plus_product(total, value, value)
            result[i] += total_of(total)
    for i in range(m):
        result[i] *= units[i] * units[i]
    restore(old)
    return result
