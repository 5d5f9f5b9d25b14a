"""The problems that a process meets, added to the shapes file of ``JITGEMM_RECORD``."""

from __future__ import annotations

import json
import os
from pathlib import Path

from jitgemm.cache import logger
from jitgemm.problem import Problem

_recorded: dict[tuple[Path, Problem], object] = {}
_failed: dict[Path, object] = {}


def record(path: Path, problem: Problem) -> None:
    """Add a problem without its m to a shapes file, once a process; where that fails, warn once.

    No lock: ``dict.setdefault`` is atomic, which also holds in a child that was forked meanwhile. A line is one write
    to a file that is open for appending, so lines of other processes on this host stay whole.
    """
    problem, mine = problem.without_m(), object()
    if _recorded.setdefault((path, problem), mine) is not mine:
        return
    line = json.dumps(problem.to_dict()).encode() + b"\n"
    try:
        # Not blocking, in case it is a FIFO that nobody reads.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o644)
        try:
            written = os.write(descriptor, line)
        finally:
            os.close(descriptor)
        why = None if written == len(line) else "the disk is full"
    except OSError as error:
        why = error.strerror
    if why is not None and _failed.setdefault(path, mine) is mine:
        logger.warning("JITGEMM_RECORD: problems cannot be added to %s: %s", path, why)
