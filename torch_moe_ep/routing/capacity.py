"""A bound on the copies that each expert gets from one rank."""

import math

import torch

from torch_moe_ep.routing.choose import count_copies


def limit_copies(
    weights: torch.Tensor, expert_ids: torch.Tensor, num_experts: int, capacity_factor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Drop what an expert is asked for beyond its capacity, and pad the others with it.

    An expert takes ``ceil(capacity_factor * T * K / E)`` copies of this rank's, first choices
    before second ones, then in token order (GShard, Lepikhin et al. 2020; Switch Transformer,
    Fedus et al. 2021). A copy beyond that is dropped: its weight becomes zero, the token's other
    weights stay, and it fills a free place of another expert, where it computes nothing that
    counts. So no expert ever gets more than its capacity, and the number of copies stays T K.

    Example: E = 2, K = 1, ids 0 0 0 1, factor 1 gives capacity 2: the third token is dropped and
    fills expert 1, ids 0 0 1 1, weights w w 0 w.

    Args:
        weights: fp32 ``[T, K]``, descending by choice.
        expert_ids: int64 ``[T, K]``.
        num_experts: E.
        capacity_factor: at least 1, so that all copies find a place.

    Returns:
        weights and expert ids of the same shapes, and is_dropped bool ``[T, K]``.

    Local, no host sync, deterministic.
    """
    num_tokens, top_k = expert_ids.shape
    num_copies = num_tokens * top_k
    capacity = math.ceil(capacity_factor * num_copies / num_experts)
    ids = expert_ids.t().reshape(-1)  # first choices of all tokens, then second ones
    counts = count_copies(ids, num_experts)
    order = ids.sort(stable=True).indices
    first = (counts.cumsum(0) - counts)[ids[order]]
    place = torch.empty_like(ids)
    place[order] = torch.arange(num_copies, device=ids.device) - first
    is_dropped = place >= capacity
    # The d-th dropped copy takes the d-th free place, counted over the experts in order.
    free = (capacity - counts).clamp_min(0).cumsum(0)
    number = is_dropped.cumsum(0) - 1
    refuge = torch.searchsorted(free, number.clamp_min(0), right=True).clamp_max(num_experts - 1)
    ids = torch.where(is_dropped, refuge, ids)
    is_dropped = is_dropped.view(top_k, num_tokens).t()
    expert_ids = ids.view(top_k, num_tokens).t().contiguous()
    return weights.masked_fill(is_dropped, 0.0), expert_ids, is_dropped
