"""How threads share the rows of a row-wise problem: two configs each, for few rows and for many."""

from __future__ import annotations

from jitgemm.device import Device
from jitgemm.families.base import KernelSpec
from jitgemm.families.rowwise import (
    CHUNK,
    FAMILY,
    MAX_BLOCK,
    MAX_CHUNKS,
    VALUE_BYTES,
    WARP,
    RowwiseConfig,
    RowwiseProblem,
    scale_columns,
)

BLOCK = 256
"""Threads of a block, where a row has fewer."""

THREADS_PER_SM = 2048

_WIDTH_BYTES = 32
"""What neighbouring values of a thread of a large problem come to, where it writes codes alone."""

_LOADED_BYTES = 64
"""What a thread of a large problem loads."""


def choose_config(problem: RowwiseProblem, device: Device) -> RowwiseConfig:
    """The config for a problem with its m."""
    assert problem.m is not None
    few, many = enumerate_configs(problem)
    if problem.whole_rows:
        # A block of few rows has many threads for each: for as long as two waves of them hold all rows.
        blocks = 2 * device.num_sms * max(1, THREADS_PER_SM // (few.threads_per_row * few.rows))
        return few if problem.m <= blocks * few.rows else many
    threads = problem.m * -(-problem.n // CHUNK)
    return few if threads <= device.num_sms * THREADS_PER_SM else many


def enumerate_configs(problem: RowwiseProblem) -> tuple[RowwiseConfig, RowwiseConfig]:
    """The configs that ``choose_config`` can return: for few rows, and for many."""
    columns = -(-scale_columns(problem) // CHUNK)  # in chunks
    if not problem.whole_rows:
        few = min(WARP, max(_power(columns), WARP // 2))
        width = _width(problem)
        loaded = width * VALUE_BYTES[problem.dtype] * (2 if problem.op == "swiglu" else 1)  # bytes of a chunk
        most, many, block = _LOADED_BYTES // loaded, few, BLOCK
        if problem.op == "rope":
            many = WARP // 2  # all lanes of a warp wait for the few that rotate
        elif problem.scales in ("fp32", "pow2"):
            # For a GEMM, which wants the scales of neighbouring rows beside each other: several rows of a warp.
            many = WARP // 2 * CHUNK // width
            block = many * WARP // 2
        elif problem.format == "e4m3" and width > CHUNK:
            most = 1
        fitting = max(1, min(most, -(-columns * CHUNK // (many * width))))
        return RowwiseConfig(few, BLOCK // 2 // few, 1), RowwiseConfig(many, block // many, fitting, width)
    # Whole rows in registers.
    per_thread = MAX_CHUNKS * 2 // VALUE_BYTES[problem.dtype]
    least = max(WARP // 2, _power(-(-columns // per_thread)))
    wide = min(MAX_BLOCK // 2, max(least, _power(columns)))
    wide = max(wide, least) if columns > WARP * 4 else min(WARP, max(least, _power(columns)))
    few_rows, many_rows = (
        RowwiseConfig(threads, max(1, BLOCK // 2 // threads), -(-columns // threads)) for threads in (wide, least)
    )
    return few_rows, many_rows


def enumerate_specs(problem: RowwiseProblem, device: Device) -> tuple[KernelSpec, ...]:
    """Every kernel that calls of the problem can need, whatever their m."""
    configs = dict.fromkeys(enumerate_configs(problem))
    return tuple(FAMILY.spec(problem, config, device.arch.name) for config in configs)


def _width(problem: RowwiseProblem) -> int:
    """Neighbouring values of a thread of a large problem: 32 bytes, half as many scales for a thread to compute.

    16 bytes where values are written, so that a store of a warp has no gaps, or some columns rotated.
    """
    width = _WIDTH_BYTES // VALUE_BYTES[problem.dtype]
    codes_alone = problem.op == "cast" and problem.format != "values" and not (problem.round_trip or problem.values)
    return width if codes_alone and problem.aligned and problem.n % width == 0 else CHUNK


def _power(count: int) -> int:
    """The least power of two that is not below a count."""
    return 1 << (count - 1).bit_length()
