"""The ``jitgemm`` command: options and exit codes; the work is in the modules beside this one.

Commands import what they need when they run: ``jitgemm list`` must not pay for ``jitgemm prewarm``, and none of them
imports torch but ``tune`` and ``demo``.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

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
from jitgemm.device import ARCHITECTURES, PRESETS, Device, presets_of
from jitgemm.errors import CacheError, CacheMissError, CompileError, JitGemmError, ProblemError, SettingsError
from jitgemm.families.gemm import D_DTYPES, LAYOUTS, RECIPES, GemmProblem

if TYPE_CHECKING:
    from jitgemm.cache_tools.problems import NamedProblem

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
    if not value:
        raise click.BadParameter("is empty; accepted is a directory", context, parameter)
    context.with_resource(settings.override(cache_dir=Path(value).absolute()))


def _cache_dir_option(command: Command) -> Command:
    return click.option(
        "--cache-dir",
        type=click.Path(file_okay=False),
        callback=_use_cache_dir,
        expose_value=False,
        help="Directory of the kernel cache  [default: JITGEMM_CACHE_DIR, else the user's cache directory]",
    )(command)


def _jobs_option(command: Command) -> Command:
    return click.option(
        "--jobs",
        type=click.IntRange(1, 1024),
        default=lambda: len(os.sched_getaffinity(0)),
        show_default="all cores",
        help="Processes that compile.",
    )(command)


def _problem_options(command: Command) -> Command:
    preset = click.option("--preset", metavar="NAME", help=f"A set of problems: {', '.join(presets.names())}.")
    shapes = click.option(
        "--shapes",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A file with one JSON problem a line.",
    )
    return preset(shapes(command))


def _problems(command: str, preset: str | None, shapes: Path | None) -> list[NamedProblem]:
    from jitgemm.cache_tools import problems as read

    if preset is not None and shapes is None:
        return read.from_preset(preset)
    if shapes is not None and preset is None:
        return read.from_shapes_file(shapes)
    raise UsageError(f"{command}: wants one of --preset and --shapes, got {'both' if preset else 'neither'}")


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
@_problem_options
@click.option("--arch", type=click.Choice(list(ARCHITECTURES)), default="sm_90a", show_default=True)
@click.option(
    "--device",
    "device_names",
    type=click.Choice(list(PRESETS)),
    multiple=True,
    help="A chip to build for; may be repeated  [default: all chips of the architecture]",
)
@_jobs_option
@click.option("--dry-run", is_flag=True, help="Say what is needed; build and write nothing.")
@_json_option
@_cache_dir_option
def prewarm(
    preset: str | None,
    shapes: Path | None,
    arch: str,
    device_names: tuple[str, ...],
    jobs: int,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Build every kernel that calls of some problems can need, whatever their m. Needs no GPU."""
    from jitgemm.cache_tools import prewarm as work

    problems = _problems("prewarm", preset, shapes)
    report = work.prewarm(
        problems,
        _devices(arch, device_names),
        jobs=jobs,
        dry_run=dry_run,
        progress=sys.stderr.isatty(),
    )
    if as_json:
        print_json(**report.to_dict())
    else:
        work.print_report(report)
    return report.exit_code


def _devices(arch: str, names: Sequence[str]) -> list[Device]:
    of_arch = presets_of(arch)
    for name in names:
        if PRESETS[name] not in of_arch:
            accepted = ", ".join(device.name for device in of_arch)
            raise UsageError(f"--device: {name!r} is {PRESETS[name].arch.name}, not {arch}; accepted are {accepted}")
    return [device for device in of_arch if not names or device.name in names]


@cli.command()
@_problem_options
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
    preset: str | None,
    shapes: Path | None,
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

    everything = check_only and preset is None and shapes is None
    return work.run(
        None if everything else _problems("tune", preset, shapes),
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
@_problem_options
@click.option("--arch", type=click.Choice(list(ARCHITECTURES)), help="Kernels of one architecture  [default: all]")
@click.option(
    "--device",
    "device_names",
    type=click.Choice(list(PRESETS)),
    multiple=True,
    help="With --preset or --shapes: a chip to take kernels for; may be repeated  [default: all of the architecture]",
)
@_json_option
@_cache_dir_option
def export(
    file: Path, preset: str | None, shapes: Path | None, arch: str | None, device_names: tuple[str, ...], as_json: bool
) -> int:
    """Write kernels of the cache to FILE, a bundle for import: all, or those that some problems can need."""
    from jitgemm.cache_tools import bundle

    keys = None
    if preset is not None or shapes is not None:
        from jitgemm import heuristics
        from jitgemm.cache_key import cache_key

        keys = {
            cache_key(spec)
            for named in _problems("export", preset, shapes)
            for device in _devices(arch or "sm_90a", device_names)
            for spec in heuristics.enumerate_specs(named.problem, device)
        }
    elif device_names:
        raise UsageError("--device: wants --preset or --shapes, got neither")
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
@click.option("--recipe", type=click.Choice(list(RECIPES)), required=True, help="Operand types and scales.")
@click.option("--layout", type=click.Choice(LAYOUTS), default="nt", show_default=True)
@click.option("--d-dtype", type=click.Choice(list(D_DTYPES)), default="bf16", show_default=True)
@click.option("--fast-accum", is_flag=True, help="Without promotion every 128 of K (row-wise and tensor-wise FP8).")
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
    device: str,
    top: int,
    as_json: bool,
) -> int:
    """Print what the heuristics choose for a problem, and why."""
    from jitgemm.cache_tools import explain as work

    problem = GemmProblem(n, k, recipe, m, layout, d_dtype, fast_accum)
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
@click.option("--preset", metavar="NAME", default="deepseek-v3", show_default=True, help="What to prewarm.")
@_jobs_option
@_cache_dir_option
def demo(preset: str, jobs: int) -> int:
    """Prewarm a preset for sm_90a, then compute a GEMM and check it: on the GPU, or without one in the reference."""
    from jitgemm.cache_tools import demo as work
    from jitgemm.cache_tools import prewarm as prewarming
    from jitgemm.cache_tools import problems as read

    problems = read.from_preset(preset)
    work.require_torch()
    report = prewarming.prewarm(problems, presets_of("sm_90a"), jobs=jobs, dry_run=False, progress=sys.stderr.isatty())
    prewarming.print_report(report)
    return report.exit_code or work.check(problems)


if __name__ == "__main__":
    main()
