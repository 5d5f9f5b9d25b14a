"""The name of a kernel in the cache: a hash of everything that decides its bytes, save NVRTC's version.

The version is in the entry's file name instead, so that a cache built in one environment serves another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from jitgemm.compiler import compile_options
from jitgemm.families.base import KernelSpec
from jitgemm.render import template_digest

SCHEMA = 1
"""Raised when the meaning of a key or of an entry changes."""


def cache_key(spec: KernelSpec) -> str:
    """The key of ``spec``: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for field in _fields(spec):
        for part in field:  # length before content: no two lists of fields give the same bytes
            data = part.encode()
            digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()


def _fields(spec: KernelSpec) -> Iterator[tuple[str, str]]:
    yield "schema", str(SCHEMA)
    yield "templates", template_digest()
    yield "family", spec.family
    yield "arch", spec.arch
    for name, value in spec.constants:
        yield "constant", name
        yield type(value).__name__, str(value)
    for option in compile_options(spec.arch):
        yield "option", option
