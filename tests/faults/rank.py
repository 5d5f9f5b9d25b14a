"""A rank of ``test_ranks.py``; ``python rank.py RANK WORLD FOLDER`` prewarms together with the others."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch.distributed as dist

import jitgemm
from jitgemm import builder
from jitgemm.errors import CompileError

PROBLEMS = [{"n": 256, "k": 512, "recipe": "fp8_1x128_128x128"}, {"n": 256, "k": 512, "recipe": "bf16"}]
ABSENT = [{"n": 256, "k": 512, "recipe": "fp8_rowwise"}]


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    late = rank == 0
    time.sleep(0.5 if late else 0.0)
    entered = time.time()
    done = jitgemm.prewarm(PROBLEMS, devices=["h200"], jobs=1)
    left = time.time()
    before = builder.stats()
    jitgemm.prewarm(PROBLEMS, devices=["h200"], jobs=1)
    again = builder.stats()
    try:  # where it fails on one rank, no other waits for ever
        with jitgemm.override(**({"nvrtc": "/nowhere/nvrtc.so", "cache_dir": folder / "own"} if late else {})):
            jitgemm.prewarm(ABSENT, devices=["h200"], jobs=1)
        failed = ""
    except CompileError as error:
        failed = str(error)
    report = {
        "kernels": done.kernels,
        "compiled": done.compiled,
        "entered": entered,
        "left": left,
        "looked_up_again": again.disk_hits + again.misses - before.disk_hits - before.misses,
        "failed": failed,
    }
    (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
