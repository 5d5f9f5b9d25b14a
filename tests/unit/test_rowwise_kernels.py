"""The row-wise kernels themselves, run on the CPU, against the reference: bit for bit where bits are defined."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import emulation
import pytest
import torch
from torch import Tensor

import jitgemm.ops.rowwise as ops
from jitgemm import driver, kernel
from jitgemm.device import H200
from jitgemm.errors import ProblemError
from jitgemm.families import KernelSpec, family_of
from jitgemm.heuristics import rowwise as heuristics
from jitgemm.kernel import Kernel
from jitgemm.ops import quantize, rowwise_launch, tiles_launch
from jitgemm.ops.rowwise_launch import E8M0
from jitgemm.problem import Problem

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="g++ is not installed")


class Emulator:
    """Stands in for the driver."""

    def __init__(self) -> None:
        self.specs: dict[int, KernelSpec] = {}

    def load(self, spec: KernelSpec, device: int, problem: Problem | None = None) -> Kernel:
        handle = len(self.specs) + 1
        self.specs[handle] = spec
        family = family_of(spec)
        return Kernel(spec, device, handle, family.num_threads(spec), 0, None)

    def launch(self, handle: int, grid: tuple[int, int, int], threads: int, *_: object) -> Any:
        emulator = self

        class Launch:
            def prepare(self, arguments: driver.Arguments, stream: int) -> Callable[[], int]:
                def run() -> int:
                    emulation.emulate(emulator.specs[handle])(arguments.address, grid, threads)
                    return 0

                return run

        return Launch()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Says where the calls that follow compute: by a kernel, or by the reference. Outputs begin as NaN or garbage."""
    emulator = Emulator()
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(kernel, "load", emulator.load)
    monkeypatch.setattr(driver, "Launch", emulator.launch)
    for module in (rowwise_launch, tiles_launch):
        monkeypatch.setattr(module, "device_facts", lambda _: (H200, H200.num_sms))

    def use(emulated: bool) -> None:
        for module in (ops, quantize):
            monkeypatch.setattr(module, "on_gpu", lambda _: emulated)

    rowwise_launch.forget_plans()
    yield use
    rowwise_launch.forget_plans()
    torch.use_deterministic_algorithms(False)


def rows(m: int, n: int, dtype: torch.dtype, special: bool = True) -> Tensor:
    """Magnitudes over many binades; zeros and zero groups; if asked for, NaN, Inf and subnormals."""
    generator = torch.Generator().manual_seed(m * n)
    x = torch.randn((m, n), generator=generator) * torch.randint(-12, 9, (m, 1), generator=generator).float().exp2()
    x[torch.rand((m, n), generator=generator) < 0.1] = 0
    x[0, : n // 2] = 0
    if special:
        x[-1, n // 3], x[-1, -1], x[m // 2, n // 2] = math.inf, -math.inf, math.nan
        x[m // 3, :8] = 1e-7 if dtype == torch.float16 else 1e-39
    return x.to(dtype)


def assert_same(actual: Any, expected: Any) -> None:
    """The same bits, but for those of a NaN."""
    for a, b in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        if a.dtype.is_floating_point and a.dtype != E8M0:
            nan = b.float().isnan()
            assert torch.equal(a.float().isnan(), nan)
            a, b = (t.float().masked_fill(nan, 0).contiguous().view(torch.int32) for t in (a, b))
        else:
            a, b = (t.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8) for t in (a, b))
        wrong = (a != b).nonzero()
        assert not len(wrong), f"{len(wrong)} differ, first at {wrong[0].tolist()}"


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def check(gpu: Callable[[bool], None], call: Callable[[], Any]) -> None:
    gpu(False)
    expected = call()
    gpu(True)
    assert_same(call(), expected)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = [(1, 128), (7, 384), (5, 1152)]
CASTS: dict[str, Callable[[Tensor], Any]] = {
    "fp32 scales": lambda x: ops.act_quant(x, 128),
    "powers": lambda x: ops.act_quant(x, 64, "ue8m0", scale_layout="mn_major_tma_aligned"),
    "exponents": lambda x: ops.act_quant(x, 32, "ue8m0", E8M0),
    "packed": lambda x: ops.act_quant(x, 128, "ue8m0", torch.int32, scale_layout="mn_major_tma_aligned"),
    "packed rows": lambda x: ops.act_quant(x, 32, "ue8m0", torch.int32),
    "int8": lambda x: ops.int8_act_quant(x),
    "int8 rows": lambda x: ops.per_token_cast_to_int8(x),
    "mxfp4": lambda x: ops.fp4_act_quant(x),
    "mxfp4 ties zero": lambda x: ops.fp4_act_quant(x, ties="zero", scale_dtype=torch.int32),
    "nvfp4": lambda x: ops.nvfp4_act_quant(x),
    "nvfp4 ties away": lambda x: ops.nvfp4_act_quant(x, ties="away"),
}


@pytest.mark.parametrize("name", CASTS)
def test_casts(gpu: Callable[[bool], None], name: str) -> None:
    for m, n in SIZES:
        check(gpu, lambda m=m, n=n: CASTS[name](rows(m, n, BF16)))


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
@pytest.mark.parametrize("name", ["fp32 scales", "int8 rows", "mxfp4"])
def test_other_types(gpu: Callable[[bool], None], name: str, dtype: torch.dtype) -> None:
    check(gpu, lambda: CASTS[name](rows(9, 384, dtype)))


def test_many_rows_and_few_give_the_same_bits(gpu: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = rows(9, 1152, BF16, special=False), rows(1, 1152, BF16, special=False)[0]
    for index in (0, 1):
        monkeypatch.setattr(heuristics, "choose_config", lambda p, d, i=index: heuristics.enumerate_configs(p)[i])
        rowwise_launch.forget_plans()
        check(gpu, lambda: ops.rms_norm_act_quant(x, weight))
        check(gpu, lambda: ops.per_token_cast_to_int8(x))


@pytest.mark.parametrize("name", CASTS)
def test_casts_of_many_rows(gpu: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(heuristics, "choose_config", lambda p, d: heuristics.enumerate_configs(p)[1])
    for x in (rows(19, 1152, BF16), rows(17, 640, FP32), rows(21, 384, FP16)[::2, :256]):
        check(gpu, lambda x=x: CASTS[name](x))


def test_codes_in_rows_of_odd_strides(gpu: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """16 codes can't be stored at once where rows are 8 bytes further apart than a multiple of 16."""
    monkeypatch.setattr(heuristics, "choose_config", lambda p, d: heuristics.enumerate_configs(p)[1])
    x, ids, weights = rows(5, 256, BF16), torch.zeros(5, 1, dtype=torch.int32), torch.zeros(5, 1)

    def call(gap: int) -> tuple[Tensor, Tensor]:
        codes = torch.full((5, 256 + gap), 0x55, dtype=torch.uint8).view(torch.float8_e4m3fn)
        sf = torch.zeros(5, 2, dtype=torch.int32)
        ops.stage_fp8(x, ids, weights, codes[:, :256], sf, torch.zeros(5, 1, dtype=torch.int64), torch.zeros(5, 1))
        return codes.view(torch.uint8), sf

    for gap in (4, 8, 16):
        check(gpu, lambda gap=gap: call(gap))


@pytest.mark.parametrize("name", ["fp32 scales", "int8 rows", "nvfp4"])
def test_strided_and_unaligned_rows(gpu: Callable[[bool], None], name: str) -> None:
    base = rows(9, 600, BF16)
    for x in (base[:, 8:392], base[:, 3:387], base.view(3, 3, 600)[..., :384], base[::2, :384], base[:, 1::4][:, :128]):
        check(gpu, lambda x=x: CASTS[name](x))


@pytest.mark.parametrize("name", ["fp32 scales", "exponents", "packed rows", "int8 rows", "mxfp4", "nvfp4"])
def test_a_row_alone(gpu: Callable[[bool], None], name: str) -> None:
    check(gpu, lambda: CASTS[name](rows(3, 384, BF16)[1]))


@pytest.mark.parametrize("view", ["aligned", "odd"])
def test_round_trips_in_place(gpu: Callable[[bool], None], view: str) -> None:
    start = 0 if view == "aligned" else 1

    def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        base = rows(9, 513, BF16)[:, : 512 + start].clone()
        x = base[:, start : start + 448]
        assert function(x, *arguments, inplace=True, **options) is x
        return x.contiguous(), base[:, start + 448 :].contiguous()

    check(gpu, lambda: call(ops.act_quant, 64, "ue8m0"))
    check(gpu, lambda: call(ops.act_quant, 64))
    check(gpu, lambda: call(ops.fp4_act_quant, ties="even"))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_staging(gpu: Callable[[bool], None], index: torch.dtype) -> None:
    m, n, k = 5, 384, 6
    x = rows(m, n, BF16)
    ids = torch.randint(-1, 256, (k, m), dtype=index).t()
    weights = torch.rand(m, 2 * k)[:, ::2]

    def call(format: str) -> tuple[Tensor, ...]:
        codes = torch.full((m, n + 64), 0x55, dtype=torch.uint8)
        sf = torch.full((m, 8), -1, dtype=torch.int32)
        ids_out, weights_out = torch.full((m, k), -7), torch.full((m, k + 1), -7.0)
        if format == "fp8":
            codes = codes.view(torch.float8_e4m3fn)
            ops.stage_fp8(x, ids, weights, codes[:, :n], sf[:, : n // 128], ids_out, weights_out[:, :k])
        else:
            ops.stage_nvfp4(x, ids, weights, codes[:, : n // 2], sf[:, : n // 64], ids_out, weights_out[:, :k])
        assert torch.equal(ids_out, ids.long()) and torch.equal(weights_out[:, :k], weights)
        return codes.view(torch.uint8), sf, weights_out

    check(gpu, lambda: call("fp8"))
    check(gpu, lambda: call("nvfp4"))


def test_staging_of_more_choices_with_the_same_strides(gpu: Callable[[bool], None]) -> None:
    """A plan for so many choices is not that for others, though column-major views of both have the same strides."""
    m, n = 5, 384
    x, ids, weights = rows(m, n, BF16), torch.arange(8 * m).view(8, m).t(), torch.rand(8, m).t()
    gpu(True)
    for k in (6, 8, 6):
        codes, sf = torch.zeros(m, n, dtype=torch.float8_e4m3fn), torch.zeros(m, n // 128, dtype=torch.int32)
        ids_out, weights_out = torch.full((8, m), -7).t(), torch.full((8, m), -7.0).t()
        ops.stage_fp8(x, ids[:, :k], weights[:, :k], codes, sf, ids_out[:, :k], weights_out[:, :k])
        assert torch.equal(ids_out[:, :k], ids[:, :k]) and torch.equal(weights_out[:, :k], weights[:, :k])
        assert (ids_out[:, k:] == -7).all() and (weights_out[:, k:] == -7).all()


@pytest.mark.parametrize(
    ("m", "n", "dtype"), [(1, 8, BF16), (5, 200, BF16), (3, 777, BF16), (2, 4096, BF16), (4, 520, FP32)]
)
def test_rms_norm(gpu: Callable[[bool], None], m: int, n: int, dtype: torch.dtype) -> None:
    x = rows(m, n, dtype)
    for weight_dtype in (BF16, FP32):
        weight = torch.randn(n).to(weight_dtype)
        check(gpu, lambda weight=weight: ops.rms_norm(x, weight))


@pytest.mark.parametrize(("m", "n", "dtype"), [(1, 1, BF16), (7, 200, BF16), (3, 777, FP16), (2, 4096, FP32)])
def test_int8_rows(gpu: Callable[[bool], None], m: int, n: int, dtype: torch.dtype) -> None:
    x, weight = rows(m, n, dtype), torch.randn(n).to(BF16)
    check(gpu, lambda: ops.per_token_cast_to_int8(x))
    check(gpu, lambda: ops.per_token_cast_to_int8(x[0]))
    check(gpu, lambda: ops.rms_norm_cast_to_int8(x, weight))


def test_rms_norm_of_a_wide_row(gpu: Callable[[bool], None]) -> None:
    x, weight = rows(2, 7168, BF16, special=False), torch.randn(7168).to(BF16)
    check(gpu, lambda: ops.rms_norm_act_quant(x, weight, scale_dtype=torch.int32, scale_layout="mn_major_tma_aligned"))


@pytest.mark.parametrize("inverse", [False, True])
def test_rope(gpu: Callable[[bool], None], inverse: bool) -> None:
    tokens, heads, n = 3, 5, 512
    x = rows(tokens * heads * 2, n, BF16).view(tokens, 2 * heads, n)[:, ::2]
    table, positions = ops.rope_cos_sin(50), torch.tensor([0, 49, 50])
    weight = torch.randn(n).to(BF16)
    check(gpu, lambda: ops.head_norm_rope(x, positions, table, inverse=inverse))
    check(gpu, lambda: ops.head_norm_rope(x, positions, torch.empty(0, 64), inverse=inverse))
    check(gpu, lambda: ops.head_norm_rope(x, positions.int(), table, weight, inverse=inverse, nope_block_size=64))
    check(gpu, lambda: ops.head_norm_rope_act_quant(x, positions, table, norm=False, inverse=inverse))
    check(
        gpu,
        lambda: ops.head_norm_rope_act_quant(
            x,
            positions,
            table,
            norm=False,
            inverse=inverse,
            scale_dtype=torch.int32,
            scale_layout="mn_major_tma_aligned",
        ),
    )


@pytest.mark.parametrize(("m", "n"), [(1, 128), (6, 640), (3, 1032)])
def test_swiglu(gpu: Callable[[bool], None], m: int, n: int) -> None:
    x = rows(m, 2 * n, BF16)
    weights = torch.rand(m)
    for limit in (None, 10.0):
        gpu(False)
        expected = ops.swiglu(x, weights, limit)
        gpu(True)
        actual = ops.swiglu(x, weights, limit)
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=0, equal_nan=True)


def test_swiglu_with_quantization(gpu: Callable[[bool], None]) -> None:
    x, weights = rows(7, 768, BF16), torch.rand(7)
    for round_first in (False, True):
        gpu(False)
        codes, scales = ops.swiglu_act_quant(x, weights, 10.0, round_first=round_first)
        gpu(True)
        actual, actual_scales = ops.swiglu_act_quant(x, weights, 10.0, round_first=round_first)
        assert torch.equal(scales, actual_scales)
        assert torch.equal(codes.float().isnan(), actual.float().isnan())
        different = (codes.view(torch.uint8) != actual.view(torch.uint8)) & ~codes.float().isnan()
        assert different.float().mean() < 0.01  # where an exponential rounds differently


@pytest.mark.parametrize("format", ["e4m3", "e4m3 pow2", "int8", "int8 rows", "e2m1"])
def test_every_bf16_number(gpu: Callable[[bool], None], format: str) -> None:
    """All 65536 patterns, 31 beside one that sets the group's scale."""
    patterns = torch.arange(65536).to(torch.int16).view(BF16)
    call = {
        "e4m3": ops.act_quant,
        "e4m3 pow2": lambda x, group: ops.act_quant(x, group, "ue8m0"),
        "int8": ops.int8_act_quant,
        "int8 rows": lambda x, _: ops.per_token_cast_to_int8(x),
        "e2m1": ops.fp4_act_quant,
    }[format]
    for largest in (1.75, 6.0, 448.0):  # of which 6 and 448 have scales that are powers of two
        usable = patterns[patterns.abs() <= largest]
        x = torch.zeros(len(usable) // 31 + 1, 32, dtype=BF16)
        x[:, 0] = largest
        filled = torch.zeros((x.shape[0], 31), dtype=BF16).flatten()
        filled[: len(usable)] = usable
        x[:, 1:] = filled.view(-1, 31)
        check(gpu, lambda x=x: call(x, 32))


def test_tiles_of_more_columns_than_a_grid_has(gpu: Callable[[bool], None]) -> None:
    gpu(True)
    for cast, most in ((quantize.per_channel_cast_to_fp8, 65535 * 64), (quantize.per_block_cast_to_fp8, 65535 * 128)):
        with pytest.raises(ProblemError, match=f"x has 1 rows of {most + 8}; accepted are at most .* of {most}"):
            cast(torch.empty(1, most + 8, dtype=BF16))


@pytest.mark.parametrize("cast", [quantize.per_block_cast_to_fp8, quantize.per_channel_cast_to_fp8])
@pytest.mark.parametrize("use_ue8m0", [False, True])
def test_casts_of_tiles(gpu: Callable[[bool], None], cast: Callable[..., Any], use_ue8m0: bool) -> None:
    for m, n, gran, dtype in ((130, 264, 128, BF16), (70, 129, 32, BF16), (33, 200, 16, FP32)):
        x = rows(m, n, dtype)
        check(gpu, lambda x=x, gran=gran: cast(x, use_ue8m0, gran))
    check(gpu, lambda: cast(rows(70, 130, BF16).t(), use_ue8m0, 64))


def test_per_token_casts(gpu: Callable[[bool], None]) -> None:
    for m, n in ((5, 200), (3, 1), (4, 384)):
        x = rows(m, n, BF16)
        check(gpu, lambda x=x: quantize.per_token_cast_to_fp8(x))
        check(gpu, lambda x=x: quantize.per_token_cast_to_fp8(x, True, 32, True))


@pytest.mark.parametrize("group", [(1, 128), (128, 128), (128, 1), (1, None), (None, None), (3, 20)], ids=str)
def test_casting_back(gpu: Callable[[bool], None], group: tuple[int | None, int | None]) -> None:
    for m, n in ((3, 136), (130, 131)):
        codes = torch.arange(m * n).to(torch.uint8).view(m, n).view(torch.float8_e4m3fn)
        sf = torch.rand(*(1 if g is None else -(-size // g) for size, g in zip((m, n), group, strict=True)))
        check(gpu, lambda c=codes, s=sf: quantize.cast_back_from_fp8(c, s, group))
        mn_major = sf.t().contiguous().t()
        check(gpu, lambda c=codes, s=mn_major: quantize.cast_back_from_fp8(c, s, group, dtype=BF16))


def test_casting_back_packed_scales(gpu: Callable[[bool], None]) -> None:
    codes, sf = quantize.per_token_cast_to_fp8(rows(9, 700, BF16, special=False), True, 64, True)
    check(gpu, lambda: quantize.cast_back_from_fp8(codes, sf, (1, 64), True))
