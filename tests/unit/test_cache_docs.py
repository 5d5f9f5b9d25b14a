"""docs/cache.md names tests and settings that exist."""

from __future__ import annotations

import re

from support import ROOT

from jitgemm import settings

TEXT = (ROOT / "docs/cache.md").read_text(encoding="utf-8")


def test_every_test_it_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 40
    assert {name for name in named if f"def {name}(" not in sources} == set()


def test_every_test_of_faults_is_named() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests/faults").glob("test_*.py"))
    scenarios = re.findall(r'^def (test_\w+)\([^"]*?\) -> None:\n    """Scenarios? [0-9]', sources, re.MULTILINE)
    assert len(scenarios) > 30
    assert [name for name in scenarios if f"`{name}`" not in TEXT] == []


def test_every_setting_it_names_exists() -> None:
    assert set(re.findall(r"JITGEMM_[A-Z_]+", TEXT)) <= {variable.name for variable in settings.VARIABLES}
