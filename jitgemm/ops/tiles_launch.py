"""Launches of the casts of tiles, on checked CUDA tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from jitgemm import settings
from jitgemm.errors import ProblemError
from jitgemm.families.rowwise import CHUNK
from jitgemm.families.tiles import FAMILY, PARAMS, TileProblem
from jitgemm.ops.plain import MAX_GRID_Y
from jitgemm.ops.rowwise_launch import DTYPES, MAX_ROWS, Plan, in_rows, plans
from jitgemm.plan import current_device, device_facts
from jitgemm.record import record
from jitgemm.reference.quantize import ceil_div

_ALIGNMENT = 16  # bytes, of a vector load


def cast_tiles(op: str, x: Tensor, use_ue8m0: bool, gran: int) -> tuple[Tensor, Tensor]:
    """E4M3 of a matrix, ``per_block`` or ``per_channel``, and its scales."""
    x = in_rows(x)
    rows, columns = x.shape
    group_columns = 1 if op == "per_channel" else gran
    codes = x.new_empty((rows, columns), dtype=torch.float8_e4m3fn)
    scales = x.new_empty((ceil_div(rows, gran), ceil_div(columns, group_columns)), dtype=torch.float32)
    _launch(op, "pow2" if use_ue8m0 else "fp32_reciprocal", (gran, group_columns), x, codes, scales)
    return codes, scales


def tell_tiles(op: str, x: Tensor, use_ue8m0: bool, gran: int) -> None:
    """Record the problem of a call that the reference computes, if the settings ask for it."""
    path = settings.current().record
    if path is not None and x.numel():
        group = gran, 1 if op == "per_channel" else gran
        kind = "pow2" if use_ue8m0 else "fp32_reciprocal"
        record(path, TileProblem(op, kind, *group, DTYPES[x.dtype], x.shape[1] % CHUNK == 0))


def cast_back_tiles(x: Tensor, sf: Tensor, rows: int, columns: int, packed: bool, dtype: torch.dtype) -> Tensor:
    """E4M3 times scales of groups of rows x columns, 0 for all."""
    x = in_rows(x)
    values = x.new_empty(x.shape, dtype=dtype)
    if values.numel():
        _launch("cast_back", "packed" if packed else "fp32", (rows, columns), values, x, sf)
    return values


def _launch(op: str, kind: str, group: tuple[int, int], values: Tensor, codes: Tensor, scales: Tensor) -> None:
    device = values.get_device()
    if current_device() != device:
        with torch.cuda.device(device):
            _launch(op, kind, group, values, codes, scales)
        return
    addresses = (values.data_ptr(), codes.data_ptr(), scales.data_ptr())
    in_force = settings.current()
    misaligned = (addresses[0] | addresses[1]) % _ALIGNMENT
    key = (
        op, kind, group, in_force.generation, device, values.shape, values.dtype, values.stride(), codes.stride(),
        scales.stride(), misaligned,
    )  # fmt: skip
    plan = plans.get(key)
    if plan is None:
        rows, columns = values.shape
        steps = values.stride(0) * values.element_size() % _ALIGNMENT, codes.stride(0) % CHUNK, columns % CHUNK
        problem = TileProblem(op, kind, *group, DTYPES[values.dtype], not misaligned and not any(steps))
        spec = FAMILY.spec(problem, device_facts(device)[0].arch.name)
        most = MAX_GRID_Y * FAMILY.tile_columns(spec)
        if rows > MAX_ROWS or columns > most:
            raise ProblemError(f"x has {rows} rows of {columns}; accepted are at most {MAX_ROWS} of {most}")
        strides = (values.stride(0), codes.stride(0), *scales.stride())
        grid = (ceil_div(rows, FAMILY.tile_rows(spec)), ceil_div(columns, FAMILY.tile_columns(spec)))
        params = PARAMS.pack(0, 0, 0, *strides, rows, columns)
        plan = plans.put(key, Plan(spec, problem, params, grid, f"m={rows} n={columns}", in_force, device))
    plan(addresses)
