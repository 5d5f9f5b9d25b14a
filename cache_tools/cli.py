"""The ``jitgemm`` command: options and exit codes; the work is in the modules beside this one.

Commands import what they need when they run: ``jitgemm list`` must not pay for ``jitgemm prewarm``, and none of them
imports torch but ``tune`` and ``demo``.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class

import jitgemm
from jitgemm import settings
from jitgemm.cache_tools import presets
from jitgemm.cache_tools.console import (
    EXIT_ENVIRONMENT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    EnvironmentFaultError,
    UsageError,
    print_error,
    print_json,
)
from jitgemm.device import ARCHITECTURES, PRESETS, Device
from jitgemm.errors import CacheError, CacheMissError, CompileError, JitGemmError, ProblemError, SettingsError
from jitgemm.families.batched import KINDS, BatchedProblem
from jitgemm.families.gemm import D_BYTES, EPILOGUES, FP4_RECIPES, LAYOUTS, RECIPES, GemmProblem
from jitgemm.families.grouped import GROUPINGS, GroupedProblem

if TYPE_CHECKING:
    from jitgemm.cache_tools.models import Layers

Command = TypeVar("Command", bound=Callable[..., Any])

_EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (UsageError, EXIT_USAGE),
    (ProblemError, EXIT_USAGE),
    (EnvironmentFaultError, EXIT_ENVIRONMENT),
    (SettingsError, EXIT_ENVIRONMENT),
    (CompileError, EXIT_ENVIRONMENT),  # reaches us where NVRTC is missing; a kernel's failure is in the report
    (CacheMissError, EXIT_FAILED),
    (CacheError, EXIT_ENVIRONMENT),
    (JitGemmError, EXIT_FAILED),
    (OSError, EXIT_ENVIRONMENT),
)


class _Warnings(logging.Handler):
    """Shows what the library warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        print_error(f"warning: {record.getMessage()}")


def main() -> None:
    """Entry point of the ``jitgemm`` script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a path in the report must not fail on an ASCII terminal
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("jitgemm").addHandler(_Warnings())
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command; every expected error is one line on stderr and an exit code."""
    try:
        code = cli.main(list(arguments), prog_name="jitgemm", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        print_error(" ".join(error.format_message().split()))
        return EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        print_error("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (JitGemmError, OSError) as error:
        print_error(str(error))
        return next(code for kind, code in _EXIT_CODES if isinstance(error, kind))
    return code or 0


def _use_cache_dir(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    directories = value.split(os.pathsep)
    if not all(directories):
        raise click.BadParameter(
            f"{value!r} names an empty path; accepted is a directory, or several with {os.pathsep} between them",
            context,
            parameter,
        )
    for one in directories:
        if os.path.exists(one) and not os.path.isdir(one):
            raise click.BadParameter(f"{one!r} is not a directory", context, parameter)
    context.with_resource(settings.override(cache_dir=tuple(Path(one).absolute() for one in directories)))


def _cache_dir_option(command: Command) -> Command:
    return click.option(
        "--cache-dir",
        metavar="DIR[:DIR]...",
        callback=_use_cache_dir,
        expose_value=False,
        help="Directory of the kernel cache, then read-only ones  [default: JITGEMM_CACHE_DIR, else the user's cache"
        " directory]",
    )(command)


def _jobs_option(command: Command) -> Command:
    def default() -> int:
        from jitgemm.resources import compile_jobs

        return compile_jobs()

    return click.option(
        "--jobs",
        type=click.IntRange(1, 1024),
        default=default,
        show_default="one a core, as memory allows",
        help="Processes that compile.",
    )(command)


@dataclass(frozen=True)
class _Source:
    """Where a command's problems come from."""

    preset: str | None
    model: Path | None
    shapes: Path | None
    problem: tuple[str, ...]
    tp: int
    ep: int
    recipe: str | None

    @property
    def given(self) -> list[str]:
        """The options that name problems."""
        return [f"--{name}" for name in ("preset", "model", "shapes", "problem") if getattr(self, name)]

    def read(self, command: str) -> Layers:
        """The problems, and remarks on them."""
        from jitgemm.cache_tools import models, problems

        given = self.given
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise UsageError(f"{command}: wants one of --preset, --model, --shapes and --problem, got {got}")
        if self.preset is not None:
            return models.from_preset(self.preset, tp=self.tp, ep=self.ep, recipe=self.recipe)
        if self.model is not None:
            return models.from_file(self.model, tp=self.tp, ep=self.ep, recipe=self.recipe)
        if (self.tp, self.ep, self.recipe) != (1, 1, None):
            raise UsageError(f"{command}: --tp, --ep and --recipe go with --preset and --model, got {given[0]}")
        try:
            if self.shapes is not None:
                return models.Layers(problems.from_shapes_file(self.shapes), [])
            return models.Layers([problems.from_line(line) for line in self.problem], [])
        except ProblemError as error:
            raise UsageError(f"{given[0]}: {error}") from None


def _complete_preset(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in presets.names() if name.startswith(incomplete)]


def _source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that name problems; the command gets them as one ``source``."""

    @functools.wraps(command)
    def with_source(**options: Any) -> Any:
        given = {name: options.pop(name) for name in _Source.__dataclass_fields__}
        return command(source=_Source(**given), **options)

    for option in reversed(
        (
            click.option(
                "--preset",
                metavar="NAME",
                shell_complete=_complete_preset,
                help=f"A model: {', '.join(presets.names())}.",
            ),
            click.option(
                "--model",
                type=click.Path(exists=True, path_type=Path),
                help="The config.json of a Hugging Face model, or its folder.",
            ),
            click.option(
                "--shapes",
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                help="A file with one JSON problem a line, such as JITGEMM_RECORD writes.",
            ),
            click.option(
                "--problem", metavar="JSON", multiple=True, help="One line of a shapes file; may be repeated."
            ),
            click.option(
                "--tp",
                type=click.IntRange(1, 65536),
                default=1,
                show_default=True,
                help="Ranks of tensor parallelism that the model is cut for.",
            ),
            click.option(
                "--ep",
                type=click.IntRange(1, 65536),
                default=1,
                show_default=True,
                help="Ranks of expert parallelism that the model is cut for.",
            ),
            click.option(
                "--recipe",
                type=click.Choice(list(RECIPES)),
                help="Of the model's quantized layers  [default: what its config says]",
            ),
        )
    ):
        option(with_source)
    return with_source


def _architectures(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(ARCHITECTURES) if value == "all" else tuple(value.split(","))
    for name in names:
        if name not in ARCHITECTURES:
            accepted = f"{', '.join(ARCHITECTURES)}, several of them separated by commas, and all"
            raise click.BadParameter(f"{name!r} has no kernels; accepted are {accepted}", context, parameter)
    return names


def _complete_architecture(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in (*ARCHITECTURES, "all") if name.startswith(incomplete)]


_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(jitgemm.__version__, prog_name="jitgemm", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> int | None:
    """Build, inspect and explain jitgemm's kernels. Only tune and demo use a GPU or import torch.

    Exit codes: 0 done, 1 something failed or is missing, 2 usage, 3 environment.
    """
    if context.invoked_subcommand is not None:
        return None
    click.echo(context.get_help(), err=True)
    return EXIT_USAGE


@cli.command()
@_source_options
@click.option(
    "--arch",
    "archs",
    metavar="ARCH,...",
    default="sm_90a",
    show_default=True,
    callback=_architectures,
    shell_complete=_complete_architecture,
    help="Architectures to build for, separated by commas, or all.",
)
@click.option(
    "--device",
    "device_names",
    type=click.Choice(list(PRESETS)),
    multiple=True,
    help="A chip to build for; may be repeated  [default: all chips of the architectures]",
)
@_jobs_option
@click.option("--dry-run", is_flag=True, help="Say what is needed; build and write nothing.")
@click.option("--check", is_flag=True, help="Fail where the cache lacks a kernel; build and write nothing.")
@click.option("--require-complete", is_flag=True, help="Afterwards look all kernels up, and fail where one is missing.")
@_json_option
@_cache_dir_option
def prewarm(
    source: _Source,
    archs: tuple[str, ...],
    device_names: tuple[str, ...],
    jobs: int,
    dry_run: bool,
    check: bool,
    require_complete: bool,
    as_json: bool,
) -> int:
    """Build every kernel that calls of some problems can need, whatever their m. Needs no GPU."""
    from jitgemm.cache_tools import prewarm as work

    if dry_run + check + require_complete > 1:
        raise UsageError("prewarm: --dry-run, --check and --require-complete are three things; accepted is one")
    layers = source.read("prewarm")
    mode: work.Mode = "check" if check else "dry run" if dry_run else "complete" if require_complete else "build"
    report = work.prewarm(
        layers.problems, _devices(archs, device_names), jobs=jobs, mode=mode, progress=sys.stderr.isatty()
    )
    report.notes = layers.notes
    if as_json:
        print_json(**report.to_dict())
    else:
        work.print_report(report)
    return report.exit_code


def _devices(archs: Sequence[str], names: Sequence[str] = ()) -> list[Device]:
    of_archs = [device for device in PRESETS.values() if device.arch.name in archs]
    for name in names:
        if PRESETS[name] not in of_archs:
            accepted = ", ".join(device.name for device in of_archs)
            wanted = ", ".join(archs)
            raise UsageError(f"--device: {name!r} is {PRESETS[name].arch.name}, not {wanted}; accepted are {accepted}")
    return [device for device in of_archs if not names or device.name in names]


@cli.command()
@_source_options
@click.option(
    "--m", "ms", type=click.IntRange(1), multiple=True, help="An m to tune for; may be repeated  [default: all]"
)
@click.option("--candidates", type=click.IntRange(2), help="Configs to time at each anchor of m  [default: 24]")
@click.option("--force", is_flag=True, help="Measure again what the table has.")
@click.option(
    "--check", "check_only", is_flag=True, help="Measure what tables have, report what is stale, change nothing."
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Another table than the user's own.")
@_jobs_option
@_json_option
@_cache_dir_option
def tune(
    source: _Source,
    ms: tuple[int, ...],
    candidates: int | None,
    force: bool,
    check_only: bool,
    out: Path | None,
    jobs: int,
    as_json: bool,
) -> int:
    """Measure configs on the GPU at hand; what wins over the cost model goes into a table that calls use."""
    from jitgemm.cache_tools import tune as work

    problems = None
    if source.given or not check_only:
        problems = [named for named in source.read("tune").problems if named.is_dense]
        if not problems:
            raise UsageError(f"tune: {source.given[0]} has grouped problems only; accepted are sources of dense ones")
    return work.run(
        problems,
        out=out,
        check_only=check_only,
        show=print_json if as_json else None,
        **({} if check_only else {"ms": ms, "candidates": candidates, "force": force, "jobs": jobs}),
    )


@cli.command(name="list")
@_json_option
@_cache_dir_option
def list_entries(as_json: bool) -> int:
    """List the kernels in the cache."""
    from jitgemm.cache_tools import inspect

    inspect.list_entries(as_json=as_json)
    return 0


@cli.command()
@click.argument("key")
@click.option("--source", is_flag=True, help="Print the CUDA source, rendered again from the kernel's spec.")
@_json_option
@_cache_dir_option
def show(key: str, source: bool, as_json: bool) -> int:
    """Show one kernel of the cache: its spec and resource use. A unique prefix of KEY is enough."""
    from jitgemm.cache_tools import inspect

    inspect.show(key, source=source, as_json=as_json)
    return 0


@cli.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@_source_options
@click.option("--arch", type=click.Choice(list(ARCHITECTURES)), help="Kernels of one architecture  [default: all]")
@click.option(
    "--device",
    "device_names",
    type=click.Choice(list(PRESETS)),
    multiple=True,
    help="A chip to take the kernels of the problems for; may be repeated  [default: all of the architecture]",
)
@_json_option
@_cache_dir_option
def export(file: Path, source: _Source, arch: str | None, device_names: tuple[str, ...], as_json: bool) -> int:
    """Write kernels of the cache to FILE, a bundle for import: all, or those that some problems can need."""
    from jitgemm.cache_tools import bundle

    keys = None
    if source.given:
        from jitgemm import heuristics
        from jitgemm.cache_key import cache_key

        keys = {
            cache_key(spec)
            for named in source.read("export").problems
            for device in _devices([arch or "sm_90a"], device_names)
            for spec in heuristics.enumerate_specs(named.problem, device)
        }
    elif device_names:
        raise UsageError("--device: wants one of --preset, --model, --shapes and --problem, got none")
    bundle.export(file, keys=keys, arch=arch, as_json=as_json)
    return 0


@cli.command(name="import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_json_option
@_cache_dir_option
def import_bundle(file: Path, as_json: bool) -> int:
    """Add the kernels of FILE, a bundle that export wrote, to the cache: all of them, or none of a damaged one."""
    from jitgemm.cache_tools import bundle

    bundle.import_bundle(file, as_json=as_json)
    return 0


@cli.command()
@click.option("--m", type=click.IntRange(1), required=True, help="Rows of D.")
@click.option("--n", type=click.IntRange(1), required=True, help="Columns of D.")
@click.option("--k", type=click.IntRange(1), required=True, help="Length of the contraction.")
@click.option("--recipe", type=click.Choice([*RECIPES, *FP4_RECIPES]), required=True, help="Operand types and scales.")
@click.option("--layout", type=click.Choice(LAYOUTS), default="nt", show_default=True)
@click.option("--d-dtype", type=click.Choice(list(D_BYTES)), default="bf16", show_default=True)
@click.option("--fast-accum", is_flag=True, help="Without promotion every 128 of K (row-wise and tensor-wise FP8).")
@click.option("--epilogue", type=click.Choice(EPILOGUES), help="What follows the product in the same kernel.")
@click.option("--groups", type=click.IntRange(1), help="So many GEMMs in one launch; m is rows of each, expected.")
@click.option(
    "--kind", type=click.Choice([*GROUPINGS, *KINDS]), default="masked", show_default=True, help="With --groups."
)
@click.option(
    "--alignment", type=click.IntRange(1), default=128, show_default=True, help="Of groups along m; with --groups."
)
@click.option("--device", type=click.Choice(list(PRESETS)), default="h200", show_default=True)
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="Candidates to print.")
@_json_option
@_cache_dir_option
def explain(
    m: int,
    n: int,
    k: int,
    recipe: str,
    layout: str,
    d_dtype: str,
    fast_accum: bool,
    epilogue: str | None,
    groups: int | None,
    kind: str,
    alignment: int,
    device: str,
    top: int,
    as_json: bool,
) -> int:
    """Print what the heuristics choose for a problem, and why."""
    from jitgemm.cache_tools import explain as work

    problem: GemmProblem | GroupedProblem | BatchedProblem
    if groups is None:
        problem = GemmProblem(n, k, recipe, m, layout, d_dtype, fast_accum, epilogue)
    elif fast_accum:
        raise UsageError("--fast-accum: grouped GEMMs always promote")
    elif kind not in KINDS:
        problem = GroupedProblem(n, k, recipe, groups, kind, m, layout, d_dtype, alignment, epilogue)
    elif epilogue is not None:
        raise UsageError(f"--epilogue: {kind} GEMMs have none")
    else:
        problem = BatchedProblem(n, k, recipe, groups, kind, m, layout, d_dtype)
    work.explain(problem, PRESETS[device], top=top, as_json=as_json)
    return 0


@cli.command()
@_json_option
@_cache_dir_option
def doctor(as_json: bool) -> int:
    """Report versions, driver, NVRTC, cache and settings; ends with OK or the list of problems."""
    from jitgemm.cache_tools.doctor import examine, print_diagnosis

    diagnosis = examine()
    if as_json:
        print_json(**diagnosis.to_dict())
    else:
        print_diagnosis(diagnosis)
    return EXIT_ENVIRONMENT if diagnosis.problems else 0


@cli.command()
@_json_option
@_cache_dir_option
def verify(as_json: bool) -> int:
    """Check every kernel of the cache: ok, stale, under a wrong key, or damaged. The last two give exit code 1."""
    from jitgemm.cache_tools import upkeep

    return upkeep.verify(as_json=as_json)


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else settings.parse_size(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not accepted; accepted are {settings.SIZES}") from None


_AGE_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def _age(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    number, unit = value[:-1], value[-1:].lower()
    if unit not in _AGE_UNITS or not (number.isascii() and number.isdecimal() and len(number) < 10):
        raise click.BadParameter(
            f"{value!r} is not accepted; accepted is a whole number and s, m, h, d or w, such as 30d"
        )
    return float(int(number) * _AGE_UNITS[unit])


@cli.command()
@click.option(
    "--max-size", "max_bytes", metavar="SIZE", callback=_size, help="Least recently used first, down to this."
)
@click.option("--unused-for", "unused_seconds", metavar="AGE", callback=_age, help="Not used for so long, such as 30d.")
@click.option("--stale", is_flag=True, help="Those that this version of jitgemm and its NVRTC will not use any more.")
@click.option("--damaged", is_flag=True, help="Those that are damaged, or under a wrong key.")
@click.option("--dry-run", is_flag=True, help="Say what would go; remove nothing.")
@_json_option
@_cache_dir_option
def prune(
    max_bytes: int | None,
    unused_seconds: float | None,
    stale: bool,
    damaged: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Remove kernels that meet any of the criteria. What was used a moment ago stays, and so do read-only layers."""
    from jitgemm.cache_tools import upkeep

    upkeep.prune(
        max_bytes=max_bytes,
        unused_seconds=unused_seconds,
        stale=stale,
        damaged=damaged,
        dry_run=dry_run,
        as_json=as_json,
    )
    return 0


@cli.command()
@_json_option
@_cache_dir_option
def clear(as_json: bool) -> int:
    """Remove all kernels from the cache. Tuned tables stay, and so do read-only layers."""
    from jitgemm.cache_tools import upkeep

    upkeep.clear(as_json=as_json)
    return 0


@cli.command()
@_json_option
@_cache_dir_option
def stats(as_json: bool) -> int:
    """Print how the cache has served all processes so far, and how much it holds."""
    from jitgemm.cache_tools import upkeep

    upkeep.stats(as_json=as_json)
    return 0


@cli.command()
@_json_option
@_cache_dir_option
def path(as_json: bool) -> int:
    """Print the directory that kernels are stored in."""
    from jitgemm.cache_tools import upkeep

    upkeep.path(as_json=as_json)
    return 0


@cli.command()
@click.option("--preset", metavar="NAME", default="deepseek-v3", show_default=True, help="What to prewarm.")
@_jobs_option
@_cache_dir_option
def demo(preset: str, jobs: int) -> int:
    """Prewarm a preset for sm_90a, then compute a GEMM and check it: on the GPU, or without one in the reference."""
    from jitgemm.cache_tools import demo as work
    from jitgemm.cache_tools import models
    from jitgemm.cache_tools import prewarm as prewarming

    problems = models.from_preset(preset).problems
    work.require_torch()
    report = prewarming.prewarm(problems, _devices(["sm_90a"]), jobs=jobs, mode="build", progress=sys.stderr.isatty())
    prewarming.print_report(report)
    return report.exit_code or work.check(problems)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print the script that completes this command in a shell: eval "$(jitgemm completion bash)"."""
    kind = get_completion_class(shell)
    assert kind is not None
    # Not the class's own source(), which for bash starts one to ask its version.
    click.echo(ShellComplete.source(kind(cli, {}, "jitgemm", "_JITGEMM_COMPLETE")))
    return 0


if __name__ == "__main__":
    main()
