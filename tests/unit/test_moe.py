"""Gate, permutation and combination: references against loops, kernels (emulated) against the references."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from emulation.plain import EmulatedGpu, emulated  # noqa: F401 (a fixture)
from torch import Tensor
from torch._subclasses import FakeTensorMode

import jitgemm
from jitgemm import settings, templates
from jitgemm.errors import ProblemError
from jitgemm.families.moe import MAP_THREADS
from jitgemm.reference import moe as reference
from jitgemm.reference.layout import has_mn_major_strides

SCORES = ("sqrtsoftplus", "sigmoid", "softmax")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_logits(tokens: int, experts: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, experts, generator=generator(seed)) * 4


def choices(tokens: int, topk: int, experts: int, kind: str = "random", seed: int = 0) -> Tensor:
    """Experts of tokens: distinct random ones, some -1; all the same; or with counts of 0, 1, 127, 128 and 129."""
    if kind == "one":
        return torch.full((tokens, topk), experts - 1)
    if kind == "none":
        return torch.full((tokens, topk), -1)
    if kind == "counts":
        flat = torch.full((tokens * topk,), -1)
        counts = (0, 1, 127, 128, 129)
        chosen = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)])
        places = torch.randperm(tokens * topk, generator=generator(seed))[: len(chosen)]
        flat[places] = chosen
        return flat.view(tokens, topk)
    chosen = torch.rand(tokens, experts, generator=generator(seed)).argsort(-1)[:, :topk]
    return torch.where(torch.rand(tokens, topk, generator=generator(seed + 1)) < 0.1, -1, chosen)


def score(logit: float, kind: str, row: list[float]) -> float:
    if kind == "sqrtsoftplus":
        return math.sqrt(logit if logit > 20 else math.log1p(math.exp(logit)))
    if kind == "sigmoid":
        return 1 / (1 + math.exp(-logit))
    return math.exp(logit - max(row)) / sum(math.exp(other - max(row)) for other in row)


@pytest.mark.parametrize("kind", SCORES)
def test_the_reference_of_the_gate(kind: str) -> None:
    logits, bias = some_logits(9, 12), torch.randn(12, generator=generator(5))
    logits[3] = 1  # all tie but for the bias
    logits[4, 2] = 30
    for with_bias in (bias, None):
        indices, weights = reference.topk_gate(logits, with_bias, 4, kind, 2.5, None, None, None, torch.int64)
        for token, row in enumerate(logits.tolist()):
            scores = [score(value, kind, row) for value in row]
            keys = [s + (float(bias[e]) if with_bias is not None else 0) for e, s in enumerate(scores)]
            best = sorted(range(12), key=lambda e: (-keys[e], e))[:4]
            assert indices[token].tolist() == best
            total = 1 if kind == "softmax" else sum(scores[e] for e in best)
            expected = [2.5 * scores[e] / total for e in best]
            torch.testing.assert_close(weights[token], torch.tensor(expected), rtol=1e-5, atol=1e-7)
    assert reference.topk_gate(logits, None, 4, kind, 1, None, None, None, torch.int32)[0][3].tolist() == [0, 1, 2, 3]


def same_choice(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], logits: Tensor, bias: Tensor | None, kind: str
) -> None:
    """The same experts, or ones whose keys are as close as FP32 can tell; weights alike."""
    keys = reference.scores_of(logits.double(), kind) + (0 if bias is None else bias.double())
    assert found[0].shape == expected[0].shape
    assert torch.equal(found[0] < 0, expected[0] < 0)
    mine, other = (keys.gather(1, indices.long().clamp(min=0)) for indices in (found[0], expected[0]))
    same = found[0] == expected[0]
    assert (same | ((mine - other).abs() <= 1e-6 * other.abs().clamp(min=1))).all()
    torch.testing.assert_close(found[1][same], expected[1][same], rtol=2e-5, atol=1e-7)


def as_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the gate's kernel for many tokens take few."""
    monkeypatch.setattr("jitgemm.ops.moe.gates_by_block", lambda *_: False)


@pytest.mark.parametrize(
    ("kind", "tokens", "experts", "topk"),
    [
        ("sqrtsoftplus", 7, 384, 6),
        ("sqrtsoftplus", 5, 33, 8),
        ("sqrtsoftplus", 2, 1024, 32),
        ("sigmoid", 3, 4, 4),
        ("softmax", 1, 256, 6),
        ("softmax", 6, 193, 1),
    ],
)
@pytest.mark.parametrize("many", [False, True])
def test_gate_kernel(
    emulated: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    tokens: int,
    experts: int,
    topk: int,
    many: bool,
) -> None:
    if many:
        as_many_tokens(monkeypatch)
    # A slice of wider rows, with what must not be read behind it.
    logits = torch.full((tokens, experts + 3), math.inf)[:, :experts]
    logits.copy_(some_logits(tokens, experts))
    bias = torch.randn(experts, generator=generator(5))
    mask = torch.arange(tokens) % 3 != 2
    dtype = torch.int64 if experts == 384 else torch.int32
    for keywords in ({}, {"bias": bias}, {"bias": bias, "mask": mask, "index_dtype": dtype}):
        found = jitgemm.topk_gate(logits, topk=topk, scores=kind, route_scale=1.5, **keywords)
        expected = reference.topk_gate(
            logits, keywords.get("bias"), topk, kind, 1.5, None, None, keywords.get("mask"), found[0].dtype
        )
        assert found[0].dtype == keywords.get("index_dtype", torch.int32)
        same_choice(found, expected, logits, keywords.get("bias"), kind)
    assert {spec["by_block"] for spec in emulated} == {not many and experts <= 512}


@pytest.mark.parametrize("many", [False, True])
def test_ties_and_extremes_of_the_gate(emulated: Any, monkeypatch: pytest.MonkeyPatch, many: bool) -> None:  # noqa: F811
    if many:
        as_many_tokens(monkeypatch)
    logits = torch.zeros(7, 96)
    logits[1, 40:80] = 2
    logits[2] = -200  # scores of 0
    logits[3, 90] = math.nan
    logits[4, 7], logits[4, 8] = math.inf, -math.inf
    logits[5, ::2] = 1
    logits[6] = torch.arange(96) % 3
    indices, weights = jitgemm.topk_gate(logits)
    expected = reference.topk_gate(logits, None, 6, "sqrtsoftplus", 1.0, None, None, None, torch.int32)
    assert torch.equal(indices, expected[0])
    assert indices[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert indices[3, 0] == 90
    for token in (0, 1, 2, 5, 6):
        torch.testing.assert_close(weights[token], expected[1][token], rtol=1e-5, atol=1e-7)
    assert weights[3].isnan().all()
    assert not weights[2].any()


@pytest.mark.parametrize("kind", ["sqrtsoftplus", "softmax"])
def test_hashed_gate_kernel(emulated: Any, kind: str) -> None:  # noqa: F811
    logits = some_logits(6, 40)
    table = torch.randint(0, 40, (50, 6), generator=generator(), dtype=torch.int32)
    table[3] = torch.tensor([5, 5, -1, 40, 39, 0])  # twice the same, and some that don't exist
    for dtype in (torch.int32, torch.int64):
        ids = torch.tensor([3, 0, 49, 50, -1, 7], dtype=dtype)
        found = jitgemm.topk_gate(logits, scores=kind, route_scale=2.5, tid2eid=table, input_ids=ids)
        expected = reference.topk_gate(logits, None, 6, kind, 2.5, table, ids, None, torch.int32)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=0)
        assert found[0][0].tolist() == [5, 5, -1, -1, 39, 0]
        assert (found[0][3:5] == -1).all()
        assert not found[1][3:5].any()


def test_moe_gate_is_the_gate_of_the_product() -> None:
    x = torch.randn(9, 64, generator=generator()).bfloat16()
    weight = torch.randn(16, 64, generator=generator(1)).bfloat16()
    logits = (x.double() @ weight.double().T).float()
    bias = torch.randn(16, generator=generator(2))
    found = jitgemm.moe_gate(x, weight, bias, 4, route_scale=2.5)
    same_choice(found, jitgemm.topk_gate(logits, bias, 4, route_scale=2.5), logits, bias, "sqrtsoftplus")


@pytest.mark.parametrize(
    ("kind", "tokens", "experts", "width", "topk"),
    [
        ("sqrtsoftplus", 1, 256, 3128, 6),
        ("sqrtsoftplus", 18, 384, 264, 6),
        ("sqrtsoftplus", 3, 64, 1032, 6),  # K in parts
        ("sigmoid", 8, 33, 8, 8),
        ("softmax", 9, 512, 40, 32),
        ("softmax", 50, 40, 776, 5),
        ("sigmoid", 2, 600, 24, 4),
    ],
)
def test_gate_of_few_tokens(emulated: Any, kind: str, tokens: int, experts: int, width: int, topk: int) -> None:  # noqa: F811
    # Slices of wider rows, with what must not be read behind them.
    x, weight = (torch.full((rows, width + 8), math.nan, dtype=torch.bfloat16)[:, :width] for rows in (tokens, experts))
    x.copy_(torch.randn(tokens, width, generator=generator()))
    weight.copy_(torch.randn(experts, width, generator=generator(1)) * 4 / math.sqrt(width))
    weight[experts // 2] = weight[0]  # keys that tie
    logits = (x.double() @ weight.double().T).float()
    bias, mask = torch.randn(experts, generator=generator(2)), torch.arange(tokens) % 3 != 2
    bias[experts // 2] = bias[0]
    dtype = torch.int64 if experts == 384 else torch.int32
    table = torch.randint(-1, experts + 1, (50, topk), generator=generator(3), dtype=torch.int32)
    ids = torch.randint(-1, 51, (tokens,), generator=generator(4), dtype=dtype)
    for keywords in ({"bias": bias, "mask": mask, "index_dtype": dtype}, {"tid2eid": table, "input_ids": ids}):
        found = jitgemm.moe_gate(x, weight, topk=topk, scores=kind, route_scale=1.5, **keywords)
        optional = [keywords.get(name) for name in ("tid2eid", "input_ids", "mask")]
        expected = reference.topk_gate(logits, keywords.get("bias"), topk, kind, 1.5, *optional, found[0].dtype)
        same_choice(found, expected, logits, keywords.get("bias"), kind)
        assert found[0].dtype == keywords.get("index_dtype", torch.int32)
    assert [spec.family for spec in emulated] == ["gate_logits", "topk_gate"] * 2


def test_second_kernels_begin_beside_the_first(emulated: Any) -> None:  # noqa: F811
    x, weight = torch.ones(2, 1032).bfloat16(), torch.ones(64, 1032).bfloat16()
    jitgemm.moe_permutation(jitgemm.moe_gate(x, weight)[0], 64)
    jitgemm.moe_permutation(torch.zeros(300, 6, dtype=torch.int32), 8)
    jitgemm.topk_gate(torch.zeros(2, 64))
    x = torch.ones(2, 4, 64).bfloat16()
    jitgemm.hc_pre(x, torch.ones(24, 256), torch.ones(3), torch.ones(24))
    assert EmulatedGpu.early == ["topk_gate", "moe_map", "hc_mix"]
    assert len(emulated) == 8


def test_kernels_let_others_begin_after_they_have_waited_themselves() -> None:
    # What begins early waits for the kernel ahead only, and must find what others before it have written.
    texts = [path.read_text() for path in Path(templates.__file__).parent.glob("*.jinja")]
    letting = [text for text in texts if "grid_dependency_launch();" in text]
    assert letting
    for text in letting:
        assert text.index("grid_dependency_wait();") < text.index("grid_dependency_launch();")


def test_equal_keys_of_few_tokens(emulated: Any) -> None:  # noqa: F811
    x, weight = torch.ones(3, 16).bfloat16(), torch.ones(40, 16).bfloat16()
    weight[13] = math.nan
    weight[20], weight[37] = 2, 2
    x[2] = -30  # scores of 0
    indices, weights = jitgemm.moe_gate(x, weight)
    assert indices.tolist() == [[13, 20, 37, 0, 1, 2], [13, 20, 37, 0, 1, 2], [13, 0, 1, 2, 3, 4]]
    assert weights.isnan().all()


def test_which_gates_are_a_gemm(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    launched = []

    def gemm(x: Tensor, weight: Tensor, out: Tensor) -> None:
        launched.append(x.shape[0])
        out.copy_(x.float() @ weight.float().T)

    monkeypatch.setattr("jitgemm.ops.moe.bf16_gemm_nt", gemm)
    x, weight = (
        torch.randn(65, 24, generator=generator()).bfloat16(),
        torch.randn(9, 24, generator=generator()).bfloat16(),
    )
    jitgemm.moe_gate(x, weight)
    assert launched == [65]
    with settings.override(batch_invariant=True):  # a result may not depend on how many others there are
        jitgemm.moe_gate(x[:3], weight)
    assert launched == [65, 3]
    jitgemm.moe_gate(x[:3], weight)
    assert [spec.family for spec in emulated] == ["topk_gate", "topk_gate", "gate_logits", "topk_gate"]


# -- Permutation

CASES = [
    # tokens, topk, experts, kind, alignment, max_m, first expert
    (0, 6, 8, "random", 128, 4, 0),
    (1, 6, 256, "random", 128, 4, 0),
    (7, 6, 16, "random", 16, 3, 0),
    (64, 6, 384, "random", 128, 8, 96),
    (100, 6, 5, "counts", 128, 200, 0),
    (250, 6, 40, "random", 128, 60, 3),
    (40, 3, 1024, "random", 1, 2, 0),
    (33, 6, 12, "one", 8, 150, 0),
    (3, 2, 12, "none", 8, 4, 0),
]


def by_loops(indices: Tensor, experts: int, layout: str, alignment: int, max_m: int, first: int) -> tuple[Any, ...]:
    """Grouped layout, rows of items and items of rows, by one pass over the choices of each expert."""
    flat = indices.flatten().tolist()
    of_expert = [[i for i, e in enumerate(flat) if e - first == expert] for expert in range(experts)]
    rows = reference.num_rows(len(flat), experts, layout, alignment, max_m)
    to_row, to_item, of_row, ends = [-1] * len(flat), [-1] * rows, [-1] * rows, []
    start = 0
    for expert, items in enumerate(of_expert):
        if layout == "masked":
            start, items = expert * max_m, items[:max_m]
        for rank, item in enumerate(items):
            to_row[item], to_item[start + rank], of_row[start + rank] = start + rank, item, expert
        ends.append(len(items) if layout == "masked" else start + len(items))
        start = -(-ends[-1] // alignment) * alignment
    return of_row if layout == "contiguous" else ends, to_row, to_item


def check_permutation(case: tuple[Any, ...], layout: str, dtype: torch.dtype) -> jitgemm.MoePermutation:
    tokens, topk, experts, kind, alignment, max_m, first = case
    indices = choices(tokens, topk, experts + first, kind).to(dtype)
    weights = torch.rand(tokens, topk, generator=generator(9))
    limit = max_m if layout == "masked" else None
    made = jitgemm.moe_permutation(
        indices, experts, weights, layout=layout, alignment=alignment, max_m=limit, first_expert=first
    )
    grouped, to_row, to_item = by_loops(indices, experts, layout, alignment, max_m, first)
    assert made.grouped_layout.tolist() == grouped
    assert made.token_topk_to_pos.flatten().tolist() == to_row
    assert made.pos_to_token_topk.tolist() == to_item
    flat = weights.flatten().tolist()
    assert made.row_weights is not None
    assert made.row_weights.tolist() == [0.0 if item < 0 else flat[item] for item in to_item]
    assert made.max_m == (limit or 0)
    return made


@pytest.mark.parametrize("layout", reference.LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_of_the_permutation(case: tuple[Any, ...], layout: str) -> None:
    check_permutation(case, layout, torch.int32)


@pytest.mark.parametrize("layout", reference.LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_permutation_kernel(emulated: Any, case: tuple[Any, ...], layout: str) -> None:  # noqa: F811
    check_permutation(case, layout, torch.int64 if case[0] == 7 else torch.int32)
    items, one_kernel = case[0] * case[1], 2 * MAP_THREADS
    phases = [("single", 1 + (items > MAP_THREADS))] if items <= one_kernel else [("count", 1), ("assign", 1)]
    assert [(spec["phase"], spec["rounds"]) for spec in emulated] == phases


@pytest.mark.parametrize("layout", reference.LAYOUTS)
def test_permutation_of_many_items(emulated: Any, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("jitgemm.families.moe._MAP_BLOCKS", 2)  # so that these are many
    tokens = MAP_THREADS * 8 // 6 * 2 + 50
    check_permutation((tokens, 6, 40, "random", 128, 180, 3), layout, torch.int32)
    assert [(spec["phase"], spec["rounds"]) for spec in emulated] == [("count", 8), ("assign", 8)]


def test_rows_are_aligned_as_the_grouped_gemms_count_with() -> None:
    indices = torch.tensor([[0, 2], [2, 1]], dtype=torch.int32)
    for alignment in (16, 128):
        with settings.override(mk_alignment=alignment):
            made = jitgemm.moe_permutation(indices, 3, layout="psum")
            assert made.grouped_layout.tolist() == [1, alignment + 1, 2 * alignment + 2]


def test_rows_never_run_out() -> None:
    # As many choices as can be, spread so that each expert wastes as much as can be.
    for items, experts, alignment in ((6, 256, 128), (256 * 3, 256, 128), (1000, 7, 16)):
        each = torch.arange(items) % experts
        counts = torch.bincount(each, minlength=experts)
        needed = int(((counts + alignment - 1) // alignment * alignment).sum())
        assert needed <= reference.num_rows(items, experts, "contiguous", alignment, 0)


def test_rows_of_no_token_are_zeros(emulated: Any) -> None:  # noqa: F811
    permutation = jitgemm.moe_permutation(torch.empty(0, 2, dtype=torch.int32), 3, layout="masked", max_m=4)
    junk = [torch.full((3, 4, size), float("nan")) for size in (16, 32, 64)]
    del junk  # what the allocator hands out again
    x, scales = torch.empty(0, 128, dtype=torch.bfloat16).to(torch.float8_e4m3fn), torch.empty(0, 1)
    rows, rows_scales = jitgemm.moe_permute(x, permutation, scales, zero_padding=True)
    assert rows.shape[:2] == (3, 4)
    assert not rows.float().any()
    assert rows_scales is not None
    assert not rows_scales.any()


@pytest.mark.parametrize("zero_padding", [False, True])
@pytest.mark.parametrize("layout", reference.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.uint8])
def test_permute_kernel(emulated: Any, dtype: torch.dtype, layout: str, zero_padding: bool) -> None:  # noqa: F811
    tokens, experts, width = 9, 5, 4128 if dtype == torch.bfloat16 else 80
    storage = torch.randint(0, 120, (tokens, width + 16), generator=generator()).to(dtype)
    x = storage[:, :width]
    limit = 6 if layout == "masked" else None
    permutation = jitgemm.moe_permutation(choices(tokens, 3, experts), experts, layout=layout, alignment=4, max_m=limit)
    for scales in (
        torch.rand(tokens, 7),
        torch.rand(7, tokens).T,
        torch.arange(2 * tokens, dtype=torch.int32).view(-1, 2),
    ):
        rows, rows_scales = jitgemm.moe_permute(x, permutation, scales, zero_padding=zero_padding)
        assert rows.dtype == dtype
        assert rows_scales is not None
        assert has_mn_major_strides(rows_scales)
        assert rows_scales.dtype == scales.dtype
        flat, flat_scales = rows.reshape(-1, width).float(), rows_scales.reshape(-1, scales.shape[1])
        for row, item in enumerate(permutation.pos_to_token_topk.tolist()):
            if item >= 0:
                assert torch.equal(flat[row], x[item // 3].float())
                assert torch.equal(flat_scales[row], scales[item // 3])
            elif zero_padding:
                assert not flat[row].any()
                assert not flat_scales[row].any()


@pytest.mark.parametrize("shape", ["plain", "weighted", "shared", "both"])
@pytest.mark.parametrize(("tokens", "topk", "width"), [(1, 6, 2056), (7, 6, 72), (2, 16, 8)])
def test_combine_kernel(emulated: Any, tokens: int, topk: int, width: int, shape: str) -> None:  # noqa: F811
    y = torch.randn(50, width + 8, generator=generator()).bfloat16()[:, :width]
    pos = torch.randint(-1, 50, (tokens, topk), generator=generator(), dtype=torch.int32)
    pos[0] = -1
    y[49] = math.nan
    pos[pos == 49] = -1
    weights = torch.rand(tokens, topk, generator=generator()) if shape in ("weighted", "both") else None
    shared = torch.randn(tokens, width, generator=generator()).bfloat16() if shape in ("shared", "both") else None
    found = jitgemm.moe_combine(y, pos, weights, shared)
    for token in range(tokens):
        total = torch.zeros(width)
        for k in range(topk):
            if pos[token, k] >= 0:
                row = y[pos[token, k]].float()
                # A fused multiply-add: the product is not rounded.
                weighted = row if weights is None else row.double() * weights[token, k].double()
                total = (total.double() + weighted).float()
        if shared is not None:
            total = total + shared[token].float()
        assert torch.equal(found[token], total.bfloat16())
    exact = reference.moe_combine(y, pos, weights, shared)
    assert ((found.double() - exact.double()).abs() <= exact.double().abs() * 2**-7 + 1e-5).all()


def test_rows_that_do_not_exist_are_left_out(emulated: Any) -> None:  # noqa: F811
    y = torch.ones(4, 8).bfloat16()
    pos = torch.tensor([[0, 4, 1 << 30, -7]], dtype=torch.int32)
    assert jitgemm.moe_combine(y, pos).tolist() == [[1.0] * 8]
    permutation = jitgemm.MoePermutation(pos, pos, torch.tensor([0, -1, -1, -1], dtype=torch.int32), None, 0)
    rows, _ = jitgemm.moe_permute(torch.full((1, 8), 3.0).bfloat16(), permutation, zero_padding=True)
    assert rows[:, 0].tolist() == [3.0, 0.0, 0.0, 0.0]


def test_a_round_trip(emulated: Any) -> None:  # noqa: F811
    x = torch.randn(20, 64, generator=generator()).bfloat16()
    indices, weights = jitgemm.topk_gate(some_logits(20, 32))
    for layout, limit in (("contiguous", None), ("psum", None), ("masked", 20)):
        permutation = jitgemm.moe_permutation(indices, 32, weights, layout=layout, alignment=8, max_m=limit)
        rows, _ = jitgemm.moe_permute(x, permutation)
        combined = jitgemm.moe_combine(rows, permutation.token_topk_to_pos, weights)
        torch.testing.assert_close(combined.float(), x.float(), rtol=2**-7, atol=1e-6)


def test_empty_inputs() -> None:
    indices, weights = jitgemm.topk_gate(torch.empty(0, 32))
    assert (indices.shape, weights.shape) == ((0, 6), (0, 6))
    permutation = jitgemm.moe_permutation(indices, 32, weights, layout="psum")
    assert permutation.grouped_layout.tolist() == [0] * 32
    assert permutation.pos_to_token_topk.shape == (0,)
    rows, scales = jitgemm.moe_permute(torch.empty(0, 64).bfloat16(), permutation, torch.empty(0, 1))
    assert scales is not None
    assert (rows.shape, scales.shape) == ((0, 64), (0, 1))
    assert jitgemm.moe_combine(rows, permutation.token_topk_to_pos).shape == (0, 64)


L, I32 = torch.zeros(2, 8), torch.zeros(2, 2, dtype=torch.int32)
P = jitgemm.moe_permutation(I32, 4)
BAD: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    ("topk_gate", "logits has dtype torch.bfloat16", (L.bfloat16(),), {}),
    ("topk_gate", "stride 1 along experts", (torch.zeros(8, 2).T,), {}),
    ("topk_gate", "1 to 1024 experts", (torch.zeros(2, 1025),), {}),
    ("topk_gate", "topk is 9", (L,), {"topk": 9}),
    ("topk_gate", "scores is 'relu'", (L,), {"scores": "relu"}),
    ("topk_gate", r"bias has shape \[7\]", (L, torch.zeros(7)), {}),
    ("topk_gate", "tid2eid is given alone", (L,), {"topk": 2, "tid2eid": I32}),
    ("topk_gate", "bias is given with tid2eid", (L, torch.zeros(8), 2), {"tid2eid": I32, "input_ids": I32[0]}),
    ("topk_gate", "mask has dtype torch.int32", (L,), {"mask": I32[0]}),
    ("topk_gate", "index_dtype is torch.int16", (L,), {"index_dtype": torch.int16}),
    ("moe_gate", r"weight has shape \[3, 4\]", (torch.zeros(2, 8).bfloat16(), torch.zeros(3, 4).bfloat16()), {}),
    ("moe_permutation", "topk_indices has dtype torch.float32", (L, 4), {}),
    ("moe_permutation", "num_experts is 0", (I32, 0), {}),
    ("moe_permutation", r"topk_weights has shape \[2, 8\]", (I32, 4, L), {}),
    ("moe_permutation", "layout is 'dense'", (I32, 4), {"layout": "dense"}),
    ("moe_permutation", "max_m is None with layout 'masked'", (I32, 4), {"layout": "masked"}),
    ("moe_permutation", "max_m is 4 with layout 'psum'", (I32, 4), {"layout": "psum", "max_m": 4}),
    ("moe_permutation", "alignment is 0", (I32, 4), {"alignment": 0}),
    ("moe_permutation", "accepted is a contiguous tensor", (I32.T[:1].T, 4), {}),
    ("moe_permutation", "too many", (I32, 1024), {"layout": "masked", "max_m": 2**30}),
    ("moe_permute", "permutation is Tensor", (L.bfloat16(), I32), {}),
    ("moe_permute", r"permutation.token_topk_to_pos has shape \[2, 2\]", (torch.zeros(3, 8).bfloat16(), P), {}),
    ("moe_permute", "rows of 14 bytes", (torch.zeros(2, 7).bfloat16(), P), {}),
    ("moe_permute", "scales has dtype torch.bfloat16", (torch.zeros(2, 8).bfloat16(), P, L.bfloat16()), {}),
    ("moe_combine", "y has dtype torch.float32", (L, I32), {}),
    ("moe_combine", "topk 1 to 16", (L.bfloat16(), torch.zeros(2, 17, dtype=torch.int32)), {}),
    ("moe_combine", r"shared has shape \[2, 16\]", (L.bfloat16(), I32, None, torch.zeros(2, 16).bfloat16()), {}),
    ("moe_combine", "accepted is a contiguous tensor", (torch.zeros(2, 4, 16).bfloat16()[..., :8], I32), {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "message", "arguments", "keywords"), BAD, ids=range(len(BAD)))
def test_bad_arguments(name: str, message: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    with pytest.raises(ProblemError, match=message):
        getattr(jitgemm, name)(*arguments, **keywords)


def layer(x: Tensor, weight: Tensor, bias: Tensor, layout: str) -> tuple[Tensor, ...]:
    indices, weights = jitgemm.moe_gate(x, weight, bias, 4)
    permutation = jitgemm.moe_permutation(
        indices, 16, weights, layout=layout, alignment=8, max_m=8 if layout == "masked" else None
    )
    rows, scales = jitgemm.moe_permute(x, permutation, x[:, :3].float(), zero_padding=True)
    combined = jitgemm.moe_combine(rows, permutation.token_topk_to_pos, weights, x)
    assert scales is not None
    assert permutation.row_weights is not None
    return *permutation[:3], permutation.row_weights, rows, scales, combined


@pytest.mark.parametrize("layout", reference.LAYOUTS)
def test_compiled_and_fake(layout: str) -> None:
    arguments = (
        torch.randn(9, 64, generator=generator()).bfloat16(),
        torch.randn(16, 64, generator=generator(1)).bfloat16(),
        torch.randn(16, generator=generator(2)),
    )
    real = layer(*arguments, layout)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(*arguments, layout)
    with FakeTensorMode() as mode:
        fakes = layer(*map(mode.from_tensor, arguments), layout)
    for one, other, fake in zip(real, compiled, fakes, strict=True):
        assert torch.equal(one, other)
        assert (fake.shape, fake.dtype, fake.stride()) == (one.shape, one.dtype, one.stride())


def test_operators_pass_torchs_checks() -> None:
    torch.library.opcheck(
        torch.ops.jitgemm.topk_gate, (L, torch.zeros(8), 3, "sigmoid", 1.0, None, None, None, torch.int64)
    )
    torch.library.opcheck(torch.ops.jitgemm.moe_combine, (L.bfloat16(), I32, None, None))


def test_problems_are_recorded(tmp_path: Any) -> None:
    path = tmp_path / "shapes.jsonl"
    with settings.override(record=path):
        layer(torch.ones(2, 64).bfloat16(), torch.ones(16, 64).bfloat16(), torch.ones(16), "psum")
    problems = [json.loads(line) for line in path.read_text().splitlines()]
    assert {"kind": "moe_permutation", "layout": "psum", "index_dtype": "int32"} in problems
    assert {"kind": "moe_combine", "topk": 4} in problems
    assert {"kind": "moe_permute", "zero_padding": True} in problems
    gate = {"kind": "topk_gate", "experts": 16, "scores": "sqrtsoftplus", "hashed": False, "index_dtype": "int32"}
    assert gate in problems
