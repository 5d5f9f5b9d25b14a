"""Epilogues on a GPU, dense and grouped: against float64, with poison in all that must not be read or written."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import jitgemm
from benchmarks.operands import poisoned, random_matrix, same_bits
from jitgemm import Epilogue, settings
from jitgemm.errors import ProblemError
from jitgemm.families.gemm import FP4, GemmConfig, GemmProblem
from jitgemm.families.grouped import GroupedProblem
from jitgemm.heuristics import gemm as dense_heuristics
from jitgemm.heuristics import grouped as grouped_heuristics
from jitgemm.ops.fp4 import PreparedWeights
from jitgemm.plan import device_facts
from jitgemm.reference import epilogue as epilogue_reference
from jitgemm.reference import fp4
from jitgemm.reference import grouped as grouped_reference
from jitgemm.reference.gemm import check_close
from jitgemm.reference.quantize import unpack_ue8m0

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = torch.device("cuda", 0)
FP8, BF16 = "fp8_1x128_128x128", "bf16"
OUTPUTS = ("bf16", "fp32", "e4m3", "e4m3_ue8m0")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = ("masked", "contiguous", "psum")
COUNTS = (0, 1, 7, 64, 65, 130, 0, 20)


class Case:
    """Operands, epilogue and expected output of a dense (``kind`` None) or grouped problem."""

    def __init__(
        self,
        kind: str | None,
        recipe: str,
        epilogue: Epilogue,
        d_dtype: str,
        n: int,
        k: int,
        m: int = 150,
        alignment: int = 128,
        far: slice = slice(0),
    ) -> None:
        self.kind, self.recipe, self.epilogue, self.d_dtype, self.alignment = kind, recipe, epilogue, d_dtype, alignment
        self.n, self.k = n, k
        self.groups = 1 if kind is None else len(COUNTS)
        generator = torch.Generator(DEVICE).manual_seed(n + k)
        self.values: Tensor | None = None
        if kind is None:
            rows: tuple[int, ...] = (m,)
            self.used = torch.ones(m, dtype=torch.bool, device=DEVICE)
        elif kind == "masked":
            self.values = torch.tensor(COUNTS, dtype=torch.int32, device=DEVICE)
            self.used = torch.arange(m, device=DEVICE)[None, :] < self.values[:, None]
            rows = (self.groups, m)
        else:
            index: list[int] = []
            ends = []
            for group, count in enumerate(COUNTS):
                index += [-1] * (-len(index) % alignment) + [group] * count
                ends.append(len(index) if count else (ends[-1] if ends else 0))
            rows = (len(index),)
            self.values = torch.tensor(ends if kind == "psum" else index, dtype=torch.int32, device=DEVICE)
            self.used = torch.tensor(index, device=DEVICE) >= 0
        a = random_matrix(self.used.numel(), k, generator, spread=False)
        b = random_matrix(self.groups * n, k, generator, spread=False).view(self.groups, n, k)
        self.a_scales: Tensor | None = None
        self.b_scales: Tensor | None = None
        self.fp4: PreparedWeights | None = None
        if recipe != BF16:
            a, a_scales = jitgemm.per_token_cast_to_fp8(a)
            self.a_scales = jitgemm.get_mn_major_tma_aligned_tensor(a_scales.reshape(*rows, -1).contiguous())
        if recipe == FP4:
            size = (self.groups, n, k // 2)
            packed = torch.randint(-128, 128, size, generator=generator, dtype=torch.int8, device=DEVICE)
            exponents = torch.randint(119, 125, (*size[:2], -(-k // 32)), generator=generator, device=DEVICE).byte()
            if epilogue.swiglu:
                packed, exponents = map(jitgemm.interleave_gate_up, (packed, exponents))
            exponents[:, far, ::2] -= 40  # rows whose scales lie too far apart to be expanded at once
            self.fp4 = jitgemm.prepare_fp4_weights(packed, exponents)
            self.b = fp4.dequantize_fp4(packed.view(torch.uint8), exponents)
        elif recipe == FP8:
            halves = b.chunk(2, 1) if epilogue.swiglu else (b,)  # gate and up have blocks of their own
            cast = [[jitgemm.per_block_cast_to_fp8(part) for part in half] for half in halves]
            scales = torch.cat([torch.stack([scales for _, scales in half]) for half in cast], 1)
            data = torch.cat([torch.stack([values.view(torch.uint8) for values, _ in half]) for half in cast], 1)
            if epilogue.swiglu:
                data, scales = jitgemm.interleave_gate_up(data, scales)
            self.b, self.b_scales = data.view(torch.float8_e4m3fn), scales
        else:
            self.b = jitgemm.interleave_gate_up(b) if epilogue.swiglu else b
        self.a = a.view(*rows, k)
        self.columns = n // 2 if epilogue.swiglu else n
        self.d = self.output()

    def output(self) -> Any:
        """D of NaN; of FP8 and UE8M0 bytes of 0x7f."""
        shape = (*self.a.shape[:-1], self.columns)
        if self.d_dtype in DTYPES:
            return poisoned(shape, DTYPES[self.d_dtype], DEVICE)
        values, scales = jitgemm.empty_quantized(shape, ue8m0=self.d_dtype == "e4m3_ue8m0", device=DEVICE)
        values.view(torch.uint8).fill_(0x7F)
        scales.view(torch.int32).fill_(0x7FA5A5A5)
        return values, scales

    def call(self, d: Any = None, **more: Any) -> Any:
        """Run the operation."""
        d = self.d if d is None else d
        a: Any = self.a if self.a_scales is None else (self.a, self.a_scales)
        b: Any = self.b if self.b_scales is None else (self.b, self.b_scales)
        more["epilogue"] = self.epilogue
        operand = {BF16: "bf16", FP8: "fp8", FP4: "fp8_fp4"}[self.recipe]
        if self.fp4 is not None:
            b = self.fp4
        if self.kind is None:
            b = (self.b[0], self.b_scales[0]) if self.b_scales is not None else self.b[0]
            if self.fp4 is not None:
                b = self.fp4._replace(data=self.fp4.data[0], units=self.fp4.units[0])
            getattr(jitgemm, f"{operand}_gemm_nt")(a, b, d, **more)
            return d
        with settings.override(mk_alignment=self.alignment):
            if self.kind == "masked":
                getattr(jitgemm, f"m_grouped_{operand}_gemm_nt_masked")(a, b, d, self.values, 16, **more)
            else:
                more["use_psum_layout"] = self.kind == "psum"
                getattr(jitgemm, f"m_grouped_{operand}_gemm_nt_contiguous")(a, b, d, self.values, **more)
        return d

    def expected(self, d_dtype: str | None = None) -> Any:
        """D by the reference."""
        d = poisoned((*self.a.shape[:-1], self.columns), torch.float32, DEVICE) if d_dtype else self.output()
        e = self.epilogue
        fields = {"alpha": e.alpha, "bias": e.bias, "swiglu": e.swiglu, "limit": e.limit, "row_weights": e.row_weights}
        steps = epilogue_reference.Epilogue(**fields, gran_k=32 if self.d_dtype == "e4m3_ue8m0" else 128)
        given = {"a_scales": self.a_scales, "b_scales": self.b_scales, "recipe": self.recipe, "epilogue": steps}
        if self.kind is None:
            given["b_scales"] = None if self.b_scales is None else self.b_scales[0]
            epilogue_reference.gemm_into(self.a, self.b[0], d, **given)
        elif self.kind == "masked":
            grouped_reference.m_grouped_masked(self.a, self.b, d, self.values, **given)
        else:
            grouped_reference.m_grouped_contiguous(
                *(self.a, self.b, d, self.values),
                use_psum_layout=self.kind == "psum",
                alignment=self.alignment,
                **given,
            )
        return d

    def check(self, d: Any = None) -> None:
        """All rows that there are hold what they should; padding rows are zeros, their scales and others left alone."""
        d = self.d if d is None else d
        rest, pads = ~self.used, self.kind in ("contiguous", "psum")
        if self.d_dtype in DTYPES:
            assert same_bits(d[rest], torch.zeros_like(d[rest]) if pads else self.output()[rest])
            check_close(d[self.used], self.expected()[self.used], recipe=self.recipe, d_dtype=self.d_dtype)
            return
        values, scales = d
        clean_values, clean_scales = self.output()
        assert (values.view(torch.uint8)[rest] == (0 if pads else clean_values.view(torch.uint8)[rest])).all()
        assert torch.equal(scales.view(torch.int32)[rest], clean_scales.view(torch.int32)[rest])
        wanted = self.expected("fp32")[self.used].double()
        exact_values, exact_scales = (part[self.used] for part in self.expected())
        got, got_scales = values[self.used].float().double(), scales[self.used]
        if self.d_dtype == "e4m3_ue8m0":
            exponents, exact = (s.contiguous().view(torch.uint8).int() for s in (got_scales, exact_scales))
            assert (exponents - exact).abs().max() <= 1  # fp32 sums may lie on the other side of a power of two
            assert (exponents != exact).float().mean() < 0.01
            got_scales = unpack_ue8m0(got_scales.contiguous())
            step = 32
        else:
            assert torch.allclose(got_scales, exact_scales, rtol=2e-5 if self.recipe == BF16 else 2e-3, atol=0)
            step = 128
        of_columns = got_scales.double().repeat_interleave(step, -1)[:, : self.columns]
        # Half a unit in the last place of E4M3 (of subnormals 2^-10), and what sums may be off by: FP8 has 14 bits.
        of_sums = of_columns * (0.02 if self.recipe == BF16 else 448 * 2.0**-11)
        if self.recipe != BF16 and self.epilogue.swiglu:  # which grows by silu's slope times up, and by silu
            spread = float(self.b.float().square().mean().sqrt()) if self.recipe == FP4 else 1.0
            largest = 4.5 * self.k**0.5 * spread * 1.5  # of normally distributed sums, times alpha
            of_sums = of_sums + 2.0**-12 * largest * 2.1 * min(largest, self.epilogue.limit or largest)
        bound = torch.maximum(wanted.abs() / 16, of_columns * 2.0**-10) * 1.05 + of_sums
        error = (got * of_columns - wanted).abs()
        assert (error <= bound).all(), f"{int((error > bound).sum())} elements are off, by up to {error.max():g}"
        same = (values[self.used].view(torch.uint8) == exact_values.view(torch.uint8)).float().mean()
        assert same > 0.97, f"{float(same):.4f} of the codes are the reference's"

    def configs(self) -> list[GemmConfig]:
        """All tiles that calls choose from, one depth of each."""
        device, name = device_facts(0)[0], "swiglu" if self.epilogue.swiglu else "linear"
        if self.kind is None:
            dense = GemmProblem(self.n, self.k, self.recipe, None, "nt", self.d_dtype, False, name)
            offered = dense_heuristics.candidates(dense, ())
            legal = [c for c in offered if dense_heuristics.illegal(dense, c, device) is None]
        else:
            problem = GroupedProblem(
                *(self.n, self.k, self.recipe, self.groups, self.kind),
                d_dtype=self.d_dtype,
                alignment=self.alignment,
                epilogue=name,
            )
            offered = grouped_heuristics.candidates(problem)
            legal = [c for c in offered if grouped_heuristics.illegal(problem, c, device) is None]
        return list({(c.tile_m, c.tile_n, c.swap_ab, c.cluster_m, c.split_k > 1): c for c in legal}.values())


def full_epilogue(kind: str | None, n: int, swiglu: bool, m: int = 150) -> Epilogue:
    """All steps at once, with a bias and an alpha for each group where there are groups."""
    generator = torch.Generator(DEVICE).manual_seed(n)
    groups = len(COUNTS)

    def numbers(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=DEVICE)

    rows = {None: (m,), "masked": (groups, m)}.get(kind) or (Case(kind, BF16, Epilogue(), "bf16", 8, 8).a.shape[0],)
    return Epilogue(
        alpha=0.5 + (numbers(1) if kind is None else numbers(groups)),
        bias=numbers(n).bfloat16() - 0.5 if kind is None else numbers(groups, n) - 0.5,
        swiglu=swiglu,
        limit=1.5 if swiglu else None,
        row_weights=numbers(*rows),
    )


@pytest.mark.parametrize("d_dtype", OUTPUTS)
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("recipe", [FP8, FP4, BF16])
@pytest.mark.parametrize("kind", [None, "masked"])
def test_every_tile(kind: str | None, recipe: str, swiglu: bool, d_dtype: str) -> None:
    # The last blocks of scales are parts, gate's and up's each; of a cluster's last tiles one is a part, or not there.
    n = 456 if not swiglu else 720 if kind is None else 592
    case = Case(kind, recipe, full_epilogue(kind, n, swiglu), d_dtype, n, 400)
    for config in case.configs()[:: 3 if recipe == FP4 else 1]:
        d = case.output()
        with settings.override(config=str(config)):
            case.call(d)
        try:
            case.check(d)
        except AssertionError as error:
            raise AssertionError(f"{config}: {error}") from None


@pytest.mark.parametrize("cta", [0, 1])
@pytest.mark.parametrize(("config", "swiglu"), [("256x64x128 s5 c1x2", False), ("128x128x128 s6 c1x2", True)])
def test_far_fp4_scales_of_one_cta_of_a_cluster(config: str, swiglu: bool, cta: int) -> None:
    """Both walk along K as often, for they share tokens."""
    tile, n = GemmConfig.from_text(config).tile_n, 512
    case = Case(None, FP4, full_epilogue(None, n, swiglu), "e4m3", n, 1104, far=slice(cta * tile, (cta + 1) * tile))
    assert case.fp4 is not None and 0 < int((case.fp4.units < 0).sum()) <= tile
    with settings.override(config=config):
        case.call()
    case.check()


@pytest.mark.parametrize("d_dtype", ["bf16", "e4m3", "e4m3_ue8m0"])
@pytest.mark.parametrize("kind", ["contiguous", "psum"])
def test_contiguous_layouts(kind: str, d_dtype: str) -> None:
    for alignment in (128, 16, 1):  # the last: scales of A that start within 16 bytes
        for recipe in (FP8, BF16):
            case = Case(kind, recipe, Epilogue(swiglu=True), d_dtype, 512, 256, alignment=alignment)
            case.call()
            case.check()


@pytest.mark.parametrize("kind", [None, "masked"])
@pytest.mark.parametrize("field", ["alpha", "number", "bias", "row_weights", "limit", "none"])
def test_each_step_alone(kind: str | None, field: str) -> None:
    every = full_epilogue(kind, 512, True)
    epilogue = Epilogue(swiglu=True, alpha=-1.5) if field == "number" else Epilogue(swiglu=True)
    if field not in ("number", "none"):
        epilogue = dataclasses.replace(epilogue, **{field: getattr(every, field)})
    for d_dtype in ("bf16", "e4m3"):
        case = Case(kind, FP8, epilogue, d_dtype, 512, 384)
        case.call()
        case.check()


def test_c_comes_before_bias() -> None:
    bias = torch.arange(200, device=DEVICE, dtype=torch.float32)
    case = Case(None, FP8, Epilogue(alpha=2.0, bias=bias), "fp32", 200, 256)
    c = torch.randn(case.d.shape, device=DEVICE)
    case.call(c=c)
    plain = Case(None, FP8, Epilogue(alpha=2.0), "fp32", 200, 256)
    check_close(case.d, plain.expected() + c + bias, recipe=FP8, d_dtype="fp32")


@pytest.mark.parametrize("d_dtype", ["bf16", "e4m3", "e4m3_ue8m0"])
@pytest.mark.parametrize("config", ["64x128x64 s4 {}", "16x128x64 s4 {} swap"])
def test_nan_and_inf_reach_their_rows_only(config: str, d_dtype: str) -> None:
    case = Case(None, BF16, Epilogue(swiglu=True, limit=4.0), d_dtype, 512, 128)
    case.a[3, 5] = torch.nan
    case.a[40, 7] = torch.inf
    text = " ".join(config.format("c1x2" if d_dtype == "e4m3" else "").split())
    with settings.override(config=text):
        case.call()
    expected = case.expected()
    if d_dtype == "bf16":
        assert torch.equal(case.d.isnan(), expected.isnan())
        clean = torch.ones(150, dtype=torch.bool, device=DEVICE)
        clean[[3, 40]] = False
        check_close(case.d[clean], expected[clean], recipe=BF16, d_dtype="bf16")
        return
    assert torch.equal(case.d[0].float().isnan(), expected[0].float().isnan())
    if d_dtype == "e4m3":
        assert torch.equal(case.d[1].isnan(), expected[1].isnan())
        assert torch.equal(case.d[1].isinf(), expected[1].isinf())
    else:
        assert torch.equal(case.d[1][3], expected[1][3])


def test_small_magnitudes_get_the_smallest_scale() -> None:
    case = Case(None, BF16, Epilogue(alpha=1e-12), "e4m3", 256, 64)
    case.call()
    assert torch.allclose(case.d[1], torch.full_like(case.d[1], 1e-4 / 448), rtol=1e-6)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_the_same_bits_again(kind: str | None) -> None:
    case = Case(kind, FP8, Epilogue(swiglu=True), "e4m3", 1024, 512)
    first = case.call(case.output())
    for _ in range(20):
        again = case.call(case.output())
        assert torch.equal(first[0].view(torch.uint8), again[0].view(torch.uint8))
        assert torch.equal(first[1].view(torch.int32), again[1].view(torch.int32))


def test_a_captured_call_serves_other_counts_and_alphas() -> None:
    alpha = torch.ones(1, device=DEVICE)
    case = Case("masked", FP8, Epilogue(alpha=alpha, swiglu=True), "e4m3", 512, 256)
    case.call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.call()
    assert case.values is not None
    counts = torch.tensor([150, 0, 3, 0, 8, 100, 64, 1], dtype=torch.int32, device=DEVICE)
    case.values.copy_(counts)
    case.used.copy_(torch.arange(150, device=DEVICE)[None, :] < counts[:, None])
    alpha.fill_(0.25)
    for part, clean in zip(case.d, case.output(), strict=True):
        part.view(torch.uint8 if part.element_size() == 1 else torch.int32).copy_(
            clean.view(torch.uint8 if part.element_size() == 1 else torch.int32)
        )
    graph.replay()
    case.check()


@pytest.mark.parametrize("inner", [384, 192, 80])  # of a shard, too: 192 of 1536, whose second block is a part
def test_two_kernels_make_an_expert_layer(inner: int) -> None:
    groups, m, hidden = 4, 64, 512
    generator = torch.Generator(DEVICE).manual_seed(1)
    counts = torch.tensor([5, 64, 0, 33], dtype=torch.int32, device=DEVICE)

    def weights(n: int, k: int) -> tuple[Tensor, Tensor]:
        cast = [jitgemm.per_block_cast_to_fp8(random_matrix(n, k, generator, spread=False)) for _ in range(groups)]
        data = torch.stack([values.view(torch.uint8) for values, _ in cast])
        return data.view(torch.float8_e4m3fn), torch.stack([scales for _, scales in cast])

    gate, up, down = weights(inner, hidden), weights(inner, hidden), weights(hidden, inner)
    a, a_scales = jitgemm.per_token_cast_to_fp8(random_matrix(groups * m, hidden, generator, spread=False))
    operand = a.view(groups, m, hidden), jitgemm.get_mn_major_tma_aligned_tensor(a_scales.view(groups, m, -1))
    stacked = torch.cat([gate[0].view(torch.uint8), up[0].view(torch.uint8)], 1), torch.cat([gate[1], up[1]], 1)
    data, scales = jitgemm.interleave_gate_up(*stacked)
    between = jitgemm.empty_quantized((groups, m, inner), device=DEVICE)
    d = poisoned((groups, m, hidden), torch.bfloat16, DEVICE)
    interleaved = data.view(torch.float8_e4m3fn), scales
    jitgemm.m_grouped_fp8_gemm_nt_masked(operand, interleaved, between, counts, 32, epilogue=Epilogue(swiglu=True))
    jitgemm.m_grouped_fp8_gemm_nt_masked(between, down, d, counts, 32)
    expected = torch.empty_like(d)
    middle = jitgemm.empty_quantized((groups, m, inner), device=DEVICE)
    steps = epilogue_reference.Epilogue(swiglu=True)
    grouped_reference.m_grouped_masked(
        operand[0], interleaved[0], middle, counts, a_scales=operand[1], b_scales=scales, recipe=FP8, epilogue=steps
    )
    grouped_reference.m_grouped_masked(
        middle[0], down[0], expected, counts, a_scales=middle[1], b_scales=down[1], recipe=FP8
    )
    used = torch.arange(m, device=DEVICE)[None, :] < counts[:, None]
    # Codes that fp32 sums put on the other side of a rounding step differ by 1/8 in a few of the 384 terms.
    error = (d[used].double() - expected[used].double()).norm() / expected[used].double().norm()
    assert float(error) < 1e-2


def test_unaligned_outputs_and_rows() -> None:
    for d_dtype in ("bf16", "e4m3"):
        case = Case(None, BF16, Epilogue(swiglu=True), d_dtype, 16 * 13, 128, m=37)
        case.call()
        case.check()
        whole = case.d if d_dtype == "bf16" else case.d[0]
        wide = torch.zeros((37, case.columns + 3), dtype=whole.dtype, device=DEVICE)
        view = wide[:, 1 : 1 + case.columns]
        case.call(view if d_dtype == "bf16" else (view, case.d[1]))
        assert torch.equal(
            view.view(torch.int16 if d_dtype == "bf16" else torch.uint8),
            whole.view(torch.int16 if d_dtype == "bf16" else torch.uint8),
        )
        edges = wide.view(torch.int16 if d_dtype == "bf16" else torch.uint8)
        assert not edges[:, 0].any()
        assert not edges[:, 1 + case.columns :].any()


def test_compiled_calls_are_the_eager_ones() -> None:
    case = Case("masked", FP8, full_epilogue("masked", 512, True), "e4m3", 512, 256)
    case.call()

    def layer(a: Tensor) -> tuple[Tensor, Tensor]:
        d = jitgemm.empty_quantized((*a.shape[:-1], 256), device=DEVICE)
        jitgemm.m_grouped_fp8_gemm_nt_masked(
            (a, case.a_scales), (case.b, case.b_scales), d, case.values, 16, epilogue=case.epilogue
        )
        return d

    values, _ = torch.compile(layer, backend="aot_eager", fullgraph=True)(case.a)
    assert torch.equal(values.view(torch.uint8)[case.used], case.d[0].view(torch.uint8)[case.used])


def test_overlapping_outputs_are_refused() -> None:
    case = Case(None, BF16, Epilogue(), "e4m3", 128, 64)
    shared = case.d[0].view(torch.uint8).view(-1)[:640].view(torch.float32)[:150].view(150, 1)
    with pytest.raises(ProblemError, match="overlaps"):
        case.call((case.d[0], shared))
