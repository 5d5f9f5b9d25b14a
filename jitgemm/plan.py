"""Plans: loaded kernels with everything a launch needs that does not depend on addresses.

A plan is immutable and shared by threads and streams. It is found by one look-up, keyed by all that
was checked when it was made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

from jitgemm.device import ARCHITECTURES, Device, nearest_preset
from jitgemm.errors import ProblemError

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Table(Generic[Key, Value]):
    """A bounded dictionary whose readers take no lock; when full it starts anew."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: dict[Key, Value] = {}
        self.get: Callable[[Key], Value | None] = self._entries.get

    def put(self, key: Key, value: Value) -> Value:
        """Add an entry and return it."""
        if len(self._entries) >= self._size:
            self.clear()
        self._entries[key] = value
        return value

    def clear(self) -> None:
        """Start anew."""
        self._entries = {}  # replaced, not cleared: another thread may be reading it
        self.get = self._entries.get


_num_sms: int | None = None


def set_num_sms(num_sms: int) -> None:
    """Use at most ``num_sms`` multiprocessors in the calls that follow; 0 means all.

    Raises:
        ProblemError: ``num_sms`` is not an integer from 0 to the number of the current device.
    """
    global _num_sms
    limit = device_facts(torch.cuda.current_device())[1] if torch.cuda.is_available() else 2**31 - 1
    if not isinstance(num_sms, int) or isinstance(num_sms, bool) or not 0 <= num_sms <= limit:
        raise ProblemError(f"num_sms is {num_sms!r}; accepted is an integer from 0 (all) to {limit}")
    _num_sms = num_sms or None


def get_num_sms() -> int:
    """Multiprocessors that calls on the current device use."""
    if _num_sms is not None:
        return _num_sms
    if not torch.cuda.is_available():
        raise ProblemError("get_num_sms: there is no CUDA device here")
    return device_facts(torch.cuda.current_device())[1]


def num_sms_limit() -> int | None:
    """What ``set_num_sms`` asked for; part of a plan's key."""
    return _num_sms


@functools.cache
def device_facts(ordinal: int) -> tuple[Device, int]:
    """The preset that stands for a GPU, and the GPU's number of multiprocessors.

    Raises:
        ProblemError: its architecture has no kernels.
    """
    properties = torch.cuda.get_device_properties(ordinal)
    capability = (properties.major, properties.minor)
    for arch in ARCHITECTURES.values():
        if arch.compute_capability == capability:
            count = properties.multi_processor_count
            return nearest_preset(arch.name, properties.name, count), count
    accepted = ", ".join(
        f"{major}.{minor}" for major, minor in (arch.compute_capability for arch in ARCHITECTURES.values())
    )
    raise ProblemError(
        f"device cuda:{ordinal} ({properties.name}) has compute capability {capability[0]}.{capability[1]};"
        f" accepted is {accepted}"
    )


def raw_stream(device: int) -> int:
    """Handle of torch's current stream on a device."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


BOUND_LAUNCHES = 1024
"""Launches with packed arguments that one plan keeps, one for each set of addresses."""
