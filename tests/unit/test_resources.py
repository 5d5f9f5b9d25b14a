"""How many compilers may run at once, from the files in which Linux says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from jitgemm.resources import BYTES_PER_JOB, compile_jobs

CORES = 16
ROOM = f"MemTotal: 1 kB\nMemAvailable: {64 << 20} kB\n"  # 64 GB

Files = dict[str, str]


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Files], int]:
    """What is made of such files, on 16 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)))

    def count(files: Files) -> int:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return compile_jobs(tmp_path)

    return count


def _bytes(jobs: float) -> str:
    return f"{int(jobs * BYTES_PER_JOB)}\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, CORES),
        ({"proc/meminfo": ROOM}, CORES),
        ({"proc/meminfo": f"MemAvailable: {5 * BYTES_PER_JOB >> 10} kB\n"}, 5),
        ({"proc/meminfo": "MemAvailable: 1000 kB\n"}, 1),
    ],
)
def test_memory_of_the_machine(jobs: Callable[[Files], int], files: Files, expected: int) -> None:
    assert jobs(files) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a/b/memory.max": _bytes(8.5), "a/b/memory.current": _bytes(2)}, 6),
        ({"a/b/memory.max": "max\n", "a/memory.max": _bytes(4), "a/memory.current": "0\n"}, 4),
        ({"a/b/memory.max": _bytes(4), "a/b/memory.current": _bytes(5)}, 1),
        (
            {
                "a/b/memory.max": _bytes(8),
                "a/b/memory.current": _bytes(7),
                "a/b/memory.stat": f"anon 5\ninactive_file {_bytes(2)}",
            },
            3,
        ),
        ({"memory.max": _bytes(2), "memory.current": "0\n"}, 2),  # a container that sees its own group at the top
        ({"a/b/cpu.max": "300000 100000\n"}, 3),
        ({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 1),
        ({"a/b/cpu.max": "nonsense\n", "a/b/memory.max": ""}, CORES),
    ],
)
def test_control_groups(jobs: Callable[[Files], int], files: Files, expected: int) -> None:
    at_their_place = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    assert jobs({"proc/meminfo": ROOM, "proc/self/cgroup": "0::/a/b\n", **at_their_place}) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory/x/memory.limit_in_bytes": _bytes(7), "memory/x/memory.usage_in_bytes": _bytes(1)}, 6),
        ({"cpu/x/cpu.cfs_quota_us": "400000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, CORES),
    ],
)
def test_control_groups_of_version_1(jobs: Callable[[Files], int], files: Files, expected: int) -> None:
    groups = "5:memory:/x\n4:cpu,cpuacct:/x\n1:name=systemd:/\n"
    at_their_place = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    assert jobs({"proc/meminfo": ROOM, "proc/self/cgroup": groups, **at_their_place}) == expected


def test_this_machine() -> None:
    assert 1 <= compile_jobs() <= len(os.sched_getaffinity(0))
