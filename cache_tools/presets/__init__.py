"""Models that ship with jitgemm: of each, the fields of its config.json that decide its layers, one JSON file each."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any


def names() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(entry.name[: -len(".json")] for entry in files(__name__).iterdir() if entry.name.endswith(".json"))


def read(name: str) -> dict[str, Any]:
    """The preset's file: its name, title, source and config, and the config's fields that are ``unverified``.

    Raises:
        KeyError: there is no such preset.
    """
    if name not in names():
        raise KeyError(name)
    preset: dict[str, Any] = json.loads(files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return preset
