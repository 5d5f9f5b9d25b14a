from __future__ import annotations

import threading
from pathlib import Path

import pytest

from jitgemm import settings
from jitgemm.errors import SettingsError


def test_an_empty_environment_gives_the_defaults_of_the_table() -> None:
    values = settings.from_environment({"PATH": "/bin"})
    assert values == settings.Settings()
    for variable in settings.VARIABLES:
        assert getattr(values, variable.field) == variable.default


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("JITGEMM_CACHE_DIR", "/somewhere/else", "cache_dir", (Path("/somewhere/else"),)),
        ("JITGEMM_CACHE_DIR", "/first:/second", "cache_dir", (Path("/first"), Path("/second"))),
        ("JITGEMM_CACHE_MAX_BYTES", "1000", "cache_max_bytes", 1000),
        ("JITGEMM_CACHE_MAX_BYTES", "2g", "cache_max_bytes", 2 << 30),
        ("JITGEMM_CACHE_GROUP", "1", "cache_group", True),
        ("JITGEMM_JIT", "forbid", "jit", "forbid"),
        ("JITGEMM_NVRTC", "/lib/libnvrtc.so.12", "nvrtc", Path("/lib/libnvrtc.so.12")),
        ("JITGEMM_EXACT_NVRTC", "1", "exact_nvrtc", True),
        ("JITGEMM_EXACT_NVRTC", "off", "exact_nvrtc", False),
        ("JITGEMM_LOCK_TIMEOUT", "0.5", "lock_timeout", 0.5),
        ("JITGEMM_REMOTE", "s3://bucket/some/prefix/", "remote", "s3://bucket/some/prefix"),
        ("JITGEMM_REMOTE", "gs://bucket", "remote", "gs://bucket"),
        ("JITGEMM_REMOTE", "file:///shared/by all@here", "remote", "file:///shared/by all@here"),
        ("JITGEMM_REMOTE", "memory://name", "remote", "memory://name"),
        ("JITGEMM_REMOTE_TIMEOUT", "0.25", "remote_timeout", 0.25),
        ("JITGEMM_REMOTE_WRITE", "1", "remote_write", True),
        ("JITGEMM_DEBUG", "1", "debug", True),
        ("JITGEMM_TILE_M", "128", "tile_m", 128),
        ("JITGEMM_CLUSTER", "2x1", "cluster", (2, 1)),
        ("JITGEMM_SWAP_AB", "0", "swap_ab", False),
        ("JITGEMM_CONFIG", "64x48x128 s12 c2x1", "config", "64x48x128 s12 c2x1"),
        ("JITGEMM_TUNED", "0", "tuned", False),
        ("JITGEMM_AUTOTUNE", "1", "autotune", True),
        ("JITGEMM_BATCH_INVARIANT", "on", "batch_invariant", True),
        ("JITGEMM_JIT", "", "jit", "allow"),
    ],
)
def test_accepted_values(name: str, text: str, field: str, value: object) -> None:
    assert getattr(settings.from_environment({name: text}), field) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("JITGEMM_CACHE_DIR", "relative/path"),
        ("JITGEMM_CACHE_DIR", "~no-such-user/cache"),
        ("JITGEMM_CACHE_DIR", "/first::/second"),
        ("JITGEMM_CACHE_DIR", "/first:second"),
        ("JITGEMM_CACHE_MAX_BYTES", "-1"),
        ("JITGEMM_CACHE_MAX_BYTES", "1.5G"),
        ("JITGEMM_CACHE_MAX_BYTES", "1P"),
        ("JITGEMM_CACHE_GROUP", "team"),
        ("JITGEMM_JIT", "sometimes"),
        ("JITGEMM_NVRTC", "libnvrtc.so"),
        ("JITGEMM_EXACT_NVRTC", "maybe"),
        ("JITGEMM_LOCK_TIMEOUT", "-1"),
        ("JITGEMM_LOCK_TIMEOUT", "nan"),
        ("JITGEMM_REMOTE", "/a/path"),
        ("JITGEMM_REMOTE", "s3://"),
        ("JITGEMM_REMOTE", "s3:///prefix"),
        ("JITGEMM_REMOTE", "s3://key:secret@bucket/prefix"),
        ("JITGEMM_REMOTE", "simplecache::s3://bucket"),
        ("JITGEMM_REMOTE", "https://host/path"),
        ("JITGEMM_REMOTE", "file://relative/path"),
        ("JITGEMM_REMOTE", "file:///"),
        ("JITGEMM_REMOTE", "memory://"),
        ("JITGEMM_REMOTE", "s3://bucket/\x1b[31m"),
        ("JITGEMM_REMOTE_TIMEOUT", "0"),
        ("JITGEMM_TILE_M", "0"),
        ("JITGEMM_TILE_N", "wide"),
        ("JITGEMM_CLUSTER", "0x1"),
        ("JITGEMM_CONFIG", "64x48"),
        ("JITGEMM_AUTOTUNE", "always"),
    ],
)
def test_a_bad_value_names_the_variable_the_value_and_what_is_accepted(name: str, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings.from_environment({name: text})
    accepted = next(variable.accepts for variable in settings.VARIABLES if variable.name == name)
    assert all(part in str(caught.value) for part in (name, repr(text), accepted))


def test_an_unknown_variable_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"JITGEMM_CACHEDIR.*JITGEMM_CACHE_DIR"):
        settings.from_environment({"JITGEMM_CACHEDIR": "/x"})


def test_override_nests_and_ends() -> None:
    before = settings.current()
    with settings.override(tile_m=128, cluster=(2, 1)) as outer:
        assert (outer.tile_m, outer.cluster) == (128, (2, 1))
        with settings.override(tile_m="64", cluster=None):
            assert settings.current().tuning() == {**before.tuning(), "tile_m": 64}
        assert settings.current() is outer
    assert settings.current() is before


def test_override_ends_when_its_block_raises() -> None:
    before = settings.current()
    with pytest.raises(RuntimeError), settings.override(jit="forbid"):
        raise RuntimeError
    assert settings.current() is before


@pytest.mark.parametrize("values", [{"tile_q": 1}, {"tile_m": -1}, {"jit": "never"}, {"cache_dir": "relative"}])
def test_override_refuses_what_the_environment_would_refuse(values: dict[str, object]) -> None:
    with pytest.raises(SettingsError), settings.override(**values):
        pass


def test_equal_settings_are_one_object_with_one_generation() -> None:
    with settings.override(tile_n=96) as first:
        pass
    with settings.override(tile_n="96") as second:
        pass
    assert first is second
    assert first.generation != settings.current().generation


def test_other_threads_do_not_see_an_override() -> None:
    seen: list[settings.Settings] = []
    with settings.override(tile_k=64):
        thread = threading.Thread(target=lambda: seen.append(settings.current()))
        thread.start()
        thread.join()
    assert seen[0].tile_k is None


def test_reload_reads_the_environment_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITGEMM_STAGES", "3")
    assert settings.reload().stages == 3
    monkeypatch.delenv("JITGEMM_STAGES")
    assert settings.current().stages == 3
    assert settings.reload().stages is None


def test_setters_change_the_process_and_not_what_a_block_overrides() -> None:
    assert not settings.get_pdl()
    with settings.override(num_sms=6):
        settings.set_pdl(True)
        try:
            assert settings.get_pdl()
            assert settings.current().num_sms == 6
            with settings.override(pdl=False):
                assert not settings.get_pdl()
                settings.assign("test", "num_sms", 8)
                assert settings.current().num_sms == 6
            assert settings.get_pdl()
        finally:
            settings.set_pdl(False)
            settings.assign("test", "num_sms", 0)
        assert not settings.get_pdl()
    assert settings.current() is settings.reload()


def test_the_table_has_a_row_for_every_field() -> None:
    assert [row[0] for row in settings.table()] == [variable.name for variable in settings.VARIABLES]
    fields = set(settings.Settings.__dataclass_fields__) - {"generation"}
    assert fields == {variable.field for variable in settings.VARIABLES}


def test_cuda_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert settings.cuda_home() is None
    monkeypatch.setenv("CUDA_PATH", "/opt/cuda-path")
    assert settings.cuda_home() == Path("/opt/cuda-path")
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda-home")
    assert settings.cuda_home() == Path("/opt/cuda-home")
