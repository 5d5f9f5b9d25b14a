"""Scenarios 19 to 26: directories, users, clocks, pruning beside readers, other environments and architectures.

Scenario 27, the capture of CUDA graphs, is in ``tests/gpu`` and, without a GPU, in ``tests/unit/test_builder.py``.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import KEY, NOBODY, ROOT, SPEC, environment, in_forked_child, in_processes, make_cubin, warnings_of

from jitgemm import builder, compiler, settings
from jitgemm.cache import KernelCache, default_cache, logger
from jitgemm.cache_key import cache_key
from jitgemm.cache_upkeep import MOMENT_SECONDS, prune, verify
from jitgemm.compiler import Cubin
from jitgemm.errors import CacheMissError
from jitgemm.families.base import KernelSpec
from jitgemm.families.transpose_scales import FAMILY

YEAR = 365 * 86_400.0
DAY = 86_400.0


def _fill(cache: KernelCache, count: int, *, age: float = 3600.0, bytes_each: int = 10_000) -> list[str]:
    """Entries whose last uses lie a minute apart, the first the longest ago, ``age`` seconds before the last; keys."""
    keys = [f"{index:064x}" for index in range(count)]
    now = cache.clock.now()
    for index, key in enumerate(keys):
        path = cache.publish(make_cubin(key, image=bytes(bytes_each)))
        os.utime(path, (now - age - 60 * (count - index),) * 2)
    return keys


def _keys(cache: KernelCache) -> list[str]:
    return [file.key for file in cache.files()]


def _files_below(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_importing_and_looking_up_write_nothing_anywhere(tmp_path: Path) -> None:
    """Scenario 19, as told by Python's audit hook: no file is opened for writing, made, renamed or removed."""
    code = """
import sys
touched = []
def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if flags & 0o3103 and str(path) != "/dev/null":  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
            touched.append((event, str(path)))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"):
        touched.append((event, *map(str, arguments)))
sys.addaudithook(watch)
import jitgemm
from jitgemm import builder
from support import SPEC
with jitgemm.override(jit="forbid"):
    try:
        builder.build(SPEC)
    except jitgemm.CacheMissError:
        print(touched)
"""
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], env=environment(HOME=str(home)), capture_output=True, text=True, cwd=home
    )
    assert done.stdout == "[]\n", (done.stdout, done.stderr)
    assert _files_below(home) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user that has no name")
def test_a_user_without_name_or_home_has_a_fixed_place_and_is_told(cache_dir: Path) -> None:
    """Scenario 20."""
    from jitgemm import cache

    user = 54321
    importlib.import_module("platformdirs")
    builder.build(SPEC)  # imports all that it needs, which that user may not be able to read
    fallback = Path(f"/tmp/jitgemm-{user}")
    assert not fallback.exists()

    def child() -> None:
        for name in ("HOME", "XDG_CACHE_HOME", "JITGEMM_CACHE_DIR"):
            os.environ.pop(name, None)
        settings.reload()
        builder.forget()
        cache._user_directory.cache_clear()
        with warnings_of(logger) as texts:
            assert builder.build(SPEC).source == "compiled"
            builder.forget()
            assert builder.build(SPEC).source == "disk"
        assert default_cache().directory == fallback
        (text,) = texts
        assert "no home directory" in text
        assert str(fallback) in text

    try:
        assert in_forked_child(child, user=user) == 0
        assert (fallback.stat().st_uid, fallback.stat().st_mode & 0o777) == (user, 0o700)
    finally:
        shutil.rmtree(fallback, ignore_errors=True)


# The clock


@pytest.mark.parametrize("shift", [YEAR, -YEAR])
def test_a_clock_that_is_a_year_off_expires_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    """Scenario 21: prunes, uses and new entries under a wrong clock, and prunes under the right one after that."""
    cache = KernelCache(tmp_path / "cache")
    keys = _fill(cache, 6, age=DAY)
    right = time.time
    with monkeypatch.context() as wrong:
        wrong.setattr(time, "time", lambda: right() + shift)
        assert prune(cache, unused_seconds=30 * DAY).removed == []
        assert cache.find(keys[2]) is not None
        cache.publish(make_cubin(KEY))
        assert prune(cache, unused_seconds=30 * DAY).removed == []
    for _ in range(3):  # and back, and forth
        assert prune(cache, unused_seconds=30 * DAY).removed == []
        with monkeypatch.context() as wrong:
            wrong.setattr(time, "time", lambda: right() + shift)
            assert prune(cache, unused_seconds=30 * DAY).removed == []
    assert len(_keys(cache)) == 7
    # What is over a bound goes in the order of use all the same, and no more than that.
    size = next(cache.files()).size
    pruned = prune(cache, max_bytes=5 * size)
    assert [removal.file.key for removal in pruned.removed] == keys[:2]


@pytest.mark.parametrize("shift", [YEAR, -YEAR])
def test_entries_dated_a_year_off_still_obey_a_bound(tmp_path: Path, shift: float) -> None:
    """Scenario 21: dates from another machine's clock."""
    cache = KernelCache(tmp_path / "cache")
    keys = _fill(cache, 6, age=-shift)
    size = next(cache.files()).size
    assert [removal.file.key for removal in prune(cache, max_bytes=4 * size).removed] == keys[:2]


def test_time_passes_while_the_cache_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenario 21's other half: what really is unused for long goes."""
    cache = KernelCache(tmp_path / "cache")
    keys = _fill(cache, 4)
    right = time.time
    for day in range(1, 41):
        monkeypatch.setattr(time, "time", lambda day=day: right() + day * DAY)
        assert cache.find(keys[1]) is not None
    assert sorted(removal.file.key for removal in prune(cache, unused_seconds=30 * DAY).removed) == [
        keys[0],
        keys[2],
        keys[3],
    ]
    assert _keys(cache) == [keys[1]]


# Prune beside others


def test_an_entry_used_a_moment_ago_survives(tmp_path: Path) -> None:
    """Scenario 22."""
    cache = KernelCache(tmp_path / "cache")
    keys = _fill(cache, 5)
    assert cache.find(keys[0]) is not None
    pruned = prune(cache, max_bytes=0, unused_seconds=0, stale=True)
    assert sorted(removal.file.key for removal in pruned.removed) == keys[1:]
    assert _keys(cache) == [keys[0]]


def test_readers_finish_or_miss_while_everything_is_pruned(tmp_path: Path) -> None:
    """Scenario 22: one prunes without pause, one publishes, four read."""
    directory = tmp_path / "cache"
    keys = _fill(KernelCache(directory), 20)
    end = time.monotonic() + 1.0

    def work(index: int) -> dict[str, int]:
        cache = KernelCache(directory)
        counts = {"hits": 0, "misses": 0, "removed": 0}
        turn = 0
        with warnings_of(logger) as texts:
            while time.monotonic() < end:
                key = keys[turn % len(keys)]
                turn += 1
                if index == 0:
                    for file in cache.files():
                        with contextlib.suppress(FileNotFoundError):
                            os.utime(file.path, (1, 1))
                    counts["removed"] += len(prune(cache, max_bytes=0).removed)
                elif index == 1:
                    cache.publish(make_cubin(key, image=bytes(10_000)))
                else:
                    found = cache.find(key)
                    assert found in (None, make_cubin(key, image=bytes(10_000)))
                    counts["hits" if found else "misses"] += 1
        assert texts == []
        return counts

    pruner, _, *readers = in_processes(6, work)
    assert pruner["removed"] > 0
    assert sum(reader["hits"] for reader in readers) > 0
    assert sum(reader["misses"] for reader in readers) > 0


def test_two_prunes_at_once_both_succeed_and_together_remove_what_one_would(tmp_path: Path) -> None:
    """Scenario 23, by the command, as two processes."""
    cache = KernelCache(tmp_path / "cache")
    keys = _fill(cache, 200, bytes_each=1000)
    size = next(cache.files()).size
    command = [sys.executable, "-m", "jitgemm.cache_tools.cli", "prune", "--max-size", str(80 * size), "--json"]
    variables = environment(JITGEMM_CACHE_DIR=str(cache.directory))
    both = [subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert f'"bytes": {80 * size}'.encode() in out
        assert err == b""
    assert _keys(cache) == keys[120:]


def test_many_prunes_at_once_remove_each_entry_once(tmp_path: Path) -> None:
    """Scenario 23, let go at the same instant."""
    directory = tmp_path / "cache"
    keys = _fill(KernelCache(directory), 100, bytes_each=1000)
    size = next(KernelCache(directory).files()).size

    def work(index: int) -> list[str]:
        return [removal.file.key for removal in prune(KernelCache(directory), max_bytes=40 * size).removed]

    removed = [key for keys_of_one in in_processes(4, work) for key in keys_of_one]
    assert sorted(removed) == keys[:60]
    assert _keys(KernelCache(directory)) == keys[60:]


def test_a_bounded_cache_keeps_what_was_used_last(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``JITGEMM_CACHE_MAX_BYTES``, enforced when a kernel is published."""
    cache = default_cache()
    keys = _fill(cache, 5)
    size = next(cache.files()).size
    with settings.override(cache_max_bytes=4 * size):
        assert builder.build(SPEC).source == "compiled"
    assert keys[0] not in _keys(cache)
    assert {keys[4], cache_key(SPEC)} <= set(_keys(cache))
    assert sum(file.size for file in cache.files()) <= 4 * size
    with settings.override(cache_max_bytes=0):  # what was published just now stays
        builder.forget()
        assert builder.build(SPEC).source == "disk"
    assert MOMENT_SECONDS > 1


# Other environments


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package in another place, with other times."""
    root = tmp_path_factory.mktemp("elsewhere")
    for folder in ("jitgemm", "heuristics", "templates", "cache_tools"):
        shutil.copytree(
            ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"), copy_function=shutil.copyfile
        )
    shutil.copyfile(ROOT / "tests/support.py", root / "support.py")
    return root


def _in(root: Path, cache_dir: Path) -> str:
    """Where a process that has the package in ``root`` gets the kernel from."""
    code = "from support import SPEC; from jitgemm import builder; print(builder.build(SPEC).source)"
    variables = {**environment(JITGEMM_CACHE_DIR=str(cache_dir)), "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _append(text: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(path.read_text() + text)

    return change


def test_the_same_content_elsewhere_hits_a_cache_that_was_moved(elsewhere: Path, cache_dir: Path) -> None:
    """Scenario 24: neither paths nor times are in a key, nor code that decides no kernel."""
    builder.build(SPEC)
    moved = cache_dir.rename(cache_dir.with_name("moved"))
    assert _in(elsewhere, moved) == "disk"
    unrelated = elsewhere / "jitgemm/plan.py"
    unrelated.write_text(unrelated.read_text() + "\n# a remark\n")
    assert _in(elsewhere, moved) == "disk"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("templates/transpose_scales.cu.jinja", _append("\n// a remark\n")),
        ("templates/include/common.cuh", _append("\n// a remark\n")),
        ("jitgemm/families/transpose_scales.py", _append("\n# a remark\n")),
        ("jitgemm/render.py", _append("\n# a remark\n")),
    ],
)
def test_another_template_header_or_generator_is_another_key(
    elsewhere: Path, cache_dir: Path, name: str, change: Callable[[Path], None]
) -> None:
    """Scenario 24; options, suffixes of the architecture and tuning values are in tests/unit/test_cache_key.py."""
    builder.build(SPEC)
    path = elsewhere / name
    before = path.read_text()
    change(path)
    try:
        assert _in(elsewhere, cache_dir) == "compiled"
    finally:
        path.write_text(before)
    states = sorted(verdict.state for verdict in verify(default_cache()))
    assert states == ["ok", "stale"]


def _as_version(version: str) -> Callable[..., Cubin]:
    return lambda source, spec, key: make_cubin(key, version)


def test_a_kernel_too_new_for_the_driver_is_named_and_not_called_damaged(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenario 25."""
    default_cache().publish(make_cubin(cache_key(SPEC), "14.1"))
    monkeypatch.setattr(compiler, "driver_version", lambda: (13, 0))
    monkeypatch.setattr(builder, "driver_version", lambda: (13, 0))
    damaged = builder.stats().damaged
    with (
        settings.override(jit="forbid"),
        pytest.raises(CacheMissError, match=r"NVRTC 14\.1, too new for the CUDA 13\.0"),
    ):
        builder.build(SPEC)
    with warnings_of(logger) as texts:
        built = builder.build(SPEC)
    assert built.source == "compiled"
    assert built.cubin.metadata.nvrtc_version != "14.1"
    builder.forget()
    assert builder.build(SPEC).source == "disk"  # no loop: the one that was compiled serves
    assert texts == []
    assert builder.stats().damaged == damaged
    assert default_cache().versions(cache_key(SPEC))[0] == "14.1"


def test_a_driver_that_refuses_a_kernel_says_both_versions(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenario 25, where the versions promised that it would load."""
    kernel = pytest.importorskip("jitgemm.kernel")
    too_new = builder.Built(make_cubin(version="13.9"), "disk", 0.0)
    monkeypatch.setattr(kernel, "build", lambda spec, capturing, problem: too_new)
    monkeypatch.setattr(kernel, "driver_version", lambda: (13, 0))
    monkeypatch.setattr(kernel.torch.cuda, "is_current_stream_capturing", lambda: False)

    def refuse(*arguments: Any) -> None:
        raise kernel.DriverError("CUDA_ERROR_NO_BINARY_FOR_GPU (209)")

    monkeypatch.setattr(kernel.driver, "load_kernel", refuse)
    for _ in range(2):
        with pytest.raises(kernel.DriverError, match=r"NVRTC 13\.9, was refused by the CUDA 13\.0 driver: .*209"):
            kernel.load(SPEC, 0)


def test_each_architecture_in_a_process_gets_its_own_kernel(cache_dir: Path) -> None:
    """Scenario 26: at the same time, in threads."""
    archs = ("sm_90", "sm_90a", "sm_100a", "sm_120a")
    specs: dict[str, KernelSpec] = {arch: FAMILY.spec(arch) for arch in archs}
    built: dict[str, builder.Built] = {}

    def ask(arch: str) -> None:
        built[arch] = builder.build(specs[arch])

    for source in ("compiled", "disk"):
        threads = [threading.Thread(target=ask, args=(arch,)) for arch in archs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {arch: one.source for arch, one in built.items()} == dict.fromkeys(archs, source)
        assert {arch: one.cubin.metadata.arch for arch, one in built.items()} == {arch: arch for arch in archs}
        assert len({one.cubin.image for one in built.values()}) == len(archs)
        builder.forget()
    assert len({cache_key(spec) for spec in specs.values()}) == len(archs)


def test_layers_serve_and_are_never_written(cache_dir: Path, tmp_path: Path) -> None:
    """A read-only layer below: its hits count, what is missing goes into the first directory, and nobody marks it."""
    layer = tmp_path / "image"
    with settings.override(cache_dir=layer):
        builder.build(SPEC)
    for path in _files_below(layer):
        os.utime(path, (1, 1))
    before = [(path, path.lstat().st_mtime_ns, path.lstat().st_size) for path in _files_below(layer)]
    other = FAMILY.spec("sm_90")
    with settings.override(cache_dir=(cache_dir, layer)):
        builder.forget()
        assert builder.build(SPEC).source == "disk"
        assert not cache_dir.exists()
        assert builder.build(other).source == "compiled"
        assert default_cache().path_of(cache_key(other), "1.0").parent.parent.parent == cache_dir
        builder.forget()
        assert builder.build(other).source == "disk"
        assert [verdict.state for verdict in verify(default_cache())] == ["ok", "ok"]
        assert prune(default_cache(), max_bytes=0, damaged=True, stale=True).removed == []
        default_cache().save_counts()
    assert [(path, path.lstat().st_mtime_ns, path.lstat().st_size) for path in _files_below(layer)] == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give directories away")
def test_every_layer_is_checked(cache_dir: Path, tmp_path: Path) -> None:
    """Scenario 28 for layers."""
    layer = tmp_path / "image"
    layer.mkdir(mode=0o700)
    os.chown(layer, NOBODY, NOBODY)
    with (
        settings.override(cache_dir=(cache_dir, layer)),
        pytest.raises(builder.CacheError, match=f"{layer} belongs to user {NOBODY}"),
    ):
        builder.build(SPEC)
