"""Quantizers, SwiGLU, RMSNorm and rotary embedding on CUDA tensors: the reference's bits, computed from CPU copies."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import environment
from torch import Tensor

import jitgemm
from jitgemm import settings
from jitgemm.errors import CacheMissError
from jitgemm.heuristics import rowwise as heuristics
from jitgemm.ops import rowwise_launch
from jitgemm.ops.rowwise_launch import E8M0

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = torch.device("cuda", 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS = (1, 2, 7, 13, 64, 129, 1000)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Any:
    """What is allocated holds NaN, or the largest integers, until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def rows(m: int, n: int, dtype: torch.dtype = BF16, special: bool = True) -> Tensor:
    """Magnitudes over many binades, zeros and zero groups; NaN, Inf and subnormals if asked for; on the CPU."""
    generator = torch.Generator().manual_seed(m * 31 + n)
    x = torch.randn((m, n), generator=generator) * torch.randint(-12, 9, (m, 1), generator=generator).float().exp2()
    x[torch.rand((m, n), generator=generator) < 0.05] = 0
    x[0, : n // 2] = 0
    if special and m > 2:
        x[-1, n // 3], x[-1, -1], x[m // 2, n // 2] = math.inf, -math.inf, math.nan
        x[m // 3, :8] = 1e-7 if dtype == FP16 else 1e-39
    return x.to(dtype)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def assert_same(actual: Any, expected: Any) -> None:
    """Equal bits but for those of a NaN, equal strides."""
    for a, b in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.numel() <= 1 or a.stride() == b.stride()
        a = a.cpu()
        if a.dtype.is_floating_point and a.dtype != E8M0:
            nan = b.float().isnan()
            assert torch.equal(a.float().isnan(), nan)
            a, b = (t.float().masked_fill(nan, 0).contiguous().view(torch.int32) for t in (a, b))
        else:
            a, b = (t.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8) for t in (a, b))
        wrong = (a != b).nonzero()
        assert not len(wrong), f"{len(wrong)} of {a.numel()} differ, first at {wrong[0].tolist()}"


def check(call: Callable[..., Any], *tensors: Tensor | None) -> None:
    """The same from CUDA tensors as from CPU tensors, twice."""
    expected = call(*tensors)
    moved = [t if t is None else t.to(DEVICE) for t in tensors]
    assert_same(call(*moved), expected)
    assert_same(call(*moved), expected)


@pytest.fixture(params=[0, 1], ids=["few rows", "many rows"])
def every_config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The config for few rows, then that for many, whatever their number."""
    monkeypatch.setattr(heuristics, "choose_config", lambda p, d: heuristics.enumerate_configs(p)[request.param])
    rowwise_launch.forget_plans()
    yield
    rowwise_launch.forget_plans()


CASTS: dict[str, Callable[[Tensor], Any]] = {
    "e4m3 fp32": lambda x: jitgemm.act_quant(x),
    "e4m3 fp32 col_major": lambda x: jitgemm.act_quant(x, 64, scale_layout="col_major"),
    "e4m3 pow2 tma": lambda x: jitgemm.act_quant(x, 128, "ue8m0", scale_layout="mn_major_tma_aligned"),
    "e4m3 ue8m0": lambda x: jitgemm.act_quant(x, 32, "ue8m0", E8M0),
    "e4m3 packed tma": lambda x: jitgemm.act_quant(x, 128, "ue8m0", torch.int32, scale_layout="mn_major_tma_aligned"),
    "e4m3 packed": lambda x: jitgemm.act_quant(x, 32, "ue8m0", torch.int32),
    "e4m3 16": lambda x: jitgemm.act_quant(x, 16, "ue8m0"),
    "per_token": lambda x: jitgemm.per_token_cast_to_fp8(x),
    "per_token packed": lambda x: jitgemm.per_token_cast_to_fp8(x, True, 128, True),
    "per_block": lambda x: jitgemm.per_block_cast_to_fp8(x),
    "per_block pow2": lambda x: jitgemm.per_block_cast_to_fp8(x, True, 32),
    "per_channel": lambda x: jitgemm.per_channel_cast_to_fp8(x),
    "per_channel pow2": lambda x: jitgemm.per_channel_cast_to_fp8(x, True, 64),
    "int8": lambda x: jitgemm.int8_act_quant(x),
    "int8 rows": lambda x: jitgemm.per_token_cast_to_int8(x),
    "mxfp4": lambda x: jitgemm.fp4_act_quant(x),
    "mxfp4 ties zero": lambda x: jitgemm.fp4_act_quant(x, ties="zero"),
    "nvfp4": lambda x: jitgemm.nvfp4_act_quant(x),
    "nvfp4 ties away": lambda x: jitgemm.nvfp4_act_quant(x, ties="away"),
}


@pytest.mark.parametrize("name", CASTS)
def test_casts(name: str, every_config: None) -> None:
    for m in ROWS:
        check(CASTS[name], rows(m, 384))
    check(CASTS[name], rows(3, 7168))
    check(CASTS[name], rows(65, 4096))
    for dtype in (FP16, FP32):
        check(CASTS[name], rows(5, 1152, dtype))
    check(CASTS[name], torch.empty(0, 256, dtype=BF16))
    if name in ("int8 rows", "mxfp4", "nvfp4"):  # the others are of matrices
        check(CASTS[name], rows(3, 384)[1])


@pytest.mark.parametrize("name", CASTS)
def test_every_16_bit_pattern(name: str, every_config: None) -> None:
    """All numbers, each 32 times scaled by a power of two, beside their neighbours."""
    for dtype in (BF16, FP16):
        patterns = torch.arange(65536).to(torch.int16).view(dtype).view(-1, 128)
        check(CASTS[name], patterns)
        check(CASTS[name], patterns.t().contiguous())


@pytest.mark.parametrize("format", ["e4m3", "e4m3 pow2", "int8", "mxfp4", "nvfp4"])
def test_ties_beside_a_largest_element(format: str, every_config: None) -> None:
    """Numbers at, just below and just above midpoints of codes, where the scale is 1."""
    top, step = {"e4m3": (448.0, 2.0**-10), "int8": (127.0, 0.25)}.get(format.split()[0], (6.0, 1 / 64))
    x = torch.arange(0, top, step if format[0] != "e" else 2.0**-4)
    if format[0] == "e":
        x = torch.cat([x, torch.arange(0, 2, step)])
    x = torch.cat([x, torch.nextafter(x, x - 1), torch.nextafter(x, x + 1)])
    x = torch.cat([x, -x])
    x = torch.nn.functional.pad(x, (0, -len(x) % 15)).view(-1, 15)
    x = torch.cat([torch.full((len(x), 1), top), x], 1)
    call = {
        "e4m3": lambda y: jitgemm.act_quant(y, 16),
        "e4m3 pow2": lambda y: jitgemm.act_quant(y, 16, "ue8m0"),
        "int8": lambda y: jitgemm.int8_act_quant(y, 16),
        "mxfp4": lambda y: jitgemm.fp4_act_quant(y, 16),
        "nvfp4": lambda y: jitgemm.nvfp4_act_quant(y),
    }[format]
    check(call, x)


def test_nvfp4_scales_over_all_amax(every_config: None) -> None:
    amax = torch.arange(0x7F80).to(torch.int16).view(BF16)
    x = torch.zeros(len(amax), 16, dtype=BF16)
    x[:, 5] = amax
    x[:, 6] = -amax / 3
    check(lambda y: jitgemm.nvfp4_act_quant(y), x)


@pytest.mark.parametrize(
    "name", ["e4m3 fp32", "e4m3 packed tma", "int8 rows", "mxfp4", "nvfp4", "per_block", "per_channel"]
)
def test_strided_and_unaligned_rows(name: str, every_config: None) -> None:
    base = rows(260, 600)
    for view in (
        base[:, 8:392],
        base[:, 3:387],
        base[::2, :384],
        base[:256].t(),
        base[:, 1::2][:, :256],
        base[5:6, :256],
    ):
        moved = base.to(DEVICE).as_strided(view.shape, view.stride(), view.storage_offset())
        assert_same(CASTS[name](moved), CASTS[name](view))


def test_ragged_widths(every_config: None) -> None:
    for n in (1, 7, 200, 1000, 4097):
        for name in ("per_token", "per_token packed", "per_block", "per_channel"):
            check(CASTS[name], rows(131, n))
        check(lambda x: jitgemm.swiglu(x), torch.zeros(3, 2 * n, dtype=BF16))
        check(lambda x, w: jitgemm.rms_norm(x, w), rows(5, n), rows(1, n)[0])
        check(lambda x: jitgemm.per_token_cast_to_int8(x), rows(131, n))
        check(lambda x, w: jitgemm.rms_norm_cast_to_int8(x, w), rows(5, n), rows(1, n)[0])


def test_round_trips_leave_the_rest_alone(every_config: None) -> None:
    for start in (0, 1, 64):

        def call(base: Tensor, start: int = start) -> Tensor:
            base = base.clone()
            jitgemm.act_quant(base[:, start : start + 448], 64, "ue8m0", inplace=True)
            jitgemm.fp4_act_quant(base[:, start : start + 64], inplace=True)
            return base

        check(call, rows(77, 520))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_staging(index: torch.dtype, every_config: None) -> None:
    m, n, k = 137, 7168, 6
    ids = torch.randint(-1, 384, (k, m), dtype=index).t()

    def call(x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        results: list[Tensor] = []
        for stage, dtype, width, words in (
            (jitgemm.stage_nvfp4, torch.uint8, n // 2, n // 64),
            (jitgemm.stage_fp8, torch.float8_e4m3fn, n, n // 128),
        ):
            codes = torch.full((m, width + 16), 0x55, dtype=torch.uint8, device=x.device).view(dtype)
            sf = torch.full((m, words + 1), -1, dtype=torch.int32, device=x.device)
            ids_out = torch.full((m, k), -7, device=x.device)
            weights_out = torch.full((m, k + 1), -7.0, device=x.device)
            stage(x, ids, weights, codes[:, :width], sf[:, :words], ids_out, weights_out[:, :k])
            results += [codes.view(torch.uint8), sf, ids_out, weights_out]
        return tuple(results)

    check(call, rows(m, n), ids, torch.rand(m, k))


@pytest.mark.parametrize("n", [8, 128, 512, 1536, 4096, 7168, 16384, 32768])
def test_rms_norm(n: int) -> None:
    for dtype in (BF16, FP32):
        weight = rows(1, n, dtype)[0] + 1
        for m in (1, 3, 137):
            check(lambda x, w: jitgemm.rms_norm(x, w), rows(m, n, dtype), weight)
    if n % 128 == 0:
        for options in ({}, {"scale_dtype": torch.int32, "scale_layout": "mn_major_tma_aligned"}):
            check(lambda x, w, o=options: jitgemm.rms_norm_act_quant(x, w, **o), rows(13, n), weight)


def test_a_row_has_the_same_bits_in_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = rows(3000, 7168, special=False).to(DEVICE), rows(1, 7168)[0].to(DEVICE)
    whole = jitgemm.rms_norm(x, weight)
    assert_same(jitgemm.rms_norm(x[:7], weight), whole[:7].cpu())
    assert_same(jitgemm.rms_norm(x[2999:], weight), whole[2999:].cpu())
    for index in (0, 1):
        monkeypatch.setattr(heuristics, "choose_config", lambda p, d, i=index: heuristics.enumerate_configs(p)[i])
        rowwise_launch.forget_plans()
        assert_same(jitgemm.rms_norm(x[:64], weight), whole[:64].cpu())
    rowwise_launch.forget_plans()


@pytest.mark.parametrize("heads", [1, 8, 64, 128])
def test_rope(heads: int, every_config: None) -> None:
    n, table = 512, jitgemm.rope_cos_sin(4096, 64, 160000.0, 16.0)
    for tokens in (1, 3, 64):
        x = rows(tokens * heads, n).view(tokens, heads, n)
        positions = torch.arange(tokens) * 61 - 1  # one that the table lacks
        weight = rows(1, n, special=False)[0]
        for inverse in (False, True):
            check(lambda *t, i=inverse: jitgemm.head_norm_rope(*t, inverse=i), x, positions, table)
            check(lambda *t, i=inverse: jitgemm.head_norm_rope(*t, norm=False, inverse=i), x, positions.int(), table)
            check(
                lambda *t, i=inverse: jitgemm.head_norm_rope_act_quant(*t, norm=False, inverse=i), x, positions, table
            )
        check(lambda *t: jitgemm.head_norm_rope(*t, nope_block_size=64), x, positions, table, weight)
        check(jitgemm.head_norm_rope, x, positions, torch.empty(0, 64))
        check(
            lambda *t: jitgemm.head_norm_rope_act_quant(
                *t, scale_dtype=torch.int32, scale_layout="mn_major_tma_aligned"
            ),
            x, positions, table,
        )  # fmt: skip


def test_rope_of_strided_heads() -> None:
    base, table = rows(40, 6 * 576).view(40, 6, 576), jitgemm.rope_cos_sin(64)
    for view in (
        base[..., :512],
        base[..., 64:],
        base[..., 1:513],
        base[:, 1:4, :512],
        base.transpose(0, 1)[..., :128],
    ):
        moved = base.to(DEVICE).as_strided(view.shape, view.stride(), view.storage_offset())
        positions = torch.arange(view.shape[0])
        expected = jitgemm.head_norm_rope(view, positions, table)
        assert_same(jitgemm.head_norm_rope(moved, positions.to(DEVICE), table.to(DEVICE)), expected)


@pytest.mark.parametrize("n", [2048, 3072, 1000])
def test_swiglu(n: int) -> None:
    """Within one rounding of the reference: the exponential has no defined bits."""
    for m in ROWS:
        x, weights = rows(m, 2 * n), torch.rand(m)
        for limit in (None, 10.0):
            expected = jitgemm.swiglu(x.double().float(), weights, limit)
            actual = jitgemm.swiglu(x.to(DEVICE), weights.to(DEVICE), limit).cpu()
            torch.testing.assert_close(actual.float(), expected, rtol=2**-8 * 1.01, atol=1e-30, equal_nan=True)
            exact = jitgemm.swiglu(x.float().to(DEVICE), weights.to(DEVICE), limit).cpu()
            torch.testing.assert_close(exact, expected, rtol=3e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("round_first", [False, True])
@pytest.mark.parametrize("group", [32, 128])
def test_swiglu_with_quantization(group: int, round_first: bool) -> None:
    for m, n in ((1, 2048), (137, 3072)):
        x, weights = rows(m, 2 * n, special=False), torch.rand(m)
        options: dict[str, Any] = {"limit": 10.0, "block_size": group, "round_first": round_first}
        codes, scales = (t.cpu() for t in jitgemm.swiglu_act_quant(x.to(DEVICE), weights.to(DEVICE), **options))
        expected_codes, expected_scales = jitgemm.swiglu_act_quant(x, weights, **options)
        assert (scales != expected_scales).float().mean() < 1e-3  # an amax beside a power of two
        same = (scales == expected_scales).repeat_interleave(group, 1)
        assert (codes.view(torch.uint8) != expected_codes.view(torch.uint8))[same].float().mean() < 1e-3
        back, expected = (
            c.float() * s.repeat_interleave(group, 1) for c, s in ((codes, scales), (expected_codes, expected_scales))
        )
        torch.testing.assert_close(back, expected, rtol=1 / 7, atol=float(scales.max()) * 2**-8)


@pytest.mark.parametrize("group", [(1, 128), (128, 128), (128, 1), (1, None), (None, None), (3, 20)], ids=str)
def test_casting_back(group: tuple[int | None, int | None]) -> None:
    for m, n in ((3, 7168), (130, 131), (1000, 512)):
        codes = torch.arange(m * n).to(torch.uint8).view(m, n).view(torch.float8_e4m3fn)
        sf = torch.rand(*(1 if g is None else -(-size // g) for size, g in zip((m, n), group, strict=True)))
        for dtype in (FP32, BF16):
            check(lambda c, s, d=dtype: jitgemm.cast_back_from_fp8(c, s, group, dtype=d), codes, sf)
    codes, packed = jitgemm.per_token_cast_to_fp8(rows(9, 700, special=False), True, 64, True)
    check(lambda c, s: jitgemm.cast_back_from_fp8(c, s, (1, 64), True), codes, packed)


def test_many_rows() -> None:
    x = torch.randn(65536, 512, dtype=BF16, device=DEVICE)
    codes, scales = jitgemm.act_quant(x, 128, "ue8m0")
    again = jitgemm.act_quant(x[-100:].clone(), 128, "ue8m0")
    assert torch.equal(codes[-100:].view(torch.uint8), again[0].view(torch.uint8)) and torch.equal(
        scales[-100:], again[1]
    )
    back = codes.float() * scales.repeat_interleave(128, 1)
    assert bool(
        ((back - x.float()).abs() <= torch.maximum(x.float().abs() / 16, scales.repeat_interleave(128, 1) / 1024)).all()
    )


GRAPHED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "act_quant": lambda x, w: jitgemm.act_quant(x),
    "rms_norm_act_quant": lambda x, w: jitgemm.rms_norm_act_quant(x, w),
    "swiglu_act_quant": lambda x, w: jitgemm.swiglu_act_quant(x, None, 10.0),
    "per_block": lambda x, w: jitgemm.per_block_cast_to_fp8(x),
}


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("name", GRAPHED)
def test_graphs_and_streams(name: str, pdl: bool) -> None:
    x, new = rows(65, 512, special=False).to(DEVICE), rows(65, 512, special=False).flip(0).to(DEVICE)
    weight = torch.ones(512, dtype=BF16, device=DEVICE)
    with settings.override(pdl=pdl):
        expected = GRAPHED[name](new, weight)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            x.copy_(new)
            actual = GRAPHED[name](x, weight)
        stream.synchronize()
        assert_same(actual, tuple(t.cpu() for t in as_tuple(expected)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x * 2
            actual = GRAPHED[name](y, weight)
        x.copy_(new * 0.5)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(actual, tuple(t.cpu() for t in as_tuple(expected)))


def test_compiled_functions() -> None:
    def function(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y, codes, scales = jitgemm.rms_norm_act_quant(x * 2, weight)
        return y, codes, scales, *jitgemm.fp4_act_quant(y)

    x, weight = rows(65, 512, special=False).to(DEVICE), torch.ones(512, dtype=BF16, device=DEVICE)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same(compiled(x, weight), tuple(t.cpu() for t in function(x, weight)))


def test_a_missing_kernel_while_capturing_names_the_command(tmp_path: Path) -> None:
    code = """
import torch, jitgemm
x = torch.ones(4, 512, device="cuda", dtype=torch.bfloat16)
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        jitgemm.act_quant(x)
except jitgemm.CacheMissError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(JITGEMM_CACHE_DIR=str(tmp_path / "cache")),
        capture_output=True,
        text=True,
    )
    assert "jitgemm prewarm" in done.stdout and '"kind": "rowwise"' in done.stdout, done.stderr


def test_forbidden_compiling_is_a_cache_miss() -> None:
    x = torch.ones(4, 513, device=DEVICE, dtype=FP16)[:, 1:]  # which no other test has of this kind
    with settings.override(jit="forbid"), pytest.raises(CacheMissError, match='"aligned": false'):
        jitgemm.act_quant(x, 16)
