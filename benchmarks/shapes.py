"""The problems that the benchmarks run: dense shapes of DeepSeek-V3 and others, their floors, random ragged problems.

Needs neither torch nor a GPU.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from jitgemm.families.gemm import LAYOUTS, RECIPES, GemmProblem

LAYERS = ((2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
"""(n, k) of DeepSeek-V3's dense layers."""

MS = (1, 16, 64, 128, 512, 2048, 4096, 8192)

OTHER_LAYERS = (
    *((9216, 4096), (4096, 1536), (5120, 2048), (2880, 2880)),
    *((14336, 4096), (4096, 14336), (1280, 8192), (8192, 1024)),
)
"""(n, k) of other models' layers, which nothing here was chosen by."""

OTHER_MS = (7, 33, 100, 200, 777, 1500, 3000)

MAX_RAGGED_M, MAX_RAGGED_N, MAX_RAGGED_K = 4097, 4200, 5000
_SAMPLED_ABOVE_M = 512

# The floor, measured on an H200: what streaming costs before the first byte and per byte, and the sustained rates.
_STREAM_US, STREAM_BYTES_PER_US = 4.8, 4.3e6
_COMPUTE_US, FLOPS_PER_US = 3.6, {1: 1700e6, 2: 900e6}  # by the bytes of an operand's element


@dataclass(frozen=True)
class Shape:
    """Sizes of one dense problem."""

    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each product."""
        return 2 * self.m * self.n * self.k

    def traffic(self, operand_bytes: int, d_bytes: int = 2) -> int:
        """Bytes of the operands and the result, each once; without scales."""
        return (self.m + self.n) * self.k * operand_bytes + self.m * self.n * d_bytes

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"


def dense_shapes(ms: Sequence[int] = MS, layers: Sequence[tuple[int, int]] = LAYERS) -> list[Shape]:
    """Every m with every layer; by default 56 shapes."""
    return [Shape(m, n, k) for m in ms for n, k in layers]


def floor_us(shape: Shape, operand_bytes: int, d_bytes: int = 2) -> float:
    """What no kernel can beat: the longer of streaming operands and result, and of the MMAs."""
    return chain_floor_us([shape], operand_bytes, d_bytes)


def chain_floor_us(shapes: Sequence[Shape], operand_bytes: int, d_bytes: int = 2) -> float:
    """The same for problems of which one begins as the other ends, with nothing lost in between."""
    stream = _STREAM_US + sum(shape.traffic(operand_bytes, d_bytes) for shape in shapes) / STREAM_BYTES_PER_US
    return max(stream, _COMPUTE_US + sum(shape.flops for shape in shapes) / FLOPS_PER_US[operand_bytes])


@dataclass(frozen=True)
class Case:
    """One problem for the numerics check, and how its tensors lie in memory.

    Margins are elements (before, after) each stored row of a tensor, in a matrix that is wider than it.

    Args:
        shape: m, n and k.
        recipe: of ``jitgemm.families.gemm.RECIPES``.
        layout: ``nt`` for FP8.
        d_dtype: ``bf16`` or ``fp32``.
        fast_accum: without promotion of partial sums.
        c: ``none``, ``given`` or ``in_place``.
        a_margin: around the rows of A; the first a multiple of 16 bytes.
        b_margin: the same of B.
        c_margin: around the rows of C; any.
        d_margin: the same of D.
        scales: ``row_major``, ``mn_major`` (aligned for TMA), ``mn_major_shifted`` (4 bytes off) or ``strided``.
        sampled: compare some rows only.
        seed: of the data.
    """

    shape: Shape
    recipe: str
    layout: str = "nt"
    d_dtype: str = "bf16"
    fast_accum: bool = False
    c: str = "none"
    a_margin: tuple[int, int] = (0, 0)
    b_margin: tuple[int, int] = (0, 0)
    c_margin: tuple[int, int] = (0, 0)
    d_margin: tuple[int, int] = (0, 0)
    scales: str = "mn_major"
    sampled: bool = False
    seed: int = 0

    @property
    def kind(self) -> str:
        """What the results are grouped by, such as ``fp8_rowwise fast_accum fp32``."""
        layout = f" {self.layout}" if self.layout != "nt" else ""
        return f"{self.recipe}{layout}{' fast_accum' if self.fast_accum else ''} {self.d_dtype}"

    @property
    def problem(self) -> GemmProblem:
        """The problem as the heuristics see it."""
        m, n, k = self.shape.m, self.shape.n, self.shape.k
        return GemmProblem(n, k, self.recipe, m, self.layout, self.d_dtype, self.fast_accum)

    def __str__(self) -> str:
        margins = f"a{self.a_margin} b{self.b_margin} c{self.c_margin} d{self.d_margin}".replace(" ", "")
        return f"{self.shape} {self.kind} c={self.c} {margins} scales={self.scales} seed={self.seed}"


_Kind = tuple[str, str, bool]
_NT_KINDS: tuple[_Kind, ...] = tuple(
    (name, "nt", fast)
    for name, facts in RECIPES.items()
    for fast in ((False, True) if facts.a_scales in ("row", "tensor") else (False,))
)
_KINDS = _NT_KINDS + tuple(("bf16", layout, False) for layout in LAYOUTS if layout != "nt")


def dense_cases(shapes: Sequence[Shape], d_dtypes: Sequence[str] = ("bf16", "fp32")) -> list[Case]:
    """Every recipe on ``shapes``, contiguous; of more than 512 rows of D only some are compared."""
    return [
        Case(shape, recipe, layout, d_dtype, fast, sampled=shape.m > _SAMPLED_ABOVE_M, seed=index)
        for index, (shape, (recipe, layout, fast), d_dtype) in enumerate(itertools.product(shapes, _NT_KINDS, d_dtypes))
    ]


def ragged_cases(count: int, seed: int = 0) -> list[Case]:
    """Random problems: the kinds, D types and uses of C in turn, the rest drawn."""
    draw = random.Random(seed)
    turns = itertools.cycle(itertools.product(("none", "given", "in_place"), ("bf16", "fp32"), _KINDS))
    return [_ragged(draw, *next(turns), seed=index) for index in range(count)]


def _ragged(draw: random.Random, c: str, d_dtype: str, kind: _Kind, seed: int) -> Case:
    recipe, layout, fast_accum = kind
    m = _size(draw, MAX_RAGGED_M)
    n = max(_size(draw, MAX_RAGGED_N), -(-64 // m))  # a handful of results could cancel, which no relative bound allows
    k = _size(draw, MAX_RAGGED_K)
    unit = 16 // RECIPES[recipe].operand_bytes  # TMA's alignment in elements
    a_margin, b_margin = (
        (draw.randrange(4) * unit, draw.randrange(4) * unit) if draw.random() < 0.5 else (0, 0) for _ in "ab"
    )
    return Case(
        Shape(m, n, k),
        recipe,
        layout,
        d_dtype,
        fast_accum,
        c,
        a_margin,
        b_margin,
        c_margin=_output_margin(draw),
        d_margin=_output_margin(draw),
        scales=draw.choice(("row_major", "mn_major", "mn_major_shifted", "strided")),
        seed=seed,
    )


def _size(draw: random.Random, largest: int) -> int:
    """Small and large sizes alike; half of them at or beside a multiple of 64, where tiles end."""
    size = round(math.exp(draw.uniform(0, math.log(largest))))
    if draw.random() < 0.5:
        size = round(size / 64) * 64 + draw.choice((-1, 0, 0, 1))
    return min(max(size, 1), largest)


def _output_margin(draw: random.Random) -> tuple[int, int]:
    """Contiguous, aligned for TMA, or anything."""
    kind = draw.randrange(3)
    if kind == 0:
        return 0, 0
    unit = 8 if kind == 1 else 1
    return draw.randrange(5) * unit, draw.randrange(5) * unit
