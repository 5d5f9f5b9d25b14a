"""What every family's problem has, for code that knows no family."""

from __future__ import annotations

from typing import Any, Protocol


class Problem(Protocol):
    """What is asked of a family of kernels; hashable."""

    def without_m(self) -> Problem:
        """The same problem for any m."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """One line of a shapes file."""
        ...
