"""Have kernels ready before the calls that need them: in one process, or in all ranks of a job at once."""

from __future__ import annotations

import contextvars
import os
import random
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jitgemm import settings
from jitgemm.builder import build
from jitgemm.cache import default_cache
from jitgemm.cache_key import cache_key
from jitgemm.device import PRESETS, Device
from jitgemm.errors import JitGemmError, ProblemError
from jitgemm.families import KernelSpec, family_of
from jitgemm.resources import compile_jobs

if TYPE_CHECKING:
    from jitgemm.families.batched import BatchedProblem
    from jitgemm.families.gemm import GemmProblem
    from jitgemm.families.grouped import GroupedProblem
    from jitgemm.families.rowwise import RowwiseProblem
    from jitgemm.families.small_problem import SmallProblem
    from jitgemm.families.tiles import TileProblem

    AnyProblem = GemmProblem | GroupedProblem | BatchedProblem | RowwiseProblem | TileProblem | SmallProblem


@dataclass(frozen=True)
class Prewarmed:
    """What ``prewarm`` did here.

    Args:
        kernels: how many the problems can need.
        compiled: how many of them this process has compiled; the others were there, or came from other processes.
        seconds: how long it took, waiting for other ranks included.
    """

    kernels: int
    compiled: int
    seconds: float


def prewarm(
    problems: str | os.PathLike[str] | Iterable[AnyProblem | Mapping[str, Any]],
    *,
    devices: Sequence[str] | None = None,
    jobs: int | None = None,
) -> Prewarmed:
    """Build every kernel that calls of some problems can need, whatever their m, and have it in this process's memory.

    Any number of processes may do so at once: each kernel is compiled once a host, and different processes take
    different kernels. Where ``torch.distributed`` is initialized, all ranks must call this together; it returns when
    all are ready. ``JITGEMM_JIT`` does not matter here. A kernel that fails does not stop the others.

    Args:
        problems: a shapes file, such as ``JITGEMM_RECORD`` writes, or what would be its lines, as dictionaries:
            ``[{"n": 4096, "k": 7168, "recipe": "fp8_1x128_128x128"}]``.
        devices: chips to build for, such as ``["h200"]``; default: torch's current GPU, without one all chips.
        jobs: threads that compile here; default: one a core as memory allows, shared by all ranks.

    Raises:
        ProblemError: a problem, a device or ``jobs`` is not accepted; raised before anything is built.
        CompileError: a kernel could not be compiled; raised after all others are ready, on the ranks that saw it.
        CacheError: the cache directory is not safe to use; likewise.
    """
    start = time.perf_counter()
    if jobs is not None and (not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1):
        raise ProblemError(f"jobs is {jobs!r}; accepted is an integer from 1")
    specs = _specs(_problems(problems), _devices(devices))
    distributed = _distributed()
    if jobs is None:
        jobs = max(1, compile_jobs() // (distributed.get_world_size() if distributed else 1))
    compiled, failures = _build_all(specs, jobs)
    if distributed:  # also after failures, or the other ranks would wait forever
        distributed.barrier()
    if failures:
        spec, error = failures[0]
        if not isinstance(error, JitGemmError):
            raise error
        example = family_of(spec).describe(spec)
        raise type(error)(
            f"prewarm: {len(failures)} of {len(specs)} kernels failed, such as {example}: {error}"
        ) from error
    return Prewarmed(len(specs), compiled, time.perf_counter() - start)


def _problems(given: str | os.PathLike[str] | Iterable[AnyProblem | Mapping[str, Any]]) -> list[AnyProblem]:
    from jitgemm.cache_tools.problems import from_shapes_file, parse
    from jitgemm.families.batched import BatchedProblem
    from jitgemm.families.gemm import GemmProblem
    from jitgemm.families.grouped import GroupedProblem
    from jitgemm.families.rowwise import RowwiseProblem
    from jitgemm.families.small_problem import SmallProblem
    from jitgemm.families.tiles import TileProblem

    known = (GemmProblem, GroupedProblem, BatchedProblem, RowwiseProblem, TileProblem, SmallProblem)
    if isinstance(given, (str, os.PathLike)):
        return [named.problem for named in from_shapes_file(Path(given))]
    return [one.without_m() if isinstance(one, known) else parse(one).problem for one in given]


def _devices(names: Sequence[str] | None) -> list[Device]:
    if names is None:
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_available():
            return list(PRESETS.values())
        from jitgemm.plan import device_facts

        return [device_facts(torch.cuda.current_device())[0]]
    for name in [names] if isinstance(names, str) else names:
        if isinstance(names, str) or name not in PRESETS:
            raise ProblemError(f"devices is {names!r}; accepted is a list of {', '.join(PRESETS)}")
    return [PRESETS[name] for name in names]


def _specs(problems: Iterable[AnyProblem], devices: Sequence[Device]) -> list[KernelSpec]:
    from jitgemm.heuristics import enumerate_specs

    found = (spec for problem in problems for device in devices for spec in enumerate_specs(problem, device))
    return list(dict.fromkeys(found))


def _distributed() -> Any:
    """``torch.distributed`` if this process is a rank."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed


def _build_all(specs: Sequence[KernelSpec], jobs: int) -> tuple[int, list[tuple[KernelSpec, Exception]]]:
    """Build ``specs``; how many were compiled here, and what failed.

    Each process takes them in an order of its own and leaves for later what another has in hand.
    """
    compiled, failures = 0, []
    mine = random.SystemRandom().sample(specs, len(specs))
    with settings.override(jit="allow"), ThreadPoolExecutor(jobs, "jitgemm-prewarm") as pool:
        try:
            for wait in (False, True):
                contexts = [contextvars.copy_context() for _ in mine]  # for the settings in force
                results = list(
                    pool.map(lambda context, spec, wait=wait: context.run(_build, spec, wait), contexts, mine)
                )
                later = []
                for spec, result in zip(mine, results, strict=True):
                    if isinstance(result, Exception):
                        failures.append((spec, result))
                    elif result is None:
                        later.append(spec)
                    else:
                        compiled += result
                mine = later
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return compiled, failures


def _build(spec: KernelSpec, wait: bool) -> bool | Exception | None:
    """Whether ``spec`` was compiled here, or what went wrong; None if it is left to another process."""
    try:
        if not wait and default_cache().is_locked(cache_key(spec)):
            return None
        return build(spec).source == "compiled"
    except Exception as error:
        return error
