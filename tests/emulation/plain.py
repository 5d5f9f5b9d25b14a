"""A stand-in for the GPU that operations of ``jitgemm.ops.plain`` launch on."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from emulation import COMPILER, emulate
from jitgemm.families import KernelSpec, family_of
from jitgemm.families.plain import PlainFamily
from jitgemm.ops import fp4, hyper_connections, moe, pack_scales, plain


class EmulatedGpu:
    """Takes the place of ``jitgemm.ops.plain.Gpu``: a few multiprocessors, so that work is split in several ways."""

    arch, num_sms, ordinal = "sm_90a", 6, 0
    launches: ClassVar[list[KernelSpec]] = []
    early: ClassVar[list[str]] = []
    """Families of kernels that were to begin beside the one ahead."""

    def __init__(self, *_: object) -> None:
        pass

    def launch(
        self, family: PlainFamily, spec: KernelSpec, grid: tuple[int, ...], follows: bool = False, **numbers: float
    ) -> Any:
        """A callable as ``PlainLaunch`` is one."""
        assert family_of(spec) is family
        run = emulate(spec)
        values = [numbers[field.name] for field in family.fields if not field.is_pointer]
        assert len(values) == len(numbers)

        def launch(_: int, *addresses: int) -> None:
            self.launches.append(spec)
            if follows:
                self.early.append(spec.family)
            assert len(addresses) == len(family.pointers)
            params = family.params.pack(*addresses, *values).ljust(family.params_bytes, b"\0")
            run(params, grid, family.num_threads(spec))

        return launch

    def here(self, call: Any) -> Any:
        """The plan itself."""
        return call


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Operations on CPU tensors launch emulated kernels; yields the specs that are launched."""
    if COMPILER is None:
        pytest.skip("g++ is not installed")
    plain.forget_plans()
    EmulatedGpu.launches.clear()
    EmulatedGpu.early.clear()
    for module in (fp4, hyper_connections, moe, pack_scales):
        monkeypatch.setattr(module, "Gpu", EmulatedGpu)
        monkeypatch.setattr(module, "on_gpu", lambda _: True)
        monkeypatch.setattr(module, "raw_stream", lambda _: 0)
    yield EmulatedGpu.launches
    plain.forget_plans()
