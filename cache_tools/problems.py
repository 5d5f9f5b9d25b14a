"""Named problems: from a preset, or from a file of shapes with one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jitgemm.cache_tools import presets
from jitgemm.cache_tools.console import UsageError
from jitgemm.errors import ProblemError

if TYPE_CHECKING:
    from jitgemm.families.gemm import GemmProblem
    from jitgemm.families.grouped import GroupedProblem


@dataclass(frozen=True)
class NamedProblem:
    """A problem without its m, and the layer that asks it (empty where it has no name)."""

    layer: str
    problem: GemmProblem | GroupedProblem

    @property
    def dense(self) -> GemmProblem:
        """The problem, for what knows dense ones only.

        Raises:
            UsageError: it is a grouped one.
        """
        from jitgemm.families.gemm import GemmProblem

        if not isinstance(self.problem, GemmProblem):
            raise UsageError(f"{self.problem.to_dict()['kind']} problems are not tuned; accepted is gemm")
        return self.problem


def from_preset(name: str) -> list[NamedProblem]:
    """The problems of a preset that ships with jitgemm.

    Raises:
        UsageError: there is no such preset.
    """
    if name not in presets.names():
        raise UsageError(f"--preset: {name!r} is not a preset; there are: {', '.join(presets.names())}")
    return [_parse(entry) for entry in presets.read(name)["problems"]]


def from_shapes_file(path: Path) -> list[NamedProblem]:
    """The problems of a shapes file; blank lines and lines that start with ``#`` are skipped.

    Raises:
        UsageError: the file cannot be read or a line is not a problem; names file, line and fault.
    """
    problems = []
    for number, line in _lines(path):
        try:
            problems.append(_parse(_json(line)))
        except (ProblemError, _BadLineError) as error:
            raise UsageError(f"--shapes: {path}:{number}: {error}") from None
    if not problems:
        raise UsageError(f"--shapes: {path}: no problem in the file; wanted is one JSON object a line")
    return problems


class _BadLineError(Exception):
    """What is wrong with a line, before it is even a problem."""


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--shapes: {path}: {error.strerror}") from None
    for number, raw in enumerate(content.splitlines(), start=1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UsageError(f"--shapes: {path}:{number}: not UTF-8 at byte {error.start + 1} of the line") from None
        if line and not line.startswith("#"):
            yield number, line


def _json(line: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise _BadLineError(f"{repeated[0]!r} is given twice")
        return dict(pairs)

    try:
        value = json.loads(line, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise _BadLineError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError):  # nested too deep; an integer of thousands of digits
        raise _BadLineError("not JSON that describes a problem") from None
    if not isinstance(value, dict):
        raise _BadLineError(
            f'a {type(value).__name__}; wanted is an object such as {{"n": 4096, "k": 7168, "recipe": "bf16"}}'
        )
    return value


def _parse(entry: dict[str, Any]) -> NamedProblem:
    from jitgemm.families.gemm import GemmProblem
    from jitgemm.families.grouped import GroupedProblem

    for name, value in entry.items():
        if isinstance(value, (list, dict)):
            raise ProblemError(f"{name} is a {type(value).__name__}; accepted is a plain value")
    layer = entry.get("layer", "")
    if not isinstance(layer, str):
        raise ProblemError(f"layer is {layer!r}; accepted is a string")
    values = {name: value for name, value in entry.items() if name != "layer"}
    grouped = str(values.get("kind", "gemm")).startswith("m_grouped_")
    problem = GroupedProblem.from_dict(values) if grouped else GemmProblem.from_dict(values)
    return NamedProblem(layer, problem.without_m())
