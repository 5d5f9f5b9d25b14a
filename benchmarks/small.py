"""The kernels between the GEMMs raced against torch, eager and compiled, DeepGEMM, and a copy of their bytes. ::

    python -m benchmarks.small --out docs/performance/small_h200.csv
    python -m benchmarks.small --cases act_quant rms_norm --ms 1 8 64 512 4096
    python -m benchmarks.small --cases hc_prenorm --num-splits 1 2 4 8 16 32

Cases are in ``benchmarks.small_rowwise`` (quantizers, norms, SwiGLU, rotary embedding) and ``benchmarks.small_moe``
(hyper-connections and experts). m is tokens, n and k columns of the result and of the input, groups experts. ``ratio``
is the best peer's time over ours; peers are the same function as one writes it in torch, that under ``torch.compile``,
and for the prenorm GEMM DeepGEMM without splits and with 16 (sgl-deep-gemm, where it is installed; at its own shapes,
whatever ``--ms``). ``floor_us`` is 4.8 us and the bytes at 4.3 TB/s; ``of_copy`` the time of a copy that moves as many
bytes over ours, a share of the bandwidth. Each result is compared with the reference first.

After the race, pairs of dependent kernels in one CUDA graph, with programmatic dependent launch and without: the two
should take less than each in a graph of its own, together.

Processes of their own call everything once before, so that what is compiled is in the caches when the race begins.
Exit codes: 0 done, 1 something of ours is missing or wrong, 3 no GPU.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import jitgemm
from benchmarks import chain, dense, harness, small_moe, small_rowwise, small_work
from benchmarks.harness import EMPTY, Call, CsvLog, CudaTimer, Timer, race, say
from benchmarks.small_work import Case, Work, normal

OURS, EAGER, COMPILED, COPY = "jitgemm", "torch", "torch.compile", "copy"
MS = (1, 64, 4096)
SAMPLES = 50
FIXED_US, BYTES_PER_US = 4.8, 4.3e6
FEW_ROWS, MANY_ROWS, LARGE_MB, SHARE = 64, 4096, 16, 0.85  # of the targets
PEERS = {EAGER: "torch_us", COMPILED: "compiled_us", "deepgemm": "deepgemm_us", "deepgemm_16": "deepgemm_16_us"}
COLUMNS = (
    *("case", "m", "n", "k", "groups", "recipe", "ours_us", "best_peer_us", "best_peer", "ratio", "floor_us"),
    *("over_floor", "of_copy", "megabytes", "copy_us", *PEERS.values(), "empty_us", "samples", "errors", "measured"),
)
NAMES = (*small_rowwise.KINDS, *small_moe.NAMES)


def cases(names: Sequence[str], ms: Sequence[int], num_splits: Sequence[int] = ()) -> list[Case]:
    """What is raced: cases of these names for so many tokens."""

    def all_cases() -> Iterator[Case]:
        yield from small_rowwise.cases(ms)
        yield from small_moe.cases(ms, num_splits)

    return [case for case in all_cases() if case.name in names]


def peers_of(work: Work, compiled: bool) -> dict[str, Call]:
    """The calls that ours is raced against."""
    peers: dict[str, Call] = {EAGER: lambda: work.in_torch(*work.arguments)}
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(work.in_torch, dynamic=False)
        peers[COMPILED] = lambda: function(*work.arguments)
    return {**peers, **work.others}


def warm(selection: tuple[Any, ...], compiled: bool, part: int, parts: int) -> None:
    """Call every contender of each ``parts``-th case once; what fails will fail, and be reported, in the race."""
    for case in cases(*selection)[part::parts]:
        try:
            work = case.make()
            calls = [work.ours, *peers_of(work, compiled).values()]
        except Exception:
            continue
        for call in calls:
            try:
                call()
                torch.cuda.synchronize()
            except Exception:
                continue


def copy_of(moved: int) -> Call:
    """A copy that reads and writes so many bytes in all."""
    source, target = (
        torch.empty(max(moved // 32, 1), 4, dtype=torch.int32, device=small_work.DEVICE) for _ in range(2)
    )
    return lambda: target.copy_(source)


def measure(case: Case, timer: Timer, compiled: bool, samples: int) -> dict[str, Any]:
    """A row of the CSV, but for when and on what it was measured."""
    work = case.make()
    right = work.right()
    peers = peers_of(work, compiled)
    timings = race({OURS: work.ours, COPY: copy_of(work.moved), **peers}, samples, timer)
    times = {name: timing.median_us for name, timing in timings.items()}
    ours, copy = times[OURS], times[COPY]
    raced = {name: us for name in peers if (us := times[name]) is not None}
    best = min(raced, key=raced.__getitem__, default=None)
    floor = FIXED_US + work.moved / BYTES_PER_US
    errors = [f"{name}: {timing.error}" for name, timing in timings.items() if timing.error]
    return {
        "case": case.name,
        "m": case.m,
        "n": case.n,
        "k": case.k,
        "groups": case.groups,
        "recipe": case.recipe,
        "ours_us": ours,
        "best_peer_us": None if best is None else raced[best],
        "best_peer": best,
        "ratio": None if best is None or ours is None else raced[best] / ours,
        "floor_us": floor,
        "over_floor": None if ours is None else ours / floor,
        "of_copy": None if ours is None or copy is None else copy / ours,
        "megabytes": work.moved / 1e6,
        "copy_us": copy,
        **{column: times.get(name) for name, column in PEERS.items()},
        "empty_us": times[EMPTY],
        "samples": timings[OURS].samples,
        "errors": " | ".join([*(["wrong result"] * (not right)), *errors]),
    }


def misses(row: Mapping[str, Any], slack_us: float) -> str:
    """The targets that a row misses, if any: against the floor, the copy and the peers."""
    ours, found = row["ours_us"], []
    if ours is None:
        return "no time"
    if row["m"] <= FEW_ROWS and ours > row["floor_us"] + slack_us:
        found.append(f"{ours - row['floor_us']:.1f} us over the floor, not {slack_us}")
    large = row["m"] >= MANY_ROWS and row["megabytes"] >= LARGE_MB and row["of_copy"] is not None
    if large and row["of_copy"] < SHARE:
        found.append(f"{row['of_copy']:.2f} of the copy's bandwidth, not {SHARE}")
    if row["ratio"] is not None and row["ratio"] < 1:
        found.append(f"{row['ratio']:.2f} of {row['best_peer']}'s speed")
    return ", ".join(found)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each case: ratios to the best peer, and shares of the bandwidth where much is moved."""
    lines = []
    for name in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == name]
        ratios = [row["ratio"] for row in mine if row["ratio"] is not None]
        shares = [row["of_copy"] for row in mine if row["of_copy"] is not None and row["megabytes"] >= LARGE_MB]
        over = [row["over_floor"] for row in mine if row["over_floor"] is not None]
        lines.append(
            (
                name,
                len(mine),
                harness.geomean(ratios),
                *(min(x, default=None) for x in (ratios, shares)),
                max(over, default=None),
            )
        )
    headers = ("case", "rows", "ratio", "worst", f"least of copy from {LARGE_MB} MB", "most over floor")
    return harness.table(headers, lines)


def pairs(capture: Callable[[Sequence[Call]], Call], timer: Timer, samples: int) -> str:
    """What two dependent calls take in one graph, and in two."""
    x, weight = normal(FEW_ROWS, 4096, dtype=torch.bfloat16), normal(4096, dtype=torch.bfloat16)
    indices, _ = small_moe.choices(FEW_ROWS, 4096, 256)
    streams, post, comb = normal(FEW_ROWS, 4, 4096, dtype=torch.bfloat16), normal(FEW_ROWS, 4), normal(FEW_ROWS, 4, 4)
    made = jitgemm.moe_permutation(indices, 256, layout="psum")
    chains: dict[str, tuple[Call, Call]] = {
        "rms_norm, act_quant": (lambda: jitgemm.rms_norm(x, weight), lambda: jitgemm.act_quant(x)),
        "hc_post, rms_norm_act_quant": (
            lambda: jitgemm.hc_post(x, streams, post, comb),
            lambda: jitgemm.rms_norm_act_quant(x, weight),
        ),
        "moe_permutation, moe_permute": (
            lambda: jitgemm.moe_permutation(indices, 256, layout="psum"),
            lambda: jitgemm.moe_permute(x, made),
        ),
    }
    rows = []
    for name, calls in chains.items():
        graphs = {"first": capture(calls[:1]), "second": capture(calls[1:]), "both": capture(calls)}
        with jitgemm.override(pdl=True):
            graphs["both, PDL"] = capture(calls)
        times = {which: timing.median_us for which, timing in race(graphs, samples, timer).items()}
        apart, together = (times["first"] or 0) + (times["second"] or 0), times["both, PDL"]
        rows.append((name, *(times[which] for which in graphs), together / apart if together and apart else None))
    return harness.table(("pair", "first us", "second us", "both us", "with PDL us", "of the sum"), rows)


def line(row: Mapping[str, Any]) -> str:
    """One line on a row."""
    k = "" if row["k"] is None else f" k={row['k']}"
    return (
        f"{row['case']} m={row['m']} n={row['n']}{k} {row['recipe']}: ours {harness.fixed(row['ours_us'])},"
        f" {row['best_peer']} {harness.fixed(row['best_peer_us'])}, ratio {harness.fixed(row['ratio'])},"
        f" floor {harness.fixed(row['floor_us'])}, of copy {harness.fixed(row['of_copy'])} {row['errors']}".rstrip()
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="(default: all)")
    parser.add_argument("--ms", nargs="+", type=harness.positive, default=MS, help="tokens (default %(default)s)")
    parser.add_argument("--num-splits", nargs="+", type=harness.positive, default=(), help="of the prenorm GEMM")
    parser.add_argument("--samples", type=harness.positive, default=SAMPLES, help="of each (default %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes most of the time")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--list", action="store_true", help="print the cases; needs no GPU")
    harness.add_jobs_option(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the race; the exit code."""
    options = parse(arguments)
    selection = options.cases, options.ms, options.num_splits
    chosen = cases(*selection)
    if options.list:
        print(
            harness.table(
                ("case", "m", "n", "k", "groups", "recipe"),
                [(c.name, c.m, c.n, c.k, c.groups, c.recipe) for c in chosen],
            )
        )
        return 0
    harness.require_gpu()
    measured = dense.provenance()
    say(measured)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the processes that warm are parallel enough
    with harness.spawn_pool(options.jobs) as pool:
        parts = range(options.jobs)
        waiting = [pool.submit(warm, selection, not options.no_compile, part, options.jobs) for part in parts]
        for future in waiting:
            future.result()
    timer, rows, missed = CudaTimer(), [], []
    with CsvLog(options.out, COLUMNS) as log:
        for case in chosen:
            row = {**measure(case, timer, not options.no_compile, options.samples), "measured": measured}
            log.write(row)
            rows.append(row)
            say(line(row))
            if why := misses(row, case.slack_us):
                missed.append(f"  {row['case']} m={row['m']} n={row['n']} k={row['k'] or '-'}: {why}")
    say(summary(rows))
    if missed:
        say("\n".join(["targets missed:", *missed]))
    say(pairs(chain.capture, timer, options.samples))
    ratio = harness.geomean([row["ratio"] for row in rows if row["ratio"] is not None])
    say(f"ratio to the best peer, all {len(rows)} rows: {harness.fixed(ratio)} (geomean)")
    return int(any(row["ours_us"] is None or "wrong" in row["errors"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
