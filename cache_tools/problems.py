"""Named problems, and the shapes file that holds one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jitgemm.errors import ProblemError

if TYPE_CHECKING:
    from jitgemm.families.batched import BatchedProblem
    from jitgemm.families.gemm import GemmProblem
    from jitgemm.families.grouped import GroupedProblem
    from jitgemm.families.rowwise import RowwiseProblem
    from jitgemm.families.small_problem import SmallProblem
    from jitgemm.families.tiles import TileProblem

    AnyProblem = GemmProblem | GroupedProblem | BatchedProblem | RowwiseProblem | TileProblem | SmallProblem


@dataclass(frozen=True)
class NamedProblem:
    """A problem without its m, and the layer that asks it (empty where it has no name)."""

    layer: str
    problem: AnyProblem

    @property
    def dense(self) -> GemmProblem:
        """The problem, for what knows dense ones only.

        Raises:
            ProblemError: it is another, or has an epilogue.
        """
        from jitgemm.families.gemm import GemmProblem

        if not isinstance(self.problem, GemmProblem):
            raise ProblemError(f"a problem is {self.problem.to_dict()['kind']}; accepted is gemm")
        if self.problem.epilogue is not None:
            raise ProblemError(f"a problem has the epilogue {self.problem.epilogue}; accepted is none")
        return self.problem

    @property
    def is_dense(self) -> bool:
        """Whether there is ``dense``."""
        from jitgemm.families.gemm import GemmProblem

        return isinstance(self.problem, GemmProblem) and self.problem.epilogue is None


def from_shapes_file(path: Path) -> list[NamedProblem]:
    """The problems of a shapes file; blank lines and lines that start with ``#`` are skipped.

    Raises:
        ProblemError: the file cannot be read or a line is not a problem; names file, line and fault.
    """
    problems = []
    for number, line in _lines(path):
        try:
            problems.append(from_line(line))
        except ProblemError as error:
            raise ProblemError(f"{path}:{number}: {error}") from None
    if not problems:
        raise ProblemError(f"{path}: no problem in the file; wanted is one JSON object a line")
    return problems


def from_line(line: str) -> NamedProblem:
    """The problem of one line of a shapes file.

    Raises:
        ProblemError: it is none.
    """
    return parse(_json(line))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ProblemError(f"{path}: {error.strerror}") from None
    for number, raw in enumerate(content.splitlines(), start=1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ProblemError(f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line") from None
        if line and not line.startswith("#"):
            yield number, line


def _json(line: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ProblemError(f"{repeated[0]!r} is given twice")
        return dict(pairs)

    try:
        value = json.loads(line, object_pairs_hook=unique)
    except ProblemError:  # a ValueError too
        raise
    except json.JSONDecodeError as error:
        raise ProblemError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError):  # nested too deep; an integer of thousands of digits
        raise ProblemError("not JSON that describes a problem") from None
    if not isinstance(value, dict):
        raise ProblemError(
            f'a {type(value).__name__}; wanted is an object such as {{"n": 4096, "k": 7168, "recipe": "bf16"}}'
        )
    return value


def parse(entry: Mapping[str, Any]) -> NamedProblem:
    """The problem of a line's JSON object.

    Raises:
        ProblemError: it is none.
    """
    from jitgemm.families import rowwise, tiles
    from jitgemm.families.batched import SHAPES_FILE_KINDS, BatchedProblem
    from jitgemm.families.gemm import GemmProblem
    from jitgemm.families.grouped import GroupedProblem
    from jitgemm.families.small_problem import KINDS as SMALL_KINDS
    from jitgemm.families.small_problem import SmallProblem

    if not isinstance(entry, Mapping):
        raise ProblemError(f"a problem is {type(entry).__name__}; accepted is a dictionary, a line of a shapes file")
    for name, value in entry.items():
        if isinstance(value, (list, dict)):
            raise ProblemError(f"{name} is a {type(value).__name__}; accepted is a plain value")
    layer = entry.get("layer", "")
    if not isinstance(layer, str):
        raise ProblemError(f"layer is {layer!r}; accepted is a string")
    values = {name: value for name, value in entry.items() if name != "layer"}
    kind = str(values.get("kind", "gemm"))
    problem: AnyProblem
    if kind in SMALL_KINDS:
        problem = SmallProblem.from_dict(values)
    elif kind == rowwise.KIND:
        problem = rowwise.RowwiseProblem.from_dict(values)
    elif kind == tiles.KIND:
        problem = tiles.TileProblem.from_dict(values)
    elif kind in SHAPES_FILE_KINDS:
        problem = BatchedProblem.from_dict(values)
    elif kind.startswith("m_grouped_"):
        problem = GroupedProblem.from_dict(values)
    else:
        problem = GemmProblem.from_dict(values)
    return NamedProblem(layer, problem.without_m())
