"""Eight GEMMs in one CUDA graph, as decoding runs them: ours against DeepGEMM's, with programmatic dependent launch. ::

    python -m benchmarks.chain --warm-peer --out chain.csv

The GEMMs are those of one decoder layer of DeepSeek-V3 and the first ones of the next, at m = 1, 16 and 128. Each has
inputs of its own, which were quantized before (the scales in each library's layout), and depends on the one before by
the order in the stream. In FP8 the weights come to 250 MB, so that the L2 holds little of what the next replay reads.
Every library multiplies the same tensors, and is captured without programmatic dependent launch (PDL) and with it.
Results are compared with float64 first,
from a replay into outputs of NaN.

Replays take turns (A B A B), and medians count: ``warm`` is a replay's share of ``--replays`` of them back to back,
``flushed`` one replay after the L2 was flushed by reading. Ours with PDL should take at most 0.85
of DeepGEMM's time with its own PDL. Exit codes: 0 done, 1 something of ours is missing or wrong, 3 no GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import jitgemm
from benchmarks import dense, harness
from benchmarks.dense import MAKERS, NAMES, OURS, Contender, Inputs
from benchmarks.harness import Call, CsvLog, CudaTimer, Timer, race, say
from benchmarks.operands import poisoned
from benchmarks.shapes import Shape, chain_floor_us
from jitgemm.families.gemm import RECIPES, GemmProblem

LAYERS = (
    (2112, 7168),  # queries and latent keys and values down
    (24576, 1536),  # queries up
    (32768, 512),  # keys and values up
    (7168, 16384),  # attention's output
    (4096, 7168),  # shared expert: gate and up
    (7168, 2048),  # shared expert: down
    (576, 7168),  # the next layer: latent keys and values down
    (2112, 7168),  # and queries with them
)
"""(n, k) in the order of the chain."""

MS = (1, 16, 128)
TARGET = 0.85
SAMPLES, REPLAYS = 50, 20
COLUMNS = (
    *("case", "m", "recipe", "library", "pdl", "l2", "us", "of_peer", "target", "floor_us"),
    *("samples", "replays", "measured", "error"),
)


@dataclass(frozen=True)
class Mode:
    """A library and how its kernels are launched."""

    library: str
    pdl: bool = False

    def __str__(self) -> str:
        return f"{self.library} pdl" if self.pdl else self.library


PEER = Mode("deepgemm", pdl=True)
JUDGED = Mode(OURS, pdl=True)
MODES = {
    "fp8": (Mode("deepgemm"), PEER, Mode(OURS), JUDGED),
    "bf16": (Mode("cublas"), Mode("deepgemm"), PEER, Mode(OURS), JUDGED),
}


@contextmanager
def launching(mode: Mode) -> Iterator[None]:
    """Calls of a library launch as the mode says; without PDL again after that."""
    try:
        _switch(mode.library, mode.pdl)
        yield
    finally:
        _switch(mode.library, False)


def _switch(library: str, pdl: bool) -> None:
    if library == "deepgemm":
        import deep_gemm

        deep_gemm.set_pdl(pdl)
    elif library == OURS:
        jitgemm.set_pdl(pdl)


def capture(calls: Sequence[Call]) -> Call:
    """A CUDA graph of the calls, after a run of them that compiles and loads; replayed by the result."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


class WarmTimer:
    """Times a call's share of many back to back, with the L2 as the one before left it and the host's time hidden."""

    def __init__(self, timer: Timer, replays: int) -> None:
        self._timer, self._replays = timer, replays
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call) -> float:
        call()
        torch.cuda._sleep(2_000_000)  # 1 ms, in which the host gets ahead of the GPU
        self._start.record()
        for _ in range(self._replays):
            call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e3 / self._replays

    def empty(self) -> None:
        """Launch a kernel that does nothing."""
        self._timer.empty()

    def check(self) -> None:
        """Raise what the GPU has failed with, if anything."""
        self._timer.check()


def run_chain(
    recipe: str,
    inputs: Sequence[Inputs],
    timers: Mapping[str, Timer],
    samples: int,
    replays: int,
    capture: Callable[[Sequence[Call]], Call] = capture,
) -> list[dict[str, Any]]:
    """Race the modes of a recipe over one chain; rows of the CSV but for when and on what they were measured.

    Args:
        recipe: ``fp8`` or ``bf16``.
        inputs: of the GEMMs, in order.
        timers: by what they do to the L2.
        samples: of each mode.
        replays: that ``timers["warm"]`` takes the mean of; for the rows.
        capture: from calls to one that makes them all.
    """
    graphs: dict[Mode, Call] = {}
    kept: list[Contender] = []  # a graph keeps none of the tensors that it was captured with
    errors: dict[Mode, str] = {}
    for mode in MODES[recipe]:
        try:
            contenders = [MAKERS[mode.library](recipe, each) for each in inputs]
            kept += contenders
            with launching(mode):
                graphs[mode] = capture([contender.call for contender in contenders])
            _check(mode, graphs[mode], contenders, inputs)
        except Exception as error:
            next(iter(timers.values())).check()
            graphs.pop(mode, None)
            errors[mode] = harness.error_text(error)
    rows = []
    for l2, timer in timers.items():
        timings = race({str(mode): call for mode, call in graphs.items()}, samples, timer)
        peer = timings[str(PEER)].median_us if PEER in graphs else None
        for mode in MODES[recipe]:
            timing = timings.get(str(mode))
            us = None if timing is None else timing.median_us
            rows.append(
                {
                    "case": f"{NAMES[recipe]}/m={inputs[0].shape.m}/{mode}/{l2}",
                    "m": inputs[0].shape.m,
                    "recipe": NAMES[recipe],
                    "library": mode.library,
                    "pdl": int(mode.pdl),
                    "l2": l2,
                    "us": us,
                    "of_peer": None if us is None or peer is None else us / peer,
                    "target": TARGET if mode == JUDGED else None,
                    "floor_us": chain_floor_us([i.shape for i in inputs], RECIPES[NAMES[recipe]].operand_bytes),
                    "samples": 0 if timing is None else timing.samples,
                    "replays": replays if l2 == "warm" else 1,
                    "error": errors.get(mode, "") if timing is None else timing.error or "",
                }
            )
    return rows


def _check(mode: Mode, replay: Call, contenders: Sequence[Contender], inputs: Sequence[Inputs]) -> None:
    """Compare a replay's results with float64.

    Raises:
        ArithmeticError: one is wrong.
    """
    for contender in contenders:
        contender.d.copy_(poisoned(contender.d.shape, contender.d.dtype, contender.d.device))
    replay()
    for contender, each in zip(contenders, inputs, strict=True):
        dense.check(mode.library, contender, each)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each chain and mode, with the time of both variants."""
    by_chain: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        mode = Mode(row["library"], bool(row["pdl"]))
        by_chain.setdefault((row["recipe"], row["m"], mode), []).append(row)
    lines = []
    for chain, variants in by_chain.items():
        times = (value for row in variants for value in (row["us"], row["of_peer"]))
        lines.append((*chain, *times, variants[0]["target"], variants[0]["floor_us"]))
    headers = [name for l2 in dict.fromkeys(row["l2"] for row in rows) for name in (f"{l2} us", "of peer")]
    return harness.table(("recipe", "m", "chain", *headers, "target", "floor us"), lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chain", description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--m", nargs="+", type=harness.positive, default=list(MS), help="values of m")
    parser.add_argument("--samples", type=harness.positive, default=SAMPLES, help="of each chain (default %(default)s)")
    parser.add_argument(
        "--replays", type=harness.positive, default=REPLAYS, help="back to back in a warm sample (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--warm-peer", action="store_true", help="compile DeepGEMM's kernels in parallel first")
    parser.add_argument("--list", action="store_true", help="print the chain and its floors; needs no GPU")
    harness.add_jobs_option(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    options = parse(arguments)
    chains = [(recipe, m, [Shape(m, n, k) for n, k in LAYERS]) for recipe in options.recipes for m in options.m]
    if options.list:
        print("n x k:", ", ".join(f"{n}x{k}" for n, k in LAYERS))
        floors = [(NAMES[r], m, chain_floor_us(shapes, RECIPES[NAMES[r]].operand_bytes)) for r, m, shapes in chains]
        print(harness.table(("recipe", "m", "floor us"), floors))
        return 0
    harness.require_gpu()
    measured = dense.provenance()
    say(measured)
    problems = [GemmProblem(s.n, s.k, NAMES[recipe], s.m) for recipe, _, shapes in chains for s in shapes]
    harness.prewarm(problems, options.jobs)
    if options.warm_peer:
        dense.warm_peer([(recipe, shape) for recipe, _, shapes in chains for shape in dict.fromkeys(shapes)], 14)

    timer, rows = CudaTimer(), []
    timers: dict[str, Timer] = {"warm": WarmTimer(timer, options.replays), "flushed": timer}
    with CsvLog(options.out, COLUMNS) as log:
        for recipe, m, shapes in chains:
            say(f"{recipe}, m = {m}")
            try:
                inputs = [Inputs(shape, options.seed + index) for index, shape in enumerate(shapes)]
                found = run_chain(recipe, inputs, timers, options.samples, options.replays)
            except RuntimeError as error:
                say(f"stopped at {recipe}, m = {m}: {harness.error_text(error)}")
                break
            for row in found:
                row["measured"] = measured
                rows.append(row)
                log.write(row)
    print()
    print(f"us of {len(LAYERS)} GEMMs; of peer: over {PEER}'s. {measured}")
    missing = dict.fromkeys(f"{row['case']}: {row['error']}" for row in rows if row["error"])
    if missing:
        print("missing:", *missing, sep="\n  ")
    print(summary(rows))
    wanted = sum(len(MODES[recipe]) * len(timers) for recipe, _, _ in chains)
    return int(len(rows) < wanted or any(row["us"] is None for row in rows if row["library"] == OURS))


if __name__ == "__main__":
    raise SystemExit(main())
