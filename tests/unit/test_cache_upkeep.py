from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from support import KEY, SPEC, make_cubin

from jitgemm import cache_upkeep, settings
from jitgemm.cache import KernelCache, encode
from jitgemm.cache_key import build_digest, cache_key
from jitgemm.cache_upkeep import clear, keep_bound, prune, verify
from jitgemm.compiler import Cubin, CubinMetadata, NvrtcLibrary
from jitgemm.errors import CompileError
from jitgemm.families.base import KernelSpec
from jitgemm.families.transpose_scales import FAMILY

DAY = 86_400.0


@pytest.fixture
def cache(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> KernelCache:
    monkeypatch.setattr(cache_upkeep, "find_nvrtc", lambda: NvrtcLibrary(Path("libnvrtc.so"), (13, 5)))
    return KernelCache(tmp_path / "cache")


def _cubin(spec: KernelSpec = SPEC, version: str = "13.5") -> Cubin:
    """What today's templates make of a spec, but for the machine code."""
    fields = make_cubin(cache_key(spec), version).metadata.to_dict()
    fields.update(spec=spec.to_dict(), arch=spec.arch, build=build_digest(spec.arch))
    return Cubin(make_cubin().image, CubinMetadata.from_dict(fields))


def _publish(cache: KernelCache, cubin: Cubin, days_ago: float = 1.0) -> Path:
    path = cache.publish(cubin)
    os.utime(path, (cache.clock.now() - days_ago * DAY,) * 2)
    return path


def _state(cache: KernelCache) -> tuple[str, bool, str | None]:
    (verdict,) = verify(cache)
    return verdict.state, verdict.served, verdict.reason


def test_an_entry_of_today_is_ok(cache: KernelCache) -> None:
    _publish(cache, _cubin())
    assert _state(cache) == ("ok", True, None)


def test_an_entry_of_other_templates_is_stale(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    _publish(cache, _cubin())
    monkeypatch.setattr("jitgemm.cache_key.template_digest", lambda: "others")
    state, served, reason = _state(cache)
    assert (state, served) == ("stale", False)
    assert reason is not None
    assert "templates" in reason


def test_an_entry_of_another_nvrtc_is_stale_and_served_until_there_is_a_better_one(cache: KernelCache) -> None:
    _publish(cache, _cubin(version="13.0"))
    assert _state(cache) == ("stale", True, "NVRTC 13.0 compiled it, and 13.5 is in use here")
    assert prune(cache, stale=True).removed == []
    with settings.override(exact_nvrtc=True):
        assert _state(cache)[:2] == ("stale", False)
    _publish(cache, _cubin())
    assert [(v.state, v.served) for v in verify(cache)] == [("stale", False), ("ok", True)]
    assert [removal.file.nvrtc_version for removal in prune(cache, stale=True).removed] == ["13.0"]


def test_an_entry_too_new_for_the_driver_is_stale(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    _publish(cache, _cubin(version="14.0"))
    for name in ("jitgemm.compiler.driver_version", "jitgemm.cache_upkeep.driver_version"):
        monkeypatch.setattr(name, lambda: (13, 0))
    assert _state(cache) == ("stale", False, "NVRTC 14.0 is too new for the CUDA 13.0 driver")


def test_without_nvrtc_no_version_is_stale(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> NvrtcLibrary:
        raise CompileError("none")

    monkeypatch.setattr(cache_upkeep, "find_nvrtc", none)
    _publish(cache, _cubin(version="12.9"))
    assert _state(cache)[:2] == ("ok", True)


def test_damage_and_wrong_keys_are_told_apart(cache: KernelCache) -> None:
    _publish(cache, _cubin()).write_bytes(b"JITGEMM")
    assert _state(cache)[0] == "damaged"
    cache.path_of(cache_key(SPEC), "13.5").write_bytes(encode(_cubin(FAMILY.spec("sm_90"))))
    assert _state(cache)[0] == "wrong key"
    of_no_build = dataclasses.replace(_cubin().metadata, build="c" * 64)
    cache.path_of(cache_key(SPEC), "13.5").write_bytes(encode(Cubin(make_cubin().image, of_no_build)))
    assert _state(cache)[0] == "wrong key"
    assert prune(cache, stale=True).removed == []
    assert len(prune(cache, damaged=True).removed) == 1
    assert list(verify(cache)) == []


def test_a_bound_holds_and_is_not_looked_after_at_each_publish(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_upkeep, "MOMENT_SECONDS", 0.0)
    monkeypatch.setattr(cache_upkeep, "_unseen", {})
    looks, size = [], KernelCache.size
    monkeypatch.setattr(KernelCache, "size", lambda self: looks.append(size(self)) or looks[-1])
    each = cache.publish(make_cubin()).stat().st_size
    bound = 128 * each  # of which a 64th are two entries
    for number in range(1, 250):
        cache.publish(make_cubin(f"{number:064x}"))
        keep_bound(cache, bound, each)
    assert looks[0] == 2 * each
    assert max(looks) <= bound + 2 * each
    assert bound - 2 * each <= size(cache) <= bound + 2 * each
    assert len(looks) <= 126


def test_damaged_entries_go_even_if_they_were_touched_just_now(cache: KernelCache) -> None:
    cache.publish(_cubin()).write_bytes(b"")
    assert len(prune(cache, damaged=True).removed) == 1


def test_the_least_recently_used_go_first(cache: KernelCache) -> None:
    keys = [digit * 64 for digit in "0123"]
    for key, days in zip(keys, (3, 9, 1, 5), strict=True):
        _publish(cache, make_cubin(key), days)
    size = next(cache.files()).size
    assert cache.size() == 4 * size
    pruned = prune(cache, max_bytes=2 * size + 1)
    assert [removal.file.key for removal in pruned.removed] == [keys[1], keys[3]]
    assert (pruned.entries, pruned.bytes) == (2, 2 * size)
    assert prune(cache, max_bytes=2 * size).removed == []


def test_what_was_unused_for_long_goes(cache: KernelCache) -> None:
    _publish(cache, make_cubin(KEY), 3)
    _publish(cache, make_cubin("f" * 64), 1)
    pruned = prune(cache, unused_seconds=2 * DAY)
    assert [(removal.file.key, removal.reason) for removal in pruned.removed] == [(KEY, "not used for 3.0 days")]


def test_criteria_add_up(cache: KernelCache) -> None:
    _publish(cache, make_cubin("1" * 64), 9).write_bytes(b"damaged")
    os.utime(cache.path_of("1" * 64, "13.5"), (1, 1))
    for key, days in (("2" * 64, 8), ("3" * 64, 3), ("4" * 64, 2)):
        _publish(cache, make_cubin(key), days)
    size = max(file.size for file in cache.files())
    pruned = prune(cache, max_bytes=size, unused_seconds=7 * DAY, damaged=False)
    assert len(pruned.removed) == 3
    assert [file.key[0] for file in cache.files()] == ["4"]


def test_a_dry_run_says_the_same_and_removes_nothing(cache: KernelCache) -> None:
    for key in "123":
        _publish(cache, make_cubin(key * 64))
    dry = prune(cache, unused_seconds=0.0, dry_run=True)
    assert len(list(cache.files())) == 3
    wet = prune(cache, unused_seconds=0.0)
    assert dry == wet
    assert (wet.entries, wet.bytes) == (0, 0)


def test_an_entry_that_was_used_while_prune_looked_stays(cache: KernelCache) -> None:
    _publish(cache, make_cubin())
    (file,) = cache.files()
    assert cache.find(KEY) is not None
    assert not cache.remove_file(file)
    assert cache.find(KEY) is not None


def test_prune_and_clear_sweep_and_leave_what_is_not_theirs(cache: KernelCache) -> None:
    _publish(cache, make_cubin())
    with cache.lock(KEY):
        pass
    (cache.directory / "staging/left-over").write_bytes(b"half")
    tuned = cache.directory / "tuned"
    tuned.mkdir()
    (tuned / "h200.jsonl").write_text("{}")
    prune(cache)
    assert not list((cache.directory / "staging").iterdir())
    cleared = clear(cache)
    assert (len(cleared.removed), cleared.entries) == (1, 0)
    assert (tuned / "h200.jsonl").exists()
    assert (cache.directory / f"locks/{KEY}.lock").exists()


def test_nothing_is_made_where_there_is_no_cache(cache: KernelCache) -> None:
    assert list(verify(cache)) == []
    assert prune(cache, max_bytes=0, stale=True, damaged=True, unused_seconds=0).removed == []
    assert clear(cache).removed == []
    assert not cache.directory.exists()
