"""Hyper-connections: the reference against the recurrence written out, the kernels (emulated) against the reference."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from emulation.plain import emulated  # noqa: F401 (a fixture)
from torch import Tensor
from torch._subclasses import FakeTensorMode

import jitgemm
from jitgemm import settings
from jitgemm.errors import ProblemError
from jitgemm.families import hyper_connections as families
from jitgemm.families.hyper_connections import MIX_TOKENS, choose_num_splits, choose_prenorm
from jitgemm.ops import hyper_connections, plain
from jitgemm.reference import hyper_connections as reference

# Weights that a trained layer has: pre and post far from 1/2, comb near the identity.
TRAINED_SCALE = torch.tensor([0.0761, 0.0326, 0.2270])
TRAINED_BASE = torch.tensor(
    [
        *(5.9, -3.6, -2.9, -3.3),
        *(-3.9, -0.94, -3.3, -2.5),
        *(3.0, -2.1, -3.3, -2.7, -4.0, 2.0, -2.2, -3.1, -2.4, -3.7, 3.5, -2.9, -3.0, -2.6, -2.2, 2.6),
    ]
)
NAMES = ("hc_head", "hc_post", "hc_pre", "hc_split_sinkhorn", "tf32_hc_prenorm_gemm")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def streams(tokens: int, width: int, seed: int = 0) -> Tensor:
    return (torch.randn(tokens, 4, width, generator=generator(seed)) * 3).bfloat16()


def fp32_streams(tokens: int, width: int) -> Tensor:
    """What neither BF16 nor TF32 holds."""
    return torch.randn(tokens, 4, width, generator=generator(5)) * 3


def weights(rows: int, width: int) -> Tensor:
    return torch.randn(rows, 4 * width, generator=generator(7)) / math.sqrt(width)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float(((actual.double() - expected.double()).abs() / expected.double().abs().clamp(min=1e-30)).max())


def within_one_step(actual: Tensor, expected: Tensor) -> bool:
    """Whether BF16 results are the nearest or, of sums that lie on a boundary, the one beside it."""
    spacing = expected.double().abs().clamp(min=2.0**-100).log2().floor().exp2() * 2.0**-7
    return bool(((actual.double() - expected.double()).abs() <= spacing).all())


def written_out(mixes: list[float], scale: list[float], base: list[float], iterations: int = 20) -> Any:
    """The recurrence for one token, in Python's own numbers."""

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

    eps = 1e-6
    pre = [sigmoid(mixes[j] * scale[0] + base[j]) + eps for j in range(4)]
    post = [2 * sigmoid(mixes[4 + j] * scale[1] + base[4 + j]) for j in range(4)]
    c = [[mixes[8 + 4 * j + k] * scale[2] + base[8 + 4 * j + k] for k in range(4)] for j in range(4)]
    for j in range(4):
        largest = max(c[j])
        exponentials = [math.exp(value - largest) for value in c[j]]
        c[j] = [value / sum(exponentials) + eps for value in exponentials]
    for i in range(iterations):
        if i:
            for j in range(4):
                total = sum(c[j]) + eps
                c[j] = [value / total for value in c[j]]
        totals = [sum(c[j][k] for j in range(4)) + eps for k in range(4)]
        c = [[c[j][k] / totals[k] for k in range(4)] for j in range(4)]
    return pre, post, c


@pytest.mark.parametrize("trained", [False, True])
def test_the_reference_is_the_recurrence(trained: bool) -> None:
    mixes = torch.randn(6, 24, generator=generator()) * 3
    mixes[1] = 80 * mixes[1].sign()
    mixes[2] = 0
    scale, base = (TRAINED_SCALE, TRAINED_BASE) if trained else (torch.tensor([0.5, 1.0, 1.0]), torch.zeros(24))
    found = reference.hc_split_sinkhorn(mixes, scale, base, 20, 1e-6, 2.0)
    for token in range(len(mixes)):
        expected = written_out(mixes[token].tolist(), scale.tolist(), base.tolist())
        for one, values in zip(found, expected, strict=True):
            torch.testing.assert_close(
                one[token].double(), torch.tensor(values, dtype=torch.float64), rtol=1e-6, atol=0
            )
    assert (found[2].sum(-2) - 1).abs().max() < 2e-6
    if trained:  # near the identity
        assert (found[2].diagonal(dim1=-2, dim2=-1)[2] > 0.8).all()


def test_the_reference_of_pre_post_and_head() -> None:
    x, fn = streams(5, 16), weights(24, 16)
    y, post, comb = reference.hc_pre(x, fn, TRAINED_SCALE, TRAINED_BASE, 1e-6, 1e-6, 20, 2.0)
    head = reference.hc_head(x, fn[:4], TRAINED_SCALE[:1], TRAINED_BASE[:4], 1e-6, 1e-6)
    back = reference.hc_post(y, x, post, comb)
    for token in range(5):
        flat = [float(value) for value in x[token].flatten()]
        r = 1 / math.sqrt(sum(value**2 for value in flat) / len(flat) + 1e-6)
        mixes = [r * sum(a * float(b) for a, b in zip(flat, row, strict=True)) for row in fn]
        pre, post_of, comb_of = written_out(mixes, TRAINED_SCALE.tolist(), TRAINED_BASE.tolist())
        torch.testing.assert_close(post[token], torch.tensor(post_of), rtol=1e-6, atol=0)
        torch.testing.assert_close(comb[token], torch.tensor(comb_of), rtol=1e-6, atol=0)
        for d in range(16):
            total = sum(pre[h] * float(x[token, h, d]) for h in range(4))
            assert within_one_step(y[token, d], torch.tensor(total))
            assert within_one_step(head[token, d], torch.tensor(total))
            for k in range(4):
                mixed = sum(comb_of[j][k] * float(x[token, j, d]) for j in range(4))
                assert within_one_step(back[token, k, d], torch.tensor(post_of[k] * float(y[token, d]) + mixed))


def test_split_ranges_cover_k_in_blocks_of_64() -> None:
    assert reference.split_ranges(28672, 1) == [(0, 28672)]
    assert reference.split_ranges(320, 3) == [(0, 128), (128, 256), (256, 320)]
    assert reference.split_ranges(200, 5) == [(0, 64), (64, 128), (128, 192), (192, 200), (200, 200)]


@pytest.mark.parametrize("tokens", [1, 31, 70])
def test_sinkhorn_kernel(emulated: Any, tokens: int) -> None:  # noqa: F811
    mixes = torch.randn(tokens, 24, generator=generator(tokens)) * 3
    mixes[-1, ::2], mixes[-1, 1::2] = 80, -80
    for scale, base in ((TRAINED_SCALE, TRAINED_BASE), (torch.ones(3), torch.zeros(24))):
        for iterations in (1, 20):
            found = jitgemm.hc_split_sinkhorn(mixes, scale, base, iterations)
            expected = reference.hc_split_sinkhorn(mixes, scale, base, iterations, 1e-6, 2.0)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)
    assert [spec.family for spec in emulated] == ["hc_sinkhorn"] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
@pytest.mark.parametrize(
    ("m", "n", "k", "splits"),
    [(13, 24, 1288, 3), (33, 24, 640, None), (70, 4, 200, 2), (140, 4, 200, 7), (270, 20, 328, 1), (3, 9, 8, 1)],
)
def test_prenorm_kernel(
    emulated: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    m: int,
    n: int,
    k: int,
    splits: int | None,
    precision: str,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(families, "_MEDIUM_ROWS", 100)
    # Rows of a wider matrix, and NaN around what is asked for.
    storage = torch.full((m + 2, k + 24), math.nan, dtype=dtype)
    a = storage[1:-1, 8 : 8 + k]
    a.copy_(torch.randn(m, k, generator=generator(k)))
    fn = torch.full((n, k + 4), math.nan)[:, :k]
    fn.copy_(torch.randn(n, k, generator=generator(n)))
    leading = () if splits is None else (splits,)
    d, squares = torch.full((*leading, m, n), math.nan), torch.full((*leading, m), math.nan)
    jitgemm.tf32_hc_prenorm_gemm(a, fn, d, squares, splits, precision=precision)
    exact_d, exact_squares = torch.empty_like(d), torch.empty_like(squares)
    plain.forget_plans()
    for split, (start, end) in enumerate(reference.split_ranges(k, splits or 1)):
        product, sums = reference.hc_prenorm_gemm(a[:, start:end], fn[:, start:end])
        exact_d.view(-1, m, n)[split], exact_squares.view(-1, m)[split] = product, sums
    torch.testing.assert_close(squares, exact_squares, rtol=2e-6, atol=1e-6)
    error = 1 - 2 * (d.double() * exact_d).sum() / (d.double().square() + exact_d.double().square()).sum()
    assert error < (2e-7 if precision == "tf32" else 1e-12)
    assert {spec["fp32"] for spec in emulated} == {dtype == torch.float32}


@pytest.mark.parametrize("make", [streams, fp32_streams])
@pytest.mark.parametrize(("tokens", "width"), [(1, 2056), (14, 264), (40, 72)])
def test_pre_and_head_kernels(emulated: Any, tokens: int, width: int, make: Any) -> None:  # noqa: F811
    x, fn = make(tokens, width), weights(24, width)
    x[0, 1] = 0
    arguments = (x, fn, TRAINED_SCALE, TRAINED_BASE)
    y, post, comb = jitgemm.hc_pre(*arguments, precision="fp32")
    expected = reference.hc_pre(*arguments, 1e-6, 1e-6, 20, 2.0)
    torch.testing.assert_close(post, expected[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(comb, expected[2], rtol=2e-5, atol=0)
    assert y.dtype == torch.bfloat16 and within_one_step(y, expected[0])
    arguments = (x, fn[:4].contiguous(), TRAINED_SCALE[:1], TRAINED_BASE[:4])
    assert within_one_step(jitgemm.hc_head(*arguments, precision="fp32"), reference.hc_head(*arguments, 1e-6, 1e-6))
    assert [spec.family for spec in emulated] == ["hc_prenorm", "hc_mix"] * 2


@pytest.mark.parametrize("tokens", [1, 16, 37])
def test_weights_of_many_tokens_a_block(emulated: Any, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:  # noqa: F811
    arguments = (streams(tokens, 24), weights(24, 24), TRAINED_SCALE, TRAINED_BASE)
    found = []
    for per_block in MIX_TOKENS:
        monkeypatch.setattr(hyper_connections, "choose_mix_tokens", lambda _, per_block=per_block: per_block)
        plain.forget_plans()
        found.append(jitgemm.hc_pre(*arguments))
        assert emulated[-1]["tokens_per_block"] == per_block
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)  # sums in the same order


def test_tokens_of_zeros(emulated: Any) -> None:  # noqa: F811
    y, post, comb = jitgemm.hc_pre(torch.zeros(2, 4, 64).bfloat16(), weights(24, 64), TRAINED_SCALE, TRAINED_BASE)
    assert not y.any()
    expected = reference.hc_split_sinkhorn(torch.zeros(2, 24), TRAINED_SCALE, TRAINED_BASE, 20, 1e-6, 2.0)
    torch.testing.assert_close(post, expected[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(comb, expected[2], rtol=2e-5, atol=0)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(1, 2056), (5, 72)])
def test_post_kernel(emulated: Any, tokens: int, width: int, inplace: bool) -> None:  # noqa: F811
    x, residual = streams(tokens, width, seed=3)[:, 0].contiguous(), streams(tokens, width)
    _, post, comb = reference.hc_split_sinkhorn(
        torch.randn(tokens, 24, generator=generator()), torch.ones(3), torch.zeros(24), 20, 1e-6, 2.0
    )
    expected = reference.hc_post(x, residual, post, comb)
    before = residual.clone()
    y = jitgemm.hc_post(x, residual, post, comb, inplace=inplace)
    assert within_one_step(y, expected)
    assert (y is residual) == inplace
    assert inplace or torch.equal(before, residual)


@pytest.mark.parametrize("inplace", [False, True])
def test_post_kernel_of_fp32_streams(emulated: Any, inplace: bool) -> None:  # noqa: F811
    x, residual = streams(5, 72, seed=3)[:, 0].contiguous(), fp32_streams(5, 72)
    _, post, comb = reference.hc_split_sinkhorn(torch.randn(5, 24), torch.ones(3), torch.zeros(24), 20, 1e-6, 2.0)
    expected = reference.hc_post(x, residual, post, comb)
    y = jitgemm.hc_post(x, residual, post, comb, inplace=inplace)
    assert y.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert (y is residual) == inplace


def test_empty_inputs(emulated: Any) -> None:  # noqa: F811
    x, fn = streams(0, 64), weights(24, 64)
    y, post, comb = jitgemm.hc_pre(x, fn, TRAINED_SCALE, TRAINED_BASE)
    assert (y.shape, post.shape, comb.shape) == ((0, 64), (0, 4), (0, 4, 4))
    assert jitgemm.hc_post(y, x, post, comb).shape == (0, 4, 64)
    assert jitgemm.hc_head(x, fn[:4], TRAINED_SCALE[:1], TRAINED_BASE[:4]).shape == (0, 64)
    assert jitgemm.hc_split_sinkhorn(torch.empty(0, 3, 24), TRAINED_SCALE, TRAINED_BASE)[2].shape == (0, 3, 4, 4)
    jitgemm.tf32_hc_prenorm_gemm(torch.empty(0, 64).bfloat16(), fn[:, :64], torch.empty(0, 24), torch.empty(0))
    assert not emulated


def test_splits_fill_the_gpu_in_whole_waves() -> None:
    for m in (1, 13, 32, 33, 137, 512, 1025, 4096, 8192, 16896, 20000, 65536):
        config = choose_prenorm(m)
        slots = 132 * config.blocks_per_sm
        for k in (7168, 7680, 16384, 28672):
            splits = choose_num_splits(m, k, 132)
            tiles = -(-m // config.tile_m)
            blocks, waves = tiles * splits, -(-tiles * splits // slots)
            assert 1 <= splits <= min(128, k // 128)
            assert splits == k // 128 or splits == 128 or blocks > 0.75 * waves * slots
    assert choose_num_splits(8192, 28672, 132) == 4
    assert choose_num_splits(20000, 28672, 132) == 3  # 79 tiles: two waves of 237 blocks, not one of 79
    assert choose_num_splits(0, 64, 132) == 1
    assert jitgemm.get_hc_prenorm_num_splits(4096, 16384, 132) == 8


X, FN = streams(2, 64), weights(24, 64)
FLAT = X[0]
ONES, D, SUMS = torch.ones(25, 64), torch.empty(2, 4), torch.empty(2)
POST, COMB = torch.ones(2, 4), torch.ones(2, 4, 4)
BAD: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    ("hc_pre", r"x has shape \[2, 3, 64\]", (X[:, :3], FN, TRAINED_SCALE, TRAINED_BASE), {}),
    ("hc_pre", "x has dtype torch.float16; accepted is .*float32", (X.half(), FN, TRAINED_SCALE, TRAINED_BASE), {}),
    ("hc_pre", "x is list", ([1], FN, TRAINED_SCALE, TRAINED_BASE), {}),
    ("hc_pre", "x has shape .* and strides", (X.mT.contiguous().mT, FN, TRAINED_SCALE, TRAINED_BASE), {}),
    ("hc_pre", "multiple of 8", (X[..., :60].contiguous(), FN, TRAINED_SCALE, TRAINED_BASE), {}),
    ("hc_pre", r"fn has shape \[23, 256\]", (X, FN[:23], TRAINED_SCALE, TRAINED_BASE), {}),
    ("hc_pre", r"scale has shape \[2\]", (X, FN, TRAINED_SCALE[:2], TRAINED_BASE), {}),
    ("hc_pre", "sinkhorn_iterations is 0", (X, FN, TRAINED_SCALE, TRAINED_BASE), {"sinkhorn_iterations": 0}),
    ("hc_pre", "eps is nan", (X, FN, TRAINED_SCALE, TRAINED_BASE), {"eps": math.nan}),
    ("hc_pre", "precision is 'bf16'", (X, FN, TRAINED_SCALE, TRAINED_BASE), {"precision": "bf16"}),
    ("hc_pre", r"norm_eps is \[\]", (X, FN, TRAINED_SCALE, TRAINED_BASE), {"norm_eps": []}),
    ("hc_head", r"base has shape \[24\]", (X, FN[:4], TRAINED_SCALE[:1], TRAINED_BASE), {}),
    ("hc_post", r"residual has shape \[1, 4, 64\]", (X[:, 0].contiguous(), X[:1], POST, COMB), {}),
    ("hc_post", r"post has shape \[2, 3\]", (X[:, 0].contiguous(), X, POST[:, :3], COMB), {}),
    ("hc_post", "x has dtype torch.float32", (X[:, 0].contiguous().float(), X.float(), POST, COMB), {}),
    ("hc_post", "residual is NoneType", (X[:, 0].contiguous(), None, POST, COMB), {}),
    ("hc_post", "inplace is 1", (X[:, 0].contiguous(), X, POST, COMB), {"inplace": 1}),
    ("hc_split_sinkhorn", r"mixes has shape \[5, 23\]", (torch.ones(5, 23), TRAINED_SCALE, TRAINED_BASE), {}),
    ("hc_split_sinkhorn", r"mixes has shape \[\]", (torch.ones(()), TRAINED_SCALE, TRAINED_BASE), {}),
    ("tf32_hc_prenorm_gemm", r"d has shape \[2, 24\]", (X.flatten(1), FN, torch.empty(2, 24), torch.empty(2), 2), {}),
    ("tf32_hc_prenorm_gemm", "num_splits is 0", (X.flatten(1), FN, torch.empty(2, 24), torch.empty(2), 0), {}),
    ("tf32_hc_prenorm_gemm", r"b has shape \[25, 64\]", (X[:, 0], ONES, D, SUMS), {}),
    ("tf32_hc_prenorm_gemm", "a has rows of 120 bytes", (X[:, 0, :60], ONES[:4, :60], D, SUMS), {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "message", "arguments", "keywords"), BAD, ids=range(len(BAD)))
def test_bad_arguments(name: str, message: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    with pytest.raises(ProblemError, match=message):
        getattr(jitgemm, name)(*arguments, **keywords)


def test_what_overlaps_what_is_written(emulated: Any) -> None:  # noqa: F811
    with pytest.raises(ProblemError, match="residual, which is written, overlaps x"):
        jitgemm.hc_post(X[:1, 0], X[:1], POST[:1], COMB[:1], inplace=True)
    d, squares = torch.empty(2, 24), torch.empty(2)
    with pytest.raises(ProblemError, match="d overlaps b"):
        jitgemm.tf32_hc_prenorm_gemm(X.flatten(1), FN, FN.view(-1)[:48].view(2, 24), squares)
    with pytest.raises(ProblemError, match="sqr_sum overlaps d"):
        jitgemm.tf32_hc_prenorm_gemm(X.flatten(1), FN, d, d.view(-1)[:2])
    with pytest.raises(ProblemError, match="x starts at address"):
        jitgemm.hc_post(torch.empty(129).bfloat16()[1:].view(2, 64), X, POST, COMB)


def call_all(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, ...]:
    y, post, comb = jitgemm.hc_pre(x, fn, scale, base)
    streams = jitgemm.hc_post(y, x, post, comb)
    d, squares = fn.new_empty(2, x.shape[0], 24), fn.new_empty(2, x.shape[0])
    jitgemm.tf32_hc_prenorm_gemm(streams.flatten(1), fn, d, squares, 2)
    pre, *_ = jitgemm.hc_split_sinkhorn(d.sum(0), scale, base)
    jitgemm.hc_post(y, streams, post, comb, inplace=True)
    return y, comb, streams, squares, pre, jitgemm.hc_head(streams, fn[:4], scale[:1], base[:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiled_as_a_full_graph(dtype: torch.dtype) -> None:
    arguments = X.to(dtype), FN, TRAINED_SCALE, TRAINED_BASE
    compiled = torch.compile(call_all, backend="aot_eager", fullgraph=True)(*arguments)
    for one, other in zip(compiled, call_all(*arguments), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fake_tensors_have_the_shapes(dtype: torch.dtype) -> None:
    arguments = X.to(dtype), FN, TRAINED_SCALE, TRAINED_BASE
    with FakeTensorMode() as mode:
        fakes = call_all(*map(mode.from_tensor, arguments))
        with pytest.raises(ProblemError, match="x has shape"):
            jitgemm.hc_pre(mode.from_tensor(FLAT), *map(mode.from_tensor, arguments[1:]))
    for fake, real in zip(fakes, call_all(*arguments), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_operators_pass_torchs_checks() -> None:
    torch.library.opcheck(torch.ops.jitgemm.hc_post, (X[:, 0].contiguous(), X, POST, COMB))
    torch.library.opcheck(torch.ops.jitgemm.hc_post_, (X[:, 0].contiguous(), X.clone(), POST, COMB))
    torch.library.opcheck(torch.ops.jitgemm.hc_pre, (X, FN, TRAINED_SCALE, TRAINED_BASE, 1e-6, 1e-6, 20, 2.0, "tf32"))


def test_parameters_that_require_grad_are_read() -> None:
    fn = torch.nn.Parameter(FN)
    y, *_ = jitgemm.hc_pre(X, fn, TRAINED_SCALE, TRAINED_BASE)
    assert not y.requires_grad


def test_problems_are_recorded(tmp_path: Any) -> None:
    path = tmp_path / "shapes.jsonl"
    with settings.override(record=path):
        call_all(X, FN, TRAINED_SCALE, TRAINED_BASE)
        call_all(X.float(), FN, TRAINED_SCALE, TRAINED_BASE)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {"kind": "hc_post"} in lines and {"kind": "hc_post", "dtype": "fp32"} in lines
    kinds = {line["kind"] for line in lines}
    assert kinds == {"hc_pre", "hc_post", "hc_head", "hc_split_sinkhorn", "hc_prenorm_gemm"}
    assert set(NAMES) <= set(jitgemm.__all__)
