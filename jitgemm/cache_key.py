"""The name of a kernel in the cache: a hash of everything that decides its bytes, save NVRTC's version.

The version is in the entry's file name instead, so that a cache built in one environment serves another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from jitgemm.compiler import compile_options
from jitgemm.families.base import KernelSpec
from jitgemm.render import template_digest

SCHEMA = 2
"""Raised when the meaning of a key or of an entry changes."""


def cache_key(spec: KernelSpec) -> str:
    """The key of ``spec``: 64 hexadecimal digits."""
    return key_of(spec, build_digest(spec.arch))


def build_digest(arch: str) -> str:
    """Digest of all that decides a kernel's bytes besides its spec: schema, templates, generators, compile options."""
    options = (("option", option) for option in compile_options(arch))
    return _digest((("schema", str(SCHEMA)), ("templates", template_digest()), *options))


def key_of(spec: KernelSpec, build: str) -> str:
    """The key of ``spec`` where the rest has the digest ``build``, which may be one of another version of jitgemm."""
    return _digest((("build", build), *_fields(spec)))


def _digest(fields: Iterable[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for field in fields:
        for part in field:  # length before content: no two lists of fields give the same bytes
            data = part.encode()
            digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()


def _fields(spec: KernelSpec) -> Iterator[tuple[str, str]]:
    yield "family", spec.family
    yield "arch", spec.arch
    for name, value in spec.constants:
        yield "constant", name
        yield type(value).__name__, str(value)
