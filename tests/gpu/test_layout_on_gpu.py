"""The scale-layout kernel on a GPU against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import jitgemm
from benchmarks.operands import same_bits
from jitgemm.reference import layout as reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = torch.device("cuda", 0)
SHAPES = [
    (1, 1), (1, 56), (3, 1), (4, 4), (5, 7), (31, 33), (32, 32), (33, 31), (64, 128), (129, 56), (4097, 3), (7, 1000),
    (100_003, 56), (1, 1, 1), (2, 5, 7), (256, 1, 1), (9, 130, 16), (300, 33, 2),
]  # fmt: skip


def scales(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(sum(shape)))


def check(sf: Tensor) -> None:
    """Exactly the values and strides of the reference, at an aligned address, in new memory."""
    before = sf.clone()
    result = jitgemm.get_mn_major_tma_aligned_tensor(sf)
    assert result.dtype == torch.float32
    assert result.shape == sf.shape
    assert result.stride() == reference.mn_major_strides(sf.shape, 4)
    assert result.data_ptr() % 16 == 0
    assert same_bits(result, reference.get_mn_major_tma_aligned_tensor(sf))
    assert same_bits(result, sf)
    assert same_bits(sf, before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    check(scales(*shape))


def test_views() -> None:
    base = scales(3, 130, 90)
    for sf in (
        base[0].t(),
        base[1, 1:, 3:],
        base[:, ::2, ::3],
        base.permute(2, 0, 1),
        base.permute(1, 2, 0),
        base[0, :1].expand(70, 90),
        base[:1].expand(5, 130, 90),
        base[:, :, :1],
        base[0][:, 7:8],
    ):
        check(sf)


def test_nan_keeps_its_bits() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (66, 40), dtype=torch.int32, device=DEVICE)
    check(bits.view(torch.float32))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 5), (0, 4, 4)], ids=str)
def test_nothing_to_copy(shape: tuple[int, ...]) -> None:
    result = jitgemm.get_mn_major_tma_aligned_tensor(scales(*shape))
    assert result.shape == shape


def test_what_is_in_the_layout_is_returned_as_it_is() -> None:
    sf = jitgemm.get_mn_major_tma_aligned_tensor(scales(129, 7))
    assert jitgemm.get_mn_major_tma_aligned_tensor(sf) is sf
    shifted = torch.zeros(2000, device=DEVICE)[1:].as_strided(sf.shape, sf.stride()).copy_(sf)
    result = jitgemm.get_mn_major_tma_aligned_tensor(shifted)
    assert result is not shifted
    assert same_bits(result, sf)


def test_the_current_stream_is_used() -> None:
    sf, new = torch.zeros(500, 56, device=DEVICE), scales(500, 56)
    check(sf)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        sf.copy_(new)
        result = jitgemm.get_mn_major_tma_aligned_tensor(sf)
    stream.synchronize()
    assert same_bits(result, new)


def test_graphs() -> None:
    sf, new = torch.zeros(130, 56, device=DEVICE), scales(130, 56)
    check(sf)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        result = jitgemm.get_mn_major_tma_aligned_tensor(sf)
    sf.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(result, new)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device() -> None:
    with torch.cuda.device(0):
        sf = scales(130, 56).to("cuda:1")
        result = jitgemm.get_mn_major_tma_aligned_tensor(sf)
        assert torch.cuda.current_device() == 0
    assert result.device == sf.device
    assert same_bits(result, sf)


@pytest.mark.parametrize("shape", [(5, 7), (2, 33, 12), (130, 56)], ids=str)
def test_packed_exponents_are_those_of_cpu_tensors(shape: tuple[int, ...]) -> None:
    sf = torch.randint(-126, 128, shape).double().exp2().float()
    on_cpu = jitgemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf)
    on_gpu = jitgemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf.to(DEVICE))
    assert on_gpu.stride() == on_cpu.stride()
    assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize("name", ["get_mn_major_tma_aligned_tensor", "get_mn_major_tma_aligned_packed_ue8m0_tensor"])
def test_operators_pass_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.jitgemm, name).default, (scales(33, 7).abs(),))
