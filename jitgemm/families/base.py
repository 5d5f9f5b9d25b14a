"""What a family of kernels brings, and the ``KernelSpec`` that names one kernel of it.

Rendering, compiling, caching and launching know this protocol only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Protocol

from jitgemm.errors import ProblemError

Scalar = str | int | bool


def check_fields(problem: type, values: Mapping[str, Any]) -> None:
    """Check the names in a line of a shapes file, without its kind, against the fields of a problem's dataclass.

    Raises:
        ProblemError: one is unknown, or a field without a default is missing.
    """
    known = {field.name: field.default is MISSING for field in fields(problem) if field.name != "kind"}
    if unknown := sorted(set(values) - set(known)):
        raise ProblemError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}")
    if missing := [name for name, required in known.items() if required and name not in values]:
        raise ProblemError(f"field {missing[0]!r} is missing")


@dataclass(frozen=True)
class KernelSpec:
    """All that decides a kernel's code, and nothing that does not.

    ``constants`` holds the compile-time part of the problem and the config, sorted by name, so
    that equal specs compare, hash and serialize equally.
    """

    family: str
    arch: str
    constants: tuple[tuple[str, Scalar], ...]

    @classmethod
    def make(cls, family: str, arch: str, constants: Mapping[str, Scalar]) -> KernelSpec:
        """Build a spec from unordered constants."""
        return cls(family, arch, tuple(sorted(constants.items())))

    def __getitem__(self, name: str) -> Any:
        return dict(self.constants)[name]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form; ``from_dict`` reverses it."""
        return {"family": self.family, "arch": self.arch, "constants": dict(self.constants)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KernelSpec:
        """Reverse ``to_dict``.

        Raises:
            ValueError: ``data`` is not of that form.
        """
        family, arch, constants = data.get("family"), data.get("arch"), data.get("constants")
        if not isinstance(family, str) or not isinstance(arch, str) or not isinstance(constants, Mapping):
            raise ValueError("not a kernel spec: wants family, arch and constants")
        for name, value in constants.items():
            if not isinstance(name, str) or not isinstance(value, (str, int, bool)):
                raise ValueError(f"not a kernel spec: constant {name!r} is {type(value).__name__}")
        return cls.make(family, arch, constants)


class Family(Protocol):
    """One family of kernels (dense GEMM, a layout transform, ...)."""

    name: str
    template: str
    """File name in ``templates/``."""

    def kernel_name(self, spec: KernelSpec) -> str:
        """Symbol of the kernel's entry; names the operation, for profilers."""
        ...

    def render_context(self, spec: KernelSpec) -> dict[str, object]:
        """Values that the template names."""
        ...

    def num_threads(self, spec: KernelSpec) -> int:
        """Threads of a block."""
        ...

    def smem_bytes(self, spec: KernelSpec) -> int:
        """Dynamic shared memory of a block, in bytes."""
        ...

    def describe(self, spec: KernelSpec) -> str:
        """One short line for people, such as ``fp8_1x128_128x128 nt bf16 128x128x128 s6 c2x1``."""
        ...
