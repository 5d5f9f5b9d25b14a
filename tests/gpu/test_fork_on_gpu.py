"""Scenario 11: CUDA in a forked child."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import environment

pytestmark = pytest.mark.gpu

FORKED = """
import os, signal
import torch
import jitgemm

a, b = (torch.randn(64, 256, dtype=torch.bfloat16, device="cuda") for _ in range(2))
d = torch.empty(64, 64, dtype=torch.bfloat16, device="cuda")
less = a[:32], b, d[:32]  # here, for torch's views are errors in the child too
jitgemm.bf16_gemm_nt(a, b, d)
torch.cuda.synchronize()
if os.fork() == 0:
    signal.alarm(60)
    for given in ((a, b, d), less):  # with the plan of the parent, and with a plan to be made
        try:
            jitgemm.bf16_gemm_nt(*given)
            print("no error", flush=True)
        except Exception as error:
            print(type(error).__name__, " ".join(str(error).split()), flush=True)
    os._exit(0)
os.wait()
jitgemm.bf16_gemm_nt(a, b, d)
torch.cuda.synchronize()
print("the parent works", flush=True)
"""


def test_cuda_in_a_forked_child_is_a_clear_error(tmp_path: Path) -> None:
    done = subprocess.run(
        (sys.executable, "-c", FORKED),
        env=environment(JITGEMM_CACHE_DIR=str(tmp_path / "cache")),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *errors, last = done.stdout.splitlines()
    assert last == "the parent works"
    assert len(errors) == 2
    for error in errors:
        assert "fork" in error, error
        assert "spawn" in error, error
