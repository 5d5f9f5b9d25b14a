"""The kernel that adds up FP32 parts of a sum, such as those of ``einsum("bmk,bnk->mn")``."""

from __future__ import annotations

from jitgemm.families.plain import Field, PlainFamily

QUAD = 4  # columns of one load, 16 bytes of FP32
THREADS = 128
D_DTYPES = ("bf16", "fp32")
_PARTS_OF_A_THREAD = 4  # at least: fewer loads would not pay for adding up the threads' sums
_MOST_WAYS = 16  # that leave 8 threads side by side, for 128 bytes of a row

SUM_PARTS = PlainFamily(
    "sum_parts",
    (
        Field("parts", "const float4*", "[num_parts, m, row_quads]; columns behind the n-th may be anything"),
        Field("c", "const Element*", "[m, n], may be d; null: none"),
        Field("d", "Element*", "[m, n]"),
        Field("c_row_stride", "int64_t", "elements"),
        Field("d_row_stride", "int64_t"),
        Field("num_parts", "int32_t"),
        Field("n", "int32_t"),
        Field("row_quads", "int32_t", "ceil(n / 4)"),
        Field("quads", "int32_t", "m * row_quads"),
        Field("ways", "int32_t", "threads that share the parts of four columns, a power of two"),
    ),
    num_threads=THREADS,
    describe=lambda spec: f"{spec['d_dtype']}",
)


def ways_of(num_parts: int) -> int:
    """Threads that share so many parts: each has 4 to 7 of them, unless there are less than 8 parts, or very many."""
    ways = num_parts // _PARTS_OF_A_THREAD
    return min(1 << max(0, ways.bit_length() - 1), _MOST_WAYS)
