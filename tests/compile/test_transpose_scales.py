"""The smallest kernel through the whole path: spec, source, NVRTC, cache."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import SPEC, environment

from jitgemm import builder
from jitgemm.cache import default_cache
from jitgemm.cache_key import cache_key
from jitgemm.compiler import compile_source, find_nvrtc
from jitgemm.errors import CompileError
from jitgemm.families.transpose_scales import FAMILY
from jitgemm.render import render


def test_from_spec_to_entry(cache_dir: Path) -> None:
    built = builder.build(SPEC)
    metadata = built.cubin.metadata
    assert built.source == "compiled"
    assert built.cubin.image.startswith(b"\x7fELF")
    assert metadata.kernel_name.encode() in built.cubin.image
    assert metadata.key == cache_key(SPEC)
    assert metadata.spec == SPEC.to_dict()
    assert (metadata.kernel_name, metadata.arch) == (FAMILY.kernel_name(SPEC), "sm_90a")
    assert metadata.nvrtc_version == find_nvrtc().version_text
    assert 0 < metadata.registers <= 255
    assert (metadata.spill_bytes, metadata.stack_bytes, metadata.warnings) == (0, 0, ())
    assert default_cache().find(metadata.key) == built.cubin


def test_a_rejected_source_gives_the_whole_log() -> None:
    source = replace(render(SPEC), text='#include "common.cuh"\nthis is not CUDA;\n#error "second"\n')
    with pytest.raises(CompileError) as caught:
        compile_source(source, SPEC, "0" * 64)
    message = str(caught.value)
    assert all(part in message for part in (f"{source.name}.cu(2)", '"second"', "sm_90a", find_nvrtc().version_text))


def test_an_architecture_that_nvrtc_does_not_know_is_an_error() -> None:
    with pytest.raises(CompileError, match="sm_11z"):
        compile_source(render(SPEC), FAMILY.spec("sm_11z"), "0" * 64)


def test_a_hit_loads_neither_jinja_nor_nvrtc(cache_dir: Path) -> None:
    builder.build(SPEC)
    code = """
import sys
from pathlib import Path
import support
from jitgemm import builder
built = builder.build(support.SPEC)
heavy = {"jinja2", "filelock", "platformdirs", "cuda", "torch"} & set(sys.modules)
print(built.source, sorted(heavy), "libnvrtc" in Path("/proc/self/maps").read_text())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(JITGEMM_CACHE_DIR=str(cache_dir)),
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "disk [] False", done.stderr


def test_the_source_is_ascii_and_names_its_kernel_once() -> None:
    source = render(SPEC)
    assert all(text.isascii() for text in (source.text, *source.headers.values()))
    assert len(re.findall(r"extern \"C\" __global__", source.text)) == 1
