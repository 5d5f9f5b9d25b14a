"""Tuning: configs of a problem are timed on the GPU at hand, and what wins goes into a tuned table.

All but ``Workload``, ``GpuMeasure`` and ``current_run`` works with any source of times.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

import jitgemm
from jitgemm import settings
from jitgemm.builder import build
from jitgemm.cache import logger
from jitgemm.compiler import driver_version, find_nvrtc, version_text
from jitgemm.device import Device
from jitgemm.errors import CacheError, CompileError, ProblemError
from jitgemm.families import KernelSpec
from jitgemm.families.gemm import FAMILY, NVFP4_GROUP, SCALE_GROUP, GemmConfig, GemmProblem
from jitgemm.heuristics import choose_config, tuned
from jitgemm.heuristics.gemm import MAX_KERNELS, predict, rank_candidates
from jitgemm.heuristics.pruning import assign
from jitgemm.heuristics.serving import ANCHORS, serving_anchors
from jitgemm.heuristics.tuned import Entry, Run
from jitgemm.ops import gemm as ops
from jitgemm.ops.fp4 import PreparedWeights, prepare_fp4_weights
from jitgemm.plan import device_facts
from jitgemm.reference.layout import get_tma_aligned_size
from jitgemm.render import template_digest
from jitgemm.timing import Call, CudaTimer, Timer, error_text, measure

CANDIDATES = 24
"""Configs that are timed at each anchor unless another number is given: those with the best predictions."""

MIN_MARGIN = 0.005
"""What a config must gain on the model's choice to replace it; less is noise."""

NOISE = 0.02
"""An entry is stale if the model's choice of today takes so much less time."""

_FINALISTS, _FINAL_SAMPLES = 4, 60
_FAR = 1.25  # predicted time over the best's beyond which a config is no candidate
_UNMEASURED = 1.02  # what a config that was not timed is taken to lose at least
_AUTOTUNE_CANDIDATES = 12
_PLAIN: dict[str, Any] = {"tuned": False, "batch_invariant": False, **dict.fromkeys(settings.TUNING_FIELDS)}
_D_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Measure = Callable[[GemmProblem, Sequence[GemmConfig], Sequence[GemmConfig]], Mapping[GemmConfig, float]]
"""Times in us of configs for a problem with its m, those that can't run left out; the last are timed with most care."""


# -- What to measure, and what to keep.


def model_choice(problem: GemmProblem, device: Device) -> GemmConfig:
    """What a call gets without tuned tables, whatever settings are in force here."""
    with settings.override(**_PLAIN):
        return choose_config(problem, device)


def candidates(problem: GemmProblem, device: Device, count: int = CANDIDATES) -> list[GemmConfig]:
    """What is timed for a problem with its m: the model's choice, and the best predictions up to ``count`` in all."""
    chosen = model_choice(problem, device)
    ranked = rank_candidates(problem, device)
    limit = _FAR * predict(problem, ranked[0], device)["total"]
    near = [config for config in ranked[:count] if predict(problem, config, device)["total"] <= limit]
    return [chosen, *(config for config in near if config != chosen)][:count]


def specs(problem: GemmProblem, anchors: Iterable[int], device: Device, count: int = CANDIDATES) -> list[KernelSpec]:
    """The kernels that tuning a problem at some anchors needs."""
    configs = {config for m in anchors for config in candidates(problem.with_m(m), device, count)}
    return [FAMILY.spec(problem, config, device.arch.name) for config in sorted(configs)]


def tune_problem(
    problem: GemmProblem,
    anchors: Sequence[int],
    device: Device,
    run: Run,
    measure: Measure,
    count: int = CANDIDATES,
    advance: Callable[[], None] = lambda: None,
) -> dict[int, Entry]:
    """Find the configs of a problem (without its m) at some anchors; at most ``MAX_KERNELS`` different ones.

    Args:
        problem: without its m.
        anchors: values of m, each of ``ANCHORS``.
        device: whose model chooses candidates.
        run: the circumstances, which go into the entries.
        measure: the source of times.
        count: candidates at each anchor.
        advance: called after each anchor.

    Returns:
        Entries by anchor; an anchor where the model's choice can't run has none.
    """
    problem = problem.without_m()
    chosen = {m: model_choice(problem.with_m(m), device) for m in anchors}
    times: dict[int, dict[GemmConfig, float]] = {}
    for m in anchors:
        times[m] = dict(measure(problem.with_m(m), candidates(problem.with_m(m), device, count), [chosen[m]]))
        if chosen[m] not in times[m]:
            del times[m]
        advance()

    configs = sorted({config for of_anchor in times.values() for config in of_anchor})
    costs = [[_cost(problem.with_m(m), config, chosen[m], times[m], device) for config in configs] for m in times]
    kept = [configs[index] for index in sorted(set(assign(costs, MAX_KERNELS)))]
    entries = {}
    for m, of_anchor in times.items():
        if _by_time(of_anchor, chosen[m])[0] not in kept:  # then any that is kept may be the best here
            others = [config for config in kept if config not in of_anchor]
            of_anchor.update(measure(problem.with_m(m), [chosen[m], *others], [chosen[m]]))
        winner = next((config for config in _by_time(of_anchor, chosen[m]) if config in kept), None)
        if winner is not None:
            us, model_us = (round(of_anchor[config], 3) for config in (winner, chosen[m]))
            entries[m] = Entry(m, winner, us, chosen[m], model_us, run)
    return entries


def _by_time(times: Mapping[GemmConfig, float], chosen: GemmConfig) -> list[GemmConfig]:
    """The fastest first; the model's choice goes before what gains too little on it."""
    return sorted(times, key=lambda config: (times[config] / (1 + MIN_MARGIN if config == chosen else 1), config))


def _cost(
    problem: GemmProblem, config: GemmConfig, chosen: GemmConfig, times: Mapping[GemmConfig, float], device: Device
) -> float:
    """A measured time or, for want of one, a prediction scaled to those that were measured."""
    if config in times:
        return times[config] / (1 + MIN_MARGIN if config == chosen else 1)
    best = min(times, key=lambda config: (times[config], config))
    ratio = predict(problem, config, device)["total"] / predict(problem, best, device)["total"]
    return times[best] * max(_UNMEASURED, ratio)


def stale(problem: GemmProblem, entry: Entry, device: Device, run: Run, measure: Measure) -> list[str]:
    """Why an entry should be measured anew; empty where it holds.

    Args:
        problem: without its m.
        entry: of a tuned table.
        device: the table's.
        run: the circumstances of today.
        measure: the source of times.
    """
    reasons = entry.run.differences(run)
    if entry.m not in ANCHORS:
        return [*reasons, f"m = {entry.m} is no anchor of this version"]
    at = problem.with_m(entry.m)
    chosen = model_choice(at, device)
    if entry.config == chosen:
        return reasons
    times = measure(at, [entry.config, chosen], [entry.config, chosen])
    if entry.config not in times:
        return [*reasons, f"{entry.config} can't run any more"]
    if chosen in times and times[entry.config] > (1 + NOISE) * times[chosen]:
        loss = f"{entry.config} takes {times[entry.config]:.2f} us, the model's choice {chosen} {times[chosen]:.2f}"
        return [*reasons, f"it no longer wins: {loss}"]
    return reasons


# -- On the GPU.


class GpuMeasure:
    """Times configs on the current GPU."""

    def __init__(self, timer: Timer | None = None, device: str = "cuda") -> None:
        self._timer = timer or CudaTimer()
        self._device = device

    def __call__(
        self, problem: GemmProblem, configs: Sequence[GemmConfig], keep: Sequence[GemmConfig]
    ) -> dict[GemmConfig, float]:
        """Median times in us; configs that fail are logged and left out.

        Raises:
            RuntimeError: the GPU failed, and can't go on in this process.
        """
        work = Workload(problem, self._device)
        calls: dict[str, Call] = {}
        errors: dict[str, str] = {}
        for config in configs:
            try:
                calls[str(config)] = work.call(config)
            except Exception as error:
                self._timer.check()
                errors[str(config)] = error_text(error)
        names = [str(config) for config in keep]
        times, failed = measure(calls, self._timer, keep=names, finalists=_FINALISTS, samples=_FINAL_SAMPLES)
        for name, text in (errors | failed).items():
            logger.warning("tuning %s: %s is left out: %s", problem, name, text)
        return {config: times[str(config)].us for config in configs if str(config) in times}


def current_run() -> Run:
    """The circumstances of measurements on the current GPU.

    Raises:
        CompileError: there is no NVRTC.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = driver_version()
    return Run(
        gpu=properties.name,
        num_sms=properties.multi_processor_count,
        jitgemm=jitgemm.__version__,
        templates=template_digest(),
        nvrtc=find_nvrtc().version_text,
        driver="none" if driver is None else version_text(driver),
        torch=torch.__version__,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )


def tune(
    n: int,
    k: int,
    recipe: str = "fp8_1x128_128x128",
    *,
    m: int | Iterable[int] | None = None,
    layout: str = "nt",
    d_dtype: str = "bf16",
    fast_accum: bool = False,
    candidates: int = CANDIDATES,
) -> dict[int, Entry]:
    """Measure configs of a problem on the current GPU, and let the best win over the cost model from now on.

    They are added to the user's tuned table, beside the kernel cache. Takes seconds, and compiles what is missing.

    Args:
        n: columns of D.
        k: length of the contraction.
        recipe: ``"bf16"``, one of ``fp8_gemm_nt``, or one of FP4 weights: ``"fp8_1x128_fp4_1x32"``,
            ``"fp8_1x32_fp4_1x32"``, ``"fp8_1x128_nvfp4_1x16"``.
        m: rows of D, one value or several; default: all m. What is measured are the anchors that serve them.
        layout: ``"nt"``, ``"nn"``, ``"tn"`` or ``"tt"``; FP8: ``"nt"``.
        d_dtype: ``"bf16"`` or ``"fp32"``.
        fast_accum: as in ``fp8_gemm_nt``.
        candidates: configs that are timed at each anchor.

    Returns:
        The entries by anchor.

    Raises:
        ProblemError: there is no such problem, or no GPU that has kernels.
        CacheMissError: a kernel is missing and compiling is forbidden.
        OSError: the table can't be written.
    """
    if not torch.cuda.is_available():
        raise ProblemError("tune: there is no CUDA device here")
    problem = GemmProblem(n, k, recipe, None, layout, d_dtype, fast_accum)
    ms = ANCHORS if m is None else [m] if isinstance(m, int) else list(m)
    for value in ms:
        problem.with_m(value)  # checks it
    anchors = sorted({anchor for value in ms for anchor in serving_anchors(value)})
    return _tune_and_save(problem, anchors, device_facts(torch.cuda.current_device())[0], candidates)


def _tune_and_save(problem: GemmProblem, anchors: Sequence[int], device: Device, count: int) -> dict[int, Entry]:
    path = tuned.user_path(device)
    run = current_run()
    _build_in_threads(specs(problem, anchors, device, count))
    entries = tune_problem(problem, anchors, device, run, GpuMeasure(), count)
    with tuned.lock(path):
        tuned.update(path, device, problem, entries)
    ops.forget_plans()
    return entries


def _build_in_threads(specs: Sequence[KernelSpec]) -> None:
    """Build kernels; one that fails is left out when it is measured."""
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(contextvars.copy_context().run, build, spec) for spec in specs]
        for job in jobs:
            with contextlib.suppress(CompileError):
                job.result()


_autotuning = threading.Lock()
_tried: set[tuple[GemmProblem, Device, int]] = set()


def autotune(problem: GemmProblem, device: Device) -> None:
    """Tune the anchors that serve a problem with its m, unless tables have them: ``JITGEMM_AUTOTUNE``.

    Each is tried once in a process. What goes wrong is logged, and the model chooses.
    """
    assert problem.m is not None
    current = settings.current()
    if current.tuning() or current.batch_invariant or not current.tuned or torch.cuda.is_current_stream_capturing():
        return
    with _autotuning:
        known = tuned.tables(device).entries(problem)
        key = problem.without_m()
        anchors = [m for m in serving_anchors(problem.m) if m not in known and (key, device, m) not in _tried]
        if not anchors:
            return
        _tried.update((key, device, m) for m in anchors)
        start = time.monotonic()
        what = f"{problem.n} x {problem.k}, {problem.recipe} {problem.layout}, at m = {', '.join(map(str, anchors))}"
        try:
            entries = _tune_and_save(key, anchors, device, _AUTOTUNE_CANDIDATES)
        except (RuntimeError, OSError, CacheError, CompileError) as error:
            logger.warning("autotune: %s: the cost model chooses instead: %s", what, error_text(error))
            return
        found = "; ".join(f"m = {m}: {e.config}, {e.margin:.3f}x the model's choice" for m, e in entries.items())
        seconds = time.monotonic() - start
        logger.warning("autotune: %s: %s; %.1f s, saved in %s", what, found, seconds, tuned.user_path(device))


class Workload:
    """Operands of one problem with its m: normally distributed, scales as kernels load them, D contiguous."""

    def __init__(self, problem: GemmProblem, device: str = "cuda", seed: int = 0) -> None:
        """Make the tensors.

        Args:
            problem: with its m.
            device: a CUDA device; on ``cpu`` calls go to the reference, whatever their config.
            seed: of the data.
        """
        assert problem.m is not None
        self._problem = problem
        self._random = torch.Generator(device).manual_seed(seed)
        traits, m = problem.traits, problem.m
        self._a = self._operand(m, problem.k, problem.a_major == "k")
        self._a_scales = self._scales(traits.a_scales, m)
        self._b_scales: Tensor | None
        if traits.fp4_b:
            self._b, self._b_scales = self._fp4_operand(problem.n, problem.k)
        else:
            self._b = self._operand(problem.n, problem.k, problem.b_major == "k")
            self._b_scales = self._scales(traits.b_scales, problem.n)
        self.d = torch.empty((m, problem.n), dtype=_D_DTYPES[problem.d_dtype], device=device)

    def call(self, config: GemmConfig) -> Call:
        """A call that computes the problem with a config; it has been called once, so that its kernel is loaded.

        Raises:
            JitGemmError: the config can't be built or launched.
        """
        forced = {**_PLAIN, "config": str(config)}
        problem, d = self._problem, self.d
        if problem.traits.fp4_b:
            assert self._a_scales is not None and self._b_scales is not None
            scaled_a = self._a, self._a_scales
            prepared = PreparedWeights(self._b, self._b_scales, problem.k, group=problem.traits.fp4_group)

            def call() -> None:
                with settings.override(**forced):
                    ops.fp8_fp4_gemm_nt(scaled_a, prepared, d, recipe=problem.recipe)
        elif self._a_scales is None or self._b_scales is None:
            a, b = self._a, self._b
            function = getattr(ops, f"bf16_gemm_{problem.layout}")

            def call() -> None:
                with settings.override(**forced):
                    function(a, b, d)
        else:
            scaled_a, scaled_b = (self._a, self._a_scales), (self._b, self._b_scales)

            def call() -> None:
                with settings.override(**forced):
                    ops.fp8_gemm_nt(scaled_a, scaled_b, d, recipe=problem.recipe, fast_accum=problem.fast_accum)

        call()
        return call

    def _operand(self, mn: int, k: int, k_major: bool) -> Tensor:
        rows, columns = (mn, k) if k_major else (k, mn)
        size = self._problem.traits.operand_bytes
        width = get_tma_aligned_size(columns, size)  # TMA wants rows that start a multiple of 16 bytes apart
        values = torch.randn((rows, width), dtype=torch.bfloat16, device=self._random.device, generator=self._random)
        return (values if size == 2 else values.to(torch.float8_e4m3fn))[:, :columns]

    def _fp4_operand(self, n: int, k: int) -> tuple[Tensor, Tensor]:
        """Packed weights, all of whose scales are expanded with them."""
        size = (n, -(-k // 2))
        codes = torch.randint(-128, 128, size, dtype=torch.int8, device=self._random.device, generator=self._random)
        group = self._problem.traits.fp4_group
        scales = torch.full((n, -(-k // group)), 120, dtype=torch.uint8, device=codes.device)
        prepared = prepare_fp4_weights(codes, scales.view(torch.float8_e4m3fn) if group == NVFP4_GROUP else scales)
        return prepared.data, prepared.units

    def _scales(self, granularity: str, mn: int) -> Tensor | None:
        groups = -(-self._problem.k // SCALE_GROUP)
        if granularity == "none":
            return None
        if granularity == "row_k":  # MN-major and aligned, which TMA reads in place
            groups = -(-self._problem.k // self._problem.traits.a_group)  # of b 128
            return self._positive(groups, get_tma_aligned_size(mn, 4)).t()[:mn]
        shapes = {"block_k": (-(-mn // SCALE_GROUP), groups), "row": (mn, 1), "tensor": (1, 1)}
        return self._positive(*shapes[granularity])

    def _positive(self, rows: int, columns: int) -> Tensor:
        return torch.rand((rows, columns), device=self._random.device, generator=self._random) + 0.5
