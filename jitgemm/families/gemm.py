"""Dense GEMM on SM90a: ``D = A @ B^T (+ C)`` for FP8 and BF16 operands.

``GemmProblem`` is what is asked, ``GemmConfig`` what the heuristics chose; together they make the
``KernelSpec``. Tiles are in D's coordinates; with ``swap_ab`` the kernel computes the transposed
product, so that B's rows take the MMA's M side (64 rows an instruction) and A's rows its N side.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jitgemm.device import SM90A
from jitgemm.errors import ProblemError
from jitgemm.families.base import KernelSpec, check_fields

SCALE_GROUP = 128
"""Elements of K (and rows of B in a 128x128 block) that share one scale, and between two promotions."""

GATE_UP_RUN = 8
"""Rows of B that are gate's, and then up's."""

WARPGROUP = 128  # threads
MMA_M = 64  # rows of one warpgroup-wide MMA
ROWS_STORED = 16  # of D by one warp at a time: those that it holds of an MMA's rows
STAGE_ROW_BYTES = 128  # bytes of K of one operand row in one stage: the widest TMA swizzle
SMEM_ALIGNMENT = 1024  # bytes: repeat of the 128-byte swizzle
A_REGISTERS = 4  # that hold a thread's part of an MMA's A
FRAGMENT_REGISTERS = 16  # that hold a thread's part of 64 x 128 weights, expanded
CHAIN_REGISTERS = {
    "bf16": 192,
    "fp32": 176,
}  # that sums and two partial sums may take for MMAs to overlap with promotion
FP4_CHAIN_REGISTERS = {"bf16": 176, "fp32": 168}  # the same with expanded weights
MXFP4_GROUP, NVFP4_GROUP = 32, 16  # of K, that share a scale
PARTS_REGISTERS = 64  # that the sums of parts of a k-block may take, where these have scales of their own
FEW_BOUNDARIES_STEP = (
    32  # tile columns that are multiples of it meet scale blocks at 4 places at most; 8 cost more than selects
)
_STAGING_END = SM90A.smem_per_block - 2 * SMEM_ALIGNMENT  # slack for alignment, and the barriers


@dataclass(frozen=True)
class Recipe:
    """How operands are stored and scaled.

    ``a_scales`` and ``b_scales`` say what one scale covers: ``none``, ``row_k`` (one row x 128 of K, of A ``a_group``),
    ``block_k`` (128 rows x 128 of K), ``row`` or ``tensor``. ``fp4_group``: B is packed E2M1 with a scale for so many
    of K, which are packed with it but for one number a row (``jitgemm.reference.fp4``); 0: it is not. ``far_only``: D
    is written only if B has rows whose scales lie too far apart for its expansion. ``b_format``: B's elements, as the
    tensor cores know them.
    """

    name: str
    operand_bytes: int
    a_scales: str
    b_scales: str
    a_group: int = SCALE_GROUP
    fp4_group: int = 0
    far_only: bool = False
    b_format: str = "e4m3"

    @property
    def fp4_b(self) -> bool:
        """Whether B is FP4."""
        return self.fp4_group > 0

    @property
    def is_fp8(self) -> bool:
        """Whether the tensor cores multiply FP8."""
        return self.operand_bytes == 1


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp8_1x128_128x128", 1, "row_k", "block_k"),
        Recipe("fp8_1x128_1x128", 1, "row_k", "row_k"),
        Recipe("fp8_rowwise", 1, "row", "row"),
        Recipe("fp8_tensorwise", 1, "tensor", "tensor"),
        Recipe("bf16", 2, "none", "none"),
    )
}
FP4 = "fp8_1x128_fp4_1x32"
"""e4m3 A with scales of 1 x 128, MXFP4 B."""

FP4_RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(FP4, 1, "row_k", "row", fp4_group=MXFP4_GROUP),
        Recipe("fp8_1x32_fp4_1x32", 1, "row_k", "row", a_group=32, fp4_group=MXFP4_GROUP),
        Recipe("fp8_1x128_nvfp4_1x16", 1, "row_k", "row", fp4_group=NVFP4_GROUP),
    )
}
"""Those whose B is not a plain matrix: MXFP4 with scales of A of 1 x 128 or 1 x 32, and NVFP4."""

EXPANDED = Recipe("fp8_1x128_e5m2_row", 1, "row_k", "row", b_format="e5m2")
"""MXFP4 weights that a kernel has expanded: the second of three launches that many rows take (docs/fp4.md) ..."""

FAR_FP4 = Recipe("fp8_1x128_far_fp4_1x32", 1, "row_k", "row", fp4_group=MXFP4_GROUP, far_only=True)
"""... and the third, for weights that can't be expanded so."""

_ALL_RECIPES = {**RECIPES, **FP4_RECIPES, EXPANDED.name: EXPANDED, FAR_FP4.name: FAR_FP4}


def recipe_traits(name: str) -> Recipe:
    """The facts of a recipe in ``RECIPES`` or ``FP4_RECIPES``, ``EXPANDED`` or ``FAR_FP4``."""
    return _ALL_RECIPES[name]


@functools.cache
def packed_bytes(fp4_group: int) -> int:
    """Bytes of 64 x 128 FP4 weights with a byte for each group's scale."""
    return MMA_M * SCALE_GROUP // 2 + MMA_M * SCALE_GROUP // fp4_group


LAYOUTS = ("nt", "nn", "tn", "tt")
D_DTYPES = {"bf16": 2, "fp32": 4}  # bytes
D_SCALE_COLUMNS = {"e4m3": 128, "e4m3_ue8m0": 32}  # of a quantized D, which epilogues make, that share a scale
D_BYTES = {**D_DTYPES, **dict.fromkeys(D_SCALE_COLUMNS, 1)}
EPILOGUES = ("linear", "swiglu")


@dataclass(frozen=True)
class GemmProblem:
    """What is asked of a dense GEMM; ``m`` is None where any m is meant.

    Args:
        n: columns of D.
        k: length of the contraction.
        recipe: a name in ``RECIPES`` or ``FP4_RECIPES``.
        m: rows of D.
        layout: BLAS letters of A and B: ``nt`` is A ``[m, k]`` and B ``[n, k]`` row-major, ``nn`` B ``[k, n]``,
            ``tn`` A ``[k, m]`` and B ``[k, n]``, ``tt`` A ``[k, m]`` and B ``[n, k]``. FP8 has ``nt`` only.
        d_dtype: ``bf16`` or ``fp32``; with an epilogue also ``e4m3`` (an fp32 scale for 128 columns) and ``e4m3_ue8m0``
            (packed, one for 32 columns).
        fast_accum: leave FP8 partial sums in the tensor cores' accumulator (row-wise and tensor-wise only).
        epilogue: what follows the product: ``linear`` (alpha, bias, weights of rows, any of them), or ``swiglu`` as
            well, which makes one column of D of two of the product; None: nothing.

    Raises:
        ProblemError: a field is not of these.
    """

    n: int
    k: int
    recipe: str
    m: int | None = None
    layout: str = "nt"
    d_dtype: str = "bf16"
    fast_accum: bool = False
    epilogue: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.recipe, str) or self.recipe not in _ALL_RECIPES:
            raise ProblemError(f"recipe is {self.recipe!r}; accepted are {', '.join((*RECIPES, *FP4_RECIPES))}")
        for name, low in (("n", 1), ("k", 1), ("m", 0)):
            value = getattr(self, name)
            if name == "m" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**31:
                raise ProblemError(f"{name} is {value!r}; accepted is an integer from {low} to 2**31 - 1")
        if self.layout not in LAYOUTS:
            raise ProblemError(f"layout is {self.layout!r}; accepted are {', '.join(LAYOUTS)}")
        if self.d_dtype not in (D_DTYPES if self.epilogue is None else D_BYTES):
            accepted = ", ".join(D_DTYPES) + (" and, with an epilogue, " if self.epilogue is None else ", ")
            raise ProblemError(f"d_dtype is {self.d_dtype!r}; accepted are {accepted}{', '.join(D_SCALE_COLUMNS)}")
        recipe = _ALL_RECIPES[self.recipe]
        if self.epilogue is not None and self.epilogue not in EPILOGUES:
            raise ProblemError(f"epilogue is {self.epilogue!r}; accepted are {', '.join(EPILOGUES)} and None")
        if self.epilogue == "swiglu" and self.n % (2 * GATE_UP_RUN):
            raise ProblemError(f"n is {self.n}; SwiGLU accepts multiples of {2 * GATE_UP_RUN}")
        if recipe.is_fp8 and self.layout != "nt":
            raise ProblemError(f"layout is {self.layout!r}; FP8 operands must be nt (both K-major)")
        if not isinstance(self.fast_accum, bool):
            raise ProblemError(f"fast_accum is {self.fast_accum!r}; accepted is a boolean")
        if self.fast_accum and recipe.a_scales not in ("row", "tensor"):
            raise ProblemError(
                f"fast_accum is True; recipe {self.recipe} does not allow it (fp8_rowwise and fp8_tensorwise do)"
            )

    @property
    def traits(self) -> Recipe:
        """The recipe's facts."""
        return _ALL_RECIPES[self.recipe]

    @property
    def a_major(self) -> str:
        """Contiguous dimension of A: ``k`` or ``mn``."""
        return "k" if self.layout[0] == "n" else "mn"

    @property
    def b_major(self) -> str:
        """Contiguous dimension of B: ``k`` or ``mn``."""
        return "k" if self.layout[1] == "t" else "mn"

    @property
    def promotes(self) -> bool:
        """Whether partial sums are added up in FP32 registers every 128 of K."""
        return self.traits.is_fp8 and not self.fast_accum

    @property
    def quantizes(self) -> bool:
        """Whether D is FP8 with scales."""
        return self.d_dtype in D_SCALE_COLUMNS

    @property
    def gated(self) -> int:
        """Columns of the product that make one of D."""
        return 2 if self.epilogue == "swiglu" else 1

    def without_m(self) -> GemmProblem:
        """The same problem for any m."""
        return dataclasses.replace(self, m=None) if self.m is not None else self

    def without_sizes(self) -> GemmProblem:
        """What a kernel knows of the problem; equal ones are one object."""
        return _without_sizes(self.recipe, self.layout, self.d_dtype, self.fast_accum, self.epilogue)

    def with_m(self, m: int) -> GemmProblem:
        """The same problem for one m."""
        if not isinstance(m, int) or isinstance(m, bool) or not 0 <= m < 2**31:
            return dataclasses.replace(self, m=m)  # which says what is accepted
        copy = object.__new__(GemmProblem)  # all else has been checked
        copy.__dict__.update(self.__dict__, m=m)
        return copy

    def to_dict(self) -> dict[str, Any]:
        """One line of a shapes file; ``from_dict`` reverses it."""
        return {"kind": "gemm", **{f: v for f, v in dataclasses.asdict(self).items() if v is not None}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GemmProblem:
        """Read one problem of a shapes file.

        Raises:
            ProblemError: an unknown or missing field, or a value that is not accepted.
        """
        if not isinstance(data, Mapping):
            raise ProblemError(f"a problem is {type(data).__name__}; accepted is a JSON object")
        values = dict(data)
        kind = values.pop("kind", "gemm")
        if kind != "gemm":
            raise ProblemError(f"kind is {kind!r}; accepted is gemm")
        check_fields(cls, values)
        return cls(**values)


def scale_blocks(n: int, gated: int = 1) -> int:
    """Scales of B along n where one covers 128 x 128; gate and up have their own, also where n cuts a block."""
    return -(-n // (SCALE_GROUP * gated)) * gated


@functools.cache
def _without_sizes(
    recipe: str, layout: str, d_dtype: str, fast_accum: bool = False, epilogue: str | None = None
) -> GemmProblem:
    n = 2 * GATE_UP_RUN if epilogue == "swiglu" else 1  # the least that is accepted
    return GemmProblem(n, 1, recipe, None, layout, d_dtype, fast_accum, epilogue)


_SIZE = r"([1-9][0-9]{0,3})"
_CONFIG_TEXT = re.compile(rf"{_SIZE}x{_SIZE}x{_SIZE} s{_SIZE}(?: c{_SIZE}x{_SIZE})?(?: k{_SIZE})?( swap)?")


@dataclass(frozen=True, order=True)
class GemmConfig:
    """What the heuristics choose. Shared memory and threads follow from it and are stored nowhere.

    Args:
        tile_m: rows of D in a tile.
        tile_n: columns of D in a tile.
        tile_k: elements of K in a pipeline stage.
        stages: depth of the shared-memory ring.
        cluster_m: CTAs of a cluster along m; they share B's tile by multicast.
        cluster_n: CTAs of a cluster along n; they share A's tile by multicast.
        split_k: CTAs of a cluster that share one tile, each with a part of K; partial sums meet in
            distributed shared memory.
        swap_ab: B's rows take the M side of the MMA.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    stages: int
    cluster_m: int = 1
    cluster_n: int = 1
    split_k: int = 1
    swap_ab: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {field: getattr(self, field) for field in self.__dataclass_fields__}

    def __str__(self) -> str:
        parts = [f"{self.tile_m}x{self.tile_n}x{self.tile_k}", f"s{self.stages}"]
        if self.cluster_m * self.cluster_n > 1:
            parts.append(f"c{self.cluster_m}x{self.cluster_n}")
        if self.split_k > 1:
            parts.append(f"k{self.split_k}")
        if self.swap_ab:
            parts.append("swap")
        return " ".join(parts)

    @classmethod
    def from_text(cls, text: str) -> GemmConfig:
        """Reverse ``str``, such as ``64x48x128 s12 c2x1``.

        Raises:
            ValueError: the text is not that of a config.
        """
        match = _CONFIG_TEXT.fullmatch(text)
        if match is None:
            raise ValueError(
                f"config is {text!r}; accepted is text such as '64x48x128 s12 c2x1' or '8x64x128 s12 k4 swap'"
            )
        *numbers, cluster_m, cluster_n, split_k, swap = match.groups()
        tile_m, tile_n, tile_k, stages = map(int, numbers)
        return cls(
            *(tile_m, tile_n, tile_k, stages),
            cluster_m=int(cluster_m or 1),
            cluster_n=int(cluster_n or 1),
            split_k=int(split_k or 1),
            swap_ab=swap is not None,
        )


@dataclass(frozen=True)
class KernelShape:
    """What follows from a problem and a config, in the MMA's coordinates (after ``swap_ab``)."""

    problem: GemmProblem
    config: GemmConfig
    scale_slack: int = 0
    """Rows of scales beside the tile's that a stage holds: where tiles start at any row, TMA loads start before it."""

    @functools.cached_property
    def mma_m(self) -> int:
        """Tile rows on the M side of the MMA."""
        return self.config.tile_n if self.config.swap_ab else self.config.tile_m

    @functools.cached_property
    def mma_n(self) -> int:
        """Tile rows on the N side of the MMA."""
        return self.config.tile_m if self.config.swap_ab else self.config.tile_n

    @functools.cached_property
    def m_side_major(self) -> str:
        """Contiguous dimension of the M-side operand."""
        return self.problem.b_major if self.config.swap_ab else self.problem.a_major

    @functools.cached_property
    def n_side_major(self) -> str:
        """Contiguous dimension of the N-side operand."""
        return self.problem.a_major if self.config.swap_ab else self.problem.b_major

    @functools.cached_property
    def m_side_scales(self) -> str:
        """Granularity of the M-side operand's scales."""
        traits = self.problem.traits
        return traits.b_scales if self.config.swap_ab else traits.a_scales

    @functools.cached_property
    def n_side_scales(self) -> str:
        """Granularity of the N-side operand's scales."""
        traits = self.problem.traits
        return traits.a_scales if self.config.swap_ab else traits.b_scales

    @functools.cached_property
    def fp4(self) -> bool:
        """Whether the M-side operand is FP4, which becomes e5m2 in registers."""
        return self.problem.traits.fp4_b and self.config.swap_ab

    @functools.cached_property
    def expands(self) -> bool:
        """Whether the N-side operand is FP4, which becomes e5m2 in shared memory, by warps beside the producer's."""
        return self.problem.traits.fp4_b and not self.config.swap_ab

    @functools.cached_property
    def stage_barriers(self) -> int:
        """Barriers of a stage: full and empty, and one for packed weights that are to be expanded."""
        return 3 if self.expands else 2

    @functools.cached_property
    def fp4_group(self) -> int:
        """Of K, that share a scale of FP4 weights; 0 where there are none."""
        return self.problem.traits.fp4_group

    @functools.cached_property
    def packed_bytes(self) -> int:
        """Bytes of 64 x 128 weights where these are FP4."""
        return packed_bytes(self.problem.traits.fp4_group)

    @functools.cached_property
    def a_scales_per_stage(self) -> int:
        """Scales of a row of A in one stage, where they go through the ring."""
        return SCALE_GROUP // self.problem.traits.a_group

    @functools.cached_property
    def parts(self) -> int:
        """Parts of a k-block that have sums of their own: their scales are not multiplied into the operands."""
        return SCALE_GROUP // NVFP4_GROUP if self.fp4_group == NVFP4_GROUP else self.a_scales_per_stage

    @functools.cached_property
    def parts_at_once(self) -> int:
        """Parts whose MMAs are waited for together."""
        most = max(1, PARTS_REGISTERS // (self.mma_n // 2))
        return min(self.parts, 1 << most.bit_length() - 1)

    @functools.cached_property
    def math_warpgroups(self) -> int:
        """Warpgroups that issue MMAs: one for each 64 rows, but two for 256."""
        return 3 if self.mma_m == 192 else min(2, self.mma_m // MMA_M)

    @functools.cached_property
    def waves(self) -> int:
        """Blocks of 64 rows that one warpgroup computes, one after the other."""
        return self.mma_m // (MMA_M * self.math_warpgroups)

    @functools.cached_property
    def num_threads(self) -> int:
        """Threads of a block: the math warpgroups and the producer's."""
        return WARPGROUP * (self.math_warpgroups + 1)

    @functools.cached_property
    def m_side_bytes(self) -> int:
        """Bytes of the M-side operand in one stage."""
        return self.mma_m // MMA_M * self.packed_bytes if self.fp4 else self.mma_m * STAGE_ROW_BYTES

    @functools.cached_property
    def n_side_rows(self) -> int:
        """Rows of the N-side operand that a stage holds; MN-major boxes come in whole 64s."""
        return -(-self.mma_n // 64) * 64 if self.n_side_major == "mn" else self.mma_n

    @functools.cached_property
    def n_side_bytes(self) -> int:
        """Bytes of the N-side operand in one stage, padded so that every stage starts a swizzle repeat."""
        return -(-self.n_side_rows * STAGE_ROW_BYTES // SMEM_ALIGNMENT) * SMEM_ALIGNMENT

    @functools.cached_property
    def scale_bytes(self) -> int:
        """Bytes of per-row scales in one stage (each part padded to TMA's 128-byte alignment)."""
        rows = [
            rows
            for rows, scales in ((self.mma_m, self.m_side_scales), (self.mma_n, self.n_side_scales))
            if scales == "row_k"
        ]
        scales = [(row_count + self.scale_slack) * self.a_scales_per_stage for row_count in rows]
        return sum(-(-count * 4 // 128) * 128 for count in scales)

    @functools.cached_property
    def stage_bytes(self) -> int:
        """Bytes of one pipeline stage."""
        return self.m_side_bytes + self.n_side_bytes + self.scale_bytes

    @functools.cached_property
    def d_bytes(self) -> int:
        """Bytes of one element of D."""
        return D_BYTES[self.problem.d_dtype]

    @functools.cached_property
    def store_columns(self) -> int:
        """MMA columns that are staged at a time on their way to D: as many as the ring leaves room for."""
        columns = self.mma_n
        if self.narrows:  # whole tiles: a scale must be known before the first of its values is staged
            return columns
        while columns % 16 == 0 and self.staging_offset + self._staging(columns) > _STAGING_END:
            columns //= 2
        return columns

    def _staging(self, columns: int) -> int:
        """Bytes that stage so many columns of all warpgroups' waves, each in whole swizzle repeats."""
        per_wave = -(-MMA_M * columns // self.problem.gated * self.d_bytes // SMEM_ALIGNMENT) * SMEM_ALIGNMENT
        return self.math_warpgroups * self.waves * per_wave

    @functools.cached_property
    def staging_bytes(self) -> int:
        """Bytes in which all math warpgroups stage D."""
        return self._staging(self.store_columns)

    @functools.cached_property
    def staging_wave_bytes(self) -> int:
        """Bytes in which one wave of a warpgroup stages D."""
        return self.staging_bytes // (self.math_warpgroups * self.waves)

    @functools.cached_property
    def partial_bytes(self) -> int:
        """Bytes of FP32 partial sums that split-K exchanges; they take the ring's place after the main loop."""
        return self.mma_m * self.mma_n * 4 if self.config.split_k > 1 else 0

    @functools.cached_property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block, alignment slack and barriers included."""
        barriers = self.config.stages * self.stage_barriers * 8
        return SMEM_ALIGNMENT + self.staging_offset + self.staging_bytes + barriers + self.exchange_bytes

    @functools.cached_property
    def swiglu(self) -> bool:
        """Whether columns of the product are gate's and up's."""
        return self.problem.epilogue == "swiglu"

    @functools.cached_property
    def quantizes(self) -> bool:
        """Whether D is FP8 with scales."""
        return self.problem.quantizes

    @functools.cached_property
    def narrows(self) -> bool:
        """Whether D's tile has fewer bytes than one of BF16 as wide as the product's."""
        return self.swiglu or self.quantizes

    @functools.cached_property
    def gate_up_blocks(self) -> bool:
        """Whether gate and up have 128 x 128 scale blocks of their own."""
        return self.swiglu and self.problem.traits.b_scales == "block_k"

    @functools.cached_property
    def d_scale_columns(self) -> int:
        """Columns of D that share a scale; 0 where it has none."""
        return D_SCALE_COLUMNS.get(self.problem.d_dtype, 0)

    @functools.cached_property
    def d_scales_ue8m0(self) -> bool:
        """Whether these scales are packed exponents."""
        return self.problem.d_dtype == "e4m3_ue8m0"

    @functools.cached_property
    def scale_parts(self) -> int:
        """CTAs of a cluster, side by side along n, that make up the columns of a scale of D."""
        return max(1, self.d_scale_columns * self.problem.gated // self.config.tile_n)

    @functools.cached_property
    def exchange_bytes(self) -> int:
        """Shared memory in which magnitudes of rows meet: the template's ``Quantization::BYTES``."""
        warps = 4 * self.math_warpgroups
        if not self.quantizes or (not self.config.swap_ab and self.scale_parts == 1):
            return 0
        if self.config.swap_ab:
            planes = self.waves if self.d_scales_ue8m0 else 1
            barriers = 8 if self.scale_parts > 1 else 0
            return 2 * (planes * self.scale_parts * warps * self.mma_n * 4 + barriers) + warps * 4
        return 2 * (warps * self.waves * 16 * 4 + warps * 8) + warps * 4

    @functools.cached_property
    def staging_offset(self) -> int:
        """Offset of the staging area: after the ring, on a swizzle repeat."""
        rows = -(-self.config.stages * self.m_side_bytes // SMEM_ALIGNMENT) * SMEM_ALIGNMENT
        ring = max(rows + self.config.stages * (self.n_side_bytes + self.scale_bytes), self.partial_bytes)
        return -(-ring // SMEM_ALIGNMENT) * SMEM_ALIGNMENT

    @functools.cached_property
    def store_row_bytes(self) -> int:
        """Width of a staged row of D: the box and swizzle of its TMA store."""
        if self.config.swap_ab:
            return min(128, MMA_M // self.problem.gated * self.d_bytes)
        width = 128
        while self.store_columns // self.problem.gated * self.d_bytes % width:
            width //= 2
        return width

    @functools.cached_property
    def column_scale_blocks(self) -> int:
        """128-wide scale blocks that a tile's N-side rows can touch, wherever the tile starts."""
        if self.n_side_scales != "block_k":
            return 1
        if self.gate_up_blocks:
            return 2
        largest_offset = SCALE_GROUP - self.column_boundary_step
        return (largest_offset + self.mma_n - 1) // SCALE_GROUP + 1

    @functools.cached_property
    def column_boundary_step(self) -> int:
        """Scale blocks begin at a multiple of it from a tile's first column, wherever the tile starts."""
        return SCALE_GROUP if self.gate_up_blocks else math.gcd(self.mma_n, SCALE_GROUP)

    @functools.cached_property
    def chain(self) -> int:
        """k-blocks of a chain in which MMAs overlap with promotion; 1 where a second partial sum does not fit.

        A chain drains at its end, which costs two warpgroups, out of step by then, more than one. Row-wise and
        tensor-wise scales, which chains of 8 spill beside, keep 4.
        """
        d_type = "bf16" if self.d_bytes <= 2 else "fp32"
        limit = CHAIN_REGISTERS[d_type if self.mma_n % 64 == 0 else "fp32"]
        if self.fp4:
            limit = FP4_CHAIN_REGISTERS[d_type]
        elif self.expands and self.narrows:
            limit = CHAIN_REGISTERS["fp32"]
        registers = self.mma_n // 2 * 3 + self._fragment_registers
        fits = self.waves == 1 and self.math_warpgroups < 3 and self.parts == 1 and registers <= limit
        if not self.problem.promotes or not fits:
            return 1
        long = self.fp4 or self.problem.traits.a_scales == "row_k"
        return 8 if self.math_warpgroups == 2 and long else 4

    @functools.cached_property
    def unroll(self) -> int:
        """k-blocks in the main loop's body: the first steps of one then overlap with the promotion of another.

        Four waves, or two where promotion takes more registers than with scales of 128 columns.
        """
        waves = 4 if self.n_side_scales == "block_k" else 2
        return waves // self.waves if self.chain == 1 else 1

    @functools.cached_property
    def accumulator_registers(self) -> int:
        """Registers per thread that hold sums: all waves', and one wave's partial sum where it is promoted.

        With them those of expanded weights.
        """
        partial = self.parts_at_once + (self.fp4_group == NVFP4_GROUP) if self.parts > 1 else min(2, self.chain)
        sums = self.mma_n // 2 * (self.waves + (partial if self.problem.promotes else 0))
        return sums + self._fragment_registers

    @property
    def _fragment_registers(self) -> int:
        if not self.fp4:
            return 0
        return A_REGISTERS * self.parts if self.parts > 1 else 2 * FRAGMENT_REGISTERS  # a k-block's, and the next one's

    @functools.cached_property
    def blocks_per_sm(self) -> int:
        """Blocks that are compiled to share an SM: two where registers and shared memory allow it."""
        small = self.math_warpgroups == 1 and self.accumulator_registers <= 64
        return 2 if small and 2 * (self.smem_bytes + SM90A.smem_reserved) <= SM90A.smem_per_sm else 1


def problem_of_spec(spec: KernelSpec) -> GemmProblem:
    """What a kernel of this family, or of grouped GEMMs, knows of its problem."""
    constants = dict(spec.constants)
    epilogue = constants.get("epilogue")
    return _without_sizes(
        *(str(constants[name]) for name in ("recipe", "layout", "d_dtype")),
        fast_accum=bool(constants.get("fast_accum", False)),
        epilogue=None if epilogue is None else str(epilogue),
    )


def operands_name(problem: GemmProblem) -> str:
    """What names of functions and kernels call the operands' types."""
    traits = problem.traits
    return "fp8_fp4" if traits.fp4_b else "fp8" if traits.is_fp8 else "bf16"


kernel_shape = functools.lru_cache(maxsize=4096)(KernelShape)
"""The ``KernelShape`` of a problem without sizes and a config, from a bounded table."""


class Gemm:
    """The dense GEMM kernels."""

    name = "gemm"
    template = "sm90_gemm.cu.jinja"

    def spec(self, problem: GemmProblem, config: GemmConfig, arch: str) -> KernelSpec:
        """The kernel that computes ``problem`` (of any size) with ``config``."""
        constants: dict[str, Any] = {
            "recipe": problem.recipe,
            "layout": problem.layout,
            "d_dtype": problem.d_dtype,
            "fast_accum": problem.fast_accum,
            **({} if problem.epilogue is None else {"epilogue": problem.epilogue}),
            **config.to_dict(),
        }
        return KernelSpec.make(self.name, arch, constants)

    def shape(self, spec: KernelSpec) -> KernelShape:
        """What follows from a spec."""
        constants = dict(spec.constants)
        config = GemmConfig(**{field.name: constants[field.name] for field in dataclasses.fields(GemmConfig)})  # type: ignore[arg-type]
        return KernelShape(problem_of_spec(spec), config)

    def kernel_name(self, spec: KernelSpec) -> str:
        """Symbol of the kernel's entry, such as ``jitgemm_fp8_gemm_nt``."""
        shape = self.shape(spec)
        return f"jitgemm_{operands_name(shape.problem)}_gemm_{shape.problem.layout}"

    def render_context(self, spec: KernelSpec) -> dict[str, object]:
        """Values that the template names."""
        shape = self.shape(spec)
        return {
            **self.context_of(shape),
            "kernel_name": self.kernel_name(spec),
            "description": self.describe(spec),
            "grouping": "",
        }

    def context_of(self, shape: KernelShape) -> dict[str, object]:
        """What the template names of a shape alone; grouped kernels share it."""
        derived = (
            "mma_m",
            "mma_n",
            "m_side_major",
            "n_side_major",
            "m_side_scales",
            "n_side_scales",
            "m_side_bytes",
            "n_side_bytes",
            "n_side_rows",
            "math_warpgroups",
            "waves",
            "d_bytes",
            "store_columns",
            "store_row_bytes",
            "staging_offset",
            "staging_wave_bytes",
            "column_scale_blocks",
            "column_boundary_step",
            "blocks_per_sm",
            "chain",
            "unroll",
            "scale_slack",
            "swiglu",
            "quantizes",
            "narrows",
            "gate_up_blocks",
            "d_scale_columns",
            "d_scales_ue8m0",
            "scale_parts",
            "exchange_bytes",
            "fp4",
            "expands",
            "stage_barriers",
            "fp4_group",
            "a_scales_per_stage",
            "parts",
            "parts_at_once",
        )
        config = shape.config
        return {
            **config.to_dict(),
            **{name: getattr(shape, name) for name in derived},
            "stack": "",
            "producer_stores": False,
            "few_boundaries_step": FEW_BOUNDARIES_STEP,
            "fp8": shape.problem.traits.is_fp8,
            "b_format": "e5m2" if shape.expands else shape.problem.traits.b_format,
            "far_only": shape.problem.traits.far_only,
            "promotes": shape.problem.promotes,
            "epilogue": shape.problem.epilogue is not None,
            "cluster": config.cluster_m * config.cluster_n * config.split_k,
        }

    def num_threads(self, spec: KernelSpec) -> int:
        """Threads of a block."""
        return self.shape(spec).num_threads

    def smem_bytes(self, spec: KernelSpec) -> int:
        """Dynamic shared memory of a block, in bytes."""
        return self.shape(spec).smem_bytes

    def describe(self, spec: KernelSpec) -> str:
        """One line for people."""
        shape = self.shape(spec)
        problem = shape.problem
        fast = " fast_accum" if problem.fast_accum else ""
        epilogue = f" {problem.epilogue}" if problem.epilogue else ""
        return f"{problem.recipe} {problem.layout} {problem.d_dtype}{fast}{epilogue} {shape.config}"


FAMILY = Gemm()
