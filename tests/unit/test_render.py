from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, SPEC, environment

from jitgemm.errors import CompileError
from jitgemm.families.transpose_scales import TransposeScales
from jitgemm.render import render, template_digest


def test_a_rendered_kernel_is_complete() -> None:
    source = render(SPEC)
    assert source.name == "transpose_scales"
    assert f"{source.name}(const __grid_constant__" in source.text
    assert "constexpr int TILE = 32;" in source.text
    assert not any(mark in source.text for mark in ("{{", "{%", "{#"))
    assert "common.cuh" in source.headers  # by its bare name, as the source includes it
    assert source.headers["common.cuh"] == (ROOT / "templates/include/common.cuh").read_text()


def test_a_name_that_the_family_does_not_give_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransposeScales, "render_context", lambda self, spec: {"kernel_name": "k", "tile": 32})
    with pytest.raises(CompileError, match=r"transpose_scales\.cu\.jinja.*threads"):
        render(SPEC)


def test_booleans_are_rendered_as_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    context = {"kernel_name": "k", "tile": True, "threads": False}
    monkeypatch.setattr(TransposeScales, "render_context", lambda self, spec: context)
    assert "TILE = true;" in render(SPEC).text
    assert "THREADS = false;" in render(SPEC).text


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package's code in another place, with other times."""
    for folder in ("jitgemm", "templates", "heuristics"):
        shutil.copytree(ROOT / folder, tmp_path / folder, copy_function=shutil.copyfile)
    return tmp_path


def _run(folder: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(PYTHONPATH=str(folder)),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


_DIGEST = "from jitgemm.render import template_digest; print(template_digest())"


def test_the_digest_is_of_content_only(copied: Path) -> None:
    assert _run(copied, _DIGEST) == template_digest()


@pytest.mark.parametrize(
    "path",
    [
        "templates/transpose_scales.cu.jinja",
        "templates/include/common.cuh",
        "jitgemm/render.py",
        "jitgemm/families/transpose_scales.py",
    ],
)
def test_whatever_decides_the_source_is_in_the_digest(copied: Path, path: str) -> None:
    with (copied / path).open("a") as file:
        file.write("\n")
    assert _run(copied, _DIGEST) != template_digest()


def test_a_new_header_is_in_the_digest(copied: Path) -> None:
    (copied / "templates/include/added.cuh").write_text("")
    assert _run(copied, _DIGEST) != template_digest()


@pytest.mark.parametrize(("fact", "counts"), [("smem_per_block=232_448", True), ("hbm_bytes_per_s=4.3e12", False)])
def test_of_the_device_only_the_architecture_is_in_the_digest(copied: Path, fact: str, counts: bool) -> None:
    path = copied / "jitgemm/device.py"
    text = path.read_text()
    assert fact in text
    path.write_text(text.replace(fact, fact.split("=")[0] + "=100_000"))
    assert (_run(copied, _DIGEST) != template_digest()) == counts


def test_what_is_rendered_is_what_was_digested(copied: Path) -> None:
    code = """
from pathlib import Path
from jitgemm.families.transpose_scales import FAMILY
from jitgemm.render import render, template_digest
template_digest()
for path in Path("templates").rglob("*.[cj]*"):
    path.write_text("changed")
source = render(FAMILY.spec("sm_90a"))
print("changed" in source.text or "changed" in source.headers.values())
"""
    assert _run(copied, code) == "False"
