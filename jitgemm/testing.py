"""Measures and timers for tests and benchmarks, under the peer's names."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from jitgemm.reference.gemm import error_measures
from jitgemm.settings import other_profiler
from jitgemm.timing import FLUSH_BYTES

__all__ = [
    "assert_bitwise_equal",
    "bench",
    "bench_kineto",
    "calc_diff",
    "count_bytes",
    "get_arch_major",
    "ignore_env",
    "suppress_stdout_stderr",
    "test_filter",
]

_cuda: Any = torch.cuda  # whose stubs lack types
_profiler: Any = torch.profiler

_NAME_CHARACTERS = 97
"""How much of a kernel's name is searched: what is left of a longer one in the profiler's table of 100 columns."""

_BARRIER_SLEEP_CYCLES = 20_000_000  # 10 ms


def calc_diff(x: Tensor, y: Tensor) -> float:
    """``1 - 2<x,y> / (<x,x> + <y,y>)`` in float64: 0 for equal tensors, NaN where one holds a NaN or an Inf.

    Raises:
        ValueError: the shapes differ.
    """
    return error_measures(x, y).cosine


def count_bytes(*tensors: Any) -> int:
    """Bytes of the elements of all tensors, in tuples and lists too; None counts nothing."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, (tuple, list)):
            total += count_bytes(*tensor)
        elif tensor is not None:
            total += tensor.numel() * tensor.element_size()
    return total


def assert_bitwise_equal(x: Tensor, y: Tensor, label: str = "") -> None:
    """Check that two tensors have the same bits.

    Raises:
        AssertionError: they differ in shape, type or bits; says where first.
    """
    what = f" ({label})" if label else ""
    assert x.shape == y.shape and x.dtype == y.dtype, (
        f"tensors{what} are {x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
    )
    size = max(x.element_size(), 1)
    x_bytes, y_bytes = (t.contiguous().view(-1).view(torch.uint8).view(-1, size) for t in (x, y))
    differ = (x_bytes != y_bytes).any(1)
    if differ.any():
        index = int(differ.to(torch.uint8).argmax())
        position = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), x.shape))
        raise AssertionError(
            f"{int(differ.sum())} of {x.numel()} elements{what} differ, first at {position}:"
            f" {x[position].item()} and {y[position].item()}, bytes {x_bytes[index].tolist()} and"
            f" {y_bytes[index].tolist()}"
        )


def get_arch_major() -> int:
    """The major compute capability of the current GPU: 9 for Hopper."""
    return int(torch.cuda.get_device_capability()[0])


def test_filter(condition: Callable[[], bool]) -> Callable[[Callable[..., object]], Callable[..., None]]:
    """Decorate a test that runs only where ``condition()`` holds when it is called."""

    def decorator(function: Callable[..., object]) -> Callable[..., None]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> None:
            if condition():
                function(*args, **kwargs)
            else:
                print(f"{function.__name__}: left out by its filter\n")

        return wrapper

    return decorator


test_filter.__test__ = False  # type: ignore[attr-defined]  # pytest: not a test


def ignore_env(name: str, condition: Callable[[], bool]) -> Callable[[Callable[..., object]], Callable[..., None]]:
    """Decorate a function to run without the environment variable ``name`` where ``condition()`` holds."""

    def decorator(function: Callable[..., object]) -> Callable[..., None]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> None:
            value = os.environ.pop(name, None) if condition() else None
            try:
                function(*args, **kwargs)
            finally:
                if value is not None:
                    os.environ[name] = value

        return wrapper

    return decorator


@contextlib.contextmanager
def suppress_stdout_stderr() -> Iterator[None]:
    """Discard what the process writes to its standard output and error, C libraries included."""
    sys.stdout.flush()
    sys.stderr.flush()
    streams = (sys.stdout, sys.stderr)
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            sys.stdout = sys.stderr = nowhere
            yield
    finally:
        sys.stdout, sys.stderr = streams
        for descriptor, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)


def bench(fn: Callable[[], object], num_warmups: int = 5, num_tests: int = 10, high_precision: bool = False) -> float:
    """Seconds per call of ``fn`` on the GPU, between two events around ``num_tests`` of them.

    Args:
        fn: enqueues work on the current stream.
        num_warmups: calls before, after which the L2 is not flushed.
        num_tests: calls that are timed.
        high_precision: enqueue a large GEMM first, behind which the host gets ahead of the GPU.
    """
    torch.cuda.synchronize()
    _flush_l2()
    for _ in range(num_warmups):
        fn()
    if high_precision:
        x = torch.ones(8192, 8192, device="cuda")
        x @ x
    start, end = (_cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(num_tests):
        fn()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / num_tests / 1e3


def bench_kineto(
    fn: Callable[[], object],
    kernel_names: str | tuple[str, ...],
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: str | None = None,
    flush_l2: bool = True,
    with_multiple_kernels: bool = False,
    barrier: Callable[[], object] | None = None,
) -> float | tuple[float, ...]:
    """Seconds that one launch of a kernel takes, by the CUDA profiler; 0 where no kernel has the name.

    Args:
        fn: launches the kernels.
        kernel_names: part of the name of each kernel to report.
        num_tests: calls of ``fn`` that are profiled, after as many that are not.
        suppress_kineto_output: discard what the profiler prints.
        trace_path: write a Chrome trace there.
        flush_l2: overwrite the L2 before each call.
        with_multiple_kernels: whether a name may stand for several kernels, whose launches are averaged.
        barrier: is called before each call of ``fn``, behind a sleeping kernel: of ranks that time together.

    Returns:
        One time, or a tuple of them where ``kernel_names`` is one; 1 each where ``DG_USE_NVIDIA_TOOLS`` is set.

    Raises:
        AssertionError: a name stands for several kernels, and may not.
    """
    names = (kernel_names,) if isinstance(kernel_names, str) else kernel_names
    times: tuple[float, ...] = (1.0,) * len(names)
    if not other_profiler():
        fn()  # what is compiled at the first call is compiled outside of the profile
        with suppress_stdout_stderr() if suppress_kineto_output else contextlib.nullcontext():
            events = _profile(fn, num_tests, trace_path, flush_l2, barrier)
        times = tuple(_seconds_per_launch(events, name, with_multiple_kernels) for name in names)
    return times[0] if isinstance(kernel_names, str) else times


def _profile(
    fn: Callable[[], object],
    num_tests: int,
    trace_path: str | None,
    flush_l2: bool,
    barrier: Callable[[], object] | None,
) -> list[tuple[str, float, int]]:
    """Name, total microseconds and launches of every kernel."""
    # The profiler runs from the first round on, which is dropped: its start disturbs the launches around it.
    profile = _profiler.profile(
        activities=[_profiler.ProfilerActivity.CUDA],
        schedule=_profiler.schedule(wait=0, warmup=1, active=1, repeat=1),
        acc_events=True,
    )
    with profile:
        for _ in range(2):
            for _ in range(num_tests):
                if flush_l2:
                    _flush_l2()
                if barrier is not None:
                    _cuda._sleep(_BARRIER_SLEEP_CYCLES)
                    barrier()
                fn()
            torch.cuda.synchronize()
            profile.step()
    if trace_path is not None:
        profile.export_chrome_trace(trace_path)
    return [(event.key, event.device_time_total, event.count) for event in profile.key_averages()]


def _seconds_per_launch(events: list[tuple[str, float, int]], name: str, with_multiple_kernels: bool) -> float:
    found = [event for event in events if name in event[0][:_NAME_CHARACTERS]]
    if len(found) > 1 and not with_multiple_kernels:
        raise AssertionError(f"{name!r} is in the names of {len(found)} kernels: {', '.join(key for key, *_ in found)}")
    launches = sum(count for _, _, count in found)
    return sum(microseconds for _, microseconds, _ in found) / launches / 1e6 if launches else 0.0


def _flush_l2() -> None:
    torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda").zero_()
