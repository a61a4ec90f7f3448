"""Dispatch: move copies to the ranks that own their experts."""

import torch

from torch_moe_ep.ops.one_device import check_one_device
from torch_moe_ep.ops.plan import DispatchPlan, SendBuffer, num_slots_fake


def dispatch(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    plan: DispatchPlan,
    packed: SendBuffer | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move each token to its K experts, and its router weights with it.

    Args:
        x: hidden states ``[T, H]``, float32, bfloat16 or float16, any strides.
        weights: router weights fp32 ``[T, K]``, any strides, or None.
        plan: the plan of these tokens; K is at most 32 on CUDA.
        packed: the send buffer of `plan_and_pack` for these tokens; None or empty: packed here.

    Returns:
        rows ``[R, H]`` of x's dtype in expert order, and row_weights fp32 ``[R]`` (``[0]`` without
        weights). Padding rows at the end of a segment are zeros; rows behind the last segment
        (P = 1 on CUDA, where the host does not know the sum) belong to nobody and are not written.

    Raises:
        ValueError: a shape, dtype or device that does not fit the plan.
        RuntimeError: a collective failed; the message names the ranks that did not take part.

    P > 1: collective over the plan's group (an all-to-all of rows, and of weights), in backward as
    well; gloo waits for it on the host, NCCL does not. Deterministic. Differentiable in `x` and
    `weights`; its backward is `combine`. Under autocast rows travel in the autocast dtype.
    """
    buffer = (None, None) if packed is None or packed.rows.size(0) == 0 else packed
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.torch_moe_ep.dispatch(
        x, weights, *plan, *buffer
    )
    return result


@torch.library.register_fake("torch_moe_ep::dispatch")
def _dispatch_fake(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    slot_of_copy: torch.Tensor,
    slot_of_received: torch.Tensor,
    expert_offsets: torch.Tensor,
    counts: torch.Tensor,
    host_counts: torch.Tensor,
    top_k: int,
    row_alignment: int,
    group_name: str,
    send_rows: torch.Tensor | None = None,
    send_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_one_device(x=x, weights=weights, slot_of_copy=slot_of_copy)
    num_slots = num_slots_fake(counts, slot_of_copy.numel(), row_alignment, group_name)
    num_weights = 0 if weights is None else num_slots
    return x.new_empty((num_slots, x.size(1))), x.new_empty(num_weights, dtype=torch.float32)
