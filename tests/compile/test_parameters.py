"""The parameter blocks that the host packs have the layout of the kernels' ``Params``, as NVRTC sees it."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from jitgemm.compiler import compile_source
from jitgemm.device import SM90A
from jitgemm.errors import CompileError
from jitgemm.families import (
    KernelSpec,
    batched,
    batched_launch,
    gemm_launch,
    grouped,
    grouped_launch,
    transpose_scales,
)
from jitgemm.families.gemm import FAMILY, GemmConfig, GemmProblem
from jitgemm.ops import epilogue
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
RASTER: Fields = {name: code for name, code in TAIL.items() if name.startswith("raster.")}
MATRICES: Fields = {name: code for name, code in TAIL.items() if name.startswith(("d_plain", "c.", "row_", "column_"))}
COMMON_OF_BATCHED: Fields = {
    **MATRICES,
    **dict.fromkeys(("d_group_stride", "c_group_stride"), "q"),
    **RASTER,
    **dict.fromkeys(("by_group.multiplier", "by_group.shift"), "I"),
    **dict.fromkeys(("tiles", "m", "n", "d_aligned", "adds"), "i"),
}
BATCHES: Fields = {
    **dict.fromkeys(("k_blocks", "batches"), "i"),
    **dict.fromkeys(("by_batch.multiplier", "by_batch.shift"), "I"),
    **dict.fromkeys(("k_blocks_of_batch", "scale_matrix_group_stride"), "i"),
    **dict.fromkeys(("holes.by_width.multiplier", "holes.by_width.shift"), "I"),
    **dict.fromkeys(("holes.width", "holes.left", "holes.mid"), "i"),
}
GROUPS_OF_K: Fields = {
    f"groups[{group}].{field}": code
    for group in range(batched.MOST_GROUPS_OF_K)
    for field, code in (("k_blocks", "i"), ("first_scale", "i"), ("plane", "i4x"))
}
STEPS: Fields = {
    **dict.fromkeys(("alpha", "bias", "row_weights", "scales"), "Q"),
    **dict.fromkeys(("scales_stride", "scales_plane_stride"), "q"),
    **dict.fromkeys(("alpha_group_stride", "bias_group_stride", "weights_plane_stride", "bias_is_bf16"), "i"),
    **dict.fromkeys(("alpha_value", "limit"), "f"),
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


@pytest.mark.parametrize("kind", ["batched", "k_grouped"])
def test_batched_gemm(kind: str) -> None:
    problem = batched.BatchedProblem(64, 64, "bf16", 2, kind)
    spec = batched.FAMILY.spec(problem, GemmConfig.from_text("64x8x64 s2"), SM90A.name)
    along_k = kind == "k_grouped"
    maps = batched_launch.MAPS_OF_K if along_k else batched_launch.MAPS_OF_BATCHES
    packed = {**COMMON_OF_BATCHED, **({} if along_k else BATCHES)}
    formats = [batched_launch.COMMON.format, "" if along_k else batched_launch.BATCHES.format]
    assert "".join(formats).replace(" ", "").replace("<", "") == "".join(packed.values())
    fields = {**dict.fromkeys(maps, f"{BYTES}s"), **packed, **(GROUPS_OF_K if along_k else {})}
    if along_k:
        end = sum(struct.calcsize(f"<{code}") for code in fields.values())
        fields["rows[0]"] = f"{BYTES * batched.MOST_GROUPS_OF_K}s"
        last = f"groups[{batched.MOST_GROUPS_OF_K - 1}].plane"
        fields[last] += f"{batched_launch.maps_of_groups() - end}x"
        fields["columns[0]"] = f"{BYTES * batched.MOST_GROUPS_OF_K}s"
    compile_with_asserts(spec, fields, batched_launch.params_bytes(kind))


def test_epilogues() -> None:
    assert epilogue.STEPS.format.replace(" ", "") == "<" + "".join(STEPS.values())
    steps = {f"steps.{name}": code for name, code in STEPS.items()}
    config = GemmConfig.from_text("64x32x64 s2")
    spec = FAMILY.spec(GemmProblem(64, 64, "bf16", epilogue="linear"), config, SM90A.name)
    assert struct.calcsize("<" + "".join({**MAPS, **TAIL}.values())) == gemm_launch.STEPS_OFFSET
    compile_with_asserts(spec, {**MAPS, **TAIL, **steps}, gemm_launch.PARAMS_BYTES)
    problem = grouped.GroupedProblem(64, 64, "bf16", 2, "masked", epilogue="linear")
    spec = grouped.FAMILY.spec(problem, config, SM90A.name)
    fields = {**dict.fromkeys(grouped_launch.MAPS, f"{BYTES}s"), **GROUPED_TAIL}
    assert struct.calcsize("<" + "".join(fields.values())) == grouped_launch.STEPS_OFFSET
    compile_with_asserts(spec, {**fields, **steps}, grouped_launch.PARAMS_BYTES)


def test_transpose_scales() -> None:
    packed = transpose_scales._PARAMS
    assert packed.format == "<" + "".join(TRANSPOSE.values()) + "i"  # padding
    compile_with_asserts(transpose_scales.FAMILY.spec(SM90A.name), TRANSPOSE, packed.size)


def test_another_layout_is_noticed() -> None:
    with pytest.raises(CompileError, match="static assertion failed"):
        compile_with_asserts(gemm_spec(), {**MAPS, **dict(reversed(TAIL.items()))}, gemm_launch.PARAMS_BYTES)
