"""FP4 weights and many rows: the kernel that expands weights in memory, when calls use it, and what they launch."""

from __future__ import annotations

import ctypes
import gc
import json
import weakref
from typing import Any

import pytest
import test_fp4_ops
import test_launches
import torch
from emulation.plain import emulated  # noqa: F401 (a fixture)
from torch import Tensor

import jitgemm
from jitgemm import settings, tensor_map
from jitgemm.device import PRESETS, Device
from jitgemm.families.fp4 import EXPAND_FP4
from jitgemm.families.gemm import EXPANDED, FAR_FP4, FP4, FP4_RECIPES, GemmProblem
from jitgemm.heuristics import enumerate_specs, expansion, explain, gemm, sm90a
from jitgemm.ops import fp4 as ops
from jitgemm.ops import gemm as gemm_ops
from jitgemm.reference import fp4
from jitgemm.reference.quantize import pack_nibbles

dense_gpu = test_launches.gpu
H200 = PRESETS["h200"]


# -- The kernel, emulated.

E5M2_MAGNITUDES = (0x00, 0x38, 0x3C, 0x3E, 0x40, 0x42, 0x44, 0x46)  # 0, 0.5, 1, 1.5, 2, 3, 4, 6


def expanded_bytes(packed: Tensor, relative: Tensor) -> Tensor:
    """Bytes of codes ``[n, k/2]`` times 2^relative, one for each 32 of K: E5M2 has two bits of mantissa."""
    byte = packed.view(torch.uint8).int()
    codes = torch.stack([byte & 15, byte >> 4], -1).flatten(-2)
    magnitudes = torch.tensor(E5M2_MAGNITUDES)[codes & 7]
    moved = magnitudes + 4 * relative.int().repeat_interleave(32, -1)[..., : codes.shape[-1]]
    return (torch.where(magnitudes == 0, 0, moved) | codes >> 3 << 7).to(torch.uint8)


def expand(prepared: ops.PreparedWeights) -> Tensor:
    n, k = prepared.units.shape[0], prepared.k
    return ops.expander(GemmProblem(n, k, FP4), prepared.data)(prepared.data)


@pytest.mark.parametrize("base", [0, 100, 228])
def test_all_codes_with_all_scales_of_the_window_are_expanded(emulated: Any, base: int) -> None:  # noqa: F811
    n, k = 128, 384
    place = torch.arange(k) + torch.arange(n)[:, None]
    packed = pack_nibbles((place % 16).to(torch.uint8))
    exponents = base + (torch.arange(n)[:, None] * 5 + torch.arange(k // 32) * 7) % 27
    exponents[:, 0] = base + 26
    prepared = jitgemm.prepare_fp4_weights(packed, exponents.to(torch.uint8))
    found = expand(prepared)
    assert [spec.family for spec in emulated] == ["pack_fp4", "expand_fp4"]
    assert found.dtype == torch.float8_e5m2 and (prepared.units > 0).all()
    assert torch.equal(found.view(torch.uint8), expanded_bytes(packed, exponents - base - 13))
    values = found.double() * prepared.units[:, None].double()
    assert torch.equal(values, fp4.dequantize_fp4(packed, exponents.to(torch.uint8)))


@pytest.mark.parametrize("shape", [(1, 2), (64, 128), (65, 130), (200, 416), (130, 1056)])
def test_weights_of_any_size_are_expanded(emulated: Any, shape: tuple[int, int]) -> None:  # noqa: F811
    n, k = shape
    packed, exponents = test_fp4_ops.weights(n, k, window=(90, 116))
    found = expand(jitgemm.prepare_fp4_weights(packed, exponents))
    assert tuple(found.shape) == expansion.workspace_shape(n, k)
    units = jitgemm.prepare_fp4_weights(packed, exponents).units
    assert torch.equal(found[:n, :k].double() * units[:, None].double(), fp4.dequantize_fp4(packed, exponents))
    assert found[n:].view(torch.uint8).count_nonzero() == 0 and found[:, k:].view(torch.uint8).count_nonzero() == 0


# -- Choice.

SHAPES = ((4096, 7168), (7168, 2048), (2112, 7168), (24576, 1536))


@pytest.mark.parametrize("device", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_many_rows_are_expanded_for_and_few_are_not(n: int, k: int, device: Device) -> None:
    for m in (1, 8, 64, 128, 200):
        assert expansion.expansion(GemmProblem(n, k, FP4, m), device) is None
    for m in (4096, 5000, 16384, 100_000):
        problem = GemmProblem(n, k, FP4, m)
        chosen = expansion.expansion(problem, device)
        if chosen is None:  # where MMAs are slow, expanding weights for each tile costs less than the copy
            assert device.mma_fp8_flops_per_clock_per_sm < sm90a.NOMINAL_FP8_FLOPS
            continue
        assert chosen.us < chosen.packed_us
        assert gemm.illegal(expansion.expanded(problem), chosen.product, device) is None
        assert gemm.illegal(expansion.far(problem), chosen.far, device) is None
        assert (chosen.product.swap_ab, chosen.far.swap_ab) == (False, True)


def test_what_is_never_expanded() -> None:
    many = GemmProblem(4096, 7168, FP4, 8192)
    for values in (
        {"batch_invariant": True},
        {"expand_fp4": False},
        {"config": "128x128x128 s8 swap"},
        {"expand_fp4": True, "batch_invariant": True},
    ):
        with settings.override(**values):
            assert expansion.expansion(many, H200) is None
            assert not {"expand_fp4"} & {spec.family for spec in enumerate_specs(many.without_m(), H200)}
    for recipe in set(FP4_RECIPES) - {FP4} | {"fp8_1x128_128x128"}:
        assert expansion.expansion(GemmProblem(4096, 7168, recipe, 8192), H200) is None


def test_expansion_on_request() -> None:
    few = GemmProblem(256, 512, FP4, 3)
    assert expansion.expansion(few, H200) is None
    with settings.override(expand_fp4=True):
        chosen = expansion.expansion(few, H200)
        assert chosen is not None and chosen.us > chosen.packed_us


@pytest.mark.parametrize(
    ("epilogue", "d_dtype"), [(None, "bf16"), (None, "fp32"), ("linear", "e4m3"), ("swiglu", "e4m3_ue8m0")]
)
def test_prewarm_has_all_three_kernels_of_every_m(epilogue: str | None, d_dtype: str) -> None:
    problem = GemmProblem(4096, 2048, FP4, None, "nt", d_dtype, epilogue=epilogue)
    specs = enumerate_specs(problem, H200)
    assert EXPAND_FP4.spec("sm_90a") in specs and len(set(specs)) == len(specs)
    met = 0
    for m in (512, 600, 1000, 2048, 3333, 4096, 8192, 20_000):
        chosen = expansion.expansion(problem.with_m(m), H200)
        if chosen is not None:
            met += 1
            assert set(chosen.specs(problem, "sm_90a")) < set(specs)
    assert met >= 4


def test_explain_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    from jitgemm.cache_tools.explain import explain as show

    many, few = GemmProblem(4096, 7168, FP4, 4096), GemmProblem(4096, 7168, FP4, 16)
    found = explain(many, H200).expansion
    assert found is not None and found.workspace_bytes == 4096 * 7168 and explain(few, H200).expansion is None
    show(many, H200, top=1, as_json=False)
    text = capsys.readouterr().out
    assert f"in memory first, 28.0 MiB: {found.product} multiplies them" in text
    show(many, H200, top=1, as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["expansion"]["product"] == found.product.to_dict()
    show(few, H200, top=1, as_json=True)
    assert json.loads(capsys.readouterr().out)["expansion"] is None


# -- Launches.


class Calls:
    """Calls on a driver that takes notes, with weights of 200 x 416 and a workspace that keeps its place."""

    def __init__(self, gpu: test_launches.Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpu, self.expansions = gpu, 0
        self.b = test_fp4_ops.prepared_for_launch(200, 416)
        self.workspace = test_launches.aligned(torch.zeros((256, 512), dtype=torch.uint8)).view(torch.float8_e5m2)

        def expander(problem: GemmProblem, on: Tensor) -> Any:
            assert (problem.recipe, problem.n, problem.k, on.numel()) == (FP4, 200, 416, 0)

            def expand(given: Tensor) -> Tensor:
                assert given is self.b.data
                self.expansions += 1
                return self.workspace

            return expand

        def encode(target: int, code: int, rank: int, address: int, *rest: int) -> int:
            dims = (ctypes.c_uint64 * rank).from_address(rest[0])
            for index, number in enumerate((address, *dims[:2])):
                ctypes.c_uint64.from_address(target + 8 * index).value = number
            return 0

        monkeypatch.setattr(gemm_ops, "expander", expander)
        monkeypatch.setattr(tensor_map, "encode_tensor_map_function", lambda: encode)

    def tensors(self, m: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        data, scales = test_fp4_ops.activations(m, 416)
        a = test_launches.aligned(data), test_launches.aligned(jitgemm.get_mn_major_tma_aligned_tensor(scales))
        return a, test_launches.aligned(torch.zeros(m, 200, dtype=torch.bfloat16))

    def __call__(self, m: int, **more: Any) -> list[test_launches.Launched]:
        """The launches of a call, checked."""
        (a, d), before = self.tensors(m), self.expansions
        jitgemm.fp8_fp4_gemm_nt(a, self.b, d, **more)
        launched = list(self.gpu.launched)
        self.gpu.launched.clear()
        for one in launched:
            assert one.tail[0] == d.data_ptr() and one.tail[24:27] == (m, 200, 4) and one.stream == self.gpu.stream
        if len(launched) == 1:
            assert self.expansions == before
            swapped = launched
        else:
            assert self.expansions == before + 1
            product, *swapped = launched
            assert product.map(0)[:3] == (a[0].data_ptr(), 416, m)
            assert product.map(2)[:3] == (self.workspace.data_ptr(), 512, 200)
            assert product.map(4)[0] == a[1].data_ptr()
            assert product.tail[9:11] == (self.b.units.data_ptr(), 1)
        (last,) = swapped
        assert last.map(0)[0] == self.b.data.data_ptr() and last.map(2)[0] == a[0].data_ptr()
        assert last.tail[4] == self.b.units.data_ptr()
        return launched


@pytest.fixture
def calls(dense_gpu: test_launches.Gpu, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(dense_gpu, monkeypatch)


def test_weights_are_expanded_multiplied_and_multiplied_again_if_they_must(calls: Calls) -> None:
    with settings.override(expand_fp4=True):
        for m in (40, 40, 41, 300, 40, 2, 1, 300):
            assert len(calls(m)) == 2
    assert {problem.to_dict()["recipe"] for problem in calls.gpu.loaded_for} == {FP4}


def test_few_and_many_rows_in_turn(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = expansion.expansion

    def from_100_rows(problem: GemmProblem, device: Device, in_force: settings.Settings) -> Any:
        with settings.override(expand_fp4=True):
            return chosen(problem, device, settings.current()) if (problem.m or 0) >= 100 else None

    monkeypatch.setattr(gemm_ops, "expansion", from_100_rows)
    for m in (8, 8, 120, 120, 8, 9, 130, 8, 120, 8, 1, 120):
        assert len(calls(m)) == (2 if m >= 100 else 1), m


def test_accumulation_is_one_launch(calls: Calls) -> None:
    with settings.override(expand_fp4=True):
        assert len(calls(40)) == 2
        c = test_launches.aligned(torch.zeros(40, 200, dtype=torch.bfloat16))
        assert len(calls(40, c=c)) == 1
        assert len(calls(40)) == 2


def test_epilogues_and_programmatic_launches(calls: Calls) -> None:
    with settings.override(expand_fp4=True, pdl=True):
        for _ in range(2):
            launched = calls(40, epilogue=jitgemm.Epilogue(alpha=2.0))
            assert [one.pdl for one in launched] == [True, True]


def test_plans_hold_no_tensors(calls: Calls) -> None:
    (a, d), c = calls.tensors(40), test_launches.aligned(torch.zeros(40, 200, dtype=torch.bfloat16))
    with settings.override(expand_fp4=True):
        jitgemm.fp8_fp4_gemm_nt(a, calls.b, d)
        jitgemm.fp8_fp4_gemm_nt(a, calls.b, d, c)
        jitgemm.fp8_fp4_gemm_nt(a, calls.b, d, epilogue=jitgemm.Epilogue(alpha=2.0))
    held = [weakref.ref(tensor) for tensor in (*a, d, c, calls.b.data, calls.b.units)]
    calls.b = test_fp4_ops.prepared_for_launch(64, 128)
    del a, d, c
    gc.collect()
    assert [tensor() for tensor in held] == [None] * 6


def test_an_output_in_the_weights_is_refused_before_anything_is_launched(calls: Calls) -> None:
    a, _ = calls.tensors(40)
    d = calls.b.data.view(torch.bfloat16).flatten()[: 40 * 200].view(40, 200)
    with settings.override(expand_fp4=True), pytest.raises(jitgemm.ProblemError, match="overlaps"):
        jitgemm.fp8_fp4_gemm_nt(a, calls.b, d)
    assert not calls.gpu.launched and not calls.expansions


def test_recipes_of_expanded_weights_are_not_offered() -> None:
    assert {EXPANDED.name, FAR_FP4.name}.isdisjoint(FP4_RECIPES)
    with pytest.raises(jitgemm.ProblemError, match="recipe is 'fp8_1x128_e5m2_row'"):
        a, d = torch.zeros((1, 16), dtype=torch.float8_e4m3fn), torch.zeros((1, 1))
        jitgemm.fp8_gemm_nt((a, torch.zeros(1, 1)), (a, torch.zeros(1, 1)), d, recipe=EXPANDED.name)
