"""Combine: bring results back and sum over K."""

import torch

from torch_moe_ep.ops.one_device import check_one_device
from torch_moe_ep.ops.plan import DispatchPlan


def combine(
    rows: torch.Tensor, plan: DispatchPlan, *, tokens_per_expert: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum the K results of each token.

    Args:
        rows: results ``[R, H]`` in expert order, float32, bfloat16 or float16, any strides.
        plan: the plan of the dispatch.
        tokens_per_expert: int64 ``[E]`` on the plan's device; backward adds this rank's copies per
            expert to it. Neither evaluation nor the recomputation of activation checkpointing runs
            that backward, so each copy is counted once.

    Returns:
        ``[T, H]`` of the rows' dtype: ``x[t] = sum over k of rows[slot of copy t * K + k]``, added
        in fp32 in ascending k and rounded once. Router weights are not applied here.

    Raises:
        ValueError: a shape, dtype or device that does not fit the plan.
        RuntimeError: a collective failed; the message names the ranks that did not take part.

    P > 1: collective over the plan's group (an all-to-all of rows), in backward as well; gloo waits
    for it on the host, NCCL does not. Deterministic, no float atomics. Differentiable in `rows`;
    its backward is `dispatch`.
    """
    result: torch.Tensor = torch.ops.torch_moe_ep.combine(rows, None, *plan, tokens_per_expert)[0]
    return result


@torch.library.register_fake("torch_moe_ep::combine")
def _combine_fake(
    rows: torch.Tensor,
    row_weights: torch.Tensor | None,
    slot_of_copy: torch.Tensor,
    slot_of_received: torch.Tensor,
    expert_offsets: torch.Tensor,
    counts: torch.Tensor,
    host_counts: torch.Tensor,
    top_k: int,
    row_alignment: int,
    group_name: str,
    tokens_per_expert: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_one_device(rows=rows, row_weights=row_weights, slot_of_copy=slot_of_copy)
    num_tokens = slot_of_copy.numel() // top_k
    weights_shape = (0,) if row_weights is None else (num_tokens, top_k)
    x = rows.new_empty((num_tokens, rows.size(1)))
    return x, rows.new_empty(weights_shape, dtype=torch.float32)
