"""Archives that nobody should import: each is refused whole, and nothing is written."""

from __future__ import annotations

import errno
import gzip
import io
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import support
from support import KEY, in_forked_child, make_cubin

from jitgemm.cache import MAX_ENTRY_BYTES, KernelCache, encode
from jitgemm.cache_tools import bundle
from jitgemm.cache_tools.console import EnvironmentFaultError, UsageError

KEYS = sorted(support.KEYS[1:4])
HOSTILE = encode(make_cubin(KEY))
NAME = f"{KEY}.13.5.jgk"
BLOCK = tarfile.BLOCKSIZE

pytestmark = pytest.mark.usefixtures("cache_dir")


def _member(name: str = NAME, data: bytes = HOSTILE, **fields: object) -> bytes:
    """A member as tarfile writes it in its default format, extended headers included."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    format = tarfile.GNU_FORMAT if info.size < 0 else tarfile.PAX_FORMAT
    return info.tobuf(format, "utf-8", "surrogateescape") + data + bytes(-len(data) % BLOCK)


def _good() -> bytes:
    return b"".join(_member(f"{key}.13.5.jgk", encode(make_cubin(key))) for key in KEYS)


END = bytes(2 * BLOCK)


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _with_checksum(header: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def _link(type: bytes, target: str) -> bytes:
    return _member(data=b"", type=type, linkname=target)


ARCHIVES: dict[str, tuple[bytes, str]] = {
    # what an archive may say that it holds
    "parent folder": (_good() + _member(f"../{NAME}") + END, "is not the name of an entry"),
    "parent folder inside": (_good() + _member(f"a/../{NAME}") + END, "is not the name of an entry"),
    "absolute name": (_good() + _member(f"/tmp/{NAME}") + END, "is not the name of an entry"),
    "in a folder": (_good() + _member(f"kernels/{NAME}") + END, "is not the name of an entry"),
    "dot": (_good() + _member(f"./{NAME}") + END, "is not the name of an entry"),
    "empty name": (_good() + _member("") + END, "is not the name of an entry"),
    "terminal codes": (_good() + _member("\x1b]0;owned\x07.jgk") + END, "is not the name of an entry"),
    "not ASCII": (_good() + _member("1" * 63 + "\u0661.13.5.jgk") + END, "is not"),
    "bytes that are no text": (_good() + _member("\udcff" + NAME[1:]) + END, "is not"),
    "case": (_good() + _member() + _member(NAME.upper().replace("JGK", "jgk")) + END, "is not the name of an entry"),
    "another's name": (_good() + _member(f"{'4' * 64}.13.5.jgk") + END, "holds the kernel of another entry"),
    "another version's name": (_good() + _member(f"{KEY}.13.4.jgk") + END, "holds the kernel of another entry"),
    "a spec that is not the key's": (
        _good() + _member(f"{'f' * 64}.13.5.jgk", encode(make_cubin("f" * 64))) + END,
        "its spec does not give its key",
    ),
    "duplicate": (_good() + _member(f"{KEYS[0]}.13.5.jgk", encode(make_cubin(KEYS[0]))) + END, "comes twice"),
    # what a member may be
    "symbolic link": (_good() + _link(tarfile.SYMTYPE, "/etc/passwd") + END, "is not a regular file"),
    "hard link": (_good() + _link(tarfile.LNKTYPE, f"{KEYS[0]}.13.5.jgk") + END, "is not a regular file"),
    "folder": (_good() + _link(tarfile.DIRTYPE, "") + END, "is not"),
    "FIFO": (_good() + _link(tarfile.FIFOTYPE, "") + END, "is not a regular file"),
    "device": (_good() + _link(tarfile.CHRTYPE, "") + END, "is not a regular file"),
    "sparse": (_good() + _member(type=tarfile.GNUTYPE_SPARSE) + END, "is not a regular file"),
    "long name": (_good() + _member("././@LongLink", b"../x\0", type=tarfile.GNUTYPE_LONGNAME) + END, "is not"),
    "extended header": (_good() + _member(pax_headers={"path": f"../{NAME}"}) + END, "is not"),
    "global extended header": (_member(data=b"16 path=../../x\n", type=tarfile.XGLTYPE) + _good() + END, "is not"),
    # how large it may be
    "too large": (_good() + _member(data=b"", size=MAX_ENTRY_BYTES + 1) + END, "an entry has at most"),
    "enormous": (_good() + _member(data=b"", size=8**11 - 1) + END, "an entry has at most"),
    "negative": (_good() + _member(data=b"", size=-BLOCK) + END, "an entry has at most"),
    "no bytes": (_good() + _member(data=b"") + END, "an entry has at most"),
    # what is damaged
    "digest": (_good() + _member(data=_flip(HOSTILE, 200)) + END, "digest does not match"),
    "not an entry": (_good() + _member(data=b"x" * 1000) + END, "does not begin like an entry"),
    "header": (_flip(_good(), 10) + END, "not a tar archive, or damaged"),
    "truncated in a header": (_good() + _member()[:100], "not a tar archive, or damaged"),
    "truncated in an entry": (_good() + _member()[: BLOCK + 100], "is not a valid entry"),
    "truncated before the end": (_good() + _member(), "truncated"),
    "truncated in the end": (_good() + _member() + END[:100], "truncated"),
    "in the padding": (_good() + _member()[:-1] + b"x" + END, "is followed by what is no padding"),
    "after the end": (_good() + END + _member() + END, "goes on after its end"),
    "far after the end": (_good() + END + bytes(tarfile.RECORDSIZE) + b"x", "goes on after its end"),
    # what is none
    "compressed": (gzip.compress(_good() + END), "not a tar archive"),
    "nothing": (b"", "truncated"),
    "zeros": (END, "holds no kernels"),
    "text": (b"hello\n" * 1000, "not a tar archive"),
    "checksum only": (_with_checksum(bytes(BLOCK)) + END, "is not the name of an entry"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_hostile_archive_is_refused_whole(tmp_path: Path, cache_dir: Path, kind: str) -> None:
    content, reason = ARCHIVES[kind]
    path = tmp_path / "bundle.tar"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        bundle.import_bundle(path)
    message = str(caught.value)
    assert f"{path} is refused, and nothing of it is imported: " in message
    assert reason in message
    assert message.isprintable()
    assert not cache_dir.exists()


def test_the_same_members_without_the_hostile_one_are_imported(
    tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bundle.tar"
    path.write_bytes(_good() + END)
    bundle.import_bundle(path)
    assert capsys.readouterr().out == f"imported 3 kernels, 0 were already there; cache {cache_dir}\n"
    assert {entry.key for entry in KernelCache(cache_dir).entries()} == set(KEYS)


def test_any_flipped_byte_is_noticed(tmp_path: Path, cache_dir: Path) -> None:
    path, content = tmp_path / "bundle.tar", _member() + END
    unread = 155  # of a header: what fills up its checksum
    for at in {*range(BLOCK), *range(BLOCK, len(content), 7)} - {unread}:
        path.write_bytes(_flip(content, at))
        with pytest.raises(UsageError):
            bundle.import_bundle(path)
    assert not cache_dir.exists()


def test_too_many_members(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_ENTRIES", 2)
    path = tmp_path / "bundle.tar"
    path.write_bytes(_good() + END)
    with pytest.raises(UsageError, match="more than 2 members"):
        bundle.import_bundle(path)
    assert not cache_dir.exists()


def test_an_archive_too_large_is_not_even_read(tmp_path: Path, cache_dir: Path) -> None:
    path = tmp_path / "bundle.tar"
    path.touch()
    os.truncate(path, bundle.MAX_BUNDLE_BYTES + 1)
    with pytest.raises(UsageError, match="larger than 8 GiB"):
        bundle.import_bundle(path)
    assert not cache_dir.exists()


def test_a_bundle_is_a_regular_file(tmp_path: Path, cache_dir: Path) -> None:
    fifo = tmp_path / "bundle.tar"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/zero")):
        with pytest.raises(UsageError, match="is not a regular file"):
            bundle.import_bundle(path)
        with pytest.raises(UsageError, match="is not a regular file"):
            bundle.export(path)
    assert not cache_dir.exists()


def _fail_at_the_third(act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    publish, seen = KernelCache.publish, []

    def fails(self: KernelCache, cubin: object) -> Path:
        seen.append(cubin)
        if len(seen) == 3:
            act()
        return publish(self, cubin)  # type: ignore[arg-type]

    monkeypatch.setattr(KernelCache, "publish", fails)


def test_a_full_disk_leaves_whole_entries_and_a_resumable_import(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "bundle.tar"
    path.write_bytes(_good() + END)
    _fail_at_the_third(fill, monkeypatch)
    with pytest.raises(EnvironmentFaultError, match=r"2 of 3 kernels .* are in the cache, then: .*No space left"):
        bundle.import_bundle(path)
    assert [entry.problem for entry in KernelCache(cache_dir).entries()] == [None, None]
    bundle.import_bundle(path)
    assert "imported 1 kernels, 2 were already there" in capsys.readouterr().out


def test_killed_halfway_leaves_whole_entries(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bundle.tar"
    path.write_bytes(_good() + END)
    _fail_at_the_third(lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch)
    assert in_forked_child(lambda: bundle.import_bundle(path)) == -signal.SIGKILL
    assert [entry.problem for entry in KernelCache(cache_dir).entries()] == [None, None]


def test_a_bundle_written_to_meanwhile_puts_nothing_invalid_into_the_cache(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bundle.tar"
    path.write_bytes(_good() + END)

    def tamper() -> None:
        with open(path, "r+b") as file:
            file.seek(len(_good()) - BLOCK)
            file.write(os.urandom(BLOCK))

    seek = io.BufferedReader.seek
    opened = bundle._open

    class Tampered(io.BufferedReader):
        def seek(self, *arguments: int) -> int:
            tamper()
            return seek(self, *arguments)

    monkeypatch.setattr(bundle, "_open", lambda path: Tampered(opened(path).detach()))  # type: ignore[attr-defined]
    with pytest.raises(EnvironmentFaultError, match="2 of 3 kernels"):
        bundle.import_bundle(path)
    assert [entry.problem for entry in KernelCache(cache_dir).entries()] == [None, None]


def test_a_valid_entry_that_is_there_stays_and_a_damaged_one_is_replaced(
    tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, path = KernelCache(cache_dir), tmp_path / "bundle.tar"
    path.write_bytes(_good() + END)
    ours = make_cubin(KEYS[0], image=b"ours")
    cache.publish(ours)
    damaged = cache.publish(make_cubin(KEYS[1]))
    damaged.write_bytes(b"damaged")
    bundle.import_bundle(path)
    assert "imported 2 kernels, 1 were already there" in capsys.readouterr().out
    assert [cache.find(key) for key in KEYS] == [ours, make_cubin(KEYS[1]), make_cubin(KEYS[2])]
