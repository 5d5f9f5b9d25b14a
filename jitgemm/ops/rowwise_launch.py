"""From a row-wise operation on tensors to a launch, or to the reference: plans, and where scales go."""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jitgemm import settings
from jitgemm.errors import ProblemError
from jitgemm.families import KernelSpec, family_of
from jitgemm.families.rowwise import CHUNK, FAMILY, PARAMS, POINTERS, REALS, SIZES, STRIDES, RowwiseProblem
from jitgemm.heuristics import rowwise as heuristics
from jitgemm.nvtx import in_range
from jitgemm.plan import BOUND_LAUNCHES, Table, current_device, device_facts, raw_stream
from jitgemm.problem import Problem
from jitgemm.record import record
from jitgemm.reference import layout
from jitgemm.reference import rowwise as reference
from jitgemm.reference.quantize import ceil_div

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
E8M0: torch.dtype = getattr(torch, "float8_e8m0fnu", torch.uint8)
"""The dtype of scales that are exponents, a byte each; torch before 2.7 has none of its own."""

LAYOUTS = ("row_major", "col_major", "mn_major_tma_aligned")
MAX_ROWS, MAX_COLUMNS = 2**31 - 2**16, 65535 * 16 * CHUNK
_ALIGNMENT = 16  # bytes, of a vector load
_CODES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8, "e2m1": torch.uint8}


@dataclass(frozen=True, eq=False)
class Quantizer:
    """How rows become codes and scales. Made once for each set of arguments: keys of plans compare by identity.

    Args:
        format: of the codes: e4m3, int8 or e2m1 (two to a byte).
        scales: their kind, see ``RowwiseProblem``.
        group: columns that share one, or ``WHOLE_ROW``.
        layout: a name in ``LAYOUTS``.
        packed: four exponents to an int32.
        ties: where a tie of E2M1 goes.
        padding: byte that fills up the last int32 of a row.
    """

    format: str
    scales: str
    group: int
    layout: str = "row_major"
    packed: bool = False
    ties: str = "even"
    padding: int = 0

    def empty(self, x: Tensor, rows: Sequence[int], columns: int) -> tuple[Tensor, Tensor]:
        """Codes [*rows, columns] (E2M1: half as many) and their scales, on the device of ``x``."""
        width = columns // 2 if self.format == "e2m1" else columns
        codes = x.new_empty((*rows, width), dtype=_CODES[self.format])
        group = self.group or columns
        groups = -(-columns // (4 * group if self.packed else group))
        if self.layout == "row_major":
            return codes, x.new_empty((*rows, groups), dtype=self.scale_dtype)
        if self.layout == "col_major":
            return codes, x.new_empty((groups, rows[0]), dtype=self.scale_dtype).t()
        return codes, layout.empty_mn_major((rows[0], groups), self.scale_dtype, x.device)

    @functools.cached_property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of the scales."""
        if self.packed:
            return torch.int32
        return {"ue8m0": E8M0, "ue4m3": torch.float8_e4m3fn}.get(self.scales, torch.float32)

    def scale_strides(self, scales: Tensor) -> tuple[int, int, int]:
        """Bytes to the next row, to the next four groups and from one of these to the next."""
        size, column = scales.element_size(), scales.stride(-1)
        row = scales.stride(-2) if scales.dim() > 1 else 0  # of a single row
        if self.packed:
            return row * size, column * size, 1
        return row * size, 4 * column * size, column * size

    def write(self, quantized: reference.Quantized, codes: Tensor, scales: Tensor) -> None:
        """Put what the reference gives into tensors of these kinds."""
        data = reference.pack_nibbles(quantized.codes) if self.format == "e2m1" else quantized.codes
        codes.view(data.dtype).copy_(data.reshape(codes.shape))
        if quantized.scale_codes is None or scales.dtype == torch.float32:
            scales.copy_(quantized.scales.reshape(scales.shape))
        elif scales.dtype == torch.int32:
            words = reference.pad_groups(quantized.scale_codes, 4, self.padding).flatten().view(torch.int32)
            scales.copy_(words.view(scales.shape))
        else:
            scales.view(torch.uint8).copy_(quantized.scale_codes.reshape(scales.shape))


@dataclass(frozen=True, eq=False)
class Operation:
    """What is done with each row, but for sizes and types of tensors. Made by ``operation_of``.

    Args:
        op: a name in ``families.rowwise.OPS``.
        quantizer: of the result, if it is quantized.
        round_trip: write what the codes stand for.
        round_first: quantize values that were rounded to the type of the input.
        norm: divide each row by its root mean square first.
        inverse: rotate back.
        eps: what is added to the mean square.
        limit: of SwiGLU.
    """

    op: str
    quantizer: Quantizer | None = None
    round_trip: bool = False
    round_first: bool = False
    norm: bool = False
    inverse: bool = False
    eps: float = 0.0
    limit: float = float("inf")


operation_of = functools.lru_cache(maxsize=1024)(Operation)
"""``Operation``, the same object for the same arguments."""


@dataclass(frozen=True)
class Staging:
    """Top-k indices and weights that a quantizer copies on its way, each [m, k]."""

    ids: Tensor
    weights: Tensor
    ids_out: Tensor
    weights_out: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """All four."""
        return self.ids, self.weights, self.ids_out, self.weights_out


def on_gpu(x: Tensor) -> bool:
    """Whether a kernel computes; else the reference does."""
    return x.is_cuda


def rows_of(x: Tensor) -> tuple[int, int] | None:
    """How many rows a tensor has, and the elements between two of them; None if that is not one number."""
    if x.dim() == 2:
        return x.shape[0], x.stride(0)
    rows, stride = 1, x.shape[-1]
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if rows == 1:
            stride = step
        elif step != rows * stride:
            return None
        rows *= size
    return rows, stride


def in_rows(x: Tensor) -> Tensor:
    """``x``, or a copy whose rows are contiguous and equally far apart."""
    if x.is_contiguous():
        return x
    return x if (x.stride(-1) == 1 or x.shape[-1] == 1) and rows_of(x) is not None else x.contiguous()


def launch(
    operation: Operation,
    x: Tensor,
    columns: int,
    *,
    values: Tensor | None = None,
    codes: Tensor | None = None,
    scales: Tensor | None = None,
    weight: Tensor | None = None,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
    staging: Staging | None = None,
) -> None:
    """Launch the kernel of an operation on checked CUDA tensors, on the current stream of their device.

    Args:
        operation: what to do.
        x: what is read: rows as ``rows_of`` says, or [tokens, heads, columns] of any strides but the last where
            ``positions`` are given.
        columns: of the result.
        values: written in the type of ``x``; may be ``x`` itself.
        codes: written.
        scales: of these.
        weight: of the norm [columns]; for SwiGLU fp32 [m].
        positions: [tokens].
        cos_sin: fp32 [positions, rope_dim].
        staging: copied on the way.
    """
    if not x.numel():
        return
    device = x.get_device()
    if current_device() != device:
        with torch.cuda.device(device):
            launch(
                operation, x, columns, values=values, codes=codes, scales=scales, weight=weight,
                positions=positions, cos_sin=cos_sin, staging=staging,
            )  # fmt: skip
        return
    addresses = (
        x.data_ptr(),
        0 if values is None else values.data_ptr(),
        0 if codes is None else codes.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if positions is None else positions.data_ptr(),
        0 if cos_sin is None else cos_sin.data_ptr(),
        *((0, 0, 0, 0) if staging is None else (tensor.data_ptr() for tensor in staging.tensors())),
    )
    in_force = settings.current()
    # All but the address of an output follows from these, unless it is the caller's: ``x`` itself, or with staging.
    key = (
        operation, in_force.generation, device, x.shape, x.stride(), x.dtype, _misalignment(operation, addresses),
        None if weight is None else weight.dtype, None if positions is None else positions.dtype,
        None if cos_sin is None else cos_sin.shape,
        None if staging is None or codes is None or scales is None
        else (
            codes.stride(), scales.stride(), staging.ids.dtype, staging.ids.shape,
            *(tensor.stride() for tensor in staging.tensors()),
        ),
    )  # fmt: skip
    plan = plans.get(key)
    if plan is None:
        tensors = (x, values, codes, scales, weight, positions, cos_sin)
        plan = plans.put(key, _make_plan(operation, tensors, columns, staging, addresses, in_force, device))
    plan(addresses)


def tell(operation: Operation, x: Tensor, columns: int, **tensors: Any) -> None:
    """Record the problem of a call that the reference computes, if the settings ask for it."""
    path = settings.current().record
    if path is not None and x.numel():
        record(path, problem_of(operation, x, columns, aligned=columns % CHUNK == 0, **tensors))


def problem_of(
    operation: Operation,
    x: Tensor,
    columns: int,
    *,
    aligned: bool,
    values: Tensor | None = None,
    weight: Tensor | None = None,
    positions: Tensor | None = None,
    staging: Staging | None = None,
) -> RowwiseProblem:
    """The problem that a call is."""
    quantizer = operation.quantizer
    index = staging.ids if staging is not None else positions
    norm = "none"
    if operation.norm:
        norm = "plain" if weight is None else DTYPES[weight.dtype]
    return RowwiseProblem(
        op=operation.op,
        n=columns,
        m=x.numel() // x.shape[-1],
        dtype=DTYPES[x.dtype],
        format="values" if quantizer is None else quantizer.format,
        scales="none" if quantizer is None else quantizer.scales,
        group=0 if quantizer is None else quantizer.group,
        ties="even" if quantizer is None else quantizer.ties,
        round_trip=operation.round_trip,
        values=quantizer is not None and not operation.round_trip and values is not None,
        round_first=operation.round_first,
        norm=norm,
        inverse=operation.inverse,
        index="none" if index is None else str(index.dtype).removeprefix("torch."),
        stage=staging is not None,
        aligned=aligned,
    )


plans: Table[Any, Plan] = Table(4096)


def forget_plans() -> None:
    """Make plans anew."""
    plans.clear()


os.register_at_fork(after_in_child=forget_plans)


class Plan:
    """A loaded kernel with all of its parameters but the addresses, which come first among them.

    Args:
        spec: of the kernel.
        problem: what it is needed for.
        params: with room for the addresses.
        grid: blocks.
        sizes: that a profiler should see.
        in_force: settings.
        device: ordinal.
    """

    def __init__(
        self,
        spec: KernelSpec,
        problem: Problem,
        params: bytes,
        grid: tuple[int, int],
        sizes: str,
        in_force: settings.Settings,
        device: int,
    ) -> None:
        from jitgemm.driver import Launch  # the CUDA path only: CPU tensors need no driver
        from jitgemm.kernel import load

        if in_force.record is not None:
            record(in_force.record, problem)
        kernel = load(spec, device, problem)
        self._launch = Launch(kernel.handle, (*grid, 1), kernel.num_threads, 0, device, in_force.pdl)
        self._params, self._device = params, device
        self._range = f"jitgemm {family_of(spec).describe(spec)} {sizes}" if in_force.nvtx else None
        self._bound: Table[tuple[int, ...], Callable[[], int]] = Table(BOUND_LAUNCHES)

    def __call__(self, addresses: tuple[int, ...]) -> None:
        """Launch with tensors at these addresses, on the current stream."""
        key = (raw_stream(self._device), *addresses)
        run = self._bound.get(key) or self._bind(key)
        status = run()
        if status:
            self._launch.retry(run, status)

    def _bind(self, key: tuple[int, ...]) -> Callable[[], int]:
        from jitgemm.driver import Arguments

        arguments = Arguments(len(self._params))
        ctypes.memmove(arguments.address, self._params, len(self._params))
        for index, address in enumerate(key[1:]):
            arguments.words[arguments.first + index] = address
        run = self._launch.prepare(arguments, key[0])
        return self._bound.put(key, run if self._range is None else in_range(self._range, run))


def _make_plan(
    operation: Operation,
    tensors: tuple[Tensor | None, ...],
    columns: int,
    staging: Staging | None,
    addresses: tuple[int, ...],
    in_force: settings.Settings,
    device: int,
) -> Plan:
    x, values, codes, scales, weight, positions, cos_sin = tensors
    assert x is not None
    sizes, strides = dict.fromkeys(SIZES, 0), dict.fromkeys(STRIDES, 0)
    strides["x_row"], strides["x_head"] = _row_and_head(x, positions)
    if values is not None:
        strides["values_row"], strides["values_head"] = _row_and_head(values, positions)
    if codes is not None:
        strides["codes_row"], strides["codes_head"] = _row_and_head(codes, positions)
    quantizer = operation.quantizer
    if scales is not None and quantizer is not None:
        strides["scale_row"], strides["scale_word"], strides["scale_group"] = quantizer.scale_strides(scales)
        sizes["padding"] = quantizer.padding
    if staging is not None:
        for name, tensor in zip(("ids", "weights", "ids_out", "weights_out"), staging.tensors(), strict=True):
            strides[f"{name}_row"], strides[f"{name}_column"] = tensor.stride()
        sizes["topk"] = staging.ids.shape[1]
    if cos_sin is not None:
        strides["num_positions"], sizes["rope_dim"] = cos_sin.shape

    steps = (strides[name] * x.element_size() for name in ("x_row", "x_head", "values_row", "values_head"))
    aligned = columns % CHUNK == 0 and not any(step % _ALIGNMENT for step in steps)
    aligned = aligned and _misalignment(operation, addresses) == 0
    if quantizer is not None:  # codes are written with as many columns at a time as rows are multiples of
        together = math.gcd(columns, 2 * CHUNK) // (2 if quantizer.format == "e2m1" else 1)
        aligned = aligned and strides["codes_row"] % together == 0
    problem = problem_of(
        operation, x, columns, aligned=aligned, values=values, weight=weight, positions=positions, staging=staging
    )
    assert problem.m is not None
    if problem.m > MAX_ROWS or columns > MAX_COLUMNS:
        raise ProblemError(f"x has {problem.m} rows of {columns}; accepted are at most {MAX_ROWS} of {MAX_COLUMNS}")

    heads = 1 if positions is None else x.shape[1]
    packed = quantizer is not None and quantizer.packed
    group = 1 if quantizer is None else quantizer.group or columns
    unit = 4 * group if packed and positions is None else group  # heads have no columns between them
    sizes |= {"m": problem.m // heads, "n": columns, "heads": heads, "scale_columns": ceil_div(columns, unit) * unit}
    reals = {"eps": operation.eps, "limit": operation.limit}
    params = PARAMS.pack(
        *(0 for _ in POINTERS),
        *(strides[name] for name in STRIDES),
        *(sizes[name] for name in SIZES),
        *(reals[name] for name in REALS),
    )
    preset, num_sms = device_facts(device)
    config = heuristics.choose_config(problem, preset.with_num_sms(min(num_sms, in_force.num_sms or num_sms)))
    grid = (ceil_div(problem.m, config.rows), ceil_div(max(columns, sizes["scale_columns"]), config.columns))
    spec = FAMILY.spec(problem, config, preset.arch.name)
    return Plan(spec, problem, params, grid, f"m={problem.m} n={columns}", in_force, device)


def _misalignment(operation: Operation, addresses: tuple[int, ...]) -> int:
    """Not 0 where something that is read or written in vectors starts elsewhere than at a multiple of 16 bytes."""
    x, values, codes, _, weight, _, cos_sin, *_ = addresses
    return (x | values | codes | cos_sin | (0 if operation.op == "swiglu" else weight)) % _ALIGNMENT


def _row_and_head(x: Tensor, positions: Tensor | None) -> tuple[int, int]:
    """Elements between rows, and between heads of a row."""
    if positions is not None:
        return x.stride(0), x.stride(1)
    rows = rows_of(x)
    assert rows is not None
    return rows[1], 0
