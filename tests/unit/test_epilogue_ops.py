"""Epilogues through the public functions on the CPU: what they compute and refuse, and what kernels are given."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import jitgemm
from jitgemm import Epilogue, empty_quantized, settings
from jitgemm.device import H200
from jitgemm.errors import ProblemError
from jitgemm.families.gemm import GemmConfig, GemmProblem, kernel_shape
from jitgemm.families.grouped import FAMILY, GroupedProblem
from jitgemm.heuristics import gemm as dense_heuristics
from jitgemm.heuristics import grouped as grouped_heuristics
from jitgemm.ops import epilogue as ops
from jitgemm.reference.layout import has_mn_major_strides
from jitgemm.testing import calc_diff

RECIPE = "fp8_1x128_128x128"
M, N, K = 5, 64, 48


def operands(groups: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    of_groups = () if groups is None else (groups,)
    shapes = (*of_groups, M, K), (*of_groups, N, K)
    a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return a, b


def test_steps_follow_each_other_as_written() -> None:
    a, b = operands()
    bias, weights, c = torch.rand(N), torch.rand(M), torch.randn(M, N)
    d = torch.full((M, N), torch.nan)
    jitgemm.bf16_gemm_nt(a, b, d, c, epilogue=Epilogue(alpha=0.5, bias=bias, row_weights=weights))
    expected = (0.5 * (a.double() @ b.double().T) + c + bias) * weights[:, None]
    assert torch.allclose(d.double(), expected, rtol=1e-6)


def test_without_a_product_the_other_steps_remain() -> None:
    bias, c, d = torch.rand(N), torch.randn(M, N), torch.full((M, N), torch.nan)
    a, b = (torch.empty(rows, 0).bfloat16() for rows in (M, N))
    jitgemm.bf16_gemm_nt(a, b, d, c, epilogue=Epilogue(alpha=0.5, bias=bias))
    assert torch.equal(d, c + bias)
    jitgemm.bf16_gemm_nt(a, b[:0], d[:, :0], epilogue=Epilogue(alpha=0.5))  # nothing at all


def test_swiglu_of_interleaved_weights() -> None:
    a, b = operands()
    d = torch.full((M, N // 2), torch.nan)
    alpha = torch.tensor(2.0)
    jitgemm.bf16_gemm_nt(a, jitgemm.interleave_gate_up(b), d, epilogue=Epilogue(alpha=alpha, swiglu=True, limit=3.0))
    gate, up = (2 * (a.double() @ b.double().T)).chunk(2, 1)
    gate, up = gate.clamp(max=3.0), up.clamp(-3.0, 3.0)
    assert torch.allclose(d.double(), gate / (1 + (-gate).exp()) * up, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("ue8m0", [False, True])
def test_a_quantized_output_is_the_next_call_s_operand(ue8m0: bool) -> None:
    a, b = operands()
    d = empty_quantized((M, N), ue8m0=ue8m0, device="cpu")
    assert has_mn_major_strides(d[1])
    jitgemm.bf16_gemm_nt(a, b, d, epilogue=Epilogue())
    whole = torch.empty(M, N)
    jitgemm.bf16_gemm_nt(a, b, whole)
    back = jitgemm.cast_back_from_fp8(d[0], d[1], 32 if ue8m0 else 128, ue8m0)
    assert (back - whole).norm() / whole.norm() < 0.05


def test_groups_have_their_own_alpha_bias_and_weights() -> None:
    a, b = operands(3)
    counts = torch.tensor([0, 2, 5], dtype=torch.int32)
    alpha, bias, weights = torch.rand(3), torch.rand(3, N), torch.rand(3, M)
    d = torch.full((3, M, N), torch.nan)
    epilogue = Epilogue(alpha=alpha, bias=bias, row_weights=weights)
    jitgemm.m_grouped_bf16_gemm_nt_masked(a, b, d, counts, 4, epilogue=epilogue)
    expected = (alpha[:, None, None] * (a.double() @ b.double().mT) + bias[:, None]) * weights[..., None]
    for group, count in enumerate(counts.tolist()):
        assert torch.allclose(d[group, :count].double(), expected[group, :count], rtol=1e-6)
        assert d[group, count:].isnan().all()


@pytest.mark.parametrize(("psum", "debug"), [(False, False), (True, True)])
def test_padding_of_a_quantized_output_is_zero_and_its_scales_stay(psum: bool, debug: bool) -> None:
    a, b = operands(3)
    index = torch.tensor([0, 0, -1, -1, 2], dtype=torch.int32)
    layout = torch.tensor([2, 2, 5], dtype=torch.int32) if psum else index
    d = empty_quantized((M, N), device="cpu")
    d[0].view(torch.uint8).fill_(0x7F)
    d[1].fill_(7.0)
    more = {"use_psum_layout": psum, "epilogue": Epilogue(alpha=2.0)}
    with settings.override(mk_alignment=4, debug=debug):
        jitgemm.m_grouped_bf16_gemm_nt_contiguous(a[0], b, d, layout, **more)
    pads = index < 0
    assert not d[0].view(torch.uint8)[pads].any()
    assert (d[1][pads] == 7).all()
    back = jitgemm.cast_back_from_fp8(d[0][~pads], d[1][~pads])
    expected = 2 * torch.stack([a[0, row].double() @ b[group].double().T for row, group in ((0, 0), (1, 0), (4, 2))])
    assert (back - expected).norm() / expected.norm() < 0.05


def test_operands_with_k_first() -> None:
    a, b = operands()
    fp8 = jitgemm.per_token_cast_to_fp8(a), jitgemm.per_block_cast_to_fp8(b)
    (a_data, a_scales), (b_data, b_scales) = fp8
    epilogue = Epilogue(bias=torch.rand(N))
    expected = torch.empty(M, N)
    jitgemm.fp8_gemm_nt(*fp8, expected, epilogue=epilogue)
    first = (a_data.t().contiguous(), a_scales.t()), (b_data.t().contiguous(), b_scales.t())
    for name, given in (("nn", (fp8[0], first[1])), ("tn", first), ("tt", (first[0], fp8[1]))):
        d = torch.full((M, N), torch.nan)
        getattr(jitgemm, f"fp8_gemm_{name}")(*given, d, epilogue=epilogue)
        assert torch.equal(d, expected)


def test_calls_compile_without_breaks() -> None:
    a, b = operands()
    bias = torch.rand(N)

    def layer(a: Tensor) -> tuple[Tensor, Tensor]:
        d = empty_quantized((M, N), device="cpu")
        jitgemm.bf16_gemm_nt(a, b, d, epilogue=Epilogue(bias=bias))
        return d

    compiled, eager = torch.compile(layer, backend="eager", fullgraph=True)(a), layer(a)
    assert torch.equal(compiled[0].view(torch.uint8), eager[0].view(torch.uint8))
    assert torch.equal(compiled[1], eager[1])


def test_operators_pass_torch_s_own_checks() -> None:
    a, b = operands()
    operation = torch.ops.jitgemm.gemm_with_epilogue.default
    asked = (None, False, "bf16", "nt", False, None, 1.5, torch.rand(N), False, None, None)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operation, (a, None, b, None, torch.empty(M, N), *asked, None), test_utils=checks)
    d, scales = empty_quantized((M, N), device="cpu")
    torch.library.opcheck(operation, (a, None, b, None, d, *asked, scales), test_utils=checks[1:])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"alpha": "1"}, "alpha is '1'"),
    ({"alpha": torch.ones(2)}, "alpha is torch.float32 \\(2,\\)"),
    ({"alpha": torch.ones(1).bfloat16()}, "alpha is torch.bfloat16"),
    ({"bias": torch.ones(N - 1)}, "bias is torch.float32 \\(63,\\)"),
    ({"bias": torch.ones(N).half()}, "bias is torch.float16"),
    ({"bias": torch.ones(2 * N)[::2]}, "bias has strides"),
    ({"bias": 1.0}, "bias is float"),
    ({"swiglu": 1}, "swiglu is 1"),
    ({"limit": 1.0}, "limit is 1.0 without swiglu"),
    ({"limit": -1.0, "swiglu": True}, "limit is -1.0"),
    ({"limit": math.nan, "swiglu": True}, "limit is nan"),
    ({"row_weights": torch.ones(M + 1)}, "row_weights are torch.float32 \\(6,\\)"),
    ({"swiglu": True}, "d has shape \\(5, 64\\); a and b make it \\(5, 32\\) with SwiGLU"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_epilogues(fields: dict[str, Any], message: str) -> None:
    a, b = operands()
    with pytest.raises(ProblemError, match=message):
        jitgemm.bf16_gemm_nt(a, b, torch.empty(M, N), epilogue=Epilogue(**fields))


def test_bad_outputs() -> None:
    a, b = operands()
    values, scales = empty_quantized((M, N), device="cpu")
    whole = torch.empty(M, N)
    for d, c, message in (
        ((values,), None, "d has 1 parts"),
        ((values, None), None, "d_scales is NoneType"),
        (values, None, "d has dtype torch.float8_e4m3fn"),
        ((whole, scales), None, "d is torch.float32 with scales of torch.float32"),
        ((values, scales.double()), None, "with scales of torch.float64"),
        ((values, torch.empty(M, 2)), None, "d_scales have shape"),
        ((values, torch.empty(M, 2)[:, :1]), None, "d_scales have strides"),
        ((values, scales), whole, "c is given with SwiGLU or a quantized d"),
        ((values, values.view(-1)[:20].view(torch.float32).view(M, 1)), None, "overlaps"),
    ):
        with pytest.raises(ProblemError, match=message):
            jitgemm.bf16_gemm_nt(a, b, d, c, epilogue=Epilogue())
    with pytest.raises(ProblemError, match="epilogue is dict"):
        jitgemm.bf16_gemm_nt(a, b, whole, epilogue={})  # type: ignore[arg-type]


@pytest.mark.parametrize("grouping", [None, "masked", "contiguous", "psum"])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("half", "k"), [(192, 352), (8, 144), (96, 128), (320, 64)])
def test_blocks_of_gate_and_up_may_be_cut(half: int, k: int, quantized: bool, grouping: str | None) -> None:
    """Shards of tensor parallelism: their last blocks are parts, gate's and up's each."""
    groups, generator = 2, torch.Generator().manual_seed(half)
    a, gate, up = (torch.randn(groups, rows, k, generator=generator).bfloat16() for rows in (M, half, half))
    blocks = [[jitgemm.per_block_cast_to_fp8(part) for part in stack] for stack in (gate, up)]
    weights = [torch.stack([torch.cat([g[i], u[i]]) for g, u in zip(*blocks, strict=True)]) for i in range(2)]
    b = jitgemm.interleave_gate_up(*weights)
    x = [jitgemm.per_token_cast_to_fp8(part) for part in a]
    values, scales = (torch.stack(parts) for parts in zip(*x, strict=True))
    exact = []
    for (data, sf), *stacked in zip(x, *blocks, strict=True):
        of_x = jitgemm.cast_back_from_fp8(data, sf).double()
        gates, ups = (of_x @ jitgemm.cast_back_from_fp8(w, s, (128, 128)).double().T for w, s in stacked)
        exact.append(gates / (1 + (-gates).exp()) * ups)
    rows = (groups, M) if grouping == "masked" else (groups * M,)
    d: Any = empty_quantized((*rows, half), device="cpu") if quantized else torch.full((*rows, half), torch.nan)
    swiglu = Epilogue(swiglu=True)
    if grouping is None:
        for i in range(groups):
            part = tuple(t[i * M : i * M + M] for t in d) if quantized else d[i * M : i * M + M]
            jitgemm.fp8_gemm_nt((values[i], scales[i]), (b[0][i], b[1][i]), part, epilogue=swiglu)
    elif grouping == "masked":
        counts = torch.full((groups,), M, dtype=torch.int32)
        jitgemm.m_grouped_fp8_gemm_nt_masked((values, scales), b, d, counts, M, epilogue=swiglu)
    else:
        psum = grouping == "psum"
        layout = torch.arange(groups) + 1 if psum else torch.arange(groups).repeat_interleave(M)
        with settings.override(mk_alignment=M):
            jitgemm.m_grouped_fp8_gemm_nt_contiguous(
                *((values.flatten(0, 1), scales.flatten(0, 1)), b, d),
                (layout * M if psum else layout).int(),
                use_psum_layout=psum,
                epilogue=swiglu,
            )
    result = d if not quantized else (d[0].float() * d[1].repeat_interleave(128, -1)[..., :half])
    error = calc_diff(result.view(groups, M, half), torch.stack(exact))
    assert error < (1e-3 if quantized else 1e-10)


def test_operands_that_an_epilogue_does_not_take() -> None:
    with pytest.raises(ProblemError, match="n is 392; SwiGLU accepts multiples of 16"):
        GemmProblem(392, 128, "fp8_1x128_128x128", epilogue="swiglu")
    a, b = torch.zeros(M, 128).to(torch.float8_e4m3fn), torch.zeros(384, 128).to(torch.float8_e4m3fn)
    with pytest.raises(ProblemError, match=r"b_scales has shape \(3, 1\); .* accepts \(4, 1\)"):
        d = torch.empty(M, 192)
        jitgemm.fp8_gemm_nt((a, torch.ones(M, 1)), (b, torch.ones(3, 1)), d, epilogue=Epilogue(swiglu=True))
    with pytest.raises(ProblemError, match="with an epilogue, e4m3"):
        GemmProblem(384, 128, "bf16", d_dtype="e4m3")


def test_what_the_kernel_is_given() -> None:
    alpha, bias, weights = torch.ones(3), torch.ones(3, N).bfloat16(), torch.ones(3, M)
    d = empty_quantized((3, M, 300), device="cpu")
    steps, _ = ops.steps_of(Epilogue(alpha=alpha, bias=bias, swiglu=True, limit=7, row_weights=weights), d)
    given = ops.STEPS.unpack(ops.pack(steps))
    assert given[:4] == tuple(tensor.data_ptr() for tensor in (alpha, bias, weights, d[1]))
    assert given[4:] == (8, 24, 1, N, M, 1, 1.0, 7.0)
    steps, _ = ops.steps_of(Epilogue(alpha=2), torch.empty(M, N))
    assert ops.STEPS.unpack(ops.pack(steps)) == (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2.0, math.inf)


@pytest.mark.parametrize("d_dtype", ["bf16", "e4m3", "e4m3_ue8m0"])
@pytest.mark.parametrize("epilogue", ["linear", "swiglu"])
@pytest.mark.parametrize("recipe", ["fp8_1x128_128x128", "bf16"])
def test_tiles_hold_whole_scales(recipe: str, epilogue: str, d_dtype: str) -> None:
    dense = GemmProblem(4096, 4096, recipe, d_dtype=d_dtype, epilogue=epilogue)
    problem = GroupedProblem(4096, 4096, recipe, 8, "masked", d_dtype=d_dtype, epilogue=epilogue)
    chosen = {
        dense: [dense_heuristics.choose_config(dense.with_m(m), H200) for m in (1, 16, 64, 200, 4096)],
        problem: [grouped_heuristics.choose_config(problem.with_m(m), H200) for m in (1, 16, 64, 200, 4096)],
    }
    for asked, configs in chosen.items():
        for config in configs:
            shape = kernel_shape(dense.without_sizes(), config)
            if shape.quantizes:
                whole = shape.d_scale_columns * dense.gated
                assert config.tile_n % whole == 0 or config.tile_n * config.cluster_n == whole
            if shape.narrows:
                assert config.split_k == 1
        heuristics: Any = dense_heuristics if asked is dense else grouped_heuristics
        assert set(configs) <= set(heuristics.enumerate_configs(asked, H200))


def test_shapes_files_hold_epilogues() -> None:
    problem = GroupedProblem(4096, 7168, "fp8_1x128_128x128", 8, "masked", d_dtype="e4m3", epilogue="swiglu")
    assert GroupedProblem.from_dict(problem.to_dict()) == problem
    dense = GemmProblem(4096, 7168, "bf16", epilogue="linear")
    assert GemmProblem.from_dict(dense.to_dict()) == dense
    assert "epilogue" not in dataclasses.replace(dense, epilogue=None).to_dict()
    spec = FAMILY.spec(problem, GemmConfig.from_text("8x128x128 s6 c1x2 swap"), "sm_90a")
    assert FAMILY.describe(spec) == "m_grouped_masked fp8_1x128_128x128 nt e4m3 swiglu 8x128x128 s6 c1x2 swap"


def test_groups_that_start_anywhere_have_epilogues_too() -> None:
    problem = GroupedProblem(4096, 7168, RECIPE, 8, "psum", d_dtype="e4m3", alignment=1, epilogue="swiglu")
    config = grouped_heuristics.choose_config(problem.with_m(64), H200)
    shape = FAMILY.shape(FAMILY.spec(problem, config, "sm_90a"))
    assert (shape.scale_slack, shape.problem.epilogue, shape.problem.d_dtype) == (4, "swiglu", "e4m3")
    assert shape == problem.shape(config)
