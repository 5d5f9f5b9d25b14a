"""The public GEMM calls on CPU tensors: results, refusals, and what torch makes of them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import environment
from torch import Tensor
from torch._subclasses import FakeTensorMode

import jitgemm
from benchmarks.operands import Embedded, Operands, quantize, random_matrix
from jitgemm.errors import ProblemError, SettingsError
from jitgemm.families.gemm import LAYOUTS, RECIPES
from jitgemm.ops.gemm import _OPERATIONS, _Operands
from jitgemm.reference import gemm as reference

M, N, K = 5, 40, 272
FP8_RECIPES = [name for name, recipe in RECIPES.items() if recipe.is_fp8]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CPU = torch.device("cpu")


def operands(recipe: str, m: int = M, n: int = N, k: int = K) -> Operands:
    generator = torch.Generator().manual_seed(m * n + k)
    return quantize(recipe, random_matrix(m, k, generator), random_matrix(n, k, generator))


def call(x: Operands, d: Tensor, c: Tensor | None = None, layout: str = "nt", **more: Any) -> None:
    """The public function of the recipe and layout; operands are stored as the layout says."""
    if x.recipe == "bf16":
        a = x.a.t().contiguous() if layout[0] == "t" else x.a
        b = x.b.t().contiguous() if layout[1] == "n" else x.b
        getattr(jitgemm, f"bf16_gemm_{layout}")(a, b, d, c, **more)
    else:
        jitgemm.fp8_gemm_nt((x.a, x.a_scales), (x.b, x.b_scales), d, c, **{"recipe": x.recipe, **more})


# -- Results.


@pytest.mark.parametrize("d_dtype", DTYPES)
@pytest.mark.parametrize(
    ("recipe", "layout"), [*((recipe, "nt") for recipe in FP8_RECIPES), *(("bf16", layout) for layout in LAYOUTS)]
)
@pytest.mark.parametrize("with_c", ["no c", "c", "c is d"])
def test_cpu_tensors_get_the_reference(recipe: str, layout: str, d_dtype: str, with_c: str) -> None:
    x, dtype = operands(recipe), DTYPES[d_dtype]
    c = None if with_c == "no c" else torch.randn(M, N).to(dtype)
    expected = x.product(d_dtype, c=c)
    embedded = Embedded((M, N), dtype, CPU, (3, 2))
    if with_c == "c is d":
        assert c is not None
        embedded.fill(c)
        c = embedded.view
    call(x, embedded.view, c, layout)
    assert torch.equal(embedded.view, expected)
    assert embedded.intact()


@pytest.mark.parametrize(
    ("given", "recipe"),
    [
        ({}, "fp8_1x128_128x128"),
        ({"recipe": (1, 128, 128)}, "fp8_1x128_128x128"),
        ({"recipe": [1, 128, 128]}, "fp8_1x128_128x128"),
        ({"recipe": (1, 1, 128)}, "fp8_1x128_1x128"),
        ({"recipe_a": (1, 128), "recipe_b": (128, 128)}, "fp8_1x128_128x128"),
        ({"recipe_a": (1, 128), "recipe_b": (1, 128)}, "fp8_1x128_1x128"),
        ({"recipe_b": (1, 128)}, "fp8_1x128_1x128"),
        ({"recipe_a": [1, 128], "recipe_b": [1, 128]}, "fp8_1x128_1x128"),
        ({"compiled_dims": "nk", "disable_ue8m0_cast": True}, "fp8_1x128_128x128"),
    ],
    ids=str,
)
def test_the_peers_ways_to_name_a_recipe(given: dict[str, Any], recipe: str) -> None:
    x = operands(recipe)
    d = torch.empty(M, N, dtype=torch.bfloat16)
    jitgemm.fp8_gemm_nt((x.a, x.a_scales), [x.b, x.b_scales], d, **given)  # type: ignore[arg-type]
    assert torch.equal(d, x.product("bf16"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", FP8_RECIPES)
@pytest.mark.parametrize("k_major", [True, False])
def test_fp8_operands_with_k_first(layout: str, recipe: str, k_major: bool) -> None:
    x = operands(recipe)
    assert x.a_scales is not None and x.b_scales is not None

    def stored(data: Tensor, scales: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        if not transposed:
            return data, scales
        data, scales = data.t(), scales.t()
        return (data if k_major else data.view(torch.uint8).contiguous().view(data.dtype)), scales.contiguous()

    a, b = stored(x.a, x.a_scales, layout[0] == "t"), stored(x.b, x.b_scales, layout[1] == "n")
    for name in ("fp8_gemm", "fp8_fp4_gemm"):
        d = torch.ones(M, N)
        getattr(jitgemm, f"{name}_{layout}")(a, b, d, d, recipe)
        assert torch.equal(d, x.product("fp32", c=torch.ones(M, N)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp4_operands_are_refused_by_name(layout: str) -> None:
    x = operands("fp8_1x128_128x128")
    a = x.a.view(torch.int8).t().contiguous() if layout[0] == "t" else x.a.view(torch.int8)
    with pytest.raises(ProblemError, match=r"a has dtype torch.int8; .* \(packed FP4 is accepted as b of .*\)"):
        b = x.b.t() if layout[1] == "n" else x.b
        getattr(jitgemm, f"fp8_fp4_gemm_{layout}")((a, x.a_scales), (b, x.b_scales), torch.empty(M, N))


def test_bad_operands_with_k_first() -> None:
    x = operands("fp8_1x128_128x128")
    d = torch.empty(M, N)
    for b, message in (
        (x.b, "b is Tensor; accepted is a pair"),
        ((x.b[0], x.b_scales), "b has 1 dimensions; accepted is 2"),
        ((x.b, x.b_scales[None]), "b_scales has 3 dimensions; accepted is 2"),  # type: ignore[index]
        ((x.b, None), "b_scales is NoneType"),
    ):
        with pytest.raises(ProblemError, match=message):
            jitgemm.fp8_gemm_nn((x.a, x.a_scales), b, d)  # type: ignore[arg-type]


def test_knobs_of_the_peer_remember_what_they_are_given() -> None:
    assert (jitgemm.get_tc_util(), jitgemm.get_deterministic_algorithms()) == (100, False)
    try:
        jitgemm.set_tc_util(50)
        jitgemm.use_deterministic_algorithms(True)
        assert (jitgemm.get_tc_util(), jitgemm.get_deterministic_algorithms()) == (50, True)
    finally:
        jitgemm.set_tc_util(100)
        jitgemm.use_deterministic_algorithms(False)
    for value in (101, -1, True, "50"):
        with pytest.raises(SettingsError, match="new_tc_util is"):
            jitgemm.set_tc_util(value)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="mode is 1"):
        jitgemm.use_deterministic_algorithms(1)  # type: ignore[arg-type]
    jitgemm.set_ignore_compile_dims(True)
    jitgemm.set_block_size_multiple_of(64)
    jitgemm.set_block_size_multiple_of((128, 32))
    with pytest.raises(SettingsError, match="new_value is 1; accepted is a boolean"):
        jitgemm.set_ignore_compile_dims(1)  # type: ignore[arg-type]
    for bad in (0, (64,), (64, True), "64"):
        with pytest.raises(SettingsError, match=r"new_value is .*; accepted is a positive integer, or two"):
            jitgemm.set_block_size_multiple_of(bad)  # type: ignore[arg-type]


def test_fast_accum_and_one_element_scales() -> None:
    x = operands("fp8_tensorwise")
    assert x.a_scales is not None
    d, e = (torch.empty(M, N) for _ in range(2))
    call(x, d, fast_accum=True)
    jitgemm.fp8_gemm_nt((x.a, x.a_scales.reshape(())), (x.b, x.b_scales), e, recipe="fp8_tensorwise")
    assert torch.equal(d, e)
    assert torch.equal(d, x.product("fp32"))


def test_scales_in_any_layout() -> None:
    x = operands("fp8_1x128_1x128")
    assert x.a_scales is not None and x.b_scales is not None
    d = torch.empty(M, N)
    a_scales = jitgemm.get_mn_major_tma_aligned_tensor(x.a_scales)
    b_scales = torch.randn(N, 9)[:, ::3].copy_(x.b_scales)
    jitgemm.fp8_gemm_nt((x.a, a_scales), (x.b, b_scales), d, recipe="fp8_1x128_1x128")
    assert torch.equal(d, x.product("fp32"))


def test_strided_operands() -> None:
    x = operands("bf16")
    a = torch.randn(2 * M, K + 16).bfloat16()[::2, 8 : K + 8].copy_(x.a)
    d = torch.empty(M, N)
    jitgemm.bf16_gemm_nt(a, x.b.t().contiguous().t(), d)  # either dimension may be the contiguous one
    assert torch.equal(d, x.product("fp32"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_rows(recipe: str) -> None:
    x = operands(recipe)
    a_scales = None if x.a_scales is None else x.a_scales if x.a_scales.numel() == 1 else x.a_scales[:0]
    d = torch.empty(0, N)
    call(Operands(recipe, x.a[:0], a_scales, x.b, x.b_scales), d)
    call(Operands(recipe, x.a[:0], a_scales, x.b, x.b_scales), d, d)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("with_c", ["no c", "c", "c is d"])
@pytest.mark.parametrize(("m", "n", "k"), [(M, 0, K), (M, N, 0), (0, 0, K), (0, N, 0), (M, 0, 0)])
@pytest.mark.parametrize("compiled", [False, True])
def test_sizes_of_zero(m: int, n: int, k: int, with_c: str, dtype: torch.dtype, compiled: bool) -> None:
    """Nothing is multiplied: D is C, or zero, in each layout and through torch.compile."""
    scales = torch.ones(m, -(-k // 128)), torch.ones(-(-n // 128), -(-k // 128))
    for recipe, layout in (("fp8", "nt"), ("fp8", "tn"), *(("bf16", layout) for layout in LAYOUTS)):
        if compiled and layout != "nt":
            continue
        a = empty(*((k, m) if layout[0] == "t" else (m, k)), dtype=F8 if recipe == "fp8" else BF16)
        b = empty(*((n, k) if layout[1] == "t" else (k, n)), dtype=a.dtype)
        d = torch.randn(m, n + 3).to(dtype)[:, :n]
        c = {"no c": None, "c": torch.randn(m, n).to(dtype), "c is d": d}[with_c]
        expected = torch.zeros(m, n).to(dtype) if c is None else c.clone()
        function: Any = getattr(jitgemm, f"{recipe}_gemm_{layout}")
        if compiled:
            torch._dynamo.reset()
            function = torch.compile(function, backend="eager", fullgraph=True)
        if recipe == "fp8":
            a_scales, b_scales = (x.T for x in scales) if layout == "tn" else scales
            function((a, a_scales), (b, b_scales), d, c)
        else:
            function(a, b, d, c)
        assert torch.equal(d, expected)


# -- Refusals. Nothing may be written: D is NaN before and after.

Arguments = dict[str, Any]
F8, BF16 = torch.float8_e4m3fn, torch.bfloat16


def empty(*shape: int, dtype: torch.dtype = F8, **more: Any) -> Tensor:
    return torch.zeros(shape, dtype=dtype, **more)


def change(**values: Any) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, **values}


def pair(name: str, data: Any = None, scales: Any = None) -> Callable[[Arguments], Arguments]:
    def apply(arguments: Arguments) -> Arguments:
        old = arguments[name]
        return {**arguments, name: (old[0] if data is None else data, old[1] if scales is None else scales)}

    return apply


GROUPS = 3  # of 128 in K
FP8_FAULTS: dict[str, tuple[Callable[[Arguments], Arguments], str]] = {
    "a no pair": (change(a=empty(M, K)), r"a is Tensor; accepted is a pair \(e4m3 tensor, scales\)"),
    "b three": (change(b=(empty(N, K),) * 3), "b is tuple; accepted is a pair"),
    "a none": (change(a=None), "a is NoneType; accepted is a pair"),
    "a data none": (change(a=(None, torch.ones(M, GROUPS))), "a is NoneType; accepted is a torch.Tensor"),
    "a list": (pair("a", data=[1.0]), "a is list; accepted is a torch.Tensor"),
    "a dtype": (pair("a", empty(M, K, dtype=BF16)), "a has dtype torch.bfloat16; .* accepts torch.float8_e4m3fn"),
    "b dtype": (pair("b", empty(N, K, dtype=torch.float8_e5m2)), "b has dtype torch.float8_e5m2"),
    "a rank": (pair("a", empty(1, M, K)), "a has 3 dimensions; accepted is 2"),
    "b rank": (pair("b", empty(K)), "b has 1 dimensions; accepted is 2"),
    "a scales missing": (change(a=(empty(M, K), None)), "a_scales is missing; recipe fp8_1x128_128x128 needs scales"),
    "b scales missing": (change(b=(empty(N, K), None)), "b_scales is missing"),
    "a scales list": (pair("a", scales=[1.0]), "a_scales is list; accepted is a torch.Tensor"),
    "a scales dtype": (pair("a", scales=torch.ones(M, GROUPS).int()), "a_scales has dtype torch.int32"),
    "b scales dtype": (pair("b", scales=torch.ones(1, GROUPS).bfloat16()), "b_scales has dtype torch.bfloat16"),
    "a scales shape": (pair("a", scales=torch.ones(M, 2)), r"a_scales has shape \(5, 2\); .* accepts \(5, 3\)"),
    "a scales transposed": (pair("a", scales=torch.ones(GROUPS, M)), r"a_scales has shape \(3, 5\)"),
    "b scales shape": (pair("b", scales=torch.ones(N, GROUPS)), r"b_scales has shape \(40, 3\); .* accepts \(1, 3\)"),
    "a scales rank": (pair("a", scales=torch.ones(M)), r"a_scales has shape \(5,\)"),
    "k": (pair("b", empty(N, K - 16)), r"a \(5, 272\) and b \(40, 256\) in layout nt have k 272 and 256"),
    "k 0 of a": (change(a=(empty(M, 0), torch.ones(M, 0))), "in layout nt have k 0 and 272; they must agree"),
    "k 0 of scales": (change(a=(empty(M, 0), torch.ones(M, 1)), b=(empty(N, 0), torch.ones(1, 0))), "a_scales has sh"),
    "recipe": (change(recipe="fp8_1x32"), "recipe is 'fp8_1x32'; accepted are fp8_1x128_128x128.*fp8_tensorwise"),
    "recipe bf16": (change(recipe="bf16"), "recipe is 'bf16'; accepted are fp8"),
    "recipe numbers": (change(recipe=(1, 64, 64)), r"recipe is \(1, 64, 64\); accepted are .*\(1, 128, 128\)"),
    "recipe integer": (change(recipe=128), "recipe is 128; accepted are"),
    "recipe nested": (change(recipe=([1], 1, 128)), "recipe is .*; accepted are"),
    "recipe_a": (change(recipe_a=(128, 128)), r"recipe_a is \(128, 128\); accepted are \(1, 128\)"),
    "recipe_b": (change(recipe_b=(1, 32)), r"recipe_b is \(1, 32\)"),
    "recipe_a k": (change(recipe_a=(1, 32)), "recipe"),
    "fast_accum": (change(fast_accum=True), "fast_accum is True; recipe fp8_1x128_128x128 does not allow it"),
    "fast_accum kind": (change(fast_accum="yes", recipe="fp8_tensorwise", a=(empty(M, K), torch.ones(1)),
                               b=(empty(N, K), torch.ones(1))), "fast_accum is 'yes'; accepted is a boolean"),
    "rowwise a": (change(recipe="fp8_rowwise"), r"a_scales has shape \(5, 3\); .* accepts \(5,\) or \(5, 1\)"),
    "tensorwise a": (change(recipe="fp8_tensorwise"), r"a_scales has shape \(5, 3\); .* accepts one element"),
    "a scales device": (pair("a", scales=torch.ones(M, GROUPS, device="meta")), "a_scales is on meta and d on cpu"),
    "a device": (pair("a", empty(M, K, device="meta")), "a is on meta and d on cpu; accepted is one device"),
    "sparse a": (pair("a", torch.zeros(M, K).to_sparse()), "a has layout torch.sparse_coo; accepted is torch.strided"),
}  # fmt: skip
D_FAULTS: dict[str, tuple[Callable[[Arguments], Arguments], str]] = {
    "d none": (change(d=None), "d is NoneType; accepted is a torch.Tensor"),
    "d dtype": (change(d=torch.empty(M, N, dtype=torch.float16)), "d has dtype torch.float16; accepted are"),
    "d rank": (change(d=torch.empty(M, N, 1)), "d has 3 dimensions"),
    "d shape": (change(d=torch.empty(N, M)), r"d has shape \(40, 5\); a and b make it \(5, 40\)"),
    "d transposed": (change(d=torch.empty(N, M).t()), "d has strides .*; accepted is stride 1 along n"),
    "d expanded": (change(d=torch.empty(1, N).expand(M, N)), "d has strides .*; its rows of 40 elements overlap"),
    "d rows overlap": (change(d=torch.empty(400).as_strided((M, N), (N - 1, 1))), "its rows of 40 elements overlap"),
    "d device": (change(d=torch.empty(M, N, device="meta")), "a is on cpu and d on meta"),
    "c string": (change(c="d"), "c is str; accepted is a torch.Tensor"),
    "c dtype": (change(c=torch.empty(M, N, dtype=BF16)), "c has dtype torch.bfloat16 and d torch.float32"),
    "c shape": (change(c=torch.empty(M, 1)), r"c has shape \(5, 1\); a and b make it \(5, 40\)"),
    "c rank": (change(c=torch.empty(N)), "c has 1 dimensions; accepted is 2"),
    "c strides": (change(c=torch.empty(N, M).t()), "c has strides .*; accepted is stride 1 along n"),
    "c device": (change(c=torch.empty(M, N, device="meta")), "c is on meta and d on cpu"),
}  # fmt: skip
BF16_FAULTS: dict[str, tuple[Callable[[Arguments], Arguments], str]] = {
    "a none": (change(a=None), "a is NoneType; accepted is a torch.Tensor"),
    "a pair": (change(a=(empty(M, K, dtype=BF16), None)), "a is tuple; accepted is a torch.Tensor"),
    "a dtype": (change(a=torch.empty(M, K)), "a has dtype torch.float32; recipe bf16 accepts torch.bfloat16"),
    "b dtype": (change(b=empty(N, K)), "b has dtype torch.float8_e4m3fn; recipe bf16 accepts torch.bfloat16"),
    "b rank": (change(b=empty(1, N, K, dtype=BF16)), "b has 3 dimensions"),
    "k": (change(b=empty(N, K + 8, dtype=BF16)), "have k 272 and 280; they must agree"),
    "n 0": (change(b=empty(0, K, dtype=BF16)), r"d has shape \(5, 40\); a and b make it \(5, 0\)"),
}


def refused(function: Callable[..., None], arguments: Arguments, message: str) -> None:
    d = arguments["d"]
    checked = isinstance(d, Tensor) and d.device.type == "cpu" and d.numel() > 0
    if checked:
        d.fill_(float("nan"))
    with pytest.raises(ProblemError, match=message):
        function(**arguments)
    assert not checked or bool(d.isnan().all())


@pytest.mark.parametrize("name", [*FP8_FAULTS, *D_FAULTS])
def test_fp8_refuses(name: str) -> None:
    fault, message = {**FP8_FAULTS, **D_FAULTS}[name]
    good = {
        "a": (empty(M, K), torch.ones(M, GROUPS)),
        "b": (empty(N, K), torch.ones(1, GROUPS)),
        "d": torch.empty(M, N),
    }
    jitgemm.fp8_gemm_nt(**good)  # type: ignore[arg-type]
    refused(jitgemm.fp8_gemm_nt, fault(good), message)


@pytest.mark.parametrize("name", [*BF16_FAULTS, *D_FAULTS])
def test_bf16_refuses(name: str) -> None:
    fault, message = {**BF16_FAULTS, **D_FAULTS}[name]
    good = {"a": empty(M, K, dtype=BF16), "b": empty(N, K, dtype=BF16), "d": torch.empty(M, N)}
    jitgemm.bf16_gemm_nt(**good)
    refused(jitgemm.bf16_gemm_nt, fault(good), message)


def test_meta_tensors_are_refused() -> None:
    a, b = empty(M, K, dtype=BF16, device="meta"), empty(N, K, dtype=BF16, device="meta")
    with pytest.raises(ProblemError, match="d is on meta; accepted are CUDA and CPU tensors"):
        jitgemm.bf16_gemm_nt(a, b, torch.empty(M, N, device="meta"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_read_shapes_their_way(layout: str) -> None:
    a = empty(K, M, dtype=BF16) if layout[0] == "t" else empty(M, K, dtype=BF16)
    b = empty(K, N, dtype=BF16) if layout[1] == "n" else empty(N, K, dtype=BF16)
    function = getattr(jitgemm, f"bf16_gemm_{layout}")
    function(a, b, torch.empty(M, N))
    with pytest.raises(ProblemError, match=f"layout {layout} have k"):
        function(a.t(), b, torch.empty(M, N))


# -- What depends on addresses and on TMA; CUDA calls check it, here on CPU tensors.


def checked(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None, recipe: str = "bf16") -> _Operands:
    fp8 = recipe != "bf16"
    one = torch.ones(1) if fp8 else None
    return _Operands(a, one, b, one, d, c, _OPERATIONS[recipe, "nt", False])


def addresses(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None) -> tuple[int, ...]:
    return (a.data_ptr(), 0, b.data_ptr(), 0, d.data_ptr(), 0 if c is None else c.data_ptr())


def buffer(elements: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Memory that starts ``offset`` elements behind a multiple of 64 bytes."""
    base = torch.zeros(elements * dtype.itemsize + offset * dtype.itemsize + 64, dtype=torch.uint8)
    start = -base.data_ptr() % 64 + offset * dtype.itemsize
    return base[start : start + elements * dtype.itemsize].view(dtype)


@pytest.mark.parametrize("offset", range(1, 9))
@pytest.mark.parametrize("name", ["a", "b"])
def test_alignment(name: str, offset: int) -> None:
    shift = {"a": 0, "b": 0, name: offset}
    a, b = (buffer(rows * K, BF16, shift[x]).view(rows, K) for x, rows in (("a", M), ("b", N)))
    d = buffer(M * N, BF16, 3).view(M, N)  # D may start anywhere
    operands = checked(a, b, d)
    operands.check_for_tma()
    if offset % 8 == 0:
        operands.extents.check(*addresses(a, b, d))
        return
    with pytest.raises(
        ProblemError, match=rf"{name} starts at address 0x[0-9a-f]+; accepted is a multiple of 16 bytes"
    ):
        operands.extents.check(*addresses(a, b, d))


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_overlap(name: str) -> None:
    size = N * K
    base = buffer(4 * size, BF16)
    tensors = {
        "a": buffer(M * K, BF16).view(M, K),
        "b": buffer(N * K, BF16).view(N, K),
        "c": buffer(M * N, BF16).view(M, N),
    }
    tensors[name] = base[size : size + tensors[name].numel()].view(tensors[name].shape)
    length = tensors[name].numel()

    def check(start: int) -> None:
        d = base[start : start + M * N].view(M, N)
        a, b, c = tensors["a"], tensors["b"], tensors["c"]
        checked(a, b, d, c).extents.check_overlap(*addresses(a, b, d, c))

    check(size - M * N)  # ends where the input begins
    check(size + length)
    for start in {size - M * N + 1, size + 1, size + length - 1}:
        with pytest.raises(ProblemError, match=f"d overlaps {name}; accepted is an output apart from the other"):
            check(start)


def test_scales_may_not_overlap_d() -> None:
    storage = buffer(1024, torch.float32)
    d, scales = storage[: M * N].view(M, N), storage[M * N - 1 : M * N]
    a, b = empty(M, K), empty(N, K)
    operands = _Operands(a, scales, b, torch.ones(1), d, None, _OPERATIONS["fp8_tensorwise", "nt", False])
    align = 1 << 20
    with pytest.raises(ProblemError, match="d overlaps a_scales"):
        operands.extents.check_overlap(align, scales.data_ptr(), 2 * align, 3 * align, d.data_ptr(), 0)


def test_c_may_be_d_but_not_a_part_of_it() -> None:
    a, b = buffer(M * K, BF16).view(M, K), buffer(N * K, BF16).view(N, K)
    d = buffer(M * (N + 8), BF16).view(M, N + 8)[:, :N]
    checked(a, b, d, d).extents.check_overlap(*addresses(a, b, d, d))
    narrow = d.as_strided((M, N), (N, 1))
    with pytest.raises(ProblemError, match=r"d overlaps c; .*c may be d itself, with the same strides"):
        checked(a, b, d, narrow).extents.check_overlap(*addresses(a, b, d, narrow))


def test_overlap_is_refused_on_the_cpu_too() -> None:
    d = torch.ones(16, 16, dtype=BF16)
    with pytest.raises(ProblemError, match="d overlaps a; accepted"):
        jitgemm.bf16_gemm_nt(d, d.clone(), d)
    assert bool((d == 1).all())


def test_one_row_may_have_any_stride() -> None:
    """With one row, the row strides of C and D mean nothing: C is D whatever they are."""
    a, b = buffer(K, BF16).view(1, K), buffer(N * K, BF16).view(N, K)
    storage = buffer(4 * N, BF16)
    d, c = storage.as_strided((1, N), (N, 1)), storage.as_strided((1, N), (2 * N, 1))
    checked(a, b, d, c).extents.check_overlap(*addresses(a, b, d, c))
    short = storage.as_strided((1, N), (1, 1))
    checked(a, b, short, short).extents.check_overlap(*addresses(a, b, short, short))


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize(
    ("shape", "strides", "accepted"),
    [
        ((M, K), (K, 1), True),
        ((M, K), (K + 8, 1), True),
        ((M, K), (1, 8), True),  # MN-major
        ((M, K), (K + 4, 1), False),  # 8 bytes off
        ((M, K), (K + 1, 1), False),
        ((M, K), (2 * K, 2), False),  # no dimension is contiguous
        ((M, K), (K // 2 // 8 * 8, 1), False),  # rows overlap
        ((M, K), (0, 1), False),
        ((M, K), (1, 4), False),
        ((M, 1), (8, 1), True),
        ((1, K), (3, 1), True),  # one row: its stride is never used
        ((1, K), (1, 1), True),
    ],
    ids=str,
)
def test_strides_for_tma(name: str, shape: tuple[int, int], strides: tuple[int, int], accepted: bool) -> None:
    tensor = buffer(100_000, BF16).as_strided(shape, strides)
    other = buffer(8 * K, BF16).view(8, K)[:, : shape[1]] if shape[1] > 1 else buffer(64, BF16).view(8, 8)[:, :1]
    a, b = (tensor, other) if name == "a" else (other, tensor)
    operands = checked(a, b, torch.empty(a.shape[0], b.shape[0]))
    if accepted:
        operands.check_for_tma()
        for rows in (operands.a, operands.b):
            matrix = rows.matrix()
            assert matrix.row_stride * 2 % 16 == 0
            assert matrix.row_stride >= matrix.columns or matrix.rows == 1
        return
    with pytest.raises(ProblemError, match=f"{name} has shape .* and strides {re.escape(str(strides))}"):
        operands.check_for_tma()


def test_fp8_operands_must_be_k_major() -> None:
    a, b = buffer(M * K, F8).view(M, K), buffer(48 * K, F8).view(K, 48).t()[:N]
    with pytest.raises(ProblemError, match=r"stride 1 along k|FP8 operands must be nt"):
        checked(a, b, torch.empty(M, N), recipe="fp8_tensorwise").check_for_tma()


# -- Torch.


def operator_arguments(x: Operands, d: Tensor, c: Tensor | None, accumulate: bool = False) -> tuple[Any, ...]:
    return (x.a, x.a_scales, x.b, x.b_scales, d, c, accumulate, x.recipe, "nt", False)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("with_c", ["no c", "c", "c is d"])
def test_the_operator_passes_opcheck(recipe: str, with_c: str) -> None:
    x, d = operands(recipe), torch.randn(M, N)
    c = torch.randn(M, N) if with_c == "c" else None
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.jitgemm.gemm.default,
        operator_arguments(x, d, c, with_c == "c is d"),
        test_utils=checks if recipe == "bf16" else checks[1:],  # torch can't compare FP8 tensors on the CPU
    )


def two_layers(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, w: Tensor) -> Tensor:
    hidden = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16, device=a.device)
    jitgemm.fp8_gemm_nt((a, a_scales), (b, b_scales), hidden)
    out = torch.ones(a.shape[0], w.shape[1], device=a.device)
    jitgemm.bf16_gemm_nn(torch.relu(hidden), w, out, out)
    return out * 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_calls_compile_without_graph_breaks(dynamic: bool) -> None:
    compiled = torch.compile(two_layers, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    w = torch.randn(N, 24).bfloat16()
    for m in (M, 7, 19):
        x = operands("fp8_1x128_128x128", m=m)
        arguments = (x.a, x.a_scales, x.b, x.b_scales, w)
        assert torch.equal(compiled(*arguments), two_layers(*arguments))  # type: ignore[arg-type]


def test_fake_tensors() -> None:
    with FakeTensorMode():
        d = torch.empty(M, N)
        jitgemm.bf16_gemm_nt(empty(M, K, dtype=BF16), empty(N, K, dtype=BF16), d, d)
        assert d.shape == (M, N)


def test_gradients_are_not_asked_for() -> None:
    """The calls write in place and have no derivative: under no_grad parameters are fine."""
    weight = torch.nn.Parameter(random_matrix(N, K, torch.Generator()))
    d = torch.empty(M, N)
    with torch.no_grad():
        jitgemm.bf16_gemm_nt(empty(M, K, dtype=BF16), weight, d)
    assert torch.equal(d, torch.zeros(M, N))


def test_results_do_not_depend_on_who_called_before() -> None:
    first, second = operands("bf16", 3), operands("bf16", 4)
    for x in (first, second, first):
        d = torch.empty(x.a.shape[0], N)
        call(x, d)
        assert torch.equal(d, x.product("fp32"))


# -- The package.

PEER_NAMES = {
    "fp8_gemm_nt", "bf16_gemm_nt", "bf16_gemm_nn", "bf16_gemm_tn", "bf16_gemm_tt", "set_num_sms", "get_num_sms",
    "per_token_cast_to_fp8", "per_block_cast_to_fp8", "per_channel_cast_to_fp8", "get_mn_major_tma_aligned_tensor",
    "get_tma_aligned_size",
}  # fmt: skip
ERRORS = {
    "JitGemmError", "ProblemError", "SettingsError", "ConfigError", "CompileError", "CacheError", "CacheMissError",
    "DriverError",
}  # fmt: skip


def test_public_names() -> None:
    assert set(jitgemm.__all__) >= PEER_NAMES | ERRORS | {"override"}
    for name in jitgemm.__all__:
        assert getattr(jitgemm, name).__doc__
        assert name in dir(jitgemm)
    for name in ERRORS:
        assert issubclass(getattr(jitgemm, name), jitgemm.JitGemmError)
    assert issubclass(jitgemm.ProblemError, ValueError)
    with pytest.raises(AttributeError, match="no attribute 'fp4_gemm'"):
        _ = jitgemm.fp4_gemm


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, jitgemm; dir(jitgemm); jitgemm.ProblemError; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    loaded = {name.strip("[]' \n").split(".")[0] for name in done.stdout.split(",")}
    assert "jitgemm" in loaded
    assert not {"torch", "cuda", "numpy", "jinja2", "filelock", "platformdirs", "rich", "click"} & loaded


def test_the_number_of_multiprocessors() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(ProblemError, match="no CUDA device"):
        jitgemm.get_num_sms()
    try:
        jitgemm.set_num_sms(64)
        assert jitgemm.get_num_sms() == 64
    finally:
        jitgemm.set_num_sms(0)
    for bad in (-1, 1.5, True, None, "4"):
        with pytest.raises(ProblemError, match=r"num_sms is .*; accepted is an integer from 0"):
            jitgemm.set_num_sms(bad)  # type: ignore[arg-type]


def test_bounds_are_the_reference_s_own() -> None:
    x = operands("fp8_rowwise")
    d = torch.empty(M, N)
    call(x, d)
    reference.check_close(d, x.product("fp32"), recipe="fp8_rowwise", d_dtype="fp32")
