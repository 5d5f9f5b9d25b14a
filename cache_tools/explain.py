"""Why the heuristics choose what they choose for one problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jitgemm.cache_tools.console import print_json, print_table, printable
from jitgemm.cache_tools.tune import entry_to_dict
from jitgemm.device import Device

if TYPE_CHECKING:
    from jitgemm.families.batched import BatchedProblem
    from jitgemm.families.gemm import GemmProblem
    from jitgemm.families.grouped import GroupedProblem
    from jitgemm.heuristics import Candidate, Explanation


def explain(problem: GemmProblem | GroupedProblem | BatchedProblem, device: Device, *, top: int, as_json: bool) -> None:
    """Print the ``top`` candidates with their predicted cost, why others are illegal, and the winner."""
    from jitgemm import heuristics
    from jitgemm.families.gemm import GemmProblem

    explanation = heuristics.explain(problem, device)
    legal = _by_cost(explanation)
    illegal = _by_reason(explanation)
    entry, expansion = explanation.entry, explanation.expansion
    if as_json:
        print_json(
            problem=problem.to_dict(),
            device=device.name,
            winner=explanation.winner.to_dict(),
            tuned=None if entry is None else {**entry_to_dict(entry), "table": str(explanation.table)},
            expansion=None
            if expansion is None
            else {
                **expansion._asdict(),
                "product": expansion.product.to_dict(),
                "far": expansion.far.to_dict(),
            },
            candidates=[_to_dict(candidate) for candidate in legal],
            illegal=[
                {"reason": reason, "configs": [candidate.config.to_dict() for candidate in candidates]}
                for reason, candidates in illegal
            ],
        )
        return
    groups = "" if isinstance(problem, GemmProblem) else f"{problem.groups} groups, {problem.kind}, "
    print(
        f"{groups}{problem.m} x {problem.n} x {problem.k}, {problem.recipe} {problem.layout}, D in {problem.d_dtype},"
        f" on {device.name} with {device.num_sms} SMs: {explanation.winner}\n"
    )
    if entry is not None:
        print(
            f"tuned: at m = {entry.m} it took {entry.us:.2f} us, the model's choice {entry.model_config}"
            f" {entry.model_us:.2f} ({entry.margin:.3f}x); {printable(entry.run.gpu)}, {printable(entry.run.date)},"
            f" {printable(explanation.table)}\n"
        )
    if expansion is not None:
        print(
            f"without C calls expand the weights to FP8 in memory first, {expansion.workspace_bytes / 2**20:.1f} MiB:"
            f" {expansion.product} multiplies them, and {expansion.far} if scales lie too far apart for that; predicted"
            f" {expansion.us:.2f} us, and {expansion.packed_us:.2f} with packed weights\n"
        )
    shown = [c for place, c in enumerate(legal) if place < top or c.config == explanation.winner]
    terms = [name for name in dict.fromkeys(name for c in legal for name in c.terms or {}) if name != "total"]
    print_table(
        ["config", ">predicted us", *(f">{name}" for name in terms)],
        [
            (
                f"{candidate.config}{'  <- winner' if candidate.config == explanation.winner else ''}",
                _number(candidate.cost_us),
                *(_number((candidate.terms or {}).get(name)) for name in terms),
            )
            for candidate in shown
        ],
    )
    if len(legal) > len(shown):
        print(f"... and {len(legal) - len(shown)} legal candidates more (--top {len(legal)} shows all)\n")
    if illegal:
        print_table(
            [">illegal", "because", "such as"],
            [(len(candidates), reason, candidates[0].config) for reason, candidates in illegal],
        )


def _by_cost(explanation: Explanation) -> list[Candidate]:
    """Legal candidates, cheapest first; the winner leads among equals."""
    legal = [candidate for candidate in explanation.candidates if candidate.cost_us is not None]
    return sorted(legal, key=lambda c: (c.cost_us, c.config != explanation.winner, c.config))


def _by_reason(explanation: Explanation) -> Sequence[tuple[str, list[Candidate]]]:
    """Illegal candidates of each reason, the most frequent reason first."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in explanation.candidates:
        if candidate.reason is not None:
            groups.setdefault(candidate.reason, []).append(candidate)
    return sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))


def _to_dict(candidate: Candidate) -> dict[str, Any]:
    return {"config": candidate.config.to_dict(), "cost_us": candidate.cost_us, "terms": dict(candidate.terms or {})}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
