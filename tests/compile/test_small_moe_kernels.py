"""Kernels around hyper-connections, experts, scales and sums through NVRTC: no spills, no advisories, few registers."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from jitgemm.compiler import compile_source
from jitgemm.device import SM90A
from jitgemm.families import KernelSpec, family_of
from jitgemm.families.hyper_connections import HC_PRENORM
from jitgemm.families.moe import MAX_EXPERTS
from jitgemm.families.plain import PlainFamily
from jitgemm.families.small_problem import LAYOUTS, PRECISIONS, SCORES, STREAM_DTYPES, SmallProblem
from jitgemm.families.sum_parts import D_DTYPES, SUM_PARTS
from jitgemm.render import render

PROBLEMS = [
    SmallProblem.make("hc_split_sinkhorn"),
    *(
        SmallProblem.make(kind, precision=precision, dtype=dtype)
        for kind in ("hc_pre", "hc_head")
        for precision in PRECISIONS
        for dtype in STREAM_DTYPES
    ),
    *(SmallProblem.make("hc_post", dtype=dtype) for dtype in STREAM_DTYPES),
    SmallProblem.make("hc_prenorm_gemm", n=16, precision="fp32"),
    *(
        SmallProblem.make("topk_gate", experts=experts, scores=scores, hashed=hashed, index_dtype=dtype)
        for scores in SCORES
        for experts, hashed, dtype in ((384, False, "int32"), (256, True, "int64"))
    ),
    SmallProblem.make("topk_gate", experts=MAX_EXPERTS, scores="softmax", hashed=False, index_dtype="int64"),
    SmallProblem.make("moe_gate", experts=256, scores="sqrtsoftplus", hashed=False, index_dtype="int32"),
    *(SmallProblem.make("moe_permutation", layout=layout, index_dtype="int64") for layout in LAYOUTS),
    *(SmallProblem.make("moe_permute", zero_padding=zero_padding) for zero_padding in (False, True)),
    *(SmallProblem.make("moe_combine", topk=topk) for topk in (1, 6, 16)),
    *(SmallProblem.make("pack_ue8m0", grouped=grouped) for grouped in (False, True)),
]
SPECS = [
    *dict.fromkeys(spec for problem in PROBLEMS for spec in problem.specs(SM90A.name)),
    *(SUM_PARTS.spec(SM90A.name, d_dtype=d_dtype) for d_dtype in D_DTYPES),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: family_of(spec).describe(spec))
def test_kernel(spec: KernelSpec) -> None:
    source, family = render(spec), family_of(spec)
    assert isinstance(family, PlainFamily)
    # What the host packs has the kernel's layout.
    asserts, packed = [f"static_assert(sizeof(Params) == {family.params_bytes});"], "<"
    for field, code in zip(family.fields, family.params.format[1:], strict=True):
        asserts.append(f"static_assert(__builtin_offsetof(Params, {field.name}) == {struct.calcsize(packed)});")
        packed += code
    source = dataclasses.replace(source, text="\n".join([source.text, *asserts, ""]))
    metadata = compile_source(source, spec, "0" * 64).metadata
    assert (metadata.spill_bytes, metadata.stack_bytes, metadata.warnings) == (0, 0, ())
    threads, smem = family.num_threads(spec), family.smem_bytes(spec)
    # 512 threads of a multiprocessor have enough loads in flight; the prenorm GEMM's share of registers is its own.
    blocks = spec["blocks_per_sm"] if family is HC_PRENORM else 512 // threads
    assert metadata.registers * threads * blocks <= SM90A.registers_per_sm
    if family is SUM_PARTS:  # 8 loads of 16 bytes are in flight at once
        assert metadata.registers > 32
    assert blocks * (smem + SM90A.smem_reserved) <= SM90A.smem_per_sm
