"""Plans: loaded kernels with everything a launch needs that does not depend on addresses.

A plan is immutable and shared by threads and streams. It is found by one look-up, keyed by all that
was checked when it was made.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from jitgemm import settings
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


def set_num_sms(num_sms: int) -> None:
    """Use at most ``num_sms`` multiprocessors in the calls that follow; 0 means all.

    Raises:
        ProblemError: ``num_sms`` is not an integer from 0 to the number of the current device.
    """
    limit = device_facts(torch.cuda.current_device())[1] if torch.cuda.is_available() else 2**31 - 1
    if not isinstance(num_sms, int) or isinstance(num_sms, bool) or not 0 <= num_sms <= limit:
        raise ProblemError(f"num_sms is {num_sms!r}; accepted is an integer from 0 (all) to {limit}")
    settings.assign("set_num_sms", "num_sms", num_sms)


def get_num_sms() -> int:
    """Multiprocessors that calls on the current device use."""
    limit = settings.current().num_sms
    if not torch.cuda.is_available():
        if limit:
            return limit
        raise ProblemError("get_num_sms: there is no CUDA device here")
    count = device_facts(torch.cuda.current_device())[1]
    return min(limit or count, count)


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


current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
"""Ordinal of torch's current device."""

raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0)
"""Handle of torch's current stream on a device."""

BOUND_LAUNCHES = 1024
"""Launches with packed arguments that one plan keeps, one for each stream and set of addresses."""


def _find_tensor_guards() -> Any:
    """Torch's check of several tensors' types, dtypes, devices, sizes and strides in one call, or None.

    It is internal to torch, and so is used only if it does what is expected of it here.
    """
    try:
        guards: Any = importlib.import_module("torch._C._dynamo.guards").TensorGuards
        x = torch.empty((2, 4))
        match = guards(x, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        match_columns = guards(x, dynamic_dims_sizes=[[None, 4]], dynamic_dims_strides=[[4, 1]]).check
        others = (x[:, :2], x.as_strided((2, 4), (1, 2)), x.view(torch.int32), torch.nn.Parameter(x), None)
        right = match(x) and match_columns(x[:1]) and not match(x[:1])
        return guards if right and not any(match(y) or match_columns(y) for y in others) else None
    except Exception:  # whatever another version of torch may do
        return None


_tensor_guards = _find_tensor_guards()


Sizes = list[list[int | None]]


def matcher(tensors: Sequence[Tensor], sizes: Sizes | None = None, strides: Sizes | None = None) -> Callable[..., bool]:
    """A function that says whether as many tensors are like these in all but their addresses.

    It may say no, but not yes, without cause. It raises TypeError for another number of tensors. Of the sizes and
    strides, where given, a None matches all.
    """
    if _tensor_guards is None:
        return lambda *_: False
    match: Callable[..., bool] = _tensor_guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return match
