"""``jitgemm.prewarm`` called by all ranks of a ``torch.distributed`` job on one host."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support import environment

from jitgemm.cache import KernelCache

RANK = Path(__file__).with_name("rank.py")
WORLD = 3
NARROW = {"JITGEMM_TILE_M": "64", "JITGEMM_CLUSTER": "1x1", "JITGEMM_SPLIT_K": "1", "JITGEMM_SWAP_AB": "0"}


def test_ranks_share_the_work_and_leave_together(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(rank), str(WORLD), str(tmp_path)],
            env=environment(JITGEMM_CACHE_DIR=str(cache), **NARROW),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * WORLD, errors
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD)]
    (kernels,) = {report["kernels"] for report in reports}
    assert sum(report["compiled"] for report in reports) == kernels > 3  # each once
    assert min(report["left"] for report in reports) >= max(report["entered"] for report in reports)
    assert {report["looked_up_again"] for report in reports} == {0}  # all is in every rank's memory
    assert "/nowhere/nvrtc.so" in reports[0]["failed"]
    assert [report["failed"] for report in reports[1:]] == [""] * (WORLD - 1)  # and they did not wait for ever
    assert all(entry.problem is None for entry in KernelCache(cache).entries())
