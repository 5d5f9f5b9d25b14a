"""Grouped GEMMs along m on a GPU: against float64, with poison in all that must not be read or written."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import jitgemm
from benchmarks.operands import poisoned, random_matrix, same_bits
from jitgemm import settings
from jitgemm.errors import ProblemError
from jitgemm.families.gemm import GemmConfig
from jitgemm.families.grouped import GroupedProblem
from jitgemm.heuristics.grouped import candidates, illegal
from jitgemm.plan import device_facts
from jitgemm.reference import grouped as reference
from jitgemm.reference.gemm import check_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = torch.device("cuda", 0)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FP8 = "fp8_1x128_128x128"
KINDS = ("masked", "contiguous", "psum")


def poison(tensor: Tensor, rows: Tensor) -> None:
    """NaN into the rows (of the last dimension but one) that a mask names."""
    bits = {1: (torch.uint8, 0x7F), 2: (torch.int16, 0x7FA5), 4: (torch.int32, 0x7FA5A5A5)}[tensor.element_size()]
    tensor.view(bits[0])[rows] = bits[1]


class Case:
    """Operands whose padding rows are NaN, an output of NaN, and what the rows of groups should be.

    Args:
        kind: ``masked``, ``contiguous`` or ``psum``.
        recipe: of ``GROUPED_RECIPES``.
        counts: rows of each group; masked ones may be negative or above ``max_m``.
        behind: rows of padding behind the last group.
    """

    def __init__(
        self,
        kind: str,
        recipe: str,
        counts: Sequence[int],
        n: int,
        k: int,
        *,
        max_m: int = 0,
        alignment: int = 128,
        d_dtype: str = "bf16",
        layout: str = "nt",
        seed: int = 0,
        behind: int = 0,
    ) -> None:
        self.kind, self.recipe, self.alignment, self.d_dtype, self.layout = kind, recipe, alignment, d_dtype, layout
        self.groups, self.n, self.k = len(counts), n, k
        generator = torch.Generator(DEVICE).manual_seed(seed)
        if kind == "masked":
            self.rows = max_m
            self.values = torch.tensor(list(counts), dtype=torch.int32, device=DEVICE)
            used = torch.arange(max_m, device=DEVICE)[None, :] < self.values[:, None]
            shape: tuple[int, ...] = (self.groups, max_m)
        else:
            index, ends = [], []
            for group, count in enumerate(counts):
                index += [-1] * (-len(index) % alignment) + [group] * count
                ends.append(len(index) if count else (ends[-1] if ends else 0))
            index += [-1] * (-len(index) % alignment + behind)
            self.rows = len(index)
            self.values = torch.tensor(ends if kind == "psum" else index, dtype=torch.int32, device=DEVICE)
            used = torch.tensor(index, device=DEVICE) >= 0
            shape = (self.rows,)
        self.used = used
        a = random_matrix(used.numel(), k, generator, spread=True)
        b = random_matrix(self.groups * n, k, generator, spread=True)
        self.a_scales: Tensor | None = None
        self.b_scales: Tensor | None = None
        if recipe == FP8:
            a, a_scales = jitgemm.per_token_cast_to_fp8(a)
            self.a_scales = a_scales.reshape(*shape, -1).contiguous()
            cast = [jitgemm.per_block_cast_to_fp8(part) for part in b.view(self.groups, n, k)]
            self.b, self.b_scales = (
                torch.stack([data.view(torch.uint8) for data, _ in cast]).view(a.dtype),
                torch.stack([scales for _, scales in cast]),
            )
        else:
            self.b = b.view(self.groups, n, k)
        self.a = a.view(*shape, k)
        for tensor in (self.a, self.a_scales):
            if tensor is not None:
                poison(tensor, ~used)
        if self.a_scales is not None:
            self.a_scales = jitgemm.get_mn_major_tma_aligned_tensor(self.a_scales)
        self.d = self.output()

    def output(self) -> Tensor:
        """D of NaN."""
        return poisoned((*self.a.shape[:-1], self.n), DTYPES[self.d_dtype], DEVICE)

    def call(self, d: Tensor | None = None, expected_m: int = 8, **more: Any) -> Tensor:
        """Run the operation."""
        d = self.d if d is None else d
        a: Any = self.a if self.a_scales is None else (self.a, self.a_scales)
        b: Any = self.b if self.b_scales is None else (self.b, self.b_scales)
        name = "m_grouped_fp8_gemm" if self.recipe == FP8 else "m_grouped_bf16_gemm"
        with settings.override(mk_alignment=self.alignment):
            if self.kind == "masked":
                getattr(jitgemm, f"{name}_nt_masked")(a, b, d, self.values, expected_m, **more)
                return d
            if self.layout == "nn":
                b = self.b.transpose(1, 2).contiguous()
            if self.kind == "psum":
                more = {"use_psum_layout": True, **more}
            getattr(jitgemm, f"{name}_{self.layout}_contiguous")(a, b, d, self.values, **more)
        return d

    def expected(self) -> Tensor:
        """D by the reference; its other rows are NaN."""
        d = self.output()
        scales = {"a_scales": self.a_scales, "b_scales": self.b_scales, "recipe": self.recipe}
        if self.kind == "masked":
            reference.m_grouped_masked(self.a, self.b, d, self.values, **scales)
        else:
            reference.m_grouped_contiguous(
                *(self.a, self.b, d, self.values),
                use_psum_layout=self.kind == "psum",
                alignment=self.alignment,
                **scales,
            )
        return d

    def check(self, d: Tensor | None = None, zeros: bool = True) -> None:
        """The groups' rows are right, and others are zeros, or where there are no such have not been written."""
        d = self.d if d is None else d
        others = d[~self.used]
        if self.kind == "masked" or not zeros:
            assert same_bits(others, self.output()[~self.used])
        else:
            assert same_bits(others, torch.zeros_like(others))
        if bool(self.used.any()):
            check_close(d[self.used], self.expected()[self.used], recipe=self.recipe, d_dtype=self.d_dtype)


def configs_of(kind: str, recipe: str, layout: str = "nt", alignment: int = 128) -> list[GemmConfig]:
    """All tiles that calls choose from, one depth of each."""
    problem = GroupedProblem(4096, 4096, recipe, 8, kind, None, layout, alignment=alignment)
    device = device_facts(0)[0]
    legal = [config for config in candidates(problem) if illegal(problem, config, device) is None]
    return list({(c.tile_m, c.tile_n, c.swap_ab): c for c in legal}.values())


RAGGED = (0, 1, 7, 8, 0, 64, 65, 127, 128, 129, 200, 3, 0, 0, 320, 17)


@pytest.mark.parametrize("recipe", [FP8, "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_on_ragged_groups(kind: str, recipe: str) -> None:
    case = Case(kind, recipe, RAGGED, n=328, k=400 if recipe == FP8 else 200, max_m=330)
    for config in configs_of(kind, recipe):
        d = case.output()
        with settings.override(config=str(config)):
            case.call(d)
        try:
            case.check(d)
        except AssertionError as error:
            raise AssertionError(f"{config}: {error}") from None


@pytest.mark.parametrize("kind", ["contiguous", "psum"])
def test_weights_along_n(kind: str) -> None:
    for n, k in ((328, 200), (64, 72), (1000, 512)):
        case = Case(kind, "bf16", RAGGED, n=n, k=k, layout="nn")
        for config in configs_of(kind, "bf16", "nn"):
            d = case.output()
            with settings.override(config=str(config)):
                case.call(d)
            case.check(d)


@pytest.mark.parametrize("kind", ["contiguous", "psum"])
def test_every_tile_on_groups_that_start_at_any_row(kind: str) -> None:
    case = Case(kind, FP8, RAGGED, n=328, k=400, alignment=1)
    for config in configs_of(kind, FP8, alignment=1):
        d = case.output()
        with settings.override(config=str(config)):
            case.call(d)
        try:
            case.check(d)
        except AssertionError as error:
            raise AssertionError(f"{config}: {error}") from None


@pytest.mark.parametrize("alignment", [128, 64, 48, 32, 16, 8, 4, 2, 1])
@pytest.mark.parametrize("kind", ["contiguous", "psum"])
@pytest.mark.parametrize("recipe", [FP8, "bf16"])
def test_alignments(recipe: str, kind: str, alignment: int) -> None:
    for seed in range(3):
        draw = random.Random(seed)
        counts = [draw.choice([0, 1, alignment, draw.randint(0, 300)]) for _ in range(draw.choice([1, 5, 40]))]
        counts[0] = max(counts[0], 1)
        case = Case(kind, recipe, counts, n=256, k=512, alignment=alignment, seed=seed)
        case.call()
        case.check()


@pytest.mark.parametrize("d_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("recipe", [FP8, "bf16"])
@pytest.mark.parametrize("n", [1000, 1001, 8])
def test_masked_counts(recipe: str, d_dtype: str, n: int) -> None:
    counts = (0, 1, 200, 201, 10**9, -7, 199, 64)
    case = Case("masked", recipe, counts, n=n, k=512, max_m=200, d_dtype=d_dtype)
    for expected_m in (1, 16, 64, 200):
        d = case.output()
        case.call(d, expected_m)
        case.check(d)


def test_no_group_has_rows() -> None:
    case = Case("masked", FP8, (0, 0, 0), n=256, k=512, max_m=64)
    case.call()
    case.check()
    case = Case("contiguous", FP8, (1, 1), n=256, k=512)
    case.values.fill_(-1)
    case.used.fill_(False)
    case.call()
    case.check()


def test_many_groups() -> None:
    draw = random.Random(0)
    counts = [draw.choice([0, 0, 0, 1, 2, 9]) for _ in range(1024)]
    case = Case("masked", FP8, counts, n=128, k=256, max_m=16)
    case.call()
    case.check()
    case = Case("psum", FP8, counts, n=128, k=256, alignment=8)
    case.call()
    case.check()


@pytest.mark.parametrize("recipe", [FP8, "bf16"])
def test_a_captured_call_serves_other_counts(recipe: str) -> None:
    case = Case("masked", recipe, (3, 0, 64, 20), n=512, k=1024, max_m=64)
    with settings.override(debug=True):
        case.call(expected_m=20)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with settings.override(debug=True), torch.cuda.graph(graph):  # which checks no layout that is yet to come
        case.call(expected_m=20)
    for counts in ((3, 0, 64, 20), (0, 0, 0, 0), (64, 64, 64, 64), (1, 70, -1, 5)):
        fresh = Case("masked", recipe, counts, n=512, k=1024, max_m=64)
        case.a.copy_(fresh.a)
        if case.a_scales is not None and fresh.a_scales is not None:
            case.a_scales.copy_(fresh.a_scales)
        case.values.copy_(fresh.values)
        case.d.copy_(case.output())
        graph.replay()
        torch.cuda.synchronize()
        fresh.check(case.d)


def test_the_same_bits_every_time() -> None:
    for kind in KINDS:
        case = Case(kind, FP8, RAGGED, n=512, k=2048, max_m=330)
        first = case.call().clone()
        for _ in range(20):
            assert same_bits(case.call(case.output()), first)


def test_an_index_that_makes_no_sense_touches_nothing_else() -> None:
    case = Case("contiguous", "bf16", (128,) * 4, n=256, k=256)
    case.values[128:256] = 7
    case.values[256:384] = -(2**31)
    case.used[128:384] = False
    case.call()
    assert not bool(case.d[~case.used].any())
    case = Case("psum", "bf16", (128,) * 4, n=256, k=256)
    case.values.copy_(torch.tensor([2**31 - 1, -5, 2**31 - 1, 100], dtype=torch.int32))
    case.call()
    torch.cuda.synchronize()


def test_layouts_are_checked_where_that_is_asked() -> None:
    masked = Case("masked", "bf16", (5, 40, 65, 64), n=256, k=256, max_m=64)
    index = Case("contiguous", "bf16", (128, 128), n=256, k=256)
    index.values[200] = 9
    psum = Case("psum", "bf16", (128, 128), n=256, k=256)
    psum.values[1] = 257
    with settings.override(debug=True):
        for case, message in (
            (masked, r"masked_m\[2\] is 65"),
            (index, r"grouped_layout\[200\] is 9"),
            (psum, r"grouped_layout\[1\] is 257"),
        ):
            with pytest.raises(ProblemError, match=message):
                case.call()
            assert same_bits(case.d, case.output())
        masked.values[2] = 60
        masked.used[2, 60:] = False
        masked.call()
    masked.check()


def test_d_with_margins_and_strides() -> None:
    case = Case("masked", FP8, (5, 40, 0, 64), n=256, k=512, max_m=64)
    for columns, first in ((264, 0), (272, 8), (261, 3)):
        around = poisoned((4, 70, columns), torch.bfloat16, DEVICE)
        d = around[:, 3:67, first : first + 256]
        case.call(d)
        case.check(d)
        d.copy_(case.output())
        assert same_bits(around, poisoned(around.shape, torch.bfloat16, DEVICE))


def test_slices_of_weights() -> None:
    case = Case("masked", "bf16", (5, 40, 0, 64), n=256, k=512, max_m=64)
    wide = poisoned((4, 300, 640), torch.bfloat16, DEVICE)
    wide[:, 16:272, 64:576] = case.b
    case.b = wide[:, 16:272, 64:576]
    case.call()
    case.check()


@pytest.mark.parametrize("kind", ["contiguous", "psum"])
@pytest.mark.parametrize("alignment", [128, 8, 1])
def test_zeros_in_rows_of_no_group(kind: str, alignment: int) -> None:
    draw = random.Random(alignment)
    for counts in ((5, 200, 0, 64), (0, 0, 0), (1,) * 70, [draw.choice([0, 1, 300]) for _ in range(200)]):
        case = Case(kind, "bf16", counts, n=200, k=64, alignment=alignment, behind=700)
        for columns, first in ((200, 0), (208, 8), (205, 3)):  # aligned, apart, and such that TMA can't store it
            around = poisoned((case.rows + 2, columns), torch.bfloat16, DEVICE)
            d = around[1:-1, first : first + 200]
            case.call(d)
            case.check(d)
            case.call(d, ensure_zero_padding=False)
            d[~case.used] = case.output()[~case.used]
            case.call(d, ensure_zero_padding=False)
            case.check(d, zeros=kind == "contiguous")
            d.copy_(case.output())
            assert same_bits(around, poisoned(around.shape, torch.bfloat16, DEVICE))


def test_zeros_follow_the_layout_of_a_captured_call() -> None:
    def of(counts: Sequence[int]) -> Case:
        return Case("psum", "bf16", counts, n=256, k=256, behind=512 - sum(-(-count // 128) * 128 for count in counts))

    case = of((100, 3, 0, 64))
    case.call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.call()
    for counts in ((100, 3, 0, 64), (1, 128, 1, 1), (0, 0, 0, 0)):
        fresh = of(counts)
        for ours, theirs in ((case.a, fresh.a), (case.values, fresh.values), (case.d, case.output())):
            ours.copy_(theirs)
        graph.replay()
        torch.cuda.synchronize()
        fresh.check(case.d)


def test_scales_in_any_layout() -> None:
    for kind in KINDS:
        case = Case(kind, FP8, (5, 40, 0, 64), n=256, k=1024, max_m=64)
        assert case.a_scales is not None
        case.a_scales = case.a_scales.contiguous()
        case.call()
        case.check()


@pytest.mark.parametrize("pdl", [False, True])
def test_programmatic_launches_in_a_row(pdl: bool) -> None:
    case = Case("masked", FP8, (5, 40, 0, 64), n=512, k=512, max_m=64)
    with settings.override(pdl=pdl):
        for _ in range(10):
            case.d.copy_(case.output())
            case.call()
    case.check()


@pytest.mark.parametrize("num_sms", [1, 7, 132])
def test_fewer_multiprocessors(num_sms: int) -> None:
    case = Case("masked", FP8, (5, 40, 0, 64), n=1024, k=512, max_m=64)
    with settings.override(num_sms=num_sms):
        case.call()
    case.check()


def test_compiled_by_torch() -> None:
    case = Case("masked", "bf16", (5, 40, 0, 64), n=256, k=512, max_m=64)

    @torch.compile(fullgraph=True)
    def step(a: Tensor, b: Tensor, d: Tensor, counts: Tensor) -> Tensor:
        jitgemm.m_grouped_bf16_gemm_nt_masked(a, b, d, counts, 20)
        return d * 2

    step(case.a, case.b, case.d, case.values)
    case.check()


def test_bad_arguments() -> None:
    case = Case("masked", FP8, (5, 40), n=256, k=512, max_m=64)
    with pytest.raises(ProblemError, match="masked_m is on cpu"):
        case.values = case.values.cpu()
        case.call()


def test_real_sizes() -> None:
    for n, k in ((4096, 7168), (7168, 2048)):
        case = Case("masked", FP8, (192, 1, 20, 256), n=n, k=k, max_m=256)
        for expected_m in (1, 20, 192):
            d = case.output()
            case.call(d, expected_m)
            case.check(d)
