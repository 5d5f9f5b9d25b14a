"""What a user installs: the wheel's content, and jitgemm after a normal and an editable install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from support import ROOT

import jitgemm
from jitgemm import settings
from jitgemm.cache_tools.presets import names
from jitgemm.render import template_digest

FOLDERS = {"jitgemm": "jitgemm", **{name: f"jitgemm/{name}" for name in ("heuristics", "templates", "cache_tools")}}
"""Folder of the checkout -> folder of the wheel."""

SHIPPED = (".py", ".jinja", ".cuh", ".json", ".jsonl", ".typed")

USE = """
import jitgemm.cache_tools.cli, jitgemm.heuristics, jitgemm.templates
from jitgemm.cache_tools import presets
from jitgemm.render import template_digest
print(jitgemm.__file__, template_digest(), *presets.names())
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout: a build leaves files beside its source, and takes up those of the one before."""
    copy = tmp_path_factory.mktemp("source") / "jitgemm"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "out", "*.egg-info", "tests")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder)
    shutil.rmtree(source / "build")
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_has_every_file_under_one_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    info = f"jitgemm-{jitgemm.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"jitgemm", info}
    shipped = {
        f"{target}/{file.relative_to(ROOT / folder)}"
        for folder, target in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in SHIPPED or file.name == "py.typed"
    }
    assert {name for name in names if name.startswith("jitgemm/")} == shipped
    assert f"{info}/licenses/LICENSE" in names


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["normal", "editable"])
def test_an_install_works_in_the_checkout_and_outside(
    source: Path, wheel: Path, tmp_path: Path, editable: bool
) -> None:
    environment = tmp_path / "venv"
    python, command = environment / "bin/python", environment / "bin/jitgemm"
    _run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    # All but jitgemm comes from the environment of this test, behind the new one's own packages: no network is needed.
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    what = ["--no-build-isolation", "--editable", source] if editable else [wheel]
    _run(python, "-m", "pip", "install", "--no-index", "--no-deps", "--ignore-installed", *what, cwd=tmp_path)

    file, digest, *presets = _run(python, "-c", USE, cwd=tmp_path).split()
    assert Path(file) == (source if editable else site_packages) / "jitgemm/__init__.py"
    assert digest == template_digest()  # and so the same cache serves
    assert presets == names()

    file, digest, *presets = _run(python, "-c", USE, cwd=source).split()
    assert Path(file) == source / "jitgemm/__init__.py"  # a checkout's own, which must find its siblings
    assert (digest, presets) == (template_digest(), names())
    assert jitgemm.__version__ in _run(command, "--version", cwd=source)
    assert "fp8_1x128_128x128" in _run(python, "-m", "benchmarks.dense", "--list", cwd=source)


def test_readme_has_the_settings_of_the_table() -> None:
    rows = [f"| `{name}` | {' | '.join(cells)} |" for name, *cells in settings.table()]
    table = "\n".join(["| variable | default | accepted | what it does |", "|---|---|---|---|", *rows])
    assert _readme(r"<!-- settings: begin -->\n(.*?)\n<!-- settings: end -->") == table


def test_readme_example_runs(cache_dir: Path) -> None:
    code = _readme(r"```python\n(.*?)```")
    exec(compile(code, "README.md", "exec"), {"__name__": "example"})


def test_examples_of_the_cache_run(cache_dir: Path) -> None:
    with settings.override(tile_m=64, tile_n=64, split_k=1, cluster="1x1", swap_ab=False):
        for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs/cache.md").read_text(encoding="utf-8"), re.DOTALL):
            exec(compile(code, "docs/cache.md", "exec"), {"__name__": "example"})
    assert list(cache_dir.rglob("*.jgk"))


def test_readme_commands_are_one_line_each() -> None:
    for name, end in (("demo", "bin/jitgemm demo"), ("test", "bin/pytest -n 2")):
        command = _readme(rf"<!-- command: {name} -->\n```sh\n(.*?)\n```")
        assert "\n" not in command
        assert command.startswith("python3 -m venv .venv")
        assert command.endswith(end)


def _readme(pattern: str) -> str:
    (match,) = re.findall(pattern, (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return str(match)


def _run(*command: object, cwd: Path) -> str:
    """Run a command that is to succeed, without this process's import path; its output."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_CONSTRAINT")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
