"""GEMMs with FP4 weights: what they compute on the CPU, what they refuse, and what they launch."""

from __future__ import annotations

import ctypes
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import test_grouped_launches
import test_launches
import torch
from emulation.plain import emulated  # noqa: F401 (a fixture)
from torch import Tensor

import jitgemm
from jitgemm import prewarming, settings, tensor_map
from jitgemm.device import H200
from jitgemm.errors import ProblemError
from jitgemm.families.gemm import FP4, FP4_RECIPES, GemmConfig, GemmProblem
from jitgemm.families.grouped import GroupedProblem
from jitgemm.families.small_problem import SmallProblem
from jitgemm.heuristics import enumerate_specs, gemm, grouped
from jitgemm.ops.fp4 import PreparedWeights
from jitgemm.reference import fp4, layout
from jitgemm.reference.gemm import check_close, round_to_bf16
from jitgemm.tuning import Workload

dense_gpu = test_launches.gpu
grouped_gpu = test_grouped_launches.gpu


def weights(*shape: int, window: tuple[int, int] = (112, 122), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Packed codes and UE8M0 exponents of ``[..., n, k]``."""
    generator = torch.Generator().manual_seed(seed)
    *lead, n, k = shape
    packed = torch.randint(-128, 128, (*lead, n, k // 2), generator=generator, dtype=torch.int8)
    exponents = torch.randint(window[0], window[1] + 1, (*lead, n, -(-k // 32)), generator=generator)
    return packed, exponents.to(torch.uint8)


def activations(*shape: int) -> tuple[Tensor, Tensor]:
    """e4m3 and scales of random rows."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float32)
    data, scales = jitgemm.per_token_cast_to_fp8(x.flatten(0, -2))
    return data.view(shape), scales.view(*shape[:-1], scales.shape[-1])


def values(data: Tensor, scales: Tensor) -> Tensor:
    """Dequantized activations."""
    return data.double() * scales.double().repeat_interleave(128, -1)[..., : data.shape[-1]]


def decoded(packed: Tensor, exponents: Tensor) -> Tensor:
    """Dequantized weights, by a table of the format's 16 values."""
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    table = torch.tensor(table + [-value for value in table], dtype=torch.float64)
    byte = packed.view(torch.uint8).long()
    codes = torch.stack([byte & 15, byte >> 4], -1).flatten(-2)
    powers = 2.0 ** (exponents.double() - 127)
    return table[codes] * powers.repeat_interleave(32, -1)[..., : codes.shape[-1]]


@pytest.mark.parametrize("how", ["prepared", "raw", "floats", "peer's recipes"])
@pytest.mark.parametrize("window", [(112, 122), (90, 140)])
@pytest.mark.parametrize(("m", "n", "k"), [(5, 72, 160), (1, 64, 128), (70, 200, 416)])
def test_dense(m: int, n: int, k: int, window: tuple[int, int], how: str) -> None:
    a, b = activations(m, k), weights(n, k, window=window)
    for dtype in (torch.bfloat16, torch.float32):
        d = torch.full((m, n), float("nan"), dtype=dtype)
        more: dict[str, Any] = {}
        operand: Any = jitgemm.prepare_fp4_weights(*b)
        if how == "raw":
            operand = b[0].view(torch.uint8), b[1]
        elif how == "floats":
            operand = b[0], fp4.exponents_to_float(b[1])
        elif how == "peer's recipes":
            more = {"recipe_a": (1, 128), "recipe_b": (1, 32)}
        jitgemm.fp8_fp4_gemm_nt(a, operand, d, **more)
        expected = values(*a) @ decoded(*b).T
        assert torch.equal(d, round_to_bf16(expected) if dtype == torch.bfloat16 else expected.float())
        c = torch.randn(m, n).to(dtype)
        jitgemm.fp8_fp4_gemm_nt(a, operand, d, c, **more)
        total = expected + c.double()
        assert torch.equal(d, round_to_bf16(total) if dtype == torch.bfloat16 else total.float())


@pytest.mark.parametrize("kind", ["masked", "contiguous", "psum"])
def test_grouped(kind: str) -> None:
    groups, n, k = 3, 72, 160
    b = weights(groups, n, k)
    counts, matrices = [4, 0, 9], decoded(*b)
    if kind == "masked":
        a, layout = activations(groups, 10, k), torch.tensor(counts, dtype=torch.int32)
        used = torch.arange(10)[None] < layout[:, None]
        expected = values(*a) @ matrices.mT
    else:
        a = activations(32, k)
        index = torch.tensor([0] * 4 + [-1] * 12 + [2] * 9 + [-1] * 7, dtype=torch.int32)
        layout = index if kind == "contiguous" else torch.tensor([4, 4, 25], dtype=torch.int32)
        used = index >= 0
        expected = (values(*a)[:, None] @ matrices[index.clamp(min=0).long()].mT)[:, 0]
    for operand in (jitgemm.prepare_fp4_weights(*b), b):
        d = torch.full((*used.shape, n), float("nan"), dtype=torch.bfloat16)
        with settings.override(mk_alignment=16):
            if kind == "masked":
                jitgemm.m_grouped_fp8_fp4_gemm_nt_masked(a, operand, d, layout, 4, recipe_b=(1, 32))
            else:
                jitgemm.m_grouped_fp8_fp4_gemm_nt_contiguous(a, operand, d, layout, use_psum_layout=kind == "psum")
        assert torch.equal(d[used], round_to_bf16(expected)[used])
        others = d[~used]
        assert others.isnan().all() if kind == "masked" else (others == 0).all()


def scaled_activations(group: int, form: str, *shape: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """e4m3 with scales of ``group`` of K that differ much, in some form; and the values."""
    generator = torch.Generator().manual_seed(9)
    data = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    count = -(-shape[-1] // group)
    exponents = torch.randint(110, 141, (*shape[:-1], count), generator=generator)
    scales = 2.0 ** (exponents.double() - 127)
    expected = data.double() * scales.repeat_interleave(group, -1)[..., : shape[-1]]
    if form == "floats":
        return (data, scales.float()), expected
    packed = torch.full((*shape[:-1], -(-count // 4) * 4), 255, dtype=torch.uint8)  # what lies behind is not read
    packed[..., :count] = exponents.to(torch.uint8)
    words = packed.view(torch.int32)
    if form == "packed, as the peer lays them out":
        words = words.mT.contiguous().mT
    return (data, words), expected


_FORMS = ("floats", "packed", "packed, as the peer lays them out")


@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("group", [128, 32])
def test_scales_of_activations(group: int, form: str) -> None:
    for m, n, k in ((5, 72, 160), (3, 64, 1312), (4, 64, 32)):
        a, plain = scaled_activations(group, form, m, k)
        b = weights(n, k)
        d = torch.full((m, n), float("nan"))
        expected = (plain @ decoded(*b).T).float()
        recipe = next(name for name, facts in FP4_RECIPES.items() if facts.a_group == group)
        jitgemm.fp8_fp4_gemm_nt(a, b, torch.empty(m, n), recipe=recipe, recipe_a=(1, group))
        for recipe_a in (None, (1, group), [1, group]):
            if recipe_a is None and group == 32 and k <= 128 and form != "floats":
                continue  # a word a row could be either
            jitgemm.fp8_fp4_gemm_nt(a, b, d, recipe_a=recipe_a)  # type: ignore[arg-type]
            assert torch.equal(d, expected)


@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("group", [128, 32])
def test_scales_of_grouped_activations(group: int, form: str) -> None:
    groups, m, n, k = 2, 6, 72, 672
    b = weights(groups, n, k)
    a, plain = scaled_activations(group, form, groups, m, k)
    d = torch.full((groups, m, n), float("nan"))
    counts = torch.full((groups,), m, dtype=torch.int32)
    jitgemm.m_grouped_fp8_fp4_gemm_nt_masked(a, b, d, counts, m, recipe_a=(1, group))
    expected = (plain @ decoded(*b).mT).float()
    assert torch.equal(d, expected)
    rows: Any = tuple(part.flatten(0, 1) for part in a)
    index = torch.arange(groups, dtype=torch.int32).repeat_interleave(m)
    flat = torch.full((groups * m, n), float("nan"))
    with settings.override(mk_alignment=1):
        jitgemm.m_grouped_fp8_fp4_gemm_nt_contiguous(rows, b, flat, index)
    assert torch.equal(flat, expected.flatten(0, 1))


def test_every_packed_exponent_has_its_value() -> None:
    exponents = torch.arange(256).to(torch.uint8).view(2, 128)
    found = torch.ops.jitgemm.unpack_ue8m0(exponents.view(torch.int32), 128).double().flatten()
    assert torch.equal(found[:255], 2.0 ** (torch.arange(255).double() - 127))
    assert found[255].isnan()
    column = exponents[0, :20].contiguous().view(torch.int32)[:, None]
    for words in (column, column.T.contiguous().T):
        assert torch.equal(torch.ops.jitgemm.unpack_ue8m0(words, 3).double(), found[:20].view(5, 4)[:, :3])


def test_the_unpacking_operator_passes_opcheck() -> None:
    torch.library.opcheck(torch.ops.jitgemm.unpack_ue8m0, (torch.ones((2, 5, 3), dtype=torch.int32), 10))


def test_scales_of_weights_that_are_packed() -> None:
    packed, exponents = weights(2, 72, 160)
    one_word = weights(72, 96)
    alone = torch.nn.functional.pad(one_word[1], (0, 1)).view(torch.int32).T.contiguous().T
    assert torch.equal(
        jitgemm.prepare_fp4_weights(one_word[0], alone).data, jitgemm.prepare_fp4_weights(*one_word).data
    )
    words = torch.nn.functional.pad(exponents, (0, 3), value=255).view(torch.int32)
    for form in (words, words.mT.contiguous().mT):
        one, other = jitgemm.prepare_fp4_weights(packed, form), jitgemm.prepare_fp4_weights(packed, exponents)
        assert torch.equal(one.data, other.data) and torch.equal(one.units, other.units)


# -- NVFP4.


def nv_weights(*shape: int) -> tuple[Tensor, Tensor]:
    """Packed codes and E4M3 scales of ``[..., n, k]``, all positive finite ones and zero."""
    generator = torch.Generator().manual_seed(3)
    *lead, n, k = shape
    packed = torch.randint(-128, 128, (*lead, n, k // 2), generator=generator, dtype=torch.int8)
    scales = torch.randint(0, 0x7F, (*lead, n, -(-k // 16)), generator=generator)
    return packed, scales.to(torch.uint8).view(torch.float8_e4m3fn)


def nv_decoded(packed: Tensor, scales: Tensor, global_scale: Tensor | float = 1.0) -> Tensor:
    """Dequantized weights: a table of codes, times torch's own values of the scales."""
    ones = torch.full((*packed.shape[:-1], -(-packed.shape[-1] // 16)), 127, dtype=torch.uint8)
    each = scales.double().repeat_interleave(16, -1)[..., : 2 * packed.shape[-1]]
    return decoded(packed, ones) * each * global_scale


@pytest.mark.parametrize("how", ["prepared", "raw", "peer's recipes", "raw, without a global scale"])
@pytest.mark.parametrize(("m", "n", "k"), [(5, 72, 160), (1, 64, 128), (9, 200, 416), (3, 8, 16)])
def test_nvfp4(m: int, n: int, k: int, how: str) -> None:
    a, (packed, scales) = activations(m, k), nv_weights(n, k)
    factor = 1.0 if how.endswith("scale") else 0.37
    d = torch.full((m, n), float("nan"))
    operand: Any = jitgemm.prepare_fp4_weights(packed, scales, factor)
    more: dict[str, Any] = {}
    if how == "raw":
        operand = packed, scales, torch.tensor([factor])
    elif how == "peer's recipes":
        more = {"recipe": "fp8_1x128_nvfp4_1x16", "recipe_a": (1, 128), "recipe_b": [1, 16]}
    elif how.endswith("scale"):
        operand = packed, scales
    jitgemm.fp8_fp4_gemm_nt(a, operand, d, **more)
    global_scale = torch.tensor(factor, dtype=torch.float32).double()
    assert torch.equal(d, (values(*a) @ nv_decoded(packed, scales, global_scale).T).float())


@pytest.mark.parametrize("of", ["all", "groups", "rows"])
def test_grouped_nvfp4(of: str) -> None:
    groups, m, n, k = 3, 4, 72, 160
    a, (packed, scales) = activations(groups, m, k), nv_weights(groups, n, k)
    shape = {"all": (), "groups": (groups,), "rows": (groups, n)}[of]
    global_scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    of_rows = global_scale if of != "groups" else global_scale[:, None]
    prepared = jitgemm.prepare_fp4_weights(packed, scales, global_scale)
    d = torch.full((groups, m, n), float("nan"))
    counts = torch.full((groups,), m, dtype=torch.int32)
    jitgemm.m_grouped_fp8_fp4_gemm_nt_masked(a, prepared, d, counts, m)
    factors = of_rows.double().expand(groups, n)[..., None]
    assert torch.equal(d, (values(*a) @ nv_decoded(packed, scales, factors).mT).float())
    codes, found, units = jitgemm.restore_fp4_weights(prepared)
    assert torch.equal(units, of_rows.expand(groups, n))
    assert torch.equal(nv_decoded(codes, found), nv_decoded(packed, scales))
    nonzero = scales.double() != 0
    assert torch.equal(found.double()[nonzero], scales.double()[nonzero])
    again = jitgemm.prepare_fp4_weights(codes, found, units)
    assert torch.equal(again.data, prepared.data) and torch.equal(again.units, prepared.units)


def test_nan_scales_of_nvfp4_reach_their_column_alone() -> None:
    a, (packed, scales) = activations(4, 128), nv_weights(64, 128)
    scales.view(torch.uint8)[9, 1] = 0x7F
    d = torch.empty(4, 64)
    jitgemm.fp8_fp4_gemm_nt(a, (packed, scales), d)
    assert d[:, 9].isnan().all() and d.isnan().sum() == 4
    _, found, units = jitgemm.restore_fp4_weights(jitgemm.prepare_fp4_weights(packed, scales))
    assert found.double()[9].isnan().all() and units.isnan().nonzero().flatten().tolist() == [9]


def test_compiled_nvfp4() -> None:
    def run(data: Tensor, scales: Tensor, packed: Tensor, of_weights: Tensor, global_scale: Tensor) -> Tensor:
        d = torch.empty(5, 72)
        jitgemm.fp8_fp4_gemm_nt((data, scales), jitgemm.prepare_fp4_weights(packed, of_weights, global_scale), d)
        return d

    arguments = *activations(5, 128), *nv_weights(72, 128), torch.tensor(0.5)
    assert torch.equal(torch.compile(run, fullgraph=True, backend="eager")(*arguments), run(*arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*weights(64, 128), 0.5), "global_scale is given with scales of torch.uint8"),
        ((*nv_weights(64, 128), torch.tensor(1.0).double()), "global_scale is torch.float64"),
        ((*nv_weights(64, 128), torch.ones(3)), r"global_scale has shape \(3,\)"),
        ((*nv_weights(64, 128), "one"), "global_scale is str"),
        ((nv_weights(64, 128)[0], nv_weights(64, 64)[1]), r"make it \(64, 8\): one for 16"),
    ],
)
def test_nvfp4_that_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        jitgemm.prepare_fp4_weights(*arguments)


def test_what_nvfp4_is_not_multiplied_with() -> None:
    b, d = nv_weights(64, 128), torch.empty(5, 64)
    (data, scales), _ = scaled_activations(32, "floats", 5, 128)
    cases: Any = (((data, scales), {}), (activations(5, 128), {"recipe_a": (1, 32)}))
    for a, more in cases:
        with pytest.raises(ProblemError, match=r"a_scales has shape|recipe_a is \(1, 32\)"):
            jitgemm.fp8_fp4_gemm_nt(a, b, d, **more)
    with pytest.raises(ProblemError, match="scales are those of NVFP4"):
        jitgemm.mxfp4_to_fp8(*b)
    with pytest.raises(ProblemError, match="recipe_b is"):
        jitgemm.fp8_fp4_gemm_nt(activations(5, 128), b, d, recipe_b=(1, 32))


@pytest.mark.parametrize("output", ["bf16", "quantized"])
@pytest.mark.parametrize("is_masked", [False, True])
def test_epilogues_follow_the_product(is_masked: bool, output: str) -> None:
    groups, m, n, k = 2, 5, 256, 160
    rows, kept = ((groups, m), slice(None)) if is_masked else ((m,), 0)
    a, (packed, exponents) = activations(*rows, k), (part[kept] for part in weights(groups, n, k))
    gate, up = (3e4 * values(*a) @ decoded(packed, exponents).mT).chunk(2, -1)
    expected = gate / (1 + (-gate).exp()) * up
    d: Any = torch.full((*rows, n // 2), float("nan"), dtype=torch.bfloat16)
    if output == "quantized":
        d = jitgemm.empty_quantized((*rows, n // 2), device="cpu")
    prepared = jitgemm.prepare_fp4_weights(*map(jitgemm.interleave_gate_up, (packed, exponents)))
    epilogue = jitgemm.Epilogue(alpha=3e4, swiglu=True)
    if is_masked:
        counts = torch.full((groups,), m, dtype=torch.int32)
        jitgemm.m_grouped_fp8_fp4_gemm_nt_masked(a, prepared, d, counts, m, epilogue=epilogue)
    else:
        jitgemm.fp8_fp4_gemm_nt(a, prepared, d, epilogue=epilogue)
    if output == "quantized":
        largest = expected.abs().amax(-1, keepdim=True)
        assert torch.allclose(d[1].double() * 448, largest, rtol=1e-6)
        assert ((values(*d) - expected).abs() <= expected.abs() / 16 + largest / 448 / 1024).all()
    else:
        assert torch.equal(d, round_to_bf16(expected))


def test_no_rows() -> None:
    operand = jitgemm.prepare_fp4_weights(*weights(64, 128))
    d = torch.empty(0, 64, dtype=torch.bfloat16)
    jitgemm.fp8_fp4_gemm_nt(activations(0, 128), operand, d)
    words = torch.empty((0, 1), dtype=torch.int32)
    for recipe_a in ((1, 128), (1, 32)):
        jitgemm.fp8_fp4_gemm_nt((activations(0, 128)[0], words), operand, d, recipe_a=recipe_a)


def test_nan_reaches_its_column_alone() -> None:
    a, (packed, exponents) = activations(4, 128), weights(64, 128)
    exponents[9, 1] = 255
    d = torch.empty(4, 64, dtype=torch.bfloat16)
    jitgemm.fp8_fp4_gemm_nt(a, (packed, exponents), d)
    assert d[:, 9].isnan().all() and d.isnan().sum() == 4


def test_restored_weights_are_the_prepared() -> None:
    packed, exponents = weights(2, 100, 160)
    prepared = jitgemm.prepare_fp4_weights(packed, exponents)
    assert isinstance(prepared, PreparedWeights) and prepared.k == 160
    assert prepared.data.shape == (2, 2, 2 * fp4.PACKED_BYTES) and prepared.units.shape == (2, 100)
    codes, scales = jitgemm.restore_fp4_weights(prepared)
    assert torch.equal(codes, packed) and torch.equal(scales, exponents)
    each = [jitgemm.prepare_fp4_weights(packed[i], exponents[i]) for i in range(2)]
    assert torch.equal(torch.stack([one.data for one in each]), prepared.data)


def test_fp8_of_the_same_values() -> None:
    packed, exponents = weights(2, 70, 160)
    converted = jitgemm.mxfp4_to_fp8(packed, exponents)
    assert converted is not None
    assert torch.equal(values(*converted), decoded(packed, exponents))
    assert jitgemm.mxfp4_to_fp8(*weights(70, 160, window=(90, 140))) is None


def test_quantized_weights_are_those_of_the_cast() -> None:
    x = torch.randn(64, 128)
    packed, scales = jitgemm.per_token_cast_to_fp4(x, True, 32)
    a, d = activations(3, 128), torch.empty(3, 64)
    jitgemm.fp8_fp4_gemm_nt(a, (packed, scales), d)
    expected = values(*a) @ jitgemm.cast_back_from_fp4(packed, scales, 32).double().T
    check_close(d, expected.float(), recipe=FP4, d_dtype="fp32")


def test_compiled() -> None:
    a, b = activations(5, 128), weights(72, 128)

    def run(data: Tensor, scales: Tensor, packed: Tensor, exponents: Tensor) -> Tensor:
        prepared = jitgemm.prepare_fp4_weights(packed, exponents)
        d = torch.empty(5, 72, dtype=torch.bfloat16)
        jitgemm.fp8_fp4_gemm_nt((data, scales), prepared, d)
        return d

    for given in (a, scaled_activations(128, "packed", 5, 128)[0]):
        compiled = torch.compile(run, fullgraph=True, backend="eager")
        assert torch.equal(compiled(*given, *b), run(*given, *b))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": (1, 128, 128)}, "recipe is .* with FP4 weights .* accepted is"),
        ({"recipe_b": (1, 128)}, "recipe_b is"),
        ({"recipe_a": (1, 64)}, r"recipe_a is .* accepted is \(1, 128\) or \(1, 32\)"),
        ({"recipe_a": (1, 32)}, r"a_scales has shape \(5, 1\); a \(5, 128\) makes it \(5, 4\)"),
        ({"recipe": "fp8_1x32_fp4_1x32"}, r"a_scales has shape"),
        ({"recipe": FP4, "recipe_a": (1, 32)}, r"recipe_a is \(1, 32\); .* accepted is \(1, 128\)"),
        ({"recipe": FP4, "recipe_b": [1, 16]}, r"recipe_b is \(1, 16\)"),
        ({"a": (activations(5, 128)[0], torch.ones(5, 2))}, r"makes it \(5, 1\) or \(5, 4\)"),
        ({"a": (activations(5, 128)[0], torch.ones(5, 3, dtype=torch.int32))}, r"makes it \(5, 1\)$"),
        ({"a": (activations(5, 128)[0], torch.ones(4, 1, dtype=torch.int32))}, r"a has rows \(5,\)"),
        ({"a": activations(5, 256)}, "have k 256 and 128"),
        ({"b": (weights(64, 128)[0], weights(64, 128)[1][:, :3])}, "scales have shape"),
        ({"b": (weights(64, 128)[0], weights(64, 128)[1].long())}, "scales has dtype torch.int64"),
        ({"b": (weights(64, 128)[0], weights(64, 128)[1].int())}, r"scales have shape .* make it \(64, 1\)"),
        ({"b": (weights(64, 128)[0], torch.full((64, 4), 3.0))}, "no power of two"),
        ({"d": torch.empty(5, 65, dtype=torch.bfloat16)}, "d has shape"),
        ({"a": (activations(5, 128)[0].view(torch.uint8), activations(5, 128)[1])}, "a has dtype torch.uint8"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"a": activations(5, 128), "b": weights(64, 128), "d": torch.empty(5, 64, dtype=torch.bfloat16)}
    with pytest.raises(ProblemError, match=message):
        jitgemm.fp8_fp4_gemm_nt(**{**arguments, **change})


def test_prepared_weights_that_were_changed_are_refused() -> None:
    good = jitgemm.prepare_fp4_weights(*weights(64, 128))
    a, d = activations(5, 128), torch.empty(5, 64, dtype=torch.bfloat16)
    for wrong, message in (
        (good._replace(version=99), "layout version 99"),
        (good._replace(group=64), "scales of 64; accepted is version 1 and 32 or 16"),
        (good._replace(units=good.units[:-1].repeat(2)), "make it"),
        (good._replace(data=good.data[:, 1:]), "make it"),
        (good._replace(data=good.data.view(torch.int8)), "b has dtype torch.int8"),
    ):
        with pytest.raises(ProblemError, match=message):
            jitgemm.fp8_fp4_gemm_nt(a, wrong, d)
    with pytest.raises(ProblemError, match="layout version"):
        jitgemm.restore_fp4_weights(good._replace(version=99))


# -- The kernels beside the GEMM's, emulated.


def differing(weights: tuple[Tensor, ...], place: str) -> tuple[Tensor, ...]:
    """The same weights where kernels find them otherwise: in wider rows, at odd addresses, with scales in columns."""
    packed, scales, *rest = weights
    if place == "as they are":
        return weights
    lead = packed.shape[:-1]
    wide = torch.full((*lead, packed.shape[-1] + 5), 0x11, dtype=torch.int8)
    wide[..., 1 : 1 + packed.shape[-1]] = packed
    columns = scales.view(torch.uint8).mT.contiguous().mT.view(scales.dtype)
    return wide[..., 1 : 1 + packed.shape[-1]], columns, *rest


@pytest.mark.parametrize("place", ["as they are", "elsewhere"])
@pytest.mark.parametrize("shape", [(64, 256), (100, 416), (3, 70, 160), (1, 2), (2, 65, 34)])
@pytest.mark.parametrize("window", [(101, 127), (0, 26), (228, 254), (0, 254), (120, 147)])
def test_the_kernel_that_packs_mxfp4(
    emulated: Any,  # noqa: F811
    shape: tuple[int, ...],
    window: tuple[int, int],
    place: str,
) -> None:
    packed, exponents = weights(*shape, window=window)
    generator = torch.Generator().manual_seed(4)
    zeros = torch.rand(exponents.shape, generator=generator) < 0.3
    packed[zeros.repeat_interleave(16, -1)[..., : shape[-1] // 2]] &= -0x78  # signs stay
    exponents[torch.rand(exponents.shape, generator=generator) < 0.003] = 255
    packed[..., shape[-2] // 2, :] = 0
    found = jitgemm.prepare_fp4_weights(*differing((packed, exponents), place))
    assert len(emulated) == 1
    expected = fp4.pack(packed.view(torch.uint8), exponents)
    assert torch.equal(found.data, expected[0])
    assert torch.equal(found.units.view(torch.int32), expected[1].view(torch.int32))


@pytest.mark.parametrize("place", ["as they are", "elsewhere"])
@pytest.mark.parametrize("shape", [(64, 256), (100, 416), (3, 70, 160), (1, 2), (2, 65, 34)])
def test_the_kernel_that_packs_nvfp4(emulated: Any, shape: tuple[int, ...], place: str) -> None:  # noqa: F811
    packed, scales = nv_weights(*shape)
    units = torch.rand(shape[:-1])
    scales.view(torch.uint8)[torch.rand(scales.shape) < 0.003] = 0x7F
    scales.view(torch.uint8)[torch.rand(scales.shape) < 0.1] |= 0x80
    found = jitgemm.prepare_fp4_weights(*differing((packed, scales, units), place))
    assert len(emulated) == 1
    expected = fp4.pack_nvfp4(packed, scales, units)
    assert torch.equal(found.data, expected[0])
    assert torch.equal(found.units.view(torch.int32), expected[1].view(torch.int32))


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (300, 2), (3, 130, 7), (2, 1, 5)])
@pytest.mark.parametrize("is_mn_major", [False, True])
def test_the_kernel_that_unpacks_scales(emulated: Any, shape: tuple[int, ...], is_mn_major: bool) -> None:  # noqa: F811
    exponents = torch.arange(4 * torch.Size(shape).numel()).remainder(256).to(torch.uint8)
    words = exponents.view(torch.int32).view(shape)
    words = words.mT.contiguous().mT if is_mn_major else words
    for k_blocks in (4 * shape[-1], 4 * shape[-1] - 3):
        found = torch.ops.jitgemm.unpack_ue8m0(words, k_blocks)
        expected = layout.unpack_ue8m0_to_mn_major(words, k_blocks)
        assert found.stride() == expected.stride()
        bits = [tensor.contiguous().view(torch.int32) for tensor in (found, expected)]
        assert torch.equal(*bits)
    assert len(emulated) == 2


# -- Launches.


def prepared_for_launch(*shape: int) -> PreparedWeights:
    prepared = jitgemm.prepare_fp4_weights(*weights(*shape))
    return prepared._replace(data=test_launches.aligned(prepared.data), units=test_launches.aligned(prepared.units))


@pytest.mark.parametrize("config", ["16x128x128 s4 swap", "64x128x128 s4"])
def test_dense_launch(dense_gpu: test_launches.Gpu, maps: dict[int, Any], config: str) -> None:
    """The weights' address is in the place of their operand's maps, also when a call is repeated with others."""
    m, n, k = 40, 200, 416
    data, scales = activations(m, k)
    a = test_launches.aligned(data), test_launches.aligned(jitgemm.get_mn_major_tma_aligned_tensor(scales))
    d, swapped = test_launches.aligned(torch.zeros(m, n, dtype=torch.bfloat16)), config.endswith("swap")
    for b in (prepared_for_launch(n, k), prepared_for_launch(n, k)):
        for _ in range(2):
            with settings.override(config=config):
                jitgemm.fp8_fp4_gemm_nt(a, b, d)
            launched = dense_gpu.last()
            tail, place = launched.tail, 0 if swapped else 2
            assert launched.map(place)[0] == b.data.data_ptr() and b.data.data_ptr() not in maps
            units, of_a = (4, 9) if swapped else (9, 4)
            assert tail[units : units + 2] == (b.units.data_ptr(), 1) and tail[of_a] == a[1].data_ptr()
            assert tail[0] == d.data_ptr() and tail[24:27] == (m, n, 4)
    assert dense_gpu.loaded_for[-1].to_dict()["recipe"] == FP4


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Sizes and boxes of tensor maps, by address."""
    found: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def encode(target: int, code: int, rank: int, address: int, *rest: int) -> int:
        dims = tuple((ctypes.c_uint64 * rank).from_address(rest[0]))
        found[address] = (dims, tuple((ctypes.c_uint32 * rank).from_address(rest[2])))
        return 0

    monkeypatch.setattr(tensor_map, "encode_tensor_map_function", lambda: encode)
    return found


def test_launch_of_nvfp4(dense_gpu: test_launches.Gpu, maps: dict[int, Any]) -> None:
    m, n, k = 40, 200, 416
    data, scales = activations(m, k)
    a = test_launches.aligned(data), test_launches.aligned(jitgemm.get_mn_major_tma_aligned_tensor(scales))
    prepared = jitgemm.prepare_fp4_weights(*nv_weights(n, k))
    b = prepared._replace(data=test_launches.aligned(prepared.data), units=test_launches.aligned(prepared.units))
    d = test_launches.aligned(torch.zeros(m, n, dtype=torch.bfloat16))
    with settings.override(config="16x128x128 s4 swap"):
        jitgemm.fp8_fp4_gemm_nt(a, b, d)
    launched = dense_gpu.last()
    tail = launched.tail
    assert launched.map(0)[0] == b.data.data_ptr()
    assert maps[a[1].data_ptr()] == ((m, 4), (16, 1)) and tail[4] == b.units.data_ptr()
    assert dense_gpu.loaded_for[-1].to_dict()["recipe"] == "fp8_1x128_nvfp4_1x16"


def test_launch_with_scales_of_32(dense_gpu: test_launches.Gpu, maps: dict[int, Any]) -> None:
    m, n, k = 40, 200, 416
    (data, scales), _ = scaled_activations(32, "floats", m, k)
    a = test_launches.aligned(data), test_launches.aligned(jitgemm.get_mn_major_tma_aligned_tensor(scales))
    b, d = prepared_for_launch(n, k), test_launches.aligned(torch.zeros(m, n, dtype=torch.bfloat16))
    with settings.override(config="16x128x128 s4 swap"):
        jitgemm.fp8_fp4_gemm_nt(a, b, d)
    dense_gpu.last()
    assert maps[a[1].data_ptr()] == ((m, 13), (16, 4))  # 13 scales a row, four of them a stage
    assert dense_gpu.loaded_for[-1].to_dict()["recipe"] == "fp8_1x32_fp4_1x32"


@pytest.mark.parametrize("kind", ["masked", "contiguous"])
def test_grouped_launch(grouped_gpu: test_grouped_launches.Gpu, kind: str) -> None:
    groups, rows, n, k = 4, 256, 320, 384
    one = test_grouped_launches.call(kind, groups=groups, rows=rows, n=n, k=k)
    b = prepared_for_launch(groups, n, k)
    a, more = (one.a, one.a_scales), [8] if kind == "masked" else []
    getattr(jitgemm, f"m_grouped_fp8_fp4_gemm_nt_{kind}")(a, b, one.d, one.layout, *more)
    launched = grouped_gpu.last()
    assert launched.config.swap_ab
    assert launched.map(0) == (b.data.data_ptr(), *(0,) * 8) and launched.map(1) == (0,) * 9
    tail = launched.tail
    assert tail[2] == b.units.data_ptr() and tail[3] == 1  # the row scales' matrix and its stride
    assert n in struct.unpack(f"<{len(launched.params) // 4}i", launched.params)
    assert tail[13] == n  # between groups' units


def test_recorded_problems_can_be_prewarmed(tmp_path: Path) -> None:
    path = tmp_path / "shapes.jsonl"
    dense, grouped_a = activations(5, 128), activations(2, 5, 128)
    with settings.override(record=path):
        d = torch.empty(5, 72, dtype=torch.bfloat16)
        jitgemm.fp8_fp4_gemm_nt(dense, weights(72, 128), d)
        masked = torch.empty(2, 5, 72, dtype=torch.bfloat16)
        counts = torch.tensor([1, 5], dtype=torch.int32)
        jitgemm.m_grouped_fp8_fp4_gemm_nt_masked(grouped_a, weights(2, 72, 128), masked, counts, 3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("recipe") for line in lines] == [None, FP4, FP4]
    first, *found = prewarming._problems(path)
    assert first == SmallProblem.make("prepare_fp4_weights", format="mxfp4")
    assert found[0] == GemmProblem(72, 128, FP4) and isinstance(found[1], GroupedProblem)
    for problem in found:
        specs = enumerate_specs(problem, H200)
        assert {"transpose_scales", "unpack_scales", "pack_fp4"} < {spec.family for spec in specs}
        assert first.specs("sm_90a")[0] in specs


# -- Choice.


@pytest.mark.parametrize("recipe", FP4_RECIPES)
def test_every_shape_gets_a_legal_config(recipe: str) -> None:
    for n, k in ((4096, 7168), (7168, 2048), (576, 7168), (64, 128), (7168, 16384)):
        for m in (1, 8, 16, 33, 64, 128, 512, 4096):
            problem = GemmProblem(n, k, recipe, m)
            config = gemm.choose_config(problem, H200)
            assert gemm.illegal(problem, config, H200) is None and (config.swap_ab or recipe == FP4)
            many = GroupedProblem(n, k, recipe, 8, "masked", m)
            chosen = grouped.choose_config(many, H200)
            assert grouped.illegal(many, chosen, H200) is None and chosen.swap_ab


@pytest.mark.parametrize("recipe", FP4_RECIPES)
def test_tuning_has_operands(recipe: str) -> None:
    problem = GemmProblem(72, 160, recipe, 5)
    work = Workload(problem, "cpu")
    work.call(gemm.choose_config(problem, H200))()
    assert bool(work.d.isfinite().all()) and bool((work.d != 0).any())


def test_configs_that_the_kernels_have_not() -> None:
    problem = GemmProblem(4096, 4096, FP4)
    for text, reason in (
        ("128x192x128 s4", "tile_n must be 64 or 128"),
        ("16x192x128 s4 swap", "tile_n must be 64 or 128"),
        ("136x64x128 s4 swap", "tile_m must be at most"),
        ("16x64x128 s4 c2x1 swap", "clusters only where"),
        ("16x64x128 s4 c1x2 swap", "clusters only where"),
    ):
        assert reason in str(gemm.illegal(problem, GemmConfig.from_text(text), H200))
    in_shared_memory = GemmConfig.from_text("128x128x128 s4")
    assert gemm.illegal(problem, in_shared_memory, H200) is None
    for recipe in set(FP4_RECIPES) - {FP4}:
        reason = gemm.illegal(GemmProblem(4096, 4096, recipe), in_shared_memory, H200)
        assert "swap_ab must be on" in str(reason)


def test_rows_that_must_not_depend_on_m_are_multiplied_from_registers() -> None:
    """Scales that lie far apart are summed up in another order elsewhere."""
    problem = GemmProblem(4096, 7168, FP4)
    assert not all(config.swap_ab for config in gemm.enumerate_configs(problem, H200))
    with settings.override(batch_invariant=True):
        assert all(config.swap_ab for config in gemm.enumerate_configs(problem, H200))
