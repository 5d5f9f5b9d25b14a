"""The parameter blocks that the host packs have the layout of the kernels' ``Params``, as NVRTC sees it."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from jitgemm.compiler import compile_source
from jitgemm.device import SM90A
from jitgemm.errors import CompileError
from jitgemm.families import KernelSpec, gemm_launch, grouped, grouped_launch, transpose_scales
from jitgemm.families.gemm import FAMILY, GemmConfig, GemmProblem
from jitgemm.render import render
from jitgemm.tensor_map import BYTES

Fields = dict[str, str]  # of Params, and how the host packs each

MAPS: Fields = dict.fromkeys(gemm_launch._MAPS, f"{BYTES}s")
SCALES: Fields = {"pointer": "Q", "stride_mn": "i", "stride_k": "i", "blocks": "i", "padding": "i"}
TAIL: Fields = {
    **{
        f"{matrix}.{field}": code
        for matrix in ("d_plain", "c")
        for field, code in (("pointer", "Q"), ("row_stride", "q"))
    },
    **{f"{side}_scale_matrix.{field}": code for side in ("row", "column") for field, code in SCALES.items()},
    **{f"raster.{field}": "i" for field in ("clusters_m", "clusters_n", "group", "last_group")},
    **{
        f"raster.{divisor}.{field}": "I"
        for divisor in ("per_group", "by_group", "by_last_group")
        for field in ("multiplier", "shift")
    },
    **dict.fromkeys(("m", "n", "k_blocks", "d_aligned"), "i"),
}
GROUPED_TAIL: Fields = {
    "d_plain.pointer": "Q",
    "d_plain.row_stride": "q",
    **{f"{side}_scale_matrix.{field}": code for side in ("row", "column") for field, code in SCALES.items()},
    "d_group_stride": "q",
    "scale_matrix_group_stride": "i4x",
    "layout.values": "Q",
    **dict.fromkeys((f"layout.{field}" for field in ("groups", "m", "alignment", "tiles_n", "band", "positions")), "i"),
    "layout.step": "i4x",
    **dict.fromkeys(("n", "k_blocks", "d_aligned", "zero_padding"), "i"),
}
TRANSPOSE: Fields = {
    "input": "Q",
    "output": "Q",
    "stride_group": "q",
    "stride_mn": "q",
    "stride_k": "q",
    "output_stride_group": "q",
    "mn": "i",
    "mn_aligned": "i",
    "k_blocks": "i",
}


def compile_with_asserts(spec: KernelSpec, fields: Fields, size: int) -> None:
    offset, asserts = 0, [f"static_assert(sizeof(Params) == {size});"]
    for name, code in fields.items():
        asserts.append(f"static_assert(__builtin_offsetof(Params, {name}) == {offset});")
        offset += struct.calcsize(f"<{code}")
    source = render(spec)
    compile_source(dataclasses.replace(source, text="\n".join([source.text, *asserts, ""])), spec, "0" * 64)


def gemm_spec() -> KernelSpec:
    return FAMILY.spec(GemmProblem(64, 64, "bf16"), GemmConfig.from_text("64x8x64 s2"), SM90A.name)


def test_gemm() -> None:
    assert gemm_launch._TAIL.format.replace(" ", "") == "<" + "".join(TAIL.values())
    compile_with_asserts(gemm_spec(), {**MAPS, **TAIL}, gemm_launch.PARAMS_BYTES)


def test_grouped_gemm() -> None:
    assert grouped_launch.TAIL.format.replace(" ", "") == "<" + "".join(GROUPED_TAIL.values())
    problem = grouped.GroupedProblem(64, 64, "bf16", 2, "masked")
    spec = grouped.FAMILY.spec(problem, GemmConfig.from_text("64x8x64 s2"), SM90A.name)
    fields = {**dict.fromkeys(grouped_launch.MAPS, f"{BYTES}s"), **GROUPED_TAIL}
    compile_with_asserts(spec, fields, grouped_launch.PARAMS_BYTES)


def test_transpose_scales() -> None:
    packed = transpose_scales._PARAMS
    assert packed.format == "<" + "".join(TRANSPOSE.values()) + "i"  # padding
    compile_with_asserts(transpose_scales.FAMILY.spec(SM90A.name), TRANSPOSE, packed.size)


def test_another_layout_is_noticed() -> None:
    with pytest.raises(CompileError, match="static assertion failed"):
        compile_with_asserts(gemm_spec(), {**MAPS, **dict(reversed(TAIL.items()))}, gemm_launch.PARAMS_BYTES)
