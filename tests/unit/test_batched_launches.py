"""The way of batches and of groups along K to the GPU, with CPU tensors and a driver that only takes notes."""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import jitgemm
from jitgemm import driver, plan, settings, tensor_map
from jitgemm.device import H200
from jitgemm.errors import ProblemError
from jitgemm.families import KernelSpec, family_of
from jitgemm.families.batched import MOST_GROUPS_OF_K, BatchedProblem
from jitgemm.families.batched_launch import (
    BATCHES,
    COMMON,
    GROUP,
    MAPS_OF_BATCHES,
    MAPS_OF_K,
    PartOfK,
    maps_of_groups,
    params_bytes,
)
from jitgemm.families.gemm import GemmConfig, kernel_shape
from jitgemm.families.sum_parts import SUM_PARTS, THREADS, ways_of
from jitgemm.heuristics.batched import candidates, choose_config, problem_of_sum
from jitgemm.kernel import Kernel
from jitgemm.ops import batched, plain
from jitgemm.ops.batched import parts_of_k
from jitgemm.reference.layout import get_mn_major_tma_aligned_tensor

Map = tuple[int, ...]
"""Address, sizes, strides in bytes and box."""


@dataclass
class Launched:
    """What the driver was given."""

    grid: int
    kernel: KernelSpec
    params: bytes

    def map(self, offset: int) -> Map:
        """One of the tensor maps."""
        rank = struct.unpack_from("<q", self.params, offset)[0]
        if not rank:
            return ()
        return struct.unpack_from(f"<{2 * rank}Q{rank}I", self.params, offset + 8)

    def operand_map(self, name: str) -> Map:
        """One of the first maps, by its name."""
        names = MAPS_OF_K if self.along_k else MAPS_OF_BATCHES
        return self.map(128 * names.index(name))

    @property
    def along_k(self) -> bool:
        return self.kernel["kind"] == "k_grouped"  # type: ignore[no-any-return]

    @property
    def tail(self) -> int:
        return 128 * len(MAPS_OF_K if self.along_k else MAPS_OF_BATCHES)

    @property
    def common(self) -> dict[str, int]:
        """What follows the maps."""
        values = COMMON.unpack_from(self.params, self.tail)
        named = ("d", "d_row_stride", "c", "c_row_stride")
        last = ("tiles", "m", "n", "d_aligned", "adds")
        found = dict(zip(named, values, strict=False)) | dict(zip(last, values[-5:], strict=True))
        return found | {
            "row_scales": values[4],
            "column_scales": values[9],
            "d_group_stride": values[14],
            "c_group_stride": values[15],
        }

    @property
    def batches(self) -> tuple[int, ...]:
        return BATCHES.unpack_from(self.params, self.tail + COMMON.size)

    def group(self, index: int) -> tuple[tuple[int, ...], Map, Map]:
        """Numbers and maps of a group along K: the M side's and the N side's."""
        numbers = GROUP.unpack_from(self.params, self.tail + COMMON.size + index * GROUP.size)
        at = maps_of_groups() + 128 * index
        return numbers, self.map(at), self.map(at + 128 * MOST_GROUPS_OF_K)

    @property
    def sum(self) -> dict[str, int]:
        """Parameters of the kernel that adds up parts."""
        names = (field.name for field in SUM_PARTS.fields)
        return dict(zip(names, SUM_PARTS.params.unpack_from(self.params), strict=True))

    @property
    def config(self) -> GemmConfig:
        return family_of(self.kernel).shape(self.kernel).config  # type: ignore[attr-defined,no-any-return]


class Gpu:
    """Stands in for the driver."""

    def __init__(self) -> None:
        self.launched: list[Launched] = []
        self.kernels: list[KernelSpec] = []

    def load(self, spec: KernelSpec, device: int, problem: Any = None) -> Kernel:
        family = family_of(spec)
        self.kernels.append(spec)
        return Kernel(spec, device, len(self.kernels), family.num_threads(spec), family.smem_bytes(spec), None)

    def launch(self, config: Any, kernel: Any, arguments: Any, extra: None) -> int:
        address = ctypes.c_uint64.from_address(ctypes.cast(arguments, ctypes.c_void_p).value or 0).value
        assert address % 128 == 0
        spec = self.kernels[kernel.value - 1]
        size = SUM_PARTS.params_bytes if spec.family == SUM_PARTS.name else params_bytes(str(spec["kind"]))
        params = ctypes.string_at(address, size)
        self.launched.append(Launched(config._obj.grid[0], spec, params))
        return 0

    def encode(self, target: int, code: int, rank: int, address: int, *rest: int) -> int:
        sizes, strides, box, steps = rest[:4]
        assert (target % 64, address % 16) == (0, 0)
        assert list((ctypes.c_uint32 * rank).from_address(steps)) == [1] * rank
        numbers = (*(ctypes.c_uint64 * rank).from_address(sizes), *(ctypes.c_uint64 * (rank - 1)).from_address(strides))
        assert all(stride % 16 == 0 for stride in numbers[rank:])
        packed = struct.pack(
            f"<q{2 * rank}Q{rank}I", rank, address, *numbers, *(ctypes.c_uint32 * rank).from_address(box)
        )
        ctypes.memmove(target, packed, len(packed))
        return 0

    def last(self) -> Launched:
        """The one launch since the last look."""
        (launched,) = self.launched
        self.launched.clear()
        return launched

    def last_sum(self) -> tuple[Launched, Launched]:
        """The launches since the last look: of parts, and of their sum."""
        of_parts, of_sum = self.launched
        self.launched.clear()
        assert of_sum.kernel.family == SUM_PARTS.name
        return of_parts, of_sum


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    fake = Gpu()
    monkeypatch.setattr(batched, "_GPU", "cpu")
    monkeypatch.setattr(batched, "_plans", plan.Table(4096))
    monkeypatch.setattr(batched, "_of_expressions", plan.Table(4096))
    for module in (batched, plain):
        monkeypatch.setattr(module, "load", fake.load)
        monkeypatch.setattr(module, "device_facts", lambda _: (H200, 132))
    monkeypatch.setattr(batched, "current_device", lambda: -1)
    monkeypatch.setattr(batched, "raw_stream", lambda _: 7)
    monkeypatch.setattr(driver, "_launch_function", lambda: fake.launch)
    monkeypatch.setattr(tensor_map, "encode_tensor_map_function", lambda: fake.encode)
    yield fake


def aligned(tensor: Tensor) -> Tensor:
    """A copy at a multiple of 16 bytes, with the same strides."""
    size = tensor.untyped_storage().nbytes()
    raw = torch.zeros(size + 16, dtype=torch.uint8)
    return raw[-raw.data_ptr() % 16 :][:size].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return aligned(torch.empty(shape, dtype=dtype))


FP8 = torch.float8_e4m3fn


def test_heads_are_read_in_place(gpu: Gpu) -> None:
    b, h, r, d = 20, 3, 512, 200
    x, y, z = empty(b, h, r), empty(h, d, r + 128)[..., :r], empty(b, h, d)
    for _ in range(2):
        jitgemm.einsum("bhr,hdr->bhd", x, y, z)
        launched = gpu.last()
        config = launched.config
        assert config.split_k == 1
        assert launched.kernel["layout"] == "nt"
        sides = ("columns", "rows") if config.swap_ab else ("rows", "columns")
        assert launched.operand_map(sides[0])[:6] == (x.data_ptr(), r, b, h, h * r * 2, r * 2)
        assert launched.operand_map(sides[1])[:6] == (y.data_ptr(), r, d, h, (r + 128) * 2, d * (r + 128) * 2)
        assert launched.operand_map("d")[:6] == (z.data_ptr(), d, b, h, h * d * 2, d * 2)
        common = launched.common
        tiles = -(-b // config.tile_m) * -(-d // config.tile_n) * h
        assert (common["tiles"], common["m"], common["n"]) == (tiles, b, d)
        assert (common["d"], common["d_row_stride"], common["d_group_stride"]) == (z.data_ptr(), h * d, d)
        assert (common["c"], common["d_aligned"], common["adds"]) == (0, 1, 0)
        assert launched.batches[:2] == (r // 64, 1)
        assert launched.batches[-3:] == (d, 0, 0)


@pytest.mark.parametrize(("expr", "layout"), [("bhd,hdr->bhr", "nn"), ("bhd,bhr->hdr", "tn")])
def test_operands_along_their_rows(gpu: Gpu, expr: str, layout: str) -> None:
    b, h, r, d = 24, 3, 136, 264
    x = empty(b, h, d)
    y = empty(h, d, r) if layout == "nn" else empty(b, h, r)
    z = empty(b, h, r) if layout == "nn" else empty(h, d, r, dtype=torch.float32)
    jitgemm.einsum(expr, x, y, z)
    launched = gpu.last()
    assert launched.kernel["layout"] == layout
    side = "rows" if launched.config.swap_ab else "columns"
    found = launched.operand_map(side)
    if layout == "nn":
        assert found == (y.data_ptr(), r, d, h, r * 2, d * r * 2, 64, 64, 1)
    else:
        assert found == (y.data_ptr(), r, b, h, h * r * 2, r * 2, 64, 64, 1)


def test_scales_of_heads(gpu: Gpu) -> None:
    b, h, r, d = 8, 4, 1024, 256
    x, y, z = empty(b, h, r, dtype=FP8), empty(h, d, r, dtype=FP8), empty(b, h, d)
    x_scales = aligned(get_mn_major_tma_aligned_tensor(torch.ones(h, b, r // 128))).permute(1, 0, 2)
    y_scales = torch.ones(h, d // 128, r // 128)
    jitgemm.fp8_einsum("bhr,hdr->bhd", (x, x_scales), (y, y_scales), z)
    launched = gpu.last()
    assert launched.config.swap_ab
    assert launched.operand_map("column_scales")[:6] == (x_scales.data_ptr(), b, r // 128, h, b * 4, b * r // 128 * 4)
    assert launched.common["row_scales"] == y_scales.data_ptr()
    assert launched.batches[5] == y_scales.stride(0)


def test_fp8_operands_along_rows_are_copied(gpu: Gpu) -> None:
    b, h, r, d = 8, 4, 256, 128
    x, y, z = empty(b, h, d, dtype=FP8), empty(h, d, r, dtype=FP8), empty(b, h, r)
    jitgemm.fp8_einsum("bhd,hdr->bhr", (x, torch.ones(b, h, 1)), (y, torch.ones(h, 1, 2)), z)
    launched = gpu.last()
    weights = launched.operand_map("rows" if launched.config.swap_ab else "columns")
    assert weights[0] != y.data_ptr()
    assert weights[1:6] == (d, r, h, d, d * r)


@pytest.mark.parametrize("d_dtype", [torch.bfloat16, torch.float32])
def test_c(gpu: Gpu, d_dtype: torch.dtype) -> None:
    x, y = empty(8, 3, 64), empty(3, 40, 64)
    z, c = empty(8, 3, 40, dtype=d_dtype), empty(8, 3, 40, dtype=d_dtype)
    jitgemm.einsum("bhr,hdr->bhd", x, y, z, c)
    common = gpu.last().common
    assert (common["c"], common["c_row_stride"], common["c_group_stride"]) == (c.data_ptr(), 120, 40)
    assert common["adds"] == 0
    for same in (z, z.view(z.shape)):
        jitgemm.einsum("bhr,hdr->bhd", x, y, z, same)
        common = gpu.last().common
        by_copy_engine = d_dtype == torch.float32
        assert (common["c"], common["adds"]) == ((0, 1) if by_copy_engine else (z.data_ptr(), 0))


def test_batches_are_summed_in_parts(gpu: Gpu) -> None:
    s, m, n, k = 300, 128, 384, 72
    a, b, d = empty(s, m, k), empty(s, n, k), empty(m, n, dtype=torch.float32)
    jitgemm.einsum("bmk,bnk->mn", a, b, d)
    launched, of_sum = gpu.last_sum()
    problem = problem_of_sum(s, m, n, k, "nt", H200)
    parts, batches = problem.groups, problem.k // k
    assert parts > 1
    assert launched.kernel["kind"] == "batch_sum"
    assert launched.kernel["d_dtype"] == "fp32"
    assert "bmn_bnk_mn_gemm_impl" in family_of(launched.kernel).kernel_name(launched.kernel)
    side = "columns" if launched.config.swap_ab else "rows"
    assert launched.operand_map(side)[:6] == (a.data_ptr(), k, m, s, k * 2, m * k * 2)
    assert launched.batches[:2] == (2 * batches, batches)
    assert launched.batches[4] == 2
    assert launched.operand_map("d")[3] == parts
    assert of_sum.kernel["d_dtype"] == "fp32"
    expected = {"parts": launched.common["d"], "c": 0, "d": d.data_ptr(), "c_row_stride": 0, "d_row_stride": n}
    quads = {"row_quads": n // 4, "quads": m * n // 4, "ways": ways_of(parts)}
    assert of_sum.sum == expected | {"num_parts": parts, "n": n} | quads
    assert of_sum.grid == m * n // 4 * ways_of(parts) // THREADS


def test_rows_of_parts_are_whole_quads(gpu: Gpu) -> None:
    s, m, n, k = 300, 128, 382, 72
    a, b, around = empty(s, m, k), empty(s, n, k), empty(m, 400)
    d, c = around[:, 3 : 3 + n], empty(1, n).expand(m, n)
    jitgemm.einsum("bmk,bnk->mn", a, b, d, c)
    of_parts, of_sum = gpu.last_sum()
    assert (of_parts.common["d_row_stride"], of_parts.common["d_group_stride"]) == (384, m * 384)
    found = of_sum.sum
    assert (found["c"], found["d"]) == (c.data_ptr(), d.data_ptr())
    assert (found["c_row_stride"], found["d_row_stride"]) == (0, 400)
    assert (found["n"], found["row_quads"], found["quads"]) == (n, 96, m * 96)


@pytest.mark.parametrize("d_dtype", [torch.bfloat16, torch.float32])
def test_a_sum_has_one_plan(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, d_dtype: torch.dtype) -> None:
    made: list[object] = []
    plan_of_batches = batched._plan_of_batches
    monkeypatch.setattr(batched, "_plan_of_batches", lambda *given: made.append(given) or plan_of_batches(*given))
    s, m, n, k = 300, 128, 384, 72
    a, b = empty(s, m, k), empty(s, n, k)
    for c_of in (lambda d: None, lambda d: d, torch.zeros_like, lambda d: d.view(d.shape)):
        made.clear()
        for _ in range(3):
            d = empty(m, n, dtype=d_dtype)
            c = c_of(d)
            jitgemm.einsum("bmk,bnk->mn", a, b, d, c)
            launched, of_sum = gpu.last_sum()
            assert (launched.common["c"], launched.common["adds"], launched.kernel["d_dtype"]) == (0, 0, "fp32")
            assert (of_sum.sum["c"], of_sum.sum["d"]) == (0 if c is None else c.data_ptr(), d.data_ptr())
        assert len(made) <= 2, "one for the sum, one for its parts"
        for name, overlapping in (("a", a), ("b", b)):
            d = overlapping.view(-1)[8:].view(d_dtype)[: m * n].view(m, n)
            with pytest.raises(ProblemError, match=f"d overlaps {name}"):
                jitgemm.einsum("bmk,bnk->mn", a, b, d, c_of(d))
    assert not gpu.launched
    bad: tuple[tuple[str, Sequence[Any]], ...] = (
        ("c has strides", (a, b, d, torch.empty(n, m, dtype=d_dtype).t())),
        ("b starts at address", (a, empty(s * n * k + 1).flatten()[1:].view(s, n, k), empty(m, n))),
        ("TMA needs steps", (empty(s, m, 70), empty(s, n, 70), empty(m, n))),
    )
    for message, arguments in bad:
        with pytest.raises(ProblemError, match=message):
            jitgemm.einsum("bmk,bnk->mn", *arguments)
    assert not gpu.launched


@pytest.mark.parametrize("batches", [1, 5, 44, 45, 129, 4096, 10**6])
def test_parts_of_a_sum(batches: int) -> None:
    for m, n in ((1, 1), (128, 384), (1000, 4000)):
        for num_sms in (0, 20):
            with settings.override(num_sms=num_sms):
                problem = problem_of_sum(batches, m, n, 64, "nt", H200)
            each = problem.k // 64
            assert 1 <= problem.groups <= 2 * (num_sms or 132)
            assert (problem.groups - 1) * each < batches <= problem.groups * each


def test_parts_of_a_sum_fill_the_chip_with_tiles_once() -> None:
    for m, n, k in ((128, 384, 128), (256, 256, 256), (384, 128, 384), (264, 200, 72)):
        for batches in (129, 4096):
            problem = problem_of_sum(batches, m, n, k, "nt", H200)
            config = choose_config(problem, H200)
            tiles = -(-m // config.tile_m) * -(-n // config.tile_n) * problem.groups
            slots = 132 * kernel_shape(problem.dense.without_sizes(), config).blocks_per_sm
            assert 0.9 < tiles / slots <= 1, (problem, config)
    with settings.override(config="128x128x64 s6"):
        assert problem_of_sum(129, 128, 384, 128, "nt", H200).groups == 43


def test_threads_that_share_parts() -> None:
    assert [ways_of(parts) for parts in (2, 7, 8, 15, 16, 44, 64, 264)] == [1, 1, 2, 2, 4, 8, 16, 16]


def test_holes_of_heads(gpu: Gpu) -> None:
    m, n, k = 128, 8192, 512
    a, b = empty(m, k, dtype=FP8), empty(n, k, dtype=FP8)
    scales = aligned(get_mn_major_tma_aligned_tensor(torch.ones(m, 4))), torch.ones(64, 4)
    for splits, by_tma in (((128, 64, 128), 1), ((120, 64, 136), 0), ((128, 3, 128), 0)):
        d = empty(m, n // 256 * sum(splits))
        jitgemm.fp8_gemm_nt_skip_head_mid((a, scales[0]), (b, scales[1]), d, splits)
        launched = gpu.last()
        assert launched.batches[-3:] == (256, splits[0], splits[1])
        assert launched.common["d_aligned"] == by_tma
        assert bool(launched.operand_map("d")) == bool(by_tma)


def k_grouped(
    ks: Sequence[int], m: int = 128, n: int = 256, layout: str = "nt", fp8: bool = True
) -> tuple[Any, Any, Tensor, list[int], Tensor]:
    total, blocks = sum(ks), sum(-(-k // 128) for k in ks)
    dtype = FP8 if fp8 else torch.bfloat16
    shapes = ((total * m,), (total * n,)) if layout == "nt" else ((total, m), (total, n))
    operands: list[Any] = [empty(*shape, dtype=dtype) for shape in shapes]
    if fp8:
        scales = [aligned(torch.ones(blocks, extent)) for extent in (m, n)]
        operands = [(x, s.t() if layout == "nt" else s) for x, s in zip(operands, scales, strict=True)]
    counts = torch.tensor(list(ks), dtype=torch.int32)
    return operands[0], operands[1], empty(len(ks), m, n, dtype=torch.float32), list(ks), counts


def test_groups_along_k_have_maps_of_their_own(gpu: Gpu) -> None:
    m, n, ks = 128, 256, (144, 0, 512)
    a, b, d, ks_given, counts = k_grouped(ks, m, n)
    with settings.override(swap_ab=False):
        jitgemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks_given, counts, d)
    launched = gpu.last()
    config = launched.config
    assert config.split_k == 1
    order = [(2, 512, 144, 2), (0, 144, 0, 0)]  # longest first: group, k, where it starts, first scale
    for index, (group, k, start, first_scale) in enumerate(order):
        numbers, rows, columns = launched.group(index)
        assert numbers == (-(-k // 128), first_scale, group)
        assert rows[:4] == (a[0].data_ptr() + start * m, k, m, k)
        assert columns[:4] == (b[0].data_ptr() + start * n, k, n, k)
    assert launched.operand_map("row_scales")[:4] == (a[1].data_ptr(), m, 6, m * 4)
    common = launched.common
    assert common["tiles"] == 2 * -(-m // config.tile_m) * -(-n // config.tile_n)
    assert (common["adds"], common["c"]) == (1, 0)
    assert launched.operand_map("d")[1:4] == (n, m, 3)


def test_tiles_along_k_that_are_staged_whole_are_stored_in_boxes_of_64_rows(gpu: Gpu) -> None:
    a, b, d, ks, counts = k_grouped((256, 1280), 384, 384)
    for config, box, barriers in (("128x192x128 s3", (32, 64), 16), ("128x192x128 s4", (32, 16), 0)):
        with settings.override(config=config):
            jitgemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks, counts, d)
        launched = gpu.last()
        assert launched.operand_map("d")[-3:-1] == box
        family = family_of(launched.kernel)
        assert family.smem_bytes(launched.kernel) == family.shape(launched.kernel).smem_bytes + barriers  # type: ignore[attr-defined]
    with settings.override(config="16x128x128 s11 swap"):  # one box for all tokens of 32 columns
        jitgemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks, counts, d)
    assert gpu.last().operand_map("d")[-3:-1] == (32, 16)


@pytest.mark.parametrize(("recipe", "layout"), [("fp8_1x128_1x128", "nt"), ("bf16", "tn")])
def test_configs_along_k_leave_room_for_tiles_of_d(recipe: str, layout: str) -> None:
    problem = BatchedProblem(7168, 4096, recipe, 16, "k_grouped", 4096, layout, "fp32")
    sliced = []
    for config in candidates(problem, ()):
        if kernel_shape(problem.dense.without_sizes(), config).store_columns < config.tile_n and not config.swap_ab:
            sliced.append((config.tile_m, config.tile_n))
    # Of these, 3 stages and a tile of D don't fit.
    assert set(sliced) == ({(256, 128)} if recipe != "bf16" else {(128, 256), (192, 192), (192, 160), (256, 192)})
    assert str(choose_config(problem, H200)) == ("128x192x128 s3" if recipe != "bf16" else "128x256x64 s4")


def test_groups_along_k_in_bf16(gpu: Gpu) -> None:
    m, n, ks = 128, 256, (65, 3)
    a, b, d, ks_given, counts = k_grouped(ks, m, n, "tn", fp8=False)
    with settings.override(swap_ab=False):
        jitgemm.k_grouped_bf16_gemm_tn_contiguous(a, b, d, ks_given, counts)
    launched = gpu.last()
    for index, (k, start) in enumerate(((65, 0), (3, 65))):
        numbers, rows, columns = launched.group(index)
        assert numbers[0] == -(-k // 64)
        assert rows[:4] == (a.data_ptr() + start * m * 2, m, k, m * 2)
        assert columns[:4] == (b.data_ptr() + start * n * 2, n, k, n * 2)
    assert launched.common["adds"] == 0


def test_fp8_operands_in_rows_of_k_are_copied(gpu: Gpu) -> None:
    a, b, d, ks, counts = k_grouped((128, 256), layout="tn")
    with settings.override(swap_ab=False):
        jitgemm.k_grouped_fp8_gemm_tn_contiguous(a, b, d, ks, counts, d)
    launched = gpu.last()
    first, second = launched.group(0), launched.group(1)
    assert first[1][1:4] == (256, 128, 384)
    assert second[1][1:4] == (128, 128, 384)
    assert first[1][0] == second[1][0] + 128
    assert first[0] == (2, 1, 1)


def test_more_groups_than_one_launch_takes(gpu: Gpu) -> None:
    a, b, d, ks, counts = k_grouped([128, 0] * 40, 64, 64)
    jitgemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks, counts, d)
    assert len(gpu.launched) == 2
    planes = {one.group(i)[0][2] for one, count in zip(gpu.launched, (32, 8), strict=True) for i in range(count)}
    assert planes == set(range(0, 80, 2))


def test_groups_without_elements_get_c_or_zeros(gpu: Gpu) -> None:
    a, b, d, ks, counts = k_grouped((128, 0))
    d.fill_(7)
    jitgemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks, counts, d)
    assert bool((d[1] == 7).all())
    jitgemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks, counts, torch.full_like(d, 3))
    assert bool((d[1] == 3).all())
    jitgemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks, counts)
    assert not bool(d[1].any())
    assert len(gpu.launched) == 3
    a, b, d, ks, counts = k_grouped((0, 0))
    d.fill_(7)
    jitgemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks, counts)
    assert not bool(d.any())
    assert len(gpu.launched) == 3


def test_parts_of_k() -> None:
    found = parts_of_k((16, 0, 300), 8, 24, 2, along_k=False, in_rows=False)
    assert found == [PartOfK(300, 1, 2, 16 * 8 * 2, 8, 16 * 24 * 2, 24), PartOfK(16, 0, 0, 0, 8, 0, 24)]


def test_k_is_split_for_fp8_alone_unless_that_is_asked_for(gpu: Gpu) -> None:
    x, y, z = empty(8, 1, 8192), empty(1, 64, 8192), empty(8, 1, 64)
    jitgemm.einsum("bhr,hdr->bhd", x, y, z)
    assert gpu.last().config.split_k == 1
    with settings.override(tile_n=64):
        jitgemm.einsum("bhr,hdr->bhd", x, y, z)
        assert gpu.last().config.split_k == 1
    with settings.override(split_k=4):
        jitgemm.einsum("bhr,hdr->bhd", x, y, z)
        assert gpu.last().config.split_k == 4
    problem = BatchedProblem(64, 4096, "bf16", 4, "k_grouped", 64, "tn", "fp32")
    from jitgemm.heuristics.batched import enumerate_configs

    assert all(config.split_k == 1 for config in enumerate_configs(problem, H200))


BAD: dict[str, tuple[str, str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "expression": ("bij,bjk->bik", "expr is", (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    "rank": ("bhr,hdr->bhd", "a has shape", (2, 64), (2, 8, 64), (2, 2, 8)),
    "heads": ("bhr,hdr->bhd", "b has h = 3", (4, 2, 64), (3, 8, 64), (4, 2, 8)),
    "output": ("bhr,hdr->bhd", "d has b = 5", (4, 2, 64), (2, 8, 64), (5, 2, 8)),
    "steps": ("bhr,hdr->bhd", "TMA needs steps", (4, 2, 60), (2, 8, 60), (4, 2, 8)),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_expressions_and_shapes(gpu: Gpu, bad: str) -> None:
    expr, message, a, b, d = BAD[bad]
    with pytest.raises(ProblemError, match=message):
        jitgemm.einsum(expr, empty(*a), empty(*b), empty(*d))
    assert not gpu.launched


def test_bad_operands(gpu: Gpu) -> None:
    x, y, z = empty(4, 2, 64), empty(2, 8, 64), empty(4, 2, 8)
    bad: tuple[tuple[str, Sequence[Any]], ...] = (
        ("a is list", ([], y, z)),
        ("a has dtype", (x.float(), y, z)),
        ("d has dtype", (x, y, z.half())),
        ("c has dtype", (x, y, z, z.float())),
        ("its elements overlap", (x, y, z[:1].expand(4, 2, 8))),
        ("stride 1 in the last", (x, y, empty(4, 8, 2).transpose(1, 2))),
        ("d overlaps a", (x, y, x[..., :8])),
        ("d overlaps c", (x, y, z, z.flatten()[:32].as_strided((4, 2, 8), (8, 4, 1)))),
        ("b starts at address", (x, empty(2, 8, 72).flatten()[1:1025].view(2, 8, 64), z)),
    )
    for message, arguments in bad:
        with pytest.raises(ProblemError, match=message):
            jitgemm.einsum("bhr,hdr->bhd", *arguments)
    with pytest.raises(ProblemError, match="use_cublaslt is 1"):
        jitgemm.einsum("bhr,hdr->bhd", x, y, z, use_cublaslt=1)  # type: ignore[arg-type]
    assert not gpu.launched


def test_bad_scales_and_recipes(gpu: Gpu) -> None:
    x, y, z = empty(4, 2, 128, dtype=FP8), empty(2, 8, 128, dtype=FP8), empty(4, 2, 8)
    one, other = torch.ones(4, 2, 1), torch.ones(2, 1, 1)
    for message, arguments, recipe in (
        ("recipe is", ((x, one), (y, other)), (1, 2, 3)),
        ("a is Tensor", (x, (y, other)), (1, 128, 128)),
        ("a_scales has 2 dimensions", ((x, one[..., 0]), (y, other)), (1, 128, 128)),
        ("a_scales has shape", ((x, one[:3]), (y, other)), (1, 128, 128)),
        ("b_scales has shape", ((x, one), (y, other)), (1, 1, 128)),
        ("b_scales has dtype", ((x, one), (y, other.double())), (1, 128, 128)),
    ):
        with pytest.raises(ProblemError, match=message):
            jitgemm.fp8_einsum("bhr,hdr->bhd", *arguments, z, recipe=recipe)  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match=r"accepts fp8_1x128_1x128"):
        jitgemm.fp8_einsum("bhd,bhr->hdr", (x, one), (x, one), empty(2, 128, 128))
    with pytest.raises(ProblemError, match="head_splits is"):
        jitgemm.fp8_gemm_nt_skip_head_mid((x[:, 0], one[:, 0]), (y[0], other[0]), z[:, 0], (3, 1, 3))
    assert not gpu.launched


def test_groups_along_k_may_be_given_as_numpy_s_integers() -> None:
    ks, counts = (24, 40), torch.tensor([24, 40], dtype=torch.int32)
    a, b = (torch.randn(sum(ks), mn).bfloat16() for mn in (8, 16))
    results = [torch.full((2, 8, 16), torch.nan) for _ in range(2)]
    for d, given in zip(results, (ks, list(np.array(ks))), strict=True):
        jitgemm.k_grouped_bf16_gemm_tn_contiguous(a, b, d, given, counts)
    assert torch.equal(*results) and not results[0].isnan().any()


class Passing(TorchDispatchMode):
    """Sees every operator, and lets it pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def adding(operation: str) -> tuple[Callable[[Tensor, Tensor | None], None], Tensor]:
    """A call that takes d and c, and some d."""
    torch.manual_seed(1)
    if operation.startswith("k_grouped"):
        kind = "fp8" if "fp8" in operation else "bf16"
        ks, m, n = (16, 0, 48), 8, 24
        layout = operation[-2:]
        a, b, d, sizes, counts = k_grouped(ks, m, n, layout, fp8=kind == "fp8")
        for operand in (a, b):
            data, scales = operand if kind == "fp8" else (operand, torch.empty(0))
            data.copy_(torch.randn(data.shape))
            scales.fill_(0.5)
        function = getattr(jitgemm, f"k_grouped_{kind}_gemm_{layout}_contiguous")
        return lambda d, c: function(a, b, d, sizes, counts, c), torch.randn(d.shape)
    sizes_of = {"b": 4, "h": 3, "d": 16, "r": 128, "m": 8, "n": 24, "k": 16}
    of_a, of_b, of_d = (tuple(sizes_of[x] for x in dims) for dims in operation.replace("->", ",").split(","))
    a, b = (torch.randn(shape).bfloat16() for shape in (of_a, of_b))
    return lambda d, c: jitgemm.einsum(operation, a, b, d, c), torch.randn(of_d)


ADDING = ("bhr,hdr->bhd", "bhd,bhr->hdr", "bmk,bnk->mn", "k_grouped bf16 tn", "k_grouped fp8 nt", "k_grouped fp8 tn")


@pytest.mark.parametrize("operation", ADDING)
def test_c_may_be_another_view_of_d_under_every_mode(operation: str) -> None:
    call, before = adding(operation)
    expected = before.clone()
    call(expected, before)
    assert not torch.equal(expected, before)
    views = {
        "itself": lambda d: d,
        "view": lambda d: d.view(d.shape),
        "alias": lambda d: d[:],
        "detached": lambda d: d.detach(),
    }
    for name, of in views.items():

        def whole(x: Tensor, of: Any = of) -> Tensor:
            d = x * 1
            call(d, of(d))
            return d

        assert torch.equal(whole(before), expected), name
        with Passing():
            assert torch.equal(whole(before), expected), name
        assert torch.equal(torch.func.functionalize(whole)(before), expected), name
        torch.compiler.reset()
        assert torch.equal(torch.compile(whole, backend="aot_eager", fullgraph=True)(before), expected), name
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert whole(mode.from_tensor(before)).shape == before.shape


@pytest.mark.parametrize("operation", ADDING)
def test_c_may_not_be_a_part_of_d_under_any_mode(operation: str) -> None:
    call, before = adding(operation)
    storage = torch.randn(before.numel() + 1)
    d, c = storage[:-1].view(before.shape), storage[1:].view(before.shape)
    for mode in (contextlib.nullcontext(), Passing()):
        with mode, pytest.raises(ProblemError, match=r"d overlaps c; .*; c may be d itself, with"):
            call(d, c)


def test_strides_of_one_element_do_not_make_c_another(gpu: Gpu) -> None:
    x, y, z = empty(1, 2, 64), empty(2, 8, 64), empty(1, 2, 8, dtype=torch.float32)
    jitgemm.einsum("bhr,hdr->bhd", x, y, z, z.as_strided(z.shape, (99, 8, 1)))
    assert gpu.last().common["adds"] == 1


def test_cublas_computes_under_modes() -> None:
    a, b = torch.randn(4, 8, 16).bfloat16(), torch.randn(4, 24, 16).bfloat16()
    d, expected = torch.ones(8, 24), torch.ones(8, 24)
    jitgemm.einsum("bmk,bnk->mn", a, b, expected, expected, use_cublaslt=True)
    with Passing():
        jitgemm.einsum("bmk,bnk->mn", a, b, d, d.view(8, 24), use_cublaslt=True)
    assert torch.equal(d, expected) and not torch.equal(d, torch.ones(8, 24))
    with FakeTensorMode() as mode:
        d = torch.empty(8, 24)
        fakes = mode.from_tensor(a), mode.from_tensor(b)
        jitgemm.einsum("bmk,bnk->mn", *fakes, d, d.view(8, 24), use_cublaslt=True)


def test_bad_groups_along_k(gpu: Gpu) -> None:
    call = jitgemm.k_grouped_fp8_gemm_nt_contiguous
    a, b, d, ks, counts = k_grouped((128, 256))
    for message, changed in (
        ("ks is None", (a, b, d, None, counts)),
        ("ks is", (a, b, d, [128, -1], counts)),
        ("ks is", (a, b, d, [384], counts)),
        ("ks is", (a, b, d, [128.0, 256], counts)),
        ("ks is", (a, b, d, torch.tensor([128, 256]), counts)),
        ("grouped_layout is", (a, b, d, ks, counts.long())),
        ("a has shape", (a, b, d, [128, 128], counts)),
        ("a_scales has shape", ((a[0], a[1][:, :2]), b, d, ks, counts)),
        ("c has shape", (a, b, d, ks, counts, d[:1])),
        ("recipe is", (a, b, d, ks, counts, None, (1, 128, 128))),
        ("use_psum_layout is True", (a, b, d, ks, counts, None, (1, 1, 128), "mn", True)),
    ):
        with pytest.raises(ProblemError, match=message):
            call(*changed)  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="FP8 accepts multiples of 16"):
        call(*k_grouped((120, 256)))
    with pytest.raises(ProblemError, match="accept multiples of 8"):
        jitgemm.k_grouped_bf16_gemm_tn_contiguous(*k_grouped((64,), 60, 64, "tn", fp8=False))
    assert not gpu.launched


def test_problems_are_lines_of_a_shapes_file() -> None:
    from jitgemm.cache_tools.problems import parse

    for kind, recipe, layout in (("batched", "bf16", "nn"), ("batch_sum", "bf16", "nt"), ("k_grouped", "bf16", "tn")):
        problem = BatchedProblem(64, 128, recipe, 3, kind, None, layout, "fp32")
        assert parse(problem.to_dict()).problem == problem
    of_k = {"kind": "k_grouped_gemm", "n": 64, "recipe": "bf16", "groups": 3, "layout": "tn", "d_dtype": "fp32"}
    from jitgemm.heuristics import enumerate_specs

    with_k = parse({**of_k, "k": 9999}).problem
    assert enumerate_specs(parse(of_k).problem, H200) == enumerate_specs(with_k, H200)
    with pytest.raises(ProblemError, match="field 'groups' is missing"):
        parse({"kind": "batched_gemm", "n": 1, "k": 1, "recipe": "bf16"})
    with pytest.raises(ProblemError, match="k_grouped GEMMs accept"):
        BatchedProblem(64, 128, "fp8_1x128_128x128", 3, "k_grouped")


def test_recorded_problems_name_the_kernels_of_calls(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from jitgemm.cache_tools.problems import from_shapes_file
    from jitgemm.heuristics import enumerate_specs

    path = tmp_path / "shapes.jsonl"
    with settings.override(record=path):
        jitgemm.einsum("bhr,hdr->bhd", empty(20, 3, 512), empty(3, 200, 512), empty(20, 3, 200))
        a, b, d, ks, counts = k_grouped((128, 256))
        jitgemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks, counts)
        for d_dtype in (torch.bfloat16, torch.float32):
            jitgemm.einsum("bmk,bnk->mn", empty(129, 128, 64), empty(129, 384, 64), empty(128, 384, dtype=d_dtype))
    problems = from_shapes_file(path)
    known = {spec for named in problems for spec in enumerate_specs(named.problem, H200)}
    assert len(problems) == 3
    assert {launched.kernel for launched in gpu.launched} <= known
    assert sum(launched.kernel.family == SUM_PARTS.name for launched in gpu.launched) == 2


def test_calls_are_repeated_with_other_tensors_and_under_other_settings(gpu: Gpu) -> None:
    y = empty(3, 200, 512)
    for _ in range(3):
        for shape in ((20, 3), (21, 3)):
            x, z = empty(*shape, 512), empty(*shape, 200)
            for c in (None, z, z.clone()):
                jitgemm.einsum("bhr,hdr->bhd", x, y, z, c)
                launched = gpu.last()
                side = "columns" if launched.config.swap_ab else "rows"
                assert launched.operand_map(side)[:3] == (x.data_ptr(), 512, shape[0])
                common = launched.common
                assert (common["d"], common["c"]) == (z.data_ptr(), 0 if c is None else c.data_ptr())
    with settings.override(config="64x64x64 s4"):
        jitgemm.einsum("bhr,hdr->bhd", x, y, z)
        assert str(gpu.last().config) == "64x64x64 s4"
    with pytest.raises(ProblemError, match="d overlaps a"):
        jitgemm.einsum("bhr,hdr->bhd", x, y, x[..., :200].as_strided(z.shape, z.stride()))
