"""A report on the dense race from its CSV: a table against the targets, and plots. Needs no GPU. ::

    python -m benchmarks.report docs/performance/dense_h200.csv out/

Into the directory go ``report.md``, ``roofline.png`` (TFLOP/s against arithmetic intensity), ``over_floor_*.png`` (time
over the floor against m, layer by layer), ``ratio.png`` (the best peer's time over ours, shape by shape) and, with
``--sweep``, ``tuned.png`` (the chosen config's time over the best's). Plots of shapes outside DeepSeek-V3's list have
``_other`` in their names. Needs matplotlib: ``pip install '.[report]'``.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness, sweep
from benchmarks.regret import Regret, regret
from benchmarks.shapes import FLOPS_PER_US, STREAM_BYTES_PER_US, Shape, dense_shapes
from jitgemm.device import PRESETS
from jitgemm.families.gemm import RECIPES, GemmConfig, GemmProblem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Sweep = Mapping[GemmProblem, Mapping[GemmConfig, float]]

LABELS = {"fp8_1x128_128x128": "FP8", "bf16": "BF16"}
_LISTED = frozenset(dense_shapes())
_INTEGERS = ("m", "n", "k", "groups")
_TEXTS = ("case", "recipe", "best_peer", "config", "measured", "errors")


# -- The targets. A ratio is the best peer's time over ours.


@dataclass(frozen=True)
class Target:
    """What a class of shapes should reach; None where nothing is asked."""

    label: str  # of the recipe
    listed: bool  # of the 56 shapes of DeepSeek-V3, or other shapes
    ms: str
    belongs: Callable[[int], bool]
    geomean: float | None  # of the ratios, at least
    each: float  # ratio, at least
    over_floor: float | None = None  # geomean of our time over the floor, at most

    @property
    def name(self) -> str:
        """What the class is called."""
        return f"{self.label}, {'' if self.listed else 'other shapes, '}{self.ms}"

    def members(self, rows: Iterable[Row]) -> list[Row]:
        """The rows of the class."""
        return [r for r in rows if label(r) == self.label and listed(r) == self.listed and self.belongs(r["m"])]


_UP_TO_128 = ("m <= 128", lambda m: m <= 128)
_ABOVE_128 = ("m > 128", lambda m: m > 128)
TARGETS = (
    Target("FP8", True, *_UP_TO_128, 1.22, 1.03, 1.14),
    Target("FP8", True, "m = 512", lambda m: 128 < m <= 512, 1.18, 1.00),
    Target("FP8", True, "m >= 2048", lambda m: m > 512, 1.10, 0.98),
    Target("BF16", True, *_UP_TO_128, 1.08, 0.97),
    Target("BF16", True, "m >= 512", _ABOVE_128[1], 1.05, 0.97),
    *(Target(name, False, *_UP_TO_128, None, 0.97, 1.16) for name in LABELS.values()),
    *(Target(name, False, *_ABOVE_128, 1.05, 0.97) for name in LABELS.values()),
)


@dataclass(frozen=True)
class Verdict:
    """How the rows of a class stand to its target."""

    target: Target
    rows: int
    raced: int
    geomean: float | None
    worst: Row | None
    over_floor: float | None

    @property
    def met(self) -> bool:
        """Whether nothing is missing and all that is asked is reached."""
        wanted = self.target
        return (
            self.raced == self.rows
            and self.worst is not None
            and self.worst["ratio"] >= wanted.each
            and (wanted.geomean is None or (self.geomean or 0) >= wanted.geomean)
            and (wanted.over_floor is None or (self.over_floor or math.inf) <= wanted.over_floor)
        )

    def cells(self) -> tuple[object, ...]:
        """A row of the table, as ``HEADERS`` has it."""
        worst = self.worst or {}
        return (
            self.target.name,
            f"{self.raced}/{self.rows}",
            _against(self.geomean, self.target.geomean, ">="),
            _against(worst.get("ratio"), self.target.each, ">="),
            f"{size(worst)} ({worst['best_peer']})" if worst else "",
            _against(self.over_floor, self.target.over_floor, "<="),
            "yes" if self.met else "no",
        )


HEADERS = (
    "class",
    "raced",
    "ratio (target)",
    "worst (target)",
    "worst shape (best peer)",
    "over floor (target)",
    "met",
)


def _against(value: float | None, bound: float | None, sign: str) -> str:
    return harness.fixed(value, 3) + ("" if bound is None else f" ({sign} {bound:.2f})")


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """How the rows stand to the targets, by class; without classes that have no rows."""
    return [verdict(target, members) for target in TARGETS if (members := target.members(rows))]


def verdict(target: Target, members: Sequence[Row]) -> Verdict:
    """How the rows of a class stand to its target."""
    raced = [row for row in members if row["ratio"] is not None]
    return Verdict(
        target,
        len(members),
        len(raced),
        harness.geomean([row["ratio"] for row in raced]),
        min(raced, key=lambda row: row["ratio"], default=None),
        harness.geomean([row["ours_us"] / row["floor_us"] for row in members if row["ours_us"] is not None]),
    )


def summary(rows: Sequence[Row]) -> str:
    """The table of classes as text."""
    return harness.table(HEADERS, [found.cells() for found in verdicts(rows)])


# -- Rows.


def read_rows(path: Path, *columns: str) -> list[dict[str, Any]]:
    """Rows of a CSV on GEMMs; numbers as such, and None for what is missing.

    Raises:
        ValueError: it lacks one of ``columns``, or of m, n, k and recipe.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = [{name: _value(name, text) for name, text in row.items()} for row in reader]
    missing = [name for name in ("m", "n", "k", "recipe", *columns) if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}")
    return rows


def _value(name: str, text: str) -> Any:
    if name in _INTEGERS:
        return int(text)
    if name in _TEXTS:
        return text
    try:
        return float(text) if text else None
    except ValueError:
        return text


def label(row: Row) -> str:
    """What a row's recipe is called for short."""
    return LABELS.get(row["recipe"], row["recipe"])


def listed(row: Row) -> bool:
    """Whether a row is one of the 56 shapes."""
    return shape_of(row) in _LISTED


def shape_of(row: Row) -> Shape:
    """The sizes of a row's problem."""
    return Shape(row["m"], row["n"], row["k"])


def size(row: Row) -> str:
    """The sizes of a row's problem as text."""
    return str(shape_of(row))


# -- The report.


def regrets_of(measured: Sweep, device: str) -> list[Regret]:
    """What the cost model's choice loses on each problem of a sweep where it was measured.

    Args:
        measured: microseconds by problem and config.
        device: the preset to choose for.
    """
    found = (regret(problem, times, PRESETS[device]) for problem, times in measured.items())
    return [each for each in found if each is not None]


def write(rows: Sequence[Row], directory: Path, source: str, regrets: Sequence[Regret] = ()) -> list[Path]:
    """Write ``report.md`` and the plots into ``directory``; their paths.

    Args:
        rows: of the dense race.
        directory: made if need be.
        source: where the rows come from, for the report's first line.
        regrets: for the plot of tuned against chosen.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in _figures(rows, regrets):
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
    text = directory / "report.md"
    text.write_text(markdown(rows, source, [path.name for path in paths]))
    return [text, *paths]


def markdown(rows: Sequence[Row], source: str, images: Sequence[str] = ()) -> str:
    """The report's text."""
    measured = dict.fromkeys(row["measured"] for row in rows if row.get("measured"))
    shapes = [
        (
            label(row),
            size(row),
            harness.fixed(row["ours_us"]),
            harness.fixed(row["best_peer_us"]),
            row["best_peer"] or "-",
            harness.fixed(row["ratio"], 3),
            harness.fixed(row["floor_us"]),
            harness.fixed(None if row["ours_us"] is None else row["ours_us"] / row["floor_us"]),
            row.get("config", ""),
        )
        for row in rows
    ]
    headers = (
        *("recipe", "m x n x k", "ours us", "best peer us", "best peer", "ratio"),
        *("floor us", "over floor", "config"),
    )
    parts = [
        "# Dense race",
        "\n".join([f"Rows: {source}.", *measured, "Ratio: best peer's time over ours."]),
        _markdown_table(HEADERS, [found.cells() for found in verdicts(rows)]),
        *(f"![{Path(image).stem}]({image})" for image in images),
        "## Shapes",
        _markdown_table(headers, shapes),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# -- Plots.


@dataclass(frozen=True)
class _Style:
    name: str
    marker: str
    colour: str


_OURS = "ours_us"
_STYLES = {  # by the column of the time; later ones are drawn over earlier ones
    "cublaslt_blockwise_us": _Style("cuBLASLt, block-wise scales", "v", "#CC79A7"),
    "cublaslt_rowwise_us": _Style("cuBLASLt, row-wise scales", "^", "#009E73"),
    "cublas_us": _Style("cuBLAS", "D", "#009E73"),
    "deepgemm_us": _Style("DeepGEMM", "s", "#D55E00"),
    _OURS: _Style("jitgemm", "o", "#0072B2"),
}
_FLOOR_COLOUR = "#666666"


def require_matplotlib() -> None:
    """Leave with exit code 2 where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("the report's plots need matplotlib: pip install '.[report]'")


def _figures(rows: Sequence[Row], regrets: Sequence[Regret]) -> Iterable[tuple[str, Figure]]:
    timed = [row for row in rows if any(row.get(column) for column in _STYLES)]
    for suffix, wanted in (("", True), ("_other", False)):
        by_recipe = _grouped((row for row in timed if listed(row) == wanted), label)
        if not by_recipe:
            continue
        title = "dense layers of DeepSeek-V3" if wanted else "other shapes"
        yield f"roofline{suffix}", _roofline(by_recipe, title)
        for name, members in by_recipe.items():
            yield f"over_floor_{name.lower()}{suffix}", _over_floor(members, f"{name}, {title}")
        yield f"ratio{suffix}", _ratio(by_recipe, title)
    if regrets:
        yield "tuned", _tuned(regrets)


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _subplots(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of its own, which no display and no global state has a part in, and its axes row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def _contenders(rows: Iterable[Row]) -> dict[str, _Style]:
    rows = list(rows)
    return {column: style for column, style in _STYLES.items() if any(row.get(column) for row in rows)}


def _scatter_options(column: str, style: _Style) -> dict[str, Any]:
    face = style.colour if column == _OURS else "none"
    return {"marker": style.marker, "facecolors": face, "edgecolors": style.colour, "label": style.name}


def _legend(figure: Figure, axes: Sequence[Axes], columns: int) -> None:
    """One legend below all axes: ours, the peers, the rest."""
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    order = [style.name for style in reversed(_STYLES.values())]
    names = sorted(entries, key=lambda name: order.index(name) if name in order else len(order))
    figure.legend([entries[name] for name in names], names, loc="outside lower center", ncols=columns, frameon=False)


def _roofline(by_recipe: Mapping[str, Sequence[Row]], title: str) -> Figure:
    """TFLOP/s against arithmetic intensity, a panel for each recipe; contenders side by side around a shape's floor."""
    figure, axes = _subplots(1, len(by_recipe), (6.6 * len(by_recipe), 5.6))
    for ax, (name, rows) in zip(axes, by_recipe.items(), strict=True):
        operand_bytes = RECIPES[rows[0]["recipe"]].operand_bytes
        flops = [shape_of(row).flops for row in rows]
        intensity = [f / shape_of(row).traffic(operand_bytes) for row, f in zip(rows, flops, strict=True)]
        peak = FLOPS_PER_US[operand_bytes]
        low, high = min(intensity) / 1.4, max(intensity) * 1.4
        corners = (low, min(max(peak / STREAM_BYTES_PER_US, low), high), high)
        roof = [min(peak, x * STREAM_BYTES_PER_US) / 1e6 for x in corners]
        ax.plot(corners, roof, color="black", linewidth=1.2, label="sustained bandwidth and MMA rate", zorder=1)
        floors = [f / row["floor_us"] / 1e6 for row, f in zip(rows, flops, strict=True)]
        ax.scatter(intensity, floors, marker="_", s=220, color=_FLOOR_COLOUR, label="floor of a shape", zorder=2)
        contenders = _contenders(rows)
        for index, (column, style) in enumerate(reversed(contenders.items())):
            aside = 1.1 ** (index - (len(contenders) - 1) / 2)
            points = [
                (x * aside, f / row[column] / 1e6)
                for x, f, row in zip(intensity, flops, rows, strict=True)
                if row.get(column) is not None
            ]
            ax.scatter(*zip(*points, strict=True), s=16, linewidths=0.9, zorder=3, **_scatter_options(column, style))
        ax.set(xscale="log", yscale="log", title=name, xlabel="arithmetic intensity, FLOP per byte of A, B and D")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("TFLOP/s")
    figure.suptitle(f"Roofline, {title} (contenders are drawn side by side)")
    _legend(figure, axes, 4)
    return figure


def _over_floor(rows: Sequence[Row], title: str) -> Figure:
    """Time over the floor against m, a panel for each layer."""
    layers = _grouped(rows, lambda row: (row["n"], row["k"]))
    columns = min(4, len(layers))
    lines = math.ceil(len(layers) / columns)
    figure, axes = _subplots(lines, columns, (3.3 * columns + 0.4, 2.7 * lines + 1), sharex=True, sharey=True)
    ms = sorted({row["m"] for row in rows})
    for ax, ((n, k), members) in zip(axes, layers.items(), strict=False):
        ax.axhline(1, color=_FLOOR_COLOUR, linewidth=1, label="floor")
        members = sorted(members, key=lambda row: row["m"])
        for column, style in _contenders(rows).items():
            points = [(row["m"], row[column] / row["floor_us"]) for row in members if row.get(column) is not None]
            if points:
                fill = style.colour if column == _OURS else "white"
                ax.plot(
                    *zip(*points, strict=True),
                    marker=style.marker,
                    markersize=5,
                    markerfacecolor=fill,
                    color=style.colour,
                    linewidth=1.6 if column == _OURS else 0.9,
                    label=style.name,
                )
        ax.set(xscale="log", yscale="log", title=f"n = {n}, k = {k}")
        ax.title.set_fontsize("medium")
        ax.grid(alpha=0.25)
    for ax in axes[len(layers) :]:
        ax.set_axis_off()
    _ticks(axes[0].xaxis, ms)
    largest = max(row[column] / row["floor_us"] for row in rows for column in _contenders(rows) if row.get(column))
    _ticks(
        axes[0].yaxis, [tick for tick in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 15, 20) if tick <= largest * 1.05]
    )
    for ax in axes:
        lowest = ax in axes[len(layers) - columns : len(layers)]
        ax.tick_params(axis="x", labelrotation=45, labelsize="small", labelbottom=lowest)
        ax.set_xlabel("m" if lowest else "")
    figure.supylabel("time over the floor")
    figure.suptitle(f"Time over the floor, {title}")
    _legend(figure, axes[: len(layers)], 5)
    return figure


def _ticks(axis: Any, values: Sequence[float]) -> None:
    """Just these ticks, as plain numbers, on a logarithmic axis."""
    axis.set_ticks(values, labels=[f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)


def _ratio(by_recipe: Mapping[str, Sequence[Row]], title: str) -> Figure:
    """The best peer's time over ours as a grid of m and layer; what is below its target is framed."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.patches import Rectangle

    counts = [(len({(r["n"], r["k"]) for r in rows}), len({r["m"] for r in rows})) for rows in by_recipe.values()]
    height, width = max(count[0] for count in counts), sum(count[1] for count in counts)
    figure, axes = _subplots(1, len(by_recipe), (0.72 * width + 3.6, 0.5 * height + 1.9))
    norm = TwoSlopeNorm(1.0, 0.7, 1.5)
    for ax, (name, rows) in zip(axes, by_recipe.items(), strict=True):
        layers, ms = list(_grouped(rows, lambda row: (row["n"], row["k"]))), sorted({row["m"] for row in rows})
        grid = [[math.nan] * len(ms) for _ in layers]
        for row in rows:
            if row["ratio"] is None:
                continue
            x, y = ms.index(row["m"]), layers.index((row["n"], row["k"]))
            grid[y][x] = row["ratio"]
            dark = row["ratio"] < 0.8 or row["ratio"] > 1.4
            ax.text(x, y, f"{row['ratio']:.2f}", ha="center", va="center", color="white" if dark else "black")
            if any(row["ratio"] < target.each for target in TARGETS if target.members([row])):
                ax.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, edgecolor="black", linewidth=1.8))
        mesh = ax.imshow(grid, cmap="RdBu", norm=norm, aspect="auto")
        ax.set_xticks(range(len(ms)), labels=list(map(str, ms)))
        ax.set_yticks(range(len(layers)), labels=[f"{n} x {k}" for n, k in layers])
        ax.set(title=name, xlabel="m")
        ax.tick_params(length=0)
    axes[0].set_ylabel("layer, n x k")
    bar = figure.colorbar(mesh, ax=axes, extend="both", ticks=[0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5])
    bar.set_label("ratio; blue: we are faster")
    figure.suptitle(f"Best peer's time over ours, {title} (framed: below the target of each shape)")
    return figure


def _tuned(regrets: Sequence[Regret]) -> Figure:
    """The time of the cost model's choice over the best's, against the best's time."""
    figure, (ax,) = _subplots(1, 1, (8, 5))
    for (recipe, name), style in zip(LABELS.items(), (_STYLES[_OURS], _STYLES["deepgemm_us"]), strict=True):
        points = [(r.us / r.choice, r.choice) for r in regrets if r.problem.recipe == recipe]
        if not points:
            continue
        mean = harness.geomean([choice for _, choice in points])
        ax.scatter(
            *zip(*points, strict=True),
            s=26,
            marker=style.marker,
            facecolors="none",
            edgecolors=style.colour,
            label=f"{name}: geomean {harness.fixed(mean, 3)}",
        )
    for bound, name in ((1.02, "target of the geomean"), (1.08, "target of each shape")):
        ax.axhline(bound, color=_FLOOR_COLOUR, linestyle="--", linewidth=1)
        ax.annotate(
            f"{name}, {bound} ",
            (1, bound),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize="small",
        )
    ax.axhline(1, color="black", linewidth=1)
    ax.set(xscale="log", xlabel="time of the tuned config, us", ylabel="time of the chosen config over the tuned one")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_title("Chosen by the cost model against tuned (the best of a sweep)")
    ax.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def add_sweep_option(parser: argparse.ArgumentParser) -> None:
    """``--sweep``: the times of many configs."""
    text = "of benchmarks.sweep: plot the time of the cost model's choice over the best config's"
    parser.add_argument("--sweep", type=_sweep, default={}, metavar="CSV", help=text)


def _sweep(text: str) -> Sweep:
    try:
        return sweep.read(Path(text))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("csv", type=Path, help="of benchmarks.dense")
    parser.add_argument("directory", type=Path, help="where the report goes")
    add_sweep_option(parser)
    parser.add_argument("--device", choices=list(PRESETS), default="h200", help="of the sweep (default %(default)s)")
    options = parser.parse_args(arguments)
    require_matplotlib()
    try:
        rows = read_rows(options.csv, "ours_us", "best_peer", "ratio", "floor_us")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    paths = write(rows, options.directory, options.csv.name, regrets_of(options.sweep, options.device))
    print(summary(rows))
    print("written:", *paths, sep="\n  ")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
