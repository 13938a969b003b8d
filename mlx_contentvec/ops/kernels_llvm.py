"""What one thread computes of a pass, compiled by LLVM for the processor that runs it.

What follows a product is done in one walk over its rows, and attention keeps no more of its
scores than fits the cache. With AVX-512 products are compiled too: they read the weights
where they are stored, in the runs of sums that keep features as exact as PyTorch's, where
OpenBLAS copies each weight once a product. With AVX2 OpenBLAS's are faster, on a Zen 2 by 5
to 10 %.

What is compiled sums each number in the same order, whatever the rows, columns or threads:
vectors have 16 numbers on every processor, which are one or two of its registers.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt
from llvmlite import ir

from ..backend import openblas_kernels
from ..config import EPS
from . import blas
from .blas import data_pointer
from .kernels_numpy import (
    GELU,
    HIDDEN_SCORE,
    PLAIN,
    Buffer,
    Mask,
    NumpyKernels,
    Then,
    require,
    require_windows,
)

#: numbers of a vector
LANES = 16
#: outputs of a product that are in work at once: what they are multiplied by is read from
#: the fastest cache, 24 KB of a run of 96
COLUMNS = 64
#: rows of a product in work at once: what they are multiplied by is copied once for them
ROWS_PER_PANEL = 512
#: keys whose scores are in work at once, with as many queries as a tile has columns
KEYS_PER_SPAN = 960
#: keys that values are summed over in a row, and softmax's own sum
KEYS_PER_RUN = 96

_FLOAT, _INT, _INT32, _BYTE, _BIT = (
    ir.FloatType(),
    ir.IntType(64),
    ir.IntType(32),
    ir.IntType(8),
    ir.IntType(1),
)
#: inputs that a tile adds in each turn of its loop
_UNROLLED = 4
_VECTORS = COLUMNS // LANES
_POINTER, _VOID = ir.PointerType(), ir.VoidType()
_WIDE = {'"prefer-vector-width"="512"', '"min-legal-vector-width"="512"'}

# exp(r) on [-ln 2 / 2, ln 2 / 2], and ln 2 in two parts: Moshier's expf in the Cephes library
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
#: argument of exp below which it is 0
_EXP_LOWEST = -87.33654
_LARGEST = float(np.finfo(np.float32).max)
#: added to a small number and taken away again, it leaves the nearest integer
_ROUNDER = 12582912.0


_PLACE, _COUNT = ctypes.c_void_p, ctypes.c_int64
#: where a matrix begins, and how far apart its rows are
_MATRIX = (_PLACE, _COUNT)


class Tile(NamedTuple):
    """What of a product is kept in registers."""

    rows: int
    #: vectors of each row
    vectors: int
    #: whether products of its own are faster than OpenBLAS's
    multiplies: bool


#: with 32 registers of 16 numbers, and with 16 of 8
_TILES = ((("avx512f",), Tile(6, 4, True)), (("avx2", "fma"), Tile(6, 1, False)))


def tile_for(features: dict[str, bool], cpuinfo: str) -> Tile | None:
    """The tile for a processor; None for one that does not multiply and add in one step.

    features: what LLVM knows of it    cpuinfo: the text of /proc/cpuinfo
    """
    for needed, tile in _TILES:
        if all(features.get(name) for name in needed):
            # not on one that computes 512 bits in two halves, where nothing was measured
            whole = openblas_kernels(cpuinfo) == "SKYLAKEX"
            return tile._replace(multiplies=tile.multiplies and whole)
    return None


class _Loop:
    """A loop that is being written: its index, and values that go from turn to turn."""

    def __init__(self, index: Any, values: list[Any]) -> None:
        self.index, self.values = index, values
        #: the values of the next turn
        self.next = list(values)


class _Builder(ir.IRBuilder):
    """Instructions on float32 numbers, vectors of them and 64-bit integers."""

    def integer(self, value: int) -> Any:
        return ir.Constant(_INT, value)

    def vector(self, value: float, lanes: int = LANES) -> Any:
        return ir.Constant(ir.VectorType(_FLOAT, lanes), [ir.Constant(_FLOAT, value)] * lanes)

    def null(self) -> Any:
        return ir.Constant(_POINTER, None)

    def at(self, pointer: Any, *offsets: Any) -> Any:
        """A pointer so many numbers further."""
        for offset in offsets:
            offset = self.integer(offset) if isinstance(offset, int) else offset
            pointer = self.gep(pointer, [offset], source_etype=_FLOAT)
        return pointer

    def read(self, pointer: Any, lanes: int = LANES) -> Any:
        """A vector, wherever it lies."""
        return self.load(pointer, typ=ir.VectorType(_FLOAT, lanes), align=4)

    def write(self, value: Any, pointer: Any) -> None:
        self.store(value, pointer, align=4)

    def number(self, pointer: Any) -> Any:
        return self.load(pointer, typ=_FLOAT, align=4)

    def splat(self, number: Any, lanes: int = LANES) -> Any:
        """A vector of one number."""
        kind = ir.VectorType(_FLOAT, lanes)
        empty = ir.Constant(kind, ir.Undefined)
        one = self.insert_element(empty, number, ir.Constant(_INT32, 0))
        lane = ir.Constant(ir.VectorType(_INT32, lanes), [0] * lanes)
        return self.shuffle_vector(one, empty, lane)

    def sum_of(self, vector: Any) -> Any:
        """The numbers of a vector added up, halves first."""
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            low, high = (
                ir.Constant(ir.VectorType(_INT32, lanes), list(range(begin, begin + lanes)))
                for begin in (0, lanes)
            )
            vector = self.fadd(
                self.shuffle_vector(vector, vector, low), self.shuffle_vector(vector, vector, high)
            )
        return self.extract_element(vector, ir.Constant(_INT32, 0))

    def intrinsic(self, name: str, *values: Any) -> Any:
        kind = values[0].type
        lanes = kind.count if isinstance(kind, ir.VectorType) else 0
        full = f"llvm.{name}.{f'v{lanes}' if lanes else ''}f32"
        known = self.module.globals.get(full)
        if known is None:
            known = ir.Function(self.module, ir.FunctionType(kind, [kind] * len(values)), full)
        return self.call(known, values)

    def fused(self, a: Any, b: Any, c: Any) -> Any:
        """``a * b + c``, rounded once."""
        return self.intrinsic("fma", a, b, c)

    def prefetch(self, pointer: Any, *, to_write: bool = False, near: int = 3) -> None:
        """Have a line of the cache fetched; an address that is nowhere does no harm."""
        name = "llvm.prefetch.p0"
        kind = ir.FunctionType(_VOID, [_POINTER, _INT32, _INT32, _INT32])
        known = self.module.globals.get(name) or ir.Function(self.module, kind, name)
        numbers = (ir.Constant(_INT32, value) for value in (int(to_write), near, 1))
        self.call(known, [pointer, *numbers])

    def smaller(self, a: Any, b: Any) -> Any:
        return self.select(self.icmp_signed("<", a, b), a, b)

    @contextlib.contextmanager
    def loop(
        self, start: Any, stop: Any, step: Any, carried: Sequence[Any] = ()
    ) -> Iterator[_Loop]:
        """``for index in range(start, stop, step)``; its ``values`` are the last ones behind it."""
        start, stop, step = (
            self.integer(x) if isinstance(x, int) else x for x in (start, stop, step)
        )
        before = self.block
        head, body, end = (self.function.append_basic_block() for _ in range(3))
        self.branch(head)
        self.position_at_end(head)
        index = self.phi(_INT)
        index.add_incoming(start, before)
        values = []
        for value in carried:
            phi = self.phi(value.type)
            phi.add_incoming(value, before)
            values.append(phi)
        self.cbranch(self.icmp_signed("<", index, stop), body, end)
        self.position_at_end(body)
        state = _Loop(index, values)
        yield state
        index.add_incoming(self.add(index, step), self.block)
        for phi, value in zip(values, state.next, strict=True):
            phi.add_incoming(value, self.block)
        self.branch(head)
        self.position_at_end(end)

    def vectors_of(self, count: Any) -> Iterator[tuple[Any, int]]:
        """Loops over the vectors of ``count`` numbers, then over those left: index and lanes."""
        whole = self.and_(count, self.integer(-LANES))
        with self.loop(0, whole, LANES) as at:
            yield at.index, LANES
        with self.loop(whole, count, 1) as at:
            yield at.index, 1

    def exp(self, x: Any) -> Any:
        """exp of numbers that are at most 0: 0 below the normal ones, and nan of nan."""
        lanes = x.type.count
        lowest = self.vector(_EXP_LOWEST, lanes)
        too_low = self.fcmp_ordered("<", x, lowest)
        x = self.select(too_low, lowest, x)
        rounder = self.vector(_ROUNDER, lanes)
        shifted = self.fused(x, self.vector(_LOG2_E, lanes), rounder)
        power = self.fsub(shifted, rounder)
        rest = self.fused(power, self.vector(-_LN2_HIGH, lanes), x)
        rest = self.fused(power, self.vector(-_LN2_LOW, lanes), rest)
        inner = self.vector(_EXP[0], lanes)
        for coefficient in _EXP[1:]:
            inner = self.fused(inner, rest, self.vector(coefficient, lanes))
        inner = self.fused(inner, self.fmul(rest, rest), rest)
        inner = self.fadd(inner, self.vector(1.0, lanes))
        integers = ir.VectorType(_INT32, lanes)
        bits = self.bitcast(shifted, integers)
        # the integer is in the lowest bits of the sum; there the exponent's bias is added
        bits = self.add(bits, ir.Constant(integers, [127] * lanes))
        bits = self.shl(bits, ir.Constant(integers, [23] * lanes))
        result = self.fmul(inner, self.bitcast(bits, x.type))
        return self.select(too_low, self.vector(0.0, lanes), result)

    def gelu(self, x: Any, coefficients: Sequence[float]) -> Any:
        """GELU of a vector: the polynomial of ``kernels_numpy`` in an exponential, not a tanh."""
        # of a negative number nothing is left of a difference, and 1 + E has few digits of a
        # small E: x > 0 less |x| E / (1 + E), where E = exp(-2 |x| R) is at most 1
        lanes = x.type.count
        largest, none = self.vector(_LARGEST, lanes), self.vector(0.0, lanes)
        size = self.intrinsic("fabs", x)
        square = self.fmul(x, x)
        inner = self.vector(coefficients[0], lanes)
        for coefficient in coefficients[1:]:
            inner = self.fused(inner, square, self.vector(coefficient, lanes))
        power = self.exp(self.fmul(self.fmul(inner, self.vector(-2.0, lanes)), size))
        part = self.fdiv(power, self.fadd(power, self.vector(1.0, lanes)))
        # infinity by nothing is nothing here
        size = self.select(self.fcmp_ordered("<", size, largest), size, largest)
        positive = self.select(self.fcmp_ordered(">", x, none), x, none)
        return self.fsub(positive, self.fmul(size, part))


class _Module:
    """The functions of this module in LLVM's language."""

    def __init__(self, tile: Tile) -> None:
        self._tile = tile
        self.module = ir.Module()
        self._finish = self._write_finish()
        self._rows, self._columns = (self._write_rows(by_columns) for by_columns in (False, True))
        if tile.multiplies:
            self._write_product()
        self._write_attend()
        self._write_layer_norm()

    def _function(self, name: str, *kinds: Any) -> tuple[ir.Function, _Builder]:
        function = ir.Function(self.module, ir.FunctionType(_VOID, kinds), name)
        attributes = function.attributes
        attributes._known = attributes._known | _WIDE
        for attribute in _WIDE:
            attributes.add(attribute)
        return function, _Builder(function.append_basic_block())

    def _write_finish(self) -> ir.Function:
        """Rows less ``mean``, times ``factor``, plus ``shift``, and their GELU; either or both."""
        function, b = self._function(
            "finish",
            *(_POINTER, _INT, _INT, _INT, _POINTER, _POINTER, _POINTER, _INT),
        )
        out, step, rows, columns, mean, factor, shift, gelu = function.args
        is_scaled = b.icmp_unsigned("!=", mean, b.null())
        with b.if_then(is_scaled), b.loop(0, rows, 1) as row:
            for i, lanes in b.vectors_of(columns):
                place = b.at(out, b.mul(row.index, step), i)
                mean_, factor_, shift_ = (b.read(b.at(x, i), lanes) for x in (mean, factor, shift))
                centred = b.fsub(b.read(place, lanes), mean_)
                b.write(b.fadd(b.fmul(centred, factor_), shift_), place)
        with b.if_then(b.icmp_signed("!=", gelu, b.integer(0))), b.loop(0, rows, 1) as row:
            for i, lanes in b.vectors_of(columns):
                place = b.at(out, b.mul(row.index, step), i)
                b.write(b.gelu(b.read(place, lanes), GELU), place)
        b.ret_void()
        return function

    def _add_tile(
        self,
        b: _Builder,
        rows: int,
        by_columns: bool,
        a: Any,
        step: Any,
        panel: Any,
        out: Any,
        out_step: Any,
        count: Any,
        base: Any,
        base_step: Any,
        ahead: Any,
        ahead_step: Any,
    ) -> None:
        """A few rows by part of a panel: ``out = base + a @ panel``."""
        vectors = self._tile.vectors
        a_rows = [b.at(a, r if by_columns else b.mul(step, b.integer(r))) for r in range(rows)]
        out_rows = [b.at(out, b.mul(out_step, b.integer(r))) for r in range(rows)]
        places = [(r, v) for r in range(rows) for v in range(vectors)]
        for r, v in places:
            b.prefetch(b.at(out_rows[r], v * LANES), to_write=True)

        def add_one(k: Any, totals: list[Any]) -> list[Any]:
            at = b.at(panel, b.mul(k, b.integer(COLUMNS)))
            weights = [b.read(b.at(at, v * LANES)) for v in range(vectors)]
            b.prefetch(b.at(ahead, b.mul(k, ahead_step)), near=2)
            along = b.mul(k, step) if by_columns else k
            factors = [b.splat(b.number(b.at(row, along))) for row in a_rows]
            return [
                b.fused(factors[r], weights[v], total)
                for (r, v), total in zip(places, totals, strict=True)
            ]

        turns = _UNROLLED if rows == self._tile.rows else 1
        whole = b.and_(count, b.integer(-turns))
        totals = [b.vector(0.0)] * len(places)
        with b.loop(0, whole, turns, totals) as main:
            for turn in range(turns):
                main.next = add_one(b.add(main.index, b.integer(turn)), main.next)
        totals = main.values
        if turns > 1:
            with b.loop(whole, count, 1, totals) as rest:
                rest.next = add_one(rest.index, rest.next)
            totals = rest.values
        for (r, v), total in zip(places, totals, strict=True):
            begun = b.read(b.at(base, b.mul(base_step, b.integer(r)), v * LANES))
            b.write(b.fadd(begun, total), b.at(out_rows[r], v * LANES))

    def _write_rows(self, by_columns: bool) -> ir.Function:
        """Rows by a panel: ``out = base + a @ panel``, ``base`` one row or ``out`` itself.

        by_columns: the columns of ``a`` are contiguous, not its rows
        """
        function, b = self._function(
            f"{'columns' if by_columns else 'rows'}_by_panel",
            *(_POINTER, _INT, _POINTER, _POINTER, _INT, _INT, _INT, _POINTER, _POINTER, _INT),
            *(_BIT, _POINTER, _POINTER, _POINTER, _INT),
        )
        a, step, panel, out, out_step, rows, count, base, ahead, ahead_step = function.args[:10]
        finishes = function.args[10]
        most = self._tile.rows
        is_null = b.icmp_unsigned("==", base, b.null())
        none = b.integer(0)
        base_step = b.select(is_null, out_step, none)

        def add(row: Any, size: int) -> None:
            # a vector of the next panel's rows for each of the first tiles
            fetched = b.mul(b.sdiv(row, b.integer(most)), b.integer(LANES))
            fetches = b.icmp_signed("<", fetched, b.integer(COLUMNS))
            a_tile = b.at(a, row if by_columns else b.mul(row, step))
            out_tile = b.at(out, b.mul(row, out_step))
            base_tile = b.select(is_null, out_tile, base)
            with b.loop(0, COLUMNS, self._tile.vectors * LANES) as at:
                fetches_here = b.and_(fetches, b.icmp_signed("==", at.index, none))
                self._add_tile(
                    *(b, size, by_columns, a_tile, step, b.at(panel, at.index)),
                    *(b.at(out_tile, at.index), out_step, count),
                    *(b.at(base_tile, at.index), base_step),
                    b.select(fetches_here, b.at(ahead, fetched), panel),
                    b.select(fetches_here, ahead_step, none),
                )
            with b.if_then(finishes):
                sizes = (b.integer(size), b.integer(COLUMNS))
                b.call(self._finish, [out_tile, out_step, *sizes, *function.args[11:]])

        start = none
        for size in (most, most // 2, 1):
            with b.loop(start, b.sub(rows, b.integer(size - 1)), size) as at:
                add(at.index, size)
            start = b.sub(rows, b.srem(b.sub(rows, start), b.integer(size)))
        b.ret_void()
        return function

    def _write_product(self) -> None:
        """A product of matrices whose rows are contiguous, and what follows it."""
        width = COLUMNS
        function, b = self._function(
            "product",
            *(_POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _INT, _INT, _INT, _INT),
            *(_POINTER, _POINTER, _POINTER, _POINTER, _INT, _POINTER),
        )
        a, a_step, weights, weight_step, out, out_step = function.args[:6]
        rows, columns, inputs, run = function.args[6:10]
        bias, mean, factor, shift, then_gelu, scratch = function.args[10:]
        null = b.null()
        panel = scratch
        #: what stands for the row of numbers for each column, and the outputs, of a part panel
        rows_of_part = [b.at(panel, b.mul(run, b.integer(width)), i * width) for i in range(4)]
        part_out = b.at(rows_of_part[-1], width)
        with b.loop(0, rows, ROWS_PER_PANEL) as block:
            count = b.smaller(b.sub(rows, block.index), b.integer(ROWS_PER_PANEL))
            block_a = b.at(a, b.mul(block.index, a_step))
            block_out = b.at(out, b.mul(block.index, out_step))
            with b.loop(0, columns, width) as column:
                there = b.sub(columns, column.index)
                is_part = b.icmp_signed("<", there, b.integer(width))
                there = b.smaller(there, b.integer(width))
                given = [bias, mean, factor, shift]
                with b.if_then(is_part):
                    for row, part in zip(given, rows_of_part, strict=True):
                        is_there = b.icmp_unsigned("!=", row, null)
                        with b.if_then(is_there):
                            for v in range(_VECTORS):
                                b.write(b.vector(0.0), b.at(part, v * LANES))
                            with b.loop(0, there, 1) as i:
                                number = b.number(b.at(row, column.index, i.index))
                                b.store(number, b.at(part, i.index), align=4)
                used = []
                for row, part in zip(given, rows_of_part, strict=True):
                    is_there = b.icmp_unsigned("!=", row, null)
                    place = b.select(is_part, part, b.at(row, column.index))
                    used.append(b.select(is_there, place, null))
                c = b.select(is_part, part_out, b.at(block_out, column.index))
                c_step = b.select(is_part, b.integer(width), out_step)
                with b.loop(0, inputs, run) as k:
                    left = b.sub(inputs, k.index)
                    is_last = b.icmp_signed("<=", left, run)
                    summed = b.smaller(left, run)
                    source = b.at(weights, b.mul(k.index, weight_step), column.index)
                    self._copy_panel(b, source, weight_step, panel, summed, there, is_part)
                    ahead = b.select(
                        is_last,
                        b.at(weights, column.index, width),
                        b.at(source, b.mul(weight_step, run)),
                    )
                    is_first = b.icmp_signed("==", k.index, b.integer(0))
                    base = b.select(is_first, used[0], null)

                    b.call(
                        self._rows,
                        [
                            *(b.at(block_a, k.index), a_step, panel, c, c_step, count, summed),
                            *(base, ahead, weight_step, is_last, *used[1:], then_gelu),
                        ],
                    )
                with (
                    b.if_then(is_part),
                    b.loop(0, count, 1) as row,
                    b.loop(0, there, 1) as i,
                ):
                    number = b.number(b.at(part_out, b.mul(row.index, b.integer(width)), i.index))
                    place = b.at(block_out, b.mul(row.index, out_step), column.index, i.index)
                    b.store(number, place, align=4)
        b.ret_void()

    def _copy_panel(
        self, b: _Builder, source: Any, step: Any, panel: Any, rows: Any, there: Any, is_part: Any
    ) -> None:
        """Rows of weights, one behind the other; zeros for columns that are not there."""
        width = COLUMNS
        with b.if_else(is_part) as (part, whole):
            with part, b.loop(0, rows, 1) as row:
                place = b.at(panel, b.mul(row.index, b.integer(width)))
                for v in range(_VECTORS):
                    b.write(b.vector(0.0), b.at(place, v * LANES))
                with b.loop(0, there, 1) as i:
                    number = b.number(b.at(source, b.mul(row.index, step), i.index))
                    b.store(number, b.at(place, i.index), align=4)
            with whole, b.loop(0, rows, 1) as row:
                for v in range(_VECTORS):
                    value = b.read(b.at(source, b.mul(row.index, step), v * LANES))
                    b.write(value, b.at(panel, b.mul(row.index, b.integer(width)), v * LANES))

    def _write_attend(self) -> None:
        """Attention of some queries of one head, as many at a time as a tile has columns.

        Scores are computed key by key, so that each number of a vector is another query's and
        softmax needs no sum within a vector; neither keys nor values are copied.
        """
        width = COLUMNS
        function, b = self._function(
            "attend",
            *(_POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _POINTER, _POINTER, _INT),
            *(_INT, _INT, _INT, _FLOAT, _POINTER),
        )
        queries, q_step, keys, k_step, values, v_step, hidden = function.args[:7]
        out, out_step, rows, count, size, factor, scratch = function.args[7:]
        vectors = range(_VECTORS)
        null, columns = b.null(), b.integer(width)
        top, total, zeros = (b.at(scratch, i * width) for i in range(3))
        scores = b.at(zeros, width)
        turned = b.at(scores, KEYS_PER_SPAN * width)
        mixed = b.at(turned, b.mul(size, columns))
        # nothing is done with sums but to add them
        plain = [ir.Constant(_BIT, 0), null, null, null, b.integer(0)]
        is_masked = b.icmp_unsigned("!=", hidden, null)
        for v in vectors:
            b.write(b.vector(0.0), b.at(zeros, v * LANES))
        with b.loop(0, rows, width) as block:
            there = b.smaller(b.sub(rows, block.index), columns)
            with b.loop(0, size, 1) as d:
                for v in vectors:
                    b.write(b.vector(0.0), b.at(turned, b.mul(d.index, columns), v * LANES))
                    b.write(b.vector(0.0), b.at(mixed, b.mul(d.index, columns), v * LANES))
            with b.loop(0, there, 1) as q, b.loop(0, size, 1) as d:
                row = b.mul(b.add(block.index, q.index), q_step)
                number = b.fmul(b.number(b.at(queries, row, d.index)), factor)
                b.store(number, b.at(turned, b.mul(d.index, columns), q.index), align=4)
            for v in vectors:
                b.write(b.vector(float("-inf")), b.at(top, v * LANES))
                b.write(b.vector(0.0), b.at(total, v * LANES))
            with b.loop(0, count, KEYS_PER_SPAN) as span:
                spanned = b.smaller(b.sub(count, span.index), b.integer(KEYS_PER_SPAN))
                span_keys = b.at(keys, b.mul(span.index, k_step))

                b.call(
                    self._rows,
                    [
                        *(span_keys, k_step, turned, scores, columns, spanned, size, zeros),
                        *(turned, b.integer(0), *plain),
                    ],
                )
                with b.if_then(is_masked), b.loop(0, spanned, 1) as key:
                    flag = b.load(
                        b.gep(hidden, [b.add(span.index, key.index)], source_etype=_BYTE), typ=_BYTE
                    )
                    with b.if_then(b.icmp_unsigned("!=", flag, ir.Constant(_BYTE, 0))):
                        for v in vectors:
                            place = b.at(scores, b.mul(key.index, columns), v * LANES)
                            b.write(b.vector(HIDDEN_SCORE), place)
                with b.loop(0, columns, LANES) as vector:
                    place = b.at(top, vector.index)
                    before = b.read(place)
                    with b.loop(0, spanned, 1, [before]) as key:
                        one = b.read(b.at(scores, b.mul(key.index, columns), vector.index))
                        higher = b.fcmp_ordered(">", one, key.values[0])
                        key.next[0] = b.select(higher, one, key.values[0])
                    b.write(key.values[0], place)
                    shrunk = b.exp(b.fsub(before, key.values[0]))
                    place = b.at(total, vector.index)
                    b.write(b.fmul(b.read(place), shrunk), place)
                    is_later = b.icmp_signed(">", span.index, b.integer(0))
                    with b.if_then(is_later), b.loop(0, size, 1) as d:
                        place = b.at(mixed, b.mul(d.index, columns), vector.index)
                        b.write(b.fmul(b.read(place), shrunk), place)
                with b.loop(0, spanned, KEYS_PER_RUN) as run:
                    summed = b.smaller(b.sub(spanned, run.index), b.integer(KEYS_PER_RUN))
                    run_scores = b.at(scores, b.mul(run.index, columns))
                    with b.loop(0, columns, LANES) as vector:
                        highest = b.read(b.at(top, vector.index))
                        with b.loop(0, summed, 1, [b.vector(0.0)]) as key:
                            place = b.at(run_scores, b.mul(key.index, columns), vector.index)
                            weight = b.exp(b.fsub(b.read(place), highest))
                            b.write(weight, place)
                            key.next[0] = b.fadd(key.values[0], weight)
                        place = b.at(total, vector.index)
                        b.write(b.fadd(b.read(place), key.values[0]), place)
                    run_values = b.at(values, b.mul(b.add(span.index, run.index), v_step))

                    b.call(
                        self._columns,
                        [
                            *(run_values, v_step, run_scores, mixed, columns, size, summed, null),
                            *(run_scores, b.integer(0), *plain),
                        ],
                    )
            with b.loop(0, there, 1) as q:
                weight = b.number(b.at(total, q.index))
                with b.loop(0, size, 1) as d:
                    number = b.number(b.at(mixed, b.mul(d.index, columns), q.index))
                    row = b.mul(b.add(block.index, q.index), out_step)
                    b.store(b.fdiv(number, weight), b.at(out, row, d.index), align=4)
        b.ret_void()

    def _write_layer_norm(self) -> None:
        function, b = self._function(
            "layer_norm",
            *(_POINTER, _INT, _POINTER, _INT, _INT, _INT, _POINTER, _POINTER, _FLOAT),
        )
        x, x_step, out, out_step, rows, width, scale, shift, eps = function.args
        whole = b.and_(width, b.integer(-LANES))
        size = b.sitofp(width, _FLOAT)
        with b.loop(0, rows, 1) as row:
            source, target = (
                b.at(x, b.mul(row.index, x_step)),
                b.at(out, b.mul(row.index, out_step)),
            )

            def mean_of(value: Any) -> Any:
                with b.loop(0, whole, LANES, [b.vector(0.0)]) as i:
                    i.next[0] = b.fadd(i.values[0], value(i.index, LANES))
                with b.loop(whole, width, 1, [b.vector(0.0, 1)]) as j:
                    j.next[0] = b.fadd(j.values[0], value(j.index, 1))
                left = b.extract_element(j.values[0], ir.Constant(_INT32, 0))
                return b.fdiv(b.fadd(b.sum_of(i.values[0]), left), size)

            mean = mean_of(lambda i, lanes: b.read(b.at(source, i), lanes))

            def centred(i: Any, lanes: int) -> Any:
                return b.fsub(b.read(b.at(source, i), lanes), b.splat(mean, lanes))

            def squared(i: Any, lanes: int) -> Any:
                value = centred(i, lanes)
                return b.fmul(value, value)

            variance = mean_of(squared)
            deviation = b.intrinsic("sqrt", b.fadd(variance, eps))
            for i, lanes in b.vectors_of(width):
                value = b.fdiv(centred(i, lanes), b.splat(deviation, lanes))
                value = b.fmul(value, b.read(b.at(scale, i), lanes))
                b.write(b.fadd(value, b.read(b.at(shift, i), lanes)), b.at(target, i))
        b.ret_void()


def compiled() -> LlvmKernels | None:
    """The steps for this processor; None if it lacks instructions, or they are not right."""
    tile = tile_for(dict(llvm.get_host_cpu_features()), Path("/proc/cpuinfo").read_text())
    if tile is None:
        return None
    kernels = (LlvmProducts if tile.multiplies else LlvmKernels)(tile)
    return kernels if is_right(kernels) else None


class LlvmKernels(NumpyKernels):
    """The steps compiled for the processor that runs this, but for products themselves."""

    columns = COLUMNS

    def __init__(self, tile: Tile) -> None:
        super().__init__()
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        module = llvm.parse_assembly(str(_Module(tile).module))
        module.verify()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
        )
        #: owns the machine code
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        self._attend = self._function(
            "attend", *_MATRIX * 3, _PLACE, *_MATRIX, *[_COUNT] * 3, ctypes.c_float, _PLACE
        )
        self._norm = self._function(
            "layer_norm", *_MATRIX * 2, _COUNT, _COUNT, _PLACE, _PLACE, ctypes.c_float
        )
        self._finish_rows = self._function(
            "finish", *_MATRIX, _COUNT, _COUNT, *[_PLACE] * 3, _COUNT
        )

    @property
    def name(self) -> str:
        """OpenBLAS's and LLVM's."""
        return f"{blas.name()} and LLVM"

    def _function(self, name: str, *kinds: Any) -> Any:
        return ctypes.CFUNCTYPE(None, *kinds)(self._engine.get_function_address(name))

    def most_queries(self, keys: int) -> int:
        """Any number: what is kept of scores does not grow with it."""
        return sys.maxsize

    def attend(
        self, queries: Buffer, keys: Buffer, values: Buffer, hidden: Mask | None, out: Buffer
    ) -> None:
        """``NumpyKernels.attend``."""
        queries, keys, values = (_with_rows(x) for x in (queries, keys, values))
        (rows, width), count = queries.shape, len(keys)
        require(keys.shape == values.shape == (count, width), queries, keys, values)
        require(out.shape == (rows, width), queries, out)
        if hidden is not None:
            hidden = np.ascontiguousarray(hidden, np.bool_)
            require(hidden.shape == (count,), keys, hidden)
        scratch = self._scratch.of(COLUMNS * (3 + KEYS_PER_SPAN + 2 * width))
        self._attend(
            *(*_matrix(queries), *_matrix(keys), *_matrix(values)),
            *(_place(hidden), *_writeable(out)),
            *(rows, count, width, width**-0.5, data_pointer(scratch)),
        )

    def layer_norm(self, x: Buffer, out: Buffer, scale: Buffer, shift: Buffer) -> None:
        """``NumpyKernels.layer_norm``."""
        x = _with_rows(x)
        rows, width = x.shape
        require(out.shape == x.shape, x, out)
        scale_, shift_ = _vector(scale, width), _vector(shift, width)
        self._norm(
            *(*_matrix(x), *_writeable(out), rows, width),
            *(data_pointer(scale_), data_pointer(shift_), EPS),
        )

    def gelu_in_place(self, x: Buffer) -> None:
        """``NumpyKernels.gelu_in_place``."""
        self._finish(x if x.ndim == 2 else x[None], Then(gelu=True))

    def _finish(self, out: Buffer, then: Then) -> None:
        rows, columns = out.shape
        added = _scaling(then, columns)
        self._finish_rows(*_writeable(out), rows, columns, *map(_place, added), then.gelu)


class LlvmProducts(LlvmKernels):
    """The same, and products that read the weights where they are stored."""

    def __init__(self, tile: Tile) -> None:
        super().__init__(tile)
        self._product = self._function(
            "product", *_MATRIX * 3, *[_COUNT] * 4, *[_PLACE] * 4, _COUNT, _PLACE
        )

    @property
    def name(self) -> str:
        """LLVM's alone."""
        return "LLVM"

    def product(self, a: Buffer, b: Buffer, out: Buffer, run: int, then: Then = PLAIN) -> None:
        """``NumpyKernels.product``."""
        a = _with_rows(a)
        require(a.shape[1] == b.shape[0] > 0, a, b)
        self._multiply(a, b, out, run, then)

    def convolve(
        self, clip: Buffer, taps: Buffer, out: Buffer, stride: int, run: int, then: Then = PLAIN
    ) -> None:
        """``NumpyKernels.convolve``: windows overlap, and each is one row of a product."""
        clip = np.ascontiguousarray(clip)
        kernel, inputs, outputs = taps.shape
        require_windows(clip, taps, out, stride)
        windows = np.lib.stride_tricks.as_strided(
            clip, (len(out), kernel * inputs), (4 * stride * inputs, 4), writeable=False
        )
        self._multiply(windows, taps.reshape(-1, outputs), out, run, then)

    def _multiply(self, a: Buffer, b: Buffer, out: Buffer, run: int, then: Then) -> None:
        b = _with_rows(b)
        width = b.shape[1]
        require(out.shape == (len(a), width), a, b, out)
        # what the first run of sums begins with
        bias = np.zeros(width, np.float32) if then.bias is None else _vector(then.bias, width)
        added = [bias, *_scaling(then, width)]
        scratch = self._scratch.of(COLUMNS * (run + len(added) + ROWS_PER_PANEL))
        self._product(
            *(*_matrix(a), *_matrix(b), *_writeable(out), len(a), width, a.shape[1], run),
            *map(_place, added),
            *(then.gelu, data_pointer(scratch)),
        )


def _with_rows(x: Buffer) -> Buffer:
    """A matrix of float32 whose rows are contiguous: itself or a copy."""
    require(x.ndim == 2, x)
    is_so = x.dtype == np.float32 and (x.strides[1] == 4 or x.shape[1] == 1)
    return x if is_so else np.ascontiguousarray(x, np.float32)


def _vector(x: Buffer, width: int) -> Buffer:
    """One float32 number for each column, contiguous."""
    require(x.shape == (width,), x)
    return np.ascontiguousarray(x, np.float32)


def _scaling(then: Then, width: int) -> Sequence[Buffer | None]:
    """Mean, factor and shift, contiguous; three times None where nothing is scaled."""
    return [None] * 3 if then.scaling is None else [_vector(row, width) for row in then.scaling]


def _place(x: npt.NDArray[Any] | None) -> int | None:
    return None if x is None else data_pointer(x)


def _matrix(x: Buffer) -> tuple[int, int]:
    """Where a matrix of contiguous rows lies, and how far apart its rows do."""
    return data_pointer(x), x.strides[0] // 4


def _writeable(out: Buffer) -> tuple[int, int]:
    """The same of a result, which cannot be a copy."""
    if out.dtype != np.float32 or (out.strides[1] != 4 and out.shape[1] > 1):
        raise ValueError(f"not rows of float32: {out.dtype}, strides {out.strides}")
    return _matrix(out)


def is_right(kernels: LlvmKernels) -> bool:
    """Whether the steps agree with float64 on a few numbers: a trial of the compiler."""
    numbers = np.random.default_rng(0).standard_normal
    a, b = numbers((13, 90), np.float32), numbers((90, 77), np.float32)
    bias, mean, factor, shift = numbers((4, 77), np.float32)
    exact = (a.astype(np.float64) @ b + bias - mean) * factor + shift
    exact *= (1 + np.vectorize(math.erf)(exact / math.sqrt(2))) / 2
    out = np.empty((13, 77), np.float32)
    kernels.product(a, b, out, 64, Then(bias, (mean, factor, shift), True))
    right = _close(out, exact, 1e-4)

    rows, keys = numbers((13, 64), np.float32), numbers((77, 64), np.float32)
    hidden = np.arange(77) % 3 == 0
    scores = np.exp(rows.astype(np.float64) @ keys.T / 8)
    scores[:, hidden] = 0
    out = np.empty((13, 64), np.float32)
    kernels.attend(rows, keys, keys, hidden, out)
    right &= _close(out, scores @ keys / scores.sum(axis=1, keepdims=True), 1e-5)

    x, out = a[:, :77], np.empty((13, 77), np.float32)
    kernels.layer_norm(x, out, factor, shift)
    centred = x - x.mean(axis=1, keepdims=True, dtype=np.float64)
    deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + EPS)
    return right and _close(out, centred / deviation * factor + shift, 1e-5)


def _close(found: Buffer, expected: npt.NDArray[np.float64], most: float) -> bool:
    return bool(np.abs(found - expected).max() <= most)
