"""What the operations around hyper-connections and experts share: checks of arguments, and plans."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jitgemm import settings
from jitgemm.errors import ProblemError
from jitgemm.families.base import KernelSpec
from jitgemm.families.plain import PlainFamily, PlainLaunch
from jitgemm.families.small_problem import SmallProblem
from jitgemm.kernel import load
from jitgemm.plan import Table, current_device, device_facts, matcher
from jitgemm.problem import Problem
from jitgemm.record import record

ALIGNMENT = 16  # bytes: of a load
MAX_GRID = 2**31 - 1
MAX_GRID_Y = 2**16 - 1


def check_tensor(
    name: str,
    tensor: object,
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    shape: Sequence[int | str],
    like: Tensor | None = None,
) -> None:
    """Check a tensor's kind.

    Args:
        name: of the argument.
        tensor: the argument.
        dtypes: that are accepted.
        shape: sizes; a name stands for any.
        like: a tensor whose device it must be on.

    Raises:
        ProblemError: it is not of that kind.
    """
    if not isinstance(tensor, Tensor):
        raise ProblemError(f"{name} is {type(tensor).__name__}; accepted is a torch.Tensor")
    if tensor.layout != torch.strided:
        raise ProblemError(f"{name} has layout {tensor.layout}; accepted is torch.strided")
    accepted = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    if tensor.dtype not in accepted:
        raise ProblemError(f"{name} has dtype {tensor.dtype}; accepted is {' or '.join(map(str, accepted))}")
    same = tensor.dim() == len(shape) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not same:
        raise ProblemError(f"{name} has shape {list(tensor.shape)}; accepted is [{', '.join(map(str, shape))}]")
    if like is not None and tensor.device != like.device:
        raise ProblemError(f"{name} is on {tensor.device}; accepted is {like.device}, where the others are")


def check_number(name: str, value: object, low: float, high: float, kind: type = int) -> None:
    """Check a number's type and range.

    Raises:
        ProblemError: it is another.
    """
    types = (int, float) if kind is float else (int,)
    if not isinstance(value, types) or isinstance(value, bool) or not low <= value <= high:
        what = "an integer" if kind is int else "a number"
        raise ProblemError(f"{name} is {value!r}; accepted is {what} from {low} to {high}")


def check_choice(name: str, value: object, accepted: Sequence[object]) -> None:
    """Check that a value is one of several.

    Raises:
        ProblemError: it is none.
    """
    if value not in accepted:
        raise ProblemError(f"{name} is {value!r}; accepted is {' or '.join(map(repr, accepted))}")


def check_contiguous(**tensors: Tensor | None) -> None:
    """Check that tensors are contiguous, as kernels read and write them.

    Raises:
        ProblemError: one is not.
    """
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            shape, strides = list(tensor.shape), tensor.stride()
            raise ProblemError(f"{name} has shape {shape} and strides {strides}; accepted is a contiguous tensor")


def check_rows(name: str, tensor: Tensor) -> None:
    """Check that a matrix's rows can be read 16 bytes at a time.

    Raises:
        ProblemError: they can't.
    """
    width, size = tensor.shape[1], tensor.element_size()
    row_stride = tensor.stride(0) if tensor.shape[0] > 1 else width
    if width * size % ALIGNMENT:
        raise ProblemError(f"{name} has rows of {width * size} bytes; accepted is a multiple of {ALIGNMENT}")
    if (tensor.stride(1) != 1 and width > 1) or row_stride * size % ALIGNMENT or row_stride < width:
        raise ProblemError(
            f"{name} has strides {tensor.stride()}; accepted is stride 1 along a row, and rows that don't overlap and"
            f" start a multiple of {ALIGNMENT} bytes apart"
        )


def row_stride(tensor: Tensor) -> int:
    """Elements between the rows of a checked matrix; with one row it means nothing, and may be anything."""
    return tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1]


def check_aligned(names: Sequence[str], addresses: Sequence[int]) -> None:
    """Check that tensors start where 16 bytes can be loaded.

    Raises:
        ProblemError: one does not; ``names`` and ``addresses`` go together.
    """
    for name, address in zip(names, addresses, strict=False):
        if address % ALIGNMENT:
            raise ProblemError(f"{name} starts at address {address:#x}; accepted is a multiple of {ALIGNMENT} bytes")


def on_gpu(tensor: Tensor) -> bool:
    """Whether kernels compute, not the reference.

    Raises:
        ProblemError: neither can.
    """
    kind = tensor.device.type
    if kind not in ("cuda", "cpu"):
        raise ProblemError(f"tensors are on {tensor.device}; accepted are CUDA and CPU tensors")
    return kind == "cuda"


def keys_of(*tensors: object) -> tuple[object, ...]:
    """All of tensors but their addresses; of what is no tensor its type, for a check to refuse it."""
    return tuple(
        (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) if isinstance(tensor, Tensor) else type(tensor)
        for tensor in tensors
    )


Call = Callable[..., Any]
"""A plan: takes the tensors of a call that is like the one it was made for."""

_plans: Table[Any, Call] = Table(4096)
_recent: dict[str, tuple[settings.Settings, object, Callable[..., bool], Call]] = {}
"""Of each kind the last plan, behind its settings, its numbers and a function that knows tensors like its own."""


def forget_plans() -> None:
    """Make plans anew."""
    _plans.clear()
    _recent.clear()


os.register_at_fork(after_in_child=forget_plans)


def plan_of(kind: str, tensors: Sequence[object], numbers: tuple[object, ...], make: Callable[[], Call]) -> Call:
    """The plan of calls with such tensors and numbers under the settings in force; made at the first.

    Args:
        kind: of the call.
        tensors: its arguments that are tensors, or None; anything else is for ``make`` to refuse.
        numbers: its other arguments.
        make: makes the plan.
    """
    in_force = settings.current()
    absent = tuple(tensor is None for tensor in tensors)
    given = [tensor for tensor in tensors if tensor is not None] if True in absent else tensors
    recent = _recent.get(kind)
    if recent is not None and recent[0] is in_force and recent[1] == (absent, numbers):
        try:
            if recent[2](*given):
                return recent[3]
        except TypeError:  # no tensor
            pass
    full = kind, in_force.generation, keys_of(*tensors), numbers
    try:
        plan = _plans.get(full) or _plans.put(full, make())
    except TypeError:  # an argument that has no hash, which no check accepts
        return make()
    like = matcher([tensor for tensor in given if isinstance(tensor, Tensor)])
    _recent[kind] = in_force, (absent, numbers), like, plan
    return plan


def record_if_asked(problem: SmallProblem) -> None:
    """Add a problem to the file of ``JITGEMM_RECORD``."""
    if (path := settings.current().record) is not None:
        record(path, problem)


class Gpu:
    """Where a plan's kernels run.

    Args:
        tensor: on it.
        problem: that kernels are needed for, as messages name it.
    """

    def __init__(self, tensor: Tensor, problem: Problem) -> None:
        self.ordinal, self._problem = tensor.get_device(), problem
        device, num_sms = device_facts(self.ordinal)
        self.arch = device.arch.name
        self._settings = settings.current()
        self.num_sms = min(num_sms, self._settings.num_sms or num_sms)

    def launch(
        self,
        family: PlainFamily,
        spec: KernelSpec,
        grid: tuple[int, int] | tuple[int],
        follows: bool = False,
        **numbers: int | float,
    ) -> PlainLaunch:
        """The launch of a kernel, loaded.

        Args:
            family: of the kernel.
            spec: of the kernel.
            grid: blocks.
            follows: it is launched behind a kernel that lets it begin early, whatever the setting ``pdl``.
            **numbers: fields of its ``Params``.

        Raises:
            ProblemError: it would be larger than a grid can be.
        """
        x, y = (*grid, 1)[:2]
        if x > MAX_GRID or y > MAX_GRID_Y:
            raise ProblemError(f"the call takes a grid of {x} x {y} blocks; accepted are {MAX_GRID} x {MAX_GRID_Y}")
        kernel = load(spec, self.ordinal, self._problem)
        range_name = f"jitgemm {family.describe(spec)} grid {x}x{y}" if self._settings.nvtx else None
        return PlainLaunch(family, kernel, (x, y, 1), numbers, self._settings.pdl or follows, range_name)

    def here(self, call: Call) -> Call:
        """The plan with this device current while it runs."""
        ordinal = self.ordinal

        def on_device(*tensors: Any) -> Any:
            if current_device() == ordinal:
                return call(*tensors)
            with torch.cuda.device(ordinal):
                return call(*tensors)

        return on_device


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator ``torch.ops.jitgemm.*`` of a schema without the namespace."""
    name, signature = schema.split("(", 1)
    full = f"jitgemm::{name}"
    # Not by ``torch.library.custom_op``, which would pass every call through two more layers of Python.
    torch.library.define(full, f"({signature}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(full, ("cpu", "cuda"), implementation)
    torch.library.register_fake(full, fake)
