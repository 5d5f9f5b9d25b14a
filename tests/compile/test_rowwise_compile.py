"""Row-wise kernels and casts of tiles compile, without spills; their parameters are what the host packs."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from jitgemm import builder
from jitgemm.compiler import compile_source
from jitgemm.device import H200, SM90A
from jitgemm.families import KernelSpec, family_of, rowwise, tiles
from jitgemm.families.rowwise import RowwiseProblem as Row
from jitgemm.families.tiles import TileProblem as Tile
from jitgemm.heuristics import enumerate_specs
from jitgemm.render import render

# Every operation, format, kind of scales, type and option; the widest rows, which take the most registers.
PROBLEMS = [
    *(
        Row("cast", 7168, dtype=dtype, format="e4m3", scales=scales, group=128, aligned=aligned)
        for dtype, aligned in (("bf16", True), ("fp32", False))
        for scales in rowwise.SCALES["e4m3"]
    ),
    *(Row("cast", 4096, format="e4m3", scales="ue8m0", group=group) for group in rowwise.GROUPS),
    Row("cast", 448, format="e4m3", scales="pow2", group=64, round_trip=True),
    Row("cast", 512, dtype="fp16", format="int8", scales="fp32", group=128),
    *(
        Row("cast", n, dtype=dtype, format="int8", scales="fp32_inverse", aligned=n != 777)
        for n, dtype in ((777, "bf16"), (7168, "bf16"), (32768, "fp32"))
    ),
    Row("rms_norm", 7168, norm="bf16", format="int8", scales="fp32_inverse", values=True, round_first=True),
    *(Row("cast", 128, format="e2m1", scales="ue8m0", group=32, ties=ties) for ties in rowwise.TIES),
    Row("cast", 128, format="e2m1", scales="ue8m0", group=32, round_trip=True),
    Row("cast", 4096, format="e4m3", scales="ue8m0", group=32, stage=True, index="int64"),
    *(
        Row("cast", 7168, format="e2m1", scales="ue4m3", group=16, stage=True, index=index, ties=ties)
        for index, ties in (("int32", "even"), ("int64", "away"))
    ),
    *(Row("swiglu", 3072, dtype=dtype, aligned=aligned) for dtype in ("bf16", "fp32") for aligned in (True, False)),
    *(
        Row("swiglu", 2048, format="e4m3", scales=scales, group=group, round_first=first)
        for scales, group, first in (("pow2", 128, False), ("ue8m0", 32, True), ("fp32", 128, False))
    ),
    *(Row("rms_norm", n, dtype=dtype, norm=dtype) for n in (512, 4096, 7168, 32768) for dtype in ("bf16", "fp32")),
    Row("rms_norm", 777, norm="fp32", aligned=False),
    *(
        Row("rms_norm", n, norm="bf16", format="e4m3", scales=scales, group=128, values=True, round_first=True)
        for n, scales in ((4096, "ue8m0"), (7168, "pow2"), (32768, "fp32"))
    ),
    *(
        Row("rope", 512, norm=norm, inverse=inverse, index=index)
        for norm, inverse, index in (("plain", False, "int64"), ("none", True, "int32"), ("bf16", False, "int64"))
    ),
    Row("rope", 512, norm="bf16", index="int64", format="e4m3", scales="pow2", group=64, round_trip=True),
    Row("rope", 512, norm="plain", index="int64", format="e4m3", scales="fp32", group=128, round_first=True),
    Row("rope", 512, inverse=True, index="int64", format="e4m3", scales="ue8m0", group=128, round_first=True),
    *(
        Tile(op, "pow2" if rows == 32 else "fp32_reciprocal", rows, columns, dtype, aligned)
        for op, rows, columns in (("per_block", 128, 128), ("per_block", 32, 32), ("per_channel", 128, 1))
        for dtype in ("bf16", "fp32")
        for aligned in (True, False)
    ),
    *(
        Tile("cast_back", scales, rows, columns, dtype)
        for scales, rows, columns in (("fp32", 1, 128), ("fp32", 128, 1), ("fp32", 0, 0), ("packed", 1, 32))
        for dtype in ("bf16", "fp32")
    ),
]  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: f"{problem} {getattr(problem, 'n', '')}")
def test_kernels_compile_without_spills(problem: Row | Tile) -> None:
    for spec in enumerate_specs(problem, H200):
        metadata = builder.build(spec).cubin.metadata
        assert (metadata.spill_bytes, metadata.stack_bytes, metadata.warnings) == (0, 0, ())
        assert metadata.registers * family_of(spec).num_threads(spec) <= SM90A.registers_per_sm


def assert_params(spec: KernelSpec, names: tuple[str, ...], packed: struct.Struct) -> None:
    codes = "".join(c * int(n or 1) for n, c in _fields(packed.format.lstrip("<")))
    offset, asserts = 0, [f"static_assert(sizeof(Params) == {packed.size});"]
    for name, code in zip(names, codes, strict=True):
        asserts.append(f"static_assert(__builtin_offsetof(Params, {name}) == {offset});")
        offset += struct.calcsize(f"<{code}")
    source = render(spec)
    compile_source(dataclasses.replace(source, text="\n".join([source.text, *asserts, ""])), spec, "0" * 64)


def _fields(format: str) -> list[tuple[str, str]]:
    fields, number = [], ""
    for character in format:
        if character.isdigit():
            number += character
        else:
            if character != "x":  # padding
                fields.append((number, character))
            number = ""
    return fields


def test_parameters() -> None:
    spec = enumerate_specs(Row("cast", 128, format="e4m3", scales="fp32", group=128), H200)[0]
    names = (*rowwise.POINTERS, *rowwise.STRIDES, *rowwise.SIZES, *rowwise.REALS)
    assert_params(spec, names, rowwise.PARAMS)
    names = ("values", "codes", "scales", "values_row", "codes_row", "scale_row", "scale_column", "rows", "columns")
    assert_params(enumerate_specs(Tile("per_block", "pow2", 128, 128), H200)[0], names, tiles.PARAMS)
