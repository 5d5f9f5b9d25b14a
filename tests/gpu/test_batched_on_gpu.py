"""Several GEMMs in one launch on a GPU: against float64, with poison in all that must not be read or written."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from sums import in_order, some_parts, within
from torch import Tensor

import jitgemm
from benchmarks import harness
from benchmarks.operands import poisoned, random_matrix, same_bits
from jitgemm import settings
from jitgemm.errors import ProblemError
from jitgemm.families.batched import FAMILY, BatchedProblem
from jitgemm.families.gemm import GemmConfig, kernel_shape
from jitgemm.heuristics.batched import candidates, illegal
from jitgemm.ops.batched import launch_of_sum
from jitgemm.ops.plain import Gpu
from jitgemm.plan import device_facts
from jitgemm.reference import einsum as reference_einsum
from jitgemm.reference import grouped as reference_grouped
from jitgemm.reference.gemm import check_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = torch.device("cuda", 0)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROWS, BLOCKS = "fp8_1x128_1x128", "fp8_1x128_128x128"
PEER = {ROWS: (1, 1, 128), BLOCKS: (1, 128, 128)}
HEADS = ("bhr,hdr->bhd", "bhd,hdr->bhr", "bhd,bhr->hdr")


def normal(shape: Sequence[int], seed: int) -> Tensor:
    """Random bf16 in another order of magnitude each 128 elements."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    *outer, last = shape
    return random_matrix(torch.Size(outer).numel(), last, generator, spread=True).view(*shape)


class Einsum:
    """Operands of an expression, and what its output should be.

    Args:
        expr: one of ``HEADS`` or ``bmk,bnk->mn``.
        recipe: ``bf16`` or one of FP8.
        sizes: of the letters.
        margin: elements behind the last dimension of each operand, poison.
        d_dtype: the output's.
        accumulate: whether C is added.
    """

    def __init__(
        self, expr: str, recipe: str = "bf16", *, margin: int = 0, d_dtype: str = "bf16", accumulate: bool = False,
        seed: int = 0, **sizes: int,
    ) -> None:  # fmt: skip
        self.expr, self.recipe, self.d_dtype = expr, recipe, d_dtype
        inputs, output = expr.split("->")
        left, right = inputs.split(",")
        (summed,) = set(left) & set(right) - set(output) - {"b" if expr.startswith("bmk") else ""}
        self.a, self.a_scales = self._operand([*left], summed, sizes, margin, seed, 1)
        self.b, self.b_scales = self._operand([*right], summed, sizes, margin, seed + 1, 128 if recipe == BLOCKS else 1)
        self.shape = tuple(sizes[letter] for letter in output)
        self.c = normal(self.shape, seed + 2).to(DTYPES[d_dtype]) if accumulate else None

    def _operand(
        self, letters: list[str], summed: str, sizes: dict[str, int], margin: int, seed: int, rows: int
    ) -> tuple[Tensor, Tensor | None]:
        x = normal([sizes[letter] for letter in letters], seed)
        if self.recipe == "bf16":
            return _within(x, margin), None
        # As [groups, rows, k] for the cast, and back.
        other = next(letter for letter in letters if letter not in (summed, "h"))
        order = [letters.index(letter) for letter in ("h", other, summed)]
        back = [order.index(axis) for axis in range(3)]
        cast = jitgemm.per_block_cast_to_fp8 if rows == 128 else jitgemm.per_token_cast_to_fp8
        parts = [cast(part.contiguous()) for part in x.permute(order)]
        data = torch.stack([part.view(torch.uint8) for part, _ in parts]).view(torch.float8_e4m3fn)
        scales = torch.stack([part for _, part in parts])
        return _within(data.permute(back).contiguous(), margin), scales.permute(back)

    def output(self) -> Tensor:
        """D of NaN."""
        return poisoned(self.shape, DTYPES[self.d_dtype], DEVICE)

    def call(self, d: Tensor | None = None, c: Tensor | None = None, **more: Any) -> Tensor:
        """Run the operation."""
        d, c = self.output() if d is None else d, self.c if c is None else c
        if self.a_scales is None or self.b_scales is None:
            jitgemm.einsum(self.expr, self.a, self.b, d, c, **more)
        else:
            a, b = (self.a, self.a_scales), (self.b, self.b_scales)
            jitgemm.fp8_einsum(self.expr, a, b, d, c, PEER[self.recipe], **more)
        return d

    def expected(self) -> Tensor:
        """D by the reference."""
        d = self.output()
        if self.a_scales is None or self.b_scales is None:
            reference_einsum.einsum(self.expr, self.a, self.b, d, self.c)
        else:
            a, b = (self.a, self.a_scales), (self.b, self.b_scales)
            reference_einsum.fp8_einsum(self.expr, a, b, d, self.c, recipe=self.recipe)
        return d

    def check(self, d: Tensor) -> None:
        """Compare with the reference."""
        check_close(d.flatten(0, -2), self.expected().flatten(0, -2), recipe=self.recipe, d_dtype=self.d_dtype)


def _within(x: Tensor, margin: int) -> Tensor:
    """A copy with poison behind its last dimension."""
    *outer, last = x.shape
    bits = {1: torch.uint8, 2: torch.int16}[x.element_size()]
    wide = poisoned((*outer, last + margin), x.dtype, x.device)
    wide.view(bits)[..., :last] = x.view(bits)
    return wide[..., :last]


def configs_of(problem: BatchedProblem) -> list[GemmConfig]:
    """Of the tiles that calls choose from one of each structure: warpgroups, waves, clusters, splits, stores."""
    device, found = device_facts(0)[0], {}
    for config in candidates(problem, ()):
        if illegal(problem, config, device) is not None:
            continue
        shape = kernel_shape(problem.dense.without_sizes(), config)
        blocks = (config.cluster_m, config.cluster_n, config.split_k > 1, config.swap_ab)
        loops = (shape.math_warpgroups, shape.waves, shape.chain > 1, shape.column_scale_blocks > 1)
        found[blocks, loops, shape.store_columns < shape.mma_n] = config
    return list(found.values())


HEADS_WITH_TILES = [
    ("bhr,hdr->bhd", BLOCKS, "nt"),
    ("bhr,hdr->bhd", ROWS, "nt"),
    ("bhr,hdr->bhd", "bf16", "nt"),
    ("bhd,hdr->bhr", "bf16", "nn"),
    ("bhd,bhr->hdr", "bf16", "tn"),
]


def heads_problem(recipe: str, layout: str) -> BatchedProblem:
    """What ``test_every_tile`` asks; the smallest K that any of its expressions has."""
    return BatchedProblem(328, 328, recipe, 3, "batched", 200, layout)


def k_problem(recipe: str) -> BatchedProblem:
    """What ``test_every_tile_of_groups_along_k`` asks."""
    return BatchedProblem(264, 4096, recipe, 7, "k_grouped", 328, "nt" if recipe == ROWS else "tn", "fp32")


@pytest.fixture(scope="module")
def every_tile() -> None:
    """Kernels of the tests that go through tiles, compiled by several processes."""
    problems = [heads_problem(recipe, layout) for _, recipe, layout in HEADS_WITH_TILES]
    problems += [k_problem(recipe) for recipe in (ROWS, "bf16")]
    arch = device_facts(0)[0].arch.name
    specs = [FAMILY.spec(problem, config, arch) for problem in problems for config in configs_of(problem)]
    assert not harness.build_all(specs, min(8, len(os.sched_getaffinity(0))))


@pytest.mark.parametrize(("expr", "recipe", "layout"), HEADS_WITH_TILES)
def test_every_tile(every_tile: None, expr: str, recipe: str, layout: str) -> None:
    case = Einsum(expr, recipe, b=200, h=3, r=1040, d=328)
    for config in configs_of(heads_problem(recipe, layout)):
        with settings.override(config=str(config)):
            d = case.call()
        try:
            case.check(d)
        except AssertionError as error:
            raise AssertionError(f"{config}: {error}") from None


@pytest.mark.parametrize("d_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("expr", HEADS)
def test_bf16_heads(expr: str, d_dtype: str) -> None:
    for seed, (b, h, r, d) in enumerate(
        [(1, 1, 8, 8), (4, 5, 512, 128), (33, 3, 136, 72), (130, 2, 64, 264), (8, 2, 1000, 8)]
    ):
        for margin in (0, 128):
            for accumulate in (False, True):
                case = Einsum(
                    *(expr,), margin=margin, d_dtype=d_dtype, accumulate=accumulate, seed=seed, b=b, h=h, r=r, d=d
                )  # fmt: skip
                case.check(case.call())


@pytest.mark.parametrize("expr", HEADS)
def test_fp8_heads(expr: str) -> None:
    recipes = (ROWS,) if expr == "bhd,bhr->hdr" else (ROWS, BLOCKS)
    for recipe in recipes:
        for seed, (b, h, r, d) in enumerate(
            [(16, 1, 128, 128), (4, 3, 512, 128), (48, 5, 144, 272), (132, 2, 640, 64)]
        ):
            if expr == "bhd,bhr->hdr":
                b += -b % 16
            for d_dtype in DTYPES:
                case = Einsum(expr, recipe, d_dtype=d_dtype, accumulate=seed == 1, seed=seed, b=b, h=h, r=r, d=d)
                case.check(case.call())


def test_real_heads() -> None:
    for b in (4, 32, 128):
        for recipe in ("bf16", BLOCKS):
            case = Einsum("bhr,hdr->bhd", recipe, b=b, h=8, r=4096, d=1024)
            case.check(case.call())
        case = Einsum("bhd,hdr->bhr", margin=128, b=b, h=128, r=512, d=128)
        case.check(case.call())


@pytest.mark.parametrize("d_dtype", ["bf16", "fp32"])
def test_sums_of_batches(d_dtype: str) -> None:
    for b, m, n, k in ((1, 8, 8, 8), (7, 136, 72, 40), (129, 128, 384, 128), (300, 264, 201, 72), (1000, 1, 7, 64)):
        for accumulate in (False, True):
            case = Einsum("bmk,bnk->mn", d_dtype=d_dtype, accumulate=accumulate, b=b, m=m, n=n, k=k)
            first = case.call()
            case.check(first)
            for columns, start in ((n + 5, 3), (n + -n % 8 + 8, 8)):  # rows that start anywhere, or at 16 bytes
                d, around = within(case.output(), columns, start)
                assert same_bits(case.call(d), first)
                if case.c is not None:  # in place; and C in another tensor of other strides
                    d.copy_(case.c)
                    assert same_bits(case.call(d, d), first)
                    assert same_bits(case.call(d, within(case.c, n + 3, 1)[0]), first)
                d.fill_(torch.nan)
                assert bool(around.isnan().all())


@pytest.mark.parametrize("d_dtype", ["bf16", "fp32"])
def test_parts_are_added_up_in_order(d_dtype: str) -> None:
    problem = BatchedProblem(8, 64, "bf16", 2, "batch_sum", d_dtype="fp32")
    shapes = ((44, 128, 384), (43, 257, 130), (2, 1024, 1024), (11, 130, 777), (132, 64, 64), (264, 16, 17), (33, 1, 1))
    for seed, (num_parts, m, n) in enumerate(shapes):
        padded, parts = some_parts(num_parts, m, n, torch.Generator(DEVICE).manual_seed(seed))
        c = normal((m, n), seed + 1).to(DTYPES[d_dtype])
        for columns, start in ((n + -n % 8, 0), (n + 5, 3)):
            for added in (None, c, within(c, n + 3, 1)[0]):
                d, _ = within(torch.full_like(c, torch.nan), columns, start)
                launch = launch_of_sum(Gpu(d, problem), num_parts, d, added)
                c_address = 0 if added is None else added.data_ptr()
                launch(torch.cuda.current_stream().cuda_stream, padded.data_ptr(), c_address, d.data_ptr())
                assert same_bits(d.contiguous(), in_order(parts, added, d.dtype))


def test_parts_of_calls_in_a_row_do_not_mix() -> None:
    sizes = ((129, 128, 384, 128), (300, 264, 201, 72), (1000, 1, 7, 64))
    cases = [
        Einsum("bmk,bnk->mn", d_dtype="fp32", seed=9 * i, b=b, m=m, n=n, k=k) for i, (b, m, n, k) in enumerate(sizes)
    ]
    expected = []
    for case in cases:
        expected.append(case.call())
        torch.cuda.synchronize()
        case.check(expected[-1])
    found = [[case.output() for case in cases] for _ in range(20)]
    torch.cuda.synchronize()
    for outputs in found:
        for case, d in zip(cases, outputs, strict=True):
            case.call(d)
    for outputs in found:
        for d, first in zip(outputs, expected, strict=True):
            assert same_bits(d, first)


@pytest.mark.parametrize("d_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("recipe", ["bf16", BLOCKS])
def test_adding_to_d_itself(recipe: str, d_dtype: str) -> None:
    for d in (128, 130):  # 130 columns are stored without the copy engine
        case = Einsum("bhr,hdr->bhd", recipe, d_dtype=d_dtype, accumulate=True, b=70, h=3, r=256, d=d)
        assert case.c is not None
        out = case.c.clone()
        case.call(out, out)
        case.check(out)
        assert same_bits(out, case.call())


@pytest.mark.parametrize("expr", ["bhr,hdr->bhd", "bmk,bnk->mn"])
def test_adding_to_another_view_of_d(expr: str) -> None:
    case = Einsum(expr, d_dtype="fp32", accumulate=True, b=70, h=3, r=256, d=128, m=128, n=384, k=64)
    assert case.c is not None
    expected = case.call()
    case.check(expected)

    def step(before: Tensor) -> Tensor:
        d = before * 1
        jitgemm.einsum(expr, case.a, case.b, d, d.view(d.shape))
        return d

    assert same_bits(step(case.c), expected)
    assert same_bits(torch.compile(step, fullgraph=True)(case.c), expected)


@pytest.mark.parametrize("d_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_sums_of_batches_are_captured_and_launched_again(accumulate: bool, d_dtype: str) -> None:
    case = Einsum("bmk,bnk->mn", d_dtype=d_dtype, accumulate=accumulate, b=129, m=128, n=384, k=128)
    expected, start = case.call(), case.output() if case.c is None else case.c
    d = start.clone()
    c = d if accumulate else None
    case.call(d, c)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.call(d, c)
    for _ in range(3):
        d.copy_(start)
        graph.replay()
        assert same_bits(d, expected)
    with settings.override(num_sms=20):
        case.check(case.call())


def test_an_output_with_margins() -> None:
    case = Einsum("bhr,hdr->bhd", BLOCKS, b=20, h=3, r=256, d=200)
    for columns, first in ((208, 0), (216, 8), (207, 3)):
        around = poisoned((20, 4, columns), torch.bfloat16, DEVICE)
        d = around[:, :3, first : first + 200]
        case.call(d)
        case.check(d.contiguous())
        d.copy_(case.output())
        assert same_bits(around, poisoned(around.shape, torch.bfloat16, DEVICE))


def test_nan_stays_in_its_head_and_row() -> None:
    for recipe in ("bf16", BLOCKS):
        case = Einsum("bhr,hdr->bhd", recipe, b=20, h=4, r=384, d=136)
        case.a.view(torch.uint8 if recipe == BLOCKS else torch.int16)[7, 2] = 0x7F if recipe == BLOCKS else 0x7FC0
        d = case.call()
        assert bool(d[7, 2].isnan().all())
        assert int(d.isnan().sum()) == 136


def test_splitting_k_is_opt_in() -> None:
    case = Einsum("bhr,hdr->bhd", b=4, h=2, r=4096, d=128)
    with settings.override(split_k=4):
        d = case.call()
    case.check(d)
    for _ in range(5):
        with settings.override(split_k=4):
            assert same_bits(case.call(), d)


def test_einsum_as_cublas_computes_it() -> None:
    for expr in HEADS:
        case = Einsum(expr, d_dtype="fp32", accumulate=True, b=48, h=3, r=136, d=72)
        case.check(case.call(use_cublaslt=True))


# -- Heads with holes.


@pytest.mark.parametrize("splits", [(128, 64, 128), (64, 32, 128), (24, 8, 40), (5, 3, 11), (0, 16, 64), (64, 0, 64)])
@pytest.mark.parametrize("d_dtype", ["bf16", "fp32"])
def test_holes_of_heads(splits: tuple[int, int, int], d_dtype: str) -> None:
    left, mid, right = splits
    for m, heads in ((1, 3), (130, 5), (300, 16)):
        n = heads * (left + right)
        a, a_scales = jitgemm.per_token_cast_to_fp8(normal((m, 512), 1))
        b, b_scales = jitgemm.per_block_cast_to_fp8(normal((n, 512), 2))
        expected = poisoned((m, heads * sum(splits)), DTYPES[d_dtype], DEVICE)
        reference_einsum.fp8_gemm_nt_skip_head_mid((a, a_scales), (b, b_scales), expected, splits)
        d = poisoned(expected.shape, expected.dtype, DEVICE)
        jitgemm.fp8_gemm_nt_skip_head_mid((a, a_scales), (b, b_scales), d, splits)
        hole = torch.zeros(sum(splits), dtype=torch.bool, device=DEVICE)
        hole[left : left + mid] = True
        hole = hole.repeat(heads)
        assert same_bits(d[:, hole], poisoned((m, heads * mid), expected.dtype, DEVICE))
        check_close(d[:, ~hole], expected[:, ~hole], recipe=BLOCKS, d_dtype=d_dtype)


def test_holes_with_every_tile(every_tile: None) -> None:
    m, heads, splits = 200, 3, (128, 64, 128)
    a, a_scales = jitgemm.per_token_cast_to_fp8(normal((m, 1024), 1))
    b, b_scales = jitgemm.per_block_cast_to_fp8(normal((heads * 256, 1024), 2))
    expected = poisoned((m, heads * 320), torch.bfloat16, DEVICE)
    reference_einsum.fp8_gemm_nt_skip_head_mid((a, a_scales), (b, b_scales), expected, splits)
    written = ~expected.isnan()
    for config in configs_of(heads_problem(BLOCKS, "nt")):
        d = poisoned(expected.shape, expected.dtype, DEVICE)
        with settings.override(config=str(config)):
            jitgemm.fp8_gemm_nt_skip_head_mid((a, a_scales), (b, b_scales), d, splits)
        assert same_bits(d[~written], expected[~written]), str(config)
        check_close(d[written][None], expected[written][None], recipe=BLOCKS, d_dtype="bf16", what=str(config))


# -- Groups along K.


class KGrouped:
    """Operands of groups along K."""

    def __init__(
        self,
        recipe: str,
        ks: Sequence[int],
        m: int,
        n: int,
        *,
        layout: str = "tn",
        d_dtype: str = "fp32",
        seed: int = 0,
    ) -> None:
        self.recipe, self.ks, self.m, self.n, self.layout, self.d_dtype = recipe, list(ks), m, n, layout, d_dtype
        self.a, self.a_scales = self._operand(m, seed)
        self.b, self.b_scales = self._operand(n, seed + 1)
        self.counts = torch.tensor(self.ks, dtype=torch.int32, device=DEVICE)
        self.c = normal((len(ks), m, n), seed + 2).to(DTYPES[d_dtype]) * 32

    def _operand(self, extent: int, seed: int) -> tuple[Tensor, Tensor | None]:
        groups = [normal((extent, max(k, 1)), seed + 10 * index)[:, :k] for index, k in enumerate(self.ks)]
        if self.recipe == "bf16":
            return torch.cat([group.T for group in groups]).contiguous(), None
        cast = [jitgemm.per_token_cast_to_fp8(group.contiguous()) for group in groups if group.shape[1]]
        bits = [data.view(torch.uint8) for data, _ in cast]
        if self.layout == "nt":
            data = torch.cat([group.flatten() for group in bits])
        else:
            data = torch.cat([group.T for group in bits]).contiguous()
        scales = torch.cat([group.T for _, group in cast]).contiguous()  # [blocks, extent]
        return data.view(torch.float8_e4m3fn), scales.T if self.layout == "nt" else scales

    def output(self) -> Tensor:
        """D of NaN."""
        return poisoned(self.c.shape, self.c.dtype, DEVICE)

    def call(self, d: Tensor, c: Tensor | None = None) -> Tensor:
        """Run the operation."""
        a: Any = self.a if self.a_scales is None else (self.a, self.a_scales)
        b: Any = self.b if self.b_scales is None else (self.b, self.b_scales)
        name = f"k_grouped_{'bf16' if self.recipe == 'bf16' else 'fp8'}_gemm_{self.layout}_contiguous"
        getattr(jitgemm, name)(a, b, d, self.ks, self.counts, c)
        return d

    def check(self, d: Tensor, c: Tensor | None = None) -> None:
        """Compare with the reference, group by group."""
        expected = self.output()
        reference_grouped.k_grouped_contiguous(
            *(self.a, self.b, expected, self.ks, c),
            a_scales=self.a_scales,
            b_scales=self.b_scales,
            recipe=self.recipe,
            layout=self.layout,
        )
        for group, k in enumerate(self.ks):
            if k == 0 and c is None:
                assert not bool(d[group].any())
            else:
                check_close(d[group], expected[group], recipe=self.recipe, d_dtype=self.d_dtype, what=f"group {group}")


KINDS_OF_K = [(ROWS, "nt"), (ROWS, "tn"), ("bf16", "tn")]
ALIGNED = (128, 0, 512, 1280, 128, 0)


def uneven(recipe: str) -> Sequence[int]:
    """Ks that end inside stages."""
    return (1, 63, 0, 65, 300, 7, 1000, 0) if recipe == "bf16" else (16, 144, 0, 112, 1040, 0, 272)


@pytest.mark.parametrize(("recipe", "layout"), KINDS_OF_K)
@pytest.mark.parametrize(("m", "n"), [(256, 384), (136, 264), (64, 8), (8, 1000)])
def test_groups_along_k(recipe: str, layout: str, m: int, n: int) -> None:
    for ks in (ALIGNED, uneven(recipe), (0, 0, 128)):
        case = KGrouped(recipe, ks, m, n, layout=layout)
        case.check(case.call(case.output()))
        case.check(case.call(case.output(), case.c), case.c)
        d = case.c.clone()
        case.check(case.call(d, d), case.c)
        assert same_bits(d, case.call(case.output(), case.c))


@pytest.mark.parametrize(("recipe", "layout"), KINDS_OF_K[::2])
def test_every_tile_of_groups_along_k(every_tile: None, recipe: str, layout: str) -> None:
    case = KGrouped(recipe, uneven(recipe), 328, 264, layout=layout)
    for config in configs_of(k_problem(recipe)):
        d = case.c.clone()
        with settings.override(config=str(config)):
            case.call(d, d)
        try:
            case.check(d, case.c)
        except AssertionError as error:
            raise AssertionError(f"{config}: {error}") from None


@pytest.mark.parametrize(
    ("recipe", "config"),
    [(ROWS, "128x192x128 s3"), (ROWS, "128x128x128 s4"), (ROWS, "16x128x128 s4 swap"), ("bf16", "128x192x64 s3")],
)
def test_tiles_are_stored_while_the_next_ones_are_computed(recipe: str, config: str) -> None:
    """By few blocks, which have many tiles each: of fewer stages than the ring has, of as many, and of more."""
    stage = 128 if recipe == ROWS else 64
    ks = [stage * stages for stages in (1, 2, 3, 4, 5, 40)] + [0, stage]
    for n in (392, 390) if recipe == ROWS else (392,):  # of 390 columns without the copy engine
        case = KGrouped(recipe, ks, 328, n, layout="nt" if recipe == ROWS else "tn")
        with settings.override(config=config, num_sms=3):
            case.check(case.call(case.output()))
            first = case.call(case.output(), case.c)
            case.check(first, case.c)
            for _ in range(3):
                d = case.c.clone()
                assert same_bits(case.call(d, d), first)


@pytest.mark.parametrize(("recipe", "layout"), KINDS_OF_K[::2])
def test_a_group_reads_no_other_group(recipe: str, layout: str) -> None:
    case = KGrouped(recipe, uneven(recipe), 128, 128, layout=layout)
    clean = case.call(case.output())
    for poisoned_group, k in enumerate(case.ks):
        if k == 0:
            continue
        start = sum(case.ks[:poisoned_group])
        a = case.a.clone()
        bits = a.view(torch.int16 if recipe == "bf16" else torch.uint8)
        flat = bits.flatten()
        flat[start * 128 : (start + k) * 128] = 0x7FC0 if recipe == "bf16" else 0x7F
        kept, case.a = case.a, flat.view(bits.shape).view(a.dtype)
        d = case.call(case.output())
        case.a = kept
        for group in range(len(case.ks)):
            if group == poisoned_group:
                assert bool(d[group].isnan().all())
            else:
                assert same_bits(d[group], clean[group])


def test_an_output_in_bf16_and_one_without_the_copy_engine() -> None:
    for n, d_dtype in ((264, "bf16"), (136, "bf16")):
        case = KGrouped("bf16", (64, 0, 200), 136, n, d_dtype=d_dtype)
        case.check(case.call(case.output(), case.c), case.c)
    case = KGrouped(ROWS, (128, 0, 272), 130, 134, layout="nt")
    d = case.c.clone()
    case.check(case.call(d, d), case.c)


def test_more_groups_than_one_launch_takes() -> None:
    draw = random.Random(0)
    ks = [draw.choice([0, 128, 256, 16]) for _ in range(70)]
    case = KGrouped(ROWS, ks, 64, 72, layout="nt")
    d = case.c.clone()
    case.check(case.call(d, d), case.c)


def test_real_groups_along_k() -> None:
    for recipe, layout in KINDS_OF_K[::2]:
        case = KGrouped(recipe, (4096, 1024, 0, 2176), 1024, 2048, layout=layout)
        d = case.c.clone()
        case.check(case.call(d, d), case.c)


# -- All of them.


def test_captured_calls() -> None:
    heads = Einsum("bhr,hdr->bhd", BLOCKS, b=8, h=4, r=512, d=256)
    groups = KGrouped(ROWS, (256, 0, 144), 128, 256, layout="nt")
    d_of_heads, d_of_groups = heads.call(), groups.call(groups.output())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        heads.call(d_of_heads)
        groups.call(d_of_groups)
    for d in (d_of_heads, d_of_groups):
        d.zero_()
    graph.replay()
    torch.cuda.synchronize()
    heads.check(d_of_heads)
    groups.check(d_of_groups)


def test_the_same_bits_every_time() -> None:
    heads, groups = Einsum("bhr,hdr->bhd", BLOCKS, b=8, h=4, r=2048, d=256), KGrouped("bf16", (999, 64), 256, 256)
    first = heads.call(), groups.call(groups.output(), groups.c)
    for _ in range(20):
        assert same_bits(heads.call(), first[0])
        assert same_bits(groups.call(groups.output(), groups.c), first[1])


@pytest.mark.parametrize("num_sms", [1, 7])
def test_fewer_multiprocessors(num_sms: int) -> None:
    heads, groups = Einsum("bhr,hdr->bhd", BLOCKS, b=8, h=4, r=512, d=256), KGrouped(ROWS, (144, 256), 256, 256)
    with settings.override(num_sms=num_sms):
        heads.check(heads.call())
        groups.check(groups.call(groups.output()))


def test_compiled_by_torch() -> None:
    heads, groups = Einsum("bhr,hdr->bhd", b=8, h=4, r=512, d=256), KGrouped("bf16", (64, 200), 128, 256)

    @torch.compile(fullgraph=True)
    def step(a: Tensor, b: Tensor, d: Tensor, x: Tensor, y: Tensor, z: Tensor, counts: Tensor) -> Tensor:
        jitgemm.einsum("bhr,hdr->bhd", a, b, d)
        jitgemm.k_grouped_bf16_gemm_tn_contiguous(x, y, z, [64, 200], counts, z)
        return d * 2

    d, z = heads.output(), groups.c.clone()
    step(heads.a, heads.b, d, groups.a, groups.b, z, groups.counts)
    heads.check(d)
    groups.check(z, groups.c)


def test_what_tma_cannot_read_is_refused() -> None:
    a = torch.zeros((4, 2, 100), dtype=torch.bfloat16, device=DEVICE)
    b = torch.zeros((2, 64, 100), dtype=torch.bfloat16, device=DEVICE)
    d = torch.zeros((4, 2, 64), dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ProblemError, match="TMA needs steps"):
        jitgemm.einsum("bhr,hdr->bhd", a[..., :-1], b[..., :-1], d)
    case = KGrouped(ROWS, (128, 256), 64, 64, layout="nt")
    case.ks = [120, 264]
    with pytest.raises(ProblemError, match=r"a_scales|ks has 120"):
        case.call(case.output())
