"""Vector instructions written into numba's functions, where its own vectorization leaves short loops to single numbers.

Every rounding is written down too: what numba compiles and what a later process loads from its cache differ in the order of sums
where that order is left open (``fastmath``), and a training that goes on must give the same bits.
numba does not notice a change of this file: remove its caches (``__pycache__/*.nb?``) after one.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import extending
from numba.core import cgutils

LANES = 8  # float32 of a vector instruction
FLOAT, INT = ir.FloatType(), ir.IntType(32)
FLOATS, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)
DEGREE = 6  # of the polynomial for 2^x, |x| <= 1/2: relative error below 1.2e-7
EXP2 = [math.log(2) ** k / math.factorial(k) for k in range(DEGREE, -1, -1)]
intrinsic: Any = extending.intrinsic  # which gives the function its first argument


class Lanes:
    """Instructions on ``LANES`` numbers, in the function that ``builder`` is writing."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context, self.builder = context, builder

    def pointer(self, kind: Any, array: Any, at: Any) -> Any:
        return self.builder.gep(self.context.make_array(kind)(self.context, self.builder, array).data, [at])

    def load(self, pointer: Any) -> Any:
        loaded = self.builder.load(self.builder.bitcast(pointer, FLOATS.as_pointer()))
        loaded.align = 4
        return loaded

    def store(self, value: Any, pointer: Any) -> None:
        self.builder.store(value, self.builder.bitcast(pointer, FLOATS.as_pointer())).align = 4

    def fill(self, value: Any) -> Any:
        """The same number, float or int, in every lane."""
        kind = ir.VectorType(value.type, LANES)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(INT, 0))
        return self.builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(INTS, [0] * LANES))

    def call(self, name: str, *arguments: Any) -> Any:
        kind = ir.FunctionType(FLOATS, [FLOATS] * len(arguments))
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.{name}.v{LANES}f32"), arguments)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        return self.call("fmuladd", a, b, c)

    def total(self, value: Any) -> Any:
        """Sum over the lanes, in halves."""
        half = LANES // 2
        while half:
            other = self.builder.shuffle_vector(value, value, ir.Constant(INTS, [(k + half) % LANES for k in range(LANES)]))
            value, half = self.builder.fadd(value, other), half // 2
        return self.builder.extract_element(value, ir.Constant(INT, 0))

    def exp(self, x: Any) -> Any:
        """``e^x`` for x <= 0: a power of two written into the exponent, times a polynomial."""
        b = self.builder
        y = self.call("maxnum", b.fmul(x, constant(math.log2(math.e))), constant(-126.0))
        whole = self.call("floor", b.fadd(y, constant(0.5)))
        rest = b.fsub(y, whole)
        value = constant(EXP2[0])
        for c in EXP2[1:]:
            value = self.multiply_add(value, rest, constant(c))
        power = b.shl(b.add(b.fptosi(whole, INTS), ir.Constant(INTS, [127] * LANES)), ir.Constant(INTS, [23] * LANES))
        return b.fmul(value, b.bitcast(power, FLOATS))

    def numbered(self, first: Any) -> Any:
        """Whole numbers from ``first`` on."""
        return self.builder.add(ir.Constant(INTS, list(range(LANES))), self.fill(self.builder.trunc(first, INT)))


def constant(value: float) -> Any:
    return ir.Constant(FLOATS, [value] * LANES)
