"""chunked_experts: dispatch, expert_mlp and combine, a chunk travelling under another's GEMMs."""

from typing import cast

import torch

from torch_moe_ep.ops.expert_mlp import gradients_of_weights
from torch_moe_ep.ops.one_device import check_one_device
from torch_moe_ep.ops.plan import SendBuffer
from torch_moe_ep.ops.plan_chunks import ChunkPlan


def chunked_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    plan: ChunkPlan,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    packed: SendBuffer | None = None,
    weight_grad_scale: float = 1.0,
    slots_per_pass: int = 0,
    recompute_gate_up: bool = False,
    tokens_per_expert: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run each token through its K experts in chunks: what the three operators do in turn.

    Chunk i + 1 is on its way while the GEMMs of chunk i run, and results of chunk i go back under
    those of chunk i + 1; in backward so do gradients, and the weights' gradients are computed once
    over all rows, in the order of one chunk.

    Args:
        x: hidden states ``[T, H]``, float32, bfloat16 or float16, any strides.
        weights: router weights fp32 ``[T, K]``, any strides.
        plan: the plan of these tokens.
        gate_up: ``[L, 2I, H]`` of x's dtype, gate rows first.
        down: ``[L, H, I]`` likewise.
        packed: the send buffer of `plan_chunks` for these tokens; None or empty: packed here.
        weight_grad_scale: factor on the gradients of `gate_up` and `down`, and on nothing else.
        slots_per_pass: compute this many rows at once (CUDA: rounded up to 128); 0: a chunk's. With
            it, gradients are computed in passes once all chunks' have come.
        recompute_gate_up: keep no gate and up products for backward, compute them again there.
        tokens_per_expert: int64 ``[E]``; backward adds this rank's copies per expert to it.

    Returns:
        ``[T, H]`` of x's dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
        RuntimeError: a collective failed; the message names the ranks that did not take part.

    Collective over the plan's group in forward and backward: for each chunk an all-to-all of rows
    and weights there and one back. No host sync (gloo: for each exchange when its rows are needed).
    Deterministic. Differentiable once in `x`, `weights`, `gate_up` and `down`. Saves the received
    rows ``[R, H]``, their weights, the expert weights, and gate and up products ``[R, 2I]`` unless
    they are computed again: what the operators in turn save. Of frozen expert weights no gradient
    is computed, and no rows are saved where the products are.
    """
    buffer = (None, None) if packed is None or packed.rows.size(0) == 0 else packed
    output: torch.Tensor = torch.ops.torch_moe_ep.chunked_experts(
        x,
        weights,
        *plan[:3],
        gate_up,
        down,
        *plan[3:],
        weight_grad_scale,
        slots_per_pass,
        recompute_gate_up,
        tokens_per_expert,
        *buffer,
    )
    return output


@torch.library.register_fake("torch_moe_ep::chunked_experts_forward")
def _chunked_experts_forward_fake(
    x: torch.Tensor,
    weights: torch.Tensor,
    slot_of_copy: torch.Tensor,
    counts: torch.Tensor,
    host_counts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    row_alignment: int,
    group_name: str,
    segment_offsets: torch.Tensor | None,
    capacity: int,
    num_sms: int,
    slots_per_pass: int,
    send_rows: torch.Tensor | None,
    send_weights: torch.Tensor | None,
    keep_rows: bool,
    keep_gate_up: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check_one_device(x=x, weights=weights, slot_of_copy=slot_of_copy, gate_up=gate_up, down=down)
    num_rows = _unknown_or(capacity) if keep_rows else 0
    num_z = 0
    if keep_gate_up and slots_per_pass <= 0:
        num_z = num_rows if keep_rows else _unknown_or(capacity)
    elif keep_gate_up and slots_per_pass >= capacity:
        num_z = _unknown_or(capacity)  # without a capacity: none where R takes several passes
    return (
        x.new_empty(x.shape),
        x.new_empty((num_rows, x.size(1))),
        weights.new_empty(num_rows if keep_rows else num_z),
        x.new_empty((num_z, gate_up.size(1))),
    )


def _unknown_or(capacity: int) -> int:
    """R: the capacity, or a size that is known at run time alone."""
    return capacity or cast("int", torch.library.get_ctx().new_dynamic_size())


@torch.library.register_fake("torch_moe_ep::chunked_experts_backward")
def _chunked_experts_backward_fake(
    grad_output: torch.Tensor,
    rows: torch.Tensor,
    row_weights: torch.Tensor,
    z: torch.Tensor,
    slot_of_copy: torch.Tensor,
    counts: torch.Tensor,
    host_counts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    row_alignment: int,
    group_name: str,
    segment_offsets: torch.Tensor | None,
    capacity: int,
    num_sms: int,
    weight_grad_scale: float,
    slots_per_pass: int,
    needs_weight_grads: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        grad_output.new_empty(grad_output.shape),
        row_weights.new_empty((grad_output.size(0), top_k)),
        *gradients_of_weights(gate_up, down, needs_weight_grads),
    )
