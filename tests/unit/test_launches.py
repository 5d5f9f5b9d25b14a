"""The way of a call to the GPU, with CPU tensors and a driver that only takes notes.

A launch must be that of the tensors, the settings and the stream of its own call, whatever was called before.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import in_forked_child
from torch import Tensor

import jitgemm
from benchmarks.operands import Operands, quantize, random_matrix
from jitgemm import driver, plan, settings, tensor_map
from jitgemm.device import H200
from jitgemm.errors import DriverError, ProblemError
from jitgemm.families import KernelSpec, family_of, gemm_launch
from jitgemm.families.gemm import RECIPES, GemmConfig, GemmProblem
from jitgemm.families.gemm_launch import PARAMS_BYTES
from jitgemm.kernel import Kernel
from jitgemm.ops import gemm
from jitgemm.problem import Problem
from jitgemm.reference.layout import get_mn_major_tma_aligned_tensor

INVALID_CONTEXT = 201


@dataclass
class Launched:
    """What the driver was given."""

    stream: int
    grid: int
    pdl: bool
    params: bytes

    def map(self, index: int) -> tuple[int, ...]:
        """Address, width, height, stride in bytes, box width and box height of one of the tensor maps."""
        return struct.unpack_from("<4Q2I", self.params, 128 * index)

    @property
    def tail(self) -> tuple[int, ...]:
        """What follows the maps."""
        return struct.unpack_from("<Qq Qq Qiiii Qiiii iiii IIIIII iii i", self.params, 896)

    @property
    def d_aligned(self) -> bool:
        return bool(self.tail[-1])


class Gpu:
    """Stands in for the driver and for torch's current device and stream."""

    def __init__(self) -> None:
        self.launched: list[Launched] = []
        self.stream, self.device, self.status, self.encoded = 7, -1, 0, 0
        self.loaded_for: list[Problem] = []

    def launch(self, config: Any, kernel: Any, arguments: Any, extra: None) -> int:
        if self.status:
            status, self.status = self.status, 0
            return status
        given = config._obj
        address = ctypes.c_uint64.from_address(ctypes.cast(arguments, ctypes.c_void_p).value or 0).value
        assert address % 128 == 0
        assert extra is None
        pdl = False
        if given.num_attributes:
            assert (given.num_attributes, given.attributes[0].id, given.attributes[0].value) == (1, 6, 1)
            pdl = True
        self.launched.append(Launched(given.stream or 0, given.grid[0], pdl, ctypes.string_at(address, PARAMS_BYTES)))
        return 0

    def encode(self, target: int, code: int, rank: int, address: int, *rest: int) -> int:
        dims, strides, box = rest[:3]
        assert (target % 64, address % 16, rank) == (0, 0, 2)
        numbers = (*(ctypes.c_uint64 * 2).from_address(dims), ctypes.c_uint64.from_address(strides).value)
        packed = struct.pack("<4Q2I", address, *numbers, *(ctypes.c_uint32 * 2).from_address(box))
        ctypes.memmove(target, packed, len(packed))
        self.encoded += 1
        return 0

    def replace(self, target: int, address: int) -> int:
        assert (target % 64, address % 16) == (0, 0)
        ctypes.c_uint64.from_address(target).value = address
        return 0

    def last(self) -> Launched:
        """The one launch since the last look."""
        (launched,) = self.launched
        self.launched.clear()
        return launched


@pytest.fixture(params=["guards", "no guards"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """With torch's check of all tensors at once, and without it, as if torch had changed it."""
    fake = Gpu()

    def load(spec: KernelSpec, device: int, problem: Problem) -> Kernel:
        family = family_of(spec)
        fake.loaded_for.append(problem)
        return Kernel(spec, device, 1, family.num_threads(spec), family.smem_bytes(spec), None)

    monkeypatch.setattr(gemm, "_GPU", "cpu")
    monkeypatch.setattr(gemm, "_plans", plan.Table(4096))
    monkeypatch.setattr(gemm, "_recent", plan.Table(4096))
    monkeypatch.setattr(gemm, "load", load)
    monkeypatch.setattr(gemm, "device_facts", lambda _: (H200, 132))
    monkeypatch.setattr(gemm, "current_device", lambda: fake.device)
    monkeypatch.setattr(gemm, "raw_stream", lambda _: fake.stream)
    monkeypatch.setattr(driver, "_launch_function", lambda: fake.launch)
    monkeypatch.setattr(tensor_map, "encode_tensor_map_function", lambda: fake.encode)
    monkeypatch.setattr(gemm_launch, "replace_tensor_map_address_function", lambda: fake.replace)
    if request.param == "no guards":
        monkeypatch.setattr(plan, "_tensor_guards", None)
    yield fake


def test_torch_has_the_check_of_all_tensors_at_once() -> None:
    assert plan._tensor_guards is not None


@dataclass
class Call:
    """Tensors, and the public function of their recipe."""

    x: Operands
    d: Tensor
    c: Tensor | None = None

    def __call__(self) -> None:
        if self.x.recipe == "bf16":
            jitgemm.bf16_gemm_nt(self.x.a, self.x.b, self.d, self.c)
        else:
            pairs = (self.x.a, self.x.a_scales), (self.x.b, self.x.b_scales)
            jitgemm.fp8_gemm_nt(*pairs, self.d, self.c, recipe=self.x.recipe)  # type: ignore[arg-type]


def aligned(tensor: Tensor) -> Tensor:
    """A copy at a multiple of 16 bytes, with the same strides."""
    size = tensor.untyped_storage().nbytes()
    raw = torch.empty(size + 16, dtype=torch.uint8)
    raw = raw[-raw.data_ptr() % 16 :][:size]
    copy = raw.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    copy.view(torch.uint8 if tensor.element_size() == 1 else tensor.dtype).copy_(
        tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    )
    return copy


def tensors(recipe: str = "fp8_1x128_128x128", m: int = 40, n: int = 256, k: int = 384, with_c: bool = False) -> Call:
    generator = torch.Generator().manual_seed(0)
    x = quantize(recipe, random_matrix(m, k, generator), random_matrix(n, k, generator))
    scales = [x.a_scales, x.b_scales]
    for index, granularity in enumerate((RECIPES[recipe].a_scales, RECIPES[recipe].b_scales)):
        if granularity == "row_k":
            scales[index] = get_mn_major_tma_aligned_tensor(scales[index])
    a_scales, b_scales = (None if one is None else aligned(one) for one in scales)
    d = aligned(torch.zeros(m, n, dtype=torch.bfloat16))
    return Call(Operands(recipe, aligned(x.a), a_scales, aligned(x.b), b_scales), d, d.clone() if with_c else None)


def check(launched: Launched, call: Call, gpu: Gpu) -> None:
    """The launch is that of these tensors: addresses, sizes, strides, stream."""
    m, k = call.x.a.shape
    n = call.x.b.shape[0]
    size = call.x.a.element_size()
    tail = launched.tail
    assert launched.stream == gpu.stream
    assert tail[0] == call.d.data_ptr()
    assert tail[1] == call.d.stride(0)
    assert tail[2] == (0 if call.c is None else call.c.data_ptr())
    assert tail[24:26] == (m, n)
    sides = [
        (call.x.a.data_ptr(), k, m, call.x.a.stride(0) * size, call.x.a_scales, RECIPES[call.x.recipe].a_scales, 2),
        (call.x.b.data_ptr(), k, n, call.x.b.stride(0) * size, call.x.b_scales, RECIPES[call.x.recipe].b_scales, 3),
    ]
    if launched.map(0)[0] != call.x.a.data_ptr():  # swapped
        sides.reverse()
    for index, (address, width, height, stride, scales, granularity, _) in enumerate(sides):
        whole, cut = launched.map(2 * index), launched.map(2 * index + 1)
        assert whole[:4] == (address, width, height, stride)
        left = height % whole[5]  # no operand here is shared by multicast
        assert cut == ((*whole[:5], left) if left else (0,) * 6)
        assert tail[(4, 9)[index]] == (0 if scales is None else scales.data_ptr())
        if granularity == "row_k":
            assert scales is not None
            assert launched.map(4 + index)[:4] == (scales.data_ptr(), height, scales.shape[1], scales.stride(1) * 4)
    if launched.d_aligned:
        assert launched.map(6)[:4] == (call.d.data_ptr(), n, m, call.d.stride(0) * 2)


@pytest.mark.parametrize("with_c", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_calls_again_and_with_other_tensors(gpu: Gpu, recipe: str, with_c: bool) -> None:
    first, second = tensors(recipe, with_c=with_c), tensors(recipe, with_c=with_c)
    for call in (first, first, second, first, second, second):
        call()
        check(gpu.last(), call, gpu)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("with_c", [False, True])
def test_another_m_with_the_same_weights(gpu: Gpu, recipe: str, with_c: bool) -> None:
    weights = tensors(recipe)
    for m in (40, 41, 2, 200, 41, 1, 3000, 40, 1):
        call = tensors(recipe, m, with_c=with_c)
        call.x = Operands(recipe, call.x.a, call.x.a_scales, weights.x.b, weights.x.b_scales)
        call()
        launched = gpu.last()
        check(launched, call, gpu)
        again = gemm._plans, gemm._recent
        gemm._plans, gemm._recent = plan.Table(4), plan.Table(4)
        call()  # what is derived from a plan of another m is what is made from scratch
        assert gpu.last() == launched
        gemm._plans, gemm._recent = again


def replaced(call: Call, **values: Any) -> Call:
    """The same tensors but for some."""
    x = call.x
    parts = {"a": x.a, "a_scales": x.a_scales, "b": x.b, "b_scales": x.b_scales}
    other = Operands(x.recipe, *({**parts, **{n: v for n, v in values.items() if n in parts}}.values()))
    return Call(other, values.get("d", call.d), values.get("c", call.c))


CHANGES_IN_PLACE: dict[str, Callable[[Call], object]] = {
    "fewer rows": lambda call: (call.x.a.resize_(8, 384), call.d.resize_(8, 256)),
    "strides of d": lambda call: call.d.set_(call.d.new_empty(40 * 264).untyped_storage(), 0, (40, 256), (264, 1)),
    "strides of d, same storage": lambda call: (
        call.d.as_strided_((20, 256), (512, 1)),
        call.x.a.as_strided_((20, 384), (384, 1)),
    ),
    "storage of a": lambda call: call.x.a.set_(aligned(call.x.a)),
    "data of b": lambda call: setattr(call.x.b, "data", aligned(call.x.b)),
    "fewer columns of d and b": lambda call: (call.x.b.resize_(128, 384), call.d.resize_(40, 128)),
}


@pytest.mark.parametrize("change", CHANGES_IN_PLACE)
def test_tensors_changed_in_place(gpu: Gpu, change: str) -> None:
    call = tensors("bf16")
    call.d = torch.zeros(64, 264, dtype=torch.bfloat16)[:40, :256].clone()
    for _ in range(2):
        call()
        check(gpu.last(), call, gpu)
    CHANGES_IN_PLACE[change](call)
    for _ in range(2):
        call()
        check(gpu.last(), call, gpu)


def test_dtype_shape_and_layout_at_the_same_addresses(gpu: Gpu) -> None:
    call = tensors("bf16")
    call()
    check(gpu.last(), call, gpu)
    a = call.x.a
    with pytest.raises(ProblemError, match="a has dtype"):
        replaced(call, a=a.view(torch.float16))()
    with pytest.raises(ProblemError, match="d has dtype"):
        replaced(call, d=call.d.view(torch.float16))()
    with pytest.raises(ProblemError, match="a has 3 dimensions"):
        replaced(call, a=a.view(1, *a.shape))()
    with pytest.raises(ProblemError, match="d has shape"):
        replaced(call, d=call.d[:, :128])()
    with pytest.raises(ProblemError, match="d has shape"):
        replaced(call, d=call.d[:20])()
    with pytest.raises(ProblemError, match="must agree"):
        replaced(call, a=a[:, :128])()
    with pytest.raises(ProblemError, match="a is list"):
        replaced(call, a=a.tolist())()
    assert not gpu.launched
    half = replaced(call, a=a[:20], d=call.d[:20])
    half()
    check(gpu.last(), half, gpu)
    call()
    check(gpu.last(), call, gpu)


@pytest.mark.parametrize("bad", ["a_scales rows", "a_scales", "b_scales", "b_scales missing", "c rows", "d rows"])
def test_wrong_rows_are_refused_for_another_m_too(gpu: Gpu, bad: str) -> None:
    good = tensors(m=40, with_c=True)
    for _ in range(2):
        good()
    gpu.launched.clear()
    call = tensors(m=50, with_c=True)
    weights = {"b": good.x.b, "b_scales": good.x.b_scales}
    short = tensors(m=49, with_c=True)
    changed: dict[str, Any] = {
        "a_scales rows": {"a_scales": short.x.a_scales},
        "a_scales": {"a_scales": None},
        "b_scales": {"b_scales": good.x.b_scales[:1]},  # type: ignore[index]
        "b_scales missing": {"b_scales": None},
        "c rows": {"c": short.c},
        "d rows": {"d": short.d},
    }[bad]
    with pytest.raises(ProblemError):
        replaced(call, **{**weights, **changed})()
    assert not gpu.launched


def test_addresses_are_checked_whatever_is_known(gpu: Gpu) -> None:
    call = tensors("bf16")
    for _ in range(2):
        call()
    gpu.launched.clear()
    storage = torch.zeros(64 * 384 + 8, dtype=torch.bfloat16)
    storage = storage[-storage.data_ptr() // 2 % 8 :]
    shifted = storage[1 : 1 + 40 * 384].view(40, 384)
    for m in (40, 30):
        other = replaced(call, a=shifted[:m], d=call.d[:m])
        with pytest.raises(ProblemError, match="a starts at address"):
            other()
        overlapping = call.x.a.view(-1)[: m * 256].view(m, 256)
        with pytest.raises(ProblemError, match="d overlaps a"):
            replaced(call, a=call.x.a[:m], d=overlapping)()
    assert not gpu.launched


def test_d_at_any_address(gpu: Gpu) -> None:
    call = tensors("bf16")
    storage = aligned(torch.zeros(40 * 256 + 8, dtype=torch.bfloat16))
    for shift in (0, 1, 8, 3, 0):
        other = replaced(call, d=storage[shift : shift + 40 * 256].view(40, 256))
        other()
        launched = gpu.last()
        check(launched, other, gpu)
        assert launched.d_aligned == (shift % 8 == 0)


def test_scales_at_unaligned_addresses_are_copied(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Tensor] = []

    def copy(scales: Tensor) -> Tensor:
        copies.append(aligned(get_mn_major_tma_aligned_tensor(scales.clone())))
        return copies[-1]

    monkeypatch.setattr(gemm, "copy_to_mn_major", copy)
    call = tensors()
    assert call.x.a_scales is not None
    for _ in range(2):
        call()
    gpu.launched.clear()
    storage = torch.zeros(40 * 3 + 8)
    storage = storage[-storage.data_ptr() // 4 % 4 + 1 :]
    unaligned = storage.as_strided((40, 3), (1, 40))
    for m in (40, 36):
        other = replaced(call, a=call.x.a[:m], a_scales=unaligned[:m], d=call.d[:m])
        other()
        check(gpu.last(), replaced(other, a_scales=copies.pop()), gpu)
    assert not copies


@pytest.mark.parametrize("known", [False, True])
def test_streams(gpu: Gpu, known: bool) -> None:
    call = tensors()
    for stream in (0, 1 << 40, 0, 5) if known else (0, 1 << 40):
        gpu.stream = stream
        call()
        check(gpu.last(), call, gpu)


def test_another_device_is_current(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    made_current: list[int] = []

    class Device:
        def __init__(self, ordinal: int) -> None:
            self.ordinal = ordinal

        def __enter__(self) -> None:
            made_current.append(self.ordinal)
            self.before, gpu.device = gpu.device, self.ordinal

        def __exit__(self, *_: object) -> None:
            gpu.device = self.before

    monkeypatch.setattr(torch.cuda, "device", Device)
    call = tensors()
    for device, expected in ((-1, []), (1, [-1]), (-1, []), (1, [-1])):
        gpu.device = device
        call()
        check(gpu.last(), call, gpu)
        assert made_current == expected
        made_current.clear()


def test_settings_count_from_the_next_call_on(gpu: Gpu) -> None:
    call = tensors("fp8_1x128_1x128", 2000, 1024)

    def launched() -> Launched:
        call()
        one = gpu.last()
        check(one, call, gpu)
        return one

    assert not launched().pdl
    whole = launched().grid
    try:
        jitgemm.set_pdl(True)
        assert jitgemm.get_pdl()
        assert launched().pdl
        assert launched().pdl
        with jitgemm.override(pdl=False) as inside:
            assert not launched().pdl
            jitgemm.set_num_sms(6)  # the block's own values stay
            assert settings.current() is not inside
            assert not launched().pdl
            assert launched().grid <= 6
        assert launched().pdl
        jitgemm.set_num_sms(0)
        assert launched().grid == whole
        with jitgemm.override(tile_m=64, tile_n=64, swap_ab=False, split_k=1, cluster="1x1"):
            assert launched().map(0)[5] == 64
    finally:
        jitgemm.set_pdl(False)
        jitgemm.set_num_sms(0)
    assert not launched().pdl


def test_a_forced_config_and_plans_that_are_forgotten(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    call = tensors("bf16")
    forced = [GemmConfig.from_text(text) for text in ("64x64x64 s4", "64x128x64 s4")]

    def box_of_b() -> int:
        call()
        return gpu.last().map(2)[5]

    for config in (*forced, *forced):
        with jitgemm.override(config=str(config)):
            assert box_of_b() == config.tile_n
    monkeypatch.setattr(gemm, "chooser", lambda *_, **__: lambda _: forced[0])
    assert (box_of_b(), box_of_b()) == (64, 64)
    monkeypatch.setattr(gemm, "chooser", lambda *_, **__: lambda _: forced[1])
    assert box_of_b() == 64
    gemm.forget_plans()
    assert (box_of_b(), box_of_b()) == (128, 128)


def test_a_forked_child_asks_for_its_kernel_anew(gpu: Gpu) -> None:
    call = tensors("bf16")
    call()
    call()
    assert len(gpu.loaded_for) == 1

    def child() -> None:
        call()
        assert len(gpu.loaded_for) == 2

    assert in_forked_child(child) == 0


def test_autotune_is_asked_once_for_each_m(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def autotune(problem: GemmProblem, *_: object) -> None:
        asked.append(problem.m)
        gemm.forget_plans()  # as tuning does

    monkeypatch.setattr(gemm, "_autotune", autotune)
    weights = tensors("bf16")
    calls = [replaced(tensors("bf16", m), b=weights.x.b) for m in (40, 50, 60)]
    with jitgemm.override(autotune=True):
        for index in (0, 0, 1, 1, 2, 2):
            calls[index]()
            check(gpu.last(), calls[index], gpu)
    assert asked == [40, 50, 60]
    calls[0]()
    assert asked == [40, 50, 60]


@pytest.mark.parametrize("value", ["yes", None, 2, 1.5])
def test_set_pdl_refuses_what_is_no_boolean(value: object) -> None:
    with pytest.raises(jitgemm.SettingsError, match=r"set_pdl: .* accepted is 0 or 1"):
        jitgemm.set_pdl(value)  # type: ignore[arg-type]
    assert not jitgemm.get_pdl()


def test_modes_and_subclasses_do_not_take_the_short_way(gpu: Gpu) -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Dispatch(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Subclass(Tensor):
        pass

    call = tensors("bf16")
    for _ in range(2):
        call()
    gpu.launched.clear()
    for mode in (Dispatch(), Function()):  # type: ignore[no-untyped-call]
        with mode:
            call()
        assert seen == ["jitgemm.gemm.default"] or "jitgemm.gemm" in seen
        seen.clear()
        check(gpu.last(), call, gpu)
    with torch.inference_mode():
        call()
    check(gpu.last(), call, gpu)
    other = replaced(call, b=call.x.b.as_subclass(Subclass))
    for _ in range(2):
        other()
        check(gpu.last(), other, gpu)
    torch.ops.jitgemm.gemm(call.x.a, None, call.x.b, None, call.d, None, False, "bf16", "nt", False)
    check(gpu.last(), call, gpu)


def test_ids_of_freed_tensors_mean_nothing(gpu: Gpu) -> None:
    for n in (64, 128, 192, 256) * 4:  # often at the id, or the address, of the tensors before
        call = tensors("bf16", 16, n, 128)
        call()
        check(gpu.last(), call, gpu)
        del call


def test_a_threads_first_launch_gets_a_context(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts: list[int] = []
    monkeypatch.setattr(driver, "use_primary_context", contexts.append)
    call = tensors()
    for _ in range(2):
        gpu.status = INVALID_CONTEXT
        call()
        check(gpu.last(), call, gpu)
    assert contexts == [-1, -1]


def test_a_refused_launch_is_an_error(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def error_of(status: int, what: str = "") -> DriverError:
        return DriverError(f"{what}: {status}")

    monkeypatch.setattr(driver, "error_of", error_of)
    call = tensors()
    for _ in range(2):
        gpu.status = 719
        with pytest.raises(DriverError, match="launch: 719"):
            call()
        call()
        check(gpu.last(), call, gpu)


def test_addresses_are_replaced_in_maps_that_are_encoded_once(gpu: Gpu) -> None:
    calls = [tensors() for _ in range(5)]
    calls[0]()
    encoded = gpu.encoded
    for call in calls:
        call()
    assert gpu.encoded == encoded > 0
    for launched, call in zip(gpu.launched[1:], calls, strict=True):
        check(launched, call, gpu)


def test_threads_launch_their_own_tensors(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the weights, so that each finds what another has left."""
    weights = tensors("bf16")
    streams = threading.local()
    monkeypatch.setattr(gemm, "raw_stream", lambda _: streams.mine)
    calls = {
        stream: [replaced(tensors("bf16", m), b=weights.x.b) for m in (30 + stream, 40, 50)] for stream in range(1, 5)
    }
    errors: list[BaseException] = []

    def run(stream: int) -> None:
        streams.mine = stream
        try:
            for index in range(300):
                calls[stream][index % 7 % 3]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(stream,)) for stream in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    assert len(gpu.launched) == 4 * 300
    for stream, own in calls.items():
        gpu.stream = stream
        launched = [one for one in gpu.launched if one.stream == stream]
        assert len(launched) == 300
        for index, one in enumerate(launched):
            check(one, own[index % 7 % 3], gpu)


def test_ranges_name_each_launch_where_asked(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str | None] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", told.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append(None))
    call, other = tensors("bf16"), tensors("bf16", m=50)
    call()
    assert told == []
    with jitgemm.override(nvtx=True):
        for one in (call, call, other, other):
            one()
            check(gpu.launched[-1], one, gpu)
        call()
    ranges, ends = told[::2], told[1::2]
    assert ends == [None] * 5
    assert [name.split()[-3] for name in ranges if name] == ["m=40", "m=40", "m=50", "m=50", "m=40"]
    assert all(str(name).startswith("jitgemm bf16 nt bf16 ") and "n=256 k=384" in str(name) for name in ranges)
    call()
    assert len(told) == 10


def test_a_range_ends_when_its_launch_fails(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    depth: list[int] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda _: depth.append(1))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", depth.pop)
    monkeypatch.setattr(driver, "error_of", lambda *_: DriverError("refused"))
    call = tensors("bf16")
    with jitgemm.override(nvtx=True):
        call()
        gpu.status = 700
        with pytest.raises(DriverError, match="refused"):
            call()
    assert depth == []


def test_kernels_are_loaded_for_the_problem_that_prewarms_them(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "copy_to_mn_major", lambda scales: aligned(get_mn_major_tma_aligned_tensor(scales)))
    call = tensors("fp8_1x128_128x128")
    assert call.x.a_scales is not None
    replaced(call, a_scales=call.x.a_scales.contiguous())()  # the copy needs a kernel too
    assert len(gpu.loaded_for) == 2
    assert {problem.without_m() for problem in gpu.loaded_for} == {GemmProblem(256, 384, "fp8_1x128_128x128")}
