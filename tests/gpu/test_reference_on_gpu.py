"""The reference of grouped GEMMs on GPU tensors, where kernels are compared with it, against itself on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import jitgemm
from jitgemm.reference.einsum import einsum, fp8_einsum, fp8_gemm_nt_skip_head_mid
from jitgemm.reference.epilogue import Epilogue
from jitgemm.reference.gemm import error_measures
from jitgemm.reference.grouped import k_grouped_contiguous, m_grouped_contiguous, m_grouped_masked

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

Move = Callable[[Tensor], Tensor]
N, K = 256, 272


def fp8(*shape: int) -> Tensor:
    return torch.randn(shape).mul(30).to(torch.float8_e4m3fn)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape) * 0.02 + 0.005


def contiguous(move: Move, use_psum_layout: bool) -> tuple[Tensor, ...]:
    index = [0] * 10 + [-1] * 6 + [2] * 16 + [1] * 3 + [-1] * 13
    layout = [10, 19, 48] if use_psum_layout else index
    d, d_scales = move(torch.zeros(48, N // 2).to(torch.float8_e4m3fn)), move(torch.zeros(48, 1))
    m_grouped_contiguous(
        move(fp8(48, K)),
        move(fp8(3, N, K)),
        (d, d_scales),
        move(torch.tensor(layout, dtype=torch.int32)),
        a_scales=move(scales(48, 3)),
        b_scales=move(scales(3, 2, 3)),
        recipe="fp8_1x128_128x128",
        use_psum_layout=use_psum_layout,
        alignment=16,
        zero_padding=True,
        epilogue=Epilogue(
            alpha=0.5, bias=move(torch.randn(3, N)), swiglu=True, limit=7.0, row_weights=move(torch.rand(48))
        ),
    )
    return jitgemm.cast_back_from_fp8(d, d_scales), d_scales


def masked(move: Move) -> tuple[Tensor, ...]:
    d = move(torch.full((3, 8, N), 5.0).bfloat16())
    counts = move(torch.tensor([0, 3, 9], dtype=torch.int32))
    m_grouped_masked(
        move(torch.randn(3, 8, K).bfloat16()), move(torch.randn(3, N, K).bfloat16()), d, counts, recipe="bf16"
    )
    return (d,)


def along_k(move: Move) -> tuple[Tensor, ...]:
    ks = [128, 0, 40]
    d = move(torch.randn(3, 20, 30))
    a, b, a_scales, b_scales = (move(x) for x in (fp8(168, 20), fp8(168, 30), scales(2, 20), scales(2, 30)))
    k_grouped_contiguous(a, b, d, ks, d, a_scales=a_scales, b_scales=b_scales, recipe="fp8_1x128_1x128")
    return (d,)


def products_of_heads(move: Move) -> tuple[Tensor, ...]:
    d, e = move(torch.zeros(5, 2, 130)), move(torch.zeros(6, 7).bfloat16())
    fp8_einsum(
        "bhr,hdr->bhd",
        (move(fp8(5, 2, 140)), move(scales(5, 2, 2))),
        (move(fp8(2, 130, 140)), move(scales(2, 2, 2))),
        d,
    )
    einsum("bmk,bnk->mn", move(torch.randn(4, 6, 9).bfloat16()), move(torch.randn(4, 7, 9).bfloat16()), e)
    return d, e


def around_holes(move: Move) -> tuple[Tensor, ...]:
    d = move(torch.full((5, 64), 3.0).bfloat16())
    fp8_gemm_nt_skip_head_mid(
        (move(fp8(5, K)), move(scales(5, 3))), (move(fp8(48, K)), move(scales(1, 3))), d, (8, 4, 4)
    )
    return (d,)


@pytest.mark.parametrize(
    "operation",
    [
        lambda move: contiguous(move, False),
        lambda move: contiguous(move, True),
        masked,
        along_k,
        products_of_heads,
        around_holes,
    ],
    ids=["contiguous", "psum", "masked", "k_grouped", "einsum", "skip_head_mid"],
)
def test_both_devices_give_the_same(operation: Callable[[Move], tuple[Tensor, ...]]) -> None:
    torch.manual_seed(1)
    expected = operation(lambda x: x)
    torch.manual_seed(1)
    actual = operation(lambda x: x.cuda())
    for x, y in zip(actual, expected, strict=True):
        assert x.is_cuda and error_measures(x.cpu(), y).frobenius < 2e-3  # a value may round to the one beside it
