"""Shared fixtures: pools of ranks, one per module and world size."""

from collections.abc import Callable, Iterator

import pytest
import torch

from torch_moe_ep.testing import RankPool


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(W)` gives the module's pool of W ranks; its workers start at the first case."""
    yield from _pools("gloo")


@pytest.fixture(scope="module")
def hooked_ranks() -> Iterator[Callable[[int], RankPool]]:
    """The same with process-group hooks, by the name of the backend."""
    yield from _pools("torch_moe_ep_gloo")


@pytest.fixture(scope="module")
def gpu_ranks() -> Iterator[Callable[[int], RankPool]]:
    """The same over NCCL."""
    yield from _pools("nccl")


def _pools(backend: str) -> Iterator[Callable[[int], RankPool]]:
    pools: dict[int, RankPool] = {}

    def pool_of(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size, backend=backend)
        return pools[world_size]

    yield pool_of
    for pool in pools.values():
        pool.close()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
