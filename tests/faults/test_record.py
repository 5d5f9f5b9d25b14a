"""``JITGEMM_RECORD``: every problem once a process, whole lines whoever writes, and never a failed call."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support import environment, in_forked_child

import jitgemm
from jitgemm.cache_tools.problems import from_shapes_file
from jitgemm.families.gemm import GemmProblem
from jitgemm.ops import gemm
from jitgemm.record import record

pytestmark = pytest.mark.usefixtures("cache_dir")


def problems_in(path: Path) -> list[GemmProblem]:
    return [named.problem for named in from_shapes_file(path)]


def _call(m: int, n: int, k: int, d_dtype: torch.dtype = torch.bfloat16) -> None:
    a, b = torch.ones(m, k, dtype=torch.bfloat16), torch.ones(n, k, dtype=torch.bfloat16)
    jitgemm.bf16_gemm_nt(a, b, torch.empty(m, n, dtype=d_dtype))


def test_calls_record_each_problem_once_whatever_its_m(tmp_path: Path) -> None:
    path = tmp_path / "shapes.jsonl"
    _call(4, 32, 64)
    with jitgemm.override(record=path):
        for m in (1, 4, 4, 7):
            _call(m, 32, 64)
        _call(4, 32, 64, torch.float32)
        _call(4, 48, 64)
    _call(4, 64, 64)
    assert problems_in(path) == [
        GemmProblem(32, 64, "bf16"),
        GemmProblem(32, 64, "bf16", d_dtype="fp32"),
        GemmProblem(48, 64, "bf16"),
    ]
    assert all("m" not in json.loads(line) for line in path.read_text().splitlines())


def test_a_refused_call_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_GPU", "cpu")  # where TMA decides
    a, b = torch.ones(4, 60, dtype=torch.bfloat16), torch.ones(32, 60, dtype=torch.bfloat16)
    with jitgemm.override(record=tmp_path / "shapes.jsonl"), pytest.raises(jitgemm.ProblemError):
        jitgemm.bf16_gemm_nt(a, b, torch.empty(4, 32, dtype=torch.bfloat16))
    assert not (tmp_path / "shapes.jsonl").exists()


def _record_many(path: Path, first: int, count: int) -> None:
    for n in range(first, first + count):
        record(path, GemmProblem(n, 64, "fp8_1x128_128x128"))


def test_lines_of_many_processes_and_threads_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "shapes.jsonl"
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_record_many, args=(path, 1, 500)) for _ in range(3)]
    for other in others:
        other.start()
    threads = [threading.Thread(target=_record_many, args=(path, 1, 500)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for one in (*threads, *others):
        one.join()
    found = problems_in(path)  # which a torn line would end
    assert len(found) == 4 * 500  # once a process, though eight threads asked
    assert len(set(found)) == 500


def test_a_forked_child_adds_what_its_parent_has_not(tmp_path: Path) -> None:
    path = tmp_path / "shapes.jsonl"
    _record_many(path, 1, 3)

    def child() -> None:
        _record_many(path, 1, 5)

    assert in_forked_child(child) == 0
    assert [problem.n for problem in problems_in(path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("fault", ["no folder", "a folder", "a fifo", "a file as folder"])
def test_a_file_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "place"
    if fault == "no folder":
        path = path / "shapes.jsonl"
    elif fault == "a folder":
        path.mkdir()
    elif fault == "a fifo":
        os.mkfifo(path)
    else:
        path.write_text("")
        path = path / "shapes.jsonl"
    with caplog.at_level(logging.WARNING, logger="jitgemm"), jitgemm.override(record=path):
        for n in (16, 32, 48):
            _call(4, n, 64)
    (warning,) = caplog.records
    assert f"JITGEMM_RECORD: problems cannot be added to {path}: " in warning.getMessage()


def test_a_full_disk_costs_one_warning(tmp_path: Path) -> None:
    path = tmp_path / "shapes.jsonl"
    path.write_bytes(b"#" * 4095 + b"\n")

    def child() -> None:
        warnings: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda entry: warnings.append(entry.getMessage())  # type: ignore[method-assign]
        logging.getLogger("jitgemm").addHandler(handler)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        _record_many(path, 1, 3)
        assert len(warnings) == 1
        assert str(path) in warnings[0]

    assert in_forked_child(child) == 0


def test_run_once_anywhere_then_prewarm_everywhere(tmp_path: Path) -> None:
    """A process on the CPU records; prewarm reads what it wrote."""
    path = tmp_path / "shapes.jsonl"
    program = (
        "import torch, jitgemm\n"
        "x = torch.randn(8, 256, dtype=torch.bfloat16)\n"
        "a, b = jitgemm.per_token_cast_to_fp8(x), jitgemm.per_block_cast_to_fp8(x)\n"
        "jitgemm.fp8_gemm_nt(a, b, torch.empty(8, 8, dtype=torch.bfloat16))\n"
    )
    subprocess.run([sys.executable, "-c", program], env=environment(JITGEMM_RECORD=str(path)), check=True, timeout=100)
    gemms = [problem for problem in problems_in(path) if isinstance(problem, GemmProblem)]  # beside the casts
    assert gemms == [GemmProblem(8, 256, "fp8_1x128_128x128")]
    done = subprocess.run(
        [sys.executable, "-m", "jitgemm.cache_tools.cli", "prewarm", "--shapes", str(path), "--dry-run", "--json"],
        env=environment(JITGEMM_CACHE_DIR=str(tmp_path / "cache")),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert json.loads(done.stdout)["needed"] > 1, done.stderr
