"""From a ``KernelSpec`` to the exact text that NVRTC compiles, and the digest of all that decides it.

Templates and headers are read once per process: what is compiled is what was digested, even if a
file changes meanwhile. Jinja is imported only when something has to be rendered.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from jitgemm.device import ARCHITECTURES
from jitgemm.errors import CompileError
from jitgemm.families import KernelSpec, family_of

if TYPE_CHECKING:
    from importlib.abc import Traversable

    import jinja2

_PACKAGE = files("jitgemm")
_TEMPLATES = files("jitgemm.templates")  # not _PACKAGE / "templates": in a checkout it lies elsewhere


@dataclass(frozen=True)
class KernelSource:
    """One translation unit: the kernel's symbol, its text, and the headers by the names they are included under."""

    name: str
    text: str
    headers: dict[str, str]


def render(spec: KernelSpec) -> KernelSource:
    """Render the template of the spec's family.

    Raises:
        CompileError: the template is broken or names a value that its family does not give.
    """
    import jinja2

    family = family_of(spec)
    try:
        text = _environment().get_template(family.template).render(family.render_context(spec))
    except jinja2.TemplateError as error:
        raise CompileError(f"{family.template}: {type(error).__name__}: {error}") from error
    return KernelSource(family.kernel_name(spec), text, _headers())


@functools.cache
def template_digest() -> str:
    """SHA-256 over templates, headers and the Python that turns a spec into source and launch arguments.

    Content only: the same files in another place, or with other times, have the same digest.
    """
    digest = hashlib.sha256()
    for kind, texts in (("template", _templates()), ("header", _headers()), ("generator", _generators())):
        for name, text in sorted(texts.items()):
            for field in (kind.encode(), name.encode(), text.encode()):
                digest.update(b"%d:" % len(field) + field)
    return digest.hexdigest()


@functools.cache
def _templates() -> dict[str, str]:
    return _texts(_TEMPLATES, ".jinja")


@functools.cache
def _headers() -> dict[str, str]:
    return _texts(_TEMPLATES / "include", ".cuh")


def _generators() -> dict[str, str]:
    # Of device.py only the facts that families build kernels from, not the rates that cost models read.
    architectures = {"architectures": repr(ARCHITECTURES)}
    return _texts(_PACKAGE / "families", ".py") | _texts(_PACKAGE, "render.py") | architectures


def _texts(folder: Traversable, suffix: str) -> dict[str, str]:
    return {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.name.endswith(suffix)}


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.DictLoader(_templates()),
        undefined=jinja2.StrictUndefined,
        finalize=_cpp_literal,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def _cpp_literal(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value
