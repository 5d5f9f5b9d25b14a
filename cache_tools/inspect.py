"""What is in the cache: all kernels, or one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jitgemm.cache import EntryInfo, default_cache
from jitgemm.cache_tools.console import NotFoundError, UsageError, print_error, print_json, print_table, printable
from jitgemm.compiler import UNKNOWN
from jitgemm.families import KernelSpec, family_of

SHORT_KEY = 12
"""Digits of a key in tables; ``show`` accepts them."""


def known(value: int) -> int | None:
    """A resource's use, or None where the compiler did not tell it."""
    return None if value == UNKNOWN else value


def list_entries(*, as_json: bool) -> None:
    """Print every entry of the cache, invalid ones with the reason."""
    cache = default_cache()
    entries = list(cache.entries())
    if as_json:
        print_json(cache_dir=str(cache.directory), entries=[_to_dict(entry) for entry in entries])
        return
    if entries:
        print_table(
            ["key", "kernel", "arch", "nvrtc", ">bytes", ">registers", ">spilled"],
            [
                (
                    entry.key[:SHORT_KEY],
                    _describe(entry),
                    entry.metadata.arch if entry.metadata else None,
                    entry.nvrtc_version,
                    entry.size,
                    known(entry.metadata.registers) if entry.metadata else None,
                    known(entry.metadata.spill_bytes) if entry.metadata else None,
                )
                for entry in entries
            ],
        )
    total = sum(entry.size for entry in entries)
    print(printable(f"{len(entries)} kernels, {total / 1e6:.1f} MB in {cache}"))


def show(prefix: str, *, source: bool, as_json: bool) -> None:
    """Print one kernel: its spec and resource use, once for each NVRTC version that compiled it.

    Args:
        prefix: the start of its key.
        source: print its CUDA source instead, rendered again from its spec.
        as_json: print one JSON object.

    Raises:
        NotFoundError: no kernel has such a key, or none of its entries is valid.
        UsageError: several have.
    """
    entries = _entries_of(prefix)
    spec = next((KernelSpec.from_dict(entry.metadata.spec) for entry in entries if entry.metadata), None)
    if spec is None:
        raise NotFoundError(f"show: kernel {entries[0].key} is damaged: {entries[0].problem}")
    if as_json:
        rendered = {"source": _source(spec, entries[0].key)} if source else {}
        print_json(key=entries[0].key, spec=spec.to_dict(), entries=[_to_dict(entry) for entry in entries], **rendered)
    elif source:
        print(printable(_source(spec, entries[0].key), keep="\n\t"), end="")
    else:
        _print_kernel(spec, entries)


def _entries_of(prefix: str) -> list[EntryInfo]:
    cache = default_cache()
    entries = [entry for entry in cache.entries() if entry.key.startswith(prefix.lower())]
    keys = list(dict.fromkeys(entry.key for entry in entries))
    if not keys:
        raise NotFoundError(f"show: no kernel in {cache} has a key that starts with {prefix!r}")
    if len(keys) > 1:
        some = ", ".join(key[:SHORT_KEY] for key in keys[:5]) + (", ..." if len(keys) > 5 else "")
        raise UsageError(f"show: KEY is {prefix!r}, with which {len(keys)} keys start ({some}); give more digits")
    return entries


def _print_kernel(spec: KernelSpec, entries: Sequence[EntryInfo]) -> None:
    print_table(
        ["kernel", _describe(entries[0])],
        [
            ("key", entries[0].key),
            ("family", spec.family),
            ("arch", spec.arch),
            *((f"  {name}", value) for name, value in spec.constants),
        ],
    )
    for entry in entries:
        print_table(["entry", entry.path.name[len(entry.key) + 1 :]], _properties(entry))


def _properties(entry: EntryInfo) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("file", entry.path), ("bytes", entry.size)]
    if entry.metadata is None:
        return [*rows, ("damaged", entry.problem)]
    metadata = entry.metadata
    return [
        *rows,
        ("NVRTC", metadata.nvrtc_version),
        ("symbol", metadata.kernel_name),
        ("registers", known(metadata.registers)),
        ("spilled bytes", known(metadata.spill_bytes)),
        ("stack bytes", known(metadata.stack_bytes)),
        ("compile seconds", f"{metadata.compile_seconds:.2f}"),
        ("cubin bytes", metadata.size),
        ("cubin sha256", metadata.sha256),
        *(("warning", warning) for warning in metadata.warnings),
    ]


def _source(spec: KernelSpec, key: str) -> str:
    from jitgemm.cache_key import cache_key
    from jitgemm.render import render

    if cache_key(spec) != key:
        print_error("show: the templates changed since this kernel was built; this is the source of today's")
    try:
        return render(spec).text
    except Exception as error:  # a spec of another version, or of who knows whom
        raise NotFoundError(f"show: this version cannot render {key[:SHORT_KEY]} again: {error}") from None


def _to_dict(entry: EntryInfo) -> dict[str, Any]:
    metadata = entry.metadata
    return {
        "key": entry.key,
        "config": _describe(entry),
        "nvrtc": entry.nvrtc_version,
        "file": str(entry.path),
        "bytes": entry.size,
        "arch": metadata.arch if metadata else None,
        "symbol": metadata.kernel_name if metadata else None,
        "registers": known(metadata.registers) if metadata else None,
        "spill_bytes": known(metadata.spill_bytes) if metadata else None,
        "stack_bytes": known(metadata.stack_bytes) if metadata else None,
        "compile_seconds": metadata.compile_seconds if metadata else None,
        "warnings": list(metadata.warnings) if metadata else [],
        "problem": entry.problem,
    }


def _describe(entry: EntryInfo) -> str:
    """The family's line; the spec of another version's entry may be one that today's families don't know."""
    if entry.metadata is None:
        return f"damaged: {entry.problem}"
    spec = KernelSpec.from_dict(entry.metadata.spec)
    try:
        return family_of(spec).describe(spec)
    except Exception:
        return f"{spec.family} ({entry.metadata.kernel_name})"
