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
FEW_ROWS = 16  # so many are read a tile at a time where they lie; of more, longer pieces are copied, which is faster
TILE = 32  # columns of a tile: 128 rows of it are 16 KB
GRAM_COLUMNS = 1024  # this and the next six as in kernels/__init__.py, where they are explained
QUANTUM_BITS = 22
LOW_BITS = 11
LEAST_PEAK = 2.0**-103
GREATEST_EXPONENT = 127
EXPONENT_MASK = 0x7F800000
UPPER_ERROR = 1026.0
PACKED_COLUMNS = 512  # columns of whole numbers multiplied at once: sums of so many products stay below 2^31
PACKED_STRIDE = PACKED_COLUMNS + 16  # not a power of two: rows would fall on the same lines of the cache
STEP = 2 * WIDTH  # whole numbers of 16 bits in a register
WEIGHTED, EQUAL, MIXTURE = range(3)  # kinds of stages: any weights, all weights one, a kernels.Mixture
GROUP = 12  # rows, 12 KB of whole numbers: they stay in the first cache while the others pass
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
WORDS = Vector(ir.IntType(32), WIDTH)
SUMS = Vector(ir.IntType(64), WIDTH)
SHORTS = Vector(ir.IntType(16), STEP)
HALF_SHORTS = Vector(ir.IntType(16), WIDTH)
TILE_ROW = Vector(ir.FloatType(), TILE)
DOUBLES = Vector(ir.DoubleType(), WIDTH)


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
load_shorts = loader(SHORTS)


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
filled = filler(SINGLES, types.float32)


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
def plus_products(typing: Any, total: Any, x: Any, y: Any) -> Any:
    """total[i] + x[2 i] * y[2 i] + x[2 i + 1] * y[2 i + 1], whole numbers of 16 bits: two operations on x86."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.VectorType(ir.IntType(32), STEP)
        both = [builder.sext(argument, wide) for argument in arguments[1:]]
        product = builder.mul(*both, flags=("nsw",))
        even, odd = (selected(builder, product, range(first, STEP, 2)) for first in (0, 1))
        return builder.add(arguments[0], builder.add(even, odd))

    return total(total, x, y), generate


def selected(builder: Any, vector: Any, places: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(places)), [ir.IntType(32)(place) for place in places])
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


@intrinsic
def no_words(typing: Any) -> Any:
    return WORDS(), lambda context, builder, signature, arguments: ir.Constant(WORDS.llvm, None)


@intrinsic
def whole(typing: Any, singles: Any) -> Any:
    """float32 numbers below 2^31 to whole numbers, half to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fptosi(elementwise(builder, "llvm.rint", arguments), WORDS.llvm)

    return WORDS(singles), generate


def word_operation(emit: Callable[..., Any]) -> Any:
    """A function of a vector of whole numbers of 32 bits."""

    def typed(typing: Any, words: Any) -> Any:
        return words(words), lambda context, builder, signature, arguments: emit(builder, arguments[0])

    return intrinsic(typed)


def word(number: int) -> Any:
    return ir.Constant(WORDS.llvm, [ir.IntType(32)(number)] * WIDTH)


# v = upper_part(v) * 2^LOW_BITS + lower_part(v), the lower part from -2^(LOW_BITS - 1) to 2^(LOW_BITS - 1) - 1.
upper_part = word_operation(lambda b, v: b.ashr(b.add(v, word(1 << (LOW_BITS - 1))), word(LOW_BITS)))
times_radix = word_operation(lambda b, v: b.shl(v, word(LOW_BITS)))
difference = operation(None, lambda builder, x, y: builder.sub(x, y))
addition = operation(None, lambda builder, x, y: builder.add(x, y))


@intrinsic
def short(typing: Any, words: Any) -> Any:
    return HALF_SHORTS(words), lambda context, builder, signature, x: builder.trunc(x[0], HALF_SHORTS.llvm)


@intrinsic
def no_sums(typing: Any) -> Any:
    return SUMS(), lambda context, builder, signature, arguments: ir.Constant(SUMS.llvm, None)


@intrinsic
def plus_squares(typing: Any, total: Any, words: Any) -> Any:
    """total, int64, plus the squares of whole numbers of 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = builder.sext(arguments[1], SUMS.llvm)
        return builder.add(arguments[0], builder.mul(wide, wide, flags=("nsw",)))

    return total(total, words), generate


@intrinsic
def total_of_sums(typing: Any, sums: Any) -> Any:
    return types.int64(sums), lambda context, builder, signature, arguments: added_up(builder, arguments[0])


def added_up(builder: Any, vector: Any) -> Any:
    """The sum of a vector of whole numbers, in any order."""
    count = vector.type.count
    while count > 1:
        count //= 2
        halves = [selected(builder, vector, range(first, first + count)) for first in (0, count)]
        vector = builder.add(*halves)
    return builder.extract_element(vector, ir.IntType(32)(0))


@intrinsic
def magnitude(typing: Any, vector: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return elementwise(builder, "llvm.fabs", arguments)

    return vector(vector), generate


@intrinsic
def total_of(typing: Any, words: Any) -> Any:
    """The sum of whole numbers of 32 bits, as int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return added_up(builder, builder.sext(arguments[0], ir.VectorType(ir.IntType(64), WIDTH)))

    return types.int64(words), generate


@intrinsic
def power_below(typing: Any, value: Any) -> Any:
    """The largest power of two that is not above a positive normal float32; of infinity infinity."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.and_(builder.bitcast(arguments[0], ir.IntType(32)), ir.IntType(32)(EXPONENT_MASK))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.float32), generate


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
def halving_sum_of_rows(tile, at, k, sums):
    """As halving_sum, of the float32 numbers of k rows of a tile, number j at tile[at + j * TILE:]."""
    half = (k + 1) // 2
    quarter = (half + 1) // 2
    for j in range(quarter):
        here = at + j * TILE
        total = widen(load(tile, here))
        if j + half < k:
            total = plus(total, widen(load(tile, here + half * TILE)))
        if j + quarter < half:
            other = widen(load(tile, here + quarter * TILE))
            if j + quarter + half < k:
                other = plus(other, widen(load(tile, here + (quarter + half) * TILE)))
            total = plus(total, other)
        if quarter == 1:
            return total
        store(sums, j * WIDTH, total)
    return halving_sum(sums, quarter)


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
def mix(source, n, target, stride, count, places, weights, first, m, k, kind, terms, sums):
    """One stage on `count` columns: m rows, each a weighted sum of k of the n, or in a mixture of k sums of groups."""
    for at in range(0, count, WIDTH):
        if kind == MIXTURE:
            add_up_groups(source, n, stride, at, weights[first], terms)
        else:
            for i in range(n):
                value = widen(load(source, i * stride + at))
                store(terms, i * WIDTH, times(doubles(weights[first]), value) if kind == EQUAL else value)
        for i in range(m):
            here = first + i * k
            if kind != WEIGHTED:
                total = halving_sum_at(terms, places, here, k, sums)
            else:
                for j in range(here, here + k):
                    store(
                        sums, (j - here) * WIDTH, times(doubles(item(weights, j)), load_doubles(terms, item(places, j)))
                    )
                total = halving_sum(sums, k)
            store(target, i * stride + at, narrow(total))


@njit
def add_up_groups(source, n, stride, at, share, terms):
    """For each four rows times share their sixteen partial sums: group g, members c at terms[(16 g + c) * WIDTH]."""
    weight, nothing = doubles(share), doubles(0.0)
    for group in range((n + 3) // 4):
        a = b = c = d = nothing
        row = 4 * group
        a = times(weight, widen(load(source, row * stride + at)))
        if row + 1 < n:
            b = times(weight, widen(load(source, (row + 1) * stride + at)))
        if row + 2 < n:
            c = times(weight, widen(load(source, (row + 2) * stride + at)))
        if row + 3 < n:
            d = times(weight, widen(load(source, (row + 3) * stride + at)))
        # adding nothing is not idle: it turns -0.0 into 0.0, as in the other kernels
        x, y, z = plus(a, nothing), plus(nothing, b), plus(a, b)
        put_sums(terms, (4 * row) * WIDTH, x, y, z, nothing)
        put_sums(terms, (4 * row + 4) * WIDTH, x, y, z, plus(c, nothing))
        put_sums(terms, (4 * row + 8) * WIDTH, x, y, z, plus(nothing, d))
        put_sums(terms, (4 * row + 12) * WIDTH, x, y, z, plus(c, d))


@njit
def put_sums(terms, at, x, y, z, other):
    store(terms, at, plus(doubles(0.0), other))
    store(terms, at + WIDTH, plus(x, other))
    store(terms, at + 2 * WIDTH, plus(y, other))
    store(terms, at + 3 * WIDTH, plus(z, other))


@njit
def resize(source, target, stride, count, places, weights, first, m):
    """A stage with k = 1: each new row is one row times a number."""
    for i in range(m):
        weight, row = doubles(item(weights, first + i)), item(places, first + i) // WIDTH * stride
        for at in range(0, count, WIDTH):
            store(target, i * stride + at, narrow(times(weight, widen(load(source, row + at)))))


@njit
def fill(x, n, d, column, count, stages, places, weights, first, second, stride, terms, sums):
    """Columns of the rows after all stages, in `first`. stages: (s, 4): m, k, first of places and weights, kind."""
    end = (count + TILE - 1) // TILE * TILE
    odd = stages.shape[0] % 2 == 1
    source, target = (second, first) if odd else (first, second)
    copy_columns(x, n, d, column, count, source, stride)
    rows = n
    for s in range(stages.shape[0]):
        m, k, at, kind = stages[s, 0], stages[s, 1], stages[s, 2], stages[s, 3]
        if k == 1 and kind != MIXTURE:
            resize(source, target, stride, end, places, weights, at, m)
        else:
            mix(source, rows, target, stride, end, places, weights, at, m, k, kind, terms, sums)
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
    terms = rows
    for s in range(stages.shape[0]):
        if stages[s, 3] == MIXTURE:
            terms = max(terms, 16 * stages[s, 1])
    first, second = singles(rows * stride), singles(rows * stride if blocks == 2 else 1)
    return first, second, stride, stack(terms), stack(rows)


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
    for lane in range(0, TILE, WIDTH):
        store(line, lane, plus(load(line, lane), filled(np.float32(0))))
    if count == TILE:
        for lane in range(0, TILE, WIDTH):
            store(out, column + lane, load(line, lane))
    else:
        for lane in range(count):
            out[column + lane] = line[lane]


@njit
def rank_tile(block, at, stride, m, tile, net, low, high, cut, terms, line, outside):
    """ranked_means of one tile, to `line`. Row i of it is at block[at + i * stride:]; net: steps, front."""
    steps, front = net
    load_tile(block, at, stride, m, tile, front)
    sort_tile(tile, steps)
    reciprocal = doubles(1.0 / np.float64(high - low))
    for lane in range(0, TILE, WIDTH):
        total = halving_sum_of_rows(tile, (front + low) * TILE + lane, high - low, terms)
        store(line, lane, narrow(times(total, reciprocal)))
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
    """Part of the centre, zeros behind it. An empty centre is zero."""
    for at in range(shift.shape[0]):
        shift[at] = centre[column + at] if at < count and centre.shape[0] > 0 else np.float32(0)


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
    """The unit of whole numbers for a row whose largest number is `peak`: a power of two, 2^-22 of peak's."""
    power = min(power_below(max(peak, np.float32(LEAST_PEAK))), np.float32(2.0**GREATEST_EXPONENT))
    return np.float64(power) * 2.0**-QUANTUM_BITS


@njit
def units_of(block, origin, step, m, count, shift, units):
    """For each row the unit of its `count` numbers minus shift."""
    line = singles(WIDTH)
    end = (count + WIDTH - 1) // WIDTH * WIDTH
    for i in range(m):
        largest = filled(np.float32(0))
        for at in range(0, end, WIDTH):
            largest = upper(largest, magnitude(minus(load(block, origin + i * step + at), load(shift, at))))
        store(line, 0, largest)
        peak = np.float32(0)
        for lane in range(WIDTH):
            peak = max(peak, line[lane])
        units[i] = unit_of(peak)


@njit
def whole_numbers(block, at, shift, offset, inverse):
    """WIDTH numbers minus shift in their row's unit, below 2^23 also where the difference is infinite."""
    bound = np.float32(2.0 ** (QUANTUM_BITS + 1))
    value = times(minus(load(block, at), load(shift, offset)), inverse)
    return whole(upper(lower(value, filled(bound)), filled(-bound)))


@njit
def shorts(count):
    """Memory for whole numbers of 16 bits, all zero."""
    memory = np.zeros(count + 32, np.int16)
    first = -memory.ctypes.data % 64 // 2
    return memory[first : first + count]


@njit
def pack(block, origin, step, m, count, shift, offset, units, plane, numbers):
    """The whole numbers of `count` columns, zeros behind them: upper parts, at `plane` lower parts, then their sums."""
    end = (count + STEP - 1) // STEP * STEP
    for i in range(m):
        inverse = filled(np.float32(1.0 / units[i]))
        for at in range(0, end, WIDTH):
            to = i * PACKED_STRIDE + at
            number = no_words()
            if at < count:
                number = whole_numbers(block, origin + i * step + offset + at, shift, offset + at, inverse)
            above = upper_part(number)
            below = difference(number, times_radix(above))
            store(numbers, to, short(above))
            store(numbers, plane + to, short(below))
            store(numbers, 2 * plane + to, short(addition(above, below)))


@njit
def products_2_by_4(numbers, left, right, end, factor, i, j, total):
    """Add factor times the inner products of rows i, i + 1 (at `left`) with j to j + 3 (at `right`) to total."""
    a0, a1, a2, a3 = no_words(), no_words(), no_words(), no_words()
    b0, b1, b2, b3 = no_words(), no_words(), no_words(), no_words()
    for at in range(0, end, STEP):
        x, y = load_shorts(numbers, left + at), load_shorts(numbers, left + PACKED_STRIDE + at)
        u = load_shorts(numbers, right + at)
        a0, b0 = plus_products(a0, x, u), plus_products(b0, y, u)
        u = load_shorts(numbers, right + PACKED_STRIDE + at)
        a1, b1 = plus_products(a1, x, u), plus_products(b1, y, u)
        u = load_shorts(numbers, right + 2 * PACKED_STRIDE + at)
        a2, b2 = plus_products(a2, x, u), plus_products(b2, y, u)
        u = load_shorts(numbers, right + 3 * PACKED_STRIDE + at)
        a3, b3 = plus_products(a3, x, u), plus_products(b3, y, u)
    add4(total, i, j, factor, a0, a1, a2, a3)
    add4(total, i + 1, j, factor, b0, b1, b2, b3)


@njit
def add4(total, i, j, factor, a, b, c, d):
    total[i, j] += factor * total_of(a)
    total[i, j + 1] += factor * total_of(b)
    total[i, j + 2] += factor * total_of(c)
    total[i, j + 3] += factor * total_of(d)


@njit
def add_products(numbers, plane, m, count, factor, total):
    """Add factor times the inner products of all rows at `plane` to total, right where j <= i < m."""
    end = (count + STEP - 1) // STEP * STEP
    for group in range(0, m, GROUP):
        for i in range(group, m, 2):
            left = plane + i * PACKED_STRIDE
            for j in range(group, min(group + GROUP, i + 2, m), 4):
                products_2_by_4(numbers, left, plane + j * PACKED_STRIDE, end, factor, i, j, total)


@njit(nogil=True, cache=True)
def gram_blocks(x, n, d, start, stop, stages, places, weights, rows, m, centre, rough):
    """The inner products in each block of GRAM_COLUMNS columns from start to stop - 1: (blocks, m + 1, m), j <= i.

    rough: of the upper parts alone. In row m the squares of how far a row is from its upper parts at most.
    """
    old = flushing()
    first, second, stride, terms, sums = scratch(rows, stages, GRAM_COLUMNS)
    shift, units = singles(GRAM_COLUMNS + WIDTH), np.empty(m)
    plane = (m + 6) * PACKED_STRIDE
    numbers, total = shorts(3 * plane), np.empty((m + 6, m + 6), np.int64)
    result = np.zeros(((stop - start + GRAM_COLUMNS - 1) // GRAM_COLUMNS, m + 1, m))
    for part in range(len(result)):
        column = start + part * GRAM_COLUMNS
        count = min(GRAM_COLUMNS, stop - column)
        copy_centre(centre, column, count, shift)
        block, origin, step = gather(
            x, n, d, column, count, True, stages, places, weights, first, second, stride, terms, sums
        )
        units_of(block, origin, step, m, count, shift, units)
        total[:] = 0
        for offset in range(0, count, PACKED_COLUMNS):
            size = min(PACKED_COLUMNS, count - offset)
            pack(block, origin, step, m, size, shift, offset, units, plane, numbers)
            add_whole_products(numbers, plane, m, size, rough, total)
        for i in range(m):
            for j in range(i + 1):
                result[part, i, j] = np.float64(total[i, j]) * (units[i] * units[j])
            result[part, m, i] = np.float64(count) * ((UPPER_ERROR * units[i]) * (UPPER_ERROR * units[i]))
    restore(old)
    return result


@njit
def add_whole_products(numbers, plane, m, count, rough, total):
    """(r h + l) (r h' + l') = (r^2 - r) h h' + r (h + l) (h' + l') + (1 - r) l l' with r = 2^11; rough: r^2 h h'."""
    radix = np.int64(1 << LOW_BITS)
    add_products(numbers, 0, m, count, radix * radix - (0 if rough else radix), total)
    if not rough:
        add_products(numbers, plane, m, count, 1 - radix, total)
        add_products(numbers, 2 * plane, m, count, radix, total)


@njit(nogil=True, cache=True)
def square_norms_blocks(x, n, d, start, stop, stages, places, weights, rows, m, centre):
    """The sums of squares in each block of GRAM_COLUMNS columns from start to stop - 1: (blocks, m)."""
    old = flushing()
    first, second, stride, terms, sums = scratch(rows, stages, GRAM_COLUMNS)
    shift, units = singles(GRAM_COLUMNS + WIDTH), np.empty(m)
    result = np.empty(((stop - start + GRAM_COLUMNS - 1) // GRAM_COLUMNS, m))
    for part in range(len(result)):
        column = start + part * GRAM_COLUMNS
        count = min(GRAM_COLUMNS, stop - column)
        copy_centre(centre, column, count, shift)
        block, origin, step = gather(
            x, n, d, column, count, True, stages, places, weights, first, second, stride, terms, sums
        )
        units_of(block, origin, step, m, count, shift, units)
        for i in range(m):
            inverse, total = filled(np.float32(1.0 / units[i])), no_sums()
            for at in range(0, count, WIDTH):
                total = plus_squares(total, whole_numbers(block, origin + i * step + at, shift, at, inverse))
            result[part, i] = np.float64(total_of_sums(total)) * (units[i] * units[i])
    restore(old)
    return result
