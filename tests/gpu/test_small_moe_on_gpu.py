"""Hyper-connections, gate, permutation and combination on a GPU, against the references."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import jitgemm
from jitgemm import builder, kernel, settings
from jitgemm.errors import CacheMissError
from jitgemm.ops import plain
from jitgemm.reference import hyper_connections as hc
from jitgemm.reference import moe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = torch.device("cuda", 0)
TOKENS = (1, 2, 7, 13, 32, 33, 129, 1000, 4096)
WIDTHS = (4096, 7168, 1280, 2056)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


@pytest.fixture(autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """What a kernel leaves unwritten is NaN: blocks that the allocator hands out again were filled with it."""
    torch.cuda.empty_cache()
    junk = [torch.full((size,), math.nan, device=DEVICE) for size in (1 << 8, 1 << 12, 1 << 18, 1 << 24, 1 << 27)]
    del junk
    yield


def within_one_step(actual: Tensor, expected: Tensor, slack: float = 0.0) -> bool:
    spacing = expected.double().abs().clamp(min=2.0**-100).log2().floor().exp2() * 2.0**-7
    return bool(((actual.double() - expected.double()).abs() <= spacing + slack).all())


def twice(call: Callable[[], Any]) -> Any:
    """The results, which must have the same bits again."""
    first, second = call(), call()
    pairs = zip(first, second, strict=True) if isinstance(first, tuple) else [(first, second)]
    for one, other in pairs:
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    return first


def layer_weights(width: int, rows: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    scale = torch.tensor([0.0761, 0.0326, 0.2270], device=DEVICE) * 4
    base = normal(24, seed=3) * 2
    return normal(rows, 4 * width, seed=2) / math.sqrt(width), scale, base


@pytest.mark.parametrize("tokens", [1, 31, 1000, 16385])
def test_sinkhorn(tokens: int) -> None:
    mixes = normal(tokens, 24) * 3
    mixes[-1, ::2], mixes[-1, 1::2] = 80, -80
    _, scale, base = layer_weights(8)
    found = twice(lambda: jitgemm.hc_split_sinkhorn(mixes, scale, base))
    for one, other in zip(found, hc.hc_split_sinkhorn(mixes, scale, base, 20, 1e-6, 2.0), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    assert (found[2].sum(-2) - 1).abs().max() < 3e-6


def check_prenorm(a: Tensor, fn: Tensor, splits: int | None, precision: str, bound: float) -> tuple[Tensor, Tensor]:
    """What the prenorm GEMM gives, after a comparison with float64."""
    exact, exact_squares = a.double() @ fn.double().T, a.double().square().sum(-1)
    leading = () if splits is None else (splits,)
    shapes = (a.shape[0], fn.shape[0]), a.shape[:1]
    d, squares = (torch.full((*leading, *shape), math.nan, device=DEVICE) for shape in shapes)
    jitgemm.tf32_hc_prenorm_gemm(a, fn, d, squares, splits, precision=precision)
    total, sums = (d, squares) if splits is None else (d.double().sum(0), squares.double().sum(0))
    torch.testing.assert_close(sums.double(), exact_squares, rtol=2e-6, atol=0)
    error = 1 - 2 * (total.double() * exact).sum() / (total.double().square() + exact.square()).sum()
    assert error < bound, (splits, float(error))
    return d, squares


@pytest.mark.parametrize("precision", ["tf32", "fp32"])
@pytest.mark.parametrize(
    ("m", "k"),
    [(m, k) for k in (28672, 16384, 7680, 7168) for m in (1, 13, 137, 4096)] + [(33, 1288), (8192, 7168), (100, 8)],
)
def test_prenorm(m: int, k: int, precision: str) -> None:
    a, fn = normal(m, k, dtype=torch.bfloat16), normal(24, k, seed=1)
    best = jitgemm.get_hc_prenorm_num_splits(m, k)
    for splits in (None, best, 16, 5):
        d, squares = check_prenorm(a, fn, splits, precision, 1e-7 if precision == "tf32" else 1e-8)
        again, again_squares = torch.empty_like(d), torch.empty_like(squares)
        jitgemm.tf32_hc_prenorm_gemm(a, fn, again, again_squares, splits, precision=precision)
        assert torch.equal(d, again)
        assert torch.equal(squares, again_squares)


@pytest.mark.parametrize("n", [1, 4, 9, 20])
def test_prenorm_of_slices(n: int) -> None:
    a = torch.full((52, 1000), math.nan, device=DEVICE).bfloat16()[1:-1, 8:904]
    fn = torch.full((n, 900), math.nan, device=DEVICE)[:, :896]
    a.copy_(normal(50, 896)), fn.copy_(normal(n, 896, seed=1))
    d, squares = torch.full((50, n), math.nan, device=DEVICE), torch.full((50,), math.nan, device=DEVICE)
    jitgemm.tf32_hc_prenorm_gemm(a, fn, d, squares, precision="fp32")
    torch.testing.assert_close(d, (a.double() @ fn.double().T).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", WIDTHS)
def test_pre_post_and_head(width: int) -> None:
    fn, scale, base = layer_weights(width)
    for tokens in TOKENS:
        x = normal(tokens, 4, width, dtype=torch.bfloat16)
        x[0, 1] = 0
        y, post, comb = twice(lambda x=x: jitgemm.hc_pre(x, fn, scale, base, precision="fp32"))
        expected = hc.hc_pre(x, fn, scale, base, 1e-6, 1e-6, 20, 2.0)
        torch.testing.assert_close(post, expected[1], rtol=1e-4, atol=0)
        torch.testing.assert_close(comb, expected[2], rtol=1e-4, atol=1e-8)
        assert within_one_step(y, expected[0], 2e-4)
        fast = jitgemm.hc_pre(x, fn, scale, base)
        torch.testing.assert_close(fast[1], expected[1], rtol=2e-3, atol=0)
        out = normal(tokens, width, seed=5, dtype=torch.bfloat16)
        streams = twice(lambda x=x, out=out, post=post, comb=comb: jitgemm.hc_post(out, x, post, comb))
        assert within_one_step(streams, hc.hc_post(out, x, post, comb), 1e-5)
        head = twice(lambda x=x: jitgemm.hc_head(x, fn[:4], scale[:1], base[:4], precision="fp32"))
        assert within_one_step(head, hc.hc_head(x, fn[:4], scale[:1], base[:4], 1e-6, 1e-6), 2e-4)
        assert jitgemm.hc_post(out, x, post, comb, inplace=True) is x
        assert torch.equal(x, streams)


@pytest.mark.parametrize("precision", ["tf32", "fp32"])
@pytest.mark.parametrize(("m", "k"), [(1, 28672), (13, 16384), (137, 7168), (4096, 7680), (33, 1288), (100, 8)])
def test_prenorm_of_fp32(m: int, k: int, precision: str) -> None:
    a, fn = normal(m, k), normal(24, k, seed=1)
    for splits in (None, jitgemm.get_hc_prenorm_num_splits(m, k), 5):
        check_prenorm(a, fn, splits, precision, 2e-7 if precision == "tf32" else 1e-8)


@pytest.mark.parametrize("width", (4096, 7168, 2056))
def test_fp32_streams(width: int) -> None:
    fn, scale, base = layer_weights(width)
    for tokens in (1, 7, 33, 1000):
        x = normal(tokens, 4, width)
        y, post, comb = twice(lambda x=x: jitgemm.hc_pre(x, fn, scale, base, precision="fp32"))
        expected = hc.hc_pre(x, fn, scale, base, 1e-6, 1e-6, 20, 2.0)
        torch.testing.assert_close(post, expected[1], rtol=1e-4, atol=0)
        torch.testing.assert_close(comb, expected[2], rtol=1e-4, atol=1e-8)
        assert within_one_step(y, expected[0], 2e-4)
        torch.testing.assert_close(jitgemm.hc_pre(x, fn, scale, base)[1], expected[1], rtol=2e-3, atol=0)
        out = normal(tokens, width, seed=5, dtype=torch.bfloat16)
        streams = twice(lambda x=x, out=out, post=post, comb=comb: jitgemm.hc_post(out, x, post, comb))
        torch.testing.assert_close(streams, hc.hc_post(out, x, post, comb), rtol=1e-5, atol=1e-5)
        head = twice(lambda x=x: jitgemm.hc_head(x, fn[:4], scale[:1], base[:4], precision="fp32"))
        assert within_one_step(head, hc.hc_head(x, fn[:4], scale[:1], base[:4], 1e-6, 1e-6), 2e-4)
        assert jitgemm.hc_post(out, x, post, comb, inplace=True) is x
        assert torch.equal(x, streams)


@pytest.mark.parametrize("scores", moe.SCORES)
@pytest.mark.parametrize(("experts", "topk"), [(256, 6), (384, 6), (33, 8), (1000, 32), (4, 4)])
def test_gate(scores: str, experts: int, topk: int) -> None:
    for tokens in (1, 5, 4099):
        logits = torch.full((tokens, experts + 3), math.inf, device=DEVICE)[:, :experts]
        logits.copy_(normal(tokens, experts) * 4)
        logits[0] = 1  # ties
        bias = normal(experts, seed=1)
        mask = torch.arange(tokens, device=DEVICE) % 5 != 2
        for keywords in ({}, {"bias": bias}, {"bias": bias, "mask": mask, "index_dtype": torch.int64}):
            found = twice(lambda: jitgemm.topk_gate(logits, topk=topk, scores=scores, route_scale=2.5, **keywords))  # noqa: B023
            of_bias = keywords.get("bias")
            expected = moe.topk_gate(
                logits, of_bias, topk, scores, 2.5, None, None, keywords.get("mask"), found[0].dtype
            )
            assert torch.equal(found[0] < 0, expected[0] < 0)
            keys = moe.scores_of(logits.double(), scores) + (0 if of_bias is None else of_bias.double())
            mine, other = (keys.gather(1, indices.long().clamp(min=0)) for indices in (found[0], expected[0]))
            same = found[0] == expected[0]
            assert (same | ((mine - other).abs() <= 1e-6 * other.abs().clamp(min=1))).all()
            alike = same.all(1)  # another expert changes the weights of all
            assert alike.float().mean() > 0.9
            torch.testing.assert_close(found[1][alike], expected[1][alike], rtol=5e-5, atol=1e-7)
            if not keywords:
                assert found[0][0].tolist() == list(range(topk))


def test_hashed_gate_and_the_whole_gate() -> None:
    x, weight = normal(100, 4096, dtype=torch.bfloat16), normal(256, 4096, seed=1, dtype=torch.bfloat16)
    weight /= 16
    table = torch.randint(-1, 257, (1000, 6), device=DEVICE, dtype=torch.int32)
    ids = torch.randint(-1, 1001, (100,), device=DEVICE)
    logits = (x.double() @ weight.double().T).float()
    found = jitgemm.moe_gate(x, weight, route_scale=1.5, tid2eid=table, input_ids=ids)
    expected = moe.topk_gate(logits, None, 6, "sqrtsoftplus", 1.5, table, ids, None, torch.int32)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-7)
    indices, weights = jitgemm.moe_gate(x, weight, normal(256, seed=2), route_scale=1.5)
    torch.testing.assert_close(weights.sum(1), torch.full((100,), 1.5, device=DEVICE))
    assert all(len(set(row)) == 6 for row in indices.tolist())


@pytest.mark.parametrize(
    ("experts", "width", "topk"), [(256, 4096, 6), (384, 7168, 6), (33, 72, 8), (512, 1032, 32), (1000, 520, 4)]
)
def test_gate_of_few_tokens(experts: int, width: int, topk: int) -> None:
    wide = torch.full((experts, width + 8), math.nan, device=DEVICE, dtype=torch.bfloat16)
    weight = wide[:, :width]
    weight.copy_(normal(experts, width, seed=1) * 2 / math.sqrt(width))
    weight[experts - 1] = weight[0]  # keys that tie
    bias = normal(experts, seed=2)
    bias[experts - 1] = bias[0] = 9
    table = torch.randint(-1, experts + 1, (50, topk), device=DEVICE, dtype=torch.int32)
    for tokens in (1, 8, 9, 17, 33, 64):
        x = torch.full((tokens, width + 8), math.nan, device=DEVICE, dtype=torch.bfloat16)[:, :width]
        x.copy_(normal(tokens, width, seed=tokens))
        logits = (x.double() @ weight.double().T).float()
        mask = torch.arange(tokens, device=DEVICE) % 5 != 2
        ids = torch.arange(tokens, device=DEVICE) - 1
        for scores in moe.SCORES:
            for keywords in ({"bias": bias, "mask": mask}, {"tid2eid": table, "input_ids": ids}):
                found = twice(
                    lambda: jitgemm.moe_gate(x, weight, topk=topk, scores=scores, route_scale=2.5, **keywords)  # noqa: B023
                )
                optional = [keywords.get(name) for name in ("tid2eid", "input_ids", "mask")]
                of_bias = keywords.get("bias")
                expected = moe.topk_gate(logits, of_bias, topk, scores, 2.5, *optional, torch.int32)
                assert torch.equal(found[0] < 0, expected[0] < 0)
                # Tensor cores cut the FP32 sums of logits off.
                keys = moe.scores_of(logits.double(), scores) + (0 if of_bias is None else of_bias.double())
                mine, other = (keys.gather(1, indices.long().clamp(min=0)) for indices in (found[0], expected[0]))
                same = found[0] == expected[0]
                assert (same | ((mine - other).abs() <= 2e-5)).all()
                alike = same.all(1)
                torch.testing.assert_close(found[1][alike], expected[1][alike], rtol=2e-4, atol=1e-7)
                if of_bias is not None:
                    routed = found[0][mask]
                    assert (routed[:, 0] == 0).all()
                    assert (routed[:, 1] == experts - 1).all()


def choices(tokens: int, experts: int, kind: str) -> Tensor:
    if kind == "one":
        return torch.full((tokens, 6), experts - 1, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    chosen = torch.rand(tokens, experts, generator=generator, device=DEVICE).argsort(-1)[:, :6]
    dropped = torch.rand(tokens, 6, generator=generator, device=DEVICE) < (1.0 if kind == "none" else 0.05)
    return torch.where(dropped, -1, chosen)


@pytest.mark.parametrize("layout", moe.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_permutation_and_combination(layout: str, dtype: torch.dtype) -> None:
    for tokens, kind in [(t, "random") for t in (1, 8, 64, 128, 683, 5000, 65536)] + [(500, "one"), (700, "none")]:
        experts, first = (256, 0) if tokens % 2 == 0 else (96, 96)
        indices = choices(tokens, experts + first, kind).to(dtype)
        weights = torch.rand(tokens, 6, device=DEVICE)
        limit = 64 if layout == "masked" else None
        keywords: dict[str, Any] = {"layout": layout, "max_m": limit, "first_expert": first}
        made = jitgemm.moe_permutation(indices, experts, weights, **keywords)
        expected = moe.moe_permutation(indices, weights, experts, layout, 128, limit or 0, first)
        for one, other in zip(made[:4], expected, strict=True):
            assert torch.equal(one, other)
        if tokens > 5000:
            continue
        x = normal(tokens, 1024, dtype=torch.bfloat16)
        rows, scales = jitgemm.moe_permute(x, made, x[:, :9].float(), zero_padding=True)
        item = made.pos_to_token_topk.long()
        exists = (item >= 0).unsqueeze(1)
        flat = torch.where(exists, x[(item // 6).clamp(min=0)], 0)
        assert torch.equal(rows.reshape(-1, 1024), flat)
        assert scales is not None
        assert torch.equal(scales.reshape(-1, 9), flat[:, :9].float())
        sparse, _ = jitgemm.moe_permute(x, made)
        assert torch.equal(sparse.reshape(-1, 1024)[exists[:, 0]], flat[exists[:, 0]])
        for of_weights, shared in ((weights, None), (None, x)):
            found = twice(
                lambda w=of_weights, s=shared: jitgemm.moe_combine(rows, made.token_topk_to_pos, w, s)  # noqa: B023
            )
            exact = moe.moe_combine(flat, made.token_topk_to_pos, of_weights, shared)
            assert within_one_step(found, exact, 1e-5)


def test_permute_fp8_rows() -> None:
    x = normal(300, 7168, dtype=torch.bfloat16)
    data, scales = jitgemm.per_token_cast_to_fp8(x)
    made = jitgemm.moe_permutation(choices(300, 384, "random"), 384, layout="psum")
    rows, rows_scales = jitgemm.moe_permute(data, made, scales)
    item = made.pos_to_token_topk.long()
    exists = item >= 0
    assert torch.equal(rows.view(torch.uint8)[exists], data.view(torch.uint8)[item[exists] // 6])
    assert rows_scales is not None
    assert torch.equal(rows_scales[exists], scales[item[exists] // 6])
    assert jitgemm.get_mn_major_tma_aligned_tensor(rows_scales) is rows_scales


def block(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """All of it, one after the other, as a layer would."""
    y, post, comb = jitgemm.hc_pre(x, fn, scale, base)
    indices, weights = jitgemm.moe_gate(y, weight, route_scale=1.5)
    made = jitgemm.moe_permutation(indices, weight.shape[0], weights, layout="psum")
    rows, _ = jitgemm.moe_permute(y, made)
    combined = jitgemm.moe_combine(rows, made.token_topk_to_pos, weights, y)
    streams = jitgemm.hc_post(combined, x, post, comb)
    return streams, jitgemm.hc_head(streams, fn[:4], scale[:1], base[:4])


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("tokens", [1, 64, 1500])
def test_captured_and_compiled(tokens: int, pdl: bool) -> None:
    fn, scale, base = layer_weights(4096)
    weight = normal(256, 4096, seed=9, dtype=torch.bfloat16) / 64
    x = normal(tokens, 4, 4096, dtype=torch.bfloat16)
    with settings.override(pdl=pdl):
        expected = block(x, fn, scale, base, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = block(x, fn, scale, base, weight)
        for seed in (0, 4):
            x.copy_(normal(tokens, 4, 4096, seed=seed, dtype=torch.bfloat16))
            for output in outputs:
                output.fill_(math.nan)
            graph.replay()
            expected = block(x, fn, scale, base, weight)
            for output, other in zip(outputs, expected, strict=True):
                assert torch.equal(output, other)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x, fn, scale, base, weight)
        for output, other in zip(compiled, expected, strict=True):
            assert torch.equal(output, other)


def test_a_missing_kernel_names_its_command(monkeypatch: pytest.MonkeyPatch, cache_dir: Any) -> None:
    monkeypatch.setattr(kernel, "_kernels", {})
    plain.forget_plans()
    builder.forget()
    with settings.override(jit="forbid"), pytest.raises(CacheMissError, match=r'prewarm.*"kind": "hc_post"'):
        jitgemm.hc_post(*(normal(*shape) if i > 1 else normal(*shape, dtype=torch.bfloat16)
                          for i, shape in enumerate(((2, 64), (2, 4, 64), (2, 4), (2, 4, 4)))))  # fmt: skip
    plain.forget_plans()


def test_another_stream_and_no_tokens() -> None:
    fn, scale, base = layer_weights(1280)
    x = normal(9, 4, 1280, dtype=torch.bfloat16)
    expected = jitgemm.hc_pre(x, fn, scale, base)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = jitgemm.hc_pre(x, fn, scale, base)
    stream.synchronize()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    y, post, comb = jitgemm.hc_pre(x[:0], fn, scale, base)
    assert jitgemm.hc_post(y, x[:0], post, comb).shape == (0, 4, 1280)
    indices, weights = jitgemm.moe_gate(y, fn[:, :1280].bfloat16(), topk=2)
    made = jitgemm.moe_permutation(indices, 24, weights, layout="masked", max_m=8)
    assert made.grouped_layout.tolist() == [0] * 24
    assert (made.pos_to_token_topk == -1).all()
    assert jitgemm.moe_combine(normal(5, 1280, dtype=torch.bfloat16), made.token_topk_to_pos).shape == (0, 1280)


def test_the_most_tokens() -> None:
    """Offsets beyond 2^31 elements: the experts' rows here are 3.0e9."""
    tokens, width, experts, topk = 65536, 7168, 256, 6
    fn, scale, base = layer_weights(width)
    x = torch.empty(tokens, 4, width, dtype=torch.bfloat16, device=DEVICE).normal_()
    y, post, comb = jitgemm.hc_pre(x, fn, scale, base, precision="fp32")
    indices = torch.randint(experts, (tokens, topk), dtype=torch.int32, device=DEVICE)
    weights = torch.rand(tokens, topk, device=DEVICE)
    made = jitgemm.moe_permutation(indices, experts, weights, layout="psum")
    furthest = int(made.token_topk_to_pos.amax(1).argmax())
    checked = torch.tensor([0, 32768, furthest, tokens - 2, tokens - 1], device=DEVICE)
    expected = hc.hc_pre(x[checked], fn, scale, base, 1e-6, 1e-6, 20, 2.0)
    assert within_one_step(y[checked], expected[0], 2e-4)
    torch.testing.assert_close(comb[checked], expected[2], rtol=1e-4, atol=1e-8)
    streams = jitgemm.hc_post(y, x, post, comb)
    assert within_one_step(streams[checked], hc.hc_post(y[checked], x[checked], post[checked], comb[checked]), 1e-5)
    del streams, x
    rows, _ = jitgemm.moe_permute(y, made)
    assert rows.numel() > 2**31
    pos = made.token_topk_to_pos[checked]
    assert torch.equal(rows[pos.long()], y[checked].unsqueeze(1).expand(-1, topk, -1))
    combined = jitgemm.moe_combine(rows, made.token_topk_to_pos, weights, y)
    assert within_one_step(combined[checked], moe.moe_combine(rows, pos, weights[checked], y[checked]), 1e-5)
