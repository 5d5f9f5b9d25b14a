"""Every dense GEMM kernel through NVRTC: no spills, no advisories, and the instructions that it is there for."""

from __future__ import annotations

import importlib.util
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jitgemm import builder, settings
from jitgemm.cache_tools.models import from_preset
from jitgemm.cache_tools.problems import NamedProblem
from jitgemm.compiler import UNKNOWN, Cubin, compile_source
from jitgemm.device import H200, PRESETS, SM90A
from jitgemm.families.gemm import FAMILY, LAYOUTS, GemmConfig, GemmProblem, KernelShape
from jitgemm.heuristics import choose_config, enumerate_configs, explain
from jitgemm.heuristics.gemm import candidates
from jitgemm.render import render

# recipe, layout, fast_accum
KINDS = [
    ("fp8_1x128_128x128", "nt", False),
    ("fp8_1x128_1x128", "nt", False),
    *[(recipe, "nt", fast) for recipe in ("fp8_rowwise", "fp8_tensorwise") for fast in (False, True)],
    *[("bf16", layout, False) for layout in LAYOUTS],
]
SIZES = [(576, 7168), (2112, 7168), (4096, 4096), (24576, 1536), (1000, 520), (130, 100_000)]
MS = (1, 17, 130, 700, 4096, 20_000)
DRAWN = 1  # config beside those that a feature brings in, for each kind
Build = Callable[[GemmProblem, GemmConfig], Cubin]


def kind_name(kind: tuple[str, str, bool]) -> str:
    return "-".join(kind[:2]) + "-fast" * kind[2]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    """Compile kernels into a cache that the processes of one test run share."""
    directory = tmp_path_factory.getbasetemp()
    if directory.name.startswith("popen-"):  # a worker of pytest-xdist has its own folder in the run's
        directory = directory.parent

    def compiled(problem: GemmProblem, config: GemmConfig) -> Cubin:
        return builder.build(FAMILY.spec(problem, config, SM90A.name)).cubin

    with settings.override(cache_dir=directory / "gemm-kernels"):
        yield compiled


def faults(problem: GemmProblem, config: GemmConfig, cubin: Cubin) -> list[str]:
    """What is wrong with a kernel's use of resources."""
    shape, metadata, image = KernelShape(problem, config), cubin.metadata, cubin.image
    found = [f"{problem} {config}: {warning}" for warning in metadata.warnings]
    for name in ("spill_bytes", "stack_bytes"):
        if getattr(metadata, name) != 0:
            found.append(f"{problem} {config}: {name} is {getattr(metadata, name)}")
    blocks = shape.blocks_per_sm
    limit = SM90A.registers_per_sm // (shape.num_threads * blocks) // 8 * 8
    if not 0 < metadata.registers <= min(limit, SM90A.max_registers_per_thread):
        found.append(f"{problem} {config}: {metadata.registers} registers; {limit} are allowed")
    smem = shape.smem_bytes + static_smem(image)
    if smem > SM90A.smem_per_block or blocks * (smem + SM90A.smem_reserved) > SM90A.smem_per_sm:
        found.append(f"{problem} {config}: {blocks} blocks of {smem} bytes of shared memory")
    return found


def static_smem(image: bytes) -> int:
    """Bytes of shared memory that a cubin's kernel declares: its ``.nv.shared`` section, less what the system takes."""
    table, width, count, names = (struct.unpack_from(f"<{code}", image, at)[0] for code, at in _ELF_HEADER)
    headers = [struct.unpack_from("<IIQQQQ", image, table + index * width) for index in range(count)]
    strings = headers[names][4]
    for name, *_, size in headers:
        text = image[strings + name : image.index(b"\0", strings + name)]
        if text.startswith(b".nv.shared.") and not text.startswith(b".nv.shared.reserved"):
            return max(0, int(size) - SM90A.smem_reserved)
    return 0


_ELF_HEADER = (("Q", 0x28), ("H", 0x3A), ("H", 0x3C), ("H", 0x3E))  # section headers: offset, size, count, names


def representative(kind: tuple[str, str, bool], d_dtype: str) -> list[tuple[GemmProblem, GemmConfig]]:
    """Choices at random sizes, the extremes of what is legal, and a random part of the rest."""
    recipe, layout, fast_accum = kind
    draw = random.Random(f"{kind} {d_dtype}")
    (n, k), m = draw.choice(SIZES), draw.choice(MS)
    problem = GemmProblem(n, k, recipe, m, layout, d_dtype, fast_accum)
    legal = sorted(c.config for c in explain(problem, H200).candidates if c.reason is None)
    draw.shuffle(legal)  # ties between extremes fall elsewhere for each kind

    def sums(config: GemmConfig) -> int:
        return KernelShape(problem, config).accumulator_registers

    groups = [
        [config for config in legal if feature(config)]
        for feature in (
            lambda c: not c.swap_ab and c.tile_m == 64,
            lambda c: not c.swap_ab and c.tile_m == 128,
            lambda c: not c.swap_ab and c.tile_m == 192,
            lambda c: not c.swap_ab and c.tile_m == 256,
            lambda c: c.swap_ab,
            lambda c: c.cluster_m > 1,
            lambda c: c.cluster_n > 1,
            lambda c: c.split_k > 1,
        )
    ]
    chosen = {max(group, key=sums) for group in groups if group}
    chosen |= {min(legal, key=sums), max(legal, key=lambda c: c.split_k), max(legal, key=lambda c: c.stages)}
    chosen |= set(draw.sample(legal, min(DRAWN, len(legal))))
    chosen |= {choose_config(problem, H200)}
    return [(problem, config) for config in sorted(chosen)]


@pytest.mark.parametrize("d_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("recipe", ["fp8_1x128_128x128", "bf16"])
def test_large_tiles_may_split_k_where_results_must_not_depend_on_m(build: Build, recipe: str, d_dtype: str) -> None:
    problem = GemmProblem(128, 8192, recipe, None, "nt", d_dtype)
    with settings.override(batch_invariant=True):
        configs = enumerate_configs(problem, H200)
    assert all(config.split_k > 1 for config in configs)
    largest = max(configs, key=lambda config: KernelShape(problem, config).accumulator_registers)
    assert largest not in candidates(problem, ())
    assert faults(problem, largest, build(problem, largest)) == []


@pytest.mark.parametrize("d_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_kernels_of_every_kind_fit(build: Build, kind: tuple[str, str, bool], d_dtype: str) -> None:
    found = []
    for problem, config in representative(kind, d_dtype):
        found += faults(problem, config, build(problem, config))
    assert not found, "\n".join(found)


DENSE = [named for named in from_preset("deepseek-v3").problems if isinstance(named.problem, GemmProblem)]


@pytest.mark.parametrize("named", DENSE, ids=lambda named: named.layer)
def test_kernels_of_the_preset_fit(build: Build, named: NamedProblem) -> None:
    found = []
    for config in enumerate_configs(named.problem, H200):
        found += faults(named.problem, config, build(named.problem, config))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("device", ["h100", "h20"])
def test_kernels_for_other_chips_fit(build: Build, device: str) -> None:
    problem = GemmProblem(576, 7168, "fp8_1x128_128x128")
    found = []
    for config in enumerate_configs(problem, PRESETS[device]):
        found += faults(problem, config, build(problem, config))
    assert not found, "\n".join(found)


def test_compiling_again_tells_the_same() -> None:
    """NVRTC may keep compiled programs itself; what it says of them must not be lost."""
    problem = GemmProblem(576, 7168, "fp8_rowwise", m=8)
    spec = FAMILY.spec(problem, choose_config(problem, H200), SM90A.name)
    first, second = (compile_source(render(spec), spec, "0" * 64) for _ in range(2))
    assert first.image == second.image
    for cubin in (first, second):
        assert UNKNOWN not in (cubin.metadata.registers, cubin.metadata.spill_bytes, cubin.metadata.stack_bytes)


def test_the_source_names_its_kernel_once_and_is_ascii() -> None:
    problem = GemmProblem(576, 7168, "fp8_rowwise", m=8)
    spec = FAMILY.spec(problem, choose_config(problem, H200), SM90A.name)
    source = render(spec)
    assert render(spec) == source
    assert all(text.isascii() for text in (source.text, *source.headers.values()))
    assert len(re.findall(r"extern \"C\" __global__", source.text)) == 1
    assert FAMILY.kernel_name(spec) == source.name
    assert source.text.count(f"{source.name}(") == 1


# -- Machine code.


def find_nvdisasm() -> str | None:
    """The disassembler of the ``nvidia-cuda-nvdisasm`` wheel, or one on the path."""
    nvidia = importlib.util.find_spec("nvidia")
    for root in (nvidia.submodule_search_locations or ()) if nvidia else ():
        for path in sorted(Path(root).glob("*/bin/nvdisasm")):
            return str(path)
    return shutil.which("nvdisasm")


NVDISASM = find_nvdisasm()


def opcodes(image: bytes, folder: Path) -> dict[str, int]:
    """How often each instruction, without its modifiers, is in a cubin."""
    assert NVDISASM is not None
    path = folder / "kernel.cubin"
    path.write_bytes(image)
    text = subprocess.run([NVDISASM, "-c", str(path)], check=True, capture_output=True, text=True).stdout
    counts: dict[str, int] = {}
    for name in re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9]*)", text, re.MULTILINE):
        counts[name] = counts.get(name, 0) + 1
    return counts


@pytest.mark.skipif(NVDISASM is None, reason="nvdisasm is not installed (nvidia-cuda-nvdisasm)")
@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_machine_code(build: Build, tmp_path: Path, kind: tuple[str, str, bool]) -> None:
    for problem, config in representative(kind, "bf16")[::2]:
        shape = KernelShape(problem, config)
        counts = opcodes(build(problem, config).image, tmp_path)
        what = f"{problem} {config}: {counts}"
        mma, other = ("QGMMA", "HGMMA") if problem.traits.is_fp8 else ("HGMMA", "QGMMA")
        # One stage of one wave is 4 MMAs; chains and unrolled loops repeat whole stages.
        assert counts.get(mma, 0) > 0, what
        assert counts[mma] % (4 * shape.waves) == 0, what
        assert other not in counts, what
        assert counts.get("UTMALDG", 0) > 0, what
        assert ("UTMASTG" in counts) == (config.split_k == 1), what
        assert ("USETMAXREG" in counts) == (shape.math_warpgroups > 1), what
        assert not {"LDL", "STL"} & counts.keys(), what
