"""Which tiles the CTAs of a grouped GEMM take, in which order: device code, run on the host."""

from __future__ import annotations

import itertools
import random
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
from model_programs import compiled

BLOCK_M, BLOCK_N, CLUSTER_N, FEW_ROWS = 128, 192, 2, 256  # of tile_walk.cpp


@dataclass(frozen=True)
class Tile:
    """A super tile: what a cluster computes at once."""

    expert: int
    m: int
    n: int


@dataclass(frozen=True)
class Walk:
    """A grid of clusters over experts with these rows; tiles_m 0: from the rows."""

    kind: str
    clusters: int
    tiles_m: int
    tiles_n: int
    group_m: int
    rows: tuple[int, ...]

    def all_tiles(self) -> Counter[Tile]:
        """What has to be computed."""
        return Counter(
            Tile(expert, m, n)
            for expert, rows in enumerate(self.rows)
            for m in range(self.tiles_m or -(-rows // BLOCK_M))
            for n in range(self.tiles_n)
        )


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("tile_walk", tmp_path_factory.mktemp("tile_walk"))


def tiles_of(program: Path, walk: Walk) -> list[list[Tile]]:
    """The super tiles of each cluster in its order; both CTAs of it agree."""
    sizes = (walk.clusters, walk.tiles_m, walk.tiles_n, walk.group_m, *walk.rows)
    command = [program, walk.kind, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    begins = list(itertools.accumulate(walk.rows, initial=0))
    found: dict[tuple[int, int], list[Tile]] = defaultdict(list)
    for line in done.stdout.splitlines():
        cluster, cta, expert, m, n, row_begin, num_rows = map(int, line.split())
        assert (row_begin, num_rows) == (begins[expert], walk.rows[expert])
        assert (m % BLOCK_M, n % (CLUSTER_N * BLOCK_N)) == (0, cta * BLOCK_N)
        tile = Tile(expert, m // BLOCK_M, n // (CLUSTER_N * BLOCK_N))
        found[cluster, cta].append(tile)
    for cluster in range(walk.clusters):
        assert found[cluster, 0] == found[cluster, 1]
    return [found[cluster, 0] for cluster in range(walk.clusters)]


def drawn_walk(seed: int, kind: str) -> Walk:
    """Few and many rows, more and fewer columns than clusters."""
    draw = random.Random(seed)
    sizes = draw.choice([(0, 128, 256), (0, 128, 256, 384, 1024), (256,), (384, 512)])
    rows = tuple(draw.choice(sizes) for _ in range(draw.choice([1, 2, 8, 33, 70])))
    fixed = kind == "columns" or draw.random() < 0.5
    return Walk(
        kind,
        draw.choice([1, 3, 8, 66]),
        draw.randint(1, 9) if fixed else 0,
        draw.randint(1, 5),
        draw.choice([1, 3, 8]),
        rows,
    )


@pytest.mark.parametrize("kind", ["groups", "columns"])
def test_every_tile_is_taken_once_and_shares_are_even(program: Path, kind: str) -> None:
    for seed in range(40):
        walk = drawn_walk(seed, kind)
        found = tiles_of(program, walk)
        assert Counter(itertools.chain(*found)) == walk.all_tiles(), walk
        for is_few in (True, False):
            shares = [sum((walk.rows[t.expert] <= FEW_ROWS) == is_few for t in f) for f in found]
            if kind == "columns" or len({rows <= FEW_ROWS for rows in walk.rows}) == 1:
                assert max(shares) - min(shares) <= 1, walk


def test_columns_are_walked_side_by_side(program: Path) -> None:
    """Whole columns first, all clusters at the same m; experts with most rows first."""
    for seed in range(40):
        walk = drawn_walk(seed, "columns")
        few = [rows for rows in walk.rows if rows <= FEW_ROWS]
        num_whole = len(few) * walk.tiles_n // walk.clusters * walk.tiles_m
        rest = len(few) * walk.tiles_n % walk.clusters * walk.tiles_m
        for tiles in tiles_of(program, walk):
            assert [t.m for t in tiles[:num_whole]] == [
                step % walk.tiles_m for step in range(num_whole)
            ]
            mine = [t for t in tiles if walk.rows[t.expert] <= FEW_ROWS]
            assert mine == tiles[: len(mine)]
            sizes = [walk.rows[t.expert] for t in mine]
            assert sizes == sorted(sizes, reverse=True)
            columns = [column for column, _ in itertools.groupby(mine, lambda t: (t.expert, t.n))]
            run = -(-rest // walk.clusters)
            assert len(columns) <= num_whole // walk.tiles_m + -(-run // walk.tiles_m) + 1


def test_examples_of_the_headers(program: Path) -> None:
    groups = tiles_of(program, Walk("groups", 1, 3, 2, 2, (512,)))[0]
    assert [(t.m, t.n) for t in groups] == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1)]
    columns = tiles_of(program, Walk("columns", 3, 3, 2, 8, (256, 128)))
    for cluster, tiles in enumerate(columns):
        whole = [Tile(cluster // 2, m, cluster % 2) for m in range(3)]
        assert tiles == [*whole, Tile(1, cluster, 1)]
