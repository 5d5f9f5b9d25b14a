"""Scenario 12: SIGKILL at each step of a publish; afterwards the key is a miss or a whole entry."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support import KEY, in_forked_child, make_cubin

from jitgemm import cache as module
from jitgemm.cache import KernelCache

NEW = make_cubin(image=os.urandom(100_000))  # larger than any buffer, so that a kill can leave a part
DAMAGED = b"JITGEMM\x02 and nothing more"


def _publish_and_die_at(line: int, directory: Path) -> int:
    """Exit code of a process that publishes and is killed before the ``line``-th line of cache.py that it runs."""
    seen = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def child() -> None:
        cache = KernelCache(directory)
        sys.settrace(trace)
        cache.publish(NEW)
        sys.settrace(None)

    return in_forked_child(child)


@pytest.mark.parametrize("before", ["nothing", "a damaged entry"])
def test_killed_at_each_step(tmp_path: Path, before: str) -> None:
    outcomes = []
    line = code = 0
    while code != 0 or line == 0:
        line += 1
        cache = KernelCache(tmp_path / str(line))
        if before == "a damaged entry":
            cache.publish(NEW).write_bytes(DAMAGED)
        code = _publish_and_die_at(line, cache.directory)
        assert code in (0, -signal.SIGKILL)
        found = cache.find(KEY)
        assert found in (None, NEW)
        outcomes.append(found == NEW)
        cache.publish(NEW)  # the next use heals the key
        assert cache.find(KEY) == NEW
        cache.sweep()
        assert os.listdir(cache.directory / "staging") == []
    assert outcomes == sorted(outcomes)  # first invisible, then whole
    assert outcomes.count(False) > 20
    assert outcomes.count(True) > 3
