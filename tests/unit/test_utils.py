"""jitgemm.utils and the layout functions that callers use beside the GEMMs."""

from __future__ import annotations

import inspect
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulation.plain import emulated  # noqa: F401 (a fixture)
from support import environment
from torch import Tensor

import jitgemm
from jitgemm import settings, utils
from jitgemm.errors import ProblemError, SettingsError
from jitgemm.ops import pack_scales
from jitgemm.reference import layout as reference
from jitgemm.reference.layout import rows_of_gate_up_blocks

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def powers_of_two(*shape: int) -> Tensor:
    return torch.randint(-20, 20, shape).double().exp2().float()


def exponent(x: float) -> int:
    return math.frexp(x)[1] + 126


@pytest.fixture
def default_alignment() -> object:
    yield
    settings.reload()


def test_the_names_of_the_peer_are_where_it_has_them() -> None:
    code = """
import sys
import jitgemm as deep_gemm
assert "torch" not in sys.modules
assert deep_gemm.utils.align(5, 4) == deep_gemm.align(5, 4) == 8
from jitgemm.utils import (
    align, ceil_div, ceil_to_ue8m0, get_mk_alignment_for_contiguous_layout, get_tma_aligned_size,
    get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor, get_mn_major_tma_aligned_packed_ue8m0_tensor,
    get_mn_major_tma_aligned_tensor, per_block_cast_to_fp8, per_channel_cast_to_fp8, per_custom_dims_cast_to_fp8,
    per_token_cast_to_fp4, per_token_cast_to_fp8, set_mk_alignment_for_contiguous_layout, transpose_packed_fp4,
    get_theoretical_mk_alignment_for_contiguous_layout, get_m_alignment_for_contiguous_layout,
)
from jitgemm.utils.math import pack_ue8m0_to_int, unpack_ue8m0_from_int
from jitgemm.utils.layout import get_k_alignment_for_contiguous_layout
from jitgemm.testing import bench, bench_kineto, calc_diff, count_bytes, get_arch_major, ignore_env, test_filter
assert deep_gemm.testing.calc_diff is calc_diff
for name in deep_gemm.__all__:
    assert getattr(deep_gemm, name) is not None and name in dir(deep_gemm), name
"""
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=120)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (jitgemm.per_token_cast_to_fp4, ["x", "use_ue8m0", "gran_k", "use_packed_ue8m0"]),
        (jitgemm.per_custom_dims_cast_to_fp8, ["x", "dims", "use_ue8m0"]),
        (jitgemm.get_theoretical_mk_alignment_for_contiguous_layout, ["expected_m"]),
        (jitgemm.set_mk_alignment_for_contiguous_layout, ["new_value"]),
        (
            jitgemm.transform_sf_into_required_layout,
            ["sf", "mn", "k", "recipe", "num_groups", "is_sfa", "disable_ue8m0_cast", "psum_layout"],
        ),
        (
            jitgemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor,
            ["sf", "grouped_layout", "ks_cpu", "gran_k", "k_alignment", "use_psum_layout"],
        ),
    ],
)
def test_parameters_have_the_peers_names_and_order(function: object, parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters  # type: ignore[arg-type]


def nearest_e2m1(x: float) -> int:
    """By search: the nearest code, ties to the even one; zeros without sign."""
    code = min(range(8), key=lambda c: (abs(E2M1[c] - abs(x)), c % 2))
    return code | (8 if x < 0 and code else 0)


@pytest.mark.parametrize(("use_ue8m0", "gran_k"), [(False, 128), (True, 32), (False, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_casts_to_fp4_equal_a_search(use_ue8m0: bool, gran_k: int, dtype: torch.dtype) -> None:
    m, k = 5, 146
    x = (torch.randn(m, k) * torch.tensor([1e-6, 0.1, 1, 30, 1000])[:, None]).to(dtype)
    packed, sf = jitgemm.per_token_cast_to_fp4(x, use_ue8m0, gran_k)
    assert packed.dtype == torch.int8 and packed.shape == (m, k // 2) and sf.shape == (m, -(-k // gran_k))
    data = packed.view(torch.uint8)
    for i in range(m):
        for group in range(sf.shape[1]):
            columns = range(group * gran_k, min(group * gran_k + gran_k, k))
            expected = np.float32(max(*(abs(x[i, j].item()) for j in columns), 1e-4)) / np.float32(6)
            if use_ue8m0:
                expected = 2.0 ** math.ceil(math.log2(expected))
            assert sf[i, group].item() == expected
            inverse = np.float32(1) / np.float32(expected)
            for j in columns:
                byte = int(data[i, j // 2])
                assert (byte >> 4 if j % 2 else byte & 15) == nearest_e2m1(float(np.float32(x[i, j].item()) * inverse))
    restored = jitgemm.cast_back_from_fp4(packed, sf, gran_k)
    steps = sf.repeat_interleave(gran_k, 1)[:, :k]
    assert ((restored - x.float()).abs() <= steps * 1.0001).all()  # half of the widest step, from 4 to 6


def test_ties_between_fp4_codes_go_to_the_even_one() -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    row = torch.tensor([ties + [-x for x in ties]]).float()
    packed, sf = jitgemm.per_token_cast_to_fp4(row, False, 16)
    assert sf.item() == 1
    restored = jitgemm.cast_back_from_fp4(packed, sf, 16)[0].tolist()
    assert restored == [0, 1, 1, 2, 2, 4, 4, 6, 0, -1, -1, -2, -2, -4, -4, -6]


def test_every_fp4_code_survives_packing_and_transposing() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(6, 1)
    codes[1::2] = codes[1::2].flip(1)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8)
    values = jitgemm.cast_back_from_fp4(packed, torch.ones(6, 1), 16)
    table = torch.tensor([*E2M1, *(-x for x in E2M1)])
    assert torch.equal(values, table[codes.int()])
    turned = jitgemm.transpose_packed_fp4(packed)
    assert turned.shape == (16, 3)
    assert torch.equal(jitgemm.cast_back_from_fp4(turned, torch.ones(16, 1), 16), values.T)
    assert torch.equal(jitgemm.transpose_packed_fp4(turned), packed)


def test_packed_scales_of_fp4_and_fp8_are_read_back() -> None:
    x = torch.randn(4, 96).bfloat16()
    for cast, back in (
        (jitgemm.per_token_cast_to_fp4, jitgemm.cast_back_from_fp4),
        (jitgemm.per_token_cast_to_fp8, jitgemm.cast_back_from_fp8),
    ):
        values, sf = cast(x, True, 32)
        packed_values, packed = cast(x, True, 32, True)
        assert packed.dtype == torch.int32 and packed.shape == (4, 1)
        assert torch.equal(back(packed_values, packed, 32, True), back(values, sf, 32))


@pytest.mark.parametrize("dims", [(0,), (1,), (-1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("use_ue8m0", [False, True])
def test_casts_along_any_dimensions(dims: tuple[int, ...], use_ue8m0: bool) -> None:
    x = torch.randn(3, 5, 4) * torch.rand(3, 1, 1) * 100
    values, sf = jitgemm.per_custom_dims_cast_to_fp8(x, dims, use_ue8m0)
    kept = sorted(dim % 3 for dim in dims)
    assert values.shape == x.shape and sf.shape == tuple(x.shape[dim] for dim in kept)
    moved, moved_values = (
        t.float()[..., None].movedim(kept, list(range(len(kept)))).flatten(len(kept)) for t in (x, values)
    )
    for index in np.ndindex(*sf.shape):
        amax = moved[index].abs().max()
        scale = amax.clamp(min=1e-4) * torch.tensor(1 / 448)
        assert sf[index] == (jitgemm.ceil_to_ue8m0(scale) if use_ue8m0 else scale)
        assert ((moved_values[index] * sf[index] - moved[index]).abs() <= amax / 16).all()


def test_exponents_are_packed_and_unpacked() -> None:
    x = powers_of_two(3, 8)
    packed = jitgemm.pack_ue8m0_to_int(x)
    assert packed.dtype == torch.int32 and packed.shape == (3, 2)
    for i in range(3):
        for word in range(2):
            bytes_ = int(packed[i, word]).to_bytes(4, "little", signed=True)
            assert list(bytes_) == [exponent(v) for v in x[i, word * 4 : word * 4 + 4].tolist()]
    assert torch.equal(jitgemm.unpack_ue8m0_from_int(packed), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: utils.pack_ue8m0_to_int(torch.ones(2, 6)), r"x is torch.float32 \(2, 6\); accepted is"),
        (lambda: utils.pack_ue8m0_to_int(torch.full((4,), 3.0)), "x holds a number that is no power of two"),
        (lambda: utils.pack_ue8m0_to_int(torch.full((4,), -2.0)), "x holds a number that is no power of two"),
        (lambda: utils.unpack_ue8m0_from_int(torch.ones(4)), "packed_sf has dtype torch.float32"),
        (lambda: utils.per_token_cast_to_fp4(torch.ones(2, 5), True), "x has 5 columns; accepted is an even number"),
        (lambda: utils.per_token_cast_to_fp4(torch.ones(2, 4), False, 32, True), "use_packed_ue8m0 is True"),
        (lambda: utils.per_token_cast_to_fp4(torch.ones(2, 4), True, 20), "gran_k is 20"),
        (lambda: utils.cast_back_from_fp4(torch.ones(2, 4), torch.ones(2, 1)), "packed has dtype torch.float32"),
        (lambda: utils.transpose_packed_fp4(torch.ones(3, 4).char()), r"a has shape \(3, 4\); accepted is a matrix"),
        (lambda: utils.per_custom_dims_cast_to_fp8(torch.ones(2, 3), (2,), True), r"dims is \(2,\)"),
        (lambda: utils.per_custom_dims_cast_to_fp8(torch.ones(0, 3), (0,), True), r"x has shape \(0, 3\)"),
    ],
)
def test_casts_that_are_refused(call: object, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        call()  # type: ignore[operator]


def test_the_alignment_of_groups_is_a_setting(default_alignment: object) -> None:
    assert jitgemm.get_mk_alignment_for_contiguous_layout() == 128
    for alignment in (64, 1, 256):
        jitgemm.set_mk_alignment_for_contiguous_layout(alignment)
        assert utils.get_m_alignment_for_contiguous_layout() == alignment
        assert utils.get_k_alignment_for_contiguous_layout() == settings.current().mk_alignment == alignment
    with settings.override(mk_alignment=8):
        assert jitgemm.get_mk_alignment_for_contiguous_layout() == 8
    assert jitgemm.get_mk_alignment_for_contiguous_layout() == 256
    assert settings.from_environment({"JITGEMM_MK_ALIGNMENT": "16"}).mk_alignment == 16
    for bad in (0, -8, 1.5, "many"):
        with pytest.raises(SettingsError, match="set_mk_alignment_for_contiguous_layout: mk_alignment is "):
            jitgemm.set_mk_alignment_for_contiguous_layout(bad)  # type: ignore[arg-type]


def test_the_alignment_that_suits_a_size_of_groups() -> None:
    theoretical = jitgemm.get_theoretical_mk_alignment_for_contiguous_layout
    assert theoretical() == 128
    sizes = {1: 8, 8: 8, 9: 16, 24: 32, 64: 64, 65: 128, 128: 128, 5000: 128}
    assert {m: theoretical(m) for m in sizes} == sizes
    for bad in (0, -1, 2.0):
        with pytest.raises(ProblemError, match="expected_m is "):
            theoretical(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", [None, 3])
def test_scales_become_what_the_kernels_load(groups: int | None) -> None:
    mn, k = 131, 300
    leading = () if groups is None else (groups,)
    rows, blocks = torch.rand(*leading, mn, 3), torch.rand(*leading, 2, 3)
    for recipe, is_sfa in (((1, 128), None), ((1, 128, 128), True), ((1, 1, 128), False)):
        result = jitgemm.transform_sf_into_required_layout(rows, mn, k, recipe, groups, is_sfa)
        assert torch.equal(result, rows) and result.stride()[-2:] == (1, 132)
    for recipe, is_sfa in (((128, 128), None), ((1, 128, 128), False)):
        assert jitgemm.transform_sf_into_required_layout(blocks, mn, k, recipe, groups, is_sfa) is blocks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sf": torch.ones(5, 3, dtype=torch.int32)}, "sf has dtype torch.int32; accepted is torch.float32"),
        ({"recipe": (1, 1, 128)}, r"recipe is \(1, 1, 128\) and is_sfa None"),
        ({"recipe": (1, 128), "is_sfa": True}, r"recipe is \(1, 128\) and is_sfa True"),
        ({"recipe": (1, 32)}, r"recipe is \(1, 32\); accepted is 1 or 128 by 128"),
        ({"recipe": (128, 128)}, r"sf has shape \(5, 3\); accepted is \(1, 3\)"),
        ({"num_groups": 2}, r"sf has shape \(5, 3\); accepted is \(2, 5, 3\) for 5 x 300"),
    ],
)
def test_scales_that_are_refused(changes: dict[str, object], message: str) -> None:
    call: dict[str, object] = {"sf": torch.ones(5, 3), "mn": 5, "k": 300, "recipe": (1, 128)}
    with pytest.raises(ProblemError, match=message):
        jitgemm.transform_sf_into_required_layout(**(call | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("use_psum_layout", [False, True])
@pytest.mark.parametrize("gran_k", [32, 128])
def test_scales_of_groups_along_k_are_packed_group_by_group(
    seed: int, use_psum_layout: bool, gran_k: int, default_alignment: object
) -> None:
    generator = random.Random(seed)
    mn, alignment = generator.choice([1, 8, 30]), generator.choice([128, 256])
    ks = [generator.choice([0, 128, generator.randrange(1, 700)]) for _ in range(5)]
    sf = powers_of_two(sum(-(-k // gran_k) for k in ks), mn)
    layout, end = [], 0
    for k in ks:
        end = -(-end // alignment) * alignment + k
        layout.append(end)
    jitgemm.set_mk_alignment_for_contiguous_layout(alignment)
    result = jitgemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(
        sf,
        torch.tensor(layout if use_psum_layout else ks, dtype=torch.int32),
        None if use_psum_layout else ks,
        gran_k,
        *((alignment,) if seed % 2 else ()),
        use_psum_layout=use_psum_layout,
    )
    expected, start = [], 0
    for k in ks:
        blocks = -(-k // gran_k)
        for first in range(start, start + blocks, 4):
            of_word = sf[first : min(first + 4, start + blocks)].double().numpy()
            expected.append([sum(exponent(x) << 8 * i for i, x in enumerate(column)) for column in of_word.T])
        start += blocks
    words = result.contiguous().numpy().astype(np.int64) & 0xFFFFFFFF
    assert words.tolist() == expected and result.dtype == torch.int32
    if len(expected) > 1:
        assert result.stride() == (-(-mn // 4) * 4, 1)


def bits(*shape: int) -> Tensor:
    """fp32 of any bits: signs, mantissas, NaN and Inf too."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).int().view(torch.float32)


@pytest.mark.parametrize("shape", [(131, 1), (128, 9), (3, 257, 6), (2, 1, 4)])
@pytest.mark.parametrize("k_major", [True, False])
def test_the_kernel_packs_planes(emulated: Any, shape: tuple[int, ...], k_major: bool) -> None:  # noqa: F811
    sf = bits(*shape) if k_major else bits(*shape[:-2], shape[-1], shape[-2]).mT
    for view in (sf, sf[..., ::2, :], sf[..., 1:]):
        packed = jitgemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(view)
        expected = reference.get_mn_major_tma_aligned_packed_ue8m0_tensor(view)
        assert torch.equal(packed, expected) and packed.stride() == expected.stride()
    empty = jitgemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf[..., :0])
    assert empty.shape == (*shape[:-1], 0)
    assert {spec["grouped"] for spec in emulated} == {False}


@pytest.mark.parametrize("mn", [1, 130])
@pytest.mark.parametrize("use_psum_layout", [False, True])
@pytest.mark.parametrize(("gran_k", "ks"), [(128, (128, 0, 1000, 512, 4)), (32, (96, 128, 0)), (32, (0,))])
def test_the_kernel_packs_groups(
    emulated: Any,  # noqa: F811
    gran_k: int,
    ks: tuple[int, ...],
    use_psum_layout: bool,
    mn: int,
) -> None:
    blocks = [-(-k // gran_k) for k in ks]
    ends, end = [], 0
    for k in ks:
        end = -(-end // 160) * 160 + k
        ends.append(end)
    layout = torch.tensor(ends if use_psum_layout else ks, dtype=torch.int32)
    for sf in (bits(sum(blocks), mn), bits(mn, sum(blocks)).T):
        packed = jitgemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(
            sf, layout, list(ks), gran_k, 160, use_psum_layout
        )
        expected = reference.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf, blocks)
        assert torch.equal(packed, expected) and packed.stride() == expected.stride()
    assert {spec["grouped"] for spec in emulated} == ({True} if sum(blocks) else set())


@pytest.mark.parametrize("wrong", [(128, 2**31 - 1, 2**31 - 1, 128), (-5, 99999, -(2**31), 1), (0, 0, 0, 2**31 - 1)])
def test_the_kernel_stays_within_its_tensors(emulated: Any, wrong: tuple[int, ...]) -> None:  # noqa: F811
    """The layout on the device may say otherwise than the host: what lies around the output is left alone."""
    ks, mn = [128, 256, 640, 128], 5
    sf, storage = bits(9, mn), torch.full((100, 8), -1, dtype=torch.int32)
    inside = storage[30:].view(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_scales.reference, "empty_packed_groups", lambda *_: inside.as_strided((5, mn), (8, 1)))
        layout = torch.tensor(wrong, dtype=torch.int32)
        jitgemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf, layout, ks, 128)
    assert bool((storage[:30] == -1).all() and (storage[35:] == -1).all() and (storage[30:35, 5:] == -1).all())


def test_packed_scales_compile_without_breaks() -> None:
    sf, ks = bits(9, 20), torch.tensor([128, 256, 640, 128], dtype=torch.int32)

    def pack(sf: Tensor) -> tuple[Tensor, Tensor]:
        return (
            jitgemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf),
            jitgemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf, ks, [128, 256, 640, 128], 128),
        )

    compiled = torch.compile(pack, backend="eager", fullgraph=True)(sf)
    for one, other in zip(compiled, pack(sf), strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()
    torch.library.opcheck(torch.ops.jitgemm.pack_k_grouped_ue8m0, (sf, ks, [1, 2, 5, 1], 128, 0))


def test_calls_that_pack_are_recorded(tmp_path: Path) -> None:
    path = tmp_path / "shapes.jsonl"
    with settings.override(record=path):
        jitgemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(bits(4, 4))
        jitgemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(
            bits(1, 4), torch.tensor([128], dtype=torch.int32), [128], 128
        )
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"kind": "pack_ue8m0", "grouped": grouped} for grouped in (False, True)]


def test_scales_of_groups_along_k_that_are_refused() -> None:
    pack = jitgemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor
    ks = torch.tensor([128, 256], dtype=torch.int32)
    with pytest.raises(ProblemError, match=r"sf has 4 rows; groups of \[128, 256\] in steps of 128 have 3"):
        pack(torch.ones(4, 8), ks, [128, 256], 128)
    with pytest.raises(ProblemError, match=r"ks_cpu is \[128\]; accepted are 2 numbers"):
        pack(torch.ones(3, 8), ks, [128], 128)
    with pytest.raises(ProblemError, match="ks_cpu is None; accepted are 2 numbers"):
        pack(torch.ones(3, 8), ks, None, 128)
    with pytest.raises(ProblemError, match=r"sf is torch.float32 \(3,\)"):
        pack(torch.ones(3), ks, [128, 256], 128)
    with pytest.raises(ProblemError, match="gran_k is 0"):
        pack(torch.ones(3, 8), ks, [128, 256], 0)
    for layout in (ks.long(), ks[None], None):
        with pytest.raises(ProblemError, match="grouped_layout is "):
            pack(torch.ones(3, 8), layout, [128, 256], 128)  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="k_alignment is 0"):
        pack(torch.ones(3, 8), ks, None, 128, 0, True)


@pytest.mark.parametrize("leading", [(), (2,)])
@pytest.mark.parametrize("half", [128, 384, 192, 104, 8])
def test_gate_and_up_are_interleaved_with_their_scales(leading: tuple[int, ...], half: int) -> None:
    k, blocks = 200, -(-half // 128)
    weights = torch.randn(*leading, 2 * half, k).to(torch.float8_e4m3fn)
    block_scales = torch.rand(*leading, 2 * blocks, 2)
    of_rows = torch.cat(
        [part.repeat_interleave(128, -2)[..., :half, :] for part in block_scales.chunk(2, -2)], -2
    )  # gate's and up's blocks are their own
    order = [row for i in range(half // 8) for start in (i * 8, half + i * 8) for row in range(start, start + 8)]

    interleaved, scales = jitgemm.interleave_gate_up(weights, block_scales)
    assert torch.equal(interleaved.float(), weights.float()[..., order, :])
    assert scales.shape == block_scales.shape
    for part, rows in zip(scales.view(-1, *scales.shape[-2:]), of_rows.view(-1, 2 * half, 2), strict=True):
        assert torch.equal(rows_of_gate_up_blocks(part)[: 2 * half], rows[order])
    back = jitgemm.deinterleave_gate_up(interleaved, scales)
    assert torch.equal(back[1], block_scales)
    assert torch.equal(back[0].float(), weights.float())

    row_scales = torch.rand(*leading, 2 * half, 2)
    interleaved, scales = jitgemm.interleave_gate_up(weights, row_scales)
    assert torch.equal(scales, row_scales[..., order, :])
    assert torch.equal(jitgemm.deinterleave_gate_up(interleaved, scales)[1], row_scales)
    alone = jitgemm.interleave_gate_up(weights.bfloat16())
    assert torch.equal(alone, weights.bfloat16()[..., order, :])
    assert torch.equal(jitgemm.deinterleave_gate_up(alone), weights.bfloat16())


def test_gate_and_up_that_are_refused() -> None:
    with pytest.raises(ProblemError, match="gate and up have 24 rows; accepted is a multiple of 16"):
        jitgemm.interleave_gate_up(torch.ones(24, 16))
    with pytest.raises(ProblemError, match=r"weights have shape \(16,\)"):
        jitgemm.interleave_gate_up(torch.ones(16))
    with pytest.raises(ProblemError, match=r"scales have shape \(3, 1\); accepted is \(384, 1\) or \(4, 1\)"):
        jitgemm.interleave_gate_up(torch.ones(384, 16), torch.ones(3, 1))


def test_a_single_row_or_column_of_scales_may_have_any_strides() -> None:
    row, column = powers_of_two(4, 1).T, powers_of_two(8, 1)
    assert torch.equal(jitgemm.unpack_ue8m0_from_int(jitgemm.pack_ue8m0_to_int(row)), row)
    packed = jitgemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(column)
    assert packed.shape == (8, 1) and torch.equal(jitgemm.unpack_ue8m0_from_int(packed)[:, :1], column)
