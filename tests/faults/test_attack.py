"""Scenarios 28 to 30, 32 and 33: who may put what where.

Scenario 31, hostile archives, is with the tests of import; 34, what a digest does not do, is in docs/cache.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import KEY, NOBODY, SPEC, environment, in_forked_child, make_cubin, warnings_of

from jitgemm import builder, settings
from jitgemm import cache as module
from jitgemm.cache import KernelCache, default_cache, encode, logger
from jitgemm.cache_key import cache_key
from jitgemm.cache_upkeep import verify
from jitgemm.compiler import find_nvrtc
from jitgemm.errors import CacheError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away and become others")
MEMBER, OUTSIDER, TEAM = 54321, 54322, 54399


@pytest.fixture
def place(cache_dir: Path) -> Iterator[Path]:
    """A folder that other users can reach; pytest's own are closed to them."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        builder.build(SPEC)  # imports all that it needs, which other users may not be able to read
        builder.forget()
        yield Path(folder)


# Scenario 28: directories


def test_an_ancestor_that_everyone_can_write_is_refused(place: Path) -> None:
    """Scenario 28: the message has the command, and the command fixes it."""
    ancestor = place / "open"
    cache_dir = ancestor / "below/cache"
    cache_dir.mkdir(parents=True)
    ancestor.chmod(0o777)
    with settings.override(cache_dir=cache_dir):
        with pytest.raises(CacheError, match=f"{ancestor}, above the kernel cache .* chmod o-w '{ancestor}'"):
            builder.build(SPEC)
        assert list(cache_dir.iterdir()) == []
        ancestor.chmod(0o1777)  # the sticky bit: nobody can move what others own
        assert builder.build(SPEC).source == "compiled"
    ancestor.chmod(0o777)
    subprocess.run(["chmod", "o-w", str(ancestor)], check=True)
    KernelCache(cache_dir)


@as_root
def test_an_ancestor_of_another_user_is_refused(place: Path) -> None:
    """Scenario 28: also where the path leads through a link."""
    ancestor = place / "theirs"
    cache_dir = ancestor / "cache"
    cache_dir.mkdir(parents=True)
    os.chown(ancestor, NOBODY, NOBODY)
    link = place / "link"
    link.symlink_to(cache_dir)
    for path in (cache_dir, link):
        with pytest.raises(CacheError, match=f"belongs to user {NOBODY}.* chown 0 '{ancestor}'"):
            KernelCache(path)
    os.chown(ancestor, 0, 0)
    KernelCache(link)


@as_root
def test_a_directory_that_someone_else_makes_later_is_refused(place: Path) -> None:
    """Scenario 28: it did not exist when the process began."""
    cache = KernelCache(place / "later")
    assert cache.find(KEY) is None
    (place / "later").mkdir()
    os.chown(place / "later", NOBODY, NOBODY)
    for use in (lambda: cache.find(KEY), lambda: cache.publish(make_cubin()), lambda: cache.lock(KEY)):
        with pytest.raises(CacheError, match=f"belongs to user {NOBODY}"):
            use()
    assert list((place / "later").iterdir()) == []


@as_root
@pytest.mark.parametrize("name", ["kernels", "locks", "staging"])
def test_a_folder_that_someone_else_made_in_a_sticky_directory_is_not_used(place: Path, name: str) -> None:
    """Scenario 28: everyone may make files in such a directory, but ours go into folders of ours."""
    place.chmod(0o1777)
    (place / name).mkdir()
    os.chown(place / name, NOBODY, NOBODY)
    cache = KernelCache(place)
    with pytest.raises(CacheError, match=f"{place / name} belongs to user {NOBODY}"):
        cache.lock(KEY) if name == "locks" else cache.publish(make_cubin())
    with settings.override(cache_dir=place):
        assert builder.build(SPEC).source == "compiled"
    assert list((place / name).iterdir()) == []


@as_root
@pytest.mark.parametrize("mode", [0o3777, 0o2777])
def test_a_directory_that_is_shared_must_be_closed_to_everyone_else(place: Path, mode: int) -> None:
    """Scenario 28: who may make files where the group is inherited would pass for a member of it."""
    team = place / "team"
    team.mkdir()
    os.chown(team, 0, TEAM)
    team.chmod(mode)

    def plant() -> None:
        os.umask(0)
        folder = team / "kernels" / KEY[:2]
        folder.mkdir(parents=True)
        (folder / f"{KEY}.13.5.jgk").write_bytes(encode(make_cubin(image=b"not the team's")))

    assert in_forked_child(plant, user=NOBODY) == 0
    (planted,) = team.rglob("*.jgk")
    assert (planted.stat().st_uid, planted.stat().st_gid) == (NOBODY, TEAM)

    def refused(use: Callable[[], object]) -> Callable[[], None]:
        def action() -> None:
            with pytest.raises(CacheError, match=f"{team} can be written by everyone.* chmod o-w '{team}'"):
                use()

        return action

    assert _as(MEMBER, TEAM)(refused(lambda: KernelCache(team, shared=True))) == 0
    assert _as(MEMBER, TEAM)(refused(lambda: KernelCache(place / "own", [team], shared=True))) == 0
    team.chmod(0o2770)  # what is open inside is not served either
    assert _as(MEMBER, TEAM)(lambda: _expect_nothing(KernelCache(team, shared=True))) == 0


def _expect_nothing(cache: KernelCache) -> None:
    with warnings_of(logger) as texts:
        assert cache.find(KEY) is None
    assert "can be written by everyone" in "".join(texts)
    with pytest.raises(CacheError, match="can be written by everyone"):
        cache.publish(make_cubin())


@pytest.mark.parametrize(("mode", "who"), [(0o602, "everyone"), (0o666, "everyone"), (0o660, "group [0-9]+")])
def test_an_entry_that_others_can_write_is_refused_and_healed(tmp_path: Path, mode: int, who: str) -> None:
    """Scenario 28: whoever owns it."""
    cache = KernelCache(tmp_path / "cache")
    path = cache.publish(make_cubin())
    path.chmod(mode)
    with warnings_of(logger) as texts:
        assert cache.find(KEY) is None
    (text,) = texts
    assert re.search(f"{path} is ignored: it can be written by {who} \\(mode {mode:04o}\\)", text)
    assert [entry.problem is None for entry in cache.entries()] == [False]
    cache.publish(make_cubin())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert cache.find(KEY) == make_cubin()


@pytest.mark.parametrize(("mode", "who"), [(0o777, "everyone"), (0o1777, "everyone"), (0o770, "group [0-9]+")])
def test_a_folder_of_entries_that_others_can_write_is_not_used(cache_dir: Path, mode: int, who: str) -> None:
    """Scenario 28: also where its entries are ours."""
    assert builder.build(SPEC).source == "compiled"
    (entry,) = cache_dir.rglob("*.jgk")
    entry.parent.chmod(mode)
    builder.forget()
    with warnings_of(logger) as texts:
        assert builder.build(SPEC).source == "compiled"
    assert all(re.search(f"{entry.parent} can be written by {who}", text) for text in texts)
    assert len(texts) == 2  # one for the entry, one for its successor that is not stored
    entry.parent.chmod(0o700)
    builder.forget()
    assert builder.build(SPEC).source == "disk"


def test_of_what_is_made_only_the_cache_itself_is_open_to_the_group(place: Path) -> None:
    """Scenario 28: the directories above are of the user, whatever the umask."""
    before = os.umask(0)
    try:
        KernelCache(place / "new/parent/cache", shared=True).publish(make_cubin())
    finally:
        os.umask(before)
    for path in (place / "new", place / "new/parent"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755
    cache = place / "new/parent/cache"
    assert {stat.S_IMODE(path.stat().st_mode) for path in (cache, *cache.rglob("*")) if path.is_dir()} == {0o2770}


def test_what_is_made_is_private_whatever_the_umask(place: Path) -> None:
    """Scenario 28: also the folders above, which would be refused next time if they were open."""
    before = os.umask(0)
    try:
        with settings.override(cache_dir=place / "a/b/cache"):
            builder.build(SPEC)
            default_cache().save_counts()
    finally:
        os.umask(before)
    for path in (place / "a").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    KernelCache(place / "a/b/cache")


def _as(user: int, *groups: int) -> Callable[[Callable[[], None]], int]:
    """Run an action as a user who is in some groups; its exit code."""

    def run(action: Callable[[], None]) -> int:
        def child() -> None:
            os.setgroups(list(groups))
            os.setgid(user)
            os.setuid(user)
            os.umask(0o077)
            module._cache_in.cache_clear()
            action()

        return in_forked_child(child)

    return run


def _expect_source(source: str) -> Callable[[], None]:
    def action() -> None:
        builder.forget()
        with warnings_of(logger) as texts:
            assert builder.build(SPEC).source == source
        assert texts == []

    return action


@as_root
def test_a_group_shares_only_where_that_is_said(place: Path) -> None:
    """Scenario 28: members serve each other, an outsider is out, and without the setting each is alone."""
    team = place / "team"
    team.mkdir()
    os.chown(team, MEMBER, TEAM)
    team.chmod(0o2775)
    cache_dir = team / "cache"
    with settings.override(cache_dir=cache_dir, cache_group=True):
        assert _as(MEMBER, TEAM)(_expect_source("compiled")) == 0
        assert _as(OUTSIDER, TEAM)(_expect_source("disk")) == 0
        modes = {stat.S_IMODE(path.stat().st_mode) for path in cache_dir.rglob("*")}
        assert modes == {0o2770, 0o660}
        assert {path.stat().st_gid for path in cache_dir.rglob("*")} == {TEAM}

        def heal() -> None:
            with settings.override(lock_timeout=5):
                (entry,) = cache_dir.rglob("*.jgk")
                entry.write_bytes(b"damaged")
                assert builder.build(SPEC).source == "compiled"

        assert _as(OUTSIDER, TEAM)(heal) == 0
        assert _as(MEMBER, TEAM)(_expect_source("disk")) == 0
        with pytest.raises(CacheError, match=f"belongs to user {MEMBER}"):
            _raise(_as(NOBODY), builder.build, SPEC)
    with settings.override(cache_dir=cache_dir), pytest.raises(CacheError, match=f"belongs to user {MEMBER}"):
        _raise(_as(OUTSIDER, TEAM), builder.build, SPEC)


def _raise(run: Callable[[Callable[[], None]], int], function: Callable[..., object], *arguments: object) -> None:
    """Raise here what a call raises there."""
    read, write = os.pipe()

    def action() -> None:
        try:
            function(*arguments)
        except CacheError as error:
            os.write(write, str(error).encode())

    assert run(action) == 0
    os.close(write)
    with open(read, "rb") as pipe:
        message = pipe.read().decode()
    if message:
        raise CacheError(message)


# Scenario 29: links, FIFOs and devices


def _link(path: Path) -> None:
    target = path.with_name("precious")
    target.write_text("precious")
    path.symlink_to(target)


def _second_name(path: Path) -> None:
    target = path.with_name("precious")
    target.write_text("precious")
    path.hardlink_to(target)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero


PLACES = [
    pytest.param(_link, id="symlink"),
    pytest.param(_fifo, id="fifo"),
    pytest.param(_device, id="device", marks=as_root),
]


def _unharmed(folder: Path) -> None:
    for path in folder.rglob("precious"):
        assert path.read_text() == "precious"


@pytest.mark.parametrize("put", PLACES)
def test_at_the_place_of_an_entry_it_is_refused_and_replaced(cache_dir: Path, put: Callable[[Path], None]) -> None:
    """Scenario 29."""
    path = default_cache().path_of(cache_key(SPEC), find_nvrtc().version_text)
    path.parent.mkdir(mode=0o700, parents=True)
    cache_dir.chmod(0o700)
    put(path)
    assert builder.build(SPEC).source == "compiled"
    assert stat.S_ISREG(path.lstat().st_mode)
    _unharmed(cache_dir)
    builder.forget()
    assert builder.build(SPEC).source == "disk"


@pytest.mark.parametrize("put", [*PLACES, pytest.param(_second_name, id="hard link")])
def test_at_the_place_of_a_lock_it_is_refused(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, put: Callable[[Path], None]
) -> None:
    """Scenario 29: one warning, and the kernel is compiled and published without a lock."""
    monkeypatch.setattr(builder, "_warned", set())
    path = cache_dir / "locks" / f"{cache_key(SPEC)}.lock"
    path.parent.mkdir(mode=0o700, parents=True)
    cache_dir.chmod(0o700)
    put(path)
    with warnings_of(logger) as texts:
        assert builder.build(SPEC).source == "compiled"
    assert len(texts) == 1
    assert default_cache().lock_holder(cache_key(SPEC)) is None
    _unharmed(cache_dir)
    builder.forget()
    assert builder.build(SPEC).source == "disk"


@pytest.mark.parametrize("put", [*PLACES, pytest.param(_second_name, id="hard link")])
@pytest.mark.parametrize("name", ["clock", "stats.json"])
def test_at_the_place_of_the_clock_or_the_counts_it_is_left_alone(
    cache_dir: Path, name: str, put: Callable[[Path], None]
) -> None:
    """Scenario 29: for the files that are not in the scenario, too."""
    cache_dir.mkdir(mode=0o700)
    put(cache_dir / name)
    assert builder.build(SPEC).source == "compiled"
    default_cache().save_counts()
    builder.forget()
    assert builder.build(SPEC).source == "disk"
    default_cache().stats()
    _unharmed(cache_dir)


@pytest.mark.parametrize("put", PLACES)
def test_at_the_place_of_a_staging_file_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put: Callable[[Path], None]
) -> None:
    """Scenario 29: even if someone could guess the random name; and sweeping follows and opens nothing either."""
    cache = KernelCache(tmp_path / "cache")
    staging = cache.directory / "staging"
    staging.mkdir(mode=0o700, parents=True)
    monkeypatch.setattr(module.secrets, "token_hex", lambda count: "guessed")
    put(staging / "guessed")
    monkeypatch.setattr(KernelCache, "sweep", lambda self: None)
    with pytest.raises(FileExistsError):
        cache.publish(make_cubin())
    monkeypatch.undo()
    _unharmed(cache.directory)
    cache.sweep()
    _unharmed(cache.directory)
    cache.publish(make_cubin())
    assert cache.find(KEY) == make_cubin()


# Scenarios 30 and 32: entries that are whole, and lie


def _forged(**changes: object) -> bytes:
    """An entry with a right digest and whatever metadata its author likes."""
    cubin = make_cubin(cache_key(SPEC), find_nvrtc().version_text)
    text = json.dumps({**cubin.metadata.to_dict(), **changes}).encode()
    body = module._HEADER.pack(module.MAGIC, len(text), len(cubin.image)) + text + cubin.image
    return body + hashlib.sha256(body).digest()


DEEP: object = "x"
for _ in range(300):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"key": KEY}, id="another key"),
        pytest.param({"nvrtc_version": "1.0"}, id="another version"),
        pytest.param({"sha256": "0" * 64}, id="another cubin"),
        pytest.param({"size": 1}, id="another size"),
        pytest.param({"kernel_name": "\x1b]0;owned\x07"}, id="escape sequences"),
        pytest.param({"warnings": ["\u202e\x9b2J"]}, id="more of them"),
        pytest.param({"spec": {**SPEC.to_dict(), "constants": {"\x1b[2J": 1}}}, id="in a name"),
        pytest.param({"warnings": DEEP}, id="depth"),
        pytest.param({"warnings": ["x" * 70_000]}, id="size"),
        pytest.param({"size": 10**400}, id="a large number"),
        pytest.param({"size": True}, id="a boolean"),
        pytest.param({"compile_seconds": float("nan")}, id="nan"),
        pytest.param({"another": 1}, id="an unknown field"),
    ],
)
def test_an_entry_that_lies_is_refused_and_healed(cache_dir: Path, changes: dict[str, object]) -> None:
    """Scenarios 30 and 32."""
    path = default_cache().path_of(cache_key(SPEC), find_nvrtc().version_text)
    path.parent.mkdir(mode=0o700, parents=True)
    cache_dir.chmod(0o700)
    path.write_bytes(_forged(**changes))
    (verdict,) = verify(default_cache())
    assert verdict.state == ("wrong key" if {"key", "nvrtc_version"} & changes.keys() else "damaged")
    with warnings_of(logger) as texts:
        assert builder.build(SPEC).source == "compiled"
    assert len(texts) == 1
    assert texts[0].isprintable()
    builder.forget()
    assert builder.build(SPEC).source == "disk"


def test_an_entry_whose_spec_is_another_kernels_is_found_by_verify(cache_dir: Path) -> None:
    """Scenario 30: a look-up asks for a key; that the key is that of the spec, verify tells."""
    builder.build(SPEC)
    (file,) = default_cache().files()
    spec = {**SPEC.to_dict(), "constants": {"tile": 16, "threads": 256}}
    file.path.write_bytes(_forged(spec=spec))
    (verdict,) = verify(default_cache())
    assert (verdict.state, verdict.reason) == ("wrong key", "its spec does not give its key")


# Scenario 33


def test_nothing_is_resolved_against_the_current_directory_and_no_process_is_started(tmp_path: Path) -> None:
    """Scenario 33: a build in a folder full of bait, watched by Python's audit hook."""
    code = """
import os, sys
opened, started = [], []
def watch(event, arguments):
    if event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "ctypes.dlopen"):
        name = arguments[0]
        by_name = event == "ctypes.dlopen" and os.sep not in str(name)  # the system's loader looks elsewhere
        if isinstance(name, (str, bytes)) and not os.path.isabs(os.fsdecode(name)) and not by_name:
            opened.append((event, name))
    elif event in ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "os.fork"):
        started.append((event, *map(str, arguments)))
sys.addaudithook(watch)
from jitgemm import builder
from jitgemm.cache_tools.cli import run
from support import SPEC
assert builder.build(SPEC).source == "compiled"
builder.forget()
assert builder.build(SPEC).source == "disk"
assert [run([name]) for name in ("list", "verify", "stats", "path")] == [0, 0, 0, 0]
print(opened, started, file=sys.stderr)
"""
    home, bait = tmp_path / "home", tmp_path / "bait"
    home.mkdir()
    for name in ("cache", "jitgemm", "kernels", "locks", "staging", "templates"):
        (bait / name).mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", code.replace("import os, sys", "import os, sys; sys.path.remove('')", 1)],
        env={**environment(HOME=str(home)), "XDG_CACHE_HOME": "cache"},
        cwd=bait,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[] []", done.stderr
    assert list((home / ".cache/jitgemm").rglob("*.jgk"))
    assert [path.name for path in bait.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("text", ["cache", "./cache", "../cache", ":/tmp", "/tmp:", "/tmp::/var", "/tmp:cache"])
def test_a_relative_directory_is_refused(text: str) -> None:
    """Scenario 33."""
    with pytest.raises(settings.SettingsError, match="JITGEMM_CACHE_DIR"):
        settings.from_environment({"JITGEMM_CACHE_DIR": text})
