"""What the kernel that adds up parts of a sum should give, bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor

from jitgemm.families.sum_parts import ways_of


def in_order(parts: Tensor, c: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum as it is documented: a way's parts in turn, then the ways, then C; FP32 until the end."""
    ways, sums = ways_of(len(parts)), []
    for way in range(ways):
        total = torch.zeros_like(parts[0])
        for part in parts[way::ways]:
            total = total + part
        sums.append(total)
    total = sums[0]
    for one in sums[1:]:
        total = total + one
    return (total if c is None else total + c.float()).to(dtype)


def some_parts(num_parts: int, m: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Parts as the kernel reads them, NaN behind the n-th column, and without these columns.

    They are orders of magnitude apart, so that in another order they have another sum.
    """
    device = generator.device
    padded = torch.full((num_parts, m, -(-n // 4) * 4), torch.nan, device=device)
    parts = padded[..., :n]
    magnitudes = torch.exp2(torch.randint(-12, 12, parts.shape, generator=generator, device=device).float())
    parts.copy_(torch.randn(parts.shape, generator=generator, device=device) * magnitudes)
    return padded, parts


def within(values: Tensor, columns: int, first: int) -> tuple[Tensor, Tensor]:
    """A matrix of these values inside one of NaN, and that."""
    m, n = values.shape
    around = torch.full((m, columns), torch.nan, dtype=values.dtype, device=values.device)
    inside = around[:, first : first + n]
    inside.copy_(values)
    return inside, around
