"""The CUDA driver: cold calls through cuda-bindings, the hot ones through ctypes.

Launches happen at every call, and tensor maps are written at every call with new tensors; ctypes lets both
work on prepared buffers in place, where the bindings convert Python objects field by field.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
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
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


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


_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_PDL = _LaunchAttribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)


@functools.cache
def _launch_function() -> Any:
    # Without argument types: the arguments are ctypes objects already, and need no conversion.
    function = _libcuda().cuLaunchKernelEx
    function.restype = ctypes.c_int
    return function


class Arguments:
    """Memory for a kernel's one parameter.

    Args:
        size: its bytes, a multiple of 8; they start at ``address``, aligned to 128, which is ``words[first]``.
    """

    __slots__ = ("address", "first", "reference", "words")

    def __init__(self, size: int) -> None:
        # Behind the parameter its address, which is what the driver is pointed to.
        self.words = words = _memory(size)()
        base = ctypes.addressof(words)
        self.address = address = -(-base // 128) * 128
        self.first = (address - base) // 8
        behind = self.first + size // 8
        words[behind] = address
        self.reference = ctypes.byref(words, behind * 8)  # keeps the memory


@functools.cache
def _memory(size: int) -> Any:
    return ctypes.c_uint64 * (128 // 8 + size // 8 + 1)


class Launch:
    """A kernel and its geometry, ready for any arguments and any stream.

    Args:
        kernel: handle from ``load_kernel``.
        grid: blocks in x, y, z.
        threads: threads of a block.
        smem_bytes: dynamic shared memory of a block.
        device: ordinal, for the context of a thread that has none yet.
        pdl: whether to launch with programmatic dependent launch.
    """

    __slots__ = ("_configs", "_device", "_grid", "_kernel", "_pdl", "_smem", "_threads")

    _STREAMS = 64  # launch configurations kept, one a stream

    def __init__(
        self, kernel: int, grid: tuple[int, int, int], threads: int, smem_bytes: int, device: int, pdl: bool
    ) -> None:
        self._kernel = ctypes.c_void_p(kernel)
        self._grid, self._threads, self._smem, self._device, self._pdl = grid, threads, smem_bytes, device, pdl
        self._configs: dict[int, Any] = {}

    def __call__(self, arguments: Arguments, stream: int) -> None:
        """Enqueue the kernel on a stream, given by its raw handle.

        Raises:
            DriverError: the driver refused the launch.
        """
        run = self.prepare(arguments, stream)
        status = run()
        if status:
            self.retry(run, status)

    def prepare(self, arguments: Arguments, stream: int) -> Callable[[], int]:
        """The launch as a function that returns the driver's status; for ``retry`` if that is not 0."""
        config = self._configs.get(stream) or self._add_stream(stream)
        return functools.partial(_launch_function(), config, self._kernel, arguments.reference, None)

    def _add_stream(self, stream: int) -> Any:
        config = _LaunchConfig((*self._grid,), (self._threads, 1, 1), self._smem, stream)
        if self._pdl:
            config.attributes, config.num_attributes = ctypes.pointer(_PDL), 1
        if len(self._configs) >= self._STREAMS:
            self._configs = {}  # replaced, not cleared: another thread may be reading it
        reference = self._configs[stream] = ctypes.byref(config)  # keeps the configuration alive
        return reference

    def retry(self, run: Callable[[], int], status: int) -> None:
        """Launch once more in a thread that had no context yet.

        Raises:
            DriverError: that was not the reason, or it fails again.
        """
        if status == int(driver.CUresult.CUDA_ERROR_INVALID_CONTEXT):  # a thread's first CUDA call
            use_primary_context(self._device)
            status = run()
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


@functools.cache
def replace_tensor_map_address_function() -> Any:
    """``cuTensorMapReplaceAddress`` with its C signature."""
    function = _libcuda().cuTensorMapReplaceAddress
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    function.restype = ctypes.c_int
    return function
