"""What every command shares: exit codes, errors, tables and JSON on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jitgemm.errors import JitGemmError

if TYPE_CHECKING:
    from rich.text import Text

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_ENVIRONMENT = 3
EXIT_INTERRUPTED = 130

SCHEMA = 1
"""Version of the JSON that ``--json`` prints."""


class UsageError(JitGemmError):
    """An option or a file of the user's is wrong: exit code 2."""


class NotFoundError(JitGemmError):
    """What was asked for is not there: exit code 1."""


class EnvironmentFaultError(JitGemmError):
    """The machine lacks something that the command needs: exit code 3."""


def printable(text: object, keep: str = "") -> str:
    """``text`` with control characters escaped, but for those in ``keep``.

    Metadata of a cache entry is data of whoever wrote it; a terminal must not obey it.
    """
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape", "backslashreplace").decode()
        for char in str(text)
    )


def print_json(**fields: Any) -> None:
    """Print the one JSON object of a command; only ASCII leaves, so nothing in it can reach a terminal raw."""
    print(json.dumps({"schema": SCHEMA, **fields}, indent=2))


def print_error(text: str) -> None:
    """One line on stderr."""
    print(printable(f"jitgemm: {text}"), file=sys.stderr)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, total: Sequence[object] = ()) -> None:
    """Print a table and a blank line to stdout; columns whose name starts with ``>`` are flush right.

    Into a pipe or a file it has the full width of its content, and no colours.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), show_footer=bool(total))
    for index, name in enumerate(columns):
        table.add_column(
            _cell(name.removeprefix(">")),
            footer=_cell(total[index] if total else None),
            justify="right" if name.startswith(">") else "left",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(_cell, row))
    terminal = sys.stdout.isatty()
    console = Console(force_terminal=terminal, highlight=False)
    if not terminal:
        console.width = 10_000
        console.width = console.measure(table).maximum
    with console.capture() as captured:
        console.print(table)
    print(*(line.rstrip() for line in captured.get().splitlines()), "", sep="\n")


def _cell(value: object) -> Text:
    from rich.text import Text

    return Text("" if value is None else printable(value))  # Text: square brackets are no markup here
