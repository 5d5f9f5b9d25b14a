"""Checks of arguments that the operations share."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from jitgemm.errors import ProblemError

Scaled = tuple[Tensor, Tensor]
"""An FP8 operand: e4m3 data and scales."""


def pair(name: str, operand: Any) -> Scaled:
    """The parts of an FP8 operand.

    Raises:
        ProblemError: it has not two.
    """
    if not isinstance(operand, (tuple, list)) or len(operand) != 2:
        raise ProblemError(f"{name} is {type(operand).__name__}; accepted is a pair (e4m3 tensor, scales)")
    return operand[0], operand[1]


def check_tensors(**tensors: object) -> None:
    """Check that arguments are strided tensors.

    Raises:
        ProblemError: one is not.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ProblemError(f"{name} is {type(tensor).__name__}; accepted is a torch.Tensor")
        if tensor.layout != torch.strided:
            raise ProblemError(f"{name} has layout {tensor.layout}; accepted is torch.strided")


def extent(tensor: Tensor | None) -> int:
    """Elements from the first to behind the last."""
    if tensor is None or 0 in tensor.shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def integer_of(value: Any) -> int | None:
    """An integer, NumPy's too; None for anything else, booleans and tensors among it."""
    if isinstance(value, (bool, Tensor)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def span_of(tensor: Tensor | None) -> int:
    """Bytes from the first element to behind the last."""
    return 0 if tensor is None else extent(tensor) * tensor.element_size()


def check_apart(output: str, address: int, span: int, others: Iterable[tuple[str, int, int]]) -> None:
    """Check that an output lies apart from other tensors, given as names, addresses and spans in bytes.

    What has no bytes overlaps nothing, wherever it is.

    Raises:
        ProblemError: it overlaps one.
    """
    end = address + span if span else 0
    for name, other, length in others:
        if other < end and address < other + length and length:
            same = "; c may be d itself, with the same strides" if name == "c" else ""
            raise ProblemError(f"{output} overlaps {name}; accepted is an output apart from the other tensors{same}")


MAX_FP32 = 3.4028234663852886e38


def check_elements_apart(name: str, tensor: Tensor) -> None:
    """Check that no two elements of an output are one.

    Raises:
        ProblemError: they are.
    """
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride <= reach:
            raise ProblemError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; its elements overlap"
            )
        reach += (size - 1) * stride
