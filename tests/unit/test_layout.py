"""The MN-major, TMA-aligned layout of scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

import jitgemm
from jitgemm.errors import ProblemError

TRANSFORMS = {
    "plain": jitgemm.get_mn_major_tma_aligned_tensor,
    "packed": jitgemm.get_mn_major_tma_aligned_packed_ue8m0_tensor,
}
OPERATORS = {
    "plain": torch.ops.jitgemm.get_mn_major_tma_aligned_tensor.default,
    "packed": torch.ops.jitgemm.get_mn_major_tma_aligned_packed_ue8m0_tensor.default,
}
SHAPES = st.one_of(
    st.tuples(st.integers(0, 40), st.integers(1, 12)),
    st.tuples(st.integers(1, 3), st.integers(0, 40), st.integers(1, 12)),
)


def powers_of_two(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(-126, 128, shape).double().exp2().float()


def assert_aligned(result: Tensor) -> None:
    mn, blocks = result.shape[-2:]
    aligned = -(-mn // 4) * 4
    assert result.stride()[-2:] == (1, aligned)
    if result.dim() == 3:
        assert result.stride(0) == aligned * blocks
    assert result.data_ptr() % 16 == 0
    groups = result.shape[0] if result.dim() == 3 else 1
    assert result.untyped_storage().nbytes() == groups * aligned * blocks * 4  # TMA may read the padding


@pytest.mark.parametrize("element_size", [1, 2, 4, 8, 16])
def test_aligned_size_is_the_least_multiple_of_16_bytes(element_size: int) -> None:
    for mn in range(70):
        aligned = jitgemm.get_tma_aligned_size(mn, element_size)
        assert aligned == next(size for size in range(mn, mn + 17) if size * element_size % 16 == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 4), "mn is -1"),
        ((1.5, 4), "mn is 1.5; accepted is an integer"),
        ((8, 0), "element_size is 0; accepted is 1, 2, 4, 8 or 16"),
        ((8, 3), "element_size is 3"),
        ((8, 32), "element_size is 32"),
    ],
)
def test_aligned_size_refuses(arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        jitgemm.get_tma_aligned_size(*arguments)


@given(SHAPES)
@settings(max_examples=60, deadline=None)
def test_transform_keeps_shape_and_values(shape: tuple[int, ...]) -> None:
    sf = torch.randn(shape)
    result = jitgemm.get_mn_major_tma_aligned_tensor(sf)
    assert result.dtype == torch.float32 and result.shape == shape
    assert torch.equal(result, sf)
    assert_aligned(result)


@given(SHAPES)
@settings(max_examples=60, deadline=None)
def test_packing_puts_four_exponents_into_a_word(shape: tuple[int, ...]) -> None:
    sf = powers_of_two(shape)
    result = jitgemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf)
    words = -(-shape[-1] // 4)
    assert result.dtype == torch.int32 and result.shape == (*shape[:-1], words)
    assert_aligned(result)
    exponents = np.zeros((*shape[:-1], words * 4), np.uint8)
    exponents[..., : shape[-1]] = np.log2(sf.double().numpy()) + 127
    assert result.contiguous().numpy().tobytes() == exponents.tobytes()


def test_packing_reads_exponents_only() -> None:
    sf = torch.tensor([[-1.5, 3.0, 0.0, 1e-45]])
    assert jitgemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf).item() == 127 | 128 << 8


@pytest.mark.parametrize("name", TRANSFORMS)
def test_strided_scales(name: str) -> None:
    base = powers_of_two((3, 30, 22))
    for sf in (base[0].T, base[1, 1:, 3:], base[:, ::2, ::3], base.permute(2, 0, 1), base[0, :1].expand(9, 22)):
        result = TRANSFORMS[name](sf)
        assert_aligned(result)
        assert torch.equal(result, TRANSFORMS[name](sf.contiguous()))


@pytest.mark.parametrize("shape", [(8, 3), (7, 3), (2, 7, 3), (1, 5, 2), (0, 3)])
def test_scales_in_the_layout_are_returned_as_they_are(shape: tuple[int, ...]) -> None:
    sf = jitgemm.get_mn_major_tma_aligned_tensor(torch.randn(shape))
    assert jitgemm.get_mn_major_tma_aligned_tensor(sf) is sf


def test_a_single_group_may_have_any_group_stride() -> None:
    sf = jitgemm.get_mn_major_tma_aligned_tensor(torch.randn(2, 7, 3))[:1]
    assert jitgemm.get_mn_major_tma_aligned_tensor(sf) is sf
    sf = torch.randn(5, 3, 8).mT[::2]  # MN-major, but with gaps between groups
    assert jitgemm.get_mn_major_tma_aligned_tensor(sf) is not sf


def test_scales_in_the_layout_at_a_misaligned_address_are_copied() -> None:
    sf = torch.randn(100)[1:].as_strided((7, 3), (1, 8), 1)
    result = jitgemm.get_mn_major_tma_aligned_tensor(sf)
    assert result is not sf and torch.equal(result, sf)
    assert_aligned(result)
    # Likewise where the storage itself begins at an odd address.
    array = np.zeros(100, np.float32)
    start = next(i for i in range(4) if array[i:].ctypes.data % 16 == 4)
    sf = torch.from_numpy(array[start:]).as_strided((7, 3), (1, 8))
    assert sf.storage_offset() == 0
    assert jitgemm.get_mn_major_tma_aligned_tensor(sf) is not sf


def test_the_transform_is_not_differentiable() -> None:
    assert not jitgemm.get_mn_major_tma_aligned_tensor(torch.randn(5, 3, requires_grad=True)).requires_grad


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(
    ("sf", "message"),
    [
        (None, "sf is NoneType; accepted is a torch.Tensor"),
        (torch.ones(4, 2, dtype=torch.bfloat16), "sf has dtype torch.bfloat16; accepted is torch.float32"),
        (torch.ones(4), "sf has 1 dimensions"),
        (torch.ones(1, 2, 3, 4), "sf has 4 dimensions"),
        (torch.ones(4, 2).to_sparse(), "layout torch.sparse_coo"),
    ],
)
def test_bad_arguments(name: str, sf: object, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        TRANSFORMS[name](sf)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (0, 3), (1, 1)])
def test_operators_pass_opcheck(name: str, shape: tuple[int, ...]) -> None:
    torch.library.opcheck(OPERATORS[name], (powers_of_two(shape),))


def test_operators_never_return_their_input() -> None:
    sf = jitgemm.get_mn_major_tma_aligned_tensor(torch.randn(8, 3))
    torch.library.opcheck(OPERATORS["plain"], (sf,))
    assert OPERATORS["plain"](sf).data_ptr() != sf.data_ptr()


@pytest.mark.parametrize("dynamic", [False, True])
def test_transforms_compile_without_graph_breaks(dynamic: bool) -> None:
    def function(sf: Tensor) -> tuple[Tensor, ...]:
        sf = sf * 2
        aligned = jitgemm.get_mn_major_tma_aligned_tensor(sf)
        again = jitgemm.get_mn_major_tma_aligned_tensor(aligned)
        packed = jitgemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf)
        return aligned, again, packed, sf * jitgemm.get_tma_aligned_size(sf.shape[0], 4)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for mn in (10, 13):
        sf = powers_of_two((mn, 6)).clamp(max=2.0**60)
        for actual, expected in zip(compiled(sf), function(sf), strict=True):
            assert actual.stride() == expected.stride()
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_fake_tensors_show_the_layout(name: str) -> None:
    with FakeTensorMode():
        fake = TRANSFORMS[name](torch.randn(2, 9, 6))
    real = TRANSFORMS[name](torch.randn(2, 9, 6))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
