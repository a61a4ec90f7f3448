"""global_token_shuffle: mix the tokens of an EP group before routing, and undo it after.

The order of all tokens of the group is a fixed permutation for each layer and number of tokens:
nothing is drawn while training, so recomputation by activation checkpointing shuffles alike.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from torch_moe_ep.gather import all_gather
from torch_moe_ep.seed import seed_of


class _Shuffle(NamedTuple):
    """One rank's part of a permutation.

    Attributes:
        send_order: int64 ``[T]``, this rank's tokens in the order they are sent.
        place: int64 ``[T]``, where each received row belongs.
        send_counts: rows sent to each rank.
        receive_counts: rows received from each rank.
    """

    send_order: torch.Tensor
    place: torch.Tensor
    send_counts: list[int]
    receive_counts: list[int]


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; backward is the exchange the other way."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        received = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        exchange: Any = _Exchange.apply
        return exchange(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None


def shuffle_tokens(
    forward: Callable[..., torch.Tensor], group: dist.ProcessGroup, key: str
) -> Callable[..., torch.Tensor]:
    """Wrap a block's forward: tokens ``[..., H]`` shuffled over a group before it, and back after.

    Args:
        forward: takes hidden states first and returns a tensor of their shape.
        group: the EP group. Its ranks may hold different numbers of tokens; each keeps its own.
        key: text that seeds the permutation.

    Collective over the group (two all-to-alls of rows, an all-gather of a number), one host sync,
    to learn the numbers of tokens. The result is exact: rows are moved, never computed with.
    """

    @functools.wraps(forward)
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        shuffle = _shuffle_of(x, group, key)
        exchange: Any = _Exchange.apply
        counts = (shuffle.send_counts, shuffle.receive_counts)
        received = exchange(x[shuffle.send_order], *counts, group)
        mixed = torch.empty_like(received).index_copy(0, shuffle.place, received)
        y = forward(mixed.view(hidden_states.shape), *args, **kwargs).reshape(x.shape[0], -1)
        returned = exchange(y[shuffle.place], *reversed(counts), group)
        y = torch.empty_like(returned).index_copy(0, shuffle.send_order, returned)
        return y.view(hidden_states.shape)

    return run


def _shuffle_of(x: torch.Tensor, group: dist.ProcessGroup, key: str) -> _Shuffle:
    sizes = all_gather(torch.tensor([x.shape[0]], dtype=torch.int64, device=x.device), group)
    return plan_shuffle(sizes.flatten().tolist(), group.rank(), key, x.device)


def plan_shuffle(sizes: list[int], rank: int, key: str, device: torch.device) -> _Shuffle:
    """One rank's part of the permutation of all tokens of a group.

    Example: sizes [2, 2] and the permutation 3 0 1 2, which says who comes where: rank 0 gets the
    tokens 3 and 0, so it receives one row from itself, then one from rank 1, for the places 1, 0.

    Args:
        sizes: T of each rank.
        rank: this rank in the group.
        key: text that seeds the permutation.
        device: of the result's tensors.
    """
    generator = torch.Generator().manual_seed(seed_of(key))
    permutation = torch.randperm(sum(sizes), generator=generator)
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    owner = torch.bucketize(torch.arange(sum(sizes)), bounds[1:], right=True)
    first, end = int(bounds[rank]), int(bounds[rank + 1])
    # Rows travel in the order of their places at home, so both sides count them alike.
    place_of_token = torch.empty_like(permutation)
    place_of_token[permutation] = torch.arange(sum(sizes))
    mine = place_of_token[first:end]
    target = owner[mine]
    wanted = permutation[first:end]
    num_ranks = len(sizes)
    return _Shuffle(
        send_order=target.argsort(stable=True).to(device),
        place=wanted.argsort().to(device),
        send_counts=torch.bincount(target, minlength=num_ranks).tolist(),
        receive_counts=torch.bincount(owner[wanted], minlength=num_ranks).tolist(),
    )
