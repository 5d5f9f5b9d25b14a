"""The kernel that adds up parts of a sum, emulated: its order bit by bit, poison around what it reads and writes."""

from __future__ import annotations

import pytest
import torch
from emulation import COMPILER
from emulation.plain import EmulatedGpu
from sums import in_order, some_parts, within

from jitgemm.ops.batched import launch_of_sum

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("c_kind", ["none", "d", "separate"])
@pytest.mark.parametrize(
    ("num_parts", "m", "n"), [(2, 3, 8), (7, 5, 9), (11, 1, 1), (44, 4, 130), (43, 17, 3), (132, 2, 20), (264, 3, 7)]
)
def test_the_kernel(num_parts: int, m: int, n: int, c_kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_parts)
    padded, parts = some_parts(num_parts, m, n, generator)
    values = (torch.randn(m, n, generator=generator) * 8).to(dtype)
    for columns, first in (
        (n + -n % 8 + 8, 0),
        (n + 5, 1),
        (n + -n % 8 + 8, 4),
    ):  # 16-byte rows; odd ones; 4 columns on
        d, around = within(values if c_kind == "d" else torch.full_like(values, torch.nan), columns, first)
        c = d if c_kind == "d" else within(values, columns + 3, 2)[0] if c_kind == "separate" else None
        expected = in_order(parts, c, dtype)
        launch = launch_of_sum(EmulatedGpu(), num_parts, d, c)  # type: ignore[arg-type]
        launch(0, padded.data_ptr(), 0 if c is None else c.data_ptr(), d.data_ptr())
        assert torch.equal(d, expected)
        d.fill_(torch.nan)
        assert bool(around.isnan().all())


def test_rows_of_c_may_be_one() -> None:
    parts, row = torch.randn(9, 6, 12, generator=torch.Generator().manual_seed(1)), torch.arange(12.0)
    d, c = torch.full((6, 12), torch.nan), row.expand(6, 12)
    launch_of_sum(EmulatedGpu(), 9, d, c)(0, parts.data_ptr(), c.data_ptr(), d.data_ptr())  # type: ignore[arg-type]
    assert torch.equal(d, in_order(parts, c, torch.float32))


def test_nan_and_infinity_stay_where_they_are() -> None:
    parts = torch.ones(20, 2, 8)
    parts[13, 0, 3], parts[19, 1, 7], parts[0, 1, 0] = torch.nan, torch.inf, -torch.inf
    d = torch.zeros(2, 8)
    launch_of_sum(EmulatedGpu(), 20, d, None)(0, parts.data_ptr(), 0, d.data_ptr())  # type: ignore[arg-type]
    torch.testing.assert_close(d, parts.sum(0), equal_nan=True)
