"""Facts of architectures and chips: the one description that the rest of the project reads.

``Device`` presets let a machine without a GPU choose configurations for one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """What the code generator needs to know of an SM architecture."""

    name: str
    compute_capability: tuple[int, int]
    smem_per_block: int  # bytes of shared memory that one block may have (opt-in maximum)
    smem_per_sm: int  # bytes that the blocks of one SM share
    smem_reserved: int  # bytes that the system takes from each block
    registers_per_sm: int
    max_registers_per_thread: int


SM90A = Architecture(
    name="sm_90a",
    compute_capability=(9, 0),
    smem_per_block=232_448,
    smem_per_sm=233_472,
    smem_reserved=1_024,
    registers_per_sm=65_536,
    max_registers_per_thread=255,
)
ARCHITECTURES: dict[str, Architecture] = {arch.name: arch for arch in (SM90A,)}


@dataclass(frozen=True)
class Device:
    """A chip as the cost model sees it.

    Rates are per second and per chip; ``clock`` is what the chip holds under a tensor load,
    ``idle_clock`` under a memory-bound one. Sources: the vendor's data sheets for SM count, L2
    and memory; docs/performance.md for what was measured on the H200 and scaled to the others.
    """

    name: str
    arch: Architecture
    num_sms: int
    l2_bytes: int
    hbm_bytes_per_s: float
    l2_bytes_per_s: float
    clock_hz: float
    clock_hz_memory_bound: float
    mma_fp8_flops_per_clock_per_sm: int
    mma_bf16_flops_per_clock_per_sm: int

    def with_num_sms(self, num_sms: int) -> Device:
        """The same chip with only ``num_sms`` multiprocessors to use."""
        return dataclasses.replace(self, num_sms=num_sms)


H200 = Device(
    name="h200",
    arch=SM90A,
    num_sms=132,
    l2_bytes=60 << 20,
    hbm_bytes_per_s=4.3e12,
    l2_bytes_per_s=9.4e12,
    clock_hz=1.70e9,
    clock_hz_memory_bound=1.90e9,
    mma_fp8_flops_per_clock_per_sm=8192,
    mma_bf16_flops_per_clock_per_sm=4096,
)
H100 = dataclasses.replace(H200, name="h100", l2_bytes=50 << 20, hbm_bytes_per_s=3.0e12)
H20 = dataclasses.replace(
    H200,
    name="h20",
    num_sms=78,
    hbm_bytes_per_s=3.6e12,
    l2_bytes_per_s=5.5e12,
    clock_hz=1.9e9,
    mma_fp8_flops_per_clock_per_sm=2048,
    mma_bf16_flops_per_clock_per_sm=1024,
)
PRESETS: dict[str, Device] = {device.name: device for device in (H200, H100, H20)}


def presets_of(arch: str) -> tuple[Device, ...]:
    """All device presets of one architecture, such as ``sm_90a``."""
    return tuple(device for device in PRESETS.values() if device.arch.name == arch)


def nearest_preset(arch: str, device_name: str, num_sms: int) -> Device:
    """The preset for a GPU at hand: by its marketing name, else by the nearest SM count."""
    candidates = presets_of(arch)
    lowered = device_name.lower()
    for device in sorted(candidates, key=lambda d: -len(d.name)):
        if device.name in lowered.replace("-", " ").split():
            return device
    return min(candidates, key=lambda d: abs(d.num_sms - num_sms))
