"""The way of a grouped call to the GPU, with CPU tensors and a driver that only takes notes."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jitgemm
from jitgemm import driver, plan, settings, tensor_map
from jitgemm.cache_tools.problems import from_shapes_file
from jitgemm.device import H200
from jitgemm.errors import ProblemError
from jitgemm.families import KernelSpec, family_of, gemm
from jitgemm.families.gemm import GemmConfig, GemmProblem
from jitgemm.families.grouped import FAMILY, GroupedProblem, token_piece
from jitgemm.families.grouped_launch import PARAMS_BYTES, TAIL, TAIL_OFFSET, band, most_tiles, stretch
from jitgemm.families.transpose_scales import FAMILY as TRANSPOSE_SCALES
from jitgemm.kernel import Kernel
from jitgemm.ops import grouped
from jitgemm.reference.layout import get_mn_major_tma_aligned_tensor


@dataclass
class Launched:
    """What the driver was given."""

    stream: int
    grid: int
    kernel: KernelSpec
    params: bytes

    def map(self, index: int) -> tuple[int, ...]:
        """Address, three sizes, two strides in bytes and box of one of the tensor maps."""
        return struct.unpack_from("<6Q3I", self.params, 128 * index)

    @property
    def tail(self) -> tuple[int, ...]:
        """What follows the maps."""
        return TAIL.unpack_from(self.params, TAIL_OFFSET)

    @property
    def config(self) -> GemmConfig:
        return family_of(self.kernel).shape(self.kernel).config  # type: ignore[attr-defined,no-any-return]


class Gpu:
    """Stands in for the driver."""

    def __init__(self) -> None:
        self.launched: list[Launched] = []
        self.stream = 7
        self.kernels: list[KernelSpec] = []

    def load(self, spec: KernelSpec, device: int, problem: object) -> Kernel:
        family = family_of(spec)
        self.kernels.append(spec)
        return Kernel(spec, device, len(self.kernels), family.num_threads(spec), family.smem_bytes(spec), None)

    def launch(self, config: Any, kernel: Any, arguments: Any, extra: None) -> int:
        given = config._obj
        address = ctypes.c_uint64.from_address(ctypes.cast(arguments, ctypes.c_void_p).value or 0).value
        assert address % 128 == 0
        spec = self.kernels[kernel.value - 1]
        self.launched.append(Launched(given.stream or 0, given.grid[0], spec, ctypes.string_at(address, PARAMS_BYTES)))
        return 0

    def encode(self, target: int, code: int, rank: int, address: int, *rest: int) -> int:
        sizes, strides, box, steps = rest[:4]
        assert (target % 64, address % 16, rank) == (0, 0, 3)
        assert list((ctypes.c_uint32 * 3).from_address(steps)) == [1, 1, 1]
        numbers = (*(ctypes.c_uint64 * 3).from_address(sizes), *(ctypes.c_uint64 * 2).from_address(strides))
        assert all(stride % 16 == 0 for stride in numbers[3:])
        packed = struct.pack("<6Q3I", address, *numbers, *(ctypes.c_uint32 * 3).from_address(box))
        ctypes.memmove(target, packed, len(packed))
        return 0

    def last(self) -> Launched:
        """The one launch since the last look."""
        (launched,) = self.launched
        self.launched.clear()
        return launched


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    fake = Gpu()
    monkeypatch.setattr(grouped, "_GPU", "cpu")
    monkeypatch.setattr(grouped, "_plans", plan.Table(4096))
    monkeypatch.setattr(grouped, "load", fake.load)
    monkeypatch.setattr(grouped, "device_facts", lambda _: (H200, 132))
    monkeypatch.setattr(grouped, "current_device", lambda: -1)
    monkeypatch.setattr(grouped, "raw_stream", lambda _: fake.stream)
    monkeypatch.setattr(driver, "_launch_function", lambda: fake.launch)
    monkeypatch.setattr(tensor_map, "encode_tensor_map_function", lambda: fake.encode)
    yield fake


def aligned(tensor: Tensor) -> Tensor:
    """A copy at a multiple of 16 bytes, with the same strides."""
    size = tensor.untyped_storage().nbytes()
    raw = torch.zeros(size + 16, dtype=torch.uint8)
    return raw[-raw.data_ptr() % 16 :][:size].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


@dataclass
class Call:
    """Tensors of a call; ``kind`` names the function."""

    kind: str
    a: Tensor
    b: Tensor
    d: Tensor
    layout: Tensor
    a_scales: Tensor | None = None
    b_scales: Tensor | None = None
    expected_m: int = 8

    def __call__(self, **more: Any) -> None:
        kind = "masked" if self.kind == "masked" else "contiguous"
        arguments: list[Any] = [self.a, self.b, self.d, self.layout]
        name = f"m_grouped_bf16_gemm_nt_{kind}"
        if self.a_scales is not None:
            arguments[:2] = (self.a, self.a_scales), (self.b, self.b_scales)
            name = f"m_grouped_fp8_gemm_nt_{kind}"
        if kind == "masked":
            arguments.append(self.expected_m)
        elif self.kind == "psum":
            more = {"use_psum_layout": True, **more}
        getattr(jitgemm, name)(*arguments, **more)


def call(kind: str, fp8: bool = True, groups: int = 4, rows: int = 256, n: int = 320, k: int = 384) -> Call:
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    stacked = (groups,) if kind == "masked" else ()
    length = rows if kind == "contiguous" else groups
    made = Call(
        kind,
        aligned(torch.empty(*stacked, rows, k, dtype=dtype)),
        aligned(torch.empty(groups, n, k, dtype=dtype)),
        aligned(torch.empty(*stacked, rows, n, dtype=torch.bfloat16)),
        torch.zeros(length, dtype=torch.int32),
    )
    if fp8:
        k_blocks = -(-k // 128)
        made.a_scales = aligned(get_mn_major_tma_aligned_tensor(torch.ones(*stacked, rows, k_blocks)))
        made.b_scales = torch.ones(groups, -(-n // 128), k_blocks)
    return made


def check(launched: Launched, call: Call, gpu: Gpu) -> None:
    """The launch is that of these tensors."""
    config, size, tail = launched.config, call.a.element_size(), launched.tail
    groups, n, k = call.b.shape
    rows, masked = call.a.shape[-2], call.kind == "masked"
    assert launched.kernel["kind"] == call.kind
    assert launched.stream == gpu.stream
    tokens, weights = (2, 0) if config.swap_ab else (0, 2)
    a_group = call.a.stride(0) * size if masked else rows * call.a.stride(-2) * size
    a_map = (call.a.data_ptr(), k, rows, groups if masked else 1, call.a.stride(-2) * size, a_group)
    assert launched.map(tokens) == (*a_map, config.tile_k, config.tile_m, 1)
    assert launched.map(tokens + 1) == (*a_map, config.tile_k, token_piece(config), 1)
    b_map = (call.b.data_ptr(), k, n, groups, call.b.stride(1) * size, call.b.stride(0) * size)
    assert launched.map(weights) == (*b_map, config.tile_k, config.tile_n, 1)
    left = n % config.tile_n
    assert launched.map(weights + 1) == ((*b_map, config.tile_k, left, 1) if left else (0,) * 9)
    if call.a_scales is not None:
        found = launched.map(5 if config.swap_ab else 4)
        assert found[:4] == (call.a_scales.data_ptr(), rows, call.a_scales.shape[-1], groups if masked else 1)
        assert found[4] == call.a_scales.stride(-1) * 4
        assert found[6:] == (config.tile_m, 1, 1)
        assert call.b_scales is not None
        scales = tail[2:6] if config.swap_ab else tail[7:11]
        assert scales == (call.b_scales.data_ptr(), *call.b_scales.stride()[1:], -(-n // 128))
        assert tail[13] == call.b_scales.stride(0)
    assert launched.map(6)[:4] == (call.d.data_ptr(), n, rows, groups if masked else 1)
    assert tail[:2] == (call.d.data_ptr(), call.d.stride(-2))
    if masked:
        assert tail[12] == call.d.stride(0)
    assert tail[14:17] == (call.layout.data_ptr(), groups, rows)
    positions, step = stretch(config.tile_m, 128)
    assert tail[17:22] == (128, -(-n // config.tile_n), band(config.tile_m), positions, step)
    assert tail[22:] == (n, -(-k // config.tile_k), 1, call.kind != "masked")


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("kind", ["masked", "contiguous", "psum"])
def test_calls(gpu: Gpu, kind: str, fp8: bool) -> None:
    first, second, wide = call(kind, fp8), call(kind, fp8), call(kind, fp8, rows=2048)
    for one in (first, first, second, wide, first):
        one()
        check(gpu.last(), one, gpu)
    gpu.stream = 9
    first()
    check(gpu.last(), first, gpu)


def test_the_grid_does_not_depend_on_counts_but_the_config_on_what_is_expected(gpu: Gpu) -> None:
    one = call("masked", rows=1024, n=4096, k=7168)
    grids = set()
    for counts in (0, 5, 1024):
        one.layout.fill_(counts)
        one()
        grids.add(gpu.last().grid)
    assert len(grids) == 1
    one.expected_m = 1024
    one()
    assert gpu.last().config.tile_m >= 128


def test_weights_along_n(gpu: Gpu) -> None:
    one = call("contiguous", fp8=False, n=320, k=384)
    stored = aligned(torch.empty(4, 384, 320, dtype=torch.bfloat16))
    jitgemm.m_grouped_bf16_gemm_nn_contiguous(one.a, stored, one.d, one.layout)
    launched = gpu.last()
    config = launched.config
    assert launched.kernel["layout"] == "nn"
    weights = launched.map(0 if config.swap_ab else 2)
    assert weights == (stored.data_ptr(), 320, 384, 4, 640, 640 * 384, 64, config.tile_k, 1)


def test_fp8_weights_that_are_stored_along_k_under_the_name_nn(gpu: Gpu) -> None:
    one = call("contiguous")
    assert one.b_scales is not None
    b = one.b.transpose(1, 2), one.b_scales.transpose(1, 2)
    jitgemm.m_grouped_fp8_gemm_nn_contiguous((one.a, one.a_scales), b, one.d, one.layout)  # type: ignore[arg-type]
    check(gpu.last(), one, gpu)


def test_d_where_tma_cannot_store(gpu: Gpu) -> None:
    for n in (320, 321):
        one = call("masked", n=n)
        one()
        launched = gpu.last()
        assert launched.tail[24] == (n == 320)
        assert (launched.map(6) == (0,) * 9) == (n == 321)


def test_scales_that_are_copied_first(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Tensor] = []

    def copy(scales: Tensor) -> Tensor:
        copies.append(aligned(get_mn_major_tma_aligned_tensor(scales.clone())))
        return copies[-1]

    monkeypatch.setattr(grouped, "copy_to_mn_major", copy)
    one = call("masked")
    assert one.a_scales is not None
    one.a_scales = one.a_scales.contiguous()
    one()
    launched = gpu.last()
    (copied,) = copies
    assert launched.map(5 if launched.config.swap_ab else 4)[0] == copied.data_ptr()


@pytest.mark.parametrize("alignment", [1, 2, 4])
@pytest.mark.parametrize("kind", ["contiguous", "psum"])
def test_scales_of_groups_that_start_at_any_row(gpu: Gpu, kind: str, alignment: int) -> None:
    one = call(kind)
    with settings.override(mk_alignment=alignment):
        one()
    launched = gpu.last()
    config, slack = launched.config, 0 if alignment == 4 else 4
    assert launched.kernel["scale_slack"] == slack
    assert launched.map(5 if config.swap_ab else 4)[6:] == (config.tile_m + slack, 1, 1)


def test_the_declared_alignment(gpu: Gpu) -> None:
    one = call("contiguous")
    with settings.override(mk_alignment=48):
        one()
    launched = gpu.last()
    tail, tile = launched.tail, launched.config.tile_m
    assert tail[17] == 48
    assert 48 % tile == 0 or tile % 48 == 0
    assert tail[20:22] == stretch(tile, 48)


def test_who_writes_zeros_to_rows_of_no_group(gpu: Gpu) -> None:
    for kind, by_default, switched_off in (("masked", 0, 0), ("psum", 1, 0), ("contiguous", 1, 1)):
        one = call(kind)
        one()
        assert gpu.last().tail[25] == by_default
        if kind != "masked":
            one(ensure_zero_padding=False)
            assert gpu.last().tail[25] == switched_off


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank of a": ({"a": torch.empty(4, 384, dtype=torch.float8_e4m3fn)}, "a has 2 dimensions; accepted is 3"),
    "dtype of a": ({"a": torch.empty(4, 256, 384, dtype=torch.bfloat16)}, "a has dtype torch.bfloat16"),
    "groups of a": ({"b": torch.empty(5, 320, 384, dtype=torch.float8_e4m3fn)}, "a has shape"),
    "counts in 64 bits": ({"layout": torch.zeros(4, dtype=torch.int64)}, "masked_m has dtype torch.int64"),
    "counts of fewer groups": ({"layout": torch.zeros(3, dtype=torch.int32)}, "masked_m has shape"),
    "strided counts": ({"layout": torch.zeros(8, dtype=torch.int32)[::2]}, "masked_m has strides"),
    "scales of a": ({"a_scales": torch.ones(4, 256, 4)}, "a_scales has shape"),
    "scales of b": ({"b_scales": torch.ones(4, 3, 4)}, "b_scales has shape"),
    "dtype of scales": ({"b_scales": torch.ones(4, 3, 3, dtype=torch.float64)}, "b_scales has dtype"),
    "d not along n": ({"d": torch.empty(4, 320, 256, dtype=torch.bfloat16).transpose(1, 2)}, "d has strides"),
    "dtype of d": ({"d": torch.empty(4, 256, 320, dtype=torch.float16)}, "d has dtype"),
    "a list": ({"layout": [0, 0, 0, 0]}, "masked_m is list"),
    "negative": ({"expected_m": -1}, "expected_m is -1"),
    "a fraction": ({"expected_m": 1.5}, "expected_m is 1.5"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(gpu: Gpu, bad: str) -> None:
    values, message = BAD[bad]
    one = call("masked")
    for name, value in values.items():
        setattr(one, name, value)
    with pytest.raises(ProblemError, match=message):
        one()
    assert not gpu.launched


def test_more_bad_arguments(gpu: Gpu) -> None:
    one = call("contiguous")
    with pytest.raises(ProblemError, match="recipe is"):
        one(recipe=(1, 1, 128))
    with pytest.raises(ProblemError, match="use_psum_layout is 1"):
        one(use_psum_layout=1)
    with pytest.raises(ProblemError, match="d overlaps a"):
        other = call("contiguous", fp8=False)
        other.d = other.a[:, :320]
        other()
    with pytest.raises(ProblemError, match="b starts at address"):
        other = call("contiguous", fp8=False)
        storage = aligned(torch.empty(4 * 320 * 384 + 8, dtype=torch.bfloat16))
        other.b = storage[1 : 1 + 4 * 320 * 384].view(4, 320, 384)
        other()
    with pytest.raises(ProblemError, match="a is list"):
        jitgemm.m_grouped_bf16_gemm_nt_masked([], one.b, one.d, one.layout, 1)  # type: ignore[arg-type]
    assert not gpu.launched


def test_no_rows(gpu: Gpu) -> None:
    call("masked", rows=0)()
    call("contiguous", rows=0)()
    assert not gpu.launched


def test_tiles_are_counted_from_above() -> None:
    config = GemmConfig.from_text("64x128x128 s8")
    problem = GroupedProblem(300, 128, "fp8_1x128_128x128", 5, "masked")
    assert most_tiles(problem, config, 65) == 5 * 2 * 3
    assert most_tiles(GroupedProblem(300, 128, "bf16", 5, "contiguous", alignment=16), config, 65) == 5 * 3


WRONG_LAYOUTS: dict[str, tuple[str, dict[int, int], str]] = {
    "a group that is not there": (
        "contiguous",
        {128: 4, 200: 7},
        r"grouped_layout\[128\] is 4; accepted is less than 4",
    ),
    "a group between": ("contiguous", {130: 1, 200: 7}, r"grouped_layout\[130\] is 1 after 0; .* multiple of 128 rows"),
    "an end that decreases": (
        "psum",
        {0: 100, 1: 50},
        r"grouped_layout\[1\] is 50; accepted is 100, or from 128 to 256",
    ),
    "an end past the rows": ("psum", {0: 100, 1: 200, 2: 200, 3: 257}, r"grouped_layout\[3\] is 257"),
    "too many rows": ("masked", {1: 256, 2: 257}, r"masked_m\[2\] is 257; accepted is 0 to 256"),
    "fewer than none": ("masked", {3: -1}, r"masked_m\[3\] is -1"),
}


@pytest.mark.parametrize("wrong", WRONG_LAYOUTS)
def test_layouts_are_checked_where_that_is_asked(gpu: Gpu, wrong: str) -> None:
    kind, values, message = WRONG_LAYOUTS[wrong]
    one = call(kind)
    one()
    gpu.last()
    with settings.override(debug=True):
        one()
        gpu.last()
        for place, value in values.items():
            one.layout[place] = value
        with pytest.raises(ProblemError, match=message):
            one()
    assert gpu.launched == []
    one()  # as ever: what is wrong is padding, or clamped
    gpu.last()


def test_problems_are_recorded_and_launches_named_where_that_is_asked(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "shapes.jsonl"
    told: list[str | None] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", told.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append(None))
    one = call("psum")
    with settings.override(record=path, nvtx=True, mk_alignment=64):
        for _ in range(2):
            one()
            gpu.last()
        call("psum", rows=128)()
    assert [named.problem for named in from_shapes_file(path)] == [
        GroupedProblem(320, 384, "fp8_1x128_128x128", 4, "psum", alignment=64)
    ]
    assert told[1::2] == [None] * 3
    assert all(str(name).startswith("jitgemm m_grouped_psum fp8_1x128_128x128 nt bf16 ") for name in told[::2])


def test_counts_on_the_cpu_are_checked_where_that_is_asked() -> None:
    one = call("masked", groups=2, rows=8, n=16, k=16)
    one.layout.copy_(torch.tensor([3, 9]))
    with settings.override(debug=True), pytest.raises(ProblemError, match=r"masked_m\[1\] is 9; accepted is 0 to 8"):
        one()
    one()


@pytest.mark.parametrize("kind", ["masked", "contiguous"])
def test_names_of_the_peer_for_either_type(gpu: Gpu, kind: str) -> None:
    one = call(kind)
    a, b, more = (one.a, one.a_scales), (one.b, one.b_scales), [8] if kind == "masked" else []
    getattr(jitgemm, f"m_grouped_fp8_fp4_gemm_nt_{kind}")(a, b, one.d, one.layout, *more)
    check(gpu.last(), one, gpu)
    with pytest.raises(ProblemError, match=r"b has dtype torch.int8; .* \(there are no kernels for packed FP4\)"):
        b = one.b.view(torch.int8), one.b_scales
        getattr(jitgemm, f"m_grouped_fp8_fp4_gemm_nt_{kind}")(a, b, one.d, one.layout, *more)
    assert gpu.launched == []
    assert jitgemm.bf16_m_grouped_gemm_nt_masked is jitgemm.m_grouped_bf16_gemm_nt_masked


def test_a_profile_finds_one_kernel_for_the_operation() -> None:
    """DeepGEMM's tests look for these names, and want one kernel for each."""
    config = GemmConfig.from_text("64x128x128 s8")
    for recipe, name in (("fp8_1x128_128x128", "fp8_gemm"), ("bf16", "bf16_gemm")):
        for kind in ("masked", "contiguous", "psum"):
            symbol = FAMILY.kernel_name(FAMILY.spec(GroupedProblem(64, 64, recipe, 1, kind), config, "sm_90a"))
            assert name in symbol and "gemm_" in symbol
        assert name in gemm.FAMILY.kernel_name(gemm.FAMILY.spec(GemmProblem(64, 64, recipe), config, "sm_90a"))
    helper = TRANSPOSE_SCALES.kernel_name(TRANSPOSE_SCALES.spec("sm_90a"))
    assert "transpose" in helper and "gemm_" not in helper
