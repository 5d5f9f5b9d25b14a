"""The CUDA driver: cold calls through cuda-bindings, the two hot ones through ctypes.

A launch and the encoding of a tensor map happen at every call with new tensors; ctypes lets both work
on prepared buffers in place, where the bindings convert Python objects field by field.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from cuda.bindings import driver

from jitgemm.errors import DriverError


def check(result: tuple[Any, ...]) -> Any:
    """The value of a cuda-bindings call.

    Raises:
        DriverError: the call failed; names the error and quotes the driver's text.
    """
    status, *values = result
    if int(status) != 0:
        raise error_of(int(status))
    return values[0] if len(values) == 1 else values


def error_of(status: int, what: str = "") -> DriverError:
    """The exception for a CUDA status code."""
    code = driver.CUresult(status)
    _, name = driver.cuGetErrorName(code)
    _, text = driver.cuGetErrorString(code)
    prefix = f"{what}: " if what else ""
    return DriverError(f"{prefix}{(name or b'?').decode()} ({status}): {(text or b'?').decode()}")


@functools.cache
def _libcuda() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(f"no CUDA driver: {error}") from None


def load_kernel(image: bytes, name: str, smem_bytes: int, device: int) -> tuple[Any, int]:
    """Load a cubin and return (library, kernel handle); the handle serves every context of the device's kind.

    Works while a stream of this thread is being captured.

    Raises:
        DriverError: the driver refuses the cubin or the kernel's shared memory.
    """
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = check(driver.cuThreadExchangeStreamCaptureMode(relaxed))
    try:
        library = check(driver.cuLibraryLoadData(image, [], [], 0, [], [], 0))
        kernel = check(driver.cuLibraryGetKernel(library, name.encode()))
        allow_smem(int(kernel), smem_bytes, device)
        return library, int(kernel)
    finally:
        check(driver.cuThreadExchangeStreamCaptureMode(before))


def allow_smem(kernel: int, smem_bytes: int, device: int) -> None:
    """Let a kernel have ``smem_bytes`` of dynamic shared memory on a device."""
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    check(driver.cuKernelSetAttribute(attribute, smem_bytes, driver.CUkernel(kernel), driver.CUdevice(device)))


def function_attribute(kernel: int, name: str, device: int) -> int:
    """An attribute of a loaded kernel, such as ``LOCAL_SIZE_BYTES`` or ``NUM_REGS``."""
    attribute = getattr(driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}")
    return int(check(driver.cuKernelGetAttribute(attribute, driver.CUkernel(kernel), driver.CUdevice(device))))


def ensure_context(device: int) -> None:
    """Give a thread that has made no CUDA call yet the context that torch uses on a device."""
    if int(check(driver.cuCtxGetCurrent())) == 0:
        use_primary_context(device)


def use_primary_context(device: int) -> None:
    """Make a device's primary context, the one torch uses, current in this thread."""
    check(driver.cuCtxSetCurrent(check(driver.cuDevicePrimaryCtxRetain(driver.CUdevice(device)))))


class _LaunchAttribute(ctypes.Structure):
    # CUlaunchAttribute: an id, and a union of 64 bytes.
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_char * 64))


class _LaunchConfig(ctypes.Structure):
    # CUlaunchConfig
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("smem_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


@functools.cache
def _launch_function() -> Any:
    function = _libcuda().cuLaunchKernelEx
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    function.restype = ctypes.c_int
    return function


class Launch:
    """One kernel with its geometry and packed arguments, ready for any stream; immutable once made.

    Args:
        kernel: handle from ``load_kernel``.
        grid: blocks in x, y, z.
        threads: threads of a block.
        smem_bytes: dynamic shared memory of a block.
        arguments: address of the kernel's one parameter; ``owner`` keeps it alive.
        owner: what owns the argument memory.
        device: ordinal, for the context of a thread that has none yet.
    """

    __slots__ = ("_arguments", "_configs", "_device", "_function", "_grid", "_kernel", "_owner", "_smem", "_threads")

    _STREAMS = 64  # launch configurations kept, one a stream

    def __init__(
        self,
        kernel: int,
        grid: tuple[int, int, int],
        threads: int,
        smem_bytes: int,
        arguments: int,
        owner: object,
        device: int,
    ) -> None:
        self._kernel, self._grid, self._threads, self._smem, self._device = kernel, grid, threads, smem_bytes, device
        pointers = (ctypes.c_void_p * 1)(arguments)
        self._owner = (owner, pointers)
        self._arguments = ctypes.addressof(pointers)
        self._configs: dict[int, tuple[int, _LaunchConfig]] = {}
        self._function = _launch_function()

    def __call__(self, stream: int) -> None:
        """Enqueue the kernel on a stream, given by its raw handle.

        Raises:
            DriverError: the driver refused the launch.
        """
        config = self._configs.get(stream) or self._add_stream(stream)
        status = self._function(config[0], self._kernel, self._arguments, None)
        if status:
            self._retry(config[0], status)

    def _add_stream(self, stream: int) -> tuple[int, _LaunchConfig]:
        config = _LaunchConfig(
            grid=(ctypes.c_uint * 3)(*self._grid),
            block=(ctypes.c_uint * 3)(self._threads, 1, 1),
            smem_bytes=self._smem,
            stream=stream,
        )
        if len(self._configs) >= self._STREAMS:
            self._configs = {}  # replaced, not cleared: another thread may be reading it
        entry = (ctypes.addressof(config), config)
        self._configs[stream] = entry
        return entry

    def _retry(self, config: int, status: int) -> None:
        if status == int(driver.CUresult.CUDA_ERROR_INVALID_CONTEXT):  # a thread's first CUDA call
            use_primary_context(self._device)
            status = self._function(config, self._kernel, self._arguments, None)
        if status:
            raise error_of(status, "launch")


@functools.cache
def encode_tensor_map_function() -> Any:
    """``cuTensorMapEncodeTiled`` with its C signature."""
    function = _libcuda().cuTensorMapEncodeTiled
    pointer = ctypes.c_void_p
    function.argtypes = (
        pointer, ctypes.c_int, ctypes.c_uint32, pointer, pointer, pointer, pointer, pointer,
        ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int,
    )  # fmt: skip
    function.restype = ctypes.c_int
    return function
