"""GEMM by cuBLAS, as torch calls it: what ours are compared with, under the peer's names.

CPU tensors are computed by the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jitgemm.errors import ProblemError
from jitgemm.reference.gemm import gemm

_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_FP8 = torch.float8_e4m3fn
_torch: Any = torch  # whose stubs lack some overloads


def cublaslt_gemm_nt(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None) -> None:
    """``d = a @ b.T (+ c)``: a ``[m, k]``, b ``[n, k]``.

    Args:
        a: bf16, or e4m3 without scales.
        b: of the same type.
        d: output, bf16 or fp32 ``[m, n]``.
        c: added to the product; ``[m, n]`` of d's type, may be ``d`` itself.

    Raises:
        ProblemError: an argument is not of these.
    """
    for name, tensor in (("a", a), ("b", b), ("d", d), *((("c", c),) if c is not None else ())):
        if not isinstance(tensor, Tensor) or tensor.dim() != 2:
            raise ProblemError(f"{name} is {_described(tensor)}; accepted is a matrix")
    if a.dtype not in (torch.bfloat16, _FP8) or b.dtype != a.dtype:
        raise ProblemError(f"a has dtype {a.dtype} and b {b.dtype}; accepted is torch.bfloat16 or {_FP8} for both")
    if d.dtype not in _DTYPES or (c is not None and c.dtype != d.dtype):
        given = "" if c is None else f" and c {c.dtype}"
        raise ProblemError(f"d has dtype {d.dtype}{given}; accepted is torch.bfloat16 or torch.float32 for both")
    shape = (a.shape[0], b.shape[0])
    if a.shape[1] != b.shape[1] or d.shape != shape or (c is not None and c.shape != shape):
        shapes = [tuple(tensor.shape) for tensor in (a, b, d, c) if tensor is not None]
        raise ProblemError(f"a, b, d and c have shapes {shapes}; accepted is [m, k], [n, k], [m, n], [m, n]")
    if a.shape[1] == 0 or not d.numel():  # which cuBLAS does not take in FP8
        d.zero_() if c is None else d.copy_(c)
        return
    if d.is_cuda:
        _on_device(a, b, d, c)
        return
    recipe, one = ("fp8_tensorwise", torch.ones(1)) if a.dtype == _FP8 else ("bf16", None)
    d.copy_(gemm(a, b, c, a_scales=one, b_scales=one, recipe=recipe, d_dtype=_DTYPES[d.dtype]))


def cublaslt_gemm_nn(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None) -> None:
    """``d = a @ b (+ c)``: a ``[m, k]``, b ``[k, n]``; else as ``cublaslt_gemm_nt``."""
    cublaslt_gemm_nt(a, _transposed("b", b), d, c)


def cublaslt_gemm_tn(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None) -> None:
    """``d = a.T @ b (+ c)``: a ``[k, m]``, b ``[k, n]``; else as ``cublaslt_gemm_nt``."""
    cublaslt_gemm_nt(_transposed("a", a), _transposed("b", b), d, c)


def cublaslt_gemm_tt(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None) -> None:
    """``d = a.T @ b.T (+ c)``: a ``[k, m]``, b ``[n, k]``; else as ``cublaslt_gemm_nt``."""
    cublaslt_gemm_nt(_transposed("a", a), b, d, c)


def _on_device(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None) -> None:
    if a.dtype == _FP8:
        one = torch.ones((), dtype=torch.float32, device=d.device)
        product = _torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=d.dtype)
        torch.add(product, c, out=d) if c is not None else d.copy_(product)
    elif d.dtype == torch.bfloat16:
        torch.mm(a, b.T, out=d) if c is None else torch.addmm(c, a, b.T, out=d)
    elif hasattr(torch.ops.aten.mm, "dtype"):  # torch 2.8
        product = _torch.mm(a, b.T, out_dtype=d.dtype) if c is None else _torch.addmm(c, a, b.T, out_dtype=d.dtype)
        d.copy_(product)
    else:
        a, b = a.float(), b.float()  # products of bf16 are exact in fp32
        torch.mm(a, b.T, out=d) if c is None else torch.addmm(c, a, b.T, out=d)


def _transposed(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor) or x.dim() != 2:
        raise ProblemError(f"{name} is {_described(x)}; accepted is a matrix")
    return x.T


def _described(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
