"""Ranks of one machine that play nodes, and their tokens."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from torch_moe_ep.parallel.nodes import RANKS_PER_NODE
from torch_moe_ep.testing import random_routing

NUM_EXPERTS = 16
HIDDEN = 24


@dataclass(frozen=True)
class Split:
    """`world` ranks as nodes of `per_node` ranks."""

    world: int
    per_node: int

    def __str__(self) -> str:
        """A pytest id: nodes x ranks."""
        return f"{self.world // self.per_node}x{self.per_node}"

    @property
    def num_nodes(self) -> int:
        return self.world // self.per_node


SPLITS = [
    Split(4, 2),
    pytest.param(Split(8, 4), marks=pytest.mark.full),
    pytest.param(Split(8, 2), marks=pytest.mark.full),
]


@contextlib.contextmanager
def ranks_per_node(text: object) -> Iterator[None]:
    """Play nodes of so many ranks."""
    with mock.patch.dict(os.environ, {RANKS_PER_NODE: str(text)}):
        yield


def tokens_of_rank(top_k: int, dtype: torch.dtype, tokens: int | None = None):
    """Hidden states, ids and weights of this rank; rank 1 has no token."""
    rank = dist.get_rank()
    if tokens is None:
        tokens = 0 if rank == 1 else 9 + 4 * rank
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    ids, weights = random_routing(tokens, top_k, NUM_EXPERTS, seed=rank)
    return x, ids, weights.requires_grad_()


def remote_nodes_of(ids: torch.Tensor, split: Split) -> int:
    """Sum over this rank's tokens of the distinct other nodes of its experts."""
    own = dist.get_rank() // split.per_node
    nodes = ids // (NUM_EXPERTS // split.num_nodes)
    return sum(len(set(row) - {own}) for row in nodes.tolist())


@contextlib.contextmanager
def lines_logged() -> Iterator[list[str]]:
    """What the package logs at INFO or above on this rank."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("torch_moe_ep")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
