"""The kernels' own search for tiles, run on the CPU: a warp as 32 fibers that take turns at every exchange of values.

Whatever the layout says, all rows of all groups are found once, in no tile two groups, and nothing out of bounds.
"""

from __future__ import annotations

import ctypes
import random
import re
import shutil
import subprocess
from collections.abc import Sequence

import pytest
from support import ROOT

from jitgemm.families.grouped_launch import band, stretch

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")

TILES, WIDTH = (8, 48, 64, 128, 160, 192), 64
KINDS = {"masked": 0, "psum": 1, "contiguous": 2}

_SHIM = """
#include <ucontext.h>
#include <cstdint>
#include <cstdlib>
#define __device__
#define __forceinline__ inline
constexpr int WARP = 32;
template <typename T> constexpr T min_of(T x, T y) { return x < y ? x : y; }
static ucontext_t contexts[32], outside;
static int current, alive, values[2][32], turn[32];
static char* stacks[32];
static struct { struct { operator int() const { return current; } } x; } threadIdx;
// All lanes make the same exchanges; each passes on to the next lane, and reads when its turn comes again.
static void exchange(int value) {
  const int lane = current, which = turn[lane]++ % 2;
  values[which][lane] = value;
  current = (lane + 1) % 32;
  swapcontext(&contexts[lane], &contexts[current]);
}
static const int* others() { return values[(turn[current] - 1) % 2]; }
static int __shfl_sync(unsigned, int value, int lane) { exchange(value); return others()[lane & 31]; }
static int __shfl_up_sync(unsigned, int value, int distance) {
  exchange(value);
  return current >= distance ? others()[current - distance] : value;
}
static unsigned __ballot_sync(unsigned, bool value) {
  exchange(value);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned(others()[lane]) << lane;
  return bits;
}
static int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }
static int __popc(unsigned bits) { return __builtin_popcount(bits); }
static int wrong_by = 0;  // units in the last place by which the reciprocal is off
static float reciprocal_of(float x) {
  union { float f; int i; } value{1.f / x};
  value.i += wrong_by;
  return value.f;
}
static struct { unsigned x; } blockIdx;
static int (*asked)(const int*);  // a line of the layout ahead of its use
struct uint4 { unsigned x, y, z, w; };
struct BFloat16 { uint16_t bits; };
struct Float32 { float bits; };
struct PlainMatrix { void* pointer; int64_t row_stride; };
"""

_MAIN = """
static const GroupLayout* given;
static int blocks, limit, found, (*out)[5];
static PlainMatrix matrix;
static int columns, rows_aligned, warps;
static void finish() {
  // All lanes end in the same round: each hands over to the next, the last to the caller.
  const int lane = current;
  if (lane == 31) setcontext(&outside);
  current = lane + 1;
  setcontext(&contexts[current]);
}
template <Grouping GROUPING, int TILE>
static void lane_of_block() {
  GroupSchedule<GROUPING, TILE, %(width)d> schedule(*given);
  GroupTile tile;
  const int block = blocks & 0xffff, grid = blocks >> 16;
  for (int round = 0; schedule.find(tile_of_round(round, block, grid), tile); ++round)
    if (threadIdx.x == 0 && found < limit) {
      int* row = out[found++];
      row[0] = tile_of_round(round, block, grid), row[1] = tile.row, row[2] = tile.rows_left;
      row[3] = tile.group, row[4] = tile.column;
    }
  finish();
}
template <Grouping GROUPING, class Element>
static void lane_of_padding() {
  for (int warp = 0; warp < warps; ++warp)
    clear_padding<GROUPING, Element>(*given, matrix, columns, rows_aligned, warp, warps);
  finish();
}
static void start(void (*lane_function)()) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!stacks[lane]) stacks[lane] = static_cast<char*>(malloc(1 << 16));
    getcontext(&contexts[lane]);
    contexts[lane].uc_stack.ss_sp = stacks[lane], contexts[lane].uc_stack.ss_size = 1 << 16;
    contexts[lane].uc_link = nullptr;
    makecontext(&contexts[lane], lane_function, 0);
    turn[lane] = 0;
  }
  current = 0;
  swapcontext(&outside, &contexts[0]);
}
extern "C" void prefetch(const GroupLayout* layout, unsigned block, int (*ask)(const int*)) {
  asked = ask, blockIdx.x = block;
  for (current = 0; current < 32; ++current) prefetch_index(*layout);
}
extern "C" int find_quotient(int dividend, int divisor, int wrong) {
  wrong_by = wrong;
  return quotient(dividend, divisor);
}
extern "C" int find_tiles(int grouping, int tile, const GroupLayout* layout, int block, int grid, int (*tiles)[5],
                          int capacity) {
  given = layout, blocks = block | grid << 16, limit = capacity, found = 0, out = tiles;
  %(cases)s
  return found;
}
extern "C" void clear(int grouping, int size, const GroupLayout* layout, void* d, int64_t row_stride, int n,
                      int aligned, int of_warps) {
  given = layout, matrix = {d, row_stride}, columns = n, rows_aligned = aligned, warps = of_warps;
  if (grouping == PSUM) start(size == 2 ? lane_of_padding<PSUM, BFloat16> : lane_of_padding<PSUM, Float32>);
  if (grouping == INDEXED) start(size == 2 ? lane_of_padding<INDEXED, BFloat16> : lane_of_padding<INDEXED, Float32>);
}
"""


class Layout(ctypes.Structure):
    """The template's ``GroupLayout``."""

    _fields_ = (
        ("values", ctypes.POINTER(ctypes.c_int32)),
        *((name, ctypes.c_int32) for name in ("groups", "m", "alignment", "tiles_n", "band", "positions", "step")),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels' code, compiled for the CPU."""
    header = (ROOT / "templates/include/grouped.cuh").read_text()
    code = header[header.index("enum Grouping") : header.index("// -- The queue")]
    code, replaced = re.subn(r"asm\(\"rcp[^;]*;[^;]*;", "reciprocal = reciprocal_of(float(divisor));", code)
    assert replaced == 1
    code, replaced = re.subn(r"asm volatile\(\"prefetch.*?::\"l\"\((.*)\) : \"memory\"\);", r"asked(\1);", code)
    assert replaced == 1
    padding = (ROOT / "templates/include/padding.cuh").read_text()
    code += padding[padding.index("// By a whole warp") :]
    cases = "\n  ".join(
        f"if (grouping == {name} && tile == {tile}) start(lane_of_block<{name}, {tile}>);"
        for name in ("MASKED", "PSUM", "INDEXED")
        for tile in TILES
    )
    folder = tmp_path_factory.mktemp("schedule")
    source = folder / "schedule.cpp"
    source.write_text(_SHIM + code + _MAIN % {"width": WIDTH, "cases": cases})
    assert COMPILER is not None
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", str(source), "-o", str(folder / "schedule.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "schedule.so"))


Tile = tuple[int, int, int, int, int]  # index, row, rows left, group, column


def find_tiles(
    library: ctypes.CDLL,
    kind: str,
    tile: int,
    values: Sequence[int],
    groups: int,
    m: int,
    n: int,
    alignment: int,
) -> list[Tile]:
    """The tiles of all blocks of a small grid."""
    return [one for tiles in tiles_of_blocks(library, kind, tile, values, groups, m, n, alignment, 5) for one in tiles]


def tiles_of_blocks(
    library: ctypes.CDLL,
    kind: str,
    tile: int,
    values: Sequence[int],
    groups: int,
    m: int,
    n: int,
    alignment: int,
    grid: int,
) -> list[list[Tile]]:
    """The tiles of each block, in its order."""
    # Guard words around the layout: what reads them finds groups that are not there.
    stored = (ctypes.c_int32 * (len(values) + 2))(0x7EADBEEF, *values, 0x7EADBEEF)
    pointer = ctypes.cast(ctypes.addressof(stored) + 4, ctypes.POINTER(ctypes.c_int32))
    positions, step = stretch(tile, alignment)
    layout = Layout(pointer, groups, m, alignment, -(-n // WIDTH), band(tile), positions, step)
    found: list[list[Tile]] = []
    capacity = 1 << 16
    buffer = (ctypes.c_int32 * 5 * capacity)()
    for block in range(grid):
        count = library.find_tiles(KINDS[kind], tile, ctypes.byref(layout), block, grid, buffer, capacity)
        assert count < capacity
        mine = [tuple(buffer[i]) for i in range(count)]
        assert [index // grid for index, *_ in mine] == list(range(count))  # one of each round
        found.append(mine)  # type: ignore[arg-type]
    indices = sorted(index for tiles in found for index, *_ in tiles)
    assert indices == list(range(len(indices)))
    return found


def check(found: list[Tile], expected: dict[tuple[int, int], int], tile: int, n: int) -> None:
    """The tiles cover each (plane, row) of ``expected`` once for all columns, with its group, and nothing else."""
    columns = range(0, n, WIDTH)
    seen: dict[tuple[int, int, int], int] = {}
    for _, row, left, group, column in found:
        assert left > 0
        assert column in columns
        for r in range(row, row + min(left, tile)):
            key = (group, r, column)
            assert key not in seen
            seen[key] = group
    assert seen.keys() == {(group, row, column) for (group, row) in expected for column in columns}


def rows_of(groups: list[tuple[int, int]]) -> dict[tuple[int, int], int]:
    return {(group, row): group for group, (first, end) in enumerate(groups) for row in range(first, end)}


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("seed", range(4))
def test_masked(library: ctypes.CDLL, tile: int, seed: int) -> None:
    draw = random.Random(seed)
    groups, max_m, n = draw.choice([1, 4, 33, 70]), draw.choice([8, 200, 1500]), draw.choice([64, 200])
    counts = [draw.choice([0, 0, 1, 7, max_m, max_m + 5, -3, 2**31 - 1, draw.randint(0, max_m)]) for _ in range(groups)]
    found = find_tiles(library, "masked", tile, counts, groups, max_m, n, 128)
    check(found, rows_of([(0, min(max(count, 0), max_m)) for count in counts]), tile, n)
    assert all(row % tile == 0 for _, row, *_ in found)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("alignment", [128, 48, 8, 1])
def test_psum(library: ctypes.CDLL, tile: int, alignment: int) -> None:
    draw = random.Random(tile * alignment)
    groups, n = draw.choice([3, 40]), 130
    ends, rows, end = [], [], 0
    for _ in range(groups):
        first = -(-end // alignment) * alignment
        end = draw.choice([end, first + draw.randint(1, 300), first + 1])
        rows.append((first, max(first, end)))
        ends.append(end)
    m = end + draw.randint(0, 100)
    check(find_tiles(library, "psum", tile, ends, groups, m, n, alignment), rows_of(rows), tile, n)


@pytest.mark.parametrize("bad", [[-5, 10, 2**31 - 1], [300, 100, 50], [2**31 - 1] * 3, [-(2**31)] * 3])
def test_psum_that_makes_no_sense_stays_in_bounds(library: ctypes.CDLL, bad: list[int]) -> None:
    for _, row, left, group, _ in find_tiles(library, "psum", 64, bad, 3, 200, 64, 128):
        assert 0 <= row < row + left <= 200
        assert 0 <= group < 3


def random_index(draw: random.Random, groups: int, alignment: int) -> list[int]:
    index: list[int] = []
    for group in range(groups):
        count = draw.choice([0, 1, alignment, draw.randint(0, 400)])
        index += [group] * count
        index += [-1] * (-len(index) % alignment)
        if draw.random() < 0.2:
            index += [-1] * alignment
    return index or [-1]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("alignment", [128, 64, 48, 16, 8, 1])
def test_index_of_every_row(library: ctypes.CDLL, tile: int, alignment: int) -> None:
    draw = random.Random(tile * alignment)
    for groups in (1, 6, 20):
        index = random_index(draw, groups, alignment)
        found = find_tiles(library, "contiguous", tile, index, groups, len(index), 130, alignment)
        expected = {(group, row): group for row, group in enumerate(index) if group >= 0}
        check(found, expected, tile, 130)
        if alignment % tile == 0:  # no more tiles than there need be
            blocks = {(index[row], row // tile) for row in range(len(index)) if index[row] >= 0}
            assert len(found) == 3 * len(blocks)


def test_groups_may_come_in_any_order_and_again(library: ctypes.CDLL) -> None:
    index = [2] * 64 + [0] * 10 + [-1] * 54 + [2] * 70 + [-1] * 58 + [1] * 128
    found = find_tiles(library, "contiguous", 64, index, 3, len(index), 64, 64)
    check(found, {(group, row): group for row, group in enumerate(index) if group >= 0}, 64, 64)


def test_an_index_that_makes_no_sense_stays_in_bounds(library: ctypes.CDLL) -> None:
    draw = random.Random(0)
    for tile in TILES:
        for alignment in (128, 8):
            index = [draw.choice([-1, 0, 3, 4, 5, 2**31 - 1, -(2**31)]) for _ in range(500)]
            for _, row, left, group, _ in find_tiles(library, "contiguous", tile, index, 4, 500, 64, alignment):
                assert 0 <= row < row + left <= 500
                assert 0 <= group < 4
                assert index[row : row + left] == [group] * left


def test_tall_groups_are_walked_in_bands(library: ctypes.CDLL) -> None:
    found = sorted(find_tiles(library, "masked", 128, [4000], 1, 4000, 300, 128))
    order = [(row // 128, column // WIDTH) for _, row, _, _, column in found]
    assert order[:9] == [(m, 0) for m in range(8)] + [(0, 1)]
    assert len(order) == len(set(order)) == 32 * 5


@pytest.mark.parametrize("grid", [6, 12, 132])
def test_every_block_gets_full_tiles_and_last_ones(library: ctypes.CDLL, grid: int) -> None:
    tiles = tiles_of_blocks(library, "masked", 128, [320] * 22, 22, 640, 64 * 32, 128, grid)
    last = [sum(left < 128 for _, _, left, *_ in mine) for mine in tiles]
    assert sum(last) == 22 * 32
    assert max(last) - min(last) <= 2  # 3 tiles along m: without a turn, one block in 3 would get all of them


def test_quotients_are_exact_where_the_reciprocal_is_not(library: ctypes.CDLL) -> None:
    draw = random.Random(0)
    for _ in range(20_000):
        divisor = draw.choice([1, 2, 3, 7, draw.randint(1, 10**6)])
        largest = min(2**31 - 1, divisor * 2**21)
        dividend = draw.choice([draw.randint(0, largest), draw.randint(0, largest // divisor) * divisor])
        dividend = max(0, min(largest, dividend - draw.randint(0, 1)))
        for wrong in (-1, 0, 1):
            assert library.find_quotient(dividend, divisor, wrong) == dividend // divisor


@pytest.mark.parametrize("m", [1, 31, 32, 33, 128, 1000, 16384, 200_000])
def test_the_blocks_ask_for_all_of_an_index(library: ctypes.CDLL, m: int) -> None:
    values = (ctypes.c_int32 * m)()
    first = ctypes.addressof(values)
    layout = Layout(ctypes.cast(values, ctypes.POINTER(ctypes.c_int32)), 4, m, 128, 1, 1, 1, 1)
    asked: list[int] = []
    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(
        lambda address: asked.append((address - first) // 4) or 0
    )
    for block in range(132):
        before = len(asked)
        library.prefetch(ctypes.byref(layout), block, callback)
        assert len(set(asked[before:])) == len(asked) - before == min(32, -(-m // 32))  # a line once
    expected = set(range(0, m, 32))
    assert set(asked) == expected if m < 132 * 1024 else set(asked) < expected


def clear(
    library: ctypes.CDLL, kind: str, values: Sequence[int], groups: int, m: int, n: int, alignment: int, size: int
) -> list[list[bool]]:
    """Which elements of each row of D the kernel's spare warps have made zeros; nothing beside D is touched."""
    stored = (ctypes.c_int32 * (len(values) + 2))(0x7EADBEEF, *values, 0x7EADBEEF)
    pointer = ctypes.cast(ctypes.addressof(stored) + 4, ctypes.POINTER(ctypes.c_int32))
    layout = Layout(pointer, groups, m, alignment, 1, 1, 1, 1)
    stride = n + 16 // size
    aligned = n * size % 16 == 0
    raw = ctypes.create_string_buffer(b"\x77" * (m * stride * size + 64))
    base = -ctypes.addressof(raw) % 16 + 16
    arguments = (ctypes.c_void_p(ctypes.addressof(raw) + base), ctypes.c_longlong(stride), n, int(aligned), 7)
    library.clear(KINDS[kind], size, ctypes.byref(layout), *arguments)
    found = raw.raw
    rows = [found[base + row * stride * size : base + (row + 1) * stride * size] for row in range(m)]
    assert all(row[n * size :] == b"\x77" * 16 for row in rows)
    assert found[:base] == b"\x77" * base
    assert set(found[base + m * stride * size : -1]) <= {0x77}
    parts = [[row[i * size : (i + 1) * size] for i in range(n)] for row in rows]
    assert all(part in (bytes(size), b"\x77" * size) for row in parts for part in row)
    return [[part == bytes(size) for part in row] for row in parts]


@pytest.mark.parametrize(("n", "size"), [(40, 2), (37, 2), (300, 4)])
@pytest.mark.parametrize("alignment", [128, 16, 1])
def test_rows_of_no_group_become_zeros(library: ctypes.CDLL, alignment: int, n: int, size: int) -> None:
    draw = random.Random(alignment * n)
    for groups in (1, 3, 40):
        index = random_index(draw, groups, alignment)[: 2000 // alignment * alignment]
        index[: len(index) // 5 // alignment * alignment] = [-1] * (len(index) // 5 // alignment * alignment)
        found = clear(library, "contiguous", index, groups, len(index), n, alignment, size)
        assert found == [[group < 0] * n for group in index]
        bad = [draw.choice([-1, group, group, groups, 2**31 - 1, -(2**31)]) for group in index]
        assert clear(library, "contiguous", bad, groups, len(bad), n, alignment, size) == [
            [not 0 <= group < groups] * n for group in bad
        ]
        ends, owned = [], set()
        end = 0
        for _ in range(groups):
            first = -(-end // alignment) * alignment
            end = draw.choice([end, first + draw.randint(1, 60), first + 1])
            owned |= set(range(first, end))
            ends.append(end)
        m = end + draw.randint(0, 100)
        assert clear(library, "psum", ends, groups, m, n, alignment, size) == [
            [row not in owned] * n for row in range(m)
        ]


@pytest.mark.parametrize("bad", [[-5, 10, 2**31 - 1], [300, 100, 50], [2**31 - 1] * 3, [-(2**31)] * 3])
def test_padding_that_makes_no_sense_stays_in_bounds(library: ctypes.CDLL, bad: list[int]) -> None:
    clear(library, "psum", bad, 3, 200, 40, 128, 2)
