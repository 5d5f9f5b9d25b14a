"""Kernels whose parameters are pointers and numbers: their families, and how they are launched."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jitgemm.families.base import KernelSpec, Scalar

if TYPE_CHECKING:
    from jitgemm.kernel import Kernel

_CODES = {"int64_t": "q", "int32_t": "i", "float": "f"}  # C types and ``struct``'s codes


class Field(NamedTuple):
    """A member of a kernel's ``Params``."""

    name: str
    type: str
    """C type: a pointer, ``int64_t``, ``int32_t`` or ``float``, the wider ones first."""
    remark: str = ""

    @property
    def is_pointer(self) -> bool:
        """Whether it is an address, which is given at each launch."""
        return self.type.endswith("*")


class PlainFamily:
    """A family whose template takes one ``Params``, which is written down here only.

    Args:
        name: of the family, its template and, after ``jitgemm_``, its kernels.
        fields: of ``Params``: pointers, then numbers, by falling size.
        num_threads: of a block.
        describe: a spec's constants for people.
        smem_bytes: a block's dynamic shared memory by spec; none by default.
    """

    def __init__(
        self,
        name: str,
        fields: Sequence[Field],
        num_threads: int,
        describe: Callable[[KernelSpec], str] = lambda _: "",
        smem_bytes: Callable[[KernelSpec], int] = lambda _: 0,
    ) -> None:
        self.name, self.template, self.fields = name, f"{name}.cu.jinja", tuple(fields)
        self._threads, self._describe, self._smem_bytes = num_threads, describe, smem_bytes
        self.pointers = tuple(field.name for field in fields if field.is_pointer)
        codes = "".join("Q" if field.is_pointer else _CODES[field.type] for field in fields)
        self.params = struct.Struct(f"<{codes}")
        self.params_bytes = -(-self.params.size // 8) * 8

    def spec(self, arch: str, **constants: Scalar) -> KernelSpec:
        """The spec of a kernel."""
        return KernelSpec.make(self.name, arch, constants)

    def kernel_name(self, spec: KernelSpec) -> str:
        """Symbol of the kernel's entry."""
        return f"jitgemm_{self.name}"

    def render_context(self, spec: KernelSpec) -> dict[str, object]:
        """Values that the template names."""
        members = [
            f"  {field.type} {field.name};" + (f"  // {field.remark}" if field.remark else "") for field in self.fields
        ]
        params = "\n".join(["struct Params {", *members, "};"])
        return {
            **dict(spec.constants),
            "kernel_name": self.kernel_name(spec),
            "threads": self._threads,
            "params": params,
        }

    def num_threads(self, spec: KernelSpec) -> int:
        """Threads of a block."""
        return self._threads

    def smem_bytes(self, spec: KernelSpec) -> int:
        """Dynamic shared memory of a block, in bytes."""
        return self._smem_bytes(spec)

    def describe(self, spec: KernelSpec) -> str:
        """One line for people."""
        return f"{self.name} {self._describe(spec)}".rstrip()


class PlainLaunch:
    """A launch of a kernel of a ``PlainFamily``: all but the addresses.

    Args:
        family: of the kernel.
        kernel: loaded.
        grid: blocks.
        numbers: the fields of ``Params`` that are no pointers, by name.
        pdl: launch with programmatic dependent launch.
        range_name: of the NVTX range around launches; None: there is none.
    """

    def __init__(
        self,
        family: PlainFamily,
        kernel: Kernel,
        grid: tuple[int, int, int],
        numbers: Mapping[str, int | float],
        pdl: bool,
        range_name: str | None = None,
    ) -> None:
        from jitgemm.driver import Launch
        from jitgemm.plan import BOUND_LAUNCHES, Table

        self.pointers = family.pointers
        self._size, self._range = family.params_bytes, range_name
        zeros = [0] * len(family.pointers)
        values = [numbers[field.name] for field in family.fields if not field.is_pointer]
        self._params = family.params.pack(*zeros, *values)
        self._launch = Launch(kernel.handle, grid, kernel.num_threads, kernel.smem_bytes, kernel.device, pdl)
        self._bound: Table[tuple[int, ...], Callable[[], int]] = Table(BOUND_LAUNCHES)

    def __call__(self, stream: int, *addresses: int) -> None:
        """Enqueue the kernel on a stream; the addresses are in the order of the family's ``pointers``.

        Raises:
            DriverError: the driver refused the launch.
        """
        key = (stream, *addresses)
        run = self._bound.get(key) or self._bound.put(key, self._bind(stream, addresses))
        status = run()
        if status:
            self._launch.retry(run, status)

    def _bind(self, stream: int, addresses: tuple[int, ...]) -> Callable[[], int]:
        from jitgemm.driver import Arguments

        arguments = Arguments(self._size)
        ctypes.memmove(arguments.address, self._params, len(self._params))
        for index, (_, address) in enumerate(zip(self.pointers, addresses, strict=True)):
            arguments.words[arguments.first + index] = address
        run = self._launch.prepare(arguments, stream)
        if self._range is None:
            return run
        from jitgemm.nvtx import in_range

        return in_range(self._range, run)
