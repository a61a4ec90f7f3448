"""Combine between GPUs that map each other's memory: results are read where they were computed."""

import torch

from torch_moe_ep.ops.one_device import check_one_device
from torch_moe_ep.ops.peer_dispatch import PeerPlan


def peer_combine(
    rows: torch.Tensor, plan: PeerPlan, *, tokens_per_expert: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum the K results of each token, read from the ranks that own its experts.

    Args:
        rows: results ``[R, H]`` in expert order, float32, bfloat16 or float16, any strides.
        plan: the plan of the dispatch.
        tokens_per_expert: as in `combine`.

    Returns:
        ``[T, H]`` of the rows' dtype, the bits that `combine` returns.

    Raises:
        ValueError: a shape, dtype or device that does not fit the plan.
        RuntimeError: a rank of the group did not come; the message names it.

    Collective over the group, in backward as well; no host sync. Deterministic, no float atomics.
    Differentiable in `rows`; its backward is `peer_dispatch`.
    """
    result: torch.Tensor = torch.ops.torch_moe_ep.peer_combine(
        rows, None, *plan, tokens_per_expert
    )[0]
    return result


@torch.library.register_fake("torch_moe_ep::peer_combine")
def _peer_combine_fake(
    rows: torch.Tensor,
    row_weights: torch.Tensor | None,
    slot_of_copy: torch.Tensor,
    expert_offsets: torch.Tensor,
    counts: torch.Tensor,
    host_counts: torch.Tensor,
    top_k: int,
    row_alignment: int,
    capacity: int,
    num_sms: int,
    group_name: str,
    tokens_per_expert: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_one_device(rows=rows, row_weights=row_weights, slot_of_copy=slot_of_copy)
    num_tokens = slot_of_copy.numel() // top_k
    weights_shape = (0,) if row_weights is None else (num_tokens, top_k)
    x = rows.new_empty((num_tokens, rows.size(1)))
    return x, rows.new_empty(weights_shape, dtype=torch.float32)
