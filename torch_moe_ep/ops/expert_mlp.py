"""expert_mlp: the SwiGLU MLP of every local expert over its rows."""

import torch

from torch_moe_ep.ops.main_grad import check_main_grad
from torch_moe_ep.ops.node_dispatch import NodePlan
from torch_moe_ep.ops.one_device import check_one_device
from torch_moe_ep.ops.peer_dispatch import PeerPlan
from torch_moe_ep.ops.plan import DispatchPlan


def expert_mlp(
    rows: torch.Tensor,
    row_weights: torch.Tensor,
    plan: DispatchPlan | NodePlan | PeerPlan,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    weight_grad_scale: float = 1.0,
    slots_per_pass: int = 0,
    recompute_gate_up: bool = False,
    x: torch.Tensor | None = None,
    main_grads: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run each expert over its segment of rows.

    For the rows r of expert l: ``z = rows[r] @ gate_up[l].T``,
    ``a = row_weights[r] * silu(z[:I]) * z[I:]``, ``y[r] = a @ down[l].T``. The router weight is
    applied before the down projection, which it commutes with, so that `combine` is a plain sum.

    Args:
        rows: ``[R, H]`` in expert order, float32, bfloat16 or float16, any strides.
        row_weights: fp32 ``[R]``.
        plan: gives the segments.
        gate_up: ``[L, 2I, H]`` of the rows' dtype, gate rows first (Hugging Face's gate_up_proj).
        down: ``[L, H, I]`` likewise (down_proj).
        weight_grad_scale: factor on the gradients of `gate_up` and `down`, and on nothing else:
            the one place where expert gradients are divided by P.
        slots_per_pass: compute this many rows at once (CUDA: rounded up to 128); 0: all.
        recompute_gate_up: keep no z for backward, compute it again there.
        x: the tokens ``[T, H]`` that `dispatch` made `rows` of, in the rows' dtype; P = 1 alone.
            With it x is kept for backward, which dispatches it again, and `rows` are not.
        main_grads: fp32 tensors of the shapes of `gate_up` and `down`, to which backward adds the
            weights' gradients in place, call after call; the weights' ``.grad`` stays None. The
            hand-written kernels for 9.0 add their fp32 sums, unrounded. Without FSDP alone, which
            needs the gradients returned.

    Returns:
        ``[R, H]`` of the rows' dtype. Rows behind the last segment are not written, and whatever
        they hold in `rows` reaches no result.

    Raises:
        ValueError: a shape, dtype or device that does not fit, x with a plan of several ranks, or
            main_grads of a DTensor.

    Not collective. Host syncs: none on the CPU and with the hand-written and grouped kernels
    (bfloat16); the loop over experts that float32, float16 and odd sizes take on CUDA waits once
    per call for the offsets when P = 1. Deterministic. Differentiable once in `rows`,
    `row_weights`, `gate_up` and `down`; an expert without rows has zero gradients. Saves `rows`
    (or `x`), `row_weights`, the weights, and z ``[R, 2I]`` unless it is recomputed or computed in
    passes.
    Of frozen weights no gradient is computed, and neither `rows` nor `x` saved where z is.
    Under autocast rows and weights are cast as for a matmul.
    """
    if x is not None and plan.group_name:
        raise ValueError(
            f"x goes with a plan of one rank, got one of group {plan.group_name!r}, whose rows "
            f"came from other ranks too (pass no x)."
        )
    if main_grads is not None:
        check_main_grad(gate_up, main_grads[0], "gate_up")
        check_main_grad(down, main_grads[1], "down")
    slot_of_copy = plan.slot_of_copy if isinstance(plan, DispatchPlan) else None
    y: torch.Tensor = torch.ops.torch_moe_ep.expert_mlp(
        rows,
        row_weights,
        plan.expert_offsets,
        plan.host_offsets(),
        gate_up,
        down,
        weight_grad_scale,
        slots_per_pass,
        recompute_gate_up,
        x,
        None if x is None else slot_of_copy,
        None if x is None else plan.counts,
        plan.top_k,
        plan.row_alignment,
        *(main_grads or (None, None)),
    )
    return y


@torch.library.register_fake("torch_moe_ep::expert_mlp_forward")
def _expert_mlp_forward_fake(
    rows: torch.Tensor,
    row_weights: torch.Tensor,
    expert_offsets: torch.Tensor,
    host_offsets: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    slots_per_pass: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_one_device(
        rows=rows,
        row_weights=row_weights,
        expert_offsets=expert_offsets,
        gate_up=gate_up,
        down=down,
    )
    is_one_pass = slots_per_pass <= 0 or slots_per_pass >= rows.size(0)
    num_z = rows.size(0) if is_one_pass else 0
    return rows.new_empty(rows.shape), rows.new_empty((num_z, gate_up.size(1)))


@torch.library.register_fake("torch_moe_ep::expert_mlp_backward")
def _expert_mlp_backward_fake(
    grad_y: torch.Tensor,
    rows: torch.Tensor,
    row_weights: torch.Tensor,
    z: torch.Tensor,
    expert_offsets: torch.Tensor,
    host_offsets: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weight_grad_scale: float,
    slots_per_pass: int,
    needs_weight_grads: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        rows.new_empty(rows.shape),
        row_weights.new_empty(row_weights.shape),
        *gradients_of_weights(gate_up, down, needs_weight_grads),
    )


def gradients_of_weights(
    gate_up: torch.Tensor, down: torch.Tensor, are_needed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fakes of both gradients, ``[0]`` where nobody needs them."""
    if not are_needed:
        return gate_up.new_empty(0), down.new_empty(0)
    return gate_up.new_empty(gate_up.shape), down.new_empty(down.shape)


@torch.library.register_fake("torch_moe_ep::expert_mlp_forward_chunk")
@torch.library.register_fake("torch_moe_ep::expert_mlp_input_grads_chunk")
def _expert_mlp_chunk_fake(*_args: object) -> None:
    """Both write into tensors that are there."""


@torch.library.register_fake("torch_moe_ep::expert_mlp_backward_chunks")
def _expert_mlp_backward_chunks_fake(
    grad_y: torch.Tensor,
    rows: torch.Tensor,
    row_weights: torch.Tensor,
    z: torch.Tensor,
    segment_offsets: torch.Tensor,
    host_offsets: torch.Tensor,
    num_chunks: int,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weight_grad_scale: float,
    slots_per_pass: int,
    grad_rows: torch.Tensor,
    grad_row_weights: torch.Tensor,
    needs_weight_grads: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    return gradients_of_weights(gate_up, down, needs_weight_grads)


@torch.library.register_fake("torch_moe_ep::expert_mlp_weight_grads")
def _expert_mlp_weight_grads_fake(
    grad_y: torch.Tensor,
    rows: torch.Tensor,
    grad_z: torch.Tensor,
    activation: torch.Tensor,
    segment_offsets: torch.Tensor,
    host_offsets: torch.Tensor,
    num_chunks: int,
    weight_grad_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_experts = (segment_offsets.size(0) - 1) // num_chunks
    return (
        rows.new_empty((num_experts, grad_z.size(1), rows.size(1))),
        rows.new_empty((num_experts, rows.size(1), activation.size(1))),
    )


@torch.library.register_fake("torch_moe_ep::expert_mlp_backward_add")
def _expert_mlp_backward_add_fake(
    grad_y: torch.Tensor,
    rows: torch.Tensor,
    row_weights: torch.Tensor,
    z: torch.Tensor,
    expert_offsets: torch.Tensor,
    host_offsets: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weight_grad_scale: float,
    slots_per_pass: int,
    main_grad_gate_up: torch.Tensor,
    main_grad_down: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.new_empty(rows.shape), row_weights.new_empty(row_weights.shape)
